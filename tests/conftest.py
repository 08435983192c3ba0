"""Random tiny models. initializer_range=0.3 makes their distributions sharp, so mistakes show."""

# ruff: noqa: I001  the order of these imports matters
import os
from argparse import Namespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries read it: no test waits for a network

import lab  # noqa: F401  before torch: it sets how threads wait
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast

from lab.experiments import DEFAULTS
from lab.models import SharedJunior, add_adapter, load_pair, lora_layers, token_bytes
from lab.models import trainable_parameters
from rollout import Pair, Rollouts, random_numbers, rollout

torch.set_num_threads(1)  # models this small gain nothing from more threads
TEXT = ["Natalia sold 48 clips in April, schön. l'eau 三个\n"] * 4
TEXT += ["In 48/2 = <<48/2=24>>24 days! She sold half as many.\n"] * 4


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with leading spaces, about 330 tokens, all 256 bytes among them."""
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    options = dict(vocab_size=330, special_tokens=["<pad>", "</s>"])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast.train_from_iterator(TEXT, trainers.BpeTrainer(initial_alphabet=alphabet, **options))
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="</s>")


@pytest.fixture(scope="session")
def tokenizer():
    return byte_level_tokenizer()


@pytest.fixture(scope="session")
def sentencepiece():
    """The spelling of Llama 2: "▁" is a space, <0xE4> a byte of a character without a token."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", *sorted(set("Awordswl482,NatiaschönBC/=<>.")), "▁4", "▁48", "▁w"]
    merges = [("▁", "4"), ("▁4", "8"), ("▁", "w")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    fast = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    fast.normalizer = normalizers.Sequence(spaces)
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>")


COMMON = dict(initializer_range=0.3, bos_token_id=None, eos_token_id=1, pad_token_id=0)


def llama(vocab_size: int, seed: int, dtype=torch.float32):
    torch.manual_seed(seed)
    # 64 is the smallest width that 4-bit blocks fit.
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    config = LlamaConfig(vocab_size=vocab_size, max_position_embeddings=1024, **sizes, **COMMON)
    return LlamaForCausalLM(config).to(dtype).eval()


def gpt2(vocab_size: int, seed: int, dtype=torch.float32):
    torch.manual_seed(seed)
    sizes = dict(n_embd=32, n_layer=2, n_head=2, n_positions=256)
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, **sizes, **COMMON)).to(dtype).eval()


@pytest.fixture(params=[llama, gpt2], ids=["llama", "gpt2"])
def make_model(request):
    """Rotary and absolute positions: only the latter notice positions that ignore left padding."""
    return request.param


def save_base(folder, tokenizer) -> str:
    """A random Llama with its tokenizer, saved as a checkpoint."""
    llama(len(tokenizer), seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def base_folder(tokenizer, tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"), tokenizer)


def load(senior, junior=None, **changes) -> Pair:
    """The pair of these checkpoints; without the second, both are the first."""
    flags = {"senior": str(senior), "junior": str(junior or senior), "device": "cpu"}
    flags |= {"rank": 4, "bfloat16": False} | changes
    return load_pair(Namespace(**DEFAULTS | flags))


def fill_adapter(senior, std: float) -> None:
    """An adapter that does something: B is zero at the start."""
    for layer in lora_layers(senior):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=std)


def gradient_of(value, model, **options) -> torch.Tensor:
    """With respect to all parameters that are trained, as one vector."""
    gradients = torch.autograd.grad(value, trainable_parameters(model), **options)
    return torch.cat([gradient.flatten() for gradient in gradients])


def make_pair(senior, junior, tokenizer, end_ids=(1,), both=None) -> Pair:
    """Two models over the tokenizer's vocabulary, as rollout.py takes them."""
    pieces = token_bytes(tokenizer, len(tokenizer))
    return Pair(senior, junior, tokenizer, tokenizer, list(end_ids), pieces, both)


def shared_pair(make_model, tokenizer) -> Pair:
    """A senior with a random adapter; the junior is its base, and one pass serves both."""
    senior = add_adapter(make_model(len(tokenizer), 0), rank=4).double()
    fill_adapter(senior, std=0.3)
    junior, ends = SharedJunior(senior), range(1, len(tokenizer), 8)
    return make_pair(senior, junior, tokenizer, ends, junior.beside_senior)


def write(pair: Pair, prompts, max_new_tokens=14, **options):
    """Rollouts with the random numbers of seed 2. prompts: the senior's and the junior's lists."""
    noise, coins = random_numbers(len(prompts[0]), max_new_tokens, seed=2)
    return rollout(pair, *prompts, noise, coins, **(dict(p=0.5, temperature=1.3) | options))


def rollouts_of(ids, by_senior, mask=None, texts=None) -> Rollouts:
    """Completions by hand, lists or tensors (B, C), after prompts that do not matter."""
    ids, by_senior = torch.as_tensor(ids), torch.as_tensor(by_senior)
    ones = torch.ones_like(ids)
    mask = ones if mask is None else torch.as_tensor(mask)
    return Rollouts(ones, ones, ones, ones, ids, mask, by_senior, texts or [""] * len(ids))


def real(rollouts, name="completion_ids") -> list[list[int]]:
    """Every row of a field without its padding."""
    mask = getattr(rollouts, name.replace("ids", "mask").replace("senior", "completion")).bool()
    return [row[kept].tolist() for row, kept in zip(getattr(rollouts, name), mask)]


def with_authors(rollouts) -> list[list[tuple[int, str]]]:
    """Every row as reference_rollout writes it: its (token id, author)."""
    both, names = zip(real(rollouts), real(rollouts, "senior_mask")), ("junior", "senior")
    return [[(token, names[by_senior]) for token, by_senior in zip(*row)] for row in both]


def ends_with(message: str, program, *args) -> None:
    """The program must end with an error message in which this regular expression is found."""
    with pytest.raises(SystemExit, match=message):
        program(*args)
