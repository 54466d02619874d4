"""What people see: balances, statements, exports, fsck, straight from the database."""

from __future__ import annotations

import asyncio
import csv
import json

import pytest
from click.testing import CliRunner

from trueweight.ledger.commands import ledger as commands
from trueweight.protos.money import parse_credits
from trueweight.simulation.ledger_crash import make_load, run_load


@pytest.fixture(scope="module")
def books(databases, migrated):
    url = databases.copy(migrated)
    asyncio.run(run_load(make_load(), url, lambda _: None))
    return url


def run(*arguments):
    result = CliRunner().invoke(commands, list(arguments))
    return result.exit_code, result.output


def test_balances_sum_to_zero_and_statements_end_at_them(books):
    code, output = run("balance", "--database", books, "--json")
    assert code == 0
    rows = {row["account"]: row for row in json.loads(output)}
    assert sum(int(row["available"]) for row in rows.values()) == 0
    for account, row in rows.items():
        _, output = run("statement", account, "--database", books, "--json", "--limit", "1000")
        last = json.loads(output)[-1]
        text = last["available"].lstrip("-")
        sign = -1 if last["available"].startswith("-") else 1
        assert sign * parse_credits(text) == int(row["available"])


def test_fsck_says_clean_with_exit_status_zero(books):
    code, output = run("fsck", "--database", books, "--json")
    assert (code, json.loads(output)["clean"]) == (0, True)


def test_exports_have_every_transfer_and_balance(books, tmp_path):
    code, _ = run("export", "--database", books, "--out", str(tmp_path / "t.csv"))
    assert code == 0
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert [int(r["sequence"]) for r in rows] == list(range(1, len(rows) + 1))
    code, _ = run(
        "export", "--database", books, "--format", "ledger", "--out", str(tmp_path / "t.txt")
    )
    text = (tmp_path / "t.txt").read_text()
    postings = [line.split() for line in text.splitlines() if line.startswith("    ")]
    assert len(postings) % 2 == 0
    for credit, debit in zip(postings[::2], postings[1::2], strict=True):
        assert debit[1] == f"-{credit[1]}"


def test_missing_books_are_named(tmp_path):
    result = CliRunner().invoke(commands, ["balance", "--database", f"{tmp_path}/none.db"])
    assert "there are no books" in str(result.exception)
