"""Run folders: what a run leaves on disk, how it is resumed, and the lines that it prints.

    RUNS/<arm>/seed-<k>/config.json      every flag, versions, device, commit
                        metrics.jsonl    one row per update, appended and flushed
                        samples.jsonl    evaluation rollouts, with the author of every span of text
                        adapter/         the senior, as an adapter that PeftModel.from_pretrained loads
                        state.pt         what --resume needs: adapter, optimizer, the number of the last update
                        stopped.txt      only where training diverged: why

An interrupted run is resumed from state.pt, which is written last. If it is interrupted after a row is appended and before
state.pt is saved, the resumed run appends that row again, and the last line of a file may be incomplete. Files are never
rewritten for that: read_rows skips what is incomplete and keeps the last version of each row.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from shutil import which

import torch
from peft import set_peft_model_state_dict
from tqdm import tqdm

from lab import models, parallel

# Flags that may differ between a run and its --resume: what else to run and how long, where, and what is in memory at a
# time, which changes results by rounding only.
MAY_CHANGE = {"setting", "arms", "seeds", "updates", "resume", "out", "device", "memory", "rollout_batch", "micro_tokens", "checkpointing"}


def run_folder(args: argparse.Namespace) -> Path:
    return Path(args.out) / args.arm / f"seed-{args.seed}"


# ----------------------------------------------------------------------------------------------------------------------
# Rows and samples


def append_rows(path: Path, rows: Iterable[dict]) -> None:
    if parallel.is_main():
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl or samples.jsonl in the order of their updates, the last version of each."""
    rows = {}
    # Not splitlines, which also splits at rarer characters that a model may write.
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:
            # An empty line, or one that was cut off when the run was interrupted.
            continue
        # Rows of metrics.jsonl have only the first of these keys.
        rows[row["update"], row.get("who"), row.get("question")] = row
    return sorted(rows.values(), key=lambda row: row["update"])


# ----------------------------------------------------------------------------------------------------------------------
# Begin, save, resume


def check_folder(args: argparse.Namespace) -> None:
    """Raises ValueError rather than write over a run, or resume it with other flags or on another base."""
    folder, config = run_folder(args), run_folder(args) / "config.json"
    if folder.exists() and not args.resume:
        raise ValueError(f"{folder} already holds a run: continue it with --resume, choose another --out, or remove it")
    if (folder / "metrics.jsonl").is_file() and not (folder / "state.pt").is_file():
        raise ValueError(f"{folder} holds rows but no state.pt to resume from: choose another --out, or remove it")
    if config.is_file():
        before = json.loads(config.read_text())["flags"]
        changed = [name for name in before if name not in MAY_CHANGE and before[name] != getattr(args, name, None)]
        if changed:
            flags = ", ".join(f"{name.replace('_', '-')} = {before[name]}" for name in changed)
            raise ValueError(f"{folder} was begun with {flags}: resume it with the same, or choose another --out")


def write_config(args: argparse.Namespace) -> None:
    """config.json: every flag, and what tells one machine's run from another's, as of the last start of the run."""
    folder = run_folder(args)
    if parallel.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"flags": vars(args), **describe_machine(args.device)}, indent=2) + "\n")
        # A last line that was cut off must not swallow the next one. Readers skip empty lines.
        for path in folder.glob("*.jsonl"):
            with open(path, "a") as file:
                file.write("\n")


def describe_machine(device: str) -> dict:
    on_cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "numpy", "tokenizers")}
    name = torch.cuda.get_device_name() if device.startswith("cuda") else on_cpu
    return {"device": name, "python": platform.python_version(), "versions": versions, "commit": COMMIT}


# The commit of this code, with "-dirty" if files differ from it; None without git. Read at import, because files may change
# during a long run.
_GIT = "git describe --always --dirty --abbrev=40 --exclude=*".split()
COMMIT = subprocess.run(_GIT, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip() or None if which("git") else None


def save_atomically(content: dict, path: Path) -> None:
    """Write a file of tensors that is either complete or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    torch.save(content, draft)
    os.replace(draft, path)


def save_checkpoint(folder: Path, update: int, senior, optimizer) -> None:
    """The adapter and, last of all, the state after an update: an interruption leaves the state of the update before."""
    if parallel.is_main():
        senior.save_pretrained(folder / "adapter", save_embedding_layers=False)
        state = {"update": update, "adapter": models.adapter_state(senior), "optimizer": optimizer.state_dict()}
        save_atomically(state, folder / "state.pt")


def load_checkpoint(folder: Path, senior, optimizer) -> int | None:
    """Load the last state, if there is one, and return the number of its update."""
    if not (folder / "state.pt").is_file():
        return None
    # To the CPU first: from there every tensor goes to the device of its parameter.
    state = torch.load(folder / "state.pt", map_location="cpu")
    set_peft_model_state_dict(senior, state["adapter"])
    optimizer.load_state_dict(state["optimizer"])
    return state["update"]


def is_finished(args: argparse.Namespace) -> bool:
    """Whether the last update of a run is on disk, or its training diverged."""
    state, stopped = run_folder(args) / "state.pt", run_folder(args) / "stopped.txt"
    return stopped.is_file() or (state.is_file() and torch.load(state, map_location="cpu")["update"] >= args.updates)


# ----------------------------------------------------------------------------------------------------------------------
# Several runs, one after the other


class Diverged(Exception):
    """Training diverged. The last checkpoint is kept."""


def check_divergence(row: dict, args: argparse.Namespace, vocab_size: int) -> None:
    """Raises Diverged before a step that is not finite, or if wrong rollouts have become too unlikely (c < 0).

    With c < 0 the log-probability of wrong rollouts can fall without bound. We stop when its mean per token is below that
    of a uniform distribution, -log V.
    """
    reason, wrong = None, row["logprob_wrong"]
    if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
        reason = f"loss {row['loss']}, gradient norm {row['grad_norm']}"
    elif args.wrong_weight < 0 and wrong is not None and wrong < -math.log(vocab_size):
        reason = f"wrong rollouts are pushed away without bound ({wrong:.1f} nats per token)"
    if reason:
        kept = f"The last checkpoint, after update {row['update'] - 1}, is kept in {run_folder(args)}"
        remedy = "Start again in another --out with a smaller --lr, or a --wrong-weight nearer to 0"
        raise Diverged(f"update {row['update']}: {reason}. {kept}. {remedy}")


def run_all(runs: list[argparse.Namespace], train: Callable[[argparse.Namespace], None]) -> list[str]:
    """Train every run that is not finished, and say how long the rest will take. Returns the messages of all diverged runs."""
    todo, started = [args for args in runs if not is_finished(args)], time.time()
    for done, args in enumerate(todo, 1):
        try:
            train(args)
        except (Diverged, FloatingPointError) as error:
            metrics = run_folder(args) / "metrics.jsonl"
            when = f"after update {read_rows(metrics)[-1]['update']}" if metrics.is_file() else "before the first evaluation"
            reason = f"{run_folder(args)}, {when}: {error}"
            print(reason)
            if parallel.is_main():
                (run_folder(args) / "stopped.txt").write_text(f"{reason}\n")
        minutes = (time.time() - started) / done * (len(todo) - done) / 60
        print(f"{done} of {len(todo)} runs finished, about {minutes:.0f} minutes left\n")
    reasons = [run_folder(args) / "stopped.txt" for args in runs]
    return [path.read_text().strip() for path in reasons if path.is_file()]


# ----------------------------------------------------------------------------------------------------------------------
# What a run prints


def log_row(row: dict) -> None:
    """One line per update."""
    line = f"{row['update']:6d}  "
    if "reward" in row:
        # Update 0 has no rollouts, only an evaluation.
        line += f"reward {row['reward']:.2f}  senior's share {row['senior_share']:4.0%}  handoffs {row['handoffs']:4.1f}  "
        learned = row["loss"] is not None
        line += f"loss {row['loss']:+.3f}  gradient {row['grad_norm']:.3f}  " if learned else "no rollout to learn from: skipped  "
        line += f"{row['tokens']} tokens  {row['seconds_rollout']:.1f} + {row['seconds_update']:.1f} s"
    for who, evaluation in row.get("eval", {}).items():
        line += f" | {who} accuracy {evaluation['accuracy']:.2f} jargon {evaluation['jargon']:.2f}"
    tqdm.write(line)


def log_rollout(spans: list[tuple[str, str]]) -> None:
    """One rollout on one line, the junior's words underlined on a terminal and in [brackets] elsewhere."""
    opening, closing = ("\033[4m", "\033[0m") if sys.stdout.isatty() else ("[", "]")
    text = "".join(text if author == "senior" else f"{opening}{text}{closing}" for author, text in spans)
    tqdm.write(f"         {text}".replace("\n", " ⏎ "))
