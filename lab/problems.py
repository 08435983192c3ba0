"""Problems and prompts: GSM8K, a generated stand-in for it, and what each model is asked.

A problem is a question in English with a worked solution per language, which ends in "#### " and
the answer. In its annotated form every step carries a calculator annotation, as in GSM8K (Cobbe et
al., 2021):

    She sells 5: 12-5=<<12-5=7>>7.
    #### 7

`<<12-5=7>>` is the jargon of the skill setting: the specialist is taught to write it, its junior is
not.

Generated problems have two to four steps and the same format, in three languages, so that a model
of half a million parameters can learn them on a laptop. A checksum of the question decides its
split. So no question is in two of training, validation and test, whatever the seeds are. (A
question may differ from one of another split in a name only.)

The three parts of the file: reading GSM8K, generating problems, and prompts.
"""

import csv
import json
import random
import re
import zlib
from argparse import Namespace
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import count, islice
from pathlib import Path

from reward import final_number

LANGUAGES = ("en", "de", "fr")
ANNOTATION = re.compile(r"<<[^<>\n]*>>")


@dataclass(frozen=True)
class Problem:
    """`solutions` maps a language to its annotated solution; `gold` is the right number as text."""

    question: str
    solutions: dict[str, str]
    gold: str


def plain(solution: str) -> str:
    """The same solution without calculator annotations, as a junior writes it.

    >>> plain("She sells 5: 12-5=<<12-5=7>>7.")
    'She sells 5: 12-5=7.'
    """
    return ANNOTATION.sub("", solution)


# ------------------------------------------------------------------------------------------------
# GSM8K


def load_gsm8k(source: str, split: str) -> list[Problem]:
    """The official problems of one split ("train" or "test").

    `source` is a local folder with train.jsonl and test.jsonl (objects with "question" and
    "answer"), or else a hub id such as openai/gsm8k. Raises ValueError for a malformed row, naming
    its line, and FileNotFoundError if there is nothing to read.
    """
    path = Path(source).expanduser().absolute() / f"{split}.jsonl"
    if path.is_file():
        # Lines of bytes: text that is not UTF-8 is reported with its line.
        rows, where = path.read_bytes().split(b"\n"), f"{path}, line"
    else:
        try:
            # Imported here because it takes a second and generated problems do not need it.
            from datasets import load_dataset

            of_split, where = load_dataset(source, "main", split=split), f"{source}, {split}, row"
        except Exception as error:
            # The hub fails in many ways, all with the same remedy.
            tried = f"{path} is not there, and the hub has no {source} ({error!r:.100})"
            remedy = "give a folder that holds train.jsonl and test.jsonl"
            raise FileNotFoundError(f"{tried}: {remedy}") from error
        rows = [json.dumps(row, default=str).encode() for row in of_split]
    return [_parse(row, f"{where} {i}") for i, row in enumerate(rows, 1) if row.strip()]


def _parse(line: bytes, where: str) -> Problem:
    try:
        row = json.loads(line.decode())
        question, (solution, mark, after) = row["question"], row["answer"].rpartition("####")
        # The reference is read like a solution, but without annotations: "#### <<3+4=7>>7".
        after = plain(after)
        gold = final_number(mark + after)
        if not question.strip() or not mark or gold is None:
            raise ValueError("the question is empty, or the answer has no number after ####")
        # A lone surrogate cannot be written to any file.
        (question + solution + after).encode()
    except Exception as error:
        expected = 'expected {"question": "...", "answer": "... #### 72"} in UTF-8'
        got = f"got {line.strip()[:80]!r} ({error!r:.100})"
        raise ValueError(f"{where}: {expected}, {got}") from error
    return Problem(question, {"en": f"{solution}#### {after.strip()}"}, gold)


# ------------------------------------------------------------------------------------------------
# Generated problems
#
# lab/patterns.csv has one pattern per line: its kind (opening, event or comparison), an operator, a
# part of the question, and a step of the solution per language. {n} is a name, {i} the things that
# are counted, {a} and {b} are the operands, {e} is the annotated expression with its result. A
# pattern without an operator tells something and is not a step.

GENERATED = "generated"  # the value of --problems
PATTERNS_FILE = Path(__file__).with_name("patterns.csv")
PATTERNS = list(csv.DictReader(PATTERNS_FILE.read_text(encoding="utf-8").splitlines()))
# Every number, every name and every thing is a single token of the tiny tokenizer.
NAMES = "Anna Clara Emma Julia Lena Marie Nina Olga Paula Rosa Sofia Vera".split()
ITEMS = "apples books cards coins marbles pens shells stamps".split()
LARGEST = 99  # no number is larger
LARGEST_FIRST = {"": 99, "+": 40, "*": 9}  # the largest first number, by the opening's operator


def split_of(question: str) -> str:
    """The split of a question, decided by its checksum: 80 % train, 10 % validation, 10 % test."""
    return {0: "test", 1: "validation"}.get(zlib.crc32(question.encode()) % 10, "train")


def generate(n: int, split: str, seed: int) -> list[Problem]:
    """n generated problems of one split (see split_of). The same seed gives the same problems."""
    rng = random.Random(f"{split} {seed}")
    drawn = (_draw(rng) for _ in count())
    return list(islice((p for p in drawn if split_of(p.question) == split), n))


def _draw(rng: random.Random) -> Problem:
    """A problem of two to four steps: an opening, a chain of events, and perhaps a comparison.

    The shipped base and all results were made with exactly this sequence of calls of rng:
    reordering or dropping one of them changes every problem (tests/test_tiny.py notices).
    """
    kinds = ("opening", "event", "comparison")
    openings, events, comparison = ([p for p in PATTERNS if p["kind"] == kind] for kind in kinds)
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    num_steps = rng.choices((2, 3, 4), (0.5, 0.35, 0.15))[0]
    opening, ending = rng.choice(openings), comparison if rng.random() < 0.2 else []
    # An opening with an operator is a step.
    num_events = num_steps - len(ending) - (1 if opening["operator"] else 0)
    if num_events < 0:
        return _draw(rng)
    value = rng.randint(2, LARGEST_FIRST[opening["operator"]])

    # Follow the chain: `value` is how many there are now, `before` how many before the last step.
    before, clauses, lines = value, [], {language: [] for language in LANGUAGES}
    for pattern in [opening, *rng.sample(events, num_events), *ending]:
        op = pattern["operator"]
        # The second line of the comparison, which has no question, adds both amounts.
        b = before if op and not pattern["question"] else _operand(rng, op, value)
        if b is None:
            # There is no number with which this chain could go on: draw another problem.
            return _draw(rng)
        before, expression = value, f"{value}{op}{b}"
        clauses.append(pattern["question"].format(n=name, i=item, a=value, b=b))
        value = {"": value, "+": value + b, "-": value - b, "*": value * b, "/": value // b}[op]
        annotated = f"{expression}=<<{expression}={value}>>{value}"
        for language in LANGUAGES if op else ():
            lines[language].append(pattern[language].format(a=before, b=b, e=annotated))
    if value > LARGEST:
        return _draw(rng)
    # What happens to one person makes one sentence; what her friend has makes another.
    own, others = clauses[: num_events + 1], clauses[num_events + 1 :]
    question = " and ".join(filter(None, [", ".join(own[:-1]), own[-1]]))
    question += "".join(f". {more}" for more in others if more)
    question = f"{question}. How many {item} are there{' together' if ending else ''}?"
    solutions = {k: "\n".join([*steps, f"#### {value}"]) for k, steps in lines.items()}
    return Problem(question, solutions, str(value))


def _operand(rng: random.Random, op: str, value: int) -> int | None:
    """The second number of a step, or None if none keeps the result whole and up to LARGEST."""
    choices = {
        "": [1],
        "+": [b for b in range(2, 10) if value + b <= LARGEST],
        "-": [b for b in range(2, 10) if value - b >= 1],
        "*": [b for b in range(2, 6) if value * b <= LARGEST],
        "/": [b for b in range(2, 6) if value % b == 0 and value > b],
    }[op]
    return rng.choice(choices) if choices else None


# ------------------------------------------------------------------------------------------------
# Problems of a run


def load_problems(args: Namespace) -> tuple[list[Problem], list[Problem]]:
    """(training problems in the order in which a run uses them, held-out problems).

    Every update uses batch / rollouts_per_prompt new problems; GSM8K's are shuffled anew in every
    epoch. With `validation` a tenth of the training split is held out instead of the test split.
    Raises ValueError if there are too few problems, or if a test problem is a training problem too.
    """
    kind = "validation" if args.validation else "test"
    n = args.updates * args.batch // args.rollouts_per_prompt
    if args.problems == GENERATED:
        return generate(n, "train", args.seed), generate(args.eval_problems, kind, args.seed)
    train, shown = training_problems(args), examples(args)
    held_out = load_gsm8k(args.problems, "train" if args.validation else "test")
    if args.validation:
        held_out = [p for p in held_out if split_of(p.question) == kind and p not in shown]
    known = {problem.question.strip() for problem in [*train, *shown]}
    leaked = [problem.question for problem in held_out if problem.question.strip() in known]
    if not train or leaked or len(held_out) < args.eval_problems:
        found = f"{len(train)} training and {len(held_out)} {kind} problems"
        remedy = f"lower --eval-problems ({args.eval_problems}), or give more problems"
        if leaked:
            remedy = f"remove the {len(leaked)} that are in both, such as {leaked[0][:60]!r}"
        raise ValueError(f"{args.problems} has {found}: {remedy}")
    rng = random.Random(args.seed)
    # The held-out problems are drawn first, so that they stay the same when --updates grows.
    held_out = rng.sample(held_out, args.eval_problems)
    epochs = [rng.sample(train, len(train)) for _ in range(n // len(train) + 1)]
    return [problem for epoch in epochs for problem in epoch][:n], held_out


def training_problems(args: Namespace) -> list[Problem]:
    """The training split of a GSM8K-like source, without validation problems and examples."""
    shown = examples(args)
    train = [p for p in load_gsm8k(args.problems, "train") if p not in shown]
    return [p for p in train if not (args.validation and split_of(p.question) == "validation")]


# Every 25th generated solution is taught without annotations, so that the specialist can still
# solve problems without writing them. GSM8K has such solutions too: 113 of 8,792.
PLAIN_EVERY = 25


def annotated_solutions(args: Namespace) -> list[tuple[str, str]]:
    """The (prompt, solution) texts that a specialist learns from."""
    if args.problems != GENERATED:
        train = training_problems(args)
        random.Random(args.seed).shuffle(train)
        return [(prompt(p.question), p.solutions["en"]) for p in train]  # GSM8K has English only
    # Far from the seeds of the training problems, so that it does not know their solutions.
    train = generate(args.specialist_steps * args.specialist_batch, "train", args.seed + 10**6)
    language = args.senior_language
    texts = [(prompt(p.question, language), p.solutions[language]) for p in train]
    texts[::PLAIN_EVERY] = [(asked, plain(text)) for asked, text in texts[::PLAIN_EVERY]]
    return texts


# ------------------------------------------------------------------------------------------------
# Prompts: senior and junior each have their own, and share the text that they write

# A completion ends after the line with "####" and a number, as in evaluation harnesses, or where a
# model that was shown solved examples goes on with a question of its own.
STOP = re.compile(rb"####[^\n]*[0-9][^\n]*\n|\nQuestion:")
# lab/prompts.json has, per language, the cue and the instruction, and solved examples.
_PROMPTS = json.loads(Path(__file__).with_name("prompts.json").read_text(encoding="utf-8"))
CUES, INSTRUCTIONS = _PROMPTS["cues"], _PROMPTS["instructions"]


def prompt(question: str, language: str = "en", shots: list[tuple[str, str]] = ()) -> str:
    """What a model is asked: the question, then a cue in the language in which it is to answer.

    shots: solved examples (question, solution) that precede it, under an instruction.

    >>> prompt("How many are left?", "de")
    'Question: How many are left?\\nAntwort:'
    """
    # Open in paper: the prompt texts. Questions stay in English, as GSM8K's are.
    asked = f"Question: {question}\n{CUES[language]}"
    if not shots:
        return asked
    solved = [f"Question: {shot}\n{CUES[language]} {solution}" for shot, solution in shots]
    return "\n\n".join([INSTRUCTIONS[language], *solved, asked])


# Some chat templates write the date of the day, by a function that this definition replaces: a run
# that is resumed on another day must ask the same.
FIXED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}\n"


def chat_prompt(tokenizer, question: str, language: str = "en", shots=()) -> str:
    """The same for a chat model, in its own template; every example is a turn of the chat."""
    messages = []
    for asked, solution in [*shots, (question, "")]:
        messages.append({"role": "user", "content": f"{asked}\n{INSTRUCTIONS[language]}"})
        messages.append({"role": "assistant", "content": solution})
    try:
        # Templates that know no thinking ignore the last option.
        options = dict(tokenize=False, add_generation_prompt=True, enable_thinking=False)
        template = FIXED_DATE + tokenizer.get_chat_template()
        text = tokenizer.apply_chat_template(messages[:-1], chat_template=template, **options)
        if question.strip() not in text:
            raise ValueError("the question is not in its text")
    except Exception as error:
        # A template is a program of its model and may raise anything.
        fault = f"the chat template of {tokenizer.name_or_path} fails ({error!r:.100})"
        raise ValueError(f"{fault}: repair or remove it, or choose another --junior") from error
    return text


# Solved examples in three languages, written for this project; every solution is annotated.
EXAMPLES = [Problem(**example) for example in _PROMPTS["examples"]]


@lru_cache
def first_short_problems(source: str, n: int) -> list[Problem]:
    """The first n training problems of GSM8K with two or three steps, each of them annotated.

    Where there are fewer of them, other problems follow.
    """
    short, problems = re.compile(r"([^\n]*<<[^\n]*\n){2,3}####.*"), load_gsm8k(source, "train")
    return sorted(problems, key=lambda p: short.fullmatch(p.solutions["en"]) is None)[:n]


def examples(args: Namespace) -> list[Problem]:
    """The solved examples of a prompt: GSM8K's own, if both models speak English."""
    is_generated, differ = args.problems == GENERATED, args.senior_language != args.junior_language
    n = args.shots if args.shots is not None else 3 if differ and not is_generated else 0
    if args.senior_language == args.junior_language == "en" and not is_generated:
        return first_short_problems(args.problems, n)
    return EXAMPLES[:n]


def demonstrations(problems: list[Problem], language: str, annotated: bool) -> list:
    """Solved examples (question, solution): with <<...>> for a specialist, without for a junior."""
    texts = [(problem.question, problem.solutions[language]) for problem in problems]
    return [(question, text if annotated else plain(text)) for question, text in texts]


def prompts_of_pair(problems: list[Problem], args: Namespace, pair) -> list[tuple]:
    """What senior and junior are asked: [(tokenizer, one text per problem)], the senior's first.

    A specialist was fine-tuned on the Question/Answer format without examples. A junior with a chat
    template is asked as in a chat, and so is a senior that starts as the same model (Tandem RL):
    without solved examples the two are then one policy before training.
    """
    # Open in paper: the demonstrations. These are ours: annotated for the senior, else plain.
    shown, languages = examples(args), (args.senior_language, args.junior_language)
    senior_shots = [] if args.specialist_steps else demonstrations(shown, languages[0], True)
    junior_shots = demonstrations(shown, languages[1], False)
    tokenizer = pair.junior_tokenizer
    ask_junior = partial(chat_prompt, tokenizer) if tokenizer.chat_template else prompt
    is_same = args.specialist_steps == 0 and args.senior == args.junior
    ask_senior = ask_junior if is_same else prompt
    for_senior = [ask_senior(p.question, languages[0], senior_shots) for p in problems]
    for_junior = [ask_junior(p.question, languages[1], junior_shots) for p in problems]
    return [(pair.senior_tokenizer, for_senior), (tokenizer, for_junior)]
