"""The market a process takes part in: its signed descriptor, read once at start."""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.json_format import MessageToDict

from trueweight.protos.envelope import open_envelope, parse_envelope, parse_payload, ring_of
from trueweight.protos.errors import InvalidRequest, NotFound
from trueweight.protos.identity import KeyRing
from trueweight.protos.v1.envelope_pb2 import KeyEvent
from trueweight.protos.v1.market_pb2 import MarketDescriptor, Member
from trueweight.runtime.files import read_bounded

_MAX_MARKET_FILE_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Market:
    """A verified descriptor. ``ring`` knows the market's and all members' operational keys."""

    market_id: str
    descriptor: MarketDescriptor
    ring: KeyRing

    def members(self, role: Member.Role) -> tuple[Member, ...]:
        """All members of a role, in the descriptor's order."""
        return tuple(m for m in self.descriptor.members if m.role == role)

    def member(self, role: Member.Role) -> Member:
        """The first member of a role. Raises NotFound."""
        for candidate in self.descriptor.members:
            if candidate.role == role:
                return candidate
        raise NotFound(
            f"the market names no {Member.Role.Name(role).lower()}",
            hint="Is it the current market file? See 'trueweight market show'.",
        )

    def has_role(self, identity: str, role: Member.Role) -> bool:
        """True if the identity is a member of this role."""
        return any(m.identity == identity for m in self.members(role))

    def may_reinstate(self, identity: str) -> bool:
        """True for the market itself and its administrators."""
        return identity == self.market_id or self.has_role(identity, Member.ADMIN)


def write_market(path: Path, envelope: bytes, market_key_event: bytes) -> None:
    """Writes the public market file: signed bytes for machines, a readable copy for people."""
    market = _open(envelope, market_key_event)
    readable = MessageToDict(market.descriptor, preserving_proto_field_name=True)
    for member in readable.get("members", []):
        member.pop("key_event", None)
        member.pop("tls_certificate_pem", None)
    document = {
        "descriptor": base64.b64encode(envelope).decode(),
        "market_key_event": base64.b64encode(market_key_event).decode(),
        "readable": readable,
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(document, indent=2) + "\n")
    temporary.replace(path)


def load_market(path: Path) -> Market:
    """Reads and verifies a market file. Only the signed bytes count, never the readable copy."""
    try:
        if not path.exists():
            raise InvalidRequest(
                f"there is no market file at {path}",
                hint="Make one with 'trueweight market init'.",
            )
        document = json.loads(read_bounded(path, _MAX_MARKET_FILE_BYTES))
        envelope = base64.b64decode(document["descriptor"], validate=True)
        event = base64.b64decode(document["market_key_event"], validate=True)
    except (KeyError, TypeError, ValueError, RecursionError, binascii.Error):
        raise InvalidRequest(
            f"{path} is not a market file", hint="Name the market.json of 'trueweight market init'."
        ) from None
    return _open(envelope, event)


def _open(envelope: bytes, market_key_event: bytes) -> Market:
    market_id = parse_payload(parse_envelope(market_key_event), KeyEvent).identity
    ring = ring_of([market_key_event], market_id)
    opened = open_envelope(envelope, MarketDescriptor, ring, market_id, signer=market_id)
    ring = ring_of((m.key_event for m in opened.message.members), market_id, ring)
    return Market(market_id, opened.message, ring)
