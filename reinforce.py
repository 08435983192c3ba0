"""The update: REINFORCE for the senior, on text that two models wrote.

For a rollout y with reward r, each update follows the gradient of (West et al., 2025; c and j are from their Appendix E)

    J = E[ w(y) * sum_t m_t * log pi_senior(y_t | x_senior, y_<t) ]                                    (1)
    w(y) = r + c * (1 - r)               1 for a right rollout, c for a wrong one                      (2)
    m_t  = 1 if the senior wrote y_t, else j                                                           (3)

with respect to the senior's weights, with the sampled y and its reward held fixed. The senior scores every token, the
junior's too, under its own prompt. (We know the paper from secondary sources, see run_gsm8k.py.)

    symbol   variable        meaning
    c        wrong_weight    0 discards wrong rollouts (the paper's main runs); below 0 makes them less likely (the paper
                             found -0.5 to -0.3 best)
    j        junior_weight   1 counts the junior's tokens in full (the paper's main runs); 0 counts only the senior's own
    w * m    weights (B, C)            log pi_senior    logprobs (B, C)

Worked example with c = -0.4 and j = 0.3. A right rollout written by senior, junior, senior has the weights 1, 0.3, 1. A
wrong one written by junior, senior has -0.4 * 0.3 = -0.12 and -0.4.

What this optimises. With j = 0, and under a schedule whose coins depend only on text already written (`token`, `redraw`),
the gradient of (1) is that of the expected reward of the team, times 1 - c. Indeed w = r + c - c * r = (1 - c) * (r - b)
with b = -c / (1 - c), so a negative c acts as a constant baseline b. Under `word` this holds only approximately, because
discarded samples are missing from the sum (see tandem.py). With j > 0 (the paper's main runs have j = 1), (1) is not a policy
gradient: the senior is also trained to imitate what the junior wrote in right rollouts, and with c < 0 to avoid what it
wrote in wrong ones.

The loss is minus (1) divided by the number of completion tokens in the batch, so long texts weigh more than short ones, and
the estimate is slightly biased because that number is random. Its value is no measure of progress, since texts and weights
are drawn anew at every update. Only its gradient is used; watch the rewards instead. There is no learned baseline, KL
penalty or importance ratio, and every update is on-policy. The training loop, with the loss expression, is in run_gsm8k.py.
"""

import torch

from rollout import Rollouts, trim_left

# Shapes: B rollouts, P prompt length, C completion length, V vocabulary size, H hidden width,
# N completion tokens of the batch without padding.


def token_weights(rollouts: Rollouts, rewards: torch.Tensor, wrong_weight: float, junior_weight: float) -> torch.Tensor:
    """The weights w(y) * m_t of equation (1): (B, C), zero at padding.

    rewards: (B,) in [0, 1]. A partial credit r between 0 and 1 gives a weight between c and 1. Raises ValueError if
    rewards have another shape or lie outside [0, 1].
    """
    if rewards.shape != (len(rollouts),):
        raise ValueError(f"expected one reward per rollout, shape ({len(rollouts)},), got shape {tuple(rewards.shape)}")
    if not ((rewards >= 0) & (rewards <= 1)).all():
        raise ValueError(f"rewards must lie in [0, 1], got {rewards.min().item()} to {rewards.max().item()}: see equation (2)")
    w = rewards + wrong_weight * (1 - rewards)  # (B,), equation (2)
    m = torch.where(rollouts.senior_mask.bool(), 1.0, junior_weight)  # (B, C), equation (3)
    return w[:, None] * m * rollouts.completion_mask


def plain_loss(model, rollouts: Rollouts, weights: torch.Tensor, temperature: float) -> torch.Tensor:
    """Minus equation (1), divided by the number of completion tokens in the batch, whoever wrote them. A differentiable scalar.

    This is the definition. It holds logits of shape (B, P+C, V), which do not fit into memory for a large vocabulary, so
    training uses completion_logprobs below. A test checks that the gradients of the two agree.
    """
    ids, mask, position_ids = _model_inputs(rollouts)  # (B, P+C) each
    logits = model(input_ids=ids, attention_mask=mask, position_ids=position_ids, use_cache=False).logits  # (B, P+C, V)
    # The shift: the logits at position P+t-1 predict completion token t. Half precision becomes float32 for the softmax.
    logits = logits[:, rollouts.prompt_ids.shape[1] - 1 : -1].to(torch.promote_types(logits.dtype, torch.float32))  # (B, C, V)
    # Scored at the temperature of sampling: that is the distribution from which the tokens were drawn.
    logprobs = (logits / temperature).log_softmax(-1).gather(2, rollouts.completion_ids[:, :, None])[:, :, 0]  # (B, C)
    return -(weights * logprobs).sum() / rollouts.completion_mask.sum()


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
    # Under LoRA the causal language model is inside a PeftModel. Its base_model is everything below the output layer.
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


class FrozenOutputLayer(torch.autograd.Function):
    """log softmax(W h / T)[y] for N states h (N, H) and tokens y (N,), with a frozen W (V, H).

    The gradient with respect to h is W^T (onehot(y) - softmax(W h / T)) / T. Each output depends on its own state only, and
    everything that this expression needs is available during the forward pass. So it is computed there, a chunk of states
    at a time, and N * H numbers are stored instead of N * V. Unlike under checkpointing, nothing is computed twice.
    """

    @staticmethod
    def forward(ctx, head, states: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
        chunk = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
        logprobs, gradients = [], []
        for h, y in zip(states.split(chunk), targets[:, None].split(chunk)):
            logits = head(h).to(torch.promote_types(h.dtype, torch.float32)).div_(temperature)  # (n, V)
            all_logprobs = logits.log_softmax(-1)
            logprobs.append(all_logprobs.gather(1, y)[:, 0])  # (n,)
            # onehot(y) - softmax, in place: all_logprobs is not needed any more.
            difference = all_logprobs.exp_().neg_()  # (n, V)
            difference.scatter_add_(1, y, torch.ones_like(y, dtype=difference.dtype))
            gradients.append(difference.to(h.dtype) @ head.weight / temperature)  # (n, H)
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(logprobs)

    @staticmethod
    def backward(ctx, upstream: torch.Tensor):
        # The chain rule: one number per token scales its row.
        (gradients,) = ctx.saved_tensors  # (N, H)
        return None, upstream[:, None].to(gradients.dtype) * gradients, None, None


def micro_batches(rollouts: Rollouts, weights: torch.Tensor, max_tokens: int) -> list[tuple[Rollouts, torch.Tensor]]:
    """Cut a batch into parts of at most `max_tokens` tokens, padding included. A longer rollout is a part of its own.

    Returns (rollouts, weights) per part. Rollouts whose weights are all zero (the wrong ones if c = 0) contribute no
    gradient and are left out, so the list is empty if there is nothing to learn from. They still count in the denominator
    of the loss, which is therefore taken from the whole batch, before this split.
    """
    rows = (weights != 0).any(1).nonzero()[:, 0]
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
    prompt_ids, prompt_mask = trim_left(rollouts.prompt_ids[rows], rollouts.prompt_mask[rows])
    length = int(rollouts.completion_mask[rows].sum(1).max())
    not_columns = ("prompt_ids", "prompt_mask", "texts")
    columns = {name: value[rows, :length] for name, value in vars(rollouts).items() if name not in not_columns}
    return Rollouts(prompt_ids, prompt_mask, **columns, texts=[rollouts.texts[i] for i in rows.tolist()])
