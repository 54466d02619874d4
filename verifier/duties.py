"""Everything a verifier may have to do. Each duty's ``key`` says what it is about."""

from __future__ import annotations

from dataclasses import dataclass

from trueweight.verifier.calibration_file import Measured
from trueweight.verifier.selection import ReceiptLeaf


@dataclass(frozen=True, slots=True)
class OpenEpoch:
    """Commit to a new secret and freeze new rates."""

    epoch: int

    @property
    def key(self) -> str:
        return f"open-epoch/{self.epoch}"


@dataclass(frozen=True, slots=True)
class PublishCalibration:
    """Sign a measurement for weights that the market sells and has none as new for."""

    manifest_digest: bytes
    measured: Measured

    @property
    def key(self) -> str:
        return f"calibration/{self.manifest_digest.hex()}/{self.measured.version}"


@dataclass(frozen=True, slots=True)
class RevealEpoch:
    """Publish the secret of an epoch that is over."""

    epoch: int

    @property
    def key(self) -> str:
        return f"reveal-epoch/{self.epoch}"


@dataclass(frozen=True, slots=True)
class RequestAudit:
    """Say in the log which receipt is audited, before its transcript is opened."""

    receipt: ReceiptLeaf
    epoch: int

    @property
    def key(self) -> str:
        return f"request-audit/{self.receipt.receipt_digest.hex()}"


@dataclass(frozen=True, slots=True)
class PerformAudit:
    """Open the transcript, score it, publish the verdict."""

    receipt: ReceiptLeaf
    epoch: int

    @property
    def key(self) -> str:
        return f"audit/{self.receipt.receipt_digest.hex()}"


@dataclass(frozen=True, slots=True)
class PublishCommitment:
    """Commit to a finished verdict before anybody's margins are public."""

    receipt_digest: bytes

    @property
    def key(self) -> str:
        return f"commit/{self.receipt_digest.hex()}"


@dataclass(frozen=True, slots=True)
class PublishVerdict:
    """Publish a verdict that was committed to."""

    receipt_digest: bytes

    @property
    def key(self) -> str:
        return f"verdict/{self.receipt_digest.hex()}"


@dataclass(frozen=True, slots=True)
class ApplyRefund:
    """Give the client of one receipt its money back."""

    receipt_digest: bytes

    @property
    def key(self) -> str:
        return f"refund/{self.receipt_digest.hex()}"


@dataclass(frozen=True, slots=True)
class PublishConviction:
    """State in the log that a node's wealth crossed the threshold."""

    node_id: str

    @property
    def key(self) -> str:
        return f"convict/{self.node_id}"


@dataclass(frozen=True, slots=True)
class PublishSuspension:
    """Tell routers to stop routing to a convicted node."""

    node_id: str

    @property
    def key(self) -> str:
        return f"suspend/{self.node_id}"


@dataclass(frozen=True, slots=True)
class ApplyConvict:
    """Move the money of a convicted node."""

    node_id: str

    @property
    def key(self) -> str:
        return f"forfeit/{self.node_id}"


@dataclass(frozen=True, slots=True)
class ReleaseEarnings:
    """Let a clear node have what it earned in epochs that are over and audited."""

    node_id: str
    epoch: int
    below_index: int

    @property
    def key(self) -> str:
        return f"release/{self.epoch}/{self.node_id}"


Duty = (
    PublishCalibration
    | OpenEpoch
    | RevealEpoch
    | RequestAudit
    | PerformAudit
    | PublishCommitment
    | PublishVerdict
    | ApplyRefund
    | PublishConviction
    | PublishSuspension
    | ApplyConvict
    | ReleaseEarnings
)
