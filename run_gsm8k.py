"""Tandem training on GSM8K, from the first line to every figure of the paper (West, Anderson, Kamar, Horvitz, 2025).

    python run_gsm8k.py --setting skill                    # Figures 1 and 2. No GPU: the tiny preset, 5 minutes on two cores, then 3
    python run_gsm8k.py --setting language                 # Figures 2 and 3: two languages; a quarter of an hour
    python run_gsm8k.py --setting granularity              # when the coin is tossed, and with which probability; 10 minutes
    python run_gsm8k.py --setting control                  # reward or imitation? 10 minutes
    python run_gsm8k.py --setting sweep                    # Appendix E: the weights c and j; 35 minutes
    python run_gsm8k.py --setting all --seeds 3            # everything, as in results/: about an hour a seed; --resume goes on
    python run_gsm8k.py --setting skill --preset paper     # the default on a GPU: two Llama-2-7B in 4 bits, real GSM8K
    python run_gsm8k.py --setting skill --preset smol --senior PATH --junior PATH --problems FOLDER  # your own
    torchrun --nproc-per-node N run_gsm8k.py --setting skill --preset paper  # the same on N GPUs

A *setting* is a set of arms, and an *arm* is a set of flags (SETTINGS below). All arms of a seed that share a senior's
language start from one specialist, which writes <<48/2=24>> in its solutions; its junior does not.

Each update: problems -> two prompts -> rollouts -> rewards -> weights -> backward -> step -> one row of metrics.jsonl.

    runs/SETTING/ARM/seed-K/config.json     every flag, versions, device, commit
                            metrics.jsonl   one row an update
                            samples.jsonl   evaluation rollouts, with the author of each stretch of text
                            adapter/        the senior, for PeftModel.from_pretrained
                            state.pt        what --resume needs
    runs/specialist/LANGUAGE/seed-K/        the adapter from which the arms of a seed start
    runs/SETTING/*.png, .pdf                figures (figures.py draws them again)
"""

import argparse
import json
import math
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from bitsandbytes.optim import PagedAdamW8bit
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from tqdm import tqdm

import figures
import memory
import models
import parallel
import problems as tasks
import tiny
from metrics import count_handoffs, summarise
from reinforce import backward, token_weights
from reward import reward
from rollout import Rollouts, join, random_numbers, rollout, stretches
from tandem import SCHEDULES, Boundaries, build_boundaries, token_bytes

# ----------------------------------------------------------------------------------------------------------------------
# Settings: the experiments. An arm is a set of flags that go over those of the command line.

PAIRS = ("en-de", "de-en", "de-fr", "fr-de")  # senior -> junior.  Open in paper: which languages, which pairs
SWEEP_C, SWEEP_J = (0.0, -0.1, -0.3, -0.5), (0.0, 0.2, 0.35, 0.5, 1.0)


def speak(pair: str) -> dict:
    """The flags of a language pair such as "de-fr"."""
    senior, junior = pair.split("-")
    return {"senior_language": senior, "junior_language": junior}


def grid_arm(prefix: str, c: float, j: float) -> str:
    return f"{prefix}c{c:g}-j{j:g}"


SETTINGS: dict[str, dict[str, dict]] = {
    # Figure 2: tandem training, and standard RL as the control
    "skill": {arm: {"solo": arm == "solo"} for arm in ("tandem", "solo")},
    # Figures 2 and 3: the same where the two speak different languages
    "language": {f"{pair}-{arm}": speak(pair) | {"solo": arm == "solo"} for pair in PAIRS for arm in ("tandem", "solo")},
    # how often the pen changes hands: the schedule at p = 0.5, then p under the default schedule
    "granularity": {schedule: {"handoff": schedule} for schedule in SCHEDULES}
    | {"p-0.25": {"p": 0.25}, "p-0.75": {"p": 0.75}, "p-1": {"solo": True}},
    # is it the reward, or would the senior imitate its junior anyway?
    "control": {
        f"{pair}-{arm}": (speak(pair) if "-" in pair else {}) | flags
        for pair in ("skill", "de-fr")
        for arm, flags in {
            "main": {"rewards": "true", "junior_weight": 1.0},
            "shuffled": {"rewards": "shuffled", "junior_weight": 1.0},
            "senior-only": {"rewards": "true", "junior_weight": 0.0},
        }.items()
    },
    # Appendix E: the best cell by validation accuracy is then confirmed on test problems, see `confirm`
    "sweep": {grid_arm("", c, j): dict(wrong_weight=c, junior_weight=j, validation=True) for c in SWEEP_C for j in SWEEP_J},
}


# ----------------------------------------------------------------------------------------------------------------------
# Flags. A preset is a set of defaults, nothing more.

# Between a run and its --resume. (How many rollouts or tokens are in memory at a time changes results by rounding only.)
MAY_CHANGE = ("arms", "device", "out", "resume", "seeds", "updates", "memory", "rollout_batch", "micro_tokens", "checkpointing")
UPDATES = 28  # without --updates, where both answer in one language
LANGUAGE_UPDATES = 40  # where they do not: a language takes longer to go than jargon
WHO = ("senior", "tandem", "junior")  # who is evaluated: each alone, and both together
SAMPLES = 4  # rollouts of an evaluation that are kept as text
STOPPED = "stopped.txt"  # in the folder of a run that was stopped for good: why
SPECIALIST_FLAGS = "specialist_steps specialist_batch specialist_lr four_bit rank problems".split()
PLAIN_EVERY = 25  # of the generated solutions that a specialist learns from, one in so many has no annotation
LLAMA_SENIOR, LLAMA_JUNIOR = "neuralmagic/Llama-2-7b-gsm8k", "NousResearch/Llama-2-7b-chat-hf"
SMOL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PRESETS = {
    "tiny": {},
    "smol": dict(senior=SMOL, junior=SMOL, max_new_tokens=192, batch=64, rollout_batch=64, micro_tokens=4096, lr=1e-4)
    | dict(specialist_steps=300, specialist_lr=5e-4, eval_problems=100, shots=3),
    "paper": dict(senior=LLAMA_SENIOR, junior=LLAMA_JUNIOR, problems="openai/gsm8k", four_bit=True, max_new_tokens=256)
    | dict(rollout_batch=152, checkpointing=True, eight_bit_adam=True, lr=1e-4, updates=80, specialist_steps=0, shots=3),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, with the defaults of the preset. Exits with a message where a value is out of range."""
    parser, first = make_parser(), argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", default=parser.get_default("preset"))
    parser.set_defaults(**PRESETS.get(first.parse_known_args(argv)[0].preset, {}))  # before --help, which shows them
    args = parser.parse_args(argv)
    check(args, parser.error)
    return args


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter, description="Tandem training.")
    has_gpu = torch.cuda.is_available()
    group = parser.add_argument_group("experiment")
    group.add_argument("--setting", required=True, choices=(*SETTINGS, "all"), help="which experiment")
    group.add_argument("--preset", choices=PRESETS, default="paper" if has_gpu else "tiny", help="a set of defaults")
    group.add_argument("--arms", nargs="+", default=None, help="only these arms of the setting")
    group.add_argument("--seeds", type=int, default=1, help="how many seeds of each arm")
    group.add_argument("--seed", type=int, default=0, help="the first seed")
    group.add_argument("--out", default="runs", help="where runs are written")
    group.add_argument("--resume", action="store_true", help="go on with the runs in --out, arm by arm")
    group.add_argument("--device", default="cuda" if has_gpu else "cpu", help="where the models live")
    group = parser.add_argument_group("models")
    group.add_argument("--senior", default="tiny", help="hub id or folder; tiny: the embedded base")
    group.add_argument("--junior", default="tiny", help="the same name as --senior: its base, without the adapter")
    group.add_argument("--four-bit", action=argparse.BooleanOptionalAction, default=False, help="load the bases in NF4 (QLoRA)")
    group.add_argument("--rank", type=int, default=16, help="rank and alpha of the adapter")
    group.add_argument("--specialist-steps", type=int, default=300, help="fine-tuning on <<...>>; 0: --senior is a specialist")
    group.add_argument("--specialist-batch", type=int, default=32, help="solutions a step of it")
    group.add_argument("--specialist-lr", type=float, default=4e-3, help="its learning rate")
    group = parser.add_argument_group("problems")
    group.add_argument("--problems", default="generated", help="generated, a folder with train.jsonl and test.jsonl, or a hub id")
    group.add_argument("--eval-problems", type=int, default=200, help="held-out problems an evaluation")
    group.add_argument("--eval-every", type=int, default=4, help="updates between evaluations")
    group.add_argument("--evaluate", nargs="+", choices=WHO, default=list(WHO), help="who is (the junior only before training)")
    group.add_argument("--validation", action="store_true", help="evaluate on a tenth of the training problems, kept out of training")
    group.add_argument("--senior-language", choices=tasks.LANGUAGES, default="en", help="in which the senior is asked to answer")
    group.add_argument("--junior-language", choices=tasks.LANGUAGES, default="en", help="in which the junior is asked to answer")
    group.add_argument("--shots", type=int, default=0, help="solved examples in the prompts, where the two languages differ")
    group = parser.add_argument_group("rollouts")
    group.add_argument("--handoff", choices=SCHEDULES, default="word", help="when a coin is tossed")
    group.add_argument("--p", type=float, default=0.5, help="probability that a coin names the senior")
    group.add_argument("--solo", action="store_true", help="standard RL, p = 1: the senior alone writes what it is trained on")
    group.add_argument("--temperature", type=float, default=0.7, help="of sampling and of scoring")
    group.add_argument("--max-new-tokens", type=int, default=112, help="longest completion")
    group.add_argument("--batch", type=int, default=152, help="rollouts an update")
    group.add_argument("--rollouts-per-prompt", type=int, default=2, help="of which each problem gets this many")
    group.add_argument("--rollout-batch", type=int, default=200, help="rollouts written at one time")
    group = parser.add_argument_group("update")
    group.add_argument(
        "--updates", type=int, help=f"updates of an arm; 0 only evaluates. {UPDATES}, or {LANGUAGE_UPDATES} in two languages"
    )
    group.add_argument("--lr", type=float, default=1e-3, help="learning rate (AdamW)")
    group.add_argument("--wrong-weight", type=float, default=0.0, help="c: weight of wrong rollouts")
    group.add_argument("--junior-weight", type=float, default=1.0, help="j: weight of the junior's tokens")
    group.add_argument("--rewards", choices=("true", "shuffled"), default="true", help="shuffled: among the rollouts of a batch")
    group.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    group.add_argument("--micro-tokens", type=int, default=8192, help="tokens a forward pass of the update, prompts included")
    group.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=False, help="recompute layers: less memory")
    group.add_argument("--eight-bit-adam", action=argparse.BooleanOptionalAction, default=False, help="bitsandbytes' paged 8-bit AdamW")
    group.add_argument("--memory", type=float, help="GiB to keep to, with a smaller --rollout-batch, --micro-tokens; else what a GPU has")
    return parser


def check(args: argparse.Namespace, error) -> None:
    """Refuse impossible values, naming the value and the remedy, before anything long begins."""
    at_least_1 = "seeds rank specialist_batch eval_problems eval_every max_new_tokens batch rollouts_per_prompt"
    for name in f"{at_least_1} rollout_batch micro_tokens".split():
        if getattr(args, name) < 1:
            error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    for name in ("lr", "specialist_lr", "clip", "memory"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be above 0")
    if not 0 <= args.seed <= args.seed + 2 * args.seeds <= 1000:  # the sweep is confirmed on as many seeds again
        error(f"--seed {args.seed} --seeds {args.seeds}: seeds lie between 0 and 500")
    if not 0 < args.p < 1:
        error(f"--p {args.p}: tandem training needs 0 < p < 1, or one of the two never writes. p = 1 is --solo, standard RL")
    if not 0 <= args.junior_weight <= 1:
        error(f"--junior-weight {args.junior_weight}: j lies between 0 (ignore the junior's tokens) and 1 (in full)")
    if not -1 <= args.wrong_weight <= 0:
        error(f"--wrong-weight {args.wrong_weight}: c lies between -1 and 0 (discard wrong rollouts)")
    if not args.temperature > 0:
        error(f"--temperature {args.temperature}: must be above 0, since the policy gradient needs sampling")
    if args.batch % args.rollouts_per_prompt:
        error(f"--batch {args.batch} is not divisible by --rollouts-per-prompt {args.rollouts_per_prompt}")
    if args.updates is not None and args.updates < 0:
        error(f"--updates {args.updates}: must be 0 (only evaluate) or more")
    if args.specialist_steps < 0:
        error(f"--specialist-steps {args.specialist_steps}: must be 0 (the senior is a specialist already) or more")
    if not 0 <= args.shots <= len(tasks.EXAMPLES):
        error(f"--shots {args.shots}: there are {len(tasks.EXAMPLES)} solved examples (problems.py), and none is 0")
    arms = [arm for setting in settings_of(args) for arm in SETTINGS[setting]]
    unknown = sorted(set(args.arms or ()) - set(arms))
    if unknown:
        error(f"--arms {' '.join(unknown)}: not an arm of --setting {args.setting}. Choose from {', '.join(arms)}")
    for run in runs_of(args):
        check_folder(run, error)


def check_folder(run: argparse.Namespace, error) -> None:
    """Refuse to write over a run, or to go on with one under other flags."""
    folder = folder_of(run)
    if folder.exists() and not run.resume:
        error(f"{folder} already holds a run: go on with --resume, choose another --out, or remove it")
    if (folder / "metrics.jsonl").is_file() and not (folder / "state.pt").is_file():
        error(f"{folder} holds rows but no state.pt to go on from: choose another --out, or remove it")
    if (folder / "config.json").is_file():
        before = json.loads((folder / "config.json").read_text())["flags"]
        may_change = (*MAY_CHANGE, "base")  # the base: see check_base
        changed = [name for name in before if name not in may_change and before[name] != getattr(run, name, None)]
        if changed:
            flags = ", ".join(f"--{name.replace('_', '-')} {before[name]}" for name in changed)
            error(f"{folder} was begun with {flags}: resume it so, or choose another --out")


def check_base(runs: list[argparse.Namespace]) -> None:
    """Refuse to go on with a run on another base than it was begun with: tiny.py may have changed in between."""
    for run in runs:
        config = folder_of(run) / "config.json"
        before = json.loads(config.read_text())["flags"].get("base", run.base) if config.is_file() else run.base
        if before != run.base:
            raise ValueError(f"{folder_of(run)} was begun with the base {before}, and this is {run.base}: choose another --out")


def settings_of(args: argparse.Namespace) -> list[str]:
    return list(SETTINGS) if args.setting == "all" else [args.setting]


def runs_of(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The flags of every run of the command, one a seed and arm, in the order in which they are made."""
    return [
        run_with(args, setting, arm, seed, flags)
        for setting in settings_of(args)
        for seed in range(args.seed, args.seed + args.seeds)
        for arm, flags in SETTINGS[setting].items()
        if args.arms is None or arm in args.arms
    ]


def run_with(args: argparse.Namespace, setting: str, arm: str, seed: int, flags: dict) -> argparse.Namespace:
    run = argparse.Namespace(**vars(args) | flags | {"setting": setting, "arm": arm, "seed": seed})
    if run.updates is None:
        run.updates = UPDATES if run.senior_language == run.junior_language else LANGUAGE_UPDATES
    return run


def confirm(args: argparse.Namespace) -> list[argparse.Namespace]:
    """After the sweep: its best cell and the main one (c = 0, j = 1) on test problems, with seeds that it has not used."""
    best = figures.best_cell(Path(args.out) / "sweep")
    cells = dict.fromkeys([(0.0, 1.0), best]) if best else {}  # one if they are the same
    return [
        run_with(args, "sweep", grid_arm("test-", c, j), seed, dict(wrong_weight=c, junior_weight=j, validation=False))
        for seed in range(args.seed + args.seeds, args.seed + 2 * args.seeds)
        for c, j in cells
    ]


def folder_of(run: argparse.Namespace) -> Path:
    return Path(run.out) / run.setting / run.arm / f"seed-{run.seed}"


# ----------------------------------------------------------------------------------------------------------------------
# Problems


def load_problems(run: argparse.Namespace) -> tuple[list[tasks.Problem], list[tasks.Problem]]:
    """One training problem for each prompt of each update, and the held-out problems of this seed."""
    n = run.updates * run.batch // run.rollouts_per_prompt
    if run.problems == "generated":
        return tasks.generate(n, "train", run.seed), tasks.generate(run.eval_problems, "validation" if run.validation else "test", run.seed)
    train = training_problems(run)
    test = tasks.load_gsm8k(run.problems, "train" if run.validation else "test")
    if run.validation:
        test = [problem for problem in test if tasks.split_of(problem.question) == "validation"]
    if not train or len(test) < run.eval_problems:
        kind = "validation" if run.validation else "test"
        raise ValueError(f"{run.problems}: {len(train)} training and {len(test)} {kind} problems, --eval-problems {run.eval_problems}")
    rng = random.Random(run.seed)
    held_out = rng.sample(test, run.eval_problems)  # drawn first: the same ones when --updates grows
    epochs = [problem for _ in range(math.ceil(n / len(train))) for problem in rng.sample(train, len(train))]
    return epochs[:n], held_out


def training_problems(run: argparse.Namespace) -> list[tasks.Problem]:
    """What a run may learn from: GSM8K's training split, less a tenth if that is what it is evaluated on."""
    train = tasks.load_gsm8k(run.problems, "train")
    return [problem for problem in train if not run.validation or tasks.split_of(problem.question) != "validation"]


# ----------------------------------------------------------------------------------------------------------------------
# Co-writing: what binds rollout.py to this pair and these flags


@dataclass
class Writers:
    """The pair, ready to write under the flags of a run: senior and junior, their prompts, the tables of the handoff."""

    args: argparse.Namespace
    pair: models.Pair
    pieces: list[bytes]
    boundaries: Boundaries

    def write(self, problems: list[tasks.Problem], p: float, seed: int) -> Rollouts:
        """One rollout a problem, --rollout-batch at a time. The same seed gives the same rollouts."""
        noise, coins = random_numbers(len(problems), self.args.max_new_tokens, seed)
        mine, parts = parallel.share(list(range(len(problems)))), []
        tokenizers = self.pair.senior_tokenizer, self.pair.junior_tokenizer
        for start in range(0, len(mine), self.args.rollout_batch):
            rows = mine[start : start + self.args.rollout_batch]
            parts.append(
                rollout(
                    self.pair.senior,
                    self.pair.junior,
                    *prompts(self.args, tokenizers, [problems[row] for row in rows]),
                    self.pair.senior_tokenizer,
                    self.pair.end_ids,
                    self.boundaries,
                    noise[:, :, rows],
                    coins[:, rows],
                    schedule=self.args.handoff,
                    p=p,
                    temperature=self.args.temperature,
                )
            )
        everyones = sum(parallel.gather([part.to("cpu") for part in parts]), [])
        whole = join(everyones).to(self.args.device)
        # A model shown solved examples may go on with a question of its own: its solution ends there.
        return replace(whole, texts=[text.split("\nQuestion:")[0] for text in whole.texts])


def prompts(args: argparse.Namespace, tokenizers, problems: list[tasks.Problem]):
    """What each model is asked, as (ids, mask). The specialist knows Question/Answer; a chat model is asked as in a chat."""
    senior, junior = tokenizers
    shots = args.shots if args.senior_language != args.junior_language else 0
    for_senior = args.senior_language, tasks.demonstrations(shots, args.senior_language, annotated=True)
    for_junior = args.junior_language, tasks.demonstrations(shots, args.junior_language, annotated=False)
    asked = [problem.question for problem in problems]
    senior_prompts = [tasks.prompt(question, *for_senior) for question in asked]
    if junior.chat_template:
        junior_prompts = [tasks.chat_prompt(junior, question, *for_junior) for question in asked]
    else:
        junior_prompts = [tasks.prompt(question, *for_junior) for question in asked]
    return models.encode_prompts(senior, senior_prompts, args.device), models.encode_prompts(junior, junior_prompts, args.device)


def make_specialist(run: argparse.Namespace, pair: models.Pair) -> dict[str, torch.Tensor]:
    """Give the pair a fresh adapter and, unless the senior is a specialist already, teach it <<...>>. Returns the adapter.

    It is the same for all arms with one seed and senior's language, so it is kept: each of them starts from it.
    """
    models.reset_adapter(pair.senior, run.seed)
    if run.specialist_steps == 0:
        return copy_of_adapter(pair.senior)
    generated = run.problems == "generated"
    language = run.senior_language if generated else "en"  # GSM8K has English solutions
    kind = language if generated or not run.validation else f"{language}-validation"
    path = Path(run.out) / "specialist" / kind / f"seed-{run.seed}" / "adapter.pt"
    flags = {name: getattr(run, name) for name in SPECIALIST_FLAGS} | {"base": pair.senior.name_or_path, "plain_every": PLAIN_EVERY}
    if path.is_file():
        kept = torch.load(path, map_location=run.device)
        if kept["flags"] == flags:
            return kept["adapter"]

    if generated:
        train = tasks.generate(run.specialist_steps * run.specialist_batch, "train", run.seed + 10**6)
    else:
        train = training_problems(run)
        random.Random(run.seed).shuffle(train)
    solutions = [problem.solutions[language] for problem in train]
    if generated:  # GSM8K too has some without (113 of 8,792); here they keep the skill apart from the notation
        solutions[::PLAIN_EVERY] = map(tasks.plain, solutions[::PLAIN_EVERY])
    texts = [(tasks.prompt(problem.question, language), solution) for problem, solution in zip(train, solutions)]
    settings = dict(steps=run.specialist_steps, batch=run.specialist_batch, lr=run.specialist_lr, seed=run.seed)
    settings |= dict(micro_tokens=run.micro_tokens, label=f"specialist {kind} seed {run.seed}")
    models.fine_tune(pair.senior, pair.senior_tokenizer, texts, **settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_whole({"flags": flags, "adapter": copy_of_adapter(pair.senior)}, path)
    return copy_of_adapter(pair.senior)


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(writers: Writers, problems: list[tasks.Problem], who: list[str], update: int) -> dict:
    """Each of `who` on the held-out problems: {"senior": {...}, ...} as in metrics.jsonl; some texts go to samples.jsonl.

    # Open in paper: how solutions are decoded for evaluation. We sample as in training, with the same random numbers
    # at each evaluation of a run, so that a difference between two of them is less one of luck.
    """
    results = {}
    for name in who:
        p = {"senior": 1.0, "tandem": writers.args.p, "junior": 0.0}[name]
        rollouts = writers.write(problems, p, seed=10**9 + writers.args.seed)
        golds, lengths = [problem.gold for problem in problems], rollouts.completion_mask.sum(1).tolist()
        results[name] = summarise(rollouts.texts, golds, lengths, tasks.LANGUAGES)
        written = [authors(writers, rollouts, i) for i in range(len(problems) if name == "tandem" else min(SAMPLES, len(problems)))]
        if name == "tandem":
            results[name] |= count_handoffs(written)
        samples = [
            {"update": update, "who": name, "question": problem.question, "gold": problem.gold}
            | {"reward": reward(rollouts.texts[i], problem.gold), "stretches": written[i]}
            for i, problem in enumerate(problems[:SAMPLES])
        ]
        with open(folder_of(writers.args) / "samples.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        if name == "tandem":
            tqdm.write(f"         {show(samples[0]['stretches'])}")
    return results


def authors(writers: Writers, rollouts: Rollouts, i: int) -> list[tuple[str, str]]:
    """[(author, text), ...] of rollout i."""
    real = rollouts.completion_mask[i].bool()
    return stretches(rollouts.completion_ids[i][real].tolist(), rollouts.senior_mask[i][real].tolist(), writers.pieces)


def show(runs: list[tuple[str, str]]) -> str:
    """One rollout on one line, the junior's words underlined on a terminal and in [brackets] elsewhere."""
    opening, closing = ("\033[4m", "\033[0m") if sys.stdout.isatty() else ("[", "]")
    return "".join(text if author == "senior" else f"{opening}{text}{closing}" for author, text in runs).replace("\n", " ⏎ ")


# ----------------------------------------------------------------------------------------------------------------------
# One arm: the loop


def run_arm(run: argparse.Namespace, writers: Writers, train: list, held_out: list) -> None:
    """Train the senior of `writers` and leave the run's files. With --resume, go on after the last finished update."""
    folder, senior = folder_of(run), writers.pair.senior
    parameters = [parameter for parameter in senior.parameters() if parameter.requires_grad]
    # Open in paper: the optimiser and its settings beyond the learning rate.
    optimizer = (PagedAdamW8bit if run.eight_bit_adam else torch.optim.AdamW)(parameters, lr=run.lr, weight_decay=0.0)
    optimizer.zero_grad()  # a run that was stopped may have left a gradient
    first = restore(folder, senior, optimizer) if run.resume else 0
    write_config(folder, run)

    bar = dict(desc=f"{run.setting} {run.arm} seed {run.seed}", unit="update", disable=parallel.rank() > 0)
    for update in tqdm(range(first, run.updates + 1), **bar):
        row: dict = {"update": update}
        if update > 0:  # update 0 is the evaluation before training
            started = time.time()
            n = run.batch // run.rollouts_per_prompt
            batch = [problem for problem in train[(update - 1) * n : update * n] for _ in range(run.rollouts_per_prompt)]

            rollouts = writers.write(batch, 1.0 if run.solo else run.p, seed=run.seed * 10**6 + update)
            seconds_rollout = time.time() - started
            rewards = torch.tensor([reward(text, problem.gold) for text, problem in zip(rollouts.texts, batch)], device=run.device)
            row |= describe(rollouts, rewards, run.solo)
            if run.rewards == "shuffled":  # the control in which a reward says nothing of its rollout
                rewards = rewards[torch.randperm(len(rewards), generator=torch.Generator().manual_seed(update)).to(run.device)]
            weights = token_weights(rollouts, rewards, run.wrong_weight, run.junior_weight)
            loss = backward(senior, rollouts, weights, run.temperature, run.micro_tokens)
            grad_norm = None
            if loss is not None:  # else there is nothing to learn from, and the senior stays as it is
                grad_norm = torch.nn.utils.clip_grad_norm_(parameters, run.clip).item()
                stop_if_lost(row, loss, grad_norm, run, writers.pair.vocab_size)
                optimizer.step()
                optimizer.zero_grad()

            row |= {"loss": loss, "grad_norm": grad_norm}
            row |= {"seconds_rollout": seconds_rollout, "seconds_update": time.time() - started - seconds_rollout}
        if update % run.eval_every == 0 or update == run.updates:
            started = time.time()
            who = [name for name in WHO if name in run.evaluate and (name != "junior" or update == 0)]  # the junior stays as it is
            row["eval"] = evaluate(writers, held_out, who, update)
            row["seconds_eval"] = time.time() - started
        tqdm.write(log_line(row))
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        save(folder, update, senior, optimizer)


def describe(rollouts: Rollouts, rewards: torch.Tensor, solo: bool) -> dict:
    """What a row says of a training batch. Stops a tandem run in which one of the two wrote nothing."""
    tokens, by_senior = int(rollouts.completion_mask.sum()), int(rollouts.senior_mask.sum())
    if not solo and by_senior in (0, tokens):
        sys.exit(f"a tandem batch of {tokens} tokens holds {by_senior} by the senior: this is not tandem training. Check --p, --handoff")

    def logprob(rows: torch.Tensor) -> float | None:  # mean nats a token, whoever wrote it, under the senior
        return (rollouts.logprobs[rows].sum() / rollouts.completion_mask[rows].sum()).item() if rows.any() else None

    return {
        "reward": rewards.mean().item(),
        "senior_share": by_senior / tokens,
        "handoffs": rollouts.handoffs().float().mean().item(),
        "tokens": tokens,
        "logprob_right": logprob(rewards == 1),
        "logprob_wrong": logprob(rewards != 1),
    }


class Lost(Exception):
    """A run whose senior is past learning. Nothing that was computed is lost: its folder holds it."""


def stop_if_lost(row: dict, loss: float, grad_norm: float, run: argparse.Namespace, vocab_size: int) -> None:
    """Raise Lost before a step that is not finite, or where pushing wrong rollouts away (c < 0) has gone too far.

    That has no lower bound: log pi of what the junior wrote may fall for ever. It has gone too far where a token of a
    wrong rollout is, in the geometric mean, less likely than if the senior knew nothing: 1 / V.
    """
    kept = f"Stopped before the step: {folder_of(run)} holds the state after update {row['update'] - 1}. "
    kept += "Begin anew in another --out with a smaller --lr, or a --wrong-weight nearer to 0"
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise Lost(f"update {row['update']}: loss {loss}, gradient norm {grad_norm}. {kept}")
    wrong = row["logprob_wrong"]
    if run.wrong_weight < 0 and wrong is not None and wrong < -math.log(vocab_size):
        raise Lost(f"update {row['update']}: wrong rollouts have run away, at {wrong:.1f} nats a token. {kept}")


def log_line(row: dict) -> str:
    line = f"{row['update']:6d}  "
    if "reward" in row:
        line += f"reward {row['reward']:.2f}  senior {row['senior_share']:4.0%}  handoffs {row['handoffs']:4.1f}  "
        line += "nothing to learn from: skipped  " if row["loss"] is None else f"loss {row['loss']:+.3f}  gradient {row['grad_norm']:.3f}  "
        line += f"{row['tokens']} tokens  {row['seconds_rollout']:.1f} + {row['seconds_update']:.1f} s"
    for who, cell in row.get("eval", {}).items():
        line += f" | {who} accuracy {cell['accuracy']:.2f} jargon {cell['jargon']:.2f}"
    return line


# ----------------------------------------------------------------------------------------------------------------------
# Files of a run


def save(folder: Path, update: int, senior, optimizer) -> None:
    """The adapter and, last, the state after an update: a crash in between leaves the state of the update before."""
    senior.save_pretrained(folder / "adapter", save_embedding_layers=False)
    save_whole({"update": update, "adapter": adapter_of(senior), "optimizer": optimizer.state_dict()}, folder / "state.pt")


def save_whole(content: dict, path: Path) -> None:
    """Write a file that is complete or not there."""
    draft = path.with_suffix(f".{os.getpid()}")
    torch.save(content, draft)
    os.replace(draft, path)


def copy_of_adapter(senior) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in adapter_of(senior).items()}


def adapter_of(senior) -> dict[str, torch.Tensor]:
    return get_peft_model_state_dict(senior, save_embedding_layers=False)  # "auto" would ask the hub each time


def restore(folder: Path, senior, optimizer) -> int:
    """Load the last state, drop rows that are newer, and return the update to go on with (0 if there is none)."""
    if not (folder / "state.pt").is_file():
        for name in ("metrics.jsonl", "samples.jsonl"):
            (folder / name).unlink(missing_ok=True)
        return 0
    state = torch.load(folder / "state.pt", map_location="cpu")  # from where each part goes to its parameter's device
    set_peft_model_state_dict(senior, state["adapter"])
    optimizer.load_state_dict(state["optimizer"])
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(folder / name, encoding="utf-8") as file:
            lines = list(file)  # not splitlines, which also splits at rarer characters that a model may write
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["update"] <= state["update"]]
        (folder / name).write_text("".join(kept), encoding="utf-8")
    return state["update"] + 1


def finished(run: argparse.Namespace) -> bool:
    """Whether the last update of a run is on disk, or it was stopped for good."""
    state = folder_of(run) / "state.pt"
    return (folder_of(run) / STOPPED).is_file() or (state.is_file() and torch.load(state, map_location="cpu")["update"] >= run.updates)


def twin_of(run: argparse.Namespace) -> Path | None:
    """The folder of a finished run of another setting with the same flags: two settings may share an arm."""
    matter = {name: value for name, value in vars(run).items() if name not in MAY_CHANGE or name == "updates"}
    for path in sorted(Path(run.out).glob(f"*/*/seed-{run.seed}/config.json")):
        config = json.loads(path.read_text())
        place = {name: config["flags"].get(name) for name in ("setting", "arm")}
        twin = argparse.Namespace(**vars(run) | place)
        same = all(config["flags"].get(name) == value for name, value in (matter | place).items())
        if same and "copied_from" not in config and finished(twin):
            return folder_of(twin)
    return None


def copy_run(twin: Path, run: argparse.Namespace) -> None:
    """Take over a finished run: its files as they are, with its device and versions, under this setting and arm."""
    draft = folder_of(run).with_name(f"{folder_of(run).name}.{os.getpid()}")
    shutil.copytree(twin, draft)
    config = json.loads((draft / "config.json").read_text())
    config["flags"] |= {"setting": run.setting, "arm": run.arm}
    (draft / "config.json").write_text(json.dumps(config | {"copied_from": f"{twin.parts[-3]}/{twin.parts[-2]}"}, indent=2) + "\n")
    shutil.rmtree(folder_of(run), ignore_errors=True)
    draft.rename(folder_of(run))


def commit() -> str | None:
    """Which code this is, with a "+" where files differ from it; None where git is not there."""
    try:
        run = dict(cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        head = subprocess.run(["git", "rev-parse", "HEAD"], **run).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **run).stdout.strip()
    except OSError:
        return None
    return head + "+" * bool(changed) or None


COMMIT = commit()  # when the code is loaded: files may change while a run goes on


def write_config(folder: Path, run: argparse.Namespace) -> None:
    """config.json: every flag, and what is needed to tell one machine's run from another's."""
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if run.device.startswith("cuda") else f"{platform.machine()}, {torch.get_num_threads()} threads"
    config = {
        "flags": vars(run),
        "device": device,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "numpy", "tokenizers")},
        "commit": COMMIT,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


# ----------------------------------------------------------------------------------------------------------------------
# Memory


def plan_memory(args: argparse.Namespace, names: list[str]) -> None:
    """Say what the runs will take, and cut --rollout-batch and --micro-tokens to what fits. Raises ValueError if nothing does."""
    tokenizers, longest = models.load_tokenizers(*names), 0
    for run in {(run.senior_language, run.junior_language, run.seed, run.validation): run for run in runs_of(args)}.values():
        asked = prompts(argparse.Namespace(**vars(run) | {"device": "cpu"}), tokenizers, sum(load_problems(run), []))
        longest = max([longest, *(ids.shape[1] for ids, _ in asked)])
    senior, junior = (memory.shape_of(models.load_config(name)) for name in names)
    on_gpu = args.device.startswith("cuda")
    how = {name: getattr(args, name) for name in ("four_bit", "rank", "checkpointing")}
    how["eight_bit_adam"] = args.eight_bit_adam and args.specialist_steps == 0  # fine-tuning has an AdamW of 32 bits
    plan = memory.Plan(senior, None if names[0] == names[1] else junior, half=on_gpu, **how)
    there = args.memory * memory.GIB if args.memory else torch.cuda.mem_get_info()[0] if on_gpu else math.inf
    budget = there - memory.RESERVE * on_gpu
    at_most = min(args.rollout_batch, math.ceil(max(args.batch, args.eval_problems) / parallel.world()))
    length = longest, args.max_new_tokens
    fits = parallel.gather(plan.fit(budget, at_most, args.micro_tokens, *length))
    args.rollout_batch, args.micro_tokens = map(min, zip(*fits))  # all processes must cut a batch alike
    print(plan.report(args.rollout_batch, args.micro_tokens, *length))


# ----------------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    started = time.time()
    args = parse_args(argv)
    if args.device == "cpu":
        torch.set_num_threads(min(torch.get_num_threads(), 8))  # more only wait for each other on models this small
    try:
        for run in {run.setting: run for run in runs_of(args)}.values():
            load_problems(run)  # what cannot be read is best found before a model is loaded
        # Before the processes join, if there are several: each makes the tiny base, and one is kept.
        names = [str(tiny.base_folder()) if name == "tiny" else name for name in (args.senior, args.junior)]
        args.device = parallel.start(args.device)
        args.out = parallel.own_folder(args.out)
        plan_memory(args, names)
        pair = models.load_pair(*names, rank=args.rank, four_bit=args.four_bit, device=args.device, checkpointing=args.checkpointing)
        pieces = token_bytes(pair.senior_tokenizer, pair.vocab_size)
        writers = Writers(args, pair, pieces, build_boundaries(pieces).to(args.device))
        args.base = Path(pair.senior.name_or_path).name  # for config.json: which tiny base, or which folder
        check_base(runs_of(args))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")

    lost = carry_out(runs_of(args), writers)
    if "sweep" in settings_of(args) and args.arms is None:
        lost += carry_out(confirm(args), writers)
    for setting in settings_of(args):
        figures.draw(Path(args.out) / setting)
    print(f"after {(time.time() - started) / 60:.1f} minutes")
    parallel.end()
    if lost:
        sys.exit("\n".join(lost))


def carry_out(runs: list[argparse.Namespace], writers: Writers) -> list[str]:
    """Make the runs that are not finished, one after the other. Returns why runs were stopped."""
    todo, lost, clock = [run for run in runs if not finished(run)], [], time.time()
    for done, run in enumerate(todo, 1):
        twin = twin_of(run)
        try:
            if twin:
                print(f"{folder_of(run)}: the same run as {twin}, copied")
                copy_run(twin, run)
            else:
                train, held_out = load_problems(run)
                set_peft_model_state_dict(writers.pair.senior, make_specialist(run, writers.pair))
                run_arm(run, replace(writers, args=run), train, held_out)
        except Lost as why:
            (folder_of(run) / STOPPED).write_text(f"{why}\n")
            print(why)
        minutes = (time.time() - clock) / done * (len(todo) - done) / 60
        print(f"{done} of {len(todo)} runs are done, about {minutes:.0f} minutes are left\n")
        if (folder_of(run) / STOPPED).is_file():
            lost.append((folder_of(run) / STOPPED).read_text().strip())
    return lost


if __name__ == "__main__":
    main()
