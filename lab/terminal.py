"""What a command prints while it trains, and at its end:

    Runs (2, 2 at a time): tandem from update 0 to 28, solo from update 12 to 28
    Results go to <arm>/seed-<k>/ and figures/ in runs

                                        senior alone     together
    arm                       update   right  jargon        right   min left
    tandem                         4    72 %    81 %         51 %          2
    tandem 6/28  solo 15/28  about 2 min left

There is a row per evaluation; metrics.jsonl has all numbers of all updates. The last line is drawn
on a terminal only, again and again. Only the parent process prints: lab/jobs.py.
"""

import math
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from textwrap import fill

from lab import figures, tables
from lab.runs import last_update, why_it_diverged

WIDTH = min(79, shutil.get_terminal_size().columns - 1)  # of every line but the rows

parent = None  # in a worker: the queue to its parent process
updates_left: dict[str, int] = {}  # of every run
running: dict[str, str] = {}  # what the line of progress says of every run in progress
durations: list[float] = []  # seconds of every update


def name_of(args: Namespace) -> str:
    return args.arm if args.seeds == 1 else f"{args.arm} seed {args.seed}"


def show(name: str, done: int, total: int, seconds: float = 0.0, line: str = "") -> None:
    """Show that `name` has done so many of its updates or steps. seconds: those of this update."""
    if parent:
        parent.put((name, done, total, seconds, line))
        return
    running[name] = f"{name} {done}/{total}"
    if done == total:
        del running[name]
    if name in updates_left:
        updates_left[name] = total - done
    if seconds:
        durations.append(seconds)
    # Roughly, as if all updates took equally long.
    left = mean(durations or [0]) * sum(updates_left.values()) / max(1, len(running))
    minutes = math.ceil(left / 60)
    draw("")
    if line:
        print(f"{line}{minutes:11}" if seconds else line, flush=True)
    end = f"  about {minutes} min left" if durations and running else ""
    draw("  ".join(running.values())[: WIDTH - len(end)] + end)


def draw(text: str) -> None:
    """Draw the line of progress. What is printed next goes over it."""
    if os.isatty(2):
        print(f"{text:{WIDTH}}", end="\r", file=sys.stderr, flush=True)


def log_row(row: dict, args: Namespace) -> None:
    """Show that an update is done, and its evaluation if it has one."""
    name, update, line, seconds = name_of(args), row["update"], "", 0.0
    if "eval" in row:
        senior, together = row["eval"]["senior"], row["eval"]["tandem"]
        line = f"{name:24}{update:8}{100 * senior['accuracy']:6.0f} %"
        line += f"{100 * senior['jargon']:6.0f} %{100 * together['accuracy']:11.0f} %"
    if update > 0:
        # Update 0 is an evaluation only, and says nothing of how long the others take.
        seconds = sum(row[key] for key in row if key.startswith("seconds"))
    show(name, update, args.updates, seconds, line)


def announce(left: list[Namespace], jobs: int) -> None:
    """What will run, and where it writes. Its duration is known only after the first updates."""
    spans = []
    for args in left:
        start = max(last_update(args), 0)
        updates_left[name_of(args)] = args.updates - start
        spans.append(f"{name_of(args)} from update {start} to {args.updates}")
    text = f"Runs ({len(left)}, {jobs} at a time): {', '.join(spans)}"
    print(fill(text, WIDTH, max_lines=5, placeholder=" ...", break_on_hyphens=False))
    print(f"Results go to <arm>/seed-<k>/ and figures/ in {args.out}")
    if steps := max(args.specialist_steps for args in left):
        print(f"A new senior is first fine-tuned for {steps} steps.")
    print("\n                                    senior alone     together")
    print("arm                       update   right  jargon        right   min left", flush=True)


def print_outcomes(todo: list[Namespace]) -> None:
    """One line per arm: what the evaluations say before and after training, over all its seeds."""
    arms = {args.arm: args for args in todo}
    for arm, runs in tables.read_runs(todo[0].out, arms).groupby("arm", sort=False):
        numbers = {"jargon": ("senior", "jargon"), "right alone": ("senior", "accuracy")}
        numbers["right together"] = ("tandem", "accuracy")
        if arms[arm].junior_language != arms[arm].senior_language:
            language = f"languages.{arms[arm].junior_language}"
            numbers["in the junior's language"] = ("senior", language)
        shares = {name: tables.pooled(runs, *number).value for name, number in numbers.items()}
        changes = [f"{name} {s.iloc[0]:.0f} -> {s.iloc[-1]:.0f} %" for name, s in shares.items()]
        print(fill(f"{arm}: {', '.join(changes)}", WIDTH, subsequent_indent="  "))


def finish(todo: list[Namespace], settings: Iterable[str]) -> None:
    """Say what has come out, draw the figures, and exit with 1 if training diverged somewhere."""
    print()
    print_outcomes(todo)
    out = Path(todo[0].out)
    reasons = [reason for args in todo if (reason := why_it_diverged(args))]
    try:
        figures.draw_all(out, settings)
        print(f"Open {out}/figures/rollouts.html (who wrote what) and the figures beside it.")
    except Exception as error:
        # The runs are safe, whatever matplotlib cannot do here, such as start LaTeX.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        reasons += [f"error: all runs are finished, but {out}/figures cannot be drawn ({reason})"]
    if reasons:
        sys.exit("\n".join(reasons))
