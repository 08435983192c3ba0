"""Random tiny models. initializer_range=0.3 makes their distributions sharp enough for a mistake to show."""

# ruff: noqa: I001  the order of these imports matters
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries read it, so that no test waits for a network

import lab  # noqa: F401  before torch: it sets how threads wait
import matplotlib.pyplot as plt
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lab import curves, figures, figures_rl
from rollout import Pair, random_numbers, rollout
from tandem import build_tables, token_bytes

torch.set_num_threads(1)  # models this small gain nothing from more, and one thread never waits for a busy core
TEXT = ["Natalia sold 48 clips in April, schön. l'eau 三个\n", "In 48/2 = <<48/2=24>>24 days! She sold half as many.\n"] * 4


@pytest.fixture(scope="session")
def tokenizer():
    return byte_level_tokenizer()


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with leading spaces, about 330 tokens, all 256 bytes among them."""
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=330, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="</s>")


@pytest.fixture
def drawn(monkeypatch):
    """{name of the file: figure} of all figures that a test draws. For speed they are not written."""
    found = {}

    def keep(figure, path):
        found[path.name] = figure
        return path

    for module in (curves, figures, figures_rl):
        monkeypatch.setattr(module, "save", keep)
    yield found
    plt.close("all")


@pytest.fixture(scope="session")
def sentencepiece():
    """The spelling of Llama 2: "▁" for a space, bytes such as <0xE4> for characters that are not in the vocabulary."""
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["▁", *sorted(set("Awordswl482,NatiaschönBC/=<>.")), "▁4", "▁48", "▁w", "▁wo", "▁wor", "▁word", "▁words"]
    merges = [("▁", "4"), ("▁4", "8"), ("▁", "w"), ("▁w", "o"), ("▁wo", "r"), ("▁wor", "d"), ("▁word", "s")]
    fast = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True))
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Split(Regex("\n"), "isolated")]
    )
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def llama(vocab_size: int, seed: int, dtype=torch.float32):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,  # the smallest width that 4-bit blocks fit
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def gpt2(vocab_size: int, seed: int, dtype=torch.float32):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=256,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config).to(dtype).eval()


@pytest.fixture(params=[llama, gpt2], ids=["llama", "gpt2"])
def make_model(request):
    """Rotary and absolute positions: only the latter notice positions that ignore left padding."""
    return request.param


@pytest.fixture(scope="session")
def base_folder(tokenizer, tmp_path_factory):
    """A random Llama with its tokenizer, saved as a checkpoint."""
    folder = tmp_path_factory.mktemp("base")
    llama(len(tokenizer), seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_pair(senior, junior, tokenizer, end_ids=(1,)) -> Pair:
    """Two models over the tokenizer's vocabulary, as rollout.py takes them."""
    pieces = token_bytes(tokenizer, len(tokenizer))
    return Pair(senior, junior, tokenizer, tokenizer, list(end_ids), pieces, build_tables(pieces))


def left_pad(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def write(senior, junior, prompts, tokenizer, end_ids=(1,), max_new_tokens=14, **options):
    """Rollouts of two models, with the random numbers of seed 2. prompts: token ids, a list for each of the two."""
    settings = dict(p=0.5, schedule="word", temperature=1.3) | options
    pair = make_pair(senior, junior, tokenizer, end_ids)
    return rollout(pair, left_pad(prompts[0]), left_pad(prompts[1]), *random_numbers(len(prompts[0]), max_new_tokens, seed=2), **settings)
