r"""Rewrites the ways in which people and models spell a final answer as one plain form.

Numbers: ``1e-05``, ``3 1/2``, ``½``, ``1,234``, ``7²``. Words: ``\text{…}`` is put between two private
characters, so that what it holds is a word whatever its length.
"""

from __future__ import annotations

import re

from selfteach.tasks.answer_symbols import SCALES, with_currencies_named, with_symbols_spelled
from selfteach.tasks.final_answers import unboxed, unwrapped

FRAC = r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}"
RULES: tuple[tuple[re.Pattern[str], object], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\A(?:[#*•\s]|(?i:so|thus|hence|therefore)\b,?)+(?=\S)", ""),
        (r"(?i)\A\ue000?(?:the\s)?(?:final\s)?answer(?:\sis)?\s?[:=]?\s?\ue001?", ""),
        (r"\A\s*\\approx\b", ""),
        (r"(?i)\A(rs|usd|eur|gbp|inr)\b\.? ?(-?\d[\d,]*(?:\.\d+)?)", r"\2 \1 "),
        (r"(?<=[\[{(,:])( ?)\"|\"(?=[\]}),:])", r"\1'"),
        (r"(?<=[\w)}])\*\*(?=[\w({\\-])", "^"),
        (r"\*\*", ""),
        (r"(\d*)\.(\d*)\\(?:overline|bar|dot) ?\{(\d+)\}", lambda m: _periodic(m)),
        (r"(?<!\\)\\(?:[,;:>]|q?quad\b|thinspace\b|displaystyle\b|(?= ))|~|(?<=\d)\{,\}(?=\d)", " "),
        (r"(\d)\\?[%]|(\d) ?(?:percent|per cent|percentage)\b", lambda m: f"{m[1] or m[2]}\\%"),
        (r"(?<![\w.])(\d+(?:\.\d+)?|\.\d+) ?[eE]([+-]?\d+)(?![\w.])",
         lambda m: rf"{m[1]}\cdot 10^{{{int(m[2])}}}"),
        (r"(?<![\w.,])\d{1,3}(?:,\d{3})+(?![\d,])|(?<![\w.,/])\d{1,3}(?: \d{3})+(?![\d,./])"
         r"|(?<!\w)\d{1,3}(?:_\d{3})+\b|(?<![\w.'])\d{1,3}(?:'\d{3})+(?![\d'])",
         lambda m: re.sub(r"[, _']", "", m[0])),
        (r"(?<=\d) ?[x*] ?(?=10 ?\^)", r"\\times "),
        (r"\^ ?\{? ?\\circ ?\}? ?\ue000? ?([CF])(?![A-Za-z])\ue001?",
         lambda m: f" \ue000degrees {TEMPERATURES[m[1]]}\ue001"),
        (r"\\var(epsilon|phi|theta|rho|sigma|pi)\b", r"\\\1"),
        (r"\\([lr])brace\b", lambda m: r"\{" if m[1] == "l" else r"\}"),
        (r"\\varnothing\b", r"\\emptyset "),
        (r"\\[cd]?dots\b", r"\\ldots "),
        (r"\\cbrt *(\d+|[a-z]|\([^()]*\))", r"\\sqrt[3]{\1}"),
        (r"_ ?\{ ?(\w) ?\}", r"_\1"),
        (rf"(?<![\w.^{{/}}])(\d+) ?{FRAC}", lambda m: _improper(*m.groups())),
        (r"(?<![\w.^{/}])(\d+) (\d+) ?/ ?(\d+)(?![\w.^/])", lambda m: _improper(*m.groups())),
        (rf"(?<=\d) (?i:{'|'.join(SCALES)})s?\b", lambda m: rf"\cdot {SCALES[_scale(m[0])]}"),
        (r"(?i)(?<![\\\w])(?:sqrt|√) ?\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"√ ?(\d+|[a-z])", r"\\sqrt{\1}"),
        (r"(?<![\\A-Za-z])(pi|sin|cos|tan|ln|log|exp)(?![A-Za-z])", r"\\\1"),
        (r"(?<![\\\w])(?:inf|infinity|oo)(?!\w)", r"\\infty"),
        (r"(?i)(?:, ?)?(?<![\\\w])(?:and|or)(?!\w)(?! (?:more|less|fewer|greater|smaller|higher|lower"
         r"|above|below|over|under|so|later|earlier|older|younger)\b)", ","),
    )
)  # fmt: skip
GROUPING = re.compile(r"(?<=\d)(?:\{,\}|\\,)(?=\d{3})")
TEMPERATURES = {"C": "celsius", "F": "fahrenheit"}
WORDS = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal|up)?|mathrm|mbox|hbox|operatorname)\s*\{([^{}]*)\}"
)
NAMED = re.compile(r"\A[\s\ue000]*[A-Za-z][A-Za-z ]+[A-Za-z][\s\ue001]*=(?!=)")
"""What is named before an equals sign: ``Area = 5``; not a variable."""


def normalized(answer: str) -> str:
    """Return an answer in the plain form; linear in its length (each rule looks at short runs)."""
    text = re.sub(r"\.\.\.+", r"\\ldots ", answer.replace(r"\$", "$").replace(r"\!", ""))
    text = with_symbols_spelled(unwrapped(text.rstrip(" .;,\n\t")))
    text = GROUPING.sub(",", text)
    text = re.sub(r"\s+", " ", WORDS.sub(_marked, unboxed(text)))
    text = re.sub(r"\s+", " ", with_currencies_named(text)).strip()
    for pattern, replacement in RULES:
        text = pattern.sub(replacement, text)  # type: ignore[arg-type]
    text = unwrapped(NAMED.sub("", text)).rstrip(" .;,")
    return re.sub(r"\s+", " ", text).strip()


def _marked(match: re.Match[str]) -> str:
    words = match[1].strip()
    if not words or re.search(r"\d", words) or words.casefold() in ("and", "or"):
        return f" {match[1]} "
    first, _, rest = words.partition(" ")
    if _scale(first) in SCALES:
        return f" {first} \ue000{rest}\ue001" if rest else f" {first} "
    return f"\ue000{words}\ue001"


def _improper(whole: str, numerator: str, denominator: str) -> str:
    """Return a mixed number as one fraction: 3 1/2 as 7/2."""
    numerator = str(int(whole) * int(denominator) + int(numerator))
    return rf"\frac{{{numerator}}}{{{int(denominator)}}}"


def _periodic(match: re.Match[str]) -> str:
    """Return a periodic decimal as a fraction: 0.1(6) as 15/90."""
    whole, fixed, period = match[1] or "0", match[2], match[3]
    numerator = int(whole + fixed + period) - int(whole + fixed)
    return rf"\frac{{{numerator}}}{{{'9' * len(period) + '0' * len(fixed)}}}"


def _scale(word: str) -> str:
    return word.strip().casefold().removesuffix("s")
