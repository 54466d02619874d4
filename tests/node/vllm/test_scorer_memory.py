"""The V1 scorer's memory: blocks of rows whatever the length and vocabulary, three numbers a token,
a bounded number of requests."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from trueweight.node.canonical import RowSampler, Scratch
from trueweight.node.vllm import kept_scores, scorer
from trueweight.node.vllm.wire import EngineOrder, unpack_score
from trueweight.protos.sampling import Sampling, resolve

torch = pytest.importorskip("torch")
VOCABULARY = 152_064
PROMPT = [5, 6, 7]


class Runner:
    """What the scorer sees of vLLM's runner: hidden states are seeds of rows of logits."""

    def __init__(self, sampling, output, seed):
        self.model_config = SimpleNamespace(get_vocab_size=lambda: VOCABULARY, model="/nowhere")
        self.vllm_config = SimpleNamespace(model_config=self.model_config)
        order = EngineOrder(sampling, seed, len(PROMPT), "key", len(PROMPT), output[-1])
        self.request = SimpleNamespace(
            prompt_token_ids=[*PROMPT, *output[:-1]],
            num_prompt_tokens=len(PROMPT) + len(output) - 1,
            num_computed_tokens=0,
            sampling_params=SimpleNamespace(extra_args=order.pack()),
        )
        self.requests = {"r": self.request}
        self.input_batch = SimpleNamespace(req_id_to_index={"r": 0})
        self.query_start_loc = SimpleNamespace(np=np.array([0]))
        self.model = self
        self.largest_block = 0

    def compute_logits(self, hidden):
        rows = torch.from_numpy(np.stack([row_of(int(h)) for h in hidden]))
        self.largest_block = max(self.largest_block, rows.numel() * rows.element_size())
        return rows


def row_of(position):
    return np.random.default_rng(position).standard_normal(VOCABULARY, dtype=np.float32) * 3


def test_chunks_of_any_length_cost_one_block_of_logits_and_repeat_without_harm():
    sampling = resolve(Sampling(top_p=0.95, repetition_penalty=1.1))
    sampler = RowSampler(sampling, 9, PROMPT, [], Scratch(VOCABULARY))
    output: list[int] = []
    for position in range(40):
        output.append(sampler.winner(row_of(position + len(PROMPT) - 1), output))
    runner = Runner(sampling, output, 9)
    found = scorer.Scorer(runner)
    total = runner.request.num_prompt_tokens
    for computed, count in ((0, 30), (0, 10), (10, total - 10)):  # preempted after 30
        runner.request.num_computed_tokens = computed
        found.observe(torch.arange(computed, computed + count), {"r": count})
    assert 0 < runner.largest_block <= 8 << 20
    (task,) = [found.kept.get("key")]
    kept = sum(a.nbytes for a in (task.margins, task.logprobs, task.ranks, task.done))
    assert kept <= 32 * len(output)
    (packed,) = found.kept.take(["key"])
    assert not any(unpack_score(packed).margins)


def test_a_score_with_a_hole_is_an_error_not_a_zero():
    runner = Runner(Sampling(), [1] * 30, 9)
    found = scorer.Scorer(runner)
    found.observe(torch.arange(10), {"r": 10})
    assert found.kept.take(["key"]) == ["the engine skipped positions"]


def test_attack_scores_that_nobody_takes_are_forgotten(monkeypatch):
    monkeypatch.setattr(kept_scores, "MAX_KEPT", 3)
    kept = kept_scores.KeptScores()
    for number in range(10):
        kept.put(str(number), SimpleNamespace(packed=lambda: []))
    assert len(kept) == 3
    assert kept.take(["0", "9"]) == ["unknown score key", []]
