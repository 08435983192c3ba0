"""Run folders: what a run leaves on disk, how it is resumed, and the lines that it prints.

    RUNS/<arm>/seed-<k>/config.json      every flag, versions, device, commit
                        metrics.jsonl    one row per update, appended and flushed
                        samples.jsonl    evaluation rollouts, with the author of every span of text; joint ones step by step
                        adapter/         the senior, as an adapter that PeftModel.from_pretrained loads
                        state.pt         what --resume needs: adapter, optimizer, the number of the last update
                        stopped.txt      only where training diverged: why

An interrupted run is resumed from state.pt, which is saved before the first row and after every row. If a run is interrupted
in between, the resumed run appends that row again, and the last line of a file may be incomplete. Files are never rewritten
for that: read_rows skips what is incomplete and keeps the last version of each row. All other files are replaced as a whole.

While a run is being written, its metrics.jsonl is locked, so that two processes never write to one folder. Whatever is read
back is checked first, and nothing in it is run. What is wrong is Refused with the path and a remedy.
"""

import argparse
import io
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from shutil import which

import torch
from peft import set_peft_model_state_dict
from safetensors import SafetensorError
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from lab import models, parallel

if os.name == "posix":
    import fcntl

# Flags that may differ between a run and its --resume: what else to run and how long, where, and what is in memory at a
# time, which changes results by rounding only.
MAY_CHANGE = {"setting", "arms", "seeds", "updates", "resume", "out", "jobs", "device"}
MAY_CHANGE |= {"memory", "rollout_batch", "micro_tokens", "checkpointing"}
# Files that are replaced as a whole, each by way of a draft next to it, such as state.pt.1234.
REPLACED = {"config.json", "state.pt", "stopped.txt", "adapter.pt"}


class Refused(ValueError):
    """A folder or file that a run cannot use. The message names its path and a remedy."""


def run_folder(args: argparse.Namespace) -> Path:
    return Path(args.out) / args.arm / f"seed-{args.seed}"


def seed_folders(folder: str | Path, arm: str) -> list[Path]:
    """The folders seed-<k> of an arm in the order of k. Others, such as "seed-0 (copy)", do not count."""
    found = [path for path in Path(folder, arm).glob("seed-*") if re.fullmatch("seed-[0-9]+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("seed-")))


# ----------------------------------------------------------------------------------------------------------------------
# Rows and samples


def append_rows(path: Path, rows: Iterable[dict]) -> None:
    if parallel.is_main():
        with writing(path), open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl or samples.jsonl in the order of their updates, the last version of each.

    Raises Refused for a line that is JSON, but not a row.
    """
    rows = {}
    # Not splitlines, which also splits at rarer characters that a model may write.
    for i, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            row = json.loads(line)
            if int(row["update"]) != row["update"]:
                raise TypeError(f"{row['update']!r} is not the number of an update")
            # Rows of metrics.jsonl have only the first of these keys.
            rows[row["update"], row.get("who"), row.get("question")] = row
        except (ValueError, OverflowError, RecursionError):
            # An empty line, or one that was cut off when the run was interrupted.
            continue
        except (KeyError, TypeError, AttributeError) as error:
            raise unusable(path, f"line {i} is not a row of a run") from error
    return sorted(rows.values(), key=lambda row: row["update"])


# ----------------------------------------------------------------------------------------------------------------------
# Begin, save, resume


@contextmanager
def locked(runs: list[argparse.Namespace]) -> Iterator[None]:
    """Lock and check the folder of every run, and try to write there, before anything long.

    A second process at one of these folders is Refused. The kernel drops the locks of a process that dies.
    """
    with ExitStack() as files:
        # With several processes, the first one writes for all.
        for args in runs if parallel.is_main() else []:
            folder = run_folder(args)
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                # The file of the rows is the lock, because it is only ever appended to.
                lock(files.enter_context(open(folder / "metrics.jsonl", "ab")), folder)
                # Is there room for a draft of 1 MiB? It is removed together with those that killed processes have left.
                (folder / f"state.pt.{os.getpid()}").write_bytes(bytes(2**20))
                for path in folder.iterdir():
                    if path.stem in REPLACED and path.suffix[1:].isdecimal():
                        path.unlink()
            check_folder(args)
        yield


def lock(file, folder: Path) -> None:
    """Lock an open file until it is closed. Without locks, on Windows and on some file systems, this does nothing."""
    try:
        if os.name == "posix":
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise Refused(f"{folder} is being written by another process: wait until it has ended, or choose another --out") from error
    except OSError:
        pass


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other process is in this block for the same folder. Without locks this does nothing."""
    if os.name != "posix" or not parallel.is_main():
        yield
        return
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def check_folder(args: argparse.Namespace) -> None:
    """Raises Refused rather than write over a run, resume it with other flags or on another base, or resume half of it."""
    folder = run_folder(args)
    state, rows = folder / "state.pt", read_rows(folder / "metrics.jsonl")
    # A start that was interrupted before it wrote anything has left an empty file.
    written = any(path.is_dir() or path.stat().st_size for path in folder.iterdir())
    if written and not args.resume:
        raise Refused(f"{folder} already holds a run: continue it with --resume, choose another --out, or remove it")
    # State comes before rows (save_checkpoint), so these are the results of a run whose state was not kept, as in a clone.
    if rows and not state.is_file():
        raise Refused(f"{folder} holds rows but no state.pt to resume from: choose another --out, or remove it")
    before = read_back(folder / "config.json", flags=dict)["flags"] if written else {}
    changed = [name for name in before if name not in MAY_CHANGE and before[name] != getattr(args, name, None)]
    if changed:
        flags = ", ".join(f"{name.replace('_', '-')} = {before[name]}" for name in changed)
        raise Refused(f"{folder} was begun with {flags}: resume it with the same, or choose another --out")
    last = read_back(state, **STATE)["update"] if state.is_file() else -1
    if [row["update"] for row in rows if row["update"] <= last] != list(range(last + 1)):
        raise unusable(folder / "metrics.jsonl", f"it lacks some of the rows of updates 0 to {last}, which is that of state.pt")


def write_config(args: argparse.Namespace) -> None:
    """config.json: every flag, and what tells one machine's run from another's, as of the last start of the run."""
    folder = run_folder(args)
    if parallel.is_main():
        config = {"flags": vars(args), **describe_machine(args.device)}
        replace_file(folder / "config.json", f"{json.dumps(config, indent=2)}\n".encode())
        # A last line that was cut off must not swallow the next one.
        for path in folder.glob("*.jsonl") if args.resume else []:
            with open(path, "rb+") as file:
                if file.read()[-1:] not in (b"", b"\n"):
                    file.write(b"\n")


def describe_machine(device: str) -> dict:
    on_cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "numpy", "tokenizers")}
    name = torch.cuda.get_device_name() if device.startswith("cuda") else on_cpu
    return {"device": name, "python": platform.python_version(), "versions": versions, "commit": COMMIT}


# The commit of this code, with "-dirty" if files differ from it; None without git. Read at import, because files may change
# during a long run.
_GIT = "git describe --always --dirty --abbrev=40 --exclude=*".split()
COMMIT = subprocess.run(_GIT, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip() or None if which("git") else None


# What a state consists of.
STATE = {"update": int, "adapter": dict, "optimizer": dict}


def save_checkpoint(folder: Path, update: int, senior, optimizer) -> None:
    """The adapter and, last of all, the state after an update: an interruption leaves the state of the update before."""
    if parallel.is_main():
        with writing(folder / "adapter"):
            senior.save_pretrained(folder / "adapter", save_embedding_layers=False)
        state = {"update": update, "adapter": models.adapter_state(senior), "optimizer": optimizer.state_dict()}
        save_tensors(state, folder / "state.pt")


def load_checkpoint(folder: Path, senior, optimizer) -> int:
    """Load the last state and return the number of its update: -1 before the first row.

    The state of update -1 is saved here, so that there is always a state to resume from: rows without a state are those of
    a clone.
    """
    if not (folder / "state.pt").is_file():
        save_checkpoint(folder, -1, senior, optimizer)
    parallel.barrier()
    # On the CPU: from there every tensor goes to the device of its parameter.
    state = read_back(folder / "state.pt", **STATE)
    load_adapter(senior, state["adapter"], folder / "state.pt")
    optimizer.load_state_dict(state["optimizer"])
    return state["update"]


def load_adapter(senior, adapter: dict, path: Path) -> None:
    """Give the senior an adapter that was read from `path`. Raises Refused unless it has exactly the senior's tensors."""
    found, expected = ({name: tensor.shape for name, tensor in state.items()} for state in (adapter, models.adapter_state(senior)))
    if found != expected:
        raise unusable(path, f"{len(found.items() ^ expected.items())} tensors are missing, additional or of another shape")
    set_peft_model_state_dict(senior, adapter)


def is_finished(args: argparse.Namespace) -> bool:
    """Whether the last update of a run is on disk, or its training diverged."""
    state, stopped = run_folder(args) / "state.pt", run_folder(args) / "stopped.txt"
    return stopped.is_file() or (state.is_file() and read_back(state, **STATE)["update"] >= args.updates)


# ----------------------------------------------------------------------------------------------------------------------
# Files that are written as a whole and read back


def save_tensors(content: dict, path: Path, draft_folder: Path | None = None) -> None:
    """Write a file of tensors. Raises Refused, and keeps the file as it was, if a number is not finite."""
    file = io.BytesIO()
    torch.save(content | {"tensors": count_tensors(content, path)}, file)
    replace_file(path, file.getvalue(), draft_folder)


def count_tensors(content, path: Path) -> int:
    """The number of tensors in nested dictionaries and lists. Raises Refused if one of them is not finite."""
    tensors = [leaf for leaf in tree_leaves(content) if isinstance(leaf, torch.Tensor)]
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise Refused(f"{path}: its numbers are not finite. Start again in another --out with a smaller --lr or --specialist-lr")
    return len(tensors)


def replace_file(path: Path, content: bytes, draft_folder: Path | None = None) -> None:
    """Write a file that is either complete or not there. The draft is next to it, or else in a run folder that is locked."""
    draft = (draft_folder or path.parent) / f"{path.name}.{os.getpid()}"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(content)
        os.replace(draft, path)


def read_back(path: Path, **types: type) -> dict:
    """A config.json, or a file of save_tensors on the CPU. Raises Refused unless it is complete and finite.

    types: the keys that it must have, and the types of their values. Code in it is not run.
    """
    try:
        content = json.loads(path.read_bytes()) if path.suffix == ".json" else torch.load(path, map_location="cpu", weights_only=True)
        complete = all(isinstance(content.get(key), kind) for key, kind in types.items())
    except Exception as error:
        # torch.load fails in many ways, all with the same remedy.
        raise unusable(path, type(error).__name__) from error
    count = count_tensors(content, path)
    if not complete or content.get("tensors", count) != count:
        raise unusable(path, "it is incomplete")
    return content


def unusable(path: Path, reason: str) -> Refused:
    return Refused(f"{path} cannot be used ({reason}): restore it from a copy, or remove {path.parent} to make it anew")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name path and remedy if something cannot be written, for instance because the disk is full."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise Refused(f"cannot write {path} ({error}): make room or give rights and use --resume, or choose another --out") from error


# ----------------------------------------------------------------------------------------------------------------------
# Several runs


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


# A batch of few coins may be one-sided by chance, but not as many as this in a row.
MOST_ONE_SIDED = 5


def check_both_wrote(row: dict, args: argparse.Namespace) -> None:
    """Stop a tandem run in which one model writes whole batches alone: it would silently be another method."""
    if not args.solo and row["senior_share"] in (0, 1):
        # The rows of the updates before are on disk, also after --resume.
        before = [old for old in read_rows(run_folder(args) / "metrics.jsonl") if old["update"] < row["update"]]
        shares = [old.get("senior_share") for old in [*before, row][-MOST_ONE_SIDED:]]
        if shares == [row["senior_share"]] * MOST_ONE_SIDED:
            share = f"the senior wrote {row['senior_share']:.0%} of the tokens of {MOST_ONE_SIDED} tandem batches in a row"
            sys.exit(f"update {row['update']}: {share}. This is not tandem training: check --p, --handoff and --batch")


def run_all(runs: list[argparse.Namespace], train: Callable[[argparse.Namespace], None], jobs: int = 1) -> list[str]:
    """Train every run that is not finished, `jobs` at a time. Returns the messages of all diverged runs."""
    todo, started = [args for args in runs if not is_finished(args)], time.time()
    try:
        for done, _ in enumerate(parallel.for_each(train, todo, max(1, min(jobs, len(todo)))), 1):
            minutes = (time.time() - started) / done * (len(todo) - done) / 60
            print(f"{done} of {len(todo)} runs finished, about {minutes:.0f} minutes left\n")
    except BrokenProcessPool as error:
        raise Refused("a process of --jobs was killed, perhaps for want of memory: continue with --resume and fewer --jobs") from error
    reasons = [run_folder(args) / "stopped.txt" for args in runs]
    return [path.read_text(encoding="utf-8", errors="replace").strip() for path in reasons if path.is_file()]


def ends_if_it_diverges(train: Callable) -> Callable:
    """Decorate the training of a run: if it diverges, stopped.txt says why, and the other runs go on."""

    @wraps(train)
    def to_its_end(args: argparse.Namespace, *rest, **options) -> None:
        try:
            train(args, *rest, **options)
        except (Diverged, FloatingPointError) as error:
            rows = read_rows(run_folder(args) / "metrics.jsonl")
            when = f"after update {rows[-1]['update']}" if rows else "before the first evaluation"
            reason = f"{run_folder(args)}, {when}: {error}"
            print(reason)
            if parallel.is_main():
                replace_file(run_folder(args) / "stopped.txt", f"{reason}\n".encode())

    return to_its_end


# ----------------------------------------------------------------------------------------------------------------------
# What a run prints


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """End the program with one line if a folder or file is Refused, or at Ctrl-C, when a shell expects the exit code 130."""
    try:
        yield
    except Refused as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted: the same command with --resume goes on after the last update that was saved", file=sys.stderr)
        sys.exit(130)


def log_row(row: dict, arm: str) -> None:
    """One line per update."""
    line = f"{arm} {row['update']:4d}  "
    if "reward" in row:
        # Update 0 has no rollouts, only an evaluation.
        line += f"reward {row['reward']:.2f}  senior's share {row['senior_share']:4.0%}  handoffs {row['handoffs']:4.1f}  "
        learned = row["loss"] is not None
        line += f"loss {row['loss']:+.3f}  gradient {row['grad_norm']:.3f}  " if learned else "no rollout to learn from: skipped  "
        line += f"{row['tokens']} tokens  {row['seconds_rollout']:.1f} + {row['seconds_update']:.1f} s"
    for who, evaluation in row.get("eval", {}).items():
        line += f" | {who} accuracy {evaluation['accuracy']:.2f} jargon {evaluation['jargon']:.2f}"
    tqdm.write(line)


def log_rollout(spans: list[tuple[str, str]], arm: str) -> None:
    """One rollout on one line, the junior's words underlined on a terminal and in [brackets] elsewhere."""
    opening, closing = ("\033[4m", "\033[0m") if sys.stdout.isatty() else ("[", "]")
    text = "".join(text if author == "senior" else f"{opening}{text}{closing}" for author, text in spans)
    tqdm.write(f"{arm}       {text}".replace("\n", " ⏎ "))
