import json
import re

import pytest

from lab.problems import (
    ANNOTATION,
    EXAMPLES,
    INSTRUCTIONS,
    LANGUAGES,
    WORLDS,
    chat_prompt,
    demonstrations,
    generate,
    load_gsm8k,
    plain,
    prompt,
)
from metrics import has_jargon, language_of
from reward import reward

EXPRESSION = re.compile(r"([0-9]+)([-+*/])([0-9]+)=<<([0-9]+)([-+*/])([0-9]+)=([0-9]+)>>([0-9]+)")


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_generated_solutions_are_right(world):
    """Each step is recomputed; the last result is the gold; two to four steps; the same numbers in each language."""
    for problem in generate(500, "train", 3, world):
        steps = [EXPRESSION.findall(problem.solutions[language]) for language in LANGUAGES]
        assert steps[0] == steps[1] == steps[2]
        assert 2 <= len(steps[0]) <= 4
        for a, op, b, *again, result, written in steps[0]:
            assert again == [a, op, b]
            exact = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": int(a) / int(b)}[op]
            assert exact == int(result) == int(written) <= world.largest
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


def test_the_splits_never_meet():
    seeds = {"train": 0, "validation": 9, "test": 9}
    train, validation, test = ({problem.question for problem in generate(3000, split, seed)} for split, seed in seeds.items())
    assert len(train) > 2900
    assert not train & test
    assert not train & validation
    assert not validation & test
    assert generate(5, "train", 1) == generate(5, "train", 1) != generate(5, "train", 2)


def test_prompt_cues():
    assert prompt("Why?") == "Question: Why?\nAnswer:"
    assert [prompt("Why?", language).split("\n")[1] for language in LANGUAGES] == ["Answer:", "Antwort:", "Réponse:"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_demonstrations(language):
    """Right in each step, in their language, annotated for the specialist alone."""
    for annotated in (True, False):
        shots = demonstrations(EXAMPLES, language, annotated)
        for (question, solution), example in zip(shots, EXAMPLES):
            assert question == example.question
            assert reward(solution, example.gold) == 1.0
            assert has_jargon(solution) == annotated
            assert language_of(solution, LANGUAGES) == language
    for example in EXAMPLES:
        for a, op, b, *again, result, written in EXPRESSION.findall(example.solutions[language]):
            assert again == [a, op, b]
            assert (
                {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": int(a) / int(b)}[op] == int(result) == int(written)
            )
        assert len(EXPRESSION.findall(example.solutions[language])) == example.solutions[language].count("<<") >= 2


def test_prompts_with_shots():
    """Instruction, solved example, question; a chat has a turn for each."""
    shots = [("Q1?", "A1")]
    assert prompt("Q2?", "de", shots) == f"{INSTRUCTIONS['de']}\n\nQuestion: Q1?\nAntwort: A1\n\nQuestion: Q2?\nAntwort:"

    class Chat:
        def apply_chat_template(self, messages, tokenize, add_generation_prompt, enable_thinking):
            assert not enable_thinking
            return " | ".join(f"{message['role']}: {message['content']}" for message in messages)

    instruction = INSTRUCTIONS["fr"]
    assert chat_prompt(Chat(), "Q2?", "fr", shots) == f"user: Q1?\n{instruction} | assistant: A1 | user: Q2?\n{instruction}"


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
    with pytest.raises(FileNotFoundError, match="/no/such/folder/train.jsonl is not there"):
        load_gsm8k("/no/such/folder", "train")
