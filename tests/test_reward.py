"""The rule-based reward: which answers count as right, and that no string, however hostile, stops the training run."""

import inspect
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time

import psutil
import pytest
from grader_pairs import labelled_pairs, rates, with_papo

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
    ("１２", "12"),
    ("（1，2）", "(1,2)"),
    ("–3", "-3"),
    ("½", r"\frac{1}{2}"),
    ("2½", "2.5"),
    ("12厘米", "12 cm"),
    ("100平方米", "100 m²"),
    ("24 cm²", "24 cm^2"),
    ("8 meters", "8 m"),
    ("9 square units", "9"),
    ("Option C", "C"),
    ("C: 12 cm", "C"),
    ("x=2 or x=1", "x=1 or x=2"),
    ("2x-y+1=0", "y=2x+1"),
    (r"x>3\text{ or }x<-1", "$x < -1$ or $x > 3$"),
    (r"(-\infty,-1)\cup(3,+\infty)", r"$\left( -\infty ,-1 \right)\bigcup \left( 3,+\infty  \right)$"),
    ("a_n=2n-1", "a_{n}=2n-1"),
    (r"S_{\triangle ABC} = 5", "5"),
    ("k>-1且k≠0", r"k>-1 and k \ne 0"),
    (r"-1 \le x \lt 2", r"-1\leqslant x<2"),
    (r"3\times10^8 m/s", "3×10^8"),
    ("20 ml", "20 mL"),
    ("NO", "No"),
    ("Town B", "town B"),
    ("A rhombus", "a rhombus"),
    (r"x\ne2\text{ or }x\ne1", r"x \neq 1 or x \neq 2"),
    (r"x<\frac{1}{2} or x>3", "x>3 or x<0.5"),
    ("3 months", "3"),
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
    ("x+1=6", "6"),
    ("5=6", "6"),
    (r"3 \to 4", "4"),
    ("(B) or (C)", "B"),
    ("(A) is wrong; C", "A"),
    ("(B) 12 cm", "(B) 15 cm"),
    ("(1,2)", r"\{1,2\}"),
    (r"\ne 3", "3"),
    (r"\div 3", "3"),
    (r"\frac{1}{2} foo", r"\frac{1}{2}"),
    (r"not \frac{1}{2}", r"\frac{1}{2}"),
    ("5 cents", r"\$5"),
    (r"2\sqrt{3} cm", r"2\sqrt{3} m"),
    ("0.5%", "0.5"),
    ("x_1", "x"),
    (r"0.\dot{3}", "0.3"),
    ("1.7320508", r"\sqrt{3}"),
    ("on", "no"),
    (r"x<-1\text{ and }x>3", "x<-1 or x>3"),
    (r"x\ne1\text{ and }x\ne2", r"x\ne1 or x\ne2"),
    (r"\{x|x<-1, x>3\}", r"\{x|x<-1 or x>3\}"),
    (r"\{x|x\ne1, x\ne2\}", r"\{x|x\ne1 or x\ne2\}"),
    ("R", "r"),  # two radii of one figure
    ("2N", "2n"),
    ("5 MW", "5 mW"),
    (r"\Delta", r"\delta"),
    ("2 thirds", "2"),
    ("2 fifths", "2"),
    ("1 half", "1"),
    ("2 cubed", "2"),
    ("5 trillion", "5"),
    ("3 plus four", "3"),
    ("x=1=1", "x=2"),
    ("5 million dollars", r"\$5"),
    (r"\{1,2\}", "(1,2)"),
]
HANGS = [  # each known to run for minutes; an answer in other symbols is not even asked about
    ("9^{9^{9}}", "5"),
    ("99999999!", "5!"),
    (r"10^{10^{10}}", "5"),
    ("(x+y+z+1)^{5000}", "x+y+z"),
]
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
    r"\abcdefgh" * 50 + "?",
    r"\abcdefgh" * 50 + "=?",
    r"\{," * 333,
    "__import__('os')._exit(1)",
    "import os",
]


@pytest.fixture(autouse=True)
def nothing_is_remembered():
    papo.same_answer.cache_clear()


def accuracy(boxed: str, answer: str) -> float:
    return papo.compute_reward(rf"<think> so </think> \boxed{{{boxed}}}", answer)["accuracy"]


@pytest.mark.parametrize("boxed, answer", ACCEPT)
def test_accepts_what_means_the_same(boxed, answer):
    assert accuracy(boxed, answer) == 1.0


@pytest.mark.parametrize("boxed, answer", REJECT)
def test_rejects_what_does_not(boxed, answer):
    assert accuracy(boxed, answer) == 0.0


@pytest.mark.parametrize("part", labelled_pairs())
def test_labelled_pairs(part):
    """The rules were written on the tuned half alone; the other two say what they are worth."""
    pairs = labelled_pairs()[part]
    right, wrongly_accepted = rates(with_papo, pairs)
    assert len(pairs) >= 60 and right >= 0.92 and wrongly_accepted <= 0.03, (right, wrongly_accepted)


GRADER = inspect.getsource(papo).split("# 5. The rule-based reward")[1].split("# 6. Group advantages")[0]


def test_before_and_after_of_every_rule(monkeypatch):
    """The arrows beside tidy's tables are true, and without any one rule some of them is not."""
    table = GRADER.split("# tidy's tables")[1].split("# The patterns")[0]
    arrows = [item.split(" -> ") for line in re.findall(r"# (.*->.*)", table) for item in line.split("; ")]
    arrows = [(before.rsplit(": ", 1)[-1], after) for before, after in arrows]
    assert len(arrows) >= 35
    wrong = lambda: [
        (before, papo.tidy(before), after) for before, after in arrows if papo.tidy(before) != after
    ]
    assert wrong() == []
    for i, rule in enumerate(papo.TIDY_RULES):
        with monkeypatch.context() as patch:
            patch.setattr(papo, "TIDY_RULES", papo.TIDY_RULES[:i] + papo.TIDY_RULES[i + 1 :])
            assert wrong(), f"no example needs {rule}"


def test_what_the_patterns_fit():
    fits = re.findall(r"# .*?(\w+) fits (.*); not (.*)", GRADER)
    assert {name for name, *_ in fits} == {"NUMBER", "UNIT", "CHOICE", "NAME", "EXPRESSION"}
    for name, right, wrong in fits:
        pattern = getattr(papo, name)
        assert all(pattern.fullmatch(text) for text in right.split("  ")), name
        assert not any(pattern.fullmatch(text) for text in wrong.split("  ")), name


def test_the_table_of_same_by_rule():
    """Each row of its docstring, in both orders; the answers are in the one spelling, as its callers' are."""
    rows = [
        re.split("  +", line.strip()) for line in papo.same_by_rule.__doc__.split("verdict\n")[1].splitlines()
    ]
    rows = [row for row in rows if len(row) == 3]
    assert len(rows) >= 15 and {verdict for *_, verdict in rows} == {"True", "False", "None"}
    for given, expected, verdict in rows:
        assert (papo.tidy(given), papo.tidy(expected)) == (given, expected)
        assert str(papo.same_by_rule(given, expected)) == verdict, (given, expected)
        assert str(papo.same_by_rule(expected, given)) == verdict, (given, expected)


def test_numbers_and_letters_never_reach_the_child(monkeypatch):
    """The usual answers cost microseconds, and an unreliable second opinion cannot overrule an exact no."""
    monkeypatch.setattr(papo, "same_by_algebra", lambda _: pytest.fail("math-verify was asked"))
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


@pytest.mark.parametrize("bomb, answer", HANGS)
def test_a_hang_is_killed_and_the_next_answer_graded(bomb, answer, monkeypatch):
    result, seconds = graded_briefly(monkeypatch, bomb, answer)
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


def grading_child() -> psutil.Process:
    return psutil.Process(papo.grading_process(os.getpid()).pid)


def test_a_crash_scores_zero_and_the_next_answer_is_graded():
    """A crash in the middle of a task is no verdict; it is over long before the time is."""
    for _ in range(2):
        assert accuracy("x+2x", "3x") == 1.0
        child, start = grading_child(), time.perf_counter()
        threading.Timer(0.3, child.kill).start()
        assert accuracy("9^{9^{9}}", "5") == 0.0 and time.perf_counter() - start < papo.GRADE_TIMEOUT - 1
        assert papo.grading_process.cache_info().currsize == 1, "no successor was started"
        assert grading_child() != child
        papo.same_answer.cache_clear()
    assert accuracy("x+2x", "3x") == 1.0


def test_survives_the_death_of_an_idle_child():
    """As by the kernel's out-of-memory killer: no answer is lost."""
    assert accuracy("2x", "x+x") == 1.0
    child = grading_child()
    child.kill()
    child.wait(10)
    assert accuracy("3x", "x+2x") == 1.0 and grading_child() != child


def test_a_child_that_cannot_start_is_an_error_and_not_a_wrong_answer(monkeypatch):
    papo.grading_process.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(papo, "GRADING_PROCESS", "import no_such_module")
        with pytest.raises(RuntimeError, match="does not start; try: .*import math_verify"):
            accuracy("2x", "x+x")
    papo.grading_process.cache_clear()
    assert accuracy("2x", "x+x") == 1.0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends Ctrl-C otherwise")
def test_ctrl_c_does_not_end_the_child():
    """The terminal sends it to the whole group of processes, while the trainer finishes its update."""
    assert accuracy("2x", "x+x") == 1.0
    child = grading_child()
    child.send_signal(signal.SIGINT)
    assert accuracy("3x", "x+2x") == 1.0 and grading_child() == child


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no limit on a process's memory")
def test_memory_is_limited():
    assert accuracy("2x", "x+x") == 1.0
    assert grading_child().rlimit(psutil.RLIMIT_AS) == (2**31, 2**31)


def test_verdicts_are_remembered_and_time_outs_are_not(monkeypatch):
    asked = []
    ask = papo.same_by_algebra
    monkeypatch.setattr(papo, "same_by_algebra", lambda pairs: asked.append(pairs) or ask(pairs))
    for _ in range(3):
        assert accuracy("2x", "x+x") == 1.0 and accuracy("3x", "x+x") == 0.0
    assert len(asked) == 2
    monkeypatch.setattr(papo, "GRADE_TIMEOUT", SHORT)
    for _ in range(2):
        assert accuracy("9^{9^{9}}", "5") == 0.0
    assert len(asked) == 4
    assert papo.same_answer.cache_info().maxsize is not None


def run_script(path, script: str) -> subprocess.Popen:
    path.write_text(textwrap.dedent(script))
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(papo.__file__)}
    return subprocess.Popen([sys.executable, path], env=environment, stdout=subprocess.PIPE, text=True)


def test_no_process_outlives_its_killed_parent(tmp_path):
    """SIGKILL in the middle of 9^{9^{9}}, where nothing of the parent is left to clean up."""
    parent = run_script(
        tmp_path / "main.py",
        """
        import papo

        assert papo.answers_match("2x", "x+x")
        print("ready", flush=True)
        papo.answers_match("9^{9^{9}}", "5")
        """,
    )
    assert parent.stdout.readline() == "ready\n"
    time.sleep(0.5)
    children = psutil.Process(parent.pid).children(recursive=True)
    assert any(child.cpu_times().user > 0.3 for child in children), "nothing was computing"
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=papo.GRADE_TIMEOUT + 3)
    alive = [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
    for child in alive:
        child.kill()
    assert not alive


def grade_into(queue):
    queue.put([papo.answers_match("2x", "x+x"), papo.answers_match("3x", "x+x")])


def test_works_in_a_daemonic_process():
    """It may have no children by multiprocessing, and where it is forked it must not use its parent's child."""
    assert papo.answers_match("2x", "x+x")
    queue = multiprocessing.Queue()
    process = multiprocessing.Process(target=grade_into, args=(queue,), daemon=True)
    process.start()
    assert queue.get(timeout=60) == [True, False]
    process.join(60)
    assert papo.answers_match("4x", "x+3x")


def test_under_spawn_a_kill_costs_no_import_of_torch(tmp_path):
    """macOS, Windows: a child imports the main module anew. In less time than torch's import takes, with a kill in
    the middle, in a fresh process."""
    process = run_script(
        tmp_path / "main.py",
        """
        import json, multiprocessing

        import psutil
        import papo

        if __name__ == "__main__":
            multiprocessing.set_start_method("spawn")
            papo.GRADE_TIMEOUT = 2.0
            pairs = [("2x", "x+x"), ("9^{9^{9}}", "5"), ("3x", "x+2x"), ("3x", "x+x")]
            verdicts = [papo.answers_match(*pair) for pair in pairs]
            children = psutil.Process().children(recursive=True)
            print(json.dumps([verdicts, max(child.memory_info().rss for child in children) / 2**20]))
        """,
    )
    verdicts, mebibytes = json.loads(process.communicate(timeout=120)[0])
    assert verdicts == [True, False, True, False]
    assert mebibytes < 200  # torch and transformers alone take more than twice that


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
