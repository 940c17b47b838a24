r"""Do two answers mean the same? `answers_match(given, expected)`; papo.py's reward asks no more of it.

Whoever wants to understand PAPO can leave this file closed. The way of a pair of answers:

    answers_match -> same_answer
        tidy              both in one spelling
        questions         same_by_rule: numbers, units, letters; exact, in microseconds; where it
                          does not know, again for each piece between commas and the like; then
        same_by_algebra   math-verify, in a child process that a hostile answer may hang or kill

A bare list of numbers is a set, as roots are: 1, 5 is 5, 1. Its order counts where it stands in
round or square brackets and where it fills numbered blanks: (1, 5); (1) 1 (2) 5; "1" over "5".
"""

import contextlib
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import unicodedata
from fractions import Fraction

GRADE_TIMEOUT = 3.0  # seconds math-verify gets for one answer, about a hundred times what it needs
MAX_ANSWER_CHARS = 1000  # a longer answer is right only if it is the very same string: bounds work

# tidy's tables; each arrow shows what tidy makes of it in the end. One spelling for characters that
# NFKC does not unite: −3 -> -3; 3∶4 -> 3:4; 9∘ -> 9°; 2√13 -> 2\sqrt{13}; 2π -> 2\pi; 1、2 -> 1,2
CHARACTERS = dict(zip("−–—。、∘∶⁄÷", "---.,°://")) | {"¢": " cents"}
NAMES = r"\pi \times \sqrt \alpha \beta \gamma \theta \lambda".split()
CHARACTERS = str.maketrans(CHARACTERS | dict(zip("π×√αβγθλ", (name + " " for name in NAMES))))
# ... what NFKC would lose: x² -> x^2; x₁ -> x_1; 2½ -> 2\frac{1}{2}; ①③ -> 1;3
MARKED = {"<super>": "^{%s}", "<sub>": "_{%s}", "<fraction>": " %s", "<circle>": "(%s)"}
# ... for words, each group by its first, with or without s: x\le 3 -> x≤3; 1 \lt x -> 1<x
# 3 \gt x -> 3>x; \tfrac12 -> \frac12; x=1且y=2 -> x=1,y=2; 20 ml -> 20 mL; 2 lbs -> 2 lb; 5元 -> 5yuan
WORDS = r"""≤ \leqslant \leq \le; ≥ \geqslant \geq \ge; < \lt; > \gt; ≠ \neq \ne; ≈ \approx; ∞ \infty;
→ \rightarrow \to; ∪ \cup \bigcup; ∩ \cap \bigcap; ∈ \in; ∠ \angle; △ \triangle \vartriangle; | \mid;
∥ \parallel; ⊥ \perp; ∅ \emptyset \varnothing; ± \pm; Ω \Omega; \pi pi; ∨ or 或; , and 和 且; \frac \dfrac \tfrac; ms;
\sin sin; \cos cos; \tan tan; \log log; \ln ln; cm centimeter centimetre 厘米; dm 分米; ft feet foot;
mm millimeter millimetre 毫米; km kilometer kilometre 千米 公里; m meter metre 米; in inches inch;
mL ml milliliter 毫升; L liter litre 升; h hour hr 小时; min minute 分钟; s second 秒; g gram 克;
kg kilogram 千克 公斤; lb pound; % percent; ° \circ degree \degree 度; dollars dollar USD $ \$;
sterling £ \pounds; euros € euro; yuan ¥ 元"""
WORDS = {word: group.split()[0] for group in WORDS.split(";") for word in group.split()}
WORD = r"\\?[a-zA-Z]+|小时|分钟|公[里斤]|毫升|[厘毫千分]?[米克]|[或和且秒度元升]"
TIDY_RULES = [  # ... and for patterns, in this order
    # \$5 -> 5 dollars; £5 -> 5 sterling; $5 -> 5 dollars
    (
        r"(\\\$|^\$(?=[^$]*$)|\\pounds|[£€¥]) ?(\d[\d.,]*)",
        lambda m: f"{m[2]} {WORDS[m[1]]} ",
    ),
    (r"(?<=\^\{.)\}\^\{", ""),  # 10⁻³ -> 10^{-3}
    (r"\{,\}|,\\!|(?<=\d)\\,(?=\d{3}(?!\d))", ","),  # 1{,}000 -> 1,000; 1\,000 -> 1,000
    # Blanks, with $ about each or a line for each: $$7$$ $$10$$ -> 7;10; $7$ $cm$ -> 7 cm
    (r"(?<=[\w})\].%])(?:\$+ +\$+|\$*\s*\n\s*\$*)(?=[^$\n]*\d)(?![\s\S]*\\end)", ";"),
    # \textbf{C} -> C; 5\text { km} -> 5 km; 8\mathrm \pi -> 8\pi
    (
        r"\\(?:text|math|mbox|number|rm|bf)[a-z]* ?(?:\{([^{}]*)\}|(?![a-zA-Z{]))",
        r" \1 ",
    ),
    (r" *([{}]) *", r"\1"),  # \frac { 1 } { 2 } -> \frac{1}{2}
    # Braces about nothing or one thing: 30{}^\circ -> 30°; {{x}^{2}} -> x^2; 5c{{m}^{2}} -> 5cm^2
    *[
        (
            r"(?:(?<![a-zA-Z\]}^_\\])|(?<=\d[cdkm]))\{((?:[^{}]|[\^_]\{[^{}]*\})*)\}",
            r"\1",
        )
    ]
    * 3,
    # \left.x\right| -> x|; \(5\) -> 5; $5$ -> 5; 5~cm -> 5 cm
    (
        r"\\(?:left|right) ?\.?(?![a-zA-Z])|\\(?:q?quad|displaystyle)(?![a-zA-Z])"
        r"|(?<!\\)\\[()\[\],;:! ]|\$|~|\s",
        " ",
    ),
    # \{\begin{array}{l}x=1\\y=2\end{array}. -> x=1,y=2
    (
        r"(?:\\\{ *)?\\begin\{(?:cases|array)\}(?:\{\w+\})?(.*?)\\end\{\w+\}",
        lambda m: m[1].replace(r"\\", ","),
    ),
    # 9 sq. m -> 9 m^2; 9立方m -> 9m^3
    (
        r"(?:(square|sq\b\.?|平方)|cubic|立方) ?([^\W\d_]+)",
        lambda m: f"{m[2]}^{3 - bool(m[1])}",
    ),
    # 2 hours -> 2 h
    (WORD, lambda m: WORDS.get(m[0]) or WORDS.get(m[0].removesuffix("s"), m[0])),
    # The answer is C -> C; Option C -> C; 答案：C -> C
    (
        r"(?i)^ *(?:the )?(?:answer|option|choice|答案|选项?)(?![a-z])(?: ?is|是|为)?[: ]*(?=.)",
        "",
    ),
    (r"(?<=[A-J])[, ]+(?=[A-J])", ""),  # A, C and D -> ACD
    # Labels: (1) 5 cm (2) 6 -> 5 cm;6; (2), (3) -> 2;3; 1.3.4. -> 1;3;4
    (r"^ *\(\d\).*\(\d\).*$", lambda m: unlabelled(m[0])),
    (r"^ *\d(?:\.\d){2,}(?=\.?$)", lambda m: m[0].replace(".", ";")),
    (r" +", " "),  # one stays, for 4 2 is not 42, but a list: 4  2 -> 4;2; 4,  200 -> 4, 200
    (r" ?([^\w\s,.]) ?", r"\1"),  # x + 1 = 3 -> x+1=3
    (r"\\?sqrt ?(?:\(([^()]*)\)|(\d+(?:\.\d+)?|\w))", r"\\sqrt{\1\2}"),  # sqrt(3) -> \sqrt{3}
    (r"(?<=\d)\^\{?[°o]\}?|\^\{?°\}?", "°"),  # 30^{\circ} -> 30°; 30^o -> 30°
    (r"([\^_])\{(\w)\}", r"\1\2"),  # x^{2} -> x^2; a_{n} -> a_n
    (r"(\d) (\d+)/(\d+)", r"\1\\frac{\2}{\3}"),  # 1 1/2 -> 1\frac{1}{2}, as ½ arrives
    (r"(?<=\d) (?=\d)", ";"),
    # P(1,2) -> (1,2); \pi \approx 3.14 -> \pi; +\infty -> ∞; 5\% -> 5%
    (r"^[A-Z](?=\(.*,.*\)$)|(?<=.)≈[\d.]+$|\+(?=∞)|\\(?=%)", ""),
    (r"^\\\{[^|,<>≤≥]+\|(.*)\\\}$", r"\1"),  # \{x|x<2\} -> x<2
    (r"^[(\[]([^()\[\],;<>≤≥]*)[)\]]$", r"\1"),  # [40] -> 40; (e) -> e
    (r"^[^<>≤≥≠]*$", lambda m: m[0].replace("∨", ",")),  # 1 or 2 -> 1,2; x<1 or x>2 -> x<1∨x>2
]
# The patterns: what each fits and does not, with two spaces between the examples.
# NUMBER fits 5  -1,000.5  .5  1e3  2/4  50%  12 cm^2  9 km/h  5x; not 5,00  4 2  x5  2\pi
DECIMAL = r"[+-]?(?=\.?\d)(?:\d{1,3}(?:,\d{3})+|\d*)(?:\.\d*)?(?:[eE][+-]?\d{1,3})?"
UNITS = r"((?:(?:[^\W\d_]|[%°])+(?:[ /][a-zA-Z]+)*(?:\^?[23])?)?)"
NUMBER = re.compile(rf"({DECIMAL})(?:/({DECIMAL}))? ?{UNITS}")
# A measure or what is counted: may be left out. UNIT fits m^2  km/h  °C  apples  元; not x  trillion
MEASURE = r"°[CF]?|[cdkm]?m|in|ft|mi|yd|lb|k?g|h|s|min|m?L|mph|mol|[kM]?(?:Hz|Pa|J|W)|[NVAKΩ]"
COUNTED = r"(?![a-z]*illion|thousand|hundred|dozen|hal[fv]|third|[efnst][a-z]*ths|cubed)[a-z]{4,}"
COUNTED += r"|(?![万亿千百十成折多倍])[一-鿿]{1,2}"
UNIT = re.compile(rf"(?:{MEASURE}|{COUNTED})(?:/(?:{MEASURE}))?(?:\^?[23])?")
# A letter of a multiple choice, and its text. CHOICE fits B  B),  B.  B: 12 cm; not (C  AB  B 12
CHOICE = re.compile(r"\(?([A-J])(?!.*\b[A-J]\b)(?:[.,:)]+ ?(.*))?")
# What an equation is about, if it says what that is. NAME fits x_1=5  P(A)=x  ∠ABC=2x  x∈[1,2)
# NAME fits S_{△ABC}=5; not x+1=6  5=5  EB=BD  ∠1=∠2  \sum_{i=1}^n i
NAME = re.compile(r"((?!\d)(?:[\w∠△ '\\()]|\{[^{}=]*\})+[=∈])(?! ?[a-zA-Z ]+$)([^∠△=]+)")
# What math-verify can read. EXPRESSION fits 2\sqrt{3}  (x+1)^2  y=3!  2ab; not \times3  1,2  两个
# EXPRESSION fits \sum_{i=1}^n i; not N 30 E  two words  _{i=1}^n i
EXPRESSION = re.compile(
    r"(?![*/^!_]|\\times|\\cdot)(?!.*(?<![\\a-zA-Z{])[a-zA-Z]+(?:(?<=[a-zA-Z]{4})| ?\d))"
    r"(?:\\[a-zA-Z\\]|[\w .+\-*/^(){}|!&=°±∞])+",
    re.A,
)
# The child's program: a fresh interpreter, which without torch is ready in a second. It answers
# each [seconds, pairs] twice, when it begins and when it knows. The watchdog is a thread in C: it
# ends the child in the middle of 9^{9^{9}}, and also when the parent is gone.
GRADING_PROCESS = r"""
import sys
sys.path.remove("")  # the current folder: its random.py is none of ours
import faulthandler, json, os, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's
replies, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no reply
from math_verify import parse, verify
if sys.platform == "linux":
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))  # 2 GiB of memory
def same(*pair):
    read = [parse(rf"\boxed{{{text}}}", parsing_timeout=None) for text in pair]
    values = [found[0] for found in read if found and getattr(found[0], "is_number", False)]
    if len(values) == 2 and all(value.is_finite for value in values):  # equal to 12 digits
        size = max(abs(value.evalf(30)) for value in values)
        return bool(abs((values[0] - values[1]).evalf(30)) <= size / 10**12)
    return verify(read[1], read[0], 12, timeout_seconds=None)
for line in sys.stdin:
    seconds, pairs = json.loads(line)
    faulthandler.dump_traceback_later(seconds, exit=True, file=open(os.devnull, "w"))
    print("begun", file=replies, flush=True)
    verdict = all(same(*pair) for pair in pairs)
    faulthandler.cancel_dump_traceback_later()
    print(verdict, file=replies, flush=True)
"""
GRADING_LOCK = threading.Lock()


def unwrapped(answer: str) -> str:
    r"""`answer` without what other data sets write about it.

    >>> unwrapped("6 x 12 = 72 #### 72"), unwrapped(r"<think>4?</think> <answer>\boxed{3}</answer>")
    (' 72', '3')
    """
    for opener, end in ("</think>", "$^"), ("<answer>", "</answer>"), ("####", "\n"):
        if opener in answer:
            answer = re.split(end, answer.rpartition(opener)[2])[0]
    _, boxed, inside = answer.rpartition(r"\boxed{")
    depths = itertools.accumulate((char == "{") - (char == "}") for char in inside)
    return inside[: next((i for i, d in enumerate(depths) if d < 0), None)] if boxed else answer


def unlabelled(text: str) -> str:
    """The contents of blanks (1) (2) (3), or the numbers of statements, with ; between them."""
    start, *rest = re.split(r"[,; ]*(?<![a-zA-Z])\((\d)\)[,; ]*", text)
    labels, contents = rest[::2], rest[1::2]
    if start == "" and not any(contents):
        return ";".join(labels)
    numbered = labels == [str(i + 1) for i in range(len(labels))]
    return ";".join(contents) if start == "" and all(contents) and numbered else text


def tidy(answer: str) -> str:
    r"""`answer` in one spelling: without $, \text, spacing commands and a full stop at the end."""
    if not answer.isascii():  # Cf: zero-width spaces, direction marks, soft hyphens
        kind = lambda char: unicodedata.decomposition(char).split(" ")[0]
        kept = [char for char in answer if unicodedata.category(char) != "Cf"]
        marked = "".join(MARKED.get(kind(char), "%s") % char for char in kept)
        answer = unicodedata.normalize("NFKC", marked).translate(CHARACTERS)
    for pattern, replacement in TIDY_RULES:
        answer = re.sub(pattern, replacement, answer)
    return answer.strip().rstrip(". ")


def parse_number(text: str) -> tuple[Fraction, str] | None:
    r"""(exact value, unit or "") of a tidied answer that is one number; else None.

    >>> parse_number("1,000.5"), parse_number(r"-\frac{2}{4}"), parse_number("12 cm^2")
    ((Fraction(2001, 2), ''), (Fraction(-1, 2), ''), (Fraction(12, 1), 'cm2'))
    """
    match = NUMBER.fullmatch(re.sub(r"^([+-]?)\\frac\{([^{}]*)\}\{([^{}]*)\}", r"\1\2/\3", text))
    if match:
        value, divisor = (Fraction((part or "1").replace(",", "")) for part in match.group(1, 2))
        return (value / divisor, match[3].replace("^", "")) if divisor else None


def equal(value: Fraction, other: Fraction) -> bool:
    """Exactly; to 12 digits where one of them has no exact decimal, as 3/11 has none."""
    endless = any(pow(10, 2000, number.denominator) for number in (value, other))
    return value == other or endless and abs(value - other) * 10**12 < abs(other)


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
    B. 12 cm     12           True
    12 cm        B            False
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
    pair = [text.upper() if len(text) == 1 else text for text in (given, expected)]
    choices = [CHOICE.fullmatch(text) for text in pair]
    if any(choices):
        letters, texts = zip(*(c.groups() if c else (None, text) for c, text in zip(choices, pair)))
        same = all(texts) and same_by_rule(*texts) is True
        return same if None in letters else letters[0] == letters[1] and (same or not all(texts))
    if re.fullmatch(r"[a-zA-Z ]{2,}∨[a-zA-Z ]{2,}", f"{given}∨{expected}"):
        return False  # math-verify reads CBA as a product, hence as ABC
    numbers = parse_number(given), parse_number(expected)
    if not all(numbers):
        return None
    # no unit sorts first
    (value, unit), (other, other_unit) = sorted(numbers, key=lambda number: number[1])
    if not unit and other_unit == "%":
        return value == other / 100 or value == other and abs(value) > 1  # 0.5 is not 0.5%
    if unit == other_unit or not unit and UNIT.fullmatch(other_unit):
        return equal(value, other)
    # the same letters: variables?
    return False if unit and sorted(unit) != sorted(other_unit) else None


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
    """The child that may hang or die on a hostile answer, started once. owner: this process's id,
    so that a fork starts its own."""
    pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE) | {"stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "-c", GRADING_PROCESS], text=True, **pipes)


def same_by_algebra(pairs: list[tuple[str, str]]) -> bool:
    """math-verify: whether each pair is equal. Raises TimeoutError if the child is killed."""
    for _ in range(2):  # again where the child was dead before it began, as for want of memory
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
    command = f"{sys.executable} -c 'import math_verify'"
    raise RuntimeError(f"the grading process does not start; try: {command}")


def split(text: str, separators: str) -> tuple[list[str], str]:
    """The pieces of `text` between `separators` outside of brackets, and what separates them. The
    separator "" finds text of unbalanced brackets: it has no pieces."""
    pieces, found, depth = [""], "", 0
    for token in re.findall(r"\d{1,3}(?:,\d{3})+(?!\d)|.", text, re.S):
        depth += (token in "([{") - (token in ")]}")
        if depth < 0:
            return [], ""
        if depth == 0 and token in separators:
            found, token = found + token, ""
            pieces.append("")
        pieces[-1] += token
    return ([] if depth else [piece.strip() for piece in pieces]), found


def as_interval(text: str) -> str:
    r"""Inequalities about a name, as intervals: -4<m≤0 -> (-4,0]; x<1∨x>2 -> (-∞,1)∪(2,∞)."""
    intervals = []
    for chain in text.split("∨"):
        parts = re.split("([<>≤≥])", chain)
        if ">" in parts or "≥" in parts:
            parts = [part.translate(str.maketrans("<>≤≥", "><≥≤")) for part in reversed(parts)]
        match = re.fullmatch(
            r"(?:([^<≤]+)([<≤]))?\\?[^\W\d]\w*(?:([<≤])([^<≤]+))?", "".join(parts)
        )
        if not match:
            return text
        low, left, right, high = match.groups()
        brackets = "[" if left == "≤" else "(", "]" if right == "≤" else ")"
        intervals.append(f"{brackets[0]}{low or '-∞'},{high or '∞'}{brackets[1]}")
    return "∪".join(intervals)


def unnamed(given: str, expected: str) -> tuple[str, str]:
    """Without the name of what they are about, if only one has it or both the same: x=5 is 5, but
    y=5 is not x=5."""
    names = [NAME.fullmatch(text) for text in (given, expected)]
    if all(names) and names[0][1] == names[1][1]:
        return names[0][2].strip(), names[1][2].strip()
    if names[0] and not re.search("[=∈]", expected):
        return names[0][2].strip(), expected
    if names[1] and not re.search("[=∈]", given):
        return given, names[1][2].strip()
    return given, expected


# Ways to write that are made alike where only one side has them: x>3 is (3,∞), 1:2 is 1/2, ±2 is
# +2, -2.
ONE_SIDED = {
    "[<>≤≥]": as_interval,
    ":": lambda text: text.replace(":", "/"),
    "±": lambda text: ",".join(text.replace("±", sign) for sign in "+-"),
}


def questions(given, expected, ordered=None) -> list[tuple[str, str]] | None:
    """What is left to ask math-verify about two tidied answers; None if they are not the same."""
    pair = given, expected = unnamed(given, expected)
    same = given == expected or same_by_rule(given, expected)
    if same is not None:
        return [] if same else None
    for sign, convert in ONE_SIDED.items():
        if len(found := [text for text in pair if re.search(sign, text)]) == 1:
            pair = tuple(convert(text) if text == found[0] else text for text in pair)
    if pair != (given, expected):
        return questions(*pair, ordered)
    for separators in (",;∨", "∪∩", "<>≤≥≠≈→∈∥⊥"):
        (pieces, signs), (others, other_signs) = (split(text, separators) for text in pair)
        if signs or other_signs:
            break
    else:
        brackets = [re.fullmatch(r"(\\\{|[(\[])(.*,.*?)(\\\}|[)\]])", text) for text in pair]
        if all(brackets) and all(split(match[2], "")[0] for match in brackets):
            if brackets[0].group(1, 3) != brackets[1].group(1, 3):
                return None
            return questions(brackets[0][2], brackets[1][2], brackets[0][1] != r"\{")
        if not re.search("sin|cos|tan", given + expected):
            pair = [text.replace("°", "") for text in pair]
        # math-verify is asked only about expressions in the same symbols: prose has others. One of
        # the two may leave out a unit behind a digit, a bracket or \pi: 2\sqrt{3} cm is 2\sqrt{3}.
        bare = [re.sub(rf"(?<=[\d)}}i]) ?(?:{UNIT.pattern})$", "", text) for text in pair]
        bare = pair if re.search("sin|cos|tan", given + expected) else bare
        candidates = [(pair[0], pair[1]), (bare[0], pair[1]), (pair[0], bare[1])]
        alike = [c for c in candidates if symbols(c[0]) == symbols(c[1]) is not None]
        return alike[:1] or None
    if signs.replace(";", ",") != other_signs.replace(";", ","):
        return None
    if ordered is None:
        values = all(re.search(r"\d|\\pi", piece) for piece in pieces)
        ordered = len(set(signs + other_signs)) > 1 or signs[0] not in ("∨∪∩," if values else "∨∪∩")
    if not ordered and len(pieces) < 20:
        for piece in pieces[:]:
            for other in others:
                if piece == other or same_by_rule(*unnamed(piece, other)):
                    pieces.remove(piece)
                    others.remove(other)
                    break
        if len(pieces) > 1 and "=" not in given and all(map(EXPRESSION.fullmatch, pieces + others)):
            return [(r"\{" + ",".join(pieces) + r"\}", r"\{" + ",".join(others) + r"\}")]
    asked = [questions(*both) for both in zip(pieces, others)]
    return None if None in asked else sum(asked, [])


@functools.lru_cache(maxsize=2**12)
def same_answer(given: str, expected: str) -> bool:
    """answers_match, remembered; a TimeoutError is not, for the machine may have been busy."""
    given, expected = tidy(given), tidy(expected)
    if given == expected:
        return given != ""
    if not split(given, "")[0] or not split(expected, "")[0]:
        return False
    asked = questions(given, expected)
    return asked is not None and (not asked or same_by_algebra(asked))


def answers_match(given: str, expected: str) -> bool:
    """Whether two answers mean the same. Any strings will do; takes about GRADE_TIMEOUT at worst.
    Raises RuntimeError if no process with math-verify can be started: a silent "wrong" would be
    worse."""
    given, expected = unwrapped(given), unwrapped(expected)
    if max(len(given), len(expected)) > MAX_ANSWER_CHARS:
        return given.strip() == expected.strip() != ""
    try:
        return same_answer(given, expected)
    except (TimeoutError, RecursionError):  # not shown to be right
        return False
