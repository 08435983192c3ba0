"""The tiny base: a multilingual Llama of half a million parameters, shipped in lab/tiny_base/.

With it everything runs on a laptop without an account, a download or a GPU, and everybody starts
from the same weights. It answers an English question in English, German or French, as the cue of
the prompt asks. `python -m lab.tiny` makes it again, in place: it trains a byte-level BPE tokenizer
and pretrains the base on generated problems, in a few minutes.

What the pretraining text contains decides what a junior can follow. These constants are there to be
changed. After a change, `python -m lab.tiny FOLDER` makes another base, to be used with --senior
FOLDER --junior FOLDER:

    LANGUAGE_SHARES   English is the majority language, as in real models
    ANNOTATED         share of solutions with <<...>>: enough to continue them sometimes, too few to
                      write them unasked; `python -m lab.tiny FOLDER --annotated 0.02` has fewer
    MIXED             share of solutions that go on, from a random line, in a language drawn anew
    SKIPS             share of solutions that leave out their last step and so answer wrongly. Real
                      text contains errors, and a specialist is fine-tuned on correct solutions
    DRILLS            share of texts that are bare sums, from which arithmetic is learned fastest

A junior that has hardly ever seen `<<` breaks nearly every solution that contains it, and hardly
any rollout is then rewarded. The tiny base shows the mechanism; it says nothing about large models.
"""

import argparse
import hashlib
import json
import random
import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lab import models
from lab.flags import number
from lab.problems import LANGUAGES, generate, plain, prompt
from lab.runs import describe_machine
from lab.specialist import fine_tune

LANGUAGE_SHARES = (0.5, 0.25, 0.25)  # of en, de, fr
ANNOTATED = 0.06
MIXED = 0.05
SKIPS = 0.3
DRILLS = 0.15
STEPS, BATCH, LR = 850, 64, 3e-3
ARCHITECTURE = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=2)
ARCHITECTURE |= dict(num_attention_heads=4, max_position_embeddings=512)
SUM = re.compile(r"<<([^=]*)=([0-9]+)>>")  # "<<12-5=7>>" gives ("12-5", "7")


def checksum(texts: list[tuple[str, str]]) -> str:
    """SHA-256 of the pretraining corpus and the constants of training.

    It says what a base was made from, so editing a comment changes nothing. The weights themselves
    differ between machines by rounding.
    """
    constants = {"steps": STEPS, "batch": BATCH, "lr": LR, **ARCHITECTURE}
    return hashlib.sha256(json.dumps([constants, texts]).encode()).hexdigest()


def make(folder: Path | str, annotated: float = ANNOTATED) -> None:
    """Train tokenizer and base from scratch, with seed 0; save both, and how they were made."""
    texts = corpus(STEPS * BATCH, annotated)
    tokenizer = make_tokenizer([f"{asked} {solution}" for asked, solution in texts[:8000]])
    torch.manual_seed(0)
    ids = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    ids |= dict(pad_token_id=tokenizer.pad_token_id, vocab_size=len(tokenizer))
    model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **ids, **ARCHITECTURE))
    options = dict(steps=STEPS, batch=BATCH, micro_tokens=2**20, lr=LR, seed=0)
    fine_tune(model, tokenizer, texts, **options, label="pretraining the tiny base")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = models.checksum([Path(folder) / "model.safetensors"])
    note = {"annotated": annotated, "checksum": checksum(texts), "weights": weights}
    note = json.dumps(note | describe_machine("cpu"), indent=2)
    (Path(folder) / "made.json").write_text(f"{note}\n")


def corpus(n: int, annotated: float = ANNOTATED) -> list[tuple[str, str]]:
    """n (prompt, solution) texts of the mixture that the constants above describe.

    Always the same for the same n. Another share of annotated solutions leaves the problems, and
    everything else about the texts, as they are.
    """
    rng = random.Random(0)
    problems = generate(n, "train", seed=0)
    sums = [step for problem in problems for step in SUM.findall(problem.solutions["en"])]
    texts = []
    for problem in problems:
        if rng.random() < DRILLS:
            drill = rng.sample(sums, 5)
            asked = "Sums: " + ", ".join(left for left, _ in drill)
            texts.append((asked, "\n".join("=".join(step) for step in drill)))
            continue
        language = rng.choices(LANGUAGES, LANGUAGE_SHARES)[0]
        lines = problem.solutions[language].split("\n")
        if rng.random() < MIXED:
            start, other = rng.randrange(len(lines)), rng.choice(LANGUAGES)
            lines[start:] = problem.solutions[other].split("\n")[start:]
        if rng.random() < SKIPS:
            # Without the last step it answers the one before: "#### 7" instead of "#### 2".
            _, previous_result = SUM.findall("\n".join(lines))[-2]
            lines[-2:] = [f"#### {previous_result}"]
        solution = "\n".join(lines)
        solution = solution if rng.random() < annotated else plain(solution)
        texts.append((prompt(problem.question, language), solution))
    return texts


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every word and every number below 100 is one token."""
    numbers = [f" {i} {i}={i}" for i in range(100)] * 3
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # The vocabulary size is never reached: merging ends when every word is a single token.
    options = dict(vocab_size=4000, min_frequency=2, special_tokens=["<pad>", "</s>"])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False, **options)
    tokenizer.train_from_iterator(texts + numbers, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the tiny base, or another one of its kind.")
    parser.add_argument("folder", nargs="?", default=models.TINY, help="where to write")
    share = dict(type=number(float, 0, 1), default=ANNOTATED)
    parser.add_argument("--annotated", help="share of solutions with <<...>>", **share)
    args = parser.parse_args()
    make(args.folder, args.annotated)
