"""The measures of Tandem RL, against slower ways to get the same numbers, and by hand."""

import itertools
import json
import math
import re
from argparse import Namespace

import numpy as np
import pytest
import torch

import run_gsm8k
from conftest import left_pad
from lab import measures
from lab.models import load_pair
from metrics import bootstrap_interval, distance_from_junior, pass_at_k, seed_interval
from rollout import Pair, random_numbers, rollout
from tandem import build_tables


@pytest.fixture
def pair_and_solo(base_folder, tokenizer):
    """A senior whose adapter changes something, its own base as junior, and three solutions after prompts of different lengths."""
    pair = load_pair(base_folder, base_folder, rank=4, four_bit=False, device="cpu")
    torch.manual_seed(0)
    for name, parameter in pair.senior.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    asked = left_pad([[5, 6, 7], [8], [9, 10]])
    other = left_pad([[5], [8, 11, 12, 13], [9]])
    return pair, rollout(pair, asked, other, *random_numbers(3, 12, seed=3), p=1.0, temperature=1.0)


def test_distances_by_hand():
    """V = 2, one solution of two tokens and a column of padding. Senior (1/2, 1/2), then (3/4, 1/4); junior (1/4, 3/4) twice.
    The tokens are 0 and 0: the cross-entropy is ln 4 for both; KL is ln(2) / 2 + ln(2/3) / 2 and 3/4 ln 3 + 1/4 ln(1/3)."""
    senior = torch.tensor([[[0.5, 0.5], [0.75, 0.25], [0.9, 0.1]]]).log()
    junior = torch.tensor([[[0.25, 0.75], [0.25, 0.75], [0.1, 0.9]]]).log()
    found = distance_from_junior(senior, junior, torch.tensor([[0, 0, 1]]), torch.tensor([[1, 1, 0]]), temperature=1.0)
    assert found["legibility"].item() == pytest.approx(math.log(4))
    first, second = 0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0.5 * math.log(3)
    assert found["drift"].item() == pytest.approx((first + second) / 2)
    k3 = [junior_p / senior_p - 1 - math.log(junior_p / senior_p) for senior_p, junior_p in ((0.5, 0.25), (0.75, 0.25))]
    assert found["drift_k3"].item() == pytest.approx(sum(k3) / 2)


def test_each_model_reads_its_own_prompt(pair_and_solo, monkeypatch):
    """legibility of each solution beside the junior's plain forward pass over its own prompt and that solution, unpadded."""
    pair, solo = pair_and_solo
    monkeypatch.setattr(measures, "LOGITS_AT_ONCE", 2 * solo.completion_ids.shape[1] * len(pair.pieces))  # two solutions at a time
    found = measures.compare(solo, pair, temperature=1.0)
    for i in range(len(solo)):
        prompt = solo.junior_prompt_ids[i][solo.junior_prompt_mask[i].bool()]
        text = solo.completion_ids[i][solo.completion_mask[i].bool()]
        with pair.senior.disable_adapter(), torch.no_grad():
            logits = pair.senior(input_ids=torch.cat([prompt, text])[None]).logits[0, len(prompt) - 1 : -1]
            prompt = solo.prompt_ids[i][solo.prompt_mask[i].bool()]
        expected = -logits.log_softmax(-1).gather(1, text[:, None]).mean().item()
        assert found["legibility"][i] == pytest.approx(expected, abs=1e-4)
        # The divergence of the senior under its prompt from the junior under its own, over the whole vocabulary.
        with torch.no_grad():
            of_senior = pair.senior(input_ids=torch.cat([prompt, text])[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        divergence = (of_senior.exp() * (of_senior - logits.log_softmax(-1))).sum(-1).mean().item()
        assert divergence > 0.001
        assert found["drift"][i] == pytest.approx(divergence, abs=1e-4)


def test_only_the_divergence_depends_on_the_temperature_of_sampling(pair_and_solo):
    """Legibility is a cross-entropy, at temperature 1; the divergence is that of the distributions that were sampled from."""
    pair, solo = pair_and_solo
    hot, cold = (measures.compare(solo, pair, temperature) for temperature in (1.0, 0.5))
    assert hot["legibility"] == cold["legibility"]
    assert all(one != other for one, other in zip(hot["drift"], cold["drift"]))


def test_a_senior_that_is_its_junior_has_not_drifted(base_folder):
    """A fresh adapter and equal prompts: the divergence is 0, exactly and as estimated."""
    pair = load_pair(base_folder, base_folder, rank=4, four_bit=False, device="cpu")
    asked = left_pad([[5, 6, 7], [8]])
    solo = rollout(pair, asked, asked, *random_numbers(2, 8, seed=3), p=1.0, temperature=1.0)
    found = measures.compare(solo, pair, temperature=0.7)
    assert max(map(abs, found["drift"] + found["drift_k3"])) < 1e-4


def test_the_junior_continues_the_senior(pair_and_solo, tokenizer):
    """At 50 %, each solution begins with the first half of the senior's tokens and goes on with what the junior, under its own
    prompt, finds likeliest (near temperature 0). At a share of 1, nothing is left of the common budget of an unfinished one."""
    pair, solo = pair_and_solo
    greedy = Namespace(device="cpu", max_new_tokens=12, seed=0, rollout_batch=2, handoff="word", temperature=1e-4)
    for i, text in enumerate(measures.continue_solutions(solo, 0.5, greedy, pair)):
        tokens = solo.completion_ids[i][solo.completion_mask[i].bool()].tolist()
        ids = solo.junior_prompt_ids[i][solo.junior_prompt_mask[i].bool()].tolist() + tokens[: len(tokens) // 2]
        start = len(ids) - len(tokens) // 2
        while len(ids) - start < 12 and ids[-1] not in pair.end_ids:
            with pair.senior.disable_adapter(), torch.no_grad():
                ids.append(pair.senior(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        assert text == b"".join(pair.pieces[token] for token in ids[start:]).decode(errors="replace")
    args = Namespace(device="cpu", max_new_tokens=12, seed=0, rollout_batch=2, handoff="word", temperature=1.0)
    for i, text in enumerate(measures.continue_solutions(solo, 0.5, args, pair)):
        tokens = solo.completion_ids[i][solo.completion_mask[i].bool()].tolist()
        kept = b"".join(pair.pieces[token] for token in tokens[: len(tokens) // 2])
        assert kept
        # The last character of the first half may be completed by what follows.
        assert text.startswith(kept.decode(errors="replace")[:-1])
    unfinished = [i for i in range(len(solo)) if solo.completion_mask[i].sum() == 12]
    whole = measures.continue_solutions(solo, 1.0, args, pair)
    assert unfinished
    assert [whole[i] for i in unfinished] == [solo.texts[i] for i in unfinished]


class Loop:
    """A model that writes the given tokens over and over, each after the one before it, whoever wrote that one."""

    def __init__(self, tokens, vocab_size):
        self.tokens, self.vocab_size = tokens, vocab_size

    def __call__(self, input_ids, **_):
        following = {token: self.tokens[(i + 1) % len(self.tokens)] for i, token in enumerate(self.tokens)}
        logits = torch.zeros(*input_ids.shape, self.vocab_size)
        for place in itertools.product(*map(range, input_ids.shape)):
            logits[(*place, following.get(input_ids[place].item(), self.tokens[0]))] = 1e4
        return Namespace(logits=logits, past_key_values=None)


@pytest.mark.parametrize("breaks", [("\n", "\n"), ("\n", "\n\n"), ("\n\n", "\n"), (" ", "\n")])
def test_senior_and_junior_take_turns_line_by_line(breaks, monkeypatch):
    """The runner's alternation: the senior writes "A." and the junior "B." by turns, however each of them separates its sentences.
    No turn is spent on white space alone."""
    pieces = [b"", b"A", b"B", b".", b"\n", b"\n\n", b" "]
    senior, junior = (Loop([letter, 3, pieces.index(text.encode())], 7) for letter, text in zip((1, 2), breaks))
    pair = Pair(senior, junior, None, None, [0], pieces, build_tables(pieces))
    monkeypatch.setattr(run_gsm8k.tasks, "prompts_of_pair", lambda problems, *_: (problems, problems))
    monkeypatch.setattr(run_gsm8k.models, "encode_prompts", lambda *_: (torch.tensor([[6]]), torch.ones(1, 1, dtype=torch.long)))
    args = Namespace(max_new_tokens=18, device="cpu", rollout_batch=1, handoff="word", temperature=1.0)
    written = run_gsm8k.generate(["?"], args, pair, p=0.5, seed=0, schedule="sentence", alternate=True)
    authors = [author for author, text in written.author_spans(pieces)[0] if text.strip()]
    assert authors == (["senior", "junior"] * 9)[: len(authors)]
    assert len(authors) >= 4
    assert re.fullmatch(r"A\.(\s+B\.\s+A\.)*(\s+B?\.?)?\s*", written.texts[0])


def test_pass_at_k_beside_counting():
    """4 solutions of which 1 is right: 1 of 4 for k = 1, and 3 of the 6 pairs hold it."""
    assert pass_at_k(1, 4, 1) == pytest.approx(0.25)
    assert pass_at_k(1, 4, 2) == pytest.approx(0.5)
    assert pass_at_k(0, 4, 3) == 0
    assert pass_at_k(2, 4, 4) == 1
    for right, n, k in ((5, 4, 1), (-1, 4, 1), (1, 4, 5), (1, 4, 0)):
        with pytest.raises(ValueError, match=f"pass@{k} from {right} right of {n}"):
            pass_at_k(right, n, k)


def test_the_bootstrap_sees_seeds_and_problems():
    """Two seeds that disagree completely: 0 to 1. Seeds that agree on a half of 400 problems: 0.5 plus or minus 0.03 or so, as the
    normal interval of 1200 problems gives. Equal measures differ by exactly 0, because problems stay together."""
    apart = np.stack([np.zeros((50, 1)), np.ones((50, 1))])
    assert bootstrap_interval(apart) == (0.0, 1.0)
    rng = np.random.default_rng(1)
    half = np.stack([rng.permutation([0.0, 1.0] * 200) for _ in range(3)])[:, :, None]
    low, high = bootstrap_interval(half)
    assert (high - low) / 2 == pytest.approx(1.96 * 0.5 / math.sqrt(1200), rel=0.15)
    same = np.concatenate([half, half], 2)
    assert bootstrap_interval(same, lambda means: means[0] - means[1]) == (0.0, 0.0)
    with pytest.raises(ValueError, match="all of them at least 1"):
        bootstrap_interval(np.ones((0, 4, 1)))


def test_the_interval_over_seeds_covers_what_it_says():
    """Five seeds whose means scatter around 0: of 400 such experiments, about 95 % of the intervals contain 0."""
    rng = np.random.default_rng(2)
    covered = [low <= 0 <= high for low, high in (seed_interval(rng.normal(size=5).tolist()) for _ in range(400))]
    assert 0.92 < np.mean(covered) < 0.98
    for seeds in (1, 11):
        with pytest.raises(ValueError, match=f"needs 2 to 10 of them, got {seeds}"):
            seed_interval([0.0] * seeds)


def test_a_row_has_every_measure_of_every_problem(base_folder, tmp_path):
    """The runner with --measures: measures.jsonl, with the share of right solutions that metrics.jsonl states."""
    flags = f"--setting rlvr --arms rlvr-tandem --preset tiny --senior {base_folder} --junior {base_folder} --out {tmp_path} --device cpu "
    flags += "--updates 1 --batch 8 --eval-problems 5 --eval-every 1 --max-new-tokens 12 --rank 4"
    run_gsm8k.main(flags.split())
    folder = tmp_path / "rlvr-tandem" / "seed-0"
    found = [json.loads(line) for line in (folder / "measures.jsonl").read_text().splitlines()]
    assert [row["update"] for row in found] == [0, 1]
    for row in found:
        names = "solo handoff word continued_25 continued_50 continued_75 legibility drift drift_k3 right_of_8"
        assert set(row) == {"update", *names.split()}
        assert all(len(values) == 5 for name, values in row.items() if name != "update")
    # Both begin as the same model.
    assert max(found[0]["drift"]) < 1e-4
