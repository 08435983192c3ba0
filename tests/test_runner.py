"""The runner end to end with a random base, and every error that it must give before anything long begins."""

import json
import re
from importlib.metadata import version

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import figures
import run_gsm8k
from run_gsm8k import main, parse_args


@pytest.fixture
def command(base_folder, tmp_path):
    """A run of seconds: 2 updates of 8 rollouts, evaluations of 4 problems."""
    flags = f"--setting skill --preset tiny --senior {base_folder} --junior {base_folder} --out {tmp_path / 'runs'} --device cpu "
    flags += "--updates 2 --batch 8 --eval-problems 4 --eval-every 2 --max-new-tokens 12 --specialist-steps 2 --rank 4 --rollout-batch 3"
    return flags.split()


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


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
    assert "| tandem | accuracy, senior alone |" in out
    for arm in ("tandem", "solo"):
        folder = tmp_path / "runs" / "skill" / arm / "seed-0"
        config = json.loads((folder / "config.json").read_text())
        assert config["flags"]["batch"] == 8
        assert config["versions"]["torch"] == version("torch")
        start, first, second = rows(folder / "metrics.jsonl")
        assert set(start) == {"update", "eval"}
        assert set(start["eval"]) == {"senior", "tandem", "junior"}
        assert set(start["eval"]["senior"]) == {"n", "accuracy", "jargon", "languages", "tokens"}
        expected = "update reward senior_share handoffs loss grad_norm tokens seconds_rollout seconds_update".split()
        assert set(first) == set(expected)
        assert set(second) == {*expected, "eval"}
        assert set(second["eval"]) == {"senior", "tandem"}
        assert (first["senior_share"] == 1.0) == (arm == "solo")
        assert first["loss"] is not None
        samples = rows(folder / "samples.jsonl")
        assert {sample["who"] for sample in samples} == {"senior", "tandem", "junior"}
        assert {author for sample in samples if sample["who"] == "tandem" for author, _ in sample["stretches"]} == {"senior", "junior"}
        state = torch.load(folder / "state.pt")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), folder / "adapter")
        saved = dict(model.named_parameters())
        for name, tensor in state["adapter"].items():
            assert torch.equal(saved[name.replace(".weight", ".default.weight")], tensor)
    for suffix in ("png", "pdf"):
        assert (tmp_path / "runs" / "skill" / f"figure2.{suffix}").stat().st_size > 5000


@pytest.mark.usefixtures("always_right")
def test_resume_gives_the_same_run(command, tmp_path):
    """Stopped after update 1 with half a row written, then resumed: the rows of an unbroken run, bit for bit."""
    main([*command, "--arms", "tandem"])
    whole = tmp_path / "runs" / "skill" / "tandem" / "seed-0"
    expected, samples = without_times(rows(whole / "metrics.jsonl")), rows(whole / "samples.jsonl")

    other = [*command, "--arms", "tandem", "--out", str(tmp_path / "other")]
    real, calls = run_gsm8k.save, []

    def stop_after_update_1(folder, update, *rest):
        real(folder, update, *rest)
        calls.append(update)
        if update == 1:
            with open(folder / "metrics.jsonl", "a") as file:
                file.write('{"update": 2, "rew')
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_gsm8k, "save", stop_after_update_1)
        with pytest.raises(KeyboardInterrupt):
            main(other)
    assert calls == [0, 1]
    main([*other, "--resume"])
    broken = tmp_path / "other" / "skill" / "tandem" / "seed-0"
    assert without_times(rows(broken / "metrics.jsonl")) == expected
    assert rows(broken / "samples.jsonl") == samples
    before = (broken / "metrics.jsonl").read_text()
    main([*other, "--resume"])  # a finished arm is not run again
    assert (broken / "metrics.jsonl").read_text() == before
    with pytest.raises(SystemExit):
        main([*other, "--resume", "--lr", "0.5"])


def test_nothing_right_is_skipped_and_said(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_gsm8k, "reward", lambda text, gold: 0.0)
    main([*command, "--arms", "tandem"])
    assert capsys.readouterr().out.count("nothing to learn from: skipped") == 2
    first = rows(tmp_path / "runs" / "skill" / "tandem" / "seed-0" / "metrics.jsonl")[1]
    assert first["loss"] is None


@pytest.mark.usefixtures("always_right")
def test_a_gradient_that_is_not_finite_stops_the_run(command, tmp_path, monkeypatch):
    """The state on disk is that of the last good update: here of update 0, since update 1 fails."""
    monkeypatch.setattr(run_gsm8k, "backward", lambda *_: float("nan"))
    with pytest.raises(SystemExit, match="update 1: loss nan.*state after update 0.*--resume"):
        main([*command, "--arms", "tandem"])
    folder = tmp_path / "runs" / "skill" / "tandem" / "seed-0"
    assert torch.load(folder / "state.pt")["update"] == 0
    assert len(rows(folder / "metrics.jsonl")) == 1


def test_a_tandem_run_without_a_junior_stops(command, monkeypatch):
    """A switch that changes the method must not go unnoticed: here the junior is never named."""
    real = run_gsm8k.rollout
    monkeypatch.setattr(run_gsm8k, "rollout", lambda *a, **k: real(*a, **(k | {"p": 1.0 if 0 < k["p"] < 1 else k["p"]})))
    with pytest.raises(SystemExit, match="this is not tandem training"):
        main([*command, "--arms", "tandem"])


def test_coins_and_tokens_are_two_streams(command, monkeypatch):
    """The runner's own generators, for each seed that it uses: no two of them begin alike. A coin that is the number
    with which the senior samples would let it write only from the lower half of its distribution."""
    seen = []
    real = run_gsm8k.rollout

    def spy(*args, generator, coin_generator, **options):
        for one in (generator, coin_generator):
            seen.append(torch.rand(4, generator=one.clone_state()).tolist())
        return real(*args, generator=generator, coin_generator=coin_generator, **options)

    monkeypatch.setattr(run_gsm8k, "rollout", spy)
    main([*command, "--arms", "tandem", "--rollout-batch", "8"])
    tokens, coins = seen[::2], seen[1::2]
    assert len(tokens) == 7  # 3 + 2 evaluations, 2 updates
    assert not [coin for coin in coins if coin in tokens]
    assert len({tuple(numbers) for numbers in tokens}) == 3  # evaluations repeat theirs, updates do not


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--setting skil", "invalid choice: 'skil'"),
        ("--preset big", "invalid choice: 'big'"),
        ("--handoff words", "invalid choice: 'words'"),
        ("--batch 7", "--batch 7 is not divisible by --rollouts-per-prompt 2"),
        ("--p 1.0", "--p 1.0.*--arms solo"),
        ("--p 0", "--p 0"),
        ("--junior-weight 1.5", "--junior-weight 1.5"),
        ("--wrong-weight 0.4", "--wrong-weight 0.4"),
        ("--temperature 0", "--temperature 0.0: must be above 0"),
        ("--rollouts-per-prompt 0", "--rollouts-per-prompt 0: must be at least 1"),
        ("--seed -1", "--seed -1"),
        ("--updates 0", "--updates 0: must be at least 1"),
        ("--lr -1", "--lr -1.0: must be above 0"),
        ("--specialist-steps -1", "--specialist-steps -1"),
    ],
)
def test_bad_flags(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--setting", "skill", *flags.split()])
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))


def test_a_folder_that_holds_a_run_is_kept(command, tmp_path, capsys):
    folder = tmp_path / "runs" / "skill" / "solo" / "seed-0"
    folder.mkdir(parents=True)
    with pytest.raises(SystemExit):
        main(command)
    assert "already holds a run: go on with --resume" in capsys.readouterr().err
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--senior no/such-checkpoint --junior no/such-checkpoint", "cannot load 'no/such-checkpoint'.*--preset tiny"),
        ("--problems /no/such/folder", "/no/such/folder is not there"),
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
    line = json.dumps({"question": "What is 1+1?", "answer": "1+1 = <<1+1=2>>2\n#### 2"}) + "\n"
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(line * 4)
    main([*command, "--problems", str(tmp_path), "--arms", "solo"])
    with pytest.raises(SystemExit, match="4 training and 4 test problems, --eval-problems 5"):
        main([*command, "--problems", str(tmp_path), "--eval-problems", "5", "--out", str(tmp_path / "more")])


def test_pooling_by_hand(tmp_path):
    """Two seeds, 3 of 4 and 1 of 4: pooled 4 of 8, with the Wilson interval of 8."""
    for seed, accuracy in enumerate((0.75, 0.25)):
        folder = tmp_path / "tandem" / f"seed-{seed}"
        folder.mkdir(parents=True)
        cell = {"n": 4, "accuracy": accuracy, "jargon": 1.0}
        every = {"senior": cell, "tandem": cell, "junior": cell}
        (folder / "metrics.jsonl").write_text(json.dumps({"update": 0, "eval": every}) + "\n")
    ((update, share, low, high),) = figures.pooled(figures.read_runs(tmp_path)["tandem"], "senior", "accuracy")
    assert (update, share) == (0, 0.5)
    assert (low, high) == pytest.approx((0.2152, 0.7848), abs=1e-4)
    assert figures.figure_2(tmp_path).is_file()


def test_no_runs_to_draw(tmp_path):
    with pytest.raises(SystemExit, match="no SETTING/ARM/seed-K/metrics.jsonl"):
        figures.main(str(tmp_path))
