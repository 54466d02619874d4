"""Long measurements: what is kept, what a second run adds, what a time limit leaves."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest
from click.testing import CliRunner

from trueweight.node.synthetic import SyntheticEngine
from trueweight.node.synthetic_model import ModelShape, SyntheticModel
from trueweight.node.vllm.options import VllmOptions
from trueweight.protos.errors import InvalidRequest
from trueweight.simulation import calibrate as calibration
from trueweight.simulation import measuring
from trueweight.simulation.calibration_traffic import Prompts
from trueweight.simulation.cheats import SERVED
from trueweight.simulation.margin_store import MarginStore, Ragged, SliceKey
from trueweight.simulation.measuring import TRANSFORMERS, Measurement, Source, Traffic
from trueweight.verifier.calibration import PairSample
from trueweight.verifier.calibration_file import read_measured

SHAPE = ModelShape(vocabulary_size=512, mean_output_tokens=30)
PROMPTS = Prompts(heads=((1, 2, 3), (4, 5)), stop_ids=(0,))
NATIVE = Source("native", "together", VllmOptions(max_running=8), slice_requests=20)
OTHER = Source("other", "alone", VllmOptions(max_running=1), slice_requests=5)


class Bench:
    """A measurement with synthetic engines that round differently."""

    def __init__(self, directory, seed=1):
        self.starts = 0
        self.store = MarginStore(directory, b"w" * 32, seed)
        self.traffic = Traffic(PROMPTS, 2048, seed)
        self.directory = directory

    def measurement(self, minutes=1e6):
        return Measurement(
            self.directory, self.store, self.traffic, minutes, make_engine=self._engine
        )

    def _engine(self, _, options):
        self.starts += 1
        return SyntheticEngine(
            SyntheticModel(SHAPE), noise=0.01, noise_seed=self.starts, max_running=8
        )


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path / "work")


def test_rows_of_any_length_survive_the_disk(tmp_path):
    store = MarginStore(tmp_path, b"w" * 32, 1)
    key = SliceKey("vllm, float32", "64 at once", "low entropy", 0)
    for rows in ([[1, 2], [], [10**9]], [[]], []):
        store.keep_answers(key, Ragged.of(rows))
        found = store.answers(key)
        assert found.rows() == rows and found.sums().tolist() == [sum(r) for r in rows]
    assert store.margins(key, "r") is None
    assert list(store.slices("vllm, float32", "64 at once", "low entropy")) == [key]


@pytest.mark.parametrize("weights,seed", [(b"x" * 32, 1), (b"w" * 32, 2)])
def test_a_store_is_about_one_model_and_one_seed(tmp_path, weights, seed):
    MarginStore(tmp_path, b"w" * 32, 1)
    with pytest.raises(InvalidRequest, match="another model or seed"):
        MarginStore(tmp_path, weights, seed)


def test_no_two_slices_share_a_job():
    traffic = Traffic(PROMPTS, 2048, 1)
    keys = [SliceKey(s, d, "plain", n) for s in "ab" for d in "cd" for n in (0, 1)]
    seeds = [job.seed for key in keys for job in traffic.jobs(key, 30)]
    assert len(set(seeds)) == len(seeds)
    assert traffic.jobs(keys[0], 30) == Traffic(PROMPTS, 2048, 1).jobs(keys[0], 30)


async def test_a_second_run_adds_only_what_is_missing(bench):
    await bench.measurement().run(NATIVE, {"plain": 300}, judged=(NATIVE,))
    found = bench.measurement()
    before = found.tokens(NATIVE, "plain")
    assert before >= 300 and bench.starts == 1
    rows = found.sample([NATIVE], "plain", "native").requests
    assert sum(map(len, rows)) == before
    await bench.measurement().run(NATIVE, {"plain": 300}, judged=(NATIVE,))
    assert bench.starts == 1, "nothing was missing"
    await bench.measurement().run(NATIVE, {"plain": before + 1}, judged=(NATIVE,))
    assert bench.starts == 2
    assert found.sample([NATIVE], "plain", "native").requests[: len(rows)] == rows


async def test_a_run_without_time_starts_nothing_and_says_what_is_missing(bench):
    measurement = bench.measurement(minutes=0)
    await measurement.run(NATIVE, {"plain": 300})
    assert bench.starts == 0
    calibrator = calibration.Calibrator(measurement, (NATIVE,), {"plain": 300})
    assert calibrator.missing() == ["native together: answers (plain)"]


async def test_every_judge_scores_what_every_kind_of_node_answered(bench, monkeypatch):
    monkeypatch.setattr(calibration, "JUDGES", ("other", "native"))
    scored = []
    measurement = bench.measurement()
    monkeypatch.setattr(measurement, "judge_by_transformers", lambda *a: scored.append(a))
    calibrator = calibration.Calibrator(measurement, (NATIVE, OTHER), {"plain": 200, "greedy": 200})
    await calibrator.run()
    assert len(scored) == 1 and bench.starts == 3
    assert all(TRANSFORMERS in line for line in calibrator.missing())
    samples = {s.pair: s for s in calibrator.samples("plain") if TRANSFORMERS not in s.pair}
    assert set(samples) == {f"{a} / {b}" for a in ("native", "other") for b in ("native", "other")}
    for sample in samples.values():
        assert sample.tokens >= 200
        assert np.mean([x for r in sample.requests for x in r]) < 0.01 * 10**9


class Samples:
    """A calibrator for which everything was measured before."""

    def __init__(self, *_):
        pass

    async def run(self):
        pass

    def missing(self):
        return []

    def samples(self, name):
        return [PairSample(f"{name} {n}", ((0,) * 100,) * 400) for n in (1, 2)]


def test_a_file_made_class_by_class_states_the_pairs_of_all(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "Calibrator", Samples)
    monkeypatch.setattr(calibration, "weights_of", lambda _: b"w" * 32)
    monkeypatch.setattr(Traffic, "of_model", lambda *_: None)
    path = tmp_path / "c.json"
    ask = ["--model", str(tmp_path), "--out", str(path), "--class"]
    shown = CliRunner().invoke(calibration.calibrate, [*ask, "greedy"])
    assert shown.exit_code == 0 and "greedy 1" in shown.output and "0.999875" in shown.output
    found = CliRunner().invoke(calibration.calibrate, [*ask, "plain", "--json"])
    [entry] = json.loads(found.output)["entries"]
    assert [(p["pair"], p["tokens"]) for p in entry["pairs"]] == [
        ("plain 1", 40_000),
        ("plain 2", 40_000),
    ]
    entries = {e.parameter_class: e for e in read_measured(path).entries}
    assert {name: [p.pair for p in e.pairs] for name, e in entries.items()} == {
        "plain": ["plain 1", "plain 2"],
        "greedy": ["greedy 1", "greedy 2"],
    }
    # As much as if both had been measured at once.
    assert {e.confidence_ppm for e in entries.values()} == {999_875}
    assert {p.error_ppb for e in entries.values() for p in e.pairs} <= {62_500, 62_501}


def test_only_other_weights_and_other_requests_can_be_served_without_an_engine():
    served = {s.source.name: measuring._changed_request(s.source) for s in SERVED}
    assert served["early end"] is None
    (asked,) = Traffic(PROMPTS, 2048, 1).jobs(SliceKey("s", "d", "plain", 0), 1)
    assert served["4-bit weights"](asked) == served["honest"](asked) == asked
    assert served["wrong seed"](asked).seed != asked.seed
    assert served["T = 0.95 for 1"](asked).sampling.temperature < asked.sampling.temperature


async def test_an_interrupted_slice_is_not_kept(bench, monkeypatch):
    measurement = bench.measurement()
    monkeypatch.setattr(bench.store, "keep_answers", lambda *_: (_ for _ in ()).throw(KeyError))
    with pytest.raises(KeyError):
        await measurement.run(NATIVE, {"plain": 300})
    assert measurement.tokens(NATIVE, "plain") == 0
    await asyncio.sleep(0)
