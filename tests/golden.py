"""Golden runs: what three updates of each arm write and learn, as checksums.

    python tests/golden.py            # compare with tests/golden.json
    python tests/golden.py --make     # make tests/golden.json anew

tests/golden.json was made at commit e72e774, before the code was rewritten, so it says that tokens,
authors, tosses, rewards and gradients are still the same. test_golden.py runs a part of it.
"""

# ruff: noqa: I001  `lab` comes before torch
import os
import sys
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).parent.parent))

import lab  # noqa: F401, E402
import hashlib  # noqa: E402
import json  # noqa: E402
import tempfile  # noqa: E402

import torch  # noqa: E402

import run_gsm8k  # noqa: E402

GOLDEN = Path(__file__).with_suffix(".json")
SIZE = "--updates 3 --batch 48 --eval-problems 8 --eval-every 3"
SPECIALIST = "--specialist-steps 60"
# setting: (its arms, further flags)
RUNS = {
    "skill": ("tandem solo", SPECIALIST),
    "granularity": ("token sentence paragraph redraw p-0.25", SPECIALIST),
    "control": ("senior-only shuffled de-fr-tandem", SPECIALIST),
    "sweep": ("c-0.5-j1", SPECIALIST),
    "pressure": ("grpo-tandem", SPECIALIST),
    "rlvr": ("rlvr-tandem rlvr-solo-kl", ""),
}


def machine() -> str:
    """The processor: between processors rounding may differ, and with it a token."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "unknown")


def checksum(content) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def record(setting: str, arms: str, flags: str, patch) -> dict[str, list[dict]]:
    """{arm: what every update wrote and learned}. patch(owner, name, value) is that of pytest."""
    found: dict[str, list[dict]] = {}
    real = run_gsm8k.generate

    def generate(problems, args, pair, p, seed, **more):
        if seed >= 10**9:
            return real(problems, args, pair, p, seed, **more)  # an evaluation
        trace = []
        rollouts = real(problems, args, pair, p, seed, **more, trace=trace)
        lengths = rollouts.completion_mask.sum(1).tolist()
        columns: dict[str, list] = {"ids": [], "senior": [], "tosses": []}
        for row, n in enumerate(lengths):
            columns["ids"].append(rollouts.completion_ids[row][:n].tolist())
            columns["senior"].append(rollouts.senior_mask[row][:n].tolist())
            columns["tosses"].append([int(step[3][step[0].index(row)]) for step in trace[:n]])
        pairs = zip(rollouts.texts, problems)
        rewards = [str(int(run_gsm8k.reward(text, problem.gold))) for text, problem in pairs]
        sums = {name: checksum(rows) for name, rows in columns.items()}
        sums["rewards"] = "".join(rewards)
        found.setdefault(args.arm, []).append(sums)
        return rollouts

    patch(run_gsm8k, "generate", generate)
    with tempfile.TemporaryDirectory() as out:
        command = f"--setting {setting} --arms {arms} {SIZE} {flags} --device cpu --jobs 1"
        command += f" --out {out}"
        run_gsm8k.main(command.split())
        for arm, updates in found.items():
            lines = (Path(out) / arm / "seed-0" / "metrics.jsonl").read_text().splitlines()
            for sums, line in zip(updates, lines[1:]):
                sums["grad_norm"] = json.loads(line)["grad_norm"]
    patch(run_gsm8k, "generate", real)
    return found


def differences(found: dict, golden: dict) -> list[str]:
    """What differs from the golden runs. Gradients may differ by 1e-5 of their norm."""
    wrong = []
    for arm, updates in found.items():
        for i, (ours, theirs) in enumerate(zip(updates, golden[arm], strict=True), 1):
            same = [key for key in ours if key != "grad_norm"]
            wrong += [f"{arm} {i} {key}" for key in same if ours[key] != theirs[key]]
            if abs(ours["grad_norm"] - theirs["grad_norm"]) > 1e-5 * theirs["grad_norm"]:
                wrong.append(f"{arm} {i} grad_norm")
    return wrong


if __name__ == "__main__":
    torch.set_num_threads(1)
    recorded = {}
    for name, (arms, flags) in RUNS.items():
        recorded |= record(name, arms, flags, setattr)
    if sys.argv[1:] == ["--make"]:
        GOLDEN.write_text(json.dumps({"machine": machine()} | recorded, indent=1) + "\n")
    else:
        wrong = differences(recorded, json.loads(GOLDEN.read_text()))
        sys.exit(
            f"differs: {', '.join(wrong)}" if wrong else print(f"{len(recorded)} arms are equal")
        )
