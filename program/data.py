"""Rows of real data sets as both trainers read them: {images: [one image], problem, answer}.

A row that cannot be used is skipped and counted by its reason; none is cut to fit.
"""

import io
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

import datasets
import huggingface_hub
import torch
from PIL import Image
from tqdm import tqdm
from transformers.image_utils import load_image

from papo import encode_prompt, fit_image, option
from program import UserError

# What Pillow raises for a damaged or huge file; RuntimeError where a codec is a library's (AVIF).
UNREADABLE = (OSError, SyntaxError, EOFError, RuntimeError, Image.DecompressionBombError)


@dataclass
class DataConfig:
    """Which data set, and how its rows are read."""

    _argument_group_name = "data"

    dataset: str = option(None, "hub name, folder, .parquet or .jsonl; without: embedded world")
    split: str = option("train", "its last --eval-size questions, at most a quarter, are held out")
    eval_size: int = option(96, "held-out questions")
    max_samples: int = option(None, "use only the first so many rows")
    image_column: str = option("images", "column with the image, or a list of one")
    problem_column: str = option("problem", "column with the question, which may say <image>")
    answer_column: str = option("answer", "column with the answer")
    min_pixels: int = option(200704, "smaller images are enlarged to this area (published)")
    max_pixels: int = option(1003520, "larger images are reduced to this area (published)")
    max_prompt_tokens: int = option(4096, "rows with a longer prompt are skipped (published)")

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, str) and not value.strip():
                raise ValueError(f"--{name.replace('_', '-')} is empty")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and field.default != 0 and value is not None and value < 1:
                raise ValueError(f"{field.name} must be at least 1, got {value}")
        for field in fields(DataConfig) if not self.dataset else ():
            if field.name != "eval_size" and getattr(self, field.name) != field.default:
                raise ValueError(f"--{field.name.replace('_', '-')} needs --dataset")
        if self.max_pixels < self.min_pixels:
            raise ValueError(f"max_pixels {self.max_pixels} is below min_pixels {self.min_pixels}")

    @property
    def columns(self):
        return self.image_column, self.problem_column, self.answer_column


def ask_hub(name):
    """Without a network look a name up in the cache only, instead of asking six times per file."""
    if Path(name).exists() or huggingface_hub.is_offline_mode():
        return
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
        print(f"{name}: from the hub, unless it is in its cache")
    except Exception:  # no name server, no route, no answer: each has an error of its own
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def cannot_load(flag, name, error):
    """The UserError for a library's own error, of which there are many: its message says which."""
    hint = " (is there a network? The embedded world runs offline)" * (not Path(name).exists())
    return UserError(f"{flag} {name}: cannot be loaded{hint}: {type(error).__name__}: {error}")


def open_dataset(run):
    """The data set of a DataConfig, with all columns that it names."""
    name, path = run.dataset, Path(run.dataset)
    builder = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}.get(path.suffix)
    is_file, saved = builder and path.is_file(), (path / "state.json").exists()
    if (is_file or saved) and run.split != "train":
        raise UserError(f"--split {run.split}: {name} has no splits")
    if not path.exists() and (builder or path.is_absolute() or name.startswith(".")):
        raise UserError(f"--dataset {name}: no such file or folder")
    try:
        if saved:
            dataset = datasets.load_from_disk(name)
        elif is_file:
            dataset = datasets.load_dataset(builder, data_files=name, split="train")
        else:
            ask_hub(name)
            dataset = datasets.load_dataset(name, split=run.split)
    except Exception as error:
        raise cannot_load("--dataset", name, error) from None
    if missing := [column for column in run.columns if column not in dataset.column_names]:
        has = ", ".join(dataset.column_names)
        raise UserError(f"--dataset {name} has no column {missing[0]}; it has {has}")
    return dataset.select(range(min(len(dataset), run.max_samples or len(dataset))))


def open_image(image, folder):
    """A PIL image from what a data set may hold: one, its bytes, or where it lies."""
    if isinstance(image, dict):  # undecoded: {bytes, path}
        image = Image.open(io.BytesIO(image["bytes"])) if image.get("bytes") else image.get("path")
    if isinstance(image, str) and ("://" in image or image.startswith("data:")):
        with suppress(ValueError):  # what holds no image stays a string
            image = load_image(image)
    elif isinstance(image, str):
        image = Image.open(folder / image)
    if not isinstance(image, Image.Image):
        raise OSError("no image")
    image.load()
    return image


def read_row(dataset, index, run, processor):
    """One row in the trainers' columns: images (one, of the size the vision tower sees), problem,
    answer, prompt (the question encoded). Raises ValueError with the reason if it is unusable."""
    path = Path(run.dataset)
    try:
        row = dataset[index]
        images, problem, answer = (row[column] for column in run.columns)
        images = [x for x in (images if isinstance(images, list) else [images]) if x is not None]
        if len(images) != 1:
            raise ValueError("more than one image" if images else "no image")
        image = open_image(images[0], path if path.is_dir() else path.parent)
        if not isinstance(problem, str) or not problem.strip():
            raise ValueError("problem is no text")
        if answer is None or answer != answer or not str(answer).strip():  # NaN: a missing number
            raise ValueError("empty answer")
        if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
            raise ValueError("answer is no text or number")
        image = fit_image(processor, image)
        prompt = encode_prompt(processor, problem, image)
    except UNREADABLE:
        raise ValueError("unreadable image") from None
    if prompt["input_ids"].shape[1] > run.max_prompt_tokens:
        raise ValueError(f"prompt longer than {run.max_prompt_tokens} tokens")
    return {"images": [image], "problem": problem, "answer": str(answer).strip(), "prompt": prompt}


class Unusable(UserError):
    """A row that read_row refuses."""


class Rows:
    """Rows of a data set, read when asked for. One that cannot be used raises Unusable; `skipped`
    keeps {place: reason}, and the first row of each reason is said at once."""

    def __init__(self, dataset, run, processor, indices):
        self.dataset, self.run, self.processor, self.indices = dataset, run, processor, indices
        self.skipped = {}

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        try:
            return read_row(self.dataset, self.indices[i], self.run, self.processor)
        except ValueError as error:
            reason = str(error)
        if reason not in self.skipped.values():
            tqdm.write(f"skipping row {self.indices[i]}: {reason}")
        self.skipped[i] = reason
        raise Unusable(f"row {self.indices[i]}: {reason}")


def say_skipped(reasons):
    for reason, count in Counter(reasons).most_common():
        tqdm.write(f"skipped {count} rows: {reason}")


class RowStream:
    """next() gives usable rows, newly shuffled each epoch. Its state is `count`, the rows tried.
    UserError once every row is known to be unusable."""

    def __init__(self, rows, seed):
        self.rows, self.seed, self.count, self.order = rows, seed, 0, None

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
                    raise UserError(f"no row to train on is usable: {reasons}") from None


def load_rows(run, processor, training=True):
    """Rows to train on, each checked when it is drawn, and held-out ones, checked here: the last
    usable --eval-size, at most a quarter, or all if nothing is trained."""
    dataset = open_dataset(run)
    rows = Rows(dataset, run, processor, range(len(dataset)))
    wanted = max(1, min(run.eval_size, len(rows) // 4)) if training else len(rows)
    held_out, start = [], len(rows)
    with tqdm(total=wanted, desc="checking held-out rows", unit="row") as bar:
        while start > 0 and len(held_out) < wanted:
            start -= 1
            with suppress(Unusable):
                rows[start]
                held_out.insert(0, start)
                bar.update()
    say_skipped(rows.skipped.values())
    if start == 0 and len(held_out) < 1 + training:
        found = f"{len(held_out)} usable rows; skipped {dict(Counter(rows.skipped.values()))}"
        raise UserError(f"--dataset {run.dataset}: at least {1 + training} are needed, {found}")
    train = range(start)
    if start == 0 and training:  # so few are usable that all were seen
        end = len(held_out) - max(1, len(held_out) // 4)
        train, held_out = held_out[:end], held_out[end:]
    return Rows(dataset, run, processor, train), Rows(dataset, run, processor, held_out)
