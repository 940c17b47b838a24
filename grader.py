r"""Do two answers mean the same? answers_match(given, expected). PAPO is understood without it.

    tidy              both in one spelling
    same_by_rule      numbers, units, letters: exact, in microseconds; where it does not know,
    questions         the same for each piece between commas and the like; what stays open:
    same_by_algebra   math-verify, in a child process that a hostile answer may hang or kill

A bare list of numbers is a set, as roots are: 1, 5 is 5, 1. Order counts in (1, 5) and [1, 5] and
where numbers fill blanks: (1) 1 (2) 5, or a line for each."""

import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import threading
from fractions import Fraction
from unicodedata import category, decomposition, normalize

GRADE_TIMEOUT = 3.0  # seconds math-verify gets for one answer, about a hundred times what it needs
MAX_ANSWER_CHARS = 1000  # a longer answer is right only if, tidied, it is the same: bounds work

# The wrappings of other data sets: #### 72 -> 72; <think>2</think> <answer>3</answer> -> 3
WRAPPINGS = ("</think>", "\0"), ("<answer>", "</answer>"), ("####", "\n"), (r"\boxed{", "}")
# tidy's tables; each arrow shows what tidy makes of it in the end. What NFKC would lose: x² -> x^2
# 2½ -> 2\frac{1}{2}; ①③ -> 1;3; 2⁻³ -> 2^{-3}; and what it leaves: −3 -> -3; 9∘ -> 9°; πx -> \pi x
MARKED = {"<super>": "^{%s}", "<sub>": "_{%s}", "<fraction>": " %s", "<circle>": "(%s)"}
COMMANDS = r"\pi |\times |\sqrt |\alpha |\beta |\gamma |\theta |\lambda | cents".split("|")
CHARACTERS = dict(zip("−–—。、∘∶⁄÷", "---.,°://")) | dict(zip("π×√αβγθλ¢", COMMANDS))
# ... words, each group by its first, with or without s: 2 lbs -> 2 lb; 5元 -> 5yuan; x且y -> x,y
WORDS = r"""≤ \leqslant \leq \le; ≥ \geqslant \geq \ge; < \lt; > \gt; ≠ \neq \ne; ≈ \approx; | \mid;
→ \rightarrow \to; ∪ \cup \bigcup; ∩ \cap \bigcap; ∈ \in; ∠ \angle; △ \triangle; ± \pm; ∥ \parallel;
⊥ \perp; ∅ \emptyset \varnothing; ∞ \infty; Ω \Omega; ∨ or 或; , and 和 且; \sin sin; \cos cos;
\tan tan; \pi pi; \frac \dfrac \tfrac; ° \circ degree \degree 度; % percent; ft foot feet;
cm centimeter centimetre 厘米; mm millimeter millimetre 毫米; m meter metre 米; ms; dm 分米;
km kilometer kilometre 千米; mL ml milliliter 毫升; L liter; kg kilogram 千克; g gram 克;
h hour hr 小时; min minute 分钟; s second 秒; in inch inches; lb pound £ \pounds; dollars $ \$;
euros €; yuan ¥ 元"""
WORDS = {word: group.split()[0] for group in WORDS.split(";") for word in group.split()}
WORD = r"\\?[a-zA-Z]+|小时|分钟|毫升|[厘毫千分]?[米克]|[或和且秒度元]"
BRACES = r"(?:(?<![a-zA-Z\]}^_\\])|(?<=\d[cdkm]))\{((?:[^{}]|[\^_]\{[^{}]*\})*)\}", r"\1"
SPACES = r"\\(?:left\b|right\b|q?quad|displaystyle(?![a-z]))\.?|(?<!\\)\\[()\[\],;:! ]|\$|~|\s"
INEQUALITY = r"(?<![^,;∨])(?=[^,;∨]*[<≤])(?:([^<≤,;∨]+)([<≤]))?(\\?[^\W\d]\w*)"
INEQUALITY += r"(?:([<≤])([^<≤,;∨]+))?(?![^,;∨])"
IN, OUT = {None: "(", "<": "(", "≤": "["}, {None: ")", "<": ")", "≤": "]"}
FLIP = str.maketrans(">≥<≤", "<≤>≥")
PREFIX = r"(?i)^ *(?:the )?(?:answer|option|choice|答案|选项?)(?![a-z])(?: ?is|是|为)?[: ]*(?=.)"
TIDY_RULES = [  # ... and patterns, in this order
    # \$5 -> 5 dollars; £5 -> 5 lb; $5 -> 5 dollars
    (r"(\\\$|^\$(?=[^$]*$)|[£€¥]) ?(\d[\d.,]*)", lambda m: f"{m[2]} {WORDS[m[1]]} "),
    (r"\{,\}|,\\!|(?<=\d)\\,(?=\d{3}(?!\d))", ","),  # 1{,}000 -> 1,000; 1\,000 -> 1,000
    # Blanks, each in its $ or on its line: $$\sqrt{2}$$ $$-3$$ -> \sqrt{2};-3; $7$ $cm$ -> 7 cm
    (r"(?<=[\w})\].%])(?:\$+ +\$+|\$*\s*\n\s*\$*)(?=[^$\n]*\d)(?![\s\S]*\\end)", ";"),
    # \textbf{C} -> C; 5\text { km} -> 5 km; 8\mathrm \pi -> 8\pi; \frac {1} {2} -> \frac{1}{2}
    (r"\\(?:text|math|mbox|number|rm|bf)[a-z]* ?(?:\{([^{}]*)\}|(?![a-zA-Z{]))", r" \1 "),
    (r"(?<=\^\{.)\}\^\{| *([{}]) *", r"\1"),
    *[BRACES] * 2,  # 30{}^\circ -> 30°; {{x}^{2}} -> x^2; 5c{{m}^{2}} -> 5cm^2
    (SPACES, " "),  # \left.x\right| -> x|; \(5\) -> 5; $5$ -> 5; 5~cm -> 5 cm
    (r"(\\\{)?\\begin\{(cases|array)\}(\{\w+\})?(.*)\\end.*", lambda m: m[4].replace(r"\\", ",")),
    # \begin{cases}x\\y\end{cases} -> x,y; 9 sq. m -> 9 m^2; 9立方m -> 9m^3; 2 hours -> 2 h
    (r"(?:square|sq\b\.?|平方|(cubic|立方)) ?([^\W\d_]+)", lambda m: f"{m[2]}^{2 + bool(m[1])}"),
    (WORD, lambda m: WORDS.get(m[0]) or WORDS.get(m[0].removesuffix("s"), m[0])),
    (PREFIX, ""),  # The answer is C -> C; Option C -> C; 答案：C -> C
    (r"(?<=[A-J])[, ]+(?=[A-J])", ""),  # A, C and D -> ACD
    # Statements and numbered blanks: (2), (3) -> 2;3; 1.3.4. -> 1;3;4; (1) 5 cm (2) 6 -> 5 cm;6
    (r"^ *(?:\(\d\)[,; ]*){2,}$|^\d(?:\.\d){2,}\.?$", lambda m: ";".join(re.findall(r"\d", m[0]))),
    (r"^ *\(1\).+\(2\).+$", lambda m: re.sub(r"[,; ]*\(\d\)[,; ]*", ";", m[0]).strip(";")),
    (r"^ +| +$|(?<= ) +", ""),  # one stays, for 4 2 is not 42 but a list: 4  2 -> 4;2
    (r" ?([^\w\s,.]) ?", r"\1"),  # x + 1 = 3 -> x+1=3
    (r"\\?sqrt ?(?:\(([^()]*)\)|(\d+(?:\.\d+)?|\w))", r"\\sqrt{\1\2}"),  # sqrt(3) -> \sqrt{3}
    (r"(?<=\d)\^\{?[°o]\}?|\^\{?°\}?", "°"),  # 30^{\circ} -> 30°; 30º -> 30°
    (r"([\^_])\{(\w)\}", r"\1\2"),  # x^{2} -> x^2; a_{n} -> a_n
    (r"(\d) (\d+)/(\d+)", r"\1\\frac{\2}{\3}"),  # 1 1/2 -> 1\frac{1}{2}
    (r"(?<=\d)(?<![\^_]\d) (?=\d)", ";"),
    # P(1,2) -> (1,2); \pi \approx 3.14 -> \pi; +\infty -> ∞; 5\% -> 5%
    (r"^[A-Z](?=\(.*,.*\)$)|(?<=.)≈[\d.]+$|\+(?=∞)|\\(?=%)", ""),
    # \{x|x+1<2\} -> x+1<2; [40] -> 40; (e) -> e
    (r"^\\\{\w(?:∈[^|]+)?\|(.*)\\\}$|^[(\[]([^()\[\],;]*)[)\]]$", r"\1\2"),
    # 3>x\ge 1 -> x∈[1,3); x>2 or x<1 -> x∈(2,∞)∪x∈(-∞,1); 1 or 2 -> 1,2
    (r"[^,;∨]+[>≥][^,;∨]+", lambda m: "".join(re.split("([<>≤≥])", m[0])[::-1]).translate(FLIP)),
    (INEQUALITY, lambda m: f"{m[3]}∈{IN[m[2]]}{m[1] or '-∞'},{m[5] or '∞'}{OUT[m[4]]}"),
    (r"(?<=[)\]])∨", "∪"),
    (r"^[^≠]*$", lambda m: m[0].replace("∨", ",")),
]
TIDY_RULES = [(re.compile(pattern), replacement) for pattern, replacement in TIDY_RULES]
# The patterns; tests/test_grader.py shows what each fits and does not.
DECIMAL = r"[+-]?(?=\.?\d)(?:\d{1,3}(?:,\d{3})+|\d*)(?:\.\d*)?(?:[eE][+-]?\d{1,3})?"
NUMBER = rf"({DECIMAL})(?:/({DECIMAL}))? ?((?:(?:[^\W\d_]|[%°])+(?:[ /][a-zA-Z]+)*(?:\^?[23])?)?)"
NUMBER = re.compile(NUMBER)
MEASURE = r"°[CF]?|[cdkm]?m|in|ft|mi|yd|lb|k?g|h|s|min|m?L|mph|mol|[kM]?(?:Hz|Pa|J|W)|[NVAKΩ]"
COUNTED = r"(?![a-z]*illion|thousand|hundred|dozen|hal[fv]|third|[efnst][a-z]*ths|cubed)[a-z]{4,}"
COUNTED += r"|(?![万亿千百十成折多倍])[一-鿿]{1,2}"
UNIT = re.compile(rf"(?:{MEASURE}|{COUNTED})(?:/(?:{MEASURE}))?(?:\^?[23])?")  # may be left out
CHOICE = re.compile(r"\(?([A-J])(?!.*\b[A-J]\b)(?:[.,:)]+ ?(.*))?")  # and the text of the option
NAME = re.compile(r"((?!\d)(?:[\w∠△ '\\()]|\{[^{}=]*\})+[=∈])(?! ?[a-zA-Z ]+$)([^∠△=]+)")  # x=5
PROSE = r"[*/^!_]|\\times|\\cdot|[a-zA-Z ]+$|.*(?<![\\a-zA-Z{])[a-zA-Z]+((?<=[a-zA-Z]{4})| ?\d)"
EXPRESSION = re.compile(rf"(?!{PROSE})(?:\\[a-zA-Z\\]|[\w .+\-*/^(){{}}|!&=°±∞])+", re.A)
FUNCTION = r"\\(?:frac|sqrt|pi|sin|cos|tan|log|ln|times|cdot)(?![a-zA-Z])"
SYMBOL = re.compile(FUNCTION + r"|(\\[a-zA-Z]+|[a-zA-Z](?:\([^()]*\)(?==))?|[=!°±∞])")  # x, f(1)=
# The child answers each [seconds, pairs] when it begins and when it knows. The watchdog, a thread
# in C, ends it in the middle of \sin(9^{9^{9}}) and when the parent is gone.
GRADING_PROCESS = r"""
import sys; sys.path.remove("")  # the current folder: a random.py there is the user's own
import faulthandler, json, os, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's
replies, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no reply
from math_verify import parse, verify
if sys.platform == "linux":  # 2 GiB of memory
    import resource; resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
def same(pair):  # numbers and decimals in expressions: to 12 digits
    read = [parse(rf"\boxed{{{text}}}", parsing_timeout=None) for text in pair]
    if min(map(len, read)) < 2: return False  # not understood
    values = [found[0] for found in read if getattr(found[0], "is_number", False)]
    if len(values) < 2 or not all(value.is_finite for value in values):
        return verify(*read[::-1], 12, timeout_seconds=None)
    return bool(abs((values[0] - values[1]).evalf(30)) <= abs(values[1].evalf(30)) / 10**12)
for line in sys.stdin:
    seconds, pairs = json.loads(line)
    faulthandler.dump_traceback_later(seconds, exit=True, file=open(os.devnull, "w"))
    print("begun", file=replies, flush=True)
    print(all(map(same, pairs)), file=replies, flush=True)
    faulthandler.cancel_dump_traceback_later()
"""
GRADING_LOCK = threading.Lock()


def tidy(answer: str) -> str:
    r"""`answer` in one spelling: without wrappings, $, \text and a full stop at the end."""
    for opener, closer in WRAPPINGS:
        _, found, inside = answer.rpartition(opener)
        answer = (inside.rpartition(closer)[0] or inside) if found else answer
    if len(answer) > MAX_ANSWER_CHARS:
        return answer.strip()
    if not answer.isascii():
        kept = [char for char in answer if category(char) != "Cf"]  # no zero-width spaces, marks
        marked = [MARKED.get(decomposition(char).split(" ")[0], "%s") % char for char in kept]
        answer = normalize("NFKC", "".join(marked)).translate(str.maketrans(CHARACTERS))
    for pattern, replacement in TIDY_RULES:
        answer = pattern.sub(replacement, answer)
    return answer.strip().rstrip(". ")


def parse_number(text: str) -> tuple[Fraction, str] | None:
    """(exact value, unit or "") of a tidied answer that is one number; else None."""
    match = NUMBER.fullmatch(re.sub(r"^([+-]?)\\frac\{([^{}]*)\}\{([^{}]*)\}", r"\1\2/\3", text))
    if match:
        value, divisor = (Fraction((part or "1").replace(",", "")) for part in match.group(1, 2))
        return (value / divisor, match[3].replace("^", "")) if divisor else None


def same_by_rule(given: str, expected: str) -> bool | None:
    """The verdict of the cheap exact rules on two tidied answers; None if they leave it open."""
    # Case counts in symbols, not in words, which are capitalised or in capitals throughout.
    words = r"(?<![\\\w])(?:[A-Z](?:[a-z]+|[A-Z]+)\b|A(?= [a-z]{3}))"
    fold = lambda text: re.sub(words, lambda m: m[0].lower(), text)
    if not given or fold(given) == fold(expected):
        return given != ""
    pair = [text.upper() if len(text) == 1 else text for text in (given, expected)]
    choices = [CHOICE.fullmatch(text) for text in pair]
    if any(choices):
        letters, texts = zip(*(c.groups() if c else (None, text) for c, text in zip(choices, pair)))
        same = all(texts) and same_by_rule(*texts) is True
        return same if None in letters else letters[0] == letters[1] and (same or not all(texts))
    if not all(numbers := [parse_number(given), parse_number(expected)]):
        return None
    (value, unit), (other, other_unit) = sorted(numbers, key=lambda number: number[1])  # "" first
    if not unit and other_unit == "%":
        return value == other / 100 or value == other and abs(value) > 1  # 0.5 is not 0.5%
    if unit == other_unit or not unit and UNIT.fullmatch(other_unit):
        endless = any(pow(10, 2000, number.denominator) for number in (value, other))  # as 3/11
        return value == other or endless and abs(value - other) * 10**12 < abs(other)
    return None if not unit or sorted(unit) == sorted(other_unit) else False  # 2xy is 2yx


@functools.lru_cache(maxsize=1)
def grading_process(owner: int) -> subprocess.Popen:
    """The child, started once. owner: this process's id, so that a fork starts its own."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
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
    raise RuntimeError(f"grading does not start; try: {sys.executable} -c 'import math_verify'")


def split(text: str, separators: str) -> tuple[list[str], str]:
    """What lies between `separators` outside of brackets, and which; [] if brackets mismatch."""
    pieces, found, depth = [""], "", 0
    for token in re.findall(r"\d{1,3}(?:,\d{3})+(?!\d)|.", text):
        depth += depth >= 0 and (token in "([{") - (token in ")]}")
        if depth == 0 and token in separators:
            pieces, found, token = [*pieces, ""], found + token, ""
        pieces[-1] = (pieces[-1] + token).lstrip()
    return [] if depth else pieces, found


@functools.lru_cache(maxsize=2**12)
def questions(given: str, expected: str, ordered=False) -> tuple[tuple[str, str], ...] | None:
    """What is left to ask math-verify about two tidied answers; None if they are not the same."""
    pair, names = [given, expected], [NAME.fullmatch(text) for text in (given, expected)]
    # A name may be left out, or is the same: x=5 is 5, and y=5 is not x=5
    if all(names) and names[0][1] == names[1][1] or not all(re.search("[=∈]", t) for t in pair):
        pair = [name[2].strip() if name else text for name, text in zip(names, pair)]
    same = pair[0] == pair[1] or same_by_rule(*pair)
    if same is not None or not all(split(text, "")[0] for text in pair):
        return () if same else None
    # Where only one of them has it: 1:2 is 1/2; ±2 is +2, -2
    signs = lambda text: ",".join(text.replace("±", sign) for sign in "+-")
    for sign, convert in (":", lambda text: text.replace(":", "/")), ("±", signs):
        if sum(sign in text for text in pair) == 1:
            return questions(*(convert(t) if sign in t else t for t in pair), ordered)
    for separators in (",;∨", "∪∩", "<≤≠≈→∈∥⊥"):
        (pieces, signs), (others, other_signs) = (split(text, separators) for text in pair)
        if signs or other_signs:
            break
    else:
        brackets = [re.fullmatch(r"(\\\{|[(\[])(.*,.*?)(\\\}|[)\]])", text) for text in pair]
        if all(brackets) and all(split(match[2], "")[0] for match in brackets):
            same = brackets[0].group(1, 3) == brackets[1].group(1, 3)
            return questions(*(m[2] for m in brackets), brackets[0][1] != r"\{") if same else None
        # math-verify is asked only about the same symbols: prose has others. It reads degrees as
        # radians. One of the two may leave out a unit behind a digit, a bracket or \pi.
        angle = r"(\1\\pi/180)" if re.search("sin|cos|tan", given + expected) else r"\1"
        pair = [re.sub(r"(\d[\d.]*)°", angle, text) for text in pair]
        bare = [re.sub(rf"(?<=[\d)}}i]) ?(?:{UNIT.pattern})$", "", text) for text in pair]
        units = {text[len(rest) :].strip() for text, rest in zip(pair, bare)}
        tries = [pair, (bare[0], pair[1]), (pair[0], bare[1])] if len({*units, ""}) < 3 else []
        symbols = lambda text: EXPRESSION.fullmatch(text) and {*SYMBOL.findall(text), ""} or {text}
        return tuple(tuple(t) for t in tries if symbols(t[0]) == symbols(t[1]))[:1] or None
    if signs.replace(";", ",") != other_signs.replace(";", ","):
        return None
    one = len({*signs, *other_signs}) == 1 and signs[0] in ",∨∪∩" and re.search(r"\d", given)
    for piece in pieces[:20] if one and not ordered else []:  # a set
        if match := [other for other in others if questions(piece, other) == ()]:
            pieces.remove(piece), others.remove(match[0])
    asked = [questions(*both) for both in zip(pieces, others)]
    return None if None in asked else sum(asked, ())


@functools.lru_cache(maxsize=2**12)
def same_answer(given: str, expected: str) -> bool:
    """answers_match, remembered; a TimeoutError is not, for the machine may have been busy."""
    given, expected = tidy(given), tidy(expected)
    if given == expected or max(len(given), len(expected)) > MAX_ANSWER_CHARS:
        return given == expected != ""
    asked = questions(given, expected)
    return asked is not None and (not asked or same_by_algebra(asked))


def answers_match(given: str, expected: str) -> bool:
    """Whether two strings mean the same; takes about GRADE_TIMEOUT at worst."""
    try:
        return same_answer(given, expected)
    except (TimeoutError, RecursionError):  # not shown to be right
        return False
