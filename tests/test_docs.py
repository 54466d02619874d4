"""Docs cannot rot: commands, flags, targets and links in them exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from trueweight.client.launcher import cli as main

TOP = Path(__file__).resolve().parent.parent
PAGES = sorted([TOP / "README.md", *(TOP / "docs").glob("*.md")])
COMMAND = re.compile(
    r"(?:^|[\s`/])trueweight ((?:[a-z][a-z-]*)(?: [a-z][a-z-]*)*)((?:[^\n`|]|\\\n)*)"
)
# Flags that mean the same in every command share one variable.
SHARED_TWINS = {
    "--market": "TRUEWEIGHT_MARKET",
    "--log-level": "TRUEWEIGHT_LOG_LEVEL",
    "--log-json": "TRUEWEIGHT_LOG_JSON",
    "--database": "TRUEWEIGHT_LEDGER_DATABASE",
    "--archive": "TRUEWEIGHT_LEDGER_ARCHIVE",
}
# Each run must say it: a left-over variable would answer for another payout.
NO_TWIN = {"--failed", "--paid"}


def leaves(command, path=()):
    """All commands that do something, with their words."""
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from leaves(command.get_command(context, name), (*path, name))
    else:
        yield path, command


ALL = dict(leaves(main))


@pytest.mark.parametrize("words", sorted(ALL), ids=" ".join)
def test_help_teaches_every_flag_with_its_environment_twin(words):
    result = CliRunner().invoke(main, [*words, "--help"], auto_envvar_prefix="TRUEWEIGHT")
    assert result.exit_code == 0, result.output
    command = ALL[words]
    assert command.help, f"{' '.join(words)} has no description"
    for parameter in command.params:
        if not isinstance(parameter, click.Option) or parameter.name == "help":
            continue
        assert parameter.help, f"{' '.join(words)} {parameter.opts} has no help"
        flag = max(parameter.opts, key=len)
        if flag in NO_TWIN:
            assert "TRUEWEIGHT_LEDGER_SETTLE_PAID" not in result.output
            continue
        name = "_".join(["TRUEWEIGHT", *words, flag.lstrip("-")]).replace("-", "_").upper()
        twin = SHARED_TWINS.get(flag, name)
        # Help texts are wrapped anywhere.
        assert f"envvar:{twin}" in "".join(result.output.split()), f"{flag} hides its twin {twin}"


def commands_in(page):
    for match in COMMAND.finditer(page.read_text()):
        yield match.group(1).split(), match.group(2)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_and_flags_in_the_docs_exist(page):
    for words, rest in commands_in(page):
        command, context = main, click.Context(main)
        for word in words:
            if not isinstance(command, click.Group):
                break
            found = command.get_command(context, word)
            assert found is not None, f"{page.name}: no such command: trueweight {' '.join(words)}"
            command = found
        flags = {name for p in command.params for name in (*p.opts, *p.secondary_opts)} | {"--help"}
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest):
            assert flag in flags, f"{page.name}: trueweight {' '.join(words)} has no {flag}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_make_targets_and_links_in_the_docs_exist(page):
    text = page.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (TOP / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE):
        assert target in targets, f"{page.name}: no make target {target}"
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in link:
            assert (page.parent / link).exists(), f"{page.name}: broken link {link}"


def test_every_documented_make_target_parses():
    targets = re.findall(r"^([a-z-]+):.*## ", (TOP / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "up", "down", "test"} <= set(targets)
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=TOP, check=True, capture_output=True, timeout=20)


def test_the_newcomer_finds_the_answer_in_forty_lines():
    head = "\n".join((TOP / "README.md").read_text().splitlines()[:40])
    for needed in ("make demo", "make up", "curl", "receipt verify", "make test", "make down"):
        assert needed in head
