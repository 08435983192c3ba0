"""Run folders: what a run leaves on disk, how it is resumed, and the lines that it prints.

    OUT/<arm>/seed-<k>/config.json      every flag, versions, device, commit
                       metrics.jsonl    one row per update, appended and flushed
                       samples.jsonl    evaluation rollouts, with the author of every span of text
                       adapter/         the senior, which PeftModel.from_pretrained loads
                       state.pt         what --resume needs
                       stopped.txt      only where training diverged: why

state.pt is saved before the first row and after every row. If a run is killed in between, the
resumed run appends that row again, and the last line of a file may be torn. Files are never
rewritten for that: read_rows skips a torn line and keeps the last version of each row.
"""

import io
import json
import math
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from functools import wraps
from importlib.metadata import version
from multiprocessing.connection import wait
from operator import index
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

# Flags that may differ between a run and its --resume: what else to run and how long, where, and
# what is in memory at a time, which changes results by rounding only.
MAY_CHANGE = {"setting", "arms", "seeds", "updates", "resume", "out", "jobs", "device"}
MAY_CHANGE |= {"rollout_batch", "micro_tokens", "checkpointing"}


class Refused(ValueError):
    """A folder or file that a run cannot use. The message names its path and a remedy."""


class Diverged(Exception):
    """Training diverged. The last checkpoint is kept."""


def run_folder(args: Namespace) -> Path:
    return Path(args.out) / args.arm / f"seed-{args.seed}"


def seed_folders(folder: str | Path, arm: str) -> list[Path]:
    """The folders seed-<k> of an arm in the order of k. Others, "seed-0 (copy)", do not count."""
    found = [path for path in Path(folder, arm).glob("seed-*") if path.name[5:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[5:]))


# ------------------------------------------------------------------------------------------------
# Reading and writing


def append_rows(path: Path, rows: Iterable[dict]) -> None:
    with writing(path), open(path, "ab+") as file:
        # A last line that was torn must not swallow the next one.
        size = file.seek(0, os.SEEK_END)
        torn = size and (file.seek(size - 1), file.read(1))[1] != b"\n"
        lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]
        file.write(b"\n" * bool(torn) + b"".join(lines))


def read_rows(path: Path) -> list[dict]:
    """The rows of a .jsonl file in the order of their updates, the last version of each.

    Lines that are no JSON, such as a torn one, are skipped. Raises Refused for any other line that
    is no row.
    """
    rows = {}
    for i, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        try:
            # Rows of metrics.jsonl have only the first of these keys.
            rows[index(row["update"]), row.get("who"), row.get("question")] = row
        except (KeyError, TypeError, AttributeError) as error:
            raise unusable(path, f"line {i} is not a row of a run") from error
    return sorted(rows.values(), key=lambda row: row["update"])


def save_tensors(content: dict, path: Path) -> None:
    """Write a file of tensors as a whole. Raises Refused, and keeps the file, if one is NaN."""
    tensors = [leaf for leaf in tree_leaves(content) if isinstance(leaf, torch.Tensor)]
    if not all(tensor.isfinite().all() for tensor in tensors):
        remedy = "start again in another --out with a smaller learning rate"
        raise Refused(f"{path}: its numbers are not finite: {remedy}")
    file = io.BytesIO()
    torch.save(content, file)
    replace_file(path, file.getvalue())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file that is either complete or as it was before."""
    draft = path.with_name(f"{path.name}.draft")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(content)
        os.replace(draft, path)


def read_back(path: Path, **types: type) -> dict:
    """A .json file or one of save_tensors, on the CPU. Code in it is not run.

    types: the keys that it must have, with the types of their values, else it is Refused.
    """
    try:
        if path.suffix == ".json":
            content = json.loads(path.read_bytes())
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
        complete = all(isinstance(content[key], kind) for key, kind in types.items())
    except Exception as error:
        # torch.load fails in many ways, all with the same remedy.
        raise unusable(path, type(error).__name__) from error
    if not complete:
        raise unusable(path, "it is incomplete")
    return content


def unusable(path: Path, reason: str) -> Refused:
    remedy = f"restore it from a copy, or remove {path.parent} to make it anew"
    return Refused(f"{path} cannot be used ({reason}): {remedy}")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name path and remedy if something cannot be written, as on a full disk."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        remedy = "make room or give rights and use --resume, or choose another --out"
        raise Refused(f"cannot write {path} ({error}): {remedy}") from error


# ------------------------------------------------------------------------------------------------
# Begin, save, resume


@contextmanager
def locked(todo: list[Namespace]) -> Iterator[None]:
    """Lock and check the folder of every run, before anything long. Locks die with the process."""
    with ExitStack() as locks:
        for args in todo:
            folder = run_folder(args)
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                try:
                    locks.enter_context(FileLock(folder / ".lock", timeout=0))
                except Timeout as error:
                    remedy = "wait until it has ended, or choose another --out"
                    raise Refused(f"{folder} is written by another process: {remedy}") from error
            check_folder(args)
        yield


def check_folder(args: Namespace) -> None:
    """Raises Refused rather than write over a run, or resume it with other flags or no state."""
    folder = run_folder(args)
    metrics, state = folder / "metrics.jsonl", folder / "state.pt"
    rows = read_rows(metrics) if metrics.is_file() else []
    if not (folder / "config.json").is_file() and not rows and not state.is_file():
        return
    if not args.resume:
        remedy = "continue it with --resume, choose another --out, or remove it"
        raise Refused(f"{folder} already holds a run: {remedy}")
    if rows and not state.is_file():
        # The results of a run whose state was not kept, as in a clone.
        remedy = "choose another --out, or remove it"
        raise Refused(f"{folder} holds rows but no state.pt to resume from: {remedy}")
    before, now = read_back(folder / "config.json", flags=dict)["flags"], vars(args)
    changed = [flag for flag in before.keys() & now if before[flag] != now[flag]]
    if changed := sorted(set(changed) - MAY_CHANGE):
        flags = ", ".join(f"{flag.replace('_', '-')} = {before[flag]}" for flag in changed)
        remedy = "resume it with the same, or choose another --out"
        raise Refused(f"{folder} was begun with {flags}: {remedy}")
    last = read_back(state, update=int)["update"] if state.is_file() else -1
    if [row["update"] for row in rows if row["update"] <= last] != list(range(last + 1)):
        raise unusable(metrics, f"it lacks some of the updates 0 to {last} of state.pt")


def begin(args: Namespace, senior, optimizer) -> tuple[int, dict]:
    """Write config.json and load the last state: (its update, what the loop kept).

    Before the first row that is -1 and nothing. The state of update -1 is saved here, so that rows
    without a state are always those of a clone.
    """
    if multiprocessing.parent_process():
        # One of several jobs. Until here, while the others wait for the specialist that it makes,
        # this process could use all cores.
        torch.set_num_threads(1)
    folder = run_folder(args)
    config = {"flags": vars(args), **describe_machine(args.device)}
    replace_file(folder / "config.json", f"{json.dumps(config, indent=2)}\n".encode())
    if not (folder / "state.pt").is_file():
        save_state(args, -1, senior, optimizer, {})
    state = read_back(folder / "state.pt", update=int, adapter=dict, optimizer=dict, kept=dict)
    load_adapter(senior, state["adapter"], folder / "state.pt")
    optimizer.load_state_dict(state["optimizer"])
    return state["update"], state["kept"]


def save(row: dict, args: Namespace, senior, optimizer, kept: dict) -> None:
    """Append the row of an update and, last of all, save the state after it."""
    append_rows(run_folder(args) / "metrics.jsonl", [row])
    save_state(args, row["update"], senior, optimizer, kept)


def save_state(args: Namespace, update: int, senior, optimizer, kept: dict) -> None:
    folder = run_folder(args)
    with writing(folder / "adapter"):
        senior.save_pretrained(folder / "adapter", save_embedding_layers=False)
    state = {"update": update, "adapter": adapter_state(senior), "kept": kept}
    save_tensors(state | {"optimizer": optimizer.state_dict()}, folder / "state.pt")


def adapter_state(senior) -> dict[str, torch.Tensor]:
    # The default, save_embedding_layers="auto", would ask the hub about the base at every call.
    return get_peft_model_state_dict(senior, save_embedding_layers=False)


def load_adapter(senior, adapter: dict, path: Path) -> None:
    """Give the senior an adapter read from `path`, Refused unless it has exactly its tensors."""
    expected = {name: tensor.shape for name, tensor in adapter_state(senior).items()}
    if {name: getattr(tensor, "shape", None) for name, tensor in adapter.items()} != expected:
        raise unusable(path, "tensors are missing, additional or of another shape")
    set_peft_model_state_dict(senior, adapter)


def describe_machine(device: str) -> dict:
    on_cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "numpy")}
    about = {"device": torch.cuda.get_device_name() if device.startswith("cuda") else on_cpu}
    return about | {"python": platform.python_version(), "versions": versions, "commit": COMMIT}


def _commit() -> str | None:
    """The commit of this code, with "-dirty" if files differ from it; None without git."""
    command = "git describe --always --dirty --abbrev=40 --exclude=*".split()
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


COMMIT = _commit()  # at import, because files may change during a long run

# ------------------------------------------------------------------------------------------------
# Guards

MOST_ONE_SIDED = 5  # a batch of few coins may be one-sided by chance, but not so many in a row


def note_pushed_away(row: dict, weights: torch.Tensor, logprobs: torch.Tensor) -> None:
    """Sum up in the row how likely the tokens with a negative weight are, for check_row."""
    pushed = weights < 0  # (b, C)
    row["pushed"] = row.get("pushed", 0) + int(pushed.sum())
    row["pushed_logprob"] = row.get("pushed_logprob", 0.0) + logprobs[pushed].sum().item()


def check_row(row: dict, args: Namespace, kept: dict, vocab_size: int) -> None:
    """Raises Diverged before a step that is not finite, or if it pushes tokens away without bound.

    Nothing bounds the log-probability of a token with a negative weight from below. Training stops
    when its mean is below that of a uniform distribution, -log V. And a tandem run in which one
    model writes whole batches alone, which would silently be another method, exits.
    """
    pushed, total = row.pop("pushed", 0), row.pop("pushed_logprob", 0.0)
    reason = None
    if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
        reason = f"loss {row['loss']}, gradient norm {row['grad_norm']}"
    elif pushed and total / pushed < -math.log(vocab_size):
        mean = f"{total / pushed:.1f} nats per token"
        reason = f"tokens with a negative weight are pushed away without bound ({mean})"
    if reason:
        at = f"The checkpoint of update {row['update'] - 1} is kept in {run_folder(args)}"
        remedy = "Start again in another --out with a smaller --lr or a --wrong-weight nearer to 0"
        raise Diverged(f"update {row['update']}: {reason}. {at}. {remedy}")
    one_sided = row["senior_share"] in (0, 1) and not (args.solo or args.imitation)
    kept["one_sided"] = kept.get("one_sided", 0) + 1 if one_sided else 0
    if kept["one_sided"] == MOST_ONE_SIDED:
        share = f"the senior wrote {row['senior_share']:.0%} of {MOST_ONE_SIDED} batches in a row"
        sys.exit(f"{share}: this is not tandem training. Check --p, --handoff and --batch")


def ends_if_it_diverges(train: Callable) -> Callable:
    """Decorate the training of a run: if it diverges, stopped.txt says why; other runs go on."""

    @wraps(train)
    def to_its_end(args: Namespace, *rest) -> None:
        try:
            train(args, *rest)
        except (Diverged, FloatingPointError) as error:
            reason = f"{run_folder(args)}: {error}"
            print(reason)
            replace_file(run_folder(args) / "stopped.txt", f"{reason}\n".encode())

    return to_its_end


# ------------------------------------------------------------------------------------------------
# Several runs


def is_finished(args: Namespace) -> bool:
    """Whether the last update of a run is on disk, or its training diverged."""
    state, stopped = run_folder(args) / "state.pt", run_folder(args) / "stopped.txt"
    at_end = state.is_file() and read_back(state, update=int)["update"] >= args.updates
    return stopped.is_file() or at_end


def run_all(train: Callable[[Namespace], None], todo: list[Namespace]) -> list[str]:
    """Train every run that is not finished, --jobs at a time. Returns why runs have diverged."""
    left, started = [args for args in todo if not is_finished(args)], time.time()
    jobs = min(todo[0].jobs, len(left)) if todo else 0
    with ExitStack() as stack:
        if jobs > 1:
            # Spawned: a fork of a process whose OpenMP threads have started can wait forever.
            context = multiprocessing.get_context("spawn")
            workers = ProcessPoolExecutor(jobs, context, _start_worker)
            # After an error in one run, those that have not begun are not made.
            stack.callback(workers.shutdown, cancel_futures=True)
            futures = [workers.submit(train, args) for args in left]
            ends: Iterable = (future.result() for future in as_completed(futures))
        else:
            ends = map(train, left)
        try:
            for done, _ in enumerate(ends, 1):
                minutes = (time.time() - started) / done * (len(left) - done) / 60
                print(f"{done} of {len(left)} runs finished, about {minutes:.0f} minutes left\n")
        except BrokenProcessPool as error:
            remedy = "continue with --resume and fewer --jobs"
            raise Refused(f"a process was killed, perhaps for want of memory: {remedy}") from error
    reasons = [run_folder(args) / "stopped.txt" for args in todo]
    return [path.read_text("utf-8", "replace").strip() for path in reasons if path.is_file()]


def _start_worker() -> None:
    """A run may be interrupted at any moment: Ctrl-C, or the end of the parent, ends it at once."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    # The default lock of tqdm is a semaphore, which a process that ends at once would leak.
    tqdm.set_lock(threading.RLock())

    def end_with_parent() -> None:
        wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """End the program with one line for what is refused, and at Ctrl-C with the exit code 130."""
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted: the same command with --resume goes on", file=sys.stderr)
        sys.exit(130)


# ------------------------------------------------------------------------------------------------
# What a run prints


def progress(items, label: str, unit: str) -> Iterator:
    """A progress bar, except in one of several jobs, which would draw over each other."""
    return tqdm(items, desc=label, unit=unit, disable=bool(multiprocessing.parent_process()))


def log_row(row: dict, arm: str) -> None:
    """One line per update."""
    line = f"{arm} {row['update']:4d}  "
    if "reward" in row:
        # Update 0 has no rollouts, only an evaluation.
        line += f"reward {row['reward']:.2f}  senior's share {row['senior_share']:4.0%}  "
        learned = f"loss {row['loss']:+.3f}" if row["loss"] is not None else "nothing to learn from"
        line += f"handoffs {row['handoffs']:4.1f}  {learned}  {row['tokens']} tokens"
    for who, evaluation in row.get("eval", {}).items():
        line += f" | {who} right {evaluation['accuracy']:.0%} jargon {evaluation['jargon']:.0%}"
    tqdm.write(line)


def log_rollout(spans: list[tuple[str, str]], arm: str) -> None:
    """One rollout on one line, the junior's words underlined on a terminal, else in [brackets]."""
    opening, closing = ("\033[4m", "\033[0m") if sys.stdout.isatty() else ("[", "]")
    marked = {"senior": "{}", "junior": f"{opening}{{}}{closing}"}
    text = "".join(marked[author].replace("{}", text) for author, text in spans)
    tqdm.write(f"{arm}       {text}".replace("\n", " ⏎ "))
