r"""Spells the characters and currencies of final answers: ``±`` as ``\pm``, ``₹5`` as 5 rupees.

A character without an entry stays, and the formula that holds it equals only the same text.
"""

from __future__ import annotations

import re
import unicodedata


def _greek(letter: str) -> str:
    """Return TeX's name of a Greek letter; the capitals that TeX lacks look like Latin ones."""
    name = unicodedata.name(letter).rpartition(" ")[2].replace("LAMDA", "LAMBDA")
    return rf"\{name.lower() if letter.islower() else name.capitalize()} "


GREEK = "αβγδεζηθικλμνξοπρστυφχψωΓΔΘΛΞΠΣΥΦΨΩ"
SIGNS = str.maketrans(
    {letter: _greek(letter) for letter in GREEK}
    | {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full-width ASCII
    | {letter: rf"\mathbb{{{unicodedata.normalize('NFKC', letter)}}}" for letter in "ℝℤℕℚℂ"}
    | {
        "−": "-", "–": "-", "‐": "-", "‑": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ",
        "÷": "/", "⁄": "/", "∕": "/", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
        "±": r"\pm ", "∓": r"\mp ", "≈": r"\approx ", "→": r"\to ", "∪": r"\cup ", "∩": r"\cap ",
        "∈": r"\in ", "∉": r"\notin ", "∅": r"\emptyset ", "∠": r"\angle ", "△": r"\triangle ",
        "⟨": r"\langle ", "⟩": r"\rangle ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ",
        "⌉": r"\rceil ", "…": r"\ldots ", "°": r"^\circ ", "℃": r"^\circ C", "℉": r"^\circ F",
        "∆": r"\Delta ", "Ω": r"\Omega ", "ϕ": r"\phi ", "ϵ": r"\epsilon ", "∣": "|", "∛": r"\cbrt ",
        "′": "'", "’": "'", "″": "''", "٫": ".", "。": ".", "、": ",",
        "\ue000": " ", "\ue001": " ",
    }
)  # fmt: skip
INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufe0f\ufeff]")
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₋₊ₙₓᵢⱼₖₘ", "0123456789-+nxijkm")
SCALES = {"hundred": "10^{2}", "thousand": "10^{3}", "million": "10^{6}", "billion": "10^{9}",
          "trillion": "10^{12}", "dozen": "12", "lakh": "10^{5}", "crore": "10^{7}"}  # fmt: skip
CURRENCIES = {
    "$": "dollars", "€": "euros", "£": "gbp", "¥": "yen", "¢": "cents", "₹": "rupees", "₩": "won",
    "₽": "rubles", "₺": "lira", "₱": "pesos", "฿": "baht", "₫": "dong", "₪": "shekels",
    "₦": "naira", "₴": "hryvnias",
}  # fmt: skip
DOLLARS = {"US": "us", "A": "australian", "AU": "australian", "C": "canadian", "CA": "canadian",
           "NZ": "nz", "HK": "hk", "S": "singapore"}  # fmt: skip
SIGN = rf"[{''.join(CURRENCIES)}]"
NUMBER = rf"-?\d[\d,]*(?:\.\d+)?(?: ?(?i:{'|'.join(SCALES)})s?\b)?"
AMOUNT = re.compile(
    rf"(?<![A-Za-z])(?P<of>{'|'.join(DOLLARS)})?(?P<before>{SIGN}) ?(?P<first>{NUMBER})"
    rf"|(?P<second>{NUMBER}) ?(?P<after>[{''.join(CURRENCIES)[1:]}])"
)
"""Matches an amount of money with its sign: ``US$1,234.50``, ``$5 million``, ``25¢``."""


def with_symbols_spelled(text: str) -> str:
    """Return a text in ASCII as far as its characters have a meaning in mathematics."""
    if text.isascii():
        return text
    text = INVISIBLE.sub("", text)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+", lambda m: f"^{{{m[0].translate(SUPERSCRIPTS)}}}", text)
    text = re.sub("[₀-₉₋₊ₙₓᵢⱼₖₘ]+", lambda m: f"_{{{m[0].translate(SUBSCRIPTS)}}}", text)
    return "".join(map(_in_ascii, text)).translate(SIGNS)


def with_currencies_named(text: str) -> str:
    """Write ``$18`` as ``18 dollars``; dollar signs in pairs are LaTeX's."""
    if text.count("$") % 2 == 0:
        text = text.replace("$", "")
    return AMOUNT.sub(_amount, text).replace("$", "")


def _amount(match: re.Match[str]) -> str:
    """Return an amount with the name of its currency behind it."""
    name = CURRENCIES[match["before"] or match["after"]]
    of = f"{DOLLARS[match['of']]} " if match["of"] else ""
    return f"{match['first'] or match['second']} {of}{name} "


def _in_ascii(character: str) -> str:
    """Return a digit, a fraction or a mathematical letter of Unicode in ASCII."""
    if character.isascii():
        return character
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    if "VULGAR FRACTION" in unicodedata.name(character, ""):
        return " " + unicodedata.normalize("NFKC", character).replace("⁄", "/")
    if "\U0001d400" <= character <= "\U0001d7ff":  # bold, italic, script … letters
        return unicodedata.normalize("NFKC", character)
    return character
