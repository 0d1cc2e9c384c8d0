r"""Final answers in LaTeX: taken out of \boxed{}, and brought to one form so that equal answers are equal texts.

The rules are a subset of those of the MATH benchmark (Hendrycks et al. 2021): no algebra, so 2x + 1 is not 1 + 2x.
"""

from __future__ import annotations

import re

UNITS = re.compile(r"\\(?:text|mbox|mathrm)\{\s*[^}]*\}(?:\^\{?[23]\}?)?$")
WORDS = re.compile(r"\\(?:text|mbox|mathrm|textbf|mathbf)\{([^}]*)\}")
DROPPED = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[!,;:]|\\ |\\?\$|\\?%|\^\{?\\circ\}?|\s")
SHORT_FRAC = re.compile(r"\\frac(?:(\w)(\w)|(\{[^{}]*\})(\w)|(\w)(\{[^{}]*\}))")
SHORT_ROOT = re.compile(r"\\sqrt(\w)")
SLASH = re.compile(r"(-?)(\d+)/(\d+)")
THOUSANDS = re.compile(r"-?[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?")
ASSIGNED = re.compile(r"[a-zA-Z]=(.+)")


def boxed(text: str) -> str | None:
    r"""The content of the last complete \boxed{} or \fbox{} of the text; \boxed 5 holds what goes on to the next $."""
    for found in reversed([*re.finditer(r"\\(?:boxed|fbox)", text)]):
        rest = text[found.end() :]
        if not rest.startswith("{"):
            return rest.split("$")[0].strip()
        depth = 0
        for index, letter in enumerate(rest):
            depth += (letter == "{") - (letter == "}")
            if depth == 0:
                return rest[1:index]
    return None


def normalised(answer: str) -> str:
    r"""One form for answers that are written differently.

    - Spaces, \left, \right, dollar and percent signs, degrees and a unit at the end go.
    - \dfrac and \tfrac are \frac; \frac12 and 1/2 are \frac{1}{2}; \sqrt2 is \sqrt{2}.
    - Thousands have no commas, .5 is 0.5, a whole number has no .0, and x = 5 is 5.
    """
    text = answer.strip().removesuffix(".").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    without_unit = UNITS.sub("", text).strip()
    text = WORDS.sub(r"\1", without_unit or text)
    text = DROPPED.sub("", text).replace("{,}", ",")
    if found := ASSIGNED.fullmatch(text):
        text = found[1]
    text = SHORT_FRAC.sub(_frac, text)
    text = SHORT_ROOT.sub(r"\\sqrt{\1}", text)
    if found := SLASH.fullmatch(text):
        text = rf"{found[1]}\frac{{{found[2]}}}{{{found[3]}}}"
    if THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    text = re.sub(r"(?<![\d.])\.(?=\d)", "0.", text)
    return re.sub(r"(\d)\.0+$", r"\1", text)


def _frac(found: re.Match[str]) -> str:
    above, below = (part for part in found.groups() if part is not None)
    return rf"\frac{_braced(above)}{_braced(below)}"


def _braced(part: str) -> str:
    return part if part.startswith("{") else f"{{{part}}}"
