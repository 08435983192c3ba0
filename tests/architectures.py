"""Which architectures work: python -m tests.architectures [MODEL_TYPE ...]

For each model type of transformers, a tiny checkpoint with random weights is saved and loaded as a
pair on one base. It is *right* if every token of a batch of joint rollouts is what its author
samples after a plain forward pass, and the loss has the gradient of plain_logprobs. It is *refused*
if load_pair raises ValueError. Anything else is an error. results/architectures.txt has the table.
"""

# ruff: noqa: I001  the order of the imports matters
import json
import sys
import tempfile
import warnings

import lab  # noqa: F401  before torch: it sets how threads wait
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lab.engine import micro_batches
from lab.models import encode
from reinforce import loss, plain_logprobs, token_weights
from rollout import reference_rollout, random_numbers, rollout
from tests.conftest import byte_level_tokenizer, fill_adapter, gradient_of, load, with_authors

TYPES = """llama gpt2 mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 gpt_neox gptj opt bloom
falcon mpt codegen stablelm starcoder2 olmo olmo2 olmo3 cohere cohere2 granite mixtral qwen2_moe
qwen3_moe deepseek_v2 deepseek_v3 jamba mamba recurrent_gemma rwkv xglm biogpt nemotron persimmon
glm glm4 smollm3 exaone4 ernie4_5 helium bamba lfm2 qwen3_next qwen3_5_text seed_oss apertus arcee
hunyuan_v1_dense olmoe phimoe falcon_h1 bitnet diffllama gpt_bigcode granitemoe gpt_oss youtu
gemma4_text""".split()
# Sizes of a tiny model under the names that the configurations use.
SIZES = """hidden_size=64 n_embd=64 d_model=64 word_embed_proj_dim=64 lru_width=64 ffn_dim=96
intermediate_size=96 ffn_hidden_size=96 num_hidden_layers=2 n_layer=2 num_layers=2 n_layers=2
num_key_value_heads=2 num_experts_per_tok=2 num_attention_heads=4 n_head=4 n_heads=4
attention_heads=4 num_local_experts=4 num_experts=4 n_routed_experts=4 head_dim=16
sliding_window=16 attention_window_size=16 max_position_embeddings=256 n_positions=256
max_seq_len=256 moe_intermediate_size=32 shared_expert_intermediate_size=32 rotary_dim=8
n_group=1 topk_group=1 eos_token_id=1 initializer_range=0.3 pad_token_id=0 bos_token_id=null"""
SIZES = {name: json.loads(size) for name, size in (item.split("=") for item in SIZES.split())}


def save_tiny(kind: str, tokenizer: PreTrainedTokenizerFast, folder: str) -> None:
    default = AutoConfig.for_model(kind)
    sizes = {name: value for name, value in SIZES.items() if name in default.to_dict()}
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        # Sharp distributions, in which a mistake shows.
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def judge(kind: str, tokenizer: PreTrainedTokenizerFast) -> str:
    with tempfile.TemporaryDirectory() as folder:
        save_tiny(kind, tokenizer, folder)
        try:
            pair = load(folder, rank=16)
        except ValueError as error:
            return f"refused: {str(error).replace(folder, kind)}"
    fill_adapter(pair.senior, std=0.2)
    prompts = encode(tokenizer, ["In", "Natalia sold 48", "She sold half"])
    noise, coins = random_numbers(3, 12, seed=0)
    rollouts = rollout(pair, prompts, prompts, noise, coins)
    for row, prompt in enumerate(prompts):
        # Without cache and padding, one rollout at a time.
        alone = reference_rollout(pair, prompt, prompt, noise[:, :, row], coins[:, row], 0.5, 0.7)
        if with_authors(rollouts)[row] != alone:
            return "WRONG: rollouts differ from plain forward passes"
    weights = token_weights(rollouts, torch.ones(3), 1.0)
    num_tokens = rollouts.completion_mask.sum()
    ((few, w),) = micro_batches(rollouts, weights, 10**6)
    fast = loss(pair.senior, few, w, num_tokens, temperature=0.7)[0]
    plain = -(weights * plain_logprobs(pair.senior, rollouts, 0.7)).sum() / num_tokens
    ours, exact = (gradient_of(x, pair.senior, materialize_grads=True) for x in (fast, plain))
    difference = (ours - exact).norm() / exact.norm()
    return "right" if difference < 1e-3 else f"WRONG: gradients differ by {difference:.1e}"


def main(kinds: list[str]) -> None:
    warnings.simplefilter("ignore")
    for kind in kinds:
        try:
            verdict = judge(kind, byte_level_tokenizer())
        except Exception as error:
            verdict = f"ERROR: {type(error).__name__}: {error}"
        print(f"{kind:18s} {' '.join(verdict.split())[:200]}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or TYPES)
