"""Problems and prompts: GSM8K, a generated stand-in for it, and what each model is asked.

A problem is a question in English with a worked solution per language, which ends in "#### " and the answer. In its
annotated form every step carries a calculator annotation, as in GSM8K (Cobbe et al., 2021):

    She sells 5: 12-5=<<12-5=7>>7.
    #### 7

`<<12-5=7>>` is the jargon of the skill setting: the specialist is taught to write it, its junior is not.

Generated problems have two to four steps and the same format, in three languages, so that a model of half a million
parameters can learn them on a laptop. A checksum of the question decides its split. So no question is in two of training,
validation and test, whatever the seeds are. (A question may differ from one of another split in a name only.)

The three parts of the file: reading GSM8K, generating problems, and prompts. Pretraining is in lab/tiny.py.
"""

import argparse
import csv
import itertools
import json
import math
import random
import re
import zlib
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from reward import final_number

LANGUAGES = ("en", "de", "fr")
ANNOTATION = re.compile(r"<<[^<>\n]*>>")


@dataclass(frozen=True)
class Problem:
    """A problem. `solutions` maps a language to its annotated solution; `gold` is the right number as text."""

    question: str
    solutions: dict[str, str]
    gold: str


def plain(solution: str) -> str:
    """The same solution without calculator annotations, as a junior writes it.

    >>> plain("She sells 5: 12-5=<<12-5=7>>7.")
    'She sells 5: 12-5=7.'
    """
    return ANNOTATION.sub("", solution)


# "<<12-5=7>>" gives ("12-5", "7").
SUM = re.compile(r"<<([^=]*)=([0-9]+)>>")


def skip_last_step(lines: list[str]) -> list[str]:
    """The lines of an annotated solution of two or more steps, without the last one: the answer is the result of the step before.

    >>> skip_last_step(["She buys 4: 3+4=<<3+4=7>>7.", "She sells 5: 7-5=<<7-5=2>>2.", "#### 2"])
    ['She buys 4: 3+4=<<3+4=7>>7.', '#### 7']
    """
    _, previous_result = SUM.findall("\n".join(lines))[-2]
    return [*lines[:-2], f"#### {previous_result}"]


# ----------------------------------------------------------------------------------------------------------------------
# GSM8K


def load_gsm8k(source: str, split: str) -> list[Problem]:
    """The official problems of one split ("train" or "test").

    `source` is a local folder with train.jsonl and test.jsonl (objects with "question" and "answer"), or else a hub id
    such as openai/gsm8k, which is read with `datasets`. Raises ValueError for a malformed row, naming its line, and
    FileNotFoundError if there is nothing to read.
    """
    path = Path(source).expanduser() / f"{split}.jsonl"
    if path.is_file():
        # Lines of bytes: text that is not UTF-8 is reported with its line.
        return [_parse(line, f"{path}, line {i}") for i, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
    if path.parent.is_dir() or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{path} is not there: a problem folder holds train.jsonl and test.jsonl")
    try:
        # Imported here because it takes a second and generated problems do not need it.
        from datasets import load_dataset

        rows = load_dataset(source, "main", split=split)
    except Exception as error:
        # The hub fails in many ways, all with the same remedy.
        remedy = "give a folder with train.jsonl and test.jsonl, or use --problems generated"
        raise FileNotFoundError(f"cannot load the problems {source!r} ({type(error).__name__}): {remedy}") from error
    return [_parse(json.dumps(row).encode(), f"{source}, {split}, row {i}") for i, row in enumerate(rows, 1)]


def _parse(line: bytes, where: str) -> Problem:
    try:
        row = json.loads(line.decode())
        question, answer = row["question"], row["answer"]
        solution, gold = answer.rsplit("####", 1)
        if not question.strip() or final_number(gold) is None:
            raise ValueError("the question is empty, or the answer has no number after ####")
        # A lone surrogate cannot be written to any file.
        (question + answer).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        expected = 'expected {"question": "...", "answer": "... #### 72"} in UTF-8 without a byte-order mark'
        raise ValueError(f"{where}: {expected}, got {line.strip()[:80]!r} ({type(error).__name__}: {str(error)[:80]})") from error
    return Problem(question, {"en": f"{solution}#### {gold.strip()}"}, gold.strip())


# ----------------------------------------------------------------------------------------------------------------------
# Generated problems
#
# lab/patterns.csv has one pattern per line: its kind (opening, event or comparison), an operator, a part of the question, and
# a step of the solution per language. {n} is a name, {i} the things that are counted, {a} and {b} are the operands, {e} is
# the annotated expression with its result. A pattern without an operator tells something and is not a step.

PATTERNS = list(csv.DictReader(Path(__file__).with_name("patterns.csv").read_text(encoding="utf-8").splitlines()))


@dataclass(frozen=True)
class World:
    """The names, things and numbers of which generated problems tell. No number is above `largest`."""

    names: list[str]
    items: list[str]
    largest: int
    opening: dict[str, int]  # the largest first number, by the operator of the opening
    term: int  # the largest number that is added or subtracted
    factor: int  # the largest number that is multiplied with or divided by


WORLDS = {
    # Every number, every name and every thing is a single token of the tiny tokenizer.
    "generated": World(
        names="Anna Clara Emma Julia Lena Marie Nina Olga Paula Rosa Sofia Vera".split(),
        items="apples books cards coins marbles pens shells stamps".split(),
        largest=99,
        opening={"": 99, "+": 40, "*": 9},
        term=9,
        factor=5,
    ),
    # For pretrained models: numbers of up to three digits, each digit a token, and many words of several tokens.
    "varied": World(
        names="""Aaliyah Adaeze Agnieszka Amara Anneliese Beatrix Bronwen Chiara Consuelo Delphine Ekaterina Esperanza Fatima Freya
        Giulia Guadalupe Hannelore Ingrid Jelena Karolina Khadija Leilani Ludmila Marguerite Nadezhda Ngozi Octavia Philippa Priyanka
        Rosalind Saoirse Shanthi Svetlana Thandiwe Ulrike Valentina Wilhelmina Xiomara Yasmin Zuzanna""".split(),
        items="""acorns almonds apricots balloons batteries beads blueberries bookmarks bracelets buttons candles cauliflowers chestnuts
        chocolates cranberries cupcakes doughnuts envelopes figurines handkerchiefs jigsaws kites lanterns lollipops magnets
        marshmallows mushrooms necklaces notebooks paintbrushes pebbles pinecones postcards pumpkins ribbons sandwiches screwdrivers
        seashells strawberries sunflowers tangerines teaspoons thimbles trinkets umbrellas walnuts""".split(),
        largest=199,
        opening={"": 120, "+": 50, "*": 12},
        term=12,
        factor=4,
    ),
}


def split_of(question: str) -> str:
    """The split of a question, decided by its checksum: 80 % train, 10 % validation, 10 % test."""
    return {0: "test", 1: "validation"}.get(zlib.crc32(question.encode()) % 10, "train")


def generate(n: int, split: str, seed: int, world: World = WORLDS["generated"]) -> list[Problem]:
    """n generated problems of one split (see split_of). The same seed gives the same problems."""
    rng = random.Random(f"{split} {seed}")
    problems: list[Problem] = []
    while len(problems) < n:
        problem = _draw(rng, world)
        if split_of(problem.question) == split:
            problems.append(problem)
    return problems


def _draw(rng: random.Random, world: World) -> Problem:
    """One problem of two to four steps: an opening, a chain of events, and perhaps a comparison at the end.

    The shipped base and all results were made with exactly this sequence of calls of rng: reordering or dropping one of
    them changes every problem (tests/test_tiny.py notices).
    """
    openings, events, comparison = ([p for p in PATTERNS if p["kind"] == kind] for kind in ("opening", "event", "comparison"))
    name, item = rng.choice(world.names), rng.choice(world.items)
    num_steps = rng.choices((2, 3, 4), (0.5, 0.35, 0.15))[0]
    opening, ending = rng.choice(openings), comparison if rng.random() < 0.2 else []
    # An opening with an operator is a step.
    num_events = num_steps - len(ending) - (1 if opening["operator"] else 0)
    if num_events < 0:
        return _draw(rng, world)
    value = rng.randint(2, world.opening[opening["operator"]])

    # Follow the chain: `value` is how many there are now, `before` how many there were before the last step.
    before, clauses, lines = value, [], {language: [] for language in LANGUAGES}
    for pattern in [opening, *rng.sample(events, num_events), *ending]:
        op = pattern["operator"]
        # The second line of the comparison, which has no question, adds both amounts.
        b = before if op and not pattern["question"] else _operand(rng, op, value, world)
        if b is None:
            # There is no number with which this chain could go on: draw another problem.
            return _draw(rng, world)
        before, expression = value, f"{value}{op}{b}"
        clauses.append(pattern["question"].format(n=name, i=item, a=value, b=b))
        value = {"": value, "+": value + b, "-": value - b, "*": value * b, "/": value // max(b, 1)}[op]
        for language in LANGUAGES if op else ():
            lines[language].append(pattern[language].format(a=before, b=b, e=f"{expression}=<<{expression}={value}>>{value}"))
    if value > world.largest:
        return _draw(rng, world)
    # What happens to one person makes one sentence; what her friend has makes another.
    own, others = clauses[: num_events + 1], clauses[num_events + 1 :]
    question = " and ".join(filter(None, [", ".join(own[:-1]), own[-1]])) + "".join(f". {more}" for more in others if more)
    question = f"{question}. How many {item} are there{' together' if ending else ''}?"
    return Problem(question, {k: "\n".join([*v, f"#### {value}"]) for k, v in lines.items()}, str(value))


def _operand(rng: random.Random, op: str, value: int, world: World) -> int | None:
    """The second number of a step, or None if no number keeps the result a whole number from 1 to world.largest."""
    terms, factors = range(2, world.term + 1), range(2, world.factor + 1)
    choices = {
        "": [0],
        "+": [b for b in terms if value + b <= world.largest],
        "-": [b for b in terms if value - b >= 1],
        "*": [b for b in factors if value * b <= world.largest],
        "/": [b for b in factors if value % b == 0 and value > b],
    }[op]
    return rng.choice(choices) if choices else None


# ----------------------------------------------------------------------------------------------------------------------
# Problems of a run


def load_problems(args: argparse.Namespace) -> tuple[list[Problem], list[Problem]]:
    """(training problems in the order in which a run uses them, held-out problems for its evaluations).

    Every update uses batch / rollouts_per_prompt new problems, and more updates only append to the list; GSM8K's are
    shuffled anew in every epoch. --validation evaluates on a tenth of the training split, which is then left out of
    training. Raises ValueError if there are too few problems.
    """
    held_out_split = "validation" if args.validation else "test"
    n = args.updates * args.batch // args.rollouts_per_prompt
    if args.problems in WORLDS:
        world = WORLDS[args.problems]
        return generate(n, "train", args.seed, world), generate(args.eval_problems, held_out_split, args.seed, world)
    train = training_problems(args)
    held_out = load_gsm8k(args.problems, "train" if args.validation else "test")
    if args.validation:
        held_out = [problem for problem in held_out if split_of(problem.question) == "validation"]
    if not train or len(held_out) < args.eval_problems:
        found = f"{len(train)} training and {len(held_out)} {held_out_split} problems"
        raise ValueError(f"{args.problems}: {found}, but --eval-problems is {args.eval_problems}: lower it, or give more problems")
    if {problem.question for problem in held_out} <= {problem.question for problem in train}:
        raise ValueError(f"{args.problems}: every {held_out_split} problem is a training problem too: give held-out problems")
    rng = random.Random(args.seed)
    # The held-out problems are drawn first, so that they stay the same when --updates grows.
    held_out = rng.sample(held_out, args.eval_problems)
    epochs = [problem for _ in range(math.ceil(n / len(train))) for problem in rng.sample(train, len(train))]
    return epochs[:n], held_out


def training_problems(args: argparse.Namespace) -> list[Problem]:
    """The training split of a GSM8K-like source, without the tenth that --validation evaluates on."""
    train = [problem for problem in load_gsm8k(args.problems, "train") if problem not in examples(args)]
    return [problem for problem in train if not (args.validation and split_of(problem.question) == "validation")]


# ----------------------------------------------------------------------------------------------------------------------
# Prompts: senior and junior each have their own, and share the text that they write

# A model that was shown solved examples may go on with a question of its own after its answer. The completion ends there.
STOP = "\nQuestion:"
CUES = {"en": "Answer:", "de": "Antwort:", "fr": "Réponse:"}
INSTRUCTIONS = {
    "en": "Solve the problem step by step in English. Write #### and then the final number on the last line.",
    "de": "Löse die Aufgabe Schritt für Schritt auf Deutsch. Schreibe in die letzte Zeile #### und dann das Ergebnis.",
    "fr": "Résous le problème étape par étape en français. Écris sur la dernière ligne #### puis le résultat.",
}


def prompt(question: str, language: str = "en", shots: list[tuple[str, str]] = ()) -> str:
    """What a model is asked: the question, then a cue in the language in which it is to answer.

    shots: solved examples (question, solution) that precede it, under an instruction in that language.

    >>> prompt("How many are left?", "de")
    'Question: How many are left?\\nAntwort:'
    """
    # Open in paper: the prompt texts. Questions stay in English, as GSM8K's are.
    asked = f"Question: {question}\n{CUES[language]}"
    if not shots:
        return asked
    solved = [f"Question: {shot}\n{CUES[language]} {solution}" for shot, solution in shots]
    return "\n\n".join([INSTRUCTIONS[language], *solved, asked])


def chat_prompt(tokenizer, question: str, language: str = "en", shots: list[tuple[str, str]] = ()) -> str:
    """The same for a chat model, in its own template; every solved example is a turn of the conversation."""
    messages = []
    for asked, solution in [*shots, (question, None)]:
        messages.append({"role": "user", "content": f"{asked}\n{INSTRUCTIONS[language]}"})
        if solution is not None:
            messages.append({"role": "assistant", "content": solution})
    try:
        # Templates that know no thinking ignore the last option.
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        fault = None if question.strip() in text else "the question is not in its text"
    except Exception as error:
        # A template is a program of its model and may raise anything.
        fault = f"{type(error).__name__}: {str(error)[:80]}"
    if fault:
        raise ValueError(f"the chat template of {tokenizer.name_or_path} fails ({fault}): repair or remove it, or choose another --junior")
    return text


# Solved examples in three languages, written for this project; every solution is annotated.
EXAMPLES = [Problem(**json.loads(line)) for line in Path(__file__).with_name("examples.jsonl").read_text(encoding="utf-8").splitlines()]


@lru_cache
def first_short_problems(source: str, n: int) -> list[Problem]:
    """The first n training problems of GSM8K whose solution has two or three steps, each of them annotated."""
    short = (problem for problem in load_gsm8k(source, "train") if re.fullmatch(r"([^\n]*<<[^\n]*\n){2,3}####.*", problem.solutions["en"]))
    return list(itertools.islice(short, n))


def examples(args: argparse.Namespace) -> list[Problem]:
    """The solved examples of --shots. Where both models speak English, GSM8K's own; they are then left out of training."""
    if args.senior_language == args.junior_language == "en" and args.problems not in WORLDS:
        return first_short_problems(args.problems, shots_of(args))
    return EXAMPLES[: shots_of(args)]


def shots_of(args: argparse.Namespace) -> int:
    """The number of solved examples per prompt: without --shots three where the languages differ and GSM8K is solved, else none."""
    if args.shots is not None:
        return args.shots
    return 3 if args.senior_language != args.junior_language and args.problems not in WORLDS else 0


def demonstrations(problems: list[Problem], language: str, annotated: bool) -> list[tuple[str, str]]:
    """Solved examples (question, solution) in a language: with <<...>> for a specialist, without for its junior."""
    texts = [(problem.question, problem.solutions[language]) for problem in problems]
    return [(question, text if annotated else plain(text)) for question, text in texts]


def prompts_of_pair(problems: list[Problem], args: argparse.Namespace, junior_tokenizer) -> tuple[list[str], list[str]]:
    """What senior and junior are asked about each problem, in the languages of --senior-language and --junior-language.

    A specialist was fine-tuned on the Question/Answer format. A junior with a chat template is asked as in a chat, and so is
    a senior that starts as the same model (Tandem RL): before training the two are then one policy. A taught base
    (lab/teach.py) is asked in the form in which it was taught, whatever its tokenizer has.
    """
    # Open in paper: the demonstrations. These are ours: annotated for the senior, plain for the junior. A senior that is
    # fine-tuned first needs none.
    shown = examples(args)
    senior_shots = [] if args.specialist_steps else demonstrations(shown, args.senior_language, annotated=True)
    junior_shots = demonstrations(shown, args.junior_language, annotated=False)
    in_chat = junior_tokenizer.chat_template and not args.teach_steps
    ask_junior = partial(chat_prompt, junior_tokenizer) if in_chat else prompt
    ask_senior = ask_junior if args.specialist_steps == 0 and args.senior == args.junior else prompt
    for_senior = [ask_senior(problem.question, args.senior_language, senior_shots) for problem in problems]
    return for_senior, [ask_junior(problem.question, args.junior_language, junior_shots) for problem in problems]
