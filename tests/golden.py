"""Golden runs: what three updates of each arm write and learn, as checksums.

    python tests/golden.py            # compare with tests/golden.json
    python tests/golden.py --make     # make tests/golden.json anew

tests/golden.json was made at commit e72e774, before the code was rewritten, so it says that tokens,
authors, tosses, rewards and gradients are still the same. test_golden.py runs a part of it.
"""

# ruff: noqa: E402, I001  the path comes first, and conftest before torch
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import real  # no network, and one thread
import hashlib
import json
import tempfile

import pytest

import run_gsm8k

GOLDEN = Path(__file__).with_suffix(".json")
# An evaluation changes nothing of what is compared, so it may be small.
SIZE = "--updates 3 --batch 48 --eval-problems 1 --eval-every 3"
RUNS = {  # setting: its arms
    "skill": "tandem solo",
    "granularity": "token sentence paragraph redraw p-0.25",
    "control": "senior-only shuffled de-fr-tandem",
    "sweep": "c-0.5-j1",
    "pressure": "grpo-tandem",
    "rlvr": "rlvr-tandem rlvr-solo-kl",
}


def machine() -> str:
    """The processor: between processors rounding may differ, and with it a token."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "unknown")


def record(setting: str) -> dict[str, list[dict]]:
    """{arm: what every update wrote and learned} of the arms of a setting."""
    found: dict[str, list[dict]] = {}

    def generate(problems, args, pair, p, seed, *, original=run_gsm8k.generate, **more):
        if seed >= 10**9:
            return original(problems, args, pair, p, seed, **more)  # an evaluation
        trace: list = []
        rollouts = original(problems, args, pair, p, seed, **more, trace=trace)
        columns = {"ids": real(rollouts), "senior": real(rollouts, "senior_mask"), "tosses": []}
        for row, n in enumerate(map(len, columns["ids"])):
            columns["tosses"].append([int(step[3][step[0].index(row)]) for step in trace[:n]])
        data = {name: json.dumps(rows).encode() for name, rows in columns.items()}
        sums = {name: hashlib.sha256(data[name]).hexdigest()[:16] for name in data}
        pairs = zip(rollouts.texts, problems)
        rewards = [str(int(run_gsm8k.reward(text, problem.gold))) for text, problem in pairs]
        found.setdefault(args.arm, []).append(sums | {"rewards": "".join(rewards)})
        return rollouts

    with tempfile.TemporaryDirectory() as out, pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_gsm8k, "generate", generate)
        patch.setattr(run_gsm8k.terminal.figures, "draw_all", lambda *_: None)
        command = f"--setting {setting} --arms {RUNS[setting]} {SIZE} --device cpu --jobs 1"
        # The arms of Tandem RL have no specialist.
        command += "" if setting == "rlvr" else " --specialist-steps 60"
        run_gsm8k.main([*command.split(), "--out", out])
        for arm, updates in found.items():
            lines = (Path(out) / arm / "seed-0" / "metrics.jsonl").read_text().splitlines()
            for sums, line in zip(updates, lines[1:]):
                sums["grad_norm"] = json.loads(line)["grad_norm"]
    return found


def differences(found: dict, golden: dict) -> list[str]:
    """What differs from the golden runs. Gradients may differ by 1e-5 of their norm."""
    wrong = []
    for arm, updates in found.items():
        for i, (ours, theirs) in enumerate(zip(updates, golden[arm], strict=True), 1):
            same = {key: ours[key] == theirs[key] for key in ours}
            gap = abs(ours["grad_norm"] - theirs["grad_norm"])
            same["grad_norm"] = gap <= 1e-5 * theirs["grad_norm"]
            wrong += [f"{arm} {i} {key}" for key in same if not same[key]]
    return wrong


if __name__ == "__main__":
    recorded = {arm: updates for name in RUNS for arm, updates in record(name).items()}
    if sys.argv[1:] == ["--make"]:
        GOLDEN.write_text(json.dumps({"machine": machine()} | recorded, indent=1) + "\n")
    elif wrong := differences(recorded, json.loads(GOLDEN.read_text())):
        sys.exit(f"differs: {', '.join(wrong)}")
    else:
        print(f"{len(recorded)} arms are equal")
