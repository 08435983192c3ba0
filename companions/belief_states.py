"""Textual belief states: a world model whose state is a text, trained by GRPO factor by factor.

A world model predicts what an agent will observe after an action, from the history h of its actions
and observations. Textual Belief States (Gao, Dong, Yao, Jonnalagedda, Das; arXiv 2606.27681, 2026)
lets it write down its *state* z in words first. Three stages, each with its own prompt, are sampled
in turn: encode h -> z, transition (z, action a) -> z', decode z' -> o.

    strict       p(o | h, a) = sum_z sum_z' p(z | h) p(z' | z, a) p(o | z')                  (1)
    leaky        p(o | h, a) = sum_z sum_z' p(z | h) p(z' | h, z, a) p(o | h, a, z')         (2)
    stateless    p(o | h, a)                                                                 (3)

Under (2) the prediction can be right although z is empty, because later stages may read the history
instead (history bypass). Under (1), *strict mediation*, all that the prediction knows of the
history has passed through z.

fGRPO, its training method, samples a tree: N states per history, K next states per state, M
predictions per next state. Every text gets an advantage over its siblings, (4) to (7) in
factor_advantages, and every stage the objective of GRPO, (8) in stage_loss. We know the paper only
from its abstract and secondary sources, none of which gives the advantages. The world, the models
and whatever else is ours is marked "Reconstruction". All equation numbers are ours.

    symbol      variable                        symbol      variable
    N, K, M     config.branching                h, a        row["history"], row["action"]
    r           leaf_rewards (S*N*K*M,)         z, then z'  row["state"]
    g           own, one tensor per stage       o           row["observation"]

    python -m companions.belief_states      # every arm and seed, table and figure; see --help
"""

import argparse
import copy
import itertools
import json
import math
import random
import sys
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lab import figures, models, runs
from lab.engine import completion_logprobs
from lab.flags import number
from lab.measures import seed_interval
from lab.specialist import fine_tune
from lab.tables import markdown_table
from reinforce import group_advantages
from rollout import Pair, Rollouts, random_numbers, rollout

# Shapes: S histories per update; N, K, M branching of the tree; B rows of one stage (S*N, S*N*K or
# S*N*K*M); C completion length.

# --------------------------------------------------------------------------------------------------
# The world: two rooms with two things each. The agent sees only the room that it is in. A fact is
# one word, such as "red-lamp". Reconstruction: this world stands in for TextWorld and ScienceWorld.

ROOMS = {"hall": ("lamp", "door"), "yard": ("gate", "pump")}
COLOURS = ("red", "green", "blue")
ROOM_OF = {thing: room for room, things in ROOMS.items() for thing in things}
# {fact: what it is about}. Of facts about the same slot exactly one is true.
FACTS = {f"in-{room}": "in" for room in ROOMS}
FACTS |= {f"{colour}-{thing}": thing for thing in ROOM_OF for colour in COLOURS}
State = dict[str, str]  # {slot: fact}, e.g. {"in": "in-hall", ...}; a belief may lack slots


def act(state: State, action: str) -> State:
    """The state after "look here", "go ROOM" or "paint FACT", which leads to the room of the thing.

    >>> act({"in": "in-yard", "lamp": "red-lamp"}, "paint blue-lamp")
    {'in': 'in-hall', 'lamp': 'blue-lamp'}
    """
    verb, what = action.split()
    # Painting moves the agent too, so that what it sees after "go" or "paint" does not depend on
    # where it was.
    if verb == "paint":
        return state | {"in": f"in-{ROOM_OF[FACTS[what]]}", FACTS[what]: what}
    return state | {"in": f"in-{what}"} if verb == "go" else state


def describe(state: State) -> str:
    """All facts of a state, in a fixed order: "in-hall red-lamp blue-door green-gate red-pump"."""
    return " ".join(state[slot] for slot in ("in", *ROOM_OF) if slot in state)


def observe(state: State) -> str:
    """What the agent sees: the facts of the room that it is in, but not which room this is."""
    # The room is not named. After "look here" only z says which room is seen, so a complete z has
    # the room in it.
    return " ".join(state[thing] for thing in ROOMS[state["in"].removeprefix("in-")])


def random_action(rng: random.Random) -> str:
    """A third each: look, go, paint."""
    go = f"go {rng.choice(list(ROOMS))}"
    paint = f"paint {rng.choice(COLOURS)}-{rng.choice(list(ROOM_OF))}"
    return rng.choice(["look here", go, paint])


class Episode(NamedTuple):
    """A history, the true state at its end, and what follows. For another world, generate these."""

    history: str  # actions and observations in turn
    state: State
    actions: list[str]  # the next ones
    states: list[State]  # the true state after each of them


def make_episode(rng: random.Random, events: int, horizon: int) -> Episode:
    """A history of `events` actions, the first of which visit every room, then `horizon` more."""
    state = {"in": "in-hall"} | {thing: f"{rng.choice(COLOURS)}-{thing}" for thing in ROOM_OF}
    # After a visit to every room, all facts can be known from the history.
    first = [f"go {room}" for room in rng.sample(list(ROOMS), len(ROOMS))]
    # What the history shows: every action with what was seen after it.
    history = []
    for action in first + [random_action(rng) for _ in range(events - len(first))]:
        state = act(state, action)
        history += [action, observe(state)]
    # What is to be predicted.
    actions = [random_action(rng) for _ in range(horizon)]
    states = list(itertools.accumulate(actions, act, initial=state))[1:]
    return Episode(" ".join(history), state, actions, states)


def new_episodes(rng: random.Random, n: int, config: "Config") -> list[Episode]:
    """Episodes of one action, with histories of any length up to config.max_events."""
    return [make_episode(rng, rng.randint(len(ROOMS), config.max_events), 1) for _ in range(n)]


def read_facts(text: str) -> tuple[set[str], bool]:
    """The facts in a text, and whether it is valid: facts only, at least one, at most one per slot.

    >>> read_facts("red-lamp hall blue-lamp")[1], read_facts("red-lamp in-hall")[1]
    (False, True)
    """
    words = text.split()
    # The slot of a word that is no fact is None.
    slots = [FACTS.get(word) for word in words]
    valid = bool(words) and None not in slots and len(set(slots)) == len(slots)
    return {word for word in words if word in FACTS}, valid


def f1(predicted: str, truth: str) -> float:
    """F1 of the facts in two texts: 2 * |both| / (|predicted| + |truth|), in [0, 1].

    `truth` has at least one fact.

    >>> f1("red-lamp blue-door", "red-lamp green-door")
    0.5
    """
    found, true = read_facts(predicted)[0], read_facts(truth)[0]
    return 2 * len(found & true) / (len(found) + len(true))


# --------------------------------------------------------------------------------------------------
# The stages, and what each formulation lets them read

# Strict mediation is a property of this table: under "strict" no prompt but the encoder's contains
# the history. Reconstruction: the wording, and that "leaky" shows the history to transition and
# decode, and the action to decode.
ENCODE = "encode history {history} state"
PROMPTS = {
    "strict": {
        "encode": ENCODE,
        "transition": "transition state {state} action {action} state",
        "decode": "decode state {state} observation",
    },
    "leaky": {
        "encode": ENCODE,
        "transition": "transition history {history} state {state} action {action} state",
        "decode": "decode history {history} action {action} state {state} observation",
    },
    "stateless": {"decode": "decode history {history} action {action} observation"},
}
# The field of a row that a stage fills in. z' takes the place of z, so that transitions can be
# repeated.
WRITES = {"encode": "state", "transition": "state", "decode": "observation"}
# A state has 5 facts and an observation 2; one more word and the end token fit too. Nothing longer
# can be smuggled through z.
MAX_WORDS = {"encode": 7, "transition": 7, "decode": 4}

# Word-level ids; 0 is the end token.
WORDS = "encode transition decode history state action observation look here go paint".split()
WORDS += [*ROOMS, *FACTS]
WORD_LEVEL = Tokenizer(WordLevel({word: i for i, word in enumerate(["</s>", *WORDS])}))
WORD_LEVEL.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=WORD_LEVEL, pad_token="</s>", eos_token="</s>")
# What each id writes. The space keeps words apart.
PIECES = [b"", *(f" {word}".encode() for word in WORDS)]


def write(
    model, formulation: str, stage: str, rows: list[dict], seed: int, temperature: float = 1.0
) -> tuple[Rollouts, list[dict]]:
    """Sample a text of a stage for each of B rows: the rollouts, and the rows with it filled in."""
    # A stage sees only the fields of the row that its template names.
    texts = [PROMPTS[formulation][stage].format(**row) for row in rows]
    prompts = models.encode(TOKENIZER, texts)
    # The rollout of the lesson with p = 1: one writer, and a second model that is never run.
    pair = Pair(model, model, TOKENIZER, TOKENIZER, [0], PIECES)
    noise, coins = random_numbers(len(rows), MAX_WORDS[stage], seed)
    options = dict(schedule="token", p=1.0, temperature=temperature)
    rollouts = rollout(pair, prompts, prompts, noise, coins, **options)
    # The text goes into the next prompt and to the rewards. The loss uses the sampled ids.
    field, texts = WRITES[stage], rollouts.texts
    return rollouts, [row | {field: text.strip()} for row, text in zip(rows, texts)]


# --------------------------------------------------------------------------------------------------
# fGRPO: one advantage per factor


def factor_advantages(
    leaf_rewards: Tensor, own: list[Tensor], branching: tuple[int, ...], divide: bool
) -> list[Tensor]:
    """The advantage of every node over its siblings, one tensor per stage, of the shapes of `own`.

        V_ij = mean_m r_ijm    V_i = mean_j V_ij     states i, next states j, predictions m   (4)
        decode      A_ijm = (r_ijm + g_ijm - mean_m) / std_m                                  (5)
        transition  A_ij  = (V_ij + g_ij - mean_j) / std_j                                    (6)
        encode      A_i   = (V_i + g_i - mean_i) / std_i                                      (7)

    r is the F1 of the predicted facts, and g what a text earns by itself (own_rewards). mean_m and
    std_m are taken over m, of the expression before them.

    leaf_rewards: (S * b_1 * ... * b_L,) for branching (b_1, ..., b_L), children next to their
    siblings. own: the reward g of the nodes of each stage, (S * b_1 * ... * b_l,). divide: by the
    standard deviation over siblings; without it, a node is compared with the mean of the other
    siblings, which makes the expected gradient exact. Raises ValueError if the root does not
    branch. If only the root branches and g is 0, this is plain GRPO with one advantage for a whole
    chain.

    Two histories, two states each, two predictions each (one stage is left out). The second state
    of the first is better:

    >>> own, r = [torch.zeros(4), torch.zeros(8)], torch.tensor([0.0, 0, 0, 1, 1, 1, 1, 1])
    >>> for A in factor_advantages(r, own, (2, 2), divide=False): print(A.tolist())
    [-0.5, 0.5, 0.0, 0.0]
    [0.0, 0.0, -1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    """
    # Reconstruction: the sources say that advantages are group-relative factor by factor, but not
    # how.
    #
    # What is exact. Without g and the division, the expected gradient is (n - 1)/n times the
    # gradient of E[r] with respect to that stage, for n siblings. To see this, write A_i = V_i -
    # (1/n) sum_k V_k = (1 - 1/n) V_i - (1/n) sum_{k != i} V_k. V_i is an unbiased estimate of E[r |
    # z_i]. Every other V_k is independent of z_i, so its product with the score of z_i has mean 0.
    # A comparison with the *other* siblings only, V_i - mean_{k != i} V_k, is n/(n - 1) times as
    # large and exact. Not exact are the division by std, g (a text gets no credit for the g of
    # later stages), and the clipping of the gradient's norm.
    if branching[0] < 2:
        raise ValueError(f"branching {branching}: the first stage needs two or more samples")
    advantages, siblings = [], 1
    for level, branches in enumerate(branching):
        # A node without siblings is grouped as its nearest ancestor with siblings is.
        siblings = branches if branches > 1 else siblings
        # V: the mean reward of all leaves below a node, (4). A leaf is its own mean.
        values = leaf_rewards.view(-1, math.prod(branching[level + 1 :])).mean(1) + own[level]
        # Without the division: V_i - mean_{k != i} V_k, the mean of the *other* siblings.
        groups = values.view(-1, siblings)  # (groups, siblings)
        others = (groups.sum(1, keepdim=True) - groups) / (siblings - 1)
        # With it: (V - mean) / std, the group advantages of the lesson, with siblings as the group.
        exact = (groups - others).flatten()
        advantages.append(group_advantages(values, siblings) if divide else exact)
    return advantages


def stage_loss(logprobs: Tensor, mask: Tensor, advantages: Tensor) -> Tensor:
    """The term of one stage, a differentiable scalar. logprobs, mask: (B, C); advantages: (B,).

        loss = - sum over the three stages of  mean over nodes of  sum_t A log pi(y_t)        (8)

    This is GRPO as in reinforce.py, under the prompt of each stage: with one step per batch its
    ratio is 1, and nothing is clipped. But reinforce.py divides by the number of tokens, which
    depends on the samples, so that the gradient would be biased. Dividing by the number of nodes
    also gives the three stages equal weight.
    """
    # One advantage per node, for each of its tokens.
    return -(advantages[:, None] * mask * logprobs).sum() / len(logprobs)


def own_rewards(
    stage: str, rows: list[dict], format_reward: float, length_penalty: float
) -> Tensor:
    """g: what texts earn by themselves, (B,) in float64: for valid format, less for long states."""
    # Reconstruction: the kinds of reward are from a secondary source; their weights, and where they
    # apply, are ours. "Less redundancy" is part of the format, one fact per slot. z' is not
    # charged: with one action per example, the shortest sufficient z' lacks every fact that is not
    # seen next, and would be useless for the step after.
    texts = [row[WRITES[stage]] for row in rows]
    cost = length_penalty / len(["in", *ROOM_OF]) if stage == "encode" else 0.0
    rewards = [format_reward * read_facts(text)[1] - cost * len(text.split()) for text in texts]
    return torch.tensor(rewards, dtype=torch.float64)


# --------------------------------------------------------------------------------------------------
# Arms, and training


@dataclass(frozen=True)
class Config:
    """What all arms share. Reconstruction: all of these.

    Decided before any seed of the results was run, after trials with seeds 90 and 91.
    """

    # The warm start: supervised steps on batches of 64 texts.
    warm_steps: int = 800
    warm_lr: float = 3e-3
    # How often a fact about a thing is false in the states that the encoder is taught, and how
    # often it is missing.
    wrong: float = 0.15
    missing: float = 0.15
    # fGRPO: updates, histories per update (S), branching (N, K, M).
    updates: int = 80
    histories: int = 8
    branching: tuple[int, ...] = (4, 2, 2)
    lr: float = 3e-4

    format_reward: float = 0.1
    # Updates between evaluations, held-out episodes per evaluation, and the actions of an open
    # loop.
    eval_every: int = 10
    episodes: int = 200
    horizon: int = 8
    # Histories have 2 to 9 events. An open loop of 8 actions from 2 events reads histories of up to
    # 9, none longer than in training.
    max_events: int = 9


@dataclass(frozen=True)
class Arm:
    """What is compared. The switches are one field each."""

    formulation: str
    # Every stage has weights of its own, or one model serves all stages.
    separate: bool = True
    # Advantages are divided by the standard deviation over siblings.
    divide: bool = True
    freeze_encoder: bool = False
    # What a full state costs, to be compared with an F1 of up to 1.
    length_penalty: float = 0.1


ARMS = {
    # The three formulations, with every reward and the division.
    "stateless": Arm("stateless"),
    "strict": Arm("strict"),
    "leaky": Arm("leaky"),
    # How much of the prediction is due to training the encoder?
    "leaky-frozen": Arm("leaky", freeze_encoder=True),
    # Is it the reward for short states that changes z?
    "strict-no-length": Arm("strict", length_penalty=0.0),
    "leaky-no-length": Arm("leaky", length_penalty=0.0),
    # Is it the division, which gives a small reward full weight where all siblings predict equally
    # well?
    "strict-no-std": Arm("strict", divide=False),
    "leaky-no-std": Arm("leaky", divide=False),
    # Is it that every stage has its own weights?
    "strict-shared": Arm("strict", separate=False),
    "leaky-shared": Arm("leaky", separate=False),
}
# Pairs of which the table gives the difference, seed by seed.
PAIRS = [("strict", "leaky"), ("strict-no-length", "leaky-no-length")]
PAIRS += [("strict-no-std", "leaky-no-std"), ("strict-shared", "leaky-shared")]
PAIRS += [("leaky-frozen", "leaky"), ("leaky-no-length", "leaky")]


def noise_seed(*key) -> int:
    """A seed for random_numbers from every part of the key, the same on every machine."""
    return random.Random(repr(key)).getrandbits(31)


def noisy(state: State, rng: random.Random, config: Config) -> State:
    """An annotator's belief about a state. The room is always right.

    The fact about each thing is independently false, missing or true.
    """
    belief = dict(state)
    for thing in ROOM_OF:
        # One draw decides between false, missing and true.
        u = rng.random()
        if u < config.wrong:
            false = [fact for fact in FACTS if FACTS[fact] == thing and fact != state[thing]]
            belief[thing] = rng.choice(false)
        elif u < config.wrong + config.missing:
            del belief[thing]
    return belief


def warm_texts(seed: int, config: Config) -> list[tuple[str, str]]:
    """(prompt, target) texts of all prompts: an annotator's noisy states, and true observations.

    z' is the belief z after the action. Since the observation is the true one, "decode" learns how
    far to trust each part of its prompt.
    """
    rng, texts = random.Random(f"warm start {seed}"), []
    # The two formulations with an encoder share its prompt, which is taught once.
    kinds = {prompt: stage for stages in PROMPTS.values() for stage, prompt in stages.items()}
    for _ in range(64 * config.warm_steps):
        prompt, stage = rng.choice(list(kinds.items()))
        episode = make_episode(rng, rng.randint(len(ROOMS), config.max_events), 1)
        z = noisy(episode.state, rng, config)
        # z' has the errors of z, except where the action has corrected them.
        z_next = act(z, episode.actions[0])
        targets = {"encode": describe(z), "transition": describe(z_next)}
        targets["decode"] = observe(episode.states[0])
        # Each stage reads the state that the stage before it writes.
        row = {"history": episode.history, "action": episode.actions[0]}
        row["state"] = describe(z_next if stage == "decode" else z)
        texts.append((prompt.format(**row), targets[stage]))
    return texts


@lru_cache(maxsize=1)
def warm_start(seed: int, config: Config) -> LlamaForCausalLM:
    """The checkpoint of about 0.1 M parameters from which every arm of a seed starts.

    Reconstruction: the model, and what it is taught before fGRPO. The last one is kept in memory.
    """
    torch.manual_seed(seed)
    options = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=2)
    options |= dict(num_attention_heads=4, max_position_embeddings=128, tie_word_embeddings=True)
    options |= dict(bos_token_id=None, eos_token_id=0, pad_token_id=0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(PIECES), **options)).eval()
    # One model learns all prompts of all formulations, so that arms differ in what they read and in
    # nothing else.
    options = dict(steps=config.warm_steps, batch=64, micro_tokens=2**20, lr=config.warm_lr)
    options |= dict(seed=seed, label=f"seed {seed} warm start")
    fine_tune(model, TOKENIZER, warm_texts(seed, config), **options)
    return model


def make_policies(base: LlamaForCausalLM, arm: Arm) -> dict[str, LlamaForCausalLM]:
    """{stage: model}: copies of the warm start, one per stage or one for all."""
    stages = PROMPTS[arm.formulation]
    # Copies, so that no arm changes what the next one starts from.
    policies = dict.fromkeys(stages, copy.deepcopy(base))
    if arm.separate:
        policies = {stage: copy.deepcopy(base) for stage in stages}
    if arm.freeze_encoder:
        policies["encode"].requires_grad_(False)
    return policies


def train(
    base: LlamaForCausalLM, arm: Arm, seed: int, config: Config, label: str = ""
) -> tuple[dict, list[dict]]:
    """Train one arm: its policies, and evaluations, the first of them before training."""
    policies, stages = make_policies(base, arm), list(PROMPTS[arm.formulation])
    # A shared model occurs under every stage, but its parameters must be stepped once.
    every = [p for policy in policies.values() for p in policy.parameters() if p.requires_grad]
    parameters = list(dict.fromkeys(every))
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0)
    # The stateless arm has one factor; it gets as many predictions per history as the leaves of a
    # tree.
    branching = config.branching if len(stages) > 1 else (math.prod(config.branching),)
    rng = random.Random(f"train {seed}")
    evaluations = [evaluate(policies, arm, seed, config) | {"update": 0}]
    for update in tqdm(range(1, config.updates + 1), desc=label, unit="update"):
        # 1. S new histories with one action each. Arms of a seed see the same ones.
        episodes = new_episodes(rng, config.histories, config)
        rows = [{"history": e.history, "action": e.actions[0]} for e in episodes]
        rows = [row | {"truth": observe(e.states[0])} for row, e in zip(rows, episodes)]
        # 2. The tree, stage by stage: every node is repeated once per child, and each copy is
        # continued.
        tree, own = [], []
        for stage, branches in zip(stages, branching):
            rows = [row for row in rows for _ in range(branches)]
            key = noise_seed("train", seed, update, stage)
            rollouts, rows = write(policies[stage], arm.formulation, stage, rows, key)
            tree.append(rollouts)
            own.append(own_rewards(stage, rows, config.format_reward, arm.length_penalty))
        # 3. Leaf rewards, and one advantage per node. In float64, so that equal means stay equal.
        leaf_rewards = [f1(row["observation"], row["truth"]) for row in rows]
        leaf_rewards = torch.tensor(leaf_rewards, dtype=torch.float64)
        advantages = factor_advantages(leaf_rewards, own, branching, arm.divide)
        # 4. The sum of the stages' losses, (8), each under its own prompt.
        for stage, rollouts, A in zip(stages, tree, advantages):
            if arm.freeze_encoder and stage == "encode":
                continue
            logprobs = completion_logprobs(policies[stage], rollouts, temperature=1.0)  # (B, C)
            stage_loss(logprobs, rollouts.completion_mask, A).backward()
        # 5. One step for all of them.
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if update % config.eval_every == 0 or update == config.updates:
            evaluations.append(evaluate(policies, arm, seed, config) | {"update": update})
    return policies, evaluations


# --------------------------------------------------------------------------------------------------
# Measures


def open_loop(
    policies: dict, arm: Arm, episodes: list[Episode], key: tuple, temperature=1.0, extend=True
) -> list[list[dict]]:
    """Encode once, then for every action transition and decode.

    Returns the rows after encoding and after each action. No true observation is read on the way.
    What a formulation reads as its history grows by the actions and by its *own* predictions
    (extend), or stays what was encoded; under "strict" no later stage reads it, and both are the
    same.
    """
    # The stateless arm has no encoder: its z is empty.
    rows = [{"history": episode.history, "state": ""} for episode in episodes]
    # Encode once; from here on the true state is never seen again.
    if "encode" in policies:
        seed = noise_seed(*key)
        _, rows = write(policies["encode"], arm.formulation, "encode", rows, seed, temperature)
    after = [rows]
    for t in range(len(episodes[0].actions)):
        rows = [row | {"action": episode.actions[t]} for row, episode in zip(rows, episodes)]
        # Transition and decode, in this order; only decode under "stateless".
        for stage in policies:
            if stage != "encode":
                seed = noise_seed(*key, t, stage)
                _, rows = write(policies[stage], arm.formulation, stage, rows, seed, temperature)
        after.append(rows)
        if extend:
            grown = [f"{row['history']} {row['action']} {row['observation']}" for row in rows]
            rows = [row | {"history": history} for row, history in zip(rows, grown)]
    return after


def mean_f1(predicted: list[str], truth: list[str]) -> float:
    return sum(map(f1, predicted, truth)) / len(truth)


def evaluate(policies: dict, arm: Arm, seed: int, config: Config, temperature: float = 1.0) -> dict:
    """One-step prediction F1, and F1 and length of z against the true state, on held-out episodes.

    All arms share the episodes.
    """
    # The same episodes and random numbers at every update and in every arm, which reduces the
    # variance of differences.
    rng = random.Random(f"test {seed}")
    episodes = new_episodes(rng, config.episodes, config)
    encoded, predicted = open_loop(policies, arm, episodes, ("test", seed), temperature)
    observations = [row["observation"] for row in predicted]
    states = [row["state"] for row in encoded]
    one_step = mean_f1(observations, [observe(e.states[0]) for e in episodes])
    state = mean_f1(states, [describe(e.state) for e in episodes])
    # In units of a full state, which has five words.
    lengths = [len(z.split()) / len(e.state) for z, e in zip(states, episodes)]
    return {"one_step": one_step, "state": state, "length": sum(lengths) / len(episodes)}


def rollout_f1(policies: dict, arm: Arm, seed: int, config: Config, extend: bool) -> list[float]:
    """F1 of open loops after 1 to config.horizon actions, from histories of one visit per room."""
    rng = random.Random(f"open loop {seed}")
    episodes = [make_episode(rng, len(ROOMS), config.horizon) for _ in range(config.episodes)]
    after = open_loop(policies, arm, episodes, ("open loop", seed), extend=extend)[1:]
    truth = [[observe(e.states[t]) for e in episodes] for t in range(config.horizon)]
    predicted = [[row["observation"] for row in rows] for rows in after]
    return list(map(mean_f1, predicted, truth))


def sample_texts(policies: dict, arm: Arm, seed: int) -> list[dict]:
    """Three open loops of two actions, to be read: what was written at each step, and the truth."""
    episodes = [make_episode(random.Random(f"sample {seed} {i}"), 5, 2) for i in range(3)]
    after = open_loop(policies, arm, episodes, ("sample", seed))
    written = [list(rows) for rows in zip(*after)]
    truth = [list(map(describe, [e.state, *e.states])) for e in episodes]
    return [{"written": rows, "true": states} for rows, states in zip(written, truth)]


def matched_state_f1(first: list[dict], second: list[dict]) -> tuple[float, float]:
    """State F1 at matched prediction, `first` less `second`.

    Returns (difference of state F1, difference of one-step F1 that remains). The last evaluation of
    `second` is compared with the evaluation of `first` whose one-step F1 is nearest to it.
    """
    last = second[-1]
    nearest = min(first, key=lambda row: abs(row["one_step"] - last["one_step"]))
    return nearest["state"] - last["state"], nearest["one_step"] - last["one_step"]


# --------------------------------------------------------------------------------------------------
# Files: OUT/<arm>/seed-<k>.json per arm and seed, from which alone the table and the figure are
# drawn


def as_json(settings: Config | Arm) -> dict:
    """Settings as JSON gives them back, where a tuple is a list."""
    return json.loads(json.dumps(asdict(settings)))


def run_arm(name: str, seed: int, config: Config, out: Path) -> None:
    """Train and measure one arm and write its file, unless it is there.

    Raises Refused if it is there with other settings.
    """
    arm, path = ARMS[name], out / name / f"seed-{seed}.json"
    settings = as_json(config) | as_json(arm)
    # Resume: an arm whose file is there is not run again.
    if path.is_file():
        kept = runs.read_back(path, settings=dict)["settings"]
        pairs = {key: (kept.get(key), value) for key, value in settings.items()}
        changed = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
        if changed:
            remedy = "choose another --out, or remove it to make it anew"
            raise runs.Refused(f"{path} has other settings, {changed} (there, now): {remedy}")
        return
    base, started = warm_start(seed, config), time.time()
    policies, evaluations = train(base, arm, seed, config, f"seed {seed} {name}")
    # The likeliest texts before and after: merely sharpening a distribution does not change them.
    both = make_policies(base, arm), policies
    greedy = [evaluate(p, arm, seed, config, temperature=0.0) for p in both]
    result = {"settings": settings, "evaluations": evaluations, "greedy": greedy}
    # In open loop a leaky predictor still has a history to read: with its own predictions appended,
    # or as it was encoded.
    kinds = {"": True, ", history as encoded": False} if arm.formulation == "leaky" else {"": True}
    loops = [rollout_f1(policies, arm, seed, config, extend) for extend in kinds.values()]
    result["horizons"] = dict(zip(kinds, loops))
    result["samples"] = sample_texts(policies, arm, seed)
    result["seconds"] = round(time.time() - started)
    # By way of a draft: a file is either complete or not there.
    runs.replace_file(path, (json.dumps(result, indent=1) + "\n").encode())


def read_results(out: Path) -> dict[str, dict[int, dict]]:
    """{arm: {seed: the content of its file}} for all that are there."""
    types = dict(settings=dict, evaluations=list, greedy=list, horizons=dict)
    results: dict[str, dict[int, dict]] = {}
    for arm in ARMS:
        for path in sorted((out / arm).glob("seed-*.json")):
            seed = int(path.stem.removeprefix("seed-"))
            results.setdefault(arm, {})[seed] = runs.read_back(path, **types)
    return results


def with_interval(by_seed: list[float]) -> str:
    """Mean in percent, or points, with Student's 95 % interval over seeds. One seed has none."""
    mean = f"{100 * sum(by_seed) / len(by_seed):.1f}"
    if len(by_seed) < 2:
        return mean
    low, high = seed_interval(by_seed)
    return f"{mean} [{100 * low:.1f}, {100 * high:.1f}]"


def arm_row(name: str, seeds: list[dict]) -> list[str]:
    """The cells of one arm in the first table, before → after training."""
    cells = [name, str(len(seeds))]
    # Sampled at temperature 1, as in training, and greedy; the first and the last evaluation of
    # each.
    measures = "one_step", "state", "length"
    for rows, measure in itertools.product(("evaluations", "greedy"), measures):
        before, after = ([seed[rows][i][measure] for seed in seeds] for i in (0, -1))
        cells.append(f"{100 * sum(before) / len(seeds):.1f} → {with_interval(after)}")
    return [*cells, f"{sum(seed['seconds'] for seed in seeds) / len(seeds) / 60:.1f}"]


def pair_row(first: str, second: str, pairs: list[tuple[dict, dict]]) -> list[str]:
    """The cells of one pair in the third table: `first` less `second`, seed by seed."""
    ends = [(a["evaluations"][-1], b["evaluations"][-1]) for a, b in pairs]
    cells = [with_interval([a[key] - b[key] for a, b in ends]) for key in ("one_step", "state")]
    matched = [matched_state_f1(a["evaluations"], b["evaluations"]) for a, b in pairs]
    cells += [with_interval(list(values)) for values in zip(*matched)]
    # For a strict arm both kinds of open loop, the first and the last in its file, are the same.
    loops = [[list(result["horizons"].values()) for result in pair] for pair in pairs]
    shown = (0, 0), (0, -1), (-1, -1)  # (kind, horizon)
    cells += [with_interval([a[kind][h] - b[kind][h] for a, b in loops]) for kind, h in shown]
    return [f"{first} − {second}", str(len(pairs)), *cells]


def tables(results: dict[str, dict[int, dict]]) -> str:
    """The three tables in Markdown."""
    by_arm = {name: list(seeds.values()) for name, seeds in results.items()}
    headings = "arm; seeds; one-step F1; state F1; length of z; "
    headings += "greedy one-step F1; greedy state F1; greedy length; minutes"
    headings = headings.split("; ")
    text = "Percent before → after training, with the 95 % interval over seeds of the latter. "
    text += "Length: of a full state. No state: 0.\n\n"
    text += markdown_table(headings, [arm_row(*item) for item in by_arm.items()])
    # Transposed: one list of values by seed for every horizon.
    loops: dict[str, list] = {}
    for name, seeds in by_arm.items():
        for kind in seeds[0]["horizons"]:
            loops[name + kind] = list(zip(*(seed["horizons"][kind] for seed in seeds)))
    horizon = len(next(iter(loops.values())))
    text += "\n\nPrediction F1 in open loop after training, by the number of actions "
    text += "since the history was encoded, in percent.\n\n"
    rows = [[label, *map(with_interval, loop)] for label, loop in loops.items()]
    text += markdown_table(["arm", *map(str, range(1, horizon + 1))], rows)
    headings = ["difference", "seeds", "one-step F1", "state F1", "state F1, matched"]
    headings += ["one-step F1 that the match leaves", "open loop, 1 action"]
    longest = f"open loop, {horizon} actions"
    headings += [longest, f"{longest}, history as encoded"]
    text += "\n\nDifferences in points, seed by seed. "
    text += "Matched: at the one-step F1 of the second arm's last evaluation.\n\n"
    # Only seeds that both arms of a pair have run.
    rows = []
    for pair in PAIRS:
        a, b = (results.get(name, {}) for name in pair)
        if a.keys() & b.keys():
            rows.append(pair_row(*pair, [(a[seed], b[seed]) for seed in a if seed in b]))
    return text + markdown_table(headings, rows) + "\n"


def draw(results: dict[str, dict[int, dict]], path: Path) -> None:
    """Prediction and state F1 against updates, and prediction F1 against the horizon.

    Means over seeds with 95 % intervals.
    """
    figure, axes = plt.subplots(1, 3, figsize=(figures.WIDTH, 3), layout="constrained")
    looks = [dict(color=c, linestyle=line) for line in ("-", "--") for c in figures.COLOURS[:6]]
    for (name, by_seed), look in zip(results.items(), looks):
        seeds = list(by_seed.values())
        rows = [seed["evaluations"] for seed in seeds]
        loops = [seed["horizons"][""] for seed in seeds]
        curves = [[[row[key] for row in of] for of in rows] for key in ("one_step", "state")]
        updates = [row["update"] for row in rows[0]]
        xs = updates, updates, range(1, len(loops[0]) + 1)
        for axis, x, curve in zip(axes, xs, [*curves, loops]):
            # One column per update or horizon, with a value per seed.
            columns = list(zip(*curve))
            means = [sum(values) / len(seeds) for values in columns]
            axis.plot(x, means, label=name, **look)
            # An interval needs more than one seed.
            if len(seeds) > 1:
                band = dict(color=look["color"], alpha=0.1, linewidth=0)
                axis.fill_between(x, *zip(*map(seed_interval, columns)), **band)
    titles = "F1 of one-step prediction", "F1 of z, true state", "F1 of open-loop prediction"
    labels, bottoms = ("updates", "updates", "actions"), (0.6, 0.0, 0.6)
    for axis, title, label, bottom in zip(axes, titles, labels, bottoms):
        axis.set(title=title, xlabel=label, ylim=(bottom, 1.01))
    figures.add_legend(figure, ncols=4)
    note = "Bands: Student's 95\u00a0% interval over seeds. Without a state z, its F1 is 0."
    with runs.writing(path):
        figures.caption(figure, note).savefig(path, dpi=200)
    plt.close(figure)


def main(argv: list[str], config: Config) -> None:
    """Run what is missing, then make the tables and the figure from all files in --out."""
    command = "python -m companions.belief_states"
    about = "Textual belief states, three formulations."
    parser = argparse.ArgumentParser(prog=command, description=about)
    flag, about = parser.add_argument, "run seeds 0 to SEEDS - 1 (default: %(default)s)"
    # Intervals over seeds are there for up to ten of them.
    flag("--seeds", type=number(int, 1, 10), default=5, help=about)
    flag("--seed", type=number(int, 0, 9), help="run this seed only, 0 to 9")
    about = f"some of {', '.join(ARMS)}"
    flag("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=about)
    about = "folder to write to (default: %(default)s)"
    flag("--out", type=Path, default="runs/companions/belief_states", help=about)
    args = parser.parse_args(argv)
    try:
        for seed in range(args.seeds) if args.seed is None else [args.seed]:
            for arm in args.arms:
                run_arm(arm, seed, config, args.out)
        # Versions, commit, and the command that made or completed this folder.
        described = {"command": " ".join([command, *argv]), **runs.describe_machine("cpu")}
        text = json.dumps(described | {"config": as_json(config)}, indent=2) + "\n"
        runs.replace_file(args.out / "config.json", text.encode())
        # From all files that are there, also of other seeds and arms than this command's.
        results = read_results(args.out)
        runs.replace_file(args.out / "table.md", tables(results).encode())
        draw(results, args.out / "belief_states.png")
        print(tables(results))
    except runs.Refused as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # models this small gain nothing from more
    main(sys.argv[1:], Config())
