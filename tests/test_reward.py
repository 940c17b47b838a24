"""The rule-based reward: which answers count as right, and that no string, however hostile, stops the training run."""

import multiprocessing
import os
import random
import re
import threading
import time

import pytest

import papo

RELEASED_FORMAT = re.compile(r"<think>.*</think>.*\\boxed\{.*\}.*", re.DOTALL)

ACCEPT = [  # (boxed answer, answer of the data set)
    ("138°", "138"),
    (r"138^\circ", "138"),
    (r"138^{\circ}", "138°"),
    ("138 degrees", r"$138^\circ$"),
    ("100 °C", "100"),
    (r"\frac{2}{4}", r"\frac{1}{2}"),
    (r"\dfrac{1}{2}", "0.5"),
    ("0.5", r"\frac12"),
    (r"-\frac{1}{2}", "-0.5"),
    ("1 / 2", r"\frac{2}{4}"),
    (r"1\frac{1}{2}", "1.5"),
    ("1 1/2", "1.5"),
    (".5", "0.50"),
    ("-.5", "-1/2"),
    ("+5", "5"),
    ("5.", "5"),
    ("−3", "-3"),
    ("1.0", "1"),
    (r"10^{2}", "100"),
    ("1e3", "1000"),
    (r"1.5\times10^{3}", "1500"),
    ("1,000", "1000"),
    (r"1{,}000", "1000"),
    (r"1,\!000", "1000"),
    ("1,234,567.5", "1234567.5"),
    ("B.", "B"),
    ("(B)", "B"),
    ("B)", "B"),
    (r"\text{B}", "B"),
    (r"\textbf{(B)}", "B"),
    ("b", "B"),
    ("B. 12 cm", "B"),
    ("(B) 12 cm", "B"),
    ("B", "B. 12 cm"),
    ("(A)", "A"),
    (r"50\%", "50%"),
    ("50%", "50"),
    ("50%", "0.5"),
    ("0.5", r"50\%"),
    ("5", "$5$"),
    ("5", r"\boxed{5}"),
    ("B", r"$\boxed{\text{B}}$"),
    (r"\$5", "5"),
    ("5", r"\(5\)"),
    (r"12\text{ cm}", "12"),
    (r"12 \mathrm{cm}^{2}", "12 cm^2"),
    ("12", "12 square units"),
    ("60 km/h", "60"),
    ("9.8 m/s^2", "9.8"),
    ("5 apples", "5 apples"),
    ("x=5", "5"),
    ("5", "x = 5"),
    (r"\angle ABC = 138^\circ", "138°"),
    ("y=2x+3", "2x+3"),
    ("(1,2)", "(1, 2)"),
    (r"\left(1,2\right)", "(1, 2)"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    ("2√3", r"2\sqrt{3}"),
    ("2π", r"2\pi"),
    ("3x+2", "2+3x"),
    ("x^{2}", "x^2"),
    ("2yx", "2xy"),
    ("3x/2", "1.5x"),
    (r"\{2,1\}", r"\{1,2\}"),
    ("Yes", "yes"),
    ("word " * 300, "word " * 300),
    (r"\text{Yes}", "yes"),
    (r"5\sqrt{2}\text{ m}", r"5\sqrt{2}"),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
]
REJECT = [
    ("4 2", "42"),
    ("4 2", "6"),
    (r"4\,2", "42"),
    ("4$2", "42"),
    (r"4\text{}2", "42"),
    (r"4\quad 2", "6"),
    ("6", "4 2"),
    ("1 1/2", "1"),
    ("AB", "A"),
    ("A", "B"),
    ("(A)", "B"),
    ("A. 12 cm", "B. 12 cm"),
    ("12 cm", "B"),
    ("B", "12"),
    ("B 12", "B"),
    ("A, B", "A"),
    ("CBA", "ABC"),
    ("no", "yes"),
    ("north", "thorn"),
    ("3", "-3"),
    ("−3", "3"),
    ("12", "1"),
    ("1", "12"),
    ("3", "3.1"),
    (".5", "5"),
    ("0.333", r"\frac13"),
    ("3.14", r"\pi"),
    ("1, 2", "12"),
    ("1,2", "12"),
    ("2, 345", "2345"),
    ("5,000,00", "500000"),
    ("", "5"),
    ("", ""),
    (" " * 2000, ""),
    (" ", " "),
    ("$$", "$"),
    (".", "."),
    ("None", "5"),
    ("None", ""),
    ("12 cm", "12 m"),
    ("12 cm", "13 cm"),
    ("12 cm^2", "12 cm"),
    ("3 m/s", "3 m"),
    ("5°", "5 cm"),
    ("5x", "5"),
    ("5 x", "5"),
    ("5 million", "5"),
    ("50%", "0.5%"),
    ("0.5%", "50%"),
    ("0.5%", "50"),
    ("5 or 6", "5"),
    (r"5\text{ or }6", "6"),
    ("5, 6", "5"),
    ("x=6,x=5", "5"),
    (r"\pm 5", "5"),
    ("y=5", "x=5"),
    ("(1,2)", "(2,1)"),
    ("[1,2)", "(1,2)"),
    ("x<5", "5"),
    ("1/0", "2/0"),
    ("0", "1/0"),
    ("3x/2", "1.6x"),
    ("1e3", "1e4"),
    ("1e1000", "1"),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}"),
]
HANGS = ["9^{9^{9}}", "99999999!", r"10^{10^{10}}", "(x+y+z+1)^{5000}"]  # each known to run for minutes
HOSTILE = [
    "9**9**9",
    "1e999999999",
    "-" * 999 + "1",
    "9" * 999,
    "9" * 5000,
    "9" * 999 + "e999",
    "1" * 500 + "/" + "7" * 499,
    "٣",
    "\ud800",
    "\x00",
    "{",
    "}",
    "\\",
    r"\frac{1}{",
    r"\frac{}{}",
    r"\text{" * 150,
    "√" * 1000,
    ", " * 500,
    "1," * 500,
    "1 " * 500,
    "$" * 999,
    "(" * 999,
    "A" * 300_000,
    " " * 300_000,
    r"\boxed{" * 40_000,
    "__import__('os')._exit(1)",
    "import os",
]


def accuracy(boxed: str, answer: str) -> float:
    return papo.compute_reward(rf"<think> so </think> \boxed{{{boxed}}}", answer)["accuracy"]


@pytest.mark.parametrize("boxed, answer", ACCEPT)
def test_accepts_what_means_the_same(boxed, answer):
    assert accuracy(boxed, answer) == 1.0


@pytest.mark.parametrize("boxed, answer", REJECT)
def test_rejects_what_does_not(boxed, answer):
    assert accuracy(boxed, answer) == 0.0


def test_numbers_and_letters_never_reach_the_child(monkeypatch):
    """The usual answers cost microseconds, and an unreliable second opinion cannot overrule an exact no."""
    monkeypatch.setattr(papo, "grading_pool", lambda: pytest.fail("math-verify was asked"))
    for boxed, answer in [
        ("138°", "138"),
        (r"\frac{2}{4}", "0.5"),
        ("0.333333", r"\frac{1}{3}"),
        ("1e3", "1,000"),
        ("B.", "B"),
        ("A", "12"),
        ("12", "A"),
        ("3", "-3"),
        (r"50\%", "0.5"),
        ("12 cm", "12"),
        ("12 cm", "12 m"),
        ("4 2", "42"),
        ("", "x"),
        (r"\dfrac{1}{2}", "0.5"),
        (r"1{,}000", "1000"),
        (r"12 \text{ cm}^{2}", "12 cm^2"),
        (r"138^{\circ}", "138"),
        ("A", r"\boxed{B}"),
        ("CBA", "ABC"),
        (r"30\degree", "30"),
        (r"\displaystyle 5", "5"),
        ("5~cm", "5 cm"),
    ]:
        accuracy(boxed, answer)


def test_random_numbers_are_exact():
    """Two spellings of one fraction are equal; a difference in the 30th digit is seen (floats would lose it)."""
    rng = random.Random(0)
    for _ in range(300):
        a, b, k = rng.randint(-(10**6), 10**6), rng.randint(1, 999), rng.randint(1, 99)
        spelling = rf"{'-' if a < 0 else ''}\frac{{{abs(a) * k}}}{{{b * k}}}"
        assert papo.answers_match(spelling, f"{a}/{b}") and not papo.answers_match(spelling, f"{a + 1}/{b}")
        assert papo.answers_match(f"{a:,}.00", str(a)) and not papo.answers_match(
            f"{a}." + "0" * 29 + "1", str(a)
        )


def test_reward_weights():
    right, wrong = r"<think> 2+2 </think> \boxed{4}", r"<think> 2+2 </think> \boxed{5}"
    assert papo.compute_reward(right, "4") == {"reward": pytest.approx(1.0), "accuracy": 1.0, "format": 1.0}
    assert papo.compute_reward(wrong, "4") == {"reward": pytest.approx(0.1), "accuracy": 0.0, "format": 1.0}
    assert papo.compute_reward(r"\boxed{4}", "4") == {
        "reward": pytest.approx(0.9),
        "accuracy": 1.0,
        "format": 0.0,
    }
    assert papo.compute_reward(r"\boxed{4}", "4", format_weight=0.25)["reward"] == pytest.approx(0.75)
    assert papo.compute_reward("4", "4") == {"reward": 0.0, "accuracy": 0.0, "format": 0.0}
    assert (
        papo.compute_reward("", "None")["reward"] == 0.0
    )  # the released grader reads a missing box as the answer "None"
    assert all(type(value) is float for value in papo.compute_reward(right, "4").values())


# ---------------------------------------------------------------------------------------- hostile answers

SHORT = 0.4


def graded_briefly(monkeypatch, boxed: str, answer: str) -> tuple[float, float]:
    """Accuracy and seconds, under a time limit of SHORT seconds."""
    with monkeypatch.context() as patch:
        patch.setattr(papo, "GRADE_TIMEOUT", SHORT)
        start = time.perf_counter()
        return accuracy(boxed, answer), time.perf_counter() - start


@pytest.mark.parametrize("bomb", HANGS)
def test_a_hang_is_killed_and_the_next_answer_graded(bomb, monkeypatch):
    result, seconds = graded_briefly(monkeypatch, bomb, "5")
    assert result == 0.0 and seconds < SHORT + 4
    assert seconds > SHORT, "no hang: this bomb no longer shows anything"
    assert accuracy(r"2\sqrt{3}", r"\sqrt{12}") == 1.0


def test_hostile_strings_on_either_side(monkeypatch):
    for text in HOSTILE:
        for boxed, answer in [(text, "5"), ("5", text)]:
            result, seconds = graded_briefly(monkeypatch, boxed, answer)
            assert result == 0.0 and seconds < SHORT + 4, (boxed[:40], answer[:40])
        graded_briefly(monkeypatch, text, text)
    assert accuracy(r"2\sqrt{3}", r"\sqrt{12}") == 1.0


def test_rules_are_quick_and_never_raise():
    """Everything that runs in this process is bounded, so fuzz it at the length limit."""
    rng = random.Random(0)
    alphabet = [
        "{",
        "}",
        "\\",
        r"\frac",
        r"\text{",
        r"\boxed{",
        "^",
        r"\circ",
        "°",
        "%",
        "$",
        " ",
        ",",
        ".",
        "-",
        "e",
        "E",
        "/",
        "1",
        "23",
        "000",
        "A",
        "x",
        "(",
        ")",
        "√",
        "²",
        "٣",
    ]
    for length in [1, 2, 3, 4, 6] * 1500 + [100] * 100 + [900] * 20:
        given, expected = (
            papo.tidy("".join(rng.choices(alphabet, k=length))[: papo.MAX_ANSWER_CHARS]) for _ in range(2)
        )
        start = time.perf_counter()
        assert papo.same_by_rule(given, expected) in (True, False, None)
        papo.parse_number(given)
        assert time.perf_counter() - start < 0.5


same_by_algebra = papo.same_by_algebra


def sabotaged(given, expected):
    """Patched in for the whole test: a worker is forked at a moment of pebble's choosing and keeps the patches of that moment."""
    if given == "crash":
        os._exit(1)
    if given == "fail":
        raise RecursionError
    return same_by_algebra(given, expected)


@pytest.mark.parametrize("fault", ["crash", "fail"])
def test_a_crash_scores_zero_and_the_next_answer_is_graded(fault, monkeypatch):
    monkeypatch.setattr(papo, "same_by_algebra", sabotaged)
    for _ in range(3):
        assert accuracy(fault, "x+x") == 0.0
        assert accuracy("2x", "x+x") == 1.0


def test_survives_the_death_of_an_idle_worker():
    """As by the kernel's out-of-memory killer. pebble then marks the whole pool as broken, for good."""
    assert accuracy("2x", "x+x") == 1.0
    broken = papo.grading_pool()
    for child in multiprocessing.active_children():
        child.kill()
    deadline = time.monotonic() + 10
    while broken.active and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not broken.active, "pebble mended the pool by itself: the guard in answers_match can go"
    assert accuracy("2x", "x+x") == 1.0


def test_works_from_other_threads(monkeypatch):
    """math-verify's own time-outs raise here: signals belong to the main thread."""
    monkeypatch.setattr(papo, "GRADE_TIMEOUT", 1.5)
    pairs = [(r"2\sqrt{3}", r"\sqrt{12}"), ("2x", "x+x"), ("9^{9^{9}}", "5"), ("3x", "x+x")]
    results = {}
    threads = [
        threading.Thread(target=lambda pair=pair: results.update({pair: accuracy(*pair)})) for pair in pairs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert results == dict(zip(pairs, [1.0, 1.0, 0.0, 0.0]))


# ---------------------------------------------------------------------------------------- boxes and format


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


@pytest.mark.parametrize(
    "text, inside",
    [
        (r"\boxed{5}", "5"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed{1} } \boxed{2}", "2"),
        (r"\boxed{ \boxed{3} }", "3"),
        (r"\boxed{ \boxed{3} ", "3"),
        (r"\boxed{\left\{x\right.}", r"\left\{x\right."),
        (r"\boxed{}", ""),
        (r"\boxed{1", None),
        ("boxed{1}", None),
        ("", None),
        ("}{", None),
        (r"\\boxed{5}", "5"),
    ],
)
def test_boxed(text, inside):
    assert papo.extract_boxed(text) == inside == slow_boxed(text)


def test_boxed_equals_brute_force():
    rng = random.Random(0)
    for _ in range(20_000):
        text = "".join(rng.choices([r"\boxed{", "{", "}", "}", "x", r"\{", r"\}"], k=rng.randint(0, 14)))
        assert papo.extract_boxed(text) == slow_boxed(text), text


def test_format_equals_the_released_rule():
    rng = random.Random(0)
    matches = 0
    pieces = [
        "<think>",
        "<think>",
        "</think>",
        "</think>",
        r"\boxed{",
        r"\boxed{",
        "}",
        "}",
        "x",
        "\n",
        " ",
        "<",
        "/",
        ">",
        "think",
        "{",
        r"\boxed",
    ]
    for _ in range(20_000):
        text = "<think>" * (rng.random() < 0.9) + "".join(rng.choices(pieces, k=rng.randint(0, 12)))
        released = RELEASED_FORMAT.fullmatch(re.sub(r"\s*(<|>|/)\s*", r"\1", text)) is not None
        assert papo.follows_format(text) == released, text
        matches += released
    assert matches > 500  # else the comparison is of one no with another


@pytest.mark.parametrize(
    "piece",
    [
        r"\boxed{",
        "<think>",
        "<think></think>",
        r"</think>\boxed{",
        "{",
        "}",
        " ",
        "< ",
        "<think",
        r"\boxed",
        "\\",
        r"\{",
        "/ ",
    ],
)
def test_long_hostile_responses_take_linear_time(piece):
    start = time.process_time()
    text = "<think>" + piece * (200_000 // len(piece))
    for response in (text, text[7:], text + r"</think>\boxed{"):
        papo.compute_reward(response, "5")
    assert time.process_time() - start < 2
