r"""Rewrites the ways in which people and models spell a final answer as one plain form.

Numbers: ``1e-05``, ``3 1/2``, ``½``, ``1,234``, ``7²``. Words: ``\text{…}`` is put between two private
characters, so that what it holds is a word whatever its length.
"""

from __future__ import annotations

import re
import unicodedata

from selfteach.tasks.final_answers import unwrapped

SIGNS = str.maketrans(
    {
        "−": "-", "–": "-", "‐": "-", "‑": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ",
        "÷": "/", "⁄": "/", "∕": "/", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ",
        "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ",
        "°": r"^\circ ", "٫": ".", "’": "'", "\ue000": " ", "\ue001": " ",
    }
)  # fmt: skip
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
SCALES = {"hundred": "10^{2}", "thousand": "10^{3}", "million": "10^{6}", "billion": "10^{9}",
          "trillion": "10^{12}", "dozen": "12"}  # fmt: skip
CURRENCIES = {"$": "dollars", "€": "euros", "£": "gbp", "¥": "yen"}

FRAC = r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}"
RULES: tuple[tuple[re.Pattern[str], object], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\A(?:[#>*\s]|(?i:so|thus|hence|therefore)\b,?)+(?=\S)", ""),
        (r"(?i)\A(?:the\s)?(?:final\s)?answer(?:\sis)?\s?[:=]?\s?", ""),
        (r"(?<=[\w)}])\*\*(?=[\w({\\-])", "^"),
        (r"\*\*", ""),
        (r"(\d*)\.(\d*)\\(?:overline|bar|dot) ?\{(\d+)\}", lambda m: _periodic(m)),
        (r"\\(?:[,;:>]|q?quad\b|thinspace\b|displaystyle\b|(?= ))|~|(?<=\d)\{,\}(?=\d)", " "),
        (r"(\d)\\?[%]|(\d) ?(?:percent|per cent|percentage)\b", lambda m: f"{m[1] or m[2]}\\%"),
        (r"(?<![\w.])(\d+(?:\.\d+)?|\.\d+) ?[eE]([+-]?\d+)(?![\w.])",
         lambda m: rf"{m[1]}\cdot 10^{{{int(m[2])}}}"),
        (r"(?<![\w.,])\d{1,3}(?:,\d{3})+(?![\d,])|(?<![\w.,/])\d{1,3}(?: \d{3})+(?![\d,./])"
         r"|(?<!\w)\d+(?:_\d+)+\b",
         lambda m: re.sub(r"[, _]", "", m[0])),
        (rf"(?<![\w.^{{/}}])(\d+) ?{FRAC}", lambda m: _improper(*m.groups())),
        (r"(?<![\w.^{/}])(\d+) (\d+) ?/ ?(\d+)(?![\w.^/])", lambda m: _improper(*m.groups())),
        (rf"(?<=\d) (?i:{'|'.join(SCALES)})s?\b", lambda m: rf"\cdot {SCALES[_scale(m[0])]}"),
        (r"(?i)(?<![\\\w])(?:sqrt|√) ?\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"√ ?(\d+|[a-z])", r"\\sqrt{\1}"),
        (r"(?<![\\A-Za-z])(pi|sin|cos|tan|ln|log|exp)(?![A-Za-z])", r"\\\1"),
        (r"(?<![\\\w])(?:inf|infinity|oo)(?!\w)", r"\\infty"),
        (r"(?i)(?<![\\\w])(?:and|or)(?!\w)", ","),
    )
)  # fmt: skip
WORDS = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal|up)?|mathrm|mbox|hbox|operatorname)\s*\{([^{}]*)\}"
)
NAMED = re.compile(r"\A[\s\ue000]*[A-Za-z][A-Za-z ]+[A-Za-z][\s\ue001]*=(?!=)")
"""What is named before an equals sign: ``Area = 5``; not a variable."""


def normalized(answer: str) -> str:
    """Return an answer in the plain form; linear in its length (each rule looks at short runs)."""
    text = unwrapped(answer.replace(r"\$", "$").replace(r"\!", "").rstrip(" .;,\n\t"))
    text = _fractions(text).translate(SIGNS)
    text = re.sub(r"\s+", " ", _currency(text)).strip()
    text = WORDS.sub(_marked, text)
    for pattern, replacement in RULES:
        text = pattern.sub(replacement, text)  # type: ignore[arg-type]
    text = unwrapped(NAMED.sub("", text)).rstrip(" .;,")
    return re.sub(r"\s+", " ", text).strip()


def _fractions(text: str) -> str:
    """Write superscripts as powers, and digits and fractions of other scripts in ASCII."""
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+", lambda m: f"^{{{m[0].translate(SUPERSCRIPTS)}}}", text)
    return "".join(map(_ascii_number, text)) if not text.isascii() else text


def _ascii_number(character: str) -> str:
    if character.isascii():
        return character
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    if "VULGAR FRACTION" in unicodedata.name(character, ""):
        return " " + unicodedata.normalize("NFKC", character).replace("⁄", "/")
    return character


def _currency(text: str) -> str:
    """Write ``$18`` as ``18 dollars``; dollar signs in pairs are LaTeX's."""
    if text.count("$") % 2 == 0:
        text = text.replace("$", "")
    number = r"(-?\d[\d,]*(?:\.\d+)?)"
    text = re.sub(rf"([$€£¥]) ?{number}", lambda m: f"{m[2]} {CURRENCIES[m[1]]} ", text)
    return text.replace("$", "")


def _marked(match: re.Match[str]) -> str:
    words = match[1].strip()
    if not words or re.search(r"\d", words) or words.casefold() in ("and", "or"):
        return f" {match[1]} "
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
