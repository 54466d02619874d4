"""What calibrations rest on: pairs, their share of the error, files, what the commands show."""

import functools
import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from trueweight.protos.calibrations import MAX_PAIRS, fault_of, is_usable, read_calibration
from trueweight.protos.errors import InvalidRequest
from trueweight.protos.evidence import NANO
from trueweight.protos.sampling_parameters import CALIBRATED_CLASSES
from trueweight.protos.v1.audit_pb2 import Calibration, CalibrationEntry, CalibrationPair
from trueweight.verifier.calibration import PairSample, calibrate_class, measure
from trueweight.verifier.calibration_file import Measured, read_measured, write_measured
from trueweight.verifier.commands import verifier

TOP = Path(__file__).resolve().parents[2]
SHIPPED = TOP / "simulation" / "models" / "tw-demo.calibration.json"
QUIET = ((0,) * 1000,) * 200
# Nineteen of twenty differences are small; what counts are the others, one token in 500.
NOISY = (((10**7,) * 38 + (25 * 10**7,) * 2) + (0,) * 960,) * 200


@functools.cache
def _bytes_of_three():
    samples = [PairSample("quiet", QUIET), PairSample("noisy", NOISY), PairSample("still", QUIET)]
    return calibrate_class("top_p", samples).SerializeToString()


def entry_of_three():
    return CalibrationEntry.FromString(_bytes_of_three())


def run(*words, **settings):
    return CliRunner().invoke(verifier, ["calibrations", *map(str, words)], **settings)


def test_every_pair_is_stated_with_its_tokens_and_its_share_of_the_error():
    entry = entry_of_three()
    assert [p.pair for p in entry.pairs] == ["quiet", "noisy", "still"]
    assert [(p.requests, p.tokens) for p in entry.pairs] == [(200, 200_000)] * 3
    assert (entry.requests, entry.tokens) == (600, 600_000)
    assert entry.pairs[1].mean_nano == entry.mean_nano == 500_000
    assert entry.upper_bound_nano == max(p.upper_bound_nano for p in entry.pairs)
    assert entry.mu0_nano == 2 * entry.upper_bound_nano and is_usable(entry)


@pytest.mark.parametrize("pairs", [1, 2, 3, 4, 6, 7])
def test_all_pairs_of_all_classes_err_together_once_in_a_thousand(pairs):
    # Whatever is measured together: a file made class by class has the same shares.
    samples = [PairSample(f"{n}", ((0,) * 10,) * 5) for n in range(pairs)]
    entry = calibrate_class("plain", samples)
    assert entry.confidence_ppm == 999_875
    alone = measure(samples[0], 0, 1 - 1e-3 / 8 / pairs)
    for pair in entry.pairs:
        assert pair.error_ppb == -(-(10**6) // (8 * pairs)), "rounded up"
        assert pair.upper_bound_nano == math.ceil(alone.bound.upper * NANO)
    shares = sum(p.error_ppb for p in entry.pairs)
    assert shares * len(CALIBRATED_CLASSES) <= 10**6 + 8 * pairs


@pytest.mark.parametrize("names", [[], ["a", "a"]])
def test_a_class_has_pairs_and_each_once(names):
    with pytest.raises(ValueError, match="at least one pair, each once"):
        calibrate_class("plain", [PairSample(name, QUIET) for name in names])


@pytest.mark.parametrize(
    "field,value,fault",
    [
        ("pair", "", "a name is"),
        ("pair", "x" * 201, "a name is"),
        ("pair", "é" * 101, "a name is"),
        ("pair", "red\x1b[31m", "a name is"),
        ("pair", "quiet", "twice"),
        ("pair", "other", "not among"),
        ("requests", 0, "out of range"),
        ("requests", 199, "not the sums"),
        ("tokens", 1, "out of range"),
        ("tokens", 2**64 - 1, "not the sums"),
        ("upper_bound_nano", 10**9 + 1, "out of range"),
        ("upper_bound_nano", 600_000, "not the largest"),
        ("upper_bound_nano", 10**9, "not the largest"),
        ("mean_nano", 3, "not those of its worst"),
        ("error_ppb", 0, "out of range"),
        ("error_ppb", 10**9, "out of range"),
        ("error_ppb", 50_000, "add up"),
    ],
)
def test_attack_pairs_that_do_not_come_to_their_entry_are_no_calibration(field, value, fault):
    entry = entry_of_three()
    setattr(entry.pairs[1], field, value)
    assert fault in fault_of(entry)
    kept = read_calibration(Calibration(entries=[entry]), b"d", 1)
    assert not kept.entries, "nothing can be judged by it"


@pytest.mark.parametrize("field", ["requests", "tokens", "mean_nano", "upper_bound_nano"])
def test_attack_an_entry_says_less_than_its_pairs(field):
    entry = entry_of_three()
    setattr(entry, field, getattr(entry, field) - 1)
    assert not is_usable(entry)


def test_attack_a_calibration_of_very_many_pairs_is_none():
    entry = entry_of_three()
    for number in range(MAX_PAIRS - 2):
        entry.pairs.append(CalibrationPair(pair=str(number), requests=1, tokens=1, error_ppb=1))
    entry.requests, entry.tokens = entry.requests + 62, entry.tokens + 62
    assert "more than 64" in fault_of(entry)
    del entry.pairs[-1]
    entry.requests, entry.tokens = entry.requests - 1, entry.tokens - 1
    assert is_usable(entry)


def test_entries_from_before_pairs_were_stated_stay_usable(kit):
    assert not kit.entry().pairs and is_usable(kit.entry())


def test_the_shipped_calibration_is_of_all_classes_and_holds_what_it_states():
    entries = read_measured(SHIPPED).entries
    assert sorted(e.parameter_class for e in entries) == sorted(CALIBRATED_CLASSES)
    for entry in entries:
        if entry.pairs:
            holds(entry)
            assert entry.confidence_ppm == 999_875
        else:
            assert entry.confidence_ppm == 999_000, "from before pairs were stated"


def holds(entry):
    """What whoever reads a usable entry with pairs may rely on."""
    pairs = entry.pairs
    assert len(pairs) <= 64 and entry.worst_pair in {p.pair for p in pairs}
    assert len({p.pair for p in pairs}) == len(pairs)
    assert all(p.pair.isprintable() and len(p.pair.encode()) <= 200 for p in pairs)
    assert entry.tokens == sum(p.tokens for p in pairs)
    assert entry.requests == sum(p.requests for p in pairs)
    assert 2 * max(p.upper_bound_nano for p in pairs) <= entry.mu0_nano < NANO


@given(st.binary(max_size=300))
def test_attack_hostile_bytes_of_an_entry_never_pass_as_what_they_are_not(data):
    entry = entry_of_three()
    try:
        entry.MergeFromString(data)
    except DecodeError:
        return
    if is_usable(entry):
        holds(entry)


numbers = st.sampled_from([0, 1, 2, 200, 10**6, 10**9, 10**9 + 1, 2**32 - 1])
hostile_pairs = st.builds(
    CalibrationPair,
    pair=st.text(st.characters(codec="utf-8"), max_size=3),
    requests=numbers,
    tokens=numbers,
    mean_nano=numbers,
    upper_bound_nano=numbers,
    error_ppb=numbers,
)


@given(st.lists(hostile_pairs, max_size=4), st.booleans(), numbers)
def test_attack_only_pairs_that_agree_with_their_entry_pass(pairs, agrees, more):
    entry = entry_of_three()
    entry.pairs.extend(pairs)
    if agrees:
        entry.requests = min(2**64 - 1, sum(p.requests for p in entry.pairs))
        entry.tokens = min(2**64 - 1, sum(p.tokens for p in entry.pairs))
        entry.confidence_ppm = 0
    else:
        entry.tokens += more
    if is_usable(entry):
        holds(entry)


def test_a_file_round_trips_and_damage_is_named(tmp_path, kit):
    measured = Measured(b"w" * 32, 3, "here", (kit.entry(), kit.entry("greedy"), entry_of_three()))
    path = tmp_path / "c.json"
    write_measured(path, measured)
    assert read_measured(path) == measured
    assert read_measured(path).statement("m", "v", b"d", 1).entries[2] == entry_of_three()
    document = json.loads(path.read_text())
    for key in document:
        broken = {k: v for k, v in document.items() if k != key}
        path.write_text(json.dumps(broken))
        with pytest.raises(InvalidRequest):
            read_measured(path)
    with pytest.raises(InvalidRequest, match="no calibration file"):
        read_measured(tmp_path / "missing.json")
    with pytest.raises(InvalidRequest, match="cannot read"):
        read_measured(tmp_path)


def document(**changes):
    entries = [json.loads(json.dumps(e)) for e in _entries_as_json()]
    return {
        "format": "trueweight-calibration-1",
        "weights_sha256": "77" * 32,
        "version": 3,
        "clip_micro_logit": 500_000,
        "provenance": "here",
        "entries": entries,
        **changes,
    }


@functools.cache
def _entries_as_json():
    return json.loads(SHIPPED.read_text())["entries"]


@pytest.mark.parametrize(
    "changes,fault",
    [
        ({"weights_sha256": "77"}, "no SHA-256"),
        ({"weights_sha256": 7}, "not a calibration file"),
        ({"version": 0}, "a version is"),
        ({"version": -1}, "a version is"),
        ({"version": 2**32}, "a version is"),
        ({"version": float("inf")}, "not a calibration file"),
        ({"clip_micro_logit": 1}, "another format or clip"),
        ({"provenance": "red\x1b[31m"}, "provenance"),
        ({"provenance": "\ud800"}, "provenance"),
        ({"provenance": "x" * 200_000}, "more than 196608 bytes"),
        ({"entries": []}, "1 to 256 entries"),
        ({"entries": [_entries_as_json()[0]] * 2}, "another class"),
        ({"entries": [{**_entries_as_json()[0], "parameter_class": "\x1b"}]}, "a class is"),
        ({"entries": [{**_entries_as_json()[0], "mu0_nano": 1}]}, "out of range"),
        ({"entries": [{**_entries_as_json()[0], "pairs": [{"pair": "p"}]}]}, "pair 'p': a number"),
        ({"entries": [{**_entries_as_json()[0], "pairs": "all"}]}, "not a calibration file"),
        ({"entries": 5}, "not a calibration file"),
    ],
)
def test_attack_hostile_files_are_refused_by_name(tmp_path, changes, fault):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(document()))
    assert len(read_measured(path).entries) == 8
    path.write_text(json.dumps(document(**changes)))
    with pytest.raises(InvalidRequest, match=fault):
        read_measured(path)


def test_attack_files_too_large_or_nested_too_deep_are_refused(tmp_path):
    path = tmp_path / "c.json"
    for text, fault in (("[" * 900_000, "nested too deep"), (" " * 1_100_000, "too large")):
        path.write_text(text)
        with pytest.raises(InvalidRequest, match=fault):
            read_measured(path)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(st.sampled_from(sorted(document())), values)
def test_attack_no_value_of_a_file_ends_in_anything_but_a_refusal(tmp_path_factory, key, value):
    path = tmp_path_factory.getbasetemp() / "hostile.json"
    path.write_text(json.dumps(document(**{key: value})))
    try:
        measured = read_measured(path)
    except InvalidRequest:
        return
    measured.statement("m", "v", b"d" * 32, 1).SerializeToString()


def test_calibrations_are_shown_from_a_file(tmp_path, kit):
    path = tmp_path / "c.json"
    write_measured(path, Measured(b"w" * 32, 3, "by a test", (entry_of_three(), kit.entry())))
    shown = run(path)
    assert shown.exit_code == 0 and "version 3" in shown.output and "by a test" in shown.output
    rows = {line.split("│")[2].strip(): line for line in shown.output.splitlines() if "│" in line}
    assert "yes" in rows["noisy"] and "yes" not in rows["quiet"] and "0.000042" in rows["quiet"]
    assert rows["test"].count("not stated") == 3, "only the worst pair is known"
    facts = json.loads(run(path, "--json").output)
    assert facts["version"] == 3 and facts["weights_sha256"] == (b"w" * 32).hex()
    top_p, plain = facts["entries"]
    assert [p["tokens"] for p in top_p["pairs"]] == [200_000] * 3 and plain["pairs"] == []
    assert top_p["pairs"][1]["upper"] == top_p["upper"] == top_p["mu0"] / 2
    assert top_p["confidence"] == 0.999875 and plain["worst_pair"] == "test"


def test_the_shipped_calibration_is_shown_as_what_it_is():
    shown, entries = run(SHIPPED).output, read_measured(SHIPPED).entries
    for entry in entries:
        assert f"{entry.confidence_ppm / 1e6:.6f}" in shown
        assert all(pair.pair in shown for pair in entry.pairs)
    assert shown.count("not stated") == 3 * sum(1 for e in entries if not e.pairs)


def test_attack_names_are_shown_as_they_are(tmp_path, kit):
    entry = kit.entry("[/x][red]:smile:")
    entry.worst_pair = "clear\x1b[2J"
    path = tmp_path / "c.json"
    write_measured(path, Measured(b"w" * 32, 3, "[/red]", (entry,)))
    shown = run(path)
    assert shown.exit_code == 0 and "\x1b" not in shown.output
    assert "[/x][red]:smile:" in shown.output and "clear\\x1b[2J" in shown.output


def test_what_cannot_be_shown_says_what_to_do(tmp_path):
    nothing = run(env={"TRUEWEIGHT_MARKET": ""})
    assert nothing.exit_code == 2 and "--market" in nothing.output
    missing = run(tmp_path / "none.json")
    assert isinstance(missing.exception, InvalidRequest) and "calibrate" in missing.exception.hint
