"""Files that somebody else may have made: a hostile one is refused with its path and a remedy, and
no code in it runs.

Every row of HOSTILE is one file that the project reads back, in a version that would make a folder
if it were trusted. Where a library asks whether code may be run, the answer here is yes.
"""

import json
import os
import re
import shutil

import pytest
import torch
from test_interruptions import contents, copy, finished  # noqa: F401  fixtures
from test_runner import command, gsm8k  # noqa: F401  a fixture

import run_gsm8k
from conftest import ends_with


def pickled(path, marker):
    """A pickle that makes the folder `marker` when it is loaded."""

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    torch.save({"update": Hostile(), "flags": {}}, path)


def with_code(**changes):
    """Changes to a JSON file that name code beside it, and that code."""

    def write(path, marker):
        path.with_name("hostile.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return write


def weights_as_pickle(path, marker):
    """pytorch_model.bin is read only where there are no safetensors."""
    path.with_name("model.safetensors").unlink()
    pickled(path, marker)


def template(path, marker):
    """A chat template is a program. Its sandbox must not let it reach the system."""
    code = "{{ cycler.__init__.__globals__.os.mkdir(" + repr(str(marker)) + ") }}"
    path.write_text(code + "{{ messages[0].content }}")


def script_without_problems(path, marker):
    """`datasets` once ran a script that lay in a folder with its name."""
    path.with_name("train.jsonl").unlink()
    path.write_text(f"import os\nos.mkdir({str(marker)!r})\n")


def cut_off(path, marker):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def containing(content):
    return lambda path, marker: path.write_bytes(content)


CODE = {"AutoConfig": "hostile.Config", "AutoModelForCausalLM": "hostile.Model"}
# AutoConfig knows T5 and AutoModelForCausalLM does not, so only the named code could be run.
NO_CAUSAL_MODEL = {"model_type": "t5", "auto_map": {"AutoModelForCausalLM": "hostile.Model"}}
AUTO_TOKENIZER = {"AutoTokenizer": ["hostile.Hostile", "hostile.Hostile"]}
HOSTILE = {
    "run/state.pt": pickled,
    "run/config.json": pickled,
    "specialist/adapter.pt": pickled,
    "base/config.json of an unknown model": with_code(model_type="hostile", auto_map=CODE),
    "base/config.json without a causal model": with_code(**NO_CAUSAL_MODEL),
    "base/tokenizer_config.json": with_code(tokenizer_class="Hostile", auto_map=AUTO_TOKENIZER),
    "base/tokenizer.json": pickled,
    "base/generation_config.json": pickled,
    "base/chat_template.jinja": template,
    "base/chat_template.jinja that fails": containing(b"{{ raise_exception('no') }}"),
    "base/chat_template.jinja without the question": containing(b"Hi"),
    "base/model.safetensors": pickled,
    "base/pytorch_model.bin": weights_as_pickle,
    "base/adapter_config.json": pickled,
    "problems/train.jsonl": pickled,
    "problems/test.jsonl": pickled,
    "problems/problems.py": script_without_problems,
}
# A damaged file is refused in the same way.
DAMAGED = """run/state.pt run/config.json specialist/adapter.pt base/config.json base/tokenizer.json
base/generation_config.json base/model.safetensors base/tokenizer_config.json""".split()
NOT_FETCHED = b"version https://git-lfs.github.com/spec/v1\n"
DAMAGE = {"cut off": cut_off, "empty": containing(b""), "not fetched": containing(NOT_FETCHED)}
HOSTILE |= {f"{file} {kind}": DAMAGE[kind] for file in DAMAGED for kind in DAMAGE}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_and_not_run(copy, base_folder, tmp_path, monkeypatch, name):  # noqa: F811
    kind, file = name.split(" ")[0].split("/")
    (made,) = (path.parent for path in copy[1].parents[1].rglob("adapter.pt"))
    folder = {"run": copy[1], "specialist": made}.get(kind, tmp_path / kind)
    argument, marker = [*copy[0], "--updates", "3"], tmp_path / "ran"
    if kind == "base":
        shutil.copytree(base_folder, folder)
        argument += f"--senior {folder} --junior {folder} --out {tmp_path}/runs".split()
    elif kind == "problems":
        folder.mkdir()
        argument += f"--problems {gsm8k(folder)} --out {tmp_path}/runs".split()
    HOSTILE[name](folder / file, marker)
    before = contents(folder)
    monkeypatch.setattr(run_gsm8k, "_pair", [])
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    remedy = "(restore|expected|Name a local folder|choose another|holds train.jsonl and test)"
    # All of it is in one line, for a dot matches no line break.
    ends_with(rf"\Aerror: .*{re.escape(str(folder))}.*{remedy}.*\Z", run_gsm8k.main, argument)
    assert not marker.exists()
    assert contents(folder) == before
