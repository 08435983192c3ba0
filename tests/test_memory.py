"""The plan counts what a model has, and finds the fewest chunks that fit."""

import pytest
from peft import LoraConfig, get_peft_model

from conftest import gpt2, llama
from memory import GIB, Plan, Shape, shape_of

# Llama-2-7B, by hand: 32 layers of 4 * 4096^2 + 3 * 4096 * 11008; LoRA adds in + out for each of the 7 maps
LLAMA_2 = Shape(
    linear=32 * (4 * 4096**2 + 3 * 4096 * 11008),
    other=2 * 32000 * 4096 + 65 * 4096,
    lora=32 * (4 * 8192 + 3 * 15104),
    layers=32,
    hidden=4096,
    wide=11008,
    kv=8192,
    largest=4096 * 11008,
    vocab_size=32000,
)


def pair(junior=None, **options) -> Plan:
    return Plan(LLAMA_2, junior, **dict(four_bit=True, half=True, rank=16, checkpointing=True, eight_bit_adam=True) | options)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_shapes_are_those_of_the_models(make):
    model = make(50, 0)
    shape = shape_of(model.config)
    assert shape.linear + shape.other == sum(parameter.numel() for parameter in model.parameters())
    assert shape.linear > shape.other > 0
    senior = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert 3 * shape.lora == sum(parameter.numel() for parameter in senior.parameters() if parameter.requires_grad)


def test_llama_2_from_its_configuration():
    from transformers import LlamaConfig  # its defaults are those of Llama 2 7B

    assert shape_of(LlamaConfig()) == LLAMA_2


def test_two_checkpoints_weigh_twice_as_much():
    assert pair(LLAMA_2).weights() == 2 * pair().weights()
    assert 3 * GIB < pair().weights() < 4 * GIB  # 6.5 billion half bytes and 0.26 billion of two bytes
    assert pair(four_bit=False).weights() == 2 * (LLAMA_2.linear + LLAMA_2.other)


def test_each_saving_saves():
    whole = pair(checkpointing=False, eight_bit_adam=False)
    assert pair(eight_bit_adam=False).update(8192, 200, 256) < 0.3 * whole.update(8192, 200, 256)
    assert pair().adapter() < whole.adapter()


@pytest.mark.parametrize("gib", [8, 12, 16, 24, 80])
def test_the_fewest_chunks_that_fit(gib):
    plan, budget = pair(), gib * GIB
    rows, tokens = plan.fit(budget, 152, 8192, 200, 256)
    assert plan.peak(rows, tokens, 200, 256) <= budget
    if rows < 152:
        fewer = -(-152 // (-(-152 // rows) - 1))
        assert plan.peak(fewer, tokens, 200, 256) > budget
    assert (rows, tokens) == (152, 8192) if gib == 80 else rows < 152


def test_what_cannot_fit_is_refused():
    with pytest.raises(ValueError, match=r"weights 7.2 GiB.*more than 7\.0 GiB.*--four-bit"):
        pair(LLAMA_2).fit(7 * GIB, 152, 8192, 200, 256)
