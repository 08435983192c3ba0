"""Tandem training on GSM8K: every figure of West, Anderson, Kamar and Horvitz (2025), from one command line.

    python run_gsm8k.py --setting skill                 # the senior drops its jargon (Figures 1 and 2)
    python run_gsm8k.py --setting language              # senior and junior speak different languages (Figures 2 and 3)
    python run_gsm8k.py --setting granularity           # when a coin is tossed, and with which probability
    python run_gsm8k.py --setting control               # is it the reward, or imitation of the junior?
    python run_gsm8k.py --setting sweep                 # the weights c and j (Appendix E)
    python run_gsm8k.py --setting all --seeds 3         # everything, as in results/tiny; continue with --resume
    python run_gsm8k.py --setting skill --preset paper  # the default on a GPU: two Llama-2-7B in 4 bits, real GSM8K

One update, as `train` below does it (B rollouts, C tokens per completion):

    problem ─┬ x_senior ─ senior ┐ both sample y_t; the coin keeps one     rollout.py, tandem.py
             └ x_junior ─ junior ┘ ─> completion_ids, senior_mask (B, C)
    texts ─> rewards (B,) ─> weights (B, C)                                reward.py, reinforce.py
    weights x log pi_senior (B, C) ─> loss ─> one LoRA step ─> one row of metrics.jsonl ─> figures

Deviations from the paper, of which we could read secondary sources and not the full text:

1) Without a GPU, the models are a shipped Llama of half a million parameters and the problems are generated, so that the
   effect shows within minutes. --preset paper has the paper's models and problems.
2) Such a small model does not learn from examples in its prompt. Its language is chosen by a cue ("Antwort:") instead of
   by demonstrations, and its specialist is fine-tuned in its language.
3) The tiny preset has a learning rate of 1e-3 instead of 1e-4 and 28 or 40 updates instead of 80.
4) A completion ends before a question that the model asks itself ("\\nQuestion:"): neither the verifier nor the loss sees it.

What the paper leaves open is marked `# Open in paper:` where it is decided, and listed in the README.

A *setting* is a list of arms, and an *arm* is a set of flags. The arms of a seed that share the senior's language start
from one *specialist*: the senior, fine-tuned to write <<48/2=24>> in its solutions, which its junior does not write. What
a run leaves on disk is described in lab/runs.py.
"""

# ruff: noqa: I001  `lab` comes first: importing it sets how threads wait, which torch reads when it is imported
import lab  # noqa: F401
import argparse
import math
import sys
import time
from pathlib import Path

import torch
from bitsandbytes.optim import PagedAdamW8bit
from tqdm import tqdm

from lab import figures, memory, models, parallel, runs, tiny
from lab import problems as tasks
from lab.specialist import make_specialist
from metrics import batch_statistics, count_handoffs, summarise
from reinforce import completion_logprobs, micro_batches, token_weights
from reward import reward
from rollout import Pair, Rollouts, join, random_numbers, rollout
from tandem import SCHEDULES

# ----------------------------------------------------------------------------------------------------------------------
# Settings: the experiments. To add one, name its arms in ARMS and list them in SETTINGS.

LANGUAGE_PAIRS = ("en-de", "de-en", "de-fr", "fr-de")  # senior-junior.  Open in paper: which languages, which pairs
SWEEP_C, SWEEP_J = (0.0, -0.1, -0.3, -0.5), (0.0, 0.2, 0.35, 0.5, 1.0)


def in_languages(pair: str) -> dict:
    """The flags of a language pair such as "de-fr"."""
    senior, junior = pair.split("-")
    return {"senior_language": senior, "junior_language": junior}


# Every arm with the flags in which it differs from the command line. A run of an arm is stored once, in RUNS/<arm>/.
ARMS: dict[str, dict] = {
    "tandem": {},
    "solo": {"solo": True},  # standard RL, the control of most figures
    **{f"{pair}-tandem": in_languages(pair) for pair in LANGUAGE_PAIRS},
    **{f"{pair}-solo": in_languages(pair) | {"solo": True} for pair in LANGUAGE_PAIRS},
    **{schedule: {"handoff": schedule} for schedule in SCHEDULES if schedule != "word"},  # "word" is the arm "tandem"
    **{f"p-{p}": {"p": p} for p in (0.25, 0.75)},
    "shuffled": {"rewards": "shuffled"},
    "senior-only": {"junior_weight": 0.0},
    "de-fr-shuffled": in_languages("de-fr") | {"rewards": "shuffled"},
    "de-fr-senior-only": in_languages("de-fr") | {"junior_weight": 0.0},
    **{f"c{c:g}-j{j:g}": {"wrong_weight": c, "junior_weight": j, "validation": True} for c in SWEEP_C for j in SWEEP_J},
}
SETTINGS: dict[str, list[str]] = {
    "skill": ["tandem", "solo"],
    "language": [f"{pair}-{arm}" for pair in LANGUAGE_PAIRS for arm in ("tandem", "solo")],
    "granularity": ["tandem" if schedule == "word" else schedule for schedule in SCHEDULES] + ["p-0.25", "p-0.75", "solo"],
    "control": ["tandem", "shuffled", "senior-only", "de-fr-tandem", "de-fr-shuffled", "de-fr-senior-only"],
    "sweep": [arm for arm, flags in ARMS.items() if "wrong_weight" in flags],  # afterwards its best cell is confirmed, see main
}

# ----------------------------------------------------------------------------------------------------------------------
# Flags

SMOL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PRESETS = {
    "tiny": {},
    "smol": dict(senior=SMOL, junior=SMOL, max_new_tokens=192, batch=64, rollout_batch=64, micro_tokens=4096, lr=1e-4)
    | dict(specialist_steps=300, specialist_lr=5e-4, eval_problems=100, shots=3),
    "paper": dict(senior="neuralmagic/Llama-2-7b-gsm8k", junior="NousResearch/Llama-2-7b-chat-hf", problems="openai/gsm8k")
    | dict(four_bit=True, checkpointing=True, eight_bit_adam=True, max_new_tokens=256, rollout_batch=152, lr=1e-4, updates=80)
    | dict(specialist_steps=0, shots=3),
}
WHO = ("senior", "tandem", "junior")  # who is evaluated: the senior alone, both together, the junior alone
SAMPLES = 4  # rollouts per evaluation that are kept as text


def number(kind: type, low: float, high: float = math.inf, above: bool = False):
    """An argparse type: a finite number of at least `low` (or above it) and at most `high`."""

    def parse(text: str):
        value = kind(text)
        if not (low < value if above else low <= value) or not value <= high or value == math.inf:
            bounds = f"{'above' if above else 'at least'} {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
            raise argparse.ArgumentTypeError(f"{text} is not a finite number {bounds}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in its message for text that is not a number
    return parse


def make_parser() -> argparse.ArgumentParser:
    count, positive, switch = number(int, 1), number(float, 0, above=True), argparse.BooleanOptionalAction
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter, description="Tandem training on GSM8K.")
    group = parser.add_argument_group("experiment")
    group.add_argument("--setting", required=True, choices=(*SETTINGS, "all"), help="which experiment to run")
    group.add_argument("--preset", choices=PRESETS, default="tiny" if device == "cpu" else "paper", help="a set of defaults")
    group.add_argument("--arms", nargs="+", help="run only these arms of the setting")
    group.add_argument("--seeds", type=count, default=1, help="number of seeds per arm")
    group.add_argument("--seed", type=number(int, 0, 499), default=0, help="the first seed")
    group.add_argument("--out", default="runs", help="the folder to write to")
    group.add_argument("--resume", action="store_true", help="continue the runs in --out, and keep those that are finished")
    group.add_argument("--device", default=device, help="the device on which the models are")
    group = parser.add_argument_group("models")
    group.add_argument("--senior", default="tiny", help="hub id or local folder; tiny is the shipped base")
    group.add_argument("--junior", default="tiny", help="the same; if it equals --senior, the weights are loaded once")
    group.add_argument("--four-bit", action=switch, default=False, help="load the base weights in 4 bits (QLoRA)")
    group.add_argument("--rank", type=count, default=16, help="rank and alpha of the LoRA adapter")
    group.add_argument("--specialist-steps", type=number(int, 0), default=300, help="steps of fine-tuning; 0 if --senior is a specialist")
    group.add_argument("--specialist-batch", type=count, default=32, help="solutions per step of fine-tuning")
    group.add_argument("--specialist-lr", type=positive, default=4e-3, help="learning rate of fine-tuning")
    group = parser.add_argument_group("problems")
    group.add_argument("--problems", default="generated", help="generated, a folder with train.jsonl and test.jsonl, or a hub id")
    group.add_argument("--eval-problems", type=count, default=200, help="held-out problems per evaluation")
    group.add_argument("--eval-every", type=count, default=4, help="updates between evaluations")
    group.add_argument("--evaluate", nargs="+", choices=WHO, default=list(WHO), help="whom to evaluate (the junior at update 0 only)")
    group.add_argument("--validation", action="store_true", help="evaluate on a tenth of the training problems, kept out of training")
    group.add_argument("--senior-language", choices=tasks.LANGUAGES, default="en", help="language in which the senior is asked to answer")
    group.add_argument("--junior-language", choices=tasks.LANGUAGES, default="en", help="language in which the junior is asked to answer")
    group.add_argument(
        "--shots", type=number(int, 0, len(tasks.EXAMPLES)), default=0, help="solved examples per prompt, if languages differ"
    )
    group = parser.add_argument_group("rollouts")
    group.add_argument("--handoff", choices=SCHEDULES, default="word", help="schedule: before which tokens a coin is tossed")
    group.add_argument("--p", type=number(float, 0, 1), default=0.5, help="probability that a coin names the senior")
    group.add_argument("--solo", action="store_true", help="standard RL: the senior writes its training rollouts alone")
    group.add_argument("--temperature", type=positive, default=0.7, help="temperature of sampling and of scoring")
    group.add_argument("--max-new-tokens", type=count, default=112, help="maximum length of a completion")
    group.add_argument("--batch", type=count, default=152, help="rollouts per update")
    group.add_argument("--rollouts-per-prompt", type=count, default=2, help="rollouts per prompt")
    group.add_argument("--rollout-batch", type=count, default=200, help="rollouts in memory at a time")
    group = parser.add_argument_group("update")
    group.add_argument("--updates", type=number(int, 0), help="updates per run (0 only evaluates); tiny: 28, or 40 with two languages")
    group.add_argument("--lr", type=positive, default=1e-3, help="learning rate of AdamW")
    group.add_argument("--wrong-weight", type=number(float, -1, 0), default=0.0, help="c, the weight of wrong rollouts")
    group.add_argument("--junior-weight", type=number(float, 0, 1), default=1.0, help="j, the weight of the junior's tokens")
    group.add_argument("--rewards", choices=("true", "shuffled"), default="true", help="shuffled: permuted among the rollouts of a batch")
    group.add_argument("--clip", type=positive, default=1.0, help="maximum norm of the gradient")
    group.add_argument("--micro-tokens", type=count, default=8192, help="tokens per forward pass of the update, prompts included")
    group.add_argument("--checkpointing", action=switch, default=False, help="gradient checkpointing: less memory, more time")
    group.add_argument("--eight-bit-adam", action=switch, default=False, help="paged 8-bit AdamW of bitsandbytes")
    group.add_argument("--memory", type=positive, help="GiB to stay within (default: the free memory of a GPU; no limit on a CPU)")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, with the defaults of the preset. Exits with a message if a value is impossible."""
    parser, preset = make_parser(), argparse.ArgumentParser(add_help=False)
    preset.add_argument("--preset", default=parser.get_default("preset"))
    parser.set_defaults(**PRESETS.get(preset.parse_known_args(argv)[0].preset, {}))  # before --help, which shows them
    args = parser.parse_args(argv)
    # What involves several flags; the range of each is its type, above.
    if args.p in (0, 1):
        parser.error(f"--p {args.p:g}: one of the two would never write, and tandem training needs both. p = 1 is --solo, standard RL")
    if args.batch % args.rollouts_per_prompt:
        parser.error(f"--batch {args.batch} is not divisible by --rollouts-per-prompt {args.rollouts_per_prompt}")
    arms = arms_of(args.setting)
    unknown = sorted(set(args.arms or ()) - set(arms))
    if unknown:
        parser.error(f"--arms {' '.join(unknown)}: not in --setting {args.setting}, whose arms are {', '.join(arms)}")
    return args


def arms_of(setting: str) -> list[str]:
    names = list(SETTINGS) if setting == "all" else [setting]
    return list(dict.fromkeys(arm for name in names for arm in SETTINGS[name]))  # each arm once


def flags_of_run(args: argparse.Namespace, arm: str, seed: int, **flags) -> argparse.Namespace:
    """The command line with the flags of an arm over it."""
    run = argparse.Namespace(**vars(args) | ARMS.get(arm, {}) | flags | {"arm": arm, "seed": seed})
    if run.updates is None:
        run.updates = 28 if run.senior_language == run.junior_language else 40  # a language takes longer to change than jargon
    return run


# ----------------------------------------------------------------------------------------------------------------------
# Training


def train(args: argparse.Namespace, pair: Pair) -> None:
    """One run of one arm and seed: specialist, evaluation, updates with an evaluation every --eval-every of them."""
    problems, held_out = tasks.load_problems(args)
    make_specialist(args, pair)
    senior, parameters = pair.senior, models.trainable_parameters(pair.senior)
    # Open in paper: the optimizer. AdamW without weight decay, with a constant learning rate and gradient clipping.
    optimizer = (PagedAdamW8bit if args.eight_bit_adam else torch.optim.AdamW)(parameters, lr=args.lr, weight_decay=0.0)
    optimizer.zero_grad()  # a run that was stopped may have left a gradient
    last = runs.load_checkpoint(runs.run_folder(args), senior, optimizer) if args.resume else None
    runs.write_config(args)
    if last is None:
        # Update 0 is the evaluation before training.
        record({"update": 0}, args, pair, optimizer, held_out)
        last = 0

    progress = dict(desc=f"{args.arm} seed {args.seed}", unit="update", disable=not parallel.is_main())
    for update in tqdm(range(last + 1, args.updates + 1), **progress):
        started = time.time()
        # 1. Problems: every prompt gets several rollouts.
        n = args.batch // args.rollouts_per_prompt
        batch = [problem for problem in problems[(update - 1) * n : update * n] for _ in range(args.rollouts_per_prompt)]
        # 2. Rollouts: senior and junior write every solution together. With --solo, the senior writes alone.
        rollouts = generate(batch, args, pair, p=1.0 if args.solo else args.p, seed=args.seed * 10**6 + update)
        seconds_rollout = time.time() - started
        # 3. Rewards (B,): one per rollout, whoever wrote which part of it.
        rewards = torch.tensor([reward(text, problem.gold) for text, problem in zip(rollouts.texts, batch)], device=args.device)
        row = {"update": update, **batch_statistics(rollouts, rewards)}
        check_both_write(row, args)
        if args.rewards == "shuffled":
            # The control in which a reward says nothing about its rollout. The row above has the true rewards.
            order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(args.seed * 10**6 + update))
            rewards = rewards[order.to(args.device)]
        # 4. Weights (B, C): w(y) m_t of equation (1) in reinforce.py.
        weights = token_weights(rollouts, rewards, args.wrong_weight, args.junior_weight)
        # 5. Loss: minus equation (1), one micro-batch at a time.
        # Open in paper: the normalisation. A mean over all completion tokens of the batch, those of wrong rollouts included.
        num_tokens, loss = rollouts.completion_mask.sum(), 0.0
        parts = micro_batches(rollouts, weights, args.micro_tokens)
        for part, part_weights in parts[parallel.rank() :: parallel.world_size()]:
            logprobs = completion_logprobs(senior, part, args.temperature)  # (b, C), log pi_senior(y_t | x_senior, y_<t)
            part_loss = -(part_weights * logprobs).sum() / num_tokens
            part_loss.backward()
            loss += part_loss.item()
        # 6. One step, unless no token has a weight: then there is nothing to learn from, and the senior stays as it is.
        row |= {"loss": None, "grad_norm": None}
        if parts:
            row["loss"] = parallel.sum_gradients(parameters, loss)
            row["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, args.clip).item()
            runs.check_divergence(row, args, vocab_size=len(pair.pieces))
            optimizer.step()
            optimizer.zero_grad()
        row |= {"seconds_rollout": seconds_rollout, "seconds_update": time.time() - started - seconds_rollout}
        record(row, args, pair, optimizer, held_out)


def generate(problems: list[tasks.Problem], args: argparse.Namespace, pair: Pair, p: float, seed: int) -> Rollouts:
    """One rollout per problem. The same seed gives the same rollouts."""
    rows = parallel.share(list(range(len(problems))))
    senior_texts, junior_texts = tasks.prompts_of_pair([problems[row] for row in rows], args, pair.junior_tokenizer)
    noise, coins = random_numbers(len(problems), args.max_new_tokens, seed)
    rollouts = rollout(
        pair,
        models.encode_prompts(pair.senior_tokenizer, senior_texts, args.device),
        models.encode_prompts(pair.junior_tokenizer, junior_texts, args.device),
        noise[:, :, rows],
        coins[:, rows],
        schedule=args.handoff,
        p=p,
        temperature=args.temperature,
        max_rows=args.rollout_batch,
        stop=tasks.STOP,
    )
    return join(parallel.gather(rollouts.to("cpu"))).to(args.device)


def check_both_write(row: dict, args: argparse.Namespace) -> None:
    """A switch that changes the method must not go unnoticed: stop a tandem run in which one of the two wrote nothing."""
    if not args.solo and row["senior_share"] in (0, 1):
        sys.exit(
            f"update {row['update']}: the senior wrote {row['senior_share']:.0%} of the {row['tokens']} tokens of a tandem batch. "
            "This is not tandem training: check --p, --handoff and --batch"
        )


def record(row: dict, args: argparse.Namespace, pair: Pair, optimizer, held_out: list[tasks.Problem]) -> None:
    """Finish an update: evaluate if it is time, then print and append the row, then save the checkpoint."""
    if row["update"] % args.eval_every == 0 or row["update"] == args.updates:
        started = time.time()
        row["eval"] = evaluate(row["update"], args, pair, held_out)
        row["seconds_eval"] = time.time() - started
    runs.log_row(row)
    runs.append_rows(runs.run_folder(args) / "metrics.jsonl", [row])
    runs.save_checkpoint(runs.run_folder(args), row["update"], pair.senior, optimizer)


def evaluate(update: int, args: argparse.Namespace, pair: Pair, problems: list[tasks.Problem]) -> dict:
    """The senior alone, both together and the junior alone on held-out problems, as in metrics.jsonl: {"senior": {...}, ...}.

    The first few rollouts go to samples.jsonl. The junior does not change, so it is evaluated at update 0 only.
    """
    results = {}
    for who, p in zip(WHO, (1.0, args.p, 0.0)):
        if who not in args.evaluate or (who == "junior" and update > 0):
            continue
        # Open in paper: decoding in evaluations. We sample as in training. The same random numbers at every evaluation of a
        # run (common random numbers) reduce the variance of the difference between two of them.
        rollouts = generate(problems, args, pair, p, seed=10**9 + args.seed)
        golds, lengths = [problem.gold for problem in problems], rollouts.completion_mask.sum(1).tolist()
        results[who] = summarise(rollouts.texts, golds, lengths, tasks.LANGUAGES)
        spans = rollouts.author_spans(pair.pieces)
        if who == "tandem":
            results[who] |= count_handoffs(spans)
            runs.log_rollout(spans[0])
        samples = [
            {"update": update, "who": who, "question": problem.question, "gold": problem.gold}
            | {"reward": reward(rollouts.texts[i], problem.gold), "spans": spans[i]}
            for i, problem in enumerate(problems[:SAMPLES])
        ]
        runs.append_rows(runs.run_folder(args) / "samples.jsonl", samples)
    return results


# ----------------------------------------------------------------------------------------------------------------------
# Main


def main(argv: list[str] | None = None) -> None:
    started = time.time()
    args = parse_args(argv)
    if args.device == "cpu":
        # Models this small do not profit from more threads; they would only wait for each other.
        torch.set_num_threads(min(torch.get_num_threads(), 8))
    try:
        # Everything that can be wrong with the input, before anything long begins.
        names = [str(tiny.FOLDER) if name == "tiny" else name for name in (args.senior, args.junior)]
        args.base = tiny.identity() if args.senior == "tiny" else Path(args.senior).name
        seeds = range(args.seed, args.seed + args.seeds)
        arms = args.arms or arms_of(args.setting)
        todo = [flags_of_run(args, arm, seed) for seed in seeds for arm in arms]
        for run in todo:
            runs.check_folder(run)
        longest_prompt = tasks.longest_prompt(todo, models.load_tokenizers(*names))
        args.device = parallel.start(args.device)
        memory.fit_to_memory(args, *names, longest_prompt)
        pair = models.load_pair(*names, rank=args.rank, four_bit=args.four_bit, device=args.device, checkpointing=args.checkpointing)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")

    todo = [flags_of_run(args, run.arm, run.seed) for run in todo]  # with the device and the chunks as they are now
    stopped = runs.run_all(todo, lambda run: train(run, pair))
    parallel.barrier()
    if "sweep" in (args.setting, *(SETTINGS if args.setting == "all" else ())) and not args.arms:
        stopped += runs.run_all(confirm_sweep(args), lambda run: train(run, pair))
    if parallel.is_main():
        for setting in SETTINGS if args.setting == "all" else [args.setting]:
            figures.draw(Path(args.out), setting, SETTINGS[setting])
    print(f"finished after {(time.time() - started) / 60:.1f} minutes")
    parallel.end()
    if stopped:
        sys.exit("\n".join(stopped))


def confirm_sweep(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The best cell of the sweep and the main setting (c = 0, j = 1), on test problems and with seeds that are new to both."""
    best = figures.best_cell(Path(args.out))
    cells = dict.fromkeys([(0.0, 1.0), best]) if best else {}  # a single cell if they are the same
    return [
        flags_of_run(args, f"test-c{c:g}-j{j:g}", seed, wrong_weight=c, junior_weight=j)
        for seed in range(args.seed + args.seeds, args.seed + 2 * args.seeds)
        for c, j in cells
    ]


if __name__ == "__main__":
    main()
