"""What tandem rollouts and updates cost:  python -m lab.benchmark [--only PART]

    part      what is measured
    tiny      seconds of 152 rollouts of 112 tokens by the tiny base: transformers' generate (the
              senior alone), rollout with p = 1 (solo) and with p = 0.5 (tandem)
    update    8 rollouts of 32 + 224 tokens: loss and gradient, with completion_logprobs of
              lab/engine.py and with the definition, plain_logprobs of reinforce.py, for
              vocabularies of 32,000 and 152,000 tokens
    cuda      two checkpoints of the size of Llama-2-7B with random weights in NF4: their weights,
              31 rollouts of 200 + 256 tokens, an update on them, and their times, as in the part
              `tiny`

Without --only all parts run, cuda only where there is a GPU. Each part prints a JSON object.
peak_mib: on a GPU, the peak of the tensors minus what was in use before; on a CPU, by how much the
peak of the process rose. Times are medians, but for the one rollout and update of the part cuda,
and depend on the machine: compare ratios. Nothing here says how good a model is.
"""

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import reinforce
from lab import engine, models, problems, runs
from lab.experiments import flags_of_run
from rollout import Pair, Rollouts, random_numbers, rollout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEMPERATURE, REPEATS = 0.7, 5

# ------------------------------------------------------------------------------------------------
# Measuring


def measure(run: Callable[[], object]) -> dict[str, float]:
    """Seconds of run(), and the memory in MiB that it needs in addition."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before, started = peak_memory(), time.perf_counter()
    run()
    # First the memory, because reading it waits for the GPU.
    return {"peak_mib": peak_memory() - before, "seconds": time.perf_counter() - started}


def peak_memory() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def write(pair: Pair, prompts: list, new: int, p: float = 0.5) -> Rollouts:
    noise, coins = random_numbers(len(prompts), new, seed=0)
    return rollout(pair, prompts, prompts, noise.to(DEVICE), coins, p=p)


def add_gradient(senior, rollouts: Rollouts) -> None:
    """The gradient as run_gsm8k.py computes it, with the weight 1 for every token."""
    weights, num_tokens = rollouts.completion_mask.float(), rollouts.completion_mask.sum()
    for few, few_weights in engine.micro_batches(rollouts, weights, max_tokens=8192):
        reinforce.loss(senior, few, few_weights, num_tokens, TEMPERATURE)[0].backward()


def compare_rollouts(pair: Pair, prompts: list[list[int]], new: int) -> dict:
    """Median seconds per method; all of them write `new` tokens for every prompt."""
    pair.end_ids, pair.senior.generation_config.eos_token_id = [-1], None  # no token ends one
    ids, mask = engine.pad(prompts, "left", DEVICE)
    inputs = dict(input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=True, top_k=0)
    generate = partial(pair.senior.generate, **inputs, temperature=TEMPERATURE, pad_token_id=0)
    ours = partial(write, pair, prompts, new)
    methods = {"generate": generate, "solo": partial(ours, p=1.0), "tandem": partial(ours, p=0.5)}
    # The methods take turns, so that a slow minute does not fall on one of them alone. The first
    # turn is a warm-up.
    turns = [{name: measure(run) for name, run in methods.items()} for _ in range(1 + REPEATS)]
    seconds = {name: median(turn[name]["seconds"] for turn in turns[1:]) for name in methods}
    ratios = {name: value / seconds["generate"] for name, value in seconds.items()}
    return {"tokens": new, "seconds": seconds, "of_generate": ratios}


# ------------------------------------------------------------------------------------------------
# The parts


def measure_tiny() -> dict:
    flags = flags_of_run({"device": DEVICE, "bfloat16": DEVICE == "cuda"}, "tandem", seed=0)
    pair = models.load_pair(flags)
    texts = [problems.prompt(problem.question) for problem in problems.generate(152, "test", 0)]
    return compare_rollouts(pair, models.encode(pair.senior_tokenizer, texts), new=112)


def measure_updates() -> dict:
    """Each in a process of its own, in which nothing has used memory before."""
    cases = [(name, size) for size in (32_000, 152_000) for name in ("plain", "completion")]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return {f"{name} {size}": pool.apply(measure_update, (name, size)) for name, size in cases}


def measure_update(name: str, vocab_size: int) -> dict[str, float]:
    """An update of a small Llama with "plain" or "completion" log-probabilities."""
    # For "plain", the definition replaces the fast version, in this process only.
    reinforce.completion_logprobs = getattr(reinforce, f"{name}_logprobs")
    sizes = dict(vocab_size=vocab_size, hidden_size=256, intermediate_size=512)
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2)).to(DEVICE)
    pair = random_pair(base, base, vocab_size)
    rollouts = write(pair, torch.randint(vocab_size, (8, 32)).tolist(), new=224, p=1.0)
    add_gradient(pair.senior, engine.select(rollouts, [0]))  # warm-up
    found = [measure(lambda: add_gradient(pair.senior, rollouts)) for _ in range(REPEATS)]
    # The peak is that of the first update, as the process keeps freed memory.
    return found[0] | {"seconds": median(one["seconds"] for one in found)}


def measure_cuda() -> dict:
    config = LlamaConfig()  # its defaults are the sizes of Llama-2-7B
    pair = random_pair(random_base(config), random_base(config), config.vocab_size)
    models.enable_checkpointing(pair.senior)
    prompts, rollouts = torch.randint(config.vocab_size, (31, 200)).tolist(), []
    found = {"weights_mib": torch.cuda.memory_allocated() / 2**20}
    found["rollout"] = measure(lambda: rollouts.append(write(pair, prompts, new=256)))
    optimizer = models.make_optimizer(pair.senior, argparse.Namespace(eight_bit_adam=True, lr=1e-4))
    found["update"] = measure(lambda: (add_gradient(pair.senior, *rollouts), optimizer.step()))
    return found | compare_rollouts(pair, prompts, new=256)


def random_pair(base, junior, vocab_size: int) -> Pair:
    senior = models.disable_dropout(models.add_adapter(base, rank=16))
    return Pair(senior, models.disable_dropout(junior), None, None, [-1], [b" word"] * vocab_size)


def random_base(config: LlamaConfig) -> LlamaForCausalLM:
    """A Llama with random weights, its linear layers in NF4 except the output layer.

    Its matrices are views of the same numbers, so that none of it is ever in memory at full
    precision: the layers are quantised one by one.
    """
    with torch.device("meta"):
        parameters = dict(LlamaForCausalLM(config).named_parameters())
    numbers = 0.02 * torch.randn(max(p.numel() for p in parameters.values()))
    weights = {name: numbers[: p.numel()].view(p.shape) for name, p in parameters.items()}
    options = models.loading_options(torch.bfloat16, DEVICE, four_bit=True)
    return LlamaForCausalLM.from_pretrained(None, config=config, state_dict=weights, **options)


# ------------------------------------------------------------------------------------------------
# The command line

PARTS = {"tiny": measure_tiny, "update": measure_updates}
PARTS |= {"cuda": measure_cuda} if DEVICE == "cuda" else {}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What tandem rollouts and updates cost, as JSON.")
    parser.add_argument("--only", choices=list(PARTS), help="measure this part only")
    only = parser.parse_args().only
    for part in [only] if only else PARTS:
        found = {part: PARTS[part]() | runs.describe_machine(DEVICE)}
        print(json.dumps(found, indent=1), flush=True)
