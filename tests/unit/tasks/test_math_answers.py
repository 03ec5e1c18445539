"""Test which answers equal a gold answer: read wholly, in the spellings of people and models."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfteach.tasks import verifiers, verify_worker
from selfteach.tasks.answer_spelling import normalized
from selfteach.tasks.math_answers import MAX_CHARS, equivalent, read_answer
from selfteach.types import Problem

EQUAL = [
    (
        r"7 \text{ hours } 30 \text{ minutes}",
        ["7 hours 30 minutes", "7 hrs and 30 min", r"7\text{ hours and }30\text{ minutes}"],
    ),
    ("5 ft 3 in", ["5 feet, 3 inches"]),
    ("73", ["**73**", "**73**."]),
    ("18", ["18 dollars", "$18", r"\$18", "18 dollars."]),
    (
        "5",
        [
            r"\[5\]",
            r"\(5\)",
            "$$5$$",
            "`5`",
            "$5$",
            "x=5",
            "5 m",
            "Answer: 5",
            "**Answer:** 5",
            "The final answer is 5.",
            "#### 5",
            "5 apples",
            "Area = 5",
            "5 square units",
            "5 € ",
        ],
    ),
    ("3.5", ["3 1/2", "3½", "3 ½"]),
    (r"\frac{7}{2}", ["3 1/2"]),
    ("3 1/2", ["3.5", r"3\frac{1}{2}", r"3 \dfrac{1}{2}", "7/2"]),
    ("-3 1/2", ["-3.5"]),
    ("0.5", ["½", r"\frac{2}{4}"]),
    ("0.00001", ["1e-05"]),
    ("1e-05", ["0.00001"]),
    ("1e-5", ["10^{-5}"]),
    ("1.5e3", ["1500"]),
    ("1180591620717411303424", ["2^{70}"]),
    ("49", ["7²"]),
    ("18 dollars", ["18", "$18"]),
    ("$18", ["18 dollars"]),
    ("Tuesday", ["tuesday", r"\text{Tuesday}"]),
    (r"\text{Tuesday}", ["Tuesday."]),
    ("yes", ["Yes"]),
    ("A", ["A", "(A)"]),
    (r"\text{(C)}", ["C"]),
    (r"\text{E}", ["E"]),
    ("5, 7", ["7, 5"]),
    ("5 and 7", ["5, 7"]),
    ("5 or 7", ["7 or 5"]),
    ("x=5", ["5"]),
    ("(1,2)", ["(1,2)", "(1, 2)"]),
    ("[1,2)", ["[1,2)"]),
    ("1,234", ["1234"]),
    ("1,234,567", ["1234567"]),
    ("1234", ["1 234", r"1\,234", "1{,}234"]),
    ("1000", ["1_000"]),
    ("50%", ["0.5", "50%", "50 percent", r"50\%"]),
    ("50", ["50%"]),
    ("2025-01-01", ["2025-01-01"]),
    ("12:30", ["12:30"]),
    ("1:2", ["1/2"]),
    ("2:4", ["1:2"]),
    ("10:30 a.m.", ["10:30 AM"]),
    ("2x+3y", ["3y+2x"]),
    ("2ab", ["2ba"]),
    ("abc", ["abc"]),
    ("xy", ["yx"]),
    ("pi", [r"\pi"]),
    (r"\pi", ["pi"]),
    (r"2\pi", ["2pi"]),
    (r"\sqrt{2}", ["sqrt(2)"]),
    (r"3\sqrt{2}", [r"\sqrt{18}"]),
    ("10 m/s", ["10", "10 meters per second"]),
    ("10", ["10 m/s"]),
    ("5 km/h", ["5 km per hour"]),
    (r"2 \text{ cm}^2", ["2", "2 square cm", "2 cm^2"]),
    (r"36\pi \text{ cm}^2", [r"36\pi"]),
    ("5 apples", ["5 apples", "5"]),
    ("3/4 cup", ["3/4"]),
    ("3/4", ["3/4 cup", "0.75 cups"]),
    ("3 million", ["3000000"]),
    ("3000000", ["3 million"]),
    ("2 dozen", ["24"]),
    (r"90^\circ", ["90"]),
    ("90", ["90°", "90 degrees"]),
    ("90 degrees", [r"90^\circ"]),
    (r"\frac{1}{2}", ["0.5"]),
    (r"\frac12", ["0.5"]),
    ("?!", [" ?! "]),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", [r"\begin{pmatrix}1\\2\end{pmatrix}"]),
    (r"\{1,2\}", [r"\{2,1\}"]),
    ("{1,2}", [r"\{1, 2\}"]),
    ("x^2+1", ["1+x^2"]),
    ("x > 3", ["x>3", "3 < x"]),
    ("x=1, y=2", ["y=2, x=1"]),
    (r"\infty", ["infinity"]),
    ("4!", ["24"]),
    ("true", ["True"]),
    ("-3", ["−3"]),
    ("12", ["12.0"]),
    ("007", ["7"]),
    ("0.50", ["0.5"]),
    (".5", ["0.5"]),
    ("100", ["1e2"]),
    ("2^10", ["1024"]),
    ("2**10", ["1024"]),
    ("12 R 3", ["12 R 3"]),
    ("red and blue", ["red, blue"]),
    ("12 apples and 7 pears", ["12 apples, 7 pears"]),
    (r"\text{Area} = 5", ["5"]),
    (r"5\text{ units}", ["5"]),
    ("[1, 2]", ["[1, 2]"]),
    ("A, C", ["C, A"]),
    ("10^{-5}", ["0.00001"]),
    (r"1.5 \times 10^{3}", ["1500"]),
    ("1.5 × 10³", ["1500"]),
    (r"\frac{1}{2}x", ["x/2"]),
    ("y=2x+3", ["2x+3"]),
    ("2x+3", ["y=2x+3"]),
    (r"\boxed{5}", ["5"]),
    ("no solution", ["No solution"]),
    ("nan", ["nan"]),
    ("$5 and 20 cents", ["5 dollars and 20 cents"]),
    (r"(-\infty, 3]", [r"\left(-\infty,3\right]"]),
    (r"\left( 3, \frac{\pi}{2} \right)", [r"(3,\pi/2)"]),
    ("6 - 5i", ["-5i+6"]),
    (r"\text{Evelyn}", ["Evelyn"]),
    ("p - q", ["-q+p"]),
    ("1,-2", ["-2, 1"]),
    (r"5.4 \text{ cents}", ["5.4"]),
    (r"\$32,\!348", ["32348"]),
    (r"28^\circ", ["28"]),
    (r"\text{(A)}", ["A"]),
    (r"(-\infty,-5)\cup(-5,\infty)", [r"(-\infty, -5) \cup (-5, \infty)"]),
    (r"0.\overline{3}", [r"\frac{1}{3}"]),
    ("2516_8", ["2516_8"]),
    (r"1 \frac{4}{5}", ["1.8"]),
    ("4:3", [r"\frac{4}{3}"]),
    (r"11\sqrt2", [r"11\sqrt{2}"]),
    ("x=1 or x=2", ["2, 1"]),
    (r"\frac{\sqrt{3}}{2}", [r"\sqrt{3}/2"]),
    ("$1,234.50", ["1234.5"]),
    ("3 weeks, 2 days", ["3 weeks and 2 days"]),
    (r"x \in [1,2)", ["[1,2)"]),
    ("-1/2", ["-0.5"]),
    (r"-\frac{1}{2}", ["-0.5"]),
    ("2 1/2 hours", ["2.5"]),
    ("2.5", ["2 1/2 hours"]),
    ("8 1/3 %", [r"\frac{25}{3}\%"]),
    ("€5", ["5 euros"]),
    ("f(x)=x+1", ["x+1"]),
    (r"\frac{9}{2}", [r"4\frac{1}{2}"]),
    ("3rd", ["3rd"]),
    (r"\text{7 hours 30 minutes}", ["7 hours 30 minutes"]),
    (r"2\text{ and }3", ["2,3"]),
    ("1 2 3", ["1 2 3"]),
    ("10 000", ["10000"]),
    ("3R^2", ["3 R^2"]),
    ("a", ["A", "(A)"]),
]
DIFFERENT = [
    (
        r"7 \text{ hours } 30 \text{ minutes}",
        ["7", "7 hours 31 minutes", "8 hours 30 minutes", "30 minutes", "7 minutes 30 hours"],
    ),
    ("7", [r"7 \text{ hours } 30 \text{ minutes}", "7 hours 30 minutes", "7²"]),
    ("5 ft 3 in", ["5", "53", "5*3"]),
    ("3 1/2", ["2", "3 1/3"]),
    ("72", ["7²"]),
    ("18 dollars", ["18 cents", "19 dollars"]),
    ("Tuesday", ["Tuesady"]),
    ("listen", ["silent"]),
    ("yes", ["sye", "no"]),
    ("A", ["B"]),
    ("5, 7", ["5"]),
    ("5 and 7", ["5"]),
    ("x = 5", ["x=6"]),
    ("(1,2)", ["(2,1)", "1", "(1,3)"]),
    ("1", ["1_000"]),
    ("2025-01-01", ["2023"]),
    ("12:30", ["2:05"]),
    ("10:30 a.m.", ["10:30 PM"]),
    ("2ab", ["2"]),
    ("18", ["18xyz"]),
    ("10 m/s", ["10 m"]),
    (
        "5",
        [
            "5m",
            "Let me add 2 and 3, which gives 5",
            "not 5",
            "about 5",
            "5 or 6",
            "5 is wrong",
            "3+4=7, so 5",
        ],
    ),
    (r"2 \text{ cm}^2", ["2 cm", "3 cm^2"]),
    (r"36\pi \text{ cm}^2", ["36"]),
    ("5 apples", ["5 pears"]),
    ("2 dozen", ["2"]),
    ("2", ["3", "", "no idea"]),
    ("?!", ["?"]),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", [r"\begin{pmatrix}1\\3\end{pmatrix}"]),
    ("x > 3", ["x > 4", "3"]),
    ("x=1, y=2", ["x=1", "1", "x=1, y=3"]),
    ("-3", ["3"]),
    ("12 R 3", ["12"]),
    ("12 remainder 3", ["12", "12 remainder 4"]),
    ("red and blue", ["red"]),
    ("Tom has 5 apples", ["5"]),
    ("12 apples and 7 pears", ["12", "7 pears and 12 apples"]),
    ("[1, 2]", ["[1, 3]", "1"]),
    ("A, C", ["A"]),
    ("no solution", ["0"]),
    ("$5 and 20 cents", ["5"]),
    (r"(-\infty, 3]", [r"(-\infty,3)"]),
    ("1 or 2", ["1"]),
    ("12 inches", ["1 foot"]),
    ("3 weeks, 2 days", ["3"]),
    ("5 kg", ["5000 g"]),
    ("3", ["3rd"]),
    ("12", ["a dozen"]),
    (r"\text{7 hours 30 minutes}", ["7"]),
    ("1 2 3", ["1"]),
    ("A+a", ["2a", "2A"]),
    ("3R^2", ["3r^2"]),
    ("AB", ["ab"]),
]


@pytest.fixture(scope="module")
def math() -> verifiers.MathVerifier:
    return verifiers.MathVerifier()


def is_right(math: verifiers.MathVerifier, gold: str, answer: str) -> bool:
    return math(Problem("p", "q", gold), f"<answer>{answer}</answer>").correct


@pytest.mark.parametrize(("gold", "answers"), EQUAL, ids=[gold for gold, _ in EQUAL])
def test_the_same_answer_in_another_spelling_is_right(
    math: verifiers.MathVerifier, gold: str, answers: list[str]
) -> None:
    assert [answer for answer in answers if not is_right(math, gold, answer)] == []


@pytest.mark.parametrize(("gold", "answers"), DIFFERENT, ids=[gold for gold, _ in DIFFERENT])
def test_a_part_of_an_answer_or_another_one_is_wrong(
    math: verifiers.MathVerifier, gold: str, answers: list[str]
) -> None:
    assert [answer for answer in answers if is_right(math, gold, answer)] == []


UNITS = ["hours", "minutes", "apples", "cm", "dollars", "weeks", "feet"]
quantities = st.lists(st.tuples(st.integers(0, 99), st.sampled_from(UNITS)), min_size=2, max_size=4)


@given(quantities, st.data())
def test_every_number_and_every_part_of_a_gold_answer_counts(
    gold: list[tuple[int, str]], data: st.DataObject
) -> None:
    def written(parts: list[tuple[int, str]]) -> str:
        return " ".join(rf"{number} \text{{ {unit} }}" for number, unit in parts)

    def equal(a: str, b: str) -> bool:
        return Fraction(a) == Fraction(b)

    at = data.draw(st.integers(0, len(gold) - 1))
    changed = [*gold]
    changed[at] = (gold[at][0] + 1, gold[at][1])
    assert equivalent(written(gold), ", ".join(f"{n} {unit}" for n, unit in gold), equal)
    assert not equivalent(written(gold), written(changed), equal)
    for part in gold:
        assert not equivalent(written(gold), written([part]), equal)
        assert not equivalent(written([part]), written(gold), equal)
        assert not equivalent(written(gold), str(part[0]), equal)


@given(st.text(max_size=60))
def test_no_text_breaks_the_reading(text: str) -> None:
    read_answer(text)
    assert equivalent(text, f" {text} ", lambda gold, answer: False)


@pytest.mark.parametrize("text", ["(" * 5000, "1 " * 600, "x" * (MAX_CHARS + 1)])
def test_a_long_answer_is_compared_as_text(text: str) -> None:
    def equal(gold: str, answer: str) -> bool:
        raise AssertionError("not compared as mathematics")

    assert equivalent(text, text, equal) and not equivalent(text, text + "1", equal)


@pytest.mark.parametrize("formula", ["1_000", "7²", "2ab", "5 + x |"])
def test_a_formula_that_is_read_in_part_is_not_understood(formula: str) -> None:
    assert not verify_worker.equal(formula, "1")["equal"]
    assert not verify_worker.equal("7", formula)["equal"]


def test_spellings_of_numbers() -> None:
    assert normalized("1e-05") == r"1\cdot 10^{-5}" and normalized("½") == "1/2"
    assert normalized("-3 1/2") == r"-\frac{7}{2}" and normalized("7²") == "7^{2}"
    assert normalized(r"0.1\overline{6}") == r"\frac{15}{90}" and normalized("$5") == "5 dollars"
