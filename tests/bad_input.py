"""Bad command lines and files, and what becomes of them:

    python tests/bad_input.py

Every case must be refused in seconds, with a message and without a traceback, and nothing that was
there may be lost. One line per case: seconds, whether a file has changed, and the message. The
program is called in this process, so that torch is imported once. pytest does not collect it.
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
from collections.abc import Iterator
from pathlib import Path

from kill import command_for, make_base

import torch
from filelock import FileLock

import run_gsm8k
from lab import figures
from lab.runs import errors_in_one_line

LIMIT = 20  # seconds after which a case counts as accepted

FLAGS = """--device gpu | --device cuda:99 | --device= | --device cpu:1 | --out= | --out=\x01
--out=\udcff | --out=a\\nb | --out /dev/null | --out /dev/null/runs | --out /proc/runs | --problems=
--problems /no/folder | --problems no-such/dataset | --problems /dev/null | --senior= --junior=
--senior /no/folder --junior /no/folder | --senior no/such-model --junior no/such-model | --batch 0
--batch -8 | --batch 7 | --batch 1e3 | --batch nan | --batch 99999999999999999999999999
--updates -1 | --updates 10000000000 | --updates 999999 | --updates 1.5 | --seeds 0 | --seeds 100000
--seed 3 | --rank 0 | --lr 0 | --lr -1 | --lr nan | --lr inf | --lr 1e30 | --lr=
--specialist-steps 1000000 | --specialist-steps -1 | --specialist-batch 0 | --temperature 0
--temperature inf | --p 0 | --p 1 | --p 1.5 | --p nan | --wrong-weight 1 | --wrong-weight -2
--junior-weight 2 | --solo | --arms tandem tandem | --arms | --arms nobody | --arms word
--setting nothing | --setting= | --setting sweep --arms c0-j1 --wrong-weight -0.3
--setting granularity --arms p-0.25 --p 0.3 | --setting rlvr --arms rlvr-solo --specialist-steps 3
--setting rlvr --arms rlvr-solo --junior tiny | --setting pressure --arms grpo-tandem --batch 100
--handoff syllable | --eval-problems 0 | --eval-problems 1000000 | --eval-every 0
--max-new-tokens 0 | --max-new-tokens 1000000 | --jobs 0 | --jobs 65 | --preset huge | --resume=yes
--four-bit=1 | --unknown 3 | stray"""

LINE = json.dumps({"question": "What is 1+1?", "answer": "1+1 = <<1+1=2>>2\n#### 2"}).encode()
PROBLEMS = r"""{"question": "Q", "answer": "#### many"} | {"question": "Q", "answer": "text ####"}
{"question": "Q", "answer": "2"} | {"question": "", "answer": "#### 2"} | {"question": "Q"} | [1, 2]
{"question": " \n", "answer": "#### 2"} | {"question": 3, "answer": "#### 2"} | What is 1+1? 2
{"question": ["Q"], "answer": "#### 2"} | {"question": null, "answer": "#### 2"} | {"question": "Q
{"question": "Q", "answer": 2} | {"question": "\ud800", "answer": "#### 2"}"""
NO_TEXT = ["Wie groß?".encode("latin-1"), LINE.decode().encode("utf-16"), b"\xef\xbb\xbf" + LINE]
NO_TEXT += [b"[" * 10**6, b"\0" * 100, b'{"question": ' + b"9" * 5000 + b', "answer": "#### 2"}']
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
CONFIGS = [{"num_hidden_layers": 3}, {"num_hidden_layers": 0}, {"hidden_size": 16}]
CONFIGS += [{"hidden_size": "wide"}, {"hidden_size": -8}, {"vocab_size": 2}, {"vocab_size": None}]
CONFIGS += [{"max_position_embeddings": 16}, {"max_position_embeddings": "long"}]
CONFIGS += [{"model_type": "vit"}]
CONFIGS += [{"model_type": "t5", "auto_map": {"AutoModelForCausalLM": "code.Model"}}]
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

    before, printed, started = contents(kept), io.StringIO(), time.time()
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LIMIT)
    run_gsm8k._pair.clear()  # the models of the last case
    code, lines = 0, 1
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(printed):
        try:
            program(argument)
        except SystemExit as stop:
            code, lines = stop.code, len(str(stop.code).splitlines())
        except BaseException as error:
            code, lines = f"TRACEBACK {type(error).__name__}: {error}", 2
    signal.alarm(0)
    seconds, after = time.time() - started, contents(kept)
    lost = any(after.get(path) != content for path, content in before.items())
    # argparse prints its message and exits with 2; all others exit with their message.
    last = code if isinstance(code, str) else f"\n{printed.getvalue().strip()}".splitlines()[-1]
    last = last.encode("utf-8", "backslashreplace").decode()[-230:]
    kept_or_lost = "LOST" if lost else "kept"
    print(f"| {name!r:62.62} | {seconds:4.1f} | {kept_or_lost} | {last} |", flush=True)
    return code not in (0, None) and lines == 1 and not lost and seconds < 10


def bad_flags(place: Path) -> Iterator[tuple]:
    for flags in split(FLAGS):
        given = flags.replace("\\n", "\n").split(" ")
        yield flags, [*short_command(place / "base", place / "runs"), *given], place / "base"


def bad_problems(place: Path) -> Iterator[tuple]:
    command, folder = short_command(place / "base", place / "runs"), place / "problems"
    command += ["--problems", str(folder), "--eval-problems", "1"]
    other = LINE.replace(b"1+1?", b"one and one?")
    lines = [line.encode() for line in split(PROBLEMS)] + NO_TEXT
    cases = [(LINE + b"\n" + line + b"\n", other) for line in lines]
    folder.mkdir()
    for train, test in [*cases, (LINE, LINE), (LINE, b""), (b"", LINE)]:
        (folder / "train.jsonl").write_bytes(train)
        (folder / "test.jsonl").write_bytes(test)
        yield f"problems: {train[len(LINE) + 1 :][:50]}", command, folder


def bad_bases(place: Path) -> Iterator[tuple]:
    """A base with one damaged file, a chat template that fails, or a config of no usable model."""
    whole, damaged = place / "whole", place / "damaged"
    shutil.copytree(place / "base", whole)
    (whole / "made.json").write_text(json.dumps({"checksum": "0" * 64}))
    files = {path.name: path.read_bytes() for path in sorted(whole.iterdir())}
    cases = [(name, kind, DAMAGE[kind](files[name])) for name in files for kind in DAMAGE]
    cases += [("chat_template.jinja", kind, text) for kind, text in TEMPLATES.items()]
    changes = [("config.json", new) for new in CONFIGS]
    for name, new in [*changes, ("tokenizer_config.json", {"eos_token": None})]:
        cases.append((name, new, json.dumps(json.loads(files[name]) | new).encode()))
    for name, kind, content in cases:
        # Without the runs of a case that was accepted, which would be why the next is refused.
        shutil.rmtree(place / "runs", ignore_errors=True)
        fresh(whole, damaged)
        (damaged / name).write_bytes(content)
        yield f"base, {name}: {kind}", short_command(damaged, place / "runs"), damaged


def bad_runs(place: Path) -> Iterator[tuple]:
    """A finished run with one damaged file, which is then to go on or to be drawn."""
    finished, copy, run = place / "finished", place / "copy", "tandem/seed-0"
    command = short_command(place / "base", finished)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run_gsm8k.main(command)
    resume = [*command, "--out", str(copy), "--updates", "2", "--resume"]
    rows = {kind: lambda whole, row=row: row for kind, row in ROWS.items()}
    no_rows = {kind: DAMAGE[kind] for kind in ("empty", "bytes", "list", "nested")}
    to_resume = {f"{run}/state.pt": DAMAGE, f"{run}/config.json": DAMAGE}
    to_resume |= {"specialist/en/seed-0/adapter.pt": DAMAGE, f"{run}/metrics.jsonl": no_rows | rows}
    to_draw = {"config.json": DAMAGE, "metrics.jsonl": rows, "samples.jsonl": rows}
    to_draw = {f"{run}/{file}": kinds for file, kinds in to_draw.items()}
    for files, argument, program in ((to_resume, resume, run_gsm8k.main), (to_draw, copy, draw)):
        for file, kinds in files.items():
            for kind, change in kinds.items():
                fresh(finished, copy)
                (copy / file).write_bytes(change((copy / file).read_bytes()))
                yield f"{program.__name__}, {file}: {kind}", argument, copy, program
    fresh(finished, copy)
    yield "a run that is there, without --resume", resume[:-1], copy
    yield "--resume with another --lr", [*resume, "--lr", "0.5"], copy
    with FileLock(copy / run / ".lock"):
        yield "a second process", resume, copy
    (copy / run / "state.pt").unlink()
    yield "rows without a state, as in a clone", resume, copy


def split(cases: str) -> list[str]:
    return cases.replace("\n", " | ").split(" | ")


def fresh(folder: Path, copy: Path) -> None:
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)


def short_command(base: Path, out: Path) -> list[str]:
    """A run of one update."""
    return [*command_for(base, out), "--updates", "1"]


def main() -> None:
    print("| case | seconds | files | end of the message |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        make_base(Path(name, "base"))
        kinds = bad_flags, bad_problems, bad_bases, bad_runs
        outcomes = [attempt(*case) for of_kind in kinds for case in of_kind(Path(name))]
    count = f"{sum(outcomes)} of {len(outcomes)} cases"
    print(f"{count} are refused in one line, in under 10 seconds, and nothing is lost")
    sys.exit(not all(outcomes))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
