"""The grader on labelled pairs, beside math-verify and mathruler where they are installed, each
called as its users do:

    pip install mathruler pylatexenc tqdm && python tests/grader_pairs.py

grader_pairs.tsv is split by a checksum: the rules were written on the tuned halves only. `unseen`
was written after those of the first part; `styles`, in the style of real gold answers, before
theirs."""

import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))


def labelled_pairs() -> dict[str, list[tuple[str, str, bool]]]:
    """{part: [(boxed answer, answer of the data set, whether they agree)]}; ⏎ is a new line."""
    parts, section = {}, ""
    for line in Path(__file__).with_suffix(".tsv").read_text(encoding="utf-8").splitlines():
        section = line[2:] if line in ("# unseen", "# styles") else section
        if line[0] != "#":
            label, given, expected = line.replace("⏎", "\n").split("\t")
            odd = zlib.crc32(f"{given}\t{expected}".encode()) % 2
            part = section if section == "unseen" else f"{section} {['tuned', 'held out'][odd]}"
            parts.setdefault(part.strip(), []).append((given, expected, label == "+"))
    return parts


def rates(grade, pairs) -> tuple[float, float]:
    """(share of right verdicts, share of the wrong answers that are accepted)"""
    verdicts = [(grade(given, expected), same) for given, expected, same in pairs]
    accepted = [verdict for verdict, same in verdicts if not same]
    right = sum(verdict == same for verdict, same in verdicts)
    return right / len(verdicts), sum(accepted) / len(accepted)


def this_one(given: str, expected: str) -> bool:
    from grader import answers_match

    return answers_match(given, expected)


def math_verify(given: str, expected: str) -> bool:
    from math_verify import parse, verify

    expected = expected if "$" in expected or "boxed" in expected else f"${expected}$"
    return verify(parse(expected), parse(rf"\boxed{{{given}}}"))


def mathruler(given: str, expected: str) -> bool:
    from mathruler.grader import extract_boxed_content, grade_answer

    return bool(grade_answer(extract_boxed_content(rf"\boxed{{{given}}}"), expected))


if __name__ == "__main__":
    parts = labelled_pairs()
    print("right verdicts / wrong answers accepted")
    print("| grader | " + " | ".join(f"{name} ({len(p)})" for name, p in parts.items()) + " |")
    print("|---" * (1 + len(parts)) + "|")
    for grade in (this_one, math_verify, mathruler):
        try:
            found = [rates(grade, pairs) for pairs in parts.values()]
            cells = [f"{right:.1%} / {accepted:.1%}" for right, accepted in found]
        except ImportError as error:
            cells = [f"not installed: {error.name}"]
        print(f"| {grade.__name__.replace('_', ' ')} | " + " | ".join(cells) + " |")
