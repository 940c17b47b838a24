"""The life of a run: the folder that is its own, checkpoints that are whole or not there, how it goes on
and how it stops.

A folder holds config.json (the settings), metrics.jsonl (a line for each step) and checkpoint/, in which
run.json holds the settings and metrics that belong to its weights: {settings, history}.
"""

import importlib
import json
import os
import shutil
import signal
from contextlib import contextmanager, suppress
from pathlib import Path

from program import UserError

# What another run must not write over. The first is made at once, which only one process can.
RUN_FILES = ("config.json", "metrics.jsonl", "checkpoint", "checkpoint.new", "checkpoint.old")
# Settings that a resumed run may change: its length, how often it looks and saves, where it reports.
FREE = ("steps", "eval_every", "save_every", "resume", "out", "patch_size", "report_to")


class Stopped(Exception):
    """SIGINT or SIGTERM, whose number it carries, ended the run after a step; everything is saved."""


# --- the folder ---


@contextmanager
def claimed_folder(out, holds=RUN_FILES):
    """Take a folder that has none of the files `holds`, by creating the first of them. If what runs
    inside fails, all that was made is removed."""
    out = Path(out)
    try:
        made = [folder for folder in (out, *out.parents) if not folder.exists()]
        if os.path.lexists(out) and not out.is_dir():
            raise UserError(f"--out {out} is a file")
        out.mkdir(parents=True, exist_ok=True)
        if found := [name for name in holds if (out / name).exists()]:
            raise FileExistsError(found[0])
        (out / holds[0]).open("x").close()
    except FileExistsError:
        hint = "name another folder by --out" + ", or go on by --resume" * (holds == RUN_FILES)
        raise UserError(f"{out} holds {holds[0]} of another run: {hint}") from None
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None
    try:
        yield out
    except BaseException:
        (out / holds[0]).unlink(missing_ok=True)
        with suppress(OSError):  # somebody else's file is in it
            for folder in made:
                folder.rmdir()
        raise


def write_whole(path, text):
    """Write a file so that, killed at any moment, it is either the old one or the new one."""
    draft = path.with_name(f"{path.name}.part")
    draft.write_text(text)
    os.replace(draft, path)


def as_lines(history):
    """metrics.jsonl: one line of strict JSON for each step."""
    return "".join(json.dumps(line, allow_nan=False) + "\n" for line in history)


def append_line(path, line):
    try:
        with open(path, "a") as file:
            file.write(as_lines([line]))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; the last checkpoint is whole") from error


# --- the checkpoint ---


def save_checkpoint(folder, write):
    """write(fresh) fills a folder beside, `.new`, which is then swapped in. Killed before the first rename,
    `folder` is the last checkpoint, untouched; between the two, whole_checkpoint finds the new one."""
    fresh, old = folder.with_suffix(".new"), folder.with_suffix(".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        fresh.mkdir()
        write(fresh)
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
    """The newest whole checkpoint: a save killed between its two renames has left it as `.new`, the one
    before it as `.old`."""
    folder, fresh, old = (out / f"checkpoint{suffix}" for suffix in ("", ".new", ".old"))
    return folder if folder.exists() or not old.exists() else fresh if fresh.exists() else old


# --- going on ---


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
    """The history of the run in `out`, which may go on only as what it was, but for FREE."""
    record = read_record(out)
    was = {name: value for name, value in record["settings"].items() if name in settings}
    differs = [name for name in was if name not in FREE and was[name] != settings[name]]
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


# --- signals and trackers ---


@contextmanager
def note_signals():
    """A list that the first SIGINT or SIGTERM is put into; a second one acts at once."""
    caught, at_once = (
        [],
        {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL},
    )

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
    """A function that hands one line of metrics to a tracker, imported only when it is asked for."""
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
