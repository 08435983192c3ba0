"""The embedded default: a tiny multilingual base, pretrained on the spot and cached.

So that everything runs on a laptop with no account and no download, the tiny preset makes its own base: a Llama of half
a million parameters with a byte-level BPE tokenizer, pretrained for two minutes on generated problems. It answers an
English question in English, German or French, as the cue of the prompt asks, and solved 48, 47 and 36 % of our test
problems in them.

What the pretraining text contains decides what a junior can follow, so it stands here as numbers to play with:

    LANGUAGE_SHARES   English is the majority language, as it is of real models
    ANNOTATED         share of solutions with <<...>>: enough to follow them at times, too few to write them
    MIXED             share of solutions that change their language on the way
    SKIPS             share of solutions that leave out the last step and so answer wrongly: text from the wild is careless,
                      and a specialist fine-tuned on careful solutions is then better than the base
    DRILLS            share of texts that are bare sums, from which arithmetic is learned fastest

A junior that hardly saw `<<` breaks nearly every solution that contains it, and then hardly any rollout is rewarded.

Not here: the specialist (models.py), and any claim that half a million parameters behave as 7 billion do.
"""

import hashlib
import os
import random
import re
import shutil
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from models import fine_tune
from problems import LANGUAGES, generate, plain, prompt

LANGUAGE_SHARES = (0.5, 0.25, 0.25)  # of en, de, fr
ANNOTATED = 0.06
MIXED = 0.05
SKIPS = 0.3
DRILLS = 0.15
STEPS, BATCH, LR = 850, 64, 3e-3
SUM = re.compile(r"<<([^=]*)=([0-9]+)>>")


def base_folder() -> Path:
    """The folder of the pretrained base, below ~/.cache/tandem-training; made now if it is not there.

    Its name holds a checksum of the two files that define it, so that a change to them makes a new base.
    """
    sources = [Path(__file__), Path(__file__).with_name("problems.py")]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tandem-training"
    folder = cache / f"tiny-{key}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        print("pretraining the tiny base, once: from now on it comes from the cache")
        draft, started = tempfile.mkdtemp(dir=cache), time.time()
        pretrain(draft)
        print(f"pretrained after {(time.time() - started) / 60:.1f} minutes")
        try:
            os.rename(draft, folder)  # complete or not there at all, whoever else is at it
        except OSError:
            shutil.rmtree(draft)
    return folder


def pretrain(folder: str) -> None:
    """Train tokenizer and base from scratch, always with the same seed, and save both."""
    texts = corpus(STEPS * BATCH)
    tokenizer = make_tokenizer([question + " " + solution for question, solution in texts[:8000]])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    fine_tune(model, tokenizer, texts, steps=STEPS, batch=BATCH, micro_tokens=2**20, lr=LR, seed=0, label="pretraining")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def corpus(n: int) -> list[tuple[str, str]]:
    """n (prompt, solution) texts of the mixture that the constants above describe."""
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
        if len(lines) > 2 and rng.random() < SKIPS:  # leave out the last step: the answer is the result before it
            lines[-2:] = [f"#### {SUM.findall(problem.solutions['en'])[-2][1]}"]
        solution = "\n".join(lines)
        texts.append((prompt(problem.question, language), solution if rng.random() < ANNOTATED else plain(solution)))
    return texts


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which each word and each number below 100 ends up as one token, with or without its space."""
    numbers = [f" {i} {i}={i}" for i in range(100)] * 3
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,  # never reached: merging ends when each word is whole
        min_frequency=2,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts + numbers, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
