"""ATOD: annealed turn-aware on-policy distillation, on a text game of several turns.

A student learns from two signals at once: from a frozen teacher, which grades every token that the
student writes (on-policy distillation, OPD), and from the reward at the end of the game (GRPO). The
weight moves from the first signal to the second during training. Within a game the teacher counts
most in the turns in which it disagrees with the student or the student is uncertain: turn-aware
weights, called T-DUR, see `tdur`. The method is that of Tan, Zong, Li and Chen (2026, arXiv
2606.27814), whose equation numbers we keep. We know its abstract, its equations through secondary
sources, and details of code that was written for it, but not the full text. The game, the models
and all numbers in SETTINGS are ours, marked "Reconstruction".

    delta_t = log pi_teacher(a_t | s_t) - log pi_old(a_t | s_t)    the signal of OPD, no gradient
    A_i     = (R_i - mean(R)) / std(R)            over the games of one task, as in reinforce.py
    A_t     = kappa(s) * w_k(t) * delta_t + rho(s) * A_i                                       (8)
    q = min(s / T, 1);   kappa = max(0.1, 1 - 0.9 q);   rho = 1 + q                     (10 to 12)

    symbol       variable               meaning
    s, T         step, horizon          the update, and when annealing ends (s_t: the text before t)
    kappa, rho   kappa, rho             the weights of teacher and reward
    w_k          turn_weights (B, C)    the weight, 0 to 1, of turn k at its tokens     (13 to 16)
    k(t)         turns (B, C)           the turn in which token t was written
    A_t          weights (B, C)         the weight of token t in the objective of GRPO

With one step per batch, pi_old is the student itself: GRPO's ratio is 1, and nothing is clipped.

    python -m companions.atod --seeds 5      all arms, table and figure, in runs/companions/atod
"""

import argparse
import copy
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from lab import figures, runs
from lab.engine import completion_logprobs, pad
from lab.flags import number
from lab.measures import seed_interval
from lab.models import disable_dropout
from reinforce import group_advantages
from rollout import Pair, Rollouts, rollout

# Shapes: B games (rollouts), C tokens of a game after its task, K turns of a game.


# --------------------------------------------------------------------------------------------------
# The method


def annealed(step: int, horizon: float) -> tuple[float, float]:
    """Equations (10) to (12): (kappa, rho) at update `step`; constant after `horizon` updates, T.

    >>> [tuple(round(x, 3) for x in annealed(step, horizon=80)) for step in (0, 40, 80, 200)]
    [(1.0, 1.0), (0.55, 1.5), (0.1, 2.0), (0.1, 2.0)]
    """
    q = min(step / horizon, 1.0)
    # kappa = max(0.1, 1 - 0.9 q); rho = 1 + q. The quotient rho / kappa rises from 1 to 20, so the
    # reward always counts.
    return max(0.1, 1 - 0.9 * q), 1 + q


# (kappa, rho) of the arms that do not anneal: GRPO, OPD, and both at once. Reconstruction: the last
# are the averages over the annealing, so that both arms see the same weights in total until T.
FIXED_WEIGHTS = {"reward": (0.0, 1.0), "teacher": (1.0, 0.0), "constant": (0.55, 1.5)}


def hybrid_advantages(
    delta: Tensor, turn_weights: Tensor, advantages: Tensor, kappa: float, rho: float
) -> Tensor:
    """Equation (8): the advantage of every token, (B, C).

    delta and turn_weights: (B, C). advantages: those of the games, (B,).

    Three quarters of the way to T, q = 0.75, a token that the teacher finds more likely by 0.4
    nats, in a turn of weight 0.5 of a game with advantage -0.2:

    >>> kappa, rho = annealed(60, horizon=80)
    >>> delta, w, A = torch.tensor([[0.4]]), torch.tensor([[0.5]]), torch.tensor([-0.2])
    >>> round(kappa, 3), rho, round(hybrid_advantages(delta, w, A, kappa, rho).item(), 3)
    (0.325, 1.75, -0.285)
    """
    # A_t = kappa w_k(t) delta_t + rho A_i. The turn weight is on the teacher's term only.
    return kappa * turn_weights * delta + rho * advantages[:, None]  # (B, C)


def min_max(values: Tensor) -> Tensor:
    """Values (K,) scaled to [0, 1], from smallest to largest; all 0.5 if equal up to 1e-8."""
    low, high = values.min(), values.max()
    return torch.full_like(values, 0.5) if high - low <= 1e-8 else (values - low) / (high - low)


def tdur(disagreement: Tensor, uncertainty: Tensor) -> Tensor:
    """Equations (15) and (16): the weights w_k of one game's turns, (K,), from d_k and h_k, (K,).

    A turn counts in full if it has the largest disagreement or the largest uncertainty of its game,
    and not at all if it has the smallest of both. Two guards, known from code written for the
    paper, set all weights to 1.

    >>> tdur(torch.tensor([0.0, 0.1, 0.2]), torch.tensor([0.0, 0.5, 1.0]))
    tensor([0.0000, 0.7500, 1.0000])
    """
    # The guards. With fewer than 3 turns, min-max normalisation would give hardly anything but 0
    # and 1. And where teacher and student agree on every turn, it would amplify noise.
    if len(disagreement) < 3 or disagreement.max() < 0.01:
        return torch.ones_like(disagreement)
    # w_k = 1 - (1 - d~_k)(1 - h~_k): a turn is informative if either is large.
    return 1 - (1 - min_max(disagreement)) * (1 - min_max(uncertainty))  # (K,)


def tdur_of_tokens(old: Tensor, teacher: Tensor, turns: Tensor) -> Tensor:
    """Equations (13) to (16) for a batch: the weight of every token's turn, (B, C), else 0.

    old, teacher: log-probabilities of the written tokens, (B, C). turns: the number of the turn
    from 0 on, -1 at tokens that the student did not write, (B, C).
    """
    weights = torch.zeros_like(old)
    for i, of_game in enumerate(turns):
        # The tokens of each of the K turns; observations belong to none.
        in_turn = [of_game == k for k in of_game.unique() if k >= 0]  # K masks of shape (C,)
        # d_k = mean_t |log pi_old - log pi_teacher|; h_k = mean_t (-log pi_old).
        d = torch.stack([(old[i] - teacher[i])[mask].abs().mean() for mask in in_turn])  # (K,)
        h = torch.stack([-old[i][mask].mean() for mask in in_turn])  # (K,)
        # Every token has the weight of its turn.
        for mask, w in zip(in_turn, tdur(d, h)):
            weights[i][mask] = w
    return weights


# --------------------------------------------------------------------------------------------------
# The game. Reconstruction: it stands in for the benchmarks, none of which can be installed without
# a network.
#
# An item has to be brought to a place. The player sees only what lies where it is. A game won by an
# expert:
#
#     task key desk >   go shelf   cup >   go box   key book >   take key   taken >
#                       go desk   empty >   put key

PLACES, ITEMS = ("shelf", "desk", "box", "floor"), ("key", "cup", "book")
ACTIONS = [("go", place) for place in PLACES]
ACTIONS += [(verb, item) for verb in ("take", "put") for item in ITEMS]
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
        """Carry out an action, of words, and return the observation. Nonsense changes nothing."""
        self.turns += 1
        match action:
            # On arrival the player sees everything that lies there; nothing has to be opened.
            case ("go", place) if place in PLACES:
                self.at, self.seen = place, self.seen | {place}
                return " ".join([item for item in ITEMS if self.where[item] == place] or ["empty"])
            # There is one hand.
            case ("take", item) if not self.held and self.at and self.where.get(item) == self.at:
                self.held, self.where[item] = item, ""
                return "taken"
            # Only this last action of the task wins, wherever the item has been before.
            case ("put", item) if self.held and self.held == item:
                self.held, self.where[item] = "", self.at
                self.won = (item, self.at) == (self.item, self.target)
                return "done"
        return "nothing"


def new_game(rng: random.Random) -> Game:
    """A random task; its item is never at its target from the start."""
    item, target = rng.choice(ITEMS), rng.choice(PLACES)
    allowed = {i: [p for p in PLACES if (i, p) != (item, target)] for i in ITEMS}
    return Game(item, target, {i: rng.choice(places) for i, places in allowed.items()})


def expert(game: Game, rng: random.Random, noise: float = 0.0) -> tuple[str, str]:
    """The action of a player that remembers what it has seen, or (probability `noise`) any one."""
    if rng.random() < noise:
        return rng.choice(ACTIONS)
    if game.held:
        # Anything but the item of the task is put down where the player stands.
        goal = game.target if game.held == game.item else game.at
        return ("put", game.held) if game.at == goal else ("go", goal)
    # If it has not seen the item, it looks where it has not been, except at the target (see
    # new_game).
    place = game.where[game.item]
    if place in game.seen:
        return ("take", game.item) if game.at == place else ("go", place)
    return "go", rng.choice([p for p in PLACES if p not in game.seen and p != game.target])


# --------------------------------------------------------------------------------------------------
# Playing a batch of games

# One token per word. "." pads and would end an action early; ">" ends an observation.
WORDS = ". > task go take put taken done empty nothing".split() + [*PLACES, *ITEMS]
PAD, ACTION_TOKENS, PIECES = 0, 2, [f" {word}".encode() for word in WORDS]


def encode(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def act(player, histories: list[list[int]], games: list[Game], rng, generator) -> list[list[int]]:
    """The next action of every game as token ids. player: a model, or a script such as `expert`."""
    if not isinstance(player, torch.nn.Module):
        return [encode(" ".join(player(game, rng))) for game in games]
    # The game so far is the prompt, because rollout.py begins with one; so every turn reads the
    # whole game again, and no cache is kept across turns. With p = 1 the senior writes alone, and
    # the junior is never run.
    pair = Pair(player, player, None, None, [PAD], PIECES)
    noise = torch.rand(2, ACTION_TOKENS, len(games), generator=generator)
    options = dict(schedule="token", p=1.0, temperature=1.0)
    written = rollout(pair, histories, histories, noise, torch.zeros_like(noise[0]), **options)
    lengths = written.completion_mask.sum(1).tolist()
    return [ids[:n].tolist() for ids, n in zip(written.completion_ids, lengths)]


@torch.no_grad()
def play(
    player, games: list[Game], seed: int, *, opener=None, opening_turns: int = 0
) -> tuple[Rollouts, Tensor, Tensor]:
    """Play the games to their end: (rollouts, turns (B, C), rewards (B,)).

    The first `opening_turns` turns are played by `opener`.

    In the rollouts, completion_mask marks everything that follows the task, and senior_mask the
    tokens of `player`: neither the observations nor what the opener wrote. The reward is 1 for a
    game that was won and 0 otherwise.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    tasks = [encode(f"task {game.item} {game.target} >") for game in games]
    # Per game, two columns of equal length: token ids, turns.
    columns = [([], []) for _ in games]
    for turn in range(MAX_TURNS):
        running = [i for i, game in enumerate(games) if not game.over]
        if not running:
            break
        # 1. The player writes an action in every game that is not over.
        current = opener if turn < opening_turns else player
        histories = [tasks[i] + columns[i][0] for i in running]
        actions = act(current, histories, [games[i] for i in running], rng, generator)
        for i, action in zip(running, actions):
            # 2. The game answers. After the last action there is nothing to read any more.
            observation = games[i].step(tuple(WORDS[token] for token in action))
            seen = [] if games[i].over else encode(f"{observation} >")
            # 3. Who wrote which token is recorded now, and never inferred from ids: what is not the
            # player's is in turn -1.
            columns[i][0].extend(action + seen)
            of_action = turn if current is player else -1
            columns[i][1].extend([of_action] * len(action) + [-1] * len(seen))
    return *as_rollouts(tasks, columns), torch.tensor([float(game.won) for game in games])


def as_rollouts(
    tasks: list[list[int]], columns: list[tuple[list, list]]
) -> tuple[Rollouts, Tensor]:
    """Games as rollouts, and the turn of every token, (B, C), which is -1 at padding too.

    A game is one text with two authors: the student writes the actions, and the game, in the place
    of the junior, the observations. So reinforce.py serves unchanged. The task is the prompt. There
    is no coin, and nothing is discarded.
    """
    written, turn_of = (list(column) for column in zip(*columns))
    prompts = pad(tasks, "left", "cpu")
    ids, mask = pad(written, "right", "cpu")  # (B, C)
    turns = torch.where(mask.bool(), pad(turn_of, "right", "cpu")[0], -1)  # (B, C)
    texts = [" ".join(WORDS[i] for i in task + game) for task, game in zip(tasks, written)]
    return Rollouts(*prompts, *prompts, ids, mask, (turns >= 0).long(), texts), turns


def success(player, seed: int, games: int, **opening) -> float:
    """The share of `games` new games that a player wins; a seed gives all players the same."""
    rng = random.Random(seed)
    return play(player, [new_game(rng) for _ in range(games)], seed, **opening)[2].mean().item()


# --------------------------------------------------------------------------------------------------
# Settings and arms


# Reconstruction: all of these but the group of 8. They were found in trials with seeds 90 to 92,
# before any reported seed was run.
SETTINGS = SimpleNamespace(
    # T of equation (10) is 80 in the paper. Ours is scaled to the shorter training: the same share
    # as 80 of 200 updates.
    updates=80, long_updates=160, horizon=32.0,
    # 8 rollouts per task, as in the paper, of 8 tasks.
    tasks=8, group=8, lr=1e-3, max_grad_norm=1.0,
    # A student is tested on 256 games after every 20 updates.
    eval_every=20, eval_games=256,
    # Widths of the models, of two layers each: 60,960 and 168,160 parameters.
    student_width=48, teacher_width=80,
    # Supervised warm-up: batches of demonstrations; every 10 steps a model is tested on 128 games.
    demo_batch=64, demo_lr=3e-3, demo_test_every=10, demo_max_steps=600, demo_games=128,
    # Demonstrations in which 70 % of the actions are random blur what a skilled student does.
    blur_noise=0.7, blur_lr=3e-4,
    # The teacher's GRPO. max_opening: in the games that a student begins, the most turns that it
    # plays.
    teacher_lr=3e-4, teacher_max_updates=120, max_opening=4,
)  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One way to train a student."""

    schedule: str
    tdur: bool = False
    student: str = "skilled"
    teacher: str = "teacher"
    long: bool = False


# The paper's comparison, with a student that knows the game but plays noisily. Then, our own
# addition, a student that wins about as often but lacks a skill: it ignores its task. Its arms test
# why our ranking may differ from the paper's: is it the student, a teacher that is weak in the
# student's states, or too few updates?
ARMS = {
    "grpo": Arm("reward"),
    "opd": Arm("teacher"),
    "atod": Arm("annealed", tdur=True),
    "atod-constant": Arm("constant", tdur=True),
    "atod-no-tdur": Arm("annealed"),
    "early-grpo": Arm("reward", student="early", long=True),
    "early-opd": Arm("teacher", student="early", long=True),
    "early-opd-states": Arm("teacher", student="early", teacher="states-teacher"),
}


# --------------------------------------------------------------------------------------------------
# Training


def train(
    student,
    teacher,
    arm: Arm,
    seed: int,
    *,
    updates: int,
    lr: float,
    test: Callable[[], float],
    test_every: int,
    label: str,
    opener=None,
    stop_at: float = 2.0,
) -> list[dict]:
    """Train `student` in place, and return a row of measures per test. GRPO alone needs no teacher.

    test: a function that measures the success of the student, before training and after every
    `test_every` updates; training ends early once it is at least `stop_at`. opener: plays the first
    turns of every game; how many is drawn per update.
    """
    rng = random.Random(f"train {seed}")
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=0.0)
    rows, batches = [{"update": 0, "success": test()}], []
    for step in tqdm(range(updates), label, unit="update", leave=False):
        # 1. The student plays G games of each task.
        tasks = [rng.random() for _ in range(SETTINGS.tasks)]
        games = [new_game(random.Random(task)) for task in tasks for _ in range(SETTINGS.group)]
        opening = {}
        if opener:
            opening = dict(opener=opener, opening_turns=rng.randint(0, SETTINGS.max_opening))
        rollouts, turns, rewards = play(student, games, rng.getrandbits(31), **opening)
        own = rollouts.senior_mask  # (B, C)
        logprobs = completion_logprobs(student, rollouts, temperature=1.0)  # (B, C), log pi
        old = logprobs.detach()  # log pi_old
        # 2. The advantage of GRPO, one number per game.
        advantages = group_advantages(rewards, SETTINGS.group)  # (B,)
        # 3. The teacher grades every token. It is neither clipped nor normalised: delta_t = log
        # pi_teacher - log pi_old.
        graded = old
        if teacher is not None:
            graded = completion_logprobs(teacher, rollouts, temperature=1.0).detach()
        delta = graded - old  # (B, C)
        # 4. The weight of each turn, and of teacher and reward.
        turn_weights = tdur_of_tokens(old, graded, turns) if arm.tdur else torch.ones_like(old)
        kappa, rho = FIXED_WEIGHTS.get(arm.schedule) or annealed(step, SETTINGS.horizon)
        # 5. Only what the student wrote enters the loss.
        weights = hybrid_advantages(delta, turn_weights, advantages, kappa, rho) * own  # (B, C)
        # 6. One step on the objective of GRPO, sum_t A_t log pi(a_t).
        num_tokens = own.sum().clamp(min=1)
        (-(weights * logprobs).sum() / num_tokens).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), SETTINGS.max_grad_norm)
        # With all weights 0, Adam would still move on momentum.
        if weights.any():
            optimizer.step()
        optimizer.zero_grad()
        # Averaged over sampled tokens, -delta estimates the reverse KL divergence KL(student ||
        # teacher), in nats per token.
        gap = -(delta * own).sum() / num_tokens
        batches.append((rewards.mean().item(), gap.item()))
        if (step + 1) % test_every == 0:
            reward, gap = map(mean, zip(*batches))
            row = {"update": step + 1, "success": test(), "reward": reward, "gap": gap}
            row |= {"kappa": kappa, "rho": rho}
            rows.append({name: round(value, 4) for name, value in row.items()})
            batches = []
            if row["success"] >= stop_at:
                break
    return rows


def make_model(width: int, seed: int) -> LlamaForCausalLM:
    """A small Llama with random weights over the words of the game."""
    torch.manual_seed(seed)
    options = dict(hidden_size=width, intermediate_size=3 * width, num_hidden_layers=2)
    options |= dict(num_attention_heads=2, max_position_embeddings=64, tie_word_embeddings=True)
    options |= dict(bos_token_id=None, eos_token_id=PAD, pad_token_id=None)
    return disable_dropout(LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **options)))


class NotLearned(RuntimeError):
    """A model of a seed did not reach the success at which its warm-up ends."""


def imitate(
    model,
    seed: int,
    *,
    noise: float,
    lr: float,
    test_every: int,
    done: Callable[[float], bool],
    label: str,
) -> None:
    """Maximum likelihood on demonstrations of the expert.

    done: where it holds for the success of the model, training ends. noise: the probability that an
    action of the demonstrations is random. The learning rate warms up over the first 30 steps.
    Raises NotLearned if `done` does not hold in time.
    """
    rng = random.Random(f"imitate {seed} {noise}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    for step in tqdm(range(SETTINGS.demo_max_steps), label, unit="step", leave=False):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 30)
        games = [new_game(rng) for _ in range(SETTINGS.demo_batch)]
        worked, _, _ = play(partial(expert, noise=noise), games, rng.getrandbits(31))
        # The loss of REINFORCE with weight 1 for every word of an action: -sum_t log pi(a_t | s_t)
        # / number of them.
        logprobs = completion_logprobs(model, worked, temperature=1.0)
        (-(logprobs * worked.senior_mask).sum() / worked.senior_mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % test_every == 0:
            share = success(model, VALIDATION + seed, SETTINGS.demo_games)
            if done(share):
                return
    reason = f"its {label} did not get there in {SETTINGS.demo_max_steps} steps"
    raise NotLearned(f"seed {seed} is left out: {reason}. Run another --seed")


# Seeds of games that are never trained on: those that decide when to stop, and those that are
# reported.
VALIDATION, TEST = 10**6, 2 * 10**6


def make_models(seed: int) -> tuple[dict[str, dict], dict]:
    """The students and teachers of a seed: ({name: state dict}, measures), in about two minutes.

    Reconstruction: every rule here. Each says when to stop, so that all seeds start at a comparable
    success.
    """
    options = dict(noise=0.0, lr=SETTINGS.demo_lr, test_every=SETTINGS.demo_test_every)
    learn = partial(imitate, seed=seed, **options)
    # The early student stops where it wins every tenth game. It has not learned yet to heed the
    # task.
    early, skilled = (make_model(SETTINGS.student_width, seed) for _ in range(2))
    learn(early, done=lambda share: share >= 0.1, label="early student")
    # The skilled student learns on until it wins every second game. Then noisy demonstrations make
    # its play noisier without removing its skill. It stops at the first test at or below 18 % on
    # 128 games; on the games of the results it may be anywhere near that.
    learn(skilled, done=lambda share: share >= 0.5, label="skilled student")
    options = dict(noise=SETTINGS.blur_noise, lr=SETTINGS.blur_lr, test_every=2)
    learn(skilled, done=lambda share: share <= 0.18, label="blurring", **options)
    # Two teachers: demonstrations to 40 %, and then GRPO to 70 %. The second one takes over games
    # that the early student began.
    teacher = make_model(SETTINGS.teacher_width, seed + 1000)
    learn(teacher, done=lambda share: share >= 0.4, label="teacher, demonstrations")
    models = {"early": early, "skilled": skilled}
    models |= {"teacher": teacher, "states-teacher": copy.deepcopy(teacher)}
    measures: dict = {"seed": seed}
    options = dict(updates=SETTINGS.teacher_max_updates, lr=SETTINGS.teacher_lr, test_every=10)
    for name, opener in (("teacher", None), ("states-teacher", early)):
        test = partial(success, models[name], VALIDATION + seed, SETTINGS.eval_games)
        options |= dict(test=test, stop_at=0.7, opener=opener, label=f"{name}, GRPO")
        rows = train(models[name], None, Arm("reward"), seed, **options)
        measures[f"{name} updates"] = rows[-1]["update"]
    # Success from the start, and after three turns of each student. The expert shows what could
    # still be won from there.
    openings: dict[str, dict] = {"": {}}
    for name in ("early", "skilled"):
        openings[f" after {name}"] = dict(opener=models[name], opening_turns=3)
    for name, player in (models | {"expert": expert}).items():
        for start, opening in openings.items():
            measures[name + start] = success(player, TEST + seed, SETTINGS.eval_games, **opening)
    return {name: model.state_dict() for name, model in models.items()}, measures


# --------------------------------------------------------------------------------------------------
# Files: one per arm and seed, OUT/<arm>/seed-<k>.jsonl, written as a whole when the arm is done


def arm_file(out: Path, arm: str, seed: int) -> Path:
    return out / arm / f"seed-{seed}.jsonl"


def check_settings(path: Path, found: dict) -> None:
    """Raises Refused if a file was made with other settings than these."""
    pairs = [(name, found.get(name), now) for name, now in vars(SETTINGS).items()]
    changed = [f"{name} = {old} instead of {now}" for name, old, now in pairs if old != now]
    if changed:
        remedy = "choose another --out, or restore these settings"
        raise runs.Refused(f"{path} was made with {', '.join(changed)}: {remedy}")


def read_arm(path: Path) -> dict[int, float]:
    """{update: success} of one arm and seed. Refused for other settings or an unreadable file."""
    try:
        head, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found, curve = head["settings"], {row["update"]: row["success"] for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        remedy = "remove it, and it is made anew"
        raise runs.Refused(f"{path} cannot be read ({type(error).__name__}): {remedy}") from error
    check_settings(path, found)
    return curve


def load_models(out: Path, seed: int) -> dict[str, LlamaForCausalLM]:
    """The students and teachers of a seed, made at the first call and kept in OUT/models."""
    path = out / "models" / f"seed-{seed}.pt"
    if not path.is_file():
        states, measures = make_models(seed)
        text = json.dumps(measures, indent=1) + "\n"
        runs.replace_file(path.with_suffix(".json"), text.encode())
        runs.save_tensors({"settings": vars(SETTINGS), "states": states}, path)
    kept = runs.read_back(path, settings=dict, states=dict)
    check_settings(path, kept["settings"])
    models = {}
    for name, state in kept["states"].items():
        width = SETTINGS.teacher_width if "teacher" in name else SETTINGS.student_width
        # Teachers are frozen; of the students, each arm trains one.
        models[name] = make_model(width, seed).requires_grad_("teacher" not in name)
        models[name].load_state_dict(state)
    return models


def run_arm(out: Path, name: str, seed: int) -> None:
    """Train one arm from one seed and write its file."""
    arm, models, started = ARMS[name], load_models(out, seed), time.time()
    student, updates = models[arm.student], SETTINGS.long_updates if arm.long else SETTINGS.updates
    test = partial(success, student, TEST + seed, SETTINGS.eval_games)
    options = dict(updates=updates, lr=SETTINGS.lr, test=test, test_every=SETTINGS.eval_every)
    rows = train(student, models[arm.teacher], arm, seed, label=f"{name} seed {seed}", **options)
    # Six games of the trained student, to be read.
    rng = random.Random(TEST + seed)
    rollouts, _, rewards = play(student, [new_game(rng) for _ in range(6)], TEST + seed)
    ends = ["won" if won else "lost" for won in rewards]
    rows[-1]["samples"] = [f"{end}: {text}" for end, text in zip(ends, rollouts.texts)]
    minutes = round((time.time() - started) / 60, 2)
    head = {"arm": name, "seed": seed, "minutes": minutes, "settings": vars(SETTINGS)}
    lines = [json.dumps(row) + "\n" for row in [head, *rows]]
    runs.replace_file(arm_file(out, name, seed), "".join(lines).encode())


# --------------------------------------------------------------------------------------------------
# The table and the figure, from the files only

DIFFERENCES = [("opd", "grpo"), ("atod", "grpo"), ("atod", "opd")]
DIFFERENCES += [("atod", "atod-constant"), ("atod", "atod-no-tdur")]
DIFFERENCES += [("grpo", "teacher"), ("opd", "teacher"), ("atod", "teacher")]
DIFFERENCES += [("early-opd", "early-grpo"), ("early-opd-states", "early-opd")]


def interval(values: list[float], sign: str = "") -> str:
    """Mean and Student's 95 % interval over seeds, in percent. One seed has no interval."""
    numbers = [mean(values), *(seed_interval(values) if len(values) > 1 else ())]
    first, *bounds = [f"{100 * x:{sign}.1f}" for x in numbers]
    return f"{first} [{', '.join(bounds)}]" if bounds else first


def read_curves(out: Path, seeds: list[int]) -> dict[str, dict[int, dict[int, float]]]:
    """{arm: {seed: {update: success}}} of all arms and seeds that have a file."""
    curves: dict[str, dict[int, dict[int, float]]] = {}
    for arm, seed in product(ARMS, seeds):
        path = arm_file(out, arm, seed)
        if path.is_file():
            curves.setdefault(arm, {})[seed] = read_arm(path)
    return curves


def seeds_in(out: Path) -> list[int]:
    """The seeds whose models were made."""
    return sorted(int(path.stem.removeprefix("seed-")) for path in out.glob("models/seed-*.json"))


def read_measures(out: Path, seeds: list[int]) -> list[dict[str, float]]:
    """What make_models measured, per seed that has been begun."""
    paths = [out / "models" / f"seed-{seed}.json" for seed in seeds]
    return [json.loads(path.read_text()) for path in paths if path.is_file()]


def table(out: Path, seeds: list[int]) -> str:
    """Success by arm, differences at the last common update, and the models before training.

    Three tables in Markdown.
    """
    curves, measures, last = read_curves(out, seeds), read_measures(out, seeds), SETTINGS.updates
    updates = sorted({0, 20, 40, last, SETTINGS.long_updates})
    rows = [["arm", "seeds", *(f"update {update}" for update in updates)]]
    rows += [["---"] * len(rows[0])]
    for arm, by_seed in curves.items():
        # An arm that is not long has no value at the last of the updates.
        shown = [[curve[u] for curve in by_seed.values() if u in curve] for u in updates]
        cells = [interval(values) if values else "" for values in shown]
        rows.append([arm, str(len(by_seed)), *cells])
    # Differences are taken seed by seed: the arms of a seed start from the same models and are
    # tested on the same games.
    curves["teacher"] = {of["seed"]: {last: of["teacher"]} for of in measures}
    headings = [f"difference at update {last}, points", "mean [95 % over seeds]", "per seed"]
    rows += [[], headings, ["---"] * 3]
    for first, second in DIFFERENCES:
        a, b = curves.get(first, {}), curves.get(second, {})
        by_seed = [a[seed][last] - b[seed][last] for seed in a if seed in b]
        if by_seed:
            listed = ", ".join(f"{100 * x:+.1f}" for x in by_seed)
            rows.append([f"{first} − {second}", interval(by_seed, "+"), listed])
    headings = ["from the start", "after 3 turns of the early student", "of the skilled student"]
    rows += [[], ["player", *headings], ["---"] * 4]
    for name in ("early", "skilled", "teacher", "states-teacher", "expert"):
        starts = [name, f"{name} after early", f"{name} after skilled"]
        rows.append([name, *(interval([of[start] for of in measures]) for start in starts)])
    return "".join(f"| {' | '.join(cells)} |\n" if cells else "\n" for cells in rows)


def draw(out: Path, seeds: list[int], path: Path) -> None:
    """Success against updates, a panel per student.

    Thick lines are means over seeds, thin lines single seeds; the dotted line is the teacher.
    """
    curves = read_curves(out, seeds)
    teacher = mean([100 * of["teacher"] for of in read_measures(out, seeds)])
    options = dict(sharey=True, figsize=(figures.WIDTH, 3), layout="constrained")
    figure, panels = plt.subplots(1, 2, **options)
    for ax, student in zip(panels, ("skilled", "early")):
        names = [name for name in curves if ARMS[name].student == student]
        for name, colour in zip(names, figures.COLOURS):
            of_arm = list(curves[name].values())
            updates, columns = of_arm[0].keys(), [[*curve.values()] for curve in of_arm]
            by_update = [[100 * value for value in values] for values in zip(*columns)]
            ax.plot(updates, by_update, color=colour, linewidth=0.5, alpha=0.5)
            means = [mean(values) for values in by_update]
            ax.plot(updates, means, color=colour, linewidth=1.8, label=name)
        ax.axhline(teacher, color="black", linestyle=":", linewidth=1, label="the teacher")
        ax.set(title=f"{student} student", xlabel="updates", ylim=(0, 100))
    panels[0].set_ylabel("games won (%)")
    figures.add_legend(figure, ncols=5)
    note = f"Thick: mean of the seeds ({', '.join(map(str, seeds))}); thin: one seed. "
    note += f"{SETTINGS.eval_games} games per point and seed. Intervals over seeds: table.md."
    figures.caption(figure, note).savefig(path, dpi=200)
    plt.close(figure)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Wrong values end the program with their name and a remedy."""
    parser = argparse.ArgumentParser(description="ATOD against its parts, on a game of turns.")
    which, flag = parser.add_mutually_exclusive_group(), parser.add_argument
    about = "run the seeds 0 to SEEDS - 1 (default: %(default)s)"
    which.add_argument("--seeds", type=number(int, 1, 10), default=5, help=about)
    which.add_argument("--seed", type=number(int, 0, 9), help="run this seed only, 0 to 9")
    flag("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="run these arms only")
    about = "folder of the results (default: %(default)s)"
    flag("--out", type=Path, default=Path("runs/companions/atod"), help=about)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, seed by seed and arm by arm, and draw everything from the files."""
    args = parse(argv)
    # Models this small gain nothing from a second thread.
    torch.set_num_threads(1)
    seeds = list(range(args.seeds)) if args.seed is None else [args.seed]
    config = args.out / "config.json"
    command = " ".join(["python -m companions.atod", *(sys.argv[1:] if argv is None else argv)])
    try:
        # Everything in a folder is made with the same settings. The command is that of the last
        # start.
        if config.is_file():
            check_settings(config, runs.read_back(config, settings=dict)["settings"])
        described = {"command": command, "settings": vars(SETTINGS), **runs.describe_machine("cpu")}
        runs.replace_file(config, (json.dumps(described, indent=2) + "\n").encode())
        # What is there already is read first, so that a file that cannot be used is found before
        # anything long.
        known = read_curves(args.out, sorted({*seeds, *seeds_in(args.out)}))
        left_out: dict[int, str] = {}
        for seed, arm in product(seeds, args.arms):
            if seed not in known.get(arm, {}) and seed not in left_out:
                try:
                    run_arm(args.out, arm, seed)
                except NotLearned as error:
                    left_out[seed] = str(error)
        # From all files that are there, also of other seeds than this command's.
        done = seeds_in(args.out)
        if not done:
            sys.exit("\n".join(left_out.values()))
        text = table(args.out, done)
        runs.replace_file(args.out / "table.md", text.encode())
        draw(args.out, done, args.out / "atod.png")
    except runs.Refused as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on with the first arm that has no file")
    print(text)
    if left_out:
        sys.exit("\n".join(left_out.values()))


if __name__ == "__main__":
    main()
