"""What people see: balances, statements, exports, fsck, straight from the database."""

from __future__ import annotations

import asyncio
import csv
import json
import re

import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from trueweight.ledger.commands import ledger as commands
from trueweight.ledger.reader import Reader, transfers_sql
from trueweight.ledger.schema import make_engine, normal_url
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


def test_a_statement_has_every_transfer_of_its_account_whatever_its_reason(books):
    engine = make_engine(normal_url(books))
    reader = Reader(engine)
    whole = reader.transfers("", 0, 1000).transfers
    assert {"hold", "capture", "fee", "pool", "earning"} <= {t.reason for t in whole}
    accounts = {t.debit_account for t in whole} | {t.credit_account for t in whole}
    for account in accounts:
        found = reader.transfers(account, 0, 1000).transfers
        sides = [t for t in whole if account in {t.debit_account, t.credit_account}]
        assert [t.sequence for t in found] == [t.sequence for t in sides]
    reader.close()


@pytest.mark.parametrize("account", ["client:acme", "node-locked:n", "external:rail"])
def test_statements_are_read_by_index(books, account):
    engine = make_engine(normal_url(books))
    sqlite = engine.dialect.name == "sqlite"
    explain = "EXPLAIN QUERY PLAN" if sqlite else "EXPLAIN"
    with engine.connect() as connection:
        if not sqlite:  # the books are small enough for the planner to like scans
            connection.execute(sa.text("SET enable_seqscan = off"))
            connection.execute(sa.text("SET enable_bitmapscan = off"))
        rows = connection.execute(
            sa.text(f"{explain} {transfers_sql(account)}"),
            {"id": account, "after": 0, "limit": 10},
        ).fetchall()
    engine.dispose()
    plan = "\n".join(" ".join(map(str, row)) for row in rows)
    assert {"transfer_debit", "transfer_credit"} <= set(re.findall(r"transfer_\w+", plan))


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
