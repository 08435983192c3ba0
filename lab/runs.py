"""Run folders: what a run leaves on disk, how it is resumed, and when it is stopped.

    OUT/<arm>/seed-<k>/config.json      every flag, versions, device, commit
                       metrics.jsonl    one row per update, appended and flushed
                       samples.jsonl    evaluation rollouts, with the author of every span of text
                       measures.jsonl   only in arms of Tandem RL: see lab/measures.py
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
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError

# Flags that may differ between a run and its --resume: what else to run and how long, where, in
# which precision, and what is in memory at a time, which changes results by rounding only.
MAY_CHANGE = {"setting", "arms", "seeds", "updates", "resume", "out", "jobs", "device"}
MAY_CHANGE |= {"bfloat16", "rollout_batch", "micro_tokens", "checkpointing"}


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
    with writing(path), open(path, "ab") as file:
        # A last line that was torn must not swallow the next one.
        is_torn = path.read_bytes()[-1:] not in (b"", b"\n")
        lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]
        file.write((b"\n" if is_torn else b"") + b"".join(lines))


def read_rows(path: Path) -> list[dict]:
    """The rows of a .jsonl file in the order of their updates, the last version of each."""
    rows = {}
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
            # Rows of metrics.jsonl have only the first of these keys.
            rows[row["update"], row.get("who"), row.get("question")] = row
        except (ValueError, TypeError, KeyError, RecursionError):
            continue  # a torn line, the empty one after the last, or no row at all
    return sorted(rows.values(), key=lambda row: row["update"])


def save_tensors(content: dict, path: Path) -> None:
    """Write a file of tensors, among other things, as a whole. read_back reads it."""
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

    Raises Refused if it cannot be read, or lacks one of the keys `types` with a value of this type.
    """
    try:
        if path.suffix == ".json":
            content = json.loads(path.read_bytes())
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
        if not all(isinstance(content[key], kind) for key, kind in types.items()):
            raise TypeError
    except Exception as error:
        # torch.load fails in many ways, all with the same remedy.
        raise unusable(path, type(error).__name__) from error
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


def check_folder(args: Namespace) -> None:
    """Raises Refused rather than write over a run, or resume it with other flags or no state."""
    folder = run_folder(args)
    if not (folder / "config.json").is_file():
        return
    if not args.resume:
        raise Refused(f"{folder} already holds a run: add --resume, or choose another --out")
    if (folder / "metrics.jsonl").is_file() and not (folder / "state.pt").is_file():
        # The results of a run whose state was not kept, as in a clone.
        raise Refused(f"{folder} has rows, but no state.pt to resume from: choose another --out")
    before, now = read_back(folder / "config.json", flags=dict)["flags"], vars(args)
    fixed = sorted(before.keys() & now.keys() - MAY_CHANGE)
    if changed := [flag for flag in fixed if before[flag] != now[flag]]:
        flags = ", ".join(f"{flag.replace('_', '-')} = {before[flag]}" for flag in changed)
        raise Refused(f"{folder} was begun with {flags}: resume it so, or choose another --out")


def last_update(args: Namespace) -> int:
    """The update of the last checkpoint; -1 before there is one."""
    state = run_folder(args) / "state.pt"
    return read_back(state, update=int)["update"] if state.is_file() else -1


def is_finished(args: Namespace) -> bool:
    """Whether the last update of a run is on disk, or its training diverged."""
    return last_update(args) >= args.updates or bool(why_it_diverged(args))


def why_it_diverged(args: Namespace) -> str:
    """What stopped.txt says; nothing if training has not diverged."""
    path = run_folder(args) / "stopped.txt"
    return path.read_text("utf-8", "replace").strip() if path.is_file() else ""


def begin(args: Namespace, senior, optimizer) -> tuple[int, dict]:
    """Write config.json and load the last state: (its update, what the loop kept).

    Before the first row that is -1 and nothing. The state of update -1 is saved here, so that only
    a clone has rows without a state.
    """
    if multiprocessing.parent_process():
        # One of several jobs has one thread. Until here it may have made the specialist for which
        # the others wait, on all cores.
        torch.set_num_threads(1)
    path = run_folder(args) / "state.pt"
    config = {"flags": vars(args)} | describe_machine(args.device)
    replace_file(path.with_name("config.json"), f"{json.dumps(config, indent=2)}\n".encode())
    if not path.is_file():
        save_state(args, -1, senior, optimizer, {})
    state = read_back(path, update=int, adapter=dict, optimizer=dict, kept=dict)
    load_adapter(senior, state["adapter"], path)
    optimizer.load_state_dict(state["optimizer"])
    return state["update"], state["kept"]


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
    """Give the senior an adapter read from `path`."""
    # peft would ignore what is missing, such as tensors that another version of it names otherwise.
    if adapter.keys() != adapter_state(senior).keys():
        raise unusable(path, "it is the adapter of another model")
    set_peft_model_state_dict(senior, adapter)


def describe_machine(device: str) -> dict:
    on_cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "numpy")}
    about = {"device": torch.cuda.get_device_name(device) if "cuda" in device else on_cpu}
    return about | {"python": platform.python_version(), "versions": versions, "commit": COMMIT}


def _commit() -> str | None:
    """The commit of this code, with "-dirty" if files differ from it; None without git."""
    # Its own .git: where the project was unpacked in another repository, that one says nothing.
    command = "git --git-dir=.git --work-tree=. describe --always --dirty --abbrev=40 --exclude=*"
    options = dict(cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    with suppress(OSError):
        return subprocess.run(command.split(), **options).stdout.strip() or None
    return None


COMMIT = _commit()  # at import, because files may change during a long run

# ------------------------------------------------------------------------------------------------
# Guards

MOST_ONE_SIDED = 5  # a batch of few coins may be one-sided by chance, but not so many in a row


def note_pushed_away(row: dict, weights: torch.Tensor, logprobs: torch.Tensor) -> None:
    """Keep the log-probabilities of the tokens with a negative weight in the row, for check_row."""
    row.setdefault("pushed", []).append(logprobs[weights < 0])


def check_row(row: dict, args: Namespace, kept: dict, vocab_size: int) -> None:
    """Raises Diverged if the step is not finite, or if tokens are pushed away without bound.

    Nothing bounds the log-probability of a token with a negative weight from below. Training stops
    when its mean is below that of a uniform distribution, -log V. And a tandem run in which one
    model writes whole batches alone, which would silently be another method, exits.
    """
    mean, reason = torch.cat(row.pop("pushed")).mean(), None  # of no tokens the mean is nan
    if not math.isfinite(row["loss"] + row["grad_norm"]):
        reason = f"loss {row['loss']}, gradient norm {row['grad_norm']}"
    elif mean < -math.log(vocab_size):
        reason = f"tokens with negative weights are pushed away without bound ({mean:.1f} nats)"
    if reason:
        kept_at = f"the checkpoint of update {row['update'] - 1} is kept"
        remedy = "start again in another --out with a smaller --lr, or --wrong-weight nearer to 0"
        raise Diverged(f"update {row['update']}: {reason}: {kept_at}: {remedy}")
    one_sided = row["senior_share"] in (0, 1) and not (args.solo or args.imitation)
    kept["one_sided"] = kept.get("one_sided", 0) + 1 if one_sided else 0
    if kept["one_sided"] == MOST_ONE_SIDED:
        share = f"the senior wrote {row['senior_share']:.0%} of {MOST_ONE_SIDED} batches in a row"
        sys.exit(f"{share}: this is not tandem training. Check --p, --handoff and --batch")


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """End the program with one line for what is refused, and at Ctrl-C with the exit code 130."""
    # Where the output is closed, libraries would fail to write to it.
    sys.stdout = sys.stdout or io.StringIO()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Not every encoding has all the characters that models write.
        sys.stdout.reconfigure(errors="replace")
    try:
        yield
    except BrokenPipeError:
        # Nobody reads what is printed, as after `| head`. What is still buffered goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit("the output was closed: the same command with --resume goes on")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted: the same command with --resume goes on", file=sys.stderr)
        sys.exit(130)
