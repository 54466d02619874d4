"""L0: an honest receipt passes; every attack fails at the check that is named for it."""

from __future__ import annotations

import pytest

from trueweight.protos import receipts
from trueweight.protos.envelope import ring_of, seal
from trueweight.protos.errors import BadSignature, ReceiptRefused, error_for
from trueweight.protos.receipts import RouterEvents, billable_output, check_receipt, open_assignment
from trueweight.protos.sampling import Sampling
from trueweight.protos.tokens import token_digest
from trueweight.protos.v1 import market_pb2 as pb
from trueweight.protos.v1.market_pb2 import EngineFingerprint, Receipt

MARKET, SALT, STOP = "market-under-test", bytes(range(16)), 2


def refused(facts, ring, market=MARKET):
    with pytest.raises(ReceiptRefused) as caught:
        check_receipt(facts, ring, market)
    assert caught.value.check in str(caught.value)
    return caught.value.check


def test_an_honest_receipt_passes(honest, node):
    opened = check_receipt(honest.facts(), honest.ring, MARKET)
    assert opened.signer == node.identity
    assert opened.message.output_tokens == 4


def test_unknown_facts_skip_only_their_checks(honest):
    case = honest.spoilt(events=None)
    check_receipt(case.facts(offered=None), case.ring, MARKET)


@pytest.mark.parametrize(
    ("output", "reason", "events"),
    [
        ([9] * 8, pb.LENGTH, RouterEvents()),
        ([9] * 5, pb.STOPPED, RouterEvents(stop_at=5)),
        ([9] * 3, pb.CANCELLED, RouterEvents(cancelled=True)),
        ([9] * 3, pb.CANCELLED, RouterEvents(session_lost=True)),
        ([], pb.CANCELLED, RouterEvents(cancelled=True)),
        ([], pb.ENGINE_ERROR, RouterEvents()),
        ([STOP], pb.EOS, RouterEvents()),
        # The router's Stop met an output that had just ended by itself.
        ([9, STOP], pb.EOS, RouterEvents(stop_at=1)),
        ([9, STOP], pb.STOPPED, RouterEvents(stop_at=2)),
    ],
)
def test_every_honest_way_to_finish_passes(honest, output, reason, events):
    first = 500 if output else 0
    case = honest.spoilt(
        output=output, events=events, receipt={"finish_reason": reason, "first_token_us": first}
    )
    check_receipt(case.facts(), case.ring, MARKET)


def test_a_stop_signs_less_than_was_sent(honest):
    case = honest.spoilt(
        events=RouterEvents(stop_at=2),
        receipt={
            "finish_reason": pb.STOPPED,
            "output_tokens": 2,
            "output_digest": token_digest(SALT, [10, 11]),
        },
    )
    assert check_receipt(case.facts(), case.ring, MARKET).message.output_tokens == 2


def test_a_deadline_reached_passes(honest):
    case = honest.spoilt(output=[9], receipt={"finish_reason": pb.DEADLINE, "total_us": 10_000_100})
    check_receipt(case.facts(), case.ring, MARKET)


def test_a_later_leg_passes_with_its_prefix(honest):
    case = honest.spoilt(prefix=[30, 31], order={"leg": 1})
    check_receipt(case.facts(), case.ring, MARKET)


@pytest.mark.parametrize("prefix", [[], [30, 31]])
def test_attack_a_client_asks_for_more_tokens_than_its_grammar_has(honest, prefix):
    """Nothing but the end is left, so an honest node ends before min_tokens, and is paid."""
    sampling = Sampling(
        stop_token_ids=(STOP,), min_tokens=40, grammar_sha256=bytes(32), grammar_compiler="c"
    ).to_proto()
    for output in ([STOP], [9, STOP]):
        case = honest.spoilt(prefix=prefix, output=output, order={"sampling": sampling})
        check_receipt(case.facts(), case.ring, MARKET)
    case = honest.spoilt(prefix=prefix, output=[9, STOP, 9], order={"sampling": sampling})
    assert refused(case.facts(), case.ring) == "after_eos"


# --- attacks ---------------------------------------------------------------------------------

RECEIPT_ATTACKS = {
    "another_assignments_receipt_is_shown": ("assignment", {"assignment_digest": b"x" * 32}),
    "the_receipt_names_another_node": ("node", {"node_id": "somebody"}),
    "prompt_tokens_are_inflated": ("prompt_tokens", {"prompt_tokens": 4}),
    "tokens_are_over_reported": ("over_reported", {"output_tokens": 5}),
    "tokens_are_under_reported": ("under_reported", {"output_tokens": 3}),
    "another_output_is_signed": (
        "output_digest",
        {"output_digest": token_digest(SALT, [10, 11, 13, STOP])},
    ),
    "another_salt_is_used": (
        "output_digest",
        {"output_digest": token_digest(b"\xff" * 16, [10, 11, 12, STOP])},
    ),
    "no_finish_reason_is_given": ("finish_reason", {"finish_reason": 0}),
    "an_unknown_finish_reason_is_given": ("finish_reason", {"finish_reason": 77}),
    "an_eos_is_called_length": ("eos", {"finish_reason": pb.LENGTH}),
    "no_time_at_all_passed": ("durations", {"queue_us": 0, "first_token_us": 0, "total_us": 0}),
    "the_queue_took_longer_than_everything": ("durations", {"queue_us": 6_000}),
    "the_first_token_came_after_the_last": ("durations", {"first_token_us": 6_000}),
    "the_first_token_came_before_the_start": ("durations", {"queue_us": 501}),
    "a_deadline_is_claimed_far_too_early": ("deadline", {"finish_reason": pb.DEADLINE}),
    "work_went_on_long_after_the_deadline": ("deadline", {"total_us": 80_000_000}),
    "another_sampler_ran": (
        "sampler",
        {"fingerprint": EngineFingerprint(engine="synthetic", sampler_id="other")},
    ),
    "the_engine_was_swapped": (
        "fingerprint",
        {
            "fingerprint": EngineFingerprint(
                engine="vllm", sampler_id="tw-gumbel-1", sampler_precision="fp32"
            )
        },
    ),
}


@pytest.mark.parametrize("attack", RECEIPT_ATTACKS)
def test_attack(honest, attack):
    check, changes = RECEIPT_ATTACKS[attack]
    case = honest.spoilt(receipt=changes)
    assert refused(case.facts(), case.ring) == check


def test_early_stop_without_eos(honest):
    """The classic: stop early, keep the GPU for somebody else, call it finished."""
    case = honest.spoilt(output=[10, 11])
    assert refused(case.facts(), case.ring) == "eos"
    case = honest.spoilt(output=[10, 11], receipt={"finish_reason": pb.LENGTH})
    assert refused(case.facts(), case.ring) == "length"
    case = honest.spoilt(output=[10, 11], receipt={"finish_reason": pb.STOPPED})
    assert refused(case.facts(), case.ring) == "stopped"
    case = honest.spoilt(output=[10, 11], receipt={"finish_reason": pb.CANCELLED})
    assert refused(case.facts(), case.ring) == "cancelled"


def test_stop_is_answered_with_more_tokens_than_asked(honest):
    case = honest.spoilt(
        output=[10, 11, 12],
        receipt={"finish_reason": pb.STOPPED},
        events=RouterEvents(stop_at=2),
    )
    assert refused(case.facts(), case.ring) == "stopped"


def test_padding_after_eos(honest):
    case = honest.spoilt(output=[10, STOP, 11, 12])
    assert refused(case.facts(), case.ring) == "after_eos"
    case = honest.spoilt(output=[10, STOP, 11, STOP])
    assert refused(case.facts(), case.ring) == "after_eos"


def test_more_tokens_than_ordered(honest):
    case = honest.spoilt(output=[9] * 9, receipt={"finish_reason": pb.LENGTH})
    assert refused(case.facts(), case.ring) == "max_tokens"


@pytest.mark.parametrize("token", [100, 2**32 - 1])
def test_ids_beyond_the_vocabulary(honest, token):
    case = honest.spoilt(output=[10, token, STOP])
    assert refused(case.facts(), case.ring) == "token_ids"


def test_a_forged_or_foreign_signature(honest, stranger):
    case = honest.spoilt(signer=stranger)
    assert refused(case.facts(), case.ring) == "signature"
    # A certified key, but not the assigned node's.
    both = ring_of([case.node.key_event, stranger.key_event], MARKET)
    assert refused(case.facts(), both) == "signature"


def test_a_receipt_of_another_market(honest):
    case = honest.spoilt(receipt={"market_id": "elsewhere"})
    assert refused(case.facts(), case.ring) == "signature"


def test_a_flipped_bit_anywhere_in_the_receipt(honest):
    facts = honest.facts()
    for index in range(0, len(facts.receipt), 3):
        data = bytearray(facts.receipt)
        data[index] ^= 1
        spoilt = honest.facts(receipt=bytes(data))
        try:
            check_receipt(spoilt, honest.ring, MARKET)
        except ReceiptRefused:
            continue
        pytest.fail(f"bit flip at {index} passed")


def test_an_assignment_replayed_as_a_receipt(honest):
    facts = honest.facts()
    assert refused(honest.facts(receipt=facts.assignment.envelope), honest.ring) == "signature"


@pytest.mark.parametrize(
    ("check", "changes"),
    [
        ("manifest", {"manifest_digest": b"\x06" * 32}),
        ("prompt_digest", {"prompt": [5, 6, 8]}),
        ("prompt_digest", {"prompt": [5, 6]}),
        ("prompt_digest", {"salt": b"\x01" * 16}),
        ("prompt_digest", {"salt": b""}),
        ("prefix_digest", {"prefix": [1]}),
        ("size", {"receipt": b"\x00" * 70_000}),
        ("size", {"received": range(receipts.MAX_TOKENS + 1)}),
        ("signature", {"receipt": b""}),
        ("signature", {"receipt": b"\xff" * 100}),
        ("elapsed", {"events": RouterEvents(elapsed_us=1)}),
        ("allowed", {"refusal": lambda fingerprint: f"no {fingerprint.engine}"}),
    ],
)
def test_facts_that_do_not_fit(honest, check, changes):
    case = honest.spoilt(receipt={"total_us": 9_000_000}) if check == "elapsed" else honest
    assert refused(case.facts(**changes), case.ring) == check


def test_the_prefix_is_swapped(honest):
    case = honest.spoilt(prefix=[30, 31])
    assert refused(case.facts(prefix=[30, 32]), case.ring) == "prefix_digest"


def test_every_check_has_an_attack_here():
    """No check without a test that fails it."""
    import pathlib

    text = pathlib.Path(__file__).read_text()
    missing = [c.name for c in receipts.CHECKS if f'"{c.name}"' not in text]
    assert not missing
    assert len({c.name for c in receipts.CHECKS}) == len(receipts.CHECKS)


def test_an_assignment_must_be_signed_by_the_router_it_names(honest, stranger):
    order = honest.assignment().message
    ring = ring_of([honest.router.key_event, stranger.key_event], MARKET)
    with pytest.raises(BadSignature):
        open_assignment(seal(order, stranger), ring, MARKET)
    assert open_assignment(seal(order, honest.router), ring, MARKET).message == order


def test_billable_is_the_smaller_of_receipt_and_delivery():
    receipt = Receipt(output_tokens=5)
    assert [billable_output(receipt, n) for n in (-1, 0, 4, 5, 9)] == [0, 0, 4, 5, 5]


def test_the_refusal_crosses_borders_by_its_code():
    assert isinstance(error_for("RECEIPT_REFUSED", "no"), ReceiptRefused)


def test_the_documented_list_is_the_list():
    import pathlib

    page = (pathlib.Path(__file__).parents[2] / "docs" / "receipts.md").read_text()
    rows = [f"| {i} | `{c.name}` | {c.meaning} |" for i, c in enumerate(receipts.CHECKS, 1)]
    assert "\n".join(rows) in page
