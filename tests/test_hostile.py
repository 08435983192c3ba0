"""Files that somebody else may have made: a hostile one is refused with its path and a remedy, and
no code in it runs.

Every row of HOSTILE is one file that the project reads back, in a version that would make a folder
if it were trusted. Where a library asks whether code may be run, the answer here is yes.
"""

import json
import pickle
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_interruptions import GOOD, Hostile, contents, copy, finished  # noqa: F401  fixtures
from test_runner import command  # noqa: F401  a fixture

import run_gsm8k
from lab import viewer
from lab.runs import errors_in_one_line


@pytest.fixture(autouse=True)
def _yes(monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")


def pickled(place, marker):
    """A pickle that makes the folder `marker` when it is loaded."""
    place.write_bytes(pickle.dumps({"update": Hostile(marker), "flags": {}}))


def torch_pickled(place, marker):
    """The same in the zip format of torch.save."""
    torch.save({"update": Hostile(marker), "flags": {}}, place)


def with_code(**changes):
    """Changes to a JSON file that name code beside it, and that code."""

    def write(place, marker):
        (place.parent / "hostile.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
        before = json.loads(place.read_text()) if place.is_file() else {}
        place.write_text(json.dumps(before | changes))

    return write


def weights_as_pickle(place, marker):
    """pytorch_model.bin is read only where there are no safetensors."""
    (place.parent / "model.safetensors").unlink()
    torch_pickled(place, marker)


def adapter_beside_the_base(place, marker):
    """transformers loads an adapter in the folder of a model, with the base that it names."""
    config = {"peft_type": "LORA", "base_model_name_or_path": str(place.parent)}
    (place.parent / "adapter_config.json").write_text(json.dumps(config))
    torch_pickled(place, marker)


def template(place, marker):
    """A chat template is a program. Its sandbox must not let it reach the system."""
    code = "{{ cycler.__init__.__globals__.os.mkdir(" + repr(str(marker)) + ") }}"
    place.write_text(code + "{{ messages[0].content }}")


def row_with_code(place, marker):
    question = f"__import__('os').mkdir({str(marker)!r})"
    place.write_text(json.dumps({"update": 0, "who": "tandem", "question": question}) + "\n")


CODE = {"AutoConfig": "hostile.Config", "AutoModelForCausalLM": "hostile.Model"}
# AutoConfig knows T5 and AutoModelForCausalLM does not, so only the named code could be run.
NO_CAUSAL_MODEL = {"model_type": "t5", "auto_map": {"AutoModelForCausalLM": "hostile.Model"}}
AUTO_TOKENIZER = {"AutoTokenizer": ["hostile.Hostile", "hostile.Hostile"]}
HOSTILE = {
    "run/state.pt": torch_pickled,
    "run/config.json": pickled,
    "run/metrics.jsonl": pickled,
    "run/samples.jsonl": row_with_code,
    "specialist/adapter.pt": torch_pickled,
    "base/config.json of an unknown model": with_code(model_type="hostile", auto_map=CODE),
    "base/config.json without a causal model": with_code(**NO_CAUSAL_MODEL),
    "base/tokenizer_config.json": with_code(tokenizer_class="Hostile", auto_map=AUTO_TOKENIZER),
    "base/tokenizer.json": pickled,
    "base/generation_config.json": pickled,
    "base/chat_template.jinja": template,
    "base/model.safetensors": pickled,
    "base/pytorch_model.bin": weights_as_pickle,
    "base/adapter_model.bin": adapter_beside_the_base,
    "base/made.json": pickled,
    "problems/train.jsonl": pickled,
    "problems/test.jsonl": pickled,
    "problems/problems.py": with_code(),
}


@pytest.fixture
def places(copy, base_folder, tmp_path):  # noqa: F811
    """{first part of a row of HOSTILE: the folder that it stands for}"""
    base, problems, run = tmp_path / "base", tmp_path / "problems", copy[1]
    shutil.copytree(base_folder, base)
    problems.mkdir()
    for name in ("train", "test"):
        (problems / f"{name}.jsonl").write_bytes(GOOD.replace(b"1+1", name.encode()))
    specialist = run.parents[1] / "specialist" / "en" / "seed-0"
    return {"run": run, "specialist": specialist, "base": base, "problems": problems}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_and_not_run(copy, places, tmp_path, monkeypatch, name):  # noqa: F811
    folder, file = name.split(" ")[0].split("/")
    path, marker = places[folder] / file, tmp_path / "ran"
    if file == "problems.py":
        # A folder with a script and no problems, as `datasets` once ran them.
        shutil.rmtree(path.parent)
        path.parent.mkdir()
    HOSTILE[name](path, marker)
    monkeypatch.setattr(run_gsm8k, "_pair", [])
    before, program, argument = contents(path.parent), run_gsm8k.main, [*copy[0], "--updates", "3"]
    if file == "samples.jsonl":
        # Samples are read for the page of rollouts only.
        program, argument = errors_in_one_line()(viewer.draw_page), path.parents[2]
    elif folder == "base":
        argument += f"--senior {path.parent} --junior {path.parent} --out {tmp_path}/runs".split()
    elif folder == "problems":
        argument += f"--problems {path.parent} --eval-problems 1 --out {tmp_path}/runs".split()
    with pytest.raises(SystemExit) as stop:
        program(argument)
    remedy = "(restore|expected|Name a local folder|choose another|holds train.jsonl and test)"
    # Without DOTALL: all of it is in one line.
    expected = f"error: .*{re.escape(str(path.parent))}.*{remedy}.*"
    assert re.fullmatch(expected, str(stop.value))
    assert not marker.exists()
    assert contents(path.parent) == before


def test_the_adapter_of_a_run_is_written_and_never_read(copy, tmp_path):  # noqa: F811
    command, folder = copy  # noqa: F811
    for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
        torch_pickled(folder / "adapter" / name, tmp_path / "ran")
    run_gsm8k.main([*command, "--updates", "3"])
    assert not (tmp_path / "ran").exists()
    written = load_file(folder / "adapter" / "adapter_model.safetensors")
    state = torch.load(folder / "state.pt")["adapter"]
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name]) for name in state)
