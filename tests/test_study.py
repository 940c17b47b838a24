"""The study: arms and objectives are as stated, what is kept is what it makes, and it resumes."""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

import pytest
import torch

import toy
import train_small as ts
from papo import PAPOConfig, papo_loss
from study import methods, reproduce


def random_batch(advantages, lengths):
    """Log-probs of pi, pi_mask and another policy (B, T); advantages (B,), response mask (B, T)."""
    generator, (B, T) = torch.Generator().manual_seed(0), (len(lengths), max(lengths))
    draw = lambda: -3 * torch.rand(B, T, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[float(t < n) for t in range(T)] for n in lengths])
    return draw(), draw(), draw(), torch.tensor(advantages, dtype=torch.float64), mask


def test_vppo_is_its_papers_objective():
    """The objective of arXiv 2510.09285 in plain numbers, token by token."""
    lengths = [7, 3, 5, 1]
    logps, masked, old, advantages, mask = random_batch([1.2, -0.4, 0.3, -1.1], lengths)
    old = logps + 0.3 * (old - old.mean())  # (B, T) ratios on both sides of the clip
    x, ratios = (masked - logps).exp().tolist(), (logps - old).exp().tolist()
    owed = [[a - math.log(a) - 1 for a in x[i][:n]] for i, n in enumerate(lengths)]
    means, total = list(map(mean, owed)), 0.0
    for i, n in enumerate(lengths):
        above = (means[i] - min(means)) / mean(m - min(means) for m in means)
        A = advantages[i].item() * (0.9 + 0.1 * above)
        for t in sorted(range(n), key=lambda t: -owed[i][t])[: math.ceil(0.4 * n)]:
            total -= min(ratios[i][t] * A, min(max(ratios[i][t], 0.8), 1.28) * A)
        total -= 0.06 * logps[i, :n].sum().item()
    config = PAPOConfig(aggregation="token", clip_high=0.28, clip_dual=math.inf)
    for k in (0.0, 5.0):  # what stands in the padding counts nowhere
        fill = lambda x, y: x + y * k * (1 - mask)
        given = config, fill(logps, 1), fill(old, -1), advantages, mask, fill(masked, 2)
        loss, metrics = methods.vppo_loss(*given, ref_logps=None)
        assert [loss.item(), metrics["loss"]] == pytest.approx([total / sum(lengths)] * 2, rel=1e-5)


def test_the_push_asks_nothing_of_the_image():
    """GRPO's loss minus gamma times the mean log pi of the responses with A > 0, padding aside."""
    logps, masked, ref, advantages, mask = random_batch([1.2, -0.7, 0.5], [4, 3, 2])
    given = dict(old_logps=logps, advantages=advantages, response_mask=mask, ref_logps=ref)
    grpo, _ = papo_loss(PAPOConfig(gamma=0.0), logps, **given)
    wanted = grpo - 10 * (logps[0].mean() + logps[2, :2].mean()) / 3
    for other in (masked, logps):
        loss, _ = methods.push_loss(PAPOConfig(gamma=10.0), logps, masked_logps=other, **given)
        torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=0)


def test_every_arm_parses_and_is_compared_with_an_arm_of_its_seeds():
    seen = {}
    for name, (seeds, baselines, flags) in reproduce.ARMS.items():
        config, run = ts.parse_args(flags.split())
        assert all(seeds <= reproduce.ARMS[base][0] for base in baselines.split()), name
        same = seen.setdefault((repr(config), repr(run), name in methods.OBJECTIVES), name)
        assert same == name, f"{name} is {same} to the bit"


def test_what_is_kept_is_what_the_study_makes(tmp_path):
    study = Path(reproduce.__file__).parent
    runs = reproduce.load_runs(study / "runs")
    kept = {arm: list(by_seed) for arm, by_seed in runs.items()}
    assert kept == {arm: list(range(count)) for arm, (count, *_) in reproduce.ARMS.items()}
    reproduce.write_table(runs, tmp_path / "arms.csv")
    reproduce.write_texts(runs, tmp_path / "texts.md")
    for made in tmp_path.iterdir():
        assert made.read_bytes() == (study / made.name).read_bytes(), made.name
    elsewhere = {"idea", "curves", "trl"}  # a run's own pictures, and test_trl.py's
    assert reproduce.draw(runs).keys() | elsewhere == {path.stem for path in study.glob("*.png")}


def test_the_study_runs_resumes_and_stops_at_a_failure(tmp_path, monkeypatch, capsys):
    """One arm of two steps, on the objective of its name; a second call repeats nothing."""
    used, flags = [], "--steps=2 --prompts_per_batch=2 --updates_per_batch=1 --max_new_tokens=4"
    changes = dict(
        ARMS={"vppo": (1, "vppo", flags), "broken": (1, "vppo", "--gamma=-1")},
        WARM_START=toy.WarmStart((), clean_steps=1, guess_steps=1, batch_size=4),
        QUESTIONS=3,
        OBJECTIVES={"vppo": lambda *args, **rest: used.append(args) or papo_loss(*args, **rest)},
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
    assert used and [len(line.get("texts", ())) for line in lines] == [3, 0, 3]
    assert (tmp_path / "arms.csv").read_text().count("\n") == 1 + 3 * 11  # steps 0, 2, "run"
    go("vppo")
    assert made.stat().st_mtime_ns == when
