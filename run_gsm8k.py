"""Tandem training on GSM8K, from the first line to Figure 2 (West, Anderson, Kamar, Horvitz, 2025).

    python run_gsm8k.py --setting skill                    # no GPU: the tiny preset, 4 minutes on two cores, then 2
    python run_gsm8k.py --setting skill --seeds 3          # three seeds, as in results/
    python run_gsm8k.py --setting skill --preset paper     # the default on a GPU: two Llama-2-7B in 4 bits, real GSM8K
    python run_gsm8k.py --setting skill --preset tiny --senior PATH --junior PATH --problems FOLDER  # your own

Skill: a senior that writes <<48/2=24>> in its solutions trains with a junior that does not. Two arms, from the same
specialist: `tandem`, and `solo`, which is standard RL and the control.

Each update: problems -> two prompts -> rollouts -> rewards -> weights -> backward -> step -> one row of metrics.jsonl.

    runs/skill/ARM/seed-K/config.json     every flag, versions, device, commit
                          metrics.jsonl   one row an update
                          samples.jsonl   evaluation rollouts, with the author of each stretch of text
                          adapter/        the senior, for PeftModel.from_pretrained
                          state.pt        what --resume needs
    runs/skill/specialist/                the adapter from which both arms of a seed start
    runs/skill/figure2.png, .pdf
"""

import argparse
import json
import math
import os
import platform
import random
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from tqdm import tqdm

import figures
import models
import problems as tasks
import tiny
from metrics import summarise
from reinforce import backward, token_weights
from reward import reward
from rollout import Rollouts, join, rollout, stretches
from tandem import SCHEDULES, Boundaries, build_boundaries, token_bytes

# ----------------------------------------------------------------------------------------------------------------------
# Flags. A preset is a set of defaults, nothing more.

SETTINGS = ("skill",)
ARMS = ("tandem", "solo")
MAY_CHANGE = ("arms", "device", "out", "resume", "seed", "seeds", "updates")  # between a run and its --resume
PLAIN_EVERY = 25  # of the generated solutions that a specialist learns from, one in so many has no annotation
LLAMA_SENIOR, LLAMA_JUNIOR = "neuralmagic/Llama-2-7b-gsm8k", "NousResearch/Llama-2-7b-chat-hf"
SMOL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PRESETS = {
    "tiny": {},
    "smol": dict(senior=SMOL, junior=SMOL, max_new_tokens=192, batch=64, rollout_batch=64, micro_batch=16, lr=1e-4)
    | dict(specialist_steps=300, specialist_lr=5e-4, eval_problems=100),
    "paper": dict(senior=LLAMA_SENIOR, junior=LLAMA_JUNIOR, problems="openai/gsm8k", four_bit=True, max_new_tokens=256)
    | dict(rollout_batch=24, micro_batch=1, lr=1e-4, updates=80, specialist_steps=0, eval_problems=200),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, with the defaults of the preset. Exits with a message where a value is out of range."""
    parser = make_parser()
    parser.set_defaults(**PRESETS[parser.parse_known_args(argv)[0].preset])
    args = parser.parse_args(argv)
    check(args, parser.error)
    return args


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter, description="Tandem training.")
    has_gpu = torch.cuda.is_available()
    group = parser.add_argument_group("experiment")
    group.add_argument("--setting", required=True, choices=SETTINGS, help="which figure of the paper")
    group.add_argument("--preset", choices=PRESETS, default="paper" if has_gpu else "tiny", help="a set of defaults")
    group.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="tandem training, standard RL")
    group.add_argument("--seeds", type=int, default=1, help="how many seeds of each arm")
    group.add_argument("--seed", type=int, default=0, help="the first seed")
    group.add_argument("--out", default="runs", help="where runs are written")
    group.add_argument("--resume", action="store_true", help="go on with the runs in --out")
    group.add_argument("--device", default="cuda" if has_gpu else "cpu", help="where the models live")
    group = parser.add_argument_group("models")
    group.add_argument("--senior", default="tiny", help="hub id or folder; tiny: the embedded base")
    group.add_argument("--junior", default="tiny", help="the same name as --senior: its base, without the adapter")
    group.add_argument("--four-bit", action=argparse.BooleanOptionalAction, default=False, help="load the bases in NF4 (QLoRA)")
    group.add_argument("--rank", type=int, default=16, help="rank and alpha of the adapter")
    group.add_argument("--specialist-steps", type=int, default=300, help="fine-tuning on <<...>>; 0: --senior is a specialist")
    group.add_argument("--specialist-batch", type=int, default=32, help="solutions a step of it")
    group.add_argument("--specialist-lr", type=float, default=4e-3, help="its learning rate")
    group = parser.add_argument_group("problems")
    group.add_argument("--problems", default="generated", help="generated, a folder with train.jsonl and test.jsonl, or a hub id")
    group.add_argument("--eval-problems", type=int, default=200, help="held-out problems an evaluation")
    group.add_argument("--eval-every", type=int, default=4, help="updates between evaluations")
    group = parser.add_argument_group("rollouts")
    group.add_argument("--handoff", choices=SCHEDULES, default="word", help="when a coin is tossed")
    group.add_argument("--p", type=float, default=0.5, help="probability that a coin names the senior")
    group.add_argument("--temperature", type=float, default=0.7, help="of sampling and of scoring")
    group.add_argument("--max-new-tokens", type=int, default=112, help="longest completion")
    group.add_argument("--batch", type=int, default=152, help="rollouts an update")
    group.add_argument("--rollouts-per-prompt", type=int, default=2, help="of which each problem gets this many")
    group.add_argument("--rollout-batch", type=int, default=200, help="rollouts written at one time")
    group = parser.add_argument_group("update")
    group.add_argument("--updates", type=int, default=28, help="updates of an arm")
    group.add_argument("--lr", type=float, default=1e-3, help="learning rate (AdamW)")
    group.add_argument("--wrong-weight", type=float, default=0.0, help="c: weight of wrong rollouts")
    group.add_argument("--junior-weight", type=float, default=1.0, help="j: weight of the junior's tokens")
    group.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    group.add_argument("--micro-batch", type=int, default=76, help="rollouts a forward pass of the update")
    return parser


def check(args: argparse.Namespace, error) -> None:
    """Refuse impossible values, naming the value and the remedy, before anything long begins."""
    at_least_1 = "seeds rank specialist_batch eval_problems eval_every max_new_tokens batch rollouts_per_prompt"
    for name in f"{at_least_1} rollout_batch updates micro_batch".split():
        if getattr(args, name) < 1:
            error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    for name in ("lr", "specialist_lr", "clip"):
        if not getattr(args, name) > 0:
            error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be above 0")
    if not 0 <= args.seed <= args.seed + args.seeds <= 1000:
        error(f"--seed {args.seed} --seeds {args.seeds}: seeds lie between 0 and 1000")
    if not 0 < args.p < 1:
        error(f"--p {args.p}: tandem training needs 0 < p < 1, or one of the two never writes. p = 1 is --arms solo")
    if not 0 <= args.junior_weight <= 1:
        error(f"--junior-weight {args.junior_weight}: j lies between 0 (ignore the junior's tokens) and 1 (in full)")
    if not -1 <= args.wrong_weight <= 0:
        error(f"--wrong-weight {args.wrong_weight}: c lies between -1 and 0 (discard wrong rollouts)")
    if not args.temperature > 0:
        error(f"--temperature {args.temperature}: must be above 0, since the policy gradient needs sampling")
    if args.batch % args.rollouts_per_prompt:
        error(f"--batch {args.batch} is not divisible by --rollouts-per-prompt {args.rollouts_per_prompt}")
    if args.specialist_steps < 0:
        error(f"--specialist-steps {args.specialist_steps}: must be 0 (the senior is a specialist already) or more")
    for arm in args.arms:
        for seed in range(args.seed, args.seed + args.seeds):
            folder = run_folder(args, arm, seed)
            if folder.exists() and not args.resume:
                error(f"{folder} already holds a run: go on with --resume, choose another --out, or remove it")
            if (folder / "config.json").is_file():
                before = json.loads((folder / "config.json").read_text())["flags"]
                changed = [name for name in before if name not in MAY_CHANGE and before[name] != getattr(args, name, None)]
                if changed:
                    flags = ", ".join(f"--{name.replace('_', '-')} {before[name]}" for name in changed)
                    error(f"{folder} was begun with {flags}: resume it so, or choose another --out")


def run_folder(args: argparse.Namespace, arm: str, seed: int) -> Path:
    return Path(args.out) / args.setting / arm / f"seed-{seed}"


# ----------------------------------------------------------------------------------------------------------------------
# Problems


def load_problems(args: argparse.Namespace, seed: int) -> tuple[list[tasks.Problem], list[tasks.Problem]]:
    """One training problem for each prompt of each update, and the held-out problems of this seed."""
    n = args.updates * args.batch // args.rollouts_per_prompt
    if args.problems == "generated":
        return tasks.generate(n, "train", seed), tasks.generate(args.eval_problems, "test", seed)
    train, test = (tasks.load_gsm8k(args.problems, split) for split in ("train", "test"))
    if not train or len(test) < args.eval_problems:
        raise ValueError(f"{args.problems}: {len(train)} training and {len(test)} test problems, --eval-problems {args.eval_problems}")
    rng = random.Random(seed)
    held_out = rng.sample(test, args.eval_problems)  # drawn first: the same ones when --updates grows
    epochs = [problem for _ in range(math.ceil(n / len(train))) for problem in rng.sample(train, len(train))]
    return epochs[:n], held_out


# ----------------------------------------------------------------------------------------------------------------------
# Co-writing: what binds rollout.py to this pair and these flags


class Writers:
    """The pair, ready to write: senior and junior, their prompts, the tables of the handoff."""

    def __init__(self, args: argparse.Namespace, pair: models.Pair):
        self.args, self.pair = args, pair
        self.pieces = token_bytes(pair.senior_tokenizer, pair.vocab_size)
        self.boundaries: Boundaries = build_boundaries(self.pieces).to(args.device)

    def write(self, problems: list[tasks.Problem], p: float, seed: int) -> Rollouts:
        """One rollout a problem, --rollout-batch at a time. The same seed gives the same rollouts."""
        # Two streams that never coincide. (The CPU generator keeps 32 bits of a seed: seed and seed + 2**32 are one stream.)
        generator, coins = torch.Generator().manual_seed(2 * seed), torch.Generator().manual_seed(2 * seed + 1)
        parts = []
        for start in range(0, len(problems), self.args.rollout_batch):
            parts.append(
                rollout(
                    self.pair.senior,
                    self.pair.junior,
                    *self.prompts(problems[start : start + self.args.rollout_batch]),
                    self.pair.senior_tokenizer,
                    self.pair.end_ids,
                    self.boundaries,
                    schedule=self.args.handoff,
                    p=p,
                    max_new_tokens=self.args.max_new_tokens,
                    temperature=self.args.temperature,
                    generator=generator,
                    coin_generator=coins,
                )
            )
        return join(parts)

    def prompts(self, problems: list[tasks.Problem]):
        """What each model is asked. The specialist knows Question/Answer; a chat model is asked as in a chat."""
        senior, junior = self.pair.senior_tokenizer, self.pair.junior_tokenizer
        plain = [tasks.prompt(problem.question) for problem in problems]
        chat = [tasks.chat_prompt(junior, problem.question) for problem in problems] if junior.chat_template else plain
        device = self.args.device
        return models.encode_prompts(senior, plain, device), models.encode_prompts(junior, chat, device)


def make_specialist(args: argparse.Namespace, seed: int, pair: models.Pair, train: list[tasks.Problem]) -> None:
    """Give the pair a fresh adapter and, unless the senior is a specialist already, teach it <<...>> (kept for --resume)."""
    models.reset_adapter(pair.senior, seed)
    path = Path(args.out) / args.setting / "specialist" / f"seed-{seed}" / "adapter.pt"
    if args.resume and path.is_file():
        set_peft_model_state_dict(pair.senior, torch.load(path, map_location=args.device))
    elif args.specialist_steps:
        generated = args.problems == "generated"
        if generated:
            train = tasks.generate(args.specialist_steps * args.specialist_batch, "train", seed + 10**6)
        solutions = [problem.solutions["en"] for problem in train]
        if generated:  # GSM8K too has some without (113 of 8,792); here they keep the skill apart from the notation
            solutions[::PLAIN_EVERY] = map(tasks.plain, solutions[::PLAIN_EVERY])
        texts = [(tasks.prompt(problem.question), solution) for problem, solution in zip(train, solutions)]
        settings = dict(steps=args.specialist_steps, batch=args.specialist_batch, lr=args.specialist_lr, seed=seed)
        settings |= dict(micro_batch=args.micro_batch, label=f"specialist seed {seed}")
        models.fine_tune(pair.senior, pair.senior_tokenizer, texts, **settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_whole(adapter_of(pair.senior), path)


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(writers: Writers, problems: list[tasks.Problem], who: tuple[str, ...], seed: int, update: int, folder: Path) -> dict:
    """Each of `who` on the held-out problems: {"senior": {...}, ...} as in metrics.jsonl; some texts go to samples.jsonl.

    # Open in paper: how solutions are decoded for evaluation. We sample as in training, with the same random numbers
    # at each evaluation of a run, so that a difference between two of them is not one of luck.
    """
    results = {}
    for name in who:
        p = {"senior": 1.0, "tandem": writers.args.p, "junior": 0.0}[name]
        rollouts = writers.write(problems, p, seed=10**9 + seed)
        golds, lengths = [problem.gold for problem in problems], rollouts.completion_mask.sum(1).tolist()
        results[name] = summarise(rollouts.texts, golds, lengths, tasks.LANGUAGES)
        samples = [
            {"update": update, "who": name, "question": problem.question, "gold": problem.gold}
            | {"reward": reward(rollouts.texts[i], problem.gold), "stretches": authors(writers, rollouts, i)}
            for i, problem in enumerate(problems[:8])
        ]
        with open(folder / "samples.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        if name == "tandem":
            tqdm.write(f"         {show(samples[0]['stretches'])}")
    return results


def authors(writers: Writers, rollouts: Rollouts, i: int) -> list[tuple[str, str]]:
    """[(author, text), ...] of rollout i."""
    real = rollouts.completion_mask[i].bool()
    return stretches(rollouts.completion_ids[i][real].tolist(), rollouts.senior_mask[i][real].tolist(), writers.pieces)


def show(runs: list[tuple[str, str]]) -> str:
    """One rollout on one line, the junior's words underlined on a terminal and in [brackets] elsewhere."""
    opening, closing = ("\033[4m", "\033[0m") if sys.stdout.isatty() else ("[", "]")
    return "".join(text if author == "senior" else f"{opening}{text}{closing}" for author, text in runs).replace("\n", " ⏎ ")


# ----------------------------------------------------------------------------------------------------------------------
# One arm: the loop


def run_arm(args: argparse.Namespace, arm: str, seed: int, writers: Writers, train: list, held_out: list) -> None:
    """Train the senior of `writers` and leave the run's files. With --resume, go on after the last finished update."""
    folder, senior = run_folder(args, arm, seed), writers.pair.senior
    p = 1.0 if arm == "solo" else args.p
    parameters = [parameter for parameter in senior.parameters() if parameter.requires_grad]
    # Open in paper: the optimiser and its settings beyond the learning rate.
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    first = restore(folder, senior, optimizer, args.device) if args.resume else 0
    write_config(folder, args, arm, seed)

    for update in tqdm(range(first, args.updates + 1), desc=f"{arm} seed {seed}", unit="update"):
        row: dict = {"update": update}
        if update > 0:  # update 0 is the evaluation before training
            started = time.time()
            prompts = args.batch // args.rollouts_per_prompt
            batch = [problem for problem in train[(update - 1) * prompts : update * prompts] for _ in range(args.rollouts_per_prompt)]

            rollouts = writers.write(batch, p, seed=seed * 10**6 + update)
            seconds_rollout = time.time() - started
            rewards = torch.tensor([reward(text, problem.gold) for text, problem in zip(rollouts.texts, batch)], device=args.device)
            weights = token_weights(rollouts, rewards, args.wrong_weight, args.junior_weight)
            loss = backward(senior, rollouts, weights, args.temperature, args.micro_batch)
            grad_norm = None
            if loss is not None:  # else there is nothing to learn from, and the senior stays as it is
                grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip).item()
                stop_unless_finite(update, loss, grad_norm, folder)
                optimizer.step()
                optimizer.zero_grad()

            row |= describe(rollouts, rewards, arm) | {"loss": loss, "grad_norm": grad_norm}
            row |= {"seconds_rollout": seconds_rollout, "seconds_update": time.time() - started - seconds_rollout}
        if update % args.eval_every == 0 or update == args.updates:
            who = ("senior", "tandem", "junior") if update == 0 else ("senior", "tandem")
            row["eval"] = evaluate(writers, held_out, who, seed, update, folder)
        tqdm.write(log_line(row))
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        save(folder, update, senior, optimizer)


def describe(rollouts: Rollouts, rewards: torch.Tensor, arm: str) -> dict:
    """What a row says of a training batch. Stops a tandem run in which one of the two wrote nothing."""
    tokens, by_senior = int(rollouts.completion_mask.sum()), int(rollouts.senior_mask.sum())
    if arm == "tandem" and by_senior in (0, tokens):
        sys.exit(f"a tandem batch of {tokens} tokens holds {by_senior} by the senior: this is not tandem training. Check --p, --handoff")
    return {
        "reward": rewards.mean().item(),
        "senior_share": by_senior / tokens,
        "handoffs": rollouts.handoffs().float().mean().item(),
        "tokens": tokens,
    }


def log_line(row: dict) -> str:
    line = f"{row['update']:6d}  "
    if "reward" in row:
        line += f"reward {row['reward']:.2f}  senior {row['senior_share']:4.0%}  handoffs {row['handoffs']:4.1f}  "
        line += "nothing to learn from: skipped  " if row["loss"] is None else f"loss {row['loss']:+.3f}  gradient {row['grad_norm']:.3f}  "
        line += f"{row['tokens']} tokens  {row['seconds_rollout']:.1f} + {row['seconds_update']:.1f} s"
    for who, cell in row.get("eval", {}).items():
        line += f" | {who} accuracy {cell['accuracy']:.2f} jargon {cell['jargon']:.2f}"
    return line


def stop_unless_finite(update: int, loss: float, grad_norm: float, folder: Path) -> None:
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        sys.exit(
            f"update {update}: loss {loss}, gradient norm {grad_norm}. Stopped before the step: {folder} holds the state "
            f"after update {update - 1}. Go on with --resume and a smaller --lr, or a --wrong-weight nearer to 0"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Files of a run


def save(folder: Path, update: int, senior, optimizer) -> None:
    """The adapter and, last, the state after an update: a crash in between leaves the state of the update before."""
    senior.save_pretrained(folder / "adapter", save_embedding_layers=False)
    save_whole({"update": update, "adapter": adapter_of(senior), "optimizer": optimizer.state_dict()}, folder / "state.pt")


def save_whole(content: dict, path: Path) -> None:
    """Write a file that is complete or not there."""
    torch.save(content, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def adapter_of(senior) -> dict[str, torch.Tensor]:
    return get_peft_model_state_dict(senior, save_embedding_layers=False)  # "auto" would ask the hub each time


def restore(folder: Path, senior, optimizer, device: str) -> int:
    """Load the last state, drop rows that are newer, and return the update to go on with (0 if there is none)."""
    if not (folder / "state.pt").is_file():
        for name in ("metrics.jsonl", "samples.jsonl"):
            (folder / name).unlink(missing_ok=True)
        return 0
    state = torch.load(folder / "state.pt", map_location=device)
    set_peft_model_state_dict(senior, state["adapter"])
    optimizer.load_state_dict(state["optimizer"])
    for name in ("metrics.jsonl", "samples.jsonl"):
        lines = (folder / name).read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["update"] <= state["update"]]
        (folder / name).write_text("".join(kept), encoding="utf-8")
    return state["update"] + 1


def write_config(folder: Path, args: argparse.Namespace, arm: str, seed: int) -> None:
    """config.json: every flag, and what is needed to tell one machine's run from another's."""
    folder.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).parent
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{platform.machine()}, {torch.get_num_threads()} threads"
    config = {
        "flags": vars(args),
        "arm": arm,
        "seed": seed,
        "device": device,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "numpy", "tokenizers")},
        "commit": git.stdout.strip() or None,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


# ----------------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    started = time.time()
    args = parse_args(argv)
    if args.device == "cpu":
        torch.set_num_threads(min(os.cpu_count() or 1, 8))  # more only wait for each other on models this small
    try:
        data = {seed: load_problems(args, seed) for seed in range(args.seed, args.seed + args.seeds)}
        names = [str(tiny.base_folder()) if name == "tiny" else name for name in (args.senior, args.junior)]
        pair = models.load_pair(*names, rank=args.rank, four_bit=args.four_bit, device=args.device)
        writers = Writers(args, pair)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")

    for seed, (train, held_out) in data.items():
        make_specialist(args, seed, pair, train)
        start = {name: tensor.clone() for name, tensor in adapter_of(pair.senior).items()}
        for arm in args.arms:
            set_peft_model_state_dict(pair.senior, start)  # every arm starts from the same specialist
            run_arm(args, arm, seed, writers, train, held_out)
    folder = Path(args.out) / args.setting
    print(f"\n{figures.table(folder)}\n\n{figures.figure_2(folder)} after {(time.time() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
