"""The paper's claims in miniature: `python -m study.reproduce` trains every arm of the study.

World    toy.py as `python train_small.py` uses it: four digits, a warm start (WARM_START), 16
         questions x 8 responses a step, 2 updates a step, learning rate 1e-4, 40 steps. An arm
         changes only what its line in ARMS says, and its name: an objective of methods.py, the
         validation split ("choose-"), questions of high dependency alone ("lesson-").
Worlds   two: the sum of the digits, and the largest of them (arms "largest-"), another question
         about the same pictures, which a response that misreads them often answers right. But for
         what is said below its arms were fixed in advance.
Seeds    the same for every arm: a seed decides warm start, questions, samples and masks, so arms
         are compared pair by pair. 8 seeds for an arm that a claim rests on, 4 for long runs and
         for the steps of the second world's ladder in between, 3 for the first's. The arms of 8
         seeds in the second world, and the gated ones of PAPO-D, got the last four after the first
         four had been looked at. The second world's gated arms of gamma 3 and 30 were run after
         those of 10 and 100: that 3 is best there is read off the test split. The controls were
         thought of last, when all else had been read.
Measure  avg@8 at temperature 1 on 96 questions from the test split of handwritten digits, every 10
         steps: at the end, and over the run (mean of all evaluations but the first). Mean over
         seeds with the 95 % interval of Student's t; differences are paired by seed.
Chosen   on the validation split, whose digits no other split shares, with seeds 0 and 1. The world
         (share of invented digits 0.75, growing over 80 steps; learning rate; 40 steps): GRPO
         starts near chance where the picture is needed, and learns within the run. gamma 0.3, the
         best over the run of 0.02, 0.1, 0.3, 1 and 3. For the rescues gamma 3, which breaks one of
         the two seeds by step 20, while the other begins to fall after step 30; of eta1 0.3, 1, 3
         and beta 0.3, 1 there, 3 and 1 kept most of the accuracy. All else is the paper's value or
         a fixed ladder around it.
Gated    the form of the term, of about ten that were tried, and its gamma of 10, of six from 3 to
         1000, on the validation split with seeds 0 to 2, some with fewer.
Tried    to make the paper's 0.02 separate more, with the same two seeds: 8 questions a step for 60
         steps, 4 updates, beta 0, only questions of high dependency, a share of invented digits of
         0.85. In all of them 0.02 leads by 2 to 5 points in the middle of the run, and GRPO catches
         up; so the world stayed. With a share of 0.6 GRPO learns in 15 steps, arms hardly differ;
         without gradual growth some seeds forget how to see; at a rate of 3e-4 runs are unstable.
Runs share nothing. One that is kept, as study/runs/ARM-seedSEED.jsonl.gz, is not repeated.
"""

import argparse
import csv
import gzip
import itertools
import json
import math
import os
import re
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import toy
import train_small as ts
from program.report import save_picture
from study import compare
from study.compare import interval, scores, shared_seeds
from study.methods import OBJECTIVES

QUESTIONS, WARM_START = 96, toy.WarmStart()
# The weights of the perception term, ungated and gated, and on how many seeds; the best, 0.3 and
# 10, on 8, as ten times that mostly is. In the first world, the second, and on DAPO's base.
FIRST = {
    "gamma": {0.3: 8, 3: 8, 0.05: 3, 0.1: 3, 0.2: 3, 0.5: 3, 1: 3, 10: 3},
    "gated": {10: 8, 100: 8, 1: 3, 3: 3, 30: 3, 300: 3},
}
SECOND = dict(gamma={0.3: 8, 3: 8, 0.02: 4, 0.1: 4, 1: 4}, gated={10: 8, 100: 8, 3: 8, 30: 8, 1: 4})
ON_DAPO = dict(gamma={0.3: 8, 3: 4}, gated={10: 8, 100: 8})
# The notebook's section 11: short runs on questions of high vision dependency alone.
LESSON = "--prompts_per_batch=12 --updates_per_batch=1 --beta=0 --learning_rate=2e-4 --steps=24"
LESSON += " --eval_every=6"
ETA = "--gamma=0.3 --eta1=0.05"


def ladder(prefix, against, terms, flags=""):
    """The arms of one of the ladders above."""
    weight = {"gamma": f"{flags} --gamma=", "gated": f"{flags} --gated=True --gamma="}
    return {
        f"{prefix}{term}-{gamma}": (seeds, against, f"{weight[term]}{gamma}")
        for term, gammas in terms.items()
        for gamma, seeds in gammas.items()
    }


# Name: (how many seeds, arms it is compared with, flags of train_small.py; its defaults are PAPO-G)
ARMS = {
    "grpo": (8, "grpo", "--gamma=0"),
    "papo-g": (8, "grpo", ""),
    **ladder("", "grpo gamma-0.3", FIRST),
    "largest-grpo": (8, "largest-grpo", "--task=largest --gamma=0"),
    **ladder("largest-", "largest-grpo largest-gamma-0.3", SECOND, "--task=largest"),
    "dapo": (8, "dapo", "--algorithm=dapo"),
    # gamma 0.01 and eta1 = eta2 = 0.03; then what the entropy terms do alone
    "papo-d": (8, "dapo papo-d-entropy-only", "--algorithm=papo-d"),
    "papo-d-entropy-only": (8, "dapo", "--algorithm=papo-d --gamma=0"),
    **ladder("papo-d-", "dapo papo-d-entropy-only", ON_DAPO, "--algorithm=papo-d"),
    "long-grpo": (4, "long-grpo", "--steps=80 --gamma=0"),
    "long-gamma-0.3": (4, "long-grpo", "--steps=80 --gamma=0.3"),
    "long-gated-10": (4, "long-grpo", "--steps=80 --gamma=10 --gated=True"),
    **compare.ARMS,
    "rescue-beta": (8, "gamma-3 grpo", "--gamma=3 --beta=1"),
    "rescue-eta1": (8, "gamma-3 grpo", "--gamma=3 --eta1=3"),
    "rescue-eta2": (8, "gamma-3 grpo", "--gamma=3 --eta2=3"),
    "rescue-both": (8, "gamma-3 grpo", "--gamma=3 --eta1=3 --eta2=3"),
    "entropy-only": (8, "grpo", "--gamma=0 --eta1=3"),  # the rescue where nothing is to be rescued
    "lesson-grpo": (4, "lesson-grpo", f"{LESSON} --gamma=0"),
    "lesson-kl": (4, "lesson-grpo", f"{LESSON} --gamma=0.2"),
    "lesson-entropy": (4, "lesson-grpo", f"{LESSON} --gamma=0 --eta1=0.1 --algorithm=papo-g"),
    "lesson-both": (4, "lesson-grpo", f"{LESSON} --gamma=0.2 --eta1=0.1"),
    **{f"mask-{x}": (8, "gamma-0.3", f"--gamma=0.3 --mask_ratio={x}") for x in (0.4, 0.8, 1)},
    "variant-full": (8, "gamma-0.3", "--gamma=0.3 --masked_grad=full"),
    "variant-token": (8, "gamma-0.3", "--gamma=0.3 --aggregation=token"),
    "variant-eta-exact": (8, "gamma-0.3", f"{ETA} --eta2=0.05"),
    "variant-eta-sampled": (8, "gamma-0.3", f"{ETA} --eta2=0.05 --entropy_estimate=sampled"),
    "variant-eta1": (8, "gamma-0.3", ETA),  # to the bit also both with masked_grad "detached"
    # Controls: what the small entropy does without the perception term; and what a push of the
    # gated term's size does that does not ask what a token owes to the image.
    "control-eta1": (8, "grpo gamma-0.3", "--gamma=0 --eta1=0.05"),
    "control-push": (8, "grpo gated-10", "--gamma=10"),
}


def start_arm(name, seed):
    """The trainer of one run of one arm, before its first step."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)  # for the noise of methods.py; all else has generators of its own
    config, run = ts.parse_args(["--seed", str(seed), *ARMS[name][2].split()])
    learner = toy.warm_start(seed=seed, recipe=WARM_START, task=run.task)
    rows = toy.toy_dataset("train", 2048, seed=seed, task=run.task)
    return ts.Trainer(*learner, config, run, rows.select(range(0, len(rows), stride(name))))


def take_step(trainer, name):
    """Its next step, on the arm's objective: a line of metrics."""
    if own := own_objective(name):
        progress = (trainer.steps_done + 1) / trainer.run.steps
        trainer.objective = partial(own, progress=progress)
    return trainer.step()


def run_arm(name, seed, path):
    """One run of one arm: a line of metrics for each step, and what the policy writes."""
    trainer, lines = start_arm(name, seed), []
    model, processor = trainer.model, trainer.processor
    config, run = trainer.config, trainer.run
    split = "validation" if name.startswith("choose-") else "test"
    test = toy.toy_dataset(split, stride(name) * QUESTIONS, task=run.task)
    test = test.select(range(0, len(test), stride(name)))
    for step in range(run.steps + 1):
        line = take_step(trainer, name) if step else {"step": 0}
        if step % run.eval_every == 0 or step == run.steps:
            groups = ts.evaluate(model, processor, config, test)
            line |= {f"eval_{key}": value for key, value in ts.summarise(groups).items()}
            told = [(t, s["accuracy"], g.row) for g in groups for t, s in zip(g.texts, g.scores)]
            read = [toy.perceived(text, row) for text, _, row in told]
            line["eval_read"] = mean(read)
            line["eval_lucky"] = mean(right and not saw for saw, (_, right, _) in zip(read, told))
            line["texts"] = [group.texts[0] for group in groups[:6]]
        if step == run.steps:
            blind = replace(config, mask_ratio=1.0)
            blind = ts.evaluate(model, processor, blind, test, masked=True)
            line["eval_grounding"] = ts.grounding(groups, blind)
        lines.append(line)
    draft = path.with_suffix(".part")
    with gzip.open(draft, "wt") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    draft.replace(path)


def own_objective(arm):
    """The objective of an arm such as "pgpo", "largest-pgpo" or "choose-pgpo@6"; None: PAPO's."""
    method, _, weight = re.sub("^(largest|long|choose)-", "", arm).partition("@")
    own = OBJECTIVES.get(method)
    return partial(own, weight=float(weight)) if weight else own


def stride(arm):
    """Dependencies come in turn: the notebook's arms ask every third row, those of high."""
    return 3 if arm.startswith("lesson") else 1


def load_runs(folder):
    """{arm: {seed: lines}} of all finished runs, in the order of ARMS."""
    runs = {}
    for path in folder.glob("*.jsonl.gz"):
        arm, seed = path.name.removesuffix(".jsonl.gz").rsplit("-seed", 1)
        with gzip.open(path, "rt") as file:
            runs.setdefault(arm, {})[int(seed)] = [json.loads(line) for line in file]
    return {arm: dict(sorted(runs[arm].items())) for arm in ARMS if arm in runs}


def write_table(runs, path):
    """arms.csv, in % (read: all digits read right; lucky: right although they are not): each arm's
    mean over its seeds; over those it shares with its baseline the paired difference, and that
    relative to the baseline's mean, taken as exact. A baseline of all is compared with none."""
    measures = ["accuracy", *(f"accuracy_{kind}" for kind in reversed(toy.DEPENDENCIES))]
    measures += [*(f"error_{kind}" for kind in toy.ERROR_TYPES), "read", "lucky"]
    header = "arm seeds step measure mean half_interval baseline shared_seeds minus_baseline "
    header += "minus_half_interval relative relative_half_interval"
    table = [header.split()]
    for arm, baseline in [(name, base) for name in runs for base in ARMS[name][1].split()]:
        if not (shared := shared_seeds(runs, [arm, baseline])):
            continue
        first = runs[arm][shared[0]]
        steps = [line["step"] for line in first if "eval_accuracy" in line] + ["run"]
        # The notebook's arms ask questions of one dependency.
        asked = [measure for measure in measures if f"eval_{measure}" in first[0]]
        for step, measure in itertools.product(steps, asked):
            own = interval(scores(runs, [arm], step, measure)[arm])
            pair = scores(runs, [arm, baseline], step, measure)
            against = [""] * 6
            if arm != baseline:
                minus = interval([a - b for a, b in zip(pair[arm], pair[baseline])])
                scale = 100 / mean(pair[baseline]) if any(pair[baseline]) else math.nan
                relative = [scale * x for x in minus]
                against = [baseline, len(shared), *(f"{x:.2f}" for x in (*minus, *relative))]
            cells = (f"{x:.2f}" for x in own)
            table.append([arm, len(runs[arm]), step, measure, *cells, *against])
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(table)


def write_texts(runs, path):
    """texts.md: what each arm's first seed writes to the same three questions at the end."""
    rows = toy.toy_dataset("test", 9)
    parts = ["# What the policies write at the end\n"]
    for arm, by_seed in runs.items():
        seed = min(by_seed)
        texts = zip(rows["digits"][:: stride(arm)], by_seed[seed][-1]["texts"][:3])
        answers = "\n".join(f"    {' '.join(map(str, digits))} -> {text}" for digits, text in texts)
        head = f"{arm}, seed {seed}: the digits on the picture, and the response"
        parts.append(f"{head}\n\n{answers}\n")
    path.write_text("\n".join(parts), encoding="utf-8")


# As wide as a page's text, legible on a phone; colours of Okabe and Ito, for colour-blind readers.
page = lambda height: Figure(figsize=(7, height), layout="constrained")
COLOURS = "#000000 #0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #999999".split()
METRICS = {  # metric: (title, factor)
    "eval_accuracy": ("held-out accuracy, %", 100),
    "eval_accuracy_high": ("high vision dependency, %", 100),
    "reward": ("training reward", 1),
    "kl_prcp": (r"KL[$\pi\,\|\,\pi_{mask}$], nats per token", 1),
    "clip_high_fraction": ("tokens with r > 1 + eps_h, %", 100),
    "entropy": (r"H[$\pi$], nats per token", 1),
    "masked_entropy": (r"H[$\pi_{mask}$], nats per token", 1),
}


def spread(values):
    """What a picture shows around a mean: the 95 % interval of eight seeds, or all of fewer."""
    centre, half = interval(values)
    return (centre - half, centre + half) if len(values) >= 8 else (min(values), max(values))


def plot_curves(runs, *rows):
    """Rows of two panels: (labels {arm: words}, metrics), the mean over seeds in its spread."""
    figure = page(2.9 * len(rows))
    strips = figure.subfigures(len(rows), squeeze=False).flat
    for i, ((labels, metrics), strip) in enumerate(zip(rows, strips)):
        seeds = shared_seeds(runs, labels)
        for axis, metric in zip(strip.subplots(1, 2), metrics.split()):
            title, factor = METRICS[metric]
            for arm, colour, style in zip(labels, COLOURS, ["-", "--", "-.", ":"] * 2):
                steps = [line["step"] for line in runs[arm][seeds[0]] if metric in line]
                lines = [[runs[arm][seed][step] for seed in seeds] for step in steps]
                values = [[factor * line.get(metric, math.nan) for line in row] for row in lines]
                look = dict(color=colour, label=labels[arm])
                axis.plot(steps, list(map(mean, values)), style, linewidth=2, **look)
                low, high = zip(*map(spread, values))
                axis.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
            axis.set(title=title, xlabel="step", ylim=(0, 100 if "eval" in metric else None))
            axis.grid(alpha=0.3)
        if i + 1 == len(rows) or rows[i + 1][0] != labels:  # rows of the same arms share a legend
            below = dict(ncols=2 if len(labels) == 4 else 3, loc="outside lower center")
            strip.legend(*axis.get_legend_handles_labels(), frameon=False, **below)
    return figure


def plot_ladders(runs, panels, relative=False):
    """Accuracy over gamma, or over its multiple of the term's best. panels: title, "run" or "end",
    the arm without the term (a line), {"PAPO" or "gated": {gamma: arm}}. Every seed is a dot; the
    mean is filled, with its 95 % interval, where there are eight seeds, else hollow."""
    figure, labels = page(3.9), {}  # label: what is drawn
    xlabel = "gamma / its best value in the first world" if relative else "gamma"
    seeds = lambda count: "8 seeds" if count >= 8 else "3 or 4 seeds"
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (title, when, base, terms) in zip(axes, panels):
        counts = set()
        for (term, ladder), colour in zip(terms.items(), COLOURS[1:]):
            unit = {"PAPO": 0.3, "gated": 10}[term] if relative else 1
            aside = 1.1 if term == "gated" else 1  # the terms side by side
            for gamma, arm in ladder.items():
                values, x = scores(runs, [arm], when)[arm], gamma / unit * aside
                counts.add(count := len(values))
                axis.plot([x] * count, values, ".", color=colour, alpha=0.4, markeredgewidth=0)
                half, fill = (interval(values)[1], colour) if count >= 8 else (None, "white")
                look = dict(fmt="D", color=colour, mfc=fill, markersize=6, capsize=4)
                labels[f"{term}, {seeds(count)}"] = axis.errorbar(x, mean(values), half, **look)
        for count in sorted(counts):
            level = mean(scores(runs, [base], when)[base][:count])
            line = axis.axhline(level, color=COLOURS[0], linestyle="--" if count >= 8 else ":")
            labels[f"gamma 0, {seeds(count)}"] = line
        axis.set(xscale="log", xlabel=xlabel, title=f"{title}, %", ylim=(-3, 103))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
    names, lines = zip(*sorted(labels.items()))
    figure.legend(lines, names, frameon=False, ncols=2, loc="outside lower center")
    return figure


def plot_arms(runs, baseline, labels):
    """Held-out accuracy at the end, a dot per seed and the mean; and over the run the difference
    from the baseline, paired by seed, with its 95 % interval. labels: {arm: words}."""
    end, run = (scores(runs, labels, when) for when in ("end", "run"))
    gains = {arm: [a - b for a, b in zip(run[arm], run[baseline])] for arm in labels}
    del gains[baseline]
    figure = page(1.1 + 0.3 * len(labels))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, values in zip(axes, (end, gains)):
        for row, arm in enumerate(labels):
            if arm in values:
                dots = dict(color=COLOURS[6], alpha=0.6, markersize=5)
                axis.plot(values[arm], [row] * len(values[arm]), "o", **dots)
                half = interval(values[arm])[1] if values is gains else None
                look = dict(fmt="D", color=COLOURS[0], markersize=5, capsize=3)
                axis.errorbar(mean(values[arm]), row, xerr=half, **look)
        axis.grid(alpha=0.3)
    axes[0].set_title("accuracy at the end, %", fontsize=11)
    axes[0].set(xlim=(-3, 103), yticks=range(len(labels)), yticklabels=labels.values())
    axes[0].invert_yaxis()
    axes[1].axvline(0, color=COLOURS[7], linewidth=1)
    axes[1].set_title(f"over the run, minus\n{labels[baseline]}, points", fontsize=11)
    return figure


def plot_errors(runs, labels):
    """Shares of responses by type of error at the end, mean over seeds."""
    figure, left = page(1 + 0.35 * len(labels)), [0.0] * len(labels)
    axis = figure.subplots()
    for kind, colour in zip(toy.ERROR_TYPES, COLOURS[1:]):
        shares = list(map(mean, scores(runs, labels, "end", f"error_{kind}").values()))
        axis.barh(list(labels.values()), shares, left=left, color=colour, label=kind)
        left = [a + b for a, b in zip(left, shares)]
    axis.set(xlabel="wrong responses at the end, % of all")
    axis.invert_yaxis()
    figure.legend(frameon=False, ncols=5, loc="outside upper center", columnspacing=1)
    return figure


def draw(runs):
    """{name: picture} of the whole study."""
    labels = lambda text: dict(line.split(": ") for line in text.split("; "))  # {arm: words}
    grpo = labels("grpo: GRPO; papo-g: PAPO-G, gamma 0.02; gamma-0.3: PAPO-G, gamma 0.3")
    dapo = labels(
        "dapo: DAPO; papo-d: PAPO-D, gamma 0.01; papo-d-entropy-only: PAPO-D, gamma 0; "
        "papo-d-gamma-0.3: PAPO-D, gamma 0.3"
    )
    long = labels("long-grpo: GRPO; long-gamma-0.3: PAPO, gamma 0.3")
    long["long-gated-10"] = "gated, gamma 10"
    steep = {"papo-g": "gamma 0.02"} | {f"gamma-{x}": f"gamma {x}" for x in (0.3, 1, 3, 10)}
    rescues = labels(  # those on eight seeds
        "gamma-3: no rescue; rescue-eta1: eta1; rescue-eta2: eta2; rescue-both: eta1 and eta2; "
        "rescue-beta: beta; entropy-only: eta1, gamma 0; grpo: GRPO"
    )
    masks = labels("mask-0.4: 40 % black; gamma-0.3: 60 % black; mask-0.8: 80 % black")
    masks |= labels("mask-1: all black; grpo: GRPO")
    variants = labels(
        "gamma-0.3: PAPO-G, gamma 0.3; variant-full: gradient through mask; "
        "variant-token: one mean over tokens; variant-eta-exact: eta1, eta2 exact; "
        "variant-eta1: eta1 exact; variant-eta-sampled: eta1, eta2 sampled; grpo: GRPO"
    )
    made = lambda world, arms: {  # those of question 9's that have runs
        world + arm: compare.NAMES[arm] for arm in arms if len(runs.get(world + arm, ())) > 2
    }
    longer = made("long-", compare.LONGER)
    accuracy = "eval_accuracy eval_accuracy_high"
    signs = "eval_accuracy reward", "kl_prcp clip_high_fraction", "entropy masked_entropy"
    terms = lambda prefix, gammas: {  # {"PAPO" or "gated": {gamma: arm}}
        words: {gamma: f"{prefix}{term}-{gamma}" for gamma in gammas[term]}
        for term, words in (("gamma", "PAPO"), ("gated", "gated"))
    }
    first, second, on_dapo = terms("", FIRST), terms("largest-", SECOND), terms("papo-d-", ON_DAPO)
    first["PAPO"][0.02], on_dapo["PAPO"][0.01] = "papo-g", "papo-d"
    moments = ("accuracy over the run", "run"), ("accuracy at the end", "end")
    both = lambda base, terms: [(*moment, base, terms) for moment in moments]
    margin = [
        ("sum of the digits:\naccuracy at the end", "end", "grpo", first),
        ("largest of the digits:\naccuracy at the end", "end", "largest-grpo", second),
    ]
    return {
        "main": plot_curves(runs, (grpo, accuracy), (dapo, accuracy)),
        "errors": plot_errors(runs, grpo | dapo),
        "signs": plot_curves(runs, *((steep, metrics) for metrics in signs)),
        "gamma": plot_ladders(runs, both("grpo", {"PAPO": first["PAPO"]})),
        "gated": plot_ladders(runs, both("grpo", first)),
        "papo-d": plot_ladders(runs, both("papo-d-entropy-only", on_dapo)),
        "margin": plot_ladders(runs, margin, relative=True),
        "long": plot_curves(runs, *((arms, accuracy) for arms in (long, longer) if arms)),
        "rescue": plot_arms(runs, "gamma-3", rescues),
        "methods": plot_arms(runs, "dapo", made("", compare.NAMES)),
        "mask": plot_arms(runs, "gamma-0.3", masks),
        "variants": plot_arms(runs, "gamma-0.3", variants),
    }


def main(argv=None):
    """Run what is missing; write the tables of all there is, and the pictures if that is all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="runs and results")
    parser.add_argument("--workers", type=int, default=2, help="processes, one core each")
    parser.add_argument("--only", default="", help="arms whose name begins so; no such arm: draw")
    args = parser.parse_args(argv)
    folder = args.out / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [
        (arm, seed, path)
        for arm, (seeds, *_) in ARMS.items()
        for seed in range(seeds)
        if arm.startswith(args.only)
        and not (path := folder / f"{arm}-seed{seed}.jsonl.gz").exists()
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
    write_table(runs, args.out / "arms.csv")
    write_texts(runs, args.out / "texts.md")
    (args.out / "methods.md").write_text(compare.table(runs) + "\n")
    if runs.keys() >= ARMS.keys() - compare.ARMS.keys():
        for name, figure in draw(runs).items():
            save_picture(figure, args.out / f"{name}.png")


if __name__ == "__main__":
    main()
