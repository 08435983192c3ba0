"""Which schedules give the exact policy gradient: every path of a small tabular pair, against autograd.

The pair: V = 3 tokens ("a", "b", " c"), texts of 3 tokens, one table of logits per writer with a row for each history,
and a reward of 0 or 1 for each of the 27 texts. A path is (senior's sample, junior's sample, coin) at each of the
three steps: (3 * 3 * 2) ** 3 = 5,832 paths, all in one batch. A coin that is never tossed is summed out, since both of
its sides are among the paths.
"""

import itertools

import pytest
import torch

from reinforce import clipped_objective, group_advantages, outcome_weights, token_weights
from rollout import Rollouts
from tandem import Handoff, build_tables

V, STEPS = 3, 3
PIECES = [b"a", b"b", b" c"]
PATHS = torch.tensor(list(itertools.product(*[range(V), range(V), range(2)] * STEPS))).view(-1, STEPS, 3)


def history(tokens: torch.Tensor) -> torch.Tensor:
    """Row of the table for the text so far, (paths, t) -> (paths,): 0, then 1 to 3, then 4 to 12."""
    index = torch.zeros(len(tokens), dtype=torch.long)
    for t in range(tokens.shape[1]):
        index = index * V + tokens[:, t] + 1
    return index


def walk(schedule: str, theta: torch.Tensor, phi: torch.Tensor, p: float = 0.5):
    """All paths under a schedule: their probability (differentiable in theta), texts, authors, and log pi_senior."""
    coins = torch.where(PATHS[:, :, 2] == 1, 0.0, 0.9).T  # (STEPS, paths): below p names the senior
    handoff = Handoff(build_tables(PIECES), schedule, p, coins)
    probability = torch.full((len(PATHS),), 1.0, dtype=torch.float64)
    tokens, by_senior, logprobs, thrown = torch.zeros(len(PATHS), 0, dtype=torch.long), [], [], []
    for t in range(STEPS):
        row = history(tokens)
        senior_all, junior_all = theta.log_softmax(-1)[row], phi.log_softmax(-1)[row]  # (paths, V)
        senior_ids, junior_ids = PATHS[:, t, 0], PATHS[:, t, 1]
        coin = torch.tensor([1 - p, p], dtype=torch.float64)[PATHS[:, t, 2]]
        probability = probability * senior_all.gather(1, senior_ids[:, None])[:, 0].exp()
        probability = probability * junior_all.gather(1, junior_ids[:, None])[:, 0].exp() * coin
        was_active = handoff.senior_active
        ids, senior = handoff.choose(senior_ids, junior_ids)
        # The senior's sample was looked at (to see whether it opens a word), but the junior's was written.
        looked_at = was_active & ~senior
        thrown.append(torch.where(looked_at, senior_all.gather(1, senior_ids[:, None])[:, 0], 0.0))
        logprobs.append(senior_all.gather(1, ids[:, None])[:, 0])
        by_senior.append(senior)
        tokens = torch.cat([tokens, ids[:, None]], 1)
    return probability, tokens, torch.stack(by_senior, 1), torch.stack(logprobs, 1), torch.stack(thrown, 1)


def gradients(schedule: str, junior_weight: float, thrown_too: bool = False, p: float = 0.5, wrong_weight: float = 0.0):
    """(gradient of the expected reward by autograd, expectation of the REINFORCE estimate over all paths)."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(13, V, dtype=torch.float64, generator=generator, requires_grad=True)
    phi = torch.randn(13, V, dtype=torch.float64, generator=generator)
    right = (torch.rand(40, generator=generator) < 0.4).double()
    probability, tokens, by_senior, logprobs, thrown = walk(schedule, theta, phi, p)
    assert probability.sum().item() == pytest.approx(1.0, abs=1e-12)
    rewards = right[history(tokens)]
    (exact,) = torch.autograd.grad((probability * rewards).sum(), theta, retain_graph=True)

    ones, n = torch.ones_like(tokens), len(tokens)
    rollouts = Rollouts(ones, ones, ones, ones, tokens, ones, by_senior.long(), tokens, ones, logprobs, [""] * n)
    weights = token_weights(rollouts, outcome_weights(rewards, wrong_weight), junior_weight).double()
    terms = (weights * logprobs + thrown_too * rewards[:, None] * thrown).sum(1)
    (estimate,) = torch.autograd.grad((probability.detach() * terms).sum(), theta)
    return exact.flatten(), estimate.flatten()


@pytest.mark.parametrize("schedule", ["token", "redraw"])
@pytest.mark.parametrize("p", [0.5, 0.8])
def test_exact_where_coins_depend_on_written_text(schedule, p):
    exact, estimate = gradients(schedule, junior_weight=0.0, p=p)
    assert exact.norm() > 0.01
    assert (exact - estimate).abs().max() < 1e-10


@pytest.mark.parametrize("schedule", ["token", "redraw"])
def test_a_negative_weight_of_wrong_rollouts_is_a_constant_baseline(schedule):
    """With c = -0.4 and j = 0 the gradient is 1.4 times that of the expected reward: w = 1.4 * (r - 0.4 / 1.4)."""
    exact, estimate = gradients(schedule, junior_weight=0.0, wrong_weight=-0.4)
    assert (1.4 * exact - estimate).abs().max() < 1e-10


def test_word_is_an_approximation():
    """Scoring kept tokens only: cosine 0.90 here, where the one token that opens a word decides much. With the
    thrown-away samples scored as well: exact."""
    exact, estimate = gradients("word", junior_weight=0.0)
    assert 0.88 < torch.cosine_similarity(exact, estimate, dim=0) < 0.92
    exact, estimate = gradients("word", junior_weight=0.0, thrown_too=True)
    assert (exact - estimate).abs().max() < 1e-10


@pytest.mark.parametrize("schedule", ["token", "word", "redraw"])
def test_full_junior_weight_is_another_direction(schedule):
    """j = 1, the paper's choice: the junior's tokens add a pull that is no part of the policy gradient."""
    exact, estimate = gradients(schedule, junior_weight=1.0)
    assert torch.cosine_similarity(exact, estimate, dim=0) < 0.97


@pytest.mark.parametrize("schedule", ["token", "word", "redraw"])
@pytest.mark.parametrize("junior_weight", [0.0, 1.0])
def test_p_1_is_plain_reinforce(schedule, junior_weight):
    exact, estimate = gradients(schedule, junior_weight, p=1.0)
    assert exact.norm() > 0.01
    assert (exact - estimate).abs().max() < 1e-10


def grpo_gradients(schedule: str, p: float):
    """(a times the gradient of the expected reward, expectation of the GRPO estimate in groups of two).

    All groups of two paths would be 34 million, so the paths of a group are enumerated by what they share: given its own
    path, a rollout's expected advantage depends only on the probability q that another rollout of the group is right.
    With two rollouts the advantage is a = 0.5 / (sqrt(1/2) + 1e-6) if only this one is right, -a if only the other
    is, and else 0. So the expected weight is a * (1 - q) for a right and -a * q for a wrong rollout.
    """
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(13, V, dtype=torch.float64, generator=generator, requires_grad=True)
    phi = torch.randn(13, V, dtype=torch.float64, generator=generator)
    right = (torch.rand(40, generator=generator) < 0.4).double()
    probability, tokens, by_senior, logprobs, _ = walk(schedule, theta, phi, p)
    rewards = right[history(tokens)]
    q = (probability.detach() * rewards).sum()
    ones, n = torch.ones_like(tokens), len(tokens)
    rollouts = Rollouts(ones, ones, ones, ones, tokens, ones, by_senior.long(), tokens, ones, logprobs, [""] * n)

    # Our functions on every kind of group: the advantage of the first rollout, with a partner that is right or wrong.
    with_right, with_wrong = (
        group_advantages(torch.stack([rewards, torch.full_like(rewards, partner)], 1).flatten(), 2)[::2] for partner in (1.0, 0.0)
    )
    advantages = q * with_right + (1 - q) * with_wrong
    weights = token_weights(rollouts, advantages, junior_weight=0.0).double()
    terms = clipped_objective(logprobs, logprobs.detach(), weights, clip_ratio=0.2).sum(1)
    (estimate,) = torch.autograd.grad((probability.detach() * terms).sum(), theta, retain_graph=True)

    # The definition. E[A] = a * (r (1 - q) - (1 - r) q) = a * (r - q), and the expected score is 0: a times the policy gradient.
    a = 0.5 / (0.5**0.5 + 1e-6)
    (exact,) = torch.autograd.grad(a * (probability * rewards).sum(), theta)
    return exact.flatten(), estimate.flatten()


@pytest.mark.parametrize("schedule", ["token", "redraw"])
@pytest.mark.parametrize("p", [0.5, 0.8])
def test_grpo_in_groups_of_two_is_the_policy_gradient(schedule, p):
    """With two rollouts per problem the standard deviation is the same whenever the advantages are not 0, so that GRPO is exact."""
    exact, estimate = grpo_gradients(schedule, p)
    assert exact.norm() > 0.01
    assert (exact - estimate).abs().max() < 1e-10


def test_grpo_at_p_1_is_plain_grpo_and_at_p_0_teaches_nothing():
    exact, estimate = grpo_gradients("word", p=1.0)
    assert exact.norm() > 0.01
    assert (exact - estimate).abs().max() < 1e-10
    exact, estimate = grpo_gradients("word", p=0.0)
    assert estimate.abs().max() == 0


def test_p_0_without_the_juniors_tokens_teaches_nothing():
    exact, estimate = gradients("word", junior_weight=0.0, p=0.0)
    assert exact.abs().max() < 1e-12
    assert estimate.abs().max() == 0
