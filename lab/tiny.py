"""The tiny base: a multilingual Llama of half a million parameters, shipped in lab/tiny_base/.

With it everything runs on a laptop without an account, a download or a GPU, and everybody starts from the same weights. It
answers an English question in English, German or French, as the cue of the prompt asks. `python -m lab.tiny` makes it
again, in place: it trains a byte-level BPE tokenizer and pretrains the base on generated problems, in a few minutes.

What the pretraining text contains decides what a junior can follow. These constants are there to be changed. After a
change, `python -m lab.tiny FOLDER` makes another base, to be used with --senior FOLDER --junior FOLDER:

    LANGUAGE_SHARES   English is the majority language, as in real models
    ANNOTATED         share of solutions with <<...>>: enough to continue them sometimes, too few to write them unasked.
                      `python -m lab.tiny FOLDER --annotated 0.02` makes a base that has seen fewer
    MIXED             share of solutions that go on, from a random line, in a language drawn anew (perhaps the same)
    SKIPS             share of solutions that leave out their last step and so answer wrongly. Real text contains errors,
                      and a specialist that is fine-tuned on correct solutions is then better than the base
    DRILLS            share of texts that are bare sums, from which arithmetic is learned fastest

A junior that has hardly ever seen `<<` breaks nearly every solution that contains it, and hardly any rollout is then
rewarded. The tiny base shows the mechanism; it is no evidence about models of billions of parameters.
"""

import argparse
import hashlib
import json
import random
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lab.flags import number
from lab.problems import LANGUAGES, SUM, generate, plain, prompt, skip_last_step
from lab.runs import Refused, describe_machine
from lab.specialist import fine_tune

FOLDER = Path(__file__).parent / "tiny_base"  # the shipped base

LANGUAGE_SHARES = (0.5, 0.25, 0.25)  # of en, de, fr
ANNOTATED = 0.06
MIXED = 0.05
SKIPS = 0.3
DRILLS = 0.15
STEPS, BATCH, LR = 850, 64, 3e-3
ARCHITECTURE = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512)


def checkpoint(name: str) -> str:
    """The hub id or folder that --senior or --junior names: "tiny" is the shipped base."""
    return str(FOLDER) if name == "tiny" else name


def identity(folder: Path | str = FOLDER) -> str:
    """The name of a base: for one that was made here "tiny-" and its checksum, for any other checkpoint its own name.

    Raises Refused if the note with the checksum is damaged.
    """
    note = Path(folder) / "made.json"
    if not note.is_file():
        return Path(folder).name
    try:
        return "tiny-" + json.loads(note.read_bytes())["checksum"][:12]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        remedy = "restore it from a copy, or remove this file: the base is then known by the name of its folder"
        raise Refused(f"{note} cannot be used ({type(error).__name__}): {remedy}") from error


def checksum(texts: list[tuple[str, str]]) -> str:
    """SHA-256 of the pretraining corpus and the constants of training.

    It names a base by what it was made from, so that editing a comment changes nothing. The weights themselves differ
    between machines by rounding.
    """
    constants = {"steps": STEPS, "batch": BATCH, "lr": LR, **ARCHITECTURE}
    return hashlib.sha256(json.dumps([constants, texts]).encode()).hexdigest()


def make(folder: Path | str, annotated: float = ANNOTATED) -> None:
    """Train tokenizer and base from scratch, always with seed 0, and save both with a note of how they were made."""
    started = time.time()
    texts = corpus(STEPS * BATCH, annotated)
    tokenizer = make_tokenizer([f"{asked} {solution}" for asked, solution in texts[:8000]])
    torch.manual_seed(0)
    token_ids = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **token_ids, **ARCHITECTURE)
    model = LlamaForCausalLM(config)
    fine_tune(model, tokenizer, texts, steps=STEPS, batch=BATCH, micro_tokens=2**20, lr=LR, seed=0, label="pretraining the tiny base")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()
    note = {"checksum": checksum(texts), "weights": weights, "minutes": round((time.time() - started) / 60, 1)}
    note |= {"command": " ".join(["python -m lab.tiny", *sys.argv[1:]]), **describe_machine("cpu")}
    (Path(folder) / "made.json").write_text(json.dumps(note, indent=2) + "\n")


def corpus(n: int, annotated: float = ANNOTATED) -> list[tuple[str, str]]:
    """n (prompt, solution) texts of the mixture that the constants above describe. Always the same for the same n.

    Another share of annotated solutions leaves the problems, and everything else about the texts, as they are.
    """
    rng = random.Random(0)
    problems = generate(n, "train", seed=0)
    sums = [step for problem in problems for step in SUM.findall(problem.solutions["en"])]
    texts = []
    for problem in problems:
        if rng.random() < DRILLS:
            drill = rng.sample(sums, 5)
            texts.append(("Sums: " + ", ".join(left for left, _ in drill), "\n".join("=".join(step) for step in drill)))
            continue
        language = rng.choices(LANGUAGES, LANGUAGE_SHARES)[0]
        lines = problem.solutions[language].split("\n")
        if rng.random() < MIXED:
            start, other = rng.randrange(len(lines)), rng.choice(LANGUAGES)
            lines[start:] = problem.solutions[other].split("\n")[start:]
        if rng.random() < SKIPS:
            lines = skip_last_step(lines)
        solution = "\n".join(lines)
        texts.append((prompt(problem.question, language), solution if rng.random() < annotated else plain(solution)))
    return texts


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every word and every number below 100 is one token, with or without a space before it."""
    numbers = [f" {i} {i}={i}" for i in range(100)] * 3
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # The vocabulary size is never reached: merging ends when every word is a single token.
    options = dict(vocab_size=4000, min_frequency=2, special_tokens=["<pad>", "</s>"], show_progress=False)
    trainer = trainers.BpeTrainer(initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), **options)
    tokenizer.train_from_iterator(texts + numbers, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the tiny base, or another one of its kind.")
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help="folder to write to (default: the shipped base)")
    parser.add_argument("--annotated", type=number(float, 0, 1), default=ANNOTATED, help="share of solutions with <<...>>")
    args = parser.parse_args()
    make(args.folder, args.annotated)
    print(f"{args.folder} holds {identity(args.folder)}")
