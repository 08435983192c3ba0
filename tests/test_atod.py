"""The companion on ATOD: equations by hand, the game, the update, and the files of a run."""

import copy
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from companions import atod
from conftest import ends_with, gpt2
from reinforce import plain_logprobs

RESULTS = Path(atod.__file__).parents[1] / "results" / "companions" / "atod"


def settings(**changed) -> SimpleNamespace:
    """Those of the module, but for a run of seconds, with some changed."""
    small = dict(updates=2, long_updates=4, tasks=2, group=4, eval_every=2, eval_games=4)
    small |= dict(student_width=16, teacher_width=24)
    return SimpleNamespace(**(vars(atod.SETTINGS) | small | changed))


def new_games(n: int, seed: int) -> list[atod.Game]:
    rng = random.Random(seed)
    return [atod.new_game(rng) for _ in range(n)]


@pytest.fixture
def models():
    """A random student and teacher, sharp enough for a mistake to show.

    GPT-2, because Llama's norm computes in float32.
    """
    return tuple(gpt2(len(atod.WORDS), seed, torch.float64) for seed in (0, 1))


# --------------------------------------------------------------------------------------------------
# The equations


def test_the_arm_without_annealing_has_the_average_weights():
    average = torch.tensor([atod.annealed(step, horizon=1000) for step in range(1001)]).mean(0)
    assert average.tolist() == pytest.approx(atod.FIXED_WEIGHTS["constant"], abs=1e-6)


# (d and h of the turns of a game, their weights)
TDUR = [
    # The case study has d from .019 to .228 and h from .006 to .037, and the weights .142 and .597:
    # 1 - (1 - .003/.209)(1 - .004/.031) and 1 - (1 - .122/.209)(1 - .001/.031).
    ([0.019, 0.228, 0.022, 0.141], [0.006, 0.037, 0.010, 0.007], [0, 1, 0.142, 0.597]),
    ([0.019, 0.228, 0.019], [0.006, 0.006, 0.037], [0, 1, 1]),
    # Guards: fewer than 3 turns; teacher and student agree in every turn, and just not any more.
    ([0.1, 5.0], [0.2, 3.0], [1, 1]),
    ([0, 0.005, 0.0099], [0.1, 0.2, 0.3], [1, 1, 1]),
    ([0, 0.005, 0.0101], [0.1, 0.2, 0.3], [0, 0.7475, 1]),
    # Where all turns are equal, normalisation gives 0.5: 1 - 0.5 * (1 - 0.5) = 0.75.
    ([0.5] * 3, [0, 0.1, 0.2], [0.5, 0.75, 1]),
]


@pytest.mark.parametrize(("d", "h", "weights"), TDUR)
def test_tdur(d, h, weights):
    found = atod.tdur(torch.tensor(d).double(), torch.tensor(h).double())
    assert found.tolist() == pytest.approx(weights, abs=5e-4)


def test_tdur_of_a_batch():
    """By hand: a game of 3 turns, 2, 1 and 1 tokens, with an observation, and one of 2 turns."""
    old = -torch.tensor([[1.0, 2.0, 9.0, 0.5, 3.0], [1.0, 1.0, 2.0, 2.0, 0.0]])
    teacher = -torch.tensor([[1.5, 1.5, 0.0, 0.5, 5.0], [4.0, 4.0, 0.0, 2.0, 0.0]])
    turns = torch.tensor([[0, 0, -1, 1, 2], [0, 0, -1, 1, -1]])
    # d = .5, 0, 2 and h = 1.5, .5, 3: normalised .25, 0, 1 and .4, 0, 1. w_0 = 1 - .75 * .6 = .55.
    expected = [[0.55, 0.55, 0, 0, 1], [1, 1, 0, 1, 0]]
    torch.testing.assert_close(atod.tdur_of_tokens(old, teacher, turns), torch.tensor(expected))


# --------------------------------------------------------------------------------------------------
# The game and its rollouts

GAMES = [  # (actions, what is observed), to bring the key from the box to the desk
    ("go shelf, go box, take key, go desk, put key", "cup, key book, taken, empty, done"),
    # What makes no sense changes nothing.
    ("take key, put , go key, box go, go", "nothing, nothing, nothing, nothing, nothing"),
    # There is one hand. Another item does not win, nor does the key at another place.
    ("go shelf, take cup, go shelf, go desk, put cup", "cup, taken, empty, empty, done"),
    ("go box, take key, take book, put key, go", "key book, taken, nothing, done, nothing"),
]


@pytest.mark.parametrize(("actions", "observations"), GAMES)
def test_games_by_hand(actions, observations):
    """Only the first game is won, and all are over after turn 8."""
    game = atod.Game("key", "desk", {"key": "box", "cup": "shelf", "book": "box"}, turns=2)
    found = [game.step(tuple(action.split(" "))) for action in actions.split(", ")]
    assert ", ".join(found) == observations
    assert game.won == game.over == actions.endswith("desk, put key")
    game.step(())
    assert game.over


def test_the_expert_always_wins_in_6_turns():
    _, turns, rewards = atod.play(atod.expert, new_games(300, seed=0), seed=0)
    assert (turns.max(), rewards.min()) == (5, 1)
    assert atod.success(atod.expert, seed=0, games=4) == 1.0


def test_rollouts_of_games(models, monkeypatch):
    """Playing the recorded actions again gives the texts, the rewards, and what models read."""
    asked, expected = [], []

    def recording(pair, prompts, *args, original=atod.rollout, **options):
        asked.extend(prompts)
        assert (options["p"], options["temperature"]) == (1.0, 1.0)
        return original(pair, prompts, *args, **options)

    before, other = (atod.play(models[0], new_games(8, seed=3), seed)[0] for seed in (5, 6))
    monkeypatch.setattr(atod, "rollout", recording)
    rollouts, turns, rewards = atod.play(models[0], new_games(8, seed=3), seed=5)
    assert before.texts == rollouts.texts != other.texts
    assert torch.equal(turns >= 0, rollouts.senior_mask.bool())
    for i, game in enumerate(new_games(8, seed=3)):
        text = f"task {game.item} {game.target} >"
        for k in range(int(turns[i].max()) + 1):
            expected.append(atod.encode(text))
            action = [atod.WORDS[token] for token in rollouts.completion_ids[i][turns[i] == k]]
            observation = game.step(tuple(action))
            # After the last action there is no observation.
            seen = [] if game.over else [observation, ">"]
            text = " ".join([text, *action, *seen])
        assert game.over
        assert (rollouts.texts[i], rewards[i]) == (text, game.won)
    assert sorted(asked) == sorted(expected)


def test_the_opener_is_not_trained_on(models):
    rollouts, turns, _ = atod.play(models[0], new_games(4, 3), 5, opener=models[1], opening_turns=3)
    assert turns[turns >= 0].min() == 3
    assert torch.equal(turns >= 0, rollouts.senior_mask.bool())


# --------------------------------------------------------------------------------------------------
# Training and files


@pytest.mark.parametrize("name", ["grpo", "opd", "atod"])
def test_the_update_of_train(name, models, monkeypatch):
    """The gradient of an update: -sum_t A_t log pi(a_t) per token of the student."""
    student, teacher = models
    played = []

    def play(*args, original=atod.play, **options):
        rollouts, turns, rewards = original(*args, **options)
        # Random students hardly ever win, so every second game of the batch is rewarded instead.
        played.append((rollouts, turns, torch.arange(len(rewards)).remainder(2).double()))
        return played[-1]

    # The change of the parameters is then minus the gradient.
    monkeypatch.setattr(torch.optim, "AdamW", lambda params, **_: torch.optim.SGD(params, lr=1.0))
    monkeypatch.setattr(atod, "SETTINGS", settings(max_grad_norm=1e9))
    monkeypatch.setattr(atod, "play", play)
    before, scores = copy.deepcopy(student), iter([0.1, 0.9])
    # Training ends after the first update, with success.
    options = dict(updates=2, lr=1e-3, test=lambda: next(scores), test_every=1, stop_at=0.9)
    rows = atod.train(student, teacher, atod.ARMS[name], 0, label="", **options)
    ((rollouts, turns, rewards),) = played
    own, logprobs = turns >= 0, plain_logprobs(before, rollouts, 1.0)
    delta = (plain_logprobs(teacher, rollouts, 1.0) - logprobs).detach()
    # Groups of four with two rewards each. At the first step kappa and rho are 1.
    old, A = logprobs.detach(), ((rewards - 0.5) / ((1 / 3) ** 0.5 + 1e-6))[:, None]
    graded = atod.tdur_of_tokens(old, old + delta, turns) * delta
    weights = {"grpo": A, "opd": delta, "atod": graded + A}
    loss = -(weights[name] * logprobs)[own].sum() / own.sum()
    expected = torch.autograd.grad(loss, before.parameters())
    for old, new, g in zip(before.parameters(), student.parameters(), expected):
        assert (old - new - g).abs().max() < 1e-10
    assert max(g.abs().max() for g in expected) > 1e-2
    assert rows[-1]["gap"] == pytest.approx(-delta[own].mean().item(), abs=1e-4)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    # The games of a task are the same, those of two tasks are not.
    openings = [text[: text.index(">")] for text in rollouts.texts]
    assert [len(set(openings[i : i + 4])) for i in (0, 4)] == [1, 1]
    assert openings[0] != openings[4]


@pytest.fixture
def quick(monkeypatch):
    """Runs of seconds: untrained models instead of warmed-up ones, and none for seed 2."""
    widths = {"early": 16, "skilled": 16, "teacher": 24, "states-teacher": 24}
    measures = json.loads((RESULTS / "models" / "seed-0.json").read_text())
    made = []

    def make_models(seed):
        made.append(seed)
        if seed == 2:
            raise atod.NotLearned("seed 2 is left out")
        states = {name: atod.make_model(widths[name], seed).state_dict() for name in widths}
        return states, measures | {"seed": seed}

    monkeypatch.setattr(atod, "SETTINGS", settings())
    monkeypatch.setattr(atod, "make_models", make_models)
    return made


def test_run_resume_and_refusal(quick, monkeypatch, tmp_path, capsys):
    arms = ["--out", str(tmp_path), "--arms", "atod", "early-opd"]
    # A seed that cannot be warmed up is left out; the others are run and reported all the same.
    ends_with("seed 2 is left out", atod.main, ["--seeds", "3", *arms])
    table = capsys.readouterr().out
    for start in ("| atod | 2 |", "| early-opd | 2 |", "| atod − teacher |"):
        assert start in table
    assert (tmp_path / "table.md").read_text() + "\n" == table
    assert (tmp_path / "atod.png").stat().st_size > 5000
    path, other = (tmp_path / arm / "seed-1.jsonl" for arm in ("early-opd", "atod"))
    head, *rows = map(json.loads, path.read_text().splitlines())
    assert (head["arm"], head["seed"], head["settings"]["tasks"]) == ("early-opd", 1, 2)
    assert [row["update"] for row in rows] == [0, 2, 4]
    assert len(rows[-1]["samples"]) == 6

    # An interrupted run has all files but one. Only that one is made again, with the same content,
    # from the kept models.
    monkeypatch.setattr(atod, "draw", lambda *_: None)
    path.unlink()
    stamp = other.stat().st_mtime_ns
    atod.main(["--seeds", "2", *arms])
    assert [json.loads(line) for line in path.read_text().splitlines()[1:]] == rows
    assert other.stat().st_mtime_ns == stamp
    assert quick == [0, 1, 2]

    # A damaged file is named, and so are other settings, in the folder and in one file of an arm.
    path.write_text("{")
    ends_with("seed-1.jsonl cannot be read .*remove it", atod.main, ["--seeds", "2", *arms])
    monkeypatch.setattr(atod, "SETTINGS", settings(lr=0.5))
    for name in ("config.json", "atod/seed-0.jsonl"):
        message = f"{name} was made with lr = 0.001 instead of 0.5: choose another --out"
        ends_with(message, atod.main, arms)
        (tmp_path / name).unlink()


def test_a_model_that_does_not_learn_in_time(monkeypatch):
    monkeypatch.setattr(atod, "SETTINGS", settings(demo_max_steps=2, demo_batch=2, demo_games=2))
    options = dict(noise=0.0, lr=1e-3, test_every=1, label="teacher")
    with pytest.raises(atod.NotLearned, match="seed 3 is left out: its teacher .* in 2 steps"):
        atod.imitate(atod.make_model(16, seed=0), 3, done=lambda share: False, **options)


def test_the_committed_table_is_that_of_its_files():
    assert (RESULTS / "table.md").read_text() == atod.table(RESULTS, atod.seeds_in(RESULTS))
