"""What market to run on this machine: nodes, clients, model, engine. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trueweight.simulation.demo_files import DEMO_MODEL

ENGINES = ("vllm", "synthetic")


@dataclass(frozen=True)
class NodePlan:
    """One worker node. Asks in credits per million tokens. ``cheating`` composes another engine
    into the node from outside; the node's own code has no switch for it."""

    name: str
    ask_input: str
    ask_output: str
    cheating: bool = False
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClientPlan:
    """A client with a prepaid balance in credits."""

    name: str
    deposit: str

    @property
    def account(self) -> str:
        """Its account at the ledger."""
        return f"client:{self.name}"


@dataclass(frozen=True)
class MarketSettings:
    """What market to run. ``bond`` is what each node stakes, in credits."""

    directory: Path
    nodes: tuple[NodePlan, ...]
    clients: tuple[ClientPlan, ...]
    engine: str = "vllm"
    model: Path = DEMO_MODEL
    model_id: str = ""
    licence: str = ""
    bond: str = "1"
    log_level: str = "info"
    verifier_options: tuple[str, ...] = ()
    router_options: tuple[str, ...] = ()
    engine_options: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    calibration_file: Path | None = None

    @property
    def sold_as(self) -> str:
        """The name that clients put into "model"."""
        return self.model_id or self.model.resolve().name

    @property
    def sold_under(self) -> str:
        """The licence that clients are shown; nothing is claimed for a model that is not ours."""
        is_ours = self.model.resolve() == DEMO_MODEL
        return self.licence or ("PSF-2.0" if is_ours else "NOASSERTION")

    @property
    def calibration(self) -> Path | None:
        """The calibration that was named, else the one that lies beside the model, if any."""
        if self.calibration_file is not None:
            return self.calibration_file.resolve()
        path = self.model.resolve().with_name(self.model.resolve().name + ".calibration.json")
        return path if path.is_file() else None
