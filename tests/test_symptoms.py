"""docs/symptoms.md: each symptom is made to happen once, in the embedded world, and seen in the
metric that the page names."""

import copy
import gzip
import json
import re
from dataclasses import replace
from pathlib import Path
from statistics import mean

import conftest  # noqa: F401  sets the path to papo.py
import torch

import papo
import toy
import train_small as ts
from papo import PAPOConfig, compute_reward

ROOT = Path(__file__).resolve().parent.parent
PAGE, STUDY = ROOT / "docs" / "symptoms.md", ROOT / "study" / "runs"
SIZES = dict(beta=0.0, group_size=8, prompts_per_batch=3, updates_per_batch=1, max_new_tokens=64)


def rows(**changes):
    """Questions of all three vision dependencies, with `changes` as functions of the row."""
    for row in toy.toy_dataset("train", 60):
        yield row | {name: change(row) for name, change in changes.items()}


def roll_out(warm_start, source=None, **settings):
    config = PAPOConfig(**SIZES | settings)
    generator = torch.Generator().manual_seed(0)
    return config, papo.roll_out(*warm_start, config, source or rows(), generator)[0]


def train(warm_start, steps, run=None, **settings):
    """The metrics of a few steps from the warm start, which stays as it was."""
    model, processor = copy.deepcopy(warm_start[0]), warm_start[1]
    run = ts.RunConfig(**{"gradient_checkpointing": False} | (run or {}))
    config = PAPOConfig(**SIZES | settings)
    trainer = ts.Trainer(model, processor, config, run, list(rows()))
    return [trainer.step() for _ in range(steps)]


def share(groups, name):
    scores = [score[name] for group in groups for score in group.scores]
    return sum(scores) / len(scores)


def nothing_is_learned(warm_start, config, groups):
    """With the policy term alone, no weight gets any gradient."""
    model, alone = copy.deepcopy(warm_start[0]), replace(config, gamma=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return papo.papo_step(model, optimizer, alone, groups)["grad_norm"] == 0


def test_a_wrong_answer_column_or_wrapped_gold_answers(warm_start):
    """Responses of good form, some right, are all wrong, and no group is mixed."""
    config, groups = roll_out(warm_start, gamma=0.0)
    assert share(groups, "accuracy") > 0 and share(groups, "format") > 0.9
    for wrap in (lambda row: row["problem"], lambda row: f"<b>{row['answer']}</b>, I think"):
        _, wrong = roll_out(warm_start, rows(answer=wrap), gamma=0.0)
        assert [group.texts for group in wrong] == [group.texts for group in groups]
        assert share(wrong, "format") > 0.9 and not any(group.mixed for group in wrong)
        gold = wrong[0].row["answer"]  # the page's advice finds it
        assert compute_reward(rf"\boxed{{{groups[0].row['answer']}}}", gold)["accuracy"] == 0


def test_responses_cut_at_the_limit(warm_start):
    """No box is ever reached: no accuracy, no format, no gradient."""
    [metrics] = train(warm_start, 1, max_new_tokens=1, gamma=0.0)
    assert metrics["cut_fraction"] == 1 and metrics["response_tokens"] == 1
    assert metrics["accuracy"] == metrics["format"] == metrics["grad_norm"] == 0


def test_equal_responses_in_a_group(warm_start):
    config, groups = roll_out(warm_start, temperature=1e-3)
    assert all(len(set(group.texts)) == 1 for group in groups)
    assert not any(group.mixed for group in groups)
    assert nothing_is_learned(warm_start, config, groups)
    _, groups = roll_out(warm_start)
    assert len(set(groups[0].texts)) == 8  # a question that needs the picture


def test_the_loss_is_zero_at_the_first_update_and_the_gradient_is_not(warm_start):
    [metrics] = train(warm_start, 1, prompts_per_batch=6, gamma=0.0)
    assert abs(metrics["loss"]) < 1e-6 and metrics["mixed"] > 0 and metrics["grad_norm"] > 1e-2


def test_the_clip_fraction_leaves_zero_only_where_a_batch_has_several_updates(warm_start):
    fast = dict(learning_rate=1e-3, gamma=0.0)
    clipped = lambda updates: train(warm_start, 1, updates_per_batch=updates, **fast)[0]
    assert clipped(1)["clip_high_fraction"] == 0 and clipped(3)["clip_high_fraction"] > 0.001


def kept(arm, key, steps):
    """A metric's mean over some steps of a kept run of the study, made by the page's command."""
    with gzip.open(STUDY / f"{arm}-seed0.jsonl.gz", "rt") as file:
        lines = [json.loads(line) for line in file]
    return mean(line[key] for line in lines if line["step"] in steps)


def test_the_perception_kl_runs_away():
    """It rises twentyfold, and in the second half the reward falls, entropy and clipping rise."""
    start, middle, end = range(1, 6), range(16, 21), range(36, 41)
    found = lambda key, steps: kept("variant-full", key, steps)
    assert found("kl_prcp", end) > 20 * found("kl_prcp", start)
    assert found("reward", end) < 0.7 * found("reward", middle)
    assert found("entropy", end) > 1.3 * found("entropy", middle)
    assert found("clip_high_fraction", end) > 5e-4 > found("clip_high_fraction", start)


def test_the_responses_fill_with_tokens():
    """The form is lost, all responses run to the limit, and no perception KL tells of it."""
    found = lambda key, steps: kept("gamma-3", key, steps)
    assert found("format", range(1, 6)) > 0.98 and found("format", range(31, 41)) < 0.02
    assert found("reward", range(11, 16)) < 0.7 * found("reward", range(1, 6))
    assert found("response_tokens", range(31, 41)) > 63
    assert found("kl_prcp", range(31, 41)) < 0.01
    assert max(kept("gamma-3", "clip_high_fraction", [step]) for step in range(1, 21)) > 0.01


def test_the_entropy_freezes():
    """The policy is certain before it is right: few groups are mixed, little is left to learn."""
    found = lambda key, steps: kept("entropy-only", key, steps)
    start, end = range(1, 6), range(31, 41)
    assert found("entropy", end) < 0.1 * found("entropy", start)
    assert found("mixed", end) < 2 < 6 < found("mixed", start)
    assert found("reward", end) < 1.1 * found("reward", start) and found("format", end) > 0.99


def test_an_adapter_at_the_rate_of_full_fine_tuning_stays_where_it_was(warm_start):
    adapter = dict(run=dict(lora=4, merge=True), gamma=0.0, beta=0.01, updates_per_batch=2)
    slow = train(warm_start, 2, learning_rate=1e-6, **adapter)[-1]
    quick = train(warm_start, 2, learning_rate=1e-3, **adapter)[-1]
    assert slow["kl_ref"] < 1e-7 < 1e-5 < quick["kl_ref"] and slow["grad_norm"] > 0


def test_the_page_names_every_test_here():
    here = re.findall(r"^def (test_\w+)", Path(__file__).read_text(), re.MULTILINE)
    assert set(here[:-1]) <= set(re.findall(r"`(test_\w+)`", PAGE.read_text()))
