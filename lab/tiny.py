"""The tiny base: a multilingual Llama of half a million parameters, shipped in lab/tiny_base/.

With it everything runs on a laptop without an account, a download or a GPU, and everybody starts from the same weights. It
answers an English question in English, German or French, as the cue of the prompt asks. `python -m lab.tiny` makes it
again: it trains a byte-level BPE tokenizer and pretrains the base on generated problems, in a few minutes.

What the pretraining text contains decides what a junior can follow. These constants are meant to be played with; after a
change, `python -m lab.tiny FOLDER` makes another base, to be used with --senior FOLDER --junior FOLDER:

    LANGUAGE_SHARES   English is the majority language, as in real models
    ANNOTATED         share of solutions with <<...>>: enough to continue them sometimes, too few to write them unasked
    MIXED             share of solutions that change their language on the way
    SKIPS             share of solutions that leave out their last step and so answer wrongly. Text from the wild is
                      careless; a specialist that is fine-tuned on careful solutions is then better than the base
    DRILLS            share of texts that are bare sums, from which arithmetic is learned fastest

A junior that has hardly ever seen `<<` breaks nearly every solution that contains it, and hardly any rollout is then
rewarded. Nothing here claims that half a million parameters behave like seven billion.
"""

import hashlib
import json
import platform
import random
import re
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lab.problems import LANGUAGES, generate, plain, prompt
from lab.specialist import fine_tune

FOLDER = Path(__file__).parent / "tiny_base"  # the shipped base

LANGUAGE_SHARES = (0.5, 0.25, 0.25)  # of en, de, fr
ANNOTATED = 0.06
MIXED = 0.05
SKIPS = 0.3
DRILLS = 0.15
STEPS, BATCH, LR = 850, 64, 3e-3
ARCHITECTURE = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512)
SUM = re.compile(r"<<([^=]*)=([0-9]+)>>")


def identity(folder: Path | str = FOLDER) -> str:
    """The name of a tiny base, such as "tiny-0123456789ab": the checksum of what it was made from (see checksum)."""
    return f"tiny-{json.loads((Path(folder) / 'made.json').read_text())['checksum'][:12]}"


def checksum(texts: list[tuple[str, str]]) -> str:
    """SHA-256 of the pretraining corpus and of the constants of training: what a base is, whatever the source looks like."""
    constants = {"steps": STEPS, "batch": BATCH, "lr": LR, **ARCHITECTURE}
    return hashlib.sha256(json.dumps([constants, texts]).encode()).hexdigest()


def make(folder: Path | str) -> None:
    """Train tokenizer and base from scratch, always with seed 0, and save both with a note of how they were made."""
    started = time.time()
    texts = corpus(STEPS * BATCH)
    tokenizer = make_tokenizer([f"{asked} {solution}" for asked, solution in texts[:8000]])
    torch.manual_seed(0)
    token_ids = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **token_ids, **ARCHITECTURE)
    model = LlamaForCausalLM(config)
    fine_tune(model, tokenizer, texts, steps=STEPS, batch=BATCH, micro_tokens=2**20, lr=LR, seed=0, label="pretraining the tiny base")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    note = {
        "command": "python -m lab.tiny",
        "checksum": checksum(texts),
        "weights": hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest(),
        "device": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
        "minutes": round((time.time() - started) / 60, 1),
    }
    (Path(folder) / "made.json").write_text(json.dumps(note, indent=2) + "\n")


def corpus(n: int) -> list[tuple[str, str]]:
    """n (prompt, solution) texts of the mixture that the constants above describe. Always the same for the same n."""
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
        if len(lines) > 2 and rng.random() < SKIPS:
            # Leave out the last step: the answer is then the result of the step before.
            lines[-2:] = [f"#### {SUM.findall(problem.solutions['en'])[-2][1]}"]
        solution = "\n".join(lines)
        texts.append((prompt(problem.question, language), solution if rng.random() < ANNOTATED else plain(solution)))
    return texts


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every word and every number below 100 is one token, with or without a space before it."""
    numbers = [f" {i} {i}={i}" for i in range(100)] * 3
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # The vocabulary size is never reached: merging ends when every word is a single token.
    options = dict(vocab_size=4000, min_frequency=2, special_tokens=["<pad>", "</s>"], show_progress=False)
    trainer = trainers.BpeTrainer(initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), **options)
    tokenizer.train_from_iterator(texts + numbers, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


if __name__ == "__main__":
    destination = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    make(destination)
    print(f"{destination} holds {identity(destination)}")
