"""Two hundred bad command lines and files, and what becomes of them:

    python tests/bad_input.py

Every case must be refused in seconds, with a message and without a traceback, and nothing that was
there may be lost. One line per case: seconds, exit code, whether there was a traceback, whether a
file has changed, and the last line of the message. The program is called in this process, so that
torch is imported once. pytest does not collect this file.
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
from filelock import FileLock

import run_gsm8k
from lab import figures
from lab.runs import errors_in_one_line

LIMIT = 20  # seconds after which a case counts as accepted

FLAGS = """--device gpu | --device cuda:99 | --device meta | --device= | --device cpu:1 | --out=
--out=\x01 | --out=\udcff | --out=a\\nb | --out /dev/null | --out /dev/null/runs | --out /proc/runs
--out /sys/runs | --problems= | --problems /no/folder | --problems no-such/dataset
--problems /dev/null | --senior= --junior= | --senior /no/folder --junior /no/folder
--senior no/such-model --junior no/such-model | --batch 0 | --batch -8 | --batch 7
--batch 1000000 | --batch 1e3 | --batch nan | --batch 99999999999999999999999999 | --updates -1
--updates 10000000000 | --updates 999999 | --updates 1.5 | --seeds 0 | --seeds 100000 | --seed 3
--rank 0 | --lr 0 | --lr -1 | --lr nan | --lr inf | --lr 1e30 | --lr= | --specialist-lr 1e30
--specialist-steps 1000000 | --specialist-steps -1 | --specialist-batch 0 | --temperature 0
--temperature inf | --temperature nan | --p 0 | --p 1 | --p 1.5 | --p nan | --clip 0 | --memory 0
--micro-tokens 9 | --wrong-weight 1 | --wrong-weight -2 | --junior-weight 2 | --solo | --shots 2
--arms tandem tandem | --arms | --arms nobody | --arms word | --setting nothing | --setting=
--setting sweep --arms c0-j1 --wrong-weight -0.3 | --setting granularity --arms p-0.25 --p 0.3
--setting rlvr --arms rlvr-solo --specialist-steps 3 | --setting rlvr --arms rlvr-solo --junior tiny
--setting pressure --arms grpo-tandem --batch 100 | --handoff syllable | --rewards false | --spec 3
--evaluate nobody | --eval-problems 0 | --eval-problems 1000000 | --eval-every 0
--max-new-tokens 0 | --max-new-tokens 1000000 | --jobs 0 | --jobs 65 | --preset huge | --resume=yes
--four-bit=1 | --unknown 3 | stray"""

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
TEMPLATES = {"raises": b"{{ raise_exception('no') }}", "is wrong": b"{% for", "is empty": b" "}
TEMPLATES |= {"has no question": b"Hi", "divides by zero": b"{{ 1 / 0 }}"}
# Configurations that transformers accepts or fails on in its own way.
CONFIGS = {
    "three layers": {"num_hidden_layers": 3},
    "no layers": {"num_hidden_layers": 0},
    "another width": {"hidden_size": 16},
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
    "a share of 7": b'{"update": 0, "eval": {"senior": {"n": 4, "accuracy": 7, "jargon": 0, '
    b'"languages": {"en": 1}}}}',
}


def draw(folder: str) -> None:
    with errors_in_one_line():
        figures.draw_all(Path(folder), ["skill"])


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def attempt(name: str, argument, kept: Path, program=run_gsm8k.main) -> bool:
    """Run a case, print its line, and return whether it was refused and `kept` has lost nothing."""

    def too_long(*_):
        raise TimeoutError("still running")

    before, message, started = contents(kept), io.StringIO(), time.time()
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LIMIT)
    run_gsm8k._pair.clear()  # the models of the last case
    broken, code, in_one_line = False, 0, True
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(message):
        try:
            program(argument)
        except SystemExit as stop:
            code = 1 if isinstance(stop.code, str) else stop.code
            in_one_line = "\n" not in str(stop.code)
            print(stop.code if code == 1 else "", file=message)
        except BaseException:
            broken, code = True, 1
            traceback.print_exc()
    signal.alarm(0)
    seconds, after = time.time() - started, contents(kept)
    lost = any(after.get(path) != content for path, content in before.items())
    last = (message.getvalue().strip().splitlines() or [""])[-1]
    last = last.encode("utf-8", "backslashreplace").decode()
    verdict = f"{'yes' if broken else 'no'} | {'LOST' if lost else 'kept'} | {last[-230:]}"
    print(f"| {name!r:62.62} | {seconds:4.1f} | {code} | {verdict} |", flush=True)
    return bool(code and last and in_one_line and not broken and not lost and seconds < 10)


def bad_flags(place: Path) -> list[bool]:
    command, cases = short_command(place / "base", place / "runs"), FLAGS.replace("\n", " | ")
    cases = [case.replace("\\n", "\n") for case in cases.split(" | ")]
    return [attempt(flags, [*command, *flags.split(" ")], place / "base") for flags in cases]


def bad_problems(place: Path) -> list[bool]:
    command, folder = short_command(place / "base", place / "runs"), place / "problems"
    command += ["--problems", str(folder), "--eval-problems", "1"]
    other = LINE.replace(b"1+1?", b"one and one?")
    cases = {case: (LINE + b"\n" + line + b"\n", other) for case, line in PROBLEMS.items()}
    cases |= {"train equal to test": (LINE, LINE), "no test": (LINE, b""), "no train": (b"", LINE)}
    outcomes = []
    folder.mkdir()
    for case, (train, test) in cases.items():
        (folder / "train.jsonl").write_bytes(train)
        (folder / "test.jsonl").write_bytes(test)
        outcomes.append(attempt(f"problems: {case}", command, folder))
    return outcomes


def bad_bases(place: Path) -> list[bool]:
    """A base with one damaged file, a chat template that fails, or a config of no usable model."""
    whole = place / "whole"
    shutil.copytree(place / "base", whole)
    (whole / "made.json").write_text(json.dumps({"checksum": "0" * 64}))
    config, outcomes = json.loads((whole / "config.json").read_text()), []
    cases = {
        f"{path.name}: {kind}": (path.name, change(path.read_bytes()))
        for path in sorted(whole.iterdir())
        for kind, change in DAMAGE.items()
    }
    cases |= {f"template {kind}": ("chat_template.jinja", text) for kind, text in TEMPLATES.items()}
    for kind, new in CONFIGS.items():
        cases[f"config.json: {kind}"] = "config.json", json.dumps(config | new).encode()
    for case, (file, content) in cases.items():
        # Without the runs of a case that was accepted, which would be why the next is refused.
        for old in ("damaged", "runs"):
            shutil.rmtree(place / old, ignore_errors=True)
        shutil.copytree(whole, place / "damaged")
        (place / "damaged" / file).write_bytes(content)
        command = short_command(place / "damaged", place / "runs")
        outcomes.append(attempt(f"base, {case}", command, place / "damaged"))
    return outcomes


def bad_runs(place: Path) -> list[bool]:
    """A finished run with one damaged file, which is then to go on or to be drawn."""
    finished, copy = place / "finished", place / "copy"
    command = short_command(place / "base", finished)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run_gsm8k.main(command)
    resume = [*command, "--out", str(copy), "--updates", "2", "--resume"]
    run, outcomes = "tandem/seed-0", []

    def damaged(file: str, kinds: dict, argument, program=run_gsm8k.main) -> None:
        for kind, change in kinds.items():
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(finished, copy)
            (copy / file).write_bytes(change((copy / file).read_bytes()))
            name = f"{program.__name__}, {file}: {kind}"
            outcomes.append(attempt(name, argument, copy, program))

    rows = {kind: lambda whole, row=row: row for kind, row in ROWS.items()}
    for file in (f"{run}/state.pt", f"{run}/config.json", "specialist/en/seed-0/adapter.pt"):
        damaged(file, DAMAGE, resume)
    no_rows = {kind: DAMAGE[kind] for kind in ("empty", "bytes", "list", "nested")}
    damaged(f"{run}/metrics.jsonl", no_rows | rows, resume)
    for file, kinds in {
        "config.json": DAMAGE,
        "metrics.jsonl": rows,
        "samples.jsonl": rows,
    }.items():
        damaged(f"{run}/{file}", kinds, str(copy), draw)

    shutil.rmtree(copy)
    shutil.copytree(finished, copy)
    outcomes.append(attempt("a run that is there, without --resume", resume[:-1], copy))
    outcomes.append(attempt("--resume with another --lr", [*resume, "--lr", "0.5"], copy))
    with FileLock(copy / run / ".lock"):
        outcomes.append(attempt("a second process", resume, copy))
    (copy / run / "state.pt").unlink()
    outcomes.append(attempt("rows without a state, as in a clone", resume, copy))
    return outcomes


def short_command(base: Path, out: Path) -> list[str]:
    """A run of one update."""
    return [*command_for(base, out), "--updates", "1"]


def main() -> None:
    print("| case | seconds | exit code | traceback | files | end of the message |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        make_base(place / "base")
        outcomes = [*bad_flags(place), *bad_problems(place), *bad_bases(place), *bad_runs(place)]
    count = f"{sum(outcomes)} of {len(outcomes)} cases"
    print(f"{count} are refused in one line, in under 10 seconds, and nothing is lost")
    sys.exit(not all(outcomes))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
