"""What tandem rollouts and updates cost, as ratios within one run:  python benchmark.py [--only tiny|smol|cuda|update]

Rollouts, all of the same length, alternating, medians of several repeats:

    generate   transformers' generate, the senior alone
    plain      two models in turn at every token, each with transformers' own cache
    solo       rollout.py with p = 1
    tandem     rollout.py with p = 0.5

for the tiny base at batch 152, SmolLM2-135M at batch 16 and 64, and on CUDA a pair of the shape of Llama-2-7B with random
weights in NF4, shared or two checkpoints. Then tandem at three lengths. `update`: time and peak memory of reinforce.py
beside full logits with cross-entropy. Prints tables; --out writes them as JSON.

Not here: the quality of anything (run_gsm8k.py). Times of a busy machine mean little, ratios somewhat more.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

import models
import problems
import tiny
from reinforce import backward
from rollout import Rollouts, random_numbers, rollout, sample
from run_gsm8k import SMOL
from tandem import Handoff, build_boundaries, token_bytes

# ----------------------------------------------------------------------------------------------------------------------
# Rollouts


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


def rollout_times(pair, batch: int, steps: int, repeats: int, ways=("generate", "plain", "solo", "tandem")) -> dict[str, float]:
    """Median seconds of each way to write `steps` tokens for `batch` prompts."""
    tokenizer, device = pair.senior_tokenizer, pair.senior.device
    texts = [problems.prompt(problem.question) for problem in problems.generate(batch, "test", 0)]
    prompts = models.encode_prompts(tokenizer, texts, device)
    boundaries = build_boundaries(token_bytes(tokenizer, pair.vocab_size)).to(device)
    pair.senior.generation_config.eos_token_id = None  # nobody stops early, so that all write the same number of tokens

    def ours(p: float) -> None:
        numbers = random_numbers(batch, steps, seed=0)
        rollout(pair.senior, pair.junior, prompts, prompts, tokenizer, [-1], boundaries, *numbers, p=p, temperature=0.7)

    options = dict(do_sample=True, temperature=0.7, top_k=0, max_new_tokens=steps, pad_token_id=0)
    run = {
        "generate": lambda: pair.senior.generate(input_ids=prompts[0], attention_mask=prompts[1], **options),
        "plain": lambda: plain(pair, prompts, boundaries, steps),
        "solo": lambda: ours(1.0),
        "tandem": lambda: ours(0.5),
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


def report_rollouts(name: str, pair, batches: list[int], steps: int, lengths: list[int], repeats: int) -> list[dict]:
    rows = []
    for batch in batches:
        times = rollout_times(pair, batch, steps, repeats)
        ratios = {way: seconds / times["generate"] for way, seconds in times.items()}
        rows.append({"pair": name, "batch": batch, "steps": steps, "seconds": times, "of_generate": ratios})
        print(f"{name}, batch {batch}, {steps} tokens: " + ", ".join(f"{way} {times[way]:.2f} s ({ratios[way]:.2f})" for way in times))
    for length in lengths:
        times = rollout_times(pair, batches[0], length, repeats, ways=("tandem",))
        rows.append({"pair": name, "batch": batches[0], "steps": length, "seconds": times})
        print(f"{name}, batch {batches[0]}, {length} tokens: tandem {1000 * times['tandem'] / length:.1f} ms a token")
    return rows


def random_pair(config: LlamaConfig, tokenizer, device: str, shared: bool) -> models.Pair:
    """A pair with random weights in NF4, on one base or two."""
    import bitsandbytes as bnb

    def base():
        with torch.device(device):
            model = LlamaForCausalLM(config).to(torch.bfloat16 if device == "cuda" else torch.float32)
        for parent in list(model.model.layers.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, torch.nn.Linear):
                    bits = bnb.nn.Linear4bit(
                        child.in_features, child.out_features, bias=False, compute_dtype=child.weight.dtype, quant_type="nf4"
                    )
                    bits.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                    setattr(parent, name, bits.to(device))
        model.is_loaded_in_4bit = True
        return model.requires_grad_(False)

    senior = models.without_dropout(models.add_adapter(base(), rank=16))
    junior = models.SharedJunior(senior) if shared else models.without_dropout(base())
    return models.Pair(senior, junior, tokenizer, tokenizer, config.vocab_size, [tokenizer.eos_token_id])


def shape_of_llama(tokenizer) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=max(32000, len(tokenizer)), hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )


# ----------------------------------------------------------------------------------------------------------------------
# The update


def full_logits(model, rollouts: Rollouts, temperature: float) -> None:
    """The ordinary way: all logits of the batch at once, and cross-entropy."""
    ids = torch.cat([rollouts.prompt_ids, rollouts.completion_ids], 1)
    logits = model(input_ids=ids).logits[:, :-1].float() / temperature
    targets = ids[:, 1:].masked_fill(torch.arange(1, ids.shape[1], device=ids.device) < rollouts.prompt_ids.shape[1], -100)
    functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").div(rollouts.completion_mask.sum()).backward()


def update_once(way: str, vocabulary: int, device: str) -> dict:
    """Seconds and peak memory beyond the model's of one update of 8 rollouts of 32 + 224 tokens. In a process of its own."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    model.get_output_embeddings().requires_grad_(False)  # frozen, as under an adapter
    model.get_input_embeddings().requires_grad_(False)
    ids = torch.randint(0, vocabulary, (8, 256), device=device)
    ones, prompt = torch.ones_like(ids), 32
    rollouts = Rollouts(
        ids[:, :prompt], ones[:, :prompt], ids[:, prompt:], ones[:, prompt:], ones[:, prompt:], ids[:, prompt:].float(), [""] * 8
    )

    def update(few: Rollouts) -> None:
        if way == "full":
            full_logits(model, few, 0.7)
        else:
            backward(model, few, few.completion_mask.float(), 0.7, 2**20)

    def peak() -> float:
        if device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    model(input_ids=ids[:1, :8]).logits.sum().backward()  # warms up
    model.zero_grad()
    before, started = peak(), time.perf_counter()
    update(rollouts)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item()
    return {"seconds": seconds, "peak_mb": peak() - before, "gradient_norm": norm}


def report_updates(device: str, repeats: int) -> list[dict]:
    rows = []
    for vocabulary in (32_000, 152_000):
        found: dict[str, list[dict]] = {"full": [], "ours": []}
        for _ in range(repeats):
            for way in found:
                command = [sys.executable, __file__, "--update-once", way, str(vocabulary), device]
                found[way].append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]))
        median = {way: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for way, runs in found.items()}
        full, ours = median["full"], median["ours"]
        rows.append({"vocabulary": vocabulary, **median, "of_full": {key: ours[key] / full[key] for key in full}})
        print(f"update, vocabulary {vocabulary}: ", end="")
        print(*(f"{way} {m['seconds']:.2f} s, {m['peak_mb']:.0f} MB, norm {m['gradient_norm']:.5f};" for way, m in median.items()), end=" ")
        print(f"ratios {ours['seconds'] / full['seconds']:.2f} and {ours['peak_mb'] / full['peak_mb']:.2f}")
    return rows


# ----------------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter, description="What rollouts and updates cost.")
    parser.add_argument("--only", choices=("tiny", "smol", "cuda", "update"), help="one part; without it all that the machine can do")
    parser.add_argument("--smol", default=SMOL, help="hub id or folder of the middle-sized model")
    parser.add_argument("--repeats", type=int, default=5, help="repeats, of which the median is taken")
    parser.add_argument("--out", help="write the numbers to this JSON file")
    parser.add_argument("--update-once", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.update_once:
        way, vocabulary, device = args.update_once
        print(json.dumps(update_once(way, int(vocabulary), device)))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts = [args.only] if args.only else ["tiny", "smol", "update"] + ["cuda"] * (device == "cuda")
    if "cuda" in parts and device == "cpu":
        sys.exit("error: --only cuda: this machine has no CUDA device")
    rows: list[dict] = []
    if "tiny" in parts:
        base = str(tiny.base_folder())
        pair = models.load_pair(base, base, rank=16, four_bit=False, device=device)
        rows += report_rollouts("tiny", pair, [152], 112, [64, 256], args.repeats)
    if "smol" in parts:
        pair = models.load_pair(args.smol, args.smol, rank=16, four_bit=False, device=device)
        rows += report_rollouts("SmolLM2-135M", pair, [16, 64], 64, [64, 256, 1024], args.repeats)
    if "update" in parts:
        rows += report_updates(device, args.repeats)
    if "cuda" in parts:
        tokenizer = models.load_tokenizers(*[str(tiny.base_folder())] * 2)[0]
        for shared in (True, False):
            pair = random_pair(shape_of_llama(tokenizer), tokenizer, device, shared)
            rows += report_rollouts(f"7B in NF4, {'shared base' if shared else 'two checkpoints'}", pair, [76, 152], 256, [], 3)
            print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
            del pair
    if args.out:
        machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
        with open(args.out, "w") as file:
            json.dump({"machine": machine, "torch": torch.__version__, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
