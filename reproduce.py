"""The paper's claims in miniature: `python reproduce.py` trains every arm of the study and writes results/.

PROTOCOL
    World       toy.py as `python train_small.py` uses it: four digits, its warm start, 16 questions x 8 responses a step,
                2 updates a step, learning rate 1e-4, 40 steps. An arm changes only what its line in ARMS says.
    Worlds      two: the sum of the digits, and the largest of them (arms "largest-"), another question about the same
                pictures, which a response that misreads them often answers right. Its arms were fixed as the first one's.
    Seeds       the same for every arm: a seed decides warm start, questions, samples and masks, so arms are compared pair by
                pair. 8 seeds for an arm that a claim rests on, 4 for long runs and for the steps of the second world's ladder in
                between, 3 for the first's and for rescues that fail. The arms of 8 seeds in the second world, and the gated
                ones of PAPO-D, got the last four after the first four had been looked at. The second world's gated arms of gamma
                3 and 30 were run after those of 10 and 100: that 3 is best there is read off the test split. The controls
                were thought of last, when all else had been read.
    Measure     avg@8 at temperature 1 on 96 questions from the test split of handwritten digits, every 10 steps: at the end,
                and over the run (mean of all evaluations but the first). Mean over seeds with the 95 % interval of Student's
                t; differences are paired by seed.
    Chosen      on the validation split, whose digits no other split shares, with seeds 0 and 1. The world (share of invented
                digits 0.75, growing over 80 steps; learning rate; 40 steps): GRPO starts near chance where the picture is
                needed, and learns within the run. gamma 0.3, the best over the run of 0.02, 0.1, 0.3, 1 and 3. RESCUE_GAMMA 3,
                which breaks one of the two seeds by step 20, while the other begins to fall after step 30; of eta1 0.3, 1, 3
                and beta 0.3, 1 there, ETA and BETA kept most of the accuracy. All else is the paper's value, or a fixed ladder
                around it.
    Gated       the form of the term, of about ten that were tried, and its gamma of 10, of six from 3 to 1000, on the validation
                split with seeds 0 to 2, some with fewer.
    Tried       to make the paper's 0.02 separate more, with the same two seeds: 8 questions a step for 60 steps, 4 updates,
                beta 0, only questions of high dependency, a share of invented digits of 0.85. In all of them 0.02 leads by 2 to
                5 points in the middle of the run, and GRPO catches up; so the world stayed. With a share of 0.6 GRPO
                learns in 15 steps and arms hardly differ, without gradual growth some seeds forget how to see, and at
                learning rate 3e-4 runs are unstable.
Runs share nothing, and are kept as results/runs/ARM-seedSEED.jsonl.gz: one already there is not repeated.
"""

import argparse
import csv
import gzip
import json
import math
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev

import torch
from matplotlib.figure import Figure
from scipy.stats import t as student
from tqdm import tqdm

import toy
import train_small as ts
from papo import aggregate, clipped_policy_loss, kl_k3, papo_loss
from report import save_picture

EIGHT, FOUR, THREE = range(8), range(4), range(3)
BEST, BEST_GATED, RESCUE_GAMMA, ETA, BETA = 0.3, 10.0, 3.0, 3.0, 1.0  # see "Chosen" and "Gated" above
QUICK = toy.WarmStart(short_stages=(), clean_steps=2, guess_steps=1, batch_size=4)  # learns nothing
# The rescues: which entropies are kept low, with which gradients through the masked pass.
ETAS = {"eta1": dict(eta1=ETA), "eta2": dict(eta2=ETA), "both": dict(eta1=ETA, eta2=ETA)}
GRADS = {"eta1": ("detached", "full"), "eta2": ("entropy", "full"), "both": ("entropy", "full")}
LADDER = {  # the weights of the perception term, ungated and gated; the best and ten times that on 8 seeds
    "gamma": {
        BEST: EIGHT,
        3.0: EIGHT,
        0.05: THREE,
        0.1: THREE,
        0.2: THREE,
        0.5: THREE,
        1.0: THREE,
        10.0: THREE,
    },
    "gated": {10.0: EIGHT, 100.0: EIGHT, 1.0: THREE, 3.0: THREE, 30.0: THREE, 300.0: THREE},
}
SECOND_WORLD = {
    "gamma": {BEST: EIGHT, 3.0: EIGHT, 0.02: FOUR, 0.1: FOUR, 1.0: FOUR},
    "gated": {10.0: EIGHT, 100.0: EIGHT, 3.0: EIGHT, 30.0: EIGHT, 1.0: FOUR},
}
# The notebook's section 11: short runs on questions of high vision dependency alone, perception KL and
# entropy on or off.
LESSON = dict(prompts_per_batch=12, updates_per_batch=1, beta=0.0, learning_rate=2e-4, steps=24, eval_every=6)
TWO_BY_TWO = {
    "grpo": dict(gamma=0.0),
    "kl": dict(gamma=0.2),
    "entropy": dict(gamma=0.0, eta1=0.1, algorithm="papo-g"),
    "both": dict(gamma=0.2, eta1=0.1),
}


def term(kind, gamma):
    """The flags of a perception term, "gamma" or "gated", of this weight."""
    return dict(gamma=gamma, **{"gated": True} if kind == "gated" else {})


ARMS = {  # name: (seeds, arms it is compared with, flags of train_small.py that differ from its defaults: PAPO-G)
    "grpo": (EIGHT, "grpo", dict(gamma=0.0)),
    "papo-g": (EIGHT, "grpo", {}),
    **{
        f"{kind}-{gamma:g}": (seeds, f"grpo gamma-{BEST:g}", term(kind, gamma))
        for kind, ladder in LADDER.items()
        for gamma, seeds in ladder.items()
    },
    "largest-grpo": (EIGHT, "largest-grpo", dict(task="largest", gamma=0.0)),
    **{
        f"largest-{kind}-{gamma:g}": (
            seeds,
            f"largest-grpo largest-gamma-{BEST:g}",
            term(kind, gamma) | dict(task="largest"),
        )
        for kind, ladder in SECOND_WORLD.items()
        for gamma, seeds in ladder.items()
    },
    "dapo": (EIGHT, "dapo", dict(algorithm="dapo")),
    "papo-d": (EIGHT, "dapo papo-d-entropy-only", dict(algorithm="papo-d")),  # gamma 0.01, eta1 = eta2 = 0.03
    "papo-d-entropy-only": (
        EIGHT,
        "dapo",
        dict(algorithm="papo-d", gamma=0.0),
    ),  # what the entropy terms do alone
    **{
        f"papo-d-{kind}-{gamma:g}": (
            seeds,
            "dapo papo-d-entropy-only",
            dict(algorithm="papo-d", **term(kind, gamma)),
        )
        for kind, gamma, seeds in (
            ("gamma", BEST, EIGHT),
            ("gamma", 3.0, FOUR),
            ("gated", BEST_GATED, EIGHT),
            ("gated", 100.0, EIGHT),
        )
    },
    **{
        f"long-{name}": (FOUR, "long-grpo", dict(steps=80, **flags))
        for name, flags in {
            "grpo": dict(gamma=0.0),
            f"gamma-{BEST:g}": dict(gamma=BEST),
            f"gated-{BEST_GATED:g}": term("gated", BEST_GATED),
        }.items()
    },
    # The gamma of papo-d is there for the masked pass alone: vppo_loss has no perception term.
    "vppo": (FOUR, "dapo", dict(algorithm="papo-d", eta1=0.0, eta2=0.0, mask_ratio=0.5, format_weight=0.0)),
    # Left out because they are another arm to the bit: with "detached", H[pi_mask] is a constant, so eta2
    # does nothing and both are eta1 alone; and eta1 alone is the same with "entropy" as with "detached".
    "rescue-beta": (THREE, f"gamma-{RESCUE_GAMMA:g} grpo", dict(gamma=RESCUE_GAMMA, beta=BETA)),
    **{
        f"rescue-{name}-{grad}-{estimate}": (
            EIGHT if estimate == "exact" and grad != "full" else THREE,
            f"gamma-{RESCUE_GAMMA:g} grpo",
            dict(gamma=RESCUE_GAMMA, masked_grad=grad, entropy_estimate=estimate, **ETAS[name]),
        )
        for estimate in ("exact", "sampled")
        for name in ETAS
        for grad in GRADS[name]
    },
    "entropy-only": (
        THREE,
        "grpo",
        dict(gamma=0.0, eta1=ETA),
    ),  # what the rescue does where nothing is to be rescued
    "rescue-none-full": (THREE, f"gamma-{RESCUE_GAMMA:g} grpo", dict(gamma=RESCUE_GAMMA, masked_grad="full")),
    **{
        f"lesson-{name}": (FOUR, "lesson-grpo", {**LESSON, **changes}) for name, changes in TWO_BY_TWO.items()
    },
    **{
        f"mask-{ratio:g}": (EIGHT, f"gamma-{BEST:g}", dict(mask_ratio=ratio, gamma=BEST))
        for ratio in (0.4, 0.8, 1.0)
    },
    **{
        f"variant-{name}": (EIGHT, f"gamma-{BEST:g}", dict(gamma=BEST, **changes))
        for name, changes in {
            "full": dict(masked_grad="full"),
            "token": dict(aggregation="token"),
            "eta-exact": dict(eta1=0.05, eta2=0.05),
            "eta-sampled": dict(eta1=0.05, eta2=0.05, entropy_estimate="sampled"),
            "eta1": dict(eta1=0.05),  # to the bit also eta1 = eta2 = 0.05 with masked_grad "detached"
        }.items()
    },
    # Controls: what the small entropy does without the perception term; and what a push of the gated term's
    # size does that does not ask what a token owes to the image.
    "control-eta1": (EIGHT, f"grpo gamma-{BEST:g}", dict(gamma=0.0, eta1=0.05)),
    "control-push": (EIGHT, f"grpo gated-{BEST_GATED:g}", dict(gamma=BEST_GATED)),
}


def vppo_loss(config, logps, old_logps, advantages, response_mask, masked_logps, **_):
    """VPPO (arXiv 2510.09285), an objective without a perception term. k3 of pi and pi_mask says how far a token depends on
    the image; the 40 % of a response that depend most are trained, and the more a response depends, the more it counts.

    0.4, 0.9 and 0.06 are its authors' values. Two things differ from their code: a response's factor is scaled within its group, not within the update's batch,
    and the second update of a batch takes the dependencies of its own policy."""
    dependency = kl_k3(logps, masked_logps).detach().masked_fill(response_mask == 0, -1)  # (B, T)
    kept = (0.4 * response_mask.sum(1, keepdim=True)).ceil()  # (B, 1) tokens trained
    rank = dependency.argsort(1, descending=True).argsort(1)  # (B, T) 0 for the token that depends most
    means = (dependency * response_mask).sum(1) / response_mask.sum(1)  # (B,)
    above = means - means.min()  # (B,)
    factor = 0.9 + 0.1 * above / above.mean().clamp(min=1e-9)  # (B,) 0.9 at the smallest, 1 in the mean
    policy = clipped_policy_loss(
        logps, old_logps, advantages * factor, config.clip_low, config.clip_high, config.clip_dual
    )  # (B, T)
    mean = lambda per_token: aggregate(per_token, response_mask, config.aggregation)  # (B, T) -> scalar
    terms = {"policy_loss": mean(policy * (rank < kept)), "entropy": mean(-logps)}
    loss = terms["policy_loss"] + 0.06 * terms["entropy"]
    return loss, {"loss": loss.item(), **{name: term.item() for name, term in terms.items()}}


def push_loss(config, logps, advantages, response_mask, **rest):
    """The control of the gated term: gamma log pi instead of gamma k3, for every token of a response with A > 0."""
    loss, metrics = papo_loss(
        replace(config, gamma=0.0), logps, advantages=advantages, response_mask=response_mask, **rest
    )
    right = (advantages[:, None] > 0) * logps  # (B, T)
    return loss - config.gamma * aggregate(right, response_mask, config.aggregation), metrics


OBJECTIVES = {"vppo": vppo_loss, "control-push": push_loss}  # of arms that have one of their own


def run_arm(name, seed, quick, path):
    """One run of one arm, with a line of metrics per step and, at each evaluation, what the policy writes."""
    torch.set_num_threads(1)
    steps, eval_size, recipe = (2, 6, QUICK) if quick else (None, 96, toy.WarmStart())
    flags = {"seed": seed, **ARMS[name][2], **({"steps": steps} if quick else {})}
    config, run = ts.parse_args([f"--{flag}={value}" for flag, value in flags.items()])
    model, processor = toy.warm_start(seed=seed, recipe=recipe, task=run.task)
    every = 3 if name.startswith("lesson") else 1  # dependencies come in turn: every third row is high
    train, test = (
        rows.select(range(0, len(rows), every))
        for rows in (
            toy.toy_dataset("train", 2048, seed=seed, task=run.task),
            toy.toy_dataset("test", every * eval_size, seed=0, task=run.task),
        )
    )
    trainer, lines = ts.Trainer(model, processor, config, run, train), []
    trainer.objective = OBJECTIVES.get(name, papo_loss)
    for step in range(run.steps + 1):
        line = trainer.step() if step else {"step": 0}
        if step % run.eval_every == 0 or step == run.steps:
            groups = ts.evaluate(model, processor, config, test)
            line |= {f"eval_{key}": value for key, value in ts.summarise(groups).items()}
            answers = [(text, s["accuracy"], g.row) for g in groups for text, s in zip(g.texts, g.scores)]
            line["eval_read"] = mean(toy.perceived(text, row) for text, _, row in answers)
            line["eval_lucky"] = mean(right and not toy.perceived(text, row) for text, right, row in answers)
            line["texts"] = [group.texts[0] for group in groups[:6]]
        lines.append(line)
    draft = path.with_suffix(".part")
    with gzip.open(draft, "wt") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    draft.replace(path)


def load_runs(folder):
    """{arm: {seed: lines}} of all finished runs, in the order of ARMS."""
    runs = {}
    for path in folder.glob("*.jsonl.gz"):
        arm, seed = path.name.removesuffix(".jsonl.gz").rsplit("-seed", 1)
        with gzip.open(path, "rt") as file:
            runs.setdefault(arm, {})[int(seed)] = [json.loads(line) for line in file]
    return {arm: dict(sorted(runs[arm].items())) for arm in ARMS if arm in runs}


def interval(values):
    """Mean and half the width of its 95 % interval (Student's t); nan for fewer than two values."""
    if len(values) < 2:
        return mean(values), math.nan
    return mean(values), student.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))


def measured(lines, measure, when):
    """One run's held-out measure in percent at a step, at the "end", or over the "run": the mean after the
    first."""
    values = {line["step"]: 100 * line[f"eval_{measure}"] for line in lines if "eval_accuracy" in line}
    return (
        mean(list(values.values())[1:]) if when == "run" else values[max(values) if when == "end" else when]
    )


def write_table(runs, path):
    """results/arms.csv, in percent (read: all digits read right; lucky: right although they are not): each arm's
    mean over its seeds; over the seeds it shares with its baseline the paired difference, and that relative to the baseline's mean, which is taken as exact. A
    baseline of all is compared with none."""
    measures = ["accuracy", *(f"accuracy_{kind}" for kind in reversed(toy.DEPENDENCIES))]
    measures += [*(f"error_{kind}" for kind in toy.ERROR_TYPES), "read", "lucky"]
    header = (
        "arm seeds step measure mean half_interval baseline shared_seeds minus_baseline minus_half_interval"
    )
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(f"{header} relative relative_half_interval".split())
        for arm, baseline in [(name, baseline) for name in runs for baseline in ARMS[name][1].split()]:
            shared = [seed for seed in runs[arm] if seed in runs.get(baseline, {})]
            if not shared:
                continue
            for step in [line["step"] for line in runs[arm][shared[0]] if "eval_accuracy" in line] + ["run"]:
                for measure in measures:
                    if f"eval_{measure}" not in runs[arm][shared[0]][0]:
                        continue  # the notebook's arms ask questions of one dependency
                    own, pair, other = (
                        [measured(runs[name][seed], measure, step) for seed in seeds]
                        for name, seeds in ((arm, runs[arm]), (arm, shared), (baseline, shared))
                    )
                    difference = interval([a - b for a, b in zip(pair, other)])
                    scale = 100 / mean(other) if any(other) else math.nan
                    cells = [f"{x:.2f}" for x in (*difference, *(scale * x for x in difference))]
                    against = [""] * 6 if arm == baseline else [baseline, len(shared), *cells]
                    table.writerow(
                        [arm, len(own), step, measure, *(f"{x:.2f}" for x in interval(own)), *against]
                    )


def write_texts(runs, path):
    """results/texts.md: what each arm's first seed writes to the same three questions at the end."""
    rows = toy.toy_dataset("test", 3, seed=0)
    parts = ["# What the policies write at the end\n"]
    for arm, by_seed in runs.items():
        seed = min(by_seed)
        texts = zip(rows, by_seed[seed][-1]["texts"])
        answers = "\n".join(f"    {' '.join(map(str, row['digits']))} -> {text}" for row, text in texts)
        parts.append(f"{arm}, seed {seed}: the digits on the picture, and the response\n\n{answers}\n")
    path.write_text("\n".join(parts), encoding="utf-8")


# Okabe and Ito: told apart by colour-blind readers
COLOURS = ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999"]
PANELS = {  # metric: (title, factor)
    "eval_accuracy": ("held-out accuracy, %", 100),
    "eval_accuracy_high": ("high vision dependency, %", 100),
    "reward": ("training reward", 1),
    "kl_prcp": (r"KL[$\pi\,\|\,\pi_{mask}$], nats per token", 1),
    "clip_high_fraction": ("tokens with r > 1 + eps_h, %", 100),
    "entropy": (r"H[$\pi$], nats per token", 1),
    "masked_entropy": (r"H[$\pi_{mask}$], nats per token", 1),
}
WIDTH = 7  # inches: a page's text, and legible on a phone


def seeds_of_all(runs, arms):
    """Those of the arms that have run, and the seeds they share: a picture compares nothing else."""
    arms = [arm for arm in arms if arm in runs]
    seeds = sorted(set.intersection(*(set(runs[arm]) for arm in arms))) if arms else []
    return (arms, seeds) if seeds else ([], [])


def spread(values):
    """Lower and upper end of what a picture shows around a mean: the 95 % interval of eight seeds, or all of
    fewer."""
    centre, half = interval(values)
    return (centre - half, centre + half) if len(values) >= 8 else (min(values), max(values))


def plot_curves(runs, path, rows):
    """Rows of two panels: (labels of the arms {arm: words}, metrics), the mean over seeds in its spread."""
    rows = [(labels, metrics) for labels, metrics in rows if len(seeds_of_all(runs, labels)[0]) > 1]
    if not rows:
        return
    figure = Figure(figsize=(WIDTH, 2.9 * len(rows)), layout="constrained")
    strips = figure.subfigures(len(rows), squeeze=False).flat
    for i, ((labels, metrics), strip) in enumerate(zip(rows, strips)):
        arms, seeds = seeds_of_all(runs, labels)
        for axis, metric in zip(strip.subplots(1, 2), metrics):
            title, factor = PANELS[metric]
            for arm, colour, style in zip(arms, COLOURS, ["-", "--", "-.", ":"] * 2):
                steps = [line["step"] for line in runs[arm][seeds[0]] if metric in line]
                columns = [
                    [factor * runs[arm][seed][step].get(metric, math.nan) for seed in seeds] for step in steps
                ]
                axis.plot(
                    steps, list(map(mean, columns)), style, color=colour, linewidth=2, label=labels[arm]
                )
                if steps:
                    axis.fill_between(
                        steps, *zip(*map(spread, columns)), color=colour, alpha=0.12, linewidth=0
                    )
            axis.set(title=title, xlabel="step", ylim=(0, 100 if metric.startswith("eval") else None))
            axis.grid(alpha=0.3)
        if i + 1 == len(rows) or rows[i + 1][0] != labels:  # rows of the same arms share a legend
            columns = 2 if len(arms) == 4 else 3
            strip.legend(
                *axis.get_legend_handles_labels(), frameon=False, ncols=columns, loc="outside lower center"
            )
    save_picture(figure, path)


def plot_ladders(runs, path, xlabel, panels):
    """Accuracy over the weight of the perception term. panels: (title, step or "run" or "end", the arm without the term,
    {label: {place: arm}}). Every seed is a dot; the mean is filled, with its 95 % interval, where there are eight seeds, else
    hollow; the arm without the term is a line for each number of seeds."""
    panels = [
        (
            title,
            when,
            base,
            {name: {x: arm for x, arm in ladder.items() if arm in runs} for name, ladder in ladders.items()},
        )
        for title, when, base, ladders in panels
        if base in runs
    ]
    if not any(ladder for *_, ladders in panels for ladder in ladders.values()):
        return
    figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    labels = {}  # label: what is drawn
    many_or_few = lambda count: "8 seeds" if count >= 8 else "3 or 4 seeds"
    for axis, (title, when, base, ladders) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False).flat, panels
    ):
        for k, ((name, ladder), colour) in enumerate(zip(ladders.items(), COLOURS[1:])):
            for x, arm in ladder.items():
                values = [measured(lines, "accuracy", when) for lines in runs[arm].values()]
                many, x = len(values) >= 8, x * 1.1**k  # side by side
                axis.plot([x] * len(values), values, ".", color=colour, alpha=0.4, markeredgewidth=0)
                labels[f"{name}, {many_or_few(len(values))}"] = axis.errorbar(
                    x,
                    mean(values),
                    interval(values)[1] if many else None,
                    fmt="D",
                    color=colour,
                    mfc=colour if many else "white",
                    markersize=6,
                    capsize=4,
                )
        for count in sorted({len(runs[arm]) for ladder in ladders.values() for arm in ladder.values()}):
            level = mean(measured(runs[base][seed], "accuracy", when) for seed in list(runs[base])[:count])
            style = "--" if count >= 8 else ":"
            labels[f"gamma 0, {many_or_few(count)}"] = axis.axhline(level, color=COLOURS[0], linestyle=style)
        axis.set(xscale="log", xlabel=xlabel, title=f"{title}, %", ylim=(-3, 103))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
    labels = dict(sorted(labels.items()))
    figure.legend(labels.values(), labels, frameon=False, ncols=2, loc="outside lower center")
    save_picture(figure, path)


def plot_arms(runs, path, baseline, labels):
    """Held-out accuracy at the end, a dot per seed and the mean; and over the run the paired difference from
    the baseline, with its 95 % interval. labels: {arm: words}."""
    arms, seeds = seeds_of_all(runs, labels)
    if len(arms) < 3 or baseline not in arms:  # the baseline and GRPO alone
        return
    over, end = (
        {arm: [measured(runs[arm][seed], "accuracy", when) for seed in seeds] for arm in arms}
        for when in ("run", "end")
    )
    gains = {arm: [a - b for a, b in zip(over[arm], over[baseline])] for arm in arms if arm != baseline}
    figure = Figure(figsize=(WIDTH, 1.1 + 0.3 * len(arms)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, values in zip(axes, (end, gains)):
        for row, arm in enumerate(arms):
            if arm in values:
                axis.plot(values[arm], [row] * len(seeds), "o", color=COLOURS[6], alpha=0.6, markersize=5)
                half = interval(values[arm])[1] if values is gains else None
                axis.errorbar(
                    mean(values[arm]), row, xerr=half, fmt="D", color=COLOURS[0], markersize=5, capsize=3
                )
        axis.grid(alpha=0.3)
    axes[0].set_title("accuracy at the end, %", fontsize=11)
    axes[0].set(xlim=(-3, 103), yticks=range(len(arms)))
    axes[0].set_yticklabels([labels[arm] for arm in arms])
    axes[0].invert_yaxis()
    axes[1].axvline(0, color=COLOURS[7], linewidth=1)
    axes[1].set_title(f"over the run, minus\n{labels[baseline]}, points", fontsize=11)
    save_picture(figure, path)


def plot_errors(runs, path, labels):
    """Shares of responses by type of error at the end, mean over seeds."""
    arms, seeds = seeds_of_all(runs, labels)
    if len(arms) < 2:
        return
    figure = Figure(figsize=(WIDTH, 1 + 0.35 * len(arms)), layout="constrained")
    axis, left = figure.subplots(), [0.0] * len(arms)
    for kind, colour in zip(toy.ERROR_TYPES, COLOURS[1:]):
        shares = [mean(measured(runs[arm][seed], f"error_{kind}", "end") for seed in seeds) for arm in arms]
        axis.barh([labels[arm] for arm in arms], shares, left=left, color=colour, label=kind)
        left = [a + b for a, b in zip(left, shares)]
    axis.set(xlabel="wrong responses at the end, % of all")
    axis.invert_yaxis()
    figure.legend(frameon=False, ncols=len(toy.ERROR_TYPES), loc="outside upper center", columnspacing=1)
    save_picture(figure, path)


def draw(runs, out):
    """All tables and pictures of the runs there are; a picture that lacks the arms it compares is left
    out."""
    write_table(runs, out / "arms.csv")
    write_texts(runs, out / "texts.md")
    best, rescue = f"gamma-{BEST:g}", f"gamma-{RESCUE_GAMMA:g}"
    on_grpo = {"grpo": "GRPO", "papo-g": "PAPO-G, gamma 0.02", best: f"PAPO-G, gamma {BEST:g}"}
    on_dapo = {
        "dapo": "DAPO",
        "papo-d": "PAPO-D, gamma 0.01",
        "papo-d-entropy-only": "PAPO-D, gamma 0",
        f"papo-d-gamma-{BEST:g}": f"PAPO-D, gamma {BEST:g}",
    }
    accuracy = ["eval_accuracy", "eval_accuracy_high"]
    plot_curves(runs, out / "main.png", [(on_grpo, accuracy), (on_dapo, accuracy)])
    plot_errors(runs, out / "errors.png", on_grpo | on_dapo)
    steep = {
        arm: f"gamma {ARMS[arm][2].get('gamma', 0.02):g}"
        for arm in ("papo-g", best, "gamma-1", rescue, "gamma-10")
    }
    signs = ["eval_accuracy", "reward", "kl_prcp", "clip_high_fraction", "entropy", "masked_entropy"]
    plot_curves(runs, out / "signs.png", [(steep, signs[i : i + 2]) for i in (0, 2, 4)])
    ladders = {  # {label: {gamma: arm}} of each world, and of PAPO-D
        world: {
            label: {
                flags["gamma"]: arm
                for arm, (_, _, flags) in ARMS.items()
                if arm.startswith(f"{world}{kind}-")
            }
            for kind, label in (("gamma", "PAPO"), ("gated", "gated"))
        }
        for world in ("", "largest-", "papo-d-")
    }
    ladders[""]["PAPO"] |= {0.02: "papo-g"}
    ladders["papo-d-"]["PAPO"] |= {0.01: "papo-d"}
    moments = (("accuracy over the run", "run"), ("accuracy at the end", "end"))
    both = lambda base, ladders: [(title, when, base, ladders) for title, when in moments]
    plot_ladders(runs, out / "gamma.png", "gamma", both("grpo", {"PAPO": ladders[""]["PAPO"]}))
    plot_ladders(runs, out / "gated.png", "gamma", both("grpo", ladders[""]))
    plot_ladders(runs, out / "papo-d.png", "gamma", both("papo-d-entropy-only", ladders["papo-d-"]))
    relative = {
        world: {
            label: {gamma / (BEST if label == "PAPO" else BEST_GATED): arm for gamma, arm in ladder.items()}
            for label, ladder in by_label.items()
        }
        for world, by_label in ladders.items()
    }
    worlds = [("sum of the digits", "", "grpo"), ("largest of the digits", "largest-", "largest-grpo")]
    panels = [(f"{name}:\naccuracy at the end", "end", base, relative[world]) for name, world, base in worlds]
    plot_ladders(runs, out / "margin.png", "gamma / its best value in the first world", panels)
    long = {
        "long-grpo": "GRPO",
        f"long-gamma-{BEST:g}": f"PAPO, gamma {BEST:g}",
        f"long-gated-{BEST_GATED:g}": f"gated, gamma {BEST_GATED:g}",
    }
    plot_curves(runs, out / "long.png", [(long, accuracy)])
    rescues = {  # those on eight seeds
        rescue: "no rescue",
        "rescue-eta1-detached-exact": "eta1",
        "rescue-eta2-entropy-exact": "eta2",
        "rescue-both-entropy-exact": "eta1 and eta2",
    }
    plot_arms(runs, out / "rescue.png", rescue, rescues | {"grpo": "GRPO"})
    masks = {"mask-0.4": "40 % black", best: "60 % black", "mask-0.8": "80 % black", "mask-1": "all black"}
    plot_arms(runs, out / "mask.png", best, masks | {"grpo": "GRPO"})
    variants = {
        best: "PAPO-G, gamma 0.3",
        "variant-full": "gradient through mask",
        "variant-token": "one mean over tokens",
        "variant-eta-exact": "eta1, eta2 exact",
        "variant-eta1": "eta1 exact",
        "variant-eta-sampled": "eta1, eta2 sampled",
        "grpo": "GRPO",
    }
    plot_arms(runs, out / "variants.png", best, variants)


def main(argv=None):
    """Run what is missing, then write tables and pictures of all that is there."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--quick", action="store_true", help="2 seeds, 2 steps, two arms, an untrained model: does it run?"
    )
    parser.add_argument(
        "--out", type=Path, help="folder for runs, tables and pictures (default: results, or results-quick)"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes, one core each")
    parser.add_argument(
        "--only", default="", help="only arms whose name begins so (no such arm: only pictures)"
    )
    args = parser.parse_args(argv)
    args.out = args.out or Path("results-quick" if args.quick else "results")
    folder = args.out / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    arms = {name: (range(2), *ARMS[name][1:]) for name in ("grpo", "papo-g")} if args.quick else ARMS
    jobs = [
        (arm, seed, args.quick, path)
        for arm, (seeds, *_) in arms.items()
        for seed in seeds
        if arm.startswith(args.only) and not (path := folder / f"{arm}-seed{seed}.jsonl.gz").exists()
    ]
    os.environ["TQDM_DISABLE"] = "1"  # the runs' own bars
    with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
        waiting = [pool.submit(run_arm, *job) for job in jobs]
        try:
            for done in tqdm(as_completed(waiting), total=len(jobs), desc="runs"):
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # not hours later
            raise
    if not (runs := load_runs(folder)):
        parser.error(f"no arm of that name, and no run in {folder}")
    draw(runs, args.out)


if __name__ == "__main__":
    main()
