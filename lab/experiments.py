"""The experiments, as data: what every flag is by default, in each preset, and in each arm.

An *arm* is one way of training, a *setting* a list of arms that are compared. An arm is stored once
under its own name, so settings may share it. To add an experiment, name its arms in ARMS and list
them in SETTINGS. The runner and the figures both read this file; it imports nothing of ours but the
names of the schedules.

The flags of a run are, each going over those before it,

    DEFAULTS, the lengths of the arm, its preset, the command line, the arm

where the lengths of an arm (LENGTHS) are those for the tiny preset.
"""

from argparse import Namespace

from tandem import SCHEDULES

DEFAULTS: dict = {
    # Models. "tiny" is the base that ships with the project. If junior and senior are the same
    # checkpoint, its weights are loaded once.
    "senior": "tiny",
    "junior": "tiny",
    "four_bit": False,  # QLoRA
    "bfloat16": None,  # None: on a GPU
    "rank": 16,  # and alpha of the LoRA adapter
    "checkpointing": False,
    "eight_bit_adam": False,
    # The specialist: the senior before tandem training. No steps if the senior is one already.
    "specialist_steps": 300,
    "specialist_batch": 32,
    "specialist_lr": 4e-3,
    # Problems. validation: evaluate on a tenth of the training problems, kept out of training.
    "problems": "generated",
    "validation": False,
    "eval_problems": 200,
    "eval_every": 4,
    "measures": False,  # also evaluate robustness, legibility and drift (lab/measures.py)
    "senior_language": "en",
    "junior_language": "en",
    "shots": None,  # solved examples per prompt. None: 3 on GSM8K if the languages differ, else 0
    # Rollouts. Open in paper: the schedule's exact rule, and the temperature of evaluations.
    "solo": False,  # standard RL: the senior writes its training rollouts alone
    "imitation": False,  # the junior writes them alone, and the senior learns from its right ones
    "handoff": "word",
    "p": 0.5,
    "temperature": 0.7,
    "max_new_tokens": 112,
    "batch": 152,  # rollouts per update
    "rollouts_per_prompt": 2,  # the group size of GRPO
    "rollout_batch": 200,  # rollouts in memory at a time; halved if they do not fit
    # The update. Open in paper: optimizer, clipping, and how many updates each condition gets.
    "algorithm": "reinforce",
    "updates": 28,
    "lr": 1e-3,
    "wrong_weight": 0.0,  # c
    "junior_weight": 1.0,  # j
    "senior_weight": 1.0,  # the same for the senior's tokens
    "kl": 0.0,  # beta
    "rewards": "true",  # or shuffled among the rollouts of a batch
    "clip": 1.0,  # maximum norm of the gradient
    "micro_tokens": 8192,  # tokens per forward pass of the update, with prompts
}
LENGTHS = ("updates", "eval_every", "eval_problems")

QWEN = "Qwen/Qwen2.5-Coder-{}-Instruct"
PRESETS: dict[str, dict] = {
    "tiny": {},
    # A real pretrained pair on the real GSM8K. The senior is fine-tuned on annotated solutions for
    # some steps; its junior is shown three solved examples instead.
    "qwen": dict(senior=QWEN.format("1.5B"), junior=QWEN.format("0.5B"), problems="openai/gsm8k")
    | dict(bfloat16=True, shots=3, specialist_steps=30, specialist_batch=8, specialist_lr=1e-3)
    | dict(lr=5e-4, max_new_tokens=160, batch=64, rollout_batch=64, micro_tokens=1024)
    | dict(updates=20, eval_every=5, eval_problems=100),
    # The paper's models, on GSM8K, on one GPU.
    "paper": dict(senior="neuralmagic/Llama-2-7b-gsm8k", problems="openai/gsm8k")
    | dict(junior="NousResearch/Llama-2-7b-chat-hf", four_bit=True, checkpointing=True)
    | dict(eight_bit_adam=True, max_new_tokens=256, rollout_batch=152, lr=1e-4, updates=80)
    | dict(specialist_steps=0),
}

# ------------------------------------------------------------------------------------------------
# Arms and settings

# The senior's language, then the junior's.
# Open in paper: which languages, and which four pairs.
LANGUAGE_PAIRS = ("en-de", "de-en", "de-fr", "fr-de")
SWEEP = [(c, j) for c in (0.0, -0.1, -0.3, -0.5) for j in (0.0, 0.2, 0.35, 0.5, 1.0)]


def in_languages(pair: str) -> dict:
    """The flags of a language pair such as "de-fr". Changing the language takes longer."""
    senior, junior = pair.split("-")
    return {"senior_language": senior, "junior_language": junior, "updates": 40}


SOLO = {"solo": True}
LONG = {"updates": 80, "eval_every": 8}
GRPO = {"algorithm": "grpo", "wrong_weight": 0.0, "junior_weight": 0.0, "rollouts_per_prompt": 8}
RLVR = GRPO | {"updates": 60, "eval_every": 20, "eval_problems": 400, "measures": True}
RLVR |= {"specialist_steps": 0, "handoff": "redraw"}

# With j = 1 the loss also imitates the junior. "imitation" has nothing else: no handoff and no
# token of the senior. "shuffled" keeps the imitation and makes the reward meaningless;
# "senior-only" (j = 0) keeps the reward and removes the imitation.
CONTROLS: dict[str, dict] = {"imitation": {"imitation": True}, "shuffled": {"rewards": "shuffled"}}
CONTROLS |= {"senior-only": {"junior_weight": 0.0}}

# Who writes in training, and whose words are scored: both's, the senior's, the junior's; and the
# junior writes alone.
CREDIT = {
    "reinforce-j1": LONG,
    "reinforce-j0": LONG | {"junior_weight": 0.0},
    "reinforce-junior": LONG | {"senior_weight": 0.0},
    "reinforce-imitation": LONG | {"imitation": True},
}
CREDIT |= {f"{arm}-shuffled": flags | {"rewards": "shuffled"} for arm, flags in CREDIT.items()}

ARMS: dict[str, dict] = {
    "tandem": {},
    "solo": SOLO,
    # Senior and junior are asked to answer in different languages.
    **{f"{pair}-tandem": in_languages(pair) for pair in LANGUAGE_PAIRS},
    **{f"{pair}-solo": in_languages(pair) | SOLO for pair in LANGUAGE_PAIRS},
    # Every other schedule ("word" is the arm "tandem"), and other probabilities p.
    **{schedule: {"handoff": schedule} for schedule in SCHEDULES if schedule != "word"},
    **{f"p-{p}": {"p": p} for p in (0.25, 0.75)},
    **CONTROLS,
    **{f"de-fr-{arm}": in_languages("de-fr") | flags for arm, flags in CONTROLS.items()},
    # Appendix E, on validation problems.
    **{f"c{c:g}-j{j:g}": dict(wrong_weight=c, junior_weight=j, validation=True) for c, j in SWEEP},
    # Pressure by the reward alone: GRPO does not score the junior's tokens (j = 0).
    "grpo-tandem": GRPO | LONG,
    "grpo-shuffled": GRPO | LONG | {"rewards": "shuffled"},
    "grpo-solo": GRPO | LONG | SOLO,
    **CREDIT,
    **{f"de-fr-{arm}": in_languages("de-fr") | flags for arm, flags in CREDIT.items()},
    **{f"{pair}-grpo-tandem": in_languages(pair) | GRPO | LONG for pair in ("de-fr", "en-de")},
    # Tandem RL: senior and junior begin as one model; the first two differ in their rollouts only.
    "rlvr-tandem": RLVR,
    "rlvr-solo": RLVR | SOLO,
    # Controls: a KL penalty toward the junior (with more than the 0.001 of Jiao et al., which would
    # hardly matter in 60 updates), and as many samples as tandem rollouts cost.
    **{f"rlvr-solo-kl-{beta}": RLVR | SOLO | {"kl": beta} for beta in (0.02, 0.1)},
    "rlvr-solo-kl": RLVR | SOLO | {"kl": 0.5},
    "rlvr-solo-16": RLVR | SOLO | {"rollouts_per_prompt": 16, "batch_factor": 2},
}
SETTINGS: dict[str, list[str]] = {
    "skill": ["tandem", "solo"],
    "language": [f"{pair}-{arm}" for pair in LANGUAGE_PAIRS for arm in ("tandem", "solo")],
    "granularity": ["tandem" if schedule == "word" else schedule for schedule in SCHEDULES]
    + ["p-0.25", "p-0.75", "solo"],
    "control": [f"{language}{arm}" for language in ("", "de-fr-") for arm in ("tandem", *CONTROLS)],
    "sweep": [arm for arm in ARMS if "validation" in ARMS[arm]],
    "pressure": ["grpo-tandem", "grpo-shuffled", "grpo-solo", "reinforce-j1", "reinforce-j0"],
    "credit": [f"{language}{arm}" for language in ("", "de-fr-") for arm in CREDIT],
    "pressure-language": ["de-fr-grpo-tandem", "en-de-grpo-tandem"],
    "rlvr": [arm for arm in ARMS if arm.startswith("rlvr")],
}
ABOUT = {
    "skill": "the senior drops its jargon (Figures 1 and 2)",
    "language": "senior and junior speak different languages (Figures 2 and 3)",
    "granularity": "how often a coin is tossed, and how biased it is",
    "control": "what removes the jargon: the reward, or imitation of the junior?",
    "sweep": "the weights c of wrong rollouts and j of the junior's tokens (Appendix E)",
    "pressure": "GRPO on the senior's tokens only: does the reward alone remove jargon?",
    "credit": "who writes, whose words are scored, and are the rewards true? (two languages)",
    "pressure-language": "the same for two language pairs",
    "rlvr": "Tandem RL (Jiao et al., 2026): both models start from the same base",
    "all": "everything, as in results/",
}


def arms_of(setting: str) -> list[str]:
    """The arms of a setting, or of all settings, each once."""
    settings = SETTINGS if setting == "all" else [setting]
    return list(dict.fromkeys(arm for name in settings for arm in SETTINGS[name]))


def flags_of_run(given: dict, arm: str, seed: int) -> Namespace:
    """The flags of one run. given: from the command line."""
    fixed = {flag: value for flag, value in ARMS[arm].items() if flag not in LENGTHS}
    preset = PRESETS[given.get("preset", "tiny")]
    flags = DEFAULTS | ARMS[arm] | preset | given | fixed | {"arm": arm, "seed": seed}
    # An arm with twice the rollouts per problem keeps its number of problems.
    flags["batch"] *= flags.pop("batch_factor", 1)
    return Namespace(**flags)
