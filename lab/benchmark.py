"""What tandem rollouts and updates cost, as ratios within one run:  python -m lab.benchmark [--only PART] [--out FILE]

    part      what is measured
    tiny      rollouts of the tiny base at batch 152 (see below)
    smol      rollouts of SmolLM2-135M at batches 16 and 64
    update    time and peak memory of an update: completion_logprobs in micro-batches ("ours") beside plain_loss, which
              holds all logits ("full"), for two sizes of vocabulary
    memory    the plan of lab/memory.py beside what is used, for pairs with random weights in NF4; on CUDA also a pair of
              the size of Llama-2-7B in 24 GiB
    cuda      rollouts of a pair of the size of Llama-2-7B with random weights in NF4, on one base and on two

Rollouts are written by several methods, which take turns. Their median times are compared with those of `generate`. All
but `ending` write the same number of tokens. `generate` and `tandem` are also compared at three lengths.

    generate  transformers' generate, the senior alone
    plain     two models one after the other at every token, each with the cache of transformers
    solo      rollout.py with p = 1
    tandem    rollout.py with p = 0.5
    ending    the same, but a rollout ends at its end token, and finished rows leave the batch (tiny only)

Without --only all parts run (cuda only where there is a GPU). Nothing here measures the quality of a model (run_gsm8k.py
does). Times on a busy machine say little; their ratios say somewhat more.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from lab import models, problems, tiny
from lab.memory import GIB, RESERVE, Plan, shape_of
from lab.runs import describe_machine
from reinforce import completion_logprobs, micro_batches, plain_loss, select
from rollout import Pair, Rollouts, random_numbers, rollout, sample
from tandem import Handoff, build_tables, token_bytes

TEMPERATURE = 0.7

# ----------------------------------------------------------------------------------------------------------------------
# Rollouts

METHODS = ("generate", "plain", "solo", "tandem")


def measure_tiny(args: argparse.Namespace, device: str) -> list[dict]:
    base = str(tiny.FOLDER)
    pair = models.load_pair(base, base, rank=16, four_bit=False, device=device, bfloat16=device != "cpu")
    row = report_rollouts("tiny", pair, batch=152, steps=112, repeats=args.repeats, methods=(*METHODS, "ending"))
    return [row, *report_lengths("tiny", pair, batch=32, repeats=min(args.repeats, 3))]


def measure_smol(args: argparse.Namespace, device: str) -> list[dict]:
    pair = models.load_pair(args.smol, args.smol, rank=16, four_bit=False, device=device, bfloat16=device != "cpu")
    rows = [report_rollouts("SmolLM2-135M", pair, batch, steps=32, repeats=args.repeats) for batch in (16, 64)]
    return rows + report_lengths("SmolLM2-135M", pair, batch=2, repeats=1)


def measure_cuda(args: argparse.Namespace, device: str) -> list[dict]:
    rows = []
    for shared in (True, False):
        reset_peak(device)
        pair = random_pair(llama(4096, 32), device, shared)
        name = f"7B in NF4, {'one base' if shared else 'two checkpoints'}"
        rows += [report_rollouts(name, pair, batch, steps=256, repeats=min(args.repeats, 3)) for batch in (76, 152)]
        rows[-1]["peak_gib"] = memory_peak(device) / GIB
        print(f"peak {rows[-1]['peak_gib']:.1f} GiB")
        del pair  # before the next one is built
    return rows


def report_rollouts(name: str, pair: Pair, batch: int, steps: int, repeats: int, methods: tuple[str, ...] = METHODS) -> dict:
    """Print and return the seconds of every method, and their ratio to those of generate."""
    seconds = rollout_times(pair, batch, steps, repeats, methods)
    ratios = {method: seconds[method] / seconds["generate"] for method in methods}
    cells = [f"{method} {seconds[method]:.2f} s ({ratios[method]:.2f})" for method in methods]
    print(f"{name}, batch {batch}, {steps} tokens: {', '.join(cells)}")
    return {"pair": name, "batch": batch, "steps": steps, "seconds": seconds, "of_generate": ratios}


def report_lengths(name: str, pair: Pair, batch: int, repeats: int) -> list[dict]:
    """How the time per token grows with the length of the text, beside generate's."""
    rows = []
    for steps in (64, 256, 1024):
        seconds = rollout_times(pair, batch, steps, repeats, ("generate", "tandem"))
        ms_per_token = {method: 1000 * total / steps for method, total in seconds.items()}
        rows.append({"pair": name, "batch": batch, "steps": steps, "ms_per_token": ms_per_token})
        cells = [f"{method} {ms:.1f} ms per token" for method, ms in ms_per_token.items()]
        print(f"{name}, batch {batch}, {steps} tokens: {', '.join(cells)}")
    return rows


def rollout_times(pair: Pair, batch: int, steps: int, repeats: int, methods: tuple[str, ...]) -> dict[str, float]:
    """Median seconds that each method takes to write `steps` tokens for `batch` prompts."""
    device = pair.senior.device
    texts = [problems.prompt(problem.question) for problem in problems.generate(batch, "test", 0)]
    prompts = models.encode_prompts(pair.senior_tokenizer, texts, device)
    run = rollout_methods(pair, prompts, steps)
    for method in methods:
        run[method]()  # warm-up
    synchronise(device)
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(repeats):
        # The methods take turns, so that a slow minute of the machine does not fall on one of them alone.
        for method in methods:
            started = time.perf_counter()
            run[method]()
            synchronise(device)
            seconds[method].append(time.perf_counter() - started)
    return {method: statistics.median(times) for method, times in seconds.items()}


def rollout_methods(pair: Pair, prompts: tuple[torch.Tensor, torch.Tensor], steps: int) -> dict[str, Callable[[], object]]:
    """The methods in the docstring of this file, as functions that write `steps` tokens for these prompts."""
    # No token ends a text, so that all methods write the same number of tokens.
    endless = replace(pair, end_ids=[-1])
    pair.senior.generation_config.eos_token_id = None
    options = dict(do_sample=True, temperature=TEMPERATURE, top_k=0, max_new_tokens=steps, pad_token_id=0)

    def ours(pair: Pair, p: float) -> Rollouts:
        numbers = random_numbers(len(prompts[0]), steps, seed=0)
        return rollout(pair, prompts, prompts, *numbers, p=p, temperature=TEMPERATURE)

    return {
        "generate": lambda: pair.senior.generate(input_ids=prompts[0], attention_mask=prompts[1], **options),
        "plain": lambda: plain_rollout(pair, prompts, steps),
        "solo": lambda: ours(endless, p=1.0),
        "tandem": lambda: ours(endless, p=0.5),
        "ending": lambda: ours(pair, p=0.5),
    }


@torch.no_grad()
def plain_rollout(pair: Pair, prompts: tuple[torch.Tensor, torch.Tensor], steps: int) -> None:
    """The loop that one would write first: at every token the two models run one after the other, each with its own cache."""
    ids, mask = prompts  # (B, P) each
    batch, device = len(ids), ids.device
    handoff = Handoff(pair.tables, "word", 0.5, torch.rand(steps, batch).to(device))
    both = (pair.senior, pair.junior)
    inputs = dict(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=True)
    outputs = [model(**inputs, logits_to_keep=1) for model in both]
    for _ in range(steps):
        samples = [sample(output.logits[:, -1], torch.rand(batch).to(device), TEMPERATURE)[0] for output in outputs]
        written, _ = handoff.choose(*samples)  # (B,)
        mask = functional.pad(mask, (0, 1), value=1)
        inputs = dict(input_ids=written[:, None], attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1, use_cache=True)
        outputs = [model(**inputs, past_key_values=output.past_key_values) for model, output in zip(both, outputs)]


# ----------------------------------------------------------------------------------------------------------------------
# Pairs with random weights in NF4


def llama(hidden: int, layers: int) -> LlamaConfig:
    """A model with the proportions of Llama 2; hidden width 4096 and 32 layers are those of Llama-2-7B."""
    return LlamaConfig(
        vocab_size=32_000,
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=max(4, hidden // 128),
    )


def random_pair(config: LlamaConfig, device: str, shared: bool, checkpointing: bool = False) -> Pair:
    """A pair with random weights in NF4, on one base (shared) or two, with the tokenizer of the tiny base."""
    base = str(tiny.FOLDER)
    tokenizer = models.load_tokenizers(base, base)[0]
    pieces = token_bytes(tokenizer, config.vocab_size)
    senior = models.disable_dropout(models.add_adapter(random_base(config, device), rank=16))
    if checkpointing:
        models.enable_checkpointing(senior)
    return Pair(
        senior=senior,
        junior=models.SharedJunior(senior) if shared else models.disable_dropout(random_base(config, device)),
        senior_tokenizer=tokenizer,
        junior_tokenizer=tokenizer,
        end_ids=[tokenizer.eos_token_id],
        pieces=pieces,
        tables=build_tables(pieces).to(device),
    )


def random_base(config: LlamaConfig, device: str) -> LlamaForCausalLM:
    """A frozen Llama with random weights, its linear layers in NF4 except the output layer.

    It is built on the meta device and filled layer by layer, so that it is never in memory at full precision.
    """
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    # The tables of the rotary embedding are buffers, which the loop over parameters below does not fill.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear) and child is not model.lm_head:
                setattr(parent, name, random_four_bit_layer(child, device, dtype))
        for name, parameter in list(parent.named_parameters(recurse=False)):
            if parameter.is_meta:
                values = random_values(parameter.shape, device, dtype)
                setattr(parent, name, torch.nn.Parameter(values, requires_grad=False))
    model.is_loaded_in_4bit = True
    return model


def random_four_bit_layer(layer: torch.nn.Linear, device: str, dtype: torch.dtype) -> torch.nn.Module:
    # Imported here, because the parts without 4-bit weights do not need it.
    import bitsandbytes as bnb

    new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, False, dtype, quant_type="nf4", device="meta")
    values = random_values(layer.weight.shape, device, dtype)
    new.weight = bnb.nn.Params4bit(values, requires_grad=False, quant_type="nf4")
    return new.to(device)


def random_values(shape: torch.Size, device: str, dtype: torch.dtype) -> torch.Tensor:
    """Ones for the weights of a norm, small random numbers for matrices."""
    if len(shape) == 1:
        return torch.ones(shape, device=device, dtype=dtype)
    return 0.02 * torch.randn(shape, device=device, dtype=dtype)


def random_rollouts(rows: int, prompt: int, new: int, vocab_size: int, device: str) -> Rollouts:
    """Rollouts of random tokens without padding, written by the senior alone."""
    ids = torch.randint(0, vocab_size, (rows, prompt + new), device=device)
    ones = torch.ones_like(ids)
    return Rollouts(
        prompt_ids=ids[:, :prompt],
        prompt_mask=ones[:, :prompt],
        junior_prompt_ids=ids[:, :prompt],
        junior_prompt_mask=ones[:, :prompt],
        completion_ids=ids[:, prompt:],
        completion_mask=ones[:, prompt:],
        senior_mask=ones[:, prompt:],
        discarded_ids=ids[:, prompt:],
        toss_mask=torch.zeros_like(ones[:, prompt:]),
        logprobs=torch.zeros(rows, new, device=device),
        texts=[""] * rows,
    )


# ----------------------------------------------------------------------------------------------------------------------
# The update


def measure_update(args: argparse.Namespace, device: str) -> list[dict]:
    rows = []
    for vocab_size in (32_000, 152_000):
        full, ours, difference = compare_updates(vocab_size, device, args.repeats)
        of_full = {key: ours[key] / full[key] for key in full}
        rows.append({"vocabulary": vocab_size, "full": full, "ours": ours, "of_full": of_full, "gradients_differ_by": difference})
        print(
            f"update, vocabulary {vocab_size}: full {full['seconds']:.2f} s and {full['peak_mib']:.0f} MiB, "
            f"ours {ours['seconds']:.2f} s and {ours['peak_mib']:.0f} MiB; ratios {of_full['seconds']:.2f} and "
            f"{of_full['peak_mib']:.2f}; the gradients differ by {difference:.0e} of their norm"
        )
    return rows


def compare_updates(vocab_size: int, device: str, repeats: int) -> tuple[dict, dict, float]:
    """Medians of update_once for the methods "full" and "ours", and the relative distance of their gradients."""
    runs: dict[str, list[dict]] = {"full": [], "ours": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):
            for method, measured in runs.items():
                file = f"{folder}/{method}"
                measured.append(in_a_process("update_once", method=method, vocab_size=vocab_size, device=device, gradient_file=file))
        gradients = {method: torch.load(f"{folder}/{method}") for method in runs}
    full, ours = ({key: statistics.median(run[key] for run in measured) for key in measured[0]} for measured in runs.values())
    difference = (gradients["ours"] - gradients["full"]).norm() / gradients["full"].norm()
    return full, ours, difference.item()


def update_once(method: str, vocab_size: int, device: str, gradient_file: str) -> dict:
    """One update with 8 rollouts of 32 + 224 tokens: its seconds and its peak memory, less the model's own.

    Runs in a process of its own, and writes the gradient to a file.
    """
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocab_size, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    # As under an adapter, which leaves both of them frozen.
    for frozen in (model.get_output_embeddings(), model.get_input_embeddings()):
        frozen.requires_grad_(False)
    rollouts = random_rollouts(8, 32, 224, vocab_size, device)
    update = {"full": update_full, "ours": partial(update_ours, micro_tokens=2**20)}[method]

    update(model, select(rollouts, torch.tensor([0])))  # warm-up
    model.zero_grad()
    reset_peak(device)
    before, started = memory_used(device), time.perf_counter()
    update(model, rollouts)
    synchronise(device)
    seconds = time.perf_counter() - started
    gradients = [parameter.grad.flatten().cpu() for parameter in models.trainable_parameters(model)]
    torch.save(torch.cat(gradients), gradient_file)
    return {"seconds": seconds, "peak_mib": (memory_peak(device) - before) / 2**20}


def update_full(model, rollouts: Rollouts) -> None:
    """The gradient by the definition, which holds the logits of the whole batch."""
    plain_loss(model, rollouts, rollouts.completion_mask.float(), TEMPERATURE).backward()


def update_ours(model, rollouts: Rollouts, micro_tokens: int) -> None:
    """The gradient as the training loop computes it, every token with weight 1."""
    weights, num_tokens = rollouts.completion_mask.float(), rollouts.completion_mask.sum()
    for part, part_weights in micro_batches(rollouts, weights, micro_tokens):
        (-(part_weights * completion_logprobs(model, part, TEMPERATURE)).sum() / num_tokens).backward()


# ----------------------------------------------------------------------------------------------------------------------
# Memory: the plan of lab/memory.py beside what is used

SMALL_RUN = dict(rollout_batch=16, micro_tokens=1280, prompt=64, new=96)
LARGE_RUN = dict(rollout_batch=152, micro_tokens=8192, prompt=200, new=256)
MEMORY_PAIRS = [
    dict(hidden=512, layers=16, shared=True, checkpointing=False),
    dict(hidden=1024, layers=8, shared=False, checkpointing=True),
    dict(hidden=2048, layers=8, shared=True, checkpointing=True),
]
LLAMA_2_PAIR = dict(hidden=4096, layers=32, shared=False, checkpointing=True)


def measure_memory(args: argparse.Namespace, device: str) -> list[dict]:
    cases = [(kind, SMALL_RUN) for kind in MEMORY_PAIRS]
    if device == "cuda":
        cases.append((LLAMA_2_PAIR, LARGE_RUN))
    rows = []
    for kind, sizes in cases:
        found = in_a_process("memory_once", kind=kind, sizes=sizes, device=device)
        rows.append(kind | found)
        bases = "one base" if kind["shared"] else "two checkpoints"
        recomputing = "with" if kind["checkpointing"] else "without"
        cells = [f"{name} {cell['planned']:.0f} and {cell['measured']:.0f}" for name, cell in found.items()]
        print(f"memory, {kind['layers']} layers of width {kind['hidden']}, {bases}, {recomputing} checkpointing, ", end="")
        print(f"MiB planned and measured: {', '.join(cells)}")
    return rows


def memory_once(kind: dict, sizes: dict, device: str) -> dict[str, dict[str, float]]:
    """MiB of a random pair in NF4, planned and measured: weights, rollout, update, and the peak of the two.

    kind: see MEMORY_PAIRS. sizes: see SMALL_RUN; they are cut to what the plan fits into 24 GiB. Runs in a process of its
    own.
    """
    shapes = [shape_of(llama(kind["hidden"], kind["layers"]))] * (1 if kind["shared"] else 2)
    options = dict(four_bit=True, half_precision=device == "cuda", rank=16, checkpointing=kind["checkpointing"], eight_bit_adam=False)
    plan = Plan(shapes, **options, prompt=sizes["prompt"], new=sizes["new"])
    rollout_batch, micro_tokens = plan.fit(24 * GIB - RESERVE, sizes["rollout_batch"], sizes["micro_tokens"])
    sizes = sizes | {"rollout_batch": rollout_batch, "micro_tokens": micro_tokens}
    planned, measured = planned_bytes(plan, rollout_batch, micro_tokens), measured_bytes(kind, device, **sizes)
    return {name: {"planned": planned[name] / 2**20, "measured": measured[name] / 2**20} for name in planned}


def planned_bytes(plan: Plan, rollout_batch: int, micro_tokens: int) -> dict[str, float]:
    # Gradients and moments exist from the first update on. Until then the adapter is its weights alone: 4 bytes of 16.
    before_training = plan.weights() + plan.adapter() / 4
    return {
        "weights": before_training,
        "rollout": before_training + plan.rollout(rollout_batch),
        "update": plan.weights() + plan.adapter() + plan.update(micro_tokens),
        "peak": plan.peak(rollout_batch, micro_tokens),
    }


def measured_bytes(kind: dict, device: str, rollout_batch: int, micro_tokens: int, prompt: int, new: int) -> dict[str, int]:
    # A first small pair loads the libraries, whose memory is not part of the plan.
    random_pair(llama(64, 1), device, shared=True)
    reset_peak(device)
    empty = memory_used(device)
    pair = random_pair(llama(kind["hidden"], kind["layers"]), device, kind["shared"], kind["checkpointing"])
    weights = memory_used(device) - empty
    rollouts = random_rollouts(rollout_batch, prompt, new, len(pair.pieces), device)
    rollout_peak = peak_of_rollout(pair, rollouts, device) - empty
    update_peak = peak_of_update(pair, rollouts, micro_tokens, device) - empty
    return {"weights": weights, "rollout": rollout_peak, "update": update_peak, "peak": max(rollout_peak, update_peak)}


def peak_of_rollout(pair: Pair, rollouts: Rollouts, device: str) -> int:
    """Peak bytes of writing rollouts of the size of `rollouts`, none of which ends early."""
    reset_peak(device)
    prompts = rollouts.prompt_ids, rollouts.prompt_mask
    numbers = random_numbers(*rollouts.completion_ids.shape, seed=0)
    rollout(replace(pair, end_ids=[-1]), prompts, prompts, *numbers)
    return memory_peak(device)


def peak_of_update(pair: Pair, rollouts: Rollouts, micro_tokens: int, device: str) -> int:
    optimizer = torch.optim.AdamW(models.trainable_parameters(pair.senior))
    reset_peak(device)
    # Twice, because AdamW allocates its moments in the first step.
    for _ in range(2):
        update_ours(pair.senior, rollouts, micro_tokens)
        optimizer.step()
    return memory_peak(device)


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def synchronise(device: torch.device | str) -> None:
    """Wait for the GPU, which runs behind the program."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def memory_used(device: str) -> int:
    """Bytes in use now: of tensors on a GPU, of the whole process on a CPU (Linux)."""
    return torch.cuda.memory_allocated() if device == "cuda" else process_status("VmRSS")


def memory_peak(device: str) -> int:
    """The most bytes in use since reset_peak."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else process_status("VmHWM")


def reset_peak(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        # 5 resets the peak of the resident set: see proc(5).
        Path("/proc/self/clear_refs").write_text("5")


def process_status(key: str) -> int:
    """A size from /proc/self/status, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def in_a_process(function: str, **arguments) -> dict:
    """Call a function of this file in a process of its own, so that no memory is left over from another measurement."""
    command = [sys.executable, "-m", "lab.benchmark", "--call", json.dumps([function, arguments])]
    environment = dict(os.environ)
    if function == "memory_once":
        # The C library then returns freed tensors to the system at once, and the peak of the process is that of its tensors.
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    root = Path(__file__).parent.parent
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment, cwd=root)
    return json.loads(done.stdout.splitlines()[-1])


# ----------------------------------------------------------------------------------------------------------------------
# The command line


PARTS = {"tiny": measure_tiny, "smol": measure_smol, "update": measure_update, "memory": measure_memory, "cuda": measure_cuda}
CALLS = {"update_once": update_once, "memory_once": memory_once}


def main() -> None:
    args = make_parser().parse_args()
    if args.call:
        function, arguments = json.loads(args.call)
        print(json.dumps(CALLS[function](**arguments)))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.only == "cuda" and device == "cpu":
        sys.exit("error: --only cuda: this machine has no CUDA device")
    # Measuring takes minutes, so a file to which its numbers cannot be added is noticed first.
    if args.out:
        read_parts(Path(args.out))
    runnable = [part for part in PARTS if part != "cuda" or device == "cuda"]
    for part in [args.only] if args.only else runnable:
        started = time.time()
        rows = PARTS[part](args, device)
        if args.out:
            minutes = round((time.time() - started) / 60, 1)
            write(Path(args.out), part, {**describe_machine(device), "minutes": minutes, "rows": rows})


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter, description="What rollouts and updates cost.")
    parser.add_argument("--only", choices=PARTS, help="measure one part; without it all of them, cuda only where there is a GPU")
    parser.add_argument("--smol", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub id or folder of the model of part smol")
    parser.add_argument("--repeats", type=int, default=5, help="measurements per method, of which the median is reported")
    parser.add_argument("--out", help="write the numbers of each part to this JSON file, and keep those of other parts there")
    # For in_a_process.
    parser.add_argument("--call", help=argparse.SUPPRESS)
    return parser


def write(path: Path, part: str, numbers: dict) -> None:
    """Put the numbers of one part into the file, in place of older ones of the same part."""
    path.write_text(json.dumps(read_parts(path) | {part: numbers}, indent=1) + "\n")


def read_parts(path: Path) -> dict:
    """The parts that the file holds already. Exits with a message if it holds something else."""
    try:
        return {} | json.loads(path.read_bytes()) if path.is_file() else {}
    except (ValueError, TypeError, RecursionError) as error:
        sys.exit(f"error: {path} cannot be used ({type(error).__name__}): restore it from a copy, remove it, or choose another --out")


if __name__ == "__main__":
    main()
