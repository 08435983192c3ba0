"""A page on which to see who wrote what:  python -m lab.viewer RUNS [ARM ...]

It writes RUNS/figures/rollouts.html, one file that a browser opens without a network: every kept
evaluation rollout in the colours of its authors, what either model would have written at each step,
the tosses of the coin, and the curves of accuracy and jargon. docs/ has copies of two pages, for
GitHub Pages; each names the command that makes it in a comment. To keep the page small, it has the
first seed of every arm only, unless arms are named.

The page is lab/viewer.html, in which an empty list of runs is replaced by those of RUNS, as JSON.
They come from samples.jsonl, whose rollouts are made here:

    spans    who wrote which text: [author, text], one per run of tokens by the same author
    steps    of joint rollouts, one per token: [author, text, the senior's candidate, the junior's,
             whether a coin was tossed, the senior's probability of the written token]

A model may write anything, so no text may become a part of the page: as_json escapes what could end
the script element, and the page's script never interprets a text as markup. The example of the page
and of Figure 1 is chosen here as well.
"""

import codecs
import json
import sys
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import torch

from lab import engine, tables
from lab.experiments import ABOUT, DEFAULTS, SETTINGS, arms_of
from lab.runs import Refused, errors_in_one_line, read_back, replace_file, seed_folders
from metrics import JARGON, has_jargon
from reward import final_number, reward
from rollout import Pair, Rollouts

TEMPLATE = Path(__file__).with_suffix(".html")

# ------------------------------------------------------------------------------------------------
# Rollouts as they are kept in samples.jsonl


def author_spans(rollouts: Rollouts, pieces: list[bytes]) -> list[list[tuple[str, str]]]:
    """Who wrote what, per rollout: [("senior", "Natalia sold"), ("junior", " 48"), ...].

    The bytes of neighbouring tokens by one author are joined before they are decoded, because a
    token alone need not be valid text.
    """
    columns = rollouts.completion_ids, rollouts.senior_mask, rollouts.completion_mask.bool()
    all_spans = []
    for ids, by_senior, real in zip(*columns):
        tokens = zip(by_senior[real].tolist(), ids[real].tolist())
        spans = []
        for senior, group in groupby(tokens, key=lambda token: token[0]):
            text = b"".join(pieces[token] for _, token in group).decode(errors="replace")
            if text:
                spans.append(("senior" if senior else "junior", text))
        all_spans.append(spans)
    return all_spans


def samples(
    rollouts: Rollouts, spans: list, trace: list | None, problems: list, args: Namespace, pair: Pair
) -> Iterator[dict]:
    """The rollouts of the first `problems` as they are kept. trace: see rollout.rollout."""
    for i, problem in enumerate(problems):
        found = {"question": problem.question, "gold": problem.gold, "spans": spans[i]}
        found["reward"] = reward(rollouts.texts[i], problem.gold)
        if trace and i in trace[0][0]:  # it was written in the first chunk
            found["steps"] = steps(engine.select(rollouts, [i]), i, trace, args.temperature, pair)
        yield found


@torch.no_grad()
def steps(one: Rollouts, row: int, trace: list, temperature: float, pair: Pair) -> list[list]:
    """One rollout token by token: `one` has it only; `row`: its row in the batch of the trace."""
    logprobs = engine.completion_logprobs(pair.senior, one, temperature)[0]
    # A character may span several tokens. The decoder holds its bytes back until the last one.
    decoder, found = codecs.getincrementaldecoder("utf-8")(errors="replace"), []
    ids, by_senior = one.completion_ids[0].tolist(), one.senior_mask[0].tolist()
    for t, (written, senior) in enumerate(zip(ids, by_senior)):
        rows, *candidates, tossed = trace[t]
        i = rows.index(row)
        text = decoder.decode(pair.pieces[written], final=t + 1 == len(ids))
        # The senior's candidate, then the junior's.
        shown = [pair.pieces[of[i]].decode(errors="backslashreplace") for of in candidates]
        probability = round(logprobs[t].exp().item(), 4)
        found.append(["senior" if senior else "junior", text, *shown, tossed[i], probability])
    return found


# ------------------------------------------------------------------------------------------------
# Reading them back


def read_problems(folder: str | Path, arm: str) -> dict[int, dict[tuple, list[dict]]]:
    """{seed: {(question, gold answer): the kept rollouts in the order of updates}} of an arm.

    Only of problems that were kept at the first and at the last evaluation.
    """
    seeds = {}
    for seed, samples in tables.read_seeds(folder, arm, "samples.jsonl").items():
        found = defaultdict(list)
        samples = [sample for sample in samples if "spans" in sample]  # others are no rollouts
        for sample in samples:
            found[sample["question"], sample["gold"]].append(describe_rollout(sample))
        # read_rows has sorted them by their updates.
        ends = {sample["update"] for sample in samples[:1] + samples[-1:]}
        kept = {p: of for p, of in found.items() if ends <= {one["update"] for one in of}}
        seeds |= {seed: kept} if kept else {}
    return seeds


def kept_throughout(problems: dict[tuple, list[dict]]) -> dict[tuple, list[dict]]:
    """The problems of one seed with most rollouts: others were kept at both ends only."""
    most = max(map(len, problems.values()))
    return {problem: of for problem, of in problems.items() if len(of) == most}


def describe_rollout(sample: dict) -> dict:
    """One rollout: its verdict, its tokens (or spans), and what is underlined in it."""
    tokens = sample.get("steps", sample["spans"])
    # A token or span begins with its author and its text.
    text = "".join(token[1] for token in tokens)
    about = {"update": sample["update"], "who": sample["who"], "right": sample["reward"] == 1}
    about |= {"jargon": has_jargon(text), "tokens": tokens}
    verdict = "✓ right" if about["right"] else f"✗ wrong: {final_number(text) or 'no number'}"
    verdict += ", with jargon" if about["jargon"] else ", no jargon"
    return about | {"verdict": verdict, "underlined": [one.span() for one in JARGON.finditer(text)]}


# The example is the first kept problem of the highest rank.
EXAMPLES = {
    3: "Before training the senior alone is right, the pair wrong with jargon; after it, the pair "
    "is right without jargon",
    2: "The pair is wrong before training and right after it",
    1: "The pair loses its jargon",
    0: "The pair neither goes from wrong to right nor loses its jargon",
}


def rank_example(rollouts: list[dict]) -> int:
    """How plainly the rollouts of one problem show what training does: a key of EXAMPLES.

    rollouts: "who" wrote each, and whether it is "right" and has "jargon", in the order of updates.
    """
    alone = [rollout for rollout in rollouts if rollout["who"] == "senior"]
    joint = [rollout for rollout in rollouts if rollout["who"] == "tandem"]
    if not alone or not joint:
        return 0
    corrected = joint[-1]["right"] and not joint[0]["right"]
    lost = joint[0]["jargon"] and not joint[-1]["jargon"]
    best = corrected and lost and alone[0]["right"]
    return 3 if best else 2 if corrected else int(lost)


def choose_example(folder: Path) -> tuple[tuple, list[dict], str] | None:
    """A problem of the arm "tandem", its joint rollouts, and a sentence on how it was chosen.

    None if no problem was kept at three evaluations.
    """
    seeds, shown = read_problems(folder, "tandem").values(), []
    for problems in seeds:
        for problem, rollouts in kept_throughout(problems).items():
            joint = [rollout for rollout in rollouts if rollout["who"] == "tandem"]
            shown += [(rank_example(rollouts), problem, joint)] if len(joint) >= 3 else []
    if not shown:
        return None
    best, problem, joint = max(shown, key=lambda example: example[0])
    ranks = [rank_example(rollouts) for problems in seeds for rollouts in problems.values()]
    counted = f"The first of {ranks.count(best)} such problems among {len(ranks)} saved."
    return problem, joint, f"{EXAMPLES[best]}. {counted}"


# ------------------------------------------------------------------------------------------------
# The page


def draw_page(folder: str | Path, arms: Iterable[str] = ()) -> Path:
    """Write the page of these arms, or of all in the folder; Refused if no rollouts were kept."""
    command = " ".join(["python -m lab.viewer", str(folder), *arms])
    found = sorted({path.parts[-3] for path in Path(folder).glob("*/seed-*/samples.jsonl")})
    # In the order of the settings; what is in no setting comes last.
    shown, absent = set(arms or found) & set(found), sorted(set(arms) - set(found))
    ordered = [arm for arm in dict.fromkeys(arms_of("all") + found) if arm in shown]
    seeds = [list(read_arm(folder, arm)) for arm in ordered]
    runs = [run for of_arm in seeds for run in (of_arm if arms else of_arm[:1])]
    if absent or not runs:
        raise Refused(f"{folder}: no run of {', '.join(absent) or 'any arm'} has kept rollouts")
    runs.sort(key=lambda run: run["seed"])
    content = as_json({"runs": runs, "missing": sum(map(len, seeds)) - len(runs)})
    page = TEMPLATE.read_text(encoding="utf-8").replace("COMMAND", as_json(command), 1)
    path = Path(folder, "figures", "rollouts.html")
    replace_file(path, page.replace('{"runs": [], "missing": 0}', content).encode())
    print(path, "" if arms else "(the first seed of every arm; name arms for more)")
    return path


def as_json(content) -> str:
    """JSON in ASCII, in which no text can end the script element or begin a comment or entity.

    >>> as_json("</script>")
    '"\\\\u003c/script\\\\u003e"'
    """
    # Outside of strings, JSON has none of these characters.
    escapes = {ord(character): f"\\u{ord(character):04x}" for character in "<>&"}
    return json.dumps(content, separators=(",", ":")).translate(escapes)


def read_arm(folder: str | Path, arm: str) -> Iterator[dict]:
    """What the page says of each run of an arm."""
    config = read_back(seed_folders(folder, arm)[0] / "config.json", flags=dict)
    rows, problems = tables.read_seeds(folder, arm, "metrics.jsonl"), read_problems(folder, arm)
    about = {"arm": arm, "about": describe_training(DEFAULTS | config["flags"])}
    about["flags"] = config["flags"] | {"commit": config.get("commit")}
    # An arm of several settings is listed under the first.
    about["setting"] = next((ABOUT[s] for s in SETTINGS if arm in SETTINGS[s]), "other arms")
    # A run without a row may still lack the rollouts of a writer, and is left out.
    for seed in sorted(rows.keys() & problems.keys()):
        run = about | {"seed": seed, "ranks": list(map(rank_example, problems[seed].values()))}
        shown = kept_throughout(problems[seed]).items()
        run["problems"] = [[*problem, rank_example(of), of] for problem, of in shown]
        run["evaluations"] = {row["update"]: numbers_in(row) for row in rows[seed] if "eval" in row}
        yield run


def numbers_in(row: dict) -> dict[str, tuple]:
    return {who: (of["n"], of["accuracy"], of["jargon"]) for who, of in row["eval"].items()}


TRAINING = (
    "Training solutions are written by {writers}, {rollouts_per_prompt} per problem. The update "
    "is {algorithm} with {rewards} rewards and a KL penalty of {kl:g}. In the loss, the senior's "
    "words weigh {senior_weight:g}, the junior's j = {junior_weight:g}, and wrong solutions c = "
    "{wrong_weight:g} (reinforce only). Where both write: schedule “{handoff}”, p = {p:g} for the "
    "senior. The senior is asked to answer in “{senior_language}”, the junior in "
    "“{junior_language}”."
)


def describe_training(flags: dict) -> str:
    """How an arm is trained, in a few sentences. flags: all of DEFAULTS."""
    alone = "the senior alone" if flags["solo"] else "the junior alone"
    writers = alone if flags["solo"] or flags["imitation"] else "senior and junior together"
    return TRAINING.format(writers=writers, **flags)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    with errors_in_one_line():
        draw_page(sys.argv[1], sys.argv[2:])
