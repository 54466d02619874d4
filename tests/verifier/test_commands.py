"""What the options of ``verifier run`` mean."""

import json

import pytest
from click.testing import CliRunner

from trueweight.protos.errors import InvalidRequest
from trueweight.verifier import calibration_commands
from trueweight.verifier.commands import policy_of, run, verifier
from trueweight.verifier.epochs import RatePolicy

NEEDED = [
    "--market",
    "m",
    "--keys",
    "k",
    "--data",
    "d",
    "--ledger",
    "l",
    "--reference",
    "h:1",
    "--reference-cert",
    "c",
]


def options(*more):
    return run.make_context("run", [*NEEDED, *more]).params


def test_what_nobody_names_is_the_policy_of_the_code():
    assert policy_of(options()) == RatePolicy()


def test_every_number_of_the_policy_has_a_flag():
    flags = {
        "--newcomer-tokens": "7",
        "--floor": "0.03",
        "--epoch-s": "30",
        "--audit-deadline-s": "20",
        "--patience-s": "10",
        "--full-charge": "0.5",
        "--duplicates": "0.25",
    }
    found = policy_of(options(*(part for flag in flags.items() for part in flag)))
    assert found == RatePolicy(7, 30_000, 30_000, 20_000, 10_000, 500_000_000, 250_000)


def test_a_charge_is_an_amount_of_credits():
    with pytest.raises(InvalidRequest):
        policy_of(options("--full-charge", "much"))


async def test_calibrations_of_the_log_are_shown_by_verifier(world, kit, monkeypatch, tmp_path):
    app = world.app()
    await kit.drive(world, app, app.service.ready.is_set)
    view = app.service.view
    [logged] = view.calibrations.all()
    monkeypatch.setattr(calibration_commands, "read_log", lambda options: view)
    ask = ["calibrations", "--market", str(tmp_path / "market.json")]
    found = json.loads(CliRunner().invoke(verifier, [*ask, "--json"]).output)
    assert [(c["verifier_id"], c["log_index"]) for c in found] == [
        (logged.verifier_id, logged.index)
    ]
    assert found[0]["entries"][0]["pairs"] == [], "not stated"
    shown = CliRunner().invoke(verifier, ask, env={"COLUMNS": "200"}).output
    assert logged.verifier_id in shown and f"after leaf {logged.index}" in shown
    nobody = CliRunner().invoke(verifier, [*ask, "--verifier-id", "nobody"]).output
    assert "no calibration" in nobody
