"""The study: arms and objectives are as stated, what is kept is what it makes, and it resumes."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from inspect import signature
from pathlib import Path
from statistics import mean

import pytest

import toy
import train_small as ts
from papo import papo_loss
from study import compare, reproduce


def test_every_arm_parses_and_is_compared_with_an_arm_of_its_seeds():
    seen = {}
    for name, (seeds, baselines, flags) in reproduce.ARMS.items():
        config, run = ts.parse_args(flags.split())
        assert all(seeds <= reproduce.ARMS[base][0] for base in baselines.split()), name
        own = repr(reproduce.own_objective(name)), name.startswith("choose-")
        same = seen.setdefault((repr(config), repr(run), own), name)
        assert same == name, f"{name} is {same} to the bit"


def test_what_is_kept_is_what_the_study_makes(tmp_path):
    study = Path(reproduce.__file__).parent
    runs = reproduce.load_runs(study / "runs")
    assert runs.keys() >= reproduce.ARMS.keys() - compare.ARMS.keys()
    for arm, by_seed in runs.items():  # the comparison has arms, and seeds, that are not run yet
        wanted = list(range(reproduce.ARMS[arm][0]))
        assert list(by_seed) == wanted[: len(by_seed)] if arm in compare.ARMS else wanted
    reproduce.write_table(runs, tmp_path / "arms.csv")
    reproduce.write_texts(runs, tmp_path / "texts.md")
    for made in tmp_path.iterdir():
        assert made.read_bytes() == (study / made.name).read_bytes(), made.name
    elsewhere = {"idea", "curves", "trl"}  # a run's own pictures, and test_trl.py's
    assert reproduce.draw(runs).keys() | elsewhere == {path.stem for path in study.glob("*.png")}


def test_the_study_runs_resumes_and_stops_at_a_failure(tmp_path, monkeypatch, capsys):
    """One arm of two steps, on the objective of its name; a second call repeats nothing."""
    used, flags = set(), "--steps=2 --prompts_per_batch=2 --updates_per_batch=1 --max_new_tokens=4"

    def objective(*args, progress, **rest):
        used.add(progress)
        return papo_loss(*args, **rest)

    changes = dict(
        ARMS={"vppo": (1, "vppo", flags), "broken": (1, "vppo", "--gamma=-1")},
        WARM_START=toy.WarmStart((), clean_steps=1, guess_steps=1, batch_size=4),
        QUESTIONS=3,
        OBJECTIVES={"vppo": objective},
        ProcessPoolExecutor=lambda workers, _: ThreadPoolExecutor(1),
    )
    for change in changes.items():
        monkeypatch.setattr(reproduce, *change)
    monkeypatch.setenv("PAPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    go = lambda only: reproduce.main(["--out", str(tmp_path), "--only", only])
    with pytest.raises(SystemExit):
        go("nosuch")
    assert "no arm of that name" in capsys.readouterr().err
    with pytest.raises(ts.UserError, match="gamma must lie in"):
        go("broken")
    assert not list((tmp_path / "runs").iterdir()) and not (tmp_path / "arms.csv").exists()
    go("vppo")
    [made] = (tmp_path / "runs").iterdir()
    when, lines = made.stat().st_mtime_ns, reproduce.load_runs(made.parent)["vppo"][0]
    assert used == {0.5, 1} and 0 <= lines[2]["eval_grounding"] <= 1
    assert [len(line.get("texts", ())) for line in lines] == [3, 0, 3]
    assert (tmp_path / "arms.csv").read_text().count("\n") == 1 + 3 * 11  # steps 0, 2, "run"
    go("vppo")
    assert made.stat().st_mtime_ns == when


def test_the_comparison_is_printed_from_the_runs():
    """What methods.md shows, and a cell of it by hand."""
    study = Path(reproduce.__file__).parent
    runs = reproduce.load_runs(study / "runs")
    printed = compare.table(runs)
    assert (study / "methods.md").read_text() == printed + "\n"
    final = lambda arm, seed: 100 * runs[arm][seed][-1]["eval_accuracy"]
    gain = mean(final("vppo", seed) - final("dapo", seed) for seed in runs["vppo"])
    rows = [line.split(" | ") for line in printed.split("\n") if line.startswith("| VPPO |")]
    cells = rows[0]  # then the ladder's
    assert cells[1] == str(len(runs["vppo"])) and cells[4].startswith(f"{gain:+.1f} ±")


def test_a_chosen_weight_is_the_best_of_its_ladder():
    """Over the run, on the validation digits, by hand; where it is the authors', it has no arm."""
    runs, climbed = reproduce.load_runs(Path(reproduce.__file__).parent / "runs"), 0
    for method, weights in compare.LADDERS.items():
        if compare.best_weight(runs, method):
            tried = {w: runs[f"choose-{method}@{w}"].values() for w in weights}
            level = lambda lines: sum(line.get("eval_accuracy", 0) for line in lines[1:])
            best = max(tried, key=lambda w: sum(map(level, tried[w])))
            published = signature(reproduce.own_objective(method)).parameters["weight"].default
            assert compare.CHOSEN.get(method, published) == best, method
            climbed += 1
    assert climbed >= len(compare.CHOSEN) > 0


def test_gains_at_the_same_processor_time():
    """A straight climb from 0 to 80 % in 40 steps; one twice as fast, which then stands still, is
    level where its step costs twice as much. At a cost of 4 it has half of the other's gain."""
    line = lambda step, level: {"step": step, "eval_accuracy": level}
    slow = [line(step, step / 50) for step in range(0, 41, 10)]
    fast = [line(step, min(step / 25, 0.8)) for step in range(0, 41, 10)]
    runs = {"slow": {0: slow, 1: slow}, "fast": {0: fast, 1: fast}}
    at = lambda cost: compare.gains(runs, "fast", "slow", "time", cost=cost)
    mean_of_slow = 100 * mean(step / 50 for step in range(1, 41))
    assert at(2) == pytest.approx([0, 0], abs=1e-9)
    assert at(4) == pytest.approx([-mean_of_slow / 2] * 2)
    assert compare.break_even(runs, "fast", "slow") == pytest.approx((2, 2, 2), abs=1e-3)
    assert compare.break_even(runs, "slow", "fast") == pytest.approx((0.5, 0.5, 0.5), abs=1e-3)
    # A third run, level at 1 on one seed and at 2 on the other: in the middle, with room around it.
    runs["between"] = {0: fast, 1: slow}
    level, low, high = compare.break_even(runs, "between", "slow")
    assert low < 1 < level < 2 < high


def test_a_cost_is_relative_to_dapo_in_its_world(tmp_path, monkeypatch):
    """By a clock that runs faster and faster: it reads 0, 1, 4, 9 and so on, twice in each step."""
    small = "--algorithm=dapo --max_redraws=0 --prompts_per_batch=2 --updates_per_batch=1"
    arms = dict.fromkeys(("dapo", "pgpo"), f"{small} --max_new_tokens=4")
    arms |= {f"largest-{arm}": f"{line} --task=largest" for arm, line in arms.items()}
    ticks = (n**2 for n in itertools.count())
    recipe = toy.WarmStart((), clean_steps=1, guess_steps=1, batch_size=4)
    monkeypatch.setenv("PAPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compare, "NAMES", {"dapo": "", "pgpo": ""})
    monkeypatch.setattr(reproduce, "ARMS", {arm: (1, "", line) for arm, line in arms.items()})
    monkeypatch.setattr(reproduce, "WARM_START", recipe)
    monkeypatch.setattr(compare.time, "process_time", lambda: next(ticks))
    costs = compare.step_costs(seed=0, steps=1)
    # 1 - 0, 9 - 4; then 25 - 16, 49 - 36
    assert costs == {"dapo": 1, "pgpo": 5, "largest-dapo": 1, "largest-pgpo": round(13 / 9, 3)}


def test_holms_correction():
    """Of four at 5 %: against 1/80, 1/60, 1/40 and 1/20; after the first that fails, none."""
    holm = lambda *values: sorted(compare.holm(dict(enumerate(values))))
    assert holm(0.016, 0.03, 0.04, 0.012) == [0, 3] and holm(0.02, 0.02, 0.02, 0.02) == []
    assert holm(0.016, 0.024, 0.04, 0.012) == [0, 1, 2, 3]
