"""Two hundred bad command lines and files, and what becomes of them:  python tests/bad_input.py

Prints one line per case: seconds, exit code, whether there was a traceback, whether a file that was there has changed, and the
last line of the message. Every case must be refused in seconds, with a message and without a traceback, and nothing that was
there may be lost. The program is called in this process, so that torch is imported once. pytest does not collect this file.
"""

# ruff: noqa: I001, E402  kill.py sets the environment before torch is imported
import contextlib
import io
import json
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

from kill import command_for, make_base

import torch

import run_gsm8k
from lab import figures, runs

LIMIT = 20  # seconds after which a case counts as accepted

FLAGS = """--device gpu | --device cuda:99 | --device meta | --device= | --device cpu:1 | --out= | --out=\x01 | --out=\udcff
--out=a\nb | --out /dev/null | --out /dev/null/runs | --out /proc/runs | --out /sys/runs | --problems= | --problems /no/folder
--problems no-such/dataset | --problems /dev/null | --senior= --junior= | --senior /no/folder --junior /no/folder
--senior no/such-model --junior no/such-model | --batch 0 | --batch -8 | --batch 7 | --batch 1000000 | --batch 1e3
--batch nan | --batch 99999999999999999999999999 | --updates -1 | --updates 10000000000 | --updates 999999 | --updates 1.5
--seeds 0 | --seeds 100000 | --seed -1 | --seed 500 | --rank 0 | --rank 100000 | --rank 99999999999 | --lr 0 | --lr -1 | --lr nan
--lr inf | --lr 1e30 | --lr= | --specialist-lr 1e30 | --specialist-steps 1000000 | --specialist-steps -1 | --temperature 0
--temperature inf | --temperature nan | --p 0 | --p 1 | --p 1.5 | --p nan | --clip 0 | --clip inf | --memory 0 | --memory nan
--memory 0.0001 | --wrong-weight 1 | --wrong-weight -2 | --junior-weight 2 | --solo | --arms tandem tandem | --arms | --arms nobody
--arms word | --setting nothing | --setting= | --setting sweep --arms c0-j1 --wrong-weight -0.3 | --shots 2 | --shots 9
--setting language --arms de-fr-solo --senior-language fr | --senior-language es | --handoff syllable | --rewards false | --spec 3
--evaluate nobody | --eval-problems 0 | --eval-every 0 | --max-new-tokens 0 | --preset huge | --resume=yes | --unknown 3 | stray"""

LINE = json.dumps({"question": "What is 1+1?", "answer": "1+1 = <<1+1=2>>2\n#### 2"}).encode()
PROBLEMS = {
    "gold that is no number": b'{"question": "Q", "answer": "#### many"}',
    "gold that is empty": b'{"question": "Q", "answer": "text ####"}',
    "no mark": b'{"question": "Q", "answer": "2"}',
    "question that is empty": b'{"question": "", "answer": "#### 2"}',
    "question of spaces": b'{"question": " \\n", "answer": "#### 2"}',
    "question that is a number": b'{"question": 3, "answer": "#### 2"}',
    "question that is a list": b'{"question": ["Q"], "answer": "#### 2"}',
    "question that is null": b'{"question": null, "answer": "#### 2"}',
    "answer that is a number": b'{"question": "Q", "answer": 2}',
    "no answer": b'{"question": "Q"}',
    "no JSON": b"What is 1+1? 2",
    "a list": b"[1, 2]",
    "half a line": LINE[:30],
    "Latin-1": "Wie groß?".encode("latin-1"),
    "UTF-16": LINE.decode().encode("utf-16"),
    "byte-order mark": b"\xef\xbb\xbf" + LINE,
    "lone surrogate": b'{"question": "\\ud800", "answer": "#### 2"}',
    "deep nesting": b"[" * 10**6,
    "NUL bytes": b"\0" * 100,
    "long integer": b'{"question": ' + b"9" * 5000 + b', "answer": "#### 2"}',
}
DAMAGE = {
    "empty": lambda whole: b"",
    "half": lambda whole: whole[: len(whole) // 2],
    "bytes": lambda whole: bytes(range(256)) * 4,
    "list": lambda whole: b"[1, 2]",
    "nested": lambda whole: b"[" * 10**5,
    "first half zero": lambda whole: bytes(len(whole) // 2) + whole[len(whole) // 2 :],
}
TEMPLATES = {"raises": b"{{ raise_exception('no') }}", "is wrong": b"{% for", "is empty": b" ", "has no question": b"Hi"}
# Configurations that transformers accepts or fails on in its own way, and what becomes of them here.
CONFIGS = {
    "256 layers of width 65536": {"hidden_size": 2**16, "num_hidden_layers": 256},
    "no layers": {"num_hidden_layers": 0},
    "a width that is text": {"hidden_size": "wide"},
    "a negative width": {"hidden_size": -8},
    "a vocabulary of two": {"vocab_size": 2},
    "no vocabulary": {"vocab_size": None},
    "a context of 16": {"max_position_embeddings": 16},
    "a context that is text": {"max_position_embeddings": "long"},
    "another kind of model": {"model_type": "vit"},
    "code beside it": {"model_type": "t5", "auto_map": {"AutoModelForCausalLM": "code.Model"}},
}
# Lines that are JSON and no rows that could be drawn.
ROWS = {
    "a list": b"[1]",
    "an update that is text": b'{"update": "0"}',
    "no evaluation": b'{"update": 0, "eval": {"senior": 3}}',
    "a share of 7": b'{"update": 0, "eval": {"senior": {"n": 4, "accuracy": 7, "jargon": 0, "languages": {"en": 1}}}}',
}


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def attempt(name: str, command, kept: Path, program=run_gsm8k.main) -> bool:
    """Run a case, print its line, and return whether it was refused as it should be. `kept`: a folder that may not lose anything."""

    def too_long(*_):
        raise TimeoutError("still running")

    before, message, started = contents(kept), io.StringIO(), time.time()
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LIMIT)
    broken, code = False, 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(message):
        try:
            program(command)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
            print("" if stop.code is None or isinstance(stop.code, int) else stop.code, file=message)
        except BaseException:
            broken, code = True, 1
            traceback.print_exc()
    signal.alarm(0)
    seconds, after = time.time() - started, contents(kept)
    lost = any(after.get(path) != content for path, content in before.items())
    last = (message.getvalue().strip().splitlines() or [""])[-1].encode("utf-8", "backslashreplace").decode()
    fine = code not in (0, None) and not broken and not lost and seconds < 10 and last
    print(
        f"| {name!r:62.62} | {seconds:4.1f} | {code} | {'yes' if broken else 'no'} | {'LOST' if lost else 'kept'} | {last[-230:]} |",
        flush=True,
    )
    return bool(fine)


def bad_flags(place: Path) -> list[bool]:
    command = short_command(place / "base", place / "runs")
    return [attempt(flags, [*command, *flags.split(" ")], place / "base") for flags in FLAGS.replace("\n--", " | --").split(" | ")]


def bad_problems(place: Path) -> list[bool]:
    command, folder = short_command(place / "base", place / "runs"), place / "problems"
    command += ["--problems", str(folder), "--eval-problems", "1"]
    other = LINE.replace(b"1+1?", b"one and one?")
    cases = {case: (LINE + b"\n" + line + b"\n", other) for case, line in PROBLEMS.items()}
    cases |= {"train equal to test": (LINE, LINE), "an empty file": (LINE, b"")}
    outcomes = []
    folder.mkdir()
    for case, (train, test) in cases.items():
        (folder / "train.jsonl").write_bytes(train)
        (folder / "test.jsonl").write_bytes(test)
        outcomes.append(attempt(f"problems: {case}", command, folder))
    return outcomes


def bad_bases(place: Path) -> list[bool]:
    """One file of a base damaged at a time, chat templates that fail, and configurations of no usable model."""
    whole = place / "whole"
    shutil.copytree(place / "base", whole)
    (whole / "made.json").write_text(json.dumps({"checksum": "0" * 64}))
    config = json.loads((whole / "config.json").read_text())
    cases = {
        f"base, {path.name}: {kind}": (path.name, change(path.read_bytes()))
        for path in sorted(whole.iterdir())
        for kind, change in DAMAGE.items()
    }
    cases |= {f"base, chat template {kind}": ("chat_template.jinja", text) for kind, text in TEMPLATES.items()}
    cases |= {f"base, config.json: {kind}": ("config.json", json.dumps(config | new).encode()) for kind, new in CONFIGS.items()}
    outcomes = []
    for case, (file, content) in cases.items():
        # Without the runs of a case that was accepted, so that the next one is not refused because of them.
        for old in ("damaged", "runs"):
            shutil.rmtree(place / old, ignore_errors=True)
        shutil.copytree(whole, place / "damaged")
        (place / "damaged" / file).write_bytes(content)
        outcomes.append(attempt(case, short_command(place / "damaged", place / "runs"), place / "damaged"))
    return outcomes


def bad_runs(place: Path) -> list[bool]:
    """A finished run, of which one file at a time is damaged, and which is then to go on or to be drawn."""
    finished, copy = place / "finished", place / "copy"
    command = short_command(place / "base", finished)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run_gsm8k.main(command)
    resume = [*command, "--out", str(copy), "--updates", "2", "--resume"]
    run, outcomes = "tandem/seed-0", []

    def damaged(file: str, kinds: dict, name: str, argument, program=run_gsm8k.main) -> None:
        for kind, change in kinds.items():
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(finished, copy)
            (copy / file).write_bytes(change((copy / file).read_bytes()))
            outcomes.append(attempt(f"{name}{file}: {kind}", argument, copy, program))

    for file in (f"{run}/state.pt", f"{run}/config.json", "specialist/en/seed-0/adapter.pt"):
        damaged(file, DAMAGE, "", resume)
    damaged(f"{run}/metrics.jsonl", {kind: DAMAGE[kind] for kind in ("empty", "bytes", "list", "nested")}, "", resume)
    rows = {kind: lambda whole, row=row: row for kind, row in ROWS.items()}
    for file, kinds in {"config.json": DAMAGE, "metrics.jsonl": rows, "samples.jsonl": rows}.items():
        damaged(f"{run}/{file}", kinds, "figures, ", str(copy), figures.main)
    outcomes.append(attempt("figures, no such folder", str(place / "nowhere"), finished, figures.main))

    shutil.rmtree(copy)
    shutil.copytree(finished, copy)
    outcomes.append(attempt("a run that is there, without --resume", resume[:-1], copy))
    outcomes.append(attempt("--resume with another --lr", [*resume, "--lr", "0.5"], copy))
    with open(copy / run / "metrics.jsonl", "ab") as file:
        runs.lock(file, copy)
        outcomes.append(attempt("a second process", resume, copy))
    (copy / run / "state.pt").unlink()
    outcomes.append(attempt("rows without a state, as in a clone", resume, copy))
    return outcomes


def short_command(base: Path, out: Path) -> list[str]:
    """A run of one update."""
    return [*command_for(base, out), "--updates", "1"]


def main() -> None:
    print("| case | seconds | exit code | traceback | files | end of the message |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        make_base(place / "base")
        outcomes = [*bad_flags(place), *bad_problems(place), *bad_bases(place), *bad_runs(place)]
    print(f"{sum(outcomes)} of {len(outcomes)} cases are refused in under 10 seconds, with a message and no traceback, and nothing is lost")
    sys.exit(not all(outcomes))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
