"""Bad command lines and checkpoints, and what becomes of them:

    python tests/bad_input.py

Every case must be refused in seconds, with a message and without a traceback, and nothing that was
there may be lost. One line per case: seconds, whether a file has changed, and the message. The
program is called in this process, so that torch is imported once. pytest does not collect it. Bad
problems are in test_problems.py, damaged and hostile files in test_hostile.py.
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

import run_gsm8k

LIMIT = 20  # seconds after which a case counts as accepted

FLAGS = """--device gpu | --device cuda:99 | --out= | --out=a\\nb | --out /dev/null/runs
--out /proc/runs | --problems /no/folder | --problems no-such/dataset | --problems /dev/null
--senior /no/folder --junior /no/folder | --senior no/such-model --junior no/such-model | --batch 0
--batch 7 | --batch 1e3 | --updates -1 | --updates 999999 | --seeds 0 | --seed 3 | --lr 0 | --lr nan
--lr= | --specialist-steps 1000000 | --temperature 0 | --p 1 | --p 1.5 | --wrong-weight 1
--junior-weight 2 | --arms tandem tandem | --arms | --arms word | --setting nothing | --setting=
--setting granularity --arms p-0.25 --p 0.3 | --setting rlvr --arms rlvr-solo --junior tiny
--setting pressure --arms grpo-tandem --batch 100 | --handoff syllable | --eval-problems 1000000
--eval-every 0 | --max-new-tokens 1000000 | --jobs 0 | --preset huge | --resume=yes | stray"""

DAMAGE = {
    "empty": lambda whole: b"",
    "half": lambda whole: whole[: len(whole) // 2],
    "not fetched": lambda whole: b"version https://git-lfs.github.com/spec/v1\n",
}
TEMPLATES = {"raises": b"{{ raise_exception('no') }}", "has no question": b"Hi"}
# Configurations on which transformers fails in its own way.
CONFIGS = [{"hidden_size": 16}, {"vocab_size": 2}, {"model_type": "vit"}]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def attempt(name: str, command: list[str], kept: Path) -> bool:
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
            run_gsm8k.main(command)
        except SystemExit as stop:
            code, lines = stop.code, len(str(stop.code).splitlines())
        except BaseException as error:
            code, lines = f"TRACEBACK {type(error).__name__}: {error}", 2
    signal.alarm(0)
    seconds, after = time.time() - started, contents(kept)
    lost = any(after.get(path) != content for path, content in before.items())
    # argparse prints its message and exits with 2; all others exit with their message.
    last = code if isinstance(code, str) else f"\n{printed.getvalue().strip()}".splitlines()[-1]
    kept_or_lost = "LOST" if lost else "kept"
    print(f"| {name!r:62.62} | {seconds:4.1f} | {kept_or_lost} | {last[-230:]} |", flush=True)
    return code not in (0, None) and lines == 1 and not lost and seconds < 10


def bad_flags(place: Path) -> Iterator[tuple]:
    for flags in FLAGS.replace("\n", " | ").split(" | "):
        given = flags.replace("\\n", "\n").split(" ")
        yield flags, [*short_command(place / "base", place / "runs"), *given], place / "base"


def bad_bases(place: Path) -> Iterator[tuple]:
    """A base with one damaged file, a chat template that fails, or a config of no usable model."""
    files = {path.name: path.read_bytes() for path in sorted((place / "base").iterdir())}
    cases = [(name, kind, DAMAGE[kind](files[name])) for name in files for kind in DAMAGE]
    cases += [("chat_template.jinja", kind, text) for kind, text in TEMPLATES.items()]
    config = json.loads(files["config.json"])
    cases += [("config.json", new, json.dumps(config | new).encode()) for new in CONFIGS]
    damaged = place / "damaged"
    for name, kind, content in cases:
        # Without the runs of a case that was accepted, which would be why the next is refused.
        shutil.rmtree(place / "runs", ignore_errors=True)
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(place / "base", damaged)
        (damaged / name).write_bytes(content)
        yield f"base, {name}: {kind}", short_command(damaged, place / "runs"), damaged


def short_command(base: Path, out: Path) -> list[str]:
    """A run of one update."""
    return [*command_for(base, out), "--updates", "1"]


def main() -> None:
    print("| case | seconds | files | end of the message |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        make_base(Path(name, "base"))
        outcomes = [attempt(*case) for kind in (bad_flags, bad_bases) for case in kind(Path(name))]
    count = f"{sum(outcomes)} of {len(outcomes)} cases"
    print(f"{count} are refused in one line, in under 10 seconds, and nothing is lost")
    sys.exit(not all(outcomes))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
