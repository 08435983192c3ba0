"""The runner end to end with a random base: what a run leaves, prints, learns and asks."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from peft import PeftModel
from torch.utils._pytree import tree_map
from transformers import AutoModelForCausalLM

import run_gsm8k
from conftest import ends_with
from lab import experiments, flags, jobs, runs, terminal
from lab import problems as tasks
from lab.models import identity, trainable_parameters
from reinforce import kl_estimate, plain_logprobs
from rollout import Pair

PAIR: list = []  # models of base_folder, loaded once
real_draw_all = terminal.figures.draw_all


@pytest.fixture
def command(base_folder, tmp_path, monkeypatch):
    """A run of a second: 2 updates of 8 rollouts. About half of them are right, by their text."""
    monkeypatch.setattr(run_gsm8k, "reward", lambda text, gold: float(sum(text.encode()) % 2))
    monkeypatch.setattr(run_gsm8k, "_pair", PAIR)
    monkeypatch.setattr(terminal.figures, "draw_all", lambda *_: None)
    for state in (terminal.durations, terminal.updates_left, terminal.running):
        state.clear()  # of the last test
    sizes = "--setting skill --device cpu --jobs 1 --updates 2 --batch 8 --eval-problems 4"
    sizes += " --eval-every 2 --max-new-tokens 8 --specialist-steps 2 --specialist-batch 4"
    return f"{sizes} --senior {base_folder} --junior {base_folder} --out {tmp_path}/runs".split()


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
    monkeypatch.setattr(terminal.figures, "draw_all", real_draw_all)
    run_gsm8k.main(command)
    training = set("update reward jargon senior_share handoffs tokens loss grad_norm".split())
    training |= {"seconds_rollout", "seconds_update"}
    evaluation = set("n accuracy jargon languages tokens outcomes".split())
    handoffs = set("handoffs handoffs_inside handoffs_in_words handoffs_in_numbers".split())
    out = tmp_path / "runs"
    folder = out / "tandem" / "seed-0"
    config = json.loads((folder / "config.json").read_text())
    assert (config["flags"]["batch"], config["flags"]["base"]) == (8, identity(base_folder))
    assert config["versions"]["torch"] == version("torch")
    start, first, second = runs.read_rows(folder / "metrics.jsonl")
    assert set(start) == {"update", "eval", "seconds_eval"}
    assert set(start["eval"]) == {"senior", "tandem", "junior"}
    assert (set(first), set(second)) == (training, training | {"eval", "seconds_eval"})
    assert set(second["eval"]["senior"]) == evaluation
    assert set(second["eval"]["tandem"]) == evaluation | handoffs
    assert first["senior_share"] < metrics(out, "solo")[1]["senior_share"] == 1.0
    for sample in runs.read_rows(folder / "samples.jsonl"):
        assert ("steps" in sample) == (sample["who"] == "tandem")
        written = "".join(text for _, text in sample["spans"])
        assert written == "".join(step[1] for step in sample.get("steps", sample["spans"]))
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    saved = dict(PeftModel.from_pretrained(base, folder / "adapter").named_parameters())
    for name, tensor in torch.load(folder / "state.pt")["adapter"].items():
        assert torch.equal(saved[name.replace(".weight", ".default.weight")], tensor)
    assert {path.suffix for path in (out / "figures").iterdir()} >= {".png", ".pdf", ".html"}


def test_all_arms_of_all_settings(command, tmp_path, monkeypatch, capsys):
    """Each arm is run once, also one that settings share. Resumed, none is. Those of Tandem RL have
    every measure of every problem before and after training."""
    few = ["c0-j0", "c-0.5-j0.2"]
    monkeypatch.setitem(experiments.SETTINGS, "sweep", few)
    command += "--setting all --updates 1 --eval-problems 2 --max-new-tokens 4".split()
    run_gsm8k.main(command)
    every = experiments.arms_of("all")
    assert f"Runs ({len(every)}, 1 at a time): " in capsys.readouterr().out
    for arm in every:
        config = json.loads((tmp_path / "runs" / arm / "seed-0" / "config.json").read_text())
        assert (config["flags"]["arm"], config["flags"]["validation"]) == (arm, arm in few)
    run_gsm8k.main([*command, "--resume"])
    assert "Runs" not in capsys.readouterr().out
    found = runs.read_rows(tmp_path / "runs" / "rlvr-tandem" / "seed-0" / "measures.jsonl")
    assert [row.pop("update") for row in found] == [0, 1]
    names = "solo handoff word continued_25 continued_50 continued_75 legibility drift right_of_8"
    lengths = dict.fromkeys(names.split(), 2)
    assert all({name: len(row[name]) for name in row} == lengths for row in found)
    assert max(found[0]["drift"]) < 1e-4  # both begin as the same model


# ------------------------------------------------------------------------------------------------
# What it prints


def test_what_is_printed_and_runs_side_by_side(command, tmp_path, monkeypatch, capsys):
    """Without a terminal: a row per evaluation. Two processes, which need the same specialist at
    the same time, print and write what one does."""
    fork(monkeypatch)
    for number in "12":
        out = tmp_path / number
        run_gsm8k.main([*command, *f"--wrong-weight -0.5 --jobs {number} --out {out}".split()])
        printed = capsys.readouterr()  # by this process, not by its workers
        assert printed.err == ""
        lines = printed.out.splitlines()
        assert max(map(len, lines)) <= 79 + len(str(tmp_path))
        assert sum("update" in line and "min left" in line for line in lines) == 1
        rows = [line.split() for line in lines if re.match("(tandem|solo) +[0-9]", line)]
        assert sorted(row[:2] for row in rows) == [[a, u] for a in ("solo", "tandem") for u in "02"]
        assert rows[-1][-1] == "0"  # minutes left
        ends = "(.*): jargon [0-9]+ -> [0-9]+ %, right alone [0-9]+ -> [0-9]+ %, right together .*"
        assert re.findall(ends, printed.out) == ["tandem", "solo"]
        assert lines[-1].startswith(f"Open {out}/figures/rollouts.html")
    for arm in ("tandem", "solo"):
        assert everything(tmp_path / "1", arm) == everything(tmp_path / "2", arm)


def test_the_line_of_progress(command, tmp_path, monkeypatch, capsys):
    """On a terminal. It is not longer than the terminal is wide, and is gone at the end. Nothing is
    right here, which teaches nothing."""
    monkeypatch.setattr(run_gsm8k, "reward", lambda text, gold: 0.0)
    monkeypatch.setattr(os, "isatty", lambda stream: True)
    run_gsm8k.main([*command, "--seeds", "2"])
    drawn = capsys.readouterr().err.split("\r")
    assert {len(line) for line in drawn} == {terminal.WIDTH, 0}
    drawn = [line.strip() for line in drawn]
    assert "specialist en seed 0 step 1/2" in drawn
    assert "tandem seed 1 1/2  about 1 min left" in drawn
    assert drawn[-2:] == ["", ""]
    assert [row["loss"] for row in metrics(tmp_path / "runs")[1:]] == [None, None]


def test_characters_that_an_encoding_lacks(monkeypatch):
    """As in a redirected log. What models and tables write must not end a run."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii", write_through=True))
    with runs.errors_in_one_line():
        print("ä → 三 ⏎")
    assert b"?" in written.getvalue()


def test_a_closed_output(command, tmp_path, monkeypatch):
    """`| head` ends the command in one line. With no output at all it runs to its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", Mock(side_effect=BrokenPipeError))
        patch.setattr(os, "dup2", lambda *_: None)  # pytest's own output stays open
        ends_with("^the output was closed: the same command with --re", run_gsm8k.main, command)
    monkeypatch.setattr(sys, "stdout", None)
    run_gsm8k.main([*command, "--resume"])
    assert len(metrics(tmp_path / "runs", "solo")) == 3


def test_figures_that_cannot_be_drawn(command, tmp_path, monkeypatch):
    no_latex = Mock(side_effect=RuntimeError("latex could not be found\n..."))
    monkeypatch.setattr(terminal.figures, "draw_all", no_latex)
    message = "^error: all runs are finished, but .* found[)]$"
    ends_with(message, run_gsm8k.main, [*command, "--arms", "solo"])
    assert len(metrics(tmp_path / "runs", "solo")) == 3


def test_the_commit_is_that_of_the_project(tmp_path, monkeypatch):
    """Not of a repository in which it was unpacked without its own .git."""
    project = tmp_path / "project"
    (project / "lab").mkdir(parents=True)
    monkeypatch.setattr(runs, "__file__", str(project / "lab" / "runs.py"))
    author = "-c user.name=a -c user.email=a@b"
    for folder, expected in ((tmp_path, type(None)), (project, str)):
        for git in ("init -q", f"{author} commit -q --allow-empty -m first"):
            subprocess.run(["git", *git.split()], cwd=folder, check=True)
        assert isinstance(runs._commit(), expected)


def test_ctrl_c_during_imports(capsys):
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == "interrupted\n"


# ------------------------------------------------------------------------------------------------
# What it learns from

REINFORCE = {"wrong_weight": -0.5, "junior_weight": 0.3}
GRPO = {"algorithm": "grpo", "junior_weight": 0.0, "rollouts_per_prompt": 4}


@pytest.mark.parametrize("changes", [{}, REINFORCE, GRPO, GRPO | {"kl": 0.5}])
def test_the_loop_has_the_gradient_of_the_definition(command, changes, monkeypatch):
    """When the gradient is clipped, it is that of plain_logprobs, in all micro-batches together."""
    for name, value in (changes | {"micro_tokens": 100}).items():
        monkeypatch.setitem(experiments.DEFAULTS, name, value)
    # A group of 4 has nothing to learn from.
    monkeypatch.setattr(run_gsm8k, "reward", Mock(side_effect=cycle([1.0] + [0.0] * 7)))
    found, expected, flat = [], [], torch.nn.utils.parameters_to_vector

    def weights_spy(rollouts, *rest, original=run_gsm8k.token_weights):
        (pair,), weights = PAIR, original(rollouts, *rest)
        logprobs = plain_logprobs(pair.senior, rollouts, 0.7)
        total = -(weights * logprobs).sum()
        if kl := changes.get("kl"):
            read = plain_logprobs(pair.junior, rollouts.as_read_by_junior(), 0.7).detach()
            total += kl * kl_estimate(logprobs, read, rollouts.senior_mask).sum()
        plain = total / rollouts.completion_mask.sum()
        expected.append(flat(torch.autograd.grad(plain, trainable_parameters(pair.senior))))
        return weights

    def clip_spy(parameters, norm, original=torch.nn.utils.clip_grad_norm_):
        found.append(flat([parameter.grad for parameter in parameters]))
        return original(parameters, norm)

    monkeypatch.setattr(run_gsm8k, "token_weights", weights_spy)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_spy)
    run_gsm8k.main([*command, "--arms", "tandem"])
    assert len(expected) == 2
    for ours, plain in zip(found[-2:], expected):  # before, the specialist is made
        assert (ours - plain).norm() < 1e-4 * plain.norm()


def test_shuffled_rewards(command, monkeypatch, tmp_path):
    """As many right rollouts, but others. The row reports the true rewards."""
    given, spy = [1.0] * 3 + [0.0] * 5, Mock(wraps=run_gsm8k.outcome_weights)
    monkeypatch.setattr(run_gsm8k, "reward", Mock(side_effect=cycle(given)))
    monkeypatch.setattr(run_gsm8k, "outcome_weights", spy)
    run_gsm8k.main([*command, "--setting", "control", "--arms", "shuffled"])
    weighted = [call.args[0].tolist() for call in spy.call_args_list]
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
    ends_with("update 1: loss nan.*of update 0 is kept.*smaller --lr", run_gsm8k.main, command)
    assert everything(tmp_path / "runs")[2]["update"] == 0
    assert metrics(tmp_path / "runs", "solo") == metrics(tmp_path / "alone", "solo")
    made = len(calls)
    ends_with("update 1: loss nan", run_gsm8k.main, [*command, "--resume"])
    assert len(calls) == made


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
    real, sizes = run_gsm8k.rollout, set()

    def too_many(pair, asked, *args, **more):
        sizes.add(len(asked))
        written = real(pair, asked, *args, **more)
        if len(asked) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return written

    monkeypatch.setattr(run_gsm8k, "rollout", too_many)
    run_gsm8k.main(command)
    assert sizes == {8, 4, 2}
    found, expected = (everything(tmp_path / out) for out in ("runs", "all"))
    for row, same in zip(found[0], expected[0], strict=True):
        assert (row.get("tokens"), row.get("eval")) == (same.get("tokens"), same.get("eval"))
    assert [sample["spans"] for sample in found[1]] == [sample["spans"] for sample in expected[1]]
    # Steps are kept of the first rollouts that were written at a time.
    assert sum("steps" in sample for sample in found[1]) == 2 * 2


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
        assert (text[: len(start)], text.count(cue), text[-len(cue) :]) == (start, 4, cue)
    assert ("<<24*5=120>>" in senior, "<<" in junior) == (True, False)


def test_the_prompts_of_the_preset_qwen(tokenizer, tmp_path, monkeypatch):
    """The specialist is asked as it was fine-tuned, its junior in a chat with three plain examples,
    which are never evaluated. Without fine-tuning, one model is asked alike."""
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    flags = f"--preset qwen --problems {gsm8k(tmp_path, n=80, steps=2)} --eval-problems 7 --batch 8"
    monkeypatch.setattr(tasks, "split_of", lambda q: "validation" if "0 of" in q else "train")
    senior, junior = asked(runs_of(f"--setting skill {flags}")[0], tokenizer)
    assert re.fullmatch(r"Question: What is 1\+1 in line [0-9]+ of train\?\nAnswer:", senior)
    assert junior.count("<assistant>") == 4
    assert junior.startswith("<user>What is 1+1 in line 0 of train?\nSolve the problem")
    assert "<<" not in junior
    shown = {f"What is 1+1 in line {i} of train?" for i in range(3)}
    held_out = tasks.load_problems(runs_of(f"--setting sweep {flags}")[0])[1]
    assert not shown & {problem.question for problem in held_out}
    senior, junior = asked(runs_of(f"--setting rlvr {flags} --senior x --junior x")[0], tokenizer)
    assert "<<" in senior
    assert tasks.plain(senior) == junior


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
    assert [run.batch for run in rlvr] == [16, 16, 16, 16, 16, 32]
    assert (rlvr[1].eval_problems, rlvr[1].eval_every) == (9, 20)
    of_p = runs_of("--setting granularity --p 0.3")
    assert [run.p for run in of_p[-4:]] == [0.3, 0.25, 0.75, 0.3]
    assert [run.seed for run in runs_of("--setting skill --seeds 2 --arms solo")] == [0, 1]
    # Own models are not small enough for a process per run.
    assert runs_of("--setting skill --device cpu --senior x --junior x")[0].jobs == 1
    ends_with("2", runs_of, "--setting rlvr --junior other")  # these arms start from one model
    # GSM8K has English solutions only, so nobody learns German from them.
    ends_with("2", runs_of, "--setting language --problems openai/gsm8k")


BAD = """--device gpu | --device cuda:99 | --out= | --out=a\\nb | --out /dev/null/runs
--out /proc/runs | --problems /no/folder | --problems no-such/dataset | --problems /dev/null
--senior /no/folder --junior /no/folder | --senior no/such-model --junior no/such-model | --batch 0
--batch 7 | --batch 1e3 | --updates -1 | --updates 999999 | --seeds 0 | --seed 3 | --lr 0 | --lr nan
--specialist-steps 1000000 | --temperature 0 | --p 1 | --wrong-weight 1 | --junior-weight 2
--arms tandem tandem | --arms word | --arms | --setting nothing | --max-new-tokens 1000000 | stray
--setting granularity --arms p-0.25 --p 0.3 | --setting pressure --arms grpo-tandem --batch 100
--handoff syllable | --eval-problems 1000000 | --eval-every 0 | --preset huge | --resume=yes | --lr=
--p 1.5 | --setting= | --jobs 0"""


@pytest.mark.parametrize("given", BAD.replace("\n", " | ").split(" | "))
def test_bad_flags_are_named(given, command, monkeypatch, capsys):
    """In one line, before anything long."""
    monkeypatch.setattr(run_gsm8k, "train", Mock(side_effect=AssertionError))
    with pytest.raises(SystemExit) as stop:
        # --arms comes first: at the end it would take "stray" for an arm.
        run_gsm8k.main(["--arms", "tandem", *command, *given.replace("\\n", "\n").split(" ")])
    # argparse prints its message and exits with 2; all others exit with their message.
    printed = capsys.readouterr().err.splitlines()
    message = printed[-1] if stop.value.code == 2 else stop.value.code
    assert re.fullmatch(".*error: .*", message)
    assert any(word in message for word in re.split("[ =]", given) if word)


# ------------------------------------------------------------------------------------------------
# Several runs at a time


def fork(monkeypatch):
    """Spawned processes would import everything again, which takes half a minute."""
    context = jobs.multiprocessing.get_context("fork")
    monkeypatch.setattr(jobs.multiprocessing, "get_context", lambda kind: context)


def is_refused(args):
    if args.arm == "solo":
        time.sleep(60)  # it is not waited for
    raise runs.Refused(f"{args.arm} is refused")


def is_killed(args):
    signal.raise_signal(signal.SIGKILL)


ENDS = {is_refused: "is refused", is_killed: "killed, perhaps .*--resume and fewer --jobs"}


@pytest.mark.parametrize("train", ENDS)
def test_what_ends_a_process_is_said(tmp_path, monkeypatch, train):
    fork(monkeypatch)
    started = time.time()
    with pytest.raises(runs.Refused, match=ENDS[train]):
        jobs.run_all(train, runs_of(f"--setting skill --jobs 2 --out {tmp_path}"))
    assert time.time() - started < 30
