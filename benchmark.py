"""What tandem rollouts and updates cost, as ratios within one run:  python benchmark.py [--only PART] [--out FILE]

    tiny, smol   rollouts of the tiny base at batch 152 and of SmolLM2-135M at 16 and 64, all of one length, in turn, as medians:
                 generate   transformers' generate, the senior alone
                 plain      two models one after the other at every token, each with transformers' own cache
                 solo       rollout.py with p = 1
                 tandem     rollout.py with p = 0.5;  ending: the same where rows end when they are done
                 and the time a token of `generate` and `tandem` at three lengths
    update       time and peak memory of reinforce.py beside full logits with cross-entropy, for two vocabularies
    memory       what memory.py plans beside what is used, for pairs with random weights in NF4; on CUDA the 7B pair in 24 GiB too
    cuda         rollouts of a pair of the shape of Llama-2-7B with random weights in NF4, on one base and on two

Not here: the quality of anything (run_gsm8k.py). Times of a busy machine mean little, ratios somewhat more.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

import models
import problems
import tiny
from memory import GIB, RESERVE, Plan, shape_of
from reinforce import backward, select
from rollout import Rollouts, random_numbers, rollout, sample
from run_gsm8k import COMMIT, SMOL
from tandem import Handoff, build_boundaries, token_bytes

# ----------------------------------------------------------------------------------------------------------------------
# Rollouts

WAYS = ("generate", "plain", "solo", "tandem")


def plain(pair, prompts, boundaries, steps: int) -> None:
    """Two models one after the other at each token: the loop that one would write first."""
    batch = len(prompts[0])
    handoff = Handoff(boundaries, "word", 0.5, torch.rand(steps, batch).to(prompts[0].device))
    mask, views = prompts[1], []
    for model in (pair.senior, pair.junior):
        views.append(model(input_ids=prompts[0], attention_mask=mask, use_cache=True, logits_to_keep=1))
    for _ in range(steps):
        drawn = [sample(view.logits[:, -1], torch.rand(batch).to(mask.device), 0.7)[0] for view in views]
        ids, _ = handoff.choose(*drawn)
        mask = functional.pad(mask, (0, 1), value=1)
        inputs = dict(input_ids=ids[:, None], attention_mask=mask, use_cache=True, position_ids=mask.sum(1, keepdim=True) - 1)
        views = [m(**inputs, past_key_values=view.past_key_values) for m, view in zip((pair.senior, pair.junior), views)]


def rollout_times(pair, batch: int, steps: int, repeats: int, ways: tuple[str, ...]) -> dict[str, float]:
    """Median seconds of each way to write `steps` tokens for `batch` prompts, the ways in turn."""
    tokenizer, device = pair.senior_tokenizer, pair.senior.device
    texts = [problems.prompt(problem.question) for problem in problems.generate(batch, "test", 0)]
    prompts = models.encode_prompts(tokenizer, texts, device)
    boundaries = build_boundaries(token_bytes(tokenizer, pair.vocab_size)).to(device)
    pair.senior.generation_config.eos_token_id = None  # nobody stops early, so that all write the same number of tokens

    def ours(p: float, ends: list[int]) -> None:
        numbers = random_numbers(batch, steps, seed=0)
        rollout(pair.senior, pair.junior, prompts, prompts, tokenizer, ends, boundaries, *numbers, p=p, temperature=0.7)

    options = dict(do_sample=True, temperature=0.7, top_k=0, max_new_tokens=steps, pad_token_id=0)
    run = {
        "generate": lambda: pair.senior.generate(input_ids=prompts[0], attention_mask=prompts[1], **options),
        "plain": lambda: plain(pair, prompts, boundaries, steps),
        "solo": lambda: ours(1.0, [-1]),
        "tandem": lambda: ours(0.5, [-1]),
        "ending": lambda: ours(0.5, pair.end_ids),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(repeats + 1):
        for way in ways:
            started = time.perf_counter()
            with torch.no_grad():
                run[way]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first one warms up
                seconds[way].append(time.perf_counter() - started)
    return {way: statistics.median(times) for way, times in seconds.items()}


def report_rollouts(name: str, pair, batches: list[int], steps: int, repeats: int, ways=WAYS) -> list:
    rows = []
    for batch in batches:
        times = rollout_times(pair, batch, steps, repeats, ways)
        ratios = {way: seconds / times["generate"] for way, seconds in times.items()}
        rows.append({"pair": name, "batch": batch, "steps": steps, "seconds": times, "of_generate": ratios})
        print(f"{name}, batch {batch}, {steps} tokens: " + ", ".join(f"{way} {times[way]:.2f} s ({ratios[way]:.2f})" for way in times))
    return rows


def report_lengths(name: str, pair, batch: int, repeats: int) -> list[dict]:
    """Time a token against length, beside generate's."""
    rows = []
    for steps in (64, 256, 1024):
        times = rollout_times(pair, batch, steps, repeats, ("generate", "tandem"))
        rows.append({"pair": name, "batch": batch, "steps": steps, "ms_a_token": {way: 1000 * times[way] / steps for way in times}})
        print(f"{name}, batch {batch}, {steps} tokens: " + ", ".join(f"{way} {1000 * times[way] / steps:.1f} ms a token" for way in times))
    return rows


def random_pair(config: LlamaConfig, device: str, shared: bool, checkpointing: bool = False) -> models.Pair:
    """A pair with random weights in NF4, on one base or two, with the tokenizer of the tiny base. Never whole in memory."""
    import bitsandbytes as bnb

    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32

    def values(shape) -> torch.nn.Parameter:
        numbers = torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape, device=device, dtype=dtype)  # norms; all else
        return torch.nn.Parameter(numbers.to(device, dtype), requires_grad=False)

    def base():
        with torch.device("meta"):
            model = LlamaForCausalLM(config).to(dtype)
        model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, torch.nn.Linear) and child is not model.lm_head:
                    layer = bnb.nn.Linear4bit(child.in_features, child.out_features, False, dtype, quant_type="nf4", device="meta")
                    layer.weight = bnb.nn.Params4bit(values(child.weight.shape).data, requires_grad=False, quant_type="nf4")
                    setattr(parent, name, layer.to(device))
            for name, parameter in list(parent.named_parameters(recurse=False)):
                if parameter.is_meta:
                    setattr(parent, name, values(parameter.shape))
        model.is_loaded_in_4bit = True
        return model

    tokenizer = models.load_tokenizers(*[str(tiny.base_folder())] * 2)[0]
    senior = models.without_dropout(models.add_adapter(base(), rank=16))
    if checkpointing:
        models.recompute_layers(senior)
    junior = models.SharedJunior(senior) if shared else models.without_dropout(base())
    return models.Pair(senior, junior, tokenizer, tokenizer, config.vocab_size, [tokenizer.eos_token_id])


def llama(hidden: int, layers: int) -> LlamaConfig:
    """The proportions of Llama 2; 4096, 32 is Llama-2-7B."""
    wide = hidden * 43 // 16
    return LlamaConfig(
        vocab_size=32_000, hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=max(4, hidden // 128)
    )


# ----------------------------------------------------------------------------------------------------------------------
# The update


def full_logits(model, rollouts: Rollouts, temperature: float) -> None:
    """The ordinary way: all logits of the batch at once, and cross-entropy."""
    ids = torch.cat([rollouts.prompt_ids, rollouts.completion_ids], 1)
    logits = model(input_ids=ids).logits[:, :-1].float() / temperature
    targets = ids[:, 1:].masked_fill(torch.arange(1, ids.shape[1], device=ids.device) < rollouts.prompt_ids.shape[1], -100)
    functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").div(rollouts.completion_mask.sum()).backward()


def update_once(way: str, vocabulary: int, device: str, gradient: str) -> dict:
    """Seconds and peak memory beyond the model's of one update of 8 rollouts of 32 + 224 tokens, in a process of its own.

    Writes the gradient to the file `gradient`.
    """
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    for frozen in (model.get_output_embeddings(), model.get_input_embeddings()):  # as under an adapter
        frozen.requires_grad_(False)
    rollouts = whole_rollouts(8, 32, 224, vocabulary, device)

    def update(few: Rollouts) -> None:
        if way == "full":
            full_logits(model, few, 0.7)
        else:
            backward(model, few, few.completion_mask.float(), 0.7, 2**20)

    update(select(rollouts, torch.tensor([0])))  # warms up
    model.zero_grad()
    reset_peak(device)
    before, started = used(device), time.perf_counter()
    update(rollouts)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    torch.save(torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]), gradient)
    return {"seconds": seconds, "peak_mib": (peak(device) - before) / 2**20}


def report_updates(device: str, repeats: int) -> list[dict]:
    rows = []
    for vocabulary in (32_000, 152_000):
        found: dict[str, list[dict]] = {"full": [], "ours": []}
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(repeats):
                for way, runs in found.items():
                    runs.append(in_a_process("update_once", way=way, vocabulary=vocabulary, device=device, gradient=f"{folder}/{way}"))
            gradients = {way: torch.load(f"{folder}/{way}") for way in found}
        difference = ((gradients["ours"] - gradients["full"]).norm() / gradients["full"].norm()).item()
        median = {way: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for way, runs in found.items()}
        of_full = {key: median["ours"][key] / median["full"][key] for key in median["full"]}
        rows.append({"vocabulary": vocabulary, **median, "of_full": of_full, "gradients_differ_by": difference})
        print(f"update, vocabulary {vocabulary}: ", end="")
        print(", ".join(f"{way} {numbers['seconds']:.2f} s and {numbers['peak_mib']:.0f} MiB" for way, numbers in median.items()), end="")
        print(f"; ratios {of_full['seconds']:.2f} and {of_full['peak_mib']:.2f}, gradients differ by {difference:.0e} of their norm")
    return rows


def whole_rollouts(rows: int, prompt: int, new: int, vocabulary: int, device: str) -> Rollouts:
    """Random tokens, no padding."""
    ids = torch.randint(0, vocabulary, (rows, prompt + new), device=device)
    ones = torch.ones_like(ids)
    completion = ids[:, prompt:], ones[:, prompt:], ones[:, prompt:], torch.zeros(rows, new, device=device)
    return Rollouts(ids[:, :prompt], ones[:, :prompt], *completion, [""] * rows)


# ----------------------------------------------------------------------------------------------------------------------
# Memory: the plan of memory.py beside what was used


def memory_once(hidden: int, layers: int, shared: bool, checkpointing: bool, rows: int, tokens: int, prompt: int, new: int, device: str):
    """MiB of weights, rollout and update of a random pair in NF4, measured and planned, in a process of its own.

    `rows` rollouts at a time and updates of `tokens` tokens a pass, or what the plan finds to fit into 24 GiB.
    """
    random_pair(llama(64, 1), device, shared=True)  # loads what is loaded but once
    reset_peak(device)
    shape = shape_of(llama(hidden, layers))
    how = dict(four_bit=True, half=device == "cuda", rank=16, checkpointing=checkpointing, eight_bit_adam=False)
    plan = Plan(shape, None if shared else shape, **how)
    rows, tokens = plan.fit(24 * GIB - RESERVE, rows, tokens, prompt, new)
    empty = used(device)
    pair = random_pair(llama(hidden, layers), device, shared, checkpointing)
    weights = used(device) - empty

    reset_peak(device)
    pieces = [bytes([97 + i % 26]) for i in range(pair.vocab_size)]
    whole = whole_rollouts(rows, prompt, new, pair.vocab_size, device)
    prompts = whole.prompt_ids, whole.prompt_mask
    numbers = random_numbers(rows, new, seed=0)
    rollout(pair.senior, pair.junior, prompts, prompts, pair.senior_tokenizer, [-1], build_boundaries(pieces).to(device), *numbers)
    rollout_peak = peak(device) - empty

    parameters = [parameter for parameter in pair.senior.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    reset_peak(device)
    for _ in range(2):  # the second time beside the optimiser's moments
        backward(pair.senior, whole, whole.completion_mask.float(), 0.7, tokens)
        optimizer.step()
    update_peak = peak(device) - empty
    adapter = plan.adapter()
    found = {
        "weights": (plan.weights() + adapter / 4, weights),
        "rollout": (plan.weights() + adapter / 4 + plan.rollout(rows, prompt, new), rollout_peak),
        "update": (plan.weights() + adapter + plan.update(tokens, prompt, new), update_peak),
        "peak": (plan.peak(rows, tokens, prompt, new), max(rollout_peak, update_peak)),
    }
    return {name: {"planned": planned / 2**20, "measured": measured / 2**20} for name, (planned, measured) in found.items()}


def report_memory(device: str) -> list[dict]:
    rows = []
    small, large = dict(rows=16, tokens=1280, prompt=64, new=96), dict(rows=152, tokens=8192, prompt=200, new=256)
    shapes = [(512, 16, True, False, small), (1024, 8, False, True, small), (2048, 8, True, True, small)]
    shapes += [(4096, 32, False, True, large)] if device == "cuda" else []
    for hidden, layers, shared, checkpointing, chunks in shapes:
        kind = {"hidden": hidden, "layers": layers, "shared": shared, "checkpointing": checkpointing}
        found = in_a_process("memory_once", **kind, **chunks, device=device)
        rows.append(kind | found)
        about = f"{'one base' if shared else 'two checkpoints'}, {'with' if checkpointing else 'without'} checkpointing"
        print(f"memory, {layers} layers of {hidden}, {about}, planned and measured MiB: ", end="")
        print(", ".join(f"{what} {found[what]['planned']:.0f} {found[what]['measured']:.0f}" for what in found))
    return rows


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def used(device: str) -> int:
    """Bytes in use now: of tensors on a GPU, of the whole process on a CPU (Linux)."""
    return torch.cuda.memory_allocated() if device == "cuda" else _status("VmRSS")


def peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def reset_peak(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")


def in_a_process(function: str, **arguments) -> dict:
    """Call a function of this file in a process of its own. Where only memory counts, what is freed leaves it at once."""
    command = [sys.executable, __file__, "--call", json.dumps([function, arguments])]
    environment = os.environ | ({"MALLOC_MMAP_THRESHOLD_": "65536"} if function == "memory_once" else {})
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


# ----------------------------------------------------------------------------------------------------------------------

PARTS = ("tiny", "smol", "update", "memory", "cuda")


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter, description="What rollouts and updates cost.")
    parser.add_argument("--only", choices=PARTS, help="one part; without it all that the machine can do")
    parser.add_argument("--smol", default=SMOL, help="hub id or folder of the middle-sized model")
    parser.add_argument("--repeats", type=int, default=5, help="repeats, of which the median is taken")
    parser.add_argument("--out", help="add the numbers to this JSON file, in place of those of the same part")
    parser.add_argument("--call", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.call:
        function, arguments = json.loads(args.call)
        print(json.dumps({"update_once": update_once, "memory_once": memory_once}[function](**arguments)))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.only == "cuda" and device == "cpu":
        sys.exit("error: --only cuda: this machine has no CUDA device")
    for part in [args.only] if args.only else PARTS if device == "cuda" else PARTS[:-1]:
        started = time.time()
        rows = measure(part, device, args)
        if args.out:
            write(Path(args.out), part, device, rows, (time.time() - started) / 60)


def measure(part: str, device: str, args: argparse.Namespace) -> list[dict]:
    if part == "tiny":
        base = str(tiny.base_folder())
        pair = models.load_pair(base, base, rank=16, four_bit=False, device=device)
        rows = report_rollouts("tiny", pair, [152], 112, args.repeats, (*WAYS, "ending"))
        return rows + report_lengths("tiny", pair, 32, min(args.repeats, 3))
    if part == "smol":
        pair = models.load_pair(args.smol, args.smol, rank=16, four_bit=False, device=device)
        rows = report_rollouts("SmolLM2-135M", pair, [16, 64], 32, args.repeats)
        return rows + report_lengths("SmolLM2-135M", pair, 2, 1)
    if part == "update":
        return report_updates(device, args.repeats)
    if part == "memory":
        return report_memory(device)
    rows = []
    for shared in (True, False):
        reset_peak(device)
        pair = random_pair(llama(4096, 32), device, shared)
        rows += report_rollouts(f"7B in NF4, {'one base' if shared else 'two checkpoints'}", pair, [76, 152], 256, min(args.repeats, 3))
        rows[-1]["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        print(f"peak {rows[-1]['peak_gib']:.1f} GiB")
        del pair
    return rows


def write(path: Path, part: str, device: str, rows: list[dict], minutes: float) -> None:
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    found = json.loads(path.read_text()) if path.is_file() else {}
    found[part] = {"machine": machine, "versions": versions, "commit": COMMIT, "minutes": round(minutes, 1), "rows": rows}
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
