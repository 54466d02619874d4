"""Dishonest weights: what a cheating operator would serve under an honest manifest.

Each function reads a Hugging Face directory and writes another whose tensors are rounded as a
cheaper format would round them, stored in the original dtype ("fake quantisation"): the engine
runs them at the usual speed, the outputs are those of the cheap model. Only matrices are touched,
as quantisers do; norms stay. Torch is imported on use.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

_WEIGHTS = ".safetensors"


def write_quantised(
    source: Path | str, target: Path | str, *, bits: int = 4, group: int = 32
) -> Path:
    """Symmetric integers of ``bits`` bits with one scale per ``group`` inputs of an output row.

    ``group=0`` is one scale per output row (the usual int8). Raises ValueError for other bits
    than 2 to 8.
    """
    if not 2 <= bits <= 8 or group < 0:
        raise ValueError("bits from 2 to 8, group at least 0")
    return _rewrite(Path(source), Path(target), lambda matrix: _integers(matrix, bits, group))


def write_fp8(source: Path | str, target: Path | str) -> Path:
    """float8 e4m3 with one scale per output row."""
    return _rewrite(Path(source), Path(target), _fp8)


def write_noisy(
    source: Path | str, target: Path | str, *, relative: float = 0.01, seed: int = 1
) -> Path:
    """Gaussian noise of ``relative`` times each matrix's standard deviation."""
    import torch  # noqa: PLC0415

    generator = torch.Generator().manual_seed(seed)

    def noisy(matrix: Any) -> Any:
        noise = torch.randn(matrix.shape, generator=generator)
        return matrix + relative * matrix.std() * noise

    return _rewrite(Path(source), Path(target), noisy)


def write_fine_tuned(
    source: Path | str,
    target: Path | str,
    *,
    steps: int = 20,
    rate: float = 1e-4,
    seed: int = 1,
) -> Path:
    """A few steps of training on random token sequences of the model's own making: somebody's
    fine-tune sold under the original's name. The directory needs transformers to read it."""
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_pretrained(str(source), dtype=torch.float32)
    start = torch.randint(3, model.config.vocab_size, (8, 8))
    rows = model.generate(start, max_new_tokens=120, do_sample=True, temperature=1.2, top_k=0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        optimiser.step()
    tuned = {name: tensor.detach() for name, tensor in model.named_parameters()}

    return _rewrite_named(Path(source), Path(target), tuned.get)


def _rewrite(source: Path, target: Path, change: Callable[[Any], Any]) -> Path:
    """Copy a model directory, changing its matrices (given and taken as fp32)."""
    return _rewrite_named(
        source, target, lambda _, tensor: change(tensor) if tensor.ndim == 2 else tensor
    )


def _rewrite_named(source: Path, target: Path, change: Callable[[str, Any], Any]) -> Path:
    """Copy a model directory, changing its tensors (given and taken as fp32) by name."""
    from safetensors import safe_open  # noqa: PLC0415
    from safetensors.torch import save_file  # noqa: PLC0415

    if source.resolve() == target.resolve():
        raise ValueError("the cheat needs its own directory")
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix != _WEIGHTS:
            shutil.copyfile(path, target / path.name)
    for path in sorted(source.glob(f"*{_WEIGHTS}")):
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            metadata = file.metadata()
        changed = {
            name: change(name, tensor.float()).to(tensor.dtype).contiguous()
            for name, tensor in tensors.items()
        }
        save_file(changed, target / path.name, metadata=metadata)
    return target


def _integers(matrix: Any, bits: int, group: int) -> Any:
    import torch  # noqa: PLC0415

    rows, columns = matrix.shape
    width = group if group and columns % group == 0 else columns
    blocks = matrix.reshape(rows, columns // width, width)
    top = 2 ** (bits - 1) - 1
    scale = blocks.abs().amax(dim=2, keepdim=True).clamp(min=1e-12) / top
    return (torch.clamp(torch.round(blocks / scale), -top - 1, top) * scale).reshape(rows, columns)


def _fp8(matrix: Any) -> Any:
    import torch  # noqa: PLC0415

    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = matrix.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / largest
    return (matrix / scale).to(torch.float8_e4m3fn).float() * scale
