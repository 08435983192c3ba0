"""The shipped base is the one that lab/tiny.py describes, and it can do what it was taught."""

import hashlib
import json

from transformers import AutoModelForCausalLM, AutoTokenizer

from lab import models, problems, tiny


def test_constants_and_shipped_weights_belong_together(monkeypatch):
    """Fails after a change to a constant, the corpus or the weights: `python -m lab.tiny FOLDER`
    makes another base, `python -m lab.tiny` replaces the shipped one."""
    note = json.loads((models.TINY / "made.json").read_text())
    weights = hashlib.sha256((models.TINY / "model.safetensors").read_bytes()).hexdigest()
    assert note["checksum"] == tiny.checksum(tiny.corpus(tiny.STEPS * tiny.BATCH))
    assert note["weights"] == weights
    before = tiny.checksum([])
    monkeypatch.setattr(tiny, "STEPS", 1)
    assert tiny.checksum([]) != before


def test_the_base_solves_some_problems_in_the_language_of_its_cue():
    """Every word and number is one token."""
    tokenizer = AutoTokenizer.from_pretrained(models.TINY)
    model = AutoModelForCausalLM.from_pretrained(models.TINY)
    right = 0
    for problem in problems.generate(20, "test", 5):
        for word in problem.question.split()[:8]:
            assert len(tokenizer(f" {word.strip(',.?')}").input_ids) == 1
        asked = tokenizer(problems.prompt(problem.question, "de"), return_tensors="pt").input_ids
        text = tokenizer.decode(model.generate(asked, max_new_tokens=80, do_sample=False)[0])
        assert "Antwort: Sie" in text
        right += f"#### {problem.gold}" in text
    assert right >= 5
