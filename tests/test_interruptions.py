"""Interrupted runs, damaged files and bad values: the right result, or one message that names path and remedy.

Kills at random moments are in tests/kill.py, two hundred bad command lines and files in tests/bad_input.py.
"""

import argparse
import json
import os
import re
import shutil

import pytest
import torch
from test_runner import always_right, rows, without_times  # noqa: F401  a fixture

import run_gsm8k
from lab import benchmark, runs
from lab.problems import chat_prompt, load_gsm8k
from run_gsm8k import main, parse_args


@pytest.fixture(scope="module")
def finished(base_folder, tmp_path_factory):
    """The command of a run of two updates and its folder. Copy it before you damage it."""
    out = tmp_path_factory.mktemp("finished") / "runs"
    flags = f"--setting skill --preset tiny --senior {base_folder} --junior {base_folder} --device cpu --arms tandem --updates 2 "
    flags += "--batch 8 --eval-problems 4 --eval-every 2 --max-new-tokens 12 --specialist-steps 2 --rank 4"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_gsm8k, "reward", lambda text, gold: 1.0)
        main([*flags.split(), "--out", str(out)])
    return flags.split(), out


@pytest.fixture
def copy(finished, tmp_path):
    """(command that resumes it, run folder) of a copy of that run."""
    flags, out = finished
    shutil.copytree(out, tmp_path / "copy")
    return [*flags, "--out", str(tmp_path / "copy"), "--resume"], tmp_path / "copy" / "tandem" / "seed-0"


class Hostile:
    """A pickle that would make a folder when it is loaded."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ----------------------------------------------------------------------------------------------------------------------
# Point 8: rows are neither lost nor doubled


def test_a_second_process_is_refused(copy):
    """The lock belongs to an open file, so that it works within one process too. It is given up when the first one ends."""
    fcntl = pytest.importorskip("fcntl")
    command, folder = copy
    before = contents(folder)
    with open(folder / "metrics.jsonl", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match=r"seed-0 is being written by another process: wait .*another --out"):
            main(command)
        assert contents(folder) == before
    main(command)


def test_a_run_locks_its_folder_while_it_is_written(finished, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    tried = []

    def second_process(args, pair):
        runs.run_folder(args).mkdir(parents=True, exist_ok=True)
        with open(runs.run_folder(args) / "metrics.jsonl", "ab") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        tried.append(args)

    monkeypatch.setattr(run_gsm8k, "train", second_process)
    main([*finished[0], "--out", str(tmp_path / "runs")])
    assert len(tried) == 1


@pytest.mark.parametrize("updates", [[0, 2], [0, 1], [1, 2], []])
def test_lost_rows_are_not_resumed(copy, updates):
    """state.pt is that of update 2, so that rows 0, 1 and 2 must be there. Each may be there twice."""
    command, folder = copy
    kept = [row for row in rows(folder / "metrics.jsonl") if row["update"] in updates]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept + kept))
    with pytest.raises(SystemExit, match="metrics.jsonl cannot be used .it lacks.*updates 0 to 2.*restore it from a copy, or remove"):
        main(command)


def test_rows_that_are_there_twice_are_resumed(copy):
    command, folder = copy
    (folder / "metrics.jsonl").write_bytes((folder / "metrics.jsonl").read_bytes() * 2)
    main([*command, "--updates", "3"])
    assert [row["update"] for row in runs.read_rows(folder / "metrics.jsonl")] == [0, 1, 2, 3]


def test_only_seed_folders_count(tmp_path):
    for name in "seed-10 seed-2 seed-0.123 seed-0~ seed- seed-x seed-1.copy".split() + ["seed-0 (copy)", "seed-²"]:
        (tmp_path / "tandem" / name).mkdir(parents=True)
    assert [path.name for path in runs.seed_folders(tmp_path, "tandem")] == ["seed-2", "seed-10"]


def test_stale_drafts_are_removed(copy):
    command, folder = copy
    for name in ("state.pt.123", "config.json.4", "adapter.pt.56", "stopped.txt.7"):
        (folder / name).write_text("half")
    (folder / "metrics.jsonl.1").write_text("a file of somebody else")
    main(command)
    assert [path.name for path in folder.iterdir() if path.suffix[1:].isdecimal()] == ["metrics.jsonl.1"]


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "optimizer"])
def test_a_state_with_other_tensors_is_refused(copy, damage):
    command, folder = copy
    state = torch.load(folder / "state.pt")
    name = next(iter(state["adapter"]))
    if damage == "missing":
        del state["adapter"][name]
    elif damage == "extra":
        state["adapter"][f"{name}.more"] = torch.zeros(3)
    elif damage == "shape":
        state["adapter"][name] = torch.zeros(3, 3)
    else:
        del state["optimizer"]["state"][0]
    torch.save(state, folder / "state.pt")
    with pytest.raises(SystemExit, match=r"state.pt cannot be used .*(incomplete|another shape).*remove .*seed-0 to make it anew"):
        main([*command, "--updates", "3"])


# ----------------------------------------------------------------------------------------------------------------------
# Point 9: nothing is blocked


@pytest.mark.usefixtures("always_right")
@pytest.mark.parametrize("moment", ["config.json", "adapter", "state.pt", "first row", "after first row"])
def test_a_kill_in_the_first_save_is_resumed(finished, tmp_path, monkeypatch, moment):
    """Interrupted before anything of a run is complete: --resume gives the rows of an unbroken run."""
    flags, unbroken = finished
    command = [*flags, "--out", str(tmp_path / "runs")]
    real_replace, real_append, real_save = os.replace, runs.append_rows, runs.save_checkpoint

    def interrupt(*args):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", lambda draft, path: interrupt() if path.name == moment else real_replace(draft, path))
        if moment == "adapter":
            patch.setattr("peft.PeftModel.save_pretrained", lambda *args, **options: interrupt())
        if moment == "first row":
            patch.setattr(runs, "append_rows", lambda path, new: interrupt() if path.name == "metrics.jsonl" else real_append(path, new))
        if moment == "after first row":
            patch.setattr(runs, "save_checkpoint", lambda folder, n, *rest: interrupt() if n == 0 else real_save(folder, n, *rest))
        with pytest.raises(SystemExit, match="130"):
            main(command)
    main([*command, "--resume"])
    folder, expected = tmp_path / "runs" / "tandem" / "seed-0", unbroken / "tandem" / "seed-0"
    assert without_times(runs.read_rows(folder / "metrics.jsonl")) == without_times(rows(expected / "metrics.jsonl"))
    assert runs.read_rows(folder / "samples.jsonl") == rows(expected / "samples.jsonl")
    assert not [path for path in folder.iterdir() if path.suffix[1:].isdecimal()]


@pytest.mark.parametrize("updates", ["0", "2"])
def test_a_clone_is_kept(copy, updates):
    """Committed results have config, rows and samples, but no state. One row is all that --updates 0 leaves."""
    command, folder = copy
    (folder / "state.pt").unlink()
    shutil.rmtree(folder / "adapter")
    if updates == "0":
        (folder / "metrics.jsonl").write_text(json.dumps(rows(folder / "metrics.jsonl")[0]) + "\n")
    before = contents(folder)
    with pytest.raises(SystemExit, match="holds rows but no state.pt"):
        main([*command, "--updates", updates])
    assert contents(folder) == before


def test_config_is_replaced_as_a_whole(copy, monkeypatch):
    command, folder = copy
    before = (folder / "config.json").read_bytes()
    monkeypatch.setattr(os, "replace", lambda draft, path: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(SystemExit, match="cannot write .*config.json .*No space left on device.*another --out"):
        main([*command, "--updates", "3"])
    assert (folder / "config.json").read_bytes() == before


@pytest.mark.parametrize("place", ["file", "file in place of an arm", "folder in place of the rows", "/proc/runs"])
def test_out_is_tried_before_the_models_are_loaded(finished, tmp_path, monkeypatch, place):
    """(A full or read-only disk gives the same message; root may write to read-only folders, so that it is not tested.)"""
    out = tmp_path / "runs"
    if place == "file":
        out.write_text("")
    elif place == "file in place of an arm":
        out.mkdir()
        (out / "tandem").write_text("")
    elif place == "folder in place of the rows":
        (out / "tandem" / "seed-0" / "metrics.jsonl").mkdir(parents=True)
    else:
        out = place
    monkeypatch.setattr(run_gsm8k.models, "load_pair", None)
    with pytest.raises(SystemExit, match="cannot write .*: make room or give rights"):
        main([*finished[0], "--out", str(out)])


def test_a_disk_without_room_is_noticed_before_the_models_are_loaded(finished, tmp_path, monkeypatch):
    """A limit of 64 KiB per file stands in for a full disk."""
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(run_gsm8k.models, "load_pair", None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        with pytest.raises(SystemExit, match="cannot write .*File too large"):
            main([*finished[0], "--out", str(tmp_path / "runs")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_one_sided_batches_are_judged_over_several_updates(tmp_path):
    """Four rows in a row are chance, five are not; a mixed batch or an older version of the same row does not count."""
    args = argparse.Namespace(out=str(tmp_path), arm="tandem", seed=0, solo=False)
    path = tmp_path / "tandem" / "seed-0" / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    shares = {0: None, 1: 0.5, 2: 1.0, 3: 1.0, 4: 1.0, 5: 1.0}
    runs.append_rows(path, [{"update": update, "senior_share": share} for update, share in shares.items()])
    for update in (1, 2, 3, 4, 5):
        runs.check_both_wrote({"update": update, "senior_share": 1.0}, args)
    runs.check_both_wrote({"update": 6, "senior_share": 0.0}, args)
    with pytest.raises(SystemExit, match="update 6: the senior wrote 100% of the tokens of 5 tandem batches in a row"):
        runs.check_both_wrote({"update": 6, "senior_share": 1.0}, args)


# ----------------------------------------------------------------------------------------------------------------------
# Point 10: files that are read back


@pytest.mark.parametrize("name", ["state.pt", "adapter.pt", "config.json"])
@pytest.mark.parametrize("damage", ["hostile", "cut", "text", "empty", "list", "nested", "nan"])
def test_damaged_files_are_named(copy, tmp_path, name, damage):
    """Path and remedy in one line. A hostile file is not run."""
    command, folder = copy
    path = folder.parents[1] / "specialist" / "en" / "seed-0" / name if name == "adapter.pt" else folder / name
    whole = path.read_bytes()
    if damage == "hostile":
        torch.save({"update": Hostile(tmp_path / "ran"), "flags": {}}, path)
    elif damage == "nan" and name != "config.json":
        content = torch.load(path)
        next(iter(content["adapter"].values()))[0, 0] = float("nan")
        torch.save(content, path)
    else:
        damaged = {"cut": whole[: len(whole) // 2], "text": b"\xff\xfe no", "list": b"[1]", "nested": b"[" * 10**5, "nan": b"NaN"}
        path.write_bytes(damaged.get(damage, b""))
    with pytest.raises(SystemExit) as stop:
        main([*command, "--updates", "3"])
    assert re.match(f"error: {re.escape(str(path))}.*(remove|Start again)", str(stop.value))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("line", ["[1]", "{}", "3", '{"update": null}', '{"update": 1, "who": [], "question": {}}'])
def test_lines_that_are_no_rows_are_named(copy, line):
    command, folder = copy
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(f"{line}\n")
    with pytest.raises(SystemExit, match="metrics.jsonl cannot be used .line 4 is not a row"):
        main(command)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b"\x80\x04", b"[" * 10**5])
def test_a_damaged_benchmark_is_named_before_anything_is_measured(tmp_path, monkeypatch, content):
    path = tmp_path / "benchmark.json"
    path.write_bytes(content)
    monkeypatch.setattr("sys.argv", ["benchmark", "--only", "tiny", "--out", str(path)])
    monkeypatch.setattr(benchmark, "PARTS", {"tiny": None})
    with pytest.raises(SystemExit, match=f"^error: {re.escape(str(path))} cannot be used .*: restore it from a copy, remove it, or"):
        benchmark.main()
    assert path.read_bytes() == content


def test_lines_that_are_no_json_are_skipped(tmp_path):
    """Cut off, in another encoding, nested too deeply, or not a number that can be an update."""
    (tmp_path / "rows").write_bytes(
        b'{"update": 0}\n{"upd\n\xff\n' + b"[" * 10**5 + b'\n{"update": NaN}\n{"update": Infinity}\n{"update": 1}'
    )
    assert [row["update"] for row in runs.read_rows(tmp_path / "rows")] == [0, 1]


def test_a_specialist_that_is_not_finite_is_not_saved(finished, tmp_path, monkeypatch):
    def diverge(senior, *args, **options):
        next(parameter for parameter in senior.parameters() if parameter.requires_grad).data[0, 0] = float("inf")

    monkeypatch.setattr("lab.specialist.fine_tune", diverge)
    with pytest.raises(SystemExit, match="adapter.pt: its numbers are not finite.*smaller --lr or --specialist-lr"):
        main([*finished[0], "--out", str(tmp_path / "runs")])
    assert not list((tmp_path / "runs").rglob("adapter.pt*"))


# ----------------------------------------------------------------------------------------------------------------------
# Point 11: bad values


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--device gpu", "--device: invalid choice: 'gpu'"),
        ("--device cuda:99", "invalid choice: 'cuda:99'"),
        ("--device meta", "invalid choice: 'meta'"),
        ("--out=", "--out: '': give a name or a path"),
        ("--problems=", "--problems: '': give"),
        ("--senior=", "--senior: '': give"),
        ("--junior=\udcff", "--junior: '.udcff': give"),
        ("--updates 10000000", "--updates: 10000000: must be a finite number of at least 0 and at most 1e.06"),
        ("--batch 1000000", "28000000 problems per run are too many: lower --updates, --batch"),
        ("--specialist-steps 1000000", "32000000 problems per run are too many"),
        ("--eval-problems 1000000", "1000000 problems per run are too many"),
        ("--seeds 501", "--seeds: 501: must"),
        ("--rank 5000", "--rank: 5000: must"),
        ("--lr 2", "--lr: 2: must be a finite number greater than 0 and at most 1"),
        ("--specialist-lr 1e30", "--specialist-lr: 1e30: must"),
        ("--solo", "unrecognized arguments: --solo"),
        ("--arms tandem tandem", "--arms tandem tandem: name every arm once"),
        ("--setting sweep --junior-weight 0.3", "--junior-weight: no effect on c0-j0, .*choose other --arms"),
        ("--setting granularity --arms p-0.25 p-0.75 --p 0.3", "--p: no effect on p-0.25, p-0.75"),
        ("--setting language --senior-language fr", "--senior-language: no effect"),
        ("--spec 3", "unrecognized arguments: --spec"),
    ],
)
def test_bad_flags(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--setting", "skill", *flags.split(" ")])
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))


def test_flags_with_an_effect_are_accepted():
    for flags in ("--setting language --shots 2", "--setting granularity --p 0.3", "--setting skill --shots 2 --junior-language de"):
        parse_args(flags.split())


def test_p_is_no_abbreviation_of_preset():
    """--preset paper --p 0.3 once fell back to the tiny models."""
    args = parse_args("--setting skill --preset paper --p 0.3".split())
    assert (args.preset, args.p, args.problems) == ("paper", 0.3, "openai/gsm8k")


GOOD = json.dumps({"question": "What is 1+1?", "answer": "#### 2"}).encode()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"question": "Q", "answer": "#### many"}', "no number after ####"),
        (b'{"question": " ", "answer": "#### 2"}', "the question is empty"),
        (b'{"question": 3, "answer": "#### 2"}', "AttributeError"),
        ("Wie groß? ".encode("latin-1") + GOOD, "UnicodeDecodeError"),
        (GOOD.decode().encode("utf-16"), "UnicodeDecodeError"),
        (b"\xef\xbb\xbf" + GOOD, "BOM"),
        (b'{"question": "\\ud800?", "answer": "#### 2"}', "UnicodeEncodeError"),
        (b"[" * 10**5, "RecursionError"),
    ],
)
def test_problem_lines_are_named(tmp_path, line, reason):
    (tmp_path / "train.jsonl").write_bytes(GOOD + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=rf"train.jsonl, line 2: expected .* in UTF-8 without a byte-order mark.*{reason}") as error:
        load_gsm8k(str(tmp_path), "train")
    assert len(str(error.value)) < 500


def test_train_equal_to_test_is_refused(finished, tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_bytes((GOOD + b"\n") * 4)
    with pytest.raises(SystemExit, match="every test problem is a training problem too"):
        main([*finished[0], "--problems", str(tmp_path), "--out", str(tmp_path / "runs")])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no') }}", "TemplateError: no"),
        ("{% for", "TemplateSyntaxError"),
        (" ", "the question is not in its text"),
        ("Hello", "the question is not"),
    ],
)
def test_chat_templates_that_fail_are_named(tokenizer, monkeypatch, template, reason):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(ValueError, match=rf"the chat template of .* fails \({reason}.*choose another --junior"):
        chat_prompt(tokenizer, "Why?")
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ m.content | trim }}{% endfor %}")
    assert chat_prompt(tokenizer, " Why?").startswith("Why?")


def test_ctrl_c_says_how_to_continue(finished, tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_gsm8k, "finish_update", interrupt)
    with pytest.raises(SystemExit) as stop:
        main([*finished[0], "--out", str(tmp_path / "runs")])
    assert stop.value.code == 130
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("interrupted: the same command with --resume goes on")
