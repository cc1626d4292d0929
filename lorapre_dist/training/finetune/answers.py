r"""Final answers: finding them in a response, and telling whether two of them are equal.

Two answers are equal if they are the same after the notation is normalised, or the same rational number, or lists,
tuples, intervals or sets of the same kind whose elements are equal. Units are ignored. Nothing is simplified, no
tolerance is allowed: ``2\sqrt{2}`` is not ``\sqrt{8}``, and 0.33 is not ``\frac{1}{3}``. These are the conventions of
the usual scorers of GSM8K and MATH (Hendrycks et al., arXiv 2103.03874).
"""

from __future__ import annotations

import re
from fractions import Fraction

# A response states its answer behind one of these; of several, the last one counts.
_MARKER = re.compile(r"####|[Aa]nswer\s+is\b\s*:?|\\(?:boxed|fbox)\b")
_TEXT = r"\\(?:text|mbox|textbf|textit|textrm|mathrm|mathbf|mathit|operatorname|hbox)\s*"
_OPENING, _CLOSING = "([{", ")]}"
# What a model repeats until it is stopped is no answer.
LONGEST = 400


def extract(response: str) -> str | None:
    r"""The final answer that ``response`` states, None if it states none.

    It stands in the last ``\boxed{...}``, or behind the last ``####`` or "answer is", up to the end of the sentence.
    """
    markers = list(_MARKER.finditer(response))
    while markers:
        marker = markers.pop()
        rest = response[marker.end() :]
        found = _braced(rest) if "box" in marker.group() else _first_sentence(rest)
        if found:
            return found
    return None


def _braced(text: str) -> str:
    r"""What stands in the braces that ``text`` begins with; without braces (``\boxed 5``) the first word."""
    text = text.lstrip()
    if not text.startswith("{"):
        return "".join(re.findall(r"^[^\s$]+", text))
    depth = 0
    for place, character in enumerate(text):
        if character in "{}" and text[place - 1 : place] != "\\":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return text[1:place].strip()
    return ""  # cut off before the end of the answer


def _first_sentence(text: str) -> str:
    lines = text.strip().splitlines()
    return re.split(r"\.(?:\s|$)", lines[0], maxsplit=1)[0].strip() if lines else ""


def equal(answer: str | None, reference: str) -> bool:
    """Whether ``answer`` is the ``reference`` in another notation; never for None."""
    if answer is None or max(len(answer), len(reference)) > LONGEST:
        return False
    return _equal(normalise(answer), normalise(reference))


def _equal(one: str, other: str) -> bool:
    if one == other:
        return one != ""
    first, second = number(one), number(other)
    if first is not None and second is not None:
        return first == second
    kinds, parts = zip(_parts(one), _parts(other), strict=True)
    if kinds[0] != kinds[1] or len(parts[0]) != len(parts[1]) or len(parts[0]) < 2:
        return False
    if kinds[0] not in ("", "{}"):
        return all(_equal(a, b) for a, b in zip(*parts, strict=True))
    left = list(parts[1])  # a set, or a list without brackets: in any order
    for part in parts[0]:
        match = next((k for k, candidate in enumerate(left) if _equal(part, candidate)), None)
        if match is None:
            return False
        del left[match]
    return True


def number(text: str) -> Fraction | None:
    """The value of a normalised integer, decimal number, mixed number or fraction of such; else None."""
    text = text.strip("()") if re.fullmatch(r"\([^(),]*\)", text) else text
    if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?", text):
        text = text.replace(",", "")
    plain = r"(?:\d+\.?\d*|\.\d+)"
    if mixed := re.fullmatch(r"([-+]?)(\d+)_(\d+)/(\d+)", text):
        sign, whole, top, bottom = mixed.groups()
        if int(bottom) == 0:
            return None
        value = int(whole) + Fraction(int(top), int(bottom))
        return -value if sign == "-" else value
    match = re.fullmatch(rf"([-+]?{plain})(?:/\(?([-+]?{plain})\)?)?", text)
    if match is None:
        return None
    top, bottom = (Fraction(part) if part else Fraction(1) for part in match.groups())
    return top / bottom if bottom else None


def _parts(text: str) -> tuple[str, list[str]]:
    """The brackets around a list and its elements; no brackets, one element, for anything else."""
    kind = ""
    if len(text) > 1 and text[0] in _OPENING and text[-1] in _CLOSING and _closes(text) == len(text) - 1:
        kind, text = text[0] + text[-1], text[1:-1]
    elements, depth, begin = [], 0, 0
    for place, character in enumerate(text):
        depth += (character in _OPENING) - (character in _CLOSING)
        if character in ",;" and depth == 0:
            elements.append(text[begin:place])
            begin = place + 1
    return kind, [*elements, text[begin:]]


def _closes(text: str) -> int:
    """Where the bracket that ``text`` begins with is closed, by a bracket of either kind (intervals mix them)."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character in _OPENING) - (character in _CLOSING)
        if depth == 0:
            return place
    return -1


def normalise(answer: str) -> str:
    """One notation for the answers that only differ in how they are typeset."""
    text = answer.strip()
    boxed = re.search(r"\\(?:boxed|fbox)\s*(?=\{)", text)
    text = _braced(text[boxed.end() :]) if boxed else text
    text = _without_typesetting(text)
    text = _without_units(text)
    text = text.replace("\\{", "{").replace("\\}", "}") if text.startswith("\\{") else text
    text = _fractions(text)
    text = re.sub(r"(?<=\d),\s+(?=\d{3}(?!\d))", ";", text)  # "1, 234" is not 1,234
    text = re.sub(r"(?<=\d)\s+(?=\d)", "|", text.strip())  # "5 3" is not 53
    text = re.sub(r"\s+", "", text)
    text = re.sub(r"\*(?!\d)|(?<!\d)\*", "", text)
    text = re.sub(r"([\^_])\{([^{}])\}", r"\1\2", text)
    text = re.sub(r"([,(\[])\+(?=\\infty)", r"\1", text)
    # x = 5, f(x) = 5 and x \in ... state what x is.
    text = re.sub(r"^\\?[A-Za-z]+(?:_\w|\([a-z]\))?(?:=|\\in(?![a-z]))(?=[^=]+$)", "", text)
    choice = re.fullmatch(r"\(?([A-Z])\)?", text)
    if choice:
        return choice.group(1)
    return text.lower() if re.fullmatch(r"[A-Za-z]{2,}", text) else text


_SAME = (
    (r"\\\$|\$|€|£|\\!|\\left(?![a-z])|\\right(?![a-z])|\\[bB]igg?[lr]?(?![a-z])|\\displaystyle", ""),
    (r"(?<!\\)\\[,;: ]|~|\\q?quad|\\\(|\\\)|\\\[|\\\]", " "),
    (r"\{,\}", ""),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°|\\%|%", ""),
    (r"−|–", "-"),
    (r"\\leq(?![a-z])", r"\\le"),
    (r"\\geq(?![a-z])", r"\\ge"),
    (r"\\neq(?![a-z])", r"\\ne"),
    (r"\\(?:cdot|times)(?![a-z])|×", "*"),
    (r"∞", r"\\infty"),
    (r"π", r"\\pi"),
    (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
    (r"\\\\\s*(?=\\end)", ""),
)


def _without_typesetting(text: str) -> str:
    for pattern, replacement in _SAME:
        text = re.sub(pattern, replacement, text)
    return text.strip().rstrip(".,;").strip()


def _without_units(text: str) -> str:
    r"""``5 \text{ cm}^2`` and ``18 eggs per day`` are 5 and 18; words alone stay, as do ``2x`` and ``2 \pi``."""
    power = r"(?:\s*\^\s*\{?\d\}?)?"
    text = re.sub(rf"\s*{_TEXT}\{{\s*(?:or|and)\s*\}}\s*", ",", text)
    bare = re.fullmatch(rf"{_TEXT}\{{([^{{}}]*)\}}", text)
    if bare:
        text = bare.group(1).strip()
    else:
        text = re.sub(rf"(?<=[\d}})])\s*{_TEXT}\{{[^{{}}]*\}}{power}(?=\s*$)", "", text)
        text = re.sub(rf"{_TEXT}\{{([^{{}}]*)\}}", r"\1", text)
    text = re.sub(r"(?<=[\w})])\s+(?:or|and)\s+(?=[-\\\d(]|[a-z]\b)", ",", text)
    words = r"(?!pi\b|sqrt\b|and\b|or\b)[A-Za-z]{2,}\.?"
    match = re.fullmatch(rf"(.*\d[)}}]*)\s+{words}(?:[\s/]+(?:[A-Za-z]+\.?))*{power}", text)
    return match.group(1) if match else text


def _fractions(text: str) -> str:
    r"""``\frac{a}{b}`` as ``a/b``, in brackets where a sum or product needs them; ``1\frac{1}{2}`` as ``1_1/2``."""
    while (place := text.find("\\frac")) >= 0:
        top, rest = _argument(text[place + len("\\frac") :])
        bottom, rest = _argument(rest)
        if top is None or bottom is None:
            return text
        before = text[:place]
        if (
            re.search(r"(?:^|[^\w.])\d+\s*$", before)
            and top.isdecimal()
            and bottom.isdecimal()
            and int(top) < int(bottom)
        ):
            before = before.rstrip() + "_"
        top = f"({top})" if re.search(r"(?<=.)[-+]", top) else top
        bottom = bottom if re.fullmatch(r"\d+\.?\d*|[A-Za-z]|\\[A-Za-z]+|\\sqrt\{[^{}]*\}", bottom) else f"({bottom})"
        text = f"{before}{top}/{bottom}{rest}"
    return text


def _argument(text: str) -> tuple[str | None, str]:
    """The argument of a LaTeX command that ``text`` begins with (in braces, or one character), and the rest."""
    text = text.lstrip()
    if not text:
        return None, ""
    if text[0] != "{":
        return text[0], text[1:]
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return _fractions(text[1:place].strip()), text[place + 1 :]
    return None, text
