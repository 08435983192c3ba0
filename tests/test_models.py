"""The pair: one base, the adapter on for the senior and off for the junior; in 4 bits too."""

import shutil
from argparse import Namespace
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from math import nan

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.lora import LoraLayer
from tokenizers import AddedToken
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM

from conftest import llama
from lab import models
from lab.experiments import DEFAULTS
from lab.models import reset_adapter, token_bytes, trainable_parameters
from lab.specialist import as_rollouts, encode_examples, fine_tune
from reinforce import loss
from rollout import random_numbers, rollout

IDS = torch.tensor([[5, 6, 7, 8]])
IN_BOTH = pytest.mark.parametrize("four_bit", [False, True])


def load(senior, junior=None, **changes):
    flags = {"device": "cpu", "rank": 4, "bfloat16": False} | changes
    return models.make_pair(str(senior), str(junior or senior), Namespace(**DEFAULTS | flags))


def move_adapter(pair):
    """An adapter that does something: B is zero at the start."""
    reset_adapter(pair.senior, seed=0)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in pair.senior.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3


def gradient(pair):
    """That of the loss for two texts."""
    few = as_rollouts([([5, 6], [7, 8, 9]), ([5], [9, 1])], "cpu")
    value, _ = loss(pair.senior, few, few.completion_mask.float(), few.completion_mask.sum(), 0.7)
    gradients = torch.autograd.grad(value, trainable_parameters(pair.senior))
    return torch.cat([x.flatten() for x in gradients])


@IN_BOTH
def test_one_checkpoint_is_loaded_once(base_folder, four_bit):
    pair = load(base_folder, four_bit=four_bit)
    base = pair.senior(input_ids=IDS).logits
    assert torch.equal(pair.junior(input_ids=IDS).logits, base)  # a fresh adapter changes nothing
    move_adapter(pair)
    assert not torch.allclose(pair.senior(input_ids=IDS).logits, base, atol=1e-2)
    assert torch.equal(pair.junior(input_ids=IDS).logits, base)
    # The adapter is on again, and nothing else is trained.
    pair.senior(input_ids=IDS).logits.sum().backward()
    trained = {name for name, p in pair.senior.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in pair.senior.named_parameters() if "lora_" in name}
    kinds = {type(module).__name__ for module in pair.senior.modules()}
    assert ("Linear4bit" in kinds) == four_bit
    reset_adapter(pair.senior, seed=0)
    assert torch.equal(pair.senior(input_ids=IDS).logits, base)


@IN_BOTH
def test_one_pass_serves_both(base_folder, four_bit):
    """The first half of the rows is the senior's, the rest the junior's: as in passes of their own,
    and so are the rollouts."""
    pair = load(base_folder, four_bit=four_bit)
    move_adapter(pair)
    ids = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6], [20, 30, 40, 50], [4, 4, 9, 9]])
    with torch.no_grad():
        both, senior = pair.both(input_ids=ids).logits, pair.senior(input_ids=ids).logits
        apart = torch.cat([senior[:2], pair.junior(input_ids=ids[2:]).logits])
    assert torch.allclose(both, apart, atol=1e-4)
    assert not torch.allclose(both, senior, atol=1e-2)
    if not four_bit:
        pair.senior.double()
        asked = [[5, 6], [7], [8, 9, 10]], [[6], [7, 8], [9, 9]], *random_numbers(3, 20, seed=1)
        one, two = rollout(pair, *asked), rollout(replace(pair, both=None), *asked)
        assert torch.equal(one.completion_ids, two.completion_ids)
        assert torch.equal(one.senior_mask, two.senior_mask)


@IN_BOTH
def test_checkpointing_changes_no_gradient(base_folder, four_bit):
    """The layers are run twice."""
    found = []
    for checkpointing in (False, True):
        pair, calls = load(base_folder, four_bit=four_bit, checkpointing=checkpointing), []
        move_adapter(pair)
        layer = pair.senior.get_base_model().model.layers[0].input_layernorm
        layer.register_forward_hook(lambda *_: calls.append(1))  # noqa: B023
        found.append(gradient(pair))
        assert len(calls) == 1 + checkpointing
    assert torch.allclose(*found, atol=1e-6)
    assert found[0].norm() > 1e-3


def test_gradients_in_bfloat16(base_folder):
    """Of a float32 adapter on a base in half precision: those of a float32 base up to rounding."""
    found = []
    for bfloat16 in (True, False):
        pair = load(base_folder, bfloat16=bfloat16)
        head = pair.senior.get_base_model().get_output_embeddings()
        assert head.weight.dtype == (torch.bfloat16 if bfloat16 else torch.float32)
        assert {p.dtype for p in trainable_parameters(pair.senior)} == {torch.float32}
        move_adapter(pair)
        found.append(gradient(pair))
    assert torch.cosine_similarity(*found, dim=0) > 0.99


def test_gradients_in_four_bits(base_folder):
    """Those of a float model with the weights that the 4-bit ones stand for, after a rollout too.
    A kernel without a gradient would let it pass through the residual stream only."""
    found = []
    for four_bit in (True, False):
        pair = load(base_folder, four_bit=four_bit)
        move_adapter(pair)
        layers = [layer for layer in pair.senior.modules() if isinstance(layer, LoraLayer)]
        weights = [layer.base_layer.weight for layer in layers]
        if four_bit:
            dense = [dequantize_4bit(weight.data, weight.quant_state) for weight in weights]
        else:
            for weight, values in zip(weights, dense):
                weight.data = values
        with torch.no_grad():
            pair.both(input_ids=IDS.repeat(2, 1))
        found.append(gradient(pair))
    assert torch.allclose(*found, atol=1e-4)
    assert found[0].norm() > 0.1


def test_two_checkpoints(base_folder, tokenizer, tmp_path):
    """A token beyond the logits, such as the padding of some copies of Llama 2, is ignored."""
    llama(len(tokenizer), seed=5).save_pretrained(tmp_path)
    padded = deepcopy(tokenizer)
    padded.add_tokens(["<extra>"])
    padded.save_pretrained(tmp_path)
    pair = load(base_folder, tmp_path)
    assert isinstance(pair.junior, LlamaForCausalLM)
    assert not trainable_parameters(pair.junior)
    assert pair.both is None
    assert len(pair.pieces) == len(tokenizer) == len(pair.junior_tokenizer) - 1
    assert pair.end_ids == [tokenizer.eos_token_id]


def test_two_vocabularies_are_refused(base_folder, tokenizer, sentencepiece, tmp_path):
    width, size = len(tokenizer), len(sentencepiece)
    unlike = (sentencepiece, size, f"{base_folder} and .* have {width} and {size} tokens")
    wider = (tokenizer, width + 3, f"has {width}, .* {width + 3}")
    for other, size, message in (unlike, wider):
        other.save_pretrained(tmp_path)
        llama(size, seed=0).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            load(base_folder, tmp_path)


def test_a_checkpoint_that_lacks_weights_is_refused(base_folder, tmp_path):
    """transformers alone goes on with a random third layer."""
    config = shutil.copytree(base_folder, tmp_path / "base") / "config.json"
    config.write_text(
        config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    with pytest.raises(ValueError, match="lacks weights such as model.layers.2.*save it again"):
        load(tmp_path / "base")


def test_capped_logits_are_refused(tmp_path, tokenizer):
    """Gemma 2 caps its logits after the output layer, which lab/engine.py would miss."""
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    sizes |= dict(num_key_value_heads=2, head_dim=16, final_logit_softcapping=0.5)
    Gemma2ForCausalLM(Gemma2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="scales or caps its logits"):
        load(tmp_path)


def test_decoding_that_differs_from_a_plain_pass_is_refused(base_folder, monkeypatch):
    """As of an architecture that ignores the positions that it is given: here they are zero."""
    real = LlamaForCausalLM.forward

    def forward(self, *args, position_ids=None, **kwargs):
        position_ids = None if position_ids is None else 0 * position_ids
        return real(self, *args, position_ids=position_ids, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM\) decodes something else with a cache"):
        load(base_folder)


# In bfloat16 one unlucky adapter may amplify rounding. In float32 no distance is an accident.
AGREE = [(True, [0.5, 0.0, 0.0]), (False, [0.0])]
DIFFER = [(True, [0.5, 0.0, 0.5]), (True, [0.0, nan, nan]), (False, [0.002]), (False, [nan])]


@pytest.mark.parametrize(("bfloat16", "distances"), AGREE + DIFFER)
def test_most_adapters_must_agree(base_folder, monkeypatch, bfloat16, distances):
    compare = lambda pair, seed: {"decodes wrongly": distances[seed]}  # noqa: E731
    monkeypatch.setattr(models, "compare_with_plain_passes", compare)
    expected = pytest.raises(ValueError, match="decodes wrongly")
    with expected if (bfloat16, distances) in DIFFER else nullcontext():
        load(base_folder, bfloat16=bfloat16)


def test_end_tokens_write_nothing(base_folder, tokenizer, tmp_path):
    """<|eot_id|> of Llama 3 is special without being listed; a generation config names others."""
    copy = deepcopy(tokenizer)
    copy.add_tokens([AddedToken("<|eot_id|>", special=True)])
    assert token_bytes(copy, len(copy))[copy.convert_tokens_to_ids("<|eot_id|>")] == b""
    assert token_bytes(copy, len(copy))[5] != b""
    folder = shutil.copytree(base_folder, tmp_path / "base")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 5]}')
    pair = load(folder)
    assert pair.end_ids == [1, 5]
    assert pair.pieces[5] == b""


def test_fine_tuning_learns_what_it_is_shown(base_folder):
    """From a random model to the solution itself, greedily; the base is as before."""
    pair = load(base_folder, rank=8)
    tokenizer, texts = pair.senior_tokenizer, [("Natalia", "sold 48 clips")] * 8
    ((prompt, solution),) = encode_examples(tokenizer, texts[:1])
    assert tokenizer.decode(prompt) == "Natalia"
    assert tokenizer.decode(solution) == " sold 48 clips</s>"
    before = pair.junior(input_ids=IDS).logits
    options = dict(steps=60, batch=8, micro_tokens=4096, lr=3e-2, seed=0, label="test")
    fine_tune(pair.senior, tokenizer, texts, **options)
    ids = torch.tensor([prompt])
    for _ in solution:
        ids = torch.cat([ids, pair.senior(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert ids[0].tolist() == prompt + solution
    assert torch.equal(pair.junior(input_ids=IDS).logits, before)
