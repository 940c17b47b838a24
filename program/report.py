"""What a run leaves behind: tables, the model card (card.md), curves, samples (samples.html).

It trains nothing: it is handed dicts, groups, and for samples.html the model.
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
from statistics import mean
from string import Template

import torch
import transformers
from PIL import Image

import toy
from papo import PAPOConfig, fit_image, group_logps, roll_out
from program import SAMPLES

MEASURES = {  # of an evaluation, in words
    "accuracy": f"accuracy (avg@{SAMPLES})",
    "accuracy_low": "accuracy, low vision dependency",
    "accuracy_medium": "accuracy, medium",
    "accuracy_high": "accuracy, high",
    "accuracy_masked": "accuracy, image masked",
    "grounding": "right ones that the image decides",
    f"pass@{SAMPLES}": f"right at least once (pass@{SAMPLES})",
    **{f"error_{kind}": f"{kind} errors" for kind in toy.ERROR_TYPES},
}


@functools.cache
def versions():
    """What this process runs; code is the git commit, -dirty if files differ from it."""
    found = {"python": platform.python_version()}
    found |= {"torch": torch.__version__, "transformers": transformers.__version__}
    command = "git --no-optional-locks describe --always --dirty --exclude=* --abbrev=12".split()
    with suppress(OSError, subprocess.CalledProcessError):  # no git, or no checkout
        said = dict(cwd=Path(__file__).parent, check=True, capture_output=True, text=True)
        found["code"] = subprocess.run(command, **said).stdout.strip()
    return found


def recipe_of(config, run) -> str:
    """The algorithm, its weights, and what deviates from the preset."""
    weights = [f"{name} {getattr(config, name):g}" for name in ("gamma", "beta", "eta1", "eta2")]
    text = ", ".join([run.algorithm, *weights, *["gated"] * config.gated])
    if run.preset:
        old, new = asdict(PAPOConfig.preset(run.preset)), asdict(config)
        changed = [f"{name} {old[name]} -> {new[name]}" for name in old if new[name] != old[name]]
        but = f"but for {', '.join(changed)}" if changed else "as published"
        text += f"; preset {run.preset} {but}"
    return text


def describe(model, config, run, questions, device):
    """What is about to run, on what: {word: text}."""
    size = f"{sum(weight.numel() for weight in model.parameters()) / 1e6:,.1f} M parameters"
    trained = f", LoRA of rank {run.lora}" * bool(run.lora) + ", frozen vision" * run.freeze_vision
    threads = f"CPU, {torch.get_num_threads()} threads"
    plan = {
        "model": f"{run.model or 'the embedded world'}: {size}, {run.precision}{trained}",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else threads,
        "data": f"{run.dataset or f'{run.task} of {run.digits} handwritten digits'}: {questions}",
        "output": f"{run.out}/",
    }
    if not run.eval_only:
        batch = f"{config.prompts_per_batch} questions x {config.group_size} responses"
        updates = f"in {config.updates_per_batch} updates; seed {run.seed}"
        plan |= {"algorithm": recipe_of(config, run), "steps": f"{run.steps} of {batch} {updates}"}
    return plan


def print_block(lines):
    """{word: text}, a line each."""
    print("\n" + "\n".join(f"{word:11}{text}" for word, text in lines.items()) + "\n")


def print_table(title, columns):
    """Summaries side by side, in percent. columns: heading -> summary."""
    print(f"\n{title:36}" + "".join(f"{heading:>8}" for heading in columns))
    for name, label in MEASURES.items():
        if all(name in summary for summary in columns.values()):
            values = (f"{100 * summary[name]:8.1f}" for summary in columns.values())
            print(f"{label:36}" + "".join(values))


def evaluation_in(line):
    """The evaluation that a line of metrics.jsonl holds, {} if none was due."""
    return {k.removeprefix("eval_"): value for k, value in line.items() if k.startswith("eval_")}


def model_card(config, run, history):
    """The checkpoint's README.md, with the metadata that a model hub reads."""
    evaluations = [evaluation_in(line) for line in history if "eval_accuracy" in line]
    steps, before, after = history[-1]["step"], evaluations[0], evaluations[-1]
    method = (run.preset or run.algorithm)[:6].upper()  # PAPO-G, PAPO-D, GRPO or DAPO
    on_hub = lambda name: name if name and not Path(name).exists() else None
    named = lambda name: name and (on_hub(name) or Path(name).name)
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
    known = {name: value for name, value in metadata.items() if value is not None}
    toy_data = f"the {run.task} of {run.digits} handwritten digits (toy.py)"
    shared = [name for name in MEASURES if name in before]
    results = [f"| {MEASURES[n]} | {100 * before[n]:.1f} | {100 * after[n]:.1f} |" for n in shared]
    words = {field.name: field.metadata["help"].replace("|", "\\|") for field in fields(config)}
    settings = [f"| {name} | {value} | {words[name]} |" for name, value in asdict(config).items()]
    card = Template(Path(__file__).with_name("card.md").read_text())
    return card.substitute(
        asdict(config),
        steps=steps,
        seed=run.seed,
        samples=SAMPLES,
        method=method,
        metadata="\n".join(f"{name}: {json.dumps(value)}" for name, value in known.items()),
        base=named(run.model) or "the embedded world's warm start",
        data=f"`{named(run.dataset)}`, split `{run.split}`" if run.dataset else toy_data,
        results="\n".join(results),
        settings="\n".join(settings),
        versions=", ".join(f"{name} {value}" for name, value in versions().items()),
    )


# curves.png: {title: {metric: (label, colour, line)}}; colours of Okabe and Ito, for all eyes.
PANELS = {
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


def save_picture(figure, path):
    """A matplotlib figure as a PNG for print, of at most 256 colours: a third of the bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=160)
    picture = Image.open(buffer).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def plot_curves(path, history, title):
    """One page: accuracy, reward, and the signs by which a run goes well or is being hacked."""
    from matplotlib import pyplot as plt

    plt.switch_backend("Agg")
    figure, axes = plt.subplots(2, 3, figsize=(12, 7.2), layout="constrained")
    figure.suptitle(title)
    for axis, (name_of_panel, curves) in zip(axes.flat, PANELS.items()):
        for name, (label, colour, style) in curves.items():
            points = [(line["step"], line[name]) for line in history if name in line]
            if points:
                dot = "." if name.startswith("eval") else None
                axis.plot(*zip(*points), style, color=colour, label=label, marker=dot)
        axis.set(title=name_of_panel, xlabel="step")
        axis.locator_params(axis="x", integer=True)
        axis.set_ylim(0, 1 if "accuracy" in name_of_panel else None)
        axis.grid(alpha=0.3)
        if axis.lines:
            below = dict(loc="upper center", bbox_to_anchor=(0.5, -0.16))
            axis.legend(fontsize="small", frameon=False, ncols=2, **below)
    save_picture(figure, path)
    plt.close(figure)


@torch.no_grad()
def look_closely(model, processor, config, rows, reward):
    """A few questions, and for every response token log pi - log pi_mask: the image's worth."""
    sizes = dict(prompts_per_batch=len(rows), updates_per_batch=1, group_size=4)
    # So that every question has a mask.
    config = replace(config, gamma=1.0, gated=False, dynamic_sampling=False, **sizes)
    generator = torch.Generator().manual_seed(0)
    groups, _ = roll_out(model, processor, config, iter(rows), generator, reward)
    shown = []
    for group in groups:
        logps, _ = group_logps(model, group.prompt, group.responses)  # (G, T)
        masked_logps, _ = group_logps(model, group.masked_prompt, group.responses)  # (G, T)
        gains = (logps - masked_logps).tolist()  # G x T
        digits, responses = group.row.get("digits"), []
        for i, tokens in enumerate(group.responses):
            words = [processor.tokenizer.decode([token]) for token in tokens.tolist()]
            response = dict(tokens=list(zip(words, gains[i])), misread=(), error=None)
            if digits:
                response["misread"] = misread(words, digits)
                response["error"] = toy.error_type(group.texts[i], group.row)
            response |= dict(score=group.scores[i], advantage=group.advantages[i].item())
            responses.append(response)
        images = [fit_image(processor, image) for image in group.row["images"]]
        pictures = {"images": images, "masked": group.masked_images}
        shown.append({"row": group.row, **pictures, "responses": responses})
    return shown


def misread(words, digits):
    """Places of the words that say "I see" a digit which the picture does not show there."""
    said = re.search(r"I see (\d(?: \d)*)\.", "".join(words))
    starts = list(accumulate(map(len, words), initial=0))
    read = said[1].split() if said else []
    right = [str(digit) for digit in digits] + [None] * len(read)
    return {starts.index(said.start(1) + 2 * i) for i in range(len(read)) if read[i] != right[i]}


def shade(token, gain, wrong=False):
    """One token as HTML, blue if the image makes it likelier, else orange, the number below it."""
    text = token.rstrip("\n")
    number = f"<small>{gain:+.1f}</small>" if text and abs(gain) >= 0.1 else ""
    colour = f"rgb({'0 114 178' if gain > 0 else '230 159 0'} / {min(abs(gain) / 5, 0.8):.2f})"
    kind = f"token{' misread' * wrong}"
    look = f'class="{kind}" title="{gain:+.2f} nats" style="background: {colour}"'
    return f"<span {look}>{html.escape(text)}{number}</span>{token[len(text) :]}"


def show_picture(image, caption):
    """A PIL image as HTML."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    below = f"<figcaption>{caption}</figcaption>"
    return f'<figure><img alt="{caption}" src="{source}">{below}</figure>'


def show_response(r):
    """A response of look_closely as HTML: its tokens, shaded, and its scores."""
    parts = [f"{name} {value:.2f}" for name, value in r["score"].items()]
    parts += [f"advantage {r['advantage']:+.2f}"] + [f"{r['error']} error"] * bool(r["error"])
    tokens = (shade(token, gain, i in r["misread"]) for i, (token, gain) in enumerate(r["tokens"]))
    score = f'<span class="score">{", ".join(parts)}</span>'
    return f'<p class="response">{"".join(tokens)}{score}</p>'


def write_samples(path, plan, before, after):
    """Questions with image and masked image, and the responses before and after training, token by
    token. plan: what ran on what, {word: text}."""
    sections = []
    for old, new in zip(before, after):
        question = html.escape(old["row"]["problem"].replace("<image>", " ").strip())
        answer = html.escape(old["row"]["answer"])
        shown = [show_picture(image, "image") for image in old["images"]]
        shown += [show_picture(image, "masked image") for image in old["masked"]]
        columns = "".join(
            f"<div><h3>{title}</h3>{''.join(map(show_response, of['responses']))}</div>"
            for title, of in (("before training", old), ("after", new))
        )
        head = f"<p>{question} Answer: <b>{answer}</b></p>{''.join(shown)}"
        sections.append(f'<section>{head}<div class="pair">{columns}</div></section>')
    page = Template(Path(__file__).with_name("samples.html").read_text()).substitute(
        name=html.escape(path.parent.name),
        run="".join(f"<tr><th>{word}<td>{html.escape(text)}" for word, text in plan.items()),
        wrong=shade("1", 0, True),
        scale="".join(shade("\u2003\u2003", gain) for gain in range(-4, 5)),
        sections="".join(sections),
    )
    path.write_text(page, encoding="utf-8")


def leave_behind(out, plan, history, before, after, seconds, memory):
    """The pictures and tables of a finished run. seconds and memory (GiB): by phase."""
    write_samples(out / "samples.html", plan, before, after)
    seed = plan["steps"].split("; ")[-1]
    plot_curves(out / "curves.png", history, f"{plan['algorithm'].split(';')[0]}, {seed}")
    evaluations = [evaluation_in(line) for line in history if "eval_accuracy" in line]
    columns = {"before": evaluations[0], "after": evaluations[-1]}
    print_table("held-out questions, % of responses", columns)
    total = sum(seconds.values())
    phase = lambda name, s: f"{s:5.0f} s  {s / total:4.0%}  up to {memory[name]:.1f} GiB"
    print_block({name: phase(name, spent) for name, spent in seconds.items()})
    for name in ("samples.html", "curves.png", "metrics.jsonl", "checkpoint/README.md"):
        print((out / name).resolve().as_uri())


def answer_lines(seen, masked):
    """eval.jsonl: Groups of the same questions, with the image and with it masked, line by line."""
    for group, blind in zip(seen, masked):
        line = {"problem": group.row["problem"], "answer": group.row["answer"]}
        for suffix, of in (("", group), ("_masked", blind)):
            line[f"accuracy{suffix}"] = mean(score["accuracy"] for score in of.scores)
            line[f"responses{suffix}"] = of.texts
        yield line
