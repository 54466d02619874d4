"""A witness against a log that is honest, forks, or goes back."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from trueweight.ledger import witness
from trueweight.ledger.commands import ledger as commands
from trueweight.protos import merkle
from trueweight.protos.checkpoint import LogState, log_origin, sign_note
from trueweight.protos.errors import BadSignature, InvalidRequest
from trueweight.protos.identity import public_bytes
from trueweight.protos.v1 import log_pb2
from trueweight.simulation.ledger_world import make_signer

SIGNER = make_signer("ledger", "m")
ORIGIN, KEYS = log_origin("m"), [public_bytes(SIGNER.key)]


class Log:
    """A log that may be swapped for another one behind the witness's back."""

    def __init__(self, bodies):
        self.hashes, self.at = [merkle.leaf_hash(b) for b in bodies], 1000
        self.signer = SIGNER

    async def checkpoint(self):
        self.at += 1
        state = LogState(ORIGIN, len(self.hashes), merkle.root(self.hashes), self.at)
        return log_pb2.Checkpoint(note=sign_note(state, self.signer.key))

    async def consistency(self, old, new):
        if new > len(self.hashes):
            raise InvalidRequest("the log is not that large")
        path = merkle.consistency_path(old, new, merkle.fetch_from(self.hashes))
        return log_pb2.ConsistencyProof(path=path)


def bodies(count, salt=b""):
    return [salt + bytes([n]) for n in range(count)]


async def test_an_honest_log_that_grows_is_followed(tmp_path):
    seen = None
    for size in (0, 1, 1, 5, 70, 200):
        seen = await witness.look(Log(bodies(size)), seen, ORIGIN, KEYS)
        witness.remember(tmp_path / "w.json", seen)
        assert witness.load(tmp_path / "w.json", ORIGIN, KEYS) == seen
    assert seen.state.size == 200


@pytest.mark.parametrize("size", [50, 60])
async def test_attack_a_fork_is_reported_with_both_notes(size):
    seen = await witness.look(Log(bodies(50)), None, ORIGIN, KEYS)
    forged = Log([*bodies(49), *bodies(size - 49, b"x")])
    with pytest.raises(witness.LogForked) as caught:
        await witness.look(forged, seen, ORIGIN, KEYS)
    assert caught.value.hint.count(ORIGIN) == 4


async def test_attack_a_rollback_is_reported():
    seen = await witness.look(Log(bodies(50)), None, ORIGIN, KEYS)
    older = Log(bodies(40))
    older.at = 5000
    with pytest.raises(witness.LogForked, match="went back from 50 to 40"):
        await witness.look(older, seen, ORIGIN, KEYS)


def grown(bodies, old):
    """A log that shows its first ``old`` leaves under the old note's time, and proves all of it."""
    log = Log(bodies)
    state = LogState(ORIGIN, old, merkle.root(log.hashes[:old]), 1001)

    async def checkpoint():
        return log_pb2.Checkpoint(note=sign_note(state, SIGNER.key))

    log.checkpoint = checkpoint
    return log


async def test_attack_a_replayed_old_note_does_not_make_the_witness_forget(tmp_path):
    memory = tmp_path / "w.json"
    longer = Log(bodies(100))
    longer.at = 5000
    seen = await witness.look(longer, None, ORIGIN, KEYS)
    # The old note is genuine, and its tree is the beginning of the remembered one.
    seen = await witness.look(grown(bodies(100), 50), seen, ORIGIN, KEYS)
    witness.remember(memory, seen)
    assert witness.load(memory, ORIGIN, KEYS).state.size == 100
    fork = Log([*bodies(50), *bodies(70, b"x")])
    fork.at = 6000
    with pytest.raises(witness.LogForked, match="100 leaves is not the beginning of that of 120"):
        await witness.look(fork, witness.load(memory, ORIGIN, KEYS), ORIGIN, KEYS)


async def test_attack_an_older_note_of_the_same_tree_does_not_set_the_clock_back():
    log = Log(bodies(50))
    log.at = 5000
    seen = await witness.look(log, None, ORIGIN, KEYS)
    log.at = 1000
    assert await witness.look(log, seen, ORIGIN, KEYS) == seen


async def test_attack_a_checkpoint_by_another_key_is_no_checkpoint():
    log = Log(bodies(3))
    log.signer = make_signer("mallory", "m")
    with pytest.raises(BadSignature):
        await witness.look(log, None, ORIGIN, KEYS)


def test_a_damaged_memory_is_refused(tmp_path):
    (tmp_path / "w.json").write_text("{}")
    with pytest.raises(InvalidRequest):
        witness.load(tmp_path / "w.json", ORIGIN, KEYS)


def test_every_command_explains_itself():
    for name in commands.commands:
        result = CliRunner().invoke(commands, [name, "--help"])
        assert result.exit_code == 0
        assert commands.commands[name].help
