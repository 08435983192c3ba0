"""What jargon costs a junior:  python results/questions/price/price.py BASE

A junior goes on from the same right partial solutions, once plain and once annotated. Its price is
the accuracy after the plain ones minus that after the annotated ones. Solutions are cut

    at a line end       "She sells 5: 12-5=7."   or   "She sells 5: 12-5=<<12-5=7>>7."
    in an expression    "She sells 5: 12-5="     or   "She sells 5: 12-5=<<12-5="

The partial solutions are the beginnings of the 600 reference solutions of seeds 0 to 2, cut after
their first step or in the middle of it, so that they are the same for every base. Prints one line
of JSON: shares of right solutions, and the price with its 95 % interval over problems.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

import numpy as np
import torch

from lab import models
from lab import problems as tasks
from lab.experiments import flags_of_run
from reward import is_correct
from rollout import random_numbers, rollout


def cut(solution: str, where: str) -> tuple[str, str]:
    """The beginning of an annotated solution, plain and annotated.

    >>> cut("She sells 5: 12-5=<<12-5=7>>7.\\n#### 7", "in an expression")
    ('She sells 5: 12-5=', 'She sells 5: 12-5=<<12-5=')
    """
    if where == "at a line end":
        line = solution.split("\n")[0] + "\n"
        return tasks.plain(line), line
    before = solution.partition("<<")[0]
    # The annotation repeats the expression: the last word before it.
    return before, f"{before}<<{before.split()[-1]}"


@torch.no_grad()
def continued(pair, problems: list, beginnings: list[str], seed: int) -> np.ndarray:
    """1 where the junior is right in the end, else 0. Its prompt ends in the partial solution."""
    asked = [f"{tasks.prompt(p.question)} {text}" for p, text in zip(problems, beginnings)]
    prompts = models.encode(pair.junior_tokenizer, asked)
    numbers = random_numbers(len(problems), 112, seed)
    written = rollout(pair, prompts, prompts, *numbers, p=0.0, temperature=0.7, stop=tasks.STOP)
    texts = [text + more for text, more in zip(beginnings, written.texts)]
    return np.array([is_correct(text, p.gold) for text, p in zip(texts, problems)], float)


def main(base: str) -> None:
    given = {"senior": base, "junior": base, "device": "cpu"}
    args = flags_of_run(given, "tandem", seed=0)
    models.check_before_loading([args])
    pair, found = models.load_pair(args), {"base": base}
    problems = [p for seed in range(3) for p in tasks.generate(200, "test", seed)]
    for where in ("at a line end", "in an expression"):
        plain, annotated = zip(*(cut(p.solutions["en"], where) for p in problems))
        right = [100 * continued(pair, problems, texts, seed=0) for texts in (plain, annotated)]
        prices = right[0] - right[1]  # one per problem
        price, half = prices.mean(), 1.96 * prices.std(ddof=1) / len(prices) ** 0.5
        names = "plain", "annotated", "price", "low", "high"
        numbers = right[0].mean(), right[1].mean(), price, price - half, price + half
        found[where] = {name: round(float(x), 1) for name, x in zip(names, numbers)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
