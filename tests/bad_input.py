"""A hundred bad command lines and files, and what becomes of them:  python tests/bad_input.py

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
from lab import runs

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


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def attempt(name: str, command: list[str], kept: Path) -> bool:
    """Run a case, print its line, and return whether it was refused as it should be. `kept`: a folder that may not lose anything."""

    def too_long(*_):
        raise TimeoutError("still running")

    before, message, started = contents(kept), io.StringIO(), time.time()
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LIMIT)
    broken, code = False, 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(message):
        try:
            run_gsm8k.main(command)
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


def main() -> None:
    outcomes = []
    print("| case | seconds | exit code | traceback | files | end of the message |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        make_base(place / "base")
        command = command_for(place / "base", place / "runs")
        command[command.index("--updates") + 1] = "1"
        for flags in FLAGS.replace("\n--", " | --").split(" | "):
            outcomes.append(attempt(flags, [*command, *flags.split(" ")], place / "base"))

        for case, line in PROBLEMS.items():
            folder = place / "problems"
            folder.mkdir(exist_ok=True)
            (folder / "train.jsonl").write_bytes(LINE + b"\n" + line + b"\n")
            (folder / "test.jsonl").write_bytes(LINE.replace(b"1+1?", b"one and one?"))
            outcomes.append(attempt(f"problems: {case}", [*command, "--problems", str(folder), "--eval-problems", "1"], folder))
        (folder / "train.jsonl").write_bytes(LINE)
        (folder / "test.jsonl").write_bytes(LINE)
        outcomes.append(attempt("problems: train equal to test", [*command, "--problems", str(folder), "--eval-problems", "1"], folder))
        (folder / "test.jsonl").write_bytes(b"")
        outcomes.append(attempt("problems: an empty file", [*command, "--problems", str(folder), "--eval-problems", "1"], folder))

        for case, template in {
            "raises": "{{ raise_exception('no') }}",
            "is wrong": "{% for",
            "is empty": " ",
            "has no question": "Hi",
        }.items():
            shutil.copytree(place / "base", place / "chat", dirs_exist_ok=True)
            (place / "chat" / "chat_template.jinja").write_text(template)
            chat = command_for(place / "chat", place / "runs")
            outcomes.append(attempt(f"chat template {case}", chat, place / "chat"))

        # A finished run, of which one file at a time is damaged, and which is then to go on.
        finished = place / "finished"
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            shutil.rmtree(place / "runs", ignore_errors=True)
            run_gsm8k.main([*command, "--out", str(finished)])
        files = ["tandem/seed-0/state.pt", "tandem/seed-0/config.json", "specialist/en/seed-0/adapter.pt"]
        cases = {f"{file}: {kind}": (file, change) for file in files for kind, change in DAMAGE.items()}
        cases |= {f"metrics.jsonl: {kind}": ("tandem/seed-0/metrics.jsonl", DAMAGE[kind]) for kind in ("empty", "bytes", "list", "nested")}
        for case, (file, change) in cases.items():
            copy = place / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(finished, copy)
            (copy / file).write_bytes(change((copy / file).read_bytes()))
            outcomes.append(attempt(case, [*command, "--out", str(copy), "--updates", "2", "--resume"], copy))
        shutil.rmtree(copy)
        shutil.copytree(finished, copy)
        resume = [*command, "--out", str(copy), "--updates", "2", "--resume"]
        outcomes.append(attempt("a run that is there, without --resume", resume[:-1], copy))
        outcomes.append(attempt("--resume with another --lr", [*resume, "--lr", "0.5"], copy))
        with open(copy / "tandem/seed-0/metrics.jsonl", "ab") as file:
            runs.lock(file, copy)
            outcomes.append(attempt("a second process", resume, copy))
        (copy / "tandem/seed-0/state.pt").unlink()
        outcomes.append(attempt("rows without a state, as in a clone", resume, copy))
    print(f"{sum(outcomes)} of {len(outcomes)} cases are refused in under 10 seconds, with a message and no traceback, and nothing is lost")
    sys.exit(not all(outcomes))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
