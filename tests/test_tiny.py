"""The shipped base is the one that lab/tiny.py describes, and it can do what it was taught."""

import hashlib
import json
import re

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lab import tiny
from lab.runs import Refused


def test_constants_and_shipped_weights_belong_together():
    """A change to a constant, to the corpus or to the weights alone makes this fail. That is expected if you have made a base
    of your own in another folder; if the shipped base is to change, run `python -m lab.tiny`, which replaces it."""
    note = json.loads((tiny.FOLDER / "made.json").read_text())
    assert note["checksum"] == tiny.checksum(tiny.corpus(tiny.STEPS * tiny.BATCH))
    assert note["weights"] == hashlib.sha256((tiny.FOLDER / "model.safetensors").read_bytes()).hexdigest()
    assert tiny.identity() == f"tiny-{note['checksum'][:12]}"


@pytest.mark.parametrize("note", [b"", b"{", b"[1]", b"{}", b'{"checksum": 3}', b'{"checksum": [1]}', b"\xff", b"[" * 10**5])
def test_a_damaged_note_is_named(tmp_path, note):
    (tmp_path / "made.json").write_bytes(note)
    with pytest.raises(Refused, match=f"{re.escape(str(tmp_path / 'made.json'))} cannot be used .*: restore it from a copy, or remove"):
        tiny.identity(tmp_path)


def test_the_identity_depends_on_constants(monkeypatch):
    few = tiny.corpus(50)
    before = tiny.checksum(few)
    assert tiny.corpus(50) == few
    monkeypatch.setattr(tiny, "STEPS", tiny.STEPS + 1)
    assert tiny.checksum(few) != before


def test_words_and_numbers_are_single_tokens():
    tokenizer = AutoTokenizer.from_pretrained(tiny.FOLDER)
    text = "Question: Clara has 12 old and 8 new coins and loses 9. How many coins are there?\nAnswer: She has"
    assert len(tokenizer(text).input_ids) == 25
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_base_answers_in_the_language_of_the_cue():
    tokenizer, model = AutoTokenizer.from_pretrained(tiny.FOLDER), AutoModelForCausalLM.from_pretrained(tiny.FOLDER)
    assert 4e5 < model.num_parameters() < 6e5
    question = "Question: Clara has 12 old and 8 new coins and loses 9. How many coins are there?\n"
    begins = {"Answer:": " She", "Antwort:": " Sie", "Réponse:": " Elle"}
    for cue, first in begins.items():
        ids = tokenizer(question + cue, return_tensors="pt").input_ids
        assert tokenizer.decode(model(input_ids=ids).logits[0, -1].argmax()) == first
