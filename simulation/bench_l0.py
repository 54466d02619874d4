"""What a receipt's L0 checks cost, and what verification costs a market at the floor rate.

``python -m trueweight.simulation.bench_l0`` prints the first alone; ``bench_verify`` both.
CPU time of one thread, because other work on the machine must not count.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import click

from trueweight.protos.envelope import digest_of, ring_of, seal
from trueweight.protos.identity import KeyRing
from trueweight.protos.money import PPM
from trueweight.protos.receipts import ReceiptFacts, check_receipt, open_assignment
from trueweight.protos.sampling import SAMPLER_ID, Sampling
from trueweight.protos.tokens import token_digest
from trueweight.protos.v1.market_pb2 import LENGTH, Assignment, EngineFingerprint, Receipt
from trueweight.simulation.bench_report import Estimate, estimate, finish, say
from trueweight.simulation.ledger_world import World
from trueweight.verifier.epochs import RatePolicy

SIZES = ((64, 128), (512, 512), (4096, 1024))
ROUNDS, BATCH = 11, 100
VOCABULARY, MANIFEST, SALT = 2048, b"m" * 32, b"s" * 16


def make_facts(world: World, prompt_tokens: int, output_tokens: int) -> tuple[ReceiptFacts, bytes]:
    """An honest receipt and everything that L0 looks at; and the assignment's envelope."""
    router, node = world.signers["router"], world.node[0]
    prompt = [i % VOCABULARY for i in range(prompt_tokens)]
    output = [7 * i % VOCABULARY for i in range(output_tokens)]
    order = Assignment(
        market_id=world.market_id,
        request_id=b"r" * 16,
        router_id=router.identity,
        node_id=node.identity,
        manifest_digest=MANIFEST,
        prompt_digest=token_digest(SALT, prompt),
        prompt_len=prompt_tokens,
        sampling=Sampling().to_proto(),
        seed=7,
        max_tokens=output_tokens,
        deadline_ms=60_000,
        model_id="bench",
    )
    sealed = seal(order, router)
    fingerprint = EngineFingerprint(sampler_id=SAMPLER_ID, sampler_precision="fp32")
    receipt = Receipt(
        market_id=world.market_id,
        assignment_digest=digest_of(sealed),
        node_id=node.identity,
        output_digest=token_digest(SALT, output),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        finish_reason=LENGTH,
        fingerprint=fingerprint,
        queue_us=10,
        first_token_us=1_000,
        total_us=100 * output_tokens,
    )
    facts = ReceiptFacts(
        assignment=open_assignment(sealed, world.market.ring, world.market_id),
        receipt=seal(receipt, node),
        salt=SALT,
        prompt=prompt,
        prefix=(),
        received=output,
        manifest_digest=MANIFEST,
        vocabulary_size=VOCABULARY,
        offered=fingerprint,
    )
    return facts, sealed


def measure_l0() -> dict[str, dict[str, Estimate]]:
    """Seconds of CPU per receipt by size: at the router, and at a verifier, who also opens the
    assignment."""
    world = World()
    ring = ring_of([world.node[0].key_event], world.market_id, world.market.ring)
    found = {}
    for prompt_tokens, output_tokens in SIZES:
        facts, sealed = make_facts(world, prompt_tokens, output_tokens)
        both = {"router_s": b"", "verifier_s": sealed}
        found[f"{prompt_tokens}+{output_tokens}"] = {
            name: estimate([_seconds(facts, assignment, ring, world) for _ in range(ROUNDS)])
            for name, assignment in both.items()
        }
    return found


def _seconds(facts: ReceiptFacts, assignment: bytes, ring: KeyRing, world: World) -> float:
    start = time.process_time()
    for _ in range(BATCH):
        if assignment:
            open_assignment(assignment, ring, world.market_id)
        check_receipt(facts, ring, world.market_id)
    return (time.process_time() - start) / BATCH


def say_l0(found: Mapping[str, Mapping[str, Estimate]]) -> None:
    """The table for people."""
    say("L0, CPU per receipt (aim: below 0.5 ms)")
    for size, ways in found.items():
        ms = {name.removesuffix("_s"): f"{e.median * 1e3:.3f} ms" for name, e in ways.items()}
        say(f"  {size} tokens: " + ", ".join(f"{name} {value}" for name, value in ms.items()))


def market_share(score_over_generate: float, request_s: float, l0_s: float) -> dict[str, float]:
    """Verification as a share of the compute that makes the answers, at the floor rate.

    ``audits``: the share of answers that is scored again, in one prefill each, second opinions
    included. ``l0``: the checks that every receipt gets. ``request_s``: compute time of one answer.
    """
    policy = RatePolicy()
    rate = policy.floor_ppm / PPM * (1 + policy.duplicate_ppm / PPM)
    audits = rate * score_over_generate
    l0 = l0_s / request_s
    return {"audits": audits, "l0": l0, "both": audits + l0}


def say_shares(shares: Mapping[str, Mapping[str, float]]) -> None:
    """The table for people."""
    say("verification at the floor rate, share of the market's compute (aim: at most 1.5 %)")
    for where, share in shares.items():
        parts = ", ".join(f"{name} {value:.2%}" for name, value in share.items())
        say(f"  {where}: {parts}")


@click.command()
def main() -> None:
    """Cost of L0 per receipt."""
    found: dict[str, Any] = {"l0": measure_l0()}
    say_l0(found["l0"])
    finish("l0", found, {"rounds": ROUNDS, "receipts_a_round": BATCH})


if __name__ == "__main__":
    main()
