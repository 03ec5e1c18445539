"""Test final answers in the characters, currencies and structures that people and models write."""

from __future__ import annotations

import pytest

from selfteach.tasks import final_answers, verifiers

EQUAL: list[tuple[str, list[str]]] = [
    ("20 °C", ["20"]),
    ("1.5x10^3", ["1500"]),
    ("－5", ["-5"]),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", ["\\begin{pmatrix}1\\\\2\\end{pmatrix}"]),
    ("10_{2}", ["10_2"]),
    ("25 cents", ["25¢"]),
    ("US$5", ["5"]),
    ("₹50", ["50"]),
    ("$5 million", ["5000000 dollars", "5 million dollars"]),
    ("\\pm 2", ["±2"]),
    ("x = \\pm 2", ["±2"]),
    ("2 \\pm \\sqrt{3}", ["2±√3"]),
    ("\\varnothing", ["\\emptyset"]),
    ("\\text{The answer is } 5", ["5"]),
    ("≈ 5", ["5"]),
    ("\\mathbb{R}", ["ℝ"]),
    ("x₁", ["x_1"]),
    ("4210_{5}", ["4210_5"]),
    ("\\theta", ["θ"]),
    ("α", ["\\alpha"]),
    ("2\\alpha + β", ["2\\alpha+\\beta"]),
    ("±3", ["\\pm 3"]),
    ("3 ± √2", ["3 \\pm \\sqrt{2}"]),
    ("ℝ", ["\\mathbb{R}"]),
    ("x ∈ ℝ", ["x \\in \\mathbb{R}"]),
    ("x₁ + x₂", ["x_1 + x_2"]),
    ("1011_{2}", ["1011_2"]),
    ("1011₂", ["1011_2"]),
    ("CO₂", ["CO_2"]),
    ("$1.2 billion", ["1.2 billion dollars", "1200000000"]),
    ("₹500", ["500 rupees"]),
    ("25¢", ["25 cents"]),
    ("A$20", ["20"]),
    ("US$20", ["20 dollars"]),
    ("20°C", ["20"]),
    ("20 ℃", ["20 °C"]),
    ("98.6°F", ["98.6"]),
    ("-40 °F", ["-40"]),
    ("3 x 10^8", ["300000000"]),
    ("（1，2）", ["(1, 2)"]),
    ("ｘ＝５", ["x=5"]),
    ("［0，1］", ["[0,1]"]),
    ("５０％", ["50%"]),
    (
        "\\begin{pmatrix} -1 \\\\ 2 \\\\ 3 \\end{pmatrix}",
        ["\\begin{pmatrix}-1\\\\2\\\\3\\end{pmatrix}"],
    ),
    (
        "\\begin{bmatrix} 1 & 2 \\\\ 3 & 4 \\end{bmatrix}",
        ["\\begin{bmatrix}1&2\\\\3&4\\end{bmatrix}"],
    ),
    (
        "\\begin{cases} 1 & x>0 \\\\ 0 & x \\le 0\\end{cases}",
        ["\\begin{cases}1&x>0\\\\0&x\\le0\\end{cases}"],
    ),
    ("1 2 3", ["1, 2, 3"]),
    ("∛2", ["\\sqrt[3]{2}"]),
    ("\\ldots", ["..."]),
    ("__5__", ["5"]),
    ("_5_", ["5"]),
    ("5€", ["€5"]),
    ("\\cos\\theta", ["cos θ"]),
    ("A, B, and C", ["A, B, C"]),
    ("1, 2, and 3", ["1, 2, 3"]),
    ("2, 3, or 5", ["2,3,5"]),
    (
        "\\begin{pmatrix} -1/3 \\\\ 2/3 \\\\ 5/3 \\end{pmatrix}",
        ["\\begin{pmatrix} -\\frac{1}{3} \\\\ \\frac{2}{3} \\\\ \\frac{5}{3} \\end{pmatrix}"],
    ),
    ("1 \\pm \\sqrt{19}", ["1 ± √19"]),
    ("2+3 = 5", ["5"]),
    ("1.41", ["\\sqrt{2} \\approx 1.41"]),
    ("\\sqrt{2}", ["\\sqrt{2} \\approx 1.41"]),
    ("\\frac{1}{3}", ["1/3 ≈ 0.333"]),
    ("3\\sqrt{2}", ["3\\sqrt{2} \\approx 4.24"]),
    ("\\Theta(n)", ["Θ(n)"]),
    ("\\log_2(n)", ["\\log_2 n"]),
    ("\\lfloor n/2 \\rfloor", ["⌊n/2⌋"]),
    ("\\lambda = 3", ["λ=3"]),
    ("\\lambda", ["λ"]),
    ("3\\Omega", ["3Ω"]),
    ("\\mu = 5", ["μ = 5"]),
    ("\\sigma^2", ["σ²"]),
    ("\\Delta x", ["Δx"]),
    ("v_0 t + \\frac{1}{2} a t^2", ["v_0t + at^2/2"]),
    ("\\langle 1, 2, 3 \\rangle", ["⟨1,2,3⟩"]),
    ("\\{1, 2, \\ldots, n\\}", ["\\{1,2,\\dots,n\\}"]),
    ("2, 4, 6, ...", ["2, 4, 6, \\ldots"]),
    ("k\\pi, k \\in \\mathbb{Z}", ["kπ, k∈ℤ"]),
    ("H_2SO_4", ["H₂SO₄"]),
    ("-273.15 °C", ["-273.15"]),
    ("$1,000,000", ["$1 million"]),
    ("\\lbrace 1, 2\\rbrace", ["\\{1,2\\}"]),
    ("\\$5{,}000", ["5000"]),
    ("5\\text{ million}", ["5000000"]),
    ("\\$5\\text{ million}", ["5 million dollars"]),
    ("5 lakh", ["500000"]),
    ("2, 3, \\text{ and } 5", ["2, 3, 5"]),
    ("at^2", ["t^2a"]),
    ("s = ut + \\frac{1}{2}at^2", ["s = ut + at^2/2"]),
    ("3.0 × 10^8 m/s", ["3.0e8"]),
    ("7", ["x = 3 + 4 = 7"]),
    ("5", ["2 + 3 = 5"]),
    ("6 - 5i", ["-5i+6"]),
    ("(1,2)", ["(1, 2)"]),
]
DIFFERENT: list[tuple[str, list[str]]] = [
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", ["\\begin{pmatrix} 2 \\\\ 1 \\end{pmatrix}"]),
    ("1 2 3", ["123", "6", "1 3 2", "1 23"]),
    ("12", ["1 2"]),
    ("\\$5 million", ["5"]),
    ("1 23", ["12 3"]),
    ("(1 2)(3 4)", ["(1 2 3 4)"]),
    ("(1 2)(3)", ["(1)(2 3)"]),
    ("[1 2] [3 4]", ["[1 2 3 4]"]),
    ("if p ∧ q", ["if p ∨ q"]),
    ("$5 million", ["$5"]),
    ("$1.2 billion", ["$1.2"]),
    (
        "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}",
        ["\\begin{pmatrix} 1 & 3 \\\\ 2 & 4 \\end{pmatrix}"],
    ),
    (
        "\\begin{cases} 1 & x>0 \\\\ 0 & x \\le 0\\end{cases}",
        ["\\begin{cases} 2 & x>0 \\\\ 0 & x \\le 0\\end{cases}"],
    ),
    ("3:2:1", ["3:2", "3/2"]),
    ("4-3-2", ["-1"]),
    ("12-15", ["-3"]),
    ("555-1234", ["-679"]),
    ("192.168.0.1", ["192.168.0.2"]),
    ("0x1F", ["0x1E"]),
    ("0b101", ["0b100"]),
    ("f'(x)", ["f(x)"]),
    ("f'", ["f"]),
    ("x'", ["x"]),
    (
        "7",
        [
            "7?",
            "8 = 7",
            "7...",
            "7\\ldots",
            "7'",
            ">7",
            "\\ge 7",
            "7 for n even",
            "7\\%\\%",
            "3 + 5 = 7",
            "y = 8 = 7",
        ],
    ),
    ("8", ["3 + 4 = 7 = 8"]),
    (
        "5",
        [
            "5 or more",
            "5 or less",
            "5 at least",
            "5 at most",
            "5 for all n",
            "5..6",
            "5#",
            "5@",
            "5′",
            "5″",
            "5^{}",
            "5_{}",
            "5^",
            "{5",
            "5}",
            "(5",
            "[5",
            "5)+",
            "\\not 5",
            "\\neg 5",
            "\\sim 5",
            "\\ldots 5",
            "1, \\ldots, 5",
            "5 \\to \\infty",
            "5'",
            "5\\cdot",
            "5\\times",
            "5+",
            "=5=",
            "5%%",
            "5‰",
            "5 NaN",
            "5 below zero",
            "5 negative",
            "5 squared",
            "5 cubed",
            "5 factorial",
            "5 halves",
            "5 thirds",
            "5 hundredths",
            "5 thousandths",
            "5 lakh",
            "5 crore",
        ],
    ),
    ("2, 4, 6, ...", ["2, 4, 6"]),
    ("A^T", ["A"]),
    ("1, 1, 2", ["1, 2", "1, 2, 2"]),
    ("1, 1, 2, 3, 5", ["1, 2, 3, 5"]),
    ("1,1", ["1"]),
    ("11 pm", ["11"]),
    ("5\\text{ million}", ["5"]),
    ("\\$5\\text{ million}", ["5", "\\$5"]),
]


@pytest.fixture(scope="module")
def math() -> verifiers.MathVerifier:
    return verifiers.MathVerifier()


@pytest.mark.parametrize(("gold", "answers"), EQUAL, ids=[gold for gold, _ in EQUAL])
def test_characters_currencies_and_lists_of_one_meaning_are_equal(
    math: verifiers.MathVerifier, gold: str, answers: list[str]
) -> None:
    assert [answer for answer in [gold, *answers] if not math.equivalent(gold, answer)] == []


@pytest.mark.parametrize(("gold", "answers"), DIFFERENT, ids=[gold for gold, _ in DIFFERENT])
def test_structure_signs_and_words_of_another_meaning_are_different(
    math: verifiers.MathVerifier, gold: str, answers: list[str]
) -> None:
    assert math.equivalent(gold, gold)
    assert [answer for answer in answers if math.equivalent(gold, answer)] == []


def test_a_tag_with_several_boxes_states_all_that_it_holds() -> None:
    text = r"<answer>\boxed{5} or \boxed{6}</answer>"
    assert final_answers.tag_or_boxed(text) == r"\boxed{5} or \boxed{6}"
    assert final_answers.tag_or_boxed(r"<answer>it is \boxed{6}</answer>") == "6"


def test_a_list_with_equal_elements_takes_few_comparisons() -> None:
    calls = 0

    def equal(gold: str, answer: str) -> bool:
        nonlocal calls
        calls += 1
        return gold == answer

    from selfteach.tasks.math_answers import equivalent

    gold = ", ".join(["1"] + [str(i) for i in range(1, 150)])
    assert not equivalent(gold, ", ".join(["2"] + [str(i) for i in range(1, 150)]), equal)
    assert calls < 300
