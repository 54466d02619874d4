"""What people see: balances, statements, exports, fsck, straight from the database."""

from __future__ import annotations

import asyncio
import csv
import json
import re

import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from trueweight.ledger import reports, statements
from trueweight.ledger.commands import ledger as commands
from trueweight.ledger.reader import Reader
from trueweight.ledger.schema import make_engine, normal_url
from trueweight.ledger.statements import transfers_sql
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
    plan = plan_of(books, account)
    assert {"transfer_debit", "transfer_credit"} <= set(re.findall(r"transfer_\w+", plan))


def plan_of(books, account):
    """How the database would read a page of an account."""
    engine = make_engine(normal_url(books))
    sqlite = engine.dialect.name == "sqlite"
    explain = "EXPLAIN QUERY PLAN" if sqlite else "EXPLAIN"
    with engine.connect() as connection:
        if not sqlite:  # the books are small enough for the planner to like scans
            connection.execute(sa.text("SET enable_seqscan = off"))
            connection.execute(sa.text("SET enable_bitmapscan = off"))
        rows = connection.execute(
            sa.text(f"{explain} {transfers_sql(account)}"),
            {"number": 7, "after": 5, "end": 10, "limit": 10},
        ).fetchall()
    engine.dispose()
    return "\n".join(" ".join(map(str, row)) for row in rows)


@pytest.fixture
def reader(books):
    made = Reader(make_engine(normal_url(books)))
    yield made
    made.close()


BUSY = ["clearing:c0", "fee:market", "pool:market"]


@pytest.mark.parametrize("account", BUSY)
def test_attack_a_page_of_a_busy_account_looks_at_a_bounded_part_of_the_book(books, account):
    plan = plan_of(books, account)
    # By the primary key, from both ends.
    if books.startswith("sqlite"):
        assert "INTEGER PRIMARY KEY (rowid>? AND rowid<?)" in plan
    else:
        condition = r"Index Cond: \(\(sequence > .*\) AND \(sequence <= .*\)\)"
        assert re.search(r"transfer_pkey .*\s+" + condition, plan), plan


@pytest.mark.parametrize("account", ["clearing:nobody", "client:nobody", "fee:nobody"])
def test_attack_an_account_that_does_not_exist_costs_nobody_a_scan(reader, account, monkeypatch):
    asked = []
    real = reader._rows
    monkeypatch.setattr(reader, "_rows", lambda *a: asked.append(str(a[0])) or real(*a))
    page = reader.transfers(account, 0, 1000)
    assert (list(page.transfers), page.more, page.next_sequence) == ([], False, 0)
    assert not any("FROM transfer t" in sql for sql in asked)


def test_pages_of_a_busy_account_may_be_empty_and_lead_to_its_end(books, reader, monkeypatch):
    whole = reader.transfers("", 0, 1000).transfers
    monkeypatch.setattr(statements, "MAX_SPAN", 2)
    accounts = {a for t in whole for a in (t.debit_account, t.credit_account)}
    busy = {a for a in accounts if statements.is_busy(a)}
    assert len(busy) > 3
    for account in busy:
        sides = [t.sequence for t in whole if account in {t.debit_account, t.credit_account}]
        found, after, empty, more = [], 0, 0, True
        while more:
            page = reader.transfers(account, after, 1000)
            assert all(after < t.sequence <= after + 2 for t in page.transfers)
            found += [t.sequence for t in page.transfers]
            empty += not page.transfers
            assert page.next_sequence > after or not page.more
            after, more = page.next_sequence, page.more
        assert found == sides
        assert empty or account in {"fee:market", "pool:market"}
        assert [t["sequence"] for t in reports.statement(books, account, 1000)] == sides
        for end in (whole[-1].sequence, 2**64 - 1):
            beyond = reader.transfers(account, end, 1000)
            assert (list(beyond.transfers), beyond.next_sequence, beyond.more) == ([], end, False)


def test_a_full_page_says_that_there_may_be_more(reader):
    whole = reader.transfers("", 0, 1000)
    assert not whole.more
    last = whole.transfers[-1].sequence
    page = reader.transfers("", 0, last - 1)
    assert (page.more, page.next_sequence) == (True, last - 1)
    page = reader.transfers("", last - 1, 1000)
    assert (len(page.transfers), page.more, page.next_sequence) == (1, False, last)


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
