"""The paper's claims in miniature: `python reproduce.py` trains every arm of the study and writes results/.

PROTOCOL
    World       toy.py as `python train_small.py` uses it: four digits, its warm start, 16 questions x 8 responses a step,
                2 updates a step, learning rate 1e-4, 40 steps. An arm changes only what its line in ARMS says.
    Seeds       the same for every arm: a seed decides warm start, questions, samples and masks, so arms are compared pair by
                pair. 8 seeds for the main comparison, the rescue's baseline and its two best arms; 3 for the others.
    Measure     avg@8 at temperature 1 on 96 questions from the test split of handwritten digits, at steps 0, 10, 20, 30, 40:
                at the end (step 40), and over the run (mean of steps 10 to 40). Mean over seeds with the 95 % interval of
                Student's t; differences are paired by seed.
    Chosen      on the validation split, whose digits no other split shares, with seeds 0 and 1. The world (share of invented
                digits 0.75, growing over 80 steps; learning rate; 40 steps): GRPO starts near chance where the picture is
                needed, and learns within the run. gamma 0.3, the best over the run of 0.02, 0.1, 0.3, 1 and 3. RESCUE_GAMMA 3,
                which breaks one of the two seeds by step 20, while the other begins to fall after step 30; of eta1 0.3, 1, 3
                and beta 0.3, 1 there, ETA and BETA kept most of the accuracy. All else is the paper's value, or a fixed ladder
                around it.
    Tried       to make the paper's 0.02 separate more, with the same two seeds: 8 questions a step for 60 steps, 4 updates,
                beta 0, only questions of high dependency, a share of invented digits of 0.85. In all of them 0.02 leads by 2 to
                5 points in the middle of the run, and GRPO catches up; so the world stayed. With a share of 0.6 GRPO
                learns in 15 steps and arms hardly differ, without gradual growth some seeds forget how to see, and at
                learning rate 3e-4 runs are unstable.
    Order       GRPO and PAPO-G with gamma 0.02 ran first, on 8 seeds, and were looked at before the other arms were fixed.
                The rescue's baseline and its two best arms (SAVED) got five more seeds after three had been looked at.
Runs are independent processes, and kept as results/runs/ARM-seedSEED.jsonl.gz: one already there is not repeated.
"""

import argparse
import csv
import gzip
import json
import math
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import mean, stdev

import matplotlib
import torch
from matplotlib import pyplot as plt
from tqdm import tqdm

import toy
import train_small as ts

matplotlib.use("Agg")

EIGHT, THREE = range(8), range(3)
BEST, RESCUE_GAMMA, ETA, BETA = 0.3, 3.0, 3.0, 1.0  # see "Chosen" above
# The rescues: which entropies are kept low, with which gradients through the masked pass.
ETAS = {"eta1": dict(eta1=ETA), "eta2": dict(eta2=ETA), "both": dict(eta1=ETA, eta2=ETA)}
GRADS = {"eta1": ("detached", "full"), "eta2": ("entropy", "full"), "both": ("entropy", "full")}
SAVED = (
    ("eta1", "detached", "exact"),
    ("both", "entropy", "exact"),
)  # the rescues that looked best on three seeds
GATED_LADDER = {10.0: EIGHT, 100.0: EIGHT, 3.0: THREE, 300.0: THREE}  # 10: its best on the validation split
# The notebook's section 11: short runs on questions of high vision dependency alone, perception KL and entropy on or off.
LESSON = dict(prompts_per_batch=12, updates_per_batch=1, beta=0.0, learning_rate=2e-4, steps=24, eval_every=6)
TWO_BY_TWO = {
    "grpo": dict(gamma=0.0),
    "kl": dict(gamma=0.2),
    "entropy": dict(gamma=0.0, eta1=0.1, algorithm="papo-g"),
    "both": dict(gamma=0.2, eta1=0.1),
}
ARMS = {  # name: (seeds, arms it is compared with, flags of train_small.py that differ from its defaults: PAPO-G)
    "grpo": (EIGHT, "grpo", dict(gamma=0.0)),
    "papo-g": (EIGHT, "grpo", {}),
    f"gamma-{BEST:g}": (EIGHT, "grpo", dict(gamma=BEST)),
    "dapo": (EIGHT, "dapo", dict(algorithm="dapo")),
    "papo-d": (EIGHT, "dapo papo-d-entropy-only", dict(algorithm="papo-d")),  # gamma 0.01, eta1 = eta2 = 0.03
    "papo-d-entropy-only": (
        EIGHT,
        "dapo",
        dict(algorithm="papo-d", gamma=0.0),
    ),  # what the entropy terms do alone
    f"papo-d-{BEST:g}": (EIGHT, "dapo papo-d-entropy-only", dict(algorithm="papo-d", gamma=BEST)),
    **{
        f"gamma-{gamma:g}": (EIGHT if gamma == RESCUE_GAMMA else THREE, "grpo", dict(gamma=gamma))
        for gamma in (RESCUE_GAMMA, 0.005, 0.05, 0.1, 0.2, 0.5, 1.0, 10.0)
    },
    # Left out because they are another arm to the bit: with "detached", H[pi_mask] is a constant, so eta2 does nothing and
    # both are eta1 alone; and eta1 alone is the same with "entropy" as with "detached".
    "rescue-beta": (THREE, f"gamma-{RESCUE_GAMMA:g} grpo", dict(gamma=RESCUE_GAMMA, beta=BETA)),
    **{
        f"rescue-{name}-{grad}-{estimate}": (
            EIGHT if (name, grad, estimate) in SAVED else THREE,
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
    ),  # what the rescue does where there is nothing to rescue
    "rescue-none-full": (THREE, f"gamma-{RESCUE_GAMMA:g} grpo", dict(gamma=RESCUE_GAMMA, masked_grad="full")),
    **{
        f"mask-{ratio:g}": (THREE, f"gamma-{BEST:g}", dict(mask_ratio=ratio, gamma=BEST))
        for ratio in (0.4, 0.8, 1.0)
    },
    **{
        f"variant-{name}": (THREE, f"gamma-{BEST:g}", dict(gamma=BEST, **changes))
        for name, changes in {
            "full": dict(masked_grad="full"),
            "token": dict(aggregation="token"),
            "eta-exact": dict(eta1=0.05, eta2=0.05),
            "eta-sampled": dict(eta1=0.05, eta2=0.05, entropy_estimate="sampled"),
            "eta1": dict(eta1=0.05),  # to the bit also eta1 = eta2 = 0.05 with masked_grad "detached"
        }.items()
    },
    **{
        f"gated-{gamma:g}": (seeds, f"grpo gamma-{BEST:g}", dict(gamma=gamma, gated=True))
        for gamma, seeds in GATED_LADDER.items()
    },
    **{
        f"lesson-{name}": (range(4), "lesson-grpo", {**LESSON, **changes})
        for name, changes in TWO_BY_TWO.items()
    },
}


def run_arm(name, seed, steps, eval_size, recipe, path):
    """One run of one arm, with a line of metrics per step and, at each evaluation, what the policy writes."""
    torch.set_num_threads(1)
    model, processor = toy.warm_start(seed=seed, recipe=recipe)
    config, run = ts.parse_args(
        [f"--seed={seed}", *(f"--{flag}={value}" for flag, value in ARMS[name][2].items())]
    )
    train, test = toy.toy_dataset("train", 2048, seed=seed), toy.toy_dataset("test", eval_size, seed=0)
    if name.startswith("lesson"):  # dependencies come in turn, high first
        test = toy.toy_dataset("test", 3 * eval_size, seed=0)
        train, test = (rows.select(range(0, len(rows), 3)) for rows in (train, test))
    trainer, lines, steps = ts.Trainer(model, processor, config, run, train), [], min(steps, run.steps)
    for step in range(steps + 1):
        line = trainer.step() if step else {"step": 0}
        if step % run.eval_every == 0 or step == steps:
            groups = ts.evaluate(model, processor, config, test)
            line |= {f"eval_{key}": value for key, value in ts.summarise(groups).items()}
            line["eval_read"] = mean(toy.perceived(text, g.row) for g in groups for text in g.texts)
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
    t95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
    return mean(values), t95[len(values)] * stdev(values) / math.sqrt(len(values)) if len(
        values
    ) > 1 else math.nan


def measured(lines, measure, when):
    """One run's held-out measure in percent at a step, at the "end", or over the "run": the mean after the first."""
    values = {line["step"]: 100 * line[f"eval_{measure}"] for line in lines if "eval_accuracy" in line}
    return (
        mean(list(values.values())[1:]) if when == "run" else values[max(values) if when == "end" else when]
    )


def write_table(runs, path):
    """results/arms.csv, in percent: each arm's mean over its seeds; over the seeds it shares with its baseline the paired
    difference, and that relative to the baseline's mean, which is taken as exact."""
    measures = [
        "accuracy",
        "accuracy_low",
        "accuracy_medium",
        "accuracy_high",
        *(f"error_{kind}" for kind in toy.ERROR_TYPES),
    ]
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(
            [
                "arm",
                "seeds",
                "step",
                "measure",
                "mean",
                "half_interval",
                "baseline",
                "shared_seeds",
                "minus_baseline",
                "minus_half_interval",
                "relative",
                "relative_half_interval",
            ]
        )
        for arm, baseline in [(name, baseline) for name in runs for baseline in ARMS[name][1].split()]:
            shared = [seed for seed in runs[arm] if seed in runs.get(baseline, {})]
            if not shared:
                continue
            for step in [line["step"] for line in runs[arm][shared[0]] if "eval_accuracy" in line] + ["run"]:
                for measure in measures:
                    own, pair, other = (
                        [measured(runs[name][seed], measure, step) for seed in seeds]
                        for name, seeds in ((arm, runs[arm]), (arm, shared), (baseline, shared))
                    )
                    difference = interval([a - b for a, b in zip(pair, other)])
                    scale = 100 / mean(other) if any(other) else math.nan
                    cells = [
                        f"{x:.2f}" for x in (*interval(own), *difference, *(scale * x for x in difference))
                    ]
                    table.writerow(
                        [arm, len(own), step, measure, *cells[:2], baseline, len(shared), *cells[2:]]
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


COLOURS = [
    "#000000",
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#999999",
]  # Okabe and Ito


def seeds_of_all(runs, arms):
    """Those of the arms that have run, and the seeds they share: a picture compares nothing else."""
    arms = [arm for arm in arms if arm in runs]
    seeds = sorted(set.intersection(*(set(runs[arm]) for arm in arms))) if arms else []
    return (arms, seeds) if seeds else ([], [])


def plot_curves(runs, path, rows):
    """A row of panels {metric: title} for each list of arms: every seed thin, the mean bold."""
    rows = [(arms, panels) for arms, panels in rows if len(seeds_of_all(runs, arms)[0]) > 1]
    if not rows:
        return
    figure, axes = plt.subplots(
        len(rows), 3, figsize=(12.6, 3.4 * len(rows)), layout="constrained", squeeze=False
    )
    for (arms, panels), line_of_axes in zip(rows, axes):
        arms, seeds = seeds_of_all(runs, arms)
        for axis, (metric, title) in zip(line_of_axes, panels.items()):
            for arm, colour, style in zip(arms, COLOURS, ["-", "--", "-.", ":"] * 2):
                steps = [line["step"] for line in runs[arm][seeds[0]] if metric in line]
                values = [[runs[arm][seed][step].get(metric, math.nan) for step in steps] for seed in seeds]
                for each in values:
                    axis.plot(steps, each, style, color=colour, alpha=0.25, linewidth=0.7)
                axis.plot(
                    steps,
                    [mean(column) for column in zip(*values)],
                    style,
                    color=colour,
                    linewidth=2,
                    label=arm,
                )
            axis.set(title=title, xlabel="step")
            axis.grid(alpha=0.3)
        line_of_axes[0].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def plot_arms(runs, path, arms):
    """Held-out accuracy over the run and at the end, a line per seed and the mean; and over the run the paired difference from
    the first arm, with its 95 % interval."""
    arms, seeds = seeds_of_all(runs, arms)
    if len(arms) < 2:
        return
    over, end = (
        [[measured(runs[arm][seed], "accuracy", when) for seed in seeds] for arm in arms]
        for when in ("run", "end")
    )
    panels = {
        "accuracy over the run, %": over,
        "accuracy at the end, %": end,
        f"over the run, minus {arms[0]}": [[a - b for a, b in zip(row, over[0])] for row in over],
    }
    figure, axes = plt.subplots(1, 3, figsize=(12.6, 1 + 0.3 * len(arms)), layout="constrained", sharey=True)
    for axis, (title, values) in zip(axes, panels.items()):
        axis.plot(values, range(len(arms)), "o-", color=COLOURS[1], alpha=0.35, markersize=4, linewidth=0.8)
        centres, halves = zip(*map(interval, values))
        axis.errorbar(
            centres,
            range(len(arms)),
            xerr=halves if "minus" in title else None,
            fmt="D",
            color=COLOURS[0],
            markersize=5,
            capsize=3,
            elinewidth=1,
        )
        axis.set(title=title, yticks=range(len(arms)), yticklabels=arms)
        axis.grid(alpha=0.3)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def plot_errors(runs, path, arms):
    """Shares of responses by type of error at the end, mean over seeds."""
    arms, seeds = seeds_of_all(runs, arms)
    if len(arms) < 2:
        return
    figure, axis = plt.subplots(figsize=(10, 1 + 0.4 * len(arms)), layout="constrained")
    left = [0.0] * len(arms)
    for kind, colour in zip(toy.ERROR_TYPES, COLOURS[1:]):
        shares = [mean(measured(runs[arm][seed], f"error_{kind}", "end") for seed in seeds) for arm in arms]
        axis.barh(arms, shares, left=left, color=colour, label=kind)
        left = [a + b for a, b in zip(left, shares)]
    axis.set(xlabel="wrong responses at the end, % of all")
    axis.invert_yaxis()
    axis.legend(frameon=False, ncols=len(toy.ERROR_TYPES), loc="lower center", bbox_to_anchor=(0.5, 1))
    figure.savefig(path, dpi=80)
    plt.close(figure)


def draw(runs, out):
    """All tables and pictures of the runs there are; a picture with fewer than two arms is left out."""
    write_table(runs, out / "arms.csv")
    write_texts(runs, out / "texts.md")
    best, rescue = f"gamma-{BEST:g}", f"gamma-{RESCUE_GAMMA:g}"
    on_grpo, on_dapo = ["grpo", "papo-g", best], [arm for arm in ARMS if "dapo" in arm or "papo-d" in arm]
    accuracy = {
        "eval_accuracy": "held-out accuracy",
        "eval_accuracy_medium": "medium dependency",
        "eval_accuracy_high": "high dependency",
    }
    early = {"eval_accuracy": "held-out accuracy", "reward": "reward", "kl_prcp": "perception KL"}
    later = {
        "clip_high_fraction": "share clipped high",
        "entropy": r"H[$\pi_\theta$]",
        "masked_entropy": r"H[$\pi_{mask}$]",
    }
    plot_curves(runs, out / "main.png", [(on_grpo, accuracy), (on_dapo, accuracy)])
    steep = ["papo-g", best, "gamma-1", rescue, "gamma-10"]
    plot_curves(runs, out / "signs.png", [(steep, early), (steep, later)])
    plot_errors(runs, out / "errors.png", on_grpo + on_dapo)
    ladder = ["grpo", "papo-g", *(arm for arm in ARMS if arm.startswith("gamma"))]
    plot_arms(runs, out / "gamma.png", sorted(ladder, key=lambda arm: ARMS[arm][2].get("gamma", 0.02)))
    plot_arms(
        runs,
        out / "rescue.png",
        [rescue, *(arm for arm in ARMS if arm.startswith("rescue")), "entropy-only", "grpo"],
    )
    plot_arms(runs, out / "mask.png", [best, *(arm for arm in ARMS if arm.startswith("mask")), "grpo"])
    plot_arms(runs, out / "variants.png", [best, *(arm for arm in ARMS if arm.startswith("variant")), "grpo"])


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
    parser.add_argument(
        "--run", nargs=2, metavar=("ARM", "SEED"), help="one run in this process, as the study starts them"
    )
    args = parser.parse_args(argv)
    steps, eval_size, recipe, arms = 40, 96, toy.WarmStart(), ARMS
    if args.quick:
        steps, eval_size, recipe = (
            2,
            6,
            toy.WarmStart(short_stages=(), clean_steps=2, guess_steps=1, batch_size=4),
        )
        arms = {name: (range(2), *ARMS[name][1:]) for name in ("grpo", "papo-g")}
    args.out = args.out or Path("results-quick" if args.quick else "results")
    folder = args.out / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    path = lambda arm, seed: folder / f"{arm}-seed{seed}.jsonl.gz"
    if args.run:
        arm, seed = args.run[0], int(args.run[1])
        return run_arm(arm, seed, steps, eval_size, recipe, path(arm, seed))
    jobs = [
        (arm, seed)
        for arm, (seeds, *_) in arms.items()
        for seed in seeds
        if arm.startswith(args.only) and not path(arm, seed).exists()
    ]
    command = [sys.executable, __file__, "--out", str(args.out), *["--quick"] * args.quick]

    def start(job):
        with tempfile.TemporaryFile("w+") as errors:
            if subprocess.run([*command, "--run", *map(str, job)], stderr=errors).returncode:
                errors.seek(0)
                raise RuntimeError(f"{job[0]}, seed {job[1]}: {errors.read()[-2000:]}")

    with ThreadPoolExecutor(args.workers) as pool:
        waiting = [pool.submit(start, job) for job in jobs]
        try:
            for done in tqdm(as_completed(waiting), total=len(jobs), desc="runs"):
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # not hours later
            raise
    draw(load_runs(folder), args.out)


if __name__ == "__main__":
    main()
