"""The taught base: a pretrained model that has learned to solve the problems, without jargon, and that is then frozen.

A small pretrained model such as SmolLM2-135M solves none of the problems when it is asked in a chat. As a junior it could
continue nothing, so no rollout would be rewarded. With --teach-steps N the base of both models is therefore fine-tuned first,
by a LoRA adapter on plain solutions, and merged:

    --senior (a pretrained model) ── N steps on plain solutions ──> RUNS/base/<name>-taught-<checksum>/
                                                                     junior: this base
                                                                     senior: this base + the specialist's adapter

Both models then share one copy of the weights and one forward pass. The base is made once per --out, kept as an ordinary
checkpoint, and named by a checksum of what it was made from: the pretrained model's name, the texts and the constants.

No text contains <<...>>. For generated problems, a share of SKIPS of the solutions leaves out the last step and so answers
wrongly, as in lab/tiny.py. This makes the junior weaker than the specialist, which is fine-tuned on right solutions only. A
share of GERMAN solutions makes language pairs possible. The solutions of GSM8K are taught as they are, in English.

--junior must name the same model as --senior (lab/flags.py checks it).
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import time
from pathlib import Path

from lab import models, parallel, runs
from lab import problems as tasks
from lab.specialist import fine_tune
from lab.tiny import checkpoint, identity

# Of the generated solutions, the share without the last step, and the share in German.
SKIPS, GERMAN = 0.2, 0.3
# Solutions per step, learning rate, and rank of the adapter that is merged in the end.
BATCH, LR, RANK = 16, 1e-3, 16


def taught_name(args: argparse.Namespace) -> str:
    """The name of the taught base: that of the pretrained model, and a checksum of everything that it is made from."""
    source, constants = identity(checkpoint(args.senior)), [args.teach_steps, BATCH, LR, RANK, args.bfloat16]
    made_from = json.dumps([source, constants, plain_solutions(args)])
    return f"{source}-taught-{hashlib.sha256(made_from.encode()).hexdigest()[:12]}"


def base_folder(args: argparse.Namespace) -> Path:
    return Path(args.out) / "base" / args.base


def plain_solutions(args: argparse.Namespace) -> list[tuple[str, str]]:
    """The (prompt, solution) texts that a base is taught, the same for every seed."""
    n, rng = args.teach_steps * BATCH, random.Random(0)
    if args.problems not in tasks.WORLDS:
        problems = tasks.training_problems(args)
        rng.shuffle(problems)
        return [(tasks.prompt(problem.question), tasks.plain(problem.solutions["en"])) for problem in problems[:n]]
    texts = []
    # The third argument is a seed, far from those of training and of specialists.
    for problem in tasks.generate(n, "train", 2 * 10**6, tasks.WORLDS[args.problems]):
        language = "de" if rng.random() < GERMAN else "en"
        lines = problem.solutions[language].split("\n")
        if rng.random() < SKIPS:
            lines = tasks.skip_last_step(lines)
        texts.append((tasks.prompt(problem.question, language), tasks.plain("\n".join(lines))))
    return texts


def make_base(args: argparse.Namespace) -> None:
    """Make the base of a run unless it is there. Several processes may need the same one: the first makes it, the others wait."""
    folder = base_folder(args)
    with runs.one_at_a_time(folder.parent):
        # All processes of torchrun teach together, so all of them go by what the first one sees once it has the lock.
        if not parallel.gather(folder.is_dir())[0]:
            teach(args, folder)
        parallel.barrier()


def teach(args: argparse.Namespace, folder: Path) -> None:
    """Fine-tune an adapter on plain solutions, merge it into the pretrained model, and save the result as a checkpoint."""
    started, texts, name = time.time(), plain_solutions(args), checkpoint(args.senior)
    tokenizer, _ = models.load_tokenizers(name, name)
    # Never in 4 bits, in which an adapter cannot be merged exactly.
    model = models.add_adapter(models.load_model(name, False, args.device, args.bfloat16), RANK)
    models.reset_adapter(model, seed=0)
    options = dict(steps=args.teach_steps, batch=BATCH, micro_tokens=args.micro_tokens, lr=LR, seed=0, label="teaching the base")
    # The adapter is kept here while it is fine-tuned, for an interrupted run to go on with.
    draft = folder.with_name(f"{folder.name}.pt")
    fine_tune(model, tokenizer, texts, **options, draft=draft)
    if not parallel.is_main():
        return
    # The folder is renamed last, so it is either complete or absent.
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    with runs.writing(unfinished):
        shutil.rmtree(unfinished, ignore_errors=True)
        model.merge_and_unload().save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        note = {"steps": args.teach_steps, "minutes": round((time.time() - started) / 60, 1), **runs.describe_machine(args.device)}
        (unfinished / "taught.json").write_text(json.dumps(note, indent=2) + "\n")
        os.replace(unfinished, folder)
        draft.unlink(missing_ok=True)
