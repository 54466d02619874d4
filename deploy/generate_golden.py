#!/usr/bin/env python3
"""Writes protos/golden/*.json. Usage: deploy/generate_golden.py [OUT_DIR]   (default: in place)

Floats are written so that they read back to the same value; fp32 logits are multiples of 1/64 in
[-16, 16), exact in every binary format down to fp16. A test compares a fresh run with the commit.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from trueweight.protos import evidence, merkle, money
from trueweight.protos.audit import commitment, is_owed
from trueweight.protos.envelope import message_digest, pre_authentication_encoding
from trueweight.protos.identity import key_id
from trueweight.protos.manifest import chunk_leaf, chunk_proof
from trueweight.protos.sampling import (
    MASS_LADDER,
    Sampling,
    parameter_class,
    resolve,
    sample,
    score_row,
)
from trueweight.protos.sampling_noise import F32, gumbel_of, hash_u32, uniform
from trueweight.protos.tokens import token_digest

VOCABULARY = 64
SEEDS = (0, 1, 42, -2, 2**31, 2**32 - 1, 2**32, 0x0123456789ABCDEF, 2**63 - 1, -(2**63))


def noise() -> dict[str, Any]:
    """Hash, uniform and Gumbel: over seeds, positions and tokens, and at chosen hash values."""
    rows = []
    for seed in SEEDS:
        for pos in (0, 1, 7, 4095, 2**31 - 1):
            for token in (0, 1, 2047, 151_935, 2**31 - 1):
                h = hash_u32(seed, pos, np.array([token]))
                u = uniform(h)
                rows.append([str(seed), pos, token, int(h[0]), _bits(u[0]), float(gumbel_of(u)[0])])
    edges = [0, 1, 2, 255, 256, 65535, 65536, 2**24, 2**30, 2**31 - 1, 2**31, 0xC0000000]
    edges += [0xFFFFFF00, 0xFFFFFF7F, 0xFFFFFF80, 0xFFFFFFFE, 0xFFFFFFFF]
    ends = []
    for value in edges:
        u = uniform(np.array([value], dtype=np.uint32))
        ends.append([value, _bits(u[0]), float(gumbel_of(u)[0])])
    return {
        "what": "rows: seed, pos, token, hash, bits of u (fp32), g; ends: hash, bits of u, g",
        "tolerance": "hash and u bit-exact; g to 1e-6 relative",
        "rows": rows,
        "ends": ends,
    }


def sampling() -> dict[str, Any]:
    """Full cases over a small vocabulary, every parameter alone and some together."""
    generator = np.random.default_rng(20261123)
    cases = []
    for name, parameters, options in _sampling_cases():
        for _ in range(3):
            logits = _logits(generator, options.get("spread", 3.0), options.get("ties", False))
            cases.append(_case(name, resolve(parameters), options, logits, generator))
    for name, parameters in _cuts_at_a_mass():
        for offset in (1 / 1024, -1 / 1024, 1 / 128, -1 / 64):
            cases.append(_case_at_a_mass(name, parameters, offset, generator))
    return {
        "what": "token sampled from logits; scores: claimed token, margin, logprob, rank",
        "tolerance": "token exact; margin and logprob to 1e-4 absolute",
        "cases": cases,
    }


def _sampling_cases() -> list[tuple[str, Sampling, dict[str, Any]]]:
    plain = Sampling()
    allowed = {"mask": [v % 3 == 0 for v in range(VOCABULARY)]}
    grammar = replace(plain, grammar_sha256=b"\x07" * 32, grammar_compiler="golden")
    return [
        ("plain", plain, {}),
        ("temperature", replace(plain, temperature=0.7), {}),
        ("hot", replace(plain, temperature=2.0), {}),
        ("nearly greedy", replace(plain, temperature=0.001), {}),
        ("greedy", replace(plain, temperature=0.0), {}),
        ("greedy, ties", replace(plain, temperature=0.0), {"ties": True}),
        ("top-k 1 is greedy", replace(plain, top_k=1), {}),
        ("top-k", replace(plain, top_k=5), {}),
        ("top-k, ties at the cut", replace(plain, top_k=4), {"ties": True}),
        ("top-k beyond the vocabulary", replace(plain, top_k=1000), {}),
        ("top-p", replace(plain, top_p=0.8), {}),
        ("top-p, ties at the cut", replace(plain, top_p=0.6), {"ties": True}),
        ("top-p tiny", replace(plain, top_p=1e-6), {}),
        ("min-p", replace(plain, min_p=0.1), {}),
        ("min-p at temperature", replace(plain, min_p=0.2, temperature=1.5), {}),
        ("all cuts", replace(plain, top_k=8, top_p=0.9, min_p=0.05, temperature=0.8), {}),
        ("logit bias", replace(plain, logit_bias=((3, 5.0), (9, -100.0), (63, 2.5))), {}),
        ("allowed ids", replace(plain, allowed_token_ids=(5, 6, 40)), {}),
        ("min tokens", replace(plain, min_tokens=9, stop_token_ids=(1, 2)), {"stop_bias": 30}),
        ("min tokens over", replace(plain, min_tokens=3, stop_token_ids=(1, 2)), {"stop_bias": 30}),
        ("presence", replace(plain, presence_penalty=1.5), {}),
        ("frequency", replace(plain, frequency_penalty=-0.75), {}),
        ("repetition", replace(plain, repetition_penalty=1.3), {}),
        (
            "all penalties",
            replace(plain, presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=0.8),
            {},
        ),
        ("bad words", replace(plain, bad_words=((11,), (20, 21, 12), (8, 13))), {}),
        ("grammar", grammar, allowed),
        ("grammar, cut", replace(grammar, top_p=0.7), allowed),
        (
            "grammar that only allows the end",
            replace(grammar, min_tokens=50, stop_token_ids=(1, 2)),
            {"mask": [v in (1, 2) for v in range(VOCABULARY)]},
        ),
        ("wide logits", replace(plain, temperature=1.0), {"spread": 8.0}),
    ]


def _cuts_at_a_mass() -> list[tuple[str, Sampling]]:
    plain = Sampling()
    return [
        ("top-p at a cumulative mass", plain),
        ("top-p at a cumulative mass, warm", replace(plain, temperature=1.5)),
        ("top-k and top-p at a cumulative mass", replace(plain, top_k=12, temperature=0.7)),
    ]


def _case_at_a_mass(
    name: str, parameters: Sampling, offset: float, generator: Any
) -> dict[str, Any]:
    """top_p just beside the mass of the five likeliest tokens, not at it, so that every
    implementation cuts alike; one claim is what the other side of it samples. Drawn until a
    rounding explains a claim."""
    while True:
        logits = _logits(generator, 1.5, ties=False)
        left = np.sort(logits.astype(np.float64))[::-1][: parameters.top_k or None]
        weights = np.exp((left - left[0]) / parameters.temperature)
        mass = float(weights[:5].sum() / weights.sum())
        here = resolve(replace(parameters, top_p=mass * (1 + offset)))
        across = mass * (1 - math.copysign(1 / 1024, offset))
        options = {"across": resolve(replace(parameters, top_p=across))}
        case = _case(name, here, options, logits, generator)
        if any(margin in MASS_LADDER for _, margin, *_ in case["scores"]):
            return case


def _case(
    name: str, parameters: Sampling, options: dict[str, Any], logits: F32, generator: Any
) -> dict[str, Any]:
    logits[[1, 2]] += np.float32(options.get("stop_bias", 0))
    mask = np.array(options["mask"]) if "mask" in options else None
    prompt = [int(v) for v in generator.integers(0, VOCABULARY, 6)]
    # Ends in the beginning of two bad words.
    output = [*(int(v) for v in generator.integers(0, VOCABULARY, 3)), 8, 20, 21]
    seed = int(generator.integers(-(2**62), 2**62))
    token = sample(logits, parameters, seed, prompt, output, mask=mask)
    order = np.argsort(-logits, kind="stable")
    across = sample(logits, options.get("across", parameters), seed, prompt, output, mask=mask)
    claims = list(dict.fromkeys([token, int(order[0]), int(order[1]), int(order[5]), 11, across]))
    scores = [
        [c, *_score_values(score_row(logits, parameters, seed, prompt, output, c, mask=mask))]
        for c in claims
    ]
    return {
        "name": name,
        "class": parameter_class(parameters),
        "sampling": _parameters(parameters),
        "seed": str(seed),
        "prompt": prompt,
        "output": output,
        "mask": options.get("mask"),
        "logits": [float(v) for v in logits],
        "token": token,
        "scores": scores,
    }


def _score_values(score: Any) -> list[Any]:
    """Margin, log-probability and rank, rounded to what conformance asks for."""
    return [round(score.margin, 6), round(score.logprob, 6), score.rank]


def _parameters(parameters: Sampling) -> dict[str, Any]:
    """Only what differs from neutral."""
    neutral = asdict(Sampling())
    return {
        key: value.hex() if isinstance(value, bytes) else value
        for key, value in asdict(parameters).items()
        if value != neutral[key]
    }


def _logits(generator: Any, spread: float, ties: bool) -> F32:
    values = generator.normal(0, spread, VOCABULARY)
    step = 1.0 if ties else 1 / 64
    rounded: F32 = (np.round(values / step) * step).clip(-16, 16 - step).astype(np.float32)
    return rounded


def digests() -> dict[str, Any]:
    """Encodings, digests, ids and proofs over fixed bytes."""
    salt = bytes(range(16))
    tokens = [[], [0], [1, 2, 3], [2**32 - 1, 0, 65536]]
    payloads = [("application/vnd.trueweight.receipt.v1+proto", b""), ("a", b"\x00hello world")]
    secret, digest = bytes(range(32)), bytes(range(32, 64))
    chunk = b"chunk"
    draws = [(1_000_000, 5, 0), (20_000, 5, 0), (0, 5, 0), (500_000, 10, 40), (700_000, 99, 40)]
    return {
        "tokens": [[salt.hex(), ids, token_digest(salt, ids).hex()] for ids in tokens],
        "pae": [
            [t, p.hex(), pre_authentication_encoding(t, p).hex(), message_digest(t, p).hex()]
            for t, p in payloads
        ],
        "key_id": [[secret.hex(), key_id(secret)]],
        "epoch_commitment": [[secret.hex(), commitment(secret).hex()]],
        "audit_owed": [
            [secret.hex(), digest.hex(), *draw, is_owed(secret, digest, *draw)] for draw in draws
        ],
        "chunk_leaf": [[chunk.hex(), chunk_leaf(chunk).hex()]],
        "chunk_proof": [
            [
                secret.hex(),
                "node",
                7,
                b"chunk".hex(),
                chunk_proof(secret, "node", 7, b"chunk").hex(),
            ]
        ],
    }


def money_cases() -> dict[str, Any]:
    """Charges and splits, including one-nano roundings and 128-bit intermediates."""
    charges = [
        (0, 0, 100, 100),
        (1, 0, 1, 1),
        (1, 1, 100_000_000, 300_000_000),
        (999_999, 1, 1, 1),
        (1_000_000, 0, 1, 0),
        (123, 4567, 89_123_457, 301_234_567),
        (2**20, 2**20, 10**15, 10**12),
    ]
    splits = [(0, 50_000, 50_000), (1, 50_000, 50_000), (19, 50_000, 50_000), (20, 50_000, 50_000)]
    splits += [(10**18, 333_333, 333_333), (7, 1_000_000, 0)]
    return {
        "charge": [[*c, money.charge_nano(*c)] for c in charges],
        "split": [[*s, *asdict(money.split_charge(*s)).values()] for s in splits],
    }


def evidence_cases() -> dict[str, Any]:
    """Wealth after each request of some sequences, as exact hexadecimal doubles."""
    honest = [(n * 20_000, n, 200_000) for n in (200, 16, 300, 1, 256, 64)]
    cheat = [(n * 8_900_000, n, 200_000) for n in (200, 200, 120, 300, 200, 200)]
    turned = [*honest, *cheat]
    extreme = [(256 * 10**9, 256, 200_000)] * 120
    sequences = {"honest": honest, "int4": cheat, "turned": turned, "clamped": extreme}
    return {
        "what": "items: sum_x_nano, n, mu0_nano; wealth: W after each item, C99 hexadecimal",
        "clipped_nano": [
            [m, evidence.clipped_nano(m)] for m in (0.0, 1e-12, 1 / 3, 0.25, 0.4999, 0.5, 7.0)
        ],
        "sequences": [
            {
                "name": name,
                "items": items,
                "wealth": [w.value.hex() for w in _wealths(items)],
                "states": [w.state for w in _wealths(items)],
                "change_point": evidence.change_point([evidence.Item(*i) for i in items]),
            }
            for name, items in sequences.items()
        ],
    }


def _wealths(items: Sequence[tuple[int, int, int]]) -> list[evidence.Wealth]:
    found, wealth = [], evidence.Wealth()
    for item in items:
        wealth = wealth.add(*item)
        found.append(wealth)
    return found


def merkle_cases() -> dict[str, Any]:
    """Roots and proofs over the eight leaves of Certificate Transparency's own test vectors."""
    texts = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657"]
    texts.append("606162636465666768696a6b6c6d6e6f")
    leaves = [merkle.leaf_hash(bytes.fromhex(text)) for text in texts]
    fetch = merkle.fetch_from(leaves)
    pairs = [(i, n) for n in range(1, 9) for i in range(n)]
    ranges = [(m, n) for n in range(1, 9) for m in range(1, n + 1)]
    return {
        "leaves": texts,
        "roots": [merkle.root(leaves[:n]).hex() for n in range(9)],
        "inclusion": [
            [i, n, [h.hex() for h in merkle.inclusion_path(i, n, fetch)]] for i, n in pairs
        ],
        "consistency": [
            [m, n, [h.hex() for h in merkle.consistency_path(m, n, fetch)]] for m, n in ranges
        ],
    }


def _bits(value: np.float32) -> str:
    return f"{int(np.float32(value).view(np.uint32)):08x}"


FILES = {
    "noise": noise,
    "sampling": sampling,
    "digests": digests,
    "money": money_cases,
    "evidence": evidence_cases,
    "merkle": merkle_cases,
}


def main(out: Path) -> None:
    """Writes every file."""
    out.mkdir(parents=True, exist_ok=True)
    for name, make in FILES.items():
        (out / f"{name}.json").write_text(_pretty(make()))


def _pretty(document: dict[str, Any]) -> str:
    """One case a line: small diffs, readable files."""
    parts = []
    for key, value in document.items():
        if isinstance(value, list):
            lines = ",\n".join(json.dumps(item) for item in value)
            parts.append(f"{json.dumps(key)}: [\n{lines}\n]")
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    default = Path(__file__).resolve().parent.parent / "protos" / "golden"
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
