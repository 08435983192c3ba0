"""The measures of Tandem RL, against slower ways to get the same numbers."""

from argparse import Namespace
from dataclasses import replace

import pytest
import torch

import run_gsm8k
from conftest import llama, real, shared_pair, write
from lab import engine, measures

ARGS = dict(device="cpu", max_new_tokens=12, seed=0, rollout_batch=2, temperature=1.0)
PROMPTS = [[5, 6, 7], [8], [10, 11]], [[5], [8, 11, 12, 13], [6]]  # the senior's, the junior's


@pytest.fixture
def pair(tokenizer):
    return replace(shared_pair(llama, tokenizer), end_ids=[1])


@pytest.fixture
def solo(pair):
    """Three solutions of the senior."""
    return write(pair, PROMPTS, 12, p=1.0, temperature=1.0)


def logits_after(model, prompt: list[int], text: list[int]) -> torch.Tensor:
    """Plain, before every token of the text, unpadded."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1]


def test_each_model_reads_its_own_prompt(pair, solo, monkeypatch):
    """legibility and drift of each solution beside plain passes, two solutions at a time."""
    monkeypatch.setattr(engine, "LOGITS_AT_ONCE", 2 * 12 * len(pair.pieces))
    found = measures.compare(solo, pair, temperature=0.5)
    for i, (asked, other, text) in enumerate(zip(*PROMPTS, real(solo))):
        senior = logits_after(pair.senior, asked, text)
        junior = logits_after(pair.junior, other, text)
        cross_entropy = torch.nn.functional.cross_entropy(junior, torch.tensor(text)).item()
        assert found["legibility"][i] == pytest.approx(cross_entropy, abs=1e-5)
        # Only the divergence depends on the temperature of sampling.
        s, j = (senior / 0.5).log_softmax(-1), (junior / 0.5).log_softmax(-1)
        divergence = (s.exp() * (s - j)).sum(-1).mean().item()
        assert found["drift"][i] == pytest.approx(divergence, abs=1e-5)
        assert divergence > 0.001
    solo.completion_mask[:] = 0  # empty solutions
    assert measures.compare(solo, pair, 0.5) == {"legibility": [0.0] * 3, "drift": [0.0] * 3}


def test_the_junior_continues_the_senior(pair, solo):
    """At 50 %, a solution begins with half of the senior's tokens and goes on with what the junior,
    under its own prompt, finds likeliest (near temperature 0)."""
    greedy = Namespace(**ARGS | {"temperature": 1e-4})
    continued = measures.continue_solutions(solo, 0.5, greedy, pair)
    for text, prompt, whole in zip(continued, PROMPTS[1], real(solo)):
        ids = whole[: len(whole) // 2]
        while len(ids) < 12 and ids[-1:] != pair.end_ids:
            ids.append(logits_after(pair.junior, prompt, [*ids, 0])[-1].argmax().item())
        assert text == b"".join(pair.pieces[token] for token in ids).decode(errors="replace")
    # At a share of 1, nothing is left of the common budget of an unfinished solution.
    unfinished = [i for i, whole in enumerate(real(solo)) if len(whole) == 12]
    texts = measures.continue_solutions(solo, 1.0, Namespace(**ARGS), pair)
    assert [texts[i] for i in unfinished] == [solo.texts[i] for i in unfinished] != []


def test_senior_and_junior_take_turns(pair, monkeypatch):
    """The senior first. Here they alternate token by token, in `handoff` sentence by sentence."""
    monkeypatch.setattr(run_gsm8k.tasks, "prompts_of_pair", lambda *_: [(None, ["?"] * 3)] * 2)
    monkeypatch.setattr(run_gsm8k.models, "encode", lambda *_: [[6], [7], [8]])
    options = dict(p=0.5, seed=0, schedule="token", alternate=True)
    written = run_gsm8k.generate(["?"] * 3, Namespace(**ARGS, handoff="word"), pair, **options)
    turns = torch.arange(1, 1 + written.senior_mask.shape[1]) % 2
    assert torch.equal(written.senior_mask, turns * written.completion_mask)
