"""The measures of Tandem RL, against slower ways to get the same numbers."""

import itertools
import json
import re
from argparse import Namespace

import pytest
import torch

import run_gsm8k
from lab import engine, measures, models, viewer
from lab.experiments import flags_of_run
from rollout import Pair, random_numbers, rollout

ARGS = Namespace(device="cpu", max_new_tokens=12, seed=0, rollout_batch=2, temperature=1.0)


@pytest.fixture
def pair_and_solo(base_folder):
    """A senior whose adapter changes something, its own base as junior, and three solutions."""
    flags = vars(flags_of_run({}, "tandem", 0)) | {"bfloat16": False, "device": "cpu"}
    args = Namespace(**flags)
    pair = models.make_pair(base_folder, base_folder, args)
    torch.manual_seed(0)
    for name, parameter in pair.senior.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    asked, other = [[5, 6, 7], [8], [9, 10]], [[5], [8, 11, 12, 13], [9]]
    solo = rollout(pair, asked, other, *random_numbers(3, 12, seed=3), p=1.0, temperature=1.0)
    return pair, solo


def logits_after(model, prompt: list[int], text: list[int]) -> torch.Tensor:
    """The plain log-probabilities before every token of the text, unpadded."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + text])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def test_each_model_reads_its_own_prompt(pair_and_solo, monkeypatch):
    """legibility and drift of each solution beside plain passes, two solutions at a time."""
    pair, solo = pair_and_solo
    two = 2 * solo.completion_ids.shape[1] * len(pair.pieces)
    monkeypatch.setattr(engine, "LOGITS_AT_ONCE", two)
    found = measures.compare(solo, pair, temperature=1.0)
    texts = measures._rows(solo.completion_ids, solo.completion_mask)
    asked = measures._rows(solo.prompt_ids, solo.prompt_mask)
    others = measures._rows(solo.junior_prompt_ids, solo.junior_prompt_mask)
    for i, text in enumerate(texts):
        senior = logits_after(pair.senior, asked[i], text)
        with pair.senior.disable_adapter():
            junior = logits_after(pair.senior, others[i], text)
        expected = -junior.gather(1, torch.tensor(text)[:, None]).mean().item()
        assert found["legibility"][i] == pytest.approx(expected, abs=1e-4)
        divergence = (senior.exp() * (senior - junior)).sum(-1).mean().item()
        assert divergence > 0.001
        assert found["drift"][i] == pytest.approx(divergence, abs=1e-4)
    # Only the divergence depends on the temperature of sampling.
    cold = measures.compare(solo, pair, temperature=0.5)
    assert found["legibility"] == cold["legibility"]
    assert all(one != other for one, other in zip(found["drift"], cold["drift"]))


def test_a_senior_that_is_its_junior_has_not_drifted(pair_and_solo):
    pair, _ = pair_and_solo
    models.reset_adapter(pair.senior, 0)
    asked = [[5, 6, 7], [8]]
    solo = rollout(pair, asked, asked, *random_numbers(2, 8, seed=3), p=1.0, temperature=1.0)
    assert max(map(abs, measures.compare(solo, pair, temperature=0.7)["drift"])) < 1e-4


def test_the_junior_continues_the_senior(pair_and_solo):
    """At 50 %, a solution begins with half of the senior's tokens and goes on with what the junior,
    under its own prompt, finds likeliest (near temperature 0)."""
    pair, solo = pair_and_solo
    greedy = Namespace(**vars(ARGS) | {"temperature": 1e-4})
    wholes = measures._rows(solo.completion_ids, solo.completion_mask)
    prompts = measures._rows(solo.junior_prompt_ids, solo.junior_prompt_mask)
    for i, text in enumerate(measures.continue_solutions(solo, 0.5, greedy, pair)):
        ids = prompts[i] + wholes[i][: len(wholes[i]) // 2]
        while len(ids) - len(prompts[i]) < 12 and ids[-1] not in pair.end_ids:
            with pair.senior.disable_adapter(), torch.no_grad():
                ids.append(pair.senior(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        own = b"".join(pair.pieces[token] for token in ids[len(prompts[i]) :])
        assert text == own.decode(errors="replace")
    # At a share of 1, nothing is left of the common budget of an unfinished solution.
    unfinished = [i for i, whole in enumerate(wholes) if len(whole) == 12]
    texts = measures.continue_solutions(solo, 1.0, ARGS, pair)
    assert unfinished
    assert [texts[i] for i in unfinished] == [solo.texts[i] for i in unfinished]


class Loop:
    """A model that writes the given tokens over and over, whoever wrote the one before."""

    def __init__(self, tokens, vocab_size):
        self.after = dict(zip(tokens, [*tokens[1:], tokens[0]]))
        self.first, self.vocab_size = tokens[0], vocab_size

    def __call__(self, input_ids, **_):
        logits = torch.zeros(*input_ids.shape, self.vocab_size)
        for place in itertools.product(*map(range, input_ids.shape)):
            logits[(*place, self.after.get(input_ids[place].item(), self.first))] = 1e4
        return Namespace(logits=logits)


@pytest.mark.parametrize("breaks", [("\n", "\n"), ("\n", "\n\n"), ("\n\n", "\n"), (" ", "\n")])
def test_senior_and_junior_take_turns_line_by_line(breaks, monkeypatch):
    """The senior writes "A." and the junior "B." by turns, however each separates its sentences."""
    pieces = [b"", b"A", b"B", b".", b"\n", b"\n\n", b" "]
    spaces = [pieces.index(text.encode()) for text in breaks]
    senior, junior = (Loop([letter, 3, space], 7) for letter, space in zip((1, 2), spaces))
    pair = Pair(senior, junior, None, None, [0], pieces)
    asked = [(None, ["?"])] * 2
    monkeypatch.setattr(run_gsm8k.tasks, "prompts_of_pair", lambda *_: asked)
    monkeypatch.setattr(run_gsm8k.models, "encode", lambda *_: [[6]])
    args = Namespace(**vars(ARGS) | {"max_new_tokens": 18, "handoff": "word"})
    options = dict(p=0.5, seed=0, schedule="sentence", alternate=True)
    written = run_gsm8k.generate(["?"], args, pair, **options)
    spans = viewer.author_spans(written, pieces)[0]
    authors = [author for author, text in spans if text.strip()]
    assert authors == (["senior", "junior"] * 9)[: len(authors)]
    assert len(authors) >= 4
    assert re.fullmatch(r"A\.(\s+B\.\s+A\.)*(\s+B?\.?)?\s*", written.texts[0])


def test_a_row_has_every_measure_of_every_problem(base_folder, tmp_path):
    """The setting rlvr writes measures.jsonl before and after training."""
    flags = f"--setting rlvr --arms rlvr-tandem --senior {base_folder} --junior {base_folder}"
    flags += f" --out {tmp_path} --device cpu --updates 1 --batch 8 --eval-problems 5"
    run_gsm8k.main([*flags.split(), "--eval-every", "1", "--max-new-tokens", "12"])
    folder = tmp_path / "rlvr-tandem" / "seed-0"
    found = [json.loads(line) for line in (folder / "measures.jsonl").read_text().splitlines()]
    assert [row["update"] for row in found] == [0, 1]
    names = "solo handoff word continued_25 continued_50 continued_75 legibility drift right_of_8"
    for row in found:
        assert set(row) == {"update", *names.split()}
        assert all(len(values) == 5 for name, values in row.items() if name != "update")
    # Both begin as the same model.
    assert max(found[0]["drift"]) < 1e-4
