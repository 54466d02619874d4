"""Trains the demo model that ships in ``simulation/models/tw-demo``: minutes on one CPU core.

    python -m trueweight.simulation.train_demo_model --out DIR

Reads only the running Python's own standard library; uses no network. The same interpreter, torch,
kind of CPU and seed give the same bytes.
"""

from __future__ import annotations

import math
import os
import platform
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from trueweight.runtime.cli import option, path_option
from trueweight.simulation import demo_corpus, demo_files
from trueweight.simulation.demo_corpus import Corpus, Document

MAX_DOCUMENT_TOKENS = 190
"""With its special tokens a document ends before 200 tokens, so most outputs do as well."""
CHAT_SHARE = 0.5
IGNORED = -100
"""Label of padding: torch's cross entropy skips it."""
Row = list[int]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, apart from the text."""

    seed: int
    steps: int
    threads: int = 1
    row_tokens: int = 512
    rows_per_step: int = 4
    learning_rate: float = 3e-3
    warmup_steps: int = 80
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    hidden: int = 256
    intermediate: int = 704
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2

    def rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to a hundredth of the peak."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


class Encoder:
    """Documents to token ids, as a completion or as a conversation."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bos = demo_files.SPECIAL_TOKENS.index(demo_files.BOS)
        self._eos = demo_files.SPECIAL_TOKENS.index(demo_files.EOS)

    def length(self, document: Document) -> int:
        """Tokens of the source alone."""
        return len(self._tokenizer.encode(document.source, add_special_tokens=False))

    def completion(self, document: Document) -> Row:
        """``<|bos|> source <|eos|>``."""
        encoded = self._tokenizer.encode(document.source, add_special_tokens=False)
        return [self._bos, *encoded.ids, self._eos]

    def chat(self, document: Document, choose: random.Random) -> Row:
        """A conversation whose last turn is the source, through the shipped template."""
        messages = demo_corpus.conversation(document, choose)
        text = demo_files.render_chat(messages, add_generation_prompt=False)
        ids: Row = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def samples(encoder: Encoder, documents: Sequence[Document], choose: random.Random) -> list[Row]:
    """Each document once, about half of them as chat, in random order."""
    shuffled = list(documents)
    choose.shuffle(shuffled)
    return [
        encoder.chat(document, choose)
        if choose.random() < CHAT_SHARE
        else encoder.completion(document)
        for document in shuffled
    ]


def pack(pieces: Sequence[Row], row_tokens: int) -> list[Row]:
    """Whole samples into rows; every row starts with a sample, as every request does."""
    rows: list[Row] = []
    row: Row = []
    for piece in pieces:
        if row and len(row) + len(piece) > row_tokens:
            rows.append(row)
            row = []
        row = [*row, *piece][:row_tokens]
    return [*rows, row] if row else rows


def batches(
    encoder: Encoder, documents: Sequence[Document], recipe: Recipe
) -> Iterator[tuple[Any, Any]]:
    """Endless (input ids, labels), a pure function of the seed; each epoch asks anew."""
    choose = random.Random(recipe.seed)  # noqa: S311 - training data, not a secret
    while True:
        rows = pack(samples(encoder, documents, choose), recipe.row_tokens)
        choose.shuffle(rows)
        usable = len(rows) - len(rows) % recipe.rows_per_step
        for start in range(0, usable, recipe.rows_per_step):
            yield _to_tensors(rows[start : start + recipe.rows_per_step])


def _to_tensors(rows: Sequence[Row]) -> tuple[Any, Any]:
    """Right-padded ids and labels; causal attention never looks at the padding."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORED, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        labels[index, : len(row)] = torch.tensor(row)
    return ids, labels


def _new_model(recipe: Recipe) -> Any:
    """A Llama with tied embeddings, initialised from the seed."""
    torch.manual_seed(recipe.seed)
    special = {token: index for index, token in enumerate(demo_files.SPECIAL_TOKENS)}
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=demo_files.VOCABULARY,
            hidden_size=recipe.hidden,
            intermediate_size=recipe.intermediate,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.kv_heads,
            max_position_embeddings=demo_files.CONTEXT,
            tie_word_embeddings=True,
            pad_token_id=special[demo_files.PAD],
            bos_token_id=special[demo_files.BOS],
            eos_token_id=special[demo_files.EOS],
        )
    )


def _new_optimiser(model: Any, recipe: Recipe) -> Any:
    """AdamW; only matrices decay."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))


def _train_step(model: Any, optimiser: Any, batch: tuple[Any, Any], recipe: Recipe) -> float:
    """One update; products in bfloat16, weights in fp32. Returns nats per token."""
    ids, labels = batch
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return float(loss.detach())


def fit(
    model: Any, feed: Iterator[tuple[Any, Any]], recipe: Recipe, console: Console
) -> tuple[float, int]:
    """All steps. Returns the mean loss of the last hundred and the tokens read."""
    optimiser = _new_optimiser(model, recipe)
    losses: list[float] = []
    tokens = 0
    columns = (
        TextColumn("training"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=recipe.steps, loss=math.nan)
        for step in range(recipe.steps):
            for group in optimiser.param_groups:
                group["lr"] = recipe.rate(step)
            batch = next(feed)
            losses.append(_train_step(model, optimiser, batch, recipe))
            tokens += int((batch[1] != IGNORED).sum())
            recent = losses[-100:]
            mean = sum(recent) / len(recent)
            progress.update(task, advance=1, loss=mean)
            if (step + 1) % 100 == 0 and not console.is_terminal:
                console.print(f"step {step + 1} of {recipe.steps}, loss {mean:.3f}")
    return sum(losses[-100:]) / len(losses[-100:]), tokens


def held_out_loss(model: Any, encoder: Encoder, documents: Sequence[Document]) -> float:
    """Nats per token of completions that were not trained on, one document a row."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for document in documents:
            ids, labels = _to_tensors([encoder.completion(document)])
            predicted = ids.shape[1] - 1
            total += float(model(input_ids=ids, labels=labels).loss) * predicted
            count += predicted
    return total / count


def _write_weights(model: Any, out: Path) -> None:
    """config.json and model.safetensors, then our own generation_config.json."""
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # written for the owner alone
    (out / "generation_config.json").unlink(missing_ok=True)
    demo_files.write_generation_config(out)


def _write_record(out: Path, record: dict[str, Any], recipe: Recipe) -> None:
    """The model card and training.json."""
    card = demo_files.CARD.format(
        **record["data"],
        parameters=record["parameters"],
        layers=recipe.layers,
        hidden=recipe.hidden,
        vocabulary=demo_files.VOCABULARY,
        python=record["python"],
        seed=recipe.seed,
        steps=recipe.steps,
        tokens=record["tokens"],
        minutes=record["wall_seconds"] / 60,
        threads=recipe.threads,
        held_out_loss=record["held_out_loss"],
        context=demo_files.CONTEXT,
        row=recipe.row_tokens,
    )
    (out / "README.md").write_text(card, encoding="utf-8")
    demo_files.write_json(
        out / "training.json", {**record, "files_sha256": demo_files.file_digests(out)}
    )


def _describe_data(corpus: Corpus, documents: Sequence[Document]) -> dict[str, Any]:
    """Where the text comes from, for the card and the record."""
    return {
        "source": f"standard library of Python {platform.python_version()}",
        "licence": "PSF-2.0",
        "files": corpus.files,
        "documents": len(documents),
        "held_out_one_in": demo_corpus.HELD_OUT_ONE_IN,
        "min_chars": demo_corpus.MIN_CHARS,
        "max_chars": demo_corpus.MAX_CHARS,
        "max_tokens": MAX_DOCUMENT_TOKENS,
        "corpus_sha256": corpus.sha256,
    }


def train(out: Path, recipe: Recipe, console: Console) -> None:
    """Reads, tokenises, trains, measures and writes."""
    started = time.monotonic()
    torch.set_num_threads(recipe.threads)
    torch.use_deterministic_algorithms(True)
    out.mkdir(parents=True, exist_ok=True)
    library = demo_corpus.standard_library()
    demo_files.write_licence(out, library)  # first: without it nothing may ship
    corpus = demo_corpus.read_corpus(library)
    tokenizer = demo_files.train_tokenizer(document.source for document in corpus.documents)
    demo_files.write_tokenizer(out, tokenizer)
    encoder = Encoder(tokenizer)
    documents = [d for d in corpus.documents if encoder.length(d) <= MAX_DOCUMENT_TOKENS]
    learned = [d for d in documents if not d.held_out]
    console.print(f"{len(documents)} documents from {corpus.files} files")
    model = _new_model(recipe)
    loss, tokens = fit(model, batches(encoder, learned, recipe), recipe, console)
    model = model.to(torch.bfloat16).eval()
    measured = held_out_loss(model, encoder, [d for d in documents if d.held_out])
    _write_weights(model, out)
    record = {
        "model": "tw-demo",
        "parameters": sum(p.numel() for p in model.parameters()),
        "recipe": asdict(recipe),
        "data": _describe_data(corpus, documents),
        "tokens": tokens,
        "final_training_loss": round(loss, 4),
        "held_out_loss": round(measured, 4),
        "wall_seconds": round(time.monotonic() - started),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    _write_record(out, record, recipe)
    console.print(f"{out}: loss {loss:.3f}, held out {measured:.3f}, {tokens:,} tokens")


@click.command(context_settings={"auto_envvar_prefix": "TRUEWEIGHT_TRAIN"})
@path_option("--out", required=True, help="Directory to write the model to.")
@option("--seed", default=20261123, help="Decides the weights and the order of the text.")
@option("--steps", default=1800, type=click.IntRange(min=1), help="Updates of 2,048 tokens.")
@option("--threads", default=1, type=click.IntRange(min=1), help="CPU threads.")
def main(out: Path, seed: int, steps: int, threads: int) -> None:
    """Train the demo model on the standard library's own sources."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    train(out, Recipe(seed=seed, steps=steps, threads=threads), Console(stderr=True))


if __name__ == "__main__":
    main()
