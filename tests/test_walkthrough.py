"""walkthrough.ipynb runs without an error, was committed as it runs, copies nothing; its graders know right from wrong."""

import inspect
import re
from pathlib import Path

import conftest  # noqa: F401  sets the path to papo.py
import nbformat
import numpy as np
import pytest
import torch
from exercises import EXERCISES, check
from nbclient import NotebookClient
from PIL import Image

import papo
import toy

ROOT = Path(__file__).parent.parent
FILE = ROOT / "walkthrough.ipynb"
NOTEBOOK = nbformat.read(FILE, as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]


def texts(cell):
    """All that a cell has put out as text, pictures left out."""
    return [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]


def test_it_runs_from_top_to_bottom(monkeypatch, warm_start):
    """As a student runs it, offline, in the repository's root, with the unsolved exercises in it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    fresh = nbformat.read(FILE, as_version=4)
    NotebookClient(
        fresh, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    unsolved = [
        text
        for cell in fresh.cells
        if cell.cell_type == "code"
        for text in texts(cell)
        if "not solved yet" in text
    ]
    assert len(unsolved) == len(EXERCISES)
    pictures = lambda notebook: [
        i for i, cell in enumerate(notebook.cells) if "image/png" in str(cell.get("outputs"))
    ]
    assert pictures(fresh) == pictures(NOTEBOOK) and len(pictures(fresh)) >= 14


def test_outputs_are_committed():
    """Every cell has run, once and in order, without error or warning; no path of the author's machine; small enough to clone."""
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    for cell in CODE:
        assert all(
            output.output_type != "error" and output.get("name") != "stderr" for output in cell.outputs
        ), cell.source
        assert not re.search(r"(?<![\w.])/(?:tmp|home|root|work|usr|Users)/", "".join(texts(cell))), (
            cell.source
        )
    assert FILE.stat().st_size < 1.5e6


def test_prose_stands_before_code():
    """A code cell follows prose, or one more code cell of the same idea, never a third."""
    kinds = "".join(cell.cell_type[0] for cell in NOTEBOOK.cells)
    assert kinds.startswith("mc") and "ccc" not in kinds


def test_the_glossary_shown_is_papos():
    assert any(
        papo.__doc__.split("GLOSSARY")[1].split("\n\n")[0].strip() in text
        for cell in CODE
        for text in texts(cell)
    )


def test_nothing_is_copied():
    """It imports papo and toy: no cell defines a function of theirs again, nor repeats three lines of their code in a row."""
    ours = [line.strip() for module in (papo, toy) for line in inspect.getsource(module).splitlines()]
    runs = {tuple(ours[i : i + 3]) for i in range(len(ours)) if min(map(len, ours[i : i + 3])) > 8}
    taken = {
        name
        for module in (papo, toy)
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__
    }
    for cell in CODE:
        assert not taken & set(re.findall(r"def (\w+)", cell.source))
        lines = [line.strip() for line in cell.source.splitlines()]
        assert not runs & {tuple(lines[i : i + 3]) for i in range(len(lines))}


# --- the graders -------------------------------------------------------------------------------------------------------


def of_grid(image, ratio, patch_size, generator):
    return (
        torch.rand(-(-image.height // patch_size), -(-image.width // patch_size), generator=generator) < ratio
    )


def black_out(image, cells, patch_size):
    pixels = np.array(image.convert("RGB"))
    for y, x in cells.nonzero().tolist():
        pixels[y * patch_size : (y + 1) * patch_size, x * patch_size : (x + 1) * patch_size] = 0
    return Image.fromarray(pixels)


def whole_cells_only(image, ratio=0.6, patch_size=14, generator=None):
    cells = of_grid(image, ratio, patch_size, generator)
    cells[image.height // patch_size :], cells[:, image.width // patch_size :] = False, False
    return black_out(image, cells, patch_size)


def fixed_number(image, ratio=0.6, patch_size=14, generator=None):
    draws = torch.rand(of_grid(image, 1, patch_size, None).shape, generator=generator)
    return black_out(image, draws < draws.flatten().quantile(ratio), patch_size)


def noisy(image, sigma, generator, shape=None, clamp=True):
    pixels = torch.tensor(np.array(image.convert("RGB"))).float()
    noise = torch.randn(shape(pixels) if shape else pixels.shape, generator=generator)
    values = (pixels + 255 * sigma * noise).round()
    return Image.fromarray((values.clamp(0, 255) if clamp else values.remainder(256)).byte().numpy())


def advantages(rewards):
    rewards = torch.as_tensor(rewards, dtype=torch.float32)
    return rewards, rewards - rewards.mean(-1, keepdim=True)


def clipped(logps, old_logps, A, low, high, dual, worst=torch.maximum, dual_for=lambda A: A < 0):
    ratio, A = (logps - old_logps).clamp(-20, 20).exp(), A[:, None]
    loss = worst(-ratio * A, -ratio.clamp(1 - low, 1 + high) * A)
    return torch.where(dual_for(A), loss.minimum(dual * A.abs()), loss)


def log_ratio(a, b):
    return (b - a).clamp(-20, 20)


WRONG = {  # at least three for each: the slips that a student is likely to make
    "prediction": {
        "the many stand out": ("wrong", "shrinks"),
        "more right ones, more credit": ("right", "grows"),
        "one word only": "right",
    },
    "advantages": {
        "no standard deviation": lambda R, eps=1e-6: advantages(R)[1],
        "biased standard deviation": lambda R, eps=1e-6: (
            advantages(R)[1] / (advantages(R)[0].std(-1, correction=0, keepdim=True) + eps)
        ),
        "rounding noise in an equal group": lambda R, eps=1e-6: (
            advantages(R)[1] / (advantages(R)[0].std(-1, keepdim=True) + eps)
        ),
    },
    "clip": {
        "the better of both instead of the worse": lambda *a: clipped(*a, worst=torch.minimum),
        "no dual clip": lambda *a: clipped(*a[:5], float("inf")),
        "clip-low and clip-high exchanged": lambda l, o, A, low, high, c: clipped(l, o, A, high, low, c),
    },
    "mask": {
        "keeps the share that should go": lambda i, ratio=0.6, patch_size=14, generator=None: black_out(
            i, of_grid(i, 1 - ratio, patch_size, generator), patch_size
        ),
        "leaves cells cut by the edge": whole_cells_only,
        "always the same number of cells": fixed_number,
    },
    "k3": {
        "the ratio upside down, as printed": lambda a, b: (log_ratio(b, a).expm1() - log_ratio(b, a)).clamp(
            max=10
        ),
        "k2": lambda a, b: (log_ratio(a, b) ** 2 / 2).clamp(max=10),
        "no clamp of the value": lambda a, b: log_ratio(a, b).expm1() - log_ratio(a, b),
        "rounding near equality": lambda a, b: (log_ratio(a, b).exp() - log_ratio(a, b) - 1).clamp(max=10),
        "the other policy's gradient": lambda a, b: (
            log_ratio(a.detach(), b + (a - a.detach())).expm1() - log_ratio(a.detach(), b + (a - a.detach()))
        ).clamp(max=10),
    },
    "noise": {
        "bytes that run over": lambda i, sigma=0.3, generator=None: noisy(i, sigma, generator, clamp=False),
        "one noise for all channels": lambda i, sigma=0.3, generator=None: noisy(
            i, sigma, generator, shape=lambda x: (*x.shape[:2], 1)
        ),
        "not from the generator": lambda i, sigma=0.3, generator=None: noisy(i, sigma, None),
    },
    "exact KL": {
        "the other direction": lambda p, q: (q.exp().detach() * (q.detach() - p)).sum(-1),
        "the weights held constant": lambda p, q: (p.exp().detach() * (p - q.detach())).sum(-1),
        "gradient through the masked policy": lambda p, q: (p.exp() * (p - q)).sum(-1),
    },
    "vision entropy": {
        "the size of the gap, whatever its sign": lambda H, p, m, threshold=0.5: H.masked_fill(
            ~((p - m).detach().abs() > threshold), 0.0
        ),
        "the others instead": lambda H, p, m, threshold=0.5: H.masked_fill((p - m).detach() > threshold, 0.0),
        "multiplied by the gap, which is then differentiated": lambda H, p, m, threshold=0.5: (
            H * (p - m)
        ).masked_fill(~((p - m) > threshold), 0.0),
    },
    "leave one out": {
        "the mean of all": lambda R: advantages(R)[1],
        "divided by the standard deviation": lambda R: papo.group_advantages(R),
        "the sum of the others": lambda R: 2 * torch.as_tensor(R) - torch.as_tensor(R).sum(-1, keepdim=True),
    },
    "KL weights": {
        "negative weights": lambda p, m, H: p - m,
        "one weight per response": lambda p, m, H: torch.ones(len(p)),
        "divided by a gap of 0": lambda p, m, H: H / (p - m).abs(),
        "switched off": lambda p, m, H: torch.zeros_like(p),
    },
}


def solutions():
    """The code blocks of the notebook's folded last section: exercise name -> function."""
    last = NOTEBOOK.cells[-1].source
    assert "<details>" in last and "</details>" in last
    graded = {
        name: function
        for cell in CODE
        for name, function in re.findall(r'check\("([^"]+)", (\w+)\)', cell.source)
    }
    space = {"torch": torch, "np": np, "Image": Image}
    for block in re.findall(r"```python\n(.*?)```", last, re.DOTALL):
        exec(block, space)
    return {name: space[function] for name, function in graded.items()}


def test_every_exercise_is_in_the_notebook():
    assert solutions().keys() == EXERCISES.keys() == WRONG.keys() and len(EXERCISES) >= 8


@pytest.mark.parametrize("name", EXERCISES)
def test_the_right_answer_passes(name, capsys):
    assert check(name, solutions()[name]) is True, capsys.readouterr().out
    assert capsys.readouterr().out.startswith(f"{name}: right.")


@pytest.mark.parametrize("name, mistake", [(name, mistake) for name in WRONG for mistake in WRONG[name]])
def test_wrong_answers_fail_in_words(name, mistake, capsys):
    """The verdict names what should hold, what was given and what was expected; never an assertion's text."""
    assert len(WRONG[name]) >= 3
    assert check(name, WRONG[name][mistake]) is False
    said = capsys.readouterr().out
    assert re.search(r"\d of \d checks? fail\.\n  - \w.{30}", said), said
    assert re.search(r"\b[Yy]ou(r| gave| blacked| drew)|was changed", said), said
    assert "Error" not in said and "assert" not in said and "isclose" not in said, said


def raises(*inputs, **settings):
    raise NotImplementedError


@pytest.mark.parametrize(
    "unsolved", [raises, lambda *inputs, **settings: None, lambda *inputs, **settings: ..., ...]
)
@pytest.mark.parametrize("name", EXERCISES)
def test_an_unsolved_exercise_is_no_error(name, unsolved, capsys):
    assert check(name, unsolved) is None
    assert capsys.readouterr().out == f"{name}: not solved yet.\n"


def test_a_crash_of_the_students_function_is_reported(capsys):
    assert check("k3", lambda logps, other_logps: 1 / 0) is False
    assert "your function stops with ZeroDivisionError: division by zero" in capsys.readouterr().out


def test_a_verdict_has_both_numbers(capsys):
    """A sign slip in the clipped loss: the student sees the inputs, their number and the right one."""
    assert check("clip", lambda *inputs: -papo.clipped_policy_loss(*inputs)) is False
    assert "ratio 0.3, A 2, eps_l 0.2, eps_h 0.3, c 3: you gave 0.6, expected -0.6" in (
        capsys.readouterr().out
    )


ANSWERS = [  # a piece of each line that the exam points to
    "masked_fill((rewards == rewards[..., :1])",
    "KL[pi_other || pi], the other direction",
    "torch.where(advantages < 0",
    'if mode == "sequence"',
    "predictor = left.where",
    "visible = (owner[:, None] == owner)",
    "checkpoint(chunk_logps",
    "kl_target = masked_logps if",
    "for update in split_batch(config, groups)[1:]",
    "(loss * count / total).backward()",
    "logits[:, never] = -math.inf",
    "(advantages[:, None] > 0) & (logps > masked_logps)",
]


def test_the_exam_points_to_its_answers():
    """Each of the twelve names the line of papo.py that answers it, and the function around that line."""
    [exam] = [cell.source for cell in NOTEBOOK.cells if "Twelve questions for an exam" in cell.source]
    places = re.findall(r"papo\.py:(\d+) `(\w+)`", exam)
    assert len(places) == 12
    for (line, name), piece in zip(places, ANSWERS):
        lines, start = inspect.getsourcelines(getattr(papo, name))
        found = [start + i for i, text in enumerate(lines) if piece in text]
        assert found == [int(line)], f"{name}: the exam says line {line}, the answer stands in {found}"
