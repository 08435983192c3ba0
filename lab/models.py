"""Loading the pair: a trained senior and a frozen junior over one vocabulary.

The senior is a frozen base under a LoRA adapter, optionally with 4-bit weights (QLoRA: Dettmers et al., 2023). West et
al. (2025) use rank 16, alpha 16 and all linear layers. If --senior and --junior are the same checkpoint, its weights are
loaded once: the junior is that base with the adapter off, and one forward pass can serve both (SharedJunior). Otherwise
the junior is a second, frozen model.

Models are loaded as transformers loads them, from the hub or from a local folder, without running code that comes with a
checkpoint. Before anything long, a pair is tried out: what rollout.py and reinforce.py will do with it is compared with
plain forward passes, and architectures for which they differ are refused. This file does not sample (rollout.py) or train
(run_gsm8k.py, lab/specialist.py).
"""

import warnings
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig, logging

from rollout import Pair, make_decoders
from tandem import build_tables, token_bytes

# What transformers reports while it loads is not about this project, and a progress bar per checkpoint hides our own.
logging.set_verbosity_error()
logging.disable_progress_bar()
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def load_tokenizers(senior: str, junior: str) -> list:
    """Both tokenizers. Raises ValueError unless they are the same vocabulary. Fast, so it is done before anything long.

    Ids beyond the logits are ignored: some tokenizers have an additional padding token that the model never writes.
    """
    tokenizers = [load(AutoTokenizer, name) for name in (senior, junior)]
    widths = [load(AutoConfig, name).get_text_config().vocab_size for name in (senior, junior)]
    vocabularies = [{token: i for token, i in tokenizer.get_vocab().items() if i < width} for tokenizer, width in zip(tokenizers, widths)]
    if vocabularies[0] != vocabularies[1]:
        differ = len(set(vocabularies[0].items()) ^ set(vocabularies[1].items()))
        sizes = f"{senior} has {len(vocabularies[0])} tokens, {junior} has {len(vocabularies[1])}, and {differ} entries differ"
        raise ValueError(f"senior and junior must share one tokenizer: {sizes}. Choose two models of one family.")
    if widths[0] != widths[1]:
        raise ValueError(f"senior and junior must have logits of one width: {senior} has {widths[0]}, {junior} {widths[1]}")
    return tokenizers


def load_pair(
    senior: str, junior: str, *, rank: int, four_bit: bool, device: str, checkpointing: bool = False, bfloat16: bool = False
) -> Pair:
    """Load the pair, the senior under a fresh adapter, which changes nothing until it is trained.

    bfloat16: the type of the base weights, instead of float32.

    Raises ValueError for a missing or incomplete checkpoint, for two that differ in tokenizer or logit width, for a pair
    without an end token, and for an architecture that rollout.py or reinforce.py would get wrong.
    """
    tokenizers = load_tokenizers(senior, junior)
    base = load_model(senior, four_bit, device, bfloat16)
    other = base if senior == junior else load_model(junior, four_bit, device, bfloat16)

    # A chat model may end its turn with another token than the end token of its tokenizer.
    end_ids = {tokenizer.eos_token_id for tokenizer in tokenizers}
    for model in (base, other):
        listed = model.generation_config.eos_token_id
        end_ids.update(listed if isinstance(listed, list) else [listed])
    end_ids -= {None}
    if None in [tokenizer.eos_token_id for tokenizer in tokenizers]:
        raise ValueError(f"{senior}, {junior}: a tokenizer without an end token. Set its eos_token")

    try:
        model = disable_dropout(add_adapter(base, rank))
    except ValueError as error:
        raise ValueError(f"{senior} ({type(base).__name__}) cannot be given an adapter ({error}). Choose another model") from error
    if checkpointing:
        enable_checkpointing(model)
    pieces = token_bytes(tokenizers[0], base.config.get_text_config().vocab_size, end_ids)
    junior_model = SharedJunior(model) if other is base else other
    pair = Pair(model, junior_model, *tokenizers, sorted(end_ids), pieces, build_tables(pieces).to(device))
    check_decoding(pair, f"{senior} ({type(base).__name__})")
    return pair


def load_model(name: str, four_bit: bool, device: str, bfloat16: bool):
    """One frozen causal language model in bfloat16 or float32, with NF4 weights if four_bit."""
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    options = {"dtype": dtype, "device_map": {"": device}}
    if four_bit:
        nf4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
        options["quantization_config"] = BitsAndBytesConfig(**nf4)
    if (Path(name) / "generation_config.json").is_file():
        # transformers would go on without the end tokens of a file that it cannot read.
        load(GenerationConfig, name)
    model, report = load(AutoModelForCausalLM, name, **options, output_loading_info=True)
    if report["missing_keys"]:
        # transformers would go on with random numbers in their place.
        raise ValueError(f"{name}: the checkpoint lacks weights such as {sorted(report['missing_keys'])[0]}. Download or save it again")
    model.requires_grad_(False)
    return disable_dropout(model)


def load(kind, name: str, **options):
    """kind.from_pretrained, with a remedy in the error message. `kind`: an Auto class of transformers."""
    try:
        return kind.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:
        # A damaged or hostile file makes the libraries raise nearly anything, always with the same remedy.
        # The first sentence of its message: later ones are about the libraries' own options, and may be bad advice here.
        said = str(error).split("\n")[0].split(". ")[0][:200]
        reason = f"{type(error).__name__}: {said}" if said else type(error).__name__
        # For what can only be a path, the libraries' message would be about names on the hub.
        if Path(name).is_absolute() and not Path(name).exists():
            reason = "there is no such folder"
        elif Path(name).is_dir() and not (Path(name) / "config.json").is_file():
            reason = "the folder has no config.json"
        remedy = "Name a local folder or a checkpoint of the hub that can be reached, or use --preset tiny, which needs neither"
        raise ValueError(f"cannot load {name!r} ({reason}). {remedy}.") from error


def check_decoding(pair: Pair, name: str) -> None:
    """Raises ValueError unless what rollout.py and reinforce.py do with the pair agrees with plain forward passes.

    The comparison is made under a random adapter. In bfloat16 an unlucky one amplifies rounding beyond any tolerance, while an
    error shows under nearly every adapter; so there three are tried, and the pair is refused unless most of them agree.
    """
    in_float32 = pair.senior.dtype == torch.float32
    tolerance, num_adapters = (1e-3, 1) if in_float32 else (0.1, 3)
    try:
        compared = [compare_with_plain_passes(pair, seed) for seed in range(num_adapters)]
    except Exception as error:
        # Whatever goes wrong here would go wrong in the first rollout.
        raise ValueError(f"{name} cannot be decoded step by step here ({type(error).__name__}: {error}). Choose another model") from error
    for what in compared[0]:
        distances = [distance_of[what] for distance_of in compared]
        # A distance that is nan is not below the tolerance.
        if sum(distance < tolerance for distance in distances) <= num_adapters / 2:
            raise ValueError(f"{name} {what} (total variation distance {max(distances):.2g}). Choose another model")


@torch.no_grad()
def compare_with_plain_passes(pair: Pair, seed: int) -> dict[str, float]:
    """What may be wrong with a pair: the distance between our computation and plain forward passes, for each.

    Compared are one left-padded, cached step of both roles, and the output layer on top of the hidden states, by the total
    variation distance of the distributions of the next token. A fresh adapter does nothing, so here it gets random weights.
    """
    rows, written = [[1, 2, 3, 4, 5], [3, 2, 1]], [6, 5]
    device = pair.senior.device
    reset_adapter(pair.senior, seed)
    matrices = [module.lora_B["default"].weight for module in pair.senior.modules() if isinstance(module, LoraLayer)]
    generator = torch.Generator().manual_seed(seed)
    for matrix in matrices:
        matrix.copy_(0.1 * torch.randn(matrix.shape, generator=generator))
    try:
        prompts = pad(rows, pair.senior_tokenizer, "left", device)
        decoders, _ = make_decoders(pair, prompts, prompts, max_new_tokens=1, p=0.5)
        for decoder in decoders:
            decoder.step(torch.tensor(written, device=device))
        cached = torch.cat([logits for decoder in decoders for logits in decoder.logits])  # (2 * rows, V), the senior's first
        texts = [torch.tensor([[*row, token]], device=device) for row, token in zip(rows, written)]
        plain = [pair.senior(input_ids=ids).logits[0, -1] for ids in texts]
        if isinstance(pair.junior, SharedJunior):
            with pair.senior.disable_adapter():
                plain += [pair.senior(input_ids=ids).logits[0, -1] for ids in texts]
        else:
            plain += [pair.junior(input_ids=ids).logits[0, -1] for ids in texts]
        base = pair.senior.get_base_model()
        scored = [base.get_output_embeddings()(base.base_model(input_ids=ids)[0])[0, -1] for ids in texts]
    finally:
        for matrix in matrices:
            matrix.zero_()
    pairs = {
        "scales or caps its logits after the output layer, which is not supported": (torch.stack(scored), torch.stack(plain[:2])),
        "decodes with a cache and padding something else than in a plain forward pass": (cached, torch.stack(plain)),
    }
    difference = {what: ours.float().softmax(-1) - theirs.float().softmax(-1) for what, (ours, theirs) in pairs.items()}  # (rows, V)
    return {what: value.abs().sum(-1).max().item() / 2 for what, value in difference.items()}


# ----------------------------------------------------------------------------------------------------------------------
# The adapter


def add_adapter(base, rank: int) -> PeftModel:
    """The senior: the base under a fresh adapter on all linear layers."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    return get_peft_model(base, config)


def reset_adapter(senior: PeftModel, seed: int) -> None:
    """Reinitialise the adapter: A random and B zero, so that the senior equals its base."""
    torch.manual_seed(seed)
    for module in senior.modules():
        if isinstance(module, LoraLayer):
            module.reset_lora_parameters("default", init_lora_weights=True)


def adapter_state(senior: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's state dict, which shares its memory."""
    # The default, save_embedding_layers="auto", would ask the hub about the base at every call.
    return get_peft_model_state_dict(senior, save_embedding_layers=False)


def trainable_parameters(model) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def disable_dropout(model):
    """Evaluation mode, during training too: dropout would make the scored policy another one than the sampled policy.

    4-bit layers stay in training mode. They have no dropout, and in evaluation mode bitsandbytes repacks their weights on
    some CPUs, permanently, for a kernel that has no gradient.
    """
    model.eval()
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.train()
    return model


def enable_checkpointing(model) -> None:
    """Gradient checkpointing: keep only the input of each layer, and run the layer again when its gradient is due.

    The built-in version of transformers works in training mode only, in which dropout would be on.
    """
    # The decoder layers are the longest ModuleList of a causal language model.
    layers = max((module for module in model.modules() if isinstance(module, torch.nn.ModuleList)), key=len)
    for layer in layers:
        layer.forward = partial(_checkpointed, layer.forward)


def _checkpointed(forward, *args, **kwargs):
    return checkpoint(forward, *args, use_reentrant=False, **kwargs) if torch.is_grad_enabled() else forward(*args, **kwargs)


class SharedJunior:
    """The junior of a shared checkpoint: the senior's weights without the adapter, alone or beside the senior.

    Every LoRA layer is patched so that its adapter applies to a leading fraction of the batch only. Outside the methods
    below the fraction is 1, so that training sees an ordinary PeftModel.
    """

    def __init__(self, senior: PeftModel):
        self.senior, self.adapted_fraction = senior, 1.0
        for layer in senior.modules():
            if isinstance(layer, LoraLayer):
                layer.forward = partial(self._layer_forward, layer, layer.forward)

    def _layer_forward(self, layer: LoraLayer, peft_forward, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """A linear layer: W x for all rows; + scaling * B A x for the leading rows, which are the senior's."""
        if self.adapted_fraction == 1:
            return peft_forward(x, *args, **kwargs)
        if x.dim() != 3:
            # Layers of experts, and those of OPT, flatten batch and sequence, so that "leading rows" would mean nothing.
            raise ValueError(f"a layer got an input of shape {tuple(x.shape)}: models that flatten it or use experts are not supported")
        out = layer.base_layer(x, *args, **kwargs)
        adapted = x[: int(self.adapted_fraction * len(x))]
        if len(adapted):
            down, up = layer.lora_A["default"], layer.lora_B["default"]
            out[: len(adapted)] += up(down(adapted.to(down.weight.dtype))) * layer.scaling["default"]
        return out

    def _run(self, model, adapted_fraction: float, **inputs):
        self.adapted_fraction = adapted_fraction
        try:
            return model(**inputs)
        finally:
            self.adapted_fraction = 1.0

    def __call__(self, **inputs):
        """The junior alone: the adapter applies to no row."""
        return self._run(self.senior.get_base_model(), 0.0, **inputs)

    def base_model(self, **inputs):
        """The junior below its output layer, as reinforce.completion_logprobs needs it."""
        return self._run(self.senior.get_base_model().base_model, 0.0, **inputs)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.senior.get_base_model().get_output_embeddings()

    def beside_senior(self, **inputs):
        """One forward pass for both: the first half of the rows is the senior's, the second half the junior's."""
        return self._run(self.senior.get_base_model(), 0.5, **inputs)


# ----------------------------------------------------------------------------------------------------------------------
# From text to padded batches


def encode_prompts(tokenizer, prompts: list[str], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded (ids, mask) of B prompts, (B, P) each."""
    # A chat template has already written the start token; it must not be added twice.
    has_start = tokenizer.bos_token is not None and prompts[0].startswith(tokenizer.bos_token)
    return pad(tokenizer(prompts, add_special_tokens=not has_start).input_ids, tokenizer, "left", device)


def pad(rows: list[list[int]], tokenizer, side: str, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) of token lists of different lengths, padded on one side ("left" or "right") to (B, longest)."""
    padded = partial(pad_sequence, batch_first=True, padding_side=side)
    # Any id would do as padding: masks are kept, never guessed from ids.
    ids = padded([torch.tensor(row) for row in rows], padding_value=tokenizer.eos_token_id)
    mask = padded([torch.ones(len(row), dtype=torch.long) for row in rows])
    return ids.to(device), mask.to(device)
