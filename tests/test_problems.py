"""Generated problems, GSM8K's format, and what each model is asked."""

import json
import re

import pytest

from lab import experiments
from lab.problems import (
    ANNOTATION,
    EXAMPLES,
    INSTRUCTIONS,
    LANGUAGES,
    LARGEST,
    chat_prompt,
    demonstrations,
    examples,
    generate,
    load_gsm8k,
    plain,
    prompt,
    training_problems,
)
from metrics import has_jargon, language_of
from reward import reward

NUMBER, OPERATOR = "([0-9]+)", "([-+*/])"
SIDE = NUMBER + OPERATOR + NUMBER
EXPRESSION = re.compile(f"{SIDE}=<<{SIDE}={NUMBER}>>{NUMBER}")


def steps_of(solution: str) -> list:
    """The expressions of a solution, each of which is recomputed."""
    found = EXPRESSION.findall(solution)
    for a, op, b, *again, result, written in found:
        x, y = int(a), int(b)
        assert again == [a, op, b]
        assert {"+": x + y, "-": x - y, "*": x * y, "/": x / y}[op] == int(result) == int(written)
    assert len(found) == solution.count("<<") == len(ANNOTATION.findall(solution)) >= 2
    return found


def test_generated_solutions_are_right():
    """The last result is the gold; two to four steps; the same numbers in each language."""
    for problem in generate(500, "train", 3):
        steps = [steps_of(problem.solutions[language]) for language in LANGUAGES]
        assert steps[0] == steps[1] == steps[2]
        assert len(steps[0]) <= 4
        assert all(int(step[-1]) <= LARGEST for step in steps[0])
        told = set(re.findall("[0-9]+", problem.question))
        for solution in problem.solutions.values():
            assert told <= set(re.findall("[0-9]+", solution))
            assert solution.endswith(f"\n#### {problem.gold}")
            assert reward(solution, problem.gold) == 1.0
            assert "<<" not in plain(solution)
            assert not re.search(r"[{}]|  ", solution + problem.question)


def test_the_splits_never_meet():
    seeds = {"train": 0, "validation": 9, "test": 9}
    splits = [{p.question for p in generate(3000, *item)} for item in seeds.items()]
    assert len(splits[0]) > 2900
    assert not splits[0] & splits[1]
    assert not splits[0] & splits[2]
    assert not splits[1] & splits[2]
    assert generate(5, "train", 1) == generate(5, "train", 1) != generate(5, "train", 2)


@pytest.mark.parametrize("language", LANGUAGES)
def test_demonstrations(language):
    """Right in each step, in their language, annotated for the specialist alone."""
    for annotated in (True, False):
        shots = demonstrations(EXAMPLES, language, annotated)
        for (question, solution), example in zip(shots, EXAMPLES, strict=True):
            assert question == example.question
            assert reward(solution, example.gold) == 1.0
            assert has_jargon(solution) == annotated
            assert language_of(solution, LANGUAGES) == language
            assert steps_of(example.solutions[language])


def test_prompts():
    """Cue; instruction, solved example, question; a chat has a turn for each."""
    cues = [prompt("Why?", language).split("\n")[1] for language in LANGUAGES]
    assert cues == ["Answer:", "Antwort:", "Réponse:"]
    shots, german, french = [("Q1?", "A1")], INSTRUCTIONS["de"], INSTRUCTIONS["fr"]
    expected = f"{german}\n\nQuestion: Q1?\nAntwort: A1\n\nQuestion: Q2?\nAntwort:"
    assert prompt("Q2?", "de", shots) == expected

    class Chat:
        def apply_chat_template(self, messages, tokenize, add_generation_prompt, enable_thinking):
            assert not enable_thinking
            return " | ".join(f"{message['role']}: {message['content']}" for message in messages)

    expected = f"user: Q1?\n{french} | assistant: A1 | user: Q2?\n{french}"
    assert chat_prompt(Chat(), "Q2?", "fr", shots) == expected


BAD = ["not json", "{}", '{"question": "Q"}', '{"question": "Q", "answer": "no mark"}', "[1]"]


@pytest.mark.parametrize("bad", [*BAD, '{"question": "Q", "answer": 5}'])
def test_a_malformed_line_is_named(tmp_path, bad):
    good = json.dumps({"question": "Q", "answer": "1+1 = <<1+1=2>>2\n#### 2"})
    (tmp_path / "train.jsonl").write_text(f"{good}\n\n{bad}\n")
    with pytest.raises(ValueError, match="train.jsonl, line 3: expected"):
        load_gsm8k(str(tmp_path), "train")


@pytest.mark.parametrize("answer", ["1,002", "1/2", "1 500", "10:30", "12 (of 20)", "-3", "$5.50"])
def test_a_reference_solution_is_right(tmp_path, answer):
    """It is read by the very rule by which a solution is read."""
    whole = f"1+1 = <<1+1=2>>2\n#### {answer}"
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "Q", "answer": whole}))
    (problem,) = load_gsm8k(str(tmp_path), "test")
    assert reward(problem.solutions["en"], problem.gold) == 1.0


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="train.jsonl is not there"):
        load_gsm8k(str(tmp_path), "train")
    with pytest.raises(FileNotFoundError, match="/no/such/folder/train.jsonl is not there"):
        load_gsm8k("/no/such/folder", "train")


def test_examples_of_gsm8k_are_left_out_of_training(tmp_path):
    """The first with two or three annotated steps; for other languages those of the project."""
    line = "1+1 = <<1+1=2>>2\n"
    answers = [line + "#### 2", line * 2 + "#### 2", line * 4 + "#### 2", line * 3 + "#### 2"]
    rows = [{"question": f"Q{i}", "answer": answer} for i, answer in enumerate(answers)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {"preset": "qwen", "problems": str(tmp_path)}
    run = experiments.flags_of_run(given, "tandem", 0)
    assert [problem.question for problem in examples(run)] == ["Q1", "Q3"]
    assert [problem.question for problem in training_problems(run)] == ["Q0", "Q2"]
    assert examples(experiments.flags_of_run(given, "en-de-tandem", 0)) == EXAMPLES
