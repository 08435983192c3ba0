"""Co-generation against the reference rollout, which has no cache, no padding and no batch."""

import re
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from peft.tuners.lora import LoraLayer

import rollout as module
from conftest import gpt2, llama, make_pair, write
from lab import engine
from lab.models import SharedJunior, add_adapter
from reinforce import completion_logprobs, full_logprobs, plain_logprobs
from rollout import random_numbers, reference_rollout, rollout, sample
from tandem import SCHEDULES, decode, opens_word

T = 1.3
SCORERS = completion_logprobs, plain_logprobs, full_logprobs
TEXTS = ["In", "Natalia sold 48", "She", "schön l'eau sold clips in April", "48/2 =", "days! She"]


@pytest.fixture(scope="module")
def prompts(tokenizer):
    """Six prompts of different lengths for each model."""
    more = ["sold half as many. " * (i % 3) + text for i, text in enumerate(TEXTS)]
    return tokenizer(TEXTS).input_ids, tokenizer(more).input_ids


def two(make_model, tokenizer, dtype=torch.float64):
    """A pair of random models, for which one token in eight ends a text."""
    models = [make_model(len(tokenizer), seed, dtype) for seed in (0, 1)]
    return make_pair(*models, tokenizer, ends(tokenizer))


def ends(tokenizer) -> range:
    return range(1, len(tokenizer), 8)


def real(rollouts, name="completion_ids") -> list[list[int]]:
    """Every row of a field without its padding."""
    mask = getattr(rollouts, name.replace("ids", "mask").replace("senior", "completion")).bool()
    return [row[kept].tolist() for row, kept in zip(getattr(rollouts, name), mask)]


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_against_the_reference(make_model, prompts, tokenizer, p):
    """Ids and authors of every row: cache, padding and compaction change nothing (cases 9, 11).

    Whichever token ends a completion is part of it and carries its author.
    """
    pair, trace = two(make_model, tokenizer), []
    rollouts = write(pair, prompts, 40, p=p, trace=trace)
    noise, coins = random_numbers(6, 40, seed=2)
    for row, asked in enumerate(zip(*prompts)):
        expected = reference_rollout(pair, *asked, noise[:, :, row], coins[:, row], p, T)
        n = len(expected)
        assert real(rollouts)[row] == [token for token, _ in expected]
        authors = [int(author == "senior") for _, author in expected]
        assert real(rollouts, "senior_mask")[row] == authors
        # Nothing but padding follows.
        for tensor in (rollouts.completion_ids, rollouts.completion_mask, rollouts.senior_mask):
            assert tensor[row, n:].sum() == 0
    assert len({row[-1] for row in real(rollouts)} & set(pair.end_ids)) > 2
    assert len({len(rows) for rows, *_ in trace}) > 1  # finished rows left the batch
    if p == 0.5:
        assert {row[-1] for row in real(rollouts, "senior_mask")} == {0, 1}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_same_weights_greedy(make_model, tokenizer, prompts, schedule):
    """Case 10: two writers with the same weights write, greedily, what one writes alone."""
    pair, asked = make_pair(*[make_model(len(tokenizer), 0)] * 2, tokenizer), [prompts[0]] * 2
    alone = write(pair, asked, p=1.0, temperature=0)
    together = write(pair, asked, p=0.5, schedule=schedule, temperature=0)
    assert torch.equal(alone.completion_ids, together.completion_ids)
    assert torch.equal(alone.completion_mask, together.completion_mask)
    assert 0 < together.senior_mask.sum() < alone.senior_mask.sum()


def test_a_single_writer(tokenizer, prompts):
    """Case 9: at p = 1 the junior is never run (None cannot be called), at p = 0 the senior."""
    pair = two(llama, tokenizer)
    expected = write(pair, prompts, p=1.0)
    for schedule in SCHEDULES:
        rollouts = write(replace(pair, junior=None), prompts, p=1.0, schedule=schedule)
        assert torch.equal(rollouts.completion_ids, expected.completion_ids)
        assert torch.equal(rollouts.senior_mask, expected.completion_mask)
    assert write(replace(pair, senior=None), prompts, p=0.0).senior_mask.sum() == 0


def test_coins_and_tokens_are_two_streams(tokenizer, prompts):
    """The first candidate of either model is the same at every p."""
    pair = two(llama, tokenizer)
    junior, mixed, senior = (write(pair, prompts, p=p) for p in (0.0, 0.5, 1.0))
    by_senior = mixed.senior_mask[:, 0].bool()
    first = torch.where(by_senior, senior.completion_ids[:, 0], junior.completion_ids[:, 0])
    assert torch.equal(mixed.completion_ids[:, 0], first)
    assert 0 < by_senior.sum() < 6
    noise, coins = random_numbers(6, 14, seed=2)
    assert not (noise == coins).any()


@pytest.mark.parametrize("schedule", ["token", "word", "redraw"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-9)])
def test_every_step(make_model, tokenizer, prompts, schedule, dtype, tolerance, monkeypatch):
    """Sampled equals rescored: every step's log-probabilities are those of one pass at the end.

    The batch is padded on the left, and rows finish at different times. The trace contains what was
    sampled, and a coin is tossed where the schedule asks for it.
    """
    pair, sampled, trace = two(make_model, tokenizer, dtype), [], []

    def recording(logits, noise, temperature):
        ids = sample(logits, noise, temperature)
        sampled.append(((logits / temperature).log_softmax(-1), ids.tolist()))
        return ids

    monkeypatch.setattr(module, "sample", recording)
    rollouts = write(pair, prompts, 40, schedule=schedule, trace=trace)
    texts, authors = real(rollouts), real(rollouts, "senior_mask")
    both = (pair.senior, rollouts), (pair.junior, rollouts.as_read_by_junior())
    rescored = [[f(*scored, T) for scored in both] for f in SCORERS]
    for t, (rows, *candidates, tossed) in enumerate(trace):
        assert candidates == [ids for _, ids in sampled[2 * t : 2 * t + 2]]
        for i, row in enumerate(rows):
            if t >= len(texts[row]):
                continue  # the row is finished and waits for compaction
            for role in (0, 1):
                logprobs, token = sampled[2 * t + role][0][i], texts[row][t]
                steps = [logprobs[token], logprobs[token], logprobs]
                for step, once in zip(steps, rescored):
                    assert (step - once[role][row, t]).abs().max() < tolerance
            pieces = [pair.pieces[token] for token in texts[row][:t]]
            active = 1 - authors[row][t - 1]  # 0 is the senior
            candidate = decode(pair.pieces[candidates[active][i]])
            wanted = {"token": True, "word": opens_word(decode(b"".join(pieces)), candidate)}
            wanted["redraw"] = t == 0 or pieces[-1].startswith(b" ")
            assert tossed[i] == (t == 0 or wanted[schedule])
            assert texts[row][t] == candidates[1 - authors[row][t]][i]
    assert len({len(text) for text in texts}) > 2


def test_stop(tokenizer, prompts):
    """A completion ends with the token that completes the match; up to there nothing changes."""
    pair, stop = two(llama, tokenizer), re.compile(rb"[a-z]\W*[a-z]")
    whole, cut = write(pair, prompts, 40), write(pair, prompts, 40, stop=stop)
    matched = []
    for ours, theirs in zip(real(cut), real(whole)):
        before, text = (b"".join(pair.pieces[i] for i in ids) for ids in (ours[:-1], ours))
        matched.append(bool(stop.search(text)))
        assert not stop.search(before)
        assert ours == (theirs[: len(ours)] if matched[-1] else theirs)
    assert 1 < sum(matched) < 6


def shared_pair(make_model, tokenizer):
    """A senior with a random adapter; the junior is its base, and one pass serves both."""
    senior = add_adapter(make_model(len(tokenizer), 0), rank=4)
    for layer in senior.modules():
        if isinstance(layer, LoraLayer):
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    junior = SharedJunior(senior.double())
    return make_pair(senior, junior, tokenizer, ends(tokenizer), junior.beside_senior)


KINDS = {"two": two, "shared": shared_pair}


@pytest.mark.parametrize(("kind", "first"), [("two", (1, 80)), ("shared", (2, 70))])
def test_a_common_prefix_is_read_once(make_model, kind, first, tokenizer, prompts, monkeypatch):
    """The same as without it, also if one pass serves two roles with prefixes of 80 and 70."""
    heads = [tokenizer(text * 40).input_ids[:n] for text, n in ((TEXTS[3], 80), (TEXTS[1], 70))]
    asked = [[head + row for row in of_model] for head, of_model in zip(heads, prompts)]
    pair, shapes, found = KINDS[kind](make_model, tokenizer), [], []
    embedding = pair.senior.get_input_embeddings()
    embedding.register_forward_hook(lambda _, inputs, out: shapes.append(tuple(inputs[0].shape)))
    for shared in (64, 10**9):
        monkeypatch.setattr(engine, "MIN_SHARED", shared)
        shapes.clear()
        found.append(write(pair, asked, 40))
        assert (shapes[0] == first) is (shared == 64)
    found.append(write(replace(pair, both=None), asked, 40))  # one model after the other
    for other in found[1:]:
        assert torch.equal(found[0].completion_ids, other.completion_ids)
        assert torch.equal(found[0].senior_mask, other.senior_mask)
    assert 0 < found[0].senior_mask.sum() < found[0].completion_mask.sum()


def test_same_seed_same_ids_and_unmodified_inputs(tokenizer, prompts):
    pair = make_pair(llama(len(tokenizer), 0), gpt2(len(tokenizer), 1), tokenizer)
    inputs = [*prompts, *random_numbers(6, 14, seed=2)]
    one, other = rollout(pair, *inputs), rollout(pair, *deepcopy(inputs))
    assert torch.equal(one.completion_ids, other.completion_ids)
    assert torch.equal(one.senior_mask, other.senior_mask)
    assert inputs[:2] == [real(one, "prompt_ids"), real(one, "junior_prompt_ids")]
    assert all(map(torch.equal, inputs[2:], random_numbers(6, 14, seed=2)))
    assert one.texts == tokenizer.batch_decode(real(one), skip_special_tokens=True)


def test_logits_that_are_not_finite(tokenizer, prompts):
    """One NaN weight: without the check the last token would be written over and over."""
    pair = two(llama, tokenizer)
    broken = deepcopy(pair.senior)
    broken.lm_head.weight.data[7, 0] = torch.nan
    for p, bad in ((1.0, replace(pair, senior=broken)), (0.0, replace(pair, junior=broken))):
        assert len(write(bad, prompts, p=1 - p)) == 6  # the broken model is never run
        for share in (0.5, p):
            with pytest.raises(FloatingPointError, match="logits of a model are not finite"):
                write(bad, prompts, p=share)


def test_different_numbers_of_prompts_are_refused(tokenizer, prompts):
    pair = two(llama, tokenizer)
    for asked in ((prompts[0], prompts[1][:2]), (prompts[0][:2], prompts[1][:2])):
        with pytest.raises(ValueError, match=r"and 2 prompts for 6 rollouts"):
            rollout(pair, *asked, *random_numbers(6, 14, seed=2))


# ------------------------------------------------------------------------------------------------
# Chunks


def test_chunks_keep_each_row(tokenizer, prompts):
    """Six rows at a time, three because memory does not suffice for six, or two: all are equal.

    A chunk is padded to its own longest prompt and completion, and padded anew when it is joined.
    """
    pair, numbers, sizes = two(llama, tokenizer), random_numbers(6, 14, seed=2), []

    def some(rows):
        if rows.stop - rows.start > 3:
            raise RuntimeError("CUDA out of memory.")
        noise, coins = (of_all[..., rows] for of_all in numbers)
        part = rollout(pair, *(of_model[rows] for of_model in prompts), noise, coins)
        sizes.append((len(part), part.prompt_ids.shape[1]))
        return part

    whole = rollout(pair, *prompts, *numbers)
    for max_rows in (100, 2):
        chunks = engine.in_chunks(some, 6, max_rows)
        for name, tensor in vars(whole).items():
            assert torch.as_tensor(tensor == getattr(chunks, name)).all(), name
    assert [size for size, _ in sizes] == [3, 3, 2, 2, 2]
    assert len({width for _, width in sizes}) > 1
    # Selected rows lose the columns that are padding in all of them.
    few = engine.select(whole, [5, 0])
    assert few.texts == [whole.texts[5], whole.texts[0]]
    for name in ("prompt_ids", "junior_prompt_ids", "completion_ids", "senior_mask"):
        rows = [real(whole, name)[row] for row in (5, 0)]
        assert real(few, name) == rows
        assert getattr(few, name).shape[1] == max(map(len, rows))


# ------------------------------------------------------------------------------------------------
# Sampling


def test_sample_inverts_the_distribution():
    """Probabilities 1/4, 0, 3/4: numbers below 0.25 give token 0, all others token 2."""
    numbers = torch.tensor([0.0, 0.249, 0.2501, 0.5, 1 - 2**-24])
    logits = torch.tensor([0.25, 0.0, 0.75]).log()
    assert sample(logits.repeat(5, 1), numbers, 1.0).tolist() == [0, 0, 2, 2, 2]
    assert sample(logits.roll(-1)[None], torch.zeros(1), 1.0).item() == 1  # the first is impossible
    # So is the last one here; and probabilities add up to 1 only up to rounding.
    logits = torch.randn(2000, 50, generator=torch.Generator().manual_seed(0))
    logits[:, -1] = -torch.inf
    assert (logits.softmax(1).cumsum(1)[:, -1] < 1).any()
    assert (sample(logits, torch.full((2000,), 1 - 2.0**-24), 1.0) < 49).all()
    assert torch.equal(sample(logits, torch.rand(2000), 0), logits.argmax(1))  # greedy
    with pytest.raises(FloatingPointError):
        sample(torch.tensor([[0.0, torch.inf]]), torch.zeros(1), 1.0)
    # In bfloat16 the cumulative sum of 1/1000 would not get beyond 1/2.
    equal = torch.zeros(1, 1000, dtype=torch.bfloat16)
    assert [sample(equal, torch.tensor([u]), 1.0).item() for u in (0.2505, 0.9005)] == [250, 900]
