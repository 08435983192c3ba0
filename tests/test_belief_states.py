"""Textual belief states: advantages by enumeration, strict mediation bit by bit, world, files."""

import json
import random
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import pytest
import torch

from companions import atod
from companions import belief_states as beliefs
from companions.belief_states import ARMS, PROMPTS, Config, factor_advantages, stage_loss
from conftest import ends_with, llama
from lab.runs import Refused
from reinforce import full_logprobs

SMALL = Config(warm_steps=2, updates=2, histories=2, eval_every=1, episodes=4, horizon=2)


def zeros(branching, histories=1):
    """Own rewards of 0 for every stage."""
    counts = torch.tensor([histories, *branching]).cumprod(0)[1:]
    return [torch.zeros(int(count), dtype=torch.float64) for count in counts]


# --------------------------------------------------------------------------------------------------
# fGRPO


@pytest.mark.parametrize("branching", [(2, 2, 2), (3, 1, 2), (2, 2, 1), (3, 1, 1)])
def test_the_gradient_is_exact_without_the_division(branching):
    """Over all trees of a world of two states z, two next states z', two observations o.

    The reward r(z, z', o) is any one. T trees; tables of shape (2,), (2, 2) and (2, 2).
    """
    (N, K, M), generator = branching, torch.Generator().manual_seed(0)
    numbers = partial(torch.randn, dtype=torch.float64, generator=generator)
    *tables, reward = map(numbers, ((2,), (2, 2), (2, 2), (2, 2, 2)))
    encode, transition, decode = (table.requires_grad_() for table in tables)
    # A tree is a number whose bits are its nodes.
    counts, shapes = (N, N * K, N * K * M), ((N, 1, 1), (N, K, 1), (N, K, M))
    bits = (torch.arange(2 ** sum(counts))[:, None] >> torch.arange(sum(counts))) & 1  # (T, nodes)
    z, next_z, o = (x.view(-1, *shape) for x, shape in zip(bits.split(counts, 1), shapes))
    logprobs = [encode.log_softmax(-1)[z], transition.log_softmax(-1)[z, next_z]]
    logprobs.append(decode.log_softmax(-1)[next_z, o])
    factors = [table.softmax(-1) for table in tables]
    exact = torch.autograd.grad(torch.einsum("z,zy,yo,zyo->", *factors, reward), tables)
    probability = sum(logprob.flatten(1).sum(1) for logprob in logprobs).exp().detach()  # (T,)
    assert probability.sum().item() == pytest.approx(1.0, abs=1e-12)
    own, loss = zeros(branching, len(bits)), 0.0
    advantages = factor_advantages(reward[z, next_z, o].flatten(), own, branching, divide=False)
    for logprob, A in zip(logprobs, advantages):
        # stage_loss averages over nodes, and so over trees; T * probability turns that into the
        # expectation.
        weight = (probability * len(bits)).repeat_interleave(logprob[0].numel())
        loss = loss + stage_loss(logprob.reshape(-1, 1), torch.tensor(1), A * weight)
    for estimate, gradient in zip(torch.autograd.grad(-loss, tables), exact):
        assert gradient.abs().max() > 0.01
        assert (estimate - gradient).abs().max() < 1e-10


def test_advantages_by_hand():
    """Two states, two next states and two predictions each: V_ij = .5, 0, 1, 1 and V_i = .25, 1."""
    leaves = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1], dtype=torch.float64)
    tree = leaves, zeros((2, 2, 2)), (2, 2, 2)
    expected = [[-0.75, 0.75], [0.5, -0.5, 0, 0], [1, -1, 0, 0, 0, 0, 0, 0]]
    assert [A.tolist() for A in factor_advantages(*tree, divide=False)] == expected
    # Two values of a group differ from their mean by sqrt(1/2) of their standard deviation.
    for A, undivided in zip(factor_advantages(*tree, divide=True), expected):
        signs = torch.tensor(undivided, dtype=torch.float64).sign()
        assert torch.allclose(A, signs * 0.5**0.5, atol=1e-4)
    # What a text earns by itself stays with it: here with the first next state.
    tree[1][1][0] = 1.0
    found = factor_advantages(torch.ones(8), *tree[1:], divide=False)
    assert [A.tolist() for A in found] == [[0, 0], [1, -1, 0, 0], [0] * 8]
    # The loss: -(2 * (-1 - 2) - 1 * -3) / 2 = 1.5, where padding is masked.
    logprobs, mask = -torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1, 1], [1, 0]])
    assert stage_loss(logprobs, mask, torch.tensor([2.0, -1.0])) == 1.5
    with pytest.raises(ValueError, match="two or more"):
        factor_advantages(torch.ones(2), zeros((1, 2)), (1, 2), divide=False)


# --------------------------------------------------------------------------------------------------
# Strict mediation, and the world


@pytest.fixture(scope="module")
def model():
    return llama(len(beliefs.PIECES), 0, torch.float64)


@pytest.mark.parametrize("stage", ["transition", "decode"])
@pytest.mark.parametrize("formulation", ["strict", "leaky"])
def test_only_strict_mediation_hides_the_history(model, formulation, stage):
    """Two histories, one z: what later stages find likely differs under "leaky" only."""
    row = dict(state="in-hall red-lamp blue-door", action="paint green-gate")
    histories = [beliefs.make_episode(random.Random(0), events, 1).history for events in (3, 6)]
    rows = [row | {"history": history} for history in histories]
    rollouts, written = beliefs.write(model, formulation, stage, rows, seed=1)
    first, second = full_logprobs(model, rollouts, 1.0)[:, 0]
    assert torch.equal(first, second) == (formulation == "strict")
    # The text of a row spells its ids; 0 ends it.
    for row, ids in zip(written, rollouts.completion_ids.tolist()):
        assert beliefs.TOKENIZER(row[beliefs.WRITES[stage]]).input_ids == [i for i in ids if i]


def state_after(history: str) -> dict:
    """What a history says: the last fact about a thing is true, and so is the last room."""
    words, state = history.split(), {}
    for before, word in zip([None, *words], words):
        if word in beliefs.FACTS:
            thing = beliefs.FACTS[word]
            state |= {"in": f"in-{beliefs.ROOM_OF[thing]}", thing: word}
        elif before == "go":
            state["in"] = f"in-{word}"
    return state


def test_the_world():
    rng = random.Random(0)
    for _ in range(200):
        episode = beliefs.make_episode(rng, rng.randint(2, 9), 1)
        assert state_after(episode.history) == episode.state
    state = state_after("red-lamp red-door blue-gate green-pump go yard")
    assert beliefs.act(state, "look here") == state
    assert beliefs.observe(beliefs.act(state, "go hall")) == "red-lamp red-door"
    assert beliefs.observe(beliefs.act(state, "paint green-door")) == "red-lamp green-door"
    state = beliefs.act(state, "paint red-pump")
    assert beliefs.describe(state) == "in-yard red-lamp red-door blue-gate red-pump"


def test_what_a_text_earns():
    """A fifth of the length penalty per word of a state, where the encoder wrote it."""
    formats = {"blue-door red-lamp": (True, 1.0), "red-lamp hall blue-door": (False, 1.0)}
    formats |= {"red-lamp green-lamp blue-door": (False, 0.8), "": (False, 0.0)}
    for text, (valid, score) in formats.items():
        assert beliefs.read_facts(text)[1] is valid
        assert beliefs.f1(text, "red-lamp blue-door") == pytest.approx(score)
        rows, length = [{"state": text, "observation": text}], len(text.split())
        for stage, cost in {"encode": 0.1, "transition": 0, "decode": 0}.items():
            g = 0.1 * valid - cost * length
            assert beliefs.own_rewards(stage, rows, 0.1, 0.5).tolist() == pytest.approx([g])


def test_warm_texts():
    """Beliefs are false and missing as often as they should be; observations are true."""
    texts = beliefs.warm_texts(0, replace(SMALL, warm_steps=50))
    encoded = [(prompt, target) for prompt, target in texts if prompt.startswith("encode")]
    assert len(encoded) / len(texts) == pytest.approx(1 / 6, abs=0.02)  # there are six prompts
    told = []
    for prompt, target in encoded:
        truth, belief = state_after(prompt), {beliefs.FACTS[word]: word for word in target.split()}
        told += [belief[x] == truth[x] if x in belief else None for x in beliefs.ROOM_OF]
    for wrong in (False, None):
        assert told.count(wrong) / len(told) == pytest.approx(0.15, abs=0.03)
    for prompt, target in texts:
        if prompt.startswith(("decode history", "transition")):
            action = prompt.split(" action ")[1].split()[:2]
            assert action[0] != "paint" or action[1] in target


# --------------------------------------------------------------------------------------------------
# Measures


def oracle(model, formulation, stage, rows, seed, temperature=1.0):
    """A stand-in for `write` that follows the rules, reading what the prompt of its stage shows."""
    written, shown = [], PROMPTS[formulation][stage]
    for row in rows:
        told = {beliefs.FACTS[word]: word for word in row["state"].split()}
        state = told if "{state}" in shown else state_after(row["history"])
        if stage == "transition" or formulation == "stateless":
            state = beliefs.act(state, row["action"])
        tell = beliefs.observe if stage == "decode" else beliefs.describe
        written.append(row | {beliefs.WRITES[stage]: tell(state)})
    return None, written


@pytest.mark.parametrize("name", ["stateless", "strict", "leaky"])
def test_an_oracle_scores_one_at_every_horizon(monkeypatch, name):
    """The measures are 1 for a model without mistakes, and histories grow by its own text."""
    monkeypatch.setattr(beliefs, "write", oracle)
    policies = dict.fromkeys(PROMPTS[ARMS[name].formulation])
    config, known = Config(episodes=30), float(name != "stateless")
    expected = dict(one_step=1.0, state=known, length=known)
    assert beliefs.evaluate(policies, ARMS[name], 0, config) == expected
    assert beliefs.rollout_f1(policies, ARMS[name], 0, config, extend=True) == [1.0] * 8


def test_no_true_observation_is_read_in_open_loop(model):
    """Episodes with one history and other truths give the same rows.

    With `extend` the history grows by what was written.
    """
    episode = beliefs.make_episode(random.Random(0), 3, 2)
    other = episode._replace(state={}, states=[{}, {}])
    policies = dict.fromkeys(PROMPTS["leaky"], model)
    loop = partial(beliefs.open_loop, policies, ARMS["leaky"], key=("key",))
    first, kept = loop([episode]), loop([episode], extend=False)
    assert first == loop([other]) != loop([episode], key=("other key",))
    greedy = [loop([episode], key=(seed,), temperature=0.0) for seed in range(2)]
    assert greedy[0] == greedy[1]
    grown = f"{episode.history} {episode.actions[0]} {first[1][0]['observation']}"
    assert (first[2][0]["history"], kept[2][0]["history"]) == (grown, episode.history)


def test_statistics():
    rows = [(0.6, 0.5), (0.8, 0.9), (0.95, 1.0), (0.7, 0.6), (0.85, 0.4)]
    rows = [dict(one_step=one_step, state=state) for one_step, state in rows]
    assert beliefs.matched_state_f1(rows[:3], rows[3:]) == pytest.approx((0.5, -0.05))
    assert beliefs.with_interval([0.01, 0.02, 0.03]) == "2.0 [-0.5, 4.5]"
    assert beliefs.with_interval([0.5]) == "50.0"


# --------------------------------------------------------------------------------------------------
# Training and files


@pytest.mark.parametrize("name", ["stateless", "leaky-frozen", "leaky-shared", "strict-no-std"])
def test_training_changes_what_it_should(name, monkeypatch):
    arm, base = ARMS[name], beliefs.warm_start(0, SMALL)
    f1 = Mock(wraps=beliefs.f1)
    monkeypatch.setattr(beliefs, "f1", f1)
    if not arm.divide:
        monkeypatch.setattr(beliefs, "group_advantages", None)  # it cannot be called
    policies, evaluations = beliefs.train(base, arm, 0, SMALL)
    assert [row["update"] for row in evaluations] == [0, 1, 2]
    assert len(set(map(id, policies.values()))) == (len(policies) if arm.separate else 1)
    for stage, policy in policies.items():
        frozen = arm.freeze_encoder and stage == "encode"
        unchanged = all(map(torch.equal, policy.parameters(), base.parameters()))
        assert (unchanged, policy.lm_head.weight.requires_grad) == (frozen, not frozen)
    # After two times four evaluated texts come the predictions of two trees with 16 leaves each.
    # Their truth is what is seen after the action.
    truths = [call.args[1] for call in f1.call_args_list][8:40]
    episodes = beliefs.new_episodes(random.Random("train 0"), 2, SMALL)
    assert truths == [beliefs.observe(episode.states[0]) for episode in episodes for _ in range(16)]
    assert truths[0] != truths[-1]


def test_main_resumes_draws_from_files_and_refuses(tmp_path, monkeypatch, capsys):
    """A second command runs what is missing, with the same numbers, and draws what files say."""
    command = ["--arms", "strict", "leaky", "--seeds", "2", "--out", str(tmp_path)]
    beliefs.main(command, SMALL)
    assert json.loads((tmp_path / "config.json").read_text())["config"]["updates"] == 2
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    monkeypatch.setattr(beliefs, "draw", lambda results, path: None)
    trained, train = [], beliefs.train
    monkeypatch.setattr(beliefs, "train", lambda *args: trained.append(args[4]) or train(*args))
    paths = [tmp_path / "strict" / f"seed-{k}.json" for k in (0, 1)]
    contents = [json.loads(path.read_text()) | {"seconds": 0} for path in paths]
    paths[1].unlink()
    # Only the files decide: here on the state F1 after training.
    contents[0]["evaluations"][-1]["state"] = 1000
    paths[0].write_text(json.dumps(contents[0]))
    beliefs.main(command, SMALL)
    assert trained == ["seed 1 strict"]
    assert json.loads(paths[1].read_text()) | {"seconds": 0} == contents[1]
    assert "→ 500" in (tmp_path / "table.md").read_text()
    # Other settings, and a file that cannot be read.
    with pytest.raises(Refused, match=r"'lr': \(0.0003, 0.1\).*choose another --out"):
        beliefs.run_arm("strict", 0, replace(SMALL, lr=0.1), tmp_path)
    paths[0].write_text("{")
    ends_with("error: .*seed-0.json cannot be used", beliefs.main, command, SMALL)


@pytest.mark.parametrize("program", [partial(beliefs.main, config=SMALL), atod.parse])
def test_bad_flags_of_the_companions_are_named(program, capsys):
    messages = {"--seeds 0": "0: must be from 1 to 10", "--seed -1": "-1: must be from 0 to"}
    messages |= {"--seeds 11": "11: must be from", "--arms stric": "invalid choice: 'stric'"}
    if program is atod.parse:
        messages["--seed 1 --seeds 2"] = "not allowed with"
    for flags, message in messages.items():
        ends_with("2", program, flags.split())
        assert message in capsys.readouterr().err
