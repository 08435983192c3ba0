"""Tandem training on GSM8K: the experiments of two papers, West et al. (2025) and Jiao et al. (2026), from one command line.

    python run_gsm8k.py --setting skill                 # the senior drops its jargon (Figures 1 and 2)
    python run_gsm8k.py --setting language              # senior and junior speak different languages (Figures 2 and 3)
    python run_gsm8k.py --setting granularity           # how often a coin is tossed, and how biased it is
    python run_gsm8k.py --setting control               # what removes the jargon: the reward, or imitation of the junior?
    python run_gsm8k.py --setting sweep                 # the weights of wrong rollouts and of the junior's tokens (Appendix E)
    python run_gsm8k.py --setting pressure              # GRPO on the senior's tokens only: does the reward alone remove jargon?
    python run_gsm8k.py --setting pressure-language     # the same for two language pairs
    python run_gsm8k.py --setting rlvr                  # Tandem RL (Jiao et al., 2026): both models start from the same base
    python run_gsm8k.py --setting all --seeds 3         # everything, as in results/tiny; continue with --resume

Without a GPU these commands use the tiny preset, which needs no download. With a GPU they use the first paper's pair, two
Llama-2-7B models in 4 bits, on the real GSM8K; add --preset tiny for the tiny one. --preset smol uses a pretrained model of 135
million parameters: a few hours on a laptop.

One update (`train` below), with B rollouts of C tokens; x are the prompts, y_t is token t:

    problem ─┬ x_senior ─ senior ┐ both propose a token; at each new word a coin        rollout.py, tandem.py
             └ x_junior ─ junior ┘ names the active model; its proposal is written
                  └─> completion_ids, senior_mask (B, C), texts
    texts ─> rewards (B,) ─> weights (B, C), by REINFORCE or GRPO                       reward.py, reinforce.py
    weights x log pi_senior (B, C) ─> loss ─> one LoRA step ─> one row of metrics.jsonl ─> figures

What we know of the papers, their figures and appendices comes from secondary sources; we had no access to their full texts.
Deviations from the first paper:

1) Without a GPU, the models are a shipped Llama of half a million parameters and the problems are generated, so that the
   effect shows within minutes. --preset paper has the paper's models and problems.
2) So small a model does not learn from demonstrations in its prompt. In the tiny preset a cue ("Antwort:") selects the
   language that a model answers in, and the senior is fine-tuned on solutions in its language.
3) The tiny preset has a learning rate of 1e-3 instead of 1e-4 and 28 or 40 updates instead of 80.
4) A completion is cut off where the model goes on to write another "Question:", for the verifier and for the loss.

What the paper leaves open is marked `# Open in paper:` where it is decided, and listed in the README.

A *setting* is a list of arms, and an *arm* is a set of flags. For each seed, all arms with the same senior language start
from the same *specialist*: the senior after fine-tuning on annotated solutions (<<48/2=24>>). The junior gets no such
fine-tuning. (The first paper's senior is a specialist already. The arms of Tandem RL have none: there the senior starts as
a copy of its junior.) A run writes to OUT/<arm>/seed-<k>/; lab/runs.py says what.
"""

# ruff: noqa: I001  `lab` comes first: it sets an environment variable that torch reads when it is imported
import lab  # noqa: F401
import argparse
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from bitsandbytes.optim import PagedAdamW8bit

from lab import figures, flags, measures, memory, models, parallel, runs, teach, tiny
from lab import problems as tasks
from lab.flags import available_devices, name, number
from lab.specialist import make_specialist
from metrics import batch_statistics, count_handoffs, summarise
from reinforce import clipped_objective, completion_logprobs, frozen_logprobs, group_advantages, kl_estimate
from reinforce import micro_batches, outcome_weights, token_weights
from reward import reward
from rollout import Pair, Rollouts, join, random_numbers, rollout_in_chunks
from tandem import SCHEDULES

# ----------------------------------------------------------------------------------------------------------------------
# Settings: the experiments. To add one, name its arms in ARMS and list them in SETTINGS.

# The senior's language, then the junior's.
# Open in paper: which languages, and which four pairs.
LANGUAGE_PAIRS = ("en-de", "de-en", "de-fr", "fr-de")
SWEEP_C, SWEEP_J = (0.0, -0.1, -0.3, -0.5), (0.0, 0.2, 0.35, 0.5, 1.0)


def in_languages(pair: str) -> dict:
    """The flags of a language pair such as "de-fr"."""
    senior, junior = pair.split("-")
    return {"senior_language": senior, "junior_language": junior}


# What several arms have in common: longer training, GRPO, and the conditions of Tandem RL.
LONG = {"updates": 80, "eval_every": 8}
GRPO = LONG | {"algorithm": "grpo"}
RLVR = GRPO | {"updates": 60, "eval_every": 20, "eval_problems": 400, "measures": True, "specialist_steps": 0, "handoff": "redraw"}

# Every arm, with the flags that override the command line. Settings may share an arm; its runs are then made and
# stored once.
ARMS: dict[str, dict] = {
    "tandem": {},
    # Standard RL: the senior writes its training rollouts alone. The control of most figures.
    "solo": {"solo": True},
    # Senior and junior are asked to answer in different languages.
    **{f"{pair}-tandem": in_languages(pair) for pair in LANGUAGE_PAIRS},
    **{f"{pair}-solo": in_languages(pair) | {"solo": True} for pair in LANGUAGE_PAIRS},
    # Every other schedule of tandem.py ("word" is the arm "tandem"), and other probabilities p.
    **{schedule: {"handoff": schedule} for schedule in SCHEDULES if schedule != "word"},
    **{f"p-{p}": {"p": p} for p in (0.25, 0.75)},
    # With j = 1 the loss also imitates the junior. "shuffled" keeps the imitation and makes the reward meaningless;
    # "senior-only" (j = 0) keeps the reward and removes the imitation.
    "shuffled": {"rewards": "shuffled"},
    "senior-only": {"junior_weight": 0.0},
    "de-fr-shuffled": in_languages("de-fr") | {"rewards": "shuffled"},
    "de-fr-senior-only": in_languages("de-fr") | {"junior_weight": 0.0},
    # Appendix E. The best cell, a pair (c, j), is chosen on validation problems and then confirmed on test problems, see confirm_sweep.
    **{f"c{c:g}-j{j:g}": {"wrong_weight": c, "junior_weight": j, "validation": True} for c in SWEEP_C for j in SWEEP_J},
    # Pressure by the reward alone: GRPO does not score the junior's tokens (j = 0). REINFORCE is run as long for comparison.
    "grpo-tandem": GRPO,
    "grpo-shuffled": GRPO | {"rewards": "shuffled"},
    "grpo-solo": GRPO | {"solo": True},
    "reinforce-j1": LONG,
    "reinforce-j0": LONG | {"junior_weight": 0.0},
    **{f"{pair}-grpo-tandem": in_languages(pair) | GRPO for pair in ("de-fr", "en-de")},
    # Tandem RL: senior and junior begin as the same model, and the rollouts are the only difference between the first two.
    "rlvr-tandem": RLVR,
    "rlvr-solo": RLVR | {"solo": True},
    # Two controls: solo training with a KL penalty toward the junior, and solo training with 16 rollouts per problem instead of
    # 8, which cost as many samples as tandem rollouts, where two models sample every token.
    # The coefficient is far above the 0.001 of Jiao et al., which would hardly matter in 60 updates.
    "rlvr-solo-kl": RLVR | {"solo": True, "kl": 0.5},
    "rlvr-solo-16": RLVR | {"solo": True, "rollouts_per_prompt": 16, "batch_factor": 2},
}
SETTINGS: dict[str, list[str]] = {
    "skill": ["tandem", "solo"],
    "language": [f"{pair}-{arm}" for pair in LANGUAGE_PAIRS for arm in ("tandem", "solo")],
    "granularity": ["tandem" if schedule == "word" else schedule for schedule in SCHEDULES] + ["p-0.25", "p-0.75", "solo"],
    "control": ["tandem", "shuffled", "senior-only", "de-fr-tandem", "de-fr-shuffled", "de-fr-senior-only"],
    "sweep": [arm for arm in ARMS if "wrong_weight" in ARMS[arm]],
    "pressure": ["grpo-tandem", "grpo-shuffled", "grpo-solo", "reinforce-j1", "reinforce-j0"],
    "pressure-language": ["de-fr-grpo-tandem", "en-de-grpo-tandem"],
    "rlvr": [arm for arm in ARMS if arm.startswith("rlvr")],
}

# ----------------------------------------------------------------------------------------------------------------------
# Flags. The defaults below are the tiny preset; the others replace some of them.

SMOL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PRESETS = {
    "tiny": {},
    # A real pretrained model of 135 million parameters, taught to solve generated problems.
    "smol": dict(senior=SMOL, junior=SMOL, problems="varied", teach_steps=100, specialist_steps=120, specialist_batch=16)
    | dict(specialist_lr=1e-3, lr=3e-4, max_new_tokens=128, batch=32, rollout_batch=128, micro_tokens=1024)
    | dict(updates=24, eval_every=8, eval_problems=100),
    # A real pretrained pair on the real GSM8K, in bfloat16. The senior is fine-tuned on annotated solutions for some steps; its junior is
    # shown three solved examples instead.
    "qwen": dict(senior="Qwen/Qwen2.5-Coder-1.5B-Instruct", junior="Qwen/Qwen2.5-Coder-0.5B-Instruct", problems="openai/gsm8k")
    | dict(shots=3, specialist_steps=30, specialist_batch=8, specialist_lr=1e-3, bfloat16=True)
    | dict(lr=5e-4, max_new_tokens=160, batch=64, rollout_batch=64, micro_tokens=2048, updates=20, eval_every=5, eval_problems=100),
    # The paper's models, on GSM8K, on one GPU.
    "paper": dict(senior="neuralmagic/Llama-2-7b-gsm8k", junior="NousResearch/Llama-2-7b-chat-hf", problems="openai/gsm8k")
    | dict(four_bit=True, checkpointing=True, eight_bit_adam=True, max_new_tokens=256, rollout_batch=152)
    | dict(lr=1e-4, updates=80, specialist_steps=0),
}


def make_parser() -> argparse.ArgumentParser:
    count, positive, switch = number(int, 1), number(float, 0, above=True), argparse.BooleanOptionalAction
    rate = number(float, 0, 1, above=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Without abbreviations: --p would be one of --preset.
    parser = argparse.ArgumentParser(description="Tandem training on GSM8K.", allow_abbrev=False)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    group = parser.add_argument_group("experiment")
    group.add_argument("--setting", required=True, choices=(*SETTINGS, "all"), help="experiment to run")
    group.add_argument("--preset", choices=PRESETS, default="tiny" if device == "cpu" else "paper", help="set of defaults")
    group.add_argument("--arms", nargs="+", help="run only these arms of the setting")
    group.add_argument("--seeds", type=number(int, 1, 500), default=1, help="number of seeds per arm")
    group.add_argument("--seed", type=number(int, 0, 499), default=0, help="first seed")
    group.add_argument("--out", type=name, default="runs", help="folder to write to")
    group.add_argument("--resume", action="store_true", help="continue the runs in --out, and skip finished ones")
    group.add_argument("--device", choices=available_devices(), default=device, help="device to run the models on")
    group.add_argument("--jobs", type=number(int, 1, 64), help="runs at a time on a CPU, one thread each (tiny: one per core)")
    group = parser.add_argument_group("models")
    group.add_argument("--senior", type=name, default="tiny", help="hub id or local folder; tiny is the shipped base")
    group.add_argument("--junior", type=name, default="tiny", help="the same; if it equals --senior, the weights are loaded once")
    group.add_argument("--teach-steps", type=number(int, 0), default=0, help="steps on plain solutions for both (lab/teach.py)")
    group.add_argument("--four-bit", action=switch, default=False, help="load the base weights in 4 bits (QLoRA)")
    group.add_argument("--bfloat16", action=switch, help="weights in bfloat16 (default: on an accelerator; some CPUs are faster too)")
    group.add_argument("--rank", type=number(int, 1, 4096), default=16, help="rank and alpha of the LoRA adapter")
    group.add_argument("--specialist-steps", type=number(int, 0), default=300, help="steps of fine-tuning; 0 if --senior is a specialist")
    group.add_argument("--specialist-batch", type=count, default=32, help="solutions per step of fine-tuning")
    group.add_argument("--specialist-lr", type=rate, default=4e-3, help="learning rate of fine-tuning")
    group = parser.add_argument_group("problems")
    group.add_argument(
        "--problems", type=name, default="generated", help="generated, varied, folder of train.jsonl and test.jsonl, or hub id"
    )
    group.add_argument("--eval-problems", type=count, help="held-out problems per evaluation (default by arm: 200 or 400)")
    group.add_argument("--eval-every", type=count, help="updates between evaluations (default by arm: 4, 8 or 20)")
    group.add_argument("--evaluate", nargs="+", choices=WRITERS, default=list(WRITERS), help="whom to evaluate (the junior once)")
    group.add_argument("--measures", action=switch, default=False, help="also evaluate robustness, legibility and drift (lab/measures.py)")
    group.add_argument("--validation", action="store_true", help="evaluate on a tenth of the training problems, kept out of training")
    group.add_argument("--senior-language", choices=tasks.LANGUAGES, default="en", help="language in which the senior is asked to answer")
    group.add_argument("--junior-language", choices=tasks.LANGUAGES, default="en", help="language in which the junior is asked to answer")
    group.add_argument("--shots", type=number(int, 0, 3), help="solved examples per prompt (default: 3 on GSM8K if the languages differ, else 0)")
    group = parser.add_argument_group("rollouts")
    group.add_argument("--handoff", choices=SCHEDULES, default="word", help="schedule: before which tokens a coin is tossed")
    group.add_argument("--p", type=number(float, 0, 1), default=0.5, help="probability that a coin names the senior")
    group.add_argument("--temperature", type=positive, default=0.7, help="temperature of sampling and of scoring")
    group.add_argument("--max-new-tokens", type=count, default=112, help="maximum length of a completion")
    group.add_argument("--batch", type=count, default=152, help="rollouts per update")
    group.add_argument("--rollouts-per-prompt", type=count, help="rollouts per prompt, the group size of GRPO (default: 2, or 8 with GRPO)")
    group.add_argument("--rollout-batch", type=count, default=200, help="rollouts in memory at a time")
    group = parser.add_argument_group("update")
    group.add_argument("--algorithm", choices=("reinforce", "grpo"), default="reinforce", help="what is optimised, see reinforce.py")
    group.add_argument("--updates", type=number(int, 0), help="updates per run, 0 to evaluate only (default by arm: 28, 40, 60 or 80)")
    group.add_argument("--lr", type=rate, default=1e-3, help="learning rate of AdamW")
    group.add_argument("--wrong-weight", type=number(float, -1, 0), default=0.0, help="c, the weight of wrong rollouts (REINFORCE)")
    group.add_argument(
        "--junior-weight", type=number(float, 0, 1), help="j, the weight of the junior's tokens (default: 1, or 0 with GRPO)"
    )
    group.add_argument("--inner-steps", type=number(int, 1, 100), default=1, help="optimizer steps per batch (GRPO)")
    group.add_argument("--clip-ratio", type=number(float, 0, 1, above=True), default=0.2, help="e, the clipping range of the ratio (GRPO)")
    group.add_argument("--kl", type=number(float, 0, 100), default=0.0, help="beta, the coefficient of the KL penalty (GRPO)")
    group.add_argument("--rewards", choices=("true", "shuffled"), default="true", help="shuffled: permuted among the rollouts of a batch")
    group.add_argument("--clip", type=positive, default=1.0, help="maximum norm of the gradient")
    group.add_argument("--micro-tokens", type=count, default=8192, help="tokens per forward pass of the update, prompts included")
    group.add_argument("--checkpointing", action=switch, default=False, help="gradient checkpointing: less memory, more time")
    group.add_argument("--eight-bit-adam", action=switch, default=False, help="paged 8-bit AdamW of bitsandbytes")
    group.add_argument("--memory", type=positive, help="memory limit in GiB (default: the free memory of the GPU or the machine)")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, with the defaults of the preset. Exits with a message if a value is invalid."""
    parser, only_preset = make_parser(), argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    # The preset is read first, so that --help shows its defaults. (An unknown one is reported by the real parser.)
    only_preset.add_argument("--preset", default=parser.get_default("preset"))
    parser.set_defaults(**PRESETS.get(only_preset.parse_known_args(argv)[0].preset, {}))
    # Only arms set solo training. A flag --solo would turn a tandem arm into a solo one under the same name.
    parser.set_defaults(solo=False)
    args = parser.parse_args(argv)
    if args.bfloat16 is None:
        args.bfloat16 = args.device != "cpu"
    # Checks of several flags together. The range of each one was checked by its type.
    flags.check_arms(parser, args, arms_of(args.setting))
    args.jobs = flags.number_of_jobs(parser, args, len(runs_of(args)))
    flags.check_together(parser, argv, args, runs_of(args), ARMS)
    return args


def arms_of(setting: str) -> list[str]:
    """The arms of a setting, or of all settings, each once."""
    settings = SETTINGS if setting == "all" else [setting]
    return list(dict.fromkeys(arm for name in settings for arm in SETTINGS[name]))


def runs_of(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The flags of every run that the command line asks for."""
    arms = args.arms or arms_of(args.setting)
    if args.setting == "all" and args.senior != args.junior:
        # In Tandem RL both start as the same model.
        arms = [arm for arm in arms if arm not in SETTINGS["rlvr"]]
    return [flags_of_run(args, arm, seed) for seed in range(args.seed, args.seed + args.seeds) for arm in arms]


def flags_of_run(args: argparse.Namespace, arm: str, seed: int, **more) -> argparse.Namespace:
    """The flags of one run: the command line, overridden by those of its arm."""
    of_arm = ARMS.get(arm, {}) | more
    run = argparse.Namespace(**vars(args) | of_arm | {"arm": arm, "seed": seed})
    # Changing the language takes longer than dropping the jargon.
    updates = 28 if run.senior_language == run.junior_language else 40
    for flag, default in {"updates": updates, "eval_every": 4, "eval_problems": 200}.items():
        # Of these three, an arm sets only a default; the command line or a preset overrides it.
        given = getattr(args, flag)
        setattr(run, flag, of_arm.get(flag, default) if given is None else given)
    # The batch grows with the group, so that it holds the same number of problems.
    run.batch *= of_arm.get("batch_factor", 1)
    if run.rollouts_per_prompt is None:
        run.rollouts_per_prompt = 8 if run.algorithm == "grpo" else 2
    if run.junior_weight is None:
        run.junior_weight = 0.0 if run.algorithm == "grpo" else 1.0
    # A flag of the other algorithm has no effect.
    if run.algorithm == "grpo":
        run.wrong_weight = 0.0
    else:
        run.inner_steps, run.kl = 1, 0.0
    return run


# ----------------------------------------------------------------------------------------------------------------------
# Training


@runs.ends_if_it_diverges
def train(args: argparse.Namespace, pair: Pair) -> None:
    """One run of one arm and seed. Writes the files that lab/runs.py describes; with --resume, continues them."""
    problems, held_out = tasks.load_problems(args)
    make_specialist(args, pair)
    parallel.begin_run()
    senior, parameters = pair.senior, models.trainable_parameters(pair.senior)
    # Open in paper: the optimizer. We use AdamW without weight decay, a constant learning rate and gradient clipping.
    optimizer = (PagedAdamW8bit if args.eight_bit_adam else torch.optim.AdamW)(parameters, lr=args.lr, weight_decay=0.0)
    # All runs of a process share one model. make_specialist has reset its weights, but a run that was stopped midway may have
    # left a gradient.
    optimizer.zero_grad()
    runs.write_config(args)
    last_update = runs.load_checkpoint(runs.run_folder(args), senior, optimizer)
    if last_update < 0:
        # Update 0 is the evaluation before training.
        last_update = 0
        finish_update({"update": 0}, args, pair, optimizer, held_out)

    for update in parallel.progress(range(last_update + 1, args.updates + 1), f"{args.arm} seed {args.seed}", unit="update"):
        started = time.time()
        # 1. The next problems; load_problems gives enough for all updates. Each gets several rollouts, as in the paper.
        n = args.batch // args.rollouts_per_prompt
        batch = [problem for problem in problems[(update - 1) * n : update * n] for _ in range(args.rollouts_per_prompt)]
        # 2. Rollouts: senior and junior write each solution together. Under standard RL (p = 1) the senior writes alone.
        rollouts = generate(batch, args, pair, p=1.0 if args.solo else args.p, seed=args.seed * 10**6 + update)
        seconds_rollout = time.time() - started
        # 3. Rewards (B,): all tokens of a rollout share one, no matter which model wrote them.
        rewards = torch.tensor([reward(text, problem.gold) for text, problem in zip(rollouts.texts, batch)], device=args.device)
        row = {"update": update, **batch_statistics(rollouts, rewards)}
        runs.check_both_wrote(row, args)
        if args.rewards == "shuffled":
            # The control in which a reward says nothing about its rollout. The row above reports the true rewards.
            order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(args.seed * 10**6 + update))
            rewards = rewards[order.to(args.device)]
        # 4. Weights (B, C). REINFORCE: 1 for tokens of right rollouts and c for those of wrong ones. GRPO: the advantage within
        # the group. Either is multiplied by j at the tokens of the junior.
        grpo = args.algorithm == "grpo"
        w = group_advantages(rewards, args.rollouts_per_prompt) if grpo else outcome_weights(rewards, args.wrong_weight)  # (B,)
        weights = token_weights(rollouts, w, args.junior_weight)
        # Open in paper: the normalisation. We divide by the number of completion tokens of the whole batch, right or wrong.
        num_tokens = rollouts.completion_mask.sum()
        parts = micro_batches(rollouts, weights, args.micro_tokens, keep_all=args.kl > 0)
        row |= {"loss": None, "grad_norm": None}
        old_logprobs: dict[int, torch.Tensor] = {}
        # If all weights are zero, there is nothing to learn from, and the senior stays as it is.
        for _ in range(args.inner_steps if parts else 0):
            loss = 0.0
            for i, (part, part_weights) in enumerate(parts[parallel.process_index() :: parallel.world_size()]):  # of this process
                # 5. Loss: minus equation (1) or (5), as a sum over micro-batches of the rollouts whose weight is not 0 (--kl: of all).
                logprobs = completion_logprobs(senior, part, args.temperature)  # (b, C), log pi_senior(y_t | x_senior, y_<t)
                objective = part_weights * logprobs  # (b, C)
                if grpo:
                    # In the first step the senior is still the one that wrote the rollouts, and every ratio is exactly 1.
                    old = old_logprobs.setdefault(i, logprobs.detach())
                    objective = clipped_objective(logprobs, old, part_weights, args.clip_ratio)
                if args.kl:
                    junior_logprobs = frozen_logprobs(pair.junior, part.as_read_by_junior(), args.temperature)
                    objective = objective - args.kl * kl_estimate(logprobs, junior_logprobs, part.senior_mask)
                part_loss = -objective.sum() / num_tokens
                part_loss.backward()
                loss += part_loss.item()
            # 6. One step.
            row["loss"] = parallel.sum_gradients(parameters, loss)
            row["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, args.clip).item()
            runs.check_divergence(row, args, vocab_size=len(pair.pieces))
            optimizer.step()
            optimizer.zero_grad()
        row |= {"seconds_rollout": seconds_rollout, "seconds_update": time.time() - started - seconds_rollout}
        finish_update(row, args, pair, optimizer, held_out)


def generate(
    problems: list[tasks.Problem], args: argparse.Namespace, pair: Pair, p: float, seed: int, schedule="", alternate=False
) -> Rollouts:
    """One rollout per problem. The same seed gives the same rollouts.

    schedule: overrides --handoff. alternate: senior and junior take turns, the senior first, instead of tossing coins.

    Seeds are seed * 10**6 + update in training, and 10**9 + seed and more in evaluations, so that the batches of a run never
    share their random numbers with each other or with its evaluations. (Seeds are at most 999, so that those of training stay below 10**9.)
    """
    # Random numbers belong to rows of the whole batch, so the rollouts do not depend on the number of processes.
    noise, coins = random_numbers(len(problems), args.max_new_tokens, seed)  # (2, C, B), (C, B)
    if alternate:
        # The k-th toss of a rollout uses coin k. Coins are 0, 1, 0, 1, ..., so that 0 names the senior at any p.
        coins = (torch.arange(args.max_new_tokens) % 2).float()[:, None].expand(-1, len(problems))
    rows = parallel.share(list(range(len(problems))))
    texts = tasks.prompts_of_pair([problems[row] for row in rows], args, pair.junior_tokenizer)
    tokenizers = pair.senior_tokenizer, pair.junior_tokenizer
    prompts = [models.encode_prompts(tokenizer, asked, args.device) for tokenizer, asked in zip(tokenizers, texts)]
    options = dict(
        max_rows=args.rollout_batch, truncate_at=tasks.STOP, schedule=schedule or args.handoff, p=p, temperature=args.temperature
    )
    mine = rollout_in_chunks(pair, *prompts, noise[:, :, rows], coins[:, rows], **options)
    memory.release_freed()
    return join(parallel.gather(mine.to("cpu"))).to(args.device)


def finish_update(row: dict, args: argparse.Namespace, pair: Pair, optimizer, held_out: list[tasks.Problem]) -> None:
    """Evaluate if an evaluation is due, then print and append the row, and last of all save the checkpoint."""
    memory.release_freed()
    if row["update"] % args.eval_every == 0 or row["update"] == args.updates:
        started = time.time()
        row["eval"] = evaluate(row["update"], args, pair, held_out)
        row["seconds_eval"] = time.time() - started
    runs.log_row(row, args.arm)
    runs.append_rows(runs.run_folder(args) / "metrics.jsonl", [row])
    runs.save_checkpoint(runs.run_folder(args), row["update"], pair.senior, optimizer)


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation

# Who writes in an evaluation: the senior alone (p = 1), both together, the junior alone (p = 0). Both together means with
# the arm's own p and schedule. A senior that was trained alone is evaluated together with the junior too, to be compared
# with one that was trained in tandem.
WRITERS = ("senior", "tandem", "junior")
# Rollouts per evaluation that are kept as text.
SAMPLES = 4


def evaluate(update: int, args: argparse.Namespace, pair: Pair, problems: list[tasks.Problem]) -> dict:
    """Evaluate the writers that --evaluate names on held-out problems: {"senior": {...}, ...}. The first rollouts go to samples.jsonl."""
    results = {}
    for who, p in zip(WRITERS, (1.0, args.p, 0.0)):
        # The junior is frozen, so it is evaluated once.
        if who not in args.evaluate or (who == "junior" and update > 0):
            continue
        # Open in paper: decoding in evaluations. We sample as in training. The same random numbers at every evaluation of a
        # run (common random numbers) reduce the variance of the difference between two evaluations.
        rollouts = generate(problems, args, pair, p, seed=10**9 + args.seed)
        golds, lengths = [problem.gold for problem in problems], rollouts.completion_mask.sum(1).tolist()
        results[who] = summarise(rollouts.texts, golds, lengths, tasks.LANGUAGES)
        spans = rollouts.author_spans(pair.pieces)
        if who == "tandem":
            results[who] |= count_handoffs(spans)
            runs.log_rollout(spans[0], args.arm)
        samples = [
            {"update": update, "who": who, "question": problem.question, "gold": problem.gold}
            | {"reward": reward(rollouts.texts[i], problem.gold), "spans": spans[i]}
            # What both models would have written at every step. Where only one of them ran, there is nothing to compare.
            | ({"steps": rollouts.steps(i, pair.pieces)} if 0 < p < 1 else {})
            for i, problem in enumerate(problems[:SAMPLES])
        ]
        runs.append_rows(runs.run_folder(args) / "samples.jsonl", samples)
        if args.measures and who == "senior":
            measured = measures.measure(rollouts, update, problems, args, pair, generate)
            runs.append_rows(runs.run_folder(args) / "measures.jsonl", [measured])
    return results


# ----------------------------------------------------------------------------------------------------------------------
# Main


@runs.errors_in_one_line()
def main(argv: list[str] | None = None) -> None:
    started = time.time()
    args = parse_args(argv)
    if args.device == "cpu":
        # Models this small do not benefit from more threads.
        torch.set_num_threads(min(torch.get_num_threads(), 8))
    with ExitStack() as locks:
        try:
            # Check tokenizers, problems, memory and folders before anything slow.
            names = [tiny.checkpoint(name) for name in (args.senior, args.junior)]
            # Which base this is goes into config.json; --resume insists on the same one.
            args.base = teach.taught_name(args) if args.teach_steps else tiny.identity(names[0])
            tokenizers = models.load_tokenizers(*names)
            args.device = parallel.start(args.device)
            args.rollout_batch, args.micro_tokens = memory.fit_to_memory(args, *names, runs_of(args), tokenizers)
            locks.enter_context(runs.locked(runs_of(args)))
            # With several jobs, each process loads the pair for itself.
            train_one = partial(train, pair=load_pair(args)) if args.jobs == 1 else train_in_own_process
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")

        diverged = runs.run_all(runs_of(args), train_one, args.jobs)
        parallel.barrier()
        if args.setting in ("sweep", "all") and not args.arms:
            confirmations = confirm_sweep(args)
            locks.enter_context(runs.locked(confirmations))
            diverged += runs.run_all(confirmations, train_one, args.jobs)
    if parallel.is_main():
        figures.draw_all(Path(args.out), SETTINGS if args.setting == "all" else [args.setting])
    print(f"finished after {(time.time() - started) / 60:.1f} minutes")
    if diverged:
        sys.exit("\n".join(diverged))


def load_pair(args: argparse.Namespace) -> Pair:
    names = [tiny.checkpoint(name) for name in (args.senior, args.junior)]
    if args.teach_steps:
        teach.make_base(args)
        names = [str(teach.base_folder(args))] * 2
    options = dict(four_bit=args.four_bit, device=args.device, checkpointing=args.checkpointing, bfloat16=args.bfloat16)
    return models.load_pair(*names, rank=args.rank, **options)


# The pair of a process of --jobs, loaded for its first run and used for all.
_own_pair: list[Pair] = []


def train_in_own_process(args: argparse.Namespace) -> None:
    if not _own_pair:
        _own_pair.append(load_pair(args))
    train(args, _own_pair[0])


def confirm_sweep(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The best cell of the sweep and the paper's main one (c = 0, j = 1), on test problems and with seeds that the sweep did not use."""
    best = figures.best_cell(Path(args.out))
    # The best cell may be the main one. There is none if every run diverged.
    cells = dict.fromkeys([(0.0, 1.0), best]) if best else {}
    return [
        flags_of_run(args, f"test-c{c:g}-j{j:g}", seed, wrong_weight=c, junior_weight=j)
        for seed in range(args.seed + args.seeds, args.seed + 2 * args.seeds)
        for c, j in cells
    ]


if __name__ == "__main__":
    main()
