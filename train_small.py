"""Train a Qwen vision-language model with PAPO on one machine: `python train_small.py --gamma 0.02`.

Without --model and --dataset it trains the embedded world of toy.py: a tiny Qwen2.5-VL that adds handwritten digits, on a CPU,
offline, in minutes. With them, any Qwen2-VL, Qwen2.5-VL or Qwen3-VL on any data set of images, questions and answers.
The algorithm is papo.py. This file is the program around it, in the order in which it runs:

    command line -> data -> model -> evaluation -> training loop -> the program; what a run leaves behind is report.py's
"""

import copy
import importlib
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
import warnings
from argparse import SUPPRESS, HelpFormatter
from collections import Counter
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Literal

import datasets
import huggingface_hub
import optimi
import peft
import psutil
import torch
import transformers
from PIL import Image
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, HfArgumentParser
from transformers.image_utils import load_image

import toy
from papo import (
    HEAD_CHUNK,
    PAPOConfig,
    encode_prompt,
    end_tokens,
    fit_image,
    mask_patches,
    option,
    papo_loss,
    papo_step,
    roll_out,
    sample_and_grade,
    score_constants,
    split_batch,
)
from report import (
    SAMPLES,
    look_closely,
    model_card,
    plot_curves,
    plot_tokens,
    print_table,
    versions,
    write_samples,
)

# ---------------------------------------------------------------------------------------------------------------------
# 1. The command line: one flag per field of PAPOConfig and of RunConfig
# ---------------------------------------------------------------------------------------------------------------------

# What makes an algorithm, without the sizes of the published runs: these fields of the preset of that name.
ALGORITHMS = {"grpo": "grpo", "dapo": "dapo", "papo-g": "papo-g-3b", "papo-d": "papo-d-3b"}
ALGORITHM_FIELDS = "gamma beta eta1 eta2 masked_grad clip_high aggregation dynamic_sampling".split()
# The sizes that suit the embedded world; --preset brings the published ones back.
TOY_SIZES = dict(
    group_size=8, prompts_per_batch=16, updates_per_batch=2, max_new_tokens=64, prompts_per_sample=48, steps=40,
    learning_rate=1e-4,
    gradient_checkpointing=False,
)  # fmt: skip
GPU_SIZES = {  # --gpu-memory: what fits with a 3B model, prompts of 1,536 tokens of which 1,280 are the image's
    24: dict(precision="bf16", lora=16, freeze_vision=True, tokens_per_forward=4096, prompts_per_sample=4,
             max_new_tokens=1024),
    48: dict(precision="bf16", lora=64, freeze_vision=True, tokens_per_forward=8192, prompts_per_sample=12,
             max_new_tokens=2048),
    80: dict(precision="bf16-kahan", tokens_per_forward=8192, prompts_per_sample=16, max_new_tokens=2048),
}  # fmt: skip
GROUPS = {  # --help: the fields under each heading
    "start here": "help gamma algorithm preset model dataset gpu_memory steps seed out",
    "algorithm": "beta eta1 eta2 gated clip_low clip_high clip_dual aggregation masked_grad entropy_estimate "
    "mask_ratio patch_size dynamic_sampling max_redraws format_weight",
    "sampling and batches": "group_size temperature top_p max_new_tokens prompts_per_batch updates_per_batch "
    "learning_rate weight_decay max_grad_norm",
    "data": "task digits eval_size split max_samples image_column problem_column answer_column min_pixels max_pixels "
    "max_prompt_tokens",
    "model and memory": "precision lora merge freeze_vision gradient_checkpointing prompts_per_sample "
    "tokens_per_forward",
    "run": "eval_only eval_every resume save_every report_to",
}
USAGE = """python train_small.py [FLAGS]                              embedded world
       python train_small.py --model NAME --dataset NAME [FLAGS]  real model
       python train_small.py [FLAGS] --resume                     go on with it"""


class UserError(Exception):
    """Something the user typed or fed in that cannot work: shown as one line, exit code 2."""


@dataclass
class RunConfig:
    """What to train, on what, and where to write it."""

    algorithm: Literal["grpo", "dapo", "papo-g", "papo-d"] = option(
        "papo-g",
        "loss weights, clipping, averaging and redrawing of GRPO or DAPO, or of PAPO on top of either",
    )
    preset: str = option(
        None,
        "every value of a published recipe: papo-g-3b, papo-g-7b, papo-g-qwen3-2b, papo-g-no-ref, papo-d-3b, "
        "papo-d-7b, grpo, dapo; default: none",
    )
    seed: int = option(0, "decides the warm start, the questions, the samples and the masks")
    steps: int = option(None, "rollout batches to train on; default: two epochs, as published")
    out: str = option(
        None,
        "folder of the run, which must not hold one yet; default: runs/ALGORITHM-gammaGAMMA-seedSEED, with a number "
        "behind it where that is taken",
    )
    task: Literal["sum", "largest"] = option("sum", "embedded world: what is asked about the digits")
    digits: int = option(4, "embedded world: handwritten digits per image, 1 to 9; more is harder")
    eval_size: int = option(96, "held-out questions, each answered 8 times")
    eval_every: int = option(10, "steps between evaluations")
    save_every: int = option(10, "steps between checkpoints; the last step always writes one")
    resume: bool = option(
        False,
        "go on with the run in --out exactly from its checkpoint; without --out, with the newest of the default name "
        "and these settings",
    )
    eval_only: bool = option(False, "do not train: answer all questions 8 times, also with the image masked")
    model: str = option(
        None, "hub name or folder of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL; default: the embedded world's"
    )
    dataset: str = option(None, "hub name, folder, .parquet or .jsonl; default: the embedded world's")
    split: str = option(
        "train", "split of the data set; its last --eval-size questions, at most a quarter, are held out"
    )
    max_samples: int = option(None, "use only the first so many rows; default: all")
    image_column: str = option("images", "column with the image, or a list of one")
    problem_column: str = option("problem", "column with the question, which may say <image>")
    answer_column: str = option("answer", "column with the answer")
    min_pixels: int = option(200704, "smaller images of --dataset are enlarged to this area, as published")
    max_pixels: int = option(1003520, "larger images of --dataset are reduced to this area, as published")
    max_prompt_tokens: int = option(4096, "rows of --dataset with a longer prompt are skipped, as published")
    gradient_checkpointing: bool = option(
        True, "recompute activations in backward: less memory, about a third more time"
    )
    lora: int = option(
        None,
        "train a LoRA adapter of this rank instead of all weights; typical 16 to 64. The default learning rate is then "
        "ten times as high (Schulman et al. 2025, LoRA Without Regret, thinkingmachines.ai/blog/lora); default: none",
    )
    merge: bool = option(
        False,
        "with --lora: write checkpoints with the adapter merged into the weights, as fp32: bf16 rounds small updates away",
    )
    precision: Literal["fp32", "bf16", "bf16-kahan"] = option(
        "fp32", "of the weights; bf16 needs --lora, bf16-kahan compensates the rounding of small updates"
    )
    freeze_vision: bool = option(False, "do not train the vision tower: its features are computed only once")
    gpu_memory: Literal[24, 48, 80] = option(
        None, "settings for a GPU of so many GiB (README); default: none"
    )
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = option(
        "none", "also send every line of metrics.jsonl to this tracker, which pip installs"
    )

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, str) and not value.strip():
                raise ValueError(f"--{name.replace('_', '-')} is empty")
        counts = "eval_size eval_every save_every steps max_samples lora min_pixels max_prompt_tokens"
        for name in counts.split():
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in [0, 2^32), got {self.seed}")
        if self.eval_only and self.resume:
            raise ValueError("--resume goes on training, --eval-only trains nothing: give one of them")
        if self.precision != "fp32" and not self.model:
            raise ValueError(
                "--precision, and --gpu-memory which sets it, need --model: the embedded world is fp32"
            )
        if self.lora and not self.model and not self.merge:
            raise ValueError("--lora needs --model, or --merge: an adapter is loaded by a base model's name")
        if not 1 <= self.digits <= 9:
            raise ValueError(f"digits must lie in [1, 9], got {self.digits}")
        if self.max_pixels < self.min_pixels:
            raise ValueError(f"max_pixels {self.max_pixels} is smaller than min_pixels {self.min_pixels}")
        if self.dataset and not self.model:
            raise ValueError(
                "--dataset needs --model: the embedded world's model knows only its own questions"
            )
        of_data = "split max_samples image_column problem_column answer_column min_pixels max_pixels max_prompt_tokens"
        for name in ("task digits" if self.dataset else of_data).split():
            if getattr(self, name) != getattr(RunConfig, name):
                needs = "is of the embedded world, not of --dataset" if self.dataset else "needs --dataset"
                raise ValueError(f"--{name.replace('_', '-')} {needs}")
        if self.merge and not self.lora:
            raise ValueError("--merge needs --lora")
        if self.precision == "bf16" and not self.lora and not self.eval_only:
            raise ValueError(
                "bf16 weights with plain AdamW lose most updates (at |w| = 0.02 one bf16 step is 1e-4, an update "
                "1e-6): use --precision bf16-kahan, or --lora RANK"
            )


class Parser(HfArgumentParser):
    """A flag for each dataclass field, under the headings of GROUPS; what is wrong on the command line becomes one line."""

    def add_argument(self, *flags, help, default=None, **settings):
        """Called for each field with both spellings of its flag: both are read, the one with dashes is shown."""
        name = settings.get("dest") or flags[-1].strip("-").replace("-", "_")
        if "dest" in settings:  # --no-NAME: read, but --NAME False is shown
            help = SUPPRESS
        elif name != "help":
            help, _, words = help.partition("; default: ")  # in words where None stands for something
            others = {"embedded world": TOY_SIZES.get(name, default)}
            if name in ALGORITHM_FIELDS and not words:
                others = {a: getattr(PAPOConfig.preset(preset), name) for a, preset in ALGORITHMS.items()}
            values = [("default:", words or default), *((w, v) for w, v in others.items() if v != default)]
            shown = [f"{w} {v:g}" if isinstance(v, float) else f"{w} {v}" for w, v in values]
            help += f" ({'; '.join(shown)})"
            if "choices" not in settings:
                kind = "True|False" if "nargs" in settings else "NAME"
                settings["metavar"] = {int: "N", float: "X"}.get(settings["type"], kind)
        if not hasattr(self, "groups"):
            self.groups = {title: self.add_argument_group(title) for title in GROUPS}
        title = next(title for title, names in GROUPS.items() if name in names.split())
        action = self.groups[title].add_argument(*flags, help=help, default=default, **settings)
        action.option_strings = [flag for flag in flags if "_" not in flag]
        return action

    def error(self, message):
        raise UserError(message)  # argparse would print the whole usage first


def algorithm_of(preset: str) -> str:
    """The algorithm whose recipe a preset is: the one that its name begins with."""
    return next(name for name in ALGORITHMS if preset.startswith(name))


def parse_args(argv=None) -> tuple[PAPOConfig, RunConfig]:
    """Flags beat --gpu-memory, which beats the preset or algorithm, the embedded world's sizes and the dataclass defaults."""
    about = (
        f"{__doc__.split(':')[0]}. A flag beats --gpu-memory, which beats --preset or --algorithm, which beat the "
        "defaults below. Flags with underscores are read, too."
    )
    kinds = dict(formatter_class=HelpFormatter, allow_abbrev=False)
    parser = Parser([PAPOConfig, RunConfig], usage=USAGE, description=about, **kinds)
    try:
        first = parser.parse_args(argv)
        recipe = asdict(PAPOConfig.preset(first.preset or ALGORITHMS[first.algorithm]))
        recipe["masked_grad"] = None  # follows eta2, which a flag may change
        if not first.preset:
            recipe = {name: recipe[name] for name in ALGORITHM_FIELDS} | ({} if first.model else TOY_SIZES)
        else:
            recipe["algorithm"] = algorithm_of(first.preset)
        recipe |= GPU_SIZES.get(first.gpu_memory, {})
        if first.lora or "lora" in recipe:
            full = recipe.get("learning_rate", PAPOConfig.learning_rate)
            recipe["learning_rate"] = round(10 * full, 12)  # 1e-05, not 9.99e-06
        parser.set_defaults(**recipe)
        config, run = parser.parse_args_into_dataclasses(argv)
    except ValueError as error:
        raise UserError(error) from None
    if run.preset and run.algorithm != algorithm_of(run.preset):
        raise UserError(f"--preset {run.preset} is not --algorithm {run.algorithm}: leave one of them out")
    if run.algorithm in ("grpo", "dapo") and (config.gamma or config.eta1 or config.eta2):
        raise UserError(
            f"{run.algorithm} has gamma = eta1 = eta2 = 0; with them it is --algorithm papo-{'gd'[run.algorithm == 'dapo']}"
        )
    return config, run


def recipe_of(config, run) -> str:
    """The algorithm, its weights, and what deviates from the preset."""
    weights = "".join(f", {name} {getattr(config, name):g}" for name in ("gamma", "beta", "eta1", "eta2"))
    text = run.algorithm + weights + ", gated" * config.gated
    if run.preset:
        pairs = zip(asdict(PAPOConfig.preset(run.preset)).items(), asdict(config).values())
        changed = [f"{name} {old} -> {new}" for (name, old), new in pairs if new != old]
        text += f"; preset {run.preset} " + (f"but for {', '.join(changed)}" if changed else "as published")
    return text


def default_out(config, run) -> str:
    return f"runs/{run.preset or run.algorithm}-gamma{config.gamma:g}-seed{run.seed}"


# ---------------------------------------------------------------------------------------------------------------------
# 2. Data and model
# ---------------------------------------------------------------------------------------------------------------------


# What Pillow raises for a damaged or huge file; RuntimeError where a codec is a library's, as for AVIF.
UNREADABLE = (OSError, SyntaxError, EOFError, RuntimeError, Image.DecompressionBombError)


class Unusable(UserError):
    """A row that cannot be trained on or asked about; its message is the reason."""


class Rows:
    """Rows of a data set as {images: [one image], problem, answer}, read when asked for.

    With a processor a row is also encoded, as `prompt`, and its length checked. One that cannot be used raises Unusable; `skipped`
    keeps {place: reason}, and the first row of each reason is said at once."""

    def __init__(self, dataset, columns, folder, indices, processor=None, max_prompt_tokens=None):
        self.dataset, self.columns, self.folder, self.indices = dataset, columns, folder, indices
        self.processor, self.max_prompt_tokens, self.skipped = processor, max_prompt_tokens, {}

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        index = self.indices[i]
        try:
            row = read_row(self.dataset[index], self.columns, self.folder)
            if self.processor:
                # A photo may be ten times as large as what the vision tower sees of it.
                row["images"] = [fit_image(self.processor, row["images"][0])]
                row["prompt"] = encode_prompt(self.processor, row["problem"], row["images"][0])
                if row["prompt"]["input_ids"].shape[1] > self.max_prompt_tokens:
                    raise ValueError(f"prompt longer than {self.max_prompt_tokens} tokens")
            return row
        except ValueError as error:
            reason = str(error)
        except UNREADABLE:
            reason = "unreadable image"
        if reason not in self.skipped.values():
            tqdm.write(f"skipping row {index}: {reason}")
        self.skipped[i] = reason
        raise Unusable(f"row {index}: {reason}")

    def part(self, indices):
        """Some of the rows, known to be usable: they are only read."""
        return Rows(self.dataset, self.columns, self.folder, indices)

    def say_skipped(self):
        for reason, count in Counter(self.skipped.values()).most_common():
            tqdm.write(f"skipped {count} rows: {reason}")


class RowStream:
    """An endless iterator over usable rows, newly shuffled each epoch. `count` rows, also unusable ones, are behind it: all the
    state there is. Raises UserError once every row has turned out to be unusable."""

    def __init__(self, rows, seed):
        self.rows, self.seed, self.count, self.order = rows, seed, 0, None

    def __iter__(self):
        return self

    def __next__(self):
        while True:
            epoch, place = divmod(self.count, len(self.rows))
            if place == 0 or self.order is None:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                self.order = torch.randperm(len(self.rows), generator=generator).tolist()
            self.count += 1
            try:
                return self.rows[self.order[place]]
            except Unusable:
                if len(self.rows.skipped) == len(self.rows):
                    reasons = dict(Counter(self.rows.skipped.values()))
                    raise UserError(
                        f"none of the {len(self.rows)} rows to train on is usable: {reasons}"
                    ) from None


def open_dataset(name, split):
    """A data set by hub name, folder, or parquet / jsonl file."""
    path = Path(name)
    builder = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}.get(path.suffix)
    try:
        whole = builder and path.is_file() or (path / "state.json").exists()
        if whole and split != "train":
            raise UserError(f"--split {split}: {name} has no splits")
        if whole and not builder:
            return datasets.load_from_disk(name)
        if whole:
            return datasets.load_dataset(builder, data_files=name, split="train")
        if builder or (path.is_absolute() or name.startswith(".")) and not path.exists():
            raise UserError(f"--dataset {name}: no such file or folder")
        ask_hub(name)
        return datasets.load_dataset(name, split=split)
    except UserError:
        raise
    except Exception as error:  # the library's own errors are many; its message says which
        raise UserError(
            f"--dataset {name}: cannot be read{hub_hint(path)}: {type(error).__name__}: {error}"
        ) from None


def ask_hub(name):
    """Before a hub name is looked up: without a network only in the cache, instead of asking six times for each file."""
    if Path(name).exists() or huggingface_hub.is_offline_mode():
        return
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
        print(f"{name}: from the hub, unless it is in its cache")
    except Exception:  # no name server, no route, no answer: each has an error of its own
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def hub_hint(path):
    """What to try where a name is no local folder, so that the hub was asked."""
    offline = "Without --model and --dataset the embedded world runs offline"
    return "" if path.exists() else f" here or from the hub (is there a network? {offline})"


def read_row(row, columns, folder):
    """One row in the trainer's own columns. Raises ValueError with the reason if it has not exactly one image, or no answer,
    and UNREADABLE if its image is damaged."""
    image_column, problem_column, answer_column = columns
    images = row[image_column] if isinstance(row[image_column], (list, tuple)) else [row[image_column]]
    images = [image for image in images if image is not None]
    if len(images) != 1:
        raise ValueError("no image" if not images else "more than one image")
    image = images[0]
    if isinstance(image, dict):  # undecoded: {bytes, path}
        image = Image.open(io.BytesIO(image["bytes"])) if image.get("bytes") else image.get("path")
    if isinstance(image, str) and ("://" in image or image.startswith("data:")):
        with suppress(ValueError):  # what holds no image stays a string
            image = load_image(image)
    elif isinstance(image, str):
        image = Image.open(folder / image)
    if not isinstance(image, Image.Image):
        raise ValueError("unreadable image")
    image.load()
    problem, answer = row[problem_column], row[answer_column]
    if not isinstance(problem, str) or not problem.strip():
        raise ValueError("problem is no text")
    answer = None if answer != answer else answer  # NaN: a number that is missing
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)) or not str(answer).strip():
        raise ValueError(
            "empty answer" if answer is None or isinstance(answer, str) else "answer is no text or number"
        )
    return {"images": [image], "problem": problem, "answer": str(answer).strip()}


def load_rows(run, processor):
    """Rows to train on, each checked when it is drawn, and held-out ones, checked here: the last usable --eval-size, at most a
    quarter, or all if nothing is trained. Unusable rows are skipped and counted by reason; none is cut to fit."""
    dataset = open_dataset(run.dataset, run.split)
    columns = run.image_column, run.problem_column, run.answer_column
    if missing := [name for name in columns if name not in dataset.column_names]:
        raise UserError(
            f"--dataset {run.dataset} has no column {', '.join(missing)}; it has {', '.join(dataset.column_names)} "
            "(see --image-column, --problem-column, --answer-column)"
        )
    folder = Path(run.dataset) if Path(run.dataset).is_dir() else Path(run.dataset).parent
    total = min(len(dataset), run.max_samples or len(dataset))
    rows = Rows(dataset, columns, folder, range(total), processor, run.max_prompt_tokens)
    wanted = total if run.eval_only else max(1, min(run.eval_size, total // 4))
    held_out, start = [], total
    with tqdm(total=wanted, desc="checking held-out rows", unit="row") as bar:
        while start > 0 and len(held_out) < wanted:
            start -= 1
            with suppress(Unusable):
                rows[start]
                held_out.insert(0, start)
                bar.update()
    rows.say_skipped()
    needed = 1 if run.eval_only else 2
    if start == 0 and len(held_out) < needed:
        raise UserError(
            f"--dataset {run.dataset}: {len(held_out)} usable rows, at least {needed} are needed; "
            f"skipped {dict(Counter(rows.skipped.values()))}"
        )
    train = range(start)
    if start == 0 and not run.eval_only:  # so few are usable that all were seen
        end = len(held_out) - max(1, len(held_out) // 4)
        train, held_out = held_out[:end], held_out[end:]
    return Rows(dataset, columns, folder, train, processor, run.max_prompt_tokens), rows.part(held_out)


SUPPORTED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def load_model(run):
    """Model and processor of --model, with the image sizes of the command line where a data set is given."""
    path = Path(run.model)
    if (path.is_absolute() or run.model.startswith(".")) and not path.is_dir():
        raise UserError(f"--model {run.model}: no such folder")
    if (path / "checkpoint").is_dir():
        raise UserError(f"--model {run.model} is a run; its model is {path / 'checkpoint'}")
    try:
        adapter = (path / "adapter_config.json").exists()
        base = peft.PeftConfig.from_pretrained(run.model).base_model_name_or_path if adapter else run.model
        if adapter and run.lora and not run.merge:
            raise UserError(
                f"--model {run.model} is a LoRA adapter, and a second one on top of it cannot be loaded without it: "
                "add --merge, which writes whole models"
            )
        ask_hub(base)
        settings = AutoConfig.from_pretrained(base)
        if (kind := settings.model_type) not in SUPPORTED:
            raise UserError(f"--model {run.model} is a {kind}; supported are {', '.join(SUPPORTED)}")
        layers = getattr(settings.get_text_config(), "layer_types", None) or ()  # Qwen3-VL has none
        if "sliding_attention" in layers:
            raise UserError(
                f"--model {run.model} uses sliding-window attention, under which sampling and scoring differ: "
                "set use_sliding_window to false in its config.json"
            )
        merge = adapter and not run.eval_only  # an adapter is evaluated as it was trained, beside its base
        if merge and run.precision != "fp32":
            raise UserError(
                f"--model {run.model} is a LoRA adapter, and merged into bf16 weights most of its small updates are "
                "lost: add --precision fp32"
            )
        processor = AutoProcessor.from_pretrained(run.model)
        model, report = AutoModelForImageTextToText.from_pretrained(
            base,
            dtype=torch.float32 if run.precision == "fp32" else torch.bfloat16,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
        if adapter:
            model = peft.PeftModel.from_pretrained(model, run.model)
            model = model.merge_and_unload() if merge else model.base_model.model
            model.requires_grad_(True)  # peft had frozen the base
    except UserError:
        raise
    except Exception as error:  # a missing file, a cut-off one, no network: the message says which
        raise UserError(
            f"--model {run.model}: cannot be loaded{hub_hint(path)}: {type(error).__name__}: {error}"
        ) from None
    if missing := report["missing_keys"]:
        raise UserError(f"--model {run.model} lacks {len(missing)} weights, such as {min(missing)}")
    if broken := [name for name, weight in model.named_parameters() if not weight.isfinite().all()]:
        raise UserError(
            f"--model {run.model} has NaN or infinite weights in {len(broken)} tensors, such as {broken[0]}"
        )
    if run.dataset:
        processor.image_processor.size = {"shortest_edge": run.min_pixels, "longest_edge": run.max_pixels}
    return model, processor


def load(run):
    """Model, in host memory, processor, rows to train on, held-out rows."""
    if run.model:
        model, processor = load_model(run)
    if run.dataset:
        rows, held_out = load_rows(run, processor)
    else:
        vocabulary = lambda processor: processor.tokenizer.get_vocab()  # each task has its own
        for task in toy.TASKS.keys() - {run.task} if run.model else ():
            if vocabulary(processor) == vocabulary(toy.toy_processor(task)):
                raise UserError(f"--model {run.model} answers --task {task}, not --task {run.task}")
        rows = toy.toy_dataset("train", 2048, run.digits, run.seed, run.task)
        # Held out are the same questions for every seed.
        held_out = toy.toy_dataset("test", run.eval_size, run.digits, 0, run.task)
    if not run.model:
        # Tensors this small gain little from a second core, and lose a lot where it is busy.
        torch.set_num_threads(1)
        model, processor = toy.warm_start(run.digits, run.seed, task=run.task)
    return model, processor, rows, held_out


def best_device():
    """The GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ---------------------------------------------------------------------------------------------------------------------
# 3. Evaluation: avg@8
# ---------------------------------------------------------------------------------------------------------------------


class EncodedRows:
    """What the processor made of the held-out rows, kept from one evaluation to the next until `room` bytes are full.

    The first ones stay: evaluations ask for all rows in turn, where the least recently used is the next one needed."""

    def __init__(self, room=2**30):
        self.room, self.kept = room, {}

    def get(self, key, make):
        """The (row, state) under a key, from `make` if it is not kept. The row has a prompt and no images."""
        if key in self.kept:
            return self.kept[key]
        row, state = entry = make()
        size = state.nbytes + sum(tensor.nbytes for tensor in row["prompt"].values())
        if size <= self.room:
            self.room -= size
            self.kept[key] = entry
        return entry


def evaluate(model, processor, config, rows, seed=0, masked=False, encoded=None):
    """Answer every question SAMPLES times at temperature 1. Returns the Groups, in the order of rows, without images and prompts.

    masked: with fresh random masks on the images, to see how far the answers depend on them. encoded: EncodedRows that
    earlier calls with the same rows and settings have filled."""
    config = replace(config, group_size=SAMPLES, temperature=1.0, top_p=1.0)
    sampling = torch.Generator(model.device).manual_seed(seed)
    masking = torch.Generator().manual_seed(seed)
    encoded = EncodedRows(room=0) if encoded is None else encoded

    def encode(i):
        row = dict(rows[i])
        image = row.pop("images")[0]
        if masked:
            image = mask_patches(fit_image(processor, image), config.mask_ratio, config.patch_size, masking)
        row["prompt"] = encode_prompt(processor, row["problem"], image)
        return row, masking.get_state()

    groups = []
    for start in range(0, len(rows), config.prompts_per_sample):
        share = []
        for i in range(start, min(start + config.prompts_per_sample, len(rows))):
            row, state = encoded.get((i, masked, seed), lambda: encode(i))
            masking.set_state(state)  # as if it had been drawn: the next row's mask is the same
            share.append(dict(row))
        for group in sample_and_grade(model, processor, config, share, sampling):
            groups.append(replace(group, prompt=None))
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


def longest_prompt(model, processor, run, row):
    """Tokens of the longest prompt to expect, and those of them that are the image's: the largest image with 256 tokens of text,
    or without --dataset the row's."""
    if not run.dataset:
        ids = encode_prompt(processor, row["problem"], row["images"][0])["input_ids"]  # (1, P)
        return ids.shape[1], int((ids == model.config.image_token_id).sum())
    vision = model.config.vision_config
    image = run.max_pixels // (vision.patch_size * vision.spatial_merge_size) ** 2
    return min(run.max_prompt_tokens, image + 256), image


ADAPTED = r".*language_model.*(q|k|v|o|gate|up|down)_proj"  # the layers that --lora adapts


def layer_bytes(tokens, hidden, attention, mlp, width):
    """What one transformer layer keeps for backward: inputs of norms and matrices, q, k, v at all heads, the MLP's products."""
    return tokens * (8 * hidden + 6 * attention + 4 * mlp) * width


def estimate_memory(model, config, run, prompt_tokens, image_tokens) -> dict[str, float]:
    """GiB that a run takes on its device, by part, and the peak: what stays plus the phase that takes most. A batch's images,
    as patches, or as features of a frozen tower, wait in host memory: a part, but not in the peak.

    Computed from shapes alone, so the model (before an adapter is added) may be on the meta device. Not in it: what the
    allocator wastes, and torch's own half GiB on a GPU."""
    text, vision = model.config.get_text_config(), model.config.vision_config
    width = next(model.parameters()).element_size()  # bytes of a weight
    L = max(config.tokens_per_forward, prompt_tokens + config.max_new_tokens)
    H, V = text.hidden_size, text.vocab_size
    head = getattr(text, "head_dim", None) or H // text.num_attention_heads
    frozen = run.freeze_vision or run.lora
    count = sum(
        p.numel() for n, p in model.named_parameters() if not run.freeze_vision or ".visual." not in n
    )
    trained, each = count, width
    if run.lora:
        shapes = [m.weight.shape for n, m in model.named_modules() if re.fullmatch(ADAPTED, n)]
        trained, each = sum(run.lora * sum(shape) for shape in shapes), 4
    kahan = run.precision == "bf16-kahan" and not run.lora
    weights = sum(p.nbytes for p in model.parameters())
    layers, graphs = text.num_hidden_layers, 1 + (config.gamma > 0 and config.mask_gradient != "detached")
    one = layer_bytes(L, H, text.num_attention_heads * head, text.intermediate_size, width)
    patches = image_tokens * vision.spatial_merge_size**2
    size = getattr(vision, "embed_dim", vision.hidden_size)
    mlp = getattr(vision, "intermediate_size", None) or int(size * vision.mlp_ratio)
    seen = layer_bytes(patches, size, size, mlp, width)
    if run.gradient_checkpointing:
        kept = L * H * layers * width + (not frozen) * patches * size * vision.depth * width
        activations = graphs * kept + max(one, seen)
    else:
        activations = graphs * (one * layers + (not frozen) * seen * vision.depth)
    pixels = 3 * vision.temporal_patch_size * vision.patch_size**2  # numbers of a patch, fp32
    stacked = 1 + len(getattr(vision, "deepstack_visual_indexes", ()))
    rows = config.prompts_per_sample * max(config.group_size, SAMPLES)
    masked = config.gamma > 0 or config.eta2 > 0
    sizes = {
        "weights": weights + trained * each * bool(run.lora),
        "gradients": trained * each,
        "optimizer": trained * each * (3 if kahan else 2),
        "reference": weights * (config.beta > 0 and not run.lora),
        "features": config.prompts_per_batch * (1 + masked)
        * (image_tokens * H * stacked * width if frozen else patches * pixels * 4),
        "activations": activations + graphs * 2 * L * L * width,  # and each pass's mask
        "logits": HEAD_CHUNK * V * 4 * 5,  # as fp32: logits, log_probs, exp, the product, and a gradient
        "kv_cache": rows * (prompt_tokens + config.max_new_tokens)
        * layers * 2 * text.num_key_value_heads * head * width,
    }  # fmt: skip
    phases = (
        sizes["kv_cache"] + rows * V * 4 * 3,  # sampling: logits, probs, and the model's own
        sizes["gradients"] + sizes["activations"] + sizes["logits"],
        2 * sizes["gradients"],  # the optimizer's step works on all tensors at once, with one copy
    )
    sizes["peak"] = sizes["weights"] + sizes["optimizer"] + sizes["reference"] + max(phases)
    return {name: size / 2**30 for name, size in sizes.items()}


def memory_text(sizes, device):
    """The estimate beside what there is: the GPU's memory, or else the machine's."""
    on_gpu = device.type == "cuda"
    there = torch.cuda.get_device_properties(device).total_memory if on_gpu else psutil.virtual_memory().total
    named = {name if name != "features" else "features in host memory": size for name, size in sizes.items()}
    parts = ", ".join(f"{name} {size:.1f}" for name, size in named.items() if name != "peak" and size >= 0.05)
    text = f"estimated {sizes['peak']:.1f} GiB of the {'GPU' if on_gpu else 'machine'}'s {there / 2**30:.0f}"
    return text + (f" ({parts})" if parts else "")


def describe(model, run, questions):
    """What is about to run, on what: {word: text}, which print_block prints."""
    count = sum(weight.numel() for weight in model.parameters()) / 1e6
    trained = (f", LoRA of rank {run.lora}" if run.lora else "") + ", frozen vision tower" * run.freeze_vision
    cpu = f"CPU, {torch.get_num_threads()} of {os.cpu_count()} cores"
    data = (
        f"{run.dataset}, split {run.split}"
        if run.dataset
        else f"{run.task} of {run.digits} handwritten digits"
    )
    return {
        "model": f"{run.model or 'the embedded world'}: {count:,.1f} M parameters, {run.precision}{trained}",
        "device": torch.cuda.get_device_name() if best_device().type == "cuda" else cpu,
        "data": f"{data}: {questions}",
    }


def print_block(lines):
    print("\n" + "\n".join(f"{word:11}{text}" for word, text in lines.items()) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# 4. The training loop
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def explain_out_of_memory(config, phase, training=True):
    """Turn an allocator's error into the phase it happened in, the sizes, and the flags that help."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError on a GPU; on a CPU only the text tells
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        sizes = ["group_size", "max_new_tokens", "prompts_per_sample", "tokens_per_forward"]
        lower = "lower --tokens-per-forward or --max-pixels, or "
        if phase in ("sample", "evaluate"):
            lower = "lower --prompts-per-sample, --max-new-tokens or --max-pixels, or "
        if phase == "load":
            lower = ""
        help = "--lora 16 --precision bf16, --freeze-vision, --gpu-memory; the last checkpoint is whole"
        raise UserError(
            f"out of memory in phase {phase} with {', '.join(f'{name} {getattr(config, name)}' for name in sizes)}; "
            f"{lower}use {help if training else '--precision bf16'}"
        ) from error


def peak_rss():
    """The process's largest memory so far, in GiB."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**30
    import resource  # Windows has none

    unit = 1 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Trainer:
    """Everything that changes during a run (weights, optimizer, random state, place in the data), and one step of it."""

    def __init__(self, model, processor, config, run, rows):
        self.model, self.processor, self.config, self.run, self.steps_done = model, processor, config, run, 0
        self.rows = RowStream(rows, run.seed)
        self.generator = torch.Generator().manual_seed(run.seed)
        self.seconds, self.memory, self.phase_name = {}, {}, "set-up"
        self.objective = papo_loss  # what papo_step minimises; your own may take its place
        if run.freeze_vision:
            model.model.visual.requires_grad_(False)
        self.adapter = None
        if run.lora:  # layers are replaced inside the model, so papo.py sees the same model as ever
            with torch.random.fork_rng():
                torch.manual_seed(run.seed)
                self.adapter = peft.get_peft_model(
                    model, peft.LoraConfig(r=run.lora, lora_alpha=2 * run.lora, target_modules=ADAPTED)
                )
        frozen = copy.deepcopy(model).requires_grad_(False) if config.beta and not run.lora else None
        self.reference = self.without_adapter if run.lora else lambda: nullcontext(frozen)
        if run.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        settings = dict(
            lr=config.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=config.weight_decay
        )
        trained = [p for p in model.parameters() if p.requires_grad]
        kahan = run.precision == "bf16-kahan" and not run.lora  # an adapter's weights are fp32 in any case
        settings |= {"kahan_sum": True} if kahan else {}
        self.optimizer = (optimi.AdamW if kahan else torch.optim.AdamW)(trained, **settings)

    @contextmanager
    def without_adapter(self):
        """The reference policy under LoRA: the same model with its adapter switched off, no second copy."""
        with self.adapter.disable_adapter():
            yield self.model

    @contextmanager
    def phase(self, name):
        """Time a phase and note its peak memory in GiB: the GPU's, or else the whole process's so far."""
        on_gpu, self.phase_name, start = self.model.device.type == "cuda", name, time.perf_counter()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        with explain_out_of_memory(self.config, name):
            yield
        peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else peak_rss()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.memory[name] = max(self.memory.get(name, 0.0), peak)

    def step(self) -> dict:
        """Roll out one batch and train on it. Returns the metrics of papo_step, averaged over the updates, and the rollout's.

        What was not measured, or is not a finite number, is left out."""
        config = self.config
        with self.phase("sample"):
            groups, redraws = roll_out(self.model, self.processor, config, self.rows, self.generator)
        updates = []
        if groups:
            with self.phase("score"):
                score_constants(self.model, self.reference, config, groups)
            with self.phase("update"):
                updates = [
                    papo_step(self.model, self.optimizer, config, part, self.objective)
                    for part in split_batch(config, groups)
                ]
        self.steps_done += 1
        scores = [score for group in groups for score in group.scores]
        responses = [o for group in groups for o in group.responses]  # LongTensors (<= T,)
        ends, longest = end_tokens(self.model, self.processor), config.max_new_tokens
        metrics = {
            "step": self.steps_done,
            **{name: mean(s[name] for s in scores) for name in ("reward", "accuracy", "format") if scores},
            **{
                name: mean(u[name] for u in updates if name in u)
                for name in dict.fromkeys(itertools.chain(*updates))
            },
            "groups": len(groups),
            "mixed": sum(group.mixed for group in groups),
            "redraws": redraws,
            "response_tokens": mean(map(len, responses)) if groups else 0.0,
            "cut_fraction": mean(len(o) == longest and o[-1].item() not in ends for o in responses)
            if groups
            else math.nan,
        }
        return {name: value for name, value in metrics.items() if math.isfinite(value)}

    def save(self, folder, card, record):
        """Weights, processor, model card, trainer state and the run's record of settings and metrics, in one folder.

        It is written beside as `.new` and swapped in. Killed before the first rename, `folder` is the last checkpoint,
        untouched; between the two, whole_checkpoint finds the new one."""
        fresh, old = folder.with_suffix(".new"), folder.with_suffix(".old")
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            self.write(fresh, card, record)
            for path in filter(Path.is_file, fresh.rglob("*")):
                with open(
                    path, "rb+"
                ) as file:  # on the disk before the last checkpoint goes, should the power fail
                    os.fsync(file.fileno())
        except Exception as error:  # each library has its own for a full disk
            raise UserError(
                f"checkpoint {fresh} cannot be written: {type(error).__name__}: {error}; the last one is whole"
            ) from error
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)

    def write(self, folder, card, record):
        """The files of a checkpoint."""
        if self.run.merge:  # in fp32: what is added to a bf16 weight is mostly rounded away
            weights = {  # the copy's, made in host memory: the GPU has no room for a second model
                id(p): torch.nn.Parameter(p.detach().to("cpu", torch.float32, copy=True))
                for p in self.adapter.parameters()
            }
            copy.deepcopy(self.adapter, weights).to("cpu").merge_and_unload().save_pretrained(folder)
        elif self.adapter:  # without a config.json from_pretrained looks up the base model it names
            self.adapter.save_pretrained(folder)
        else:
            self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
        (folder / "run.json").write_text(json.dumps(record, allow_nan=False))
        # The adapter is small, and here it is not rounded by a merge.
        adapter = peft.get_peft_model_state_dict(self.adapter) if self.adapter else None
        state = {"step": self.steps_done, "rows": self.rows.count, "generator": self.generator.get_state()}
        state |= {"adapter": adapter, "optimizer": self.optimizer.state_dict()}
        torch.save(state, folder / "trainer_state.pt")

    def load(self, folder):
        """Go on from a checkpoint of the same run, bit for bit."""
        try:
            state = torch.load(folder / "trainer_state.pt", map_location="cpu", weights_only=True)
            if self.adapter:
                peft.set_peft_model_state_dict(self.adapter, state["adapter"])
            else:
                saved = AutoModelForImageTextToText.from_pretrained(folder, dtype=self.model.dtype)
                self.model.load_state_dict(saved.state_dict())
            self.optimizer.load_state_dict(state["optimizer"])
        except Exception as error:  # missing, cut off, or of another model
            raise UserError(f"--resume: {folder} cannot be loaded: {type(error).__name__}: {error}") from None
        self.generator.set_state(state["generator"])
        self.steps_done, self.rows.count = state["step"], state["rows"]


# ---------------------------------------------------------------------------------------------------------------------
# 5. The program
# ---------------------------------------------------------------------------------------------------------------------


# Settings that a resumed run may change: its length, how often it looks and saves, where it reports.
FREE = ("steps", "eval_every", "save_every", "resume", "out", "patch_size", "report_to")
# What a folder holds that another run or another evaluation must not write over.
RUN_FILES = ("config.json", "metrics.jsonl", "checkpoint", "checkpoint.new", "checkpoint.old")


class Stopped(Exception):
    """SIGINT or SIGTERM, whose number it carries, ended the run after a step; everything is saved."""


def settings_of(config, run):
    """All settings as strict JSON can hold them: an infinite one as a string."""
    both = {**asdict(config), **asdict(run)}
    return {name: str(value) if value in (math.inf, -math.inf) else value for name, value in both.items()}


def write_whole(path, text):
    """Write a file so that, killed at any moment, it is either the old one or the new one."""
    draft = path.with_name(f"{path.name}.part")
    draft.write_text(text)
    os.replace(draft, path)


def as_lines(history):
    """metrics.jsonl: one line of strict JSON for each step."""
    return "".join(json.dumps(line, allow_nan=False) + "\n" for line in history)


@contextmanager
def claimed_folder(config, run, holds):
    """Set run.out to a folder that holds none of the files `holds`, and take it by creating the first of them, which only one
    process can. If what runs inside fails, all that was made is removed."""
    base = Path(run.out or default_out(config, run))
    # A run and some model's evaluation share no default name.
    taken = holds if run.out else (*RUN_FILES, "eval.jsonl")
    for number in itertools.count(1):
        out = base if number == 1 else base.with_name(f"{base.name}-{number}")
        try:
            made = [folder for folder in (out, *out.parents) if not folder.exists()]
            if run.out and os.path.lexists(out) and not out.is_dir():
                raise UserError(f"--out {out} is a file")
            if any((out / name).exists() for name in taken):
                raise FileExistsError
            out.mkdir(parents=True, exist_ok=True)
            (out / holds[0]).open("x").close()
            break
        except FileExistsError:
            if run.out:
                hint = "" if run.eval_only else ", or go on with it by --resume"
                raise UserError(
                    f"--out {out} holds {holds[0]} of another run: name another folder{hint}"
                ) from None
        except OSError as error:
            raise UserError(f"--out {out}: {error.strerror}") from None
    run.out = str(out)
    try:
        yield out
    except BaseException:
        (out / holds[0]).unlink(missing_ok=True)
        with suppress(OSError):  # somebody else's file is in it
            for folder in made:
                folder.rmdir()
        raise


def whole_checkpoint(out):
    """The newest whole checkpoint: a save killed between its two renames has left it as `.new`, the one before it as `.old`."""
    folder, fresh, old = (out / f"checkpoint{suffix}" for suffix in ("", ".new", ".old"))
    return folder if folder.exists() or not old.exists() else fresh if fresh.exists() else old


def read_record(out):
    """{settings, history} of the run in a folder: those its checkpoint was made with. settings is None where a run was killed
    so early that nobody knows."""
    path = whole_checkpoint(out) / "run.json"
    if path.exists():
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"--resume: {path} cannot be read: {error}") from None
    record = {"settings": None, "history": []}
    with suppress(OSError, ValueError):
        record["settings"] = json.loads((out / "config.json").read_text())
        if path.parent.exists():  # a checkpoint that has no run.json: its metrics are only here
            lines = (out / "metrics.jsonl").read_text().splitlines()
            record["history"] = [json.loads(line) for line in lines if line.endswith("}")]
    return record


def find_run(config, run):
    """--resume: settle run.out and return the record of the run there. A run may go on only as what it was, but for FREE."""
    base = Path(run.out or default_out(config, run))
    named = re.compile(re.escape(base.name) + r"(-\d+)?")
    found = [base] if run.out else [path for path in base.parent.glob("*") if named.fullmatch(path.name)]
    found = [out for out in found if any((out / name).exists() for name in RUN_FILES)]
    if not found:
        raise UserError(f"--resume: there is no run in {base}")
    reasons = []
    now, defaults = settings_of(config, run), settings_of(PAPOConfig(), RunConfig())
    for out in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        record = read_record(out)
        before = defaults | (record["settings"] or now)  # what was no setting yet counts as its default
        changed = [f"{n} {before[n]} -> {now[n]}" for n in now if n not in FREE and before[n] != now[n]]
        if not changed and (record["settings"] or run.out):
            run.out = str(out)
            try:
                if (whole := whole_checkpoint(out)).name != "checkpoint":
                    whole.rename(out / "checkpoint")
                (out / "config.json").open("a").close()
            except OSError as error:
                raise UserError(f"--out {out}: {error.strerror}") from None
            return record
        reasons.append(f"{out} was started with other settings: {', '.join(changed) or 'unknown ones'}")
    raise UserError(f"--resume: {'; '.join(reasons)}")


def open_tracker(run, settings, first_step):
    """A function that hands one line of metrics to --report-to, whose library is imported only when it is asked for."""
    if run.report_to == "none":
        return lambda line: None
    try:
        if run.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
        else:
            library = importlib.import_module(run.report_to)
    except ImportError:
        raise UserError(f"--report-to {run.report_to}: pip install {run.report_to}") from None
    if run.report_to == "tensorboard":
        writer = SummaryWriter(run.out, purge_step=first_step)  # hides what was logged after the checkpoint

        def log(line):
            for name, value in line.items():
                writer.add_scalar(name, value, line["step"])
            writer.flush()

        return log
    library.init(project="papo", name=Path(run.out).name, config=settings)
    return lambda line: library.log(line, step=line["step"])


@contextmanager
def note_signals():
    """A list that the first SIGINT or SIGTERM is put into; a second one acts at once, as if this were not here."""
    caught, at_once = [], {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}

    def note(number, frame):
        caught.append(number)
        for number, handler in at_once.items():
            signal.signal(number, handler)
        with suppress(OSError):
            os.write(2, b"\nstopping after this step, its evaluation and a save; once more stops at once\n")

    before = {number: signal.signal(number, note) for number in at_once}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def evaluation_in(line):
    """The evaluation that a line of metrics.jsonl holds, {} if none was due."""
    return {name.removeprefix("eval_"): value for name, value in line.items() if name.startswith("eval_")}


def train(config, run):
    """The whole run: load, evaluate, train with evaluations in between, write everything to run.out."""
    record = find_run(config, run) if run.resume else {"history": []}
    with nullcontext() if run.resume else claimed_folder(config, run, RUN_FILES):
        log = open_tracker(run, settings_of(config, run), len(record["history"]))
        model, processor, rows, held_out = load(run)
        config = replace(config, patch_size=processor.image_processor.patch_size)
        run.steps = run.steps or math.ceil(2 * len(rows) / config.prompts_per_batch)  # published: two epochs
        sizes = estimate_memory(model, config, run, *longest_prompt(model, processor, run, held_out[0]))
        plan = describe(model, run, f"{len(rows):,} questions to train on, {len(held_out)} held out") | {
            "algorithm": recipe_of(config, run),
            "steps": f"{run.steps} of {config.prompts_per_batch} questions x {config.group_size} responses in "
            f"{config.updates_per_batch} updates; seed {run.seed}",
            "memory": memory_text(sizes, best_device()),
        }
        print_block(plan | {"output": f"{run.out}/"})  # before anything is on the GPU: it may be too much
        with explain_out_of_memory(config, "load"):
            trainer = Trainer(model.to(best_device()), processor, config, run, rows)
    out = Path(run.out)
    examples = [held_out[i] for i in range(min(3, len(held_out)))]
    with trainer.phase("evaluate"):
        before_looks = look_closely(model, processor, config, examples)

    encoded = EncodedRows()

    def evaluation():
        with trainer.phase("evaluate"):
            seen, masked = (
                summarise(evaluate(model, processor, config, held_out, masked=m, encoded=encoded))
                for m in (False, True)
            )
            return {f"eval_{k}": v for k, v in {**seen, "accuracy_masked": masked["accuracy"]}.items()}

    if (out / "checkpoint").exists():
        trainer.load(out / "checkpoint")
        history = record["history"][: trainer.steps_done + 1]  # step 0 and one for each step
        if [line["step"] for line in history] != list(range(trainer.steps_done + 1)):
            raise UserError(f"--resume: {out}/metrics.jsonl lacks lines of steps before the checkpoint")
        print(f"going on with {out} after step {trainer.steps_done}")
    else:
        history = [{"step": 0, **evaluation()}]
        log(history[0])
    settings = settings_of(config, run) | {"versions": versions(), "device": plan["device"]}
    write_whole(out / "config.json", json.dumps(settings, indent=2, allow_nan=False) + "\n")
    write_whole(out / "metrics.jsonl", as_lines(history))
    with note_signals() as caught:
        train_steps(trainer, evaluation, history, log, caught)
    if trainer.steps_done < run.steps:
        raise Stopped(caught[0])
    if isinstance(rows, Rows):
        rows.say_skipped()
    leave_behind(trainer, history, plan, before_looks, look_closely(model, processor, config, examples))


def train_steps(trainer, evaluation, history, log, caught):
    """Step, evaluate, log and save until run.steps, or until the end of the step in which a signal is caught: only there is
    the state one that an undisturbed run passes through, too."""
    config, run, out = trainer.config, trainer.run, Path(trainer.run.out)
    steps = range(trainer.steps_done + 1, run.steps + 1)
    bar = tqdm(steps, run.algorithm, run.steps, initial=trainer.steps_done, unit="step")
    for step in bar:
        metrics = trainer.step()
        last = step == run.steps
        if step % run.eval_every == 0 or last:
            metrics |= evaluation()
        history.append(metrics)
        try:
            with open(out / "metrics.jsonl", "a") as file:
                file.write(as_lines([metrics]))
        except OSError as error:
            raise UserError(f"{out}/metrics.jsonl: {error.strerror}; the last checkpoint is whole") from error
        log(metrics)
        latest = next(line for line in reversed(history) if "eval_accuracy" in line)
        shown = {
            name: f"{metrics[name]:.3f}" for name in ("reward", "accuracy", "kl_prcp") if name in metrics
        }
        bar.set_postfix(shown, held_out=f"{latest['eval_accuracy']:.3f}")
        if (few := metrics["groups"]) < config.prompts_per_batch:
            tqdm.write(f"step {step}: {few} mixed groups, all there were after {metrics['redraws']} redraws")
        stopping = bool(caught)  # once: a signal from here on is for the next step
        if step % run.save_every == 0 or last or stopping:
            card = model_card(config, run, step, evaluation_in(history[0]), evaluation_in(latest))
            trainer.save(out / "checkpoint", card, {"settings": settings_of(config, run), "history": history})
        if stopping:
            break


def leave_behind(trainer, history, plan, before_looks, after_looks):
    """The pictures and tables of a finished run."""
    out = Path(trainer.run.out)
    write_samples(out / "samples.html", plan, before_looks, after_looks)
    plot_tokens(out / "tokens.png", after_looks[0])
    plot_curves(out / "curves.png", history, f"{plan['algorithm'].split(';')[0]}, seed {trainer.run.seed}")
    last = [evaluation_in(line) for line in history if "eval_accuracy" in line][-1]
    print_table("held-out questions, % of responses", {"before": evaluation_in(history[0]), "after": last})
    total = sum(trainer.seconds.values())
    print_block(
        {
            name: f"{seconds:5.0f} s  {seconds / total:4.0%}  peak memory {trainer.memory[name]:.1f} GiB"
            for name, seconds in trainer.seconds.items()
        }
    )
    phases = {"seconds": trainer.seconds, "peak_GiB": trainer.memory}
    (out / "phases.json").write_text(json.dumps(phases, indent=2) + "\n")
    for name in "samples.html curves.png tokens.png metrics.jsonl checkpoint/README.md".split():
        print((out / name).resolve().as_uri())


def evaluate_only(config, run):
    """avg@8 and pass@8 with the image and with it masked, question by question in run.out/eval.jsonl."""
    with claimed_folder(config, run, ("eval.jsonl",)) as out:
        model, processor, _, rows = load(run)
        config = replace(config, patch_size=processor.image_processor.patch_size)
        questions = f"{len(rows)} questions, {SAMPLES} responses each, as many with the image masked"
        print_block(describe(model, run, questions) | {"output": f"{out}/"})
        with explain_out_of_memory(config, "evaluate", training=False):
            model.to(best_device())
            seen, masked = (evaluate(model, processor, config, rows, masked=m) for m in (False, True))
    lines = [
        {
            "problem": group.row["problem"],
            "answer": group.row["answer"],
            "accuracy": mean(s["accuracy"] for s in group.scores),
            "responses": group.texts,
            "accuracy_masked": mean(s["accuracy"] for s in blind.scores),
            "responses_masked": blind.texts,
        }
        for group, blind in zip(seen, masked)
    ]
    write_whole(out / "eval.jsonl", as_lines(lines))
    columns = {"image": summarise(seen), "masked": summarise(masked)}
    columns["gap"] = {name: columns["image"][name] - columns["masked"][name] for name in columns["image"]}
    print_table(f"{len(rows)} questions, % of responses", columns)
    print(f"\n{(out / 'eval.jsonl').resolve().as_uri()}")


def going_on(argv, run):
    """The command that goes on with a run that was stopped."""
    # Without --resume, which may say True or False behind it.
    after = [before == "--resume" for before in [None, *argv[:-1]]]
    words = [w for w, a in zip(argv, after) if w.split("=")[0] != "--resume" and not (a and w[:2] != "--")]
    named = any(word.split("=")[0] == "--out" for word in words)
    out = [] if named else ["--out", run.out]
    return shlex.join(["python", "train_small.py", *words, *out, "--resume"])


def main(argv=None):
    """The command: train, or evaluate only. Exit code 2 and one line for what the user can mend, 128 + its number for a signal."""
    argv, run = sys.argv[1:] if argv is None else argv, None
    # A library's progress bars and its plans for later versions are not the user's business.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="Glyph .* missing")  # in a picture of what a model wrote
    try:
        config, run = parse_args(argv)
        (evaluate_only if run.eval_only else train)(config, run)
    except UserError as error:
        print(f"train_small.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stop:
        print(f"\nstopped and saved; this goes on:\n    {going_on(argv, run)}", file=sys.stderr)
        sys.exit(128 + stop.args[0])
    except KeyboardInterrupt:
        begun = run and not run.eval_only and run.out and (Path(run.out) / "config.json").exists()
        command = f"; this goes on from the last checkpoint:\n    {going_on(argv, run)}" if begun else ""
        print(f"\ninterrupted{command}", file=sys.stderr)
        sys.exit(130)


class Pipe:
    """stdout or stderr whose reader may die first: Ctrl-C reaches the tee of `2>&1 | tee log`, too, and the run is yet to save."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


if __name__ == "__main__":
    with redirect_stdout(Pipe(sys.stdout)), redirect_stderr(Pipe(sys.stderr)):
        main()
