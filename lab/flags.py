"""Command-line flags: every value is checked, and named with its remedy, before anything begins."""

import argparse
from argparse import Namespace

import torch

from lab.experiments import ARMS, LENGTHS, arms_of, flags_of_run
from lab.problems import GENERATED


def number(kind: type, low: float, high: float = 10**6):
    """An argparse type: a number from `low` to `high`."""

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high:  # refuses nan too
            raise argparse.ArgumentTypeError(f"{text}: must be from {low:g} to {high:g}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number
    return parse


def name(text: str) -> str:
    """An argparse type: text that is not empty and that can be printed."""
    if not text.strip() or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r}: give a name or a path")
    return text


def available_devices() -> list[str]:
    """The devices on which models can run here: "cpu", and perhaps "cuda", "cuda:0" and so on."""
    devices = ["cpu"]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        devices += [kind, *(f"{kind}:{i}" for i in range(torch.accelerator.device_count()))]
    return devices


def read_runs_of(parser: argparse.ArgumentParser, argv: list[str] | None) -> list[Namespace]:
    """The flags of every run that the command line asks for, or an exit with a message.

    Every run also knows the flags that are not its own: setting, preset, arms, seeds, jobs.
    """
    parser.set_defaults(device="cuda" if torch.cuda.is_available() else "cpu")
    parser.set_defaults(preset="tiny", seeds=1, out="runs", resume=False)
    given = vars(parser.parse_args(argv))
    known = arms_of(given["setting"])
    arms, on_cpu = given.setdefault("arms", known), given["device"] == "cpu"
    if len(set(arms) & set(known)) < len(arms):
        listed = f"name arms of --setting {given['setting']}, each once: {', '.join(known)}"
        parser.error(f"--arms {' '.join(arms)}: {listed}")
    # The tiny models gain nothing from a second thread, so each run gets a process of its own.
    tiny = {given["preset"], given.get("senior", "tiny"), given.get("junior", "tiny")} == {"tiny"}
    cores = min(4, torch.get_num_threads()) if on_cpu and tiny else 1
    if given.setdefault("jobs", cores) > 1 and not on_cpu:
        parser.error(f"--jobs {given['jobs']}: several runs at a time need --device cpu")
    runs = [flags_of_run(given, arm, seed) for seed in range(given["seeds"]) for arm in arms]
    check_together(parser, given, runs)
    return runs


def check_together(parser: argparse.ArgumentParser, given: dict, runs: list[Namespace]) -> None:
    """Flags that contradict each other, ask for too much, or are fixed by the arms."""
    if given.get("p") in (0, 1):
        parser.error(f"--p {given['p']:g}: one model would never write: choose an arm such as solo")
    for flag in given:
        if flag not in LENGTHS and all(flag in ARMS[arm] for arm in given["arms"]):
            of_arms = f"it is fixed by {', '.join(given['arms'])}: leave it out"
            parser.error(f"--{flag.replace('_', '-')}: {of_arms}, or choose other arms")
    for run in runs:
        group, solved = run.rollouts_per_prompt, run.specialist_steps * run.specialist_batch
        if run.batch % group:
            parser.error(f"--batch: {run.arm} has {run.batch} rollouts in groups of {group}")
        if max(run.updates * run.batch, solved, run.eval_problems) >= 10**6:
            remedy = "lower --updates, --batch, --specialist-steps or --eval-problems"
            parser.error(f"a million rollouts or problems per run are too many: {remedy}")
        if run.problems != GENERATED and run.senior_language != "en" and run.specialist_steps:
            reason = f"no {run.senior_language} specialist can be made of their English solutions"
            remedy = f"add --specialist-steps 0, or leave out {run.arm}"
            parser.error(f"--problems {run.problems}: {reason}: {remedy}")
        if run.arm.startswith("rlvr") and run.senior != run.junior:
            parser.error(f"arm {run.arm} starts from one model: --junior must equal --senior")
