"""What a run leaves behind, from numbers and texts that train_small.py has measured: tables, model card, curves, samples.

It knows nothing of training: train_small.py hands over dicts and groups, this file makes them readable.
"""

import base64
import html
import io
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from PIL import Image

import toy
from papo import fit_image, group_logps, roll_out

SAMPLES = 8  # responses per question in every evaluation: the 8 of avg@8 and pass@8


def print_table(title, columns):
    """Summaries side by side, in percent. columns: heading -> summary."""
    names = {
        "accuracy": f"accuracy (avg@{SAMPLES})",
        "accuracy_low": "  low vision dependency",
        "accuracy_medium": "  medium",
        "accuracy_high": "  high",
        "accuracy_masked": "  with the image masked",
        f"pass@{SAMPLES}": f"right at least once (pass@{SAMPLES})",
        **{f"error_{kind}": f"{kind} errors" for kind in toy.ERROR_TYPES},
    }
    print(f"\n{title:36}" + "".join(f"{heading:>8}" for heading in columns))
    for name, label in names.items():
        if all(name in summary for summary in columns.values()):
            print(f"{label:36}" + "".join(f"{100 * summary[name]:8.1f}" for summary in columns.values()))


CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
{metadata}
tags: [papo, reinforcement-learning, vision-language]
---

# {method} (gamma = {gamma:g}) on {base}

## Method

Perception-Aware Policy Optimization (arXiv 2507.06448) trains a vision-language model by reinforcement learning with rewards
that a rule decides. To the objective of GRPO (PAPO-G) or DAPO (PAPO-D) it adds a KL divergence between the policy looking at
the image and the same policy looking at a randomly masked one. Raising it rewards answers that depend on the image.

## Model version

{version}

## Usage

```python
from transformers import AutoModelForImageTextToText, AutoProcessor
from papo import encode_prompt  # adds the instruction the model was trained with
model, processor = (kind.from_pretrained("{folder}") for kind in (AutoModelForImageTextToText, AutoProcessor))
inputs = encode_prompt(processor, "<image>How many ...?", image)  # image: a PIL image
print(processor.decode(model.generate(**inputs, max_new_tokens={max_new_tokens})[0]))
```

## Data

Trained on {data}; {steps} steps of {prompts_per_batch} questions, {group_size} responses each.

## Results

Held-out questions, % of {samples} sampled responses each:

| | before | after |
|---|---|---|
{results}

## Settings

| | |
|---|---|
{settings}
"""


def model_card(config, run, steps, before, after):
    """The checkpoint's README.md, with the metadata that a model hub reads."""
    method = (run.preset or run.algorithm)[:6].upper()  # PAPO-G, PAPO-D, GRPO or DAPO
    published_h = method == "PAPO-G" and config.gamma == 0.02 and not config.eta1 and not config.eta2
    metadata = {
        "base_model": run.model,
        "datasets": run.dataset and [run.dataset],
        "method": method,
        **{name: getattr(config, name) for name in ("gamma", "beta", "eta1", "eta2", "mask_ratio")},
        "seed": run.seed,
        "steps": steps,
        "accuracy_before": before["accuracy"],
        "accuracy_after": after["accuracy"],
    }
    return CARD.format(
        **asdict(config),
        steps=steps,
        samples=SAMPLES,
        method=method,
        folder=Path(run.out) / "checkpoint",
        metadata="\n".join(
            f"{name}: {json.dumps(value)}" for name, value in metadata.items() if value is not None
        ),
        base=run.model or "the embedded world's warm start",
        data=f"`{run.dataset}`, split `{run.split}`"
        if run.dataset
        else f"{run.digits} handwritten digits each: {run.task} (toy.py)",
        version=f"{method}{', the recipe of PAPO-H' if published_h else ''} (gamma = {config.gamma:g}, "
        f"eta1 = {config.eta1:g}, eta2 = {config.eta2:g}, beta = {config.beta:g}, mask ratio {config.mask_ratio:g}, seed {run.seed}).",
        results="\n".join(
            f"| {name} | {100 * before[name]:.1f} | {100 * after[name]:.1f} |" for name in before
        ),
        settings="\n".join(f"| {name} | {value} |" for name, value in asdict(config).items()),
    )


def save_picture(figure, path):
    """A matplotlib figure as a PNG for print, of at most 256 colours: a third of the bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=160)
    Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def plot_curves(path, history, title):
    """One page: accuracy by vision dependency, reward, and the signs by which a run goes well or is being hacked."""
    import matplotlib

    matplotlib.use("Agg")
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
    figure, axes = plt.subplots(2, 3, figsize=(12, 7.2), layout="constrained")
    figure.suptitle(title)
    for axis, (name_of_panel, curves) in zip(axes.flat, panels.items()):
        for name, (label, colour, style) in curves.items():
            points = [(line["step"], line[name]) for line in history if name in line]
            if points:
                axis.plot(
                    *zip(*points),
                    style,
                    color=colour,
                    label=label,
                    marker="." if name.startswith("eval") else None,
                )
        axis.set_title(name_of_panel)
        axis.set_xlabel("step")
        axis.set_ylim(0, 1 if "accuracy" in name_of_panel else None)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(
                fontsize="small", frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16)
            )
    figure.savefig(path, dpi=150)
    plt.close(figure)


@torch.no_grad()
def look_closely(model, processor, config, rows):
    """What samples.html shows of a few questions: for every response token log pi - log pi_mask, nats the image is worth."""
    generator = torch.Generator().manual_seed(0)
    config = replace(
        config,
        prompts_per_batch=len(rows),
        updates_per_batch=1,
        group_size=4,
        dynamic_sampling=False,
        gamma=1.0,
        gated=False,
    )  # so that every question has a mask; nothing is trained
    groups, _ = roll_out(model, processor, config, iter(rows), generator)
    shown = []
    for group in groups:
        logps, _ = group_logps(model, group.prompt, group.responses)  # (G, T)
        masked_logps, _ = group_logps(model, group.masked_prompt, group.responses)  # (G, T)
        gains = (logps - masked_logps).tolist()  # G x T
        responses = [
            {
                "tokens": [(processor.tokenizer.decode([t]), gain) for t, gain in zip(o.tolist(), row)],
                "score": score,
                "advantage": advantage,
                "error": toy.error_type(text, group.row) if "digits" in group.row else None,
            }
            for o, row, score, advantage, text in zip(
                group.responses, gains, group.scores, group.advantages.tolist(), group.texts
            )
        ]
        shown.append(
            {
                "row": group.row,
                "image": fit_image(processor, group.row["images"][0]),
                "masked": group.masked_image,
                "responses": responses,
            }
        )
    return shown


def plot_tokens(path, shown, count=3, width=64):
    """One question of look_closely as a picture: image, masked image, and responses shaded token by token."""
    import matplotlib

    matplotlib.use("Agg")
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
figcaption { font-size: .8rem }
img { display: block; width: 22rem; max-width: 100%; image-rendering: pixelated }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1.5rem }
.pair > div { min-width: 0 }
@media (max-width: 45rem) { .pair { grid-template-columns: 1fr } }
h1 { font-size: 1.6rem } h3 { font-size: 1rem; margin: .5rem 0 }
.response { overflow-wrap: anywhere; margin: 0 0 .75rem; font-family: ui-monospace, monospace; font-size: .9rem }
.score { font: .8rem system-ui, sans-serif; display: block; opacity: .8 }
.token { border-radius: .2rem; white-space: pre-wrap }
"""


def shade(token, gain):
    """One token as HTML, blue if the image makes it likelier, orange if less likely, the number on hover."""
    colour = "0 114 178" if gain > 0 else "230 159 0"
    return (
        f'<span class="token" title="{gain:+.2f} nats" style="background: rgb({colour} / {min(abs(gain) / 4, 0.8):.2f})">'
        f"{html.escape(token)}</span>"
    )


def write_samples(path, before, after):
    """samples.html: questions with image and masked image, and the responses before and after training, token by token."""

    def picture(image, caption):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        return f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'

    def response(r):
        parts = [f"{name} {value:.2f}" for name, value in r["score"].items()] + [
            f"advantage {r['advantage']:+.2f}"
        ]
        parts += [f"{r['error']} error"] if r["error"] else []
        return (
            f'<p class="response">{"".join(shade(*token) for token in r["tokens"])}'
            f'<span class="score">{", ".join(parts)}</span></p>'
        )

    sections = []
    for old, new in zip(before, after):
        columns = "".join(
            f"<div><h3>{title}</h3>{''.join(map(response, shown['responses']))}</div>"
            for title, shown in (("before training", old), ("after", new))
        )
        question, answer = html.escape(old["row"]["problem"]), html.escape(old["row"]["answer"])
        pictures = picture(old["image"], "image") + picture(old["masked"], "masked image")
        sections.append(
            f"<section><p>{question} Answer: <b>{answer}</b></p>{pictures}"
            f'<div class="pair">{columns}</div></section>'
        )
    path.write_text(
        f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>PAPO samples</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>
<h1>How much does each token owe to the image?</h1>
<p>Shading: log &pi; &minus; log &pi;<sub>mask</sub> of each sampled token, in nats. {shade("Blue", 3)}: the image makes it
likelier. {shade("Orange", -3)}: less likely. Plain: the token does not depend on the image. Hover for the number.</p>
{"".join(sections)}</body></html>""",
        encoding="utf-8",
    )
