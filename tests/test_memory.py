"""The plan counts the parameters that a model has, and finds the fewest even parts that fit."""

import argparse
import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig

from conftest import gpt2, llama
from lab import tiny
from lab.memory import GIB, Plan, Shape, fit_to_memory, free_memory, shape_of
from run_gsm8k import parse_args, runs_of

# Llama-2-7B by hand: 32 layers of 4 * 4096^2 + 3 * 4096 * 11008 parameters. LoRA adds in + out for each of the 7 linear layers.
LLAMA_2 = Shape(
    linear=32 * (4 * 4096**2 + 3 * 4096 * 11008),
    other=2 * 32000 * 4096 + 65 * 4096,
    lora=32 * (4 * 8192 + 3 * 15104),
    layers=32,
    hidden=4096,
    feed_forward=11008,
    kv=8192,
    largest=4096 * 11008,
    vocab_size=32000,
)


def plan_for(junior: Shape | None = None, **options) -> Plan:
    """A plan for Llama-2-7B as senior; without a junior, on a shared base."""
    defaults = dict(four_bit=True, half_precision=True, rank=16, checkpointing=True, eight_bit_adam=True, prompt=200, new=256)
    return Plan([LLAMA_2, junior] if junior else [LLAMA_2], **defaults | options)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_shapes_are_those_of_the_models(make):
    model = make(50, 0)
    shape = shape_of(model.config)
    assert shape.linear + shape.other == sum(parameter.numel() for parameter in model.parameters())
    assert shape.linear > shape.other > 0
    senior = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert 3 * shape.lora == sum(parameter.numel() for parameter in senior.parameters() if parameter.requires_grad)


def test_llama_2_from_its_configuration():
    # The defaults of LlamaConfig are those of Llama-2-7B.
    assert shape_of(LlamaConfig()) == LLAMA_2


def test_two_checkpoints_need_twice_the_weights():
    assert plan_for(LLAMA_2).weights() == 2 * plan_for().weights()
    # 6.5 billion parameters of half a byte and 0.26 billion of two bytes.
    assert 3 * GIB < plan_for().weights() < 4 * GIB
    assert plan_for(four_bit=False).weights() == 2 * (LLAMA_2.linear + LLAMA_2.other)


def test_checkpointing_and_eight_bit_adam_save_memory():
    neither = plan_for(checkpointing=False, eight_bit_adam=False)
    assert plan_for(eight_bit_adam=False).update(8192) < 0.3 * neither.update(8192)
    assert plan_for().adapter() < neither.adapter()


@pytest.mark.parametrize("gib", [8, 12, 16, 24, 80])
def test_the_fewest_parts_that_fit(gib):
    plan, budget = plan_for(), gib * GIB
    rollout_batch, micro_tokens = plan.fit(budget, 152, 8192)
    assert plan.peak(rollout_batch, micro_tokens) <= budget
    if rollout_batch < 152:
        parts = -(-152 // rollout_batch)
        one_part_less = -(-152 // (parts - 1))
        assert plan.peak(one_part_less, micro_tokens) > budget
    assert (rollout_batch, micro_tokens) == (152, 8192) if gib == 80 else rollout_batch < 152


def test_what_cannot_fit_is_refused():
    with pytest.raises(ValueError, match=r"weights 7.2 GiB.*more than the budget of 7\.0 GiB.*--four-bit"):
        plan_for(LLAMA_2).fit(7 * GIB, 152, 8192)


@pytest.fixture(autouse=True)
def prompts_of_48_tokens(monkeypatch):
    monkeypatch.setattr("lab.memory.longest_prompt", lambda runs, tokenizers: 48)


def flags(**changes) -> argparse.Namespace:
    """The flags that fit_to_memory reads."""
    defaults = dict(
        device="cpu", memory=None, four_bit=False, bfloat16=False, rank=4, checkpointing=False, eight_bit_adam=False, specialist_steps=0
    )
    batches = dict(rollout_batch=1000, micro_tokens=2048, batch=152, eval_problems=200, jobs=1, max_new_tokens=112)
    return argparse.Namespace(**defaults | batches | changes)


@pytest.fixture
def machine(monkeypatch):
    """Give this process a machine of which so many bytes are available."""

    def give(available: float) -> None:
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=available))

    return give


def test_with_room_enough_only_the_rollout_batch_is_cut_to_what_is_ever_written_at_one_time(base_folder, capsys):
    args = flags()
    args.rollout_batch, args.micro_tokens = fit_to_memory(args, base_folder, base_folder, [], [])
    assert (args.rollout_batch, args.micro_tokens) == (200, 2048)
    assert re.match(r"memory plan: .*, 200 rollouts of 48 \+ 112 tokens .*; peak \d+ MiB\n$", capsys.readouterr().out)


def test_batches_are_cut_to_the_budget(base_folder):
    args = flags(memory=8 / 1024)
    args.rollout_batch, args.micro_tokens = fit_to_memory(args, base_folder, base_folder, [], [])
    assert 1 <= args.rollout_batch < 200
    assert 160 <= args.micro_tokens < 2048
    shape = shape_of(LlamaConfig.from_pretrained(base_folder))
    options = dict(four_bit=False, half_precision=False, rank=4, checkpointing=False, eight_bit_adam=False)
    plan = Plan([shape], **options, prompt=48, new=112)
    assert plan.peak(args.rollout_batch, args.micro_tokens) <= 8 * 2**20


def test_on_a_cpu_the_budget_is_what_the_machine_has_left(base_folder, machine):
    machine(8 * 2**20)
    cut = fit_to_memory(flags(), base_folder, base_folder, [], [])
    assert cut == fit_to_memory(flags(memory=8 / 1024), base_folder, base_folder, [], [])
    assert cut[0] < 200
    assert cut[1] < 2048


@pytest.mark.parametrize("absurd", [{"rank": 200_000}, {"batch": 10**7}, {"eval_problems": 10**7}])
def test_what_the_machine_cannot_hold_is_refused(base_folder, machine, absurd):
    """A machine of 4 GiB."""
    machine(4 * GIB)
    with pytest.raises(ValueError, match=r"more than the budget of 4\.0 GiB.*a smaller --rank, .*--batch or --eval-problems"):
        fit_to_memory(flags(**absurd), base_folder, base_folder, [], [])


def test_an_absurd_rollout_batch_is_cut(base_folder, machine):
    machine(4 * GIB)
    rollout_batch, micro_tokens = fit_to_memory(flags(rollout_batch=10**6, batch=10**5), base_folder, base_folder, [], [])
    assert 100 < rollout_batch < 10**5
    assert micro_tokens == 2048


def test_the_default_run_fits_a_small_machine(machine, capsys):
    """With 1 GiB available, as on a machine of 4 GiB with other programs, the tiny preset keeps its batches."""
    machine(GIB)
    args = parse_args("--setting all --preset tiny --device cpu".split())
    largest = [run for run in runs_of(args) if run.arm in ("tandem", "rlvr-solo-16")]
    assert fit_to_memory(args, str(tiny.FOLDER), str(tiny.FOLDER), largest, []) == (200, 8192)
    assert "to fit" not in capsys.readouterr().out


def test_the_processes_of_a_machine_share_its_memory(machine, monkeypatch):
    machine(4 * GIB)
    assert free_memory(on_gpu=False) == 4 * GIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory(on_gpu=False) == GIB


@pytest.mark.parametrize("few", [{"batch": 4}, {"eval_problems": 4}])
def test_more_processes_than_rollouts_are_refused(base_folder, monkeypatch, few):
    monkeypatch.setattr("lab.parallel.gather", lambda value: [value])
    monkeypatch.setattr("lab.parallel.world_size", lambda: 4)
    fit_to_memory(flags(**few), base_folder, base_folder, [], [])
    monkeypatch.setattr("lab.parallel.world_size", lambda: 5)
    with pytest.raises(ValueError, match="do not give each of the 5 processes a rollout: .*fewer processes with --nproc-per-node"):
        fit_to_memory(flags(**few), base_folder, base_folder, [], [])


def test_a_run_that_cannot_fit_is_refused(base_folder):
    with pytest.raises(ValueError, match="more than the budget of 1 MiB"):
        fit_to_memory(flags(memory=1 / 1024), base_folder, base_folder, [], [])


def test_the_weights_of_a_second_checkpoint_are_counted(base_folder, tmp_path, capsys):
    config = LlamaConfig(hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, vocab_size=320)
    config.save_pretrained(tmp_path)
    for junior in (base_folder, str(tmp_path)):
        fit_to_memory(flags(), base_folder, junior, [], [])
    shared, separate = (int(size) for size in re.findall(r"weights (\d+) MiB", capsys.readouterr().out))
    # 10.5 million parameters in linear layers and 0.3 million in others, of 4 bytes each.
    assert separate - shared == pytest.approx(41.3, abs=1)


def test_a_text_beyond_the_context_is_refused(base_folder):
    """The base has a context of 1024: 48 tokens of prompt and 977 new ones are one too many."""
    fit_to_memory(flags(max_new_tokens=976), base_folder, base_folder, [], [])
    with pytest.raises(ValueError, match="48 tokens of prompt and --max-new-tokens 977 exceed its context of 1024"):
        fit_to_memory(flags(max_new_tokens=977), base_folder, base_folder, [], [])


def test_what_was_cut_is_said(base_folder, capsys):
    fit_to_memory(flags(memory=8 / 1024), base_folder, base_folder, [], [])
    assert re.search(r"to fit, \d+ rollouts at a time instead of 200 and \d+ tokens per pass instead of 2048", capsys.readouterr().out)


def test_a_shape_that_no_model_has_is_left_to_the_loading_of_the_model(base_folder, tmp_path, capsys):
    config = json.loads(Path(base_folder, "config.json").read_text()) | {"hidden_size": -8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert fit_to_memory(flags(), str(tmp_path), str(tmp_path), [], []) == (200, 2048)
    assert "memory plan: none for" in capsys.readouterr().out


def test_an_architecture_without_a_plan_is_not_blocked(base_folder, monkeypatch, capsys):
    def no_shape(config):
        raise AttributeError("head_dim is a per-layer attribute")

    monkeypatch.setattr("lab.memory.shape_of", no_shape)
    assert fit_to_memory(flags(), base_folder, base_folder, [], []) == (200, 2048)
    assert "memory plan: none for" in capsys.readouterr().out


def test_runs_at_a_time_share_the_memory_and_the_largest_batch_counts(base_folder, machine):
    """Two jobs plan for half of what is available each; an arm with more rollouts per update than the command line counts."""
    machine(16 * 2**20)
    half = fit_to_memory(flags(jobs=2), base_folder, base_folder, [], [])
    machine(8 * 2**20)
    assert half == fit_to_memory(flags(), base_folder, base_folder, [], [])
    with pytest.raises(ValueError, match="more than the budget"):
        fit_to_memory(flags(), base_folder, base_folder, [flags(batch=10**5)], [])


# glibc keeps blocks like these, because a block of the same size was freed before, and small ones between them are in use.
HOARD = """
import lab, psutil, torch
from lab.memory import release_freed
torch.ones(5 * 2**20)
blocks = [(torch.ones(5 * 2**20), torch.ones(2**16)) for _ in range(20)]
blocks = [small for large, small in blocks]
before = psutil.Process().memory_info().rss
release_freed()
print(before - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to release memory")
def test_freed_memory_is_released():
    root = Path(__file__).parents[1]
    released = subprocess.run([sys.executable, "-c", HOARD], cwd=root, capture_output=True, text=True, check=True).stdout
    # The twenty blocks are 400 MiB, of which the C library may have released some by itself.
    assert int(released) > 200 * 2**20
