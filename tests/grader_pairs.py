"""The grader on labelled pairs, beside math-verify and mathruler where they are installed, each called as
its users do:

    pip install mathruler pylatexenc tqdm && python tests/grader_pairs.py

grader_pairs.tsv is split by a checksum: the rules were written on the tuned half only, `unseen` was written
after them.
"""

import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))


def labelled_pairs() -> dict[str, list[tuple[str, str, bool]]]:
    """{"tuned", "held out", "unseen": [(boxed answer, answer of the data set, whether they mean the same)]}"""
    parts = {"tuned": [], "held out": [], "unseen": []}
    unseen = False
    for line in Path(__file__).with_suffix(".tsv").read_text(encoding="utf-8").splitlines():
        unseen = unseen or line == "# unseen"
        if line[0] != "#":
            label, given, expected = line.split("\t")
            half = "held out" if zlib.crc32(f"{given}\t{expected}".encode()) % 2 else "tuned"
            parts["unseen" if unseen else half].append((given, expected, label == "+"))
    return parts


def rates(grade, pairs) -> tuple[float, float]:
    """(share of right verdicts, share of the wrong answers that are accepted)"""
    verdicts = [(grade(given, expected), same) for given, expected, same in pairs]
    accepted = [verdict for verdict, same in verdicts if not same]
    return sum(verdict == same for verdict, same in verdicts) / len(verdicts), sum(accepted) / len(accepted)


def with_papo(given: str, expected: str) -> bool:
    import papo

    return papo.compute_reward(rf"\boxed{{{given}}}", expected)["accuracy"] == 1


def with_math_verify(given: str, expected: str) -> bool:
    from math_verify import parse, verify

    expected = expected if "$" in expected or "boxed" in expected else f"${expected}$"
    return verify(parse(expected), parse(rf"\boxed{{{given}}}"))


def with_mathruler(given: str, expected: str) -> bool:
    from mathruler.grader import extract_boxed_content, grade_answer

    return bool(grade_answer(extract_boxed_content(rf"\boxed{{{given}}}"), expected))


if __name__ == "__main__":
    parts = labelled_pairs()
    print("right verdicts / wrong answers accepted")
    print("| grader | " + " | ".join(f"{name} ({len(pairs)})" for name, pairs in parts.items()) + " |")
    print("|---" * (1 + len(parts)) + "|")
    for name, grade in [
        ("this one", with_papo),
        ("math-verify", with_math_verify),
        ("mathruler", with_mathruler),
    ]:
        try:
            cells = [
                f"{right:.1%} / {wrong:.1%}"
                for right, wrong in (rates(grade, p) for p in parts.values() if p)
            ]
        except ImportError as error:
            cells = [f"not installed: {error.name}"]
        print(f"| {name} | " + " | ".join(cells) + " |")
