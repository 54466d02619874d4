"""The demo's result: one value, shown as tables for people and as JSON for machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from trueweight.protos.money import format_credits
from trueweight.simulation.judgement import Check
from trueweight.simulation.traffic import Outcome
from trueweight.verifier.report import ExplainedVerdict, NodeRow

FORMAT = "trueweight-demo-1"


@dataclass(frozen=True)
class NodeFacts:
    """A node's row: who it is, what it asks, what the verdicts say of it."""

    name: str
    node_id: str
    ask_input: str
    ask_output: str
    cheating: bool
    requests: int
    evidence: NodeRow | None
    steps: Sequence[ExplainedVerdict] = ()
    words: str = ""


@dataclass(frozen=True)
class Result:
    """Everything that a run of the demo found. Amounts in nanocredits."""

    model: str
    engine: str
    outcomes: Sequence[Outcome]
    nodes: Sequence[NodeFacts]
    before: Mapping[str, int]
    after: Mapping[str, int]
    challenges: Mapping[str, Mapping[str, Any]]
    fsck: Mapping[str, Any]
    checks: Sequence[Check]
    seconds: Mapping[str, float]
    directory: str
    machine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every demand was met."""
        return all(check.passed for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """The document that ``--json`` writes; see docs/demo.md."""
        return {
            "format": FORMAT,
            "passed": self.passed,
            "checks": [asdict(check) for check in self.checks],
            "model": self.model,
            "engine": self.engine,
            "requests": [outcome.as_json() for outcome in self.outcomes],
            "nodes": [asdict(node) for node in self.nodes],
            "balances": {
                account: {
                    "before_nano": self.before.get(account, 0),
                    "after_nano": self.after.get(account, 0),
                }
                for account in sorted({*self.before, *self.after})
            },
            "challenges": dict(self.challenges),
            "fsck": dict(self.fsck),
            "seconds": dict(self.seconds),
            "machine": dict(self.machine),
            "directory": self.directory,
        }


def show(result: Result, console: Console) -> None:
    """All tables, the verdict on the run last."""
    names = {node.node_id: node.name for node in result.nodes}
    console.print(_requests_table(result.outcomes, names))
    console.print(_nodes_table(result.nodes))
    for node in result.nodes:
        if node.evidence is not None and node.evidence.convicted:
            console.print(_evidence_table(node))
            console.print(node.words, highlight=False)
    _show_challenges(result.challenges, console)
    console.print(_credits_table(result, names))
    console.print(_checks_table(result.checks))


def _requests_table(outcomes: Sequence[Outcome], names: Mapping[str, str]) -> Table:
    """Route, price, tokens and time to the first token of every request."""
    table = Table(title="Requests", title_justify="left")
    for column in ("#", "client", "kind", "node", "route"):
        table.add_column(column)
    for column in ("out price", "in", "out", "end", "credits", "TTFT ms", "total ms"):
        table.add_column(column, justify="right")
    for outcome in outcomes:
        first = outcome.first_token_ms
        table.add_row(
            f"{outcome.plan.number}",
            outcome.plan.client,
            outcome.plan.kind,
            names.get(outcome.node_id, outcome.node_id or "-"),
            outcome.error or outcome.why,
            format_credits(outcome.ask_output_nano_per_mtok),
            f"{outcome.prompt_tokens}",
            f"{outcome.completion_tokens}",
            outcome.finish_reason,
            format_credits(outcome.cost_nano),
            "-" if first is None else f"{first:.0f}",
            f"{outcome.total_ms:.0f}",
        )
    return table


def _nodes_table(nodes: Sequence[NodeFacts]) -> Table:
    """What the log's verdicts say of each node."""
    table = Table(title="Verdicts, recomputed from the public log", title_justify="left")
    for column in ("node", "really is", "verdict"):
        table.add_column(column)
    for column in ("in price", "out price", "requests", "audits", "tokens", "mean x", "wealth"):
        table.add_column(column, justify="right")
    for node in nodes:
        row = node.evidence
        state = row.state if row else "no audits"
        table.add_row(
            node.name,
            "cheating" if node.cheating else "honest",
            f"[red]{state}[/]" if row and row.convicted else f"[green]{state}[/]",
            node.ask_input,
            node.ask_output,
            f"{node.requests}",
            f"{row.audits}" if row else "0",
            f"{row.audited_tokens}" if row else "0",
            f"{row.mean_x:.6f}" if row else "-",
            f"{row.largest_wealth:.3g}" if row else "-",
        )
    return table


def _evidence_table(node: NodeFacts) -> Table:
    """Audit by audit, how a node's wealth came about."""
    table = Table(title=f"The evidence against {node.name}", title_justify="left")
    for column in ("receipt leaf", "class", "outcome"):
        table.add_column(column)
    for column in ("tokens", "exact", "mean x", "honest at most", "wealth"):
        table.add_column(column, justify="right")
    for step in node.steps:
        table.add_row(
            f"{step.receipt_index}",
            step.parameter_class,
            step.outcome.lower() + (f" ({step.note})" if step.note else ""),
            f"{step.tokens}",
            f"{step.exact}",
            f"{step.mean_x:.6f}",
            f"{step.mu0:.6f}" if step.mu0 else "-",
            f"{step.wealth:.4g}",
        )
    return table


def _credits_table(result: Result, names: Mapping[str, str]) -> Table:
    """Everyone's credits before and after."""
    table = Table(title="Credits (available)", title_justify="left")
    table.add_column("account")
    for column in ("before", "after", "change"):
        table.add_column(column, justify="right")
    for account in sorted({*result.before, *result.after}):
        before, after = result.before.get(account, 0), result.after.get(account, 0)
        table.add_row(
            _account_name(account, names),
            format_credits(before),
            format_credits(after),
            ("+" if after > before else "") + format_credits(after - before),
        )
    return table


def _account_name(account: str, names: Mapping[str, str]) -> str:
    """An account with the node's name instead of its id."""
    kind, _, owner = account.partition(":")
    return f"{kind}:{names.get(owner, owner)}"


def _checks_table(checks: Sequence[Check]) -> Table:
    """What was demanded of the run, and whether it held."""
    table = Table(title="Did the market do its job?", title_justify="left")
    table.add_column("")
    table.add_column("demand")
    table.add_column("what was found", overflow="fold")
    for check in checks:
        mark = "[green]yes[/]" if check.passed else "[bold red]NO[/]"
        table.add_row(mark, check.name, check.detail)
    return table


def _show_challenges(challenges: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    if not challenges:
        return
    table = Table(
        title="Weights challenge: random chunks under a fresh nonce", title_justify="left"
    )
    for column in ("node", "answer", "chunks", "ms"):
        table.add_column(column)
    for name, facts in challenges.items():
        answer = "holds the registered bytes" if facts.get("passed") else f"FAILED {facts}"
        chunks, elapsed = len(facts.get("chunks", ())), facts.get("elapsed_ms", "-")
        table.add_row(name, answer, f"{chunks}", f"{elapsed}")
    console.print(table)
    proved = next((f for f in challenges.values() if f.get("proves")), None)
    if proved is not None:
        console.print(f"It proves: {proved['proves']}", highlight=False)
        console.print(f"It does not prove: {proved['does_not_prove']}", highlight=False)
