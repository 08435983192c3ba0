"""The pair: one base, the adapter on for the senior and off for the junior; in 4 bits too."""

import json
import shutil
from contextlib import nullcontext
from copy import deepcopy
from math import nan

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from test_runner import command, gsm8k  # noqa: F401  a fixture
from tokenizers.processors import TemplateProcessing
from transformers import LlamaForCausalLM, Phi3Config

import run_gsm8k
from conftest import ends_with, fill_adapter, gradient_of, llama, load
from lab import models
from lab.models import encode, identity, lora_layers, reset_adapter
from lab.specialist import as_rollouts, encode_examples, fine_tune
from reinforce import loss

IDS = torch.tensor([[5, 6, 7, 8]])
IN_BOTH = pytest.mark.parametrize("four_bit", [False, True])


def move_adapter(pair):
    reset_adapter(pair.senior, seed=0)
    fill_adapter(pair.senior, std=0.3)


def gradient(pair):
    """That of the loss for two texts."""
    few = as_rollouts([([5, 6], [7, 8, 9]), ([5], [9, 1])], "cpu")
    value, _ = loss(pair.senior, few, few.completion_mask.float(), few.completion_mask.sum(), 0.7)
    return gradient_of(value, pair.senior)


# ------------------------------------------------------------------------------------------------
# Two models


@IN_BOTH
def test_one_checkpoint_is_loaded_once(base_folder, four_bit):
    """One pass serves both: the first half of its rows is the senior's, the rest the junior's, as
    in their own passes."""
    pair = load(base_folder, four_bit=four_bit)
    base = pair.senior(input_ids=IDS).logits
    assert torch.equal(pair.junior(input_ids=IDS).logits, base)  # a fresh adapter changes nothing
    move_adapter(pair)
    assert not torch.allclose(pair.senior(input_ids=IDS).logits, base, atol=1e-2)
    assert torch.equal(pair.junior(input_ids=IDS).logits, base)
    ids = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6], [20, 30, 40, 50], [4, 4, 9, 9]])
    with torch.no_grad():
        both, senior = pair.both(input_ids=ids).logits, pair.senior(input_ids=ids).logits
        apart = torch.cat([senior[:2], pair.junior(input_ids=ids[2:]).logits])
    assert torch.allclose(both, apart, atol=1e-4)
    assert not torch.allclose(both, senior, atol=1e-2)
    # The adapter is on again, and nothing else is trained.
    pair.senior(input_ids=IDS).logits.sum().backward()
    trained = {name for name, p in pair.senior.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in pair.senior.named_parameters() if "lora_" in name}
    kinds = {type(module).__name__ for module in pair.senior.modules()}
    assert ("Linear4bit" in kinds) == four_bit


@IN_BOTH
def test_gradients(base_folder, four_bit):
    """Checkpointing runs the layers twice and changes no gradient. That of 4-bit weights is that of
    the numbers that they stand for; a kernel without one would leave the residual stream only."""
    found = []
    for checkpointing in (False, True):
        pair, calls = load(base_folder, four_bit=four_bit, checkpointing=checkpointing), []
        move_adapter(pair)
        layer = pair.senior.get_base_model().model.layers[0].input_layernorm
        layer.register_forward_hook(lambda *_: calls.append(1))  # noqa: B023
        found.append(gradient(pair))
        assert len(calls) == 1 + checkpointing
    weights = [layer.base_layer.weight for layer in lora_layers(pair.senior)]
    pair = load(base_folder)
    move_adapter(pair)
    for layer, weight in zip(lora_layers(pair.senior), weights):
        dense = dequantize_4bit(weight.data, weight.quant_state) if four_bit else weight.data
        layer.base_layer.weight.data = dense
    for other in found:
        assert torch.allclose(gradient(pair), other, atol=1e-4)
    assert found[0].norm() > 0.1


@pytest.mark.parametrize("is_tied", [False, True])
def test_logits_are_cut_to_the_shared_vocabulary(base_folder, tokenizer, tmp_path, is_tied):
    """Qwen2.5 has 151,936 or 152,064 logits for one tokenizer. A token beyond them is ignored."""
    wide = llama(len(tokenizer) + 6, seed=5)
    wide.config.tie_word_embeddings = is_tied
    wide.save_pretrained(tmp_path)
    padded = deepcopy(tokenizer)
    padded.add_tokens(["<extra>"])
    padded.save_pretrained(tmp_path)
    for names in ((base_folder, tmp_path), (tmp_path, base_folder)):
        pair = load(*names)
        both = [model(input_ids=IDS).logits for model in (pair.senior, pair.junior)]
        assert both[0].shape == both[1].shape == (1, 4, len(tokenizer))
        assert pair.both is None
        assert len(pair.pieces) == len(tokenizer)
        assert not models.trainable_parameters(pair.junior)
        assert gradient(pair).norm() > 1e-3
    full = LlamaForCausalLM.from_pretrained(tmp_path)(input_ids=IDS).logits
    assert torch.equal(both[0], full[..., : len(tokenizer)])


# ------------------------------------------------------------------------------------------------
# What a model is called


def retrain(folder, seed=1):
    """Other weights under the same names."""
    llama(LlamaForCausalLM.from_pretrained(folder).config.vocab_size, seed).save_pretrained(folder)


def test_a_name_changes_with_the_weights(base_folder, tmp_path, monkeypatch):
    one, two = (shutil.copytree(base_folder, tmp_path / name / "final") for name in "AB")
    assert identity(one) == identity(f"{two}/") == f"final-{identity(one)[-8:]}"
    retrain(one)
    assert identity(one) != identity(two)
    before = identity(two)
    (two / "chat_template.jinja").write_text("{{ messages }}")
    assert identity(two) != before
    # A file of 100 MB is read in parts.
    (one / "model.safetensors").write_bytes(b"0" * 10**8)
    before = identity(one)
    (one / "model.safetensors").write_bytes(b"1" * 10**8)
    assert identity(one) != before
    # A base on the hub is named by its commit.
    file = tmp_path / "snapshots" / "0123456789abcdef" / "config.json"
    monkeypatch.setattr(models.transformers.utils, "cached_file", lambda *_: str(file))
    assert identity("owner/base") == "base-01234567"


def test_a_specialist_belongs_to_the_weights_of_its_base(command, base_folder, tmp_path):  # noqa: F811
    """A base in place of another gets a specialist of its own."""
    base = shutil.copytree(base_folder, tmp_path / "final")
    for seed in (1, 2):
        shutil.rmtree(tmp_path / "runs" / "tandem", ignore_errors=True)
        retrain(base, seed)
        run_gsm8k._pair.clear()
        run_gsm8k.main([*command, "--senior", str(base), "--junior", str(base), "--arms", "tandem"])
        assert len(list((tmp_path / "runs" / "specialist").glob("en-seed-0-*/adapter.pt"))) == seed


# ------------------------------------------------------------------------------------------------
# What is refused


# A .json file of the base, changes to it, further flags, and what is said.
REFUSED = [
    ("adapter_config", {}, "", "adapter: merge it .peft: merge_and_unload"),
    ("config", {}, "--senior ~/none --junior ~/none", "cannot load '/.*none' .there is no"),
    ("config", {}, "--junior tiny", "one tokenizer, but have 317 and 765 tokens, and 118"),
    ("config", {}, "--problems BASE", "'.*#### 2': .* tokens exceed the 1023 for .*: shorten"),
    ("config", {"max_position_embeddings": 99}, "", "Answer:': .* exceed the 91 for .*: shorten"),
    ("config", {"hidden_size": 16}, "", "cannot load '.*base' .*Name a local folder"),
    ("config", {"vocab_size": 2}, "", "a model lacks the end token|lacks the token .*resize"),
    ("config", {"model_type": "vit"}, "", "cannot load '.*base' .*Name a local folder"),
    ("config", {"num_hidden_layers": 3}, "", "lacks weights .*layers.2.*save it again"),
    ("tokenizer_config", {"eos_token": None}, "", "lacks the end token None: set eos_token"),
    ("tokenizer_config", {"eos_token": "<end>"}, "", "lacks the end token <end>: set eos_token"),
    ("tokenizer_config", {"extra_special_tokens": ["How many"]}, "", "lacks .*'How many': resize"),
]


@pytest.mark.parametrize("case", REFUSED)
def test_a_base_is_refused_before_fine_tuning(command, base_folder, tmp_path, monkeypatch, case):  # noqa: F811
    (name, changes, flags, message), base = case, shutil.copytree(base_folder, tmp_path / "base")
    gsm8k(base, steps=99)
    file = base / f"{name}.json"
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | changes))
    monkeypatch.setattr(run_gsm8k, "_pair", [])
    flags = f"--senior BASE --junior BASE {flags}".replace("BASE", str(base))
    ends_with(f"^error: .*{message}", run_gsm8k.main, [*command, *flags.split()])
    assert not (tmp_path / "runs" / "specialist").exists()


# What a model does with its logits after the output layer.
FAULTS = {"capped": torch.tanh, "scaled": lambda logits: logits * 1.05, "no positions": lambda x: x}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_differs_from_a_plain_pass_is_refused(base_folder, monkeypatch, fault):
    """Gemma 2 caps its logits after the output layer, which lab/engine.py would miss, in bfloat16
    even if it changes them little. Padding on the left needs a model that heeds the positions it is
    given: here all are zero."""

    def forward(self, *args, position_ids=None, original=LlamaForCausalLM.forward, **kwargs):
        if fault == "no positions" and position_ids is not None:
            position_ids = 0 * position_ids
        output = original(self, *args, position_ids=position_ids, **kwargs)
        output.logits = FAULTS[fault](output.logits)
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM\) cannot be .*it does not compute"):
        load(base_folder, bfloat16=fault == "scaled")


# The distances under three adapters, and whether the pair is accepted.
ADAPTERS = [([0.5, 0.0, 0.0], True), ([0.5, 0.0, 0.5], False), ([0.0, nan, nan], False)]


@pytest.mark.parametrize(("distances", "agree"), ADAPTERS)
def test_most_adapters_must_agree(base_folder, monkeypatch, distances, agree):
    """One unlucky adapter may amplify the rounding of bfloat16."""
    monkeypatch.setattr(models, "compare_with_plain_passes", lambda _, seed: (distances[seed], 0))
    with nullcontext() if agree else pytest.raises(ValueError, match="it does not compute"):
        load(base_folder, bfloat16=True)


# ------------------------------------------------------------------------------------------------
# Text and tokens


def test_end_tokens_write_nothing(base_folder, tmp_path):
    """A generation config names end tokens that the tokenizer does not."""
    folder = shutil.copytree(base_folder, tmp_path / "base")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 5]}')
    pair = load(folder)
    assert pair.end_ids == [1, 5]
    assert pair.pieces[5] == b"" != pair.pieces[6]


def test_start_tokens_are_not_doubled(tokenizer):
    """A tokenizer may begin with two tokens of its own, which no bos_token names."""
    copy = deepcopy(tokenizer)
    start = dict(single="<pad> </s> $A", special_tokens=[("<pad>", 0), ("</s>", 1)])
    copy.backend_tokenizer.post_processor = TemplateProcessing(**start)
    (own,), (written,) = (encode(copy, [text]) for text in ("In", "<pad></s>In"))
    assert written == own == [0, 1, *tokenizer("In").input_ids]


def test_longrope_is_not_crossed(tokenizer, tmp_path):
    """Beyond its original length such a model rotates all positions anew."""
    tokenizer.save_pretrained(tmp_path)
    Phi3Config(original_max_position_embeddings=48, pad_token_id=0).save_pretrained(tmp_path)
    assert models.load_tokenizers(tmp_path, tmp_path)[1] == [48, 48]


@pytest.mark.parametrize("pattern", ["$A </s>", "<pad> $A </s>", "$A <pad>", "$A </s> <pad>"])
def test_what_a_tokenizer_appends_is_left_out(tokenizer, pattern):
    """A prompt must not end in an end token, and must be how prompt and solution begin."""
    texts, copy = [("Natalia sold", "48")], deepcopy(tokenizer)
    ((prompt, solution),) = encode_examples(tokenizer, texts)
    single = dict(single=pattern, special_tokens=[("</s>", 1), ("<pad>", 0)])
    copy.backend_tokenizer.post_processor = TemplateProcessing(**single)
    assert copy("Natalia").input_ids[-1] in (0, 1)
    prompt = [0] * pattern.startswith("<pad>") + prompt
    assert encode(copy, ["Natalia sold"]) == [prompt]
    assert encode_examples(copy, texts) == [(prompt, solution)]
    copy.add_tokens(["sold 48"])
    with pytest.raises(ValueError, match="merges the end of a prompt with the solution"):
        encode_examples(copy, texts)


def test_fine_tuning_learns_what_it_is_shown(base_folder):
    """From a random model to one whose likeliest tokens are the solution."""
    pair = load(base_folder, rank=8)
    tokenizer, texts = pair.senior_tokenizer, [("Natalia", "sold 48 clips")] * 8
    ((prompt, solution),) = encode_examples(tokenizer, texts[:1])
    assert tokenizer.decode(solution) == " sold 48 clips</s>"
    options = dict(steps=60, batch=8, micro_tokens=4096, lr=3e-2, seed=0, label="test")
    fine_tune(pair.senior, tokenizer, texts, **options)
    likeliest = pair.senior(input_ids=torch.tensor([prompt + solution])).logits[0].argmax(-1)
    assert likeliest[len(prompt) - 1 : -1].tolist() == solution
