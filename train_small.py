"""Train a Qwen vision-language model with PAPO on one machine: `python train_small.py --gamma 0.02`.

Without --model and --dataset it trains the embedded world of toy.py: a tiny Qwen2.5-VL that adds handwritten digits, on a CPU,
offline, in minutes. With them, any Qwen2-VL, Qwen2.5-VL or Qwen3-VL on any data set of images, questions and answers.
The algorithm is papo.py. This file is the program around it, in the order in which it runs:

    command line -> data -> model -> evaluation -> training loop -> what a run leaves behind
"""

import base64
import copy
import html
import io
import itertools
import json
import math
import resource
import shutil
import sys
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import mean
from typing import Literal

import datasets
import torch
from PIL import Image
from qwen_vl_utils.vision_process import fetch_image
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, HfArgumentParser

import toy
from papo import (PAPOConfig, encode_prompt, fit_image, group_logps, mask_patches, option, papo_step, roll_out,
                  sample_and_grade, score_constants, split_batch)

# ---------------------------------------------------------------------------------------------------------------------
# 1. The command line: one flag per field of PAPOConfig and of RunConfig
# ---------------------------------------------------------------------------------------------------------------------

# What makes an algorithm, without the sizes of the published runs: these fields of the preset of that name.
ALGORITHMS = {"grpo": "grpo", "dapo": "dapo", "papo-g": "papo-g-3b", "papo-d": "papo-d-3b"}
ALGORITHM_FIELDS = ("gamma", "beta", "eta1", "eta2", "masked_grad", "clip_high", "aggregation", "dynamic_sampling")
# The sizes that suit the embedded world; --preset brings the published ones back.
TOY_SIZES = dict(group_size=8, prompts_per_batch=16, updates_per_batch=2, max_new_tokens=64, learning_rate=1e-4, steps=60)


class UserError(Exception):
    """Something the user typed or fed in that cannot work: shown as one line, exit code 2."""


@dataclass
class RunConfig:
    """What to train, on what, and where to write it."""

    algorithm: Literal["grpo", "dapo", "papo-g", "papo-d"] = option(
        "papo-g", "loss weights, clipping, averaging and redrawing of GRPO or DAPO, or of PAPO on top of either")
    preset: str = option(None, "every value of a published recipe: papo-g-3b, papo-g-7b, papo-g-qwen3-2b, papo-g-no-ref, "
                         "papo-d-3b, papo-d-7b, grpo, dapo")
    seed: int = option(0, "decides the warm start, the questions, the samples and the masks")
    steps: int = option(None, "rollout batches to train on; default 60 in the embedded world, else two epochs as published")
    out: str = option(None, "folder of the run; default runs/ALGORITHM-gammaGAMMA-seedSEED")
    digits: int = option(4, "embedded world: handwritten digits per image, 1 to 9; more is harder")
    eval_size: int = option(96, "held-out questions, each answered 8 times")
    eval_every: int = option(10, "steps between evaluations")
    save_every: int = option(50, "steps between checkpoints; the last step always writes one")
    resume: bool = option(False, "go on from the checkpoint in --out, exactly where it stopped")

    def __post_init__(self):
        for name in ("eval_size", "eval_every", "save_every", "steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class Parser(HfArgumentParser):
    def error(self, message):
        raise UserError(message)  # argparse would print the whole usage first


def parse_args(argv=None) -> tuple[PAPOConfig, RunConfig]:
    """Flags beat the preset or algorithm, which beats the embedded world's sizes, which beat the dataclass defaults."""
    parser = Parser([PAPOConfig, RunConfig], description=__doc__.split("\n")[0], allow_abbrev=False)
    try:
        first = parser.parse_args(argv)
        recipe = asdict(PAPOConfig.preset(first.preset or ALGORITHMS[first.algorithm]))
        recipe["masked_grad"] = None  # follows eta2, which a flag may change
        if not first.preset:
            recipe = {name: recipe[name] for name in ALGORITHM_FIELDS} | TOY_SIZES
        parser.set_defaults(**recipe)
        config, run = parser.parse_args_into_dataclasses(argv)
    except ValueError as error:
        raise UserError(error) from None
    if run.preset:
        published = PAPOConfig.preset(run.preset)
        changed = [f"{f.name} {getattr(published, f.name)} -> {getattr(config, f.name)}" for f in fields(config)
                   if getattr(config, f.name) != getattr(published, f.name)]
        print(f"preset {run.preset}" + (f", deviating in: {', '.join(changed)}" if changed else ", as published"))
    run.out = run.out or f"runs/{run.algorithm}-gamma{config.gamma:g}-seed{run.seed}"
    return config, run


# ---------------------------------------------------------------------------------------------------------------------
# 2. Data and model
# ---------------------------------------------------------------------------------------------------------------------


class RowStream:
    """An endless iterator over a data set, newly shuffled each epoch. `count` rows are behind it: all the state there is."""

    def __init__(self, rows, seed):
        self.rows, self.seed, self.count = rows, seed, 0

    def __iter__(self):
        return self

    def __next__(self):
        epoch, place = divmod(self.count, len(self.rows))
        if place == 0 or not hasattr(self, "order"):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.order = torch.randperm(len(self.rows), generator=generator).tolist()
        self.count += 1
        return self.rows[self.order[place]]


def load_toy(run):
    """The embedded world: model and processor after the warm start, questions to train on, held-out questions."""
    try:
        train = toy.toy_dataset("train", 2048, digits=run.digits, seed=run.seed)
        held_out = toy.toy_dataset("test", run.eval_size, digits=run.digits, seed=0)  # the same for every seed
    except ValueError as error:
        raise UserError(error) from None
    model, processor = toy.warm_start(digits=run.digits, seed=run.seed)
    return model, processor, train, held_out


# ---------------------------------------------------------------------------------------------------------------------
# 3. Evaluation: avg@8
# ---------------------------------------------------------------------------------------------------------------------

SAMPLES = 8  # responses per question in every evaluation


def evaluate(model, processor, config, rows, seed=0, masked=False):
    """Answer every question SAMPLES times at temperature 1. Returns the Groups, in the order of rows.

    masked: with fresh random masks on the images, to see how far the answers depend on them."""
    config = replace(config, group_size=SAMPLES, temperature=1.0, top_p=1.0)
    sampling = torch.Generator(model.device).manual_seed(seed)
    masking = torch.Generator().manual_seed(seed)
    groups = []
    for start in range(0, len(rows), config.prompts_per_sample):
        share = [rows[i] for i in range(start, min(start + config.prompts_per_sample, len(rows)))]
        if masked:
            share = [{**row, "images": [mask_patches(fit_image(processor, row["images"][0]), config.mask_ratio,
                                                     config.patch_size, masking)]} for row in share]
        groups += sample_and_grade(model, processor, config, share, sampling)
    return groups


def summarise(groups):
    """Means over responses: accuracy, pass@8, and where rows say so accuracy by vision dependency and error types."""
    right = [[score["accuracy"] for score in group.scores] for group in groups]
    summary = {"accuracy": mean(map(mean, right)), f"pass@{SAMPLES}": mean(map(max, right))}
    for level in ("low", "medium", "high"):
        some = [mean(r) for r, group in zip(right, groups) if group.row.get("dependency") == level]
        if some:
            summary[f"accuracy_{level}"] = mean(some)
    if "digits" in groups[0].row:
        errors = Counter(toy.error_type(text, group.row) for group in groups for text in group.texts)
        for kind in toy.ERROR_TYPES:
            summary[f"error_{kind}"] = errors[kind] / (len(groups) * SAMPLES)
    return summary


def print_table(before, after):
    """Before and after, in percent of the responses."""
    names = {"accuracy": f"accuracy (avg@{SAMPLES})", "accuracy_low": "  low vision dependency",
             "accuracy_medium": "  medium", "accuracy_high": "  high", "accuracy_masked": "  with the image masked",
             f"pass@{SAMPLES}": f"right at least once (pass@{SAMPLES})",
             **{f"error_{kind}": f"  {kind} error" for kind in toy.ERROR_TYPES}}
    print(f"\n{'held-out questions, % of responses':36}  before   after")
    for name, label in names.items():
        if name in before:
            print(f"{label:36}  {100 * before[name]:6.1f}  {100 * after[name]:6.1f}")


# ---------------------------------------------------------------------------------------------------------------------
# 4. The training loop
# ---------------------------------------------------------------------------------------------------------------------


class Trainer:
    """Everything that changes during a run (weights, optimizer, random state, place in the data), and one step of it."""

    def __init__(self, model, processor, config, run, rows):
        self.model, self.processor, self.config, self.steps_done = model, processor, config, 0
        self.rows = RowStream(rows, run.seed)
        self.generator = torch.Generator().manual_seed(run.seed)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
        frozen = copy.deepcopy(model).requires_grad_(False) if config.beta else None
        self.reference = lambda: nullcontext(frozen)
        self.seconds, self.memory, self.phase_name = {}, {}, "start"

    @contextmanager
    def phase(self, name):
        """Time a phase and note its peak memory in GiB: the GPU's, or else the whole process's so far."""
        on_gpu, self.phase_name, start = self.model.device.type == "cuda", name, time.perf_counter()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        yield
        peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else peak_rss()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.memory[name] = max(self.memory.get(name, 0.0), peak)

    def step(self) -> dict:
        """Roll out one batch and train on it. Returns metrics: those of papo_step averaged over the updates, and rollout's."""
        config = self.config
        with self.phase("sample"):
            groups, redraws = roll_out(self.model, self.processor, config, self.rows, self.generator)
        updates = []
        if groups:
            with self.phase("score"):
                score_constants(self.model, self.reference, config, groups)
            with self.phase("update"):
                updates = [papo_step(self.model, self.optimizer, config, part) for part in split_batch(config, groups)]
        self.steps_done += 1
        scores = [score for group in groups for score in group.scores]
        lengths = [len(o) for group in groups for o in group.responses]
        return {"step": self.steps_done,
                **{name: mean(s[name] for s in scores) for name in ("reward", "accuracy", "format") if scores},
                **{name: mean(u[name] for u in updates) for name in (updates[0] if updates else ())},
                "groups": len(groups), "mixed": sum(group.mixed for group in groups), "redraws": redraws,
                "response_tokens": mean(lengths) if lengths else 0.0}

    def state(self) -> dict:
        """What an exact resume needs besides the weights."""
        return {"step": self.steps_done, "rows": self.rows.count, "generator": self.generator.get_state(),
                "optimizer": self.optimizer.state_dict()}


# ---------------------------------------------------------------------------------------------------------------------
# 5. What a run leaves behind: runs/NAME/
# ---------------------------------------------------------------------------------------------------------------------


def save_checkpoint(folder, trainer, card):
    """Weights, processor, model card and trainer state, written beside and then swapped in: the last one stays whole."""
    fresh, old = folder.with_suffix(".new"), folder.with_suffix(".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    trainer.model.save_pretrained(fresh)
    trainer.processor.save_pretrained(fresh)
    (fresh / "README.md").write_text(card)
    torch.save(trainer.state(), fresh / "trainer_state.pt")
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def model_card(config, run, steps, before, after):
    """The checkpoint's README.md, with the metadata a model hub reads."""
    method = {"papo-g": "PAPO-G", "papo-d": "PAPO-D", "grpo": "GRPO", "dapo": "DAPO"}[run.algorithm]
    base, data = "toy.py's warm start", f"toy.py's sums of {run.digits} handwritten digits"
    rows = "\n".join(f"| {name} | {100 * before[name]:.1f} | {100 * after[name]:.1f} |" for name in before if name in after)
    settings = "\n".join(f"| {name} | {value} |" for name, value in {**asdict(config), "seed": run.seed, "steps": steps}.items())
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [papo, reinforcement-learning, vision-language]
---

# {method} (gamma = {config.gamma:g}) on {base}

## Method

Perception-Aware Policy Optimization (arXiv 2507.06448) trains a vision-language model by reinforcement learning with
rewards that a rule decides. To the objective of GRPO (PAPO-G) or DAPO (PAPO-D) it adds a KL divergence between the policy
looking at the image and the same policy looking at a randomly masked one. Raising it rewards answers that depend on the image.

## Model version

{method}, gamma = {config.gamma:g}, eta1 = {config.eta1:g}, eta2 = {config.eta2:g}, beta = {config.beta:g}, mask ratio {config.mask_ratio:g},
seed {run.seed}, {steps} steps.

## Usage

```python
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained("checkpoint")
processor = AutoProcessor.from_pretrained("checkpoint")
inputs = encode_prompt(processor, "<image>What is the sum of the digits?", image)  # from papo import encode_prompt
print(processor.decode(model.generate(**inputs, max_new_tokens={config.max_new_tokens})[0]))
```

## Data

{data}.

## Results

Held-out questions, % of {SAMPLES} sampled responses each:

| | before | after |
|---|---|---|
{rows}

## Settings

| | |
|---|---|
{settings}
"""


def plot_curves(path, history):
    """One page: accuracy by vision dependency, reward, and the signs by which a run goes well or is being hacked."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = {  # title: {metric: (label, colour, line style)}; colours of Okabe and Ito, told apart by colour-blind readers
        f"held-out accuracy (avg@{SAMPLES})": {"eval_accuracy": ("all", "#000000", "-"), "eval_accuracy_low": ("low", "#E69F00", "--"),
                              "eval_accuracy_medium": ("medium vision dependency", "#56B4E9", "-."),
                              "eval_accuracy_high": ("high", "#D55E00", ":"), "eval_accuracy_masked": ("image masked", "#999999", "-")},
        "training reward": {"reward": ("reward", "#000000", "-"), "accuracy": ("accuracy", "#009E73", "--"),
                            "format": ("format", "#CC79A7", ":")},
        "perception KL, nats per token": {"kl_prcp": (r"KL[$\pi\,\|\,\pi_{mask}$]", "#0072B2", "-")},
        "entropy, nats per token": {"entropy": (r"H[$\pi_\theta$]", "#0072B2", "-"),
                                    "masked_entropy": (r"H[$\pi_{mask}$]", "#D55E00", "--")},
        "share of tokens clipped": {"clip_high_fraction": (r"ratio > 1 + $\epsilon_h$", "#D55E00", "-"),
                                    "clip_low_fraction": (r"ratio < 1 - $\epsilon_l$", "#0072B2", "--")},
        "reference KL, nats per token": {"kl_ref": (r"KL[$\pi\,\|\,\pi_{ref}$]", "#0072B2", "-")}}
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    for axis, (title, curves) in zip(axes.flat, panels.items()):
        for name, (label, colour, style) in curves.items():
            points = [(line["step"], line[name]) for line in history if name in line]
            if points:
                axis.plot(*zip(*points), style, color=colour, label=label, marker="." if name.startswith("eval") else None)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=100)
    plt.close(figure)


@torch.no_grad()
def look_closely(model, processor, config, rows, seed=0):
    """What samples.html shows of a few questions: for every response token log pi - log pi_mask, nats the image is worth."""
    generator = torch.Generator().manual_seed(seed)
    config = replace(config, prompts_per_batch=len(rows), group_size=4, dynamic_sampling=False, gamma=1.0)  # gamma: draw masks
    groups, _ = roll_out(model, processor, config, iter(rows), generator)
    shown = []
    for group in groups:
        logps, _ = group_logps(model, group.prompt, group.responses)  # (G, T)
        masked_logps, _ = group_logps(model, group.masked_prompt, group.responses)  # (G, T)
        gains = (logps - masked_logps).tolist()  # G x T
        responses = [{"tokens": [(processor.tokenizer.decode([t]), gain) for t, gain in zip(o.tolist(), row)],
                      "score": score, "advantage": advantage, "error": toy.error_type(text, group.row) if "digits" in group.row else None}
                     for o, row, score, advantage, text in
                     zip(group.responses, gains, group.scores, group.advantages.tolist(), group.texts)]
        shown.append({"row": group.row, "image": fit_image(processor, group.row["images"][0]), "masked": group.masked_image,
                      "responses": responses})
    return shown


STYLE = """:root { color-scheme: light dark } body { font: 16px/1.5 system-ui, sans-serif; margin: 1rem auto; max-width: 75rem; padding: 0 1rem }
section { border-top: 1px solid #8888; padding: .5rem 0 } figure { display: inline-block; margin: 0 1rem .5rem 0 } figcaption { font-size: .8rem }
img { display: block; width: min(22rem, 90vw); image-rendering: pixelated } .pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1.5rem }
.pair > div { min-width: 0 } @media (max-width: 45rem) { .pair { grid-template-columns: 1fr } } h3 { font-size: 1rem; margin: .5rem 0 }
.response { overflow-wrap: anywhere; margin: 0 0 .75rem; font-family: ui-monospace, monospace; font-size: .9rem }
.score { font: .8rem system-ui, sans-serif; display: block; opacity: .8 } .token { border-radius: .2rem; white-space: pre-wrap }"""


def shade(token, gain):
    """One token as HTML, blue if the image makes it likelier, orange if less likely, the number on hover."""
    colour = "0 114 178" if gain > 0 else "230 159 0"
    return (f'<span class="token" title="{gain:+.2f} nats" style="background: rgb({colour} / {min(abs(gain) / 4, 0.8):.2f})">'
            f"{html.escape(token)}</span>")


def write_samples(path, before, after):
    """samples.html: questions with image and masked image, and the responses before and after training, token by token."""
    def picture(image, caption):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        return f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'

    def response(r):
        parts = [f"{name} {value:.2f}" for name, value in r["score"].items()] + [f"advantage {r['advantage']:+.2f}"]
        parts += [f"{r['error']} error"] if r["error"] else []
        return (f'<p class="response">{"".join(shade(*token) for token in r["tokens"])}'
                f'<span class="score">{", ".join(parts)}</span></p>')

    sections = []
    for old, new in zip(before, after):
        columns = "".join(f'<div><h3>{title}</h3>{"".join(map(response, shown["responses"]))}</div>'
                          for title, shown in (("before training", old), ("after", new)))
        sections.append(f'<section><p>{html.escape(old["row"]["problem"])} Answer: <b>{html.escape(old["row"]["answer"])}</b></p>'
                        f'{picture(old["image"], "image")}{picture(old["masked"], "masked image")}<div class="pair">{columns}</div></section>')
    path.write_text(f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>PAPO samples</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>
<h1>How much does each token owe to the image?</h1>
<p>Shading: log &pi; &minus; log &pi;<sub>mask</sub> of each sampled token, in nats. {shade("Blue", 3)}: the image makes it
likelier. {shade("Orange", -3)}: less likely. Plain: the token does not depend on the image. Hover for the number.</p>
{"".join(sections)}</body></html>""", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# 6. The program
# ---------------------------------------------------------------------------------------------------------------------


def peak_rss():
    """The process's largest memory so far, in GiB (macOS counts bytes, Linux KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def train(config, run):
    """The whole run: load, evaluate, train with evaluations in between, write everything to run.out."""
    model, processor, rows, held_out = load_toy(run)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    config = replace(config, patch_size=processor.image_processor.patch_size)
    trainer = Trainer(model, processor, config, run, rows)
    out = Path(run.out)
    examples = [held_out[i] for i in range(min(3, len(held_out)))]

    def evaluation():
        with trainer.phase("evaluate"):
            summary = summarise(evaluate(model, processor, config, held_out))
            return {**summary, "accuracy_masked": summarise(evaluate(model, processor, config, held_out, masked=True))["accuracy"]}

    before = after = evaluation()
    looks = [look_closely(model, processor, config, examples)]
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps({**asdict(config), **asdict(run)}, indent=2) + "\n")
    history = [{"step": 0, **{f"eval_{name}": value for name, value in before.items()}}]
    with open(out / "metrics.jsonl", "w") as log, tqdm(total=run.steps, desc=run.algorithm, unit="step") as bar:
        print(json.dumps(history[0]), file=log)
        for step in range(1, run.steps + 1):
            metrics = trainer.step()
            if step % run.eval_every == 0 or step == run.steps:
                after = evaluation()
                metrics |= {f"eval_{name}": value for name, value in after.items()}
            history.append(metrics)
            print(json.dumps(metrics), file=log, flush=True)
            bar.set_postfix(reward=f"{metrics.get('reward', 0):.2f}", accuracy=f"{metrics.get('accuracy', 0):.2f}",
                            kl_prcp=f"{metrics.get('kl_prcp', 0):.3f}", held_out=f"{after['accuracy']:.2f}")
            bar.update()
            if metrics["groups"] < config.prompts_per_batch:
                tqdm.write(f"step {step}: {metrics['groups']} mixed groups after {metrics['redraws']} redraws, trained on those")
            if step % run.save_every == 0 or step == run.steps:
                save_checkpoint(out / "checkpoint", trainer, model_card(config, run, step, before, after))
    looks.append(look_closely(model, processor, config, examples))
    write_samples(out / "samples.html", *looks)
    plot_curves(out / "curves.png", history)
    print_table(before, after)
    total = sum(trainer.seconds.values())
    print("\n" + ", ".join(f"{name} {seconds:.0f} s ({seconds / total:.0%}, peak {trainer.memory[name]:.1f} GiB)"
                           for name, seconds in trainer.seconds.items()))
    print(f"written to {out}/: config.json, metrics.jsonl, curves.png, samples.html, checkpoint/")
    return history


def main(argv=None):
    try:
        train(*parse_args(argv))
    except UserError as error:
        print(f"train_small.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
