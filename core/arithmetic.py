"""Sums in a text, computed: no `eval`, exact fractions, bounded. Torch-free.

`value` reads numbers, + - * / // % ** and brackets as Python's grammar has them, walks the tree and works in fractions,
so 0.1 + 0.2 is 0.3. `wrong_steps` finds what a text claims: GSM8K's `<<48/2=24>>` and plain `48 / 2 = 24`. A claimed
number with decimals may be the true one rounded to as many; a whole number must be exact.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

__all__ = ["agrees", "claimed_steps", "final_number", "number", "value"]

_MOST_CHARACTERS = 200
_MOST_BITS = 4096
_DIGITS = r"(?:\d{1,3}(?:,\d{3}){1,12}(?!\d)(?:\.\d{1,40})?|\d{1,40}(?:\.\d{1,40})?|\.\d{1,40})"
_NUMBER = rf"[-+]?\$?{_DIGITS}"
_STEP = re.compile(r"<<([^<>=]{1,200})=\s*([^<>=]{1,60})>>")
_OPERAND = rf"(?:\(\s{{0,3}}){{0,8}}-?\$?{_DIGITS}%?(?:\s{{0,3}}\)){{0,8}}"
_OPERATOR = r"\s{0,3}(?:\*\*|//|[-+*/×÷x])\s{0,3}"
_EQUATION = re.compile(
    rf"(?<![\w.)^*/+%-])({_OPERAND}(?:{_OPERATOR}{_OPERAND}){{1,40}})\s{{0,3}}=\s{{0,3}}({_NUMBER})(?!\s*[*/×÷])"
)
_FINAL = re.compile(rf"####\s*({_NUMBER})")
_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b), ast.Mod: operator.mod,
}  # fmt: skip


def value(expression: str) -> Fraction:
    """Return what an expression comes to; ValueError for anything else than arithmetic, or too large.

    >>> value("(48 / 2 + 0.5) * 2")
    Fraction(49, 1)
    """
    if len(expression) > _MOST_CHARACTERS:
        raise ValueError(f"an expression of {len(expression)} characters (at most {_MOST_CHARACTERS})")
    plain = re.sub(r"(?<=\d),(?=\d{3})", "", expression.replace("$", "").replace("×", "*").replace("÷", "/"))
    plain = re.sub(r"(?<=[\d)\s])x(?=[\d(\s-])", "*", plain)
    plain = re.sub(r"(\d+(?:\.\d+)?|\.\d+)%(?!\s*[\d(])", r"(\1/100)", plain)
    try:
        return _walk(ast.parse(plain.strip(), mode="eval").body, plain)
    except (SyntaxError, ZeroDivisionError, OverflowError, RecursionError, MemoryError) as error:
        raise ValueError(f"{expression.strip()!r} cannot be computed ({type(error).__name__})") from error


def _walk(node: ast.expr, text: str) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        segment = ast.get_source_segment(text.strip(), node) or ""
        plain = re.fullmatch(r"[\d_]*\.?\d*", segment) is not None  # not 1e999999
        result = Fraction(segment.replace("_", "")) if plain else Fraction(float(node.value))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        inner = _walk(node.operand, text)
        result = -inner if isinstance(node.op, ast.USub) else inner
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        result = _power(_walk(node.left, text), _walk(node.right, text))
    elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        result = _BINARY[type(node.op)](_walk(node.left, text), _walk(node.right, text))
    else:
        raise ValueError(f"{text.strip()!r} is not arithmetic ({type(node).__name__})")
    if max(result.numerator.bit_length(), result.denominator.bit_length()) > _MOST_BITS:
        raise ValueError(f"{text.strip()!r} grows beyond {_MOST_BITS:,} bits")
    return result


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    bits = max(base.numerator.bit_length(), base.denominator.bit_length(), 1)
    if exponent.denominator != 1 or abs(exponent) * bits > _MOST_BITS:
        raise ValueError(f"a power {exponent} of a number of {bits} bits is not computed")
    return base ** int(exponent)


def number(text: str) -> Fraction:
    """Return a written number: `$1,234.50` or `12`; ValueError otherwise.

    >>> number("$1,234.5")
    Fraction(2469, 2)
    """
    plain = text.strip().replace("$", "").replace(",", "").rstrip(".")
    if not re.fullmatch(r"[-+]?(?:\d+(?:\.\d+)?|\.\d+)", plain):
        raise ValueError(f"{text!r} is no number")
    return Fraction(plain)


def agrees(true: Fraction, claimed: str) -> bool:
    """Return whether a claimed number is the true one, or the true one rounded to the decimals it is given with.

    >>> agrees(Fraction(10, 3), "3.33"), agrees(Fraction(10, 3), "3"), agrees(Fraction(3), "3.0")
    (True, False, True)
    """
    given = number(claimed)
    decimals = len(claimed.strip().partition(".")[2])
    return given == true or (decimals > 0 and abs(given - true) <= Fraction(1, 2 * 10**decimals))


def claimed_steps(text: str) -> list[tuple[str, str]]:
    """Return every (expression, number) that a text says are equal.

    >>> claimed_steps("So 48 / 2 = <<48/2=24>>24 clips, and 3 + 4 = 8.")
    [('48/2', '24'), ('3 + 4', '8')]
    """
    marked = [(expression.strip(), claimed.strip()) for expression, claimed in _STEP.findall(text)]
    seen = {("".join(expression.split()), claimed) for expression, claimed in marked}
    plain = [(e, n) for e, n in _EQUATION.findall(_STEP.sub("", text)) if e.count("(") == e.count(")")]
    return marked + [(e, n) for e, n in plain if ("".join(e.split()), n) not in seen]


def final_number(text: str) -> str | None:
    """Return the number behind the last `####`, or None.

    >>> final_number("so\\n#### 1,042")
    '1,042'
    """
    found = _FINAL.findall(text)
    return found[-1] if found else None
