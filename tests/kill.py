"""Kill runs at random moments, resume them, and compare them with one that was never killed:

    python tests/kill.py [N]

Of four kills, two are aimed at a moment of writing: in the middle of a row or of a draft, before or
after a draft takes the place of a file, and with half an adapter written. One is aimed at a random
step of fine-tuning, and one comes after a random time. Rows (but for seconds), samples, the
adapter, the optimizer and the specialist of a resumed run must be those of the unbroken run, bit
for bit, and no draft may be left.

Each run is a fork of this process, so that torch is imported once. pytest does not collect it.
"""

# ruff: noqa: I001, E402  the environment is set before torch is imported
import os
import sys
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).parent.parent))

import lab  # noqa: F401
import random
import signal
import tempfile
import time

import torch
from peft import PeftModel
from test_runner import everything

import run_gsm8k
from conftest import byte_level_tokenizer, save_base
from lab import runs


def command_for(base: Path, out: Path) -> list[str]:
    flags = "--setting skill --arms tandem --device cpu --updates 4 --batch 8 --eval-problems 4"
    flags += f" --eval-every 2 --max-new-tokens 12 --specialist-steps {STEPS} --senior {base}"
    return f"{flags} --junior {base} --out {out}".split()


STEPS = 30  # of fine-tuning, which are the first calls of "step"
CALLS = {"row": (runs, "append_rows"), "draft": (Path, "write_bytes"), "replace": (os, "replace")}
CALLS |= {"adapter": (PeftModel, "save_pretrained"), "step": (torch.optim.AdamW, "step")}
TARGETS = "row before, row amid, row after, draft amid, replace before, replace after"
TARGETS = f"{TARGETS}, adapter amid, adapter after".split(", ")


def aim(target: str, count: float) -> None:
    """Let this process end after `count` seconds, or in the count-th call of a function: before,
    after or amid it."""
    if target == "seconds":
        signal.setitimer(signal.ITIMER_REAL, count)
        return
    name, moment = target.split()
    owner, function = CALLS[name]
    real, calls = getattr(owner, function), []

    def wrapper(*args, **options):
        calls.append(1)
        if len(calls) < count:
            return real(*args, **options)
        if target == "row amid":
            with open(args[0], "a") as file:
                file.write('{"update": 1, "rew')
        elif target == "draft amid":
            real(args[0], args[1][: len(args[1]) // 2])
        elif moment != "before":
            real(*args, **options)
        if target == "adapter amid":
            os.truncate(args[1] / "adapter_model.safetensors", 1000)
        return os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, function, wrapper)


def run(command: list[str], target: str = "", count: float = 0) -> int:
    """The exit status of a run in its own process, which is killed at the target."""
    child = os.fork()
    if child == 0:
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        run_gsm8k.reward = lambda text, gold: 1.0
        run_gsm8k.terminal.figures.draw_all = lambda *args: None
        if target:
            aim(target, count)
        status = 1
        try:
            run_gsm8k.main(command)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def result(out: Path) -> list:
    """Everything that must be equal, as a list of comparable things."""
    files = (out / "tandem/seed-0/adapter/adapter_model.safetensors", *out.rglob("adapter.pt"))
    return [*everything(out), *(file.read_bytes() for file in files)]


def is_equal(i: int, rng: random.Random, base: Path, out: Path, whole: float, expected: list):
    """Kill a run, resume it, print a line, and return whether it is the unbroken run."""
    command = command_for(base, out)
    if i % 4 == 0:
        target, count = "seconds", rng.uniform(0.1, 0.8) * whole
    elif i % 4 == 2:
        target, count = "step before", rng.randint(1, STEPS)
    else:
        target, count = TARGETS[i // 2 % len(TARGETS)], rng.randint(1, 6)
    killed, resumed = run(command, target, count), run([*command, "--resume"])
    equal = resumed == 0 and result(out) == expected and not list(out.rglob("*.draft"))
    end = f"status {killed}, resumed with {resumed}: {'bit-equal' if equal else 'DIFFERENT'}"
    print(f"{i:3d}  {target:14} {count:5.3g}  {end}", flush=True)
    return equal


def main(n: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        base, out = Path(place, "base"), Path(place, "unbroken")
        save_base(base, byte_level_tokenizer())
        started = time.time()
        assert run(command_for(base, out)) == 0
        whole, expected = time.time() - started, result(out)
        rest = random.Random(n), base
        outcomes = [is_equal(i, *rest, Path(place, str(i)), whole, expected) for i in range(n)]
    print(f"{sum(outcomes)} of {n} are equal to the unbroken run, which took {whole:.1f} s")
    sys.exit(not all(outcomes))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
