"""The pair: a trained senior and a frozen junior over one vocabulary.

The senior is a frozen base under a LoRA adapter, in 4 bits if asked for (QLoRA: Dettmers et al., 2023; rank 16, alpha
16, all linear layers, as in West et al., 2025). Where both name one checkpoint there is one copy of its weights: the
junior is that base with the adapter off. Otherwise the junior is a second, frozen model.

A *specialist* is a senior that has learned a skill and its jargon. Either --senior is one already (the paper's Llama
fine-tuned on GSM8K), or the adapter is fine-tuned here on annotated solutions. Fine-tuning is the update of
reinforce.py with every weight 1: as if the model had written the solution itself and been right.

Not here: sampling (rollout.py), the tiny base (tiny.py).
"""

import random
import warnings
from dataclasses import dataclass
from functools import partial

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, logging

import parallel
from reinforce import backward
from rollout import Rollouts

logging.set_verbosity_error()
logging.disable_progress_bar()
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


class SharedJunior:
    """The junior of a shared checkpoint: the senior's weights without its adapter, alone or beside the senior."""

    def __init__(self, senior: PeftModel):
        self.senior, self.share = senior, 1.0  # on which share of a batch's rows, from above, the adapter acts
        for layer in senior.modules():
            if isinstance(layer, LoraLayer):
                layer.forward = partial(self._forward, layer, layer.forward)

    def _forward(self, layer: LoraLayer, peft_forward, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """A linear layer: W x on all rows, and on those of the senior + scaling B A x."""
        if self.share == 1:
            return peft_forward(x, *args, **kwargs)
        if x.dim() != 3:
            raise ValueError(f"a layer got an input of shape {tuple(x.shape)}: models that route tokens to experts are not supported")
        out = layer.base_layer(x, *args, **kwargs)
        mine = x[: int(self.share * len(x))]
        if len(mine):
            down, up = layer.lora_A["default"], layer.lora_B["default"]
            out[: len(mine)] += up(down(mine.to(down.weight.dtype))) * layer.scaling["default"]
        return out

    def _run(self, share: float, **inputs):
        self.share = share
        try:
            return self.senior.get_base_model()(**inputs)
        finally:
            self.share = 1.0

    def __call__(self, **inputs):
        """The junior alone."""
        return self._run(0.0, **inputs)

    def beside_senior(self, **inputs):
        """One forward pass for both: the upper half of the rows is the senior's, the lower half the junior's."""
        return self._run(0.5, **inputs)


@dataclass
class Pair:
    senior: PeftModel  # trained: its adapter only
    junior: torch.nn.Module | SharedJunior  # frozen
    senior_tokenizer: object  # one vocabulary, but perhaps two chat templates
    junior_tokenizer: object
    vocab_size: int  # logit width of both
    end_ids: list[int]  # tokens with which either ends a text


def load_tokenizers(senior: str, junior: str):
    """Both tokenizers, refused with ValueError unless they are the same vocabulary. Fast: do it before anything long.

    Ids beyond the logits, such as a padding token that was added to the tokenizer alone, are never written or read.
    """
    tokenizers = [_load(AutoTokenizer, name) for name in (senior, junior)]
    widths = [load_config(name).vocab_size for name in (senior, junior)]
    first, second = ({token: i for token, i in tokenizer.get_vocab().items() if i < width} for tokenizer, width in zip(tokenizers, widths))
    if first != second:
        differ = len(set(first.items()) ^ set(second.items()))
        raise ValueError(
            f"senior and junior must share one tokenizer: {senior} has {len(first)} tokens, {junior} has {len(second)}, "
            f"and {differ} entries differ. Choose two models of one family."
        )
    if widths[0] != widths[1]:
        raise ValueError(f"senior and junior must have logits of one width: {senior} has {widths[0]}, {junior} {widths[1]}")
    return tokenizers


def load_config(name: str):
    return _load(AutoConfig, name)


def load_pair(senior: str, junior: str, *, rank: int, four_bit: bool, device: str, checkpointing: bool = False) -> Pair:
    """Load the pair with a fresh adapter (which changes nothing until it is trained).

    Raises ValueError for a missing checkpoint, or two that differ in tokenizer or logit width.
    """
    tokenizers = load_tokenizers(senior, junior)
    base = load_model(senior, four_bit, device)
    other = base if senior == junior else load_model(junior, four_bit, device)
    ends = {tokenizer.eos_token_id for tokenizer in tokenizers}
    for model in (base, other):  # a chat model may end its turn with another token than its tokenizer's
        listed = model.generation_config.eos_token_id
        ends.update(listed if isinstance(listed, list) else [listed])
    model = without_dropout(add_adapter(base, rank))
    if checkpointing:
        recompute_layers(model)
    return Pair(model, SharedJunior(model) if other is base else other, *tokenizers, base.config.vocab_size, sorted(ends - {None}))


def add_adapter(base, rank: int) -> PeftModel:
    """The senior: the base under a fresh adapter on all linear layers."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    return get_peft_model(base, config)


def reset_adapter(senior: PeftModel, seed: int) -> None:
    """A fresh adapter: A random, B zero, so that senior and base agree."""
    torch.manual_seed(seed)
    for module in senior.modules():
        if isinstance(module, LoraLayer):
            module.reset_lora_parameters("default", init_lora_weights=True)


def recompute_layers(model) -> None:
    """Gradient checkpointing: keep only what enters each layer, and run the layer again when its gradient is due.

    Ours rather than transformers', which does it only in training mode, where dropout would be on.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = max((module for module in base.modules() if isinstance(module, torch.nn.ModuleList)), key=len)
    for layer in layers:
        layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward, *args, **kwargs):
    return checkpoint(forward, *args, use_reentrant=False, **kwargs) if torch.is_grad_enabled() else forward(*args, **kwargs)


def load_model(name: str, four_bit: bool, device: str):
    """One frozen causal language model: bfloat16 on an accelerator, float32 on CPU, NF4 weights if four_bit."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    options = {"dtype": dtype}
    if four_bit:
        options["device_map"] = {"": device}
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    model = _load(AutoModelForCausalLM, name, **options)
    model = model if four_bit else model.to(device)
    model.requires_grad_(False)
    _check_head(without_dropout(model), name)
    return model


def without_dropout(model):
    """Evaluation mode, in training too: dropout would make the scored policy another than the sampled one.

    Not for 4-bit layers, which have no dropout: on some CPUs their evaluation mode packs the weights, for good, for a
    kernel that has no gradient.
    """
    model.eval()
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.train()
    return model


def _load(kind, name: str, **options):
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot load {name!r}: it is neither a local folder nor a reachable checkpoint of the hub. Check the name "
            "and the connection, or use --preset tiny, which needs neither."
        ) from error


@torch.no_grad()
def _check_head(model, name: str) -> None:
    """reinforce.py applies the output layer itself; refuse models that do something to the logits after it."""
    ids = torch.tensor([[1, 2, 3]], device=model.device)
    ours = model.get_output_embeddings()(model.base_model(input_ids=ids)[0])
    theirs = model(input_ids=ids).logits
    if not torch.allclose(ours.float(), theirs.float(), atol=1e-2, rtol=1e-2):
        raise ValueError(f"{name} ({type(model).__name__}) scales or caps its logits after the output layer: not supported")


# ----------------------------------------------------------------------------------------------------------------------
# From text to batches


def encode_prompts(tokenizer, prompts: list[str], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded (ids, mask) of B prompts, (B, P) each. A chat template has written its own start token already."""
    started = tokenizer.bos_token is not None and prompts[0].startswith(tokenizer.bos_token)
    return pad(tokenizer(prompts, add_special_tokens=not started).input_ids, tokenizer, "left", device)


def pad(rows: list[list[int]], tokenizer, side: str, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) of token lists of different lengths, padded on one side to (B, longest)."""
    fill = tokenizer.eos_token_id  # any id would do: masks are kept, never guessed from ids
    width = max(map(len, rows))
    padded = [([fill] * (width - len(row)), [0] * (width - len(row)), row) for row in rows]
    ids = [gap + row if side == "left" else row + gap for gap, _, row in padded]
    mask = [zeros + [1] * len(row) if side == "left" else [1] * len(row) + zeros for _, zeros, row in padded]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def demonstrations(tokenizer, examples: list[tuple[list[int], list[int]]], device: str) -> Rollouts:
    """Token ids of (prompt, solution) pairs as a batch of rollouts, all by the senior."""
    prompts, solutions = zip(*examples)
    ids, mask = pad(solutions, tokenizer, "right", device)
    return Rollouts(*pad(prompts, tokenizer, "left", device), ids, mask, mask, torch.zeros(ids.shape, device=device), [""] * len(ids))


def encode_examples(tokenizer, pairs: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """(prompt, solution) texts -> ids; each solution ends in the end token."""
    prompts = tokenizer([prompt for prompt, _ in pairs]).input_ids
    whole = tokenizer([f"{prompt} {solution}" for prompt, solution in pairs]).input_ids  # one text: no doubled spaces
    return [(p, w[len(p) :] + [tokenizer.eos_token_id]) for p, w in zip(prompts, whole)]


# ----------------------------------------------------------------------------------------------------------------------
# Fine-tuning on worked solutions


def fine_tune(model, tokenizer, pairs, *, steps: int, batch: int, micro_tokens: int, lr: float, seed: int, label: str) -> None:
    """Maximum likelihood of solutions given prompts, on whatever parameters of `model` are trainable.

    pairs: (prompt, solution) texts, gone through in order of similar length within windows, again and again.
    AdamW; the learning rate warms up over 30 steps and falls to 0 over the last 40 %.
    """
    rng = random.Random(seed)
    examples = encode_examples(tokenizer, pairs[: steps * batch])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    optimizer.zero_grad()
    batches: list[list] = []
    for step in tqdm(range(steps), desc=label, unit="step", disable=parallel.rank() > 0):
        if not batches:
            batches = _batches(examples, batch, rng)
        few = demonstrations(tokenizer, batches.pop(), model.device)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 30, (steps - step) / (0.4 * steps))
        backward(model, few, few.completion_mask.float(), temperature=1.0, micro_tokens=micro_tokens)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _batches(examples: list, batch: int, rng: random.Random) -> list[list]:
    """One pass over the examples in batches of similar length, which wastes a third less on padding."""
    order = rng.sample(examples, len(examples))
    batches = []
    for start in range(0, len(order), 25 * batch):
        window = sorted(order[start : start + 25 * batch], key=lambda example: sum(map(len, example)))
        batches += [window[i : i + batch] for i in range(0, len(window), batch)]
    rng.shuffle(batches)
    return batches
