"""The study: its arms are what their names say, VPPO's objective is its paper's, and a study runs and resumes."""

import math

import pytest
import torch

import reproduce
import train_small as ts
from papo import PAPOConfig, papo_loss


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


def test_vppo_is_its_papers_objective():
    generator = torch.Generator().manual_seed(0)
    logps, old, masked = (
        -3 * torch.rand(4, 7, generator=generator, dtype=torch.float64) for _ in range(3)
    )  # (B, T)
    old = logps + 0.3 * (old - old.mean())  # (B, T) ratios on both sides of the clip
    advantages, lengths = torch.tensor([1.2, -0.4, 0.3, -1.1], dtype=torch.float64), [7, 3, 5, 1]
    mask = torch.tensor([[float(t < n) for t in range(7)] for n in lengths])  # (B, T)
    config = PAPOConfig(aggregation="token", clip_high=0.28, clip_dual=math.inf)
    wanted = vppo_by_hand(
        logps.tolist(), old.tolist(), advantages.tolist(), lengths, masked.tolist(), 0.2, 0.28
    )
    for padding in (0.0, 5.0):  # what stands there counts nowhere
        filled = [x.masked_fill(mask == 0, padding * k) for k, x in ((1, logps), (-1, old), (2, masked))]
        loss, metrics = reproduce.vppo_loss(
            config, filled[0], filled[1], advantages, mask, filled[2], ref_logps=None
        )
        assert loss.item() == pytest.approx(wanted, rel=1e-5) and metrics["loss"] == pytest.approx(
            wanted, rel=1e-5
        )


def test_the_push_asks_nothing_of_the_image():
    """GRPO's loss minus gamma times the mean log pi of the responses with A > 0, padding aside."""
    generator = torch.Generator().manual_seed(0)
    logps, masked, ref = (-3 * torch.rand(3, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    advantages, lengths = torch.tensor([1.2, -0.7, 0.5], dtype=torch.float64), [4, 3, 2]
    mask = torch.tensor([[float(t < n) for t in range(4)] for n in lengths])  # (B, T)
    given = dict(old_logps=logps, advantages=advantages, response_mask=mask, ref_logps=ref)
    grpo, _ = papo_loss(PAPOConfig(gamma=0.0), logps, **given)
    wanted = grpo - 10 * sum(logps[i, : lengths[i]].mean() for i in (0, 2)) / 3
    for other in (masked, logps):
        loss, _ = reproduce.push_loss(PAPOConfig(gamma=10.0), logps, masked_logps=other, **given)
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-9)


def test_every_arm_parses_and_is_compared_with_an_arm_of_its_seeds():
    seen = {}
    for name, (seeds, baselines, flags) in reproduce.ARMS.items():
        config, run = ts.parse_args([f"--{flag}={value}" for flag, value in flags.items()])
        assert all(set(seeds) <= set(reproduce.ARMS[base][0]) for base in baselines.split()), name
        run.out = None
        same = seen.setdefault((repr(config), repr(run), name in reproduce.OBJECTIVES), name)
        assert same == name, f"{name} is {same} to the bit"


def test_the_study_runs_and_resumes(tmp_path):
    """reproduce.py --quick: two arms, two seeds; a second call repeats nothing."""
    reproduce.main(["--quick", "--out", str(tmp_path), "--workers", "2"])
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert len(made) == 4 and (tmp_path / "arms.csv").read_text().count("\n") == 1 + 2 * 3 * 11
    assert (tmp_path / "main.png").exists() and "grpo" in (tmp_path / "texts.md").read_text()
    reproduce.main(["--quick", "--out", str(tmp_path), "--workers", "2"])
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}


def test_no_run_no_tables(tmp_path, capsys):
    with pytest.raises(SystemExit):
        reproduce.main(["--out", str(tmp_path), "--only", "nosuch"])
    assert "no arm of that name" in capsys.readouterr().err and not (tmp_path / "arms.csv").exists()


def test_a_failing_run_stops_the_study(tmp_path, monkeypatch):
    monkeypatch.setitem(reproduce.ARMS, "grpo", (range(1), "grpo", {"gamma": -1.0}))
    with pytest.raises(ts.UserError, match="gamma must lie in"):
        reproduce.run_arm("grpo", 0, True, tmp_path / "grpo-seed0.jsonl.gz")
    assert not list(tmp_path.iterdir())
