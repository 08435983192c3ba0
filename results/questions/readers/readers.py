"""Who can follow the trained senior?  python results/questions/readers/readers.py OTHER FILE...

OTHER is a base with the same tokenizer that was made with another seed. FILE holds an adapter of
the senior: the state.pt of a run (OUT/<arm>/seed-<k>/), or the adapter.pt of a specialist, which is
the senior before training (in OUT/specialist/). With it, the senior solves the 200
held-out problems of the seed alone. Two readers, the junior ("base") and OTHER ("other"), go on
from each of its solutions, cut off after 25, 50 and 75 % of its tokens. Prints one line of JSON per
FILE, with one number per problem: 1 for a right answer, or for a solution with jargon, else 0.
"""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

import torch

from lab import models, runs
from lab import problems as tasks
from lab.experiments import flags_of_run
from lab.measures import continue_solutions, right
from metrics import has_jargon
from run_gsm8k import generate


@torch.no_grad()
def main(other: str, files: list[str]) -> None:
    args = flags_of_run({"device": "cpu"}, "tandem", seed=0)
    models.check_before_loading([args])
    pair = models.load_pair(args)
    readers = {"base": pair.junior, "other": models.load_model(other, args)}
    for path in map(Path, files):
        runs.load_adapter(pair.senior, runs.read_back(path, adapter=dict)["adapter"], path)
        args.seed = int(re.search("seed-([0-9]+)", path.parent.name)[1])
        problems = tasks.generate(args.eval_problems, "test", args.seed)
        solo = generate(problems, args, pair, p=1.0, seed=10**9 + args.seed)
        arm = "before" if path.name == "adapter.pt" else path.parts[-3]
        found = {"arm": arm, "seed": args.seed}
        found["solo"] = right(solo.texts, problems)
        found["jargon"] = [int(has_jargon(text)) for text in solo.texts]
        for name, reader in readers.items():
            for percent in (0, 25, 50, 75):
                texts = continue_solutions(solo, percent / 100, args, replace(pair, junior=reader))
                found[f"{name}_{percent}"] = right(texts, problems)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
