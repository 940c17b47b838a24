"""program/report.py: what a run leaves behind, as a reader finds it."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import picture

import papo
import toy
import train_small as ts
from program import report


def look(problem="<image>How many?", answer="3", tokens=(("three", 1.0),), **more):
    """One question as look_closely gives it."""
    response = dict(tokens=list(tokens), misread=(), error=None, score={"reward": 0.0}, advantage=0)
    look = {"images": [picture(1)], "masked": [picture(2)], "responses": [response | more]}
    return look | {"row": {"problem": problem, "answer": answer}}


def page(tmp_path, *looks, plan=()):
    (tmp_path / "a run").mkdir(exist_ok=True)
    report.write_samples(tmp_path / "a run" / "s.html", dict(plan), looks, looks)
    return (tmp_path / "a run" / "s.html").read_text()


def test_text_from_a_model_is_escaped(tmp_path):
    bad = look("<script>alert(1)</script>", "<b>", [("<img src=x onerror=alert(1)>", 1.0)])
    text = page(tmp_path, bad, plan={"model": "<script>"})
    assert "<script>" not in text and "<img src=x" not in text and "http" not in text
    assert text.count("&lt;script&gt;") == 2


def test_samples_say_what_ran_and_what_each_token_owes(tmp_path):
    """The run's name and settings, a number that needs no hovering under every shaded token, no
    <image>."""
    tokens = [("I see ", 0.04), ("0", 0.14), ("7", 1.26), ("\n", 0.5), ("x\n", -2.0)]
    text = page(tmp_path, look(tokens=tokens), plan={"algorithm": "papo-g, gamma 0.02"})
    assert "<h1>a run" in text and "<th>algorithm<td>papo-g, gamma 0.02" in text
    assert "image>" not in text and "image&gt;" not in text
    body = text.split("<section>")[1]
    numbers, scale = re.compile(r"<small>(.*?)</small>"), text.split("<section>")[0]
    assert numbers.findall(body) == ["+0.1", "+1.3", "-2.0"] * 2  # before and after
    assert numbers.findall(scale) == [f"{n:+d}.0" for n in range(-4, 5) if n]
    shades = [float(a) for a in re.findall(r"/ ([\d.]+)\)", scale.split("<p>")[-1])]
    assert shades == [0.8, 0.6, 0.4, 0.2, 0.0, 0.2, 0.4, 0.6, 0.8]


@pytest.mark.parametrize(
    "text, wrong",
    [
        ("<think> I see 3 0 9 4. 3 + 0", []),
        ("<think> I see 3 1 9 5. 3 + 1", ["1", "5"]),
        ("<think> I see 3 0 9 4 8 8. 3", ["8", "8"]),
        ("<think> I see 0 9. 0 + 9", ["0", "9"]),
        ("I see 3 assistant I see 3 0 8 4. ", ["8"]),
        ("I see nothing", []),
    ],
)
def test_digits_that_the_picture_does_not_show_are_marked(text, wrong, tmp_path):
    """In any cut into tokens that keeps digits apart, as the tokenizer's does."""
    processor = toy.toy_processor()
    words = [processor.tokenizer.decode([i]) for i in processor.tokenizer(text)["input_ids"]]
    places = report.misread(words, [3, 0, 9, 4])
    assert [words[i] for i in sorted(places)] == wrong
    assert (not places and "see 3 0" in text) == toy.perceived(text, {"digits": [3, 0, 9, 4]})
    html = page(tmp_path, look(tokens=[(word, 0.0) for word in words], misread=places))
    assert re.findall(r'misread"[^>]*>(\d)<', html.split("<section>")[1]) == wrong * 2


def card(model=None, dataset=None, **changes):
    config = papo.PAPOConfig(**changes)
    run = ts.RunConfig(model=model, dataset=dataset, out="/some/where/run")
    before = {"accuracy": 0.12345, "pass@8": 0.5, "accuracy_masked": 0.1, "error_perception": 0.25}
    steps = zip((0, 40), (before, before | {"accuracy": 0.9}))
    history = [{"step": n, **{f"eval_{k}": x for k, x in seen.items()}} for n, seen in steps]
    return report.model_card(config, run, [*history, {"step": 43}])


def test_the_card_is_in_words():
    text = card()
    rows = ["accuracy (avg@8) | 12.3 | 90.0", "right at least once (pass@8) | 50.0"]
    rows += ["perception errors | 25.0 | 25.0", *papo.PAPOConfig.__dataclass_fields__]
    assert all(f"| {row} |" in text for row in rows)
    for said in "accuracy_before_percent: 12.3\n", "steps: 43\n", "MIT", "## Limits":
        assert said in text
    assert f"torch {torch.__version__}" in text
    assert not any(said in text for said in ("error_perception", "/some/where", "$"))
    rows = [line for line in text.split("## Settings")[1].splitlines() if line.startswith("|")]
    assert all(len(re.split(r"(?<!\\)\|", row)) == 5 for row in rows)


def test_metadata_names_only_what_is_on_a_hub(tmp_path):
    """A folder of this machine is no id, and its path is nobody's business."""
    (tmp_path / "model").mkdir()
    (tmp_path / "data.parquet").touch()
    text = card(str(tmp_path / "model"), str(tmp_path / "data.parquet"))
    assert "base_model" not in text and "datasets:" not in text and str(tmp_path) not in text
    assert "on model\n" in text and "`data.parquet`" in text
    text = card("Qwen/Qwen2.5-VL-3B-Instruct", "hiyouga/geometry3k")
    assert 'base_model: "Qwen/Qwen2.5-VL-3B-Instruct"' in text
    assert 'datasets: ["hiyouga/geometry3k"]' in text


def test_versions_name_the_commit_and_whether_files_differ(tmp_path, monkeypatch):
    """Outside of a checkout, in one, and in one with a changed file."""

    def git(*words):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
        how = dict(cwd=tmp_path, check=True, capture_output=True, text=True)
        return subprocess.run(command, **how).stdout.strip()

    monkeypatch.setattr(report, "__file__", str(tmp_path / "report.py"))
    ask = report.versions.__wrapped__
    (tmp_path / "report.py").touch()
    found = dict(python=sys.version.split()[0], torch=torch.__version__)
    assert ask() == found | dict(transformers=transformers.__version__)
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    assert ask()["code"] == git("rev-parse", "HEAD")[:12]
    (tmp_path / "report.py").write_text("another")
    assert ask()["code"] == git("rev-parse", "HEAD")[:12] + "-dirty"


def test_curves_have_the_accuracy_from_0_to_1_and_the_legends_outside(tmp_path, monkeypatch):
    from matplotlib import pyplot as plt

    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    history = [{"step": i, "eval_accuracy": 0.4, "reward": 0.5, "kl_prcp": 0.1} for i in range(4)]
    report.plot_curves(tmp_path / "c.png", history, "papo-g, gamma 0.02, seed 0")
    (figure,) = figures
    assert figure.get_suptitle() == "papo-g, gamma 0.02, seed 0"
    assert figure.axes[0].get_ylim() == (0, 1)
    for axis in figure.axes:
        if legend := axis.get_legend():
            assert legend.get_window_extent().y1 <= axis.get_window_extent().y0
    monkeypatch.undo()
    plt.close(figure)


def test_grounding_by_hand():
    """Two questions: 6 of 8 right and 2 of 8 without the picture; 2 of 8 and 8 of 8. Of the 8 right
    answers 6 x 3/4 + 2 x 0 = 4.5 are wrong without it. Nothing right: 0."""
    group = lambda right: SimpleNamespace(scores=[{"accuracy": float(i < right)} for i in range(8)])
    groups = lambda *rights: [group(right) for right in rights]
    assert ts.grounding(groups(6, 2), groups(2, 8)) == pytest.approx(4.5 / 8)
    assert ts.grounding(groups(0, 0), groups(2, 8)) == 0
