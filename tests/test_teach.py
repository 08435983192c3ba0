"""The taught base: made once, named by what made it, continued after an interruption, and asked in the form in which it was taught."""

import json

import pytest
import torch

from lab import problems, specialist, teach
from lab.models import load_model, load_tokenizers
from lab.specialist import annotated_solutions, fine_tune
from reward import reward
from run_gsm8k import flags_of_run, main, parse_args


@pytest.fixture
def command(base_folder, tmp_path):
    flags = f"--setting skill --arms tandem --senior {base_folder} --junior {base_folder} --out {tmp_path / 'runs'} --device cpu "
    flags += "--problems varied --teach-steps 3 --updates 1 --batch 4 --eval-problems 2 --max-new-tokens 8 --specialist-steps 2 "
    flags += "--rank 4 --jobs 1"
    return flags.split()


def flags(command: list[str], *more: str):
    return flags_of_run(parse_args([*command, *more]), "tandem", seed=0)


def test_the_junior_is_taught_and_the_pretrained_model_stays(command, base_folder, tmp_path, capsys):
    main(command)
    (folder,) = [path for path in (tmp_path / "runs" / "base").iterdir() if path.is_dir()]
    taught, before = (load_model(str(name), False, "cpu", False).state_dict() for name in (folder, base_folder))
    assert taught.keys() == before.keys()
    assert any(not torch.equal(taught[name], before[name]) for name in taught)
    # The tokenizer comes along, and nothing unfinished is left.
    assert len(set(map(len, load_tokenizers(str(folder), base_folder)))) == 1
    assert list((tmp_path / "runs" / "base").iterdir()) == [folder]
    config = json.loads((tmp_path / "runs" / "tandem" / "seed-0" / "config.json").read_text())
    assert config["flags"]["base"] == folder.name
    # A second command finds it and makes no other.
    made = (folder / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    main([*command, "--resume", "--updates", "2"])
    assert "teaching the base" not in capsys.readouterr().err
    assert (folder / "model.safetensors").stat().st_mtime_ns == made


def test_the_name_changes_with_what_it_is_made_from(command, monkeypatch):
    name = teach.taught_name(flags(command))
    assert name == teach.taught_name(flags(command, "--seed", "7", "--batch", "8"))
    others = {teach.taught_name(flags(command, *more.split())) for more in ("--teach-steps 4", "--problems generated", "--bfloat16")}
    monkeypatch.setattr(teach, "SKIPS", 0.0)
    others.add(teach.taught_name(flags(command)))
    assert len(others | {name}) == 5


def test_what_is_taught(command):
    """No annotation; English and German; some solutions skip their last step, and are wrong only then."""
    args = flags(command, "--teach-steps", "20")
    texts = teach.plain_solutions(args)
    made = problems.generate(len(texts), "train", 2 * 10**6, problems.WORLDS["varied"])
    assert len(texts) == 20 * teach.BATCH
    assert not any("<<" in solution for _, solution in texts)
    german = sum(asked.endswith("Antwort:") for asked, _ in texts) / len(texts)
    right = sum(reward(solution, problem.gold) for (_, solution), problem in zip(texts, made)) / len(texts)
    assert abs(german - teach.GERMAN) < 0.1
    assert abs(right - (1 - teach.SKIPS)) < 0.1
    # The specialist learns other problems, all of them right.
    assert not {asked for asked, _ in texts} & {asked for asked, _ in annotated_solutions(args, "en")}


def test_a_taught_base_is_asked_plainly(command, tokenizer):
    tokenizer.chat_template = "{{ messages[0].content }} in a chat"
    try:
        args, problem = flags(command), problems.generate(1, "test", 0)
        assert problems.prompts_of_pair(problem, args, tokenizer)[1] == [problems.prompt(problem[0].question)]
        args.teach_steps = 0
        assert problems.prompts_of_pair(problem, args, tokenizer)[1][0].endswith("in a chat")
    finally:
        tokenizer.chat_template = None


def test_interrupted_fine_tuning_goes_on_where_it_was(command, tmp_path, monkeypatch):
    """The weights are bit for bit those of fine-tuning without an interruption."""
    monkeypatch.setattr(specialist, "SECONDS_BETWEEN_DRAFTS", -1)
    args = flags(command)
    options = dict(steps=5, batch=4, micro_tokens=512, lr=1e-2, seed=0, label="")

    def pair():
        names = [args.senior] * 2
        loaded = teach.models.load_pair(*names, rank=4, four_bit=False, device="cpu")
        teach.models.reset_adapter(loaded.senior, 0)
        return loaded

    texts, whole, halves = teach.plain_solutions(args), pair(), pair()
    fine_tune(whole.senior, whole.senior_tokenizer, texts, **options)
    draft = tmp_path / "draft.pt"
    real_save = specialist.runs.save_tensors

    def save_and_stop(content, path):
        real_save(content, path)
        if content["step"] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(specialist.runs, "save_tensors", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(halves.senior, halves.senior_tokenizer, texts, **options, draft=draft)
    monkeypatch.setattr(specialist.runs, "save_tensors", real_save)
    assert specialist.runs.read_back(draft)["step"] == 3
    resumed, steps, as_rollouts = pair(), [], specialist.as_rollouts
    monkeypatch.setattr(specialist, "as_rollouts", lambda *given: steps.append(1) or as_rollouts(*given))
    fine_tune(resumed.senior, resumed.senior_tokenizer, texts, **options, draft=draft)
    assert len(steps) == 2
    states = [teach.models.adapter_state(each.senior) for each in (whole, resumed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    # A draft of other work is not used.
    other = pair()
    steps.clear()
    fine_tune(other.senior, other.senior_tokenizer, texts, **options | {"seed": 1}, draft=draft)
    assert len(steps) == 5


def test_one_base_is_taught_for_both(command, capsys):
    with pytest.raises(SystemExit):
        parse_args([*command, "--junior", "tiny"])
    assert "--teach-steps 3: one base is taught for both" in capsys.readouterr().err
