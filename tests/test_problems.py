"""Generated problems, GSM8K's format, and what each model is asked."""

import json
import re
from datetime import datetime

import pytest

from lab import experiments
from lab import problems as tasks
from lab.problems import EXAMPLES, LANGUAGES, generate, load_gsm8k, plain, prompt
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
    assert len(found) == solution.count("<<") == len(tasks.ANNOTATION.findall(solution)) >= 2
    return found


def test_generated_solutions_are_right():
    """The last result is the gold; two to four steps; the same numbers in each language."""
    for problem in generate(500, "train", 3):
        steps = [steps_of(problem.solutions[language]) for language in LANGUAGES]
        assert steps[0] == steps[1] == steps[2]
        assert len(steps[0]) <= 4
        assert all(int(step[-1]) <= tasks.LARGEST for step in steps[0])
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
    assert len(set.union(*splits)) == sum(map(len, splits))
    assert generate(5, "train", 1) == generate(5, "train", 1) != generate(5, "train", 2)


@pytest.mark.parametrize("language", LANGUAGES)
def test_demonstrations(language):
    """Right in each step, in their language, annotated for the specialist alone."""
    for annotated in (True, False):
        shots = tasks.demonstrations(EXAMPLES, language, annotated)
        for (question, solution), example in zip(shots, EXAMPLES, strict=True):
            assert question == example.question
            assert reward(solution, example.gold) == 1.0
            assert has_jargon(solution) == annotated
            assert language_of(solution, LANGUAGES) == language
            assert steps_of(example.solutions[language])


def test_prompts(tokenizer, monkeypatch):
    """Cue; instruction, solved example, question; a chat has a turn for each. A template that
    writes the date gives the same prompt on every day."""
    cues = [prompt("Why?", language).split("\n")[1] for language in LANGUAGES]
    assert cues == ["Answer:", "Antwort:", "Réponse:"]
    shots, german, french = [("Q1?", "A1")], tasks.INSTRUCTIONS["de"], tasks.INSTRUCTIONS["fr"]
    expected = f"{german}\n\nQuestion: Q1?\nAntwort: A1\n\nQuestion: Q2?\nAntwort:"
    assert prompt("Q2?", "de", shots) == expected
    template = "\n {% if enable_thinking is false %}{{ strftime_now('%f') }}{% endif %}"
    template += "{% for m in messages %} | {{ m.role }}: {{ m.content }}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    expected = f" | user: Q1?\n{french} | assistant: A1 | user: Q2?\n{french}"
    assert tasks.chat_prompt(tokenizer, "Q2?", "fr", shots) == f"\n26 Jul 2024{expected}"


# ------------------------------------------------------------------------------------------------
# GSM8K


def write(folder, split, *rows) -> str:
    """A file of (question, answer) rows. Returns its folder."""
    lines = [json.dumps({"question": question, "answer": answer}) for question, answer in rows]
    (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


STEP = "1+1 = <<1+1=2>>2\n"
GOOD = '{"question": "Q", "answer": "#### 2"}'
# One line each. The last three are no UTF-8, or begin with a mark that JSON does not allow.
BAD = r"""text | {} | [1] | {"question": "Q | {"question": "Q"} | {"question": "Q", "answer": "2"}
{"question": "Q", "answer": "#### many"} | {"question": "Q", "answer": 2}
{"question": " \n", "answer": "#### 2"} | {"question": null, "answer": "#### 2"}"""
BAD = [line.encode() for line in BAD.replace("\n", " | ").split(" | ")]
BAD += ["Wie groß?".encode("latin-1"), GOOD.encode("utf-16"), b"\xef\xbb\xbf" + GOOD.encode()]


@pytest.mark.parametrize("bad", BAD)
def test_a_malformed_line_is_named(tmp_path, bad):
    write(tmp_path, "train", ("Q", STEP + "#### 2"), ("Q", "#### 3"))
    (tmp_path / "train.jsonl").open("ab").write(b"\n" + bad + b"\n")
    with pytest.raises(ValueError, match="train.jsonl, line 4: expected"):
        load_gsm8k(str(tmp_path), "train")


@pytest.mark.parametrize("answer", "1,002|1/2|1 500|10:30|12 (of 20)|-3|<<3+4=7>>7".split("|"))
def test_a_reference_solution_is_right(tmp_path, answer):
    """It is read by the very rule by which a solution is read, with annotations and without."""
    (problem,) = load_gsm8k(write(tmp_path, "test", ("Q", f"{STEP}#### {answer}")), "test")
    assert reward(problem.solutions["en"], problem.gold) == 1.0
    assert reward(plain(f"#### {answer}"), problem.gold) == 1.0


def test_columns_of_the_hub_that_are_no_json(monkeypatch):
    row = {"question": "Q", "answer": "#### 2", "created": datetime(2024, 5, 1)}
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [row])
    assert load_gsm8k("some/gsm8k", "train")[0].gold == "2"


def test_training_problems_are_neither_shown_nor_held_out(tmp_path):
    """Examples are the first with two or three annotated steps, then others; for other languages,
    ours."""
    rows = [(f"Q{i}", STEP * n + "#### 2") for i, n in enumerate([1, 2, 4, 3])]
    given = {"preset": "qwen", "problems": write(tmp_path, "train", *rows), "eval_problems": 1}
    run = experiments.flags_of_run(given, "tandem", 0)
    assert [problem.question for problem in tasks.examples(run)] == ["Q1", "Q3", "Q0"]
    assert [problem.question for problem in tasks.training_problems(run)] == ["Q2"]
    assert tasks.examples(experiments.flags_of_run(given, "en-de-tandem", 0)) == EXAMPLES
    for leaked in ("Q2 ", "Q1"):
        write(tmp_path, "test", ("T", "#### 2"), (leaked, "#### 2"))
        message = f"1 training and 2 test problems: remove the 1 .* in both, such as '{leaked}'"
        with pytest.raises(ValueError, match=message):
            tasks.load_problems(run)
    for train, test, found in ((rows, [], "1 training and 0"), ([], rows[2:3], "0 training and 1")):
        write(tmp_path, "train", *train)
        write(tmp_path, "test", *test)
        with pytest.raises(ValueError, match=f"{found} test problems: lower --eval-problems"):
            tasks.load_problems(run)
