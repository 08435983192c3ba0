"""The update of the senior, on text that two models wrote: REINFORCE and, from Tandem RL, GRPO.

REINFORCE. For a rollout y with reward r, each update follows the gradient of (1), from West et al. (2025; c and j are from
their Appendix E):

    J = E[ w(y) * sum_t m_t * log pi_senior(y_t | x_senior, y_<t) ]                                    (1)
    w(y) = r + c * (1 - r)               1 for a right rollout, c for a wrong one                      (2)
    m_t  = 1 if the senior wrote y_t, else j                                                           (3)

with respect to the senior's parameters, averaged over sampled y, with y and its reward held fixed. The senior scores every
token, including the junior's, under its own prompt. (We know both papers, and this appendix, from secondary sources, see
run_gsm8k.py.)

GRPO (Tandem RL: Jiao et al., 2026) compares a rollout with the others of its problem. With G rollouts y_1 ... y_G per
problem and their rewards r_1 ... r_G, it follows the gradient of

    A(y_i) = (r_i - mean(r)) / (std(r) + 1e-6)                     std with G - 1 in its denominator   (4)
    J = E[ sum_t min( rho_t * A(y) * m_t, clip(rho_t, 1 - e, 1 + e) * A(y) * m_t ) ]                   (5)
    rho_t = pi_senior(y_t | x_senior, y_<t) / pi_old(y_t | x_senior, y_<t)
    k3_t = exp(d_t) - 1 - d_t                                                                          (6)
    d_t = log pi_junior(y_t | x_junior, y_<t) - log pi_senior(y_t | x_senior, y_<t)

where pi_old is the senior that wrote the rollouts. In the first step on a batch rho_t = 1, and the gradient of (5) is that of
(1) with A instead of w. In Tandem RL only the senior's tokens enter the loss (j = 0). One of its controls adds a KL penalty
that holds the senior near its junior: beta * k3_t is subtracted from (5) for every token of the senior.

    symbol          variable            meaning
    c               wrong_weight        0 discards wrong rollouts (the paper's main runs); below 0 makes them less likely
                                        (the paper found -0.5 to -0.3 best)
    j               junior_weight       1 counts the junior's tokens in full (the paper's main runs); 0 counts only the
                                        senior's own
    w, A            w (B,)              the weight of a rollout
    w * m, A * m    weights (B, C)      the weight of a token
    log pi_senior   logprobs (B, C)     with a gradient
    log pi_old      old_logprobs (B, C) without
    G               group_size          rollouts per problem
    e               clip_ratio          the ratio is clipped to [1 - e, 1 + e]
    beta            args.kl             the coefficient of the KL penalty

Worked example of (1) with c = -0.4 and j = 0.3. A right rollout of three tokens, by senior, junior and senior, has the
weights 1, 0.3 and 1. A wrong one of two, by junior and senior, has -0.4 * 0.3 = -0.12 and -0.4. Of (4): if one of 8
rollouts is right, its advantage is 2.47 and that of the others is -0.35.

What this optimises. With j = 0, and under a schedule whose coins depend only on text already written (`token`, `redraw`),
the gradient of (1) equals 1 - c times the gradient of the expected reward of the team. To see this, write
w = r + c - c * r = (1 - c) * (r - b) with b = -c / (1 - c): a negative c acts as a constant baseline b. Under `word` this
holds only approximately, because discarded samples are missing from the sum (see tandem.py). With j > 0 (in the paper's
main runs j = 1), (1) is not a policy gradient: the senior is also trained to imitate what the junior wrote in right
rollouts, and with c < 0 to avoid what it wrote in wrong ones.

The loss is minus (1) or (5) divided by the number of completion tokens in the batch, so long texts weigh more than short
ones, and the estimate is slightly biased, since the number of tokens depends on the rollouts. Its value is no measure of
progress, since texts and weights are drawn anew at every update. Only its gradient is used; watch the rewards instead.
There is no learned baseline and no entropy bonus. The training loop, with the loss expression, is in run_gsm8k.py.
"""

import torch

from rollout import Rollouts, trim_left

# Shapes: B rollouts, P prompt length, C completion length, V vocabulary size, H hidden width, G rollouts per problem,
# N completion tokens of the batch without padding.


def outcome_weights(rewards: torch.Tensor, wrong_weight: float) -> torch.Tensor:
    """REINFORCE: w(y) of equation (2) for every rollout, (B,).

    rewards: (B,) in [0, 1]. A partial credit r between 0 and 1 gives a weight between c and 1. Raises ValueError for a
    reward outside [0, 1].
    """
    if not ((rewards >= 0) & (rewards <= 1)).all():
        raise ValueError(f"rewards must lie in [0, 1], got {rewards.min().item()} to {rewards.max().item()}: see equation (2)")
    return rewards + wrong_weight * (1 - rewards)


def group_advantages(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """GRPO: A of equation (4) for every rollout, (B,). Every `group_size` consecutive rollouts share a problem.

    If all rewards of a group are equal, its advantages are 0. Raises ValueError if group_size is 1, so that all advantages
    would be 0, or if it does not divide B.

    >>> group_advantages(torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0]), group_size=8)[:2]
    tensor([ 2.4749, -0.3536])
    """
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards in groups of {group_size}: a group is two or more rollouts of one problem")
    groups = rewards.view(-1, group_size)  # (problems, G)
    # Equal rewards differ from their mean by rounding, which the tiny denominator would blow up.
    all_equal = groups.amin(1, keepdim=True) == groups.amax(1, keepdim=True)
    centred = (groups - groups.mean(1, keepdim=True)).masked_fill(all_equal, 0.0)
    # std is the unbiased one, with G - 1 in the denominator.
    return (centred / (groups.std(1, keepdim=True) + 1e-6)).flatten()


def token_weights(rollouts: Rollouts, w: torch.Tensor, junior_weight: float) -> torch.Tensor:
    """The weights w(y) * m_t of equations (1) and (5): (B, C), zero at padding. w: (B,), one weight per rollout.

    Raises ValueError if w has another shape, or if the masks contradict each other.
    """
    if rollouts.senior_mask.shape != rollouts.completion_mask.shape or (rollouts.senior_mask > rollouts.completion_mask).any():
        raise ValueError("senior_mask must have the shape of completion_mask, and mark no token that completion_mask does not")
    if w.shape != (len(rollouts),):
        raise ValueError(f"expected one weight per rollout, shape ({len(rollouts)},), got shape {tuple(w.shape)}")
    m = torch.where(rollouts.senior_mask.bool(), 1.0, junior_weight)  # (B, C), equation (3)
    return w[:, None] * m * rollouts.completion_mask


def clipped_objective(logprobs: torch.Tensor, old_logprobs: torch.Tensor, weights: torch.Tensor, clip_ratio: float) -> torch.Tensor:
    """GRPO: the terms of equation (5), (B, C), for weights A(y) * m_t.

    logprobs: the senior's, with a gradient. old_logprobs: those of the senior that wrote the rollouts, without. As
    m_t is not negative, it may stand inside the minimum.
    """
    # Where the weight is 0, a ratio that overflows would give 0 * inf = NaN.
    log_ratio = (logprobs - old_logprobs).masked_fill(weights == 0, 0.0)
    ratio = log_ratio.exp()
    return torch.minimum(ratio * weights, ratio.clamp(1 - clip_ratio, 1 + clip_ratio) * weights)


def kl_estimate(logprobs: torch.Tensor, junior_logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """k3 of equation (6) for every token of the mask, (B, C), and 0 elsewhere. It is not negative, up to rounding.

    For tokens that this senior sampled, its expected value is KL(senior || junior) (Schulman, 2020, "Approximating KL
    Divergence"). Its gradient, with the tokens held fixed, averages to that of KL(junior || senior), which has the same
    minimum.
    """
    # Where the mask is 0, a ratio that overflows would give 0 * inf = NaN in the loss.
    log_ratio = (junior_logprobs - logprobs).masked_fill(mask == 0, 0.0)
    return torch.expm1(log_ratio) - log_ratio


def plain_loss(model, rollouts: Rollouts, weights: torch.Tensor, temperature: float) -> torch.Tensor:
    """Minus equation (1), divided by the number of completion tokens in the batch, whoever wrote them. A differentiable scalar.

    This is the definition. It holds logits of shape (B, P+C, V), which do not fit into memory for a large vocabulary, so
    training uses completion_logprobs below. A test checks that the gradients of the two agree.
    """
    # Scored at the temperature of sampling: that is the distribution from which the tokens were drawn.
    logprobs = full_logprobs(model, rollouts, temperature).gather(2, rollouts.completion_ids[:, :, None])[:, :, 0]  # (B, C)
    return -(weights * logprobs).sum() / rollouts.completion_mask.sum()


def full_logprobs(model, rollouts: Rollouts, temperature: float) -> torch.Tensor:
    """The log-probabilities of the whole vocabulary before every completion token, (B, C, V)."""
    ids, mask, position_ids = _model_inputs(rollouts)  # (B, P+C) each
    logits = model(input_ids=ids, attention_mask=mask, position_ids=position_ids, use_cache=False).logits  # (B, P+C, V)
    # The shift: the logits at position P+t-1 predict completion token t. Half precision becomes float32 for the softmax.
    logits = logits[:, rollouts.prompt_ids.shape[1] - 1 : -1].to(torch.promote_types(logits.dtype, torch.float32))  # (B, C, V)
    return (logits / temperature).log_softmax(-1)


def _model_inputs(rollouts: Rollouts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prompts and completions as one sequence: ids, mask and position ids, (B, P+C) each."""
    ids = torch.cat([rollouts.prompt_ids, rollouts.completion_ids], 1)
    mask = torch.cat([rollouts.prompt_mask, rollouts.completion_mask], 1)
    # Padding does not advance the position, exactly as during sampling.
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


# ----------------------------------------------------------------------------------------------------------------------
# Speed: skip on first reading
#
# Three things make the same loss affordable. The output layer runs only on completion tokens, in chunks. Where it is
# frozen, the gradient with respect to its input is computed during the forward pass, so that no logits are stored. And the
# batch is cut into micro-batches of rollouts of similar length.

LOGITS_AT_ONCE = 2**24  # logits per chunk: 64 MB per copy in float32


def completion_logprobs(model, rollouts: Rollouts, temperature: float) -> torch.Tensor:
    """log pi(y_t | x, y_<t) at the sampling temperature: (B, C), zero at padding, differentiable."""
    ids, mask, position_ids = _model_inputs(rollouts)  # (B, P+C) each
    # Under LoRA the causal language model is inside a PeftModel. The causal model's base_model is all but its output layer.
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    # Log-probabilities were already recorded during sampling, but without a gradient, so the senior reads the text again.
    hidden = causal_lm.base_model(input_ids=ids, attention_mask=mask, position_ids=position_ids, use_cache=False)[0]
    # The same shift as in plain_loss; then only the N real completion tokens, row by row.
    hidden = hidden[:, rollouts.prompt_ids.shape[1] - 1 : -1]  # (B, P+C, H) -> (B, C, H)
    real = rollouts.completion_mask.bool()  # (B, C)
    states, targets = hidden[real], rollouts.completion_ids[real]  # (N, H), (N,)

    head = causal_lm.get_output_embeddings()
    if head.weight.requires_grad:
        # Only when lab/tiny.py pretrains a base, whose vocabulary is small: autograd may store all logits. Under LoRA the
        # output layer is always frozen.
        logits = head(states).to(torch.promote_types(states.dtype, torch.float32))  # (N, V)
        flat = (logits / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]  # (N,)
    else:
        flat = FrozenOutputLayer.apply(head, states, targets, temperature)  # (N,)
    return torch.zeros(real.shape, dtype=flat.dtype, device=flat.device).masked_scatter(real, flat)


@torch.no_grad()
def frozen_logprobs(model, rollouts: Rollouts, temperature: float) -> torch.Tensor:
    """completion_logprobs of a model that is not trained, (B, C)."""
    return completion_logprobs(model, rollouts, temperature)


class FrozenOutputLayer(torch.autograd.Function):
    """log softmax(W h / T)[y] for N states h (N, H) and tokens y (N,), with a frozen W (V, H).

    The gradient with respect to h is W^T (onehot(y) - softmax(W h / T)) / T. Each output depends on its own state only, and
    everything that this expression needs is available during the forward pass. So the gradient is computed there, a chunk
    of states at a time, and N * H numbers are stored instead of N * V. Unlike with checkpointing, nothing is recomputed.
    The states of a model that is not trained, such as the junior, need no gradient, and none is computed.
    """

    @staticmethod
    def forward(ctx, head, states: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
        chunk = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
        logprobs, gradients = [], []
        for h, y in zip(states.split(chunk), targets[:, None].split(chunk)):
            logits = head(h).to(torch.promote_types(h.dtype, torch.float32)).div_(temperature)  # (n, V)
            all_logprobs = logits.log_softmax(-1)
            logprobs.append(all_logprobs.gather(1, y)[:, 0])  # (n,)
            if not ctx.needs_input_grad[1]:
                continue
            # onehot(y) - softmax, in place: all_logprobs is not needed any more.
            difference = all_logprobs.exp_().neg_()  # (n, V)
            difference.scatter_add_(1, y, torch.ones_like(y, dtype=difference.dtype))
            gradients.append(difference.to(h.dtype) @ head.weight / temperature)  # (n, H)
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(logprobs)

    @staticmethod
    def backward(ctx, upstream: torch.Tensor):
        # The chain rule: one number per token scales its row.
        (gradients,) = ctx.saved_tensors  # (N, H)
        return None, upstream[:, None].to(gradients.dtype) * gradients, None, None


def micro_batches(
    rollouts: Rollouts, weights: torch.Tensor, max_tokens: int, keep_all: bool = False
) -> list[tuple[Rollouts, torch.Tensor]]:
    """Cut a batch into parts of at most `max_tokens` tokens, padding included. A longer rollout is a part of its own.

    Returns (rollouts, weights) per part. Rollouts whose weights are all zero (the wrong ones if c = 0) contribute no
    gradient and are left out, so the list is empty if there is nothing to learn from. They still count in the denominator
    of the loss, which is therefore taken from the whole batch, before this split. Set keep_all if the loss has a term to
    which these rollouts contribute too: the divergence from the junior.
    """
    rows = ((weights != 0).any(1) | keep_all).nonzero()[:, 0]
    # Sorted, because parts of similar length waste less on padding.
    rows = rows[rollouts.completion_mask[rows].sum(1).argsort()]
    lengths = [mask[rows].sum(1).tolist() for mask in (rollouts.prompt_mask, rollouts.completion_mask)]
    parts: list[list[int]] = []
    longest_prompt = longest_completion = 0  # of the part that is being filled
    for row, prompt, completion in zip(rows.tolist(), *lengths):
        width = max(longest_prompt, prompt) + max(longest_completion, completion)
        if parts and (len(parts[-1]) + 1) * width <= max_tokens:
            parts[-1].append(row)
            longest_prompt, longest_completion = max(longest_prompt, prompt), max(longest_completion, completion)
        else:
            parts.append([row])
            longest_prompt, longest_completion = prompt, completion
    selected = [select(rollouts, torch.tensor(part, device=rows.device)) for part in parts]
    return [(micro_batch, weights[part, : micro_batch.completion_ids.shape[1]]) for part, micro_batch in zip(parts, selected)]


def select(rollouts: Rollouts, rows: torch.Tensor) -> Rollouts:
    """The rollouts `rows` (n,), without the columns that are padding in all of them."""
    prompts = trim_left(rollouts.prompt_ids[rows], rollouts.prompt_mask[rows])
    junior_prompts = trim_left(rollouts.junior_prompt_ids[rows], rollouts.junior_prompt_mask[rows])
    length = int(rollouts.completion_mask[rows].sum(1).max())
    columns = {name: value[rows, :length] for name, value in vars(rollouts).items() if "prompt" not in name and name != "texts"}
    return Rollouts(*prompts, *junior_prompts, **columns, texts=[rollouts.texts[i] for i in rows.tolist()])
