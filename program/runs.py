"""The life of a run: a folder of its own, checkpoints that are whole or not there, how it stops and
goes on. The folder holds config.json (the settings), metrics.jsonl (a line for each step) and
checkpoint/, whose run.json holds what belongs to its weights: {settings, history}.
"""

import importlib
import json
import math
import os
import shutil
import signal
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch

from program import UserError

# What another run must not write over. The first is made at once, which only one process can.
RUN_FILES = ("config.json", "metrics.jsonl", "checkpoint", "checkpoint.new", "checkpoint.old")
# What a resumed run may change: length, intervals, tracker. (patch_size is the model's.)
FREE = ("steps", "eval_every", "save_every", "resume", "out", "patch_size", "report_to")


def settings_of(config, run):
    """All settings as strict JSON can hold them: an infinite one as a string."""
    both = {**asdict(config), **asdict(run)}
    return {k: str(v) if v in (math.inf, -math.inf) else v for k, v in both.items()}


@contextmanager
def claimed_folder(out, holds=RUN_FILES):
    """Take a folder that has none of the files `holds`, by creating the first of them. If what runs
    inside fails, that one goes again, and the folders made here that nothing else is in."""
    out = Path(out)
    try:
        made = [folder for folder in (out, *out.parents) if not folder.exists()]
        out.mkdir(parents=True, exist_ok=True)
        if taken := [name for name in holds if (out / name).exists()]:
            raise UserError(f"{out} holds {taken[0]}: name another by --out, or go on by --resume")
        (out / holds[0]).open("x").close()
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None
    try:
        yield out
    except BaseException:
        (out / holds[0]).unlink(missing_ok=True)
        with suppress(OSError):  # a file is in it, a tracker's or somebody else's
            for folder in made:
                folder.rmdir()
        raise


def write_whole(path, text):
    """Write a file so that, killed at any moment, it is either the old one or the new one."""
    draft = path.with_name(f"{path.name}.part")
    draft.write_text(text)
    os.replace(draft, path)


def as_lines(history):
    """Lines of strict JSON, as in metrics.jsonl and eval.jsonl."""
    return "".join(json.dumps(line, allow_nan=False) + "\n" for line in history)


def append_line(path, line):
    """Add a line of metrics to a file."""
    try:
        with open(path, "a") as file:
            file.write(as_lines([line]))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; the last checkpoint is whole") from error


def save_checkpoint(folder, parts, texts, state):
    """Write parts by save_pretrained, {name: text} and a trainer's state to `.new`, and swap it in.
    Killed before the first rename, `folder` is the last one; later, whole_checkpoint finds one."""
    fresh, old = folder.with_suffix(".new"), folder.with_suffix(".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        for part in parts:
            part.save_pretrained(fresh)
        for name, text in texts.items():
            (fresh / name).write_text(text, encoding="utf-8")
        torch.save(state, fresh / "trainer_state.pt")
        # On the disk before the last checkpoint goes, should the power fail.
        for path in filter(Path.is_file, fresh.rglob("*")):
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
    except Exception as error:  # each library has its own for a full disk
        reason = f"{type(error).__name__}: {error}; the last one is whole"
        raise UserError(f"checkpoint {fresh} cannot be written: {reason}") from error
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def whole_checkpoint(out):
    """The newest whole one, which a save killed between its two renames left as `.new`."""
    folder, fresh, old = (out / f"checkpoint{suffix}" for suffix in ("", ".new", ".old"))
    return folder if folder.exists() or not old.exists() else fresh if fresh.exists() else old


def read_record(out):
    """{settings, history} of the run in a folder, as its checkpoint has them; before the first one,
    settings are config.json's, {} where it was killed even before that."""
    out = Path(out)
    if not any((out / name).exists() for name in RUN_FILES):
        raise UserError(f"--resume: there is no run in {out}")
    path = whole_checkpoint(out) / "run.json"
    try:
        if path.parent.exists():
            return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--resume: {path} cannot be read: {error}") from None
    with suppress(OSError, ValueError):
        return {"settings": json.loads((out / "config.json").read_text()), "history": []}
    return {"settings": {}, "history": []}


def find_run(out, settings):
    """The history of the run in `out`, which may go on only as what it was, but for FREE. A whole
    checkpoint that a kill left under another name gets its own back."""
    record = read_record(out)
    was = {**settings, **record["settings"]}  # what was no setting yet may be anything
    differs = [name for name in settings if name not in FREE and was[name] != settings[name]]
    if differs:
        changed = ", ".join(f"{name} {was[name]} -> {settings[name]}" for name in differs)
        raise UserError(f"--resume: {out} was started with other settings: {changed}")
    try:
        if (whole := whole_checkpoint(out)).name != "checkpoint":
            whole.rename(out / "checkpoint")
        (out / "config.json").open("a").close()
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None
    return record["history"]


@contextmanager
def note_signals():
    """A list that the first SIGINT or SIGTERM is put into; a second one acts at once."""
    caught = []
    at_once = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}

    def note(number, frame):
        caught.append(number)
        for number, handler in at_once.items():
            signal.signal(number, handler)
        with suppress(OSError):
            os.write(2, b"\nstopping after this step and a save; once more stops at once\n")

    before = {number: signal.signal(number, note) for number in at_once}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def open_tracker(library, out, settings, first_step):
    """A function that hands one line of metrics to a tracker, imported only when needed."""
    try:
        if library == "none":
            return lambda line: None
        if library != "tensorboard":
            tracker = importlib.import_module(library)
            tracker.init(project="papo", name=Path(out).name, config=settings)
            return lambda line: tracker.log(line, step=line["step"])
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(f"--report-to {library}: pip install {library}") from None
    writer = SummaryWriter(out, purge_step=first_step)  # hides what was logged after the checkpoint

    def log(line):
        for name, value in line.items():
            writer.add_scalar(name, value, line["step"])
        writer.flush()

    return log
