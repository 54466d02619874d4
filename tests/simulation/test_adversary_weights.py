"""The cheats are what they say: the right number of levels, the rest of the directory untouched."""

from __future__ import annotations

from pathlib import Path

import pytest

from trueweight.simulation.adversary_weights import write_fp8, write_noisy, write_quantised
from trueweight.simulation.random_llama import TINY, write_random_llama

torch = pytest.importorskip("torch")
safe_open = pytest.importorskip("safetensors").safe_open


def tensors(directory: Path) -> dict:
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def honest(tmp_path_factory) -> Path:
    return write_random_llama(tmp_path_factory.mktemp("honest"), TINY)


def relative_error(honest: Path, cheat: Path, name: str = "model.layers.0.mlp.up_proj.weight"):
    original, changed = tensors(honest)[name].float(), tensors(cheat)[name].float()
    return float((changed - original).norm() / original.norm())


def test_int4_has_at_most_sixteen_levels_per_group(honest, tmp_path):
    cheat = write_quantised(honest, tmp_path / "int4", bits=4, group=32)
    matrix = tensors(cheat)["model.layers.1.self_attn.q_proj.weight"]
    assert max(len(group.unique()) for group in matrix.reshape(-1, 32)) <= 16
    assert 0.05 < relative_error(honest, cheat) < 0.15


def test_errors_grow_with_fewer_bits(honest, tmp_path):
    int8 = relative_error(honest, write_quantised(honest, tmp_path / "8", bits=8, group=0))
    fp8 = relative_error(honest, write_fp8(honest, tmp_path / "fp8"))
    noise = relative_error(honest, write_noisy(honest, tmp_path / "noise", relative=0.01))
    int4 = relative_error(honest, write_quantised(honest, tmp_path / "4", bits=4))
    assert 0.003 < int8 < 0.015 < fp8 < 0.04 < int4
    assert 0.005 < noise < 0.02


def test_everything_but_matrices_is_untouched(honest, tmp_path):
    cheat = write_quantised(honest, tmp_path / "cheat")
    assert (cheat / "config.json").read_bytes() == (honest / "config.json").read_bytes()
    before, after = tensors(honest), tensors(cheat)
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {
        n: (t.shape, t.dtype) for n, t in after.items()
    }
    assert torch.equal(before["model.norm.weight"], after["model.norm.weight"])
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


def test_a_cheat_never_overwrites_the_honest_directory(honest):
    with pytest.raises(ValueError, match="own directory"):
        write_quantised(honest, honest)


def test_the_random_recipe_gives_the_same_bytes_everywhere(honest, tmp_path):
    again = write_random_llama(tmp_path / "again", TINY)
    assert (again / "model.safetensors").read_bytes() == (honest / "model.safetensors").read_bytes()
    weight = tensors(honest)["model.embed_tokens.weight"].float()
    assert weight.shape == (512, 64)
    assert 0.19 < float(weight.std()) < 0.21
