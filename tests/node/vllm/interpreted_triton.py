"""Run by ``test_triton.py`` in a process of its own, where Triton's interpreter stands for a GPU.

The Triton kernels against the reference, and the plug-in and scorer of Model Runner V2 over vLLM's
own classes.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language

# Without a GPU vLLM puts placeholders here.
stub = ModuleType("vllm.triton_utils")
vars(stub).update(triton=triton, tl=triton.language, HAS_TRITON=True)
sys.modules["vllm.triton_utils"] = stub

from vllm import SamplingParams  # noqa: E402
from vllm.v1.worker.gpu.sample.logits_processor.interface import (  # noqa: E402
    LogitsContext,
    LogitsProcRequestState,
)
from vllm.v1.worker.gpu.sample.logits_processor.loader import (  # noqa: E402
    _load_v2_logitsprocs_by_fqcns,
)
from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker  # noqa: E402

import trueweight.simulation  # noqa: E402
from trueweight.node.golden import golden_cases  # noqa: E402
from trueweight.node.grammar import Grammars  # noqa: E402
from trueweight.node.vllm import self_test_v2  # noqa: E402
from trueweight.node.vllm.options import SAMPLER_PLUGINS  # noqa: E402
from trueweight.node.vllm.sampler_v2 import CanonicalSampler  # noqa: E402
from trueweight.node.vllm.scorer_v2 import DeviceScorer  # noqa: E402
from trueweight.node.vllm.self_test_v2 import check_device, native_is_canonical  # noqa: E402
from trueweight.node.vllm.wire import EngineOrder, unpack_score  # noqa: E402
from trueweight.protos.errors import EngineError  # noqa: E402
from trueweight.protos.grammar import source_of, with_grammar  # noqa: E402
from trueweight.protos.sampling import (  # noqa: E402
    Sampling,
    resolve,
    rows_of,
    sample_rows,
    score_rows,
)

CPU = torch.device("cpu")
SIZE = 2048  # of the demo model, whose tokenizer serves the grammar; two blocks of the kernels
STOP = 2
DEMO = Path(trueweight.simulation.__path__[0]) / "models" / "tw-demo"
SOURCE = source_of("regex", "[a-f]{40,}")
STATIC = resolve(
    Sampling(
        logit_bias=((1500, 4.0), (7, -3.0)),
        bad_words=((5,), (9, 11)),
        min_tokens=30,
        stop_token_ids=(STOP, 40),
        temperature=0.8,
    )
)
SAMPLINGS = (
    Sampling(),
    Sampling(temperature=0.0),
    STATIC,
    Sampling(repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.2),
    Sampling(temperature=0.7, top_k=30, top_p=0.9, min_p=0.01),
    replace(STATIC, allowed_token_ids=tuple(range(100, 1400, 7))),
    with_grammar(Sampling(stop_token_ids=(STOP,), min_tokens=3), SOURCE),
)
CONFIG = SimpleNamespace(model_config=SimpleNamespace(model=str(DEMO), get_vocab_size=lambda: SIZE))


def logits_of(rows, seed=0):
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.standard_normal((rows, SIZE)).astype(np.float32) * 4)


def test_golden_vectors_on_the_device():
    found = check_device(CPU, every=3)
    assert found.positions == found.equal == 33


def test_all_claims_of_the_golden_vectors_with_top_p():
    cases, tolerance = golden_cases()
    cut = [case for case in cases if case.sampling.top_p < 1.0][::2]
    assert len(cut) >= 12
    rules, batch = self_test_v2._batch(cut, cut[0].logits.size, CPU)
    for claim in range(6):
        self_test_v2._check_scores(cut, claim, rules, batch, tolerance)


def test_vllms_own_sampler_gives_the_golden_tokens_of_plain_sampling():
    assert native_is_canonical(CPU)


class World:
    """The runner's state for some requests in slots of their own."""

    def __init__(self, slots):
        self.tokens = torch.zeros((slots, 64), dtype=torch.int32)
        states = LogitsProcRequestState(
            device=CPU,
            max_num_reqs=slots,
            vocab_size=SIZE,
            all_token_ids=SimpleNamespace(gpu=self.tokens),
            prompt_len=None,
            prefill_len=None,
            total_len=None,
        )
        self.plugin = CanonicalSampler(CONFIG, states)

    def add(self, slot, sampling, prompt, prefix, **order):
        history = [*prompt, *prefix]
        self.tokens[slot, : len(history)] = torch.tensor(history, dtype=torch.int32)
        source = SOURCE if sampling.grammar_sha256 else b""
        packed = EngineOrder(sampling, 77 + slot, len(prompt), grammar_source=source, **order)
        return self.plugin.add_request(slot, SamplingParams(extra_args=packed.pack()))

    def step(self, logits, slots, lengths):
        self.plugin.apply_staged_writes()
        rows = torch.tensor(slots, dtype=torch.int32)
        context = LogitsContext(
            expanded_idx_mapping=rows,
            idx_mapping=rows,
            idx_mapping_np=np.array(slots),
            expanded_local_pos=torch.zeros_like(rows),
            input_ids=torch.zeros_like(rows),
            pos=torch.tensor(lengths) - 1,
            seq_lens_upper_bound_np=np.array(lengths),
        )
        return self.plugin.apply(logits, context)


def test_the_plugin_takes_the_canonical_token_of_each_row_and_spares_the_others():
    """Slots in another order than rows, continuations, a foreign and a native request between."""
    slots = len(SAMPLINGS) + 2
    world, count = World(slots), len(SAMPLINGS)
    prompt, prefix = [3, 4, 5, 6], [40, 41]
    for slot, sampling in enumerate(SAMPLINGS):
        assert world.add(slot, sampling, prompt, prefix if slot % 2 else [])
    assert not world.plugin.add_request(count, SamplingParams())
    assert not world.add(count + 1, Sampling(), prompt, [], native=True)
    cursor = Grammars.from_directory(DEMO, SIZE).cursor(SOURCE, [STOP])
    output = {slot: [] for slot in range(slots)}
    order = list(reversed(range(slots)))
    for step in range(3):
        before = logits_of(slots, step)
        begun = [len(prompt) + len(prefix) * (s % 2) * (s < count) for s in order]
        lengths = [n + len(output[s]) for n, s in zip(begun, order, strict=True)]
        after = world.step(before.clone(), order, lengths)
        for row, slot in enumerate(order):
            if slot >= count:
                assert torch.equal(after[row], before[row])
                token = 9
            else:
                changed = torch.nonzero(after[row] != before[row]).flatten().tolist()
                assert len(changed) == 1 and after[row, changed[0]] == torch.inf
                token = changed[0]
                mine = SAMPLINGS[slot]
                head = prefix if slot % 2 else []
                done = [*head, *output[slot]]
                masks = [cursor.mask_after(done, len(done))] if mine.grammar_sha256 else None
                (claim,) = rows_of(mine, 77 + slot, prompt, done, [], count=1, masks=masks)
                assert [token] == sample_rows(before[row : row + 1].numpy(), [claim])
            world.tokens[slot, lengths[row]] = token
            output[slot].append(token)


def test_a_slot_forgets_who_had_it_before():
    world = World(2)
    world.add(0, SAMPLINGS[-1], [3], [])
    world.add(1, Sampling(), [3], [])
    world.plugin.add_request(0, SamplingParams())
    before = logits_of(2)
    after = world.step(before.clone(), [0, 1], [1, 1])
    assert torch.equal(after[0], before[0]) and not torch.equal(after[1], before[1])


def test_an_invalid_row_ends_the_engine_one_step_later():
    world = World(1)
    world.add(0, Sampling(), [3], [])
    bad = logits_of(1)
    bad[0, 5] = torch.nan
    world.step(bad, [0], [1])
    with pytest.raises(EngineError):
        world.step(logits_of(1), [0], [2])


def test_vllm_accepts_the_plugin_for_its_v2_runner():
    (found,) = _load_v2_logitsprocs_by_fqcns([SAMPLER_PLUGINS["v2"]])
    assert found is CanonicalSampler


@pytest.mark.parametrize("index", [0, 4, 6])
def test_scores_in_chunks_and_again_after_preemption(index):
    """Hidden states are logits here. Chunks come twice, as after a preemption, and another request
    shares every step."""
    sampling = SAMPLINGS[index]
    source = SOURCE if sampling.grammar_sha256 else b""
    prompt, prefix, seed, count = [3, 4, 5], [40, 41], 5, 5
    rows = logits_of(count, 3).numpy()
    grammar = Grammars.from_directory(DEMO, SIZE).cursor(SOURCE, [STOP]) if source else None
    output, masks = [], []
    for row in rows:
        done = [*prefix, *output]
        masks.append(grammar.mask_after(done, len(done)) if grammar else None)
        here = rows_of(sampling, seed, prompt, done, [], count=1, masks=masks[-1:])
        output.extend(sample_rows(row[None, :], here))
    output[2] = (output[2] + 1) % SIZE
    if grammar:
        masks = [grammar.mask_after([*prefix, *output], len(prefix) + i) for i in range(count)]
    claims = rows_of(sampling, seed, prompt, prefix, output, count=count, masks=masks)
    wanted = score_rows(rows, claims, output)

    tokens = [*prompt, *prefix, *output[:-1]]
    worker = PromptLogprobsWorker(4, CPU)
    runner = SimpleNamespace(
        prompt_logprobs_worker=worker,
        req_states=SimpleNamespace(vocab_size=SIZE, device=CPU),
        vllm_config=CONFIG,
    )
    scorer = DeviceScorer(runner)
    scorer._block_rows = 2
    order = EngineOrder(
        sampling, seed, len(prompt), "key", len(prompt) + len(prefix), output[-1], source
    )
    worker.add_request("other", 0, SamplingParams())
    worker.add_request("r", 1, SamplingParams(extra_args=order.pack()))
    hidden = torch.zeros((len(tokens), SIZE))
    hidden[len(prompt) + len(prefix) - 1 :] = torch.from_numpy(rows)
    all_tokens = torch.zeros((4, 64), dtype=torch.int32)
    all_tokens[1, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
    lengths = np.array([2, len(tokens), 0, 0])
    for computed, scheduled in ((0, 6), (0, 6), (6, len(tokens) - 6), (len(tokens), 1)):
        chunk = torch.cat([torch.zeros((1, SIZE)), hidden[computed : computed + scheduled]])
        batch = SimpleNamespace(
            req_ids=["other", "r"],
            idx_mapping_np=np.array([0, 1]),
            num_computed_prefill_tokens_np=np.array([2, computed]),
            num_scheduled_tokens=np.array([1, scheduled]),
            query_start_loc_np=np.array([0, 1, 1 + scheduled]),
        )
        worker.compute_prompt_logprobs(lambda x: x, chunk, batch, all_tokens, None, lengths)
    worker.remove_request("r")
    assert len(scorer.kept) == 1
    missing, packed = scorer.kept.take(["nothing", "key"])
    assert missing == "unknown score key" and len(scorer.kept) == 0
    score = unpack_score(packed)
    assert score.margins == pytest.approx([s.margin for s in wanted], abs=1e-5)
    assert score.logprobs == pytest.approx([s.logprob for s in wanted], abs=1e-4)
    assert list(score.ranks) == [s.rank for s in wanted]
    assert score.margins[:2] == (0.0, 0.0) and score.margins[2] > 0
