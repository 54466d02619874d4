"""Tables are readable wherever they are printed."""

from __future__ import annotations

import re

import pytest

from trueweight.runtime.cli import print_table

COLUMNS = ["node", "state", "wealth", "rate", "receipts", "audits", "tokens"]
ROWS = [
    ["yl3by6ium7we7kj6yn6oa7zb6kxa2pqr", "clear", 1.0, "100 %", 12, 12, 480 + i] for i in (0, 1)
]


def test_into_a_pipe_nothing_is_folded(capsys):
    print_table("Nodes", [*COLUMNS, "words"], [[*row, "x" * 120] for row in ROWS])
    shown = capsys.readouterr().out
    assert shown.count(ROWS[0][0]) == 2
    assert "x" * 120 in shown


@pytest.mark.parametrize("width", [60, 200])
def test_a_wide_table_in_a_narrow_terminal_becomes_records(monkeypatch, capsys, width):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    print_table("Nodes", COLUMNS, ROWS)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert shown.count(ROWS[0][0]) == 2
    assert ("wealth    1.0" in shown) == (width == 60)
    assert max(len(line) for line in shown.splitlines()) <= width
