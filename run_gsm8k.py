"""Tandem training on GSM8K: the experiments of West et al. (2025) and Jiao et al. (2026).

    python run_gsm8k.py --setting skill                 # the senior drops its jargon
    python run_gsm8k.py --setting skill --preset qwen   # a real pretrained pair on the real GSM8K
    python run_gsm8k.py --setting all --seeds 3         # everything; continue with --resume

The first command needs no GPU, download or account. lab/experiments.py has the settings, arms and
presets. One update (`train` below), with B rollouts of C tokens; x are the prompts, y_t is token t:

    problem ─┬ x_senior ─ senior ┐ both sample a candidate; at each new word a      rollout.py
             └ x_junior ─ junior ┘ coin names the writer, whose candidate stays     tandem.py
                  └─> completion_ids, senior_mask (B, C), texts
    texts ─> rewards (B,)                                                           reward.py
    rewards, senior_mask ─> weights (B, C)                                          reinforce.py
    weights * log pi_senior(y_t | x_senior, y_<t) (B, C) ─> loss ─> one LoRA step

Deviations from the first paper, whose full text we could not read (we know it from secondary
sources; `# Open in paper:` marks what they leave open, and results/open-choices.md lists it):

1) In the tiny preset the models have half a million parameters and the problems are generated, so
   that the effect shows within minutes. --preset paper has the paper's models and problems.
2) So small a model does not learn from solved examples in its prompt: a cue ("Antwort:") selects
   the language, and the senior is first fine-tuned on annotated solutions: it is a *specialist*.
3) The tiny preset has a learning rate of 1e-3 instead of 1e-4 and 28 or 40 updates instead of 80.
4) A completion ends with the line that holds "####" and a number, whichever model is active.

A run writes to OUT/<arm>/seed-<k>/; lab/runs.py says what.
"""

# ruff: noqa: I001  `lab` comes first: it sets an environment variable that torch reads
import lab  # noqa: F401
import argparse
import time
from argparse import Namespace

import torch

from lab import engine, flags, jobs, measures, models, runs, terminal, viewer
from lab import problems as tasks
from lab.experiments import ABOUT, DEFAULTS, PRESETS, SETTINGS
from lab.flags import name, number
from lab.specialist import make_specialist
from metrics import batch_statistics, count_handoffs, summarise
from reinforce import group_advantages, loss, outcome_weights, token_weights
from reward import reward
from rollout import Pair, Rollouts, random_numbers, rollout
from tandem import SCHEDULES

# ------------------------------------------------------------------------------------------------
# Training


def train(args: Namespace, pair: Pair) -> None:
    """One run of one arm and seed. It writes the files of lab/runs.py; --resume continues them."""
    problems, held_out = tasks.load_problems(args)
    make_specialist(args, pair)
    # Open in paper: the optimizer. Here AdamW without weight decay, at a constant learning rate.
    senior, optimizer = pair.senior, models.make_optimizer(pair.senior, args)
    # last: the last update that was saved, or -1. kept: whatever else the loop has to remember, a
    # dictionary that is saved with every checkpoint.
    last, kept = runs.begin(args, senior, optimizer)
    # Update 0 is the evaluation before training.
    if last < 0:
        finish_update({"update": 0}, args, pair, optimizer, held_out, kept)

    for update in range(max(last, 0) + 1, args.updates + 1):
        started = time.time()
        # 1. The problems of this update. Each gets several rollouts.
        n = args.batch // args.rollouts_per_prompt
        batch = problems[(update - 1) * n : update * n]
        batch = [problem for problem in batch for _ in range(args.rollouts_per_prompt)]
        # 2. Rollouts: senior and junior write together. Under standard RL the senior writes alone,
        # and in the imitation control the junior does.
        p = 1.0 if args.solo else 0.0 if args.imitation else args.p
        seed = args.seed * 10**6 + update
        rollouts = generate(batch, args, pair, p, seed)
        row = {"update": update, "seconds_rollout": time.time() - started}
        # 3. Rewards, one per rollout.
        found = [reward(text, problem.gold) for text, problem in zip(rollouts.texts, batch)]
        rewards = torch.tensor(found, device=args.device)  # (B,)
        row |= batch_statistics(rollouts, rewards)
        if args.rewards == "shuffled":
            # The control in which a reward says nothing about its rollout.
            order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
            rewards = rewards[order.to(args.device)]
        # 4. Weights: one per rollout, w(y) (REINFORCE) or its advantage within its group (GRPO); a
        # baseline would go here. The junior's tokens get j times the weight of their rollout.
        if args.algorithm == "grpo":
            w = group_advantages(rewards, args.rollouts_per_prompt)  # (B,)
        else:
            w = outcome_weights(rewards, args.wrong_weight)  # (B,)
        weights = token_weights(rollouts, w, args.junior_weight, args.senior_weight)  # (B, C)
        # 5. Loss and gradient, micro-batch by micro-batch. Without a KL penalty, rollouts whose
        # weight is 0 are left out.
        num_tokens = rollouts.completion_mask.sum()
        parts = engine.micro_batches(rollouts, weights, args.micro_tokens, keep_all=args.kl > 0)
        row |= {"loss": 0.0, "grad_norm": 0.0} if parts else {"loss": None, "grad_norm": None}
        for few, few_weights in parts:
            options = args.temperature, pair.junior, args.kl
            part_loss, logprobs = loss(senior, few, few_weights, num_tokens, *options)
            part_loss.backward()
            row["loss"] += part_loss.item()
            # How unlikely the tokens with negative weights have become: check_row stops a run that
            # pushes them away without bound.
            runs.note_pushed_away(row, few_weights, logprobs)
        # 6. One step. If all weights are zero, there is nothing to learn from and no step.
        if parts:
            parameters = models.trainable_parameters(senior)
            row["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, args.clip).item()
            runs.check_row(row, args, kept, vocab_size=len(pair.pieces))
            optimizer.step()
            optimizer.zero_grad()
        row["seconds_update"] = time.time() - started - row["seconds_rollout"]
        finish_update(row, args, pair, optimizer, held_out, kept)


def generate(problems: list, args: Namespace, pair: Pair, p: float, seed: int, **more) -> Rollouts:
    """One rollout per problem. The same seed gives the same rollouts.

    more: schedule, if not that of --handoff; alternate, if senior and junior take turns instead of
    tossing coins; trace, see rollout. Seeds are seed * 10**6 + update in training and 10**9 + seed
    or higher in evaluations: no training batch shares its random numbers with any other batch.
    """
    # Drawn on the CPU, so that the numbers do not depend on the device.
    noise, coins = random_numbers(len(problems), args.max_new_tokens, seed)  # (2, C, B), (C, B)
    if more.pop("alternate", False):
        # The k-th toss of a rollout uses coin k. If 0 < p < 1, 0 names the senior, 1 the junior.
        coins = (torch.arange(args.max_new_tokens) % 2).float()[:, None].expand_as(coins)
    noise, coins = noise.to(args.device), coins.to(args.device)
    # Two prompts per problem: the senior's and the junior's.
    prompts = [models.encode(*asked) for asked in tasks.prompts_of_pair(problems, args, pair)]
    options = dict(schedule=args.handoff, temperature=args.temperature, stop=tasks.STOP) | more

    def write(rows: slice) -> Rollouts:
        if rows.start == 0 and options.get("trace"):
            options["trace"].clear()  # what an attempt that ran out of memory has left
        asked = [of_model[rows] for of_model in prompts]
        return rollout(pair, *asked, noise[:, :, rows], coins[:, rows], p=p, **options)

    return engine.in_chunks(write, len(problems), args.rollout_batch)


def finish_update(row, args: Namespace, pair: Pair, optimizer, held_out: list, kept: dict) -> None:
    """Evaluate if it is due, then log the row, and last of all save the checkpoint."""
    if row["update"] % args.eval_every == 0 or row["update"] == args.updates:
        # The time of an evaluation is logged apart from that of the update.
        started = time.time()
        row["eval"] = evaluate(row["update"], args, pair, held_out)
        row["seconds_eval"] = time.time() - started
    terminal.log_row(row, args)
    runs.append_rows(runs.run_folder(args) / "metrics.jsonl", [row])
    runs.save_state(args, row["update"], pair.senior, optimizer, kept)


# ------------------------------------------------------------------------------------------------
# Evaluation

# Rollouts whose text is kept: per evaluation, and before and after training.
SAMPLES, AT_THE_ENDS = 12, 50


def evaluate(update: int, args: Namespace, pair: Pair, problems: list) -> dict:
    """Evaluate the senior alone (p = 1), the pair ("tandem") and the junior alone (p = 0).

    Returns {"senior": {...}, "tandem": {...}, "junior": {...}}, see metrics.summarise. The pair
    writes with the p and the schedule of the arm, also where the senior was trained alone. The
    first rollouts go to samples.jsonl.
    """
    results, golds = {}, [problem.gold for problem in problems]
    kept = problems[: AT_THE_ENDS if update in (0, args.updates) else SAMPLES]
    # Who writes is a matter of p alone.
    for who, p in {"senior": 1.0, "tandem": args.p, "junior": 0.0}.items():
        if who == "junior" and update > 0:
            continue  # it is frozen, so it is evaluated once
        # Open in paper: decoding in evaluations. Here as in training, with the same random numbers
        # at every evaluation of a run, which reduces the variance of differences between them.
        trace: list | None = [] if who == "tandem" else None
        rollouts = generate(problems, args, pair, p, seed=10**9 + args.seed, trace=trace)
        # Accuracy, jargon, language and length, over all problems.
        lengths = rollouts.completion_mask.sum(1).tolist()
        results[who] = summarise(rollouts.texts, golds, lengths, tasks.LANGUAGES)
        # The first few are kept, with who wrote what, for the page and for Figure 1.
        spans = viewer.author_spans(rollouts, pair.pieces)
        samples = viewer.samples(rollouts, spans, trace, kept, args, pair)
        samples = [{"update": update, "who": who} | sample for sample in samples]
        runs.append_rows(runs.run_folder(args) / "samples.jsonl", samples)
        if who == "tandem":
            results[who] |= count_handoffs(spans)
        # What Tandem RL measures: needs further rollouts, so it is off by default.
        if args.measures and who == "senior":
            measured = measures.measure(rollouts, update, problems, args, pair, generate)
            runs.append_rows(runs.run_folder(args) / "measures.jsonl", [measured])
    return results


# ------------------------------------------------------------------------------------------------
# The command line


def make_parser() -> argparse.ArgumentParser:
    """The flags. Their defaults, and what has no flag, are in lab/experiments.py."""
    listed = "\n".join(f"  {name:18} {about}" for name, about in ABOUT.items())
    parser = argparse.ArgumentParser(
        usage="python run_gsm8k.py --setting SETTING [flags]",
        description=f"Tandem training on GSM8K.\n\nsettings:\n{listed}",
        epilog="Defaults are those of the tiny preset; lab/experiments.py has all of them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # only what is given goes over the preset
        allow_abbrev=False,  # --p would be one of --preset
    )
    count, share, rate = number(int, 1), number(float, 0, 1), number(float, 1e-12, 1)

    def add(flag: str, about: str, **options) -> None:
        default = DEFAULTS.get(flag[2:].replace("-", "_"))
        about += "" if default is None or default is False else f" [{default}]"
        parser.add_argument(flag, help=about, **options)

    add("--setting", "experiment to run", choices=list(ABOUT), required=True, metavar="SETTING")
    add("--preset", "set of defaults: tiny, qwen or paper [tiny]", choices=list(PRESETS))
    add("--arms", "run only these arms of the setting", nargs="+")
    add("--seeds", "number of seeds per arm, from 0 on [1]", type=number(int, 1, 500))
    add("--out", "folder to write to [runs]", type=name)
    add("--resume", "continue the runs in --out, and skip finished ones", action="store_true")
    add("--device", "where models run [cuda, or else cpu]", choices=flags.available_devices())
    add("--jobs", "runs at a time on a CPU, one thread each", type=number(int, 1, 64))
    add("--senior", "hub id or local folder; tiny is the shipped base", type=name)
    add("--junior", "the same; if it equals --senior, its weights are loaded once", type=name)
    add("--four-bit", "load the base weights in 4 bits (QLoRA)", action="store_true")
    add("--problems", "generated, a folder, or a hub id", type=name)
    add("--specialist-steps", "fine-tuning steps; 0: keep the senior as it is", type=number(int, 0))
    add("--specialist-batch", "solutions per step of fine-tuning", type=count)
    add("--eval-problems", "held-out problems per evaluation", type=count)
    add("--eval-every", "updates between evaluations", type=count)
    add("--updates", "updates per run; 0 to evaluate only", type=number(int, 0))
    add("--batch", "rollouts per update", type=count)
    add("--max-new-tokens", "maximum length of a completion", type=count)
    add("--temperature", "of sampling and of scoring", type=number(float, 1e-3))
    add("--handoff", "schedule: when a coin is tossed", choices=list(SCHEDULES))
    add("--p", "probability that a coin names the senior", type=share)
    add("--lr", "learning rate of AdamW", type=rate)
    add("--wrong-weight", "c, the weight of wrong rollouts", type=number(float, -1, 0))
    add("--junior-weight", "j, the weight of the junior's tokens", type=share)
    return parser


@runs.errors_in_one_line()
def main(argv: list[str] | None = None) -> None:
    todo = flags.read_runs_of(make_parser(), argv)
    args = todo[0]
    _pair.clear()
    # Models and problems are checked before anything slow.
    models.check_before_loading(todo)
    jobs.run_all(train_one, todo)
    terminal.finish(todo, SETTINGS if args.setting == "all" else [args.setting])


_pair: list[Pair] = []  # loaded once per process; make_specialist resets the senior for each run


def train_one(args: Namespace) -> None:
    if not _pair:
        _pair.append(models.load_pair(args))
    train(args, _pair[0])


if __name__ == "__main__":
    main()
