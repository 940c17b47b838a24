"""Do two answers mean the same? `answers_match(given, expected)`; papo.py's reward asks nothing else of it.

Whoever wants to understand PAPO can leave this file closed. The way of a pair of answers:

    answers_match -> same_answer
        tidy              both in one spelling
        same_by_rule      numbers, units, letters: exact and in microseconds; where it does not know
        same_by_rule      once more, for each piece between commas and the like; then
        same_by_algebra   math-verify, in a child process that a hostile answer may hang or kill
"""

import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import threading
from fractions import Fraction

GRADE_TIMEOUT = 3.0  # seconds math-verify gets for one answer, about a hundred times what it needs
MAX_ANSWER_CHARS = (
    1000  # a longer answer is right only if it is the very same string: bounds all work here
)

# tidy's tables; each arrow shows what tidy makes of it in the end. One spelling for characters (those of full
# width lie 0xFEE0 above ASCII): （１，２） -> (,1,2,); −3 -> -3; x² -> x^2; 2½ -> 2\frac{1}{2}; 9∘ -> 9°
# ×5 -> \times 5
CHARACTERS = {0xFEE0 + code: chr(code) for code in range(0x21, 0x7F)}
CHARACTERS |= str.maketrans(dict(zip("−–—。、∘º∶", "---.,°°:")) | {"²": "^2", "³": "^3", "℃": "°C"})
CHARACTERS |= str.maketrans({"π": r"\pi ", "×": r"\times ", "½": " 1/2", "¼": " 1/4", "¾": " 3/4"})
# ... for words, each group by its first: x\le 3 -> x≤3; 1 \lt x -> 1<x; 3 \gt x -> 3>x; A\bigcup B -> A∪B
# \tfrac12 -> \frac12; x=1且y=2 -> x=1,y=2; 5厘米 -> 5cm; 20 ml -> 20 mL; 30 degrees -> 30°
WORDS = r"""≤ \leqslant \leq \le; ≥ \geqslant \geq \ge; < \lt; > \gt; ≠ \neq \ne; ≈ \approx; ∞ \infty;
→ \rightarrow \to; ∪ \cup \bigcup; ∩ \cap; ∈ \in; ∠ \angle; △ \triangle; ∥ \parallel; ⊥ \perp;
∅ \emptyset \varnothing; ± \pm; Ω \Omega; ∨ or 或; , and 和 且; \frac \dfrac \tfrac; cm centimeters 厘米;
mm millimeters 毫米; mL ml; km kilometers 千米; m meters 米; in inches; ft feet; h hours 小时; min minutes 分钟;
s seconds 秒; kg 千克; g grams 克; % percent; ° \circ degrees degree \degree 度"""
WORDS = {word: group.split()[0] for group in WORDS.split(";") for word in group.split()}
WORD = r"\\?[a-zA-Z]+|小时|分钟|[厘毫千]?[米克]|[或和且秒度]"
TIDY_RULES = [  # ... and for patterns, in this order
    (r"(?s)^.*\\boxed\{(.*)\}.*$", r"\1"),  # x is \boxed{5}. -> 5
    (r"\{,\}|,\\!", ","),  # 1{,}000 -> 1,000; 1,\!000 -> 1,000
    (r"√(\d+|\w)", r"\\sqrt{\1}"),  # 2√13 -> 2\sqrt{13}
    (r"\\(?:text|math)[a-z]*\{([^{}]*)\}", r" \1 "),  # \textbf{C} -> C; 5\mathrm{km} -> 5 km
    # \left.x\right| -> .x|; \(5\) -> 5; $5$ -> 5; \$5 -> 5; 5~cm -> 5 cm
    (r"\\(?:left|right|quad|displaystyle)(?![a-zA-Z])|(?<!\\)\\[()\[\],;:! ]|\\?\$|~|\s", " "),
    # 9 square m -> 9 m^2; 9立方m -> 9m^3
    (r"(?:(square|平方)|cubic|立方) ?([^\W\d_]+)", lambda m: f"{m[2]}^{3 - bool(m[1])}"),
    (WORD, lambda m: WORDS.get(m[0], m[0])),  # 2 hours -> 2 h
    # The answer is C -> C; Option C -> C; 答案：C -> C
    (r"(?i)^ *(?:the )?(?:answer|option|choice|答案|选项?)(?![a-z])(?: ?is|是|为)?[: ]*(?=.)", ""),
    (r"(?<=[A-J①-⑩])[, ]+(?=[A-J①-⑩])", ""),  # A, C and D -> ACD; ① ③ -> ①③
    (r" +", " "),  # one stays, for 4 2 is not 42: 4  2 -> 4 2; 4,  200 -> 4, 200
    (r" ?([^\w\s,.]) ?", r"\1"),  # x + 1 = 3 -> x+1=3
    (r"\^\{?°\}?", "°"),  # 30^{\circ} -> 30°; 30^\circ -> 30°
    (r"([\^_])\{(\w)\}", r"\1\2"),  # x^{2} -> x^2; a_{n} -> a_n
    (r"(\d) (\d+)/(\d+)", r"\1\\frac{\2}{\3}"),  # 1 1/2 -> 1\frac{1}{2}
    # P(1,2) -> (,1,2,); \pi \approx 3.14 -> \pi; +\infty -> ∞; 5\% -> 5%
    (r"^[A-Z](?=\(.*,.*\)$)|(?<=.)≈[\d.]+$|\+(?=∞)|\\(?=%)", ""),
    # Order does not count in sets and among alternatives: \{2,1\} -> \{,1,2,\}; x=2 or x=1 -> x=1,x=2
    (
        r"(?<=^\\\{)[^()<>≤≥≠]*(?=\\\}$)|^(?!.*[<>≤≥≠]).*∨.*$",
        lambda m: ",".join(sorted(re.split(" ?[,∨] ?", m[0]))),
    ),
    # ... but "or" of inequalities is not "and": x>3 or x<1 -> x<1∨x>3
    (r"^.*∨.*$", lambda m: "∨".join(sorted(m[0].split("∨")))),
    # Brackets become pieces of their own between commas: [1,2) -> [,1,2,)
    (r"(\\\{|[(\[])([^()\[\],]*,[^()\[\]]*?)(\\\}|[)\]])", r"\1,\2,\3"),
]
# The patterns: what each fits and does not, with two spaces between the examples.
# NUMBER fits 5  -1,000.5  .5  1e3  2/4  50%  12 cm^2  9 km/h  5x; not 5,00  4 2  x5  2\pi
DECIMAL = r"[+-]?(?=\.?\d)(?:\d{1,3}(?:,\d{3})+|\d*)(?:\.\d*)?(?:[eE][+-]?\d{1,3})?"
NUMBER = re.compile(
    rf"({DECIMAL})(?:/({DECIMAL}))? ?((?:(?:[^\W\d_]|[%°])+(?:[ /][a-zA-Z]+)*(?:\^?[23])?)?)"
)
# A measure or what is counted: may be left out. UNIT fits m^2  km/h  °C  apples  元; not x  trillion  fifths
MEASURE = r"°[CF]?|[cdkm]?m|in|ft|mi|yd|k?g|h|s|min|m?L|[NVAWJΩ]"
COUNTED = (
    r"(?![a-z]*illion|thousand|hundred|dozen|hal[fv]|third|[efnst][a-z]*ths|cubed|cents)[a-z]{4,}"
)
COUNTED += r"|(?![万亿千百十成折多倍])[一-鿿]{1,2}"
UNIT = re.compile(rf"(?:{MEASURE}|{COUNTED})(?:/(?:{MEASURE}))?(?:\^?[23])?")
# A letter of a multiple choice, and its text. CHOICE fits B  (B)  B),  B.  B: 12 cm; not (B) or (C)  AB  B 12
CHOICE = re.compile(r"\(?([A-J])(?!.*\b[A-J]\b)(?:[.,:)]+(.*))?")
# What an equation is about. NAME fits x_1=  P(A)=  ∠ABC=; not x+1=  5=
NAME = re.compile(r"(?!\d)[\w∠△ '\\{}()]+=")
# What math-verify can read. EXPRESSION fits 2\sqrt{3}  (x+1)^2  y=3!  two words; not \times3  1,2  两个
EXPRESSION = re.compile(r"(?![*/^!]|\\times|\\cdot)(?:\\[a-zA-Z\\]|[\w .+\-*/^(){}|!&=°±∞])+", re.A)
# The child's program: a fresh interpreter, which without torch is ready in a second. It answers each
# [seconds, pairs] twice, when it begins and when it knows. The watchdog is a thread in C: it ends the child
# in the middle of 9^{9^{9}}, and also when the parent is gone.
GRADING_PROCESS = r"""
import faulthandler, json, os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's
replies, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no reply
from math_verify import parse, verify
if sys.platform == "linux":
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))  # 2 GiB of memory
read = lambda text: parse(rf"\boxed{{{text}}}", parsing_timeout=None)
for line in sys.stdin:
    seconds, pairs = json.loads(line)
    faulthandler.dump_traceback_later(seconds, exit=True, file=open(os.devnull, "w"))
    print("begun", file=replies, flush=True)
    # decimals equal to 12 digits are the same
    same = all(verify(read(expected), read(given), 12, timeout_seconds=None) for given, expected in pairs)
    faulthandler.cancel_dump_traceback_later()
    print(same, file=replies, flush=True)
"""
GRADING_LOCK = threading.Lock()


def tidy(answer: str) -> str:
    r"""`answer` in one spelling: without \boxed, $, \text, spacing commands and a full stop at the end."""
    text = answer.translate(CHARACTERS)
    for pattern, replacement in TIDY_RULES:
        text = re.sub(pattern, replacement, text)
    return text.strip().rstrip(". ")


def parse_number(text: str) -> tuple[Fraction, str] | None:
    r"""(exact value, unit or "") of a tidied answer that is one number; else None.

    >>> parse_number("1,000.5"), parse_number(r"-\frac{2}{4}"), parse_number("12 cm^2"), parse_number("1/0")
    ((Fraction(2001, 2), ''), (Fraction(-1, 2), ''), (Fraction(12, 1), 'cm2'), None)
    """
    match = NUMBER.fullmatch(re.sub(r"^([+-]?)\\frac\{([^{}]*)\}\{([^{}]*)\}", r"\1\2/\3", text))
    if match:
        value, divisor = (Fraction((part or "1").replace(",", "")) for part in match.group(1, 2))
        return (value / divisor, match[3].replace("^", "")) if divisor else None


def same_by_rule(given: str, expected: str) -> bool | None:
    r"""The verdict of the cheap exact rules on two tidied answers; None if they leave it open.

    given        expected     verdict
    Yes          yes          True
    NO           No           True
    A circle     a circle     True
    R            r            None
    5 MW         5 mW         False
    B. 12 cm     B            True
    B. 12 cm     B. 15 cm     False
    12 cm        B            False
    4 2          42           False
    CBA          ABC          False
    1/2          0.50         True
    1/3          0.333        False
    50%          50           True
    50%          0.5          True
    0.5%         0.5          False
    12 cm        12           True
    12 cm        12 m         False
    5x           5            None
    2xy          2yx          None
    2\sqrt{3}    \sqrt{12}    None
    """
    # Case counts in symbols, not in words, which are capitalised or in capitals throughout.
    words = re.compile(r"(?<![\\\w])(?:[A-Z](?:[a-z]+|[A-Z]+)\b|A(?= [a-z]{3}))")
    fold = lambda text: words.sub(lambda m: m[0].lower(), text)
    if not given or fold(given) == fold(expected):
        return given != ""
    choices = [
        CHOICE.fullmatch(text.upper() if len(text) == 1 else text) for text in (given, expected)
    ]
    if any(choices):
        letters, texts = zip(*(choice.groups() if choice else (None, None) for choice in choices))
        return letters[0] == letters[1] and (not all(texts) or same_by_rule(*texts) is True)
    # math-verify reads "4 2" as 4 + 2, and CBA as a product, hence as ABC.
    if re.search(r"\d \d|^[a-zA-Z ]{2,}∨[a-zA-Z ]{2,}$", f"{given}∨{expected}"):
        return False
    numbers = parse_number(given), parse_number(expected)
    if not all(numbers):
        return None
    (value, unit), (other, other_unit) = sorted(
        numbers, key=lambda number: number[1]
    )  # no unit sorts first
    if not unit and other_unit == "%":
        return value == other / 100 or value == other and abs(value) > 1  # 0.5 is not 0.5%
    if unit == other_unit or not unit and UNIT.fullmatch(other_unit):
        return value == other
    return (
        False if unit and sorted(unit) != sorted(other_unit) else None
    )  # the same letters: variables?


def symbols(text: str) -> set[str] | None:
    r"""The variables, signs and = of one mathematical expression; None if `text` is anything else.

    >>> sorted(symbols(r"2\sqrt{3}x=\alpha"))
    ['=', '\\alpha', 'x']
    """
    if EXPRESSION.fullmatch(text):
        text = re.sub(r"\\(?:frac|sqrt|pi|sin|cos|tan|log|ln|times|cdot)(?![a-zA-Z])", " ", text)
        return set(re.findall(r"\\[a-zA-Z]+|[a-zA-Z=!°±∞]", text))


@functools.lru_cache(maxsize=1)
def grading_process(owner: int) -> subprocess.Popen:
    """The child that may hang or die on a hostile answer, started once. owner: this process's id, so that a
    fork starts its own."""
    pipes = dict(
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    return subprocess.Popen([sys.executable, "-c", GRADING_PROCESS], **pipes)


def same_by_algebra(pairs: list[tuple[str, str]]) -> bool:
    """math-verify's verdict: whether each pair is equal. Raises TimeoutError if the child is killed."""
    for _ in range(
        2
    ):  # again where the child was dead before it began, as by the out-of-memory killer
        with GRADING_LOCK:
            child = grading_process(os.getpid())
            with contextlib.suppress(OSError):
                print(json.dumps([GRADE_TIMEOUT, pairs]), file=child.stdin, flush=True)
            begun, verdict = child.stdout.readline(), child.stdout.readline()
            if verdict:
                return verdict == "True\n"
            grading_process.cache_clear()
            grading_process(os.getpid())  # its successor imports while the model works
        if begun:
            raise TimeoutError
    raise RuntimeError(
        f"the grading process does not start; try: {sys.executable} -c 'import math_verify'"
    )


@functools.lru_cache(maxsize=2**12)
def same_answer(given: str, expected: str) -> bool:
    """answers_match, remembered; a TimeoutError is not, for the machine may have been busy.

    What the rules leave open is compared piece by piece: (0.5, x+x) is (1/2, 2x)."""
    given, expected = tidy(given), tidy(expected)
    if (same := same_by_rule(given, expected)) is not None:
        return same
    pieces = [re.split("([,;∨<>≤≥≠≈→∈∪∩∥⊥])", text) for text in (given, expected)]
    questions = []  # for math-verify
    for pair in zip(*pieces):
        names = [NAME.match(text) for text in pair]
        if "=" not in pair[0] or "=" not in pair[1] or all(names) and names[0][0] == names[1][0]:
            # x=5 is 5, but y=5 is not x=5
            pair = [text[name.end() if name else 0 :].strip() for text, name in zip(pair, names)]
        same = pair[0] == pair[1] or same_by_rule(*pair)
        if same:
            continue
        # math-verify is asked only about expressions in the same symbols: prose has others. One of the two
        # may leave out a unit behind a digit, a bracket or \pi: 2\sqrt{3} cm is 2\sqrt{3}.
        bare = [re.sub(rf"(?<=[\d)}}i]) ?(?:{UNIT.pattern})$", "", text) for text in pair]
        candidates = [pair, (bare[0], pair[1]), (pair[0], bare[1])]
        alike = [c for c in candidates if symbols(c[0]) == symbols(c[1]) is not None]
        if same is False or not alike:
            return False
        questions.append(alike[0])
    return len(pieces[0]) == len(pieces[1]) and (not questions or same_by_algebra(questions))


def answers_match(given: str, expected: str) -> bool:
    """Whether two answers mean the same. Any strings will do; takes about GRADE_TIMEOUT at worst. Raises
    RuntimeError if no process with math-verify can be started: a silent "wrong" would be worse."""
    if max(len(given), len(expected)) > MAX_ANSWER_CHARS:
        return given.strip() == expected.strip() != ""
    try:
        return same_answer(given, expected)
    except TimeoutError:  # not shown to be right
        return False
