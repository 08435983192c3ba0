"""Textual belief states: advantages by enumeration, strict mediation bit by bit, world, files."""

import doctest
import json
import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from companions import belief_states as beliefs
from companions.belief_states import ARMS, PROMPTS, Arm, Config, factor_advantages, stage_loss
from lab.runs import Refused
from reinforce import full_logprobs, group_advantages
from rollout import random_numbers, sample

SMALL = Config(warm_steps=2, updates=2, histories=2, eval_every=1, episodes=4, horizon=2)


def zeros(branching, histories=1):
    """Own rewards of 0 for every stage."""
    counts = torch.tensor([histories, *branching]).cumprod(0)[1:]
    return [torch.zeros(int(count), dtype=torch.float64) for count in counts]


@pytest.fixture(scope="module")
def model():
    """A random model with sharp distributions, in double precision."""
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    shape |= dict(num_attention_heads=2, initializer_range=0.3)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(beliefs.PIECES), **shape)).double().eval()


def test_doctests():
    """All examples of the docstrings were found, and are right."""
    assert doctest.testmod(beliefs).attempted == 5
    assert doctest.testmod(beliefs).failed == 0


# --------------------------------------------------------------------------------------------------
# fGRPO on an enumerable world: two states z, two next states z', two observations o, any reward
# r(z, z', o)


def enumerate_trees(branching):
    """All trees: log-probabilities of the three factors, rewards, tables, exact gradients.

    The log-probabilities are of shape (T, N), (T, N, K) and (T, N, K, M).
    """
    (N, K, M), generator = branching, torch.Generator().manual_seed(0)
    shapes = ((2,), (2, 2), (2, 2), (2, 2, 2))
    numbers = partial(torch.randn, dtype=torch.float64, generator=generator)
    *tables, reward = map(numbers, shapes)
    encode, transition, decode = (table.requires_grad_() for table in tables)
    num_bits = N + N * K + N * K * M
    bits = (torch.arange(2**num_bits)[:, None] >> torch.arange(num_bits)) & 1  # (T, bits)
    z = bits[:, :N]
    next_z = bits[:, N : N + N * K].view(-1, N, K)
    o = bits[:, N + N * K :].view(-1, N, K, M)
    logprobs = [encode.log_softmax(-1)[z], transition.log_softmax(-1)[z[:, :, None], next_z]]
    logprobs.append(decode.log_softmax(-1)[next_z[..., None], o])
    rewards = reward[z[:, :, None, None], next_z[..., None], o]
    factors = [table.softmax(-1) for table in (encode, transition, decode)]
    expected = torch.einsum("z,zy,yo,zyo->", *factors, reward)
    exact = torch.autograd.grad(expected, (encode, transition, decode))
    return logprobs, rewards, (encode, transition, decode), exact


def expected_gradients(logprobs, advantages, tables):
    """The expectation of minus the gradient of the summed stage losses, over all trees."""
    probability = sum(logprob.flatten(1).sum(1) for logprob in logprobs).exp().detach()  # (T,)
    assert probability.sum().item() == pytest.approx(1.0, abs=1e-12)
    loss = 0.0
    for logprob, A in zip(logprobs, advantages):
        column = logprob.reshape(-1, 1)
        # stage_loss averages over nodes, and so over trees; T * probability turns that into the
        # expectation.
        weight = (probability * len(probability)).repeat_interleave(logprob[0].numel())
        loss = loss + stage_loss(column, torch.ones_like(column), A * weight)
    return [-gradient for gradient in torch.autograd.grad(loss, tables, retain_graph=True)]


@pytest.mark.parametrize("branching", [(2, 2, 2), (3, 1, 2), (2, 2, 1), (3, 1, 1)])
def test_gradient_is_exact_without_the_division(branching):
    logprobs, rewards, tables, exact = enumerate_trees(branching)
    own = zeros(branching, len(rewards))
    advantages = factor_advantages(rewards.flatten(), own, branching, divide=False)
    for estimate, gradient in zip(expected_gradients(logprobs, advantages, tables), exact):
        assert gradient.abs().max() > 0.01
        assert (estimate - gradient).abs().max() < 1e-10


def test_a_mean_that_contains_the_sample_scales_the_gradient():
    """V - mean over all n siblings: (n - 1)/n times the gradient, each factor with its own n."""
    N, K, M = branching = (3, 2, 1)
    logprobs, rewards, tables, exact = enumerate_trees(branching)
    V_ij, V_i = rewards.mean(3), rewards.mean((2, 3))
    A_i, A_ij = V_i - V_i.mean(1, keepdim=True), V_ij - V_ij.mean(2, keepdim=True)
    # The predictions have no siblings (M = 1), and take the advantage of their next state.
    estimates = expected_gradients(logprobs, [A.flatten() for A in (A_i, A_ij, A_ij)], tables)
    for estimate, gradient, n in zip(estimates, exact, (N, K, K)):
        assert (estimate - (n - 1) / n * gradient).abs().max() < 1e-10


def test_dividing_by_the_standard_deviation_is_not_exact():
    logprobs, rewards, tables, exact = enumerate_trees((2, 2, 2))
    own = zeros((2, 2, 2), len(rewards))
    advantages = factor_advantages(rewards.flatten(), own, (2, 2, 2), divide=True)
    estimates = expected_gradients(logprobs, advantages, tables)
    joined = [torch.cat([x.flatten() for x in gradients]) for gradients in (estimates, exact)]
    assert 0.5 < torch.cosine_similarity(*joined, dim=0) < 0.99


def test_a_chain_is_plain_grpo():
    """With one child per node, the loss has the gradient of GRPO on the three texts read as one."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(12, dtype=torch.float64, generator=generator)
    advantages = factor_advantages(rewards, zeros((4, 1, 1), histories=3), (4, 1, 1), divide=True)
    for A in advantages:
        assert torch.equal(A, group_advantages(rewards, 4))
    numbers = partial(torch.randn, dtype=torch.float64, generator=generator)
    texts = [numbers(12, length).requires_grad_() for length in (5, 3, 2)]
    masks = [(torch.rand(text.shape, generator=generator) < 0.7).double() for text in texts]
    factored = sum(map(stage_loss, texts, masks, advantages))
    whole, mask = torch.cat(texts, 1), torch.cat(masks, 1)
    plain = -(group_advantages(rewards, 4)[:, None] * whole * mask).sum() / 12
    for ours, grpo in zip(torch.autograd.grad(factored, texts), torch.autograd.grad(plain, texts)):
        assert ours.abs().max() > 0
        assert torch.equal(ours, grpo)


def test_advantages_by_hand():
    """Two states, two next states and two predictions each: V_ij = .5, 0, 1, 1 and V_i = .25, 1."""
    leaves = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1], dtype=torch.float64)
    tree = leaves, zeros((2, 2, 2)), (2, 2, 2)
    encode, transition, decode = factor_advantages(*tree, divide=False)
    assert encode.tolist() == [-0.75, 0.75]
    assert transition.tolist() == [0.5, -0.5, 0, 0]
    assert decode.tolist() == [1, -1, 0, 0, 0, 0, 0, 0]
    # Two values of a group differ from their mean by sqrt(1/2) of their standard deviation.
    encode, transition, decode = factor_advantages(*tree, divide=True)
    expected = torch.tensor([-1, 1, 1, -1, 1, -1]).double() * 0.5**0.5
    assert torch.allclose(torch.cat([encode, transition[:2], decode[:2]]), expected, atol=1e-4)
    assert torch.cat([transition[2:], decode[2:]]).abs().max() == 0


def test_own_rewards_stay_with_the_text_that_earned_them():
    own = zeros((2, 2, 2))
    own[1][0] = 1.0  # the first next state
    advantages = factor_advantages(torch.ones(8, dtype=torch.float64), own, (2, 2, 2), divide=False)
    assert [A.tolist() for A in advantages] == [[0, 0], [1, -1, 0, 0], [0] * 8]


def test_a_root_without_siblings_is_refused():
    with pytest.raises(ValueError, match="two or more"):
        factor_advantages(torch.ones(2), zeros((1, 2)), (1, 2), divide=False)


# --------------------------------------------------------------------------------------------------
# Strict mediation


@pytest.mark.parametrize("formulation", ["strict", "leaky"])
def test_only_strict_mediation_hides_the_history(model, formulation):
    """Two histories, one z: what later stages write, and how likely, differs under "leaky" only."""
    rng = random.Random(0)
    episodes = [beliefs.make_episode(rng, events, 1) for events in (3, 6)]
    z, action = "in-hall red-lamp blue-door", "paint green-gate"
    rows = [dict(history=episode.history, state=z, action=action) for episode in episodes]
    for stage in ("transition", "decode"):
        prompts = [PROMPTS[formulation][stage].format(**row) for row in rows]
        ids = [torch.tensor([beliefs.TOKENIZER(prompt).input_ids]) for prompt in prompts]
        first, second = (model(input_ids=x).logits[0, -1].softmax(-1) for x in ids)
        written = [beliefs.write(model, formulation, stage, [row], seed=1)[0] for row in rows]
        scored = [full_logprobs(model, rollouts, 1.0) for rollouts in written]
        if formulation == "strict":
            assert torch.equal(first, second)
            assert torch.equal(*scored)
            assert torch.equal(written[0].completion_ids, written[1].completion_ids)
        else:
            assert (first - second).abs().max() > 1e-3


def test_the_encoder_has_one_prompt():
    assert PROMPTS["strict"]["encode"] == PROMPTS["leaky"]["encode"]
    assert "{state}" not in PROMPTS["strict"]["encode"] + PROMPTS["stateless"]["decode"]


# --------------------------------------------------------------------------------------------------
# The world


def test_the_history_determines_the_state():
    """The last fact about a thing in a history is true, and so is the room of the last move."""
    rng = random.Random(0)
    for _ in range(200):
        episode = beliefs.make_episode(rng, rng.randint(2, 9), 1)
        words, known = episode.history.split(), {}
        for before, word in zip([None, *words], words):
            if word in beliefs.FACTS:
                known[beliefs.FACTS[word]] = word
                known["in"] = f"in-{beliefs.ROOM_OF[beliefs.FACTS[word]]}"
            elif before == "go":
                known["in"] = f"in-{word}"
        assert known == episode.state


def test_actions():
    state = {"in": "in-yard", "lamp": "red-lamp", "door": "red-door"}
    state |= {"gate": "blue-gate", "pump": "green-pump"}
    assert beliefs.act(state, "look here") == state
    assert beliefs.observe(beliefs.act(state, "go hall")) == "red-lamp red-door"
    assert beliefs.observe(beliefs.act(state, "paint green-door")) == "red-lamp green-door"
    painted = beliefs.describe(beliefs.act(state, "paint red-pump"))
    assert painted == "in-yard red-lamp red-door blue-gate red-pump"


@pytest.mark.parametrize(
    ("text", "valid", "score"),
    [
        ("red-lamp blue-door", True, 1.0),
        ("blue-door red-lamp", True, 1.0),
        ("red-lamp", True, 2 / 3),
        ("red-lamp green-lamp blue-door", False, 0.8),  # two facts about the lamp
        ("red-lamp hall blue-door", False, 1.0),
        ("red-lamp red-lamp", False, 2 / 3),
        ("", False, 0.0),
    ],
)
def test_format_and_f1(text, valid, score):
    assert beliefs.read_facts(text)[1] is valid
    assert beliefs.f1(text, "red-lamp blue-door") == pytest.approx(score)


def test_own_rewards():
    rows = [{"state": "red-lamp", "observation": "red-lamp"}]
    rows += [{"state": "red-lamp red-lamp hall", "observation": ""}]
    expected = {"encode": [0.1 - 0.1, -0.3], "transition": [0.1, 0], "decode": [0.1, 0]}
    for stage, g in expected.items():
        assert beliefs.own_rewards(stage, rows, 0.1, 0.5).tolist() == pytest.approx(g)


def test_warm_texts():
    """Beliefs are false and missing as often as they should be; observations are true."""
    texts = beliefs.warm_texts(0, replace(SMALL, warm_steps=50))
    encoded = [(prompt, target) for prompt, target in texts if prompt.startswith("encode")]
    assert len(texts) == 3200
    assert 0.1 < len(encoded) / len(texts) < 0.25  # one of six prompts
    counts = {"true": 0, "false": 0, "missing": 0}
    for prompt, target in encoded:
        last = {beliefs.FACTS[word]: word for word in prompt.split() if word in beliefs.FACTS}
        found = {beliefs.FACTS[word]: word for word in target.split()}
        for thing in beliefs.ROOM_OF:
            told = "true" if found.get(thing) == last[thing] else "false"
            counts[told if thing in found else "missing"] += 1
    total = sum(counts.values())
    assert counts["false"] / total == pytest.approx(0.15, abs=0.03)
    assert counts["missing"] / total == pytest.approx(0.15, abs=0.03)
    for prompt, target in texts:
        if prompt.startswith("decode history"):
            action = prompt.split(" action ")[1].split()[:2]
            assert action[0] != "paint" or action[1] in target


# --------------------------------------------------------------------------------------------------
# Sampling and measures


def test_texts_are_sampled_from_the_distribution_that_is_scored(model):
    """With left-padded prompts of different lengths, and rows that end early."""
    rng = random.Random(1)
    histories = [beliefs.make_episode(rng, events, 1).history for events in (2, 5, 9, 3)] * 4
    rows = [{"history": history} for history in histories]
    rollouts, written = beliefs.write(model, "strict", "encode", rows, seed=3)
    assert len(set(rollouts.completion_mask.sum(1).tolist())) > 1
    noise, _ = random_numbers(len(rows), beliefs.MAX_WORDS["encode"], seed=3)
    logprobs, real = full_logprobs(model, rollouts, 1.0), rollouts.completion_mask.bool()
    for t, ids in enumerate(rollouts.completion_ids.T):
        again = sample(logprobs[:, t], noise[0, t], temperature=1.0)
        assert torch.equal(again[real[:, t]], ids[real[:, t]])
    for row, ids, mask in zip(written, rollouts.completion_ids, rollouts.completion_mask.bool()):
        assert beliefs.TOKENIZER(row["state"]).input_ids == [i for i in ids[mask].tolist() if i]


def oracle(model, formulation, stage, rows, seed, temperature=1.0):
    """A stand-in for `write` that follows the rules, reading what the prompt of its stage shows."""
    written = []
    for row in rows:
        shown = PROMPTS[formulation][stage]
        if stage == "encode" or "{state}" not in shown:
            words, state = row["history"].split(), {}
            for before, word in zip([None, *words], words):
                if word in beliefs.FACTS:
                    thing = beliefs.FACTS[word]
                    state |= {"in": f"in-{beliefs.ROOM_OF[thing]}", thing: word}
                elif before == "go":
                    state["in"] = f"in-{word}"
        else:
            state = {beliefs.FACTS[word]: word for word in row["state"].split()}
        if stage == "transition" or "{state}" not in shown and stage == "decode":
            state = beliefs.act(state, row["action"])
        tell = beliefs.observe if stage == "decode" else beliefs.describe
        written.append(row | {beliefs.WRITES[stage]: tell(state)})
    return None, written


@pytest.mark.parametrize("name", ["stateless", "strict", "leaky"])
def test_an_oracle_scores_one_at_every_horizon(monkeypatch, name):
    """The measures are 1 for a model without mistakes, and histories grow by its own text."""
    monkeypatch.setattr(beliefs, "write", oracle)
    policies = dict.fromkeys(PROMPTS[ARMS[name].formulation])
    config = replace(Config(), episodes=30)
    measures = beliefs.evaluate(policies, ARMS[name], 0, config)
    assert measures["one_step"] == 1
    assert (measures["state"], measures["length"]) == ((0, 0) if name == "stateless" else (1, 1))
    assert beliefs.rollout_f1(policies, ARMS[name], 0, config, extend=True) == [1.0] * 8
    if name == "stateless":
        # Without its own predictions it does not know of earlier actions.
        assert beliefs.rollout_f1(policies, ARMS[name], 0, config, extend=False)[-1] < 0.9


def test_no_true_observation_is_read_in_open_loop(model):
    """Episodes with one history and other truths give the same rows.

    With `extend` the history grows by what was written.
    """
    policies = dict.fromkeys(PROMPTS["leaky"], model)
    episode = beliefs.make_episode(random.Random(0), 3, 2)
    other = episode._replace(state={}, states=[{}, {}])
    loop = partial(beliefs.open_loop, policies, ARMS["leaky"], key=("key",))
    first = loop([episode])
    assert first == loop([other])
    own = f"{episode.actions[0]} {first[1][0]['observation']}"
    assert first[2][0]["history"] == f"{episode.history} {own}"
    kept = loop([episode], extend=False)
    assert kept[2][0]["history"] == episode.history


def test_matched_state_f1():
    rows = [(0.6, 0.5), (0.8, 0.9), (0.95, 1.0), (0.7, 0.6), (0.85, 0.4)]
    rows = [dict(one_step=one_step, state=state) for one_step, state in rows]
    first, second = rows[:3], rows[3:]
    assert beliefs.matched_state_f1(first, second) == pytest.approx((0.5, -0.05))


# --------------------------------------------------------------------------------------------------
# Training and files


@pytest.fixture(scope="module")
def base():
    return beliefs.warm_start(0, SMALL)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_every_arm_starts_from_the_same_encoder(base):
    for arm in ARMS.values():
        policies = beliefs.make_policies(base, arm)
        assert all(same(policy, base) for policy in policies.values())
        assert len(set(map(id, policies.values()))) == (len(policies) if arm.separate else 1)


TRAINED = ["stateless", "leaky", "leaky-frozen", "leaky-shared", "strict-no-std"]


@pytest.mark.parametrize("name", TRAINED)
def test_training_changes_what_it_should(base, name):
    policies, evaluations = beliefs.train(base, ARMS[name], 0, SMALL)
    assert [row["update"] for row in evaluations] == [0, 1, 2]
    for stage, policy in policies.items():
        frozen = ARMS[name].freeze_encoder and stage == "encode"
        assert same(policy, base) == frozen
        assert all(parameter.requires_grad != frozen for parameter in policy.parameters())
    if ARMS[name].separate and "encode" in policies:
        assert not same(policies["transition"], policies["decode"])


def test_no_reward_differences_no_change(base, monkeypatch):
    """With the same reward for every text, nothing is preferred, and the weights stay."""
    monkeypatch.setattr(beliefs, "f1", lambda predicted, truth: 0.5)
    nothing = lambda stage, rows, *weights: torch.zeros(len(rows)).double()  # noqa: E731
    monkeypatch.setattr(beliefs, "own_rewards", nothing)
    policies, _ = beliefs.train(base, Arm("strict"), 0, SMALL)
    assert all(same(policy, base) for policy in policies.values())


def test_main_resumes_and_draws_from_files(tmp_path, monkeypatch, capsys):
    """A second command runs what is missing, with the same numbers, and draws what files say."""
    command = ["--arms", "strict", "leaky", "--seeds", "2", "--out", str(tmp_path)]
    beliefs.main(command, SMALL)
    paths = sorted(tmp_path.glob("*/seed-*.json"))
    expected = [f"{arm}/seed-{k}.json" for arm in ("leaky", "strict") for k in (0, 1)]
    assert [str(path.relative_to(tmp_path)) for path in paths] == expected
    others = {path.name for path in tmp_path.iterdir()} - {"strict", "leaky"}
    assert others == {"config.json", "table.md", "belief_states.png"}
    assert json.loads((tmp_path / "config.json").read_text())["config"]["updates"] == 2
    contents = [json.loads(path.read_text()) for path in paths]
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out

    paths[-1].unlink()
    # Drawing takes seconds, and once is enough.
    monkeypatch.setattr(beliefs, "draw", lambda results, path: None)
    trained, train = [], beliefs.train
    monkeypatch.setattr(beliefs, "train", lambda *args: trained.append(args[4]) or train(*args))
    beliefs.main(command, SMALL)
    assert trained == ["seed 1 strict"]
    again = json.loads(paths[-1].read_text())
    assert again | {"seconds": 0} == contents[-1] | {"seconds": 0}

    # Only the files decide: with a state F1 of one in both, the table says 100 with no width.
    for k in (0, 1):
        path = tmp_path / "strict" / f"seed-{k}.json"
        result = json.loads(path.read_text())
        result["evaluations"][-1]["state"] = 1.0
        path.write_text(json.dumps(result))
    beliefs.main(command, SMALL)
    assert "→ 100.0 [100.0, 100.0]" in (tmp_path / "table.md").read_text()
    assert len(trained) == 1


def test_other_settings_are_refused(tmp_path, base):
    beliefs.run_arm("strict", 0, SMALL, tmp_path)
    with pytest.raises(Refused, match=r"'lr': \(0.0003, 0.1\).*choose another --out"):
        beliefs.run_arm("strict", 0, replace(SMALL, lr=0.1), tmp_path)
    (tmp_path / "strict" / "seed-0.json").write_text("{")
    with pytest.raises(SystemExit, match="error: .*seed-0.json cannot be used"):
        beliefs.main(["--arms", "strict", "--seed", "0", "--out", str(tmp_path)], SMALL)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "0"], "0: must be from 1 to 10"),
        (["--seeds", "11"], "11: must be from 1 to 10"),
        (["--seed", "-1"], "-1: must be from 0 to 9"),
        (["--arms", "stric"], "invalid choice: 'stric'"),
    ],
)
def test_bad_flags_are_named(flags, message, capsys):
    with pytest.raises(SystemExit):
        beliefs.main(flags, SMALL)
    assert message in capsys.readouterr().err


def test_intervals():
    assert beliefs.with_interval([0.01, 0.02, 0.03]) == "2.0 [-0.5, 4.5]"
    assert beliefs.with_interval([0.5]) == "50.0"
