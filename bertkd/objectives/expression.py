"""The text form of an objective: a small, Python-like language read with ``ast`` and never run.

``0.5*hid_seq(map='skip') + att_kl@released`` is a sum of optionally weighted names; a name may take
keyword options with literal values, and ``@released`` asks for the released code's arithmetic.
"""

from __future__ import annotations

import ast
import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

RELEASED = "released"


@dataclass(frozen=True)
class TermSpec:
    """One summand: a term or preset by name, its options, weight and variant.

    ``position`` is the 0-based column of the name in the text it was read from; it serves error
    messages only and takes no part in comparisons.
    """

    kind: str
    options: tuple[tuple[str, Any], ...] = ()
    weight: float = 1.0
    released: bool = False
    name: str = ""
    text: str = ""
    position: int = 0

    def __str__(self) -> str:
        """The summand as text that :func:`parse` reads back."""
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.options)
        body = f"{self.kind}({arguments})" if self.options else self.kind
        variant = f"@{RELEASED}" if self.released else ""
        factor = "" if self.weight == 1.0 else f"{self.weight!r}*"
        return f"{factor}{body}{variant}"

    def __eq__(self, other: object) -> bool:
        """Equal when they mean the same term, wherever they were read from."""
        if not isinstance(other, TermSpec):
            return NotImplemented
        return self._meaning() == other._meaning()

    def __hash__(self) -> int:
        """Hash of the kind only: option values may be lists."""
        return hash(self.kind)

    def _meaning(self) -> tuple[Any, ...]:
        return self.kind, sorted(self.options), self.weight, self.released, self.name


@dataclass(frozen=True)
class Expression:
    """A sum of terms; ``str(expression)`` is text that :func:`parse` reads back to an equal one."""

    terms: tuple[TermSpec, ...]

    def __str__(self) -> str:
        """The sum as text."""
        return " + ".join(str(term) for term in self.terms)


def syntax_error(message: str, text: str, position: int) -> ValueError:
    """Build the error for an objective that cannot be read, with a caret under the place.

    Args:
        message: what is wrong and what to write instead.
        text: the whole objective.
        position: 0-based column in ``text``.
    """
    return ValueError(f"objective: {message}\n  {text}\n  {' ' * position}^")


def distinct_names(terms: tuple[TermSpec, ...]) -> tuple[TermSpec, ...]:
    """Name each term by its kind; repeated kinds get ``_2``, ``_3``, ... in order."""
    seen: Counter[str] = Counter()
    named = []
    for term in terms:
        seen[term.kind] += 1
        count = seen[term.kind]
        named.append(replace(term, name=term.kind if count == 1 else f"{term.kind}_{count}"))
    return tuple(named)


def parse(text: str) -> Expression:
    """Read an objective.

    Args:
        text: a sum such as ``"att_mse + 0.5*hid_seq(map='skip')"``. Names are not looked up here.

    Returns:
        The summands in order, each with a distinct name.

    Raises:
        TypeError: ``text`` is not a string.
        ValueError: the text is not such a sum; the message shows the text and the place.
    """
    if not isinstance(text, str):
        raise TypeError(f"objective must be text such as 'att_kl + hid_seq', got {text!r}")
    line = " ".join(text.split())
    if not line:
        raise ValueError("objective is empty; write for example 'att_kl + hid_seq'")
    try:
        terms = _Reader(line).sum(_syntax_tree(line))
    except (RecursionError, MemoryError):
        raise ValueError("objective is nested too deeply or too long to be read") from None
    return Expression(distinct_names(tuple(terms)))


def _syntax_tree(line: str) -> ast.expr:
    try:
        return ast.parse(line, mode="eval").body
    except SyntaxError as error:
        column = min(max((error.offset or 1) - 1, 0), len(line))
        message = f"{error.msg}; write a sum such as 'att_kl + 0.5*hid_seq'"
        raise syntax_error(message, line, column) from None
    except ValueError as error:  # a null character, before Python 3.12
        raise ValueError(f"objective cannot be read: {error}") from None


class _Reader:
    """Turns the syntax tree of one objective into summands."""

    def __init__(self, text: str) -> None:
        self.text = text

    def fail(self, message: str, node: ast.AST) -> ValueError:
        return syntax_error(message, self.text, self.column(node))

    def column(self, node: ast.AST) -> int:
        # ast counts UTF-8 bytes, the caret counts characters.
        offset = getattr(node, "col_offset", 0)
        return len(self.text.encode()[:offset].decode(errors="ignore"))

    def sum(self, node: ast.expr) -> list[TermSpec]:
        match node:
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return self.sum(left) + self.sum(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return self.product(left, right, node)
            case ast.BinOp(left=left, op=ast.MatMult(), right=right):
                return self.variant(left, right)
            case ast.BinOp(op=ast.Sub()) | ast.UnaryOp(op=ast.USub()):
                raise self.fail(
                    "weights must not be negative; terms can only be added, and names are written with _, "
                    "as in att_kl",
                    node,
                )
            case ast.Name(id=name):
                return [TermSpec(name, text=self.text, position=self.column(node))]
            case ast.Call():
                return [self.call(node)]
        raise self.fail("expected a term such as att_kl, 0.5*hid_seq or kd(temperature=2)", node)

    def product(self, left: ast.expr, right: ast.expr, node: ast.expr) -> list[TermSpec]:
        for factor, rest in ((left, right), (right, left)):
            weight = _number(factor)
            if weight is None:
                continue
            if not math.isfinite(weight) or weight < 0:
                message = f"a weight must be finite and not negative, got {weight}"
                raise self.fail(message, factor)
            return [replace(term, weight=weight * term.weight) for term in self.sum(rest)]
        raise self.fail("one side of * must be a number, as in 0.5*hid_seq", node)

    def variant(self, left: ast.expr, right: ast.expr) -> list[TermSpec]:
        # In Python @ and * bind alike, so "att_kl @ released * 2" has the product outside.
        if not (isinstance(right, ast.Name) and right.id == RELEASED):
            raise self.fail(f"after @ only {RELEASED!r} is known, as in att_kl@{RELEASED}", right)
        return [replace(term, released=True) for term in self.sum(left)]

    def call(self, node: ast.Call) -> TermSpec:
        if not isinstance(node.func, ast.Name):
            raise self.fail("only a term's name can be followed by options", node)
        name = node.func.id
        if node.args:
            message = f"options of {name} are written with their names, as in {name}(map='last')"
            raise self.fail(message, node.args[0])
        options: dict[str, Any] = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                raise self.fail(f"** is not allowed in the options of {name}", keyword.value)
            if keyword.arg in options:
                raise self.fail(f"option {keyword.arg!r} of {name} is given twice", keyword.value)
            try:
                options[keyword.arg] = ast.literal_eval(keyword.value)
            except (ValueError, TypeError, SyntaxError):
                message = f"option {keyword.arg!r} of {name} must be a plain value (quote text)"
                raise self.fail(message, keyword.value) from None
        weight = options.pop("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise self.fail(f"weight of {name} must be a number, got {weight!r}", node)
        if not math.isfinite(weight) or weight < 0:
            raise self.fail(f"weight of {name} must be finite and not negative, got {weight}", node)
        return TermSpec(
            name, tuple(options.items()), float(weight), text=self.text, position=self.column(node)
        )


def _number(node: ast.expr) -> float | None:
    match node:
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant() as operand):
            value = _number(operand)
            return None if value is None else -value
        case ast.Constant(value=bool()):
            return None
        case ast.Constant(value=int() | float() as value):
            # An int beyond float's range would raise OverflowError instead of being refused.
            return float(value) if abs(value) <= 1e308 else math.inf
    return None
