"""What a run leaves behind, from numbers and texts that train_small.py has measured: tables, model card, curves, samples.

It knows nothing of training: train_small.py hands over dicts and groups, this file makes them readable.
"""

import base64
import functools
import html
import io
import json
import platform
import re
import subprocess
from contextlib import suppress
from dataclasses import asdict, fields, replace
from itertools import accumulate
from pathlib import Path

import torch
import transformers
from PIL import Image

import toy
from papo import fit_image, group_logps, roll_out

SAMPLES = 8  # responses per question in every evaluation: the 8 of avg@8 and pass@8


MEASURES = {  # of an evaluation, in words
    "accuracy": f"accuracy (avg@{SAMPLES})",
    "accuracy_low": "accuracy, low vision dependency",
    "accuracy_medium": "accuracy, medium",
    "accuracy_high": "accuracy, high",
    "accuracy_masked": "accuracy, image masked",
    f"pass@{SAMPLES}": f"right at least once (pass@{SAMPLES})",
    **{f"error_{kind}": f"{kind} errors" for kind in toy.ERROR_TYPES},
}


@functools.cache
def versions():
    """What this process runs: {python, torch, transformers, code}; code is the git commit, -dirty if files differ from it."""
    found = {name: module.__version__ for name, module in (("torch", torch), ("transformers", transformers))}
    command = "git --no-optional-locks describe --always --dirty --exclude=* --abbrev=12"
    with suppress(OSError, subprocess.CalledProcessError):  # no git, or no checkout
        folder = Path(__file__).parent
        commit = subprocess.run(
            command.split(), cwd=folder, check=True, capture_output=True, text=True
        ).stdout
        found["code"] = commit.strip()
    return {"python": platform.python_version(), **found}


def print_table(title, columns):
    """Summaries side by side, in percent. columns: heading -> summary."""
    print(f"\n{title:36}" + "".join(f"{heading:>8}" for heading in columns))
    for name, label in MEASURES.items():
        if all(name in summary for summary in columns.values()):
            print(f"{label:36}" + "".join(f"{100 * summary[name]:8.1f}" for summary in columns.values()))


CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
{metadata}
tags: [papo, reinforcement-learning, vision-language]
---

# {method} (gamma {gamma:g}) on {base}

Perception-Aware Policy Optimization (arXiv 2507.06448) trains a vision-language model by reinforcement learning with rewards
that a rule decides. To the objective of GRPO (PAPO-G) or DAPO (PAPO-D) it adds a KL divergence between the policy looking at
the image and the same policy looking at a randomly masked one. Raising it rewards answers that depend on the image.{version}

## Usage

```python
from transformers import AutoModelForImageTextToText, AutoProcessor
from papo import encode_prompt  # adds the instruction the model was trained with
model, processor = (kind.from_pretrained("this folder") for kind in (AutoModelForImageTextToText, AutoProcessor))
inputs = encode_prompt(processor, "<image>How many ...?", image)  # image: a PIL image
print(processor.decode(model.generate(**inputs, max_new_tokens={max_new_tokens})[0]))
```

## Data

Trained on {data}: {steps} steps of {prompts_per_batch} questions, {group_size} responses each, seed {seed}.

## Results

Held-out questions of the same kind, {samples} sampled responses each, %:

| | before | after |
|---|---|---|
{results}

## Limits

Measured on nothing but these questions: not on other data or benchmarks, other languages, several images, video or conversation,
and not for safety. A higher reward does not prove better perception: compare the accuracy with the image masked.

## License

The code is MIT licensed. The weights derive from the base model and the data, whose own licenses hold.

## Settings

| | | |
|---|---|---|
{settings}

Versions: {versions}.
"""
PAPO_H = (
    "\n\nWith gamma = 0.02 and no entropy terms this is the recipe of what its authors call PAPO-H: the model of the higher "
    "perception weight (elsewhere they use 0.01)."
)


def model_card(config, run, steps, before, after):
    """The checkpoint's README.md, with the metadata that a model hub reads."""
    method = (run.preset or run.algorithm)[:6].upper()  # PAPO-G, PAPO-D, GRPO or DAPO
    is_h = method == "PAPO-G" and config.gamma == 0.02 and not (config.eta1 or config.eta2 or config.gated)
    on_hub = lambda name: name if name and not Path(name).exists() else None
    base, dataset = (name and (on_hub(name) or Path(name).name) for name in (run.model, run.dataset))
    metadata = {
        "base_model": on_hub(run.model),
        "datasets": on_hub(run.dataset) and [run.dataset],
        "method": method,
        **{name: getattr(config, name) for name in ("gamma", "beta", "eta1", "eta2", "mask_ratio")},
        "seed": run.seed,
        "steps": steps,
        "accuracy_before_percent": round(100 * before["accuracy"], 1),
        "accuracy_after_percent": round(100 * after["accuracy"], 1),
    }
    named = [(label, before[name], after[name]) for name, label in MEASURES.items() if name in before]
    measured = [(label, 100 * old, 100 * new) for label, old, new in named]
    rows = [(f.name, getattr(config, f.name), f.metadata["help"].replace("|", "\\|")) for f in fields(config)]
    return CARD.format(
        **asdict(config),
        steps=steps,
        seed=run.seed,
        samples=SAMPLES,
        method=method,
        metadata="\n".join(f"{k}: {json.dumps(value)}" for k, value in metadata.items() if value is not None),
        base=base or "the embedded world's warm start",
        data=f"`{dataset}`, split `{run.split}`"
        if dataset
        else f"the {run.task} of {run.digits} handwritten digits (toy.py)",
        version=PAPO_H * is_h,
        results="\n".join(f"| {label} | {old:.1f} | {new:.1f} |" for label, old, new in measured),
        settings="\n".join(f"| {name} | {value} | {words} |" for name, value, words in rows),
        versions=", ".join(f"{name} {value}" for name, value in versions().items()),
    )


def save_picture(figure, path):
    """A matplotlib figure as a PNG for print, of at most 256 colours: a third of the bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=160)
    Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def plot_curves(path, history, title):
    """One page: accuracy by vision dependency, reward, and the signs by which a run goes well or is being hacked."""
    from matplotlib import pyplot as plt

    panels = {  # title: {metric: (label, colour, line style)}; colours of Okabe and Ito, told apart by colour-blind readers
        f"held-out accuracy (avg@{SAMPLES})": {
            "eval_accuracy_low": ("low vision dependency", "#E69F00", "--"),
            "eval_accuracy_medium": ("medium", "#56B4E9", "-."),
            "eval_accuracy_high": ("high", "#D55E00", ":"),
            "eval_accuracy": ("all", "#000000", "-"),
            "eval_accuracy_masked": ("all, image masked", "#999999", "-"),
        },
        "training reward": {
            "reward": ("reward", "#000000", "-"),
            "accuracy": ("accuracy", "#009E73", "--"),
            "format": ("format", "#CC79A7", ":"),
        },
        "perception KL, nats per token": {"kl_prcp": (r"KL[$\pi\,\|\,\pi_{mask}$]", "#0072B2", "-")},
        "entropy, nats per token": {
            "entropy": (r"H[$\pi_\theta$]", "#0072B2", "-"),
            "masked_entropy": (r"H[$\pi_{mask}$]", "#D55E00", "--"),
        },
        "share of tokens clipped": {
            "clip_high_fraction": (r"ratio > 1 + $\epsilon_h$", "#D55E00", "-"),
            "clip_low_fraction": (r"ratio < 1 - $\epsilon_l$", "#0072B2", "--"),
        },
        "reference KL, nats per token": {"kl_ref": (r"KL[$\pi\,\|\,\pi_{ref}$]", "#0072B2", "-")},
    }
    plt.switch_backend("Agg")
    figure, axes = plt.subplots(2, 3, figsize=(12, 7.2), layout="constrained")
    figure.suptitle(title)
    for axis, (name_of_panel, curves) in zip(axes.flat, panels.items()):
        for name, (label, colour, style) in curves.items():
            points = [(line["step"], line[name]) for line in history if name in line]
            if points:
                dot = "." if name.startswith("eval") else None
                axis.plot(*zip(*points), style, color=colour, label=label, marker=dot)
        axis.set_title(name_of_panel)
        axis.set_xlabel("step")
        axis.locator_params(axis="x", integer=True)
        axis.set_ylim(0, 1 if "accuracy" in name_of_panel else None)
        axis.grid(alpha=0.3)
        if axis.lines:
            below = dict(loc="upper center", bbox_to_anchor=(0.5, -0.16))
            axis.legend(fontsize="small", frameon=False, ncols=2, **below)
    figure.savefig(path, dpi=150)
    plt.close(figure)


@torch.no_grad()
def look_closely(model, processor, config, rows):
    """What samples.html shows of a few questions: for every response token log pi - log pi_mask, nats the image is worth."""
    generator = torch.Generator().manual_seed(0)
    sizes = dict(prompts_per_batch=len(rows), updates_per_batch=1, group_size=4, dynamic_sampling=False)
    config = replace(config, gamma=1.0, gated=False, **sizes)  # so that every question has a mask
    groups, _ = roll_out(model, processor, config, iter(rows), generator)
    shown, decode = [], processor.tokenizer.decode
    for group in groups:
        logps, _ = group_logps(model, group.prompt, group.responses)  # (G, T)
        masked_logps, _ = group_logps(model, group.masked_prompt, group.responses)  # (G, T)
        gains = (logps - masked_logps).tolist()  # G x T
        digits = group.row.get("digits")
        responses = []
        for i, (tokens, text) in enumerate(zip(group.responses, group.texts)):
            words = [decode([token]) for token in tokens.tolist()]
            wrong = misread(words, digits) if digits else ()
            error = toy.error_type(text, group.row) if digits else None
            response = dict(tokens=list(zip(words, gains[i])), misread=wrong, error=error)
            responses.append(response | dict(score=group.scores[i], advantage=group.advantages[i].item()))
        image = fit_image(processor, group.row["images"][0])
        shown.append({"row": group.row, "image": image, "masked": group.masked_images[0], "responses": responses})
    return shown


def misread(words, digits):
    """Places of the words that say "I see" a digit which the picture does not show there."""
    said = re.search(r"I see (\d(?: \d)*)\.", "".join(words))
    starts = list(accumulate(map(len, words), initial=0))
    read = said[1].split() if said else []
    right = [str(digit) for digit in digits] + [None] * len(read)
    return {starts.index(said.start(1) + 2 * i) for i in range(len(read)) if read[i] != right[i]}


def plot_tokens(path, shown, count=3, width=64):
    """One question of look_closely as a picture: image, masked image, and responses shaded token by token."""
    from matplotlib import pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    colours = LinearSegmentedColormap.from_list("owed", ["#E69F00", "#FFFFFF", "#0072B2"])
    scale, rows = Normalize(-4, 4), []  # a row: the characters and colours of one line of text
    for response in shown["responses"][:count]:
        row, column = [], 0
        for token, gain in response["tokens"][:200]:
            if token.startswith("<|"):  # the end
                continue
            token = token.replace("\n", " ").replace("$", r"\$")
            if column + len(token) > width:
                rows.append(row)
                row, column = [], 0
            row.append((column, token, colours(scale(gain))))
            column += len(token)
        rows += [row, []]
    plt.switch_backend("Agg")
    figure = plt.figure(figsize=(7, 2.1 + 0.24 * len(rows)), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.2, 0.24 * len(rows) + 0.6])
    for axis, picture, title in zip(
        top.subplots(1, 2), (shown["image"], shown["masked"]), ("image", "masked image")
    ):
        axis.imshow(picture)
        axis.set(xticks=[], yticks=[])
        axis.set_title(title, fontsize=11)
    axis = bottom.subplots()
    axis.set(xlim=(0, width), ylim=(len(rows), -0.2))
    axis.axis("off")
    for y, row in enumerate(rows):
        for x, token, colour in row:
            axis.add_patch(plt.Rectangle((x, y), len(token), 0.95, color=colour, linewidth=0))
            axis.text(x, y + 0.5, token, family="monospace", fontsize=12.9, va="center")
    bar = plt.cm.ScalarMappable(scale, colours)
    bottom.colorbar(bar, ax=axis, orientation="horizontal", aspect=40, shrink=0.8).set_label(
        r"owed to the image: $\log\pi - \log\pi_{mask}$ of each token, nats", fontsize=11
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; margin: 1rem auto; max-width: 75rem; padding: 0 1rem }
section { border-top: 1px solid #8888; padding: .5rem 0 }
figure { display: inline-block; margin: 0 1rem .5rem 0; max-width: 100% }
figcaption, table { font-size: .8rem }
th { text-align: left; vertical-align: top; padding-right: 1rem } td { overflow-wrap: anywhere }
img { display: block; width: 22rem; max-width: 100%; image-rendering: pixelated; box-sizing: border-box; border: 1px solid #888 }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1.5rem }
.pair > div { min-width: 0 }
@media (max-width: 45rem) { .pair { grid-template-columns: 1fr } }
h1 { font-size: 1.6rem } h3 { font-size: 1rem; margin: .5rem 0 }
.response { overflow-wrap: anywhere; white-space: pre-wrap; margin: 0 0 .75rem; font: .9rem ui-monospace, monospace }
.score { font: .8rem system-ui, sans-serif; display: block; opacity: .8; margin-top: .2rem }
.token { border-radius: .2rem }
.token:has(small) { display: inline-flex; flex-direction: column; align-items: center; margin: 0 1px .4rem }
small { font: .65rem/1.2 system-ui, sans-serif; user-select: none }
.misread { outline: 2px solid #d00 }
"""


def shade(token, gain, wrong=False):
    """One token as HTML, blue if the image makes it likelier, orange if less likely, with the number below where it shows."""
    text = token.rstrip("\n")
    number = f"<small>{gain:+.1f}</small>" if text and abs(gain) >= 0.1 else ""
    colour = f"rgb({'0 114 178' if gain > 0 else '230 159 0'} / {min(abs(gain) / 5, 0.8):.2f})"
    look = f'class="token{" misread" * wrong}" title="{gain:+.2f} nats" style="background: {colour}"'
    return f"<span {look}>{html.escape(text)}{number}</span>{token[len(text) :]}"


def write_samples(path, plan, before, after):
    """samples.html: questions with image and masked image, and the responses before and after training, token by token.

    plan: what ran on what, {word: text}."""

    def picture(image, caption):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        return f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'

    def response(r):
        parts = [f"{name} {value:.2f}" for name, value in r["score"].items()]
        parts += [f"advantage {r['advantage']:+.2f}"] + [f"{r['error']} error"] * bool(r["error"])
        tokens = (shade(token, gain, i in r["misread"]) for i, (token, gain) in enumerate(r["tokens"]))
        return f'<p class="response">{"".join(tokens)}<span class="score">{", ".join(parts)}</span></p>'

    sections = []
    for old, new in zip(before, after):
        columns = "".join(
            f"<div><h3>{title}</h3>{''.join(map(response, shown['responses']))}</div>"
            for title, shown in (("before training", old), ("after", new))
        )
        question = html.escape(old["row"]["problem"].replace("<image>", " ").strip())
        answer = html.escape(old["row"]["answer"])
        pictures = picture(old["image"], "image") + picture(old["masked"], "masked image")
        sections.append(
            f"<section><p>{question} Answer: <b>{answer}</b></p>{pictures}"
            f'<div class="pair">{columns}</div></section>'
        )
    run = "".join(f"<tr><th>{word}<td>{html.escape(text)}" for word, text in plan.items())
    scale = "".join(shade("\u2003\u2003", gain) for gain in range(-4, 5))
    path.write_text(
        f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(path.parent.name)}: PAPO samples</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>
<h1>{html.escape(path.parent.name)}: how much does each token owe to the image?</h1><table>{run}</table>
<p>The number below a token is its log &pi; &minus; log &pi;<sub>mask</sub> in nats, where it is 0.1 or more. Blue: the image makes
it likelier. Orange: less likely. Plain: the token does not depend on the image. {shade("1", 0, True)}: a digit that the picture
does not show there.</p><p>{scale}</p>
{"".join(sections)}</body></html>""",
        encoding="utf-8",
    )
