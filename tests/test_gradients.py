"""Which schedules give the exact policy gradient: every path of a tabular pair, against autograd.

The pair: V = 3 tokens ("a", "b", " c"), texts of 3 tokens, for each writer a table of logits with a
row per history, and a reward of 0 or 1 for each of the 27 texts. A path is (senior's candidate,
junior's candidate, coin) at each of the three steps: (3 * 3 * 2) ** 3 = 5,832 paths, all in one
batch. A coin that is never tossed is summed out, since both of its sides are among the paths.
"""

from functools import cache
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from conftest import rollouts_of
from reinforce import group_advantages, outcome_weights, token_weights
from tandem import Handoff

V, STEPS = 3, 3
STEP = [range(V), range(V), range(2)]
PATHS = torch.tensor(list(product(*STEP * STEPS))).view(-1, STEPS, 3)


def history(tokens: torch.Tensor) -> torch.Tensor:
    """Row of the table for the text so far, (paths, t) -> (paths,): 0, then 1 to 3, 4 to 12."""
    index = torch.zeros(len(tokens), dtype=torch.long)
    for column in tokens.T:
        index = index * V + column + 1
    return index


@cache
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
    logprobs = discarded = torch.zeros(len(PATHS), 0)
    for t in range(STEPS):
        s, j = (table.log_softmax(-1)[history(tokens)] for table in (theta, phi))  # (paths, V)
        senior_ids, junior_ids, coin = PATHS[:, t, :, None].unbind(1)  # (paths, 1) each
        of_senior, of_junior = s.gather(1, senior_ids), j.gather(1, junior_ids)
        probability = probability * (of_senior + of_junior).exp() * p_of_coin[coin]
        was_active = torch.tensor([[bool(active)] for active in handoff.senior_active])
        candidates = senior_ids.flatten().tolist(), junior_ids.flatten().tolist()
        senior = torch.tensor(handoff.choose(range(len(PATHS)), *candidates))[:, None]
        # The senior's candidate caused a toss, but the junior's was written.
        lost = torch.where(was_active & ~senior, of_senior, 0.0)
        ids = torch.where(senior, senior_ids, junior_ids)
        logprobs = torch.cat([logprobs, s.gather(1, ids)], 1)
        discarded = torch.cat([discarded, lost], 1)
        tokens, authors = torch.cat([tokens, ids], 1), torch.cat([authors, senior], 1)
    assert probability.sum().item() == pytest.approx(1.0, abs=1e-12)
    rewards, rollouts = right[history(tokens)], rollouts_of(tokens, authors)
    rest = dict(probability=probability[:, 0], logprobs=logprobs, discarded=discarded)
    return SimpleNamespace(theta=theta, rewards=rewards, rollouts=rollouts, **rest)


def gradients(paths, w: torch.Tensor, junior_weight=0.0, discarded_too=False):
    """(gradient of the expected reward by autograd, expectation of REINFORCE's over all paths).

    w: the weight of every rollout.
    """
    expected = (paths.probability * paths.rewards).sum()
    weights = token_weights(paths.rollouts, w, junior_weight).double()
    terms = weights * paths.logprobs + discarded_too * paths.rewards[:, None] * paths.discarded
    estimate = (paths.probability.detach() * terms.sum(1)).sum()
    both = (torch.autograd.grad(x, paths.theta, retain_graph=True)[0] for x in (expected, estimate))
    return tuple(gradient.flatten() for gradient in both)


def equal(exact, estimate) -> bool:
    """Equal, and not because both are 0."""
    return exact.norm() > 0.01 and (exact - estimate).abs().max() < 1e-10


EXACT = [("token", 0.5), ("token", 0.8), ("redraw", 0.5), ("redraw", 0.8), ("word", 1.0)]


@pytest.mark.parametrize(("schedule", "p"), EXACT)
def test_exact_where_coins_depend_on_written_text(schedule, p):
    """c = -0.4 is a constant baseline: w = 1.4 * (r - 0.4 / 1.4)."""
    paths = walk(schedule, p)
    for c in (0.0, -0.4):
        exact, estimate = gradients(paths, outcome_weights(paths.rewards, c))
        assert equal((1 - c) * exact, estimate)


@pytest.mark.parametrize(("schedule", "p"), EXACT)
def test_grpo_in_groups_of_two_is_the_policy_gradient(schedule, p):
    """With two rollouts the standard deviation is the same wherever the advantages are not 0.

    All groups of two paths would be 34 million. But given its own path, a rollout's expected
    advantage depends only on the probability q that the other rollout of its group is right. The
    advantage is a = 0.5 / (sqrt(1/2) + 1e-6) if only this one is right, -a if only the other is,
    else 0. So E[A] = a * (r * (1 - q) - (1 - r) * q) = a * (r - q), and q is a constant baseline.
    """
    paths = walk(schedule, p)
    q = (paths.probability * paths.rewards).sum().detach()
    pairs = torch.tensor([0, 0, 0, 1, 1, 0, 1, 1]).double()  # rewards of this one and the other
    of_reward = group_advantages(pairs, 2)[::2].view(2, 2) @ torch.stack([1 - q, q])
    exact, estimate = gradients(paths, of_reward[paths.rewards.long()])
    assert equal(0.5 / (0.5**0.5 + 1e-6) * exact, estimate)


def test_word_is_an_approximation():
    """Cosine 0.90 here, where the one token that opens a word decides much.

    With the discarded candidates scored as well it is exact.
    """
    paths = walk("word", 0.5)
    assert 0.88 < torch.cosine_similarity(*gradients(paths, paths.rewards), dim=0) < 0.92
    assert equal(*gradients(paths, paths.rewards, discarded_too=True))


@pytest.mark.parametrize("schedule", ["token", "word", "redraw"])
def test_the_juniors_tokens(schedule):
    """j = 1, the paper's choice: they add a pull that is no part of the policy gradient.

    At p = 1 there are none, whatever j is.
    """
    paths, alone = walk(schedule, 0.5), walk(schedule, 1.0)
    assert torch.cosine_similarity(*gradients(paths, paths.rewards, 1.0), dim=0) < 0.97
    assert equal(*gradients(alone, alone.rewards, 1.0))
