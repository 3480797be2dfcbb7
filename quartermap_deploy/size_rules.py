"""What the sizes of a model's inputs must fulfil, so that its graph is right.

A module may decide by a size: `if x.shape[2] % 7 == 0`. In a graph one of the two ways is left, and nothing in ONNX
says for which sizes it is the right one. torch notes what it took for granted; here that is kept as text, such as
`images[2] % 7 == 0`, and looked up at every run.
"""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from quartermap_deploy.errors import BundleError, InputError

_BINARY: dict[type[ast.AST], Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Div: operator.truediv,
}
_COMPARE: dict[type[ast.AST], Any] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_CALLS: dict[str, Any] = {"max": max, "min": min, "abs": abs}
LONGEST = 2000
"""Characters of a rule. Longer ones are nobody's."""

Shapes = Mapping[str, tuple[int, ...]]


class SizeRules:
    """The rules of one model.

    Args:
        rules: comparisons of whole numbers over `name[axis]`, with + - * // % / max min abs, and, or, not.

    Raises:
        BundleError: if a rule is anything else. Nothing is ever executed.
    """

    def __init__(self, rules: Sequence[str]) -> None:
        self._trees = [(rule, _parsed(rule)) for rule in rules]
        self._fulfilled = functools.lru_cache(maxsize=64)(self._check)

    def check(self, shapes: Shapes) -> None:
        """Check the shapes of all inputs.

        Raises:
            InputError: if they break a rule.
        """
        if self._trees:
            self._fulfilled(tuple(sorted(shapes.items())))

    def _check(self, shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> None:
        known = dict(shapes)
        broken = [rule for rule, tree in self._trees if not _holds(tree, known)]
        if broken:
            sizes = ", ".join(f"{name} {shape}" for name, shape in shapes)
            # Several rules mostly follow from one decision of the module's; the shortest is the easiest to read.
            raise InputError(
                f"the model was exported for sizes with {min(broken, key=len)}, found {sizes}; its module decides by "
                "the size, so other sizes need an export of their own"
            )


def _holds(tree: ast.expr, shapes: Shapes) -> bool:
    try:
        return bool(_value(tree, shapes))
    except (ArithmeticError, IndexError, KeyError):
        return False


def is_rule(text: str) -> bool:
    """Whether a text is a rule that can be kept."""
    try:
        _parsed(text)
    except BundleError:
        return False
    return True


def _parsed(rule: object) -> ast.expr:
    if not isinstance(rule, str) or len(rule) > LONGEST:
        raise BundleError(f"{str(rule)[:80]!r} is no rule of sizes")
    try:
        tree = ast.parse(rule, mode="eval").body
        _require_known(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BundleError(f"{rule[:80]!r} is no rule of sizes") from error
    return tree


def _require_known(tree: ast.expr) -> None:
    """Check that a tree holds nothing but what `_value` computes.

    Raises:
        ValueError: if it does.
    """
    match tree:
        case ast.Constant(value=int()):
            return
        case ast.Subscript(value=ast.Name(), slice=ast.Constant(value=int())):
            return
        case ast.BinOp(op=op) if type(op) in _BINARY:
            parts = [tree.left, tree.right]
        case ast.Compare(ops=ops) if all(type(op) in _COMPARE for op in ops):
            parts = [tree.left, *tree.comparators]
        case ast.BoolOp():
            parts = tree.values
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            parts = [tree.operand]
        case ast.Call(func=ast.Name(id=name), keywords=[]) if name in _CALLS:
            parts = tree.args
        case _:
            raise ValueError(ast.dump(tree)[:80])
    for part in parts:
        _require_known(part)


def _value(tree: ast.expr, shapes: Shapes) -> Any:
    match tree:
        case ast.Constant():
            return tree.value
        case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=int() as axis)):
            return shapes[name][axis]
        case ast.BinOp():
            return _BINARY[type(tree.op)](_value(tree.left, shapes), _value(tree.right, shapes))
        case ast.Compare():
            values = [_value(part, shapes) for part in (tree.left, *tree.comparators)]
            pairs = zip(tree.ops, values, values[1:], strict=False)
            return all(_COMPARE[type(op)](left, right) for op, left, right in pairs)
        case ast.BoolOp():
            combine = all if isinstance(tree.op, ast.And) else any
            return combine(_value(part, shapes) for part in tree.values)
        case ast.UnaryOp():
            value = _value(tree.operand, shapes)
            return not value if isinstance(tree.op, ast.Not) else -value
        case ast.Call(func=ast.Name(id=name)):
            return _CALLS[name](*(_value(part, shapes) for part in tree.args))
    raise AssertionError(ast.dump(tree))
