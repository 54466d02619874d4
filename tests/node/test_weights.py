"""Weights: only what the market registered, the publisher signed and nobody altered is served."""

from __future__ import annotations

import pytest

from trueweight.node.weights import Registry, check_weights, read_registry
from trueweight.protos.envelope import seal
from trueweight.protos.errors import Unavailable, WeightsRefused
from trueweight.protos.manifest import build_manifest


async def served(world, model_id=None):
    empty = Registry(world.market.market_id, world.market.ring)
    registry = await read_registry(world.ledger, empty)
    return await check_weights(world.model_dir, registry, model_id)


class NeverStarted:
    """An engine that must not be reached."""

    async def start(self):
        raise AssertionError("the engine was started")

    async def close(self):
        pass


async def test_registered_unaltered_weights_are_served(world):
    weights = await served(world)
    assert (weights.model_id, weights.manifest_digest) == ("toy", world.manifest_digest)
    assert weights.publisher == world.signers["publisher"].identity
    assert (await served(world, "toy")).manifest.vocabulary_size == 300


async def test_attack_one_altered_byte_is_refused_before_the_engine_starts(world):
    path = world.model_dir / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[1_000_000] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsRefused, match=r"model\.safetensors") as caught:
        async with world.node(NeverStarted()):
            pass
    assert caught.value.exit_code == 65
    assert caught.value.hint


@pytest.mark.parametrize("change", ["shorter", "missing", "extra", "config"])
async def test_attack_changed_directory_is_refused(world, change):
    path = world.model_dir / "model.safetensors"
    match change:
        case "shorter":
            path.write_bytes(path.read_bytes()[:-1])
        case "missing":
            path.unlink()
        case "extra":
            (world.model_dir / "evil.py").write_text("import os")
        case "config":
            config = world.model_dir / "config.json"
            config.write_text(config.read_text().replace("300", "299"))
    with pytest.raises(WeightsRefused):
        await served(world)


async def test_a_missing_directory_is_refused(world):
    world.model_dir = world.root / "nowhere"
    with pytest.raises(WeightsRefused, match="no directory"):
        await served(world)


async def test_attack_entry_not_signed_by_the_market_is_ignored(world):
    world.ledger.entries.clear()
    world.ledger.add("registry-entry", world.sign_registry(world.signers["publisher"]))
    world.ledger.add("registry-entry", world.sign_registry(world.signers["stranger"]))
    world.ledger.add("registry-entry", b"garbage")
    with pytest.raises(WeightsRefused, match="sells no model"):
        await served(world)


async def test_attack_manifest_not_signed_by_its_publisher_is_refused(world):
    world.ledger.entries.clear()
    forged = world.sign_registry(manifest_signer=world.signers["stranger"])
    world.ledger.add("registry-entry", forged)
    with pytest.raises(WeightsRefused, match="not signed by its publisher"):
        await served(world)


async def test_attack_entry_that_names_another_digest_is_refused(world):
    world.ledger.entries.clear()
    world.ledger.add("registry-entry", world.sign_registry(manifest_digest=b"x" * 32))
    with pytest.raises(WeightsRefused, match="another manifest"):
        await served(world)


async def test_a_publisher_known_only_by_a_logged_key_event_counts(world):
    stranger = world.signers["stranger"]
    entry = world.sign_registry(manifest_signer=stranger, publisher=stranger.identity)
    world.ledger.entries.clear()
    world.ledger.add("registry-entry", entry)
    with pytest.raises(WeightsRefused):
        await served(world)
    world.ledger.add("key-event", stranger.key_event)
    assert (await served(world)).publisher == stranger.identity


async def test_revoked_weights_are_refused_and_a_later_entry_replaces(world):
    world.ledger.add("registry-entry", world.sign_registry(revoked=True))
    with pytest.raises(WeightsRefused, match="sells no"):
        await served(world)
    world.ledger.add("registry-entry", world.sign_registry())
    assert (await served(world)).model_id == "toy"


async def test_a_new_revision_under_the_name_makes_the_old_files_refused(world):
    old = (world.model_dir / "model.safetensors").read_bytes()
    (world.model_dir / "model.safetensors").write_bytes(old[:-1] + b"x")
    world.manifest = build_manifest(
        world.model_dir,
        market_id=world.market.market_id,
        name="toy",
        revision="2",
        licence="MIT",
        now_unix_ms=2,
    )
    world.ledger.add("registry-entry", world.sign_registry())
    assert (await served(world)).manifest.revision == "2"
    (world.model_dir / "model.safetensors").write_bytes(old)
    with pytest.raises(WeightsRefused):
        await served(world)


async def test_among_several_models_the_files_decide(world):
    other = build_manifest(
        world.model_dir,
        market_id=world.market.market_id,
        name="other",
        revision="1",
        licence="MIT",
        now_unix_ms=3,
    )
    other.files[-1].size_bytes += 1
    other.files[-1].sha256 = b"y" * 32
    envelope = seal(other, world.signers["publisher"])
    from trueweight.protos.envelope import digest_of

    world.ledger.add(
        "registry-entry",
        world.sign_registry(
            model_id="aaa", manifest_envelope=envelope, manifest_digest=digest_of(envelope)
        ),
    )
    assert (await served(world)).model_id == "toy"
    with pytest.raises(WeightsRefused):
        await served(world, "aaa")
    with pytest.raises(WeightsRefused, match="sells no bbb"):
        await served(world, "bbb")


async def test_without_a_ledger_the_node_does_not_start(world):
    world.ledger.down = True
    with pytest.raises(Unavailable):
        async with world.node(NeverStarted()):
            pass
