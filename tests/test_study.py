"""The study: its arms are what their names say, its own objectives are right, what is kept is what it makes, and it
runs and resumes."""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import toy
import train_small as ts
from papo import PAPOConfig, papo_loss
from study import methods, reproduce

STUDY = Path(reproduce.__file__).parent


def vppo_by_hand(logps, old_logps, advantages, lengths, masked_logps, clip_low, clip_high):
    """The objective of arXiv 2510.09285 in plain numbers, token by token."""
    dependency = []
    for i, n in enumerate(lengths):
        x = [math.exp(masked_logps[i][t] - logps[i][t]) for t in range(n)]
        dependency.append([a - math.log(a) - 1 for a in x])
    means = [sum(d) / len(d) for d in dependency]
    spread = sum(m - min(means) for m in means) / len(means)
    total = 0.0
    for i, n in enumerate(lengths):
        factor = 0.9 + 0.1 * (means[i] - min(means)) / spread
        kept = sorted(range(n), key=lambda t: -dependency[i][t])[: math.ceil(0.4 * n)]
        for t in range(n):
            if t in kept:
                ratio, A = math.exp(logps[i][t] - old_logps[i][t]), advantages[i] * factor
                total -= min(ratio * A, min(max(ratio, 1 - clip_low), 1 + clip_high) * A)
            total -= 0.06 * logps[i][t]
    return total / sum(lengths)


def random_logps(count, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: -3 * torch.rand(*shape, generator=generator, dtype=torch.float64)
    return [draw() for _ in range(count)]  # (B, T) each


def test_vppo_is_its_papers_objective():
    logps, old, masked = random_logps(3, 4, 7)
    old = logps + 0.3 * (old - old.mean())  # (B, T) ratios on both sides of the clip
    advantages, lengths = torch.tensor([1.2, -0.4, 0.3, -1.1], dtype=torch.float64), [7, 3, 5, 1]
    mask = torch.tensor([[float(t < n) for t in range(7)] for n in lengths])  # (B, T)
    config = PAPOConfig(aggregation="token", clip_high=0.28, clip_dual=math.inf)
    given = [x.tolist() for x in (logps, old, advantages)]
    wanted = pytest.approx(vppo_by_hand(*given, lengths, masked.tolist(), 0.2, 0.28), rel=1e-5)
    for padding in (0.0, 5.0):  # what stands there counts nowhere
        fill = lambda x, value, padding=padding: x.masked_fill(mask == 0, value * padding)
        given = fill(logps, 1), fill(old, -1), advantages, mask, fill(masked, 2)
        loss, metrics = methods.vppo_loss(config, *given, ref_logps=None)
        assert loss.item() == wanted and metrics["loss"] == wanted


def test_the_push_asks_nothing_of_the_image():
    """GRPO's loss minus gamma times the mean log pi of the responses with A > 0, padding aside."""
    logps, masked, ref = random_logps(3, 3, 4)
    advantages, lengths = torch.tensor([1.2, -0.7, 0.5], dtype=torch.float64), [4, 3, 2]
    mask = torch.tensor([[float(t < n) for t in range(4)] for n in lengths])  # (B, T)
    given = dict(old_logps=logps, advantages=advantages, response_mask=mask, ref_logps=ref)
    grpo, _ = papo_loss(PAPOConfig(gamma=0.0), logps, **given)
    wanted = grpo - 10 * sum(logps[i, : lengths[i]].mean() for i in (0, 2)) / 3
    for other in (masked, logps):
        loss, _ = methods.push_loss(PAPOConfig(gamma=10.0), logps, masked_logps=other, **given)
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-9)


def test_every_arm_parses_and_is_compared_with_an_arm_of_its_seeds():
    seen = {}
    for name, (seeds, baselines, flags) in reproduce.ARMS.items():
        config, run = ts.parse_args(flags.split())
        assert all(seeds <= reproduce.ARMS[base][0] for base in baselines.split()), name
        run.out = None
        same = seen.setdefault((repr(config), repr(run), name in methods.OBJECTIVES), name)
        assert same == name, f"{name} is {same} to the bit"


def test_what_is_kept_is_what_the_study_makes(tmp_path):
    """All runs are there; tables and texts come out to the byte, and a picture for each of the README's."""
    runs = reproduce.load_runs(STUDY / "runs")
    seeds = {arm: list(range(count)) for arm, (count, *_) in reproduce.ARMS.items()}
    assert {arm: list(by_seed) for arm, by_seed in runs.items()} == seeds
    reproduce.write_table(runs, tmp_path / "arms.csv")
    reproduce.write_texts(runs, tmp_path / "texts.md")
    for made in tmp_path.iterdir():
        assert made.read_bytes() == (STUDY / made.name).read_bytes(), made.name
    elsewhere = {"idea", "curves", "trl"}  # a run's own pictures, and test_trl.py's
    assert reproduce.draw(runs).keys() | elsewhere == {path.stem for path in STUDY.glob("*.png")}


def test_the_study_runs_resumes_and_stops_at_a_failure(tmp_path, monkeypatch, capsys):
    """One arm of two steps, on the objective of its name; a second call repeats nothing."""
    monkeypatch.setenv("PAPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr(reproduce, "ProcessPoolExecutor", lambda workers, _: ThreadPoolExecutor(1))
    tiny = toy.WarmStart(short_stages=(), clean_steps=1, guess_steps=1, batch_size=4)
    monkeypatch.setattr(reproduce, "WARM_START", tiny)
    monkeypatch.setattr(reproduce, "QUESTIONS", 3)
    flags = (
        "--steps=2 --prompts_per_batch=2 --updates_per_batch=1 --group_size=2 --max_new_tokens=4"
    )
    arms = {"vppo": (1, "vppo", flags), "broken": (1, "vppo", "--gamma=-1")}
    monkeypatch.setattr(reproduce, "ARMS", arms)
    used = []
    spy = lambda config, *args, **rest: used.append(config) or papo_loss(config, *args, **rest)
    monkeypatch.setitem(reproduce.OBJECTIVES, "vppo", spy)
    go = lambda only: reproduce.main(["--out", str(tmp_path), "--only", only])
    with pytest.raises(SystemExit):
        go("nosuch")
    assert "no arm of that name" in capsys.readouterr().err and not (tmp_path / "arms.csv").exists()
    with pytest.raises(ts.UserError, match="gamma must lie in"):
        go("broken")
    assert not list((tmp_path / "runs").iterdir())
    go("vppo")
    [made] = (tmp_path / "runs").iterdir()
    when, lines = made.stat().st_mtime_ns, reproduce.load_runs(tmp_path / "runs")["vppo"][0]
    assert len(used) >= 2 and [line["step"] for line in lines] == [0, 1, 2]
    assert [len(line.get("texts", ())) for line in lines] == [3, 0, 3]
    assert (tmp_path / "arms.csv").read_text().count("\n") == 1 + 3 * 11  # steps 0, 2, "run"
    assert "vppo, seed 0" in (tmp_path / "texts.md").read_text()
    go("vppo")
    assert made.stat().st_mtime_ns == when
