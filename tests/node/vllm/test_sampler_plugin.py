"""The V1 plug-in under every order of batch updates: each request gets its own canonical token,
and nobody else's row changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.node.test_kernels import SEEDS, VOCABULARY, samplings
from trueweight.protos.sampling import Sampling, rows_of, sample_rows

pytestmark = pytest.mark.vllm

SLOTS = 5
PROMPT = [3, 4, 5]


@dataclass
class Request:
    """What the batch holds; ``sampling`` None is a request that is not ours."""

    sampling: Sampling | None
    seed: int
    prefix: list[int]
    output: list[int] = field(default_factory=list)


def new_plugin():
    from trueweight.node.vllm.sampler_plugin import CanonicalSampler

    model = SimpleNamespace(model="/nowhere", get_vocab_size=lambda: VOCABULARY)
    return CanonicalSampler(SimpleNamespace(model_config=model), None, is_pin_memory=False)


def added(index, request):
    from vllm import SamplingParams

    from trueweight.node.vllm.wire import EngineOrder

    extra = None
    if request.sampling is not None:
        extra = EngineOrder(request.sampling, request.seed, len(PROMPT)).pack()
    params = SamplingParams(extra_args=extra)
    return index, params, [*PROMPT, *request.prefix], request.output


def moved(batch, source, target, swap):
    """What vLLM says of a move, and the same on our picture of the batch."""
    from vllm.v1.sample.logits_processor import MoveDirectionality

    first, second = batch.pop(source, None), batch.pop(target, None)
    if first is not None:
        batch[target] = first
    if swap and second is not None:
        batch[source] = second
    way = MoveDirectionality.SWAP if swap else MoveDirectionality.UNIDIRECTIONAL
    return source, target, way


INDEX = st.integers(0, SLOTS - 1)
REQUESTS = st.builds(
    Request,
    st.one_of(st.none(), st.just(Sampling()), samplings()),
    SEEDS,
    st.lists(st.integers(0, VOCABULARY - 1), max_size=3),
)
# vLLM's own order within one update: removed, added, moved.
UPDATES = st.tuples(
    st.sets(INDEX, max_size=2),
    st.dictionaries(INDEX, REQUESTS, max_size=2),
    st.lists(st.tuples(INDEX, INDEX, st.booleans()).filter(lambda m: m[0] != m[1]), max_size=2),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(UPDATES, min_size=1, max_size=6), st.integers(0, 2**32))
def test_each_request_gets_its_token_and_no_other_row_changes(updates, noise_seed):
    import torch
    from vllm.v1.sample.logits_processor import BatchUpdate

    plugin, batch = new_plugin(), {}
    generator = np.random.default_rng(noise_seed)
    for removed, new, moves in updates:
        for index in removed:
            batch.pop(index, None)
        batch.update(new)
        said = [added(index, request) for index, request in new.items()]
        shifted = [moved(batch, *move) for move in moves]
        plugin.update_state(
            BatchUpdate(batch_size=SLOTS, removed=list(removed), added=said, moved=shifted)
        )
        for _ in range(2):
            before = generator.standard_normal((SLOTS, VOCABULARY)).astype(np.float32) * 3
            after = plugin.apply(torch.from_numpy(before.copy())).numpy()
            check_step(batch, before, after)
        plugin.update_state(None)


def check_step(batch, before, after):
    for index in range(SLOTS):
        request = batch.get(index)
        if request is None or request.sampling is None:
            assert (after[index] == before[index]).all()
            token = 1
        else:
            (token,) = np.flatnonzero(after[index] != before[index]).tolist()
            assert after[index, token] == np.inf
            done = [*request.prefix, *request.output]
            rows = rows_of(request.sampling, request.seed, PROMPT, done, [], count=1)
            assert [token] == sample_rows(before[index : index + 1], rows)
        if request is not None:
            request.output.append(token)
