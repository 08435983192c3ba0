"""Loading the pair: a trained senior and a frozen junior over one vocabulary.

The senior is a frozen base under a LoRA adapter, optionally with 4-bit weights (QLoRA: Dettmers et
al., 2023); West et al. (2025) use rank 16, alpha 16 and all linear layers. If --senior and --junior
are the same checkpoint, its weights are loaded once: the junior is that base with the adapter off,
and one forward pass can serve both (SharedJunior). Otherwise the junior is a second model.

Memory, measured once: with Qwen2.5 1.5B and 0.5B in bfloat16 on a CPU, and updates in parts of
1,024 tokens, the peak of the process is 17 GB.

Before anything long, a pair is tried out: what lab/engine.py does with it is compared with plain
forward passes, and architectures for which they differ are refused. No Python code of a checkpoint
is run.
"""

import hashlib
import math
import os
import re
import warnings
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch.utils.checkpoint import checkpoint as recompute
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lab import engine
from lab import problems as tasks
from rollout import Pair

# What transformers reports while it loads is not about this project.
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
# It is peft that still asks for this attribute by its old name.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")

# ------------------------------------------------------------------------------------------------
# Before loading


# What a run asks its models depends on these flags alone.
ASKED = "senior_language junior_language seed shots validation updates batch eval_problems".split()
ASKED += "rollouts_per_prompt specialist_steps specialist_batch max_new_tokens measures".split()


def check_before_loading(todo: list[Namespace]) -> None:
    """Everything about models and problems that can be checked without loading a model.

    Sets `base`, `junior_base` and `problems_checksum` in the flags of every run: which weights and
    problems these are, for config.json and --resume. Raises ValueError or OSError that names what
    is wrong.
    """
    names = [checkpoint(name) for name in (todo[0].senior, todo[0].junior)]
    tokenizers, contexts, vocab_size = load_tokenizers(*names)
    identities = [identity(name) for name in names]
    files = [Path(todo[0].problems).expanduser() / f"{split}.jsonl" for split in ("train", "test")]
    files += [tasks.PATTERNS_FILE] if todo[0].problems == tasks.GENERATED else []
    for run in todo:
        run.base, run.junior_base = identities
        # Resumed, a run must not go on with other problems. (Of a hub id nothing is known here.)
        run.problems_checksum = checksum([path for path in files if path.is_file()])
        run.bfloat16 = run.device != "cpu" if run.bfloat16 is None else run.bfloat16
    pair = Pair(None, None, *tokenizers, [], [])
    for run in {tuple(vars(run)[flag] for flag in ASKED): run for run in todo}.values():
        problems = [problem for of_split in tasks.load_problems(run) for problem in of_split]
        prompts = tasks.prompts_of_pair(problems, run, pair)
        # The junior also goes on after the senior's solutions (lab/measures.py).
        new = run.max_new_tokens * (2 if run.measures else 1)
        for name, context, asked in zip(names, contexts, prompts):
            check_texts(name, *asked, vocab_size, context - new)
        taught = tasks.annotated_solutions(run)[: run.specialist_steps * run.specialist_batch]
        texts = [f"{prompt} {solution}" for prompt, solution in taught]
        # Every solution is followed by an end token.
        check_texts(names[0], tokenizers[0], texts, vocab_size, contexts[0] - 1)


def check_texts(name: str, tokenizer, texts: list[str], vocab_size: int, longest: float) -> None:
    """Raises ValueError unless every text has at most `longest` tokens, all below vocab_size."""
    if len(tokenizer) <= vocab_size:
        # A text has at most as many tokens as bytes, but for a few special ones. So hardly any text
        # needs to be tokenized here.
        texts = [text for text in texts if len(text.encode()) + 8 > longest]
    for text in texts:
        (ids,), where = encode(tokenizer, [text]), f"{name} for {text[-60:]!r}"
        if len(ids) > longest:
            reason = f"{len(ids)} tokens exceed the {longest} for which its context has room"
            raise ValueError(f"{where}: {reason}: shorten this, or lower --max-new-tokens")
        if max(ids) >= vocab_size:
            token = tokenizer.convert_ids_to_tokens(max(ids))
            raise ValueError(f"{where}: a model lacks the token {token!r}: resize its embeddings")


TINY = Path(__file__).with_name("tiny_base")  # the shipped base, see lab/tiny.py


def checkpoint(name: str) -> str:
    """The hub id or folder that --senior or --junior names: "tiny" is the shipped base."""
    return str(TINY) if name == "tiny" else os.path.expanduser(name)


def identity(name: str | Path = TINY) -> str:
    """A readable name of a checkpoint that changes with its weights.

    Of a folder: its name and a checksum of configurations, tokenizer, chat template and parts of
    the weights, which training changes everywhere. Of a hub id: its commit.
    """
    folder = Path(name).resolve()
    if not folder.is_dir():
        config = transformers.utils.cached_file(str(name), "config.json")
        return f"{folder.name}-{Path(config).parent.name[:8]}"  # .../snapshots/COMMIT/config.json
    kinds = ("*config.json", "tokenizer.json", "chat_template*", "*.safetensors", "*.bin")
    files = [path for kind in kinds for path in sorted(folder.glob(kind))]
    return f"{folder.name}-{checksum(files)[:8]}"


def checksum(files: list[Path]) -> str:
    """SHA-256 of files. Of a large one, 16 MB are read, in pieces from its beginning to its end."""
    digest, piece = hashlib.sha256(), 2**14
    for path in files:
        with path.open("rb") as file:
            size = path.stat().st_size
            for start in range(0, size, max(piece, size // 1024)):
                file.seek(start)
                digest.update(file.read(piece))
    return digest.hexdigest()


def load_tokenizers(*names: str) -> tuple[list, list, int]:
    """(tokenizers, maximum lengths, V) of the pair. Raises ValueError unless it has one vocabulary.

    Ids beyond the logits are ignored: some tokenizers have padding that the model never writes.
    """
    tokenizers = [load(AutoTokenizer, name) for name in names]
    configs = [load(AutoConfig, name).get_text_config() for name in names]
    # Beyond the second limit, some models rotate positions otherwise, also those that are cached.
    limits = ("max_position_embeddings", "original_max_position_embeddings")
    contexts = [min(getattr(c, limit, None) or math.inf for limit in limits) for c in configs]
    # Within a family, logits may be padded to different widths. Both are cut to the smaller.
    vocab_size = min(config.vocab_size for config in configs)
    one, other = (set(tokenizer.get_vocab().items()) for tokenizer in tokenizers)
    if differ := len([i for _, i in one ^ other if i < vocab_size]):
        sizes = f"{len(tokenizers[0])} and {len(tokenizers[1])} tokens, and {differ} entries differ"
        raise ValueError(f"{' and '.join(names)} must share one tokenizer, but have {sizes}")
    for name, tokenizer in zip(names, tokenizers):
        if tokenizer.eos_token_id not in range(vocab_size):
            lacks = f"a model lacks the end token {tokenizer.eos_token}"
            raise ValueError(f"{name}: {lacks}: set eos_token, or choose another model")
    return tokenizers, contexts, vocab_size


# ------------------------------------------------------------------------------------------------
# Loading


def load_pair(args: Namespace) -> Pair:
    """Load the pair, the senior under a fresh adapter, which changes nothing until it is trained.

    Raises ValueError for a missing, incomplete or unsupported checkpoint.
    """
    senior, junior = checkpoint(args.senior), checkpoint(args.junior)
    tokenizers, _, vocab_size = load_tokenizers(senior, junior)
    base = load_model(senior, args)
    other = base if senior == junior else load_model(junior, args)
    # A chat model may end its turn with another token than the end token of its tokenizer.
    end_ids = {tokenizer.eos_token_id for tokenizer in tokenizers}
    for model in (base, other):
        listed = model.generation_config.eos_token_id
        end_ids |= set(listed if isinstance(listed, list) else [listed]) - {None}
    pieces = token_bytes(tokenizers[0], vocab_size, end_ids)
    try:
        for model in (base, other):
            cut_logits(model, vocab_size)
        model = add_adapter(base, args.rank)
        if args.checkpointing:
            enable_checkpointing(model)
        shared = SharedJunior(model) if other is base else None
        both = shared.beside_senior if shared else None
        pair = Pair(model, shared or other, *tokenizers, sorted(end_ids), pieces, both)
        check_decoding(pair)
    except Exception as error:
        # Whatever goes wrong here would go wrong in the first rollout.
        about = f"{senior} with {junior} ({type(base).__name__}) cannot be trained here"
        raise ValueError(f"{about} ({error!r:.200}): choose another model") from error
    return pair


def loading_options(dtype: torch.dtype, device: str, four_bit: bool) -> dict:
    """Arguments of from_pretrained; with four_bit, linear layers have NF4 weights."""
    options = {"dtype": dtype, "device_map": {"": device}}
    if four_bit:
        nf4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        options["quantization_config"] = BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=dtype)
    return options


def load_model(name: str, args: Namespace):
    """One frozen causal language model in bfloat16 or float32, with NF4 weights if --four-bit."""
    dtype = torch.bfloat16 if args.bfloat16 else torch.float32
    options = loading_options(dtype, args.device, args.four_bit)
    if (Path(name) / "generation_config.json").is_file():
        # transformers would go on without the end tokens of a file that it cannot read.
        load(transformers.GenerationConfig, name)
    model, report = load(AutoModelForCausalLM, name, **options, output_loading_info=True)
    if report["missing_keys"]:
        # transformers would go on with random numbers in their place.
        missing = sorted(report["missing_keys"])[0]
        raise ValueError(f"{name}: the checkpoint lacks weights such as {missing}: save it again")
    return disable_dropout(model.requires_grad_(False))


def load(kind, name: str, **options):
    """kind.from_pretrained, with a remedy in its error. `kind`: an Auto class of transformers."""
    try:
        if transformers.utils.find_adapter_config_file(name):
            # transformers would load it on top of the weights beside it, or of the base it names.
            raise ValueError("it holds an adapter: merge it (peft: merge_and_unload) and save that")
        return kind.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:
        # A damaged or hostile file makes the libraries raise nearly anything.
        is_missing = Path(name).is_absolute() and not Path(name).exists()
        reason = "there is no such folder" if is_missing else f"{error!r:.200}"
        remedy = "Name a local folder or a hub id that can be reached, or use --preset tiny"
        raise ValueError(f"cannot load {name!r} ({reason}). {remedy}") from error


def cut_logits(model, vocab_size: int) -> None:
    """Drop the rows of the output layer beyond vocab_size. An embedding tied to it keeps them."""
    head = model.get_output_embeddings()
    for name, rows in list(head.named_parameters()):
        if len(rows) > vocab_size:
            setattr(head, name, torch.nn.Parameter(rows[:vocab_size], requires_grad=False))


def check_decoding(pair: Pair) -> None:
    """Raises ValueError unless lab/engine.py agrees with plain forward passes of the pair.

    Architectures that scale or cap their logits after the output layer do not, nor do those that
    decode otherwise with a cache. The comparison is made under a random adapter. An unlucky one
    amplifies the rounding of bfloat16, so the median of three counts.
    """
    distances = torch.tensor([compare_with_plain_passes(pair, seed) for seed in range(3)])
    decoded, scored = distances.median(0).values.tolist()
    # The output layer reads equal hidden states, so that its rounding is equal too. A distance may
    # be nan.
    if not (decoded < (1e-3 if pair.senior.dtype == torch.float32 else 0.1) and scored < 1e-3):
        differs = "it does not compute what a forward pass without cache and padding does"
        raise ValueError(f"{differs}: total variation distances {decoded:.2g}, {scored:.2g}")


@torch.no_grad()
def compare_with_plain_passes(pair: Pair, seed: int) -> tuple[float, float]:
    """Total variation distances between our distributions and those of plain passes.

    The first is the largest of one left-padded, cached step of both models, the second is that of
    the output layer on top of the senior's hidden states. A fresh adapter does nothing, so here it
    gets random weights.
    """
    prompts_by_role = [[1, 2, 3, 4, 5], [3, 2, 1]], [[4, 2], [6, 5, 3, 1]]
    reset_adapter(pair.senior, seed)
    for layer in lora_layers(pair.senior):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    decoder = engine.Decoder(pair, *prompts_by_role, 1, 0.5, pair.senior.device)
    decoder.step([6, 6])
    theirs = []
    for model, prompts in zip((pair.senior, pair.junior), prompts_by_role):
        for prompt in prompts:
            ids = torch.tensor([[*prompt, 6]], device=pair.senior.device)
            theirs.append(model(input_ids=ids).logits[:, -1])
    base, ids = pair.senior.get_base_model(), torch.tensor([[3, 2, 1, 6]], device=ids.device)
    scored = base.get_output_embeddings()(base.base_model(input_ids=ids)[0])[:, -1]
    reset_adapter(pair.senior, seed)
    ours, theirs = torch.cat([*decoder.logits, scored]), torch.cat([*theirs, theirs[1]])  # (5, V)
    difference = ours.float().softmax(-1) - theirs.float().softmax(-1)
    *decoded, scored = difference.abs().sum(-1).tolist()
    return max(decoded) / 2, scored / 2


# ------------------------------------------------------------------------------------------------
# The adapter


def add_adapter(base, rank: int) -> PeftModel:
    """The senior: the base under a fresh adapter on all linear layers."""
    options = dict(target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    return get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, **options))


def reset_adapter(senior: PeftModel, seed: int) -> None:
    """Reinitialise the adapter: A random and B zero, so that the senior equals its base."""
    torch.manual_seed(seed)
    for layer in lora_layers(senior):
        layer.reset_lora_parameters("default", init_lora_weights=True)


def lora_layers(senior: PeftModel) -> list[LoraLayer]:
    return [module for module in senior.modules() if isinstance(module, LoraLayer)]


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
    # The decoder layers are the longest ModuleList of a causal language model.
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    for layer in max(lists, key=len):
        # Without dropout, a layer draws no random numbers.
        options = dict(use_reentrant=False, preserve_rng_state=False)
        layer.forward = partial(recompute, layer.forward, **options)


class SharedJunior:
    """The junior of a shared checkpoint: the senior's weights without the adapter.

    Every LoRA layer is patched so that its adapter applies to a leading fraction of the batch only.
    Outside the methods below the fraction is 1, so that training sees an ordinary PeftModel.
    """

    def __init__(self, senior: PeftModel):
        self.base, self.adapted_fraction = senior.get_base_model(), 1.0
        for layer in lora_layers(senior):
            layer.forward = partial(self._layer_forward, layer, layer.forward)
        # The two parts of the junior that engine.completion_logprobs runs.
        self.base_model = partial(self._run, self.base.base_model, 0.0)
        self.get_output_embeddings = self.base.get_output_embeddings
        # One pass for both: the first half of the rows is the senior's, the rest the junior's.
        self.beside_senior = partial(self._run, self.base, 0.5)

    def __call__(self, **inputs):
        """The junior alone: the adapter applies to no row."""
        return self._run(self.base, 0.0, **inputs)

    def _run(self, model, adapted_fraction: float, **inputs):
        self.adapted_fraction = adapted_fraction
        try:
            return model(**inputs)
        finally:
            self.adapted_fraction = 1.0

    def _layer_forward(self, layer, peft_forward, x: torch.Tensor, *args, **kwargs):
        """W x for all rows; + scaling * B A x for the leading rows, which are the senior's."""
        if self.adapted_fraction == 1:
            return peft_forward(x, *args, **kwargs)
        out, rows = layer.base_layer(x, *args, **kwargs), x[: int(self.adapted_fraction * len(x))]
        if len(rows):
            down, up = layer.lora_A["default"], layer.lora_B["default"]
            out[: len(rows)] += up(down(rows.to(down.weight.dtype))) * layer.scaling["default"]
        return out


# ------------------------------------------------------------------------------------------------
# Text and tokens


def encode(tokenizer, texts: list[str]) -> list[list[int]]:
    """Prompts as token ids, which the tokenizer may begin, but not end, with tokens of its own.

    Where a text spells a special token, such as "</s>", it becomes that token. Chat templates rely
    on it, so a problem should not contain one.
    """
    encoded = tokenizer(texts, return_special_tokens_mask=True)
    for ids, is_added in zip(encoded.input_ids, encoded.special_tokens_mask):
        start = is_added.index(0)
        if ids[:start] == ids[start : 2 * start]:
            # A chat template has already written the start tokens.
            del ids[:start]
        # Some tokenizers append an end token, after which nothing would be written.
        while is_added.pop():
            ids.pop()
    return encoded.input_ids


def token_bytes(tokenizer, vocab_size: int, end_ids=()) -> list[bytes]:
    """The bytes that each id writes: a list of length V (`vocab_size`, the width of the logits).

    Special tokens, tokens that end a text (end_ids) and unused ids write nothing. Two encodings are
    supported: byte-level BPE (GPT-2, Llama 3, Qwen), in which every byte is one printable
    character, and SentencePiece (Llama 2), in which "▁" is a space and "<0xE4>" a byte. Raises
    ValueError if a short test sentence is not decoded to what was encoded.
    """
    tokens = tokenizer.convert_ids_to_tokens(list(range(min(vocab_size, len(tokenizer)))))
    added = tokenizer.added_tokens_decoder
    # Some end tokens, such as <|eot_id|> of Llama 3, are special without being listed as such.
    silent = {i for i, token in added.items() if token.special}
    silent |= {*tokenizer.all_special_ids, *end_ids}
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    # Byte-level BPE never writes "▁" itself, whose three bytes it spells separately.
    own = [token for i, token in enumerate(tokens) if token and i not in added]
    is_sentencepiece = any(token.startswith("▁") for token in own)
    pieces = [b""] * vocab_size
    for i, token in enumerate(tokens):
        if token is None or i in silent:
            continue
        if is_sentencepiece and re.fullmatch("<0x[0-9A-F]{2}>", token):
            pieces[i] = bytes.fromhex(token[3:-1])
        elif is_sentencepiece or i in added or not set(token) <= byte_of.keys():
            # A token that was added by hand is plain text, even in a byte-level vocabulary.
            pieces[i] = (token.replace("▁", " ") if is_sentencepiece else token).encode()
        else:
            pieces[i] = bytes(byte_of[character] for character in token)
    # Some tokenizers drop spaces, so that words could not be told apart. (SentencePiece adds one.)
    sentence = "A word, 48 words"
    ids = tokenizer(sentence, add_special_tokens=False).input_ids
    if b"".join(pieces[i] for i in ids).strip() != sentence.encode():
        reason = f"the tokens of {tokenizer.name_or_path} do not encode their spaces"
        raise ValueError(f"no words can be told apart: {reason}. Choose another model")
    return pieces
