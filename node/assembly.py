"""Puts a node's parts together from configuration, engine and checked weights. No I/O."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trueweight.node.admission import ModelTerms, Terms
from trueweight.node.challenge import Challenger
from trueweight.node.config import NodeConfig, advertised_endpoint
from trueweight.node.context import NodeContext
from trueweight.node.engine import Engine
from trueweight.node.journal import ReceiptJournal
from trueweight.node.registration import OfferTerms, sign_offer
from trueweight.node.scoring import Scorer
from trueweight.node.service import NodeService
from trueweight.node.session import NodeSession
from trueweight.node.weights import ServedWeights
from trueweight.node.workload import Workload
from trueweight.protos.errors import WeightsRefused
from trueweight.protos.identity import Signer
from trueweight.protos.v1.market_pb2 import Member, OfferedModel
from trueweight.runtime import rpc
from trueweight.runtime.clock import Clock


@dataclass(frozen=True)
class Parts:
    """What a started node consists of."""

    config: NodeConfig
    signer: Signer
    engine: Engine
    weights: ServedWeights
    journal: ReceiptJournal
    listening: str
    certificate_pem: str
    clock: Clock
    random: Callable[[int], bytes]


def make_context(parts: Parts) -> NodeContext:
    """The context of all sessions. Raises WeightsRefused if engine and weights do not fit."""
    config, market = parts.config, parts.config.market
    if parts.engine.limits.vocabulary_size < parts.weights.manifest.vocabulary_size:
        raise WeightsRefused(
            "the engine's vocabulary is smaller than the manifest's",
            hint="The engine runs another model than --model.",
        )
    model = _model_terms(parts)
    capacity = config.capacity or parts.engine.limits.max_running
    offer = _offer_terms(parts, model, capacity)
    routers = {m.identity for m in market.members(Member.ROUTER)}
    if config.router is not None:
        routers = {config.router.identity}
    return NodeContext(
        signer=parts.signer,
        market_id=market.market_id,
        ring=market.ring,
        router_ids=frozenset() if config.score_only else frozenset(routers),
        terms=Terms(
            market_id=market.market_id,
            node_id=parts.signer.identity,
            models={parts.weights.manifest_digest: model},
            capacity=capacity,
        ),
        engine=parts.engine,
        clock=parts.clock,
        random=parts.random,
        journal=parts.journal,
        workload=Workload(parts.journal.knows),
        offer=lambda: sign_offer(offer, parts.signer, parts.clock.now_unix_ms()),
        timing=config.timing,
    )


def make_service(
    parts: Parts, node: NodeContext, on_session: Callable[[NodeSession], None]
) -> NodeService:
    """The gRPC service. Verifiers of the market may challenge; who may ask for scores, which cost
    a prefill each, is the operator's decision."""
    config, market = parts.config, parts.config.market
    verifiers = {m.identity for m in market.members(Member.VERIFIER)}
    digest = parts.weights.manifest_digest
    context_tokens = node.terms.models[digest].max_context_tokens
    return NodeService(
        node,
        authenticator=rpc.Authenticator(
            parts.signer.identity, market.market_id, market.ring, parts.clock
        ),
        scorer=Scorer(parts.engine, digest, context_tokens),
        challenger=Challenger(parts.weights, parts.signer.identity),
        score_for=config.score_for,
        challengers=frozenset(verifiers | config.score_for),
        manifests=(parts.weights.manifest_envelope,),
        on_session=on_session,
    )


def _model_terms(parts: Parts) -> ModelTerms:
    manifest, context_tokens = parts.weights.manifest, parts.engine.limits.max_context_tokens
    if manifest.max_context_tokens:
        context_tokens = min(context_tokens, manifest.max_context_tokens)
    return ModelTerms(
        ask_input_nano_per_mtok=parts.config.ask_input_nano_per_mtok,
        ask_output_nano_per_mtok=parts.config.ask_output_nano_per_mtok,
        max_context_tokens=context_tokens,
        vocabulary_size=manifest.vocabulary_size,
    )


def _offer_terms(parts: Parts, model: ModelTerms, capacity: int) -> OfferTerms:
    return OfferTerms(
        market_id=parts.config.market.market_id,
        endpoint=advertised_endpoint(parts.config, parts.listening),
        tls_certificate_pem=parts.certificate_pem,
        models=(
            OfferedModel(
                manifest_digest=parts.weights.manifest_digest,
                ask_input_nano_per_mtok=model.ask_input_nano_per_mtok,
                ask_output_nano_per_mtok=model.ask_output_nano_per_mtok,
                max_context_tokens=model.max_context_tokens,
            ),
        ),
        fingerprint=parts.engine.fingerprint,
        capacity=capacity,
        lease_ms=parts.config.lease_ms,
    )
