"""Co-generation against the reference rollout, which has no cache, no padding and no batch."""

import re
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

import rollout as module
from conftest import COMMON, llama, make_pair, real, shared_pair, with_authors, write
from lab import engine
from reinforce import completion_logprobs
from rollout import random_numbers, reference_rollout, rollout, sample
from tandem import SCHEDULES, Handoff

T = 1.3
TEXTS = ["In 48", "In Natalia sold", "She", "schön l'eau sold in April", "48/2 =", "days! She"]


@pytest.fixture(scope="module")
def prompts(tokenizer):
    """Six prompts of different lengths for each model."""
    more = ["sold half as many. " * (i % 3) + text for i, text in enumerate(TEXTS)]
    return tokenizer(TEXTS).input_ids, tokenizer(more).input_ids


def two(make_model, tokenizer):
    """A pair of random models, for which one token in eight ends a text."""
    models = [make_model(len(tokenizer), seed, torch.float64) for seed in (0, 1)]
    return make_pair(*models, tokenizer, range(1, len(tokenizer), 8))


@pytest.fixture
def pair(tokenizer):
    return two(llama, tokenizer)


def same(one, other) -> bool:
    """Whether two batches are equal in every field."""
    return all(torch.as_tensor(x == getattr(other, name)).all() for name, x in vars(one).items())


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_against_the_reference(make_model, prompts, tokenizer, p):
    """Ids and authors of every row: cache, padding and compaction change nothing (cases 9, 11).

    Whichever token ends a completion is part of it and carries its author.
    """
    pair, trace, (noise, coins) = two(make_model, tokenizer), [], random_numbers(6, 40, seed=2)
    rollouts = write(pair, prompts, 40, p=p, trace=trace)
    for row, asked in enumerate(zip(*prompts)):
        expected = reference_rollout(pair, *asked, noise[:, :, row], coins[:, row], p, T)
        assert with_authors(rollouts)[row] == expected
        # Nothing but padding follows.
        for tensor in (rollouts.completion_ids, rollouts.completion_mask, rollouts.senior_mask):
            assert tensor[row, len(expected) :].sum() == 0
    assert len({row[-1] for row in real(rollouts)} & set(pair.end_ids)) > 2
    assert len({len(rows) for rows, *_ in trace}) > 1  # finished rows left the batch


def test_a_single_writer(pair, prompts):
    """Case 9: at p = 1 the junior is never run (None cannot be called), at p = 0 the senior.

    The schedule then changes nothing, because coins and tokens are two streams.
    """
    senior = write(pair, prompts, p=1.0)
    for schedule in SCHEDULES:
        assert same(write(replace(pair, junior=None), prompts, p=1.0, schedule=schedule), senior)
    assert torch.equal(senior.senior_mask, senior.completion_mask)
    assert write(replace(pair, senior=None), prompts, p=0.0).senior_mask.sum() == 0
    noise, coins = random_numbers(6, 14, seed=2)
    assert not (noise == coins).any()


def test_sampled_equals_rescored(make_model, tokenizer, prompts, monkeypatch):
    """Every step's log-probabilities are those of one pass at the end, for either model.

    The batch is padded on the left, and rows finish at different times.
    """
    pair, sampled, trace = two(make_model, tokenizer), [], []

    def recording(logits, noise, temperature):
        sampled.append((logits / temperature).log_softmax(-1))
        return sample(logits, noise, temperature)

    monkeypatch.setattr(module, "sample", recording)
    rollouts = write(pair, prompts, 40, trace=trace)
    mask, ids = rollouts.completion_mask.bool(), rollouts.completion_ids[:, :, None]
    assert len(set(mask.sum(1).tolist())) > 2
    read_by = (pair.senior, rollouts), (pair.junior, rollouts.as_read_by_junior())
    for role, (model, read) in enumerate(read_by):
        rescored = completion_logprobs(model, read, T)
        for t, (rows, *_) in enumerate(trace):
            step = sampled[2 * t + role].gather(1, ids[rows, t])[:, 0]
            assert (step - rescored[rows, t])[mask[rows, t]].abs().sum() < 1e-9


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_trace_is_what_happened(pair, prompts, schedule):
    """With its candidates, the handoff gives the tosses, tokens and authors of the rollouts."""
    trace, (_, coins) = [], random_numbers(6, 40, seed=2)
    rollouts = write(pair, prompts, 40, schedule=schedule, trace=trace)
    handoff = Handoff(pair.pieces, schedule, 0.5, coins)
    for t, (rows, senior_ids, junior_ids, tossed) in enumerate(trace):
        before = list(handoff.tosses)
        by_senior = handoff.choose(rows, senior_ids, junior_ids)
        assert tossed == [handoff.tosses[row] > before[row] for row in rows]
        for row, *candidates, senior in zip(rows, junior_ids, senior_ids, by_senior):
            if rollouts.completion_mask[row, t]:
                assert rollouts.completion_ids[row, t] == candidates[senior]
                assert rollouts.senior_mask[row, t] == senior


def test_stop(pair, prompts):
    """A completion ends with the token that completes the match; up to there nothing changes."""
    stop = re.compile(rb"[a-z]\W+[a-z]")
    whole, cut = (real(write(pair, prompts, 40, stop=pattern)) for pattern in (None, stop))
    for ours, theirs in zip(cut, whole):
        texts = accumulate(pair.pieces[i] for i in theirs)
        matches = [n for n, text in enumerate(texts, 1) if stop.search(text)]
        assert ours == theirs[: min(matches, default=None)]
    assert 1 < sum(map(list.__ne__, cut, whole)) < 6


@pytest.mark.parametrize(("make", "first"), [(two, (1, 80)), (shared_pair, (2, 70))])
def test_a_common_prefix_is_read_once(make_model, make, first, tokenizer, prompts, monkeypatch):
    """The same as without it, also if one pass serves two roles with prefixes of 80 and 70."""
    heads = [tokenizer(text * 40).input_ids[:n] for text, n in ((TEXTS[3], 80), (TEXTS[1], 70))]
    asked = [[head + row for row in of_model] for head, of_model in zip(heads, prompts)]
    pair, shapes, found = make(make_model, tokenizer), [], []
    embedding = pair.senior.get_input_embeddings()
    embedding.register_forward_hook(lambda _, inputs, out: shapes.append(tuple(inputs[0].shape)))
    for shared in (64, 10**9):
        monkeypatch.setattr(engine, "MIN_SHARED", shared)
        shapes.clear()
        found.append(write(pair, asked, 40))
        assert (shapes[0] == first) is (shared == 64)
    assert same(*found)
    assert same(found[0], write(replace(pair, both=None), asked, 40))  # one model after the other


def test_padding_takes_no_place_in_a_sliding_window(tokenizer, prompts, monkeypatch):
    """Nor behind a common prefix: rows of different lengths see the same number of tokens."""
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    sizes |= dict(num_key_value_heads=2, sliding_window=32, vocab_size=len(tokenizer))
    model = MistralForCausalLM(MistralConfig(**sizes, **COMMON)).double().eval()
    pair, asked = make_pair(model, model, tokenizer), [list(range(70)) + row for row in prompts[1]]
    found = [write(pair, [asked, asked])]
    monkeypatch.setattr(engine, "MIN_SHARED", 10**9)
    assert same(*found, write(pair, [asked, asked]))


def test_different_numbers_of_prompts_are_refused(pair, prompts):
    for m, n in ((6, 2), (2, 6), (2, 2)):
        with pytest.raises(ValueError, match=f"{m} and {n} prompts for 6 rollouts"):
            rollout(pair, prompts[0][:m], prompts[1][:n], *random_numbers(6, 14, seed=2))


def test_no_row_depends_on_the_others(pair, prompts, tokenizer):
    """Six rows at a time or two: all are equal.

    A chunk is padded to its own longest prompt and completion, and padded anew when it is joined.
    """
    numbers = random_numbers(6, 14, seed=2)

    def only(rows):
        asked = [[of_model[row] for row in rows] for of_model in prompts]
        return rollout(pair, *asked, *(of_all[..., rows] for of_all in numbers))

    whole = rollout(pair, *prompts, *numbers)
    assert same(whole, engine.in_chunks(lambda rows: only(range(6)[rows]), 6, max_rows=2))
    # Selected rows lose the columns that are padding in all of them.
    assert same(engine.select(whole, [2, 1]), only([2, 1]))
    # Same seed, same ids. No input is modified.
    assert same(whole, rollout(pair, *prompts, *random_numbers(6, 14, seed=2)))
    assert all(map(torch.equal, numbers, random_numbers(6, 14, seed=2)))
    assert prompts == (real(whole, "prompt_ids"), real(whole, "junior_prompt_ids"))
    assert whole.texts == tokenizer.batch_decode(real(whole), skip_special_tokens=True)


# ------------------------------------------------------------------------------------------------
# Sampling


def test_sample_inverts_the_distribution():
    """Probabilities 1/4, 0, 3/4: numbers below 0.25 give token 0, all others token 2."""
    numbers = torch.tensor([0.0, 0.249, 0.2501, 0.5, 1 - 2**-24])
    logits = torch.tensor([0.25, 0.0, 0.75]).log()
    assert sample(logits.repeat(5, 1), numbers, 1.0).tolist() == [0, 0, 2, 2, 2]
    # At T = 1/2 they are 1/10 and 9/10.
    assert sample(logits.repeat(5, 1), numbers, 0.5).tolist() == [0, 2, 2, 2, 2]
    assert sample(logits.roll(-1)[None], torch.zeros(1), 1.0).item() == 1  # the first is impossible
    # So is the last one here; and probabilities add up to 1 only up to rounding.
    logits = torch.randn(2000, 50, generator=torch.Generator().manual_seed(0))
    logits[:, -1] = -torch.inf
    assert (logits.softmax(1).cumsum(1)[:, -1] < 1).any()
    assert (sample(logits, torch.full((2000,), 1 - 2.0**-24), 1.0) < 49).all()
    assert torch.equal(sample(logits, torch.rand(2000), 0), logits.argmax(1))  # greedy
    for bad in (torch.inf, torch.nan):
        with pytest.raises(FloatingPointError, match="logits of a model are not finite"):
            sample(torch.tensor([[0.0, 1.0], [0.0, bad]]), torch.zeros(2), 1.0)
    # In bfloat16 the cumulative sum of 1/1000 would not get beyond 1/2.
    equal = torch.zeros(1, 1000, dtype=torch.bfloat16)
    assert [sample(equal, torch.tensor([u]), 1.0).item() for u in (0.2505, 0.9005)] == [250, 900]
