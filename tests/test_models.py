"""The pair: one base, the adapter on for the senior and off for the junior; in 4 bits too."""

import json
import re
import shutil
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.lora import LoraLayer
from tokenizers import AddedToken
from transformers import AutoTokenizer, LlamaForCausalLM

from conftest import llama
from lab import models
from lab.models import SharedJunior, encode_prompts, load_pair, load_tokenizers, reset_adapter, trainable_parameters
from lab.specialist import as_rollouts, encode_examples, fine_tune
from reinforce import plain_loss
from rollout import random_numbers, rollout
from tandem import token_bytes

IDS = torch.tensor([[5, 6, 7, 8]])


def move_adapter(pair):
    """An adapter that does something: B is zero at the start."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in pair.senior.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3


@pytest.mark.parametrize("four_bit", [False, True])
def test_one_checkpoint_one_base(base_folder, four_bit):
    pair = load_pair(base_folder, base_folder, rank=4, four_bit=four_bit, device="cpu")
    assert isinstance(pair.junior, SharedJunior)
    base = pair.senior(input_ids=IDS).logits
    assert torch.equal(pair.junior(input_ids=IDS).logits, base)  # a fresh adapter changes nothing
    move_adapter(pair)
    assert not torch.allclose(pair.senior(input_ids=IDS).logits, base, atol=1e-2)
    assert torch.equal(pair.junior(input_ids=IDS).logits, base)
    pair.senior(input_ids=IDS).logits.sum().backward()  # the adapter is on again, and nothing but it is trained
    trained = {name for name, parameter in pair.senior.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in pair.senior.named_parameters() if "lora_" in name}
    if four_bit:
        assert any(type(module).__name__ == "Linear4bit" for module in pair.senior.modules())
    reset_adapter(pair.senior, seed=0)
    assert torch.equal(pair.senior(input_ids=IDS).logits, base)


@pytest.mark.parametrize("four_bit", [False, True])
def test_one_forward_pass_for_both(base_folder, four_bit):
    """The upper half of the rows is the senior's, the lower half the junior's: as in two passes of their own."""
    pair = load_pair(base_folder, base_folder, rank=4, four_bit=four_bit, device="cpu")
    move_adapter(pair)
    rows = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6], [20, 30, 40, 50], [4, 4, 9, 9]])
    with torch.no_grad():
        both = pair.junior.beside_senior(input_ids=rows).logits
        senior, junior = pair.senior(input_ids=rows[:2]).logits, pair.junior(input_ids=rows[2:]).logits
        assert torch.allclose(both[:2], senior, atol=1e-4)
        assert torch.allclose(both[2:], junior, atol=1e-4)
        assert not torch.allclose(pair.senior(input_ids=rows[2:]).logits, junior, atol=1e-2)  # the adapter matters


def test_experts_are_refused(base_folder):
    """A mixture of experts gives its layers a flat list of tokens, in which a half is not the senior's rows."""
    pair = load_pair(base_folder, base_folder, rank=4, four_bit=False, device="cpu")
    layer = next(module for module in pair.senior.modules() if isinstance(module, LoraLayer))
    pair.junior.adapted_fraction = 0.5
    with pytest.raises(ValueError, match=r"shape \(6, 64\).*use experts are not supported"):
        layer(torch.zeros(6, 64))


def test_rollouts_of_one_pass_and_of_two(base_folder):
    """A pair on one base writes the same with stacked rows as with a junior that is run on its own."""
    pair = load_pair(base_folder, base_folder, rank=4, four_bit=False, device="cpu")
    move_adapter(pair)
    pair.senior.double()
    tokenizer = pair.senior_tokenizer
    senior_prompts = encode_prompts(tokenizer, ["In", "Natalia sold 48", "She"], "cpu")
    junior_prompts = encode_prompts(tokenizer, ["days", "sold half as many. She", "48/2 ="], "cpu")

    def write(junior):
        return rollout(replace(pair, junior=junior), senior_prompts, junior_prompts, *random_numbers(3, 20, seed=1))

    stacked, apart = write(pair.junior), write(lambda **inputs: pair.junior(**inputs))
    assert torch.equal(stacked.completion_ids, apart.completion_ids)
    assert torch.equal(stacked.senior_mask, apart.senior_mask)
    assert torch.allclose(stacked.logprobs, apart.logprobs, atol=1e-10)


@pytest.mark.parametrize("four_bit", [False, True])
def test_checkpointing_changes_no_gradient(base_folder, four_bit):
    """Layers run twice, gradients stay; and without gradients the cache is used as ever."""
    gradients = []
    for checkpointing in (False, True):
        pair = load_pair(base_folder, base_folder, rank=4, four_bit=four_bit, device="cpu", checkpointing=checkpointing)
        reset_adapter(pair.senior, seed=0)
        move_adapter(pair)
        calls, layer = [], pair.senior.get_base_model().model.layers[0].input_layernorm
        layer.register_forward_hook(lambda *_: calls.append(1))  # noqa: B023
        few = as_rollouts(pair.senior_tokenizer, [([5, 6], [7, 8, 9]), ([5], [9, 1])], "cpu")
        plain_loss(pair.senior, few, few.completion_mask.float(), 0.7).backward()
        assert len(calls) == 1 + checkpointing
        gradients.append(torch.cat([p.grad.flatten() for p in pair.senior.parameters() if p.requires_grad]))
    assert torch.allclose(*gradients, atol=1e-6)
    assert gradients[0].norm() > 1e-3


def test_bfloat16_weights_under_a_float32_adapter(base_folder):
    """The base in half precision, the adapter not; gradients are those of a float32 base up to rounding."""
    gradients = []
    for bfloat16 in (True, False):
        pair = load_pair(base_folder, base_folder, rank=4, four_bit=False, device="cpu", bfloat16=bfloat16)
        assert pair.senior.get_base_model().get_output_embeddings().weight.dtype == (torch.bfloat16 if bfloat16 else torch.float32)
        assert {parameter.dtype for parameter in trainable_parameters(pair.senior)} == {torch.float32}
        reset_adapter(pair.senior, seed=0)
        move_adapter(pair)
        few = as_rollouts(pair.senior_tokenizer, [([5, 6], [7, 8, 9]), ([5], [9, 1])], "cpu")
        plain_loss(pair.senior, few, few.completion_mask.float(), 0.7).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in trainable_parameters(pair.senior)]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


def test_gradients_in_four_bits(base_folder):
    """Those of a float model that has the weights which the 4-bit ones stand for, also after a rollout without gradients.

    A kernel without a gradient would let it pass through the residual stream only.
    """
    gradients = []
    for four_bit in (True, False):
        pair = load_pair(base_folder, base_folder, rank=4, four_bit=four_bit, device="cpu")
        reset_adapter(pair.senior, seed=0)
        move_adapter(pair)
        layers = [module.base_layer for module in pair.senior.modules() if isinstance(module, LoraLayer)]
        if four_bit:
            dense = [dequantize_4bit(layer.weight.data, layer.weight.quant_state).clone() for layer in layers]
        else:
            for layer, weight in zip(layers, dense):
                layer.weight.data = weight
        with torch.no_grad():
            pair.junior.beside_senior(input_ids=IDS.repeat(2, 1))
        few = as_rollouts(pair.senior_tokenizer, [([5, 6], [7, 8, 9]), ([5], [9, 1])], "cpu")
        plain_loss(pair.senior, few, few.completion_mask.float(), 0.7).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in pair.senior.parameters() if p.requires_grad]))
    assert torch.allclose(*gradients, atol=1e-4)
    assert gradients[0].norm() > 0.1


def test_two_checkpoints(base_folder, tokenizer, tmp_path):
    llama(len(tokenizer), seed=5).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pair = load_pair(base_folder, str(tmp_path), rank=4, four_bit=False, device="cpu")
    assert isinstance(pair.junior, LlamaForCausalLM)
    assert not any(parameter.requires_grad for parameter in pair.junior.parameters())


def test_two_tokenizers_are_refused(base_folder, sentencepiece, tmp_path):
    sentencepiece.save_pretrained(tmp_path)
    llama(len(sentencepiece), seed=0).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{base_folder} has 317 tokens, {tmp_path} has \d+"):
        load_tokenizers(base_folder, str(tmp_path))


def test_a_token_beyond_the_logits_is_no_difference(base_folder, tokenizer, tmp_path):
    """Some Llama-2 copies add <pad> to the tokenizer but not to the model: it is never written, so it does not count."""
    llama(len(tokenizer), seed=5).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    padded = AutoTokenizer.from_pretrained(tmp_path)
    padded.add_tokens(["<extra>"])
    padded.save_pretrained(tmp_path)
    pair = load_pair(base_folder, str(tmp_path), rank=4, four_bit=False, device="cpu")
    assert len(pair.pieces) == len(tokenizer) == len(pair.junior_tokenizer) - 1
    assert pair.end_ids == [tokenizer.eos_token_id]


def test_two_logit_widths_are_refused(base_folder, tokenizer, tmp_path):
    llama(len(tokenizer) + 3, seed=5).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has 317, .* 320"):
        load_pair(base_folder, str(tmp_path), rank=4, four_bit=False, device="cpu")


def test_a_missing_checkpoint_names_the_way_out(tmp_path):
    with pytest.raises(ValueError, match="no-such-model.*--preset tiny"):
        load_tokenizers(str(tmp_path / "no-such-model"), str(tmp_path / "no-such-model"))


def test_capped_logits_are_refused(tmp_path, tokenizer):
    """Gemma 2 caps its logits after the output layer, which reinforce.py would miss."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config.num_key_value_heads, config.head_dim, config.final_logit_softcapping = 2, 16, 0.5
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="scales or caps its logits"):
        load_pair(str(tmp_path), str(tmp_path), rank=4, four_bit=False, device="cpu")


def test_encoding(tokenizer):
    """Prompts are padded on the left; prompt and solution are one text, so the solution keeps its leading space."""
    ids, mask = encode_prompts(tokenizer, ["In", "Natalia sold 48"], "cpu")
    assert mask.tolist()[0] == [0] * (mask.shape[1] - 1) + [1]
    assert tokenizer.decode(ids[1]) == "Natalia sold 48"
    ((prompt, solution),) = encode_examples(tokenizer, [("Natalia", "sold")])
    assert tokenizer.decode(prompt) == "Natalia"
    assert tokenizer.decode(solution[:-1]) == " sold"
    assert solution[-1] == tokenizer.eos_token_id


def test_fine_tuning_learns_what_it_is_shown(base_folder):
    """60 steps on one solution: from a random model's loss to the solution itself, greedily; the base is as before."""
    pair = load_pair(base_folder, base_folder, rank=8, four_bit=False, device="cpu")
    before = pair.junior(input_ids=IDS).logits
    pairs = [("Natalia", "sold 48 clips")] * 8
    fine_tune(pair.senior, pair.senior_tokenizer, pairs, steps=60, batch=8, micro_tokens=4096, lr=3e-2, seed=0, label="test")
    tokenizer, text = pair.senior_tokenizer, "Natalia"
    ids = tokenizer(text, return_tensors="pt").input_ids
    for _ in range(8):
        ids = torch.cat([ids, pair.senior(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert tokenizer.decode(ids[0]).startswith("Natalia sold 48 clips</s>")
    assert torch.equal(pair.junior(input_ids=IDS).logits, before)


def test_a_checkpoint_that_lacks_weights_is_refused(base_folder, tmp_path):
    """Two layers of weights under a config of three: transformers alone goes on with a random third layer."""
    shutil.copytree(base_folder, tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(ValueError, match=r"lacks weights such as model.layers.2.*again"):
        load_pair(str(tmp_path / "base"), str(tmp_path / "base"), rank=4, four_bit=False, device="cpu")


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 0}, {"hidden_size": -8}, {"hidden_size": "wide"}, {"model_type": "vit"}])
def test_a_configuration_of_no_usable_model_is_refused_by_name(base_folder, tmp_path, changes):
    shutil.copytree(base_folder, tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))}/base.*(Choose another model|Name a local folder)"):
        load_pair(str(tmp_path / "base"), str(tmp_path / "base"), rank=4, four_bit=False, device="cpu")


def test_a_tokenizer_without_an_end_token_is_refused(base_folder, tmp_path):
    shutil.copytree(base_folder, tmp_path / "base")
    path = tmp_path / "base" / "tokenizer_config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "eos_token"}))
    with pytest.raises(ValueError, match="without an end token. Set its eos_token"):
        load_pair(str(tmp_path / "base"), str(tmp_path / "base"), rank=4, four_bit=False, device="cpu")


def test_code_that_comes_with_a_checkpoint_is_not_run(base_folder, tmp_path, monkeypatch):
    """Without trust_remote_code=False transformers asks, and runs the file if the answer is yes."""
    shutil.copytree(base_folder, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config |= {"model_type": "hostile", "auto_map": {"AutoConfig": "hostile.Config", "AutoModelForCausalLM": "hostile.Model"}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    (tmp_path / "base" / "hostile.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match="cannot load"):
        load_pair(str(tmp_path / "base"), str(tmp_path / "base"), rank=4, four_bit=False, device="cpu")
    assert not (tmp_path / "ran").exists()


def test_decoding_that_differs_from_a_plain_pass_is_refused(base_folder, monkeypatch):
    """An architecture that ignores the positions it is given decodes left-padded rows wrongly: here positions are zeroed."""
    real = LlamaForCausalLM.forward

    def forward(self, *args, position_ids=None, **kwargs):
        return real(self, *args, position_ids=None if position_ids is None else 0 * position_ids, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM\) decodes with a cache and padding something else"):
        load_pair(base_folder, base_folder, rank=4, four_bit=False, device="cpu")


def test_an_end_token_that_is_no_named_special_token_writes_nothing(tokenizer):
    """<|eot_id|> of Llama 3 is special, but not among all_special_ids in every version; a generation config may name others."""
    copy = AutoTokenizer.from_pretrained(tokenizer.name_or_path) if tokenizer.name_or_path else deepcopy(tokenizer)
    copy.add_tokens([AddedToken("<|eot_id|>", special=True)])
    pieces = token_bytes(copy, len(copy), end_ids=[5])
    assert pieces[copy.convert_tokens_to_ids("<|eot_id|>")] == b""
    assert pieces[5] == b""
    assert token_bytes(copy, len(copy))[5] != b""


@pytest.mark.parametrize(
    ("bfloat16", "distances", "refused"),
    [
        (True, [0.5, 0.0, 0.0], False),  # rounding, amplified by one unlucky adapter
        (True, [0.5, 0.0, 0.5], True),
        (True, [0.0, float("nan"), float("nan")], True),
        (False, [0.0], False),
        (False, [0.002], True),  # in float32 a single disagreement is an error
        (False, [float("nan")], True),
    ],
)
def test_a_pair_is_refused_unless_most_adapters_agree(base_folder, monkeypatch, bfloat16, distances, refused):
    monkeypatch.setattr(models, "compare_with_plain_passes", lambda pair, seed: {"decodes wrongly": distances[seed]})
    options = dict(rank=4, four_bit=False, device="cpu", bfloat16=bfloat16)
    with pytest.raises(ValueError, match="decodes wrongly") if refused else nullcontext():
        load_pair(str(base_folder), str(base_folder), **options)


def test_the_comparison_is_the_same_every_time(base_folder):
    pair = load_pair(str(base_folder), str(base_folder), rank=4, four_bit=False, device="cpu")
    torch.manual_seed(1)
    first = models.compare_with_plain_passes(pair, seed=0)
    torch.manual_seed(2)
    assert models.compare_with_plain_passes(pair, seed=0) == first
    assert all(distance < 1e-3 for distance in first.values())
