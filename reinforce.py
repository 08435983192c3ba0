"""The update of the senior on text that two models wrote: REINFORCE and, from Tandem RL, GRPO.

REINFORCE. Each update follows the gradient of (1) with respect to the senior's parameters, with the
sampled rollouts y and their rewards r held fixed (West et al., 2025; their Appendix E has c and j):

    J = E[ w(y) * sum_t m_t * log pi_senior(y_t | x_senior, y_<t) ]                     (1)
    w(y) = r + c * (1 - r)            1 for a right rollout, c for a wrong one          (2)
    m_t  = 1 if the senior wrote y_t, else j                                            (3)

The senior reads every token, the junior's included, under its own prompt; all probabilities are
those at the sampling temperature. `loss` also divides by the number of tokens of the batch.

GRPO (Tandem RL: Jiao et al., 2026) compares a rollout with the other rollouts of its problem. With
G rollouts per problem and their rewards r_1 ... r_G, the weight w(y) in (1) is the advantage

    A(y_i) = (r_i - mean(r)) / (std(r) + 1e-6)       std with G - 1 in its denominator  (4)

and the junior's tokens have weight 0 (the arms with GRPO in lab/experiments.py have j = 0). Where
(1) has log pi_senior, GRPO has the clipped ratio pi_senior / pi_old; pi_old is the senior that
wrote the rollouts. Here each batch is used for one optimizer step, so pi_old = pi_senior: the ratio
is 1, it is never clipped, and its gradient is that of log pi_senior, as in (1). Nor is each rollout
divided by its own length. One control experiment of Tandem RL subtracts a KL penalty, beta * k3_t,
for every token of the senior:

    k3_t = exp(d_t) - 1 - d_t                                                           (5)
    d_t  = log pi_junior(y_t | x_junior, y_<t) - log pi_senior(y_t | x_senior, y_<t)

    symbol         variable            meaning
    c              wrong_weight        0 discards wrong rollouts (the paper's main runs); below 0
                                       makes them less likely (the paper's best: -0.5 to
                                       -0.3)
    j              junior_weight       1 counts the junior's tokens in full (the paper's main runs),
                                       0 counts only the senior's own
    w, A           w (B,)              the weight of a rollout
    w * m          weights (B, C)      the weight of a token
    log pi_senior  logprobs (B, C)     with a gradient
    G, beta        group_size, kl

Worked example of (1) to (3) with c = -0.4 and j = 0.3. A right rollout by senior, junior, senior
has the token weights 1, 0.3, 1; a wrong one by junior, senior has -0.12, -0.4.

What this optimises. With j = 0 and a schedule whose coins depend only on written text (`token`,
`redraw`), the gradient of (1) is the policy gradient of the team's expected reward, times 1 - c:
w = (1 - c)(r - b) with the constant baseline b = -c / (1 - c). Under `word` it is an approximation,
because (1) has no term for discarded candidates (tandem.py). With j = 1 it is not a policy
gradient: the senior also imitates what the junior wrote in right rollouts, and with c < 0 it
unlearns what the junior wrote in wrong ones. Dividing by std in (4) weights problems by how many of
their G rollouts are right (but for G = 2 or 3, where every group with both has the same std). There
is no learned baseline and no entropy bonus.
"""

import torch

from lab.engine import completion_logprobs
from rollout import Rollouts

# Shapes: B rollouts, P prompt length, C completion length, V vocabulary size, G group size.


def outcome_weights(rewards: torch.Tensor, wrong_weight: float) -> torch.Tensor:
    """REINFORCE: w(y) of every rollout, (B,), for rewards (B,) from 0 to 1."""
    # (2)  w(y) = r + c * (1 - r)
    return rewards + wrong_weight * (1 - rewards)


def group_advantages(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """GRPO: A(y) of every rollout, (B,). Every `group_size` consecutive rollouts share a problem.

    All advantages of a group with equal rewards are 0. Raises ValueError unless the batch consists
    of groups of two or more.

    >>> group_advantages(torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0]), group_size=8)[:2]
    tensor([ 2.4749, -0.3536])
    """
    if group_size < 2 or len(rewards) % group_size:
        sizes = f"{len(rewards)} rewards in groups of {group_size}"
        raise ValueError(f"{sizes}: a group is two or more rollouts of one problem")
    r = rewards.view(-1, group_size)  # (problems, G)
    # Equal rewards differ from their mean by rounding, which a division by 1e-6 would blow up.
    all_equal = r.amin(1, keepdim=True) == r.amax(1, keepdim=True)
    centred = (r - r.mean(1, keepdim=True)).masked_fill(all_equal, 0.0)
    # (4)  A(y_i) = (r_i - mean(r)) / (std(r) + 1e-6)
    return (centred / (r.std(1, keepdim=True) + 1e-6)).flatten()


def token_weights(
    rollouts: Rollouts, w: torch.Tensor, junior_weight: float, senior_weight: float = 1.0
) -> torch.Tensor:
    """The weight w(y) * m_t of every token, (B, C), zero at padding. w: one per rollout, (B,).

    senior_weight: what takes the place of the 1 in (3). An experiment of ours sets it to 0.
    Raises ValueError if w has another shape, or if the masks contradict each other.
    """
    if w.shape != (len(rollouts),):
        raise ValueError(f"expected {len(rollouts)} weights, one per rollout, got {tuple(w.shape)}")
    written, by_senior = rollouts.completion_mask, rollouts.senior_mask  # (B, C) each
    if by_senior.shape != written.shape or (by_senior > written).any():
        raise ValueError("senior_mask marks tokens that completion_mask does not")
    # (3)  m_t = 1 if the senior wrote y_t, else j
    m = torch.where(by_senior.bool(), senior_weight, junior_weight)  # (B, C)
    return w[:, None] * m * written


def plain_logprobs(model, rollouts: Rollouts, temperature: float) -> torch.Tensor:
    """log pi(y_t | x, y_<t) of every completion token, (B, C): the definition.

    It holds logits (B, P+C, V), too many for a large vocabulary. Training uses completion_logprobs
    of lab/engine.py; a test holds the two equal.
    """
    logprobs = full_logprobs(model, rollouts, temperature)
    return logprobs.gather(2, rollouts.completion_ids[:, :, None])[:, :, 0]


def full_logprobs(model, rollouts: Rollouts, temperature: float) -> torch.Tensor:
    """The log-probabilities of the whole vocabulary before every completion token, (B, C, V)."""
    ids, mask, position_ids = rollouts.model_inputs()  # (B, P+C) each
    inputs = dict(input_ids=ids, attention_mask=mask, position_ids=position_ids)
    logits = model(**inputs, use_cache=False).logits  # (B, P+C, V)
    # The logits at position P+t-1 predict completion token t. Softmax in float32 at least.
    logits = logits[:, rollouts.prompt_ids.shape[1] - 1 : -1]  # (B, C, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # At the temperature of sampling: that is the distribution from which the tokens were drawn.
    return (logits / temperature).log_softmax(-1)


def kl_estimate(
    logprobs: torch.Tensor, junior_logprobs: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """k3 of every token of the mask, (B, C), and 0 elsewhere (Schulman, 2020).

    For tokens that the senior sampled alone, or under `token` and `redraw`, its mean is
    KL(senior || junior). With the tokens held fixed, the mean of its gradient is the gradient of
    KL(junior || senior), which has the same minimum.
    """
    # Where the mask is 0, a ratio that overflows would give 0 * inf = NaN.
    d = (junior_logprobs - logprobs).masked_fill(mask == 0, 0.0)
    # (5)  k3_t = exp(d_t) - 1 - d_t
    return torch.expm1(d) - d


def loss(
    senior,
    rollouts: Rollouts,
    weights: torch.Tensor,
    num_tokens: torch.Tensor,
    temperature: float,
    junior=None,
    kl: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(KL penalty - sum in (1)) / num_tokens, a differentiable scalar; logprobs (B, C), detached.

    num_tokens: the completion tokens of the whole batch, right and wrong; `rollouts` may be a
    micro-batch of it. So a long rollout counts in full, as in the policy gradient; that the divisor
    is random adds a bias of order 1/B. The value of the loss measures nothing, since texts and
    weights are new in every update: watch the rewards.
    """
    # log pi_senior(y_t | x_senior, y_<t)
    logprobs = completion_logprobs(senior, rollouts, temperature)  # (B, C)
    # (1)  w(y) * m_t * log pi_senior(y_t | x_senior, y_<t)
    objective = weights * logprobs  # (B, C)
    if kl:
        with torch.no_grad():
            read = completion_logprobs(junior, rollouts.as_read_by_junior(), temperature)  # (B, C)
        # (5)  minus beta * k3_t for every token of the senior
        objective = objective - kl * kl_estimate(logprobs, read, rollouts.senior_mask)
    # Open in paper: the normalisation.
    return -objective.sum() / num_tokens, logprobs.detach()
