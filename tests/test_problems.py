import json
import re

import pytest

from problems import ANNOTATION, LANGUAGES, generate, load_gsm8k, plain, prompt
from reward import reward

EXPRESSION = re.compile(r"([0-9]+)([-+*/])([0-9]+)=<<([0-9]+)([-+*/])([0-9]+)=([0-9]+)>>([0-9]+)")


def test_generated_solutions_are_right():
    """Each step is recomputed; the last result is the gold; two to four steps; the same numbers in each language."""
    for problem in generate(500, "train", 3):
        steps = [EXPRESSION.findall(problem.solutions[language]) for language in LANGUAGES]
        assert steps[0] == steps[1] == steps[2]
        assert 2 <= len(steps[0]) <= 4
        for a, op, b, *again, result, written in steps[0]:
            assert again == [a, op, b]
            exact = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": int(a) / int(b)}[op]
            assert exact == int(result) == int(written) < 100
        for solution in problem.solutions.values():
            assert solution.endswith(f"\n#### {problem.gold}")
            assert reward(solution, problem.gold) == 1.0
            assert len(ANNOTATION.findall(solution)) == solution.count("<<") == len(steps[0])
            assert "<<" not in plain(solution)
            assert not re.search(r"[{}]|  ", solution + problem.question)


def test_numbers_of_the_question_are_used():
    """Every number of a question is an operand of the solution (so nothing is asked that is not told)."""
    for problem in generate(200, "test", 0):
        told = re.findall("[0-9]+", problem.question)
        assert set(told) <= set(re.findall("[0-9]+", problem.solutions["en"]))


def test_train_and_test_never_meet():
    train, test = ({problem.question for problem in generate(3000, split, seed)} for split, seed in (("train", 0), ("test", 9)))
    assert len(train) > 2900
    assert not train & test
    assert generate(5, "train", 1) == generate(5, "train", 1) != generate(5, "train", 2)


def test_prompt_cues():
    assert prompt("Why?") == "Question: Why?\nAnswer:"
    assert [prompt("Why?", language).split("\n")[1] for language in LANGUAGES] == ["Answer:", "Antwort:", "Réponse:"]


@pytest.mark.parametrize(
    "bad", ["not json", "{}", '{"question": "Q"}', '{"question": "Q", "answer": "no mark"}', "[1]", '{"question": "Q", "answer": 5}']
)
def test_a_malformed_line_is_named(tmp_path, bad):
    good = json.dumps({"question": "Q", "answer": "1+1 = <<1+1=2>>2\n#### 2"})
    (tmp_path / "train.jsonl").write_text(f"{good}\n\n{bad}\n")
    with pytest.raises(ValueError, match="train.jsonl, line 3: expected"):
        load_gsm8k(str(tmp_path), "train")


def test_files(tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "Q", "answer": "1+1 = <<1+1=2>>2\n#### 1,002"}))
    (problem,) = load_gsm8k(str(tmp_path), "test")
    assert (problem.question, problem.gold) == ("Q", "1,002")
    assert problem.solutions == {"en": "1+1 = <<1+1=2>>2\n#### 1,002"}
    with pytest.raises(FileNotFoundError, match="train.jsonl is not there"):
        load_gsm8k(str(tmp_path), "train")
    with pytest.raises(FileNotFoundError, match="/no/such/folder is not there"):
        load_gsm8k("/no/such/folder", "train")
