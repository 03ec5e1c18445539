# ruff: noqa: E501
"""Steps of an answer that is code: statements line by line, and the text around them."""

from __future__ import annotations

import ast
import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfteach.tasks import segmentation
from selfteach.tasks.code.answer_code import find_code, write_code
from selfteach.tasks.code.answer_parts import parts_of, steps_of_code
from selfteach.tasks.code.code_steps import code_steps, is_remark, statement_lines

PROGRAM = '''\
import math

TABLE = {
    "a": 1,

    "b": 2,
}


@cached
def area(r, *,
         unit="cm"):
    """Return it.

    Twice.
    """
    # first a comment
    for k in range(3): r += k
    if r < 0:
        raise ValueError
    elif r == 0:
        x = 1; y = 2
    else:
        total = (r
                 # inside
                 + 1)
    return math.pi * \\
        r ** 2
'''
STEPS = [
    "import math",
    'TABLE = {\n    "a": 1,\n\n    "b": 2,\n}',
    "@cached",
    'def area(r, *,\n         unit="cm"):',
    '    """Return it.\n\n    Twice.\n    """',
    "    # first a comment",
    "    for k in range(3): r += k",
    "    if r < 0:",
    "        raise ValueError",
    "    elif r == 0:",
    "        x = 1; y = 2",
    "    else:",
    "        total = (r\n                 # inside\n                 + 1)",
    "    return math.pi * \\\n        r ** 2",
]


def pieces(text: str) -> list[str]:
    *spans, end = code_steps(text)
    assert end[0] == end[1] == spans[-1][1]
    return [segmentation.content(text, span) for span in spans]


def test_statements_headers_and_comments_are_steps_with_their_indentation() -> None:
    assert [PROGRAM[a:b] for a, b in statement_lines(PROGRAM)] == STEPS
    assert pieces(PROGRAM) == STEPS
    windows = PROGRAM.replace("\n", "\r\n")
    assert pieces(windows) == [step.replace("\n", "\r\n") for step in STEPS]


def test_the_lines_around_a_block_are_steps_too() -> None:
    text = f"First think.\n\n```python\n{PROGRAM}```\nIt is  done.\n```text\n  3\n```\n"
    around = ["First think.", "```python"], ["```", "It is  done.", "```text", "  3", "```"]
    assert pieces(text) == [*around[0], *STEPS, *around[1]]
    two = "```python\nx = (1,\n 2)\n```\nor\n```py\n  y = [\n3]\n```"
    assert pieces(two) == ["```python", "x = (1,\n 2)", "```", "or", "```py", "  y = [\n3]", "```"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer>def f(x):\n  return x\n</answer>",
         ["<answer>", "def f(x):", "  return x", "</answer>"]),
        ("no code at all\nhere", ["no code at all", "here"]),
        ("```python\ndef f(:\n    x = (1,\n        2)\n\n    return [x\n\n  y = 3\n```",
         ["```python", "def f(:", "    x = (1,", "        2)", "    return [x", "  y = 3", "```"]),
        ("```python\nx = (1,\n     2)\nif x\n    y = '''a\n b'''\nz = \"\"\"open\n  end",
         ["```python", "x = (1,\n     2)", "if x", "    y = '''a\n b'''", 'z = """open', "  end"]),
        ("```python\nif x:\n        a = (1,\n  2)\n    b = {\n3}\n```",
         ["```python", "if x:", "        a = (1,\n  2)", "    b = {", "3}", "```"]),
        ("```python\n", ["```python"]),
    ],
)  # fmt: skip
def test_code_that_does_not_parse_is_split_into_lines(text: str, expected: list[str]) -> None:
    assert pieces(text) == expected


TAGGED = (
    "```python\nprint(f(3))\n```\n<answer>def f(x):\n    return (x +\n            1)\n</answer>\nSo (it\nis).",
    "<answer>```python\ndef f(x):\n    return (x\n + 1)</answer>\nIt is (\n1).\n```\nf(2)\n```",
    "```python\nf(1)\n<answer>def f(x):\n  return [x,\n 1]</answer>\nf(2)\n```\nDone.",
    "So:\n   def f(x): return (x +\n   1)\n",
    "```python\ndef f(x):\n    return (x\n + 1)\n```\n<answer>it is\n(above)</answer>\n```\nf(\n1)\n```",
)


@pytest.mark.parametrize("text", TAGGED)
@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_the_code_that_is_judged_is_split_into_statements(text: str, line_break: str) -> None:
    text = text.replace("\n", line_break)
    answer = find_code(text, ["f"])
    assert answer is not None and "def f" in answer.code and "answer>" not in answer.code
    parts = parts_of(text, answer, code_steps)
    assert parts.code == steps_of_code(answer.code)
    assert sum("def f" in step for step in parts.code) == 1 and len(parts.code) == 2
    assert list(parts.steps) == [step.rstrip() for step in pieces(text)]
    assert not any("f(x)" in step for step in parts.before + parts.after)


def test_an_empty_answer_has_no_steps() -> None:
    assert code_steps("") == code_steps(" \n\n") == []


WORDS = st.sampled_from(
    ["def f(x):", "\n", "    ", "\t", "(", ")", "'''", '"', "#", "x = 1", "\\", "```", "python",
     "if x:", "<answer>", "</answer>", "\r", "\x0c", "\x00", "é", " ", "return", "[",
     "]", ";", "?", "\u2028"]
)  # fmt: skip


@settings(max_examples=300)
@given(st.lists(WORDS, max_size=30).map("".join))
def test_spans_are_in_order_disjoint_and_cover_everything(text: str) -> None:
    spans = code_steps(text)
    ends = [0, *itertools.chain(*spans), len(text)]
    assert ends == sorted(ends)
    gaps = [text[a:b] for a, b in itertools.pairwise(ends)][::2]
    assert not any(gap.strip() for gap in gaps)
    assert all(text[a:b].strip() for a, b in spans[:-1])
    for (_, end), (begin, _) in itertools.pairwise(spans[:-1]):
        assert end == begin or "\n" in text[end:begin]


PIECES = st.sampled_from(
    [
        "```python\n",
        "```\n",
        "<answer>",
        "</answer>",
        "def f(x):\n",
        "    return (x +\n1)\n",
        "So (\n1).\n",
    ]
)


@settings(max_examples=100)
@given(st.lists(PIECES, max_size=12).map("".join))
def test_the_judged_code_and_no_other_text_is_the_code_of_the_steps(text: str) -> None:
    for names in ([], ["f"]):
        if (answer := find_code(text, names)) is not None:
            assert parts_of(text, answer, code_steps).code == steps_of_code(answer.code)


STATEMENTS = st.sampled_from(
    ["x = [\n1,\n\n 2]", "pass", "x = '''\n a\n'''", "# remark", "x = 1", "y = (x +\n  1)", "'doc'"]
)
HEADERS = st.sampled_from(["def f(x):", "for i in x:", "if x:", ""])
BODIES = st.lists(STATEMENTS, min_size=1, max_size=4).map(lambda parts: [*parts, "z = 0"])


@settings(max_examples=100)
@given(
    st.lists(
        st.tuples(st.sampled_from(["def f(x):", "for i in x:", "if x:", ""]), BODIES), max_size=4
    )
)
def test_joined_steps_are_the_program(blocks: list[tuple[str, list[str]]]) -> None:
    code = ""
    for header, body in blocks:
        indent = "    " if header else ""
        code += (
            "\n".join([*([header] if header else []), *(indent + line for line in body)]) + "\n\n"
        )
    spans = statement_lines(code)
    joined = "\n".join(code[a:b] for a, b in spans)
    assert ast.dump(ast.parse(joined)) == ast.dump(ast.parse(code))
    assert len(spans) == sum(len(body) + bool(header) for header, body in blocks)


def test_tokens_belong_to_the_line_that_they_end_in() -> None:
    text = write_code("def f(x):\n    return x")
    ends = [3, 9, 10, 13, 19, 20, 24, 31, 32, 33, 36, 36]
    spans = segmentation.token_spans(code_steps(text), ends)
    assert spans == [(0, 3), (3, 6), (6, 10), (10, 12), (12, 12)]


@pytest.mark.parametrize(
    "code", ["(" * 30_000, "x = '" * 10_000, "if x:\n " * 10_000, '"""\n' * 15_001, "\\\n" * 20_000]
)
def test_odd_code_is_split_in_little_time(code: str) -> None:
    begin = time.process_time()
    statement_lines(code)
    assert time.process_time() - begin < 2


def test_remarks_do_nothing() -> None:
    assert all(map(is_remark, ["# a", "    # a", '    """Doc.\n\n    More."""', "'x'", "r'x'"]))
    assert not any(map(is_remark, ["x = 1", "f'{x()}'", "'a'.join(x)", "pass", "return 'x'", "1"]))
