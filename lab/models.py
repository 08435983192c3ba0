"""Loading the pair: a trained senior and a frozen junior over one vocabulary.

The senior is a frozen base under a LoRA adapter, optionally with 4-bit weights (QLoRA: Dettmers et
al., 2023); West et al. (2025) use rank 16, alpha 16 and all linear layers. If --senior and --junior
are the same checkpoint, its weights are loaded once: the junior is that base with the adapter off,
and one forward pass can serve both (SharedJunior). Otherwise the junior is a second model.

Memory in GiB, estimated for one rollout batch of 31 x (200 + 256) tokens and updates of 8,192:

    pair                                weights   adapter, AdamW   rollout   update
    tiny base, float32                    0.002            0.001      0.15     0.20
    SmolLM2-135M, float32                  0.5              0.1       1.2      6.9
    Qwen2.5 1.5B and 0.5B, bfloat16        4.1              0.3       2.0      5.0
    two Llama-2-7B, 4 bits, checkpointing  7.2              0.4      14.7      4.6

Before anything long, a pair is tried out: what lab/engine.py does with it is compared with plain
forward passes, and architectures for which they differ are refused. No code of a checkpoint is run.
"""

import math
import warnings
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch.utils.checkpoint import checkpoint as recompute
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    logging,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lab import engine, runs
from lab import problems as tasks
from rollout import Pair

# What transformers reports while it loads is not about this project.
logging.set_verbosity_error()
logging.disable_progress_bar()
# It is peft that still asks for this attribute by its old name.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")


def check_before_loading(todo: list[Namespace]) -> None:
    """Everything about models and problems that can be checked without loading a model.

    Sets `base` in the flags of every run: which base this is, for config.json and --resume.
    Raises ValueError or OSError that names what is wrong.
    """
    args = todo[0]
    names = [checkpoint(name) for name in (args.senior, args.junior)]
    tokenizers = load_tokenizers(*names)
    contexts = [load(AutoConfig, name).get_text_config() for name in names]
    contexts = [getattr(config, "max_position_embeddings", None) or math.inf for config in contexts]
    base = identity(names[0])
    seen = set()
    for run in todo:
        run.base = base
        run.bfloat16 = run.device != "cpu" if run.bfloat16 is None else run.bfloat16
        asked = (run.senior_language, run.junior_language, run.seed, run.validation)
        asked += (run.updates, run.batch, run.eval_problems, run.specialist_steps)
        if asked in seen:
            continue  # runs that differ in other flags have the same prompts
        seen.add(asked)
        problems = [problem for of_split in tasks.load_problems(run) for problem in of_split]
        pair = Pair(None, None, *tokenizers, [], [])
        for (tokenizer, texts), name, context in zip(
            tasks.prompts_of_pair(problems, run, pair), names, contexts
        ):
            longest = max(map(len, encode(tokenizer, texts)))
            if longest + run.max_new_tokens > context:
                reason = f"{longest} tokens of prompt and {run.max_new_tokens} new ones"
                remedy = "lower --max-new-tokens, or choose another model"
                raise ValueError(f"{name}: {reason} exceed its context of {context}: {remedy}")


TINY = Path(__file__).with_name("tiny_base")  # the shipped base, see lab/tiny.py


def checkpoint(name: str) -> str:
    """The hub id or folder that --senior or --junior names: "tiny" is the shipped base."""
    return str(TINY) if name == "tiny" else name


def identity(folder: Path | str = TINY) -> str:
    """The name of a base: "tiny-" and a checksum if lab/tiny.py made it, else its own name."""
    note = Path(folder) / "made.json"
    if not note.is_file():
        return Path(folder).name
    return "tiny-" + runs.read_back(note, checksum=str)["checksum"][:12]


def load_tokenizers(senior: str, junior: str) -> list:
    """Both tokenizers. Raises ValueError unless they are the same vocabulary, and as wide logits.

    Ids beyond the logits are ignored: some tokenizers have padding that the model never writes.
    """
    tokenizers = [load(AutoTokenizer, name) for name in (senior, junior)]
    widths = [load(AutoConfig, name).get_text_config().vocab_size for name in (senior, junior)]
    vocabularies = [
        {token: i for token, i in tokenizer.get_vocab().items() if i < width}
        for tokenizer, width in zip(tokenizers, widths)
    ]
    if vocabularies[0] != vocabularies[1]:
        differ = len(set(vocabularies[0].items()) ^ set(vocabularies[1].items()))
        sizes = " and ".join(str(len(vocabulary)) for vocabulary in vocabularies)
        reason = f"{senior} and {junior} have {sizes} tokens, and {differ} entries differ"
        raise ValueError(f"senior and junior must share one tokenizer, but {reason}")
    if widths[0] != widths[1]:
        reason = f"{senior} has {widths[0]}, {junior} {widths[1]}"
        raise ValueError(f"senior and junior must have logits of one width: {reason}")
    return tokenizers


def load_pair(args: Namespace) -> Pair:
    """Load the pair, the senior under a fresh adapter, which changes nothing until it is trained.

    Raises ValueError for a missing, incomplete or unsupported checkpoint.
    """
    names = [checkpoint(name) for name in (args.senior, args.junior)]
    return make_pair(*names, args)


def make_pair(senior: str, junior: str, args: Namespace) -> Pair:
    tokenizers = load_tokenizers(senior, junior)
    base = load_model(senior, args)
    other = base if senior == junior else load_model(junior, args)
    if None in [tokenizer.eos_token_id for tokenizer in tokenizers]:
        raise ValueError(f"{senior}, {junior}: a tokenizer has no end token: set its eos_token")
    # A chat model may end its turn with another token than the end token of its tokenizer.
    end_ids = {tokenizer.eos_token_id for tokenizer in tokenizers}
    for model in (base, other):
        listed = model.generation_config.eos_token_id
        end_ids |= set(listed if isinstance(listed, list) else [listed]) - {None}
    pieces = token_bytes(tokenizers[0], base.config.get_text_config().vocab_size, end_ids)
    about = f"{senior} ({type(base).__name__})"
    try:
        model = disable_dropout(add_adapter(base, args.rank))
    except ValueError as error:
        raise ValueError(f"{about} cannot be given an adapter ({error})") from error
    if args.checkpointing:
        enable_checkpointing(model)
    shared = SharedJunior(model) if other is base else None
    both = shared.beside_senior if shared else None
    pair = Pair(model, shared or other, *tokenizers, sorted(end_ids), pieces, both)
    check_decoding(pair, about)
    return pair


def load_model(name: str, args: Namespace):
    """One frozen causal language model in bfloat16 or float32, with NF4 weights if --four-bit."""
    dtype = torch.bfloat16 if args.bfloat16 else torch.float32
    options = {"dtype": dtype, "device_map": {"": args.device}}
    if args.four_bit:
        nf4 = dict(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        nf4 |= dict(load_in_4bit=True, bnb_4bit_compute_dtype=dtype)
        options["quantization_config"] = BitsAndBytesConfig(**nf4)
    if (Path(name) / "generation_config.json").is_file():
        # transformers would go on without the end tokens of a file that it cannot read.
        load(GenerationConfig, name)
    model, report = load(AutoModelForCausalLM, name, **options, output_loading_info=True)
    if report["missing_keys"]:
        # transformers would go on with random numbers in their place.
        missing = sorted(report["missing_keys"])[0]
        raise ValueError(f"{name}: the checkpoint lacks weights such as {missing}: save it again")
    return disable_dropout(model.requires_grad_(False))


def load(kind, name: str, **options):
    """kind.from_pretrained, with a remedy in its error. `kind`: an Auto class of transformers."""
    try:
        return kind.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:
        # A damaged or hostile file makes the libraries raise nearly anything.
        reason = f"{type(error).__name__}: {str(error).splitlines()[:1]}"[:200]
        if Path(name).is_absolute() and not Path(name).exists():
            reason = "there is no such folder"
        elif Path(name).is_dir() and not (Path(name) / "config.json").is_file():
            reason = "the folder has no config.json"
        remedy = "Name a local folder or a hub id that can be reached, or use --preset tiny"
        raise ValueError(f"cannot load {name!r} ({reason}). {remedy}") from error


def check_decoding(pair: Pair, about: str) -> None:
    """Raises ValueError unless lab/engine.py agrees with plain forward passes of the pair.

    The comparison is made under a random adapter. In bfloat16 an unlucky one amplifies rounding, so
    three are tried, and the pair is refused unless most of them agree.
    """
    in_float32 = pair.senior.dtype == torch.float32
    tolerance, num_adapters = (1e-3, 1) if in_float32 else (0.1, 3)
    try:
        compared = [compare_with_plain_passes(pair, seed) for seed in range(num_adapters)]
    except Exception as error:
        # Whatever goes wrong here would go wrong in the first rollout.
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{about} cannot be decoded step by step here ({reason})") from error
    for what in compared[0]:
        distances = [distance_of[what] for distance_of in compared]
        # A distance that is nan is not below the tolerance.
        if sum(distance < tolerance for distance in distances) <= num_adapters / 2:
            found = f"total variation distance {max(distances):.2g}"
            raise ValueError(f"{about} {what} ({found}). Choose another model")


@torch.no_grad()
def compare_with_plain_passes(pair: Pair, seed: int) -> dict[str, float]:
    """What may be wrong with a pair: the distance between our numbers and a plain pass, for each.

    Compared are one left-padded, cached step of both models, and the output layer on top of the
    hidden states. A fresh adapter does nothing, so here it gets random weights.
    """
    prompts, written, device = [[1, 2, 3, 4, 5], [3, 2, 1]], [6, 5], pair.senior.device
    reset_adapter(pair.senior, seed)
    layers = [module for module in pair.senior.modules() if isinstance(module, LoraLayer)]
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        up = layer.lora_B["default"].weight
        up.copy_(0.1 * torch.randn(up.shape, generator=generator))
    try:
        decoder = engine.Decoder(pair, prompts, prompts, 1, 0.5, device)
        decoder.step(written)
        cached = torch.cat(decoder.logits)  # (2 * rows, V), the senior's first
        whole = [[*row, token] for row, token in zip(prompts, written)]
        texts = [torch.tensor([row], device=device) for row in whole]
        plain = [pair.senior(input_ids=ids).logits[0, -1] for ids in texts]
        plain += [pair.junior(input_ids=ids).logits[0, -1] for ids in texts]
        base = pair.senior.get_base_model()
        head = base.get_output_embeddings()
        scored = [head(base.base_model(input_ids=ids)[0])[0, -1] for ids in texts]
    finally:
        reset_adapter(pair.senior, seed)
    pairs = {
        "scales or caps its logits after the output layer": (torch.stack(scored), plain[:2]),
        "decodes something else with a cache and padding": (cached, plain),
    }
    found = {}
    for what, (ours, theirs) in pairs.items():
        difference = ours.float().softmax(-1) - torch.stack(theirs).float().softmax(-1)
        found[what] = difference.abs().sum(-1).max().item() / 2
    return found


# ------------------------------------------------------------------------------------------------
# The adapter


def add_adapter(base, rank: int) -> PeftModel:
    """The senior: the base under a fresh adapter on all linear layers."""
    options = dict(target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    return get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, **options))


def reset_adapter(senior: PeftModel, seed: int) -> None:
    """Reinitialise the adapter: A random and B zero, so that the senior equals its base."""
    torch.manual_seed(seed)
    for module in senior.modules():
        if isinstance(module, LoraLayer):
            module.reset_lora_parameters("default", init_lora_weights=True)


def trainable_parameters(model) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def make_optimizer(senior, args: Namespace) -> torch.optim.Optimizer:
    """AdamW without weight decay, in 8 bits where the preset says so."""
    kind = torch.optim.AdamW
    if args.eight_bit_adam:
        from bitsandbytes.optim import PagedAdamW8bit as kind
    optimizer = kind(trainable_parameters(senior), lr=args.lr, weight_decay=0.0)
    # All runs of a process share one model, and one that was stopped may have left a gradient.
    optimizer.zero_grad()
    return optimizer


def disable_dropout(model):
    """Evaluation mode, in training too: the scored policy must be the one that was sampled.

    4-bit layers stay in training mode. They have no dropout, and in evaluation mode bitsandbytes
    repacks their weights on some CPUs for a kernel that has no gradient.
    """
    model.eval()
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.train()
    return model


def enable_checkpointing(model) -> None:
    """Keep only the input of each layer, and run the layer again when its gradient is due.

    The version of transformers works in training mode only, in which dropout would be on.
    """

    def checkpointed(forward, *args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return recompute(forward, *args, use_reentrant=False, **kwargs)

    # The decoder layers are the longest ModuleList of a causal language model.
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    for layer in max(lists, key=len):
        layer.forward = partial(checkpointed, layer.forward)


class SharedJunior:
    """The junior of a shared checkpoint: the senior's weights without the adapter.

    Every LoRA layer is patched so that its adapter applies to a leading fraction of the batch only.
    Outside the methods below the fraction is 1, so that training sees an ordinary PeftModel.
    """

    def __init__(self, senior: PeftModel):
        self.senior, self.adapted_fraction = senior, 1.0
        for layer in senior.modules():
            if isinstance(layer, LoraLayer):
                layer.forward = partial(self._layer_forward, layer, layer.forward)

    def _layer_forward(self, layer, peft_forward, x: torch.Tensor, *args, **kwargs):
        """W x for all rows; + scaling * B A x for the leading rows, which are the senior's."""
        if self.adapted_fraction == 1:
            return peft_forward(x, *args, **kwargs)
        if x.dim() != 3:
            # Layers of experts flatten batch and sequence, so that there are no leading rows.
            raise ValueError(f"layers with inputs of shape {tuple(x.shape)} are not supported")
        out = layer.base_layer(x, *args, **kwargs)
        adapted = x[: int(self.adapted_fraction * len(x))]
        if len(adapted):
            down, up = layer.lora_A["default"], layer.lora_B["default"]
            update = up(down(adapted.to(down.weight.dtype))) * layer.scaling["default"]
            out[: len(adapted)] += update
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
        """The junior below its output layer, as engine.completion_logprobs needs it."""
        return self._run(self.senior.get_base_model().base_model, 0.0, **inputs)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.senior.get_base_model().get_output_embeddings()

    def beside_senior(self, **inputs):
        """One pass for both: the first half of the rows is the senior's, the rest the junior's."""
        return self._run(self.senior.get_base_model(), 0.5, **inputs)


# ------------------------------------------------------------------------------------------------
# Text and tokens


def encode(tokenizer, texts: list[str]) -> list[list[int]]:
    """Prompts as token ids."""
    # A chat template has already written the start token; it must not be added twice.
    has_start = tokenizer.bos_token is not None and texts[0].startswith(tokenizer.bos_token)
    return tokenizer(texts, add_special_tokens=not has_start).input_ids


def token_bytes(tokenizer, vocab_size: int, end_ids=()) -> list[bytes]:
    """The bytes that each id writes: a list of length V (`vocab_size`, the width of the logits).

    Special tokens, tokens that end a text (end_ids) and unused ids write nothing. Two encodings are
    supported: byte-level BPE (GPT-2, Llama 3, Qwen), in which every byte is one printable
    character, and SentencePiece (Llama 2), in which "▁" is a space and "<0xE4>" a byte. Raises
    ValueError if a short test sentence is not decoded to what was encoded.
    """
    tokens = tokenizer.convert_ids_to_tokens(list(range(min(vocab_size, len(tokenizer)))))
    # Some end tokens, such as <|eot_id|> of Llama 3, are special without being listed as such.
    added = tokenizer.added_tokens_decoder
    silent = {i for i, token in added.items() if token.special}
    silent |= {*tokenizer.all_special_ids, *end_ids}
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    # Byte-level BPE never writes "▁" itself, whose three bytes it spells separately.
    is_sentencepiece = any(token.startswith("▁") for token in tokens if token)

    def spell(i: int, token: str) -> bytes:
        if is_sentencepiece and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:-1], 16)])
        # A token that was added by hand is plain text, even in a byte-level vocabulary.
        if is_sentencepiece or i in added or any(character not in byte_of for character in token):
            return token.replace("▁", " ").encode()
        return bytes(byte_of[character] for character in token)

    pieces = [
        b"" if token is None or i in silent else spell(i, token) for i, token in enumerate(tokens)
    ]
    pieces += [b""] * (vocab_size - len(pieces))
    # Some tokenizers drop spaces, so that words could not be told apart. (SentencePiece adds one.)
    sentence = "A word, 48 words"
    ids = tokenizer(sentence, add_special_tokens=False).input_ids
    if b"".join(pieces[i] for i in ids).strip() != sentence.encode():
        reason = f"the tokens of {tokenizer.name_or_path} do not encode their spaces"
        raise ValueError(f"no words can be told apart: {reason}. Choose another model")
    return pieces
