"""The page of rollouts: what it holds, that hostile text stays text, and, where a Chromium is installed, what a reader can do with it."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from lab import viewer

HOSTILE = [
    "</script><script>document.title = 'owned'</script>",
    "<img src=x onerror=\"document.title = 'owned'\">",
    "<!-- <script> &lt;b&gt; &amp; \"quotes\" 'quotes' `${document.title = 'owned'}` \\u003c \\",
    "\ud800 half a pair, \u202e\u05d0\u05d1 right to left, \u2028\u2029 line ends, \x00\x07\ufffd, ü, 😀",
    '{"runs": [], "missing": 0}',
]
# Author, text, the senior's candidate, the junior's, tossed, probability: "Tommy has 48" with two tosses that change the writer.
STEPS = [
    ["senior", "Tom", "Tom", "He", True, 0.5],
    ["senior", "my", "my", " has", False, 0.25],
    ["junior", " has", " sells", " has", True, 0.02],
    ["junior", " 4+4=<<4+", " 4", " 4+4=<<4+", True, 0.0001],
    ["senior", "4=8>>8", "4=8>>8", "4", True, 1.0],
    ["senior", "", "", "\n", True, 1.0],
]


def spans_of(steps):
    """The spans of STEPS, whose authors change twice."""
    texts = [("senior", steps[:2]), ("junior", steps[2:4]), ("senior", steps[4:])]
    return [[author, "".join(step[1] for step in part)] for author, part in texts]


def write_run(folder, steps=STEPS, question="How many clips?", gold="8", updates=(0, 4), with_steps=True):
    """Joint rollouts of one problem, wrong at the first evaluation and right after it, and solo ones."""
    folder.mkdir(parents=True)
    sample = {"question": question, "gold": gold}
    joint = {"who": "tandem", "spans": spans_of(steps)} | ({"steps": steps} if with_steps else {})
    alone = [["senior", "4+4=<<4+4=8>>8\n#### 8"]]
    samples = [sample | joint | {"update": update, "reward": float(update > 0)} for update in updates]
    samples += [sample | {"update": update, "who": "senior", "reward": 1.0, "spans": alone} for update in updates]
    samples += [sample | {"update": 0, "who": "junior", "reward": 0.0, "spans": [["junior", "none"]]}]
    cell = {"n": 4, "accuracy": 0.25, "jargon": 1.0, "languages": {"en": 1.0}, "tokens": 6.0}
    rows = [{"update": update, "eval": {"senior": cell, "tandem": cell}} for update in updates]
    rows[0]["eval"]["junior"] = cell
    for name, lines in (("samples", samples), ("metrics", rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    flags = {"solo": False, "handoff": "word", "p": 0.5, "rewards": "true", "senior_language": "en", "junior_language": "en"}
    (folder / "config.json").write_text(json.dumps({"flags": flags}), encoding="utf-8")


class Tags(HTMLParser):
    """The elements of a page, and the text of its element "data"."""

    def __init__(self, page: str):
        super().__init__()
        self.found, self.data = [], None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, attributes))

    def handle_data(self, data):
        if self.found and ("id", "data") in self.found[-1][1] and self.data is None:
            self.data = data


def data_of(path):
    return json.loads(Tags(path.read_text(encoding="utf-8")).data)


def hostile_run(folder, text):
    steps = [[author, text, text, text, tossed, p] for author, _, _, _, tossed, p in STEPS]
    write_run(folder, steps=steps, question=text, gold=text)
    (folder / "config.json").unlink()


# ----------------------------------------------------------------------------------------------------------------------
# Without a browser


def test_hostile_text_stays_text(tmp_path):
    """The page has the elements of its template and no others, and every text comes out of its data as it went in."""
    for i, text in enumerate(HOSTILE):
        hostile_run(tmp_path / f"arm-{i}" / "seed-0", text)
    hostile_run(tmp_path / "<img onerror=x> & 'arm'" / "seed-0", "text")
    path = viewer.draw_page(tmp_path)
    page = path.read_text(encoding="utf-8")
    assert Tags(page).found == Tags(viewer.TEMPLATE.read_text(encoding="utf-8")).found
    runs = {run["arm"]: run for run in data_of(path)["runs"]}
    assert "<img onerror=x> & 'arm'" in runs
    for i, text in enumerate(HOSTILE):
        (problem,) = runs[f"arm-{i}"]["problems"]
        assert (problem["question"], problem["gold"]) == (text, text)
        assert [token[1] for token in problem["rollouts"][0]["tokens"]] == [text] * len(STEPS)
    assert not re.search(r"[<>&\u2028\u2029\x00]", Tags(page).data)


def test_what_the_page_says_of_a_rollout(tmp_path):
    """Verdicts, handoffs, and underlines: "4+4=<<4+4=8>>8" is an expression from character 10, and in it the jargon from 14."""
    write_run(tmp_path / "tandem" / "seed-3")
    data = data_of(viewer.draw_page(tmp_path))
    (run,) = data["runs"]
    assert (run["arm"], run["seed"], data["missing"]) == ("tandem", 3, 0)
    assert "together with the junior" in run["about"]
    assert run["evaluations"]["4"] == {"senior": [4, 0.25, 1.0], "tandem": [4, 0.25, 1.0]}
    (problem,) = run["problems"]
    first = next(rollout for rollout in problem["rollouts"] if rollout["who"] == "tandem")
    assert first["tokens"] == STEPS
    assert (first["right"], first["answer"], first["jargon"]) == (False, "8", True)
    assert (first["handoffs"], first["handoffs_inside"]) == (2, 1)
    assert first["underlined"] == [[10, 24, "expression"], [14, 23, "jargon"]]


def test_a_control_is_called_one():
    flags = {"solo": True, "handoff": "token", "p": 0.25, "rewards": "shuffled", "senior_language": "de", "junior_language": "fr"}
    about = viewer.describe_training(flags)
    assert all(part in about for part in ("wrote alone", "shuffled", "“token”", "probability 0.25", "“de”", "“fr”"))


@pytest.mark.parametrize(
    ("junior_weight", "learns"),
    [
        (0.0, "only from the words that it wrote itself."),
        (1.0, "from the junior's words too."),
        (0.3, "from the junior's words too, with the weight 0.3."),
    ],
)
def test_the_page_says_what_the_senior_learns_from(junior_weight, learns):
    flags = {"solo": False, "handoff": "word", "p": 0.5, "senior_language": "en", "junior_language": "en"}
    about = viewer.describe_training(flags | {"algorithm": "grpo", "junior_weight": junior_weight})
    assert f"The update is GRPO, and the senior learns {learns}" in about
    assert "learns" not in viewer.describe_training(flags | {"solo": True, "junior_weight": 1.0})


def test_the_problem_with_jargon_comes_first(tmp_path):
    """Of two problems, the one whose joint rollout had jargon before training, although it is the second one in the file."""
    write_run(tmp_path / "tandem" / "seed-0")
    path = tmp_path / "tandem" / "seed-0" / "samples.jsonl"
    plain = {"question": "Plain?", "gold": "8", "update": 0, "who": "tandem", "reward": 1.0, "spans": [["senior", "#### 8"]]}
    path.write_text(json.dumps(plain) + "\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    (run,) = data_of(viewer.draw_page(tmp_path))["runs"]
    assert [problem["question"] for problem in run["problems"]] == ["How many clips?", "Plain?"]


def test_samples_without_candidates_are_drawn(tmp_path):
    """As older versions wrote them: spans only, no config.json and no metrics.jsonl."""
    write_run(tmp_path / "tandem" / "seed-0", with_steps=False)
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / "tandem" / "seed-0" / name).unlink()
    (run,) = data_of(viewer.draw_page(tmp_path))["runs"]
    assert run["problems"][0]["rollouts"][0]["tokens"] == spans_of(STEPS)
    assert (run["about"], run["evaluations"]) == ("", {})


def test_a_folder_without_samples_makes_no_page(tmp_path, capsys):
    """Neither an empty folder, nor a run that has just begun, nor an arm that is not there."""
    assert viewer.draw_page(tmp_path) is None
    (tmp_path / "tandem" / "seed-0").mkdir(parents=True)
    (tmp_path / "tandem" / "seed-0" / "samples.jsonl").touch()
    assert viewer.draw_page(tmp_path) is None
    assert viewer.draw_page(tmp_path, ["absent"]) is None
    assert capsys.readouterr().out.count("so there is no page of them") == 3
    assert not (tmp_path / "figures").exists()


def test_a_page_that_would_be_too_large_leaves_out_later_seeds(tmp_path, monkeypatch, capsys):
    """Room for three of four runs: seed 0 of both arms, and seed 1 of "tandem", which comes first. Arms can be named."""
    for arm in ("another", "tandem"):
        for seed in (0, 1):
            write_run(tmp_path / arm / f"seed-{seed}")
    size = len(viewer.as_json(viewer.read_run(tmp_path / "another" / "seed-0")))
    monkeypatch.setattr(viewer, "MAX_BYTES", 3.5 * size)
    data = data_of(viewer.draw_page(tmp_path))
    assert [(run["arm"], run["seed"]) for run in data["runs"]] == [("tandem", 0), ("tandem", 1), ("another", 0)]
    assert data["missing"] == 1
    assert "without 1 of 4 runs" in capsys.readouterr().out
    monkeypatch.setattr(viewer, "MAX_BYTES", 1)
    assert [(run["arm"], run["seed"]) for run in data_of(viewer.draw_page(tmp_path, ["another"]))["runs"]] == [("another", 0)]


# ----------------------------------------------------------------------------------------------------------------------
# In a browser

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """A function that opens a page 360 pixels wide, runs a script in it, and gives back what the script returns."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)} is on the path")
    folder = tmp_path_factory.mktemp("browser")

    def run(path, script):
        page = folder / "page.html"
        report = f"<script>document.body.append(element('pre', 'report', JSON.stringify((() => {{ {script} }})())));</script>"
        page.write_text(path.read_text(encoding="utf-8") + report, encoding="utf-8")
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--window-size=360,800",
            f"--user-data-dir={folder / 'profile'}",
            "--dump-dom",
        ]
        dom = subprocess.run([browser, *flags, page.as_uri()], capture_output=True, timeout=120).stdout.decode()
        if "<body" not in dom:
            pytest.skip(f"{browser} is installed, but does not open a page here")
        return json.loads(html.unescape(re.search(r'<pre class="report">(.*?)</pre>', dom, re.DOTALL)[1]))

    return run


def test_a_reader_goes_through_a_rollout(browse, tmp_path):
    """The slider by its key, a token by key and by pointer, a discarded candidate, the coin, and no scrolling sideways."""
    write_run(tmp_path / "tandem" / "seed-0")
    script = """
        const press = (target, key) => target.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
        const texts = selector => [...document.querySelectorAll(selector)].map(found => found.textContent);
        const report = {before: $("when").textContent, heads: texts("article h2"), verdicts: texts("article b")};
        press(document.body, "ArrowRight");
        Object.assign(report, {after: $("when").textContent, later: texts("article b"), jargon: texts("article:first-child .jargon")});
        const solution = document.querySelector(".text");
        report.read = solution.textContent;
        report.marks = [".toss", ".handoff", "s"].map(mark => solution.querySelectorAll(mark).length);
        press(solution, "ArrowRight");
        press(solution, "ArrowRight");
        report.step = texts("#step p");
        report.still = $("when").textContent;
        solution.querySelectorAll(".toss")[2].dispatchEvent(new MouseEvent("mouseenter"));
        report.pointed = texts("#step p");
        report.current = texts(".current");
        report.width = document.documentElement.scrollWidth;
        return report;"""
    report = browse(viewer.draw_page(tmp_path), script)
    assert (report["before"], report["after"]) == ("After 0 of 4 updates: before training", "After 4 of 4 updates: after training")
    assert report["heads"] == ["Senior and junior together", "The senior alone", "The junior alone"]
    assert report["verdicts"] == ["wrong: 8", "right", "wrong: no number"]
    assert report["later"][0] == "right"
    assert report["jargon"] == ["<<4+", "4=8>>"]
    assert report["read"].startswith(" senior: Tommy junior:  sells has 4+4=<<4+ senior: 4")
    assert report["marks"] == [5, 2, 2]
    assert report["step"] == [
        "Token 3 of 6. The senior was writing. A coin was tossed and named the junior.",
        "The senior proposed “ sells”, which was discarded.",
        "The junior proposed “ has”, which was written.",
        "By itself the senior would have written what stands there with a probability of 2.0 %.",
    ]
    assert report["still"] == report["after"]
    assert report["pointed"][0] == "Token 4 of 6. The junior was writing. A coin was tossed and named the junior again."
    assert report["pointed"][3].endswith("less than 0.1 %.")
    assert report["current"] == [" 4+4=<<4+"]
    assert report["width"] <= 360


def test_the_browser_shows_hostile_text_as_text(browse, tmp_path):
    for i, text in enumerate(HOSTILE[:2]):
        hostile_run(tmp_path / f"arm-{i}" / "seed-0", text)
    script = """
        const shown = arms.map((_, i) => {
          $("arm").selectedIndex = i;
          choose();
          document.querySelector(".text .toss").click();
          return [$("question").textContent, document.querySelector(".text .toss").textContent];
        });
        return {shown, title: document.title, images: document.images.length, scripts: document.scripts.length};"""
    report = browse(viewer.draw_page(tmp_path), script)
    assert report["shown"] == [[text, text] for text in HOSTILE[:2]]
    assert (report["title"], report["images"], report["scripts"]) == ("Tandem training: who wrote what", 0, 3)


def test_the_browser_shows_samples_without_candidates(browse, tmp_path):
    write_run(tmp_path / "tandem" / "seed-0", with_steps=False)
    script = 'document.querySelector(".text .junior").click(); return $("step").textContent;'
    assert "Written by the junior. What the other model would have written was not" in browse(viewer.draw_page(tmp_path), script)
