"""Which use of the second view is worth its cost? PAPO's successors side by side, on DAPO's base.

`python -m study.compare` prints the table of the runs that are kept (methods.md); with `time` it
first measures what a step costs, in steps.json, for hours. Each method is there with its
paper's constants, and, as NAME@WEIGHT, with its one weight (methods.py) as chosen here: the best
over the run of five, on the validation digits of the first world, with seeds 0 and 1. reproduce.py
takes its statistics from here.
"""

import itertools
import json
import math
import sys
import time
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np
from scipy.optimize import brentq
from scipy.stats import t as student
from scipy.stats import ttest_1samp

MASKED = "--algorithm=papo-d --eta1=0 --eta2=0"  # its gamma is there for the masked pass alone
FLAGS = {  # Name: flags of train_small.py, the objective of that name is in methods.py
    "vppo": f"{MASKED} --mask_ratio=0.5 --format_weight=0",
    "pgpo": "--algorithm=dapo",
    "pgpo-dev": "--algorithm=dapo",
    "pgpo-black": f"{MASKED} --mask_ratio=1",
    "vgpo": "--algorithm=dapo --format_weight=0",
    "dvrp": MASKED,
    "vepo": "--algorithm=dapo --clip_high=0.2 --clip_dual=inf",
    # PAPO's term without its entropies, as the others are run; its gate.
    "dapo-gamma-0.3": f"{MASKED} --gamma=0.3",
    "dapo-gated-10": f"{MASKED} --gated=True --gamma=10",
    # Controls on the same base: log pi pushed up where A > 0, a small entropy term.
    "dapo-push": "--algorithm=dapo",
    "dapo-eta1": "--algorithm=papo-d --gamma=0 --eta1=0.05 --eta2=0",
}
BASES = {  # what they are held against in every world, in the first as arms of reproduce.py
    "dapo": "--algorithm=dapo",
    "papo-d": "--algorithm=papo-d",
    "papo-d-entropy-only": "--algorithm=papo-d --gamma=0",
    "papo-d-gamma-0.3": "--algorithm=papo-d --gamma=0.3",
    "papo-d-gated-10": "--algorithm=papo-d --gated=True --gamma=10",
}
LADDERS = {  # from the weakest to the strongest; of a share of tokens the smaller is the stronger
    "vppo": (0.8, 0.6, 0.4, 0.2, 0.1),
    "pgpo": (0.2, 0.6, 2, 6, 20),
    "vgpo": (0.03, 0.1, 0.3, 1, 3),
    "dvrp": (0.01, 0.03, 0.1, 0.3, 1),
    "vepo": (0.8, 0.6, 0.4, 0.2, 0.1),
    "dapo-push": (1, 3, 10, 30, 100),
}
# Where the best is not the authors': of PGPO it is.
CHOSEN = {"vppo": 0.6, "vgpo": 1, "dvrp": 0.3, "vepo": 0.4, "dapo-push": 30}
# 160 updates: the best over the run, but the term alone, which was run last; and their baselines.
LONGER = "dapo papo-d-entropy-only papo-d-gamma-0.3 papo-d-gated-10 dvrp@0.3 dapo-push".split()
HARM = 5  # points below DAPO at the end, from which on a weight counts as harmful
ARMS = {name: (8, "dapo dapo-push dapo-gamma-0.3", flags) for name, flags in FLAGS.items()}
ARMS |= {f"{name}@{weight}": ARMS[name] for name, weight in CHOSEN.items()}
for name, flags in [*BASES.items(), *((name, ARMS[name][2]) for name in ARMS)]:
    for world, seeds, more in ("largest-", 8, "--task=largest"), ("long-", 4, "--steps=80"):
        if world == "largest-" or name in LONGER:
            bases = " ".join(world + x for x in ("dapo", "dapo-push", "papo-d-entropy-only"))
            ARMS[world + name] = seeds, bases, f"{more} {flags}"
ARMS["choose-dapo"] = 2, "choose-dapo", BASES["dapo"]
for method, weights in LADDERS.items():
    ARMS |= {f"choose-{method}@{w}": (2, "choose-dapo", FLAGS[method]) for w in weights}
NAMES = {  # the arms that are compared, in words
    "dapo": "DAPO",
    "papo-d": "PAPO-D, gamma 0.01",
    "papo-d-entropy-only": "PAPO-D, gamma 0",
    "papo-d-gamma-0.3": "PAPO-D, gamma 0.3",
    "papo-d-gated-10": "PAPO-D, gated, gamma 10",
    "dapo-gamma-0.3": "the term alone, gamma 0.3",
    "dapo-gated-10": "the term alone, gated, gamma 10",
    "vppo": "VPPO",
    "vppo@0.6": "VPPO, weight 0.6",
    "pgpo": "PGPO",
    "pgpo-dev": "PGPO, development code",
    "pgpo-black": "PGPO, black image",
    "vgpo": "VGPO",
    "vgpo@1": "VGPO, weight 1",
    "dvrp": "DVRP",
    "dvrp@0.3": "DVRP, weight 0.3",
    "vepo": "VEPO",
    "vepo@0.4": "VEPO, weight 0.4",
    "dapo-push": "push, on DAPO",
    "dapo-push@30": "push 30, on DAPO",
    "dapo-eta1": "eta1 0.05, on DAPO",
    "grpo": "GRPO",
    "gamma-0.3": "PAPO, gamma 0.3, on GRPO",
    "gated-10": "PAPO, gated, gamma 10, on GRPO",
    "control-push": "push, on GRPO",
    "control-eta1": "eta1 0.05, on GRPO",
}
# The arms' prefix: what is asked of them.
WORLDS = {"": "The sum of the digits", "largest-": "The largest of the digits"}
WORLDS["long-"] = "The sum of the digits, 160 updates"
COSTS = Path(__file__).with_name("steps.json")


def interval(values):
    """Mean and half the width of its 95 % interval (Student's t); nan for fewer than two values."""
    if len(values) < 2:
        return mean(values), math.nan
    half = student.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return mean(values), half


def measured(lines, measure, when, pace=1):
    """A run's held-out measure, %, at a step, the "end", or over the "run" (mean after step 0); or
    over "time": mean over steps s of the line through the evaluations, at s * pace."""
    name = f"eval_{measure}"
    values = {x["step"]: 100 * x[name] for x in lines if name in x}
    if when == "run":
        return mean(list(values.values())[1:])
    if when == "time":
        reached = [pace * step for step in range(1, max(values) + 1)]
        return mean(np.interp(reached, list(values), list(values.values())).tolist())
    return values[max(values) if when == "end" else when]


def shared_seeds(runs, arms):
    """The seeds that all of the arms have: nothing else is compared."""
    return sorted(set.intersection(*(set(runs.get(arm, ())) for arm in arms)))


def scores(runs, arms, when, measure="accuracy"):
    """{arm: what it measures on each of the shared seeds}."""
    seeds = shared_seeds(runs, arms)
    return {arm: [measured(runs[arm][seed], measure, when) for seed in seeds] for arm in arms}


def gains(runs, arm, base, when, measure="accuracy", cost=1):
    """An arm's paired differences from a base on the seeds that both have. Over "time": that of the
    shorter run, where a step of the arm costs as much as `cost` of its base."""
    paces = min(1, 1 / cost), min(1, cost)
    score = lambda arm, seed, pace: measured(runs[arm][seed], measure, when, pace)
    seeds = shared_seeds(runs, [arm, base])
    return [score(arm, seed, paces[0]) - score(base, seed, paces[1]) for seed in seeds]


def break_even(runs, arm, base):
    """What a step of the arm may cost, in steps of its base, for the two to have the same mean
    accuracy over the time of the shorter run; and the ends of its 95 % interval."""

    def level(side):
        lead = lambda cost: np.dot((1, side), interval(gains(runs, arm, base, "time", cost=cost)))
        if lead(0.1) <= 0 or lead(10) >= 0:
            return 0.0 if lead(0.1) <= 0 else math.inf
        return brentq(lead, 0.1, 10, xtol=1e-4)

    return level(0), level(-1), level(1)


def holm(values, level=0.05):
    """Which p-values survive Holm's correction: the k-th smallest of m is held against
    level / (m - k + 1), up to the first that fails."""
    order, kept = sorted(values, key=values.get), set()
    for k, name in enumerate(order):
        if values[name] > level / (len(order) - k):
            break
        kept.add(name)
    return kept


def table(runs):
    """Markdown, a table for each world: each method's paired differences from DAPO and from the
    push, in points with 95 % intervals, * where Holm's correction of all of them, in all worlds,
    leaves it; then means at the end, in %; a step's cost, the differences from DAPO and GRPO over
    the same time, and where the first is none (break_even). Below them the ladders."""
    costs = json.loads(COSTS.read_text())
    columns = [("dapo", "run", "accuracy"), ("dapo-push", "run", "accuracy")]
    columns += [("dapo", "end", "accuracy"), ("dapo", "end", "accuracy_high")]
    points = lambda values: "{:+.1f} ± {:.1f}".format(*interval(values))
    spread = "{:.2f} ({:.2f} to {:.2f})"
    cells, chances = {}, {}
    for world, arm, (base, when, measure) in itertools.product(WORLDS, NAMES, columns):
        pair = [world + arm, world + base]
        if arm not in ("dapo", base) and len(shared_seeds(runs, pair)) > 1:
            values = gains(runs, *pair, when, measure)
            place = world + arm, (base, when, measure)
            cells[place] = points(values)
            chances[place] = ttest_1samp(values, 0).pvalue if any(values) else 1.0
    kept = holm(chances)
    head = ["arm", "seeds", "over the run", "over the run: minus the push", "the end"]
    head += ["the end: high dependency", "misread", "all digits read", "lucky", "grounding"]
    lines = [
        "Accuracy in points, minus DAPO's; then shares of the responses at the end, %. The words"
    ]
    lines += ["are those of [question 9](README.md). A cost is the median of four seeds, with"]
    lines += ["the least and the most; what an arm pays up to has its 95 % interval.", ""]
    for world, title in WORLDS.items():
        timed = ["cost of a step", "over the same time", "the same: minus GRPO", "pays up to"]
        rows = [[*head, *timed], ["---"] * 14]
        for name in NAMES:
            if (arm := world + name) not in runs:
                continue
            shown = [cells.get((arm, c), "") + "*" * ((arm, c) in kept) for c in columns]
            for measure in ("error_perception", "read", "lucky", "grounding"):
                known = all(f"eval_{measure}" in run[-1] for run in runs[arm].values())
                values = scores(runs, [arm], "end", measure)[arm] if known else []
                shown.append(f"{mean(values):.1f}" if known else "")
            cost = costs.get(arm)
            shown.append(spread.format(median(cost), min(cost), max(cost)) if cost else "")
            for base in (world + "dapo", world + "grpo"):
                same = ""
                if cost and arm != base and shared_seeds(runs, [arm, base]):
                    pace = median(own / other for own, other in zip(cost, costs[base]))
                    same = points(gains(runs, arm, base, "time", cost=pace))
                shown.append(same)
            known = (arm, columns[0]) in cells
            level = spread.format(*break_even(runs, arm, world + "dapo")) if known else ""
            rows.append([NAMES[name], str(len(runs[arm])), *shown, level])
        lines += [f"## {title}", "", *(f"| {' | '.join(row)} |" for row in rows), ""]
    lines += [f"{len(chances)} comparisons, {len(kept)} survive.", "", "## Weights", ""]
    lines.append(ladder_table(runs))
    return "\n".join(lines)


def best_weight(runs, method):
    """The best of a method's ladder over the run, and {weight: (over the run, at the end)}: points
    minus DAPO on the validation digits, means over the seeds; None for a ladder not yet climbed."""
    gains = {}
    for weight in LADDERS[method]:
        arms = [f"choose-{method}@{weight}", "choose-dapo"]
        if not shared_seeds(runs, arms):
            return None
        both = [scores(runs, arms, when).values() for when in ("run", "end")]
        gains[weight] = tuple(mean(own) - mean(base) for own, base in both)
    return max(gains, key=gains.get), gains


def ladder_table(runs):
    """Markdown: each ladder, over the run, with the chosen weight in bold; and the margin."""
    rows = ["| arm | weight: over the run, minus DAPO | margin |", "| --- | --- | --- |"]
    for method, weights in LADDERS.items():
        if found := best_weight(runs, method):
            best, gains = found
            cells = [f"{w:g}: {gains[w][0]:+.1f}" for w in weights]
            cells[weights.index(best)] = f"**{cells[weights.index(best)]}**"
            stronger = weights[weights.index(best) :]
            harmful = [w for w in stronger if gains[w][1] < -HARM]
            last = (harmful or stronger)[0 if harmful else -1]
            margin = "more than " * (not harmful) + f"{max(last / best, best / last):.2g}"
            rows.append(f"| {NAMES[method]} | {', '.join(cells)} | {margin} |")
    return "\n".join(rows)


def step_costs(seed, steps=40):
    """{arm: processor time of a run's steps over DAPO's in its world}: on one seed, with the
    groups it redraws, the arms' steps in turn, so that the machine's load is shared."""
    from study.reproduce import ARMS, start_arm, take_step  # it takes its statistics from here

    costs = {}
    for world in ("", "largest-"):
        arms = [world + name for name in NAMES if world + name in ARMS]
        trainers, spent = {arm: start_arm(arm, seed) for arm in arms}, dict.fromkeys(arms, 0)
        for _ in range(steps):
            for arm, trainer in trainers.items():
                start = time.process_time()
                take_step(trainer, arm)
                spent[arm] += time.process_time() - start
        costs |= {arm: round(spent[arm] / spent[world + "dapo"], 3) for arm in arms}
    return costs


if __name__ == "__main__":
    from study.reproduce import load_runs

    if "time" in sys.argv:
        costs = [step_costs(seed) for seed in range(4)]
        costs = {arm: [one[arm] for one in costs] for arm in costs[0]}
        COSTS.write_text(json.dumps(costs, indent=1) + "\n")
    print(table(load_runs(COSTS.with_name("runs"))))
