"""Final answers as both data sets and their solvers write them, checked by hand; also what is not equal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorapre_dist.training.finetune.answers import equal, extract

RESPONSES = [
    # GSM8K's own form
    ("She makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18", "18"),
    ("...\n#### 1,080", "1,080"),
    ("...\n#### -47", "-47"),
    ("#### 5\nI checked it, and the number is right.", "5"),
    # MetaMath's
    ("So there are 72 clips.\n#### 72\nThe answer is: 72", "72"),
    ("Thus $x=\\boxed{\\frac{3}{4}}.$The answer is: \\frac{3}{4}", "\\frac{3}{4}"),
    ("The answer is: $1,234.50.", "$1,234.50"),
    ("The answer is: 18. Now the next question: what is 3 + 4?", "18"),
    ("the answer is 7", "7"),
    ("The answer is:\n 7", "7"),
    ("The answer is: 3.5", "3.5"),
    # MATH's
    ("Hence $\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}$.", "\\left( 3, \\frac{\\pi}{2} \\right)"),
    ("either \\boxed{1} or, more exactly, \\boxed{2}", "2"),
    ("$\\boxed{\\text{A set } \\{1, 2\\}}$", "\\text{A set } \\{1, 2\\}"),
    ("so it is \\fbox{4}", "4"),
    ("so it is $\\boxed 4$.", "4"),
    ("The final answer is $\\boxed{\\frac{1}{2}}$. I hope it is correct.", "\\frac{1}{2}"),
    # the last statement counts, and one that was cut off is none
    ("The answer is 5, no: $\\boxed{6}$", "6"),
    ("$\\boxed{6}$, so the answer is 5", "5"),
    ("#### 12\nLet us check: \\boxed{\\frac{1}{", "12"),
    ("\\boxed{\\frac{1}{", None),
    ("The answer is", None),
    ("There are 12 apples.", None),
    ("", None),
]


@pytest.mark.parametrize(("response", "answer"), RESPONSES)
def test_the_answer_in_a_response(response, answer):
    assert extract(response) == answer


# Answer found in a response, the data set's own.
EQUAL = [
    # numbers: thousands separators, signs, money, units, decimals
    ("18", "18"),
    ("18.", "18"),
    ("18.0", "18"),
    ("18.00", "18"),
    ("$18", "18"),
    ("\\$18.90", "18.9"),
    ("-$5", "-5"),
    ("$-5", "-5"),
    ("−5", "-5"),
    ("+7", "7"),
    ("1,080", "1080"),
    ("2520000", "2,520,000"),
    ("1{,}000", "1000"),
    ("10,\\!080", "10080"),
    ("1,\\!000,\\!000", "1000000"),
    ("$1,234.50", "1234.5"),
    (".5", "0.5"),
    ("007", "7"),
    ("18 eggs", "18"),
    ("18 eggs per day", "18"),
    ("18 dollars.", "18"),
    ("80 miles/hour", "80"),
    ("25%", "25"),
    ("25\\%", "25"),
    ("50 percent", "50"),
    ("£3", "3"),
    # LaTeX: fractions
    ("\\dfrac{14}{3}", "\\frac{14}{3}"),
    ("\\tfrac{14}{3}", "\\frac{14}{3}"),
    ("14/3", "\\frac{14}{3}"),
    ("\\frac{28}{6}", "\\frac{14}{3}"),
    ("\\frac143", "\\frac{1}{4}3"),
    ("\\frac12", "\\frac{1}{2}"),
    ("\\frac 12", "1/2"),
    ("\\frac1{2}", "0.5"),
    ("0.5", "\\frac{1}{2}"),
    ("-\\frac{1}{2}", "\\frac{-1}{2}"),
    ("1\\frac{4}{5}", "\\frac{9}{5}"),
    ("-1 \\frac{1}{2}", "-1.5"),
    ("\\frac{9}{3}", "3"),
    ("\\pi/2", "\\frac{\\pi}{2}"),
    ("(x+1)/2", "\\frac{x+1}{2}"),
    ("\\frac{\\sqrt{3}}{2}", "\\dfrac{\\sqrt3}{2}"),
    ("\\frac{\\frac{1}{2}}{3}", "\\frac{\\frac12}{3}"),
    # roots, powers, products, spacing
    ("3\\sqrt{13}", "3 \\sqrt{13}"),
    ("11\\sqrt2", "11\\sqrt{2}"),
    ("x^{2}+3x-6", "x^2 + 3x - 6"),
    ("3 \\cdot x", "3x"),
    ("3\\times 10^5", "3 \\cdot 10^{5}"),
    ("6-5i", "6 - 5i"),
    ("2k+2", "2k\\,+\\,2"),
    # units and degrees
    ("90^\\circ", "90"),
    ("90^{\\circ}", "90°"),
    ("90 degrees", "90"),
    ("864 \\mbox{ inches}^2", "864"),
    ("15\\text{ cm}^{2}", "15"),
    ("15 cm^2", "15"),
    ("5.4 \\text{ cents}", "5.4"),
    ("\\frac{1}{2}\\text{ hour}", "0.5"),
    # text and choices
    ("Evelyn", "\\text{Evelyn}"),
    ("\\text{ evelyn }", "\\text{Evelyn}"),
    ("C", "\\text{(C)}"),
    ("(C)", "\\textbf{(C)}"),
    ("\\mathrm{even}", "\\text{even}"),
    # tuples, intervals, sets, lists
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\pi/2)"),
    ("(0.5, 2)", "\\left(\\frac12,2\\right)"),
    ("[-2,7]", "\\left[-2, 7\\right]"),
    ("(0,9]", "(0, 9]"),
    ("(-\\infty,2)\\cup(3,+\\infty)", "(-\\infty, 2) \\cup (3, \\infty)"),
    ("x \\in [-2,7]", "[-2,7]"),
    ("-2, 1", "1,-2"),
    ("1 and -2", "1,-2"),
    ("1 \\text{ or } -2", "-2, 1"),
    ("\\{2, 1\\}", "\\{1,2\\}"),
    ("(1,2), (3,4)", "(3,4),(1,2)"),
    ("\\begin{pmatrix} -\\frac13 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} -1/3 \\\\ 2 \\\\ \\end{pmatrix}"),
    # what x is
    ("x = 5", "5"),
    ("x=5", "x = 5.0"),
    ("f(x) = 2x+3", "2x + 3"),
    ("\\boxed{5}", "5"),
    ("$5$", "5"),
    ("\\(5\\)", "5"),
    ("4210_{5}", "4210_5"),
    ("x \\leq 3", "x\\le3"),
]

DIFFERENT = [
    (None, "5"),
    ("", "5"),
    ("", ""),
    ("18", "81"),
    ("5", "-5"),
    ("1.8", "18"),
    ("18 or 20", "18"),
    ("5 3", "53"),
    ("5 dollars and 30 cents", "5"),
    ("1.5 million", "1500000"),
    ("1,08", "108"),
    ("1, 234", "1234"),
    ("(1,234)", "1234"),
    ("0.33", "\\frac{1}{3}"),
    ("0.25", "25\\%"),
    ("\\frac{1}{2}", "2"),
    ("\\frac{1}{0}", "1"),
    ("\\frac{3}{2}", "\\frac{2}{3}"),
    ("\\frac{1}{2x}", "\\frac{1}{2}x"),
    ("3 \\cdot 10^5", "310^5"),
    ("2 \\pi", "2"),
    ("2x", "2"),
    ("2\\sqrt{2}", "\\sqrt{8}"),
    ("x^{12}", "x^1 2"),
    ("4210_5", "4210"),
    ("52_8", "528"),
    ("(2,1)", "(1,2)"),
    ("(1,2)", "[1,2]"),
    ("(1,2]", "(1,2)"),
    ("(1,2)", "(1,2,3)"),
    ("1,2,2", "1,2"),
    ("1,1,2", "1,2,2"),
    ("(-\\infty,2)", "(-\\infty,2]"),
    ("A", "B"),
    ("(C)", "C, D"),
    ("a", "A"),
    ("Evelyn", "Angela"),
    ("x = 5", "x = 6"),
    ("x < 5", "5"),
    ("6+5i", "6-5i"),
    ("\\text{odd}", "\\text{even}"),
    ("864 \\mbox{ inches}^2", "864^2"),
    ("\\frac²³", "2"),
    ("9" * 5000, "9" * 5000),
    ("\\frac{" * 1000, "1"),
]


@pytest.mark.parametrize(("answer", "reference"), EQUAL)
def test_equal(answer, reference):
    assert equal(answer, reference)
    assert equal(reference, answer)


@pytest.mark.parametrize(("answer", "reference"), DIFFERENT)
def test_different(answer, reference):
    assert not equal(answer, reference)
    assert answer is None or not equal(reference, answer)


PIECES = [
    "\\frac",
    "\\boxed",
    "\\text",
    "\\sqrt",
    "{",
    "}",
    "(",
    ")",
    "[",
    "]",
    ",",
    ";",
    "1",
    "23",
    "0",
    ".",
    "/",
    "x",
]
PIECES += [
    "-",
    "+",
    "^",
    "_",
    "$",
    "%",
    " ",
    "\n",
    "\\",
    "|",
    "²",
    "٣",
    "####",
    "answer is",
    "cm",
    "and",
    "=",
    "°",
    "\\{",
]
strange = st.lists(st.sampled_from(PIECES), max_size=30).map("".join)


@given(strange, strange)
def test_whatever_a_model_writes_is_compared(one, other):
    assert equal(one, other) == equal(other, one)
    found = extract(one)
    assert found is None or found == found.strip() != ""
