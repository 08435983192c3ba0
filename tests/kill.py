"""Kill runs at random moments, resume them, and compare them with one that was never killed:

    python tests/kill.py [N]

Every other kill is aimed at a moment of writing: in the middle of a row or of a draft, before or
after a draft takes the place of a file, and with half an adapter written; the others come after a
random time, half of them in fine-tuning, which keeps a draft at every step here. Rows (but for
seconds), samples, the adapter, the optimizer and the specialist of a resumed run must be those of
the unbroken run, bit for bit, and no draft may be left.

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
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import run_gsm8k
from lab import models, runs, specialist


def make_base(folder: Path) -> None:
    """A random Llama of some thousand parameters, with the tokenizer of the tiny base."""
    tokenizer = AutoTokenizer.from_pretrained(models.TINY)
    torch.manual_seed(0)
    sizes = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    sizes |= dict(max_position_embeddings=512, initializer_range=0.3)
    ids = dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    LlamaForCausalLM(LlamaConfig(**sizes, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def command_for(base: Path, out: Path) -> list[str]:
    flags = "--setting skill --arms tandem --device cpu --updates 4 --batch 8 --eval-problems 4"
    flags += f" --eval-every 2 --max-new-tokens 12 --specialist-steps 30 --senior {base}"
    return f"{flags} --junior {base} --out {out}".split()


WRITERS = {"row": (runs, "append_rows"), "draft": (Path, "write_bytes")}
WRITERS |= {"replace": (os, "replace"), "adapter": (PeftModel, "save_pretrained")}
TARGETS = "row before, row amid, row after, draft amid, replace before, replace after"
TARGETS = f"{TARGETS}, adapter amid, adapter after".split(", ")


def aim(target: str, count: int) -> None:
    """Let the count-th call of a function that writes end in a SIGKILL before, after or amid it."""
    where, moment = target.split()
    owner, name = WRITERS[where]
    real, calls = getattr(owner, name), []

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

    setattr(owner, name, wrapper)


def run(command: list[str], target: str = "", count: int = 0, seconds=0.0, after=Path()) -> int:
    """The exit status of a run in its own process, killed at a target, or some seconds after there
    is a certain file (or at once after its start)."""
    child = os.fork()
    if child == 0:
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        run_gsm8k.reward = lambda text, gold: 1.0
        run_gsm8k.terminal.figures.draw_all = lambda *args: None
        specialist.SECONDS_BETWEEN_DRAFTS = 0
        if target:
            aim(target, count)
        status = 1
        try:
            run_gsm8k.main(command)
            status = 0
        finally:
            os._exit(status)
    if seconds:
        while not after.exists():
            time.sleep(0.001)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def result(out: Path) -> list:
    """Everything that must be equal, as a list of comparable things."""
    files = ("tandem/seed-0/adapter/adapter_model.safetensors", "specialist/en/seed-0/adapter.pt")
    return [*everything(out), *((out / file).read_bytes() for file in files)]


def is_equal(i: int, rng: random.Random, base: Path, out: Path, whole: float, expected: list):
    """Kill a run, resume it, print a line, and return whether it is the unbroken run."""
    command, metrics = command_for(base, out), out / "tandem" / "seed-0" / "metrics.jsonl"
    if i % 2:
        target, count = TARGETS[i // 2 % len(TARGETS)], rng.randint(1, 6)
        what, status = f"{target}, call {count}", run(command, target, count)
    elif i % 4:
        seconds = rng.uniform(0.1, 0.8) * whole
        what, status = f"after {seconds:.2f} s", run(command, seconds=seconds)
    else:
        seconds, draft = rng.uniform(0.001, 0.1), out / "specialist" / "en" / "seed-0" / "draft.pt"
        what, status = "in fine-tuning", run(command, seconds=seconds, after=draft)
    had = [row["update"] for row in runs.read_rows(metrics)] if metrics.is_file() else []
    drafts = len(list(out.glob("specialist/*/*/draft.pt")))
    resumed = run([*command, "--resume"])
    equal = resumed == 0 and result(out) == expected and not list(out.rglob("*.draft"))
    when = f"status {status:3d}  fine-tuning {drafts}  rows {had!s:15} resumed with {resumed}"
    print(f"{i:3d}  {what:24} {when}: {'bit-equal' if equal else 'DIFFERENT'}", flush=True)
    return equal


def main(n: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        base, out = Path(place, "base"), Path(place, "unbroken")
        make_base(base)
        started = time.time()
        assert run(command_for(base, out)) == 0
        whole, expected = time.time() - started, result(out)
        rest = random.Random(n), base
        outcomes = [is_equal(i, *rest, Path(place, str(i)), whole, expected) for i in range(n)]
    equal = f"{sum(outcomes)} of {n} killed runs are equal to the unbroken run"
    print(f"{equal}, which took {whole:.1f} s")
    sys.exit(not all(outcomes))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
