"""Co-generation against the reference implementation, which has no cache, no padding, no batch and no tables."""

from dataclasses import replace

import pytest
import torch

from conftest import gpt2, left_pad, llama, make_pair, write
from reinforce import completion_logprobs
from rollout import CachedDecoder, Rollouts, join, random_numbers, reference_rollout, rollout_in_chunks, sample, truncate
from tandem import SCHEDULES, opens_word, token_bytes

STEPS = 14


@pytest.fixture(scope="module")
def prompts(tokenizer):
    """Six prompts of different lengths for each model."""
    texts = ["In", "Natalia sold 48", "She", "schön l'eau sold clips in April", "48/2 =", "days! She"]
    senior = [tokenizer(text).input_ids for text in texts]
    junior = [tokenizer("sold half as many. " * (i % 3) + text).input_ids for i, text in enumerate(texts)]
    return senior, junior


def reference_row(senior, junior, prompts, row, tokenizer, p, steps=STEPS):
    """One row by the reference implementation, with the random numbers of that row in `write`."""
    noise, coins = random_numbers(len(prompts[0]), steps, seed=2)
    pair = make_pair(senior, junior, tokenizer)
    return reference_rollout(pair, prompts[0][row], prompts[1][row], noise[:, :, row], coins[:, row], p, temperature=1.3)


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
def test_against_the_reference(make_model, prompts, tokenizer, p):
    """Ids and authors of each row; the cache, the padding, the tables and dropped rows change nothing (cases 9 and 11)."""
    senior, junior = (WholeText(make_model(len(tokenizer), seed, torch.float64), tokenizer) for seed in (0, 1))
    rollouts = write(senior, junior, prompts, tokenizer, p=p)
    for row in range(len(prompts[0])):
        expected = reference_row(senior, junior, prompts, row, tokenizer, p)
        n = len(expected)
        assert rollouts.completion_ids[row, :n].tolist() == [token for token, _ in expected]
        assert rollouts.senior_mask[row].tolist()[:n] == [int(author == "senior") for _, author in expected]
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
        expected = reference_row(senior, junior, prompts, row, tokenizer, 0.5, steps=40)
        assert rollouts.completion_ids[row, : lengths[row]].tolist() == [token for token, _ in expected]


def test_any_of_several_tokens_ends_a_text(tokenizer, prompts):
    """Two models of one vocabulary may end a text differently: with every token an end, each row is one token."""
    model = llama(len(tokenizer), 0)
    rollouts = write(model, model, prompts, tokenizer, end_ids=range(len(tokenizer)))
    assert rollouts.completion_mask.tolist() == [[1]] * len(prompts[0])


@pytest.mark.parametrize("schedule", SCHEDULES)
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


@pytest.mark.parametrize("schedule", SCHEDULES)
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


def test_log_probabilities_of_the_senior_alone(tokenizer, prompts):
    """At p = 1 they are kept too, and the senior draws with its own random numbers: those of its first joint candidate."""
    senior, junior = llama(len(tokenizer), 0, torch.float64), llama(len(tokenizer), 1, torch.float64)
    alone = write(senior, None, prompts, tokenizer, p=1.0)
    assert torch.allclose(completion_logprobs(senior, alone, 1.3), alone.logprobs, atol=1e-10)
    together = write(senior, junior, prompts, tokenizer, p=0.9)
    by_senior = together.senior_mask[:, 0].bool()
    assert by_senior.sum() > 2
    assert torch.equal(alone.completion_ids[by_senior, 0], together.completion_ids[by_senior, 0])


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
    alone = CachedDecoder(model, torch.tensor([row]), torch.ones(1, 4, dtype=torch.long), 4)
    padded = CachedDecoder(model, torch.tensor([[0, 0, 0, *row]]), torch.tensor([[0, 0, 0, 1, 1, 1, 1]]), 4)
    assert torch.allclose(*alone.logits, *padded.logits, atol=1e-4)


def test_handoffs_and_author_spans(tokenizer, prompts):
    rollouts = write(llama(len(tokenizer), 0), llama(len(tokenizer), 1), prompts, tokenizer)
    spans = rollouts.author_spans(token_bytes(tokenizer, len(tokenizer)))
    for row in range(len(rollouts)):
        by_senior = rollouts.senior_mask[row][rollouts.completion_mask[row].bool()].tolist()
        assert rollouts.handoffs()[row] == sum(a != b for a, b in zip(by_senior, by_senior[1:]))
        assert all(a[0] != b[0] for a, b in zip(spans[row], spans[row][1:]))
        assert "".join(text for _, text in spans[row]).replace("\ufffd", "") == rollouts.texts[row].replace("\ufffd", "")


def test_author_spans_by_hand():
    """Two tokens of one author are decoded together (0xC3 0xB6 is ö); padding is not text."""
    ids, mask = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[1, 1, 1, 0]])
    rollouts = Rollouts(ids, mask, ids, mask, ids, mask, torch.tensor([[1, 1, 0, 0]]), ids, mask, torch.zeros(1, 4), [""])
    assert rollouts.author_spans([b"sch\xc3", b"\xb6", b"n", b"x"]) == [[("senior", "schö"), ("junior", "n")]]


@pytest.mark.parametrize("schedule", ["token", "word", "redraw"])
def test_candidates_and_tosses_are_recorded(tokenizer, prompts, schedule):
    """Both candidates of every step are what the models sample after one plain pass, and a toss is where the schedule wants it."""
    pieces = token_bytes(tokenizer, len(tokenizer))
    models = [WholeText(llama(len(tokenizer), seed, torch.float64), tokenizer) for seed in (0, 1)]
    rollouts, noise = write(*models, prompts, tokenizer, schedule=schedule), random_numbers(6, STEPS, seed=2)[0]
    for row in range(len(rollouts)):
        written = rollouts.completion_ids[row][rollouts.completion_mask[row].bool()].tolist()
        authors = rollouts.senior_mask[row].tolist()
        for t in range(len(written)):
            seen = [torch.tensor([prompts[role][row] + written[:t]]) for role in (0, 1)]
            samples = [sample(models[role](input_ids=seen[role]).logits[:, -1], noise[role, t, [row]], 1.3)[0].item() for role in (0, 1)]
            assert [written[t], rollouts.discarded_ids[row, t].item()] == (samples if authors[t] else samples[::-1])
            before, of_active = pieces[written[t - 1]], pieces[samples[1 - authors[t - 1]]]
            text = b"".join(pieces[token] for token in written[:t]).decode()
            wanted = {"token": True, "word": opens_word(text, of_active.decode()), "redraw": before.startswith(b" ")}
            assert rollouts.toss_mask[row, t] == (t == 0 or wanted[schedule])
        assert rollouts.toss_mask[row, len(written) :].sum() == 0
    assert rollouts.toss_mask.sum() > len(rollouts)


def test_steps_by_hand():
    """The bytes of ö come from two tokens: the second one adds it to the text. A candidate that is half of it is spelled out."""
    ids, ones = torch.tensor([[0, 1, 2, 3]]), torch.ones(1, 4, dtype=torch.long)
    by_senior, tosses, probabilities = torch.tensor([[1, 1, 0, 0]]), torch.tensor([[1, 0, 1, 0]]), torch.tensor([[1, 0.25, 0.5, 0.12345]])
    discarded = torch.tensor([[2, 1, 0, 2]])
    rollouts = Rollouts(ids, ones, ids, ones, ids, ones, by_senior, discarded, tosses, probabilities.log(), ["schön"])
    pieces = [b"sch\xc3", b"\xb6", b"n", b""]
    steps = rollouts.steps(0, pieces)
    assert [tuple(step) for step in steps] == [
        ("senior", "sch", r"sch\xc3", "n", True, 1.0),
        ("senior", "ö", r"\xb6", r"\xb6", False, 0.25),
        ("junior", "n", r"sch\xc3", "n", True, 0.5),
        ("junior", "", "n", "", False, 0.1235),
    ]
    cut = replace(rollouts, completion_mask=torch.tensor([[1, 0, 0, 0]]))
    assert [step.text for step in cut.steps(0, pieces)] == ["sch\ufffd"]


def test_truncate_by_hand(tokenizer):
    """The token in which the stop text begins, and all after it, leave text and masks; a row without it stays as it is."""
    pair = make_pair(None, None, tokenizer)
    rows = [tokenizer(text).input_ids for text in ("She sold 2.\nQuestion: April", "She sold 2 clips in April.")]
    width = max(map(len, rows))
    ids = torch.tensor([row + [1] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    texts = [tokenizer.decode(row) for row in rows]
    rollouts = Rollouts(ids, mask, ids, mask, ids, mask, mask, ids, mask, mask.double(), texts)
    cut = truncate(rollouts, "\nQuestion:", pair)
    assert cut.texts == ["She sold 2.", "She sold 2 clips in April."]
    kept = len(tokenizer("She sold 2.").input_ids)
    assert cut.completion_mask[0].tolist() == [1] * kept + [0] * (width - kept)
    for name in ("senior_mask", "toss_mask", "logprobs"):
        assert torch.equal(getattr(cut, name), cut.completion_mask.to(getattr(cut, name).dtype))
    assert torch.equal(cut.completion_mask[1], mask[1])
    assert torch.equal(rollouts.completion_mask, mask)  # the argument is unmodified


def test_chunks_change_nothing(tokenizer, prompts):
    """Two rows in memory at a time instead of all six; rows of a chunk are padded to its own longest prompt."""
    senior, junior = (llama(len(tokenizer), seed, torch.float64) for seed in (0, 1))
    pair, padded, numbers = make_pair(senior, junior, tokenizer), list(map(left_pad, prompts)), random_numbers(6, STEPS, seed=2)
    whole, chunks = (rollout_in_chunks(pair, *padded, *numbers, max_rows=rows, truncate_at="never", p=0.5) for rows in (6, 2))
    assert torch.equal(whole.completion_ids * whole.completion_mask, chunks.completion_ids * chunks.completion_mask)
    assert torch.equal(whole.senior_mask, chunks.senior_mask)
    assert torch.allclose(whole.logprobs, chunks.logprobs, atol=1e-10)
    assert torch.equal(whole.prompt_ids, chunks.prompt_ids)


def test_join_keeps_each_row(tokenizer, prompts):
    """Rollouts of two chunks stand in one batch as they stood in their own."""
    senior, junior = llama(len(tokenizer), 0), llama(len(tokenizer), 1)
    halves = [[part[:2] for part in prompts], [part[2:] for part in prompts]]
    parts = [write(senior, junior, half, tokenizer, max_new_tokens=n) for half, n in zip(halves, (5, 9))]
    whole = join(parts)
    assert len(whole) == len(whole.texts) == len(prompts[0])
    assert whole.prompt_mask[:, -1].all()  # prompts end at the last column, completions begin at the first
    assert whole.completion_mask[:, 0].all()
    rows = [(part, i) for part in parts for i in range(len(part))]
    for row, (part, i) in enumerate(rows):
        for ids, mask in (("prompt_ids", "prompt_mask"), ("completion_ids", "completion_mask"), ("senior_mask", "completion_mask")):
            assert torch.equal(
                getattr(whole, ids)[row][getattr(whole, mask)[row].bool()], getattr(part, ids)[i][getattr(part, mask)[i].bool()]
            )


@pytest.mark.parametrize("broken", ["senior", "junior"])
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_logits_that_are_not_finite_stop_the_rollout(tokenizer, prompts, broken, p):
    """One NaN weight in the output layer: without the check, the last token is written over and over, and nothing is said."""
    models = {name: llama(len(tokenizer), seed) for seed, name in enumerate(("senior", "junior"))}
    with torch.no_grad():
        models[broken].lm_head.weight[7, 0] = float("nan")
    runs = {"senior": p > 0, "junior": p < 1}
    if runs[broken]:
        with pytest.raises(FloatingPointError, match=f"the {broken}'s logits are not finite at completion token 1"):
            write(models["senior"], models["junior"], prompts, tokenizer, p=p)
    else:
        assert len(write(models["senior"], models["junior"], prompts, tokenizer, p=p)) == len(prompts[0])


def test_different_numbers_of_prompts_are_refused(tokenizer, prompts):
    with pytest.raises(ValueError, match="6 prompts for the senior, 2 for the junior"):
        write(llama(len(tokenizer), 0), None, (prompts[0], prompts[1][:2]), tokenizer)


def test_greedy_decoding():
    """Temperature 0: the likeliest token, whatever the random number is, and log-probabilities of each row at temperature 1."""
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    ids, logprobs = sample(logits, torch.tensor([0.999, 0.999]), 0)
    assert ids.tolist() == [1, 0]
    assert torch.allclose(logprobs.exp().sum(1), torch.ones(2))
    assert torch.allclose(logprobs, logits.log_softmax(1))


def test_the_largest_random_number_gives_a_token_that_is_possible():
    """The probabilities add up to 1 only up to rounding. The last token is impossible, and the number is the largest below 1."""
    logits = torch.randn(2000, 50, generator=torch.Generator().manual_seed(0))
    logits[:, -1] = -torch.inf
    ids, logprobs = sample(logits, torch.full((2000,), 1 - 2.0**-24), 1.0)
    assert (logprobs.exp().cumsum(1)[:, -1] < 1).any()
    assert (ids < 49).all()
