"""The runner end to end with a random base, and every error that it must give before anything long begins."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import run_gsm8k
from lab import figures, runs
from lab.models import trainable_parameters
from reinforce import plain_loss
from rollout import Step
from run_gsm8k import flags_of_run, main, parse_args


@pytest.fixture
def command(base_folder, tmp_path):
    """A run of seconds: 2 updates of 8 rollouts, evaluations of 4 problems."""
    flags = f"--setting skill --preset tiny --senior {base_folder} --junior {base_folder} --out {tmp_path / 'runs'} --device cpu "
    flags += "--updates 2 --batch 8 --eval-problems 4 --eval-every 2 --max-new-tokens 12 --specialist-steps 2 --rank 4 "
    flags += "--rollout-batch 3 --jobs 1"
    return flags.split()


def rows(path):
    """Every row of a file, as it was written."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without_times(all_rows):
    return [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in all_rows]


@pytest.fixture
def always_right(monkeypatch):
    """A random model is never right, and then nothing is learned: let every rollout be."""
    monkeypatch.setattr(run_gsm8k, "reward", lambda text, gold: 1.0)


@pytest.mark.usefixtures("always_right")
def test_a_run_leaves_what_the_contract_says(command, base_folder, tmp_path, capsys):
    main(command)
    out = capsys.readouterr().out
    assert "| tandem | 1 | 2 |" in out
    for arm in ("tandem", "solo"):
        folder = tmp_path / "runs" / arm / "seed-0"
        config = json.loads((folder / "config.json").read_text())
        assert config["flags"]["batch"] == 8
        assert config["versions"]["torch"] == version("torch")
        start, first, second = rows(folder / "metrics.jsonl")
        assert set(start) == {"update", "eval", "seconds_eval"}
        assert set(start["eval"]) == {"senior", "tandem", "junior"}
        assert set(start["eval"]["senior"]) == {"n", "accuracy", "jargon", "languages", "tokens", "outcomes"}
        expected = "update reward senior_share handoffs loss grad_norm tokens jargon logprob_right logprob_wrong seconds_rollout seconds_update"
        expected = expected.split()
        assert set(first) == set(expected)
        assert set(second) == {*expected, "eval", "seconds_eval"}
        assert set(second["eval"]) == {"senior", "tandem"}
        assert set(second["eval"]["tandem"]) == {
            *second["eval"]["senior"],
            "handoffs",
            "handoffs_inside",
            "handoffs_in_words",
            "handoffs_in_numbers",
        }
        assert (first["senior_share"] == 1.0) == (arm == "solo")
        assert first["loss"] is not None
        samples = rows(folder / "samples.jsonl")
        assert {sample["who"] for sample in samples} == {"senior", "tandem", "junior"}
        assert {author for sample in samples if sample["who"] == "tandem" for author, _ in sample["spans"]} == {"senior", "junior"}
        assert all(("steps" in sample) == (sample["who"] == "tandem") for sample in samples)
        steps = [[Step(*step) for step in sample["steps"]] for sample in samples if "steps" in sample]
        assert all(of_one[0].tossed and len(of_one) <= 12 for of_one in steps)
        assert all(0 <= step.probability <= 1 for of_one in steps for step in of_one)
        state = torch.load(folder / "state.pt")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), folder / "adapter")
        saved = dict(model.named_parameters())
        for name, tensor in state["adapter"].items():
            assert torch.equal(saved[name.replace(".weight", ".default.weight")], tensor)
    for suffix in ("png", "pdf"):
        assert (tmp_path / "runs" / "figures" / f"skill-figure2.{suffix}").stat().st_size > 5000
    assert (tmp_path / "runs" / "figures" / "rollouts.html").is_file()


@pytest.mark.usefixtures("always_right")
@pytest.mark.parametrize("flags", [[], ["--eight-bit-adam", "--rank", "64"]])  # below 4096 numbers, 8 bits are not used
def test_resume_gives_the_same_run(command, flags, tmp_path):
    """Stopped after update 1 with half a row written, then resumed: the rows of an unbroken run, bit for bit."""
    command = [*command, *flags]
    main([*command, "--arms", "tandem"])
    whole = tmp_path / "runs" / "tandem" / "seed-0"
    assert ("uint8" in str(torch.load(whole / "state.pt")["optimizer"]["state"][0])) == bool(flags)
    expected, samples = without_times(rows(whole / "metrics.jsonl")), rows(whole / "samples.jsonl")

    other = [*command, "--arms", "tandem", "--out", str(tmp_path / "other")]
    broken = tmp_path / "other" / "tandem" / "seed-0"
    real, calls = runs.save_checkpoint, []

    def interrupted(folder, update, *rest):
        """Ctrl-C before the checkpoint of update 1, whose row is written already, and in the middle of the row of update 2."""
        calls.append(update)
        if calls == [-1, 0, 1]:
            raise KeyboardInterrupt
        real(folder, update, *rest)
        if calls == [-1, 0, 1, 1]:
            with open(folder / "metrics.jsonl", "a") as file:
                file.write('{"update": 2, "rew')
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "save_checkpoint", interrupted)
        for more in ([], ["--resume"]):
            with pytest.raises(SystemExit, match="130"):
                main([*other, *more])
    assert [row["update"] for row in runs.read_rows(broken / "metrics.jsonl")] == [0, 1]
    assert (broken / "metrics.jsonl").read_text().count('{"update": 1,') == 2
    main([*other, "--resume"])
    # No line is empty, so that any reader of JSON lines can read the file; only the one that was cut off is not a row.
    lines = (broken / "metrics.jsonl").read_text().splitlines()
    assert [line for line in lines if not line.endswith("}")] == ['{"update": 2, "rew']
    assert without_times(runs.read_rows(broken / "metrics.jsonl")) == expected
    assert runs.read_rows(broken / "samples.jsonl") == samples
    before = (broken / "metrics.jsonl").read_text()
    main([*other, "--resume"])  # a finished run is not made again
    assert (broken / "metrics.jsonl").read_text() == before
    with pytest.raises(SystemExit, match="was begun with lr = 0.001"):
        main([*other, "--resume", "--lr", "0.5"])


@pytest.mark.usefixtures("always_right")
def test_a_run_goes_on_with_its_own_base_only(command, base_folder, tmp_path):
    """The same flags, but what they name has changed, as when a base is made anew between a run and its --resume."""
    main([*command, "--arms", "tandem"])
    config = tmp_path / "runs" / "tandem" / "seed-0" / "config.json"
    assert json.loads(config.read_text())["flags"]["base"] == Path(base_folder).name
    config.write_text(config.read_text().replace(f'"base": "{Path(base_folder).name}"', '"base": "tiny-0123"'))
    with pytest.raises(SystemExit, match="was begun with base = tiny-0123.*another --out"):
        main([*command, "--arms", "tandem", "--resume"])


def test_nothing_right_is_skipped_and_said(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_gsm8k, "reward", lambda text, gold: 0.0)
    main([*command, "--arms", "tandem"])
    assert capsys.readouterr().out.count("no rollout to learn from: skipped") == 2
    first = rows(tmp_path / "runs" / "tandem" / "seed-0" / "metrics.jsonl")[1]
    assert first["loss"] is None


@pytest.mark.usefixtures("always_right")
def test_a_diverged_run_is_kept_and_the_next_one_is_as_if_alone(command, tmp_path, monkeypatch):
    """The first arm's gradient is not finite: its checkpoint is that of update 0, it says why, and the second arm is made,
    with none of that gradient in it. Resumed, neither is run again, and the reason is given once more."""
    main([*command, "--arms", "solo", "--out", str(tmp_path / "alone")])
    alone = without_times(rows(tmp_path / "alone" / "solo" / "seed-0" / "metrics.jsonl"))
    real, calls = run_gsm8k.completion_logprobs, []

    def first_arm_fails(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 1 else 1.0)

    monkeypatch.setattr(run_gsm8k, "completion_logprobs", first_arm_fails)
    with pytest.raises(SystemExit, match="update 1: loss nan.*after update 0.*smaller --lr"):
        main(command)
    folder = tmp_path / "runs"
    assert torch.load(folder / "tandem" / "seed-0" / "state.pt")["update"] == 0
    assert len(rows(folder / "tandem" / "seed-0" / "metrics.jsonl")) == 1
    assert "loss nan" in (folder / "tandem" / "seed-0" / "stopped.txt").read_text()
    assert without_times(rows(folder / "solo" / "seed-0" / "metrics.jsonl")) == alone
    before = len(calls)
    with pytest.raises(SystemExit, match="update 1: loss nan"):
        main([*command, "--resume"])
    assert len(calls) == before


def test_wrong_rollouts_pushed_away_without_bound_stop_the_run():
    """V = 100: guessing at random is log 100 = 4.6 nats per token. 4.5 goes on, 4.7 does not, unless c = 0 pushes nothing."""
    args = flags_of_run(parse_args(["--setting", "sweep"]), "c-0.5-j1", seed=0)
    row = {"update": 3, "loss": 0.1, "grad_norm": 0.1, "logprob_wrong": -4.5}
    runs.check_divergence(row, args, 100)
    with pytest.raises(runs.Diverged, match=r"update 3: wrong rollouts .* without bound \(-4.7 nats.*--wrong-weight nearer to 0"):
        runs.check_divergence(row | {"logprob_wrong": -4.7}, args, 100)
    args.wrong_weight = 0.0
    runs.check_divergence(row | {"logprob_wrong": -4.7}, args, 100)


@pytest.mark.usefixtures("always_right")
def test_all_settings_arm_by_arm(command, tmp_path, monkeypatch, capsys):
    """A few arms of each setting. Interrupted and resumed, every run is made once, arms that settings share too; the sweep's
    best cell and the main setting are confirmed on test problems; all figures are there."""
    few = {"skill": ["tandem", "solo"], "language": ["de-fr-tandem", "de-fr-solo"], "granularity": ["tandem", "p-0.25"]}
    few |= {"control": ["tandem", "shuffled"], "sweep": ["c-0.1-j0.5", "c-0.5-j0"]}
    monkeypatch.setattr(run_gsm8k, "SETTINGS", few)
    flags = [*command, "--setting", "all", "--updates", "1", "--eval-every", "1"]
    real, made = run_gsm8k.train, []

    def spy(args, pair):
        if len(made) == 4:
            made.append("interrupted")
            raise KeyboardInterrupt
        real(args, pair)
        made.append(args.arm)

    monkeypatch.setattr(run_gsm8k, "train", spy)
    with pytest.raises(SystemExit, match="130"):
        main(flags)
    main([*flags, "--resume"])
    made.remove("interrupted")
    every = {arm for arms in few.values() for arm in arms}
    best = figures.best_cell(tmp_path / "runs")
    confirmed = {"test-c0-j1", f"test-c{best[0]:g}-j{best[1]:g}"}
    assert sorted(made) == sorted(every | confirmed)
    out = capsys.readouterr().out
    assert "4 of 8 runs finished" in out
    assert "4 of 4 runs finished, about 0 minutes left" in out
    assert "2 of 2 runs finished" in out
    for arm in every | confirmed:
        config = json.loads((tmp_path / "runs" / arm / f"seed-{int(arm in confirmed)}" / "config.json").read_text())
        assert config["flags"]["arm"] == arm
        assert config["flags"]["validation"] == (arm in few["sweep"])
    monkeypatch.setattr(figures, "draw", lambda *_: None)
    main([*flags, "--resume"])
    assert len(made) == len(every | confirmed)  # all is there, the confirmation too
    drawn = {path.name for path in (tmp_path / "runs" / "figures").glob("*.png")}
    assert drawn == {f"{name}.png" for name in "skill-figure2 language-figure2 language-figure3 granularity control sweep".split()}
    assert all((tmp_path / "runs" / "figures" / name).with_suffix(".pdf").is_file() for name in drawn)


def test_an_arm_that_two_settings_share_is_stored_once():
    arms = run_gsm8k.arms_of("all")
    assert len(arms) == len(set(arms)) == len(run_gsm8k.ARMS)
    assert sum("tandem" in arms for arms in run_gsm8k.SETTINGS.values()) == 3
    assert set(run_gsm8k.SETTINGS["granularity"]) == {*run_gsm8k.SCHEDULES, "tandem", "p-0.25", "p-0.75", "solo"} - {"word"}


@pytest.mark.parametrize("flags", ["", "--junior-weight 0.3 --wrong-weight -0.5 --micro-tokens 60"])
def test_the_loop_makes_the_gradient_of_the_plain_loss(command, flags, monkeypatch):
    """At the moment of clipping, the gradient is that of plain_loss for the rollouts and weights of the update."""
    batches, compared = [], []
    real_weights, real_clip, real_load = run_gsm8k.token_weights, torch.nn.utils.clip_grad_norm_, run_gsm8k.models.load_pair
    pairs, values = [], iter([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0] * 100)
    monkeypatch.setattr(run_gsm8k.models, "load_pair", lambda *a, **k: pairs.append(real_load(*a, **k)) or pairs[0])
    monkeypatch.setattr(run_gsm8k, "reward", lambda text, gold: next(values))

    def weights_spy(rollouts, *rest):
        batches.append((rollouts, real_weights(rollouts, *rest)))
        return batches[-1][1]

    def clip_spy(parameters, norm):
        if batches:  # not while the specialist is made
            ours = [parameter.grad.clone() for parameter in parameters]
            plain = torch.autograd.grad(plain_loss(pairs[0].senior, *batches[-1], 0.7), trainable_parameters(pairs[0].senior))
            compared.append((torch.cat([x.flatten() for x in ours]), torch.cat([x.flatten() for x in plain])))
        return real_clip(parameters, norm)

    monkeypatch.setattr(run_gsm8k, "token_weights", weights_spy)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_spy)
    main([*command, "--arms", "tandem", *flags.split()])
    assert len(compared) == 2
    for ours, plain in compared:
        assert plain.norm() > 1e-3
        assert (ours - plain).norm() < 1e-4 * plain.norm()


def test_each_writer_is_asked_in_its_language(command, monkeypatch):
    """fr -> de: the senior's prompts end in the French cue, the junior's in the German one."""
    asked = []
    real = run_gsm8k.models.encode_prompts
    monkeypatch.setattr(run_gsm8k.models, "encode_prompts", lambda t, prompts, d: asked.append(prompts[0]) or real(t, prompts, d))
    main([*command, "--setting", "language", "--arms", "fr-de-tandem", "--shots", "1", "--updates", "1"])
    senior, junior = asked[0], asked[1]
    assert senior.startswith("Question: ")  # it has been fine-tuned, so it is shown no examples
    assert senior.endswith("\nRéponse:")
    assert junior.endswith("\nAntwort:")
    assert junior.startswith("Löse die Aufgabe")
    assert "<<" not in junior


def test_a_question_of_its_own_ends_a_completion(command, monkeypatch):
    """The runner passes the stop text, so that what follows it counts neither for the reward nor for the loss."""
    seen, real = [], run_gsm8k.rollout_in_chunks
    monkeypatch.setattr(run_gsm8k, "rollout_in_chunks", lambda *args, **options: seen.append(options) or real(*args, **options))
    main([*command, "--arms", "tandem", "--updates", "1"])
    assert {options["truncate_at"] for options in seen} == {"\nQuestion:"}


def test_only_the_junior_is_evaluated(command, tmp_path, capsys):
    """--updates 0 --evaluate junior: one row, one evaluation, no figure."""
    main([*command, "--arms", "tandem", "--updates", "0", "--evaluate", "junior"])
    (row,) = rows(tmp_path / "runs" / "tandem" / "seed-0" / "metrics.jsonl")
    assert set(row["eval"]) == {"junior"}
    assert "there is nothing to draw" in capsys.readouterr().out


def test_shuffled_rewards(command, monkeypatch):
    """The same number of right rollouts, other ones: the row reports the true rewards, the weights follow the shuffled ones."""
    weighted, values = [], iter([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0] * 100)
    monkeypatch.setattr(run_gsm8k, "reward", lambda text, gold: next(values))
    real = run_gsm8k.outcome_weights
    monkeypatch.setattr(run_gsm8k, "outcome_weights", lambda rewards, c: weighted.append(rewards.tolist()) or real(rewards, c))
    main([*command, "--setting", "control", "--arms", "shuffled", "--seeds", "2"])
    assert all(sum(rewards) == 3 for rewards in weighted)
    assert len({tuple(rewards) for rewards in weighted}) > 2  # two updates of two seeds, each with a permutation of its own


def test_a_tandem_run_without_a_junior_stops(command, tmp_path, monkeypatch):
    """A switch that changes the method must not go unnoticed: here the junior is never named."""
    real = run_gsm8k.rollout_in_chunks
    monkeypatch.setattr(run_gsm8k, "rollout_in_chunks", lambda *a, **k: real(*a, **(k | {"p": 1.0 if 0 < k["p"] < 1 else k["p"]})))
    with pytest.raises(SystemExit, match="update 5: the senior wrote 100% of the tokens of 5 tandem batches in a row. This is not tandem"):
        main([*command, "--arms", "tandem", "--updates", "6"])
    assert [row["update"] for row in runs.read_rows(tmp_path / "runs" / "tandem" / "seed-0" / "metrics.jsonl")] == [0, 1, 2, 3, 4]


def test_coins_and_tokens_are_two_streams(command, monkeypatch):
    """The runner's own random numbers, for each seed that it uses: no two streams begin alike. A coin that is the number
    with which the senior samples would let it write only from the lower half of its distribution."""
    tokens, coins = [], []
    real = run_gsm8k.random_numbers

    def spy(*args):
        numbers = real(*args)
        tokens.append(numbers[0].flatten()[:4].tolist())
        coins.append(numbers[1].flatten()[:4].tolist())
        return numbers

    monkeypatch.setattr(run_gsm8k, "random_numbers", spy)
    main([*command, "--arms", "tandem"])
    assert len(tokens) == 7  # 3 + 2 evaluations, 2 updates
    assert not [coin for coin in coins if coin in tokens]
    assert len({tuple(numbers) for numbers in tokens}) == 3  # evaluations repeat theirs, updates do not


@pytest.mark.usefixtures("always_right")
def test_rollouts_do_not_depend_on_how_many_are_written_at_a_time(command, tmp_path):
    found = []
    for rollout_batch in ("2", "100"):
        out = tmp_path / rollout_batch
        main([*command, "--arms", "tandem", "--rollout-batch", rollout_batch, "--out", str(out)])
        found.append(rows(out / "tandem" / "seed-0" / "samples.jsonl"))
    assert found[0] == found[1]


@pytest.mark.usefixtures("always_right")
def test_chunks_are_cut_to_the_memory(command, tmp_path, capsys):
    """6 MiB hold fewer of this base's rollouts than 8, and the same ones; 1 MiB holds none."""
    command = [*command, "--arms", "tandem", "--rollout-batch", "8"]
    main(command)
    assert "8 rollouts of" in capsys.readouterr().out
    main([*command, "--out", str(tmp_path / "less"), "--memory", "0.006"])
    assert re.search(r"weights .* MiB, [1-7] rollouts of", capsys.readouterr().out)
    less, more = (tmp_path / name / "tandem" / "seed-0" / "samples.jsonl" for name in ("less", "runs"))
    assert rows(less) == rows(more)
    with pytest.raises(SystemExit, match="more than the budget of 1 MiB even with one rollout at a time.*--checkpointing"):
        main([*command, "--out", str(tmp_path / "none"), "--memory", "0.001"])
    assert not (tmp_path / "none").exists()


def test_two_processes_make_the_update_of_one(command, tmp_path):
    """torchrun with two processes on the CPU: the same rows, the same adapter, also on a base that they teach together.

    c = -0.5, so that wrong rollouts teach.
    """
    flags = [*command, "--arms", "tandem", "--wrong-weight", "-0.5", "--micro-tokens", "100", "--teach-steps", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    runs = {}
    for n in (1, 2):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), "--master-port", str(29610 + n)]
        subprocess.run(
            [*launcher, "run_gsm8k.py", *flags, "--out", str(tmp_path / str(n))], check=True, env=environment, capture_output=True
        )
        folder = tmp_path / str(n) / "tandem" / "seed-0"
        runs[n] = without_times(rows(folder / "metrics.jsonl")), torch.load(folder / "state.pt")["adapter"]
    for one, two in zip(runs[1][0], runs[2][0]):
        for name in one:
            assert two[name] == (pytest.approx(one[name], rel=1e-4) if isinstance(one[name], float) else one[name])
    for name, tensor in runs[1][1].items():
        assert torch.allclose(tensor, runs[2][1][name], atol=1e-5)
    assert runs[1][0][1]["loss"] is not None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--setting skil", "invalid choice: 'skil'"),
        ("--preset big", "invalid choice: 'big'"),
        ("--handoff words", "invalid choice: 'words'"),
        ("--batch 7", "--batch 7 is not divisible by --rollouts-per-prompt 2"),
        ("--p 1.0", "--p 1: .*such as solo"),
        ("--p 0", "--p 0: "),
        ("--p nan", "--p: nan: must be a finite number of at least 0 and at most 1"),
        ("--junior-weight 1.5", "--junior-weight: 1.5: must"),
        ("--wrong-weight 0.4", "--wrong-weight: 0.4: must be a finite number of at least -1 and at most 0"),
        ("--temperature 0", "--temperature: 0: must be a finite number greater than 0"),
        ("--rollouts-per-prompt 0", "--rollouts-per-prompt: 0: must be a finite number of at least 1"),
        ("--seed -1", "--seed: -1: must"),
        ("--setting sweep --seed 499 --seeds 300", "--seed 499 --seeds 300: the last seed would be 1098"),
        ("--updates -1", "--updates: -1: must"),
        ("--lr inf", "--lr: inf: must be a finite number greater than 0"),
        ("--lr much", "--lr: invalid float value: 'much'"),
        ("--memory 0", "--memory: 0: must"),
        ("--specialist-steps -1", "--specialist-steps: -1: must"),
        ("--teach-steps -1", "--teach-steps: -1: must"),
        ("--arms tandm", "--arms tandm: not in --setting skill, whose arms are tandem, solo"),
        ("--shots 9", "--shots: 9: must be a finite number of at least 0 and at most 3"),
        ("--senior-language es", "invalid choice: 'es'"),
        ("--algorithm ppo", "invalid choice: 'ppo'"),
        ("--algorithm grpo --kl nan", "--kl: nan: must be a finite number"),
        ("--algorithm grpo --wrong-weight -0.3", "--wrong-weight: no effect on tandem, solo"),
        ("--clip-ratio 0.1", "--clip-ratio: no effect on tandem, solo"),
        ("--kl 0.1", "--kl: no effect on tandem, solo"),
        ("--inner-steps 2", "--inner-steps: no effect on tandem, solo"),
        ("--algorithm grpo --rollouts-per-prompt 1", "--rollouts-per-prompt 1: GRPO compares the rollouts of a prompt"),
        ("--setting pressure --batch 100", "--batch 100 is not divisible by --rollouts-per-prompt 8 .arm grpo-tandem"),
        ("--setting pressure --arms grpo-tandem --algorithm grpo", "--algorithm: no effect on grpo-tandem"),
        ("--setting rlvr --preset paper", "--setting rlvr: senior and junior start as one model"),
    ],
)
def test_bad_flags(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--setting", "skill", *flags.split()])
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))


def test_help_shows_the_defaults_of_the_preset(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--preset", "paper", "--help"])
    assert "neuralmagic/Llama-2-7b-gsm8k" in capsys.readouterr().out


def test_results_without_a_state_are_not_resumed(command, tmp_path):
    """As in a clone of this repository: the rows are there, the states are not, and nothing may be lost."""
    folder = tmp_path / "runs" / "solo" / "seed-0"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"update": 0}\n')
    with pytest.raises(SystemExit, match="holds rows but no state.pt"):
        main([*command, "--resume"])
    assert (folder / "metrics.jsonl").read_text() == '{"update": 0}\n'


def test_a_folder_that_holds_a_run_is_kept(command, tmp_path):
    folder = tmp_path / "runs" / "solo" / "seed-0"
    folder.mkdir(parents=True)
    (folder / "state.pt").write_text("kept")
    with pytest.raises(SystemExit, match="already holds a run: continue it with --resume"):
        main(command)
    assert (folder / "state.pt").read_text() == "kept"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--senior no/such-checkpoint --junior no/such-checkpoint", r"cannot load 'no/such-checkpoint' \(\w+Error.*--preset tiny"),
        ("--senior /no/such-folder --junior /no/such-folder", r"cannot load '/no/such-folder' \(there is no such folder\)"),
        (f"--senior {Path(__file__).parent} --junior tiny", r"cannot load .*tests' \(the folder has no config.json\)"),
        ("--problems /no/such/folder", "/no/such/folder/train.jsonl is not there"),
    ],
)
def test_what_cannot_be_loaded(command, tmp_path, flags, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit, match=message):
        main([*command, *flags.split()])
    assert not (tmp_path / "runs").exists()  # nothing was begun


def test_malformed_problems_are_named_first(command, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"question": "Q", "answer": "#### 1"}\n{"question": "Q"}\n')
    with pytest.raises(SystemExit, match="train.jsonl, line 2"):
        main([*command, "--problems", str(tmp_path)])


def test_real_format_problems(command, tmp_path):
    for name in ("train", "test"):
        line = json.dumps({"question": f"What is 1+1 in the {name} file?", "answer": "1+1 = <<1+1=2>>2\n#### 2"}) + "\n"
        (tmp_path / f"{name}.jsonl").write_text(line * 4)
    main([*command, "--problems", str(tmp_path), "--arms", "solo"])
    with pytest.raises(SystemExit, match="4 training and 4 test problems, but --eval-problems is 5"):
        main([*command, "--problems", str(tmp_path), "--eval-problems", "5", "--out", str(tmp_path / "more")])


def test_no_runs_to_draw(tmp_path):
    with pytest.raises(SystemExit, match="metrics.jsonl"):
        figures.main(str(tmp_path))


# ----------------------------------------------------------------------------------------------------------------------
# Several runs at a time


def test_runs_side_by_side_are_those_of_one_process(command, tmp_path):
    """--jobs 2 starts two processes, which need the same specialist at the same time: the rows of --jobs 1, bit for bit."""
    command.remove("--jobs"), command.remove("1")
    found = []
    for jobs in ("1", "2"):
        out = tmp_path / jobs
        main([*command, "--jobs", jobs, "--wrong-weight", "-0.5", "--out", str(out)])
        found.append([without_times(rows(out / arm / "seed-0" / "metrics.jsonl")) for arm in ("tandem", "solo")])
        assert json.loads((out / "solo" / "seed-0" / "config.json").read_text())["flags"]["jobs"] == int(jobs)
    assert found[0] == found[1]
    assert found[0][0][1]["loss"] is not None


def test_errors_of_a_process_are_those_of_the_run(command, tmp_path):
    """A specialist that cannot be read is found by the processes that need it, and named as without them."""
    command[-1] = "2"
    path = tmp_path / "runs" / "specialist" / "en" / "seed-0" / "adapter.pt"
    path.parent.mkdir(parents=True)
    path.write_text("damaged")
    with pytest.raises(SystemExit, match="adapter.pt cannot be used .*remove"):
        main(command)


def test_a_killed_process_is_named(monkeypatch, tmp_path):
    """As when the machine has too little memory: not waited for forever."""
    from concurrent.futures.process import BrokenProcessPool

    def killed(*_):
        raise BrokenProcessPool
        yield

    monkeypatch.setattr(runs.parallel, "for_each", killed)
    args = flags_of_run(parse_args(["--setting", "skill", "--out", str(tmp_path)]), "solo", seed=0)
    with pytest.raises(runs.Refused, match="killed, perhaps for want of memory: continue with --resume and fewer --jobs"):
        runs.run_all([args], print, jobs=2)


# ----------------------------------------------------------------------------------------------------------------------
# GRPO


def test_defaults_follow_the_algorithm():
    """Groups of 8 without the junior's tokens for GRPO, pairs with them for REINFORCE. Lengths on the command line go over those of
    an arm, and twice the group means twice the batch."""
    args = parse_args(["--setting", "pressure"])
    seen = {run.arm: (run.rollouts_per_prompt, run.junior_weight, run.updates) for run in run_gsm8k.runs_of(args)}
    assert seen["grpo-tandem"] == (8, 0.0, 80)
    assert seen["reinforce-j1"] == (2, 1.0, 80)
    assert seen["reinforce-j0"] == (2, 0.0, 80)
    assert flags_of_run(parse_args(["--setting", "pressure", "--updates", "3"]), "grpo-tandem", 0).updates == 3
    rlvr = {run.arm: run for run in run_gsm8k.runs_of(parse_args(["--setting", "rlvr", "--batch", "16", "--eval-problems", "9"]))}
    assert [(run.batch, run.rollouts_per_prompt) for run in rlvr.values()] == [(16, 8), (16, 8), (16, 8), (32, 16)]
    assert (rlvr["rlvr-solo"].eval_problems, rlvr["rlvr-solo"].eval_every) == (9, 20)
    # A flag of the other algorithm does not reach an arm.
    both = run_gsm8k.runs_of(parse_args("--setting pressure --kl 0.1 --inner-steps 2 --wrong-weight -0.3".split()))
    by_arm = {run.arm: (run.kl, run.inner_steps, run.wrong_weight) for run in both}
    assert by_arm["grpo-tandem"] == (0.1, 2, 0.0)
    assert by_arm["reinforce-j1"] == (0.0, 1, -0.3)
    assert flags_of_run(parse_args(["--setting", "pressure", "--junior-weight", "0.5"]), "grpo-tandem", 0).junior_weight == 0.5


def test_the_first_step_of_grpo_is_the_gradient_of_the_plain_loss(command, monkeypatch):
    """Groups of 4, of which one, two or four are right. At the moment of clipping the gradient is that of plain_loss with A in
    the place of w, for the senior's tokens only; with a second step on the same batch the gradient is another one."""
    batches, compared, pairs = [], [], []
    real_weights, real_clip, real_load = run_gsm8k.token_weights, torch.nn.utils.clip_grad_norm_, run_gsm8k.models.load_pair
    values = iter([1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0] * 100)
    monkeypatch.setattr(run_gsm8k.models, "load_pair", lambda *a, **k: pairs.append(real_load(*a, **k)) or pairs[0])
    monkeypatch.setattr(run_gsm8k, "reward", lambda text, gold: next(values))

    def weights_spy(rollouts, w, junior_weight):
        batches.append((rollouts, real_weights(rollouts, w, junior_weight)))
        return batches[-1][1]

    def clip_spy(parameters, norm):
        if batches:  # not while the specialist is made
            ours = torch.cat([parameter.grad.flatten() for parameter in parameters])
            plain = torch.autograd.grad(plain_loss(pairs[0].senior, *batches[-1], 0.7), trainable_parameters(pairs[0].senior))
            compared.append((ours, torch.cat([x.flatten() for x in plain])))
        return real_clip(parameters, norm)

    monkeypatch.setattr(run_gsm8k, "token_weights", weights_spy)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_spy)
    flags = "--arms tandem --algorithm grpo --rollouts-per-prompt 4 --inner-steps 2 --updates 1 --micro-tokens 60 --lr 0.05"
    main([*command, *flags.split()])
    first, second = compared
    assert first[1].norm() > 1e-3
    assert (first[0] - first[1]).norm() < 1e-4 * first[1].norm()
    # In the second step the ratio is no longer 1: the gradient of the plain loss at the new weights is not that of the objective.
    assert (second[0] - second[1]).norm() > 1e-3 * second[1].norm()
    ((rollouts, weights),) = batches
    assert (weights[rollouts.senior_mask == 0] == 0).all()
    assert sorted({round(weight, 2) for weight in weights.flatten().tolist()}) == [-0.87, -0.5, 0.0, 0.87, 1.5]


def test_kl_pulls_the_senior_to_its_junior(command, monkeypatch, tmp_path):
    """No reward at all: without the KL term nothing is learned, with it the specialist's jargon-laden distribution moves back
    towards the base, although every advantage is 0."""
    monkeypatch.setattr(run_gsm8k, "reward", lambda text, gold: 0.0)
    flags = [*command, "--arms", "solo", "--algorithm", "grpo", "--rollouts-per-prompt", "4", "--batch", "16", "--updates", "8"]
    flags += ["--lr", "0.002", "--specialist-lr", "0.3", "--measures", "--eval-every", "8", "--eval-problems", "16"]
    drift = {}
    for kl in ("0", "1"):
        out = tmp_path / kl
        main([*flags, "--out", str(out), *(["--kl", kl] if kl != "0" else [])])
        folder = out / "solo" / "seed-0"
        assert (rows(folder / "metrics.jsonl")[1]["loss"] is None) == (kl == "0")
        drift[kl] = [sum(row["drift"]) / 16 for row in rows(folder / "measures.jsonl")]
    assert drift["0"][0] == drift["1"][0] > 0.05
    assert drift["0"][1] == drift["0"][0]
    assert drift["1"][1] < 0.7 * drift["1"][0]
