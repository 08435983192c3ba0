"""Command-line flags: every value is checked, and named with its remedy, before anything begins.

First the types of single flags, for argparse. Then what flags must be together. The flags themselves are in run_gsm8k.py.
"""

import argparse
import os

import torch


def number(kind: type, low: float, high: float = 10**6, above: bool = False):
    """An argparse type: a number of at least `low` (above: greater than it) and at most `high`, neither infinite nor absurd."""

    def parse(text: str):
        value = kind(text)
        # Every comparison with nan is false, so nan is refused too.
        if not (low < value if above else low <= value) or not value <= high:
            bounds = f"{'greater than' if above else 'of at least'} {low:g} and at most {high:g}"
            raise argparse.ArgumentTypeError(f"{text}: must be a finite number {bounds}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in its message for text that is not a number
    return parse


def name(text: str) -> str:
    """An argparse type: text that is not empty and that can be printed."""
    if not text.strip() or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r}: give a name or a path")
    return text


def available_devices() -> list[str]:
    """The devices on which models can run here: "cpu", and with an accelerator such as "cuda" that one too, with and without number."""
    devices = ["cpu"]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        devices += [kind, *(f"{kind}:{i}" for i in range(torch.accelerator.device_count()))]
    return devices


def given_flags(parser: argparse.ArgumentParser, argv: list[str] | None, args: argparse.Namespace) -> list[str]:
    """The names of the flags that were given on the command line, and not only have their default."""
    # A second reading into a namespace of None, so that no defaults are set.
    read = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args)))))
    return [flag for flag, value in read.items() if value is not None]


# ----------------------------------------------------------------------------------------------------------------------
# Several flags together. parser.error exits with its message.

# Flags that only one of the algorithms reads.
ALGORITHM_OF = {"inner_steps": "grpo", "clip_ratio": "grpo", "kl": "grpo", "wrong_weight": "reinforce"}


def check_arms(parser: argparse.ArgumentParser, args: argparse.Namespace, arms: list[str]) -> None:
    """--arms must name arms of the setting, each once. The setting rlvr needs one model for both."""
    if args.setting == "rlvr" and args.senior != args.junior:
        parser.error("--setting rlvr: senior and junior start as one model: give --junior the value of --senior")
    if args.teach_steps and args.senior != args.junior:
        parser.error(f"--teach-steps {args.teach_steps}: one base is taught for both: give --junior the value of --senior, or teach none")
    chosen = args.arms or arms
    unknown = sorted(set(chosen) - set(arms))
    if unknown:
        parser.error(f"--arms {' '.join(unknown)}: not in --setting {args.setting}, whose arms are {', '.join(arms)}")
    if len(set(chosen)) < len(chosen):
        parser.error(f"--arms {' '.join(chosen)}: name every arm once")


def number_of_jobs(parser: argparse.ArgumentParser, args: argparse.Namespace, num_runs: int) -> int:
    """--jobs, by default one per core for the tiny pair on a CPU, and 1 for anything larger."""
    on_cpu = args.device == "cpu" and "RANK" not in os.environ
    if args.jobs is None:
        # torch counts the cores, or what OMP_NUM_THREADS allows. Each job takes about 1 GB.
        cores = torch.get_num_threads() if on_cpu and args.preset == "tiny" else 1
        return min(cores, 4, num_runs)
    if args.jobs > 1 and not on_cpu:
        parser.error(f"--jobs {args.jobs} is for runs on a CPU without torchrun: leave it out")
    return args.jobs


def check_together(
    parser: argparse.ArgumentParser, argv: list[str] | None, args: argparse.Namespace, runs: list[argparse.Namespace], arms: dict[str, dict]
) -> None:
    """Flags that contradict each other, ask for too much, or have no effect on any run. arms: the flags that each arm sets."""
    if args.p in (0, 1):
        parser.error(f"--p {args.p:g}: one of the two models would never write. p = 1 is standard RL: choose an arm such as solo")
    # The sweep goes on to as many seeds more, and above 999 the random numbers of training meet those of evaluations.
    last = args.seed + (2 if args.setting in ("sweep", "all") else 1) * args.seeds - 1
    if last > 999:
        parser.error(f"--seed {args.seed} --seeds {args.seeds}: the last seed would be {last}, and at most 999 is possible: lower one")
    for run in runs:
        group = run.rollouts_per_prompt
        if run.batch % group:
            parser.error(f"--batch {run.batch} is not divisible by --rollouts-per-prompt {group} (arm {run.arm})")
        if run.algorithm == "grpo" and group < 2:
            parser.error(f"--rollouts-per-prompt {group}: GRPO compares the rollouts of a prompt and needs two or more (arm {run.arm})")
        # Problems and prompts of a whole run are made before it begins.
        most = max(run.updates * run.batch, run.eval_problems, run.specialist_steps * run.specialist_batch)
        if most >= 10**6:
            parser.error(f"{most} problems per run are too many: lower --updates, --batch, --eval-problems or --specialist-steps")

    given = given_flags(parser, argv, args)
    # Of three flags an arm only has a default. Any other flag of an arm goes over the command line.
    defaults = ("updates", "eval_every", "eval_problems")
    useless = [flag for flag in given if flag not in defaults and all(flag in arms[run.arm] for run in runs)]
    useless += [flag for flag in given if flag in ALGORITHM_OF and all(run.algorithm != ALGORITHM_OF[flag] for run in runs)]
    if useless:
        flags = ", ".join(f"--{flag.replace('_', '-')}" for flag in useless)
        parser.error(f"{flags}: no effect on {', '.join(dict.fromkeys(run.arm for run in runs))}. Leave it out, or choose other --arms")
