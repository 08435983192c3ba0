"""ATOD: annealed turn-aware on-policy distillation, on a text game that is played over several turns.

A student learns from two signals at once: from a frozen teacher, which grades every token that the student writes (on-policy
distillation, OPD), and from the reward at the end of the game (GRPO). The weight moves from the first signal to the second
during training, and within a game the teacher counts most in the turns that seem most informative (T-DUR). The method is that
of Tan, Zong, Li and Chen (2026, arXiv 2606.27814). We know its abstract, its equations through secondary sources, and code
that was written for it, but not the full text.

    delta_t = log pi_teacher(a_t | s_t) - log pi_old(a_t | s_t)                  the signal of OPD, a constant
    A_i     = (R_i - mean(R)) / std(R)                                           the advantage of GRPO (reinforce.py)
    A_t     = kappa(s) * w_k(t) * delta_t + rho(s) * A_i                                                      (8)
    q = min(s / T, 1);   kappa = max(0.1, 1 - 0.9 q);   rho = 1 + q                                    (10 to 12)
    d_k = mean_t |log pi_old - log pi_teacher|;   h_k = mean_t (-log pi_old)         over the tokens of turn k
    w_k = 1 - (1 - d~_k) * (1 - h~_k)        ~: min-max normalised over the turns of a game            (13 to 16)

    symbol       variable               meaning
    s, T         step, horizon          the number of the update, and when the annealing ends
    kappa, rho   kappa, rho             the weights of teacher and reward
    w_k          turn_weights           the weight of the distillation in turn k, between 0 and 1
    k(t)         turns (B, C)           the turn in which token t was written
    A_t          weights (B, C)         enters the clipped objective of GRPO; there is no KL term

Worked example of (8), three quarters of the way to T. q = 0.75, kappa = 0.325 and rho = 1.75. A token that the teacher finds
more likely by 0.4 nats, in a turn of weight 0.5 of a game with advantage -0.2, has A_t = 0.325 * 0.5 * 0.4 - 1.75 * 0.2 = -0.285.

What is ours, and marked "Reconstruction:" below: the game, the models and how they are warmed up, all numbers in Settings but
T-DUR's guards and the shape of the schedule, the weights of the arm without annealing, and the arms that ask why the order of
the methods may differ. The paper trains language models of 0.6 to 4 billion parameters on ALFWorld, WebShop and Search-QA. Here
students of 61,000 parameters play a game of 4 places. Nothing here measures what a pretrained model brings along.

What is reused. A game is one text with two authors, which is what Rollouts holds: the student writes the actions, and the game,
in the place of the junior, the observations. So rollout.py (with p = 1, one call per turn), the log-probabilities, the group
advantages and the clipped objective of reinforce.py serve unchanged. Its micro-batches are not needed for games of 32 tokens.
A turn reads the whole game anew instead of keeping a cache across turns, because rollout.py begins with a prompt.

    python -m companions.atod --seeds 5        every arm, the table and the figure, in runs/companions/atod
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from lab import runs
from lab.flags import number
from lab.models import disable_dropout, pad
from metrics import seed_interval
from reinforce import clipped_objective, completion_logprobs, frozen_logprobs, group_advantages
from rollout import Pair, Rollouts, rollout
from tandem import build_tables

# Shapes: B games (rollouts), C tokens of a game after its task, K turns of a game.


# ----------------------------------------------------------------------------------------------------------------------
# The method


def annealed(step: int, horizon: float) -> tuple[float, float]:
    """Equations (10) to (12): (kappa, rho) at update `step`; both stay as they are after `horizon` updates, T.

    >>> [tuple(round(x, 3) for x in annealed(step, horizon=80)) for step in (0, 40, 80, 200)]
    [(1.0, 1.0), (0.55, 1.5), (0.1, 2.0), (0.1, 2.0)]
    """
    q = min(step / horizon, 1.0)
    # kappa = max(0.1, 1 - 0.9 q); rho = 1 + q: the reward always counts, from as much as the teacher to 20 times as much.
    return max(0.1, 1 - 0.9 * q), 1 + q


# The weights of teacher and reward at an update, by the name that an arm gives.
SCHEDULES: dict[str, Callable[[int, float], tuple[float, float]]] = {
    "annealed": annealed,
    # Reconstruction: the averages of kappa and rho over the annealing, so that both arms see the same weights in total until T.
    "constant": lambda step, horizon: (0.55, 1.5),
    "reward": lambda step, horizon: (0.0, 1.0),
    "teacher": lambda step, horizon: (1.0, 0.0),
}


def hybrid_advantages(delta: torch.Tensor, turn_weights: torch.Tensor, advantages: torch.Tensor, kappa: float, rho: float) -> torch.Tensor:
    """Equation (8): the advantage of every token, (B, C), from delta and turn weights (B, C) and the advantages of the games (B,)."""
    # A_t = kappa w_k(t) delta_t + rho A_i. The turn weight is on the teacher's term only.
    return kappa * turn_weights * delta + rho * advantages[:, None]  # (B, C)


def min_max(values: torch.Tensor) -> torch.Tensor:
    """Values (K,) scaled so that the smallest is 0 and the largest is 1; all 0.5 if they are equal up to 1e-8."""
    low, high = values.min(), values.max()
    return torch.full_like(values, 0.5) if high - low <= 1e-8 else (values - low) / (high - low)


def tdur(disagreement: torch.Tensor, uncertainty: torch.Tensor) -> torch.Tensor:
    """Equations (15) and (16): the weights w_k of the turns of one game, (K,), from d_k and h_k, (K,) each.

    A turn counts in full if it has the largest disagreement or the largest uncertainty of its game, and not at all if it has the
    smallest of both. Two guards set all weights to 1.

    >>> tdur(torch.tensor([0.0, 0.1, 0.2]), torch.tensor([0.0, 0.5, 1.0]))
    tensor([0.0000, 0.7500, 1.0000])
    """
    # With fewer than 3 turns, min-max normalisation would give hardly anything but 0 and 1.
    if len(disagreement) < 3:
        return torch.ones_like(disagreement)
    # Where teacher and student agree everywhere, normalising would blow up noise.
    if disagreement.max() < 0.01:
        return torch.ones_like(disagreement)
    # w_k = 1 - (1 - d~_k)(1 - h~_k): a turn is informative if either is large.
    return 1 - (1 - min_max(disagreement)) * (1 - min_max(uncertainty))  # (K,)


def tdur_of_tokens(old: torch.Tensor, teacher: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Equations (13) to (16) for a batch: the weight of the turn of every token, (B, C), 0 outside the turns.

    old, teacher: log-probabilities of the written tokens, (B, C). turns: the number of the turn from 0 on, -1 at tokens that
    the student did not write, (B, C).
    """
    weights = torch.zeros_like(old)
    for i in range(len(turns)):
        numbers = [k for k in turns[i].unique().tolist() if k >= 0]
        if not numbers:
            continue
        in_turn = [turns[i] == k for k in numbers]  # K masks of shape (C,)
        # d_k = mean_t |log pi_old - log pi_teacher|; h_k = mean_t (-log pi_old).
        d = torch.stack([(old[i] - teacher[i])[mask].abs().mean() for mask in in_turn])  # (K,)
        h = torch.stack([-old[i][mask].mean() for mask in in_turn])  # (K,)
        for mask, w in zip(in_turn, tdur(d, h)):
            weights[i][mask] = w
    return weights


# ----------------------------------------------------------------------------------------------------------------------
# The game. Reconstruction: it stands in for the benchmarks, none of which can be installed without a network.
#
# An item has to be brought to a place. Where things are is seen only on the spot. A game won by an expert:
#
#     task key desk >   go shelf   cup >   go box   key book >   take key   taken >   go desk   empty >   put key

PLACES, ITEMS = ("shelf", "desk", "box", "floor"), ("key", "cup", "book")
ACTIONS = [("go", place) for place in PLACES] + [(verb, item) for verb in ("take", "put") for item in ITEMS]
MAX_TURNS = 8  # an expert needs at most 6


@dataclass
class Game:
    """One game: what the task is, where everything is, and what the player has seen."""

    item: str
    target: str
    where: dict[str, str]  # item -> place; "" for the item in the player's hand
    seen: frozenset[str] = frozenset()  # places that the player has been to
    at: str = ""
    held: str = ""
    turns: int = 0
    won: bool = False

    @property
    def over(self) -> bool:
        return self.won or self.turns == MAX_TURNS

    def step(self, action: tuple[str, ...]) -> str:
        """Carry out one action, of words, and return the observation. An action that makes no sense changes nothing."""
        self.turns += 1
        match action:
            case ("go", place) if place in PLACES:
                self.at, self.seen = place, self.seen | {place}
                return " ".join([item for item in ITEMS if self.where[item] == place] or ["empty"])
            case ("take", item) if not self.held and self.at and self.where.get(item) == self.at:
                self.held, self.where[item] = item, ""
                return "taken"
            case ("put", item) if self.held and self.held == item:
                self.held, self.where[item] = "", self.at
                self.won = (item, self.at) == (self.item, self.target)
                return "done"
        return "nothing"


def new_game(rng: random.Random) -> Game:
    """A random task; its item is never at its target from the start."""
    item, target = rng.choice(ITEMS), rng.choice(PLACES)
    return Game(item, target, {i: rng.choice([p for p in PLACES if (i, p) != (item, target)]) for i in ITEMS})


def expert(game: Game, rng: random.Random, noise: float = 0.0) -> tuple[str, str]:
    """The action of a player who remembers what it has seen, or with probability `noise` a random one."""
    if rng.random() < noise:
        return rng.choice(ACTIONS)
    if game.held:
        # Anything but the item of the task is put down where the player stands.
        goal = game.target if game.held == game.item else game.at
        return ("put", game.held) if game.at == goal else ("go", goal)
    place = game.where[game.item]
    if place in game.seen:
        return ("take", game.item) if game.at == place else ("go", place)
    return "go", rng.choice([place for place in PLACES if place not in game.seen and place != game.target])


# ----------------------------------------------------------------------------------------------------------------------
# Playing a batch of games

# One token per word. "." pads and would end an action early; ">" ends an observation.
WORDS = [".", ">", "task", "go", "take", "put", "taken", "done", "empty", "nothing", *PLACES, *ITEMS]
PAD, PIECES = 0, [f" {word}".encode() for word in WORDS]
TABLES = build_tables(PIECES)
ACTION_TOKENS = 2


def encode(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def decode(ids: list[int]) -> str:
    return " ".join(WORDS[i] for i in ids)


def pad_rows(rows: list[list], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """lab.models.pad without a tokenizer, of which it needs the padding id only."""
    return pad(rows, argparse.Namespace(eos_token_id=PAD), side, "cpu")


def act(player, histories: list[list[int]], games: list[Game], rng: random.Random, generator) -> list[tuple[list[int], list[float]]]:
    """The next action of every game as (token ids, log-probabilities). player: a model, or a script such as `expert`."""
    if not isinstance(player, torch.nn.Module):
        return [(encode(" ".join(player(game, rng))), [0.0] * ACTION_TOKENS) for game in games]
    # The game so far is the prompt. With p = 1 the senior writes alone, and the junior is never run.
    pair = Pair(player, player, None, None, [PAD], PIECES, TABLES)
    prompts, noise = pad_rows(histories, "left"), torch.rand(2, ACTION_TOKENS, len(games), generator=generator)
    written = rollout(pair, prompts, prompts, noise, torch.zeros_like(noise[0]), schedule="token", p=1.0, temperature=1.0)
    lengths = written.completion_mask.sum(1).tolist()
    return [(ids[:n].tolist(), old[:n].tolist()) for ids, old, n in zip(written.completion_ids, written.logprobs, lengths)]


@torch.no_grad()
def play(player, games: list[Game], seed: int, *, opener=None, opening_turns: int = 0) -> tuple[Rollouts, torch.Tensor, torch.Tensor]:
    """Play the games to their end: (rollouts, turns (B, C), rewards (B,)). `opener` plays the first turns, if any.

    In the rollouts, completion_mask marks everything that follows the task, and senior_mask the tokens of `player`: neither the
    observations nor what the opener wrote. The reward is 1 for a game that was won and 0 otherwise.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    tasks = [encode(f"task {game.item} {game.target} >") for game in games]
    # Per game, columns of equal length: token ids, author, turn, log-probability.
    columns = [([], [], [], []) for _ in games]
    for turn in range(MAX_TURNS):
        running = [i for i, game in enumerate(games) if not game.over]
        if not running:
            break
        # 1. The player writes an action in every game that is not over.
        current = opener if turn < opening_turns else player
        actions = act(current, [tasks[i] + columns[i][0] for i in running], [games[i] for i in running], rng, generator)
        for i, (action, old) in zip(running, actions):
            # 2. The game answers. After the last action there is nothing to read any more.
            observation = games[i].step(tuple(WORDS[token] for token in action))
            seen = [] if games[i].over else encode(f"{observation} >")
            # 3. Who wrote which token is recorded now, and never inferred from ids.
            own, rest = current is player, [0] * len(seen)
            new = (action + seen, [int(own)] * len(action) + rest, [turn if own else -1] * len(action) + [-1 for _ in rest], old + rest)
            for column, values in zip(columns[i], new):
                column.extend(values)
    return as_rollouts(tasks, columns), pad_turns(columns), torch.tensor([float(game.won) for game in games])


def as_rollouts(tasks: list[list[int]], columns: list[tuple]) -> Rollouts:
    """Games as rollouts: the task is the prompt, and the game takes the place of the junior, with nothing to toss or discard."""
    prompts = pad_rows(tasks, "left")
    ids, mask = pad_rows([game[0] for game in columns], "right")  # (B, C)
    own = pad_rows([game[1] for game in columns], "right")[0] * mask  # (B, C)
    old = torch.zeros(ids.shape, dtype=torch.float64)  # (B, C)
    for row, game in zip(old, columns):
        row[: len(game[3])] = torch.tensor(game[3], dtype=torch.float64)
    texts = [decode(game[0]) for game in columns]
    return Rollouts(*prompts, *prompts, ids, mask, own, discarded_ids=ids, toss_mask=torch.zeros_like(ids), logprobs=old, texts=texts)


def pad_turns(columns: list[tuple]) -> torch.Tensor:
    """The turn of every token, (B, C), -1 at padding and at tokens that are not the player's."""
    turns, mask = pad_rows([game[2] for game in columns], "right")
    return torch.where(mask.bool(), turns, -1)


def success(player, seed: int, games: int, **opening) -> float:
    """The share of `games` new games that a player wins. The same seed gives the same games to every player."""
    rng = random.Random(seed)
    return play(player, [new_game(rng) for _ in range(games)], seed, **opening)[2].mean().item()


# ----------------------------------------------------------------------------------------------------------------------
# Settings and arms


@dataclass(frozen=True)
class Settings:
    """Reconstruction: all of these. They were found in trials with the seeds 90 and 91, before any of the seeds reported was run."""

    updates: int = 80
    long_updates: int = 160
    # T of equation (10) is 80 in the paper. Ours is scaled to the shorter training, to the same share as 80 of 200 updates.
    horizon: float = 32
    # 8 rollouts per task, as in the paper.
    tasks: int = 8
    group: int = 8
    lr: float = 1e-3
    clip_ratio: float = 0.2
    max_grad_norm: float = 1.0
    eval_every: int = 20
    eval_games: int = 256
    # Games on which the supervised warm-up is tested.
    demo_games: int = 128
    # Widths of the two-layer models: 61,000 and 160,000 parameters.
    student_width: int = 48
    teacher_width: int = 80
    # Supervised warm-up: batches of 64 demonstrations, and a model is tested every so many steps.
    demo_batch: int = 64
    demo_lr: float = 3e-3
    demo_test_every: int = 10
    demo_max_steps: int = 600
    # Demonstrations that blur a skilled student until it succeeds in less than a fifth of its games.
    blur_noise: float = 0.7
    blur_lr: float = 3e-4
    teacher_lr: float = 3e-4
    teacher_max_updates: int = 120
    # The longest opening by a student in the games of the teacher that is trained on a student's states.
    max_opening: int = 4


SETTINGS = Settings()


@dataclass(frozen=True)
class Arm:
    """One way to train a student."""

    schedule: str
    tdur: bool = False
    student: str = "skilled"
    teacher: str = "teacher"
    long: bool = False


# The paper's comparison, with a student that has the skills of the game and plays badly. Then the same with a student of about the
# same success that lacks a skill: it does not heed its task. Its arms ask why distillation may fail.
ARMS = {
    "grpo": Arm("reward"),
    "opd": Arm("teacher"),
    "atod": Arm("annealed", tdur=True),
    "atod-constant": Arm("constant", tdur=True),
    "atod-no-tdur": Arm("annealed"),
    "early-grpo": Arm("reward", student="early", long=True),
    "early-opd": Arm("teacher", student="early", long=True),
    "early-atod": Arm("annealed", tdur=True, student="early"),
    "early-opd-states": Arm("teacher", student="early", teacher="states-teacher"),
}


# ----------------------------------------------------------------------------------------------------------------------
# Training


def train(
    student, teacher, arm: Arm, seed: int, *, updates: int, lr: float, test: Callable[[], float], test_every: int, label: str, opener=None,
    stop_at: float = 2.0
) -> list[dict]:  # fmt: skip
    """Train `student` in place, and return a row of measures per test. A teacher of None is for GRPO alone.

    test: measures the success of the student, before training and after every `test_every` updates; training ends early at
    `stop_at`. opener: plays a random number of first turns of every game.
    """
    rng = random.Random(f"train {seed}")
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=0.0)
    rows, rewards_seen, gaps = [{"update": 0, "success": test()}], [], []
    for step in (bar := tqdm(range(updates), label, unit="update", leave=False)):
        # 1. The student plays G games of each task.
        tasks = [rng.random() for _ in range(SETTINGS.tasks)]
        games = [new_game(random.Random(task)) for task in tasks for _ in range(SETTINGS.group)]
        opening = {"opener": opener, "opening_turns": rng.randint(0, SETTINGS.max_opening)} if opener else {}
        rollouts, turns, rewards = play(student, games, rng.getrandbits(31), **opening)
        old = rollouts.logprobs.float()  # (B, C), log pi_old
        # 2. The advantage of GRPO, one number per game.
        advantages = group_advantages(rewards, SETTINGS.group)  # (B,)
        # 3. The teacher grades every token. It is neither clipped nor normalised: delta_t = log pi_teacher - log pi_old.
        graded = old if teacher is None else frozen_logprobs(teacher, rollouts, temperature=1.0)  # (B, C)
        delta = graded - old
        # 4. The weight of each turn, and of teacher and reward.
        turn_weights = tdur_of_tokens(old, graded, turns) if arm.tdur else torch.ones_like(old)
        kappa, rho = SCHEDULES[arm.schedule](step, SETTINGS.horizon)
        # 5. Only what the student wrote enters the loss.
        weights = hybrid_advantages(delta, turn_weights, advantages, kappa, rho) * rollouts.senior_mask  # (B, C)
        # 6. One step on the clipped objective of GRPO. With one step per batch the ratio is 1, and nothing is clipped.
        logprobs = completion_logprobs(student, rollouts, temperature=1.0)
        loss = -clipped_objective(logprobs, old, weights, SETTINGS.clip_ratio).sum() / rollouts.senior_mask.sum().clamp(min=1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), SETTINGS.max_grad_norm)
        # Without any signal, Adam would go on by its momentum.
        if weights.any():
            optimizer.step()
        optimizer.zero_grad()
        # Averaged over sampled tokens, -delta is the reverse KL divergence KL(student || teacher), in nats per token.
        rewards_seen.append(rewards.mean().item())
        gaps.append(-(delta * rollouts.senior_mask).sum().item() / max(1, int(rollouts.senior_mask.sum())))
        if (step + 1) % test_every == 0:
            row = {"update": step + 1, "success": test(), "reward": mean(rewards_seen), "gap": mean(gaps), "kappa": kappa, "rho": rho}
            rows.append({name: round(value, 4) for name, value in row.items()})
            bar.set_postfix_str(f"success {row['success']:.0%}")
            rewards_seen, gaps = [], []
            if row["success"] >= stop_at:
                break
    return rows


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def make_model(width: int, seed: int) -> LlamaForCausalLM:
    """A small Llama with random weights over the words of the game."""
    torch.manual_seed(seed)
    shape = dict(hidden_size=width, intermediate_size=3 * width, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64)
    token_ids = dict(bos_token_id=None, eos_token_id=PAD, pad_token_id=None)
    return disable_dropout(LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), tie_word_embeddings=True, **shape, **token_ids)))


def imitate(model, seed: int, *, noise: float, lr: float, test_every: int, done: Callable[[float], bool], label: str) -> float:
    """Maximum likelihood on demonstrations of the expert, until `done` holds for the success of the model, which is returned.

    noise: the probability that an action of the demonstrations is random. A new model warms up over 30 steps. Raises Refused if the
    model has not got there in time.
    """
    rng = random.Random(f"imitate {seed} {noise}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    for step in (bar := tqdm(range(SETTINGS.demo_max_steps), label, unit="step", leave=False)):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 30)
        games = [new_game(rng) for _ in range(SETTINGS.demo_batch)]
        worked, _, _ = play(partial(expert, noise=noise), games, rng.getrandbits(31))
        # The loss of REINFORCE with weight 1 for every word of an action: -sum_t log pi(a_t | s_t) / number of them.
        logprobs = completion_logprobs(model, worked, temperature=1.0)
        (-(logprobs * worked.senior_mask).sum() / worked.senior_mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % test_every == 0:
            share = success(model, VALIDATION + seed, SETTINGS.demo_games)
            bar.set_postfix_str(f"success {share:.0%}")
            if done(share):
                return share
    raise runs.Refused(f"seed {seed}, {label}: not done after {SETTINGS.demo_max_steps} steps. Choose another --seed")


# Seeds of games that are never trained on: those that decide when to stop, and those that are reported.
VALIDATION, TEST = 10**6, 2 * 10**6


def make_models(seed: int) -> tuple[dict[str, dict], dict]:
    """The students and teachers of a seed: ({name: state dict}, measures). It takes about two minutes.

    Reconstruction: every rule here. Each says when to stop, so that all seeds start at a comparable success.
    """
    test_every = SETTINGS.demo_test_every
    learn = partial(imitate, seed=seed, noise=0.0, lr=SETTINGS.demo_lr, test_every=test_every)
    # The early student stops where it wins every tenth game. It has not learned yet to heed the task.
    early = make_model(SETTINGS.student_width, seed)
    learn(early, done=lambda share: share >= 0.1, label="early student")
    # The skilled student learns on until it wins every second game. Then noisy demonstrations blur what it does, not what it knows.
    skilled = make_model(SETTINGS.student_width, seed)
    learn(skilled, done=lambda share: share >= 0.5, label="skilled student")
    blur = dict(noise=SETTINGS.blur_noise, lr=SETTINGS.blur_lr, test_every=2, label="blurring")
    imitate(skilled, seed, done=lambda share: share <= 0.18, **blur)
    # Two teachers: demonstrations to 40 %, and then GRPO to 70 %. The second one takes over games that the early student began.
    base = make_model(SETTINGS.teacher_width, seed + 1000)
    learn(base, done=lambda share: share >= 0.4, label="teacher, demonstrations")
    models = {"early": early, "skilled": skilled}
    measures: dict = {"seed": seed}
    for name, opener in (("teacher", None), ("states-teacher", early)):
        models[name] = make_model(SETTINGS.teacher_width, seed)
        models[name].load_state_dict(base.state_dict())
        options = dict(updates=SETTINGS.teacher_max_updates, lr=SETTINGS.teacher_lr, test_every=10, stop_at=0.7, opener=opener)
        test = partial(success, models[name], VALIDATION + seed, SETTINGS.eval_games)
        rows = train(models[name], None, Arm("reward"), seed, test=test, label=f"{name}, GRPO", **options)
        measures[f"{name} updates"] = rows[-1]["update"]
    # Success from the start, and after three turns of each student. The expert shows what could still be won from there.
    for name, player in (models | {"expert": expert}).items():
        measures[name] = success(player, TEST + seed, SETTINGS.eval_games)
        for opener in ("early", "skilled"):
            opened = success(player, TEST + seed, SETTINGS.eval_games, opener=models[opener], opening_turns=3)
            measures[f"{name} after {opener}"] = opened
    return {name: model.state_dict() for name, model in models.items()}, measures


# ----------------------------------------------------------------------------------------------------------------------
# Files: one per arm and seed, OUT/<arm>/seed-<k>.jsonl, written as a whole when the arm is done


def arm_file(out: Path, arm: str, seed: int) -> Path:
    return out / arm / f"seed-{seed}.jsonl"


def check_settings(path: Path, found: dict) -> None:
    """Raises Refused if a file was made with other settings than these."""
    expected = asdict(SETTINGS)
    changed = [f"{name} = {found.get(name)} instead of {expected.get(name)}" for name in expected if found.get(name) != expected[name]]
    if changed:
        raise runs.Refused(f"{path} was made with {', '.join(changed)}: choose another --out, or restore these settings")


def read_arm(path: Path) -> list[dict]:
    """The rows of one arm and seed. Raises Refused for other settings, or a file that cannot be read."""
    try:
        head, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        check_settings(path, head["settings"])
        return rows
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, runs.Refused):
            raise
        raise runs.Refused(f"{path} cannot be read ({type(error).__name__}): remove it, and it is made anew") from error


def load_models(out: Path, seed: int) -> dict[str, LlamaForCausalLM]:
    """The students and teachers of a seed, made at the first call and kept in OUT/models."""
    path = out / "models" / f"seed-{seed}.pt"
    if not path.is_file():
        states, measures = make_models(seed)
        runs.replace_file(path.with_suffix(".json"), (json.dumps(measures, indent=1) + "\n").encode())
        runs.save_tensors({"settings": asdict(SETTINGS), "states": states}, path)
    kept = runs.read_back(path, settings=dict, states=dict)
    check_settings(path, kept["settings"])
    models = {}
    for name, state in kept["states"].items():
        models[name] = make_model(SETTINGS.teacher_width if "teacher" in name else SETTINGS.student_width, seed)
        models[name].load_state_dict(state)
        models[name].requires_grad_(name in ("early", "skilled"))
    return models


def run_arm(out: Path, name: str, seed: int) -> None:
    """Train one arm from one seed and write its file."""
    arm, models, started = ARMS[name], load_models(out, seed), time.time()
    student, games = models[arm.student], SETTINGS.eval_games
    options = dict(updates=SETTINGS.long_updates if arm.long else SETTINGS.updates, lr=SETTINGS.lr, test_every=SETTINGS.eval_every)
    test = partial(success, student, TEST + seed, games)
    rows = train(student, models[arm.teacher], arm, seed, test=test, label=f"{name} seed {seed}", **options)
    # Six games of the trained student, to be read.
    rng = random.Random(TEST + seed)
    rollouts, _, rewards = play(student, [new_game(rng) for _ in range(6)], TEST + seed)
    tasks = [decode(ids) for ids in rollouts.prompt_ids.tolist()]
    rows[-1]["samples"] = [f"{'won' if won else 'lost'}: {task} {text}" for won, task, text in zip(rewards, tasks, rollouts.texts)]
    head = {"arm": name, "seed": seed, "minutes": round((time.time() - started) / 60, 2), "settings": asdict(SETTINGS)}
    runs.replace_file(arm_file(out, name, seed), "".join(json.dumps(row) + "\n" for row in [head, *rows]).encode())


# ----------------------------------------------------------------------------------------------------------------------
# The table and the figure, from the files only

DIFFERENCES = [
    ("opd", "grpo"), ("atod", "grpo"), ("atod", "opd"), ("atod", "atod-constant"), ("atod", "atod-no-tdur"),
    ("early-opd", "early-grpo"), ("early-atod", "early-opd"), ("early-opd-states", "early-opd"),
]  # fmt: skip


def interval(values: list[float], sign: str = "") -> str:
    """Mean and Student's 95 % interval over seeds, in percent. One seed has no interval."""
    numbers = [100 * mean(values), *(100 * bound for bound in (seed_interval(values) if len(values) > 1 else ()))]
    first, *bounds = [f"{x:{sign}.1f}" for x in numbers]
    return f"{first} [{', '.join(bounds)}]" if bounds else first


def read_curves(out: Path, seeds: list[int]) -> dict[str, dict[int, dict[int, float]]]:
    """{arm: {seed: {update: success}}} of all arms and seeds that have a file."""
    paths = {arm: {seed: arm_file(out, arm, seed) for seed in seeds if arm_file(out, arm, seed).is_file()} for arm in ARMS}
    curves = {
        arm: {seed: {row["update"]: row["success"] for row in read_arm(path)} for seed, path in of.items()} for arm, of in paths.items()
    }
    return {arm: by_seed for arm, by_seed in curves.items() if by_seed}


def table(out: Path, seeds: list[int]) -> str:
    """Three tables in Markdown: success by arm, differences at the last common update, and the models before training."""
    curves, last = read_curves(out, seeds), SETTINGS.updates
    columns = sorted({0, 20, 40, last, SETTINGS.long_updates})
    lines = ["| arm | seeds | " + " | ".join(f"update {update}" for update in columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for arm, by_seed in curves.items():
        shown = [[curve[u] for curve in by_seed.values() if u in curve] for u in columns]
        cells = [interval(values) if values else "" for values in shown]
        lines.append(f"| {arm} | {len(by_seed)} | " + " | ".join(cells) + " |")
    lines += ["", f"| difference at update {last}, points | mean [95 % over seeds] | per seed |", "|---|---|---|"]
    for first, second in DIFFERENCES:
        if curves.keys() >= {first, second} and curves[first].keys() & curves[second].keys():
            common = [seed for seed in curves[first] if seed in curves[second]]
            by_seed = [curves[first][seed][last] - curves[second][seed][last] for seed in common]
            lines.append(f"| {first} − {second} | {interval(by_seed, '+')} | {', '.join(f'{100 * x:+.1f}' for x in by_seed)} |")
    files = [path for seed in seeds if (path := out / "models" / f"seed-{seed}.json").is_file()]
    if files:
        lines += ["", "| player | from the start | after 3 turns of the early student | of the skilled student |", "|---|---|---|---|"]
        measures = [json.loads(path.read_text()) for path in files]
        for name in ("early", "skilled", "teacher", "states-teacher", "expert"):
            keys = (name, f"{name} after early", f"{name} after skilled")
            lines.append(f"| {name} | " + " | ".join(interval([by_seed[key] for by_seed in measures]) for key in keys) + " |")
    return "\n".join(lines) + "\n"


def draw(out: Path, seeds: list[int]) -> None:
    """OUT/atod.png: success against updates, a panel per student; thin lines are seeds, the dotted line is the teacher."""
    curves = read_curves(out, seeds)
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for ax, student in zip(panels, ("skilled", "early")):
        for i, name in enumerate(name for name in curves if ARMS[name].student == student):
            of_arm = list(curves[name].values())
            updates = sorted(of_arm[0])
            label = f"{name} ({len(of_arm)} seeds)"
            ax.plot(updates, [100 * mean([curve[u] for curve in of_arm]) for u in updates], color=f"C{i}", lw=2.2, label=label)
            for curve in of_arm:
                ax.plot(updates, [100 * curve[u] for u in updates], color=f"C{i}", lw=0.5, alpha=0.5)
        files = [path for seed in seeds if (path := out / "models" / f"seed-{seed}.json").is_file()]
        if files:
            ax.axhline(100 * mean([json.loads(path.read_text())["teacher"] for path in files]), color="k", ls=":", lw=1, label="teacher")
        ax.set(title=f"{student} student", xlabel="update", ylim=(0, 100))
        ax.legend(fontsize=8, loc="upper left")
    panels[0].set_ylabel("games won, %")
    figure.tight_layout()
    figure.savefig(out / "atod.png", dpi=110)
    plt.close(figure)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Wrong values end the program with their name and a remedy."""
    parser = argparse.ArgumentParser(description="ATOD against its parts, on a game of several turns.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--seeds", type=number(int, 1, 10), default=5, help="run the seeds 0 to SEEDS - 1 (default: %(default)s)")
    which.add_argument("--seed", type=number(int, 0, 10**5), help="run this one seed only")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="run these arms only")
    parser.add_argument("--out", type=Path, default=Path("runs/companions/atod"), help="folder of the results (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, seed by seed and arm by arm, and draw everything from the files."""
    args = parse(argv)
    # Models this small gain nothing from a second thread.
    torch.set_num_threads(1)
    seeds = list(range(args.seeds)) if args.seed is None else [args.seed]
    command = "python -m companions.atod " + " ".join(sys.argv[1:] if argv is None else argv)
    try:
        config = {"command": command.strip(), "settings": asdict(SETTINGS), **runs.describe_machine("cpu")}
        path = args.out / "config.json"
        if path.is_file():
            check_settings(path, runs.read_back(path, settings=dict)["settings"])
        # As of the last start: an interrupted run may go on with other --arms or --seeds.
        runs.replace_file(path, (json.dumps(config, indent=2) + "\n").encode())
        for seed in seeds:
            for arm in args.arms:
                if arm_file(args.out, arm, seed).is_file():
                    read_arm(arm_file(args.out, arm, seed))
                else:
                    run_arm(args.out, arm, seed)
        text = table(args.out, seeds)
        runs.replace_file(args.out / "table.md", text.encode())
        draw(args.out, seeds)
    except runs.Refused as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on with the first arm that has no file")
    print(text)


if __name__ == "__main__":
    main()
