"""The companion on ATOD: equations by hand and by enumeration, the game, and the files of a run."""

import copy
import json
import random
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from companions import atod
from conftest import gpt2
from lab.engine import completion_logprobs
from reinforce import full_logprobs, group_advantages, plain_logprobs
from rollout import sample


def settings(**changed) -> SimpleNamespace:
    """Those of the module, with some changed."""
    return SimpleNamespace(**(vars(atod.SETTINGS) | changed))


TINY = dict(updates=2, long_updates=4, tasks=2, group=4, eval_every=2, eval_games=4)
TINY |= dict(student_width=16, teacher_width=24)


@pytest.fixture
def models():
    """A random student and teacher, sharp enough for a mistake to show.

    GPT-2, because Llama's norm computes in float32.
    """
    return tuple(gpt2(len(atod.WORDS), seed, torch.float64) for seed in (0, 1))


@pytest.fixture
def games(models):
    """Eight games of the random student: (rollouts, turns, rewards)."""
    rng = random.Random(3)
    return atod.play(models[0], [atod.new_game(rng) for _ in range(8)], seed=5)


# --------------------------------------------------------------------------------------------------
# The equations


def test_schedule_at_the_steps_of_the_paper():
    values = {step: atod.annealed(step, horizon=80) for step in (0, 40, 80, 200)}
    assert values[0] == (1.0, 1.0)
    assert values[40] == pytest.approx((0.55, 1.5))
    assert values[80] == values[200] == pytest.approx((0.1, 2.0))
    # rho / kappa goes from 1 to 20.
    assert values[200][1] / values[200][0] == pytest.approx(20)
    # The arm without annealing has the averages over the annealing.
    average = torch.tensor([atod.annealed(step, horizon=1000) for step in range(1001)]).mean(0)
    assert average.tolist() == pytest.approx(atod.FIXED_WEIGHTS["constant"], abs=1e-6)


# The case study gives the extremes over the turns of one game: d from .019 to .228, h from .006 to
# .037.
CASE_D, CASE_H = (0.019, 0.228), (0.006, 0.037)


def case_weight(d: float, h: float) -> float:
    """The weight of a turn in a game with the extremes of the case study."""
    turns = torch.tensor([[*CASE_D, d], [*CASE_H, h]], dtype=torch.float64)
    return atod.tdur(*turns)[2].item()


def test_case_study():
    """Our sources give the weights .142 and .597, and not the d and h of their turns.

    Only one pair of three decimals gives .142.
    """
    grid = torch.tensor(list(product(range(19, 229), range(6, 38))), dtype=torch.float64)
    # The grid is a game of its own, and it contains the extremes.
    rounded = (1000 * atod.tdur(grid[:, 0] / 1000, grid[:, 1] / 1000)).round()
    pairs = {target: grid[rounded == target].int().tolist() for target in (142, 597)}
    assert pairs[142] == [[22, 10]]
    # 1 - (1 - .003/.209)(1 - .004/.031) by hand.
    assert case_weight(0.022, 0.010) == pytest.approx(1 - (206 / 209) * (27 / 31), abs=1e-12)
    assert [141, 7] in pairs[597]
    assert case_weight(0.141, 0.007) == pytest.approx(1 - (87 / 209) * (30 / 31), abs=1e-12)
    # The extremes themselves.
    assert case_weight(0.019, 0.006) == 0
    assert case_weight(0.228, 0.006) == case_weight(0.019, 0.037) == 1


def test_tdur_guards():
    x = torch.tensor
    # Fewer than 3 turns.
    assert atod.tdur(x([0.1, 5.0]), x([0.2, 3.0])).tolist() == [1, 1]
    assert atod.tdur(x([0.1]), x([0.2])).tolist() == [1]
    # Teacher and student agree in every turn, and just not any more.
    assert atod.tdur(x([0.0, 0.005, 0.0099]), x([0.1, 0.2, 0.3])).tolist() == [1, 1, 1]
    assert atod.tdur(x([0.0, 0.005, 0.0101]), x([0.1, 0.2, 0.3])).tolist() != [1, 1, 1]
    # Where all turns are equal, normalisation gives 0.5, and 1 - 0.5 * 0.5 = 0.75.
    assert atod.tdur(x([0.5] * 3), x([0.2] * 3)).tolist() == [0.75] * 3
    assert atod.tdur(x([0.5] * 3), x([0.0, 0.1, 0.2])).tolist() == pytest.approx([0.5, 0.75, 1.0])


def test_tdur_of_a_batch():
    """By hand: a game of 3 turns, 2, 1 and 1 tokens, with an observation, and one of 2 turns."""
    old = -torch.tensor([[1.0, 2.0, 9.0, 0.5, 3.0], [1.0, 1.0, 2.0, 2.0, 0.0]])
    teacher = -torch.tensor([[1.5, 2.5, 0.0, 0.5, 5.0], [4.0, 4.0, 0.0, 2.0, 0.0]])
    turns = torch.tensor([[0, 0, -1, 1, 2], [0, 0, -1, 1, -1]])
    # d = .5, 0, 2 and h = 1.5, .5, 3: normalised .25, 0, 1 and .4, 0, 1. w_0 = 1 - .75 * .6 = .55.
    expected = [[0.55, 0.55, 0, 0, 1], [1, 1, 0, 1, 0]]
    torch.testing.assert_close(atod.tdur_of_tokens(old, teacher, turns), torch.tensor(expected))


def test_short_games_weigh_1_and_long_ones_do_not(models, games):
    rollouts, turns, _ = games
    old, graded = (plain_logprobs(model, rollouts, 1.0).detach() for model in models)
    weights = atod.tdur_of_tokens(old, graded, turns)
    own = rollouts.senior_mask.bool()
    assert (weights[~own] == 0).all()
    assert not (weights[own] == 1).all()
    short = torch.where(turns < 2, turns, -1)
    assert (atod.tdur_of_tokens(old, graded, short)[short >= 0] == 1).all()


def test_hybrid_advantage_by_hand():
    delta, w = torch.tensor([[0.4, -1.0]]), torch.tensor([[0.5, 1.0]])
    found = atod.hybrid_advantages(delta, w, torch.tensor([-0.2]), *atod.annealed(60, 80))
    # The worked example of the docstring: the turn weight is on the teacher's term only.
    torch.testing.assert_close(found, torch.tensor([[-0.285, -0.675]]))


# --------------------------------------------------------------------------------------------------
# The gradients


def gradient(model, loss) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def hybrid_gradient(models, games, kappa: float, rho: float) -> torch.Tensor:
    """The gradient of the loss of `train`, for given kappa and rho, with T-DUR."""
    student, teacher = models
    rollouts, turns, _ = games
    rewards = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0], dtype=torch.float64)
    logprobs = completion_logprobs(student, rollouts, 1.0)
    old, graded = logprobs.detach(), completion_logprobs(teacher, rollouts, 1.0).detach()
    w = atod.tdur_of_tokens(old, graded, turns)
    advantages = group_advantages(rewards, 4)
    weights = atod.hybrid_advantages(graded - old, w, advantages, kappa, rho)
    return gradient(student, -(weights * rollouts.senior_mask * logprobs).sum())


def test_kappa_0_is_grpo_and_rho_0_is_opd(models, games):
    student, teacher = models
    rollouts, turns, _ = games
    logprobs, mask = plain_logprobs(student, rollouts, 1.0), rollouts.senior_mask
    # GRPO: sum_i A_i sum_t log pi, with (R - mean) / std of two groups of four: one with 2 of 4
    # rewards, one with none.
    a = 0.5 / ((1 / 3) ** 0.5 + 1e-6)
    advantages = torch.tensor([a, -a, -a, a, 0, 0, 0, 0], dtype=torch.float64)
    grpo = gradient(student, -(advantages[:, None] * mask * logprobs).sum())
    # OPD: sum_t w_k delta_t log pi.
    logprobs = plain_logprobs(student, rollouts, 1.0)
    delta = (plain_logprobs(teacher, rollouts, 1.0) - logprobs).detach()
    w = atod.tdur_of_tokens(logprobs.detach(), logprobs.detach() + delta, turns)
    opd = gradient(student, -(w * delta * mask * logprobs).sum())
    assert grpo.norm() > 1
    assert opd.norm() > 1
    for found, expected in (
        (hybrid_gradient(models, games, 0.0, 1.0), grpo),
        (hybrid_gradient(models, games, 1.0, 0.0), opd),
        (hybrid_gradient(models, games, 0.325, 1.75), 0.325 * opd + 1.75 * grpo),
    ):
        assert (found - expected).abs().max() < 1e-10 * expected.abs().max() + 1e-10


# Two turns of one token each over V = 3 words, with an observation between them that depends on the
# first: x -> (x * x) % 2.
V = 3


def tabular_paths(theta: torch.Tensor, phi: torch.Tensor):
    """All paths (a_1, observation, a_2): the actions' log-probabilities for student and teacher.

    Of shape (9, 2) each. theta, phi: logits of student and teacher, (1 + 2, V): before the first
    action, and after observation 0 or 1.
    """
    paths = torch.tensor(list(product(range(V), range(V))))  # (9, 2)
    first = paths[:, 0]
    states = torch.stack([torch.zeros_like(first), 1 + first**2 % 2], 1)  # (9, 2)
    return [table.log_softmax(-1)[states, paths] for table in (theta, phi)], states


def test_opd_follows_the_reverse_kl():
    """The expected update of OPD, over all paths, is the gradient of KL(student || teacher).

    That is the KL in the states that the student visits. The states themselves are held fixed: a
    token is not blamed for the divergence of later ones.
    """
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(3, V, dtype=torch.float64, generator=generator, requires_grad=True)
    phi = torch.randn(3, V, dtype=torch.float64, generator=generator)
    (student, teacher), states = tabular_paths(theta, phi)
    probability = student.sum(1).exp().detach()  # (9,)
    delta, ones = (teacher - student).detach(), torch.ones(9, 2, dtype=torch.float64)
    no_reward = torch.zeros(9, dtype=torch.float64)
    weights = atod.hybrid_advantages(delta, ones, no_reward, kappa=1.0, rho=0.0)
    loss = -(probability[:, None] * weights * student).sum()
    (estimate,) = torch.autograd.grad(loss, theta)

    # The definition: KL at each state, times the probability of visiting it, which is held fixed.
    (student, _), states = tabular_paths(theta, phi)
    of_states = probability[:, None].expand(9, 2)
    visits = torch.zeros(3, dtype=torch.float64)
    visits.index_put_((states,), of_states, accumulate=True)
    assert visits.tolist() == pytest.approx([1, visits[1].item(), 1 - visits[1].item()])
    kl = (theta.softmax(-1) * (theta.log_softmax(-1) - phi.log_softmax(-1))).sum(-1)  # (3,)
    (exact,) = torch.autograd.grad((visits * kl).sum(), theta, retain_graph=True)
    assert exact.norm() > 0.1
    assert (exact - estimate).abs().max() < 1e-10
    # It is not the gradient of the KL divergence of whole games, in which the first action also
    # answers for where it leads.
    p = theta.softmax(-1)
    visits = torch.stack([torch.ones((), dtype=torch.float64), p[0, 0] + p[0, 2], p[0, 1]])
    (whole,) = torch.autograd.grad((visits * kl).sum(), theta)
    assert (whole - exact).abs().max() > 1e-3


# --------------------------------------------------------------------------------------------------
# The game and its rollouts


def test_the_game_of_the_module():
    game = atod.Game("key", "desk", {"key": "box", "cup": "shelf", "book": "box"})
    actions = [("go", "shelf"), ("go", "box"), ("take", "key"), ("go", "desk"), ("put", "key")]
    observations = ["cup", "key book", "taken", "empty", "done"]
    assert [game.step(action) for action in actions] == observations
    assert game.won
    assert game.over


def test_actions_that_make_no_sense_change_nothing():
    game = atod.Game("key", "desk", {"key": "box", "cup": "desk", "book": "box"})
    before = copy.deepcopy(game)
    nonsense = [("take", "key"), ("put", ""), ("put", "key"), ("go", "key")]
    nonsense += [(), ("box", "go"), ("go",)]
    assert [game.step(action) for action in nonsense] == ["nothing"] * 7
    assert replace(game, turns=0) == before
    # An item that is not the task's, or not at the target, does not win; 8 turns end the game.
    game = atod.Game("key", "desk", {"key": "box", "cup": "desk", "book": "box"}, turns=3)
    for action in [("go", "desk"), ("take", "cup"), ("put", "cup"), ("go", "box"), ("take", "key")]:
        game.step(action)
    assert game.over
    assert not game.won


def test_the_expert_always_wins_in_6_turns():
    rng = random.Random(0)
    for _ in range(300):
        game = atod.new_game(rng)
        while not game.over:
            game.step(atod.expert(game, rng))
        assert game.won
        assert game.turns <= 6


def test_rollouts_of_games(models, games):
    rollouts, turns, rewards = games
    own = rollouts.senior_mask.bool()
    assert ((turns >= 0) == own).all()
    # Its own tokens were sampled by the student after the whole game so far.
    logprobs, generator = full_logprobs(models[0], rollouts, 1.0), torch.Generator().manual_seed(5)
    for k in range(atod.MAX_TURNS):
        running = [i for i in range(8) if (turns[i] == k).any()]
        noise = torch.rand(2, atod.ACTION_TOKENS, len(running), generator=generator)[0].T
        for i, numbers in zip(running, noise):
            of_turn = turns[i] == k
            numbers = numbers[: of_turn.sum()]
            again = sample(logprobs[i][of_turn], numbers, temperature=1.0)
            assert again.tolist() == rollouts.completion_ids[i][of_turn].tolist()
    # Playing the recorded actions again gives the recorded observations and rewards.
    rng = random.Random(3)
    for i in range(8):
        game = atod.new_game(rng)
        text = ["task", game.item, game.target, ">"]
        for k in range(int(turns[i].max()) + 1):
            tokens = rollouts.completion_ids[i][turns[i] == k].tolist()
            action = [atod.WORDS[token] for token in tokens]
            text += [*action, *f"{game.step(tuple(action))} >".split()]
        assert game.over
        real = rollouts.prompt_ids.shape[1] + int(rollouts.completion_mask[i].sum())
        # After the last action there is no observation.
        assert rollouts.texts[i].split() == text[:real]
        assert len(rollouts.texts[i].split()) == real
        assert game.won == rewards[i]


def test_the_opener_is_not_trained_on(models):
    rng = random.Random(3)
    new, opening = [atod.new_game(rng) for _ in range(4)], dict(opener=models[1], opening_turns=3)
    rollouts, turns, _ = atod.play(models[0], new, 5, **opening)
    assert turns[turns >= 0].min() == 3
    assert ((turns >= 0) == rollouts.senior_mask.bool()).all()


def test_same_seed_same_games(models):
    def text(seed):
        rng = random.Random(1)
        return atod.play(models[0], [atod.new_game(rng) for _ in range(4)], seed)[0].texts

    assert text(1) == text(1)
    assert text(1) != text(2)


# --------------------------------------------------------------------------------------------------
# Training and files


@pytest.mark.parametrize("name", ["grpo", "opd", "atod"])
def test_the_update_of_train(name, models, monkeypatch):
    """The gradient of an update: -sum_t A_t log pi(a_t) per token of the student."""
    student, teacher = models
    played, gradients = [], []

    def play(*args, original=atod.play, **options):
        rollouts, turns, rewards = original(*args, **options)
        # Random students hardly ever win, so every second game of the batch is rewarded instead.
        played.append((rollouts, turns, torch.arange(len(rewards)).remainder(2).double()))
        return played[-1]

    def keep_gradients(parameters, _):
        gradients.extend(x.grad.flatten() for x in parameters)

    monkeypatch.setattr(atod, "SETTINGS", settings(**TINY))
    monkeypatch.setattr(atod, "play", play)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", keep_gradients)
    before = copy.deepcopy(student)
    options = dict(updates=1, lr=1e-3, test=lambda: 0.0, test_every=1, label="")
    atod.train(student, teacher.requires_grad_(False), atod.ARMS[name], 0, **options)
    ((rollouts, turns, rewards),) = played
    own, logprobs = turns >= 0, plain_logprobs(before, rollouts, 1.0)
    delta = (plain_logprobs(teacher, rollouts, 1.0) - logprobs).detach()
    # Groups of four with two rewards each. At the first step kappa and rho are 1.
    advantages = (rewards - 0.5) / ((1 / 3) ** 0.5 + 1e-6)
    old, A = logprobs.detach(), advantages[:, None]
    w = atod.tdur_of_tokens(old, old + delta, turns) if name == "atod" else 1.0
    weights = {"grpo": A, "opd": delta, "atod": w * delta + A}[name]
    expected = gradient(before, -(weights * logprobs)[own].sum() / own.sum())
    found = torch.cat(gradients)
    assert expected.abs().max() > 1e-2
    assert (found - expected).abs().max() < 1e-10
    # And the step was taken.
    assert any((x != y).any() for x, y in zip(student.parameters(), before.parameters()))


def test_training_follows_the_teacher(monkeypatch):
    """A few updates of OPD halve the divergence from a teacher near the student."""
    monkeypatch.setattr(atod, "SETTINGS", settings(**TINY | {"tasks": 4}))
    student, teacher = atod.make_model(16, seed=0), atod.make_model(16, seed=0)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        change = torch.randn(len(atod.WORDS), 16, generator=generator)
        teacher.get_input_embeddings().weight.add_(0.3 * change)
    options = dict(updates=16, lr=1e-2, test=lambda: 0.0, test_every=4, label="test")
    rows = atod.train(student, teacher.requires_grad_(False), atod.Arm("teacher"), 0, **options)
    assert rows[-1]["gap"] < 0.5 * rows[1]["gap"]


def test_a_frozen_teacher_stays_and_training_stops_at_success(monkeypatch):
    monkeypatch.setattr(atod, "SETTINGS", settings(**TINY))
    student, teacher = atod.make_model(16, seed=0), atod.make_model(24, seed=1)
    before = copy.deepcopy(teacher.state_dict())
    scores = iter([0.0, 0.1, 0.9])
    options = dict(updates=6, lr=1e-2, test=lambda: next(scores), test_every=2, stop_at=0.7)
    rows = atod.train(student, teacher, atod.ARMS["atod"], 0, label="test", **options)
    assert [row["update"] for row in rows] == [0, 2, 4]
    assert all((before[name] == value).all() for name, value in teacher.state_dict().items())


@pytest.fixture
def quick(monkeypatch):
    """A run of seconds: untrained models instead of warmed-up ones."""
    names = {"early": 16, "skilled": 16, "teacher": 24, "states-teacher": 24}
    starts = "", " after early", " after skilled"
    measures = {name + start: 0.5 for name in (*names, "expert") for start in starts}
    made = []

    def make_models(seed):
        made.append(seed)
        made_now = {name: atod.make_model(width, seed) for name, width in names.items()}
        states = {name: model.state_dict() for name, model in made_now.items()}
        return states, measures | {"seed": seed}

    monkeypatch.setattr(atod, "SETTINGS", settings(**TINY))
    monkeypatch.setattr(atod, "make_models", make_models)
    return made


def test_run_resume_and_refusal(quick, monkeypatch, tmp_path, capsys):
    out = str(tmp_path)
    arms = ["atod", "early-opd"]
    atod.main(["--seeds", "2", "--out", out, "--arms", *arms])
    table = capsys.readouterr().out
    lines = [line for line in table.splitlines() if line.startswith(("| atod", "| early-opd"))]
    assert [line.split(" | ")[0][2:] for line in lines] == ["atod", "early-opd", "atod − teacher"]
    assert quick == [0, 1]
    assert (tmp_path / "table.md").read_text() + "\n" == table
    assert (tmp_path / "atod.png").stat().st_size > 5000
    lines = (tmp_path / "early-opd" / "seed-1.jsonl").read_text().splitlines()
    head, *rows = map(json.loads, lines)
    assert (head["arm"], head["seed"], head["settings"]["tasks"]) == ("early-opd", 1, 2)
    assert [row["update"] for row in rows] == [0, 2, 4]
    assert len(rows[-1]["samples"]) == 6

    # An interrupted run has all files but one. Only that one is made again, with the same content,
    # from the kept models.
    path = tmp_path / "atod" / "seed-1.jsonl"
    before, other = path.read_text().splitlines()[1:], tmp_path / "early-opd" / "seed-0.jsonl"
    path.unlink()
    stamp = other.stat().st_mtime_ns
    atod.main(["--seeds", "2", "--out", out, "--arms", *arms])
    assert path.read_text().splitlines()[1:] == before
    assert other.stat().st_mtime_ns == stamp
    assert quick == [0, 1]

    # A damaged file is named, and so are other settings.
    path.write_text("{")
    with pytest.raises(SystemExit, match=r"seed-1.jsonl cannot be read .*remove it"):
        atod.main(["--seeds", "2", "--out", out, "--arms", "atod"])
    monkeypatch.setattr(atod, "SETTINGS", settings(**TINY, lr=0.5))
    changed = r" was made with lr = 0.001 instead of 0.5: choose another --out"
    with pytest.raises(SystemExit, match=r"config.json" + changed):
        atod.main(["--out", out])
    # So are those of a single file of an arm.
    (tmp_path / "config.json").unlink()
    with pytest.raises(SystemExit, match=r"atod/seed-0.jsonl" + changed):
        atod.main(["--out", out, "--arms", "early-opd"])


def test_a_model_that_does_not_learn_in_time(monkeypatch):
    monkeypatch.setattr(atod, "SETTINGS", settings(**TINY, demo_max_steps=2))
    never = dict(noise=0.0, lr=1e-3, test_every=1, done=lambda share: False, label="teacher")
    with pytest.raises(atod.NotLearned, match="seed 3 is left out: its teacher .* in 2 steps"):
        atod.imitate(atod.make_model(16, seed=0), 3, **never)


def test_a_seed_that_cannot_be_warmed_up_is_left_out(quick, monkeypatch, tmp_path, capsys):
    make_models = atod.make_models

    def fails_for_seed_1(seed):
        if seed == 1:
            raise atod.NotLearned("seed 1 is left out")
        return make_models(seed)

    monkeypatch.setattr(atod, "make_models", fails_for_seed_1)
    with pytest.raises(SystemExit, match="seed 1 is left out"):
        atod.main(["--seed", "1", "--out", str(tmp_path), "--arms", "grpo"])
    # The other seeds are run and reported all the same.
    with pytest.raises(SystemExit, match="seed 1 is left out"):
        atod.main(["--seeds", "3", "--out", str(tmp_path), "--arms", "grpo"])
    assert "| grpo | 2 |" in capsys.readouterr().out
    assert atod.seeds_in(tmp_path) == [0, 2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "0"], "--seeds: 0: must be from 1 to 10"),
        (["--seeds", "two"], "--seeds: invalid int value: 'two'"),
        (["--seed", "-1"], "--seed: -1: must be from 0 to 100000"),
        (["--arms", "ppo"], "--arms: invalid choice: 'ppo' (choose from"),
        (["--seed", "1", "--seeds", "2"], "not allowed with argument --seed"),
    ],
)
def test_bad_flags(flags, message, capsys):
    with pytest.raises(SystemExit):
        atod.main(flags)
    assert message in capsys.readouterr().err


def test_no_lesson_file_imports_a_companion():
    root = Path(atod.__file__).parents[1]
    for path in [*root.glob("*.py"), *root.glob("lab/*.py")]:
        assert "companions" not in path.read_text(encoding="utf-8"), path


def test_a_committed_table_is_that_of_its_files():
    folder = Path(atod.__file__).parents[1] / "results" / "companions" / "atod"
    if not folder.is_dir():
        pytest.skip("no results yet")
    assert (folder / "table.md").read_text() == atod.table(folder, atod.seeds_in(folder))
