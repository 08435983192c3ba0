"""The specialist: the senior before tandem training, fine-tuned on annotated solutions.

A *specialist* is a senior that has learned a skill together with its jargon. Either --senior is one
already (the paper's Llama, fine-tuned on GSM8K), or its adapter is fine-tuned here on solutions
with <<48/2=24>>. Fine-tuning is maximum likelihood: the loss of reinforce.py with every weight 1
and temperature 1, as if the model had written each solution itself and been right.

All runs of a seed with the same texts and flags start from the same specialist, whatever their
precision. It is made once and kept in OUT/specialist/. Fine-tuning that is killed begins anew, and
ends the same. The same loop pretrains the tiny base (lab/tiny.py).
"""

import hashlib
import random
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

import torch
from filelock import FileLock

from lab import engine, models, runs, terminal
from lab import problems as tasks
from reinforce import loss
from rollout import Pair, Rollouts

# The flags that decide what a specialist is, besides its texts and seed.
FLAGS = ("specialist_steps", "specialist_batch", "specialist_lr", "four_bit", "rank", "base")


def make_specialist(args: Namespace, pair: Pair) -> None:
    """Give the senior a fresh adapter and, unless --specialist-steps is 0, teach it its jargon."""
    models.reset_adapter(pair.senior, args.seed)
    if args.specialist_steps == 0:
        return
    texts = tasks.annotated_solutions(args)
    # Other texts or other flags make another specialist, in a folder of its own.
    made_from = {flag: getattr(args, flag) for flag in FLAGS}
    checksum = hashlib.sha256(repr((made_from, texts)).encode()).hexdigest()[:8]
    name = f"{args.senior_language}-seed-{args.seed}-{checksum}"
    path = Path(args.out) / "specialist" / name / "adapter.pt"
    # Runs side by side may need the same one: the first makes it, and the others wait.
    with FileLock(path.with_name(".lock")):
        if path.is_file():
            runs.load_adapter(pair.senior, runs.read_back(path, adapter=dict)["adapter"], path)
            return
        options = dict(steps=args.specialist_steps, batch=args.specialist_batch, seed=args.seed)
        options |= dict(lr=args.specialist_lr, micro_tokens=args.micro_tokens)
        options |= dict(label=f"specialist {args.senior_language} seed {args.seed}")
        fine_tune(pair.senior, pair.senior_tokenizer, texts, **options)
        runs.save_tensors({"adapter": runs.adapter_state(pair.senior)}, path)


def fine_tune(model, tokenizer, texts, *, steps, batch, lr, seed, micro_tokens, label) -> None:
    """Maximum likelihood of solutions given prompts, for the trainable parameters of `model`.

    texts: (prompt, solution) pairs, gone through in batches of similar length, again and again,
    with micro_tokens tokens per forward pass. label: what the line of progress calls it.
    AdamW; the learning rate warms up over 30 steps and falls linearly to 0 over the last 40 %.
    """
    examples = encode_examples(tokenizer, texts[: steps * batch])
    parameters = models.trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    batches = endless_batches(examples, batch, random.Random(seed))
    for step, of_step in zip(range(steps), batches):
        terminal.show(f"{label} step", step, steps)
        optimizer.zero_grad()
        worked = as_rollouts(of_step, model.device)
        weights, num_tokens = worked.completion_mask.float(), worked.completion_mask.sum()
        for few, few_weights in engine.micro_batches(worked, weights, micro_tokens):
            loss(model, few, few_weights, num_tokens, temperature=1.0)[0].backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        # Warm-up, plateau, decay.
        scale = min(1.0, (step + 1) / 30, (steps - step) / (0.4 * steps))
        optimizer.param_groups[0]["lr"] = lr * scale
        optimizer.step()
    terminal.show(f"{label} step", steps, steps)


def encode_examples(tokenizer, texts: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """(prompt, solution) texts as token ids; every solution ends in the end token."""
    prompts = models.encode(tokenizer, [prompt for prompt, _ in texts])
    # Prompt and solution are tokenized as one text, because a SentencePiece tokenizer would put a
    # space before each.
    whole = models.encode(tokenizer, [f"{prompt} {solution}" for prompt, solution in texts])
    examples = [(asked, ids[len(asked) :]) for asked, ids in zip(prompts, whole)]
    if [asked + solution for asked, solution in examples] != whole:
        reason = "it merges the end of a prompt with the solution"
        raise ValueError(f"the tokenizer {tokenizer.name_or_path}: {reason}: choose another model")
    return [(asked, [*solution, tokenizer.eos_token_id]) for asked, solution in examples]


def as_rollouts(examples: list[tuple[list[int], list[int]]], device) -> Rollouts:
    """(prompt, solution) ids as a batch of rollouts that the senior wrote alone."""
    prompts, solutions = (list(rows) for rows in zip(*examples))
    asked = engine.pad(prompts, "left", device)
    ids, mask = engine.pad(solutions, "right", device)
    return Rollouts(*asked, *asked, ids, mask, senior_mask=mask, texts=[""] * len(ids))


def endless_batches(examples: list, batch: int, rng: random.Random) -> Iterable[list]:
    """Passes over the examples in random order, in batches of similar length to save padding."""
    while True:
        order, batches = rng.sample(examples, len(examples)), []
        # Sorted by length within windows of 25 batches, so that the order stays random.
        for start in range(0, len(order), 25 * batch):
            window = sorted(order[start : start + 25 * batch], key=lambda two: sum(map(len, two)))
            batches += [window[i : i + batch] for i in range(0, len(window), batch)]
        rng.shuffle(batches)
        yield from reversed(batches)
