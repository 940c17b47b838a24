"""Rows of real data sets as both trainers read them: {images: [at least one], problem, answer}. One
that cannot be used is skipped and counted by its reason; none is cut to fit."""

import base64
import hashlib
import io
import os
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from urllib import parse, request

import datasets
import numpy
import pandas
import torch
from PIL import Image, ImageOps
from qwen_vl_utils.vision_process import to_rgb
from tqdm import tqdm

from papo import compute_reward, encode_prompt, fit_image, option
from program import UserError, ask_hub, cannot_load

FETCH_SECONDS = 10  # from asking a server for an image to its last byte
BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


@dataclass
class DataConfig:
    """Which data set, and how its rows are read."""

    _argument_group_name = "data"

    dataset: str = option(None, "hub name, folder, .parquet, .jsonl or .csv; without: toy.py's")
    split: str = option("train", "its last --eval-size questions, at most a quarter, are held out")
    eval_size: int = option(96, "held-out questions")
    max_samples: int = option(None, "use only the first so many rows")
    image_column: str = option("images", "column with an image or a list of them")
    problem_column: str = option("problem", "column with the question, which may say <image>")
    answer_column: str = option("answer", "column with the answer")
    min_pixels: int = option(200704, "smaller images are enlarged to this area (published)")
    max_pixels: int = option(1003520, "larger images are reduced to this area (published)")
    max_prompt_tokens: int = option(4096, "rows with a longer prompt are skipped (published)")

    def __post_init__(self):
        self.columns = self.image_column, self.problem_column, self.answer_column
        for field in fields(self):
            value, flag = getattr(self, field.name), f"--{field.name.replace('_', '-')}"
            if isinstance(value, str) and not value.strip():
                raise ValueError(f"{flag} is empty")
            if field.type is int and field.default != 0 and value is not None and value < 1:
                raise ValueError(f"{field.name} must be at least 1, got {value}")
            own = field.name in DataConfig.__dataclass_fields__ and field.name != "eval_size"
            if own and not self.dataset and value != field.default:
                raise ValueError(f"{flag} needs --dataset")
        if self.max_pixels < self.min_pixels:
            raise ValueError(f"max_pixels {self.max_pixels} is below min_pixels {self.min_pixels}")
        edges = dict(shortest_edge=self.min_pixels, longest_edge=self.max_pixels)
        self.edges = edges if self.dataset else None  # None: the processor's own


def open_dataset(run):
    """The columns that a DataConfig names of the data set that it names."""
    name, path = run.dataset, Path(run.dataset)
    builder = BUILDERS.get(Path(name.lower().removesuffix(".gz")).suffix)
    is_file, saved = path.is_file(), (path / "state.json").exists()
    if is_file and not builder:
        raise UserError(f"--dataset {name}: its ending is none of {', '.join(BUILDERS)}, or .gz")
    if (is_file or saved) and run.split != "train":
        raise UserError(f"--split {run.split}: {name} has no splits")
    if not path.exists() and (builder or path.is_absolute() or name.startswith(".")):
        raise UserError(f"--dataset {name}: no such file or folder")
    try:
        if saved:
            dataset = datasets.load_from_disk(name)
        elif is_file:
            how = {"keep_default_na": False} if builder == "csv" else {}  # None is a word as any
            dataset = datasets.load_dataset(builder, data_files=name, split="train", **how)
        else:
            ask_hub(name)
            dataset = datasets.load_dataset(name, split=run.split)
        answer = run.answer_column
        dates = getattr(dataset.features.get(answer), "dtype", "").startswith("timestamp")
        if dates and builder == "json":  # made of texts that look like dates
            written = pandas.read_json(name, lines=".jsonl" in name.lower(), dtype=False)[answer]
            dataset = dataset.remove_columns(answer).add_column(answer, written.tolist())
    except Exception as error:
        raise cannot_load("--dataset", name, error) from None
    if missing := [column for column in run.columns if column not in dataset.column_names]:
        has = ", ".join(dataset.column_names)
        raise UserError(f"--dataset {name} has no column {missing[0]}; it has {has}")
    first = range(min(len(dataset), run.max_samples or len(dataset)))
    return dataset.select_columns(list(run.columns)).select(first)


def fetch(url):
    """What lies at a URL (http, https, data, file). ValueError if it is not had within a time."""
    got, address = [], parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")

    def download():  # in a thread, for urlopen's time limit begins anew with every byte
        with suppress(Exception), request.urlopen(address, timeout=FETCH_SECONDS) as file:
            got.append(file.read(2**28))  # bytes at most: a camera's stream has no end

    thread = threading.Thread(target=download, daemon=True)
    thread.start()
    thread.join(FETCH_SECONDS)
    if not got:
        raise ValueError("image cannot be fetched")
    return got[0]


def open_image(image, folder):
    """A PIL image from what a data set may hold: one, its bytes (also as numbers or base64 text),
    its path or URL, or {bytes, path}."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str) and ("://" in image or image.startswith(("data:", "file:"))):
        image = fetch(image)
    elif isinstance(image, str) and os.path.isfile(folder / image):
        image = (folder / image).read_bytes()
    elif isinstance(image, str):
        image = base64.b64decode("".join(image.split()), validate=True)
    if not isinstance(image, Image.Image):
        image = Image.open(io.BytesIO(bytes(image)))
    image.load()  # which rotates a TIFF; the others are rotated by as_seen
    return image


def as_seen(image):
    """A PIL image as a person sees it, in RGB: upright, on white where it is transparent, and with
    its whole range of grey. ValueError where that range is anyone's guess."""
    known, image = image.mode != "I" or image.format == "PPM", ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # grey of 16 or 32 bits, which Pillow would clip to 8
        grey, top = numpy.asarray(image, dtype=float), 1 if image.mode == "F" else 65535
        if not known or not 0 <= grey.min() <= grey.max() <= top:
            raise ValueError("32-bit image of unknown range")
        grey = numpy.where(grey == image.info.get("transparency"), top, grey)
        return Image.fromarray((grey * (255 / top)).round().astype("uint8")).convert("RGB")
    return to_rgb(image.convert("RGBA" if image.has_transparency_data else "RGB"))


def answer_text(answer, feature):
    """The answer as it was written. ValueError with the reason if there is none."""
    if isinstance(feature, datasets.ClassLabel):
        answer = None if answer is None or answer < 0 else feature.int2str(answer)
    elif (dtype := getattr(feature, "dtype", None)) in ("float16", "float32"):
        answer = numpy.dtype(dtype).type(answer)  # 0.1, not 0.10000000149011612
    if answer is None or answer != answer or not str(answer).strip():  # NaN: a missing number
        raise ValueError("empty answer")
    if isinstance(answer, (bool, bytes)) or not numpy.isscalar(answer):
        raise ValueError("answer is no text or number")
    return str(answer).strip()


def read_row(dataset, index, run, processor):
    """One row in the trainers' columns: images (of the size the vision tower sees), problem,
    answer, prompt (the question encoded). Raises ValueError with the reason if it is unusable."""
    path = Path(run.dataset)
    folder = path if path.is_dir() else path.parent
    try:
        row = dataset[index]
        images, problem, answer = (row[column] for column in run.columns)
        images = [x for x in (images if isinstance(images, list) else [images]) if x is not None]
        images = [as_seen(open_image(image, folder)) for image in images]
    except Exception as error:  # a plain one has our reason; of Pillow's there are all kinds
        raise ValueError(error if type(error) is ValueError else "unreadable image") from None
    if not images:
        raise ValueError("no image")
    if not isinstance(problem, str) or not problem.strip():
        raise ValueError("problem is no text")
    answer = answer_text(answer, dataset.features[run.answer_column])
    if any(max(image.size) > 200 * min(image.size) for image in images):
        raise ValueError("image more than 200 times longer than wide")
    images = [fit_image(processor, image) for image in images]
    prompt = encode_prompt(processor, problem, images)
    if prompt["input_ids"].shape[1] > run.max_prompt_tokens:
        raise ValueError(f"prompt longer than {run.max_prompt_tokens} tokens")
    return {"images": images, "problem": problem, "answer": answer, "prompt": prompt}


class Rows:
    """Rows of a data set, read when asked for. One that cannot be used raises UserError; `skipped`
    keeps {place: reason}, and the first row of each reason is said at once."""

    def __init__(self, dataset, run, processor, indices):
        self.dataset, self.run, self.processor, self.indices = dataset, run, processor, indices
        self.skipped = {}

    def fingerprint(self):
        """Tells one data set from another, by all questions and answers: "64 rows, 1f3a..."."""
        texts = [self.dataset[column][:] for column in self.run.columns[1:]]
        return f"{len(self.dataset)} rows, {hashlib.sha256(repr(texts).encode()).hexdigest()[:12]}"

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        if i not in self.skipped:
            try:
                return read_row(self.dataset, self.indices[i], self.run, self.processor)
            except ValueError as error:
                if str(error) not in self.skipped.values():
                    tqdm.write(f"skipping row {self.indices[i]}: {error}")
                self.skipped[i] = str(error)  # for good: a dead server is waited for once
        raise UserError(f"row {self.indices[i]}: {self.skipped[i]}")


def say_skipped(reasons):
    """How many rows were skipped, by reason."""
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
            except UserError:
                if len(self.rows.skipped) == len(self.rows):
                    reasons = dict(Counter(self.rows.skipped.values()))
                    raise UserError(f"no row to train on is usable: {reasons}") from None


def load_rows(run, processor, training=True):
    """Rows to train on, each checked when it is drawn, and held-out ones, checked here: the last
    usable --eval-size, at most a quarter, or all if nothing is trained."""
    dataset = open_dataset(run)
    rows = Rows(dataset, run, processor, range(len(dataset)))
    wanted = max(1, min(run.eval_size, len(rows) // 4)) if training else len(rows)
    held_out, gradable, start = [], False, len(rows)
    with tqdm(total=wanted, desc="checking held-out rows", unit="row") as bar:
        while start > 0 and len(held_out) < wanted:
            start -= 1
            with suppress(UserError):
                answer = rows[start]["answer"]
                held_out.insert(0, start)
                gradable = gradable or compute_reward(rf"\boxed{{{answer}}}", answer)["accuracy"]
                bar.update()
    say_skipped(rows.skipped.values())
    if start == 0 and len(held_out) < 1 + training:
        found = f"{len(held_out)} usable rows; skipped {dict(Counter(rows.skipped.values()))}"
        raise UserError(f"--dataset {run.dataset}: at least {1 + training} are needed, {found}")
    if not gradable:
        tqdm.write(f"warning: no answer can be right, not even {answer!r} to {answer!r}")
    train = range(start)
    if start == 0 and training:  # so few are usable that all were seen
        end = len(held_out) - max(1, len(held_out) // 4)
        train, held_out = held_out[:end], held_out[end:]
    return Rows(dataset, run, processor, train), Rows(dataset, run, processor, held_out)
