"""Interrupted runs, and folders that cannot be used: the right result, or one message.

Kills at random moments are in tests/kill.py, damaged and hostile files in tests/test_hostile.py.
"""

import os
import shutil
from unittest.mock import Mock

import pytest
from test_runner import command, everything, metrics, runs_of  # noqa: F401  a fixture

from conftest import ends_with
from lab import experiments, jobs, runs
from run_gsm8k import main


@pytest.fixture(scope="module")
def finished(base_folder, tmp_path_factory):
    """The flags of a run of two updates, and its --out. Copy it before you damage it."""
    out = tmp_path_factory.mktemp("finished") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        flags = command.__wrapped__(base_folder, out, patch)[:-2] + ["--arms", "tandem"]
        main([*flags, "--out", str(out)])
    return flags, out


@pytest.fixture
def copy(finished, command, tmp_path):  # noqa: F811
    """(command that resumes it, run folder) of a copy of that run."""
    out = shutil.copytree(finished[1], tmp_path / "copy")
    return [*finished[0], "--out", str(out), "--resume"], out / "tandem" / "seed-0"


def contents(folder):
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder): path.read_bytes() for path in paths}


def fail_to_replace(patch, name, error):
    """No file of this name can be replaced by its draft."""

    def replace(draft, path, original=os.replace):
        if path.name == name:
            raise error
        original(draft, path)

    patch.setattr(os, "replace", replace)


# ------------------------------------------------------------------------------------------------
# A resumed run is the same run


@pytest.mark.parametrize("arm", ["shuffled", "rlvr-solo-kl"])
def test_resume_gives_the_same_run(command, arm, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Interrupted before the state of update 1 and in the row of update 2, then resumed."""
    monkeypatch.setitem(experiments.ARMS[arm], "measures", False)
    command = ["--setting", "all", *command[2:], "--arms", arm]  # noqa: F811
    if "rlvr" in arm:
        at = command.index("--specialist-steps")  # these arms fix it
        del command[at : at + 2]
    main(command)
    other, real, calls = [*command, "--out", str(tmp_path / "other")], runs.save_state, []
    folder, torn = tmp_path / "other" / arm / "seed-0", '{"update": 2, "rä'.encode()[:-1]

    def interrupted(args, update, *rest):
        calls.append(update)
        if calls == [-1, 0, 1]:
            raise KeyboardInterrupt
        real(args, update, *rest)
        if calls == [-1, 0, 1, 1]:
            with open(folder / "metrics.jsonl", "ab") as file:
                file.write(b"[1]\n" + torn)
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "save_state", interrupted)
        for more in ([], ["--resume"]):
            ends_with("130", main, [*other, *more])
            (line,) = capsys.readouterr().err.splitlines()
            assert line == "interrupted: the same command with --resume goes on"
    main([*other, "--resume"])
    assert f"{arm} from update 1 to 2\n" in capsys.readouterr().out
    # Any reader of JSON lines can read the file, but for what is no row and the line that was torn.
    lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    assert [line for line in lines if line[-1:] != b"}"] == [b"[1]", torn]
    assert sum(line.startswith(b'{"update": 1,') for line in lines) == 2
    assert everything(tmp_path / "other", arm) == everything(tmp_path / "runs", arm)
    assert metrics(tmp_path / "runs", arm)[1]["loss"] is not None


@pytest.mark.parametrize("moment", ["adapter.pt", "config.json", "state.pt"])
def test_an_interruption_of_the_first_save(finished, command, tmp_path, monkeypatch, moment):  # noqa: F811
    """Before anything is complete: of the specialist, and of the first files."""
    flags = [*finished[0], "--out", str(tmp_path / "runs")]
    with pytest.MonkeyPatch.context() as patch:
        fail_to_replace(patch, moment, KeyboardInterrupt())
        ends_with("130", main, flags)
    main([*flags, "--resume"])
    assert everything(tmp_path / "runs") == everything(finished[1])
    assert not list((tmp_path / "runs").rglob("*draft*"))


# ------------------------------------------------------------------------------------------------
# What is not resumed


def test_a_run_goes_on_with_its_own_flags_and_base(copy):
    command, folder = copy  # noqa: F811
    ends_with("already holds a run: add --resume", main, command[:-1])
    ends_with("was begun with lr = 0.001: resume it so", main, [*command, "--lr", "0.5"])
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('checksum": "', 'checksum": "0123'))
    ends_with("was begun with problems-checksum = 0123", main, command)
    (folder / "config.json").write_text(config.replace('"base": "', '"base": "tiny-0123'))
    ends_with("was begun with base = tiny-0123.*another --out", main, command)
    (folder / "state.pt").unlink()  # as in a clone
    ends_with("has rows, but no state.pt", main, command)


def test_a_second_process_is_refused(copy, monkeypatch):
    """A run holds its lock while it is written."""
    held = []

    def second(args, pair):
        with pytest.raises(runs.Refused, match="another process"), jobs.locked([args]):
            pass
        held.append(args)

    monkeypatch.setattr("run_gsm8k.train", second)
    main([*copy[0], "--updates", "3"])
    assert held


def test_more_runs_than_files_can_be_open(tmp_path, monkeypatch):
    """A run holds a file open for its lock."""
    monkeypatch.setattr(jobs, "FileLock", Mock(side_effect=OSError("Too many open files")))
    todo = runs_of(f"--setting all --out {tmp_path}")
    with pytest.raises(runs.Refused, match="Too many open .*fewer --seeds"), jobs.locked(todo):
        pass


# ------------------------------------------------------------------------------------------------
# Files, folders and specialists that cannot be used


def test_files_are_replaced_as_a_whole(copy, monkeypatch):
    command, folder = copy  # noqa: F811
    before = (folder / "state.pt").read_bytes()
    fail_to_replace(monkeypatch, "state.pt", OSError(28, "No space left on device"))
    message = "cannot write .*state.pt .*No space left.*another --out"
    ends_with(message, main, [*command, "--updates", "3"])
    assert (folder / "state.pt").read_bytes() == before


def test_only_seed_folders_count(tmp_path):
    for name in "seed-10 seed-2 seed-0.1 seed-0~ seed- seed-x seed-² seed-1.copy".split():
        (tmp_path / "tandem" / name).mkdir(parents=True)
    assert [path.name for path in runs.seed_folders(tmp_path, "tandem")] == ["seed-2", "seed-10"]


def test_a_specialist_that_is_not_finite_stops_its_runs(command, monkeypatch):  # noqa: F811
    def diverge(senior, *args, **options):
        next(p for p in senior.parameters() if p.requires_grad).data[0, 0] = float("nan")

    monkeypatch.setattr("lab.specialist.fine_tune", diverge)
    ends_with("(?s)(logits of a model are not finite.*){2}", main, command)
