"""walkthrough.ipynb runs without an error, was committed as it runs, copies nothing; its graders
know right from wrong."""

import inspect
import math
import re
from itertools import product
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

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "walkthrough.ipynb"
NOTEBOOK = nbformat.read(FILE, as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
text = lambda out: out.get("text") or out.get("data", {}).get("text/plain", "")
text_of = lambda cell: "".join(map(text, cell.outputs))  # pictures left out


def test_it_runs_from_top_to_bottom(monkeypatch, warm_start):
    """Offline, unsolved: the same cells draw, and every exercise says that it is not solved."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    fresh = nbformat.read(FILE, as_version=4)
    NotebookClient(fresh, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    cells = [cell for cell in fresh.cells if cell.cell_type == "code"]
    assert sum("not solved yet" in text_of(cell) for cell in cells) == len(EXERCISES)
    draws = lambda cells: [i for i, cell in enumerate(cells) if "image/png" in str(cell.outputs)]
    assert draws(cells) == draws(CODE) and len(draws(cells)) >= 15


def test_a_bare_folder_is_told_what_it_lacks(tmp_path, monkeypatch):
    """The first cell, alone in a folder; beside a clone it goes there."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="git clone .* upload"):
        exec(CODE[0].source, {})
    (tmp_path / "clone").symlink_to(ROOT)
    exec(CODE[0].source, {})
    assert Path.cwd() == ROOT


def test_outputs_are_committed():
    """Every cell has run, once and in order, without error, warning, or a path of the author's
    machine. A code cell follows prose, or one more of the same idea. The glossary is papo's."""
    kinds = "".join(cell.cell_type[0] for cell in NOTEBOOK.cells)
    assert kinds.startswith("mc") and "ccc" not in kinds
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    path = r"(?<![\w.])/(?:tmp|home|root|work|usr|Users)/"
    for cell in CODE:
        kinds = [out.get("name", out.output_type) for out in cell.outputs]
        assert "error" not in kinds and "stderr" not in kinds, cell.source
        assert not re.search(path, text_of(cell)), cell.source
    assert FILE.stat().st_size < 1.5e6
    glossary = papo.__doc__.split("GLOSSARY")[1].split("\n\n")[0].strip()
    assert any(glossary in text_of(cell) for cell in CODE)


def test_nothing_is_copied():
    """No cell defines a function of papo's or toy's, or has three lines of theirs in a row."""
    sources = [inspect.getsource(module).splitlines() for module in (papo, toy)]
    ours = [line.strip() for source in sources for line in source]
    runs = {tuple(ours[i : i + 3]) for i in range(len(ours)) if min(map(len, ours[i : i + 3])) > 8}
    taken = {line.split("(")[0][4:] for source in sources for line in source if line[:4] == "def "}
    for cell in CODE:
        assert not taken & set(re.findall(r"def (\w+)", cell.source))
        lines = [line.strip() for line in cell.source.splitlines()]
        assert not runs & {tuple(lines[i : i + 3]) for i in range(len(lines))}


ANSWERS = {  # a piece of the line that answers each question of the exam: the function it is in
    "equal = (rewards == rewards[..., :1])": "group_advantages",
    "KL[pi_other || pi], the other direction": "kl_k3",
    "torch.where(advantages < 0": "clipped_policy_loss",
    'if mode == "sequence"': "aggregate",
    "predictor = left.where": "group_row",
    "visible = (owner[:, None] == owner)": "group_row",
    "checkpoint(chunk_logps": "token_logps",
    "kl_target = masked_logps if": "papo_loss",
    "for update in split_batch(config, groups)[1:]": "score_constants",
    "(loss * count / total).backward()": "papo_step",
    "logits[:, never] = -math.inf": "sample_groups",
    "(advantages[:, None] > 0) & (logps > masked_logps)": "perception_gate",
}


def test_the_exam_points_to_its_answers():
    [exam] = [cell.source for cell in NOTEBOOK.cells if "questions for an exam" in cell.source]
    named = re.findall(r"^\| \d+ \|.*\| `(\w+)` \|$", exam, re.MULTILINE)
    assert named == list(ANSWERS.values())
    for piece, name in ANSWERS.items():
        assert inspect.getsource(getattr(papo, name)).count(piece) == 1, name


def whole_cells_only(image, ratio=0.6, patch_size=14, generator=None):
    masked, untouched = papo.mask_patches(image, ratio, patch_size, generator), image.convert("RGB")
    width, height = (side // patch_size * patch_size for side in image.size)
    untouched.paste(masked.crop((0, 0, width, height)))
    return untouched


def always_as_many(image, ratio=0.6, patch_size=14, generator=None):
    pixels, size = np.array(image.convert("RGB")), patch_size
    places = list(product(range(0, image.height, size), range(0, image.width, size)))
    for i in torch.randperm(len(places), generator=generator)[: round(ratio * len(places))]:
        pixels[places[i][0] :, places[i][1] :][:size, :size] = 0
    return Image.fromarray(pixels)


def noiser(channels=3, clamp=True, own=True):
    def noise(image, sigma=0.3, generator=None):
        pixels = torch.tensor(np.array(image.convert("RGB"))).float()
        drawn = torch.randn(*pixels.shape[:2], channels, generator=generator if own else None)
        values = (pixels + 255 * sigma * drawn).round()
        values = values.clamp(0, 255) if clamp else values.remainder(256)
        return Image.fromarray(values.byte().numpy())

    return noise


clipped, k3, advantages = papo.clipped_policy_loss, papo.kl_k3, papo.group_advantages
log_x = lambda a, b: (b - a).clamp(-20, 20)
centred = lambda R: R - R.mean(-1, keepdim=True)
std = lambda R, **how: R.std(-1, keepdim=True, **how)
kept = lambda entropy, chosen: entropy.masked_fill(~chosen, 0.0)
WRONG = {  # at least three for each: the slips that a student is likely to make
    "prediction": {
        "the many stand out": ("wrong", "shrinks"),
        "more right ones, more credit": ("right", "grows"),
        "one word only": "right",
    },
    "advantages": {
        "no standard deviation": lambda R, eps=1e-6: centred(R),
        "biased deviation": lambda R, eps=1e-6: centred(R) / (std(R, correction=0) + eps),
        "noise in an equal group": lambda R, eps=1e-6: centred(R) / (std(R) + eps),
    },
    "clip": {
        "the better of both": lambda p, o, A, *clips: -clipped(p, o, -A, *clips),
        "no dual clip": lambda *a: clipped(*a[:5], math.inf),
        "clips exchanged": lambda p, o, A, low, high, c: clipped(p, o, A, high, low, c),
    },
    "mask": {
        "keeps what should go": lambda i, ratio=0.6, *how: papo.mask_patches(i, 1 - ratio, *how),
        "leaves cells cut by the edge": whole_cells_only,
        "always as many": always_as_many,
    },
    "k3": {
        "upside down, as printed": lambda a, b: k3(b, a),
        "k2": lambda a, b: (log_x(a, b) ** 2 / 2).clamp(max=10),
        "no clamp of the value": lambda a, b: log_x(a, b).expm1() - log_x(a, b),
        "rounding near equality": lambda a, b: (log_x(a, b).exp() - log_x(a, b) - 1).clamp(max=10),
        "the other's gradient": lambda a, b: k3(a.detach(), b + (a - a.detach())),
    },
    "noise": {
        "bytes that run over": noiser(clamp=False),
        "one for all channels": noiser(channels=1),
        "not from the generator": noiser(own=False),
    },
    "exact KL": {
        "the other direction": lambda p, q: (q.exp().detach() * (q.detach() - p)).sum(-1),
        "constant weights": lambda p, q: (p.exp().detach() * (p - q.detach())).sum(-1),
        "gradient through pi_mask": lambda p, q: (p.exp() * (p - q)).sum(-1),
    },
    "vision entropy": {
        "either sign": lambda H, p, m, t=0.5: kept(H, (p - m).abs() > t),
        "the others": lambda H, p, m, t=0.5: kept(H, p - m <= t),
        "times the gap": lambda H, p, m, t=0.5: kept(H * (p - m), p - m > t),
    },
    "leave one out": {
        "the mean of all": centred,
        "divided by the deviation": advantages,
        "the sum of the others": lambda R: 2 * R - R.sum(-1, keepdim=True),
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
    space = {"torch": torch, "np": np, "Image": Image}
    for block in re.findall(r"```python\n(.*?)```", last, re.DOTALL):
        exec(block, space)
    asked = "".join(cell.source for cell in CODE)
    return {name: space[x] for name, x in re.findall(r'check\("([^"]+)", (\w+)\)', asked)}


def test_the_right_answers_pass(capsys):
    assert solutions().keys() == EXERCISES.keys() == WRONG.keys() and len(EXERCISES) >= 8
    for name, solution in solutions().items():
        assert check(name, solution) is True, capsys.readouterr().out
        assert capsys.readouterr().out.startswith(f"{name}: right.")


@pytest.mark.parametrize("name, mistake", [(name, slip) for name in WRONG for slip in WRONG[name]])
def test_wrong_answers_fail_in_words(name, mistake, capsys):
    """The verdict says what should hold, and what was given; never an assertion's text."""
    assert len(WRONG[name]) >= 3 and check(name, WRONG[name][mistake]) is False
    said = capsys.readouterr().out
    assert re.search(r"\d of \d checks? fail\.\n  - \w.{30}", said), said
    assert re.search(r"\b[Yy]ou(r| gave| blacked| drew)|was changed", said), said
    assert "Error" not in said and "assert" not in said and "isclose" not in said, said


def test_unsolved_and_broken_answers_are_told_apart(capsys):
    """Unsolved is no error; a crash is reported; a sign slip is shown with both numbers."""
    raises = lambda *i, **s: (_ for _ in ()).throw(NotImplementedError)
    for unsolved in (raises, lambda *i, **s: None, lambda *i, **s: ..., ...):
        for name in EXERCISES:
            assert check(name, unsolved) is None
            assert capsys.readouterr().out == f"{name}: not solved yet.\n"
    assert check("k3", lambda logps, other_logps: 1 / 0) is False
    assert "stops with ZeroDivisionError: division by zero" in capsys.readouterr().out
    assert check("clip", lambda *inputs: -clipped(*inputs)) is False
    assert "ratio 0.3, A 2, eps_l 0.2" in (said := capsys.readouterr().out)
    assert "you gave 0.6, expected -0.6" in said
