"""The specialist: the senior before tandem training, fine-tuned on annotated solutions.

A *specialist* is a senior that has learned a skill together with its jargon. Either --senior is one already (the paper's
Llama, fine-tuned on GSM8K), or its adapter is fine-tuned here on solutions with <<48/2=24>>. Fine-tuning is maximum
likelihood: the loss of the training loop in run_gsm8k.py with every weight 1 and temperature 1, as if the model had
written each solution itself and been right.

All runs of a seed that share the senior's language start from the same specialist, so it is made once and kept in
RUNS/specialist/. The same fine-tuning loop pretrains the tiny base (lab/tiny.py).
"""

import argparse
import hashlib
import random
import time
from pathlib import Path

import torch

from lab import models, parallel, runs
from lab import problems as tasks
from reinforce import completion_logprobs, micro_batches
from rollout import Pair, Rollouts

# The flags that decide what a specialist is, besides the seed and the senior's language.
FLAGS = ("specialist_steps", "specialist_batch", "specialist_lr", "four_bit", "bfloat16", "rank", "problems", "base")
# Every 25th generated solution is taught without annotations, so that the specialist can still solve problems without
# writing them. GSM8K has such solutions too: 113 of 8,792.
PLAIN_EVERY = 25
SECONDS_BETWEEN_DRAFTS = 60


def make_specialist(args: argparse.Namespace, pair: Pair) -> None:
    """Give the senior a fresh adapter and, unless --specialist-steps is 0, teach it to write <<...>>."""
    models.reset_adapter(pair.senior, args.seed)
    if args.specialist_steps == 0:
        return
    generated = args.problems in tasks.WORLDS
    language = args.senior_language if generated else "en"  # GSM8K has English solutions only
    # With --validation, a tenth of GSM8K is kept out of the specialist's training too.
    name = f"{language}-validation" if args.validation and not generated else language
    path = Path(args.out) / "specialist" / name / f"seed-{args.seed}" / "adapter.pt"
    # Runs side by side may need the same one: the first makes it, and the others wait.
    with runs.one_at_a_time(path.parent):
        load_or_fine_tune(args, pair, language, path)


def load_or_fine_tune(args: argparse.Namespace, pair: Pair, language: str, path: Path) -> None:
    """Load the specialist kept at `path`, or make it and keep it there."""
    texts = annotated_solutions(args, language)
    # A specialist that was taught other texts, because a flag or this file has changed, is made anew.
    flags = {flag: getattr(args, flag) for flag in FLAGS} | {"texts": hashlib.sha256(repr(texts).encode()).hexdigest()}
    kept = runs.read_back(path, flags=dict, adapter=dict) if path.is_file() else None
    if kept and kept["flags"] == flags:
        runs.load_adapter(pair.senior, kept["adapter"], path)
        return

    options = dict(steps=args.specialist_steps, batch=args.specialist_batch, lr=args.specialist_lr, seed=args.seed)
    options |= dict(micro_tokens=args.micro_tokens, label=f"specialist {path.parts[-3]} seed {args.seed}")
    fine_tune(pair.senior, pair.senior_tokenizer, texts, **options, draft=path.with_name("draft.pt"))
    if parallel.is_main():
        # Where there are no locks, several runs may make one specialist at the same time, each with a draft of its own.
        runs.save_tensors({"flags": flags, "adapter": models.adapter_state(pair.senior)}, path, draft_folder=runs.run_folder(args))
        path.with_name("draft.pt").unlink(missing_ok=True)


def annotated_solutions(args: argparse.Namespace, language: str) -> list[tuple[str, str]]:
    """The (prompt, solution) texts that a specialist learns from."""
    generated = args.problems in tasks.WORLDS
    if generated:
        # Far from the seeds of the training problems, so that the specialist does not learn their solutions by heart.
        n = args.specialist_steps * args.specialist_batch
        train = tasks.generate(n, "train", args.seed + 10**6, tasks.WORLDS[args.problems])
    else:
        train = tasks.training_problems(args)
        random.Random(args.seed).shuffle(train)
    texts = [(tasks.prompt(problem.question, language), problem.solutions[language]) for problem in train]
    return [(asked, tasks.plain(text) if generated and i % PLAIN_EVERY == 0 else text) for i, (asked, text) in enumerate(texts)]


def fine_tune(
    model, tokenizer, texts: list, *, steps: int, batch: int, micro_tokens: int, lr: float, seed: int, label: str, draft: Path | None = None
):
    """Maximum likelihood of solutions given prompts, for whichever parameters of `model` are trainable.

    texts: (prompt, solution) pairs, gone through in batches of similar length, again and again. AdamW; the learning rate
    warms up over 30 steps and falls linearly to 0 over the last 40 %. draft: a path at which the adapter of a PEFT model is kept
    while it is fine-tuned, so that an interruption loses about a minute of work.
    """
    rng = random.Random(seed)
    examples = encode_examples(tokenizer, texts[: steps * batch])
    parameters = models.trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    optimizer.zero_grad()
    # A draft of the same work is continued, any other one is written over.
    work = {"texts": hashlib.sha256(repr(texts).encode()).hexdigest(), "steps": steps, "batch": batch, "lr": lr, "seed": seed}
    first_step, saved = load_draft(draft, work, model, optimizer), time.time()
    batches: list[list] = []
    for step in parallel.progress(range(steps), label, unit="step"):
        if not batches:
            batches = batches_of_similar_length(examples, batch, rng)
        examples_of_step = batches.pop()
        if step < first_step:
            continue
        if draft and parallel.is_main() and time.time() - saved > SECONDS_BETWEEN_DRAFTS:
            state = {"adapter": models.adapter_state(model), "optimizer": optimizer.state_dict()}
            runs.save_tensors({"step": step, "work": work} | state, draft)
            saved = time.time()
        worked = as_rollouts(tokenizer, examples_of_step, model.device)
        # The loss of run_gsm8k.py with weight 1 for every token.
        weights, num_tokens = worked.completion_mask.float(), worked.completion_mask.sum()
        for part, part_weights in micro_batches(worked, weights, micro_tokens)[parallel.process_index() :: parallel.world_size()]:
            loss = -(part_weights * completion_logprobs(model, part, temperature=1.0)).sum() / num_tokens
            loss.backward()
        parallel.sum_gradients(parameters, 0.0)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        # Warm-up, plateau, decay.
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 30, (steps - step) / (0.4 * steps))
        optimizer.step()
        optimizer.zero_grad()


def load_draft(draft: Path | None, work: dict, model, optimizer) -> int:
    """Continue what an interrupted fine_tune has kept at `draft`, if it is the same work. Returns the step to begin with."""
    kept = runs.read_back(draft, step=int, work=dict, adapter=dict, optimizer=dict) if draft and draft.is_file() else None
    if not kept or kept["work"] != work:
        return 0
    runs.load_adapter(model, kept["adapter"], draft)
    optimizer.load_state_dict(kept["optimizer"])
    return kept["step"]


def encode_examples(tokenizer, texts: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """(prompt, solution) texts as token ids; every solution ends in the end token."""
    prompts = tokenizer([prompt for prompt, _ in texts]).input_ids
    # Prompt and solution are tokenized as one text, because a SentencePiece tokenizer would put a space before each. The
    # tokens of the prompt are a prefix of it, since no tokenizer in use merges across the space between the two.
    whole = tokenizer([f"{prompt} {solution}" for prompt, solution in texts]).input_ids
    return [(prompt, ids[len(prompt) :] + [tokenizer.eos_token_id]) for prompt, ids in zip(prompts, whole)]


def as_rollouts(tokenizer, examples: list[tuple[list[int], list[int]]], device: str) -> Rollouts:
    """(prompt, solution) ids as a batch of rollouts that the senior wrote alone."""
    prompts, solutions = zip(*examples)
    ids, mask = models.pad(solutions, tokenizer, "right", device)
    asked = models.pad(prompts, tokenizer, "left", device)
    nothing = torch.zeros_like(mask)
    # No junior took part and no coin was tossed.
    columns = dict(senior_mask=mask, discarded_ids=ids, toss_mask=nothing, logprobs=nothing)
    return Rollouts(*asked, *asked, ids, mask, **columns, texts=[""] * len(ids))


def batches_of_similar_length(examples: list, batch: int, rng: random.Random) -> list[list]:
    """One pass over the examples, in random order, in batches of similar length: a third less padding."""
    # Sorted by length within windows of 25 batches, so that the order stays random.
    order = rng.sample(examples, len(examples))
    batches = []
    for start in range(0, len(order), 25 * batch):
        window = sorted(order[start : start + 25 * batch], key=lambda example: sum(map(len, example)))
        batches += [window[i : i + batch] for i in range(0, len(window), batch)]
    rng.shuffle(batches)
    return batches
