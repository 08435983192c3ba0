"""A page on which to see who wrote what:  python -m lab.viewer RUNS [ARM ...]

It writes RUNS/figures/rollouts.html, one file that a browser opens from disk without a network: every kept evaluation rollout
in the colours of its authors, what either model would have written at each step, the tosses of the coin, and the curves of
accuracy and jargon. lab/figures.py makes it together with the figures.

The page is lab/viewer.html, in which an empty list of runs is replaced by those of RUNS, as JSON. They come from

    samples.jsonl   rollouts: the "steps" of joint ones (rollout.Step), or else "spans", without candidates and tosses
    metrics.jsonl   accuracy and jargon at every evaluation
    config.json     how the run was trained

A model may write anything, so no text may become a part of the page: as_json escapes what could end the script element, and
the page's script never interprets a text as markup.

To stay within MAX_BYTES the page leaves out runs, of later seeds first, and says how many. Name arms to choose yourself.
"""

import json
import sys
from itertools import accumulate
from pathlib import Path

from lab.curves import is_row, is_sample, read_checked, read_flags
from lab.runs import errors_in_one_line, seed_folders, writing
from metrics import EXPRESSION, JARGON, count_handoffs, has_jargon
from reward import final_number

TEMPLATE = Path(__file__).with_suffix(".html")
NO_RUNS = '{"runs": [], "missing": 0}'
MAX_BYTES = 1_400_000


def draw_page(folder: str | Path, arms: list[str] | None = None) -> Path | None:
    """Write the page of these arms, or of all in the folder, and print its path. None, and no page, if nothing was sampled."""
    folder = Path(folder)
    arms = arms or [path.parts[-3] for path in folder.glob("*/seed-*/samples.jsonl")]
    arms = sorted(set(arms), key=lambda arm: (arm != "tandem", arm != "solo", arm))
    runs = [run for run in (read_run(path) for arm in arms for path in seed_folders(folder, arm)) if run["problems"]]
    if not runs:
        print(f"{folder}: no run of {', '.join(arms) or 'any arm'} has kept rollouts in a samples.jsonl, so there is no page of them")
        return None
    runs.sort(key=lambda run: run["seed"])
    sizes = accumulate(len(as_json(run)) for run in runs)
    # At least one run is shown, whatever its size.
    shown = runs[: max(1, sum(size < MAX_BYTES for size in sizes))]
    missing = len(runs) - len(shown)
    data = {"runs": sorted(shown, key=lambda run: arms.index(run["arm"])), "missing": missing}
    path = folder / "figures" / "rollouts.html"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(TEMPLATE.read_text(encoding="utf-8").replace(NO_RUNS, as_json(data)), encoding="utf-8")
    print(path, f"(without {missing} of {len(runs)} runs, to stay small; name arms to choose)" if missing else "")
    return path


def as_json(content) -> str:
    """JSON in ASCII, in which no text can end the script element that it stands in or begin a comment or entity.

    >>> as_json("</script>")
    '"\\\\u003c/script\\\\u003e"'
    """
    text = json.dumps(content, separators=(",", ":"))
    # Outside of strings, JSON has none of these characters.
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def read_run(folder: Path) -> dict:
    """What the page says of one run folder. Files that are not there leave their part empty; Refused if one cannot be used."""
    checks = {"samples.jsonl": is_sample, "metrics.jsonl": is_row}
    samples, rows = (read_checked(folder / file, checks[file]) if (folder / file).is_file() else [] for file in checks)
    problems: dict[str, dict] = {}
    for sample in samples:
        problem = problems.setdefault(sample["question"], {"question": sample["question"], "gold": sample["gold"], "rollouts": []})
        problem["rollouts"].append(describe_rollout(sample))
    evaluations = {}
    for row in rows:
        if "eval" in row:
            evaluations[row["update"]] = {who: [cell["n"], cell["accuracy"], cell["jargon"]] for who, cell in row["eval"].items()}
    flags = read_flags(folder.parents[1], folder.parent.name) if (folder / "config.json").is_file() else {}
    run = {"arm": folder.parent.name, "seed": int(folder.name.removeprefix("seed-")), "about": describe_training(flags)}
    return run | {"evaluations": evaluations, "problems": sorted(problems.values(), key=how_plain)}


def how_plain(problem: dict) -> tuple[bool, bool]:
    """Sorts the problems: first those whose joint rollouts had jargon before training and, among them, were right after it."""
    joint = [rollout for rollout in problem["rollouts"] if rollout["who"] == "tandem"]
    return not (joint and joint[0]["jargon"]), not (joint and joint[-1]["right"])


def describe_rollout(sample: dict) -> dict:
    """One rollout: its verdict, its tokens (or spans, if the file has no steps), and what is underlined in it."""
    tokens = sample.get("steps", sample["spans"])
    # A token or span begins with its author and its text.
    text = "".join(token[1] for token in tokens)
    patterns = {"expression": EXPRESSION, "jargon": JARGON}
    return {
        "update": sample["update"],
        "who": sample["who"],
        "right": sample["reward"] == 1,
        "answer": final_number(text),
        "jargon": has_jargon(text),
        **count_handoffs([sample["spans"]]),
        "tokens": tokens,
        "underlined": [[*match.span(), kind] for kind in patterns for match in patterns[kind].finditer(text)],
    }


def describe_training(flags: dict) -> str:
    """How a run was trained, in a sentence or three. Nothing without flags."""
    if not flags:
        return ""
    about = "In this run the senior was trained on solutions that it wrote together with the junior."
    if flags["solo"]:
        about = "In this run, a control, the senior was trained on solutions that it wrote alone. It met the junior in evaluations only."
    if flags.get("rewards") == "shuffled":
        about += " As a control, the rewards were shuffled among the solutions."
    if "junior_weight" in flags and not flags["solo"]:
        learns = {0: "only from the words that it wrote itself", 1: "from the junior's words too"}
        learns = learns.get(flags["junior_weight"], "from the junior's words too, with the weight {junior_weight:g}")
        about += f" The update is {flags.get('algorithm', 'reinforce').upper()}, and the senior learns {learns.format(**flags)}."
    about += " The coin is tossed by the schedule “{handoff}” and names the senior with probability {p:g}.".format(**flags)
    if flags["senior_language"] != flags["junior_language"]:
        about += " The senior is asked to answer in “{senior_language}”, the junior in “{junior_language}”.".format(**flags)
    return about


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    with errors_in_one_line():
        sys.exit(0 if draw_page(sys.argv[1], sys.argv[2:]) else 1)
