"""The loss by hand, and what must not change it."""

import math

import pytest
import torch

import reinforce
from conftest import gradient_of, llama, rollouts_of
from lab import engine
from reinforce import group_advantages, kl_estimate, outcome_weights, token_weights
from rollout import Rollouts

REWARDS = torch.tensor([1.0, 0, 1, 0, 1])


def make_rollouts(vocab: int) -> Rollouts:
    """Five rollouts, prompts of 1 to 5 tokens, completions of 2 to 7, padding with odd ids."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(2, vocab, (5, width), generator=generator) for width in (6, 5, 9)]
    prompt_mask = (torch.arange(6) >= torch.tensor([[5], [3], [4], [1], [2]])).long()
    completion_mask = (torch.arange(9) < torch.tensor([[2], [7], [4], [3], [5]])).long()
    senior_mask = torch.randint(0, 2, (5, 9), generator=generator) * completion_mask
    prompts = ids[0], prompt_mask, ids[1], prompt_mask[:, 1:]
    return Rollouts(*prompts, ids[2], completion_mask, senior_mask, list("abcde"))


def weights_of(rollouts, wrong_weight=-0.3, junior_weight=0.5, rewards=REWARDS):
    return token_weights(rollouts, outcome_weights(rewards, wrong_weight), junior_weight).double()


def loss_and_gradient(model, rollouts, weights, micro_tokens=1000):
    """By micro-batches, as the training loop makes them."""
    parts = engine.micro_batches(rollouts, weights, micro_tokens)
    num_tokens = rollouts.completion_mask.sum()
    total = sum(reinforce.loss(model, few, w, num_tokens, 0.7)[0] for few, w in parts)
    return total.item(), gradient_of(total, model)


# Two rollouts: by senior, junior, senior, and by junior, senior and padding.
BY_HAND = rollouts_of([[5, 6, 7]] * 2, [[1, 0, 1], [0, 1, 0]], [[1, 1, 1], [1, 1, 0]])


def test_weights_by_hand():
    """c = -0.4, j = 0.3. A right rollout, S J S: 1, 0.3, 1. A wrong one, J S and padding:
    -0.4 * 0.3 = -0.12, -0.4 * 1 = -0.4, 0. With c and j swapped the right one's J had -0.4."""
    weights = weights_of(BY_HAND, -0.4, 0.3, torch.tensor([1.0, 0.0]))
    assert torch.allclose(weights, torch.tensor([[1, 0.3, 1], [-0.12, -0.4, 0]]).double())
    # Partial credit, r = 0.25: w = 0.25 - 0.4 * 0.75 = -0.05.
    partial = weights_of(BY_HAND, -0.4, 0.0, torch.full((2,), 0.25))
    assert torch.allclose(partial, -0.05 * BY_HAND.senior_mask.double())
    # Only the junior's words, one per rollout.
    junior_only = token_weights(BY_HAND, torch.ones(2), 1.0, senior_weight=0.0)
    assert junior_only.tolist() == [[0, 1, 0], [1, 0, 0]]


def test_loss_by_hand():
    """A model whose output layer is zero gives each of 8 tokens -ln 8, whatever T is.

    Completions hold 2 + 7 + 4 + 3 + 5 = 21 tokens. Weights 1 on the 2 tokens of row 0 and -0.5 on
    the 3 of row 3: loss = ln 8 * (2 - 1.5) / 21. The other rows count, but are not run.
    """
    model, rollouts = llama(8, 0, torch.float64), make_rollouts(8)
    torch.nn.init.zeros_(model.lm_head.weight)
    weights = rollouts.completion_mask * torch.tensor([[1.0], [0], [0], [-0.5], [0]]).double()
    value, _ = loss_and_gradient(model, rollouts, weights)
    assert value == pytest.approx(math.log(8) / 42, rel=1e-12)
    assert [few.texts for few, _ in engine.micro_batches(rollouts, weights, 1)] == [["a"], ["d"]]
    # A KL penalty needs every rollout.
    assert len(engine.micro_batches(rollouts, 0 * weights, 1, keep_all=True)) == 5


@pytest.mark.parametrize("at_once", [None, 1, 1000, 2**24])
@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_fast_and_plain_loss_are_equal(make_model, tokenizer, at_once, kl, monkeypatch):
    """Loss and gradient with all logits, and by parts.

    at_once: logits per chunk of a frozen output layer: one token at a time, a few or all. None: the
    output layer is trained too.
    """
    model, junior = (make_model(len(tokenizer), seed, torch.float64) for seed in (0, 1))
    rollouts = make_rollouts(len(tokenizer))
    if at_once:
        monkeypatch.setattr(engine, "LOGITS_AT_ONCE", at_once)
        for one in (model, junior):
            one.get_output_embeddings().requires_grad_(False)
    weights, num_tokens = weights_of(rollouts), torch.tensor(30)
    ours, logprobs = reinforce.loss(model, rollouts, weights, num_tokens, 0.7, junior, kl)
    plain = reinforce.plain_logprobs(model, rollouts, 0.7)
    d = reinforce.plain_logprobs(junior, rollouts.as_read_by_junior(), 0.7).detach() - plain
    theirs = -(weights * plain - kl * (d.exp() - 1 - d) * rollouts.senior_mask).sum() / num_tokens
    gradient = gradient_of(ours, model)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
    assert gradient.norm() > 0.01
    assert torch.allclose(gradient, gradient_of(theirs, model), atol=1e-9, rtol=1e-7)
    assert torch.allclose(logprobs, plain * rollouts.completion_mask)
    with torch.no_grad():
        assert torch.equal(engine.completion_logprobs(model, rollouts, 0.7), logprobs)


def test_half_precision_sums_in_float32():
    """Over 50,000 tokens bfloat16 would be wrong by whole nats; rounded states leave under 2 %."""
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 50_000, bias=False).requires_grad_(False)
    states, found = torch.randn(6, 16), []
    for dtype in (torch.float32, torch.bfloat16):
        leaf = states.to(dtype).requires_grad_()
        logprobs = engine.FrozenOutputLayer.apply(head.to(dtype), leaf, torch.arange(6), 0.7)
        assert logprobs.dtype == torch.float32
        found.append((logprobs, torch.autograd.grad(logprobs.sum(), leaf)[0].float()))
    for exact, rounded in zip(*found):
        assert (exact - rounded).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize(("micro_tokens", "parts"), [(1, 5), (18, 3), (26, 3), (30, 2)])
def test_micro_batches_padding_and_order(make_model, tokenizer, micro_tokens, parts):
    """They change nothing: the denominator is fixed before the split.

    Rows by completion: prompts 1 5 2 4 3, completions 2 3 4 5 7. Within 18 or 26 tokens: two rows
    of 5+3, two of 4+5, one; within 30: three rows of 5+4, two of 4+7. Then four more columns of
    padding with other ids, and the rows reversed.
    """
    model = make_model(len(tokenizer), 0, torch.float64)
    rollouts, wide = make_rollouts(len(tokenizer)), make_rollouts(len(tokenizer))
    value, gradient = loss_and_gradient(model, rollouts, weights_of(rollouts))
    for name in vars(wide).keys() - {"texts"}:
        padding, tensor = torch.full((5, 4), 0 if "mask" in name else 7), getattr(wide, name)
        columns = [padding, tensor] if "prompt" in name else [tensor, padding]
        setattr(wide, name, torch.cat(columns, 1).flip(0))
    for batch, rewards in ((rollouts, REWARDS), (wide, REWARDS.flip(0))):
        weights = weights_of(batch, rewards=rewards)
        names = [few.texts for few, _ in engine.micro_batches(batch, weights, micro_tokens)]
        assert (len(names), sorted(sum(names, []))) == (parts, batch.texts)
        part_value, part_gradient = loss_and_gradient(model, batch, weights, micro_tokens)
        assert part_value == pytest.approx(value, rel=1e-10)
        assert torch.allclose(gradient, part_gradient, atol=1e-10)
    for name, tensor in vars(make_rollouts(len(tokenizer))).items():
        assert name == "texts" or torch.equal(getattr(rollouts, name), tensor)  # unmodified


# ------------------------------------------------------------------------------------------------
# GRPO


def test_group_advantages():
    """Equal rewards leave nothing to prefer, and no 0 / 0. 0.3 is not the mean of eight times 0.3
    in float32; divided by 1e-6, that would count."""
    equal = torch.cat([torch.full((8,), reward) for reward in (1.0, 0.0, 0.3)])
    assert group_advantages(equal, 8).tolist() == [0] * 24
    for size in (1, 5):
        with pytest.raises(ValueError, match=f"24 rewards in groups of {size}: a group is two or"):
            group_advantages(equal, size)


def test_no_penalty_for_the_juniors_tokens():
    """Where the senior finds one impossible, exp(1000) would be infinite. Else d = ln 2, and
    k3 = 2 - 1 - ln 2 = 0.3069."""
    senior = torch.tensor([math.log(0.25), -1000.0], requires_grad=True)
    junior = torch.tensor([math.log(0.5), 0.0])
    k3 = kl_estimate(senior, junior, torch.tensor([1, 0]))
    assert k3.tolist() == pytest.approx([0.3069, 0], abs=1e-4)
    (gradient,) = torch.autograd.grad(k3.sum(), senior)
    assert gradient.isfinite().all()
