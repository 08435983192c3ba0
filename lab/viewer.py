"""A page on which to see who wrote what:  python -m lab.viewer RUNS [ARM ...]

It writes RUNS/figures/rollouts.html, one file that a browser opens without a network: every kept
evaluation rollout in the colours of its authors, what either model would have written at each step,
the tosses of the coin, and the curves of accuracy and jargon. docs/ has copies of two pages, for
GitHub Pages; each names the command that makes it in a comment.

The page is lab/viewer.html, in which an empty list of runs is replaced by those of RUNS, as JSON.
They come from samples.jsonl, whose rollouts are made here:

    spans    who wrote which text: [author, text], one per run of tokens by the same author
    steps    of joint rollouts, one per token: [author, text, the senior's candidate, the junior's,
             whether a coin was tossed, the senior's probability of the written token]

A model may write anything, so no text may become a part of the page: as_json escapes what could end
the script element, and the page's script never interprets a text as markup. To stay within
MAX_BYTES the page leaves out runs, of later seeds first. Name arms to choose yourself.
"""

import codecs
import json
import sys
from argparse import Namespace
from itertools import accumulate, groupby
from pathlib import Path

import torch

from lab import engine, tables
from lab.experiments import ABOUT, DEFAULTS, SETTINGS, arms_of
from lab.runs import errors_in_one_line, read_back, read_rows, replace_file, seed_folders, unusable
from metrics import JARGON, has_jargon
from reward import final_number, reward
from rollout import Pair, Rollouts

TEMPLATE = Path(__file__).with_suffix(".html")
NO_RUNS = '{"runs": [], "missing": 0}'
MAX_BYTES = 1_380_000  # of the runs; the template has some 20 KB
# An arm of several settings is listed under the first.
SETTING_OF = {arm: setting for setting in reversed(SETTINGS) for arm in SETTINGS[setting]}

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
) -> list[dict]:
    """The rollouts of the first `problems` as they are kept. trace: see rollout.rollout."""
    kept = []
    for i, problem in enumerate(problems):
        found = {"question": problem.question, "gold": problem.gold, "spans": spans[i]}
        found["reward"] = reward(rollouts.texts[i], problem.gold)
        if trace and i in trace[0][0]:  # it was written in the first chunk
            found["steps"] = steps(engine.select(rollouts, [i]), i, trace, args.temperature, pair)
        kept.append(found)
    return kept


@torch.no_grad()
def steps(one: Rollouts, row: int, trace: list, temperature: float, pair: Pair) -> list[list]:
    """One rollout token by token. `one`: it alone; `row`: its row in the batch of the trace."""
    logprobs = engine.completion_logprobs(pair.senior, one, temperature)[0]
    # A character may span several tokens. The decoder holds its bytes back until the last one.
    decoder, found = codecs.getincrementaldecoder("utf-8")(errors="replace"), []
    ids, by_senior = one.completion_ids[0].tolist(), one.senior_mask[0].tolist()
    for t, (written, senior) in enumerate(zip(ids, by_senior)):
        rows, senior_ids, junior_ids, tossed = trace[t]
        i = rows.index(row)
        text = decoder.decode(pair.pieces[written], final=t + 1 == len(ids))
        candidates = [pair.pieces[of_model[i]] for of_model in (senior_ids, junior_ids)]
        shown = [candidate.decode(errors="backslashreplace") for candidate in candidates]
        probability = round(logprobs[t].exp().item(), 4)
        found.append(["senior" if senior else "junior", text, *shown, tossed[i], probability])
    return found


# ------------------------------------------------------------------------------------------------
# The page


def draw_page(folder: str | Path, arms: list[str] | None = None) -> Path | None:
    """Write the page of these arms, or of all in the folder. None if no rollouts were kept."""
    folder, command = Path(folder), " ".join(["python -m lab.viewer", str(folder), *(arms or [])])
    arms = arms or [path.parts[-3] for path in folder.glob("*/seed-*/samples.jsonl")]
    # In the order of the settings; what is in no setting comes last.
    arms = [arm for arm in dict.fromkeys(arms_of("all") + sorted(arms)) if arm in arms]
    found = [read_run(path) for arm in arms for path in seed_folders(folder, arm)]
    runs = sorted((run for run in found if run["problems"]), key=lambda run: run["seed"])
    if not runs:
        print(f"{folder}: no run of {', '.join(arms) or 'any arm'} has kept rollouts: no page")
        return None
    sizes = accumulate(len(as_json(run)) for run in runs)
    # At least one run is shown, whatever its size.
    shown = runs[: max(1, sum(size < MAX_BYTES for size in sizes))]
    missing = len(runs) - len(shown)
    page = TEMPLATE.read_text(encoding="utf-8").replace("COMMAND", as_json(command), 1)
    page = page.replace(NO_RUNS, as_json({"runs": shown, "missing": missing}))
    path = folder / "figures" / "rollouts.html"
    replace_file(path, page.encode())
    print(path, f"(without {missing} of {len(runs)} runs: name arms to choose)" * bool(missing))
    return path


def as_json(content) -> str:
    """JSON in ASCII, in which no text can end the script element or begin a comment or entity.

    >>> as_json("</script>")
    '"\\\\u003c/script\\\\u003e"'
    """
    # Outside of strings, JSON has none of these characters.
    escapes = {ord(character): f"\\u{ord(character):04x}" for character in "<>&"}
    return json.dumps(content, separators=(",", ":")).translate(escapes)


def read_run(folder: Path) -> dict:
    """What the page says of one run folder. Files that are not there leave their part empty."""
    paths = [folder / "samples.jsonl", folder / "metrics.jsonl"]
    kept, rows = (read_rows(path) if path.is_file() else [] for path in paths)
    arm = folder.parent.name
    setting = ABOUT.get(SETTING_OF.get(arm), "other arms")
    run = {"arm": arm, "seed": int(folder.name[5:]), "setting": setting, "about": "", "flags": {}}
    if (folder / "config.json").is_file():
        run["flags"] = DEFAULTS | tables.read_flags(folder.parents[1], arm)
        run["flags"]["commit"] = read_back(folder / "config.json").get("commit")
        run["about"] = describe_training(run["flags"])
    problems: dict[tuple, list[dict]] = {}
    evaluations: dict[int, dict] = {}
    try:
        for sample in kept:
            problem = sample["question"], sample["gold"]
            problems.setdefault(problem, []).append(describe_rollout(sample))
        for row in rows:
            for who, cell in row.get("eval", {}).items():
                numbers = cell["n"], cell["accuracy"], cell["jargon"]
                evaluations.setdefault(row["update"], {})[who] = numbers
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise unusable(folder, f"a row is not what a run writes: {type(error).__name__}") from error
    # Before the end of its first evaluation a run may lack rollouts of some writer.
    found = [
        [*problem, tables.rank_example(of), of] for problem, of in problems.items() if evaluations
    ]
    return run | {"problems": found, "evaluations": evaluations}


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


def describe_training(flags: dict) -> str:
    """How an arm is trained, in a few sentences. flags: all of DEFAULTS."""
    if flags["solo"]:
        about = "Standard RL: the senior is trained on solutions that it writes alone."
    elif flags["imitation"]:
        about = "A control: the senior is trained on solutions that the junior writes alone."
    else:
        about = "The senior is trained on solutions that it writes together with the junior; its"
        about += f" words weigh 1 in the loss, the junior's j = {flags['junior_weight']:g}."
    about += f" The update is {flags['algorithm'].upper()}."
    if flags["wrong_weight"]:
        about += f" Wrong solutions weigh c = {flags['wrong_weight']:g}."
    if flags["rewards"] == "shuffled":
        about += " As a control, the rewards are shuffled within each batch."
    about += f" Where both write: schedule “{flags['handoff']}”, p = {flags['p']:g} for the senior."
    senior, junior = flags["senior_language"], flags["junior_language"]
    if senior != junior:
        about += f" The senior is asked to answer in “{senior}”, the junior in “{junior}”."
    return about


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    with errors_in_one_line():
        sys.exit(0 if draw_page(sys.argv[1], sys.argv[2:]) else 1)
