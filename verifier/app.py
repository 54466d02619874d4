"""Putting a verifier together: from its parts (simulation, tests) or from a configuration."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trueweight.protos.identity import Signer
from trueweight.runtime import rpc
from trueweight.runtime.clock import Clock, SystemClock
from trueweight.runtime.ledger_port import LedgerPort, connect_ledger
from trueweight.runtime.market import Market
from trueweight.verifier.audit import Auditor
from trueweight.verifier.calibration_file import Measured
from trueweight.verifier.deterrence import KNOWN_CHEATS, Cheat
from trueweight.verifier.epochs import RatePolicy, SecretStore, within_terms
from trueweight.verifier.outbox import Outbox
from trueweight.verifier.plan import Agenda
from trueweight.verifier.publishing import REWARD_PPM, Publisher
from trueweight.verifier.reference import GrpcNode, Reference, Scorer
from trueweight.verifier.service import VerifierService
from trueweight.verifier.state import LogView
from trueweight.verifier.transcripts import GrpcTranscripts, TranscriptSource
from trueweight.verifier.work import Worker


@dataclass(frozen=True)
class Connections:
    """What a verifier talks to. In process or over gRPC, it cannot tell."""

    ledger: LedgerPort
    transcripts: TranscriptSource
    reference: Reference


class VerifierApp:
    """A verifier ready to run. ``service`` has its state, for status and tests."""

    def __init__(
        self,
        market: Market,
        signer: Signer,
        connections: Connections,
        *,
        data_directory: Path,
        policy: RatePolicy | None = None,
        measured: Sequence[Measured] = (),
        clock: Clock | None = None,
        random: Callable[[int], bytes] = os.urandom,
        cheats: Sequence[Cheat] = KNOWN_CHEATS,
        reward_ppm: int = REWARD_PPM,
    ) -> None:
        clock = clock or SystemClock()
        view = LogView(market)
        secrets = SecretStore(data_directory, random)
        agenda = Agenda(
            view,
            signer.identity,
            secrets,
            within_terms(policy or RatePolicy(), market.descriptor),
            Outbox(data_directory / "outbox"),
            measured=tuple(measured),
        )
        self.scorer = Scorer(connections.reference)
        auditor = Auditor(view, secrets, connections.transcripts, self.scorer)
        publisher = Publisher(connections.ledger, signer)
        worker = Worker(
            agenda,
            auditor,
            publisher,
            connections.ledger,
            clock,
            reward_ppm=reward_ppm,
            cheats=cheats,
        )
        self.service = VerifierService(connections.ledger, worker, clock)
        self._connections = connections

    async def run(self, stop: asyncio.Event) -> None:
        """Works until ``stop``; closes what it talks through except the ledger port."""
        try:
            await self.service.run(stop)
        finally:
            await self.scorer.close()
            await self._connections.transcripts.close()


@dataclass(frozen=True)
class VerifierConfig:
    """A verifier process. The reference node's certificate is pinned; its id may be left empty."""

    market: Market
    signer: Signer
    data_directory: Path
    reference_endpoint: str
    reference_certificate_pem: str
    reference_id: str = ""
    policy: RatePolicy = field(default_factory=RatePolicy)
    measured: tuple[Measured, ...] = ()
    cheats: tuple[Cheat, ...] = KNOWN_CHEATS
    # Of what a conviction forfeits, for the verifier that applies it.
    reward_ppm: int = REWARD_PPM


def access_tokens(market: Market, signer: Signer, clock: Clock) -> rpc.AccessTokens:
    """Tokens that prove this verifier to other roles."""
    return rpc.AccessTokens(signer, market.market_id, clock, os.urandom)


async def run_verifier(
    config: VerifierConfig, stop: asyncio.Event, on_ready: Callable[[], None]
) -> None:
    """Connects, runs until ``stop``, closes. ``on_ready`` is called once audits can be owed."""
    clock = SystemClock()
    tokens = access_tokens(config.market, config.signer, clock)
    ledger = connect_ledger(config.market, tokens)
    connections = Connections(
        ledger=ledger,
        transcripts=GrpcTranscripts(config.market, tokens),
        reference=GrpcNode(
            config.reference_endpoint,
            config.reference_certificate_pem,
            config.reference_id,
            tokens,
        ),
    )
    app = VerifierApp(
        config.market,
        config.signer,
        connections,
        data_directory=config.data_directory,
        policy=config.policy,
        measured=config.measured,
        clock=clock,
        cheats=config.cheats,
        reward_ppm=config.reward_ppm,
    )
    announcer = asyncio.create_task(_announce(app.service.ready, on_ready))
    try:
        await app.run(stop)
    finally:
        announcer.cancel()
        await ledger.close()


async def _announce(ready: asyncio.Event, on_ready: Callable[[], None]) -> None:
    await ready.wait()
    on_ready()
