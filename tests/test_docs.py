"""The pages are about this code: what they quote is there, what they show runs, links lead
somewhere, and the first page keeps to its size."""

import csv
import re
from pathlib import Path
from types import SimpleNamespace

import conftest  # noqa: F401  sets the path to papo.py
import pytest
import torch

import papo

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "study" / "README.md"]
README = (ROOT / "README.md").read_text()


def run_block(page, **names):
    """Execute a page's one block of Python. Returns the names it has then."""
    [block] = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    space = vars(papo) | names
    exec(block, space)
    return space


def test_the_readme_quotes_papo_py():
    """Every line that it tells to change stands once in the function it names; its commands are
    whole; it has 90 lines of 100 columns and 900 words at most."""
    code = (ROOT / "papo.py").read_text()
    table = README.split("| to change |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(table) >= 5
    for row in table:
        name, line = re.findall(r"`([^`]+)`", row)
        function = code.split(f"\ndef {name}(")[1].split("\ndef ")[0]
        assert function.count(line) == 1, row
    for command in ("python train_small.py --gamma 0.02", "python -m pytest"):
        assert f"    pip install -r requirements.txt && {command}\n" in README
    lines = README.splitlines()
    assert len(lines) <= 90 and max(map(len, lines)) <= 100 and len(README.split()) <= 900


def test_the_readmes_objective_and_reward():
    trainer = SimpleNamespace()
    run_block("README.md", trainer=trainer)
    right = r"<think> 1 + 2 </think> \boxed{3}"
    assert trainer.reward(right, "3", 0.1) == dict(reward=1.0, accuracy=1.0, format=1.0)
    assert trainer.reward(right + "." * 500, "3", 0.1)["reward"] == 0
    logps = torch.zeros(2, 3, requires_grad=True)
    sizes = dict(logps=logps, old_logps=logps.detach(), response_mask=torch.ones(2, 3))
    pay = dict(advantages=torch.tensor([1.0, -1.0]), rewards=torch.tensor([0.9, 0.1]))
    loss, _ = trainer.objective(papo.PAPOConfig(gamma=0.0, beta=0.0), **sizes, **pay)
    loss.backward()
    assert (logps.grad[0] < 0).all() and not logps.grad[1].any()


@pytest.mark.parametrize(
    "said, reward",
    [
        (r"\boxed{[10, 20, 30, 40]}", 1.0),
        (r"\boxed{20, 20, 40, 40}", 1 / 3),  # half of each box
        (r"\boxed{(50, 50, 60, 60)}", 0.0),
        (r"\boxed{30, 40, 10, 20}", 0.0),  # inside out
        ("upper left", 0.0),
        (r"\boxed{10, 20, 30}", 0.0),
    ],
)
def test_the_reward_for_a_box(said, reward):
    scores = run_block("CONTRIBUTING.md", re=re)["overlap"](said, "10, 20, 30, 40", 0.1)
    assert scores == dict(reward=pytest.approx(reward), accuracy=float(reward > 0.5))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_points_to_is_there(page):
    """Files that it links, and tests that it names."""
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert link.startswith("http") or (page.parent / link).exists(), link
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    for name in set(re.findall(r"\b(test_\w+)`", text)):
        assert f"def {name}(" in tests, name
    for name in set(re.findall(r"\btest_\w+\.py", text)):
        assert (ROOT / "tests" / name).exists(), name


def test_every_interval_is_the_studys():
    """x ± y on the first page and in the study stands in methods.md, or in a line of arms.csv, there
    with one more digit."""
    shown = re.compile(r"([+-]?\d+\.\d) ± (\d+\.\d)")
    pairs = [("mean", "half_interval"), ("relative", "relative_half_interval")]
    pairs += [("minus_baseline", "minus_half_interval")]
    with open(ROOT / "study" / "arms.csv") as file:
        given = [[row[name] for name in pair] for row in csv.DictReader(file) for pair in pairs]
    given += shown.findall((ROOT / "study" / "methods.md").read_text())
    known = [[float(x) for x in pair] for pair in given if pair[1] not in ("", "nan")]
    known = torch.tensor(known)  # (intervals, 2)
    for page in (README, (ROOT / "study" / "README.md").read_text()):
        for said in shown.findall(page):
            apart = (known - torch.tensor([float(x) for x in said])).abs().amax(1).min()
            assert apart < 0.0501, said
