"""The update: REINFORCE on the senior, over text that two models wrote.

Maximised, for rollouts y with reward r (West et al., 2025; c and j: appendix E):

    J = E[ w(y) * sum_t m_t * log pi_senior(y_t | x_senior, y_<t) ]                                   (1)
    w(y) = 1 if r = 1 else c          m_t = 1 if the senior wrote y_t else j                          (2)

    c   wrong_weight    0: wrong rollouts are discarded (the paper's main runs); below 0: pushed away (the paper's best: -0.5 to -0.3)
    j   junior_weight   1: the junior's tokens count in full (main runs); 0: only the senior's own tokens
    w m                 token_weights         log pi_senior      completion_logprobs

What that optimises. Under `token` and `redraw` with j = 0 and w = r, the gradient of (1) is the exact policy gradient
of the expected team reward; under `word` it is an approximation (see tandem.py). With j = 1, the paper's choice,
it is neither: the senior is also pulled towards what the junior wrote in rollouts that came out right. The value of
the loss measures nothing: it is built so that its gradient is right. Watch the rewards.

Not here: baseline, KL term, importance ratio (none is mentioned in the paper, and each update is on-policy).
"""

import torch

import parallel
from rollout import Rollouts

# Letters: B rollouts, P prompt, C completion, H hidden width, V vocabulary, N completion tokens that are not padding.
LOGITS_AT_ONCE = 2**24  # numbers: 64 MB in float32


def completion_logprobs(model, rollouts: Rollouts, temperature: float) -> torch.Tensor:
    """log pi(y_t | x, y_<t) at the sampling temperature, (B, C); zeros at padding. Differentiable.

    The trunk runs once over (B, P+C); the output layer, whose V logits a token are what fills a memory, runs only on
    the N completion tokens, a few of them at a time.
    """
    ids = torch.cat([rollouts.prompt_ids, rollouts.completion_ids], 1)  # (B, P+C)
    mask = torch.cat([rollouts.prompt_mask, rollouts.completion_mask], 1)  # (B, P+C)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)  # padding takes no position, as when sampling
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model  # LoRA lives inside it
    hidden = causal_lm.base_model(input_ids=ids, attention_mask=mask, position_ids=position_ids, use_cache=False)[0]

    # The shift, in this one place: the state at position P+t-1 predicts completion token t.
    prompt_length = rollouts.prompt_ids.shape[1]
    hidden = hidden[:, prompt_length - 1 : -1]  # (B, P+C, H) -> (B, C, H)
    real = rollouts.completion_mask.bool()  # (B, C)
    states, targets = hidden[real], rollouts.completion_ids[real]  # (N, H), (N,)

    head = causal_lm.get_output_embeddings()
    if head.weight.requires_grad:  # only where a tiny base is pretrained: its vocabulary is small
        flat = head(states).to(torch.promote_types(states.dtype, torch.float32)).div(temperature).log_softmax(-1)
        flat = flat.gather(1, targets[:, None])[:, 0]  # (N,)
    else:
        flat = FrozenHead.apply(head, states, targets, temperature)  # (N,)
    return torch.zeros(real.shape, dtype=flat.dtype, device=flat.device).masked_scatter(real, flat)


class FrozenHead(torch.autograd.Function):
    """log softmax(W h / T)[y] of a frozen output layer W, for N states h and tokens y, without keeping N * V logits.

    Its gradient is W^T (onehot(y) - softmax(W h / T)) / T, for which all is at hand on the way forward. So it is made
    there, a few states at a time, and only its N * H numbers are kept: no logits, and none are computed twice.
    """

    @staticmethod
    def forward(ctx, head, states: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
        chunk = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
        logprobs, gradients = [], []
        for h, y in zip(states.split(chunk), targets[:, None].split(chunk)):
            logits = head(h).to(torch.promote_types(h.dtype, torch.float32)).div_(temperature)  # half precision is not enough
            all_logprobs = logits.log_softmax(-1)
            logprobs.append(all_logprobs.gather(1, y)[:, 0])
            difference = all_logprobs.exp_().neg_()  # onehot - softmax
            difference.scatter_add_(1, y, torch.ones_like(y, dtype=difference.dtype))
            gradients.append(difference.to(h.dtype) @ head.weight / temperature)
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(logprobs)

    @staticmethod
    def backward(ctx, upstream: torch.Tensor):
        (gradients,) = ctx.saved_tensors
        return None, upstream[:, None].to(gradients.dtype) * gradients, None, None


def token_weights(rollouts: Rollouts, rewards: torch.Tensor, wrong_weight: float, junior_weight: float) -> torch.Tensor:
    """w(y) * m_t of equation (2): rewards (B,) in {0, 1} -> (B, C), zero at padding."""
    if rewards.shape != (len(rollouts),):
        raise ValueError(f"one reward a rollout: expected shape ({len(rollouts)},), got {tuple(rewards.shape)}")
    w = torch.where(rewards == 1, 1.0, wrong_weight)[:, None]  # (B, 1)
    m = torch.where(rollouts.senior_mask.bool(), 1.0, junior_weight)  # (B, C)
    return w * m * rollouts.completion_mask


def backward(model, rollouts: Rollouts, weights: torch.Tensor, temperature: float, micro_tokens: int) -> float | None:
    """Add the gradient of -J to the model's and return the loss, or None if no token has a weight.

    The mean is over all N completion tokens of the batch, counted before it is cut into micro-batches of at most
    micro_tokens tokens, so that their size changes nothing. Rollouts whose weights are all zero (the wrong ones when
    c = 0) are counted, but not run.
    # Open in paper: how the sum over tokens is normalised.
    """
    denominator = rollouts.completion_mask.sum()
    rows = (weights != 0).any(1).nonzero()[:, 0]
    if len(rows) == 0:
        return None
    total = 0.0
    for part in micro_batches(rollouts, rows, micro_tokens)[parallel.rank() :: parallel.world()]:
        few = select(rollouts, part)
        logprobs = completion_logprobs(model, few, temperature)
        loss = -(weights[part, : logprobs.shape[1]] * logprobs).sum() / denominator  # minus equation (1)
        loss.backward()
        total += loss.item()
    return _of_all_processes(model, total)


def _of_all_processes(model, total: float) -> float:
    """Sum loss and gradients over processes (parallel.py): each has run its share of the micro-batches."""
    if parallel.world() == 1:
        return total
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    loss = torch.tensor(total, dtype=torch.float64, device=trained[0].device)
    parallel.add_up([loss, *(parameter.grad for parameter in trained)])
    return loss.item()


def micro_batches(rollouts: Rollouts, rows: torch.Tensor, micro_tokens: int) -> list[torch.Tensor]:
    """Cut `rows` (n,) into parts that hold at most micro_tokens tokens each, padding included, or a single rollout."""
    rows = rows[rollouts.completion_mask[rows].sum(1).argsort()]  # neighbours of one length waste less padding
    lengths = zip(rows.tolist(), rollouts.prompt_mask[rows].sum(1).tolist(), rollouts.completion_mask[rows].sum(1).tolist())
    parts: list[list[int]] = []
    longest = (0, 0)  # prompt and completion of the last part
    for row, prompt, completion in lengths:
        widened = max(longest[0], prompt), max(longest[1], completion)
        if parts and (len(parts[-1]) + 1) * sum(widened) <= micro_tokens:
            parts[-1].append(row)
            longest = widened
        else:
            parts.append([row])
            longest = prompt, completion
    return [torch.tensor(part, device=rows.device) for part in parts]


def select(rollouts: Rollouts, rows: torch.Tensor) -> Rollouts:
    """The rollouts of `rows` (n,), without the columns in which they hold only padding."""
    first = int((rollouts.prompt_mask[rows].sum(0) > 0).long().argmax())  # prompts are padded on the left
    length = int(rollouts.completion_mask[rows].sum(1).max())  # completions on the right
    return Rollouts(
        rollouts.prompt_ids[rows, first:],
        rollouts.prompt_mask[rows, first:],
        rollouts.completion_ids[rows, :length],
        rollouts.completion_mask[rows, :length],
        rollouts.senior_mask[rows, :length],
        rollouts.logprobs[rows, :length],
        [rollouts.texts[i] for i in rows.tolist()],
    )
