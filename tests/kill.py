"""Kill runs at random moments, resume them, and compare them with a run that was never killed:  python tests/kill.py [N]

Every other kill is aimed at a moment of writing: in the middle of a row or of a draft, before or after a draft takes the
place of a file, and with half an adapter written. The others come after a random time. Rows (but for seconds), samples, the
adapter and the optimiser of a resumed run must be those of the unbroken run, bit for bit, and no draft may be left.

Each run is a fork of this process, so that torch is imported once. pytest does not collect this file.
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
from torch.utils._pytree import tree_leaves
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import run_gsm8k
from lab import runs, tiny

KILL = signal.SIGKILL


def make_base(folder: Path) -> None:
    """A random Llama of some thousand parameters, with the tokenizer of the tiny base."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.FOLDER)
    torch.manual_seed(0)
    sizes = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=512)
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.3, eos_token_id=tokenizer.eos_token_id, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def command_for(base: Path, out: Path) -> list[str]:
    flags = f"--setting skill --arms tandem --preset tiny --senior {base} --junior {base} --out {out} --device cpu --updates 4 --batch 8"
    return f"{flags} --eval-problems 4 --eval-every 2 --max-new-tokens 12 --specialist-steps 2 --rank 2".split()


def aim(target: str, count: int) -> None:
    """Let the count-th call of a function that writes end in a SIGKILL, before, after or amid what it does."""
    where, moment = target.split()
    owner, name = {
        "row": (runs, "append_rows"),
        "draft": (Path, "write_bytes"),
        "replace": (os, "replace"),
        "adapter": (PeftModel, "save_pretrained"),
    }[where]
    real, calls = getattr(owner, name), []

    def wrapper(*args, **options):
        calls.append(1)
        if len(calls) < count:
            return real(*args, **options)
        if moment == "amid" and where == "row":
            with open(args[0], "a") as file:
                file.write('{"update": 1, "rew')
        elif moment == "amid" and where == "draft":
            real(args[0], args[1][: len(args[1]) // 2])
        elif moment != "before":
            real(*args, **options)
        if moment == "amid" and where == "adapter":
            path = args[1] / "adapter_model.safetensors"
            os.truncate(path, path.stat().st_size // 2)
        return os.kill(os.getpid(), KILL)

    setattr(owner, name, wrapper)


TARGETS = ["row before", "row amid", "row after", "draft amid", "replace before", "replace after", "adapter amid", "adapter after"]


def run(command: list[str], target: str = "", count: int = 0, seconds: float = 0.0) -> int:
    """The exit status of a run in a process of its own, which is killed at a target or after some seconds."""
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        run_gsm8k.reward = lambda text, gold: 1.0
        run_gsm8k.figures.draw = lambda *args: None
        if target:
            aim(target, count)
        status = 0
        try:
            run_gsm8k.main(command)
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
        os._exit(status)
    if seconds:
        time.sleep(seconds)
        os.kill(child, KILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def result(folder: Path) -> list:
    """Everything that must be equal, as a list of comparable things."""
    rows = runs.read_rows(folder / "metrics.jsonl")
    rows = [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in rows]
    state = torch.load(folder / "state.pt")
    leaves = [leaf.numpy().tobytes() if isinstance(leaf, torch.Tensor) else leaf for leaf in tree_leaves(state)]
    return [rows, runs.read_rows(folder / "samples.jsonl"), leaves, (folder / "adapter" / "adapter_model.safetensors").read_bytes()]


def main(n: int) -> None:
    rng, failures = random.Random(n), 0
    with tempfile.TemporaryDirectory() as place:
        base, out = Path(place, "base"), Path(place, "unbroken")
        make_base(base)
        started = time.time()
        assert run(command_for(base, out)) == 0
        whole, expected = time.time() - started, result(out / "tandem" / "seed-0")
        for i in range(n):
            out = Path(place, str(i))
            command, folder = command_for(base, out), out / "tandem" / "seed-0"
            if i % 2:
                target, count = TARGETS[i // 2 % len(TARGETS)], rng.randint(1, 6)
                what, status = f"{target}, call {count}", run(command, target, count)
            else:
                seconds = rng.uniform(0.2, 1.0) * whole
                what, status = f"after {seconds:.2f} s", run(command, seconds=seconds)
            had = [row["update"] for row in runs.read_rows(folder / "metrics.jsonl")] if folder.is_dir() else []
            resumed = run([*command, "--resume"])
            equal = resumed == 0 and result(folder) == expected
            clean = runs.seed_folders(out, "tandem") == [folder] and not list(folder.glob("*.*.[0-9]*"))
            failures += not (equal and clean)
            verdict = f"{'bit-equal' if equal else 'DIFFERENT'}, {'no draft left' if clean else 'DRAFTS LEFT'}"
            print(f"{i:3d}  killed {what:28s} status {status:3d}  rows then {str(had):18s} resumed with {resumed}: {verdict}", flush=True)
    print(f"{n - failures} of {n} killed runs are equal to the unbroken run, which took {whole:.1f} s")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
