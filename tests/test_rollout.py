"""Co-generation against a slow writer that has no cache, no padding, no batch and no tables."""

import pytest
import torch

from conftest import gpt2, llama
from reinforce import completion_logprobs
from rollout import Reader, join, random_numbers, rollout, sample, stretches
from tandem import build_boundaries, opens_word, token_bytes

STEPS = 14


def left_pad(rows):
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@pytest.fixture(scope="module")
def prompts(tokenizer):
    """Six prompts of different lengths for each model."""
    texts = ["In", "Natalia sold 48", "She", "schön l'eau sold clips in April", "48/2 =", "days! She"]
    senior = [tokenizer(text).input_ids for text in texts]
    junior = [tokenizer("sold half as many. " * (i % 3) + text).input_ids for i, text in enumerate(texts)]
    return senior, junior


def write(senior, junior, prompts, tokenizer, ends=(1,), **options):
    settings = dict(p=0.5, schedule="word", max_new_tokens=STEPS, temperature=1.3) | options
    noise, coins = random_numbers(len(prompts[0]), settings.pop("max_new_tokens"), seed=2)
    boundaries = build_boundaries(token_bytes(tokenizer, len(tokenizer)))
    padded = left_pad(prompts[0]), left_pad(prompts[1])
    return rollout(senior, junior, *padded, tokenizer, ends, boundaries, noise, coins, **settings)


def slow_row(senior, junior, prompts, row, tokenizer, p, temperature=1.3, steps=STEPS):
    """One row by full forward passes, with the word rule on decoded strings. Returns [(id, senior wrote it)]."""
    batch = len(prompts[0])
    noise, coins = random_numbers(batch, steps, seed=2)
    pieces = token_bytes(tokenizer, len(tokenizer))
    text, written, active, tosses = b"", [], None, 0
    for t in range(steps):
        own = []
        for m, model in enumerate((senior, junior)):
            ids = torch.tensor([prompts[m][row] + [token for token, _ in written]])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[:, -1]
            own.append(sample(logits, noise[m, t, row : row + 1], temperature)[0].item())
        active = active or 0
        half = text.decode(errors="replace")
        if opens_word(half, pieces[own[active]].decode(errors="replace")):
            active = 0 if coins[tosses, row] < p else 1
            tosses += 1
        written.append((own[active], active == 0))
        text += pieces[own[active]]
        if own[active] == tokenizer.eos_token_id:
            break
    return written


class WholeText:
    """A model that never writes part of a character: random bytes are not text, and the word rule is about text."""

    def __init__(self, model, tokenizer):
        self.model = model
        self.half = torch.tensor(["\ufffd" in piece.decode(errors="replace") for piece in token_bytes(tokenizer, len(tokenizer))])
        self.half[tokenizer.pad_token_id] = True  # nor a token that is no text at all

    def __call__(self, **inputs):
        out = self.model(**inputs)
        out.logits = out.logits.masked_fill(self.half, -1e9)
        return out


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_against_the_slow_writer(make_model, prompts, tokenizer, p):
    """Ids and authors of each row; the cache, the padding, the tables and dropped rows change nothing (cases 9 and 11)."""
    senior, junior = (WholeText(make_model(len(tokenizer), seed, torch.float64), tokenizer) for seed in (0, 1))
    rollouts = write(senior, junior, prompts, tokenizer, p=p)
    for row in range(len(prompts[0])):
        expected = slow_row(senior, junior, prompts, row, tokenizer, p)
        n = len(expected)
        assert rollouts.completion_ids[row, :n].tolist() == [token for token, _ in expected]
        assert rollouts.senior_mask[row].tolist()[:n] == [int(by_senior) for _, by_senior in expected]
        assert rollouts.completion_mask[row].tolist() == [1] * n + [0] * (rollouts.completion_ids.shape[1] - n)
        assert rollouts.senior_mask[row, n:].sum() == 0
        assert rollouts.completion_ids[row, n:].eq(tokenizer.eos_token_id).all()


def with_ends(model, tokenizer, factor=3.0):
    """The same model, more inclined to end."""
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[tokenizer.eos_token_id] *= factor
    return model


def test_rows_end_at_different_times(tokenizer, prompts):
    """The end token is part of the completion and carries its author; rows that ended leave the batch (case 11)."""
    senior, junior = (WholeText(with_ends(llama(len(tokenizer), seed, torch.float64), tokenizer), tokenizer) for seed in (0, 1))
    rollouts = write(senior, junior, prompts, tokenizer, max_new_tokens=40)
    lengths = rollouts.completion_mask.sum(1)
    assert len(set(lengths.tolist())) > 2
    ended = [row for row in range(len(rollouts)) if rollouts.completion_ids[row, lengths[row] - 1] == tokenizer.eos_token_id]
    assert len(ended) > 2
    enders = {rollouts.senior_mask[row, lengths[row] - 1].item() for row in ended}
    assert enders == {0, 1}
    for row in range(len(rollouts)):
        expected = slow_row(senior, junior, prompts, row, tokenizer, 0.5, steps=40)
        assert rollouts.completion_ids[row, : lengths[row]].tolist() == [token for token, _ in expected]


def test_any_of_several_tokens_ends_a_text(tokenizer, prompts):
    """Two models of one vocabulary may end a text differently: with every token an end, each row is one token."""
    model = llama(len(tokenizer), 0)
    rollouts = write(model, model, prompts, tokenizer, ends=tuple(range(len(tokenizer))))
    assert rollouts.completion_mask.tolist() == [[1]] * len(prompts[0])


@pytest.mark.parametrize("schedule", ["token", "word", "sentence", "paragraph", "redraw"])
@pytest.mark.parametrize("p", [0.3, 0.7])
def test_same_weights_greedy(make_model, tokenizer, prompts, schedule, p):
    """Case 10: two writers with the same weights and prompts write, greedily, what one writes alone."""
    model = make_model(len(tokenizer), 0)
    both = prompts[0], prompts[0]
    alone = write(model, None, both, tokenizer, p=1.0, temperature=0)
    together = write(model, make_model(len(tokenizer), 0), both, tokenizer, p=p, schedule=schedule, temperature=0)
    assert torch.equal(alone.completion_ids, together.completion_ids)
    assert torch.equal(alone.completion_mask, together.completion_mask)
    if schedule in ("token", "word"):  # the others toss too seldom to be sure of both authors
        assert 0 < together.senior_mask.sum() < alone.senior_mask.sum()


@pytest.mark.parametrize("schedule", ["token", "word", "sentence", "paragraph", "redraw"])
def test_p_1_is_the_senior_alone(tokenizer, prompts, schedule):
    """Case 9, whatever the schedule: and the junior is never run (None cannot be called), nor the senior at p = 0."""
    senior = llama(len(tokenizer), 0)
    rollouts = write(senior, None, prompts, tokenizer, p=1.0, schedule=schedule)
    assert torch.equal(rollouts.senior_mask, rollouts.completion_mask)
    assert torch.equal(rollouts.completion_ids, write(senior, senior, prompts, tokenizer, p=1.0).completion_ids)
    alone = write(None, senior, prompts, tokenizer, p=0.0, schedule=schedule)
    assert alone.senior_mask.sum() == 0
    assert alone.logprobs.abs().sum() == 0


def test_coins_do_not_change_the_tokens_that_are_drawn(tokenizer, prompts):
    """The first candidate of each model is the same at every p: coins have a generator of their own."""
    senior, junior = llama(len(tokenizer), 0), llama(len(tokenizer), 1)
    first = [write(senior, junior, prompts, tokenizer, p=p) for p in (0.0, 0.5, 1.0)]
    for row in range(len(prompts[0])):
        mixed = first[1].completion_ids[row, 0]
        assert mixed == (first[2] if first[1].senior_mask[row, 0] else first[0]).completion_ids[row, 0]
    assert 0 < first[1].senior_mask[:, 0].sum() < len(prompts[0])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_sampled_equals_rescored_log_probability(make_model, tokenizer, prompts, dtype, tolerance):
    """On a left-padded batch with finished rows: one pass over the whole text gives what the cached steps gave."""
    senior, junior = (with_ends(make_model(len(tokenizer), seed, dtype), tokenizer) for seed in (0, 1))
    rollouts = write(senior, junior, prompts, tokenizer, max_new_tokens=30)
    assert len(set(rollouts.completion_mask.sum(1).tolist())) > 1
    rescored = completion_logprobs(senior, rollouts, 1.3)
    assert (rescored - rollouts.logprobs).abs().max() < tolerance * rollouts.logprobs.abs().max()
    assert (completion_logprobs(senior, rollouts, 1.0) - rollouts.logprobs).abs().max() > 0.01  # the temperature counts


def test_same_seed_same_ids_and_inputs_unmodified(tokenizer, prompts):
    senior, junior = llama(len(tokenizer), 0), gpt2(len(tokenizer), 1)  # two architectures, one vocabulary
    one, two = (write(senior, junior, prompts, tokenizer) for _ in range(2))
    assert torch.equal(one.completion_ids, two.completion_ids)
    assert torch.equal(one.senior_mask, two.senior_mask)
    assert torch.equal(one.prompt_ids, left_pad(prompts[0])[0])
    assert one.texts[0] == tokenizer.decode(one.completion_ids[0][one.completion_mask[0].bool()], skip_special_tokens=True)


def test_sample_inverts_the_distribution():
    """Probabilities 1/4, 0, 3/4: numbers below 0.25 give token 0, all others token 2, and none the impossible one."""
    logits = torch.tensor([0.25, 0.0, 0.75]).log().repeat(5, 1)
    ids, logprobs = sample(logits, torch.tensor([0.0, 0.249, 0.2501, 0.5, 1 - 2**-24]), 1.0)
    assert ids.tolist() == [0, 0, 2, 2, 2]
    assert torch.allclose(logprobs[0].exp(), torch.tensor([0.25, 0.0, 0.75]))
    first_impossible = torch.tensor([[0.0, 0.25, 0.75]]).log()
    assert sample(first_impossible, torch.zeros(1), 1.0)[0].item() == 1


def test_sample_draws_in_proportion():
    """100,000 draws from softmax([0, 1, 2] / 2): within five standard deviations (0.008) of each probability."""
    logits = torch.tensor([0.0, 1.0, 2.0]).repeat(100_000, 1)
    ids, _ = sample(logits, torch.rand(100_000, generator=torch.Generator().manual_seed(0)), 2.0)
    shares = torch.bincount(ids, minlength=3) / 100_000
    assert (shares - torch.tensor([0.0, 0.5, 1.0]).softmax(0)).abs().max() < 0.008


def test_positions_ignore_padding():
    """A row padded by three reads as it does alone. Without position ids GPT-2 is off by whole nats."""
    model = gpt2(40, 0)
    row = [5, 6, 7, 8]
    alone = Reader(model, torch.tensor([row]), torch.ones(1, 4, dtype=torch.long), 4)
    padded = Reader(model, torch.tensor([[0, 0, 0, *row]]), torch.tensor([[0, 0, 0, 1, 1, 1, 1]]), 4)
    assert torch.allclose(*alone.logits, *padded.logits, atol=1e-4)


def test_handoffs_and_stretches(tokenizer, prompts):
    rollouts = write(llama(len(tokenizer), 0), llama(len(tokenizer), 1), prompts, tokenizer)
    pieces = token_bytes(tokenizer, len(tokenizer))
    for row in range(len(rollouts)):
        real = rollouts.completion_mask[row].bool()
        ids, by_senior = rollouts.completion_ids[row][real].tolist(), rollouts.senior_mask[row][real].tolist()
        runs = stretches(ids, by_senior, pieces)
        assert rollouts.handoffs()[row] == sum(a != b for a, b in zip(by_senior, by_senior[1:]))
        assert all(a[0] != b[0] for a, b in zip(runs, runs[1:]))
    assert stretches([0], [1], [b"48"]) == [("senior", "48")]


def test_join_keeps_each_row(tokenizer, prompts):
    """Rollouts of two chunks stand in one batch as they stood in their own."""
    senior, junior = llama(len(tokenizer), 0), llama(len(tokenizer), 1)
    halves = [[part[:2] for part in prompts], [part[2:] for part in prompts]]
    parts = [write(senior, junior, half, tokenizer, max_new_tokens=n) for half, n in zip(halves, (5, 9))]
    whole = join(parts)
    assert len(whole) == len(whole.texts) == len(prompts[0])
    rows = [(part, i) for part in parts for i in range(len(part))]
    for row, (part, i) in enumerate(rows):
        for ids, mask in (("prompt_ids", "prompt_mask"), ("completion_ids", "completion_mask"), ("senior_mask", "completion_mask")):
            assert torch.equal(
                getattr(whole, ids)[row][getattr(whole, mask)[row].bool()], getattr(part, ids)[i][getattr(part, mask)[i].bool()]
            )


def test_different_numbers_of_prompts_are_refused(tokenizer, prompts):
    with pytest.raises(ValueError, match="6 prompts for the senior, 2 for the junior"):
        write(llama(len(tokenizer), 0), None, (prompts[0], prompts[1][:2]), tokenizer)
