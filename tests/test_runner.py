"""The runner end to end with a random base: what a run leaves, learns, asks and refuses."""

import gc
import json
import re
import signal
from importlib.metadata import version
from itertools import cycle
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.utils._pytree import tree_map
from transformers import AutoModelForCausalLM

import run_gsm8k
from lab import experiments, flags, runs
from lab import problems as tasks
from lab.models import trainable_parameters
from reinforce import kl_estimate, plain_logprobs
from rollout import Pair

gc.freeze()  # engine.in_chunks collects garbage whenever rollouts are written
PAIR: list = []  # models of base_folder, loaded once
real_draw_all = run_gsm8k.figures.draw_all


@pytest.fixture
def command(base_folder, tmp_path, monkeypatch):
    """A run of a second: 2 updates of 8 rollouts. About half of them are right, by their text."""
    half = lambda text, gold: float(sum(text.encode()) % 2)  # noqa: E731
    monkeypatch.setattr(run_gsm8k, "reward", half)
    monkeypatch.setattr(run_gsm8k, "_pair", PAIR)
    monkeypatch.setattr(run_gsm8k.figures, "draw_all", lambda *_: None)
    sizes = "--device cpu --jobs 1 --updates 2 --batch 8 --eval-problems 4 --eval-every 2"
    sizes += " --max-new-tokens 8 --specialist-steps 2 --specialist-batch 4"
    sizes += f" --senior {base_folder} --junior {base_folder} --out {tmp_path}/runs"
    return f"--setting skill {sizes}".split()


def metrics(out, arm="tandem"):
    """The rows of a run but for their times."""
    rows = runs.read_rows(Path(out, arm, "seed-0", "metrics.jsonl"))
    return [{key: row[key] for key in row if not key.startswith("seconds")} for row in rows]


def everything(out, arm="tandem"):
    """What must be equal, bit for bit."""
    folder = out / arm / "seed-0"
    state = torch.load(folder / "state.pt")
    state = tree_map(lambda x: x.tolist() if torch.is_tensor(x) else x, state)
    return metrics(out, arm), runs.read_rows(folder / "samples.jsonl"), state


def runs_of(text):
    return flags.read_runs_of(run_gsm8k.make_parser(), ["--device", "cpu", *text.split()])


# ------------------------------------------------------------------------------------------------
# What a run leaves


def test_a_run_leaves_what_the_contract_says(command, base_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run_gsm8k.figures, "draw_all", real_draw_all)
    run_gsm8k.main(command)
    training = set("update reward jargon senior_share handoffs tokens loss grad_norm".split())
    training |= {"seconds_rollout", "seconds_update"}
    evaluation = {"n", "accuracy", "jargon", "languages", "tokens", "outcomes"}
    changes = {"handoffs", "handoffs_inside", "handoffs_in_words", "handoffs_in_numbers"}
    for arm in ("tandem", "solo"):
        folder = tmp_path / "runs" / arm / "seed-0"
        config = json.loads((folder / "config.json").read_text())
        assert (config["flags"]["batch"], config["flags"]["base"]) == (8, Path(base_folder).name)
        assert config["versions"]["torch"] == version("torch")
        start, first, second = runs.read_rows(folder / "metrics.jsonl")
        assert set(start) == {"update", "eval", "seconds_eval"}
        assert set(start["eval"]) == {"senior", "tandem", "junior"}
        assert set(first) == training
        assert set(second) == training | {"eval", "seconds_eval"}
        assert set(second["eval"]["senior"]) == evaluation
        assert set(second["eval"]["tandem"]) == evaluation | changes
        outcomes = second["eval"]["senior"]["outcomes"]
        assert {len(of_problems) for of_problems in outcomes.values()} == {4}
        assert (first["senior_share"] == 1.0) == (arm == "solo")
        samples = runs.read_rows(folder / "samples.jsonl")
        assert {sample["who"] for sample in samples} == {"senior", "tandem", "junior"}
        for sample in samples:
            assert ("steps" in sample) == (sample["who"] == "tandem")
            if "steps" in sample:
                texts = ["".join(part[1] for part in sample[name]) for name in ("spans", "steps")]
                assert texts[0] == texts[1]
                assert all(0 <= step[-1] <= 1 for step in sample["steps"])
        base = AutoModelForCausalLM.from_pretrained(base_folder)
        saved = dict(PeftModel.from_pretrained(base, folder / "adapter").named_parameters())
        for name, tensor in torch.load(folder / "state.pt")["adapter"].items():
            assert torch.equal(saved[name.replace(".weight", ".default.weight")], tensor)
    drawn = {path.suffix for path in (tmp_path / "runs" / "figures").iterdir()}
    assert drawn >= {".png", ".pdf", ".html"}


def test_all_arms_of_all_settings(command, tmp_path, monkeypatch, capsys):
    """Interrupted and resumed, each arm is run once, also one that settings share, and of the sweep
    the best cell and the main one again, on test problems and another seed."""
    few = ["c0-j0", "c-0.5-j0.2"]
    monkeypatch.setitem(experiments.SETTINGS, "sweep", few)
    real, made = run_gsm8k.train, []

    def spy(args, pair):
        if len(made) == 4 and not args.resume:
            raise KeyboardInterrupt
        real(args, pair)
        made.append(args.arm)

    monkeypatch.setattr(run_gsm8k, "train", spy)
    sizes = "--setting all --updates 1 --eval-every 1 --eval-problems 1 --max-new-tokens 4"
    command += sizes.split()
    with pytest.raises(SystemExit, match="130"):
        run_gsm8k.main(command)
    run_gsm8k.main([*command, "--resume"])
    out, every = tmp_path / "runs", experiments.arms_of("all")
    best = run_gsm8k.figures.best_cell(out)
    confirmed = {"test-c0-j1", f"test-c{best[0]:g}-j{best[1]:g}"}
    assert sorted(made) == sorted({*every, *confirmed})
    assert f"{len(every) - 4} of {len(every) - 4} runs finished" in capsys.readouterr().out
    for arm in {*every, *confirmed}:
        path = out / arm / f"seed-{int(arm in confirmed)}" / "config.json"
        config = json.loads(path.read_text())["flags"]
        assert (config["arm"], config["validation"]) == (arm, arm in few)
    run_gsm8k.main([*command, "--resume"])
    assert len(made) == len(every) + len(confirmed)  # nothing is run again


def test_nothing_right_teaches_nothing(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_gsm8k, "reward", lambda text, gold: 0.0)
    run_gsm8k.main([*command, "--arms", "tandem"])
    assert capsys.readouterr().out.count("nothing to learn from") == 2
    assert [row["loss"] for row in metrics(tmp_path / "runs")[1:]] == [None, None]


# ------------------------------------------------------------------------------------------------
# What it learns from

REINFORCE = {"wrong_weight": -0.5, "junior_weight": 0.3}
GRPO = {"algorithm": "grpo", "junior_weight": 0.0, "rollouts_per_prompt": 4}


@pytest.mark.parametrize("changes", [{}, REINFORCE, GRPO, GRPO | {"kl": 0.5}])
def test_the_loop_has_the_gradient_of_the_definition(command, changes, monkeypatch):
    """When the gradient is clipped, it is that of plain_logprobs, in all micro-batches together."""
    for name, value in (changes | {"micro_tokens": 100}).items():
        monkeypatch.setitem(experiments.DEFAULTS, name, value)
    values = cycle([1.0] + [0.0] * 7)  # a group of 4 has nothing to learn from
    monkeypatch.setattr(run_gsm8k, "reward", lambda text, gold: next(values))
    batches, compared = [], []
    real_weights, real_clip = run_gsm8k.token_weights, torch.nn.utils.clip_grad_norm_

    def weights_spy(rollouts, *rest):
        batches.append((rollouts, real_weights(rollouts, *rest)))
        return batches[-1][1]

    def clip_spy(parameters, norm):
        if batches:  # not while the specialist is made
            (pair,), (rollouts, weights) = run_gsm8k._pair, batches[-1]
            logprobs = plain_logprobs(pair.senior, rollouts, 0.7)
            total = -(weights * logprobs).sum()
            if kl := changes.get("kl"):
                read = plain_logprobs(pair.junior, rollouts.as_read_by_junior(), 0.7).detach()
                total += kl * kl_estimate(logprobs, read, rollouts.senior_mask).sum()
            own = trainable_parameters(pair.senior)
            plain = torch.autograd.grad(total / rollouts.completion_mask.sum(), own)
            flat = [torch.cat([x.flatten() for x in g]) for g in (plain, [p.grad for p in own])]
            compared.append(((flat[0] - flat[1]).norm() / flat[0].norm()).item())
        return real_clip(parameters, norm)

    monkeypatch.setattr(run_gsm8k, "token_weights", weights_spy)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_spy)
    run_gsm8k.main([*command, "--arms", "tandem"])
    assert len(compared) == 2
    assert max(compared) < 1e-4
    if changes == GRPO:
        weights = batches[0][1]
        assert (weights[batches[0][0].senior_mask == 0] == 0).all()
        assert {round(x, 2) for x in weights.flatten().tolist()} == {-0.5, 0.0, 1.5}


def test_shuffled_rewards(command, monkeypatch, tmp_path):
    """As many right rollouts, but others. The row reports the true rewards."""
    given, weighted, real = [1.0] * 3 + [0.0] * 5, [], run_gsm8k.outcome_weights
    values = cycle(given)
    monkeypatch.setattr(run_gsm8k, "reward", lambda text, gold: next(values))
    spy = lambda rewards, c: weighted.append(rewards.tolist()) or real(rewards, c)  # noqa: E731
    monkeypatch.setattr(run_gsm8k, "outcome_weights", spy)
    run_gsm8k.main([*command, "--setting", "control", "--arms", "shuffled"])
    assert [sum(rewards) for rewards in weighted] == [3, 3]
    assert len({tuple(rewards) for rewards in [given, *weighted]}) == 3
    assert metrics(tmp_path / "runs", "shuffled")[1]["reward"] == 3 / 8


def test_a_diverged_run_is_kept_and_the_next_is_as_if_alone(command, tmp_path, monkeypatch):
    """The first arm's loss is not finite. The second has none of its gradient; resumed, neither is
    run again, and the reason is given once more."""
    run_gsm8k.main([*command, "--arms", "solo", "--out", str(tmp_path / "alone")])
    real, calls = run_gsm8k.loss, []

    def first_fails(*args):
        calls.append(1)
        value, logprobs = real(*args)
        return value * (float("nan") if len(calls) == 1 else 1.0), logprobs

    monkeypatch.setattr(run_gsm8k, "loss", first_fails)
    with pytest.raises(SystemExit, match="update 1: loss nan.*of update 0 is kept.*smaller --lr"):
        run_gsm8k.main(command)
    folder = tmp_path / "runs" / "tandem" / "seed-0"
    assert torch.load(folder / "state.pt")["update"] == 0
    assert len(metrics(tmp_path / "runs")) == 1
    assert "loss nan" in (folder / "stopped.txt").read_text()
    assert metrics(tmp_path / "runs", "solo") == metrics(tmp_path / "alone", "solo")
    before = len(calls)
    with pytest.raises(SystemExit, match="update 1: loss nan"):
        run_gsm8k.main([*command, "--resume"])
    assert len(calls) == before


@pytest.mark.parametrize("flag", ["--setting sweep --arms c-0.5-j1", "--setting pressure"])
def test_tokens_pushed_away_without_bound_stop_the_run(flag):
    """V = 100: chance is log 100 = 4.6 nats per token. Only tokens with negative weights count,
    whether c or an advantage made them negative."""

    def check(logprob):
        row = {"update": 3, "loss": 0.1, "grad_norm": 0.1, "senior_share": 0.5}
        logprobs = torch.tensor([[logprob, logprob, -99.0]])
        runs.note_pushed_away(row, torch.tensor([[-0.5, -0.5, 1.0]]), logprobs)
        runs.check_row(row, runs_of(flag)[0], {}, 100)
        return row.keys()

    assert "pushed" not in check(-4.5)
    with pytest.raises(runs.Diverged, match=r"update 3: tokens .* bound \(-4.7 nats"):
        check(-4.7)


def test_a_tandem_run_without_a_junior_stops(command, tmp_path, monkeypatch):
    """A switch that changes the method must not go unnoticed; resumed, it still counts."""
    real = run_gsm8k.rollout
    alone = lambda *a, p, **k: real(*a, p=1.0 if p == 0.5 else p, **k)  # noqa: E731
    monkeypatch.setattr(run_gsm8k, "rollout", alone)
    monkeypatch.setattr(run_gsm8k, "reward", lambda text, gold: 1.0)
    command += ["--arms", "tandem"]
    run_gsm8k.main([*command, "--updates", "3"])
    with pytest.raises(SystemExit, match="the senior wrote 100% of 5 batches in a row.*Check --p"):
        run_gsm8k.main([*command, "--updates", "6", "--resume"])
    assert [row["update"] for row in metrics(tmp_path / "runs")] == [0, 1, 2, 3, 4]


# ------------------------------------------------------------------------------------------------
# Rollouts and prompts


def test_rollouts_do_not_depend_on_the_memory(command, tmp_path, monkeypatch):
    """Where memory ends amid 8 or 4 rollouts, they are written two at a time, and are the same."""
    command += ["--arms", "tandem"]
    run_gsm8k.main([*command, "--out", str(tmp_path / "all")])
    real, sizes = run_gsm8k.rollout, []

    def too_many(pair, asked, *args, **more):
        sizes.append(len(asked))
        written = real(pair, asked, *args, **more)
        if len(asked) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return written

    monkeypatch.setattr(run_gsm8k, "rollout", too_many)
    run_gsm8k.main(command)
    assert {8, 4, 2} == set(sizes)
    whole, halves = metrics(tmp_path / "all"), metrics(tmp_path / "runs")
    for one, other in zip(whole[1:], halves[1:], strict=True):
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert (one["tokens"], one.get("eval")) == (other["tokens"], other.get("eval"))
    path = Path("tandem", "seed-0", "samples.jsonl")
    found, expected = (runs.read_rows(tmp_path / out / path) for out in ("runs", "all"))
    for one, other in zip(found, expected, strict=True):
        assert one["spans"] == other["spans"]
        # Steps are kept of the first rollouts that were written at a time.
        if "steps" in one:
            assert [step[:5] for step in one["steps"]] == [step[:5] for step in other["steps"]]
    assert sum("steps" in sample for sample in found) == 2 * 2


def gsm8k(folder, n=8, steps=1):
    for name in ("train", "test"):
        solution = "1+1 = <<1+1=2>>2\n" * steps + "#### 2"
        questions = [f"What is 1+1 in line {i} of {name}?" for i in range(n)]
        lines = [json.dumps({"question": question, "answer": solution}) for question in questions]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def asked(args, tokenizer):
    """What senior and junior are asked about the first problem."""
    problems, pair = tasks.load_problems(args)[0], Pair(None, None, tokenizer, tokenizer, [], [])
    return [texts[0] for _, texts in tasks.prompts_of_pair(problems, args, pair)]


def test_each_writer_is_asked_in_its_language(tokenizer, tmp_path):
    """On GSM8K with three solved examples each, annotated for a senior without fine-tuning."""
    flags = "--setting language --arms fr-de-solo --specialist-steps 0 --junior other"
    flags += f" --eval-problems 2 --problems {gsm8k(tmp_path)}"
    senior, junior = asked(runs_of(flags)[0], tokenizer)
    for text, cue, start in ((senior, "Réponse:", "Résous le"), (junior, "Antwort:", "Löse die")):
        assert text.endswith(f"\n{cue}")
        assert text.startswith(start)
        assert text.count(cue) == 4
    assert "<<24*5=120>>" in senior
    assert "<<" not in junior


def test_the_prompts_of_the_preset_qwen(tokenizer, tmp_path, monkeypatch):
    """The specialist is asked as it was fine-tuned, its junior in a chat with three plain examples,
    which are neither trained on nor evaluated. Without fine-tuning, one model is asked alike."""
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    flags = f"--preset qwen --problems {gsm8k(tmp_path, n=80, steps=2)} --eval-problems 7 --batch 8"
    is_validation = lambda question: "validation" if "0 of" in question else "train"  # noqa: E731
    monkeypatch.setattr(tasks, "split_of", is_validation)
    (args, *_) = runs_of(f"--setting skill {flags}")
    senior, junior = asked(args, tokenizer)
    assert re.fullmatch(r"Question: What is 1\+1 in line [0-9]+ of train\?\nAnswer:", senior)
    assert junior.count("<assistant>") == 4
    assert junior.startswith("<user>What is 1+1 in line 0 of train?\nSolve the problem")
    assert "<<" not in junior
    shown = {f"What is 1+1 in line {i} of train?" for i in range(3)}
    for run in (args, runs_of(f"--setting sweep {flags}")[0]):
        trained, held_out = tasks.load_problems(run)
        everything = trained + held_out + tasks.training_problems(run)
        assert not shown & {problem.question for problem in everything}
    senior, junior = asked(runs_of(f"--setting rlvr {flags} --senior x --junior x")[0], tokenizer)
    assert "<<" in senior
    assert tasks.plain(senior) == junior


def test_problems_of_a_folder(command, tmp_path):
    command += ["--problems", gsm8k(tmp_path, n=4), "--arms", "solo"]
    run_gsm8k.main(command)
    assert len(metrics(tmp_path / "runs", "solo")) == 3
    with pytest.raises(SystemExit, match="4 training and 4 test problems: lower --eval-problems"):
        run_gsm8k.main([*command, "--eval-problems", "5"])
    (tmp_path / "train.jsonl").write_text('{"question": "Q", "answer": "#### 1"}\n{}\n')
    with pytest.raises(SystemExit, match="train.jsonl, line 2: expected"):
        run_gsm8k.main(command)


# ------------------------------------------------------------------------------------------------
# Flags


def test_which_value_a_flag_has():
    """Defaults, lengths of the arm, preset, command line, arm: each goes over those before it."""
    grpo, _, _, reinforce, _ = runs_of("--setting pressure --wrong-weight -0.3")
    assert (grpo.rollouts_per_prompt, grpo.wrong_weight, grpo.updates) == (8, 0.0, 80)
    assert (reinforce.rollouts_per_prompt, reinforce.wrong_weight) == (2, -0.3)
    assert runs_of("--setting pressure --updates 3")[0].updates == 3
    assert runs_of("--setting pressure --preset qwen")[0].updates == 20
    rlvr = runs_of("--setting rlvr --batch 16 --eval-problems 9")
    assert [run.batch for run in rlvr] == [16, 16, 16, 32]
    assert (rlvr[1].eval_problems, rlvr[1].eval_every) == (9, 20)
    paper = runs_of("--setting granularity --preset paper --p 0.3")
    assert {run.p for run in paper} == {0.25, 0.3, 0.75}
    assert paper[0].problems == "openai/gsm8k"
    assert [run.seed for run in runs_of("--setting skill --seeds 2 --arms solo")] == [0, 1]


# ------------------------------------------------------------------------------------------------
# Several runs at a time


def fork(monkeypatch):
    """Spawned processes would import everything again, which takes half a minute."""
    context = runs.multiprocessing.get_context("fork")
    monkeypatch.setattr(runs.multiprocessing, "get_context", lambda kind: context)


def is_refused(args):
    raise runs.Refused(f"{args.arm} is refused")


def is_killed(args):
    signal.raise_signal(signal.SIGKILL)


def test_runs_side_by_side_are_those_of_one_process(command, tmp_path, monkeypatch):
    """Two processes, which need the same specialist at the same time."""
    fork(monkeypatch)
    for jobs in "12":
        more = f"--wrong-weight -0.5 --jobs {jobs} --out {tmp_path / jobs}"
        run_gsm8k.main([*command, *more.split()])
    for arm in ("tandem", "solo"):
        assert everything(tmp_path / "1", arm) == everything(tmp_path / "2", arm)
        assert metrics(tmp_path / "1", arm)[1]["loss"] is not None


@pytest.mark.parametrize(
    ("train", "message"),
    [(is_refused, "is refused"), (is_killed, "killed, perhaps .*--resume and fewer --jobs")],
)
def test_what_ends_a_process_is_said(tmp_path, monkeypatch, train, message):
    fork(monkeypatch)
    with pytest.raises(runs.Refused, match=message):
        runs.run_all(train, runs_of(f"--setting skill --jobs 2 --out {tmp_path}"))
