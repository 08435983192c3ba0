"""Which architectures work: python -m tests.architectures [MODEL_TYPE ...]

For each model type of transformers, a tiny checkpoint with random weights is saved and loaded as a pair on one base. It is
*right* if every token of a batch of joint rollouts is what its author samples after a plain forward pass, and the loss of
the fast path has the gradient of plain_loss. It is *refused* if load_pair raises ValueError before anything long. Anything
else is an error. results/architectures.txt has the table.
"""

# ruff: noqa: I001  the order of the imports matters
import contextlib
import io
import sys
import tempfile
import warnings

import lab  # noqa: F401  before torch: it sets how threads wait
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, logging

from lab.models import encode_prompts, load_pair, trainable_parameters
from reinforce import completion_logprobs, micro_batches, plain_loss, token_weights
from rollout import random_numbers, rollout, sample

TYPES = """llama gpt2 mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 gpt_neox gptj opt bloom falcon mpt codegen stablelm
starcoder2 olmo olmo2 olmo3 cohere cohere2 granite mixtral qwen2_moe qwen3_moe deepseek_v2 deepseek_v3 jamba mamba recurrent_gemma
rwkv xglm biogpt nemotron persimmon glm glm4 smollm3 exaone4 ernie4_5 helium bamba lfm2 qwen3_next qwen3_5_text seed_oss apertus arcee
hunyuan_v1_dense olmoe phimoe falcon_h1 bitnet diffllama gpt_bigcode granitemoe gpt_oss youtu gemma4_text""".split()
# Sizes of a tiny model under the names that the configurations use.
SIZES = dict(hidden_size=64, n_embd=64, d_model=64, ffn_dim=96, intermediate_size=96, ffn_hidden_size=96, num_hidden_layers=2, n_layer=2)
SIZES |= dict(num_layers=2, n_layers=2, num_attention_heads=4, n_head=4, n_heads=4, attention_heads=4, num_key_value_heads=2, head_dim=16)
SIZES |= dict(max_position_embeddings=256, n_positions=256, max_seq_len=256, rotary_dim=8, initializer_range=0.3, word_embed_proj_dim=64)
SIZES |= dict(
    num_local_experts=4, num_experts=4, n_routed_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=32, n_group=1
)
SIZES |= dict(topk_group=1, num_experts_per_tok=2)
SIZES |= dict(lru_width=64, sliding_window=16, attention_window_size=16, bos_token_id=None, eos_token_id=1, pad_token_id=0)


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


@torch.no_grad()
def tokens_are_those_of_plain_passes(pair, rollouts, row: int, prompt: list[int], noise: torch.Tensor) -> bool:
    """Whether each token is what its author samples after one forward pass over the whole text, without cache and padding."""
    written = rollouts.completion_ids[row][rollouts.completion_mask[row].bool()].tolist()
    for t, token in enumerate(written):
        ids = torch.tensor([prompt + written[:t]])
        if rollouts.senior_mask[row, t]:
            logits = pair.senior(input_ids=ids).logits
        else:
            with pair.senior.disable_adapter():
                logits = pair.senior(input_ids=ids).logits
        if sample(logits[:, -1], noise[1 - rollouts.senior_mask[row, t], t : t + 1], 0.7)[0].item() != token:
            return False
    return True


def judge(kind: str, tokenizer: PreTrainedTokenizerFast) -> str:
    with tempfile.TemporaryDirectory() as folder:
        try:
            save_tiny(kind, tokenizer, folder)
        except Exception as error:
            return f"not built: {type(error).__name__}: {error}"
        try:
            pair = load_pair(folder, folder, rank=4, four_bit=False, device="cpu")
        except ValueError as error:
            return f"refused: {str(error).replace(folder, kind)}"
    generator = torch.Generator().manual_seed(1)
    for name, parameter in pair.senior.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    texts = ["In", "Natalia sold 48", "She sold half"]
    prompts = encode_prompts(tokenizer, texts, "cpu")
    noise, coins = random_numbers(3, 12, seed=0)
    rollouts = rollout(pair, prompts, prompts, noise, coins)
    for row, text in enumerate(texts):
        if not tokens_are_those_of_plain_passes(pair, rollouts, row, tokenizer(text).input_ids, noise[:, :, row]):
            return "WRONG: rollouts differ from plain forward passes"
    weights = token_weights(rollouts, torch.ones(3), 1.0)
    gradients = []
    for fast in (True, False):
        pair.senior.zero_grad()
        if fast:
            for part, w in micro_batches(rollouts, weights, 10**6):
                (-(w * completion_logprobs(pair.senior, part, 0.7)).sum() / rollouts.completion_mask.sum()).backward()
        else:
            plain_loss(pair.senior, rollouts, weights, 0.7).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trainable_parameters(pair.senior) if p.grad is not None]))
    difference = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    return "right" if difference < 1e-3 else f"WRONG: gradients differ by {difference:.1e} of their norm"


def main(kinds: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    for kind in kinds:
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                verdict = judge(kind, tokenizer)
            except Exception as error:
                verdict = f"ERROR: {type(error).__name__}: {error}"
        print(f"{kind:18s} {' '.join(verdict.split())[:200]}", flush=True)


if __name__ == "__main__":
    from tests.conftest import byte_level_tokenizer

    main(sys.argv[1:] or TYPES, byte_level_tokenizer())
