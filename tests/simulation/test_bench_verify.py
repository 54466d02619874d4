"""The tables of make bench-verify: from kept margins to rows, pictures and the last line."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from trueweight.simulation import bench_power, charts, honest_run, structural_cheats
from trueweight.simulation.bench_report import plain
from trueweight.simulation.calibrate import FLOAT32, NATIVE, VARIANTS
from trueweight.simulation.calibration_traffic import Prompts
from trueweight.simulation.cheats import SERVED
from trueweight.simulation.demo_files import DEMO_MODEL as MODEL
from trueweight.simulation.margin_store import MarginStore, Ragged, SliceKey
from trueweight.simulation.measuring import TRANSFORMERS, Measurement, Traffic
from trueweight.verifier.calibration_file import read_measured

CALIBRATION = MODEL.with_name(f"{MODEL.name}.calibration.json")
MEANS = {"honest": 0.0001, "4-bit weights": 0.03}


def rows_of(mean, rng):
    """Requests whose tokens are mostly exact and now and then off."""
    return [
        np.where(rng.random(n) < 0.1, mean * 10 * 10**9, 0).astype(int).tolist()
        for n in rng.integers(1, 100, 80)
    ]


def keep(store, source, traffic, rows, references=(TRANSFORMERS,)):
    key = SliceKey(source.name, source.detail, traffic, 0)
    store.keep_answers(key, Ragged.of(rows))
    for reference in references:
        store.keep_margins(key, reference, Ragged.of(rows))


@pytest.fixture
def bench(tmp_path, monkeypatch):
    traffic = Traffic(Prompts(((1, 2),), (0,)), 2048, bench_power.HELD_OUT_SEED)
    monkeypatch.setattr(Traffic, "of_model", lambda *_: traffic)
    found = bench_power.PowerBench(MODEL, CALIBRATION, tmp_path / "pools", 0)
    rng = np.random.default_rng(1)
    for served in SERVED:
        if served.source.name in MEANS:
            keep(found.store, served.source, "plain", rows_of(MEANS[served.source.name], rng))
    return found


def test_rows_of_the_pools_that_are_there(bench):
    shown = {s.row.name: s for s in bench.rows(10)}
    assert set(shown) == {
        "honest, plain",
        "4-bit weights",
        "4-bit weights, then a prefill with the true ones (the same text)",
        "4-bit weights, on 20 % of requests",
        "4-bit weights, ten one-token requests each",
        "4-bit weights, after 5,000 honest requests",
    }
    honest, cheat = shown["honest, plain"].found, shown["4-bit weights"].found
    assert honest.convicted == 0 and math.isinf(honest.median_tokens)
    assert cheat.convicted == 10 and cheat.median_tokens < 3000
    mixed = shown["4-bit weights, on 20 % of requests"].found
    assert mixed.convicted == 10 and mixed.median_tokens > 2 * cheat.median_tokens
    bench_power.show(list(shown.values()), 10)
    line = json.dumps(plain(bench_power.as_figures(list(shown.values()))), allow_nan=False)
    assert json.loads(line)[0]["median_tokens"] is None


def test_pictures_of_power_and_roc(bench, tmp_path):
    pytest.importorskip("matplotlib")
    charts.write_all(tmp_path, bench.rows(5), bench.roc_pools())
    for name in ("roc.png", "power.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_area_under_a_roc_curve():
    assert charts.area(charts.roc([0.0] * 5, [1.0] * 5)) == 1.0
    assert charts.area(charts.roc([1.0] * 5, [0.0] * 5)) == 0.0
    assert charts.area(charts.roc([1.0, 2.0], [1.0, 2.0])) == 0.5


def test_honest_rows_by_pair_and_by_kind_of_traffic(tmp_path):
    traffic = Traffic(Prompts(((1, 2),), (0,)), 2048, 1)
    store = MarginStore(tmp_path, b"w" * 32, 1)
    rng = np.random.default_rng(2)
    for kind, mean in (("plain", 0.0001), ("hostile plain", 0.05)):
        keep(store, VARIANTS[0], kind, rows_of(mean, rng))
    entries = {e.parameter_class: e for e in read_measured(CALIBRATION).entries}
    run = honest_run.HonestRun(
        "m", Measurement(tmp_path, store, traffic, 0), entries, ("plain", "hostile plain")
    )
    ordinary, hostile = run.rows(5)
    assert (ordinary.traffic, ordinary.convicted) == ("every class", 0)
    assert ordinary.of_null < 1 and ordinary.largest_wealth < 10
    assert (hostile.traffic, hostile.convicted) == ("hostile parameters", 5)
    assert hostile.of_null > 10
    honest_run.show([ordinary, hostile])


async def test_structural_cheats_are_touched_and_never_paid(monkeypatch):
    monkeypatch.setattr(structural_cheats, "REQUESTS", 8)
    found = {row.name: row for row in await structural_cheats.measure_all()}
    assert {name: row.refused_by for name, row in found.items()} == {
        "truncation": "length",
        "padding": "after_eos",
    }
    assert all(row.touched >= 3 and row.paid == 0 for row in found.values())


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_wide_models_are_served_in_every_way_that_the_machine_can(has_bfloat16):
    bulk, others = honest_run.wide_variants(has_bfloat16=has_bfloat16)
    kinds = {v.name for v in (*bulk, *others)}
    assert (NATIVE in kinds) == has_bfloat16 and {FLOAT32, "transformers, bfloat16"} <= kinds
    assert [v.detail for v in others] == [v.detail for v in VARIANTS if v.tokens_share < 1]
    assert has_bfloat16 or all(
        v.options.dtype == "float32" for v in (*bulk, *others) if not v.transformers_dtype
    )


def test_products_of_transformers_in_bfloat16_add_up_in_float32():
    torch = pytest.importorskip("torch")
    from trueweight.simulation.hf_decoder import _add_up_in_float32

    torch.manual_seed(1)
    layers = torch.nn.Sequential(torch.nn.Linear(512, 64), torch.nn.Linear(64, 8, bias=False))
    layers = layers.to(torch.bfloat16)
    rows = torch.randn(5, 512).to(torch.bfloat16)
    first = torch.nn.functional.linear(rows.double(), *(p.double() for p in layers[0].parameters()))
    _add_up_in_float32(layers)
    found = layers[0](rows)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, first.float().to(torch.bfloat16))
    assert layers(rows).shape == (5, 8)
