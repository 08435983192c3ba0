"""The loss by hand, and what must not change it."""

import math
from dataclasses import replace

import pytest
import torch

import reinforce
from conftest import llama
from reinforce import (
    clipped_objective,
    completion_logprobs,
    frozen_logprobs,
    group_advantages,
    kl_estimate,
    micro_batches,
    outcome_weights,
    plain_loss,
    select,
    token_weights,
)
from rollout import Rollouts


def make_rollouts(vocab: int, seed: int = 0) -> Rollouts:
    """Five rollouts, prompts of 1 to 5 tokens, completions of 2 to 7, authors at random, padding with odd ids."""
    generator = torch.Generator().manual_seed(seed)
    prompt_ids = torch.randint(2, vocab, (5, 6), generator=generator)
    completion_ids = torch.randint(2, vocab, (5, 9), generator=generator)
    prompt_mask = (torch.arange(6) >= torch.tensor([[5], [3], [4], [1], [2]])).long()
    completion_mask = (torch.arange(9) < torch.tensor([[2], [7], [4], [3], [5]])).long()
    senior_mask = torch.randint(0, 2, (5, 9), generator=generator) * completion_mask
    prompts = prompt_ids, prompt_mask, prompt_ids[:, 1:], prompt_mask[:, 1:]
    return Rollouts(
        *prompts, completion_ids, completion_mask, senior_mask, completion_ids, completion_mask, torch.zeros(5, 9), list("01234")
    )


def gradients(model, rollouts, weights, temperature=0.7, micro_tokens=1000):
    """(loss, gradient) by micro-batches, as the training loop makes them; test_runner.py holds the loop itself to plain_loss."""
    model.zero_grad()
    loss = 0.0
    for part, part_weights in micro_batches(rollouts, weights, micro_tokens):
        part_loss = -(part_weights * completion_logprobs(model, part, temperature)).sum() / rollouts.completion_mask.sum()
        part_loss.backward()
        loss += part_loss.item()
    return loss, torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def test_weights_by_hand():
    """c = -0.4, j = 0.3. Row 0 is right, authors S J S: 1, 0.3, 1. Row 1 is wrong, authors J S and padding:
    -0.4 * 0.3 = -0.12, -0.4 * 1 = -0.4, 0. Swapping c and j would give -0.4 for the junior's token of row 0."""
    rollouts = make_rollouts(9)
    rollouts = Rollouts(
        rollouts.prompt_ids[:2],
        rollouts.prompt_mask[:2],
        rollouts.prompt_ids[:2],
        rollouts.prompt_mask[:2],
        torch.tensor([[3, 4, 1], [5, 1, 0]]),
        torch.tensor([[1, 1, 1], [1, 1, 0]]),
        torch.tensor([[1, 0, 1], [0, 1, 0]]),
        torch.tensor([[3, 4, 1], [5, 1, 0]]),
        torch.tensor([[1, 1, 1], [1, 1, 0]]),
        torch.zeros(2, 3),
        ["", ""],
    )
    weights = token_weights(rollouts, outcome_weights(torch.tensor([1.0, 0.0]), -0.4), junior_weight=0.3)
    assert torch.allclose(weights, torch.tensor([[1, 0.3, 1], [-0.12, -0.4, 0]]))
    main = token_weights(rollouts, outcome_weights(torch.tensor([1.0, 0.0]), 0.0), junior_weight=1.0)
    assert main.tolist() == [[1, 1, 1], [0, 0, 0]]
    with pytest.raises(ValueError, match=r"one weight per rollout, shape \(2,\), got shape \(3,\)"):
        token_weights(rollouts, outcome_weights(torch.ones(3), 0.0), 1.0)


def test_partial_credit_is_not_rounded():
    """r = 0.25 and c = -0.4: w = 0.25 - 0.4 * 0.75 = -0.05 for the senior's tokens. Rewards beyond [0, 1] are refused."""
    rollouts = make_rollouts(9)
    weights = token_weights(rollouts, outcome_weights(torch.full((5,), 0.25), wrong_weight=-0.4), junior_weight=0.0)
    assert torch.allclose(weights, -0.05 * rollouts.senior_mask)
    for bad in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"rewards must lie in \[0, 1\]"):
            outcome_weights(torch.full((5,), bad), 0.0)


def test_loss_by_hand():
    """A model whose output layer is zero gives each of 8 tokens -ln 8. Completions hold 2 + 7 + 4 + 3 + 5 = 21 tokens.
    Weights 1 on the 2 tokens of row 0 and -0.5 on the 3 of row 3: loss = ln 8 * (2 - 1.5) / 21, whatever T is."""
    model, rollouts = llama(8, 0, torch.float64), make_rollouts(8)
    torch.nn.init.zeros_(model.lm_head.weight)
    weights = rollouts.completion_mask * torch.tensor([1.0, 0, 0, -0.5, 0], dtype=torch.float64)[:, None]
    loss, _ = gradients(model, rollouts, weights)
    assert loss == pytest.approx(math.log(8) * 0.5 / 21, rel=1e-12)


@pytest.mark.parametrize("micro_tokens", [1, 16, 1000])
def test_fast_and_plain_loss_are_equal(make_model, tokenizer, micro_tokens):
    """The three plain lines with all logits, and log-probabilities by parts: the same loss and gradient."""
    model, rollouts = make_model(len(tokenizer), 0, torch.float64), make_rollouts(len(tokenizer))
    weights = token_weights(rollouts, outcome_weights(torch.tensor([1.0, 0, 1, 0, 1]), -0.3), 0.5).double()
    loss, gradient = gradients(model, rollouts, weights, micro_tokens=micro_tokens)
    model.zero_grad()
    plain = plain_loss(model, rollouts, weights, 0.7)
    plain.backward()
    assert loss == pytest.approx(plain.item(), rel=1e-10)
    assert gradient.norm() > 0.01
    assert torch.allclose(gradient, torch.cat([parameter.grad.flatten() for parameter in model.parameters()]), atol=1e-10)


@pytest.mark.parametrize("at_once", [1, 1000, 2**24])
def test_a_frozen_output_layer_against_autograd(tokenizer, at_once, monkeypatch):
    """One token at a time, a few (V is some hundreds), or all: the loss and gradients that autograd finds with all logits."""
    model, rollouts = llama(len(tokenizer), 0, torch.float64), make_rollouts(len(tokenizer))
    weights = token_weights(rollouts, outcome_weights(torch.tensor([1.0, 0, 1, 0, 1]), -0.3), 0.5).double()
    loss, gradient = gradients(model, rollouts, weights)
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if "lm_head" not in name}
    monkeypatch.setattr(reinforce, "LOGITS_AT_ONCE", at_once)
    model.lm_head.requires_grad_(False)
    model.lm_head.weight.grad = None
    assert gradients(model, rollouts, weights)[0] == pytest.approx(loss, rel=1e-12)
    assert gradient.norm() > 0.01
    for name, value in expected.items():
        assert torch.allclose(model.get_parameter(name).grad, value, atol=1e-12), name


def test_half_precision_sums_in_float32(tokenizer):
    """Over 50,000 tokens bfloat16 would be wrong by whole nats; rounding of the states alone leaves under 2 %."""
    head = torch.nn.Linear(16, 50_000, bias=False).requires_grad_(False)
    states, targets = torch.randn(6, 16, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        leaf = states.clone().to(dtype).requires_grad_()
        logprobs = reinforce.FrozenOutputLayer.apply(head.to(dtype), leaf, targets, 0.7)
        assert logprobs.dtype == torch.float32
        logprobs.sum().backward()
        found[dtype] = logprobs.detach(), leaf.grad.float()
    for one, two in zip(*found.values()):
        assert (one - two).norm() < 0.02 * one.norm()


@pytest.mark.parametrize(("micro_tokens", "parts"), [(1, 5), (16, 4), (30, 2), (1000, 1)])
def test_micro_batches_change_nothing(make_model, tokenizer, micro_tokens, parts):
    """The denominator is fixed before the split, so the sum of the parts is the whole.

    Rows by completion: prompts 1 5 2 4 3, completions 2 3 4 5 7. Within 16 tokens: two rows of 5+3, then one each;
    within 30: three rows of 5+4, two of 4+7.
    """
    model, rollouts = make_model(len(tokenizer), 0, torch.float64), make_rollouts(len(tokenizer))
    weights = token_weights(rollouts, outcome_weights(torch.tensor([1.0, 0, 1, 0, 1]), -0.3), 0.5).double()
    loss, gradient = gradients(model, rollouts, weights)
    named = [few.texts for few, _ in micro_batches(rollouts, weights, micro_tokens)]
    assert len(named) == parts
    assert sorted(name for names in named for name in names) == ["0", "1", "2", "3", "4"]
    part_loss, part_gradient = gradients(model, rollouts, weights, micro_tokens=micro_tokens)
    assert part_loss == pytest.approx(loss, rel=1e-10)
    assert torch.allclose(gradient, part_gradient, atol=1e-10)


def test_padding_and_order_change_nothing(make_model, tokenizer):
    """Four more columns of padding on either side, other ids in it, rows reversed: the same gradient."""
    model, rollouts = make_model(len(tokenizer), 0, torch.float64), make_rollouts(len(tokenizer))
    rewards = torch.tensor([1.0, 0, 1, 0, 1])
    _, gradient = gradients(model, rollouts, token_weights(rollouts, outcome_weights(rewards, -0.3), 0.5).double())
    more, zero = torch.full((5, 4), 7), torch.zeros(5, 4, dtype=torch.long)
    wide = Rollouts(
        torch.cat([more, rollouts.prompt_ids], 1).flip(0),
        torch.cat([zero, rollouts.prompt_mask], 1).flip(0),
        rollouts.junior_prompt_ids.flip(0),
        rollouts.junior_prompt_mask.flip(0),
        torch.cat([rollouts.completion_ids, more], 1).flip(0),
        torch.cat([rollouts.completion_mask, zero], 1).flip(0),
        torch.cat([rollouts.senior_mask, zero], 1).flip(0),
        torch.cat([rollouts.discarded_ids, more], 1).flip(0),
        torch.cat([rollouts.toss_mask, zero], 1).flip(0),
        torch.zeros(5, 13),
        [""] * 5,
    )
    _, other = gradients(model, wide, token_weights(wide, outcome_weights(rewards.flip(0), -0.3), 0.5).double())
    assert torch.allclose(gradient, other, atol=1e-10)


def test_wrong_rollouts_count_in_the_mean_but_are_not_run(tokenizer):
    """With c = 0 the gradient is that of the right rollouts alone, divided by the tokens of all: 21, not 11."""
    model, rollouts = llama(len(tokenizer), 0, torch.float64), make_rollouts(len(tokenizer))
    weights = token_weights(rollouts, outcome_weights(torch.tensor([1.0, 0, 1, 0, 1]), 0.0), 1.0).double()
    _, gradient = gradients(model, rollouts, weights)
    few = select(rollouts, torch.tensor([0, 2, 4]))
    _, alone = gradients(model, few, few.completion_mask.double())
    assert (gradient - alone * 11 / 21).norm() < 1e-5 * gradient.norm()  # Llama's norms are float32, come what may


def test_nothing_to_learn_from(tokenizer):
    """p = 0 with j = 0, or a batch without a right rollout: nothing to run, rather than 0/0."""
    rollouts = make_rollouts(len(tokenizer))
    rollouts.senior_mask.zero_()
    for weights in (
        token_weights(rollouts, outcome_weights(torch.ones(5), 0.0), 0.0),
        token_weights(rollouts, outcome_weights(torch.zeros(5), 0.0), 1.0),
    ):
        assert micro_batches(rollouts, weights, 2) == []


def test_inputs_are_not_modified(tokenizer):
    model, rollouts, copy = llama(len(tokenizer), 0), make_rollouts(len(tokenizer)), make_rollouts(len(tokenizer))
    gradients(model, rollouts, rollouts.completion_mask.float(), micro_tokens=2)
    for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "senior_mask"):
        assert torch.equal(getattr(rollouts, name), getattr(copy, name))


def test_masks_that_contradict_each_other_are_refused():
    """An author of padding, or a mask of another width, is a mistake in whatever made the rollouts."""
    rollouts = make_rollouts(9)
    wrong = rollouts.senior_mask.clone()
    wrong[0, -1] = 1
    for mask in (wrong, rollouts.senior_mask[:, 1:]):
        with pytest.raises(ValueError, match="senior_mask must have the shape of completion_mask"):
            token_weights(replace(rollouts, senior_mask=mask), torch.ones(5), 1.0)


def test_a_model_that_is_not_trained_needs_no_gradient_of_its_output_layer(tokenizer, monkeypatch):
    """frozen_logprobs gives the same numbers, without the product (n, V) x (V, H) that a gradient would need."""
    model, rollouts = llama(len(tokenizer), 0), make_rollouts(len(tokenizer))
    model.lm_head.weight.requires_grad_(False)
    trained = completion_logprobs(model, rollouts, 0.7)
    monkeypatch.setattr(torch.Tensor, "scatter_add_", None)
    assert torch.equal(frozen_logprobs(model, rollouts, 0.7), trained.detach())


# ----------------------------------------------------------------------------------------------------------------------
# GRPO


def test_group_advantages_by_hand():
    """1 of 8 right: mean 1/8, unbiased standard deviation sqrt(1/8) = 0.35355, so (7/8) / 0.35355 = 2.4749 and -0.3536."""
    one_of_8 = torch.tensor([0.0, 0, 0, 1, 0, 0, 0, 0])
    advantages = group_advantages(torch.cat([one_of_8, torch.ones(8), torch.zeros(8)]), 8)
    assert advantages[3].item() == pytest.approx(2.4749, abs=1e-4)
    assert advantages[0].item() == pytest.approx(-0.3536, abs=1e-4)
    assert advantages[:8].sum().item() == pytest.approx(0, abs=1e-5)
    assert advantages[8:].tolist() == [0] * 16  # nothing to prefer, and no 0 / 0
    # A partial credit of 0.3 is not its own mean in float32; divided by 1e-6 the difference would count.
    assert group_advantages(torch.full((8,), 0.3), 8).tolist() == [0] * 8
    with pytest.raises(ValueError, match="8 rewards in groups of 1: a group is two or more"):
        group_advantages(one_of_8, 1)
    with pytest.raises(ValueError, match="8 rewards in groups of 3"):
        group_advantages(one_of_8, 3)


def test_groups_are_neighbours():
    """Two problems with two rollouts each, in the order of the runner: each pair is compared with itself only."""
    a = 0.5 / (0.5**0.5 + 1e-6)
    assert torch.allclose(group_advantages(torch.tensor([1.0, 0, 1, 1]), 2), torch.tensor([a, -a, 0, 0]))


def test_clipped_objective_by_hand():
    """e = 0.2. Ratios 1.5 and 0.5 with A = 1: min(1.5, 1.2) = 1.2 and min(0.5, 0.8) = 0.5. With A = -2: min(-3, -2.4) = -3
    and min(-1, -1.6) = -1.6. Where the minimum is the clipped term, nothing is learned."""
    old, ratios = torch.zeros(4), torch.tensor([1.5, 0.5, 1.5, 0.5])
    logprobs = ratios.log().requires_grad_()
    objective = clipped_objective(logprobs, old, torch.tensor([1.0, 1, -2, -2]), 0.2)
    assert torch.allclose(objective, torch.tensor([1.2, 0.5, -3.0, -1.6]))
    (gradient,) = torch.autograd.grad(objective.sum(), logprobs)
    assert torch.allclose(gradient, torch.tensor([0.0, 0.5, -3.0, 0.0]))  # d ratio / d logprob = ratio


def test_the_first_step_has_the_gradient_of_the_plain_loss(make_model, tokenizer):
    """At equal policies every ratio is exactly 1, and the gradient is that of equation (1) with A in the place of w."""
    model, rollouts = make_model(len(tokenizer), 0, torch.float64), make_rollouts(len(tokenizer))
    weights = token_weights(rollouts, torch.tensor([2.0, -1, 0, 0.5, -1.5]), 0.0).double()
    logprobs = completion_logprobs(model, rollouts, 0.7)
    objective = clipped_objective(logprobs, logprobs.detach(), weights, 0.2)
    assert torch.equal(objective.detach(), weights)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ours = torch.autograd.grad(-objective.sum() / rollouts.completion_mask.sum(), parameters)
    plain = torch.autograd.grad(plain_loss(model, rollouts, weights, 0.7), parameters)
    for one, other in zip(ours, plain):
        assert torch.allclose(one, other, atol=1e-10)


def test_the_juniors_tokens_do_not_matter_to_grpo(tokenizer):
    """j = 0: other log-probabilities at the junior's tokens, infinite ones too, change neither the loss nor the gradient."""
    rollouts = make_rollouts(len(tokenizer))
    weights = token_weights(rollouts, torch.tensor([2.0, -1, 0, 0.5, -1.5]), 0.0)
    by_junior = (rollouts.senior_mask == 0) & rollouts.completion_mask.bool()
    old = -torch.rand(weights.shape, generator=torch.Generator().manual_seed(1))
    found = []
    for change in (0.0, 3.0, -1e4):
        logprobs = (old + 0.1).requires_grad_()
        objective = clipped_objective(logprobs, torch.where(by_junior, old + change, old), weights, 0.2)
        found.append((objective.detach(), torch.autograd.grad(objective.sum(), logprobs)[0]))
    assert by_junior.any()
    for objective, gradient in found:
        assert torch.equal(objective, found[0][0])
        assert torch.equal(gradient, found[0][1])
        assert (gradient[by_junior] == 0).all()


def test_k3_is_never_negative_and_on_average_the_divergence():
    """Two distributions over 3 tokens: the expectation of k3 under the first is the sum of p * log(p / q)."""
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    estimate = kl_estimate(p.log(), q.log(), torch.ones(3))
    assert (estimate >= 0).all()
    assert (p * estimate).sum().item() == pytest.approx((p * (p / q).log()).sum().item(), abs=1e-6)
    assert kl_estimate(p.log(), p.log(), torch.ones(3)).abs().max() == 0
    # A token of the junior's that the senior finds impossible: exp(1000) would be infinite, and 0 * inf no number.
    logprobs = torch.tensor([-1000.0, -1.0], requires_grad=True)
    masked = kl_estimate(logprobs, torch.zeros(2), torch.tensor([0, 1]))
    (gradient,) = torch.autograd.grad(masked.sum(), logprobs)
    assert masked[0] == 0 == gradient[0]
    assert gradient.isfinite().all()


def test_as_a_loss_k3_has_the_gradient_of_the_divergence_from_the_junior():
    """Enumerated over 3 tokens: the mean gradient of k3 under the senior is that of KL(junior || senior), the other direction.
    (Its value is on average KL(senior || junior). Both are least where the two are equal.)"""
    theta = torch.tensor([0.9, -0.3, 0.1], dtype=torch.float64, requires_grad=True)
    junior = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    senior = theta.log_softmax(-1)
    (ours,) = torch.autograd.grad((senior.exp().detach() * kl_estimate(senior, junior.log(), torch.ones(3))).sum(), theta)
    (other,) = torch.autograd.grad((junior * (junior.log() - theta.log_softmax(-1))).sum(), theta)
    assert ours.norm() > 0.01
    assert (ours - other).abs().max() < 1e-12
