"""The rule-based reward: boxes, format and weights. What counts as the same answer:
test_grader.py."""

import random
import re
import time

import pytest

from papo import compute_reward, extract_boxed, follows_format

RELEASED_FORMAT = re.compile(r"<think>.*</think>.*\\boxed\{.*\}.*", re.DOTALL)


@pytest.mark.parametrize(
    "response, weight, reward, accuracy, follows",
    [
        (r"<think> 2+2 </think> \boxed{4}", 0.1, 1.0, 1, 1),
        (r"<think> 2+2 </think> \boxed{5}", 0.1, 0.1, 0, 1),
        (r"\boxed{4}", 0.1, 0.9, 1, 0),
        (r"\boxed{4}", 0.25, 0.75, 1, 0),
        (r"<think> 2+2 </think> \boxed{5}", 0.25, 0.25, 0, 1),
        ("4", 0.1, 0.0, 0, 0),
        (r"\boxed{4} or \boxed{5}", 0.1, 0.0, 0, 0),
    ],
)
def test_reward_weights(response, weight, reward, accuracy, follows):
    result = compute_reward(response, "4", **({} if weight == 0.1 else {"format_weight": weight}))
    assert result == {"reward": pytest.approx(reward), "accuracy": accuracy, "format": follows}
    assert all(type(value) is float for value in result.values())


def test_a_missing_box_is_no_answer():
    """The released grader reads it as the answer "None"."""
    assert compute_reward("", "None")["reward"] == 0.0


def slow_boxed(text: str) -> str | None:
    """Every \\boxed{ from the last to the first, counting braces one by one."""
    for start in reversed([match.end() for match in re.finditer(r"\\boxed\{", text)]):
        depth = 1
        for i in range(start, len(text)):
            if text[i] in "{}" and text[i - 1] != "\\":
                depth += 1 if text[i] == "{" else -1
            if depth == 0:
                return text[start:i]
    return None


BOXED = {
    r"\boxed{5}": "5", r"\boxed{\frac{1}{2}}": r"\frac{1}{2}", r"\boxed{}": "", r"\\boxed{5}": "5",
    r"\boxed{1} then \boxed{2}": "2", r"\boxed{1} then \boxed{2": "1", r"\boxed{1} } \boxed{2}": "2",
    r"\boxed{ \boxed{3} }": "3", r"\boxed{ \boxed{3} ": "3", "boxed{1}": None, "": None, "}{": None,
    r"\boxed{\left\{x\right.}": r"\left\{x\right.", r"\boxed{1": None,
}  # fmt: skip


@pytest.mark.parametrize("text, inside", list(BOXED.items()))
def test_boxed(text, inside):
    assert extract_boxed(text) == inside == slow_boxed(text)


def test_boxed_equals_brute_force():
    rng = random.Random(0)
    for _ in range(20_000):
        pieces = [r"\boxed{", "{", "}", "}", "x", r"\{", r"\}"]
        text = "".join(rng.choices(pieces, k=rng.randint(0, 14)))
        assert extract_boxed(text) == slow_boxed(text), text


def test_format_equals_the_released_rule():
    rng, matches = random.Random(0), 0
    pieces = ["<think>", "</think>", r"\boxed{", "}"] * 2 + [*"x\n </>{", "think", r"\boxed"]
    for _ in range(20_000):
        start = "<think>" * (rng.random() < 0.9)
        text = start + "".join(rng.choices(pieces, k=rng.randint(0, 12)))
        released = RELEASED_FORMAT.fullmatch(re.sub(r"\s*(<|>|/)\s*", r"\1", text)) is not None
        assert follows_format(text) == released, text
        matches += released
    assert matches > 500  # else the comparison is of one no with another


PIECES = [r"\boxed{", "<think>", "<think></think>", r"</think>\boxed{", "{", "}", " ", "< "]


@pytest.mark.parametrize("piece", [*PIECES, "<think", r"\boxed", "\\", r"\{", "/ "])
def test_long_hostile_responses_take_linear_time(piece):
    start = time.process_time()
    text = "<think>" + piece * (200_000 // len(piece))
    for response in (text, text[7:], text + r"</think>\boxed{"):
        compute_reward(response, "5")
    assert time.process_time() - start < 2
