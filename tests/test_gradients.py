"""Which schedules give the exact policy gradient: every path of a tabular pair, against autograd.

The pair: V = 3 tokens ("a", "b", " c"), texts of 3 tokens, for each writer a table of logits with a
row per history, and a reward of 0 or 1 for each of the 27 texts. A path is (senior's candidate,
junior's candidate, coin) at each of the three steps: (3 * 3 * 2) ** 3 = 5,832 paths, all in one
batch. A coin that is never tossed is summed out, since both of its sides are among the paths.
"""

import itertools
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch

from reinforce import group_advantages, outcome_weights, token_weights
from rollout import Rollouts
from tandem import Handoff

V, STEPS = 3, 3
STEP = [range(V), range(V), range(2)]
PATHS = torch.tensor(list(itertools.product(*STEP * STEPS))).view(-1, STEPS, 3)


def history(tokens: torch.Tensor) -> torch.Tensor:
    """Row of the table for the text so far, (paths, t) -> (paths,): 0, then 1 to 3, 4 to 12."""
    index = torch.zeros(len(tokens), dtype=torch.long)
    for column in tokens.T:
        index = index * V + column + 1
    return index


@lru_cache
def walk(schedule: str, p: float) -> SimpleNamespace:
    """All paths under a schedule: probabilities, rewards, rollouts, and the senior's terms."""
    generator = torch.Generator().manual_seed(0)
    options = dict(dtype=torch.float64, generator=generator)
    theta, phi = (torch.randn(13, V, **options) for _ in range(2))
    theta.requires_grad_()
    right = (torch.rand(40, generator=generator) < 0.4).double()
    coins = torch.where(PATHS[:, :, 2] == 1, 0.0, 0.9).T  # (STEPS, paths): below p is the senior
    handoff = Handoff([b"a", b"b", b" c"], schedule, p, coins)
    probability, p_of_coin = 1.0, torch.tensor([1 - p, p], dtype=torch.float64)
    tokens, authors = torch.zeros(2, len(PATHS), 0, dtype=torch.long)
    logprobs, discarded = [], []
    for t in range(STEPS):
        s, j = (table.log_softmax(-1)[history(tokens)] for table in (theta, phi))  # (paths, V)
        senior_ids, junior_ids, coin = PATHS[:, t].T
        of_senior = s.gather(1, senior_ids[:, None])[:, 0]
        of_junior = j.gather(1, junior_ids[:, None])[:, 0]
        probability = probability * (of_senior + of_junior).exp() * p_of_coin[coin]
        was_active = torch.tensor([bool(active) for active in handoff.senior_active])
        chosen = handoff.choose(range(len(PATHS)), senior_ids.tolist(), junior_ids.tolist())
        senior = torch.tensor(chosen)
        # The senior's candidate caused a toss, but the junior's was written.
        discarded.append(torch.where(was_active & ~senior, of_senior, 0.0))
        ids = torch.where(senior, senior_ids, junior_ids)[:, None]
        logprobs.append(s.gather(1, ids)[:, 0])
        tokens, authors = torch.cat([tokens, ids], 1), torch.cat([authors, senior[:, None]], 1)
    assert probability.sum().item() == pytest.approx(1.0, abs=1e-12)
    ones, rewards = torch.ones_like(tokens), right[history(tokens)]
    found = Rollouts(ones, ones, ones, ones, tokens, ones, authors, [""] * len(tokens))
    terms = dict(logprobs=torch.stack(logprobs, 1), discarded=torch.stack(discarded, 1))
    probabilities = dict(theta=theta, probability=probability, rewards=rewards)
    return SimpleNamespace(rollouts=found, **probabilities, **terms)


def gradients(schedule: str, w, junior_weight: float, p: float, discarded_too=False):
    """(gradient of the expected reward by autograd, expectation of REINFORCE's over all paths).

    w: the weight of every rollout, a function of the paths.
    """
    paths = walk(schedule, p)
    expected = (paths.probability * paths.rewards).sum()
    weights = token_weights(paths.rollouts, w(paths), junior_weight).double()
    terms = weights * paths.logprobs + discarded_too * paths.rewards[:, None] * paths.discarded
    estimate = (paths.probability.detach() * terms.sum(1)).sum()
    both = (torch.autograd.grad(x, paths.theta, retain_graph=True)[0] for x in (expected, estimate))
    return tuple(gradient.flatten() for gradient in both)


def reinforce(schedule, junior_weight=0.0, p=0.5, wrong_weight=0.0, discarded_too=False):
    def w(paths):
        return outcome_weights(paths.rewards, wrong_weight)

    return gradients(schedule, w, junior_weight, p, discarded_too)


def equal(exact, estimate) -> bool:
    """Equal, and not because both are 0."""
    return exact.norm() > 0.01 and (exact - estimate).abs().max() < 1e-10


@pytest.mark.parametrize("schedule", ["token", "redraw"])
def test_exact_where_coins_depend_on_written_text(schedule):
    assert equal(*reinforce(schedule))
    assert equal(*reinforce(schedule, p=0.8))
    # c = -0.4 is a constant baseline: w = 1.4 * (r - 0.4 / 1.4).
    exact, estimate = reinforce(schedule, wrong_weight=-0.4)
    assert equal(1.4 * exact, estimate)


def test_word_is_an_approximation():
    """Cosine 0.90 here, where the one token that opens a word decides much.

    With the discarded candidates scored as well it is exact.
    """
    assert 0.88 < torch.cosine_similarity(*reinforce("word"), dim=0) < 0.92
    assert equal(*reinforce("word", discarded_too=True))


@pytest.mark.parametrize("schedule", ["token", "word", "redraw"])
def test_the_juniors_tokens(schedule):
    """j = 1, the paper's choice: they add a pull that is no part of the policy gradient.

    At p = 1 there are none, whatever j is.
    """
    assert torch.cosine_similarity(*reinforce(schedule, junior_weight=1.0), dim=0) < 0.97
    for junior_weight in (0.0, 1.0):
        assert equal(*reinforce(schedule, junior_weight, p=1.0))


def grpo(schedule: str, p: float):
    """(a times the gradient of the expected reward, expectation of GRPO's in groups of two).

    All groups of two paths would be 34 million. But given its own path, a rollout's expected
    advantage depends only on the probability q that the other rollout of its group is right. The
    advantage is a = 0.5 / (sqrt(1/2) + 1e-6) if only this one is right, -a if only the other is,
    else 0. So E[A] = a * (r * (1 - q) - (1 - r) * q) = a * (r - q), and q is a constant baseline.
    """

    def w(paths):
        q, r = (paths.probability.detach() * paths.rewards).sum(), paths.rewards
        groups = [torch.stack([r, torch.full_like(r, other)], 1).flatten() for other in (1, 0)]
        beside_right, beside_wrong = (group_advantages(group, 2)[::2] for group in groups)
        return q * beside_right + (1 - q) * beside_wrong

    exact, estimate = gradients(schedule, w, junior_weight=0.0, p=p)
    return 0.5 / (0.5**0.5 + 1e-6) * exact, estimate


@pytest.mark.parametrize(
    ("schedule", "p"),
    [("token", 0.5), ("token", 0.8), ("redraw", 0.5), ("redraw", 0.8), ("word", 1.0)],
)
def test_grpo_in_groups_of_two_is_the_policy_gradient(schedule, p):
    """With two rollouts the standard deviation is the same wherever the advantages are not 0."""
    assert equal(*grpo(schedule, p))


@pytest.mark.parametrize("method", [reinforce, grpo])
def test_p_0_without_the_juniors_tokens_teaches_nothing(method):
    exact, estimate = method("word", p=0.0)
    assert exact.abs().max() < 1e-12
    assert estimate.abs().max() == 0
