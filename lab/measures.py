"""The measures of Tandem RL (Jiao et al., 2026): can the junior follow the senior, and how far has the senior moved from it?

Every measure is a list with one number per held-out problem, so that intervals can be taken over problems and seeds
(metrics.bootstrap_interval). One row per evaluation is written to measures.jsonl:

    solo           1 if the senior alone is right, else 0
    handoff        1 if both are right together, alternating at the end of every sentence, the senior first. One budget of
                   tokens is shared. The paper alternates at the end of paragraphs; a solution of the generated problems is
                   a paragraph of short lines, and every line counts as a sentence
    word           the same with a coin before every word
    continued_25   1 if the junior is right when it continues the senior's solution, cut off after 25 % of its tokens
                   (also 50 and 75)
    legibility     the junior's mean cross-entropy on the senior's solution, in nats per token
    drift          the mean divergence KL(senior || junior) per token of the senior's solution, over the whole vocabulary
    drift_k3       its estimate from the written tokens alone, k3 of reinforce.py
    right_of_8     how many of 8 solutions of the senior are right, for pass@k; only before and after training

Handoff robustness is the mean of `handoff`, and retention is that mean divided by the mean of `solo`. legibility, drift and
drift_k3 are taken on the same solutions as `solo`, senior and junior each under its own prompt: legibility at temperature 1,
where a cross-entropy is defined, the other two at the temperature of sampling, because k3 is an estimate only for tokens
that were drawn from the distribution in question.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch

from lab import models
from lab import problems as tasks
from metrics import distance_from_junior
from reinforce import LOGITS_AT_ONCE, full_logprobs, select
from reward import is_correct
from rollout import Pair, Rollouts, decode, random_numbers, rollout_in_chunks

SAMPLES = 8  # solutions per problem for pass@k


def measure(solo: Rollouts, update: int, problems: list[tasks.Problem], args: argparse.Namespace, pair: Pair, generate: Callable) -> dict:
    """One row of measures.jsonl. solo: the senior's solutions of the problems; generate: that of run_gsm8k.py."""
    write = partial(generate, args=args, pair=pair, seed=10**9 + args.seed)
    row: dict = {"update": update, "solo": right(solo.texts, problems)}
    row["handoff"] = right(write(problems, p=0.5, schedule="sentence", alternate=True).texts, problems)
    row["word"] = right(write(problems, p=0.5, schedule="word").texts, problems)
    for percent in (25, 50, 75):
        row[f"continued_{percent}"] = right(continue_solutions(solo, percent / 100, args, pair), problems)
    row |= compare(solo, pair, args.temperature)
    if update in (0, args.updates):
        # Seeds of their own, so that the first solution is not that of `solo` again.
        again = generate(problems * SAMPLES, args=args, pair=pair, p=1.0, seed=15 * 10**8 + args.seed)
        row[f"right_of_{SAMPLES}"] = torch.tensor(right(again.texts, problems * SAMPLES)).view(SAMPLES, -1).sum(0).tolist()
    return row


def right(texts: list[str], problems: list[tasks.Problem]) -> list[int]:
    return [int(is_correct(text, problem.gold)) for text, problem in zip(texts, problems)]


@torch.no_grad()
def compare(solo: Rollouts, pair: Pair, temperature: float) -> dict[str, list[float]]:
    """legibility, drift and drift_k3 of every solution: both models read it, and their distributions are compared."""
    found: dict[str, list[float]] = {"legibility": [], "drift": [], "drift_k3": []}
    max_rows = max(1, LOGITS_AT_ONCE // (solo.completion_ids.shape[1] * len(pair.pieces)))
    for rows in torch.arange(len(solo), device=solo.prompt_ids.device).split(max_rows):
        part = select(solo, rows)
        senior = full_logprobs(pair.senior, part, temperature=1.0)  # (b, C, V)
        junior = full_logprobs(pair.junior, part.as_read_by_junior(), temperature=1.0)  # (b, C, V)
        for name, values in distance_from_junior(senior, junior, part.completion_ids, part.completion_mask, temperature).items():
            found[name] += [round(value, 5) for value in values.tolist()]
    return found


def continue_solutions(solo: Rollouts, share: float, args: argparse.Namespace, pair: Pair) -> list[str]:
    """The solutions that result if the junior goes on after the leading `share` of each senior's tokens, as texts."""
    lengths = solo.completion_mask.sum(1)  # (B,)
    kept = (share * lengths).long()
    kept_mask = (torch.arange(solo.completion_ids.shape[1], device=kept.device) < kept[:, None]).long()  # (B, C)
    # To the junior, its prompt and what the senior has written are one prompt.
    parts = [(solo.junior_prompt_ids, solo.junior_prompt_mask), (solo.completion_ids, kept_mask)]
    rows = [torch.cat([ids[i][mask[i].bool()] for ids, mask in parts]).tolist() for i in range(len(solo))]
    prompts = models.pad(rows, pair.junior_tokenizer, "left", args.device)
    noise, coins = random_numbers(len(solo), args.max_new_tokens, seed=10**9 + args.seed)
    options = dict(max_rows=args.rollout_batch, truncate_at=tasks.STOP, schedule=args.handoff, p=0.0, temperature=args.temperature)
    written = rollout_in_chunks(pair, prompts, prompts, noise, coins, **options)
    # The junior has the tokens that the senior has left of the common budget.
    rest = torch.arange(written.completion_ids.shape[1], device=kept.device) < (args.max_new_tokens - kept)[:, None]
    ids = torch.cat([solo.completion_ids, written.completion_ids], 1)
    texts = decode(ids, torch.cat([kept_mask, written.completion_mask * rest], 1), pair.pieces)
    # A question that the junior invents may begin at the seam.
    return [text.split(tasks.STOP)[0] for text in texts]
