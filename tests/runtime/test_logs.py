"""Logs: one line a message, and where and what kind of error it was, never foreign words."""

from __future__ import annotations

import json
import logging

import pytest

from trueweight.protos.errors import EngineError
from trueweight.runtime.logs import configure

PROMPT = "the prompt of a client"


@pytest.fixture
def restored():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def fail_with_words():
    try:
        raise KeyError(PROMPT)
    except KeyError as error:
        raise EngineError("the engine failed") from error


@pytest.mark.parametrize("as_json", [False, True])
def test_tracebacks_do_not_quote_foreign_errors(restored, capsys, as_json):
    configure("debug", as_json=as_json)
    try:
        fail_with_words()
    except EngineError:
        logging.getLogger("x").exception("a call failed")
    shown = capsys.readouterr().err
    assert PROMPT not in shown
    for kept in ("a call failed", "KeyError", "EngineError: the engine failed", "fail_with_words"):
        assert kept in shown
    if as_json:
        assert json.loads(shown)["level"] == "error"


@pytest.mark.parametrize("as_json", [False, True])
def test_no_message_can_forge_a_line_or_talk_to_the_terminal(restored, capsys, as_json):
    configure("info", as_json=as_json)
    logging.getLogger("x").info("%s", "a\n12:00:00 ERROR forged\r\x1b[31m\x85\u2028b")
    shown = capsys.readouterr().err
    assert len(shown.splitlines()) == 1
    assert "\x1b" not in shown
