"""Small faults of one Python file, as replacements of a stretch of its text."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

BOUNDARIES = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}
OPPOSITES = {"==": "!=", "!=": "==", "is": "is not", "is not": "is", "in": "not in", "not in": "in"}
REVERSES = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
ARITHMETIC = {"+": "-", "-": "+", "*": "/", "/": "*", "//": "*", "%": "*", "**": "*", "<<": ">>", ">>": "<<"}
TWINS = {"min": "max", "max": "min", "any": "all", "all": "any", "ceil": "floor", "floor": "ceil"}
"""Functions that are taken for each other."""
UNWRAPPED = frozenset({"abs", "sorted", "reversed", "float", "int", "set", "round"})
"""Functions of one argument that a fault leaves out."""
LEFT_OUT = frozenset(
    (
        *("eval", "copy", "double", "float", "half", "contiguous", "detach", "clone", "flatten", "tolist"),
        *("resolve", "expanduser", "strip", "lower"),
    )
)
"""Methods without arguments that a fault leaves out."""
KEY = re.compile(r"[\w./:-]+")
"""Strings that a program reads: names, keys, endings. Others are for people, and stay."""
OPERATOR = re.compile(
    r"\bnot\s+in\b|\bis\s+not\b|\bis\b|\bin\b|<<|>>|<=|>=|==|!=|//|\*\*|[-+*/%<>]|\band\b|\bor\b"
)


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        file: from the repository, with slashes.
        start: of the stretch that it replaces, in bytes.
        end: of the stretch, in bytes.
        text: what takes its place.
        kind: of fault, in a word or two.
        number: of the line that the stretch begins on, from 1.
        line: that line, without the space around it.
        becomes: the line with the fault; lines that the stretch went on to are part of it.
        function: the outermost function or method that it stands in, as `Class.method`; "" outside of functions.
        ordinal: how many faults before it have the same line and become the same.
    """

    file: str
    start: int
    end: int
    text: str
    kind: str
    number: int
    line: str
    becomes: str
    function: str
    ordinal: int = 0

    @property
    def key(self) -> str:
        """What names the fault also when lines before it have moved."""
        parts = (self.file, self.line, self.becomes, self.ordinal)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def planted(self, source: bytes) -> bytes:
        """Return a source text with the fault in it."""
        return source[: self.start] + self.text.encode() + source[self.end :]


def faults_of(file: str, source: bytes) -> list[Fault]:
    """Return the faults that can be planted in a Python file, by position; each changes what the file means."""
    tree = ast.parse(source)
    text = _Text(source)
    statements = [_Statement(source, *text.whole(node)) for node in tree.body]
    seen: set[bytes] = set()
    counts: dict[tuple[str, str], int] = {}
    found = []
    edits = [edit for function, node in functions(tree) for edit in _edits(node, text, function)]
    for start, end, replacement, kind, function in sorted(edits):
        changed = source[:start] + replacement.encode() + source[end:]
        (statement,) = (each for each in statements if each.start <= start and end <= each.end)
        if changed in seen or not statement.differs(start, end, replacement):
            continue
        seen.add(changed)
        fault = fault_at(file, source, start, end, replacement, kind, function)
        ordinal = counts.get((fault.line, fault.becomes), 0)
        counts[fault.line, fault.becomes] = ordinal + 1
        found.append(replace(fault, ordinal=ordinal))
    return found


def fault_at(file: str, source: bytes, start: int, end: int, text: str, kind: str, function: str) -> Fault:
    """Return the fault that replaces a stretch of a file; see `Fault`."""
    first = source.rfind(b"\n", 0, start) + 1
    line = _one_line(source[first : _line_end(source, start)])
    becomes = _one_line(source[first:start] + text.encode() + source[end : _line_end(source, end)])
    number = source.count(b"\n", 0, start) + 1
    return Fault(file, start, end, text, kind, number, line, becomes, function)


def _line_end(source: bytes, position: int) -> int:
    found = source.find(b"\n", position)
    return found if found >= 0 else len(source)


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Return the parts of a module that run, with the name of the outermost function that each stands in, or ""."""

    def parts(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.AST]]:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield prefix + node.name, node
            elif isinstance(node, ast.ClassDef):
                yield from parts(node.body, f"{prefix}{node.name}.")
            else:
                yield "", node

    return parts(tree.body, "")


def is_docstring(node: ast.AST) -> bool:
    """Whether a statement is a string alone."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


_Edit = tuple[int, int, str, str, str]


class _Text:
    """A source text, by the positions that `ast` gives: lines from 1, columns in bytes."""

    def __init__(self, source: bytes) -> None:
        self.source = source
        self._starts = [0]
        for line in source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))

    def span(self, node: ast.AST) -> tuple[int, int]:
        at: tuple[int, int, int, int] = (node.lineno, node.col_offset, node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]
        return self._starts[at[0] - 1] + at[1], self._starts[at[2] - 1] + at[3]

    def whole(self, node: ast.AST) -> tuple[int, int]:
        """The span of a statement with its decorators."""
        start, end = self.span(node)
        first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])  # type: ignore[attr-defined]
        return min(start, self._starts[first - 1]), end

    def of(self, node: ast.AST) -> str:
        start, end = self.span(node)
        return self.source[start:end].decode()


def _one_line(text: bytes) -> str:
    return " ".join(text.decode().split())


class _Statement:
    """A statement of a module, which is parsed by itself: whole files take much longer."""

    def __init__(self, source: bytes, start: int, end: int) -> None:
        self.source, self.start, self.end = source, start, end
        self._meaning = ast.dump(ast.parse(source[start:end]))

    def differs(self, start: int, end: int, replacement: str) -> bool:
        """Whether it means something else, and something at all, with another text from one byte to another."""
        changed = self.source[self.start : start] + replacement.encode() + self.source[end : self.end]
        try:
            return ast.dump(ast.parse(changed)) != self._meaning
        except (SyntaxError, ValueError):
            return False


def _edits(top: ast.AST, text: _Text, function: str) -> Iterator[_Edit]:
    """Return every edit below a node."""
    if _stays(top):
        return
    for start, end, replacement, kind in _edits_at(top, text):
        yield start, end, replacement, kind, function
    for child in _children(top):
        yield from _edits(child, text, function)


def _stays(node: ast.AST) -> bool:
    """Whether nothing in a node is changed: texts for people, types, and names that are imported or exported."""
    if isinstance(node, (ast.Import, ast.ImportFrom, ast.JoinedStr)) or is_docstring(node):
        return True
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        return True
    if isinstance(node, ast.Assign):
        return any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets)
    return (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("cast", "TypeVar")
    )


def _children(node: ast.AST) -> list[ast.AST]:
    """Return the parts of a node in which faults are planted: no annotations, decorators, bases and errors' texts."""
    if isinstance(node, ast.Raise):
        return []
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        defaults = [value for value in (*node.args.defaults, *node.args.kw_defaults) if value is not None]
        return [*defaults, *node.body]
    if isinstance(node, ast.ClassDef):
        return [*node.body]
    if isinstance(node, ast.AnnAssign):
        return [node.value] if node.value is not None else []
    return list(ast.iter_child_nodes(node))


def _edits_at(node: ast.AST, text: _Text) -> Iterator[tuple[int, int, str, str]]:
    """Return the edits of one node itself."""
    match node:
        case ast.Compare():
            yield from _comparisons(node, text)
        case ast.BoolOp():
            yield from _connections(node, text)
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert(), operand=operand):
            yield *text.span(node), text.of(operand), "sign left out"
        case ast.BinOp(left=left, right=right):
            if not (
                _is_text(left) or _is_text(right) or (isinstance(node.op, ast.Div) and _is_path(left, right))
            ):
                yield from _operators([left, right], text, ARITHMETIC, "arithmetic")
        case ast.Constant(value=value):
            for other in _other_constants(value):
                yield *text.span(node), other, "constant"
        case ast.If(test=test):
            yield from _conditions(test, text, ("False",))
        case ast.IfExp(test=test):
            yield from _conditions(test, text, ())
        case ast.comprehension(ifs=tests):
            for test in tests:
                yield from _conditions(test, text, ("True",))
        case ast.For(iter=values):
            yield *text.span(values), "()", "loop left out"
        case ast.Subscript(slice=ast.Constant(value=0) as index):
            yield *text.span(index), "-1", "last for first"
        case ast.Call():
            yield from _calls(node, text)
        case ast.Expr(value=ast.Call() | ast.Await()) | ast.AugAssign() | ast.Raise() | ast.Delete():
            yield *text.span(node), "pass", "statement left out"
        case ast.Assign(targets=[ast.Subscript() | ast.Attribute()]):
            yield *text.span(node), "pass", "statement left out"
        case ast.Continue():
            yield *text.span(node), "break", "loop"
        case ast.Break():
            yield *text.span(node), "continue", "loop"
        case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
            yield *text.span(value), "None", "nothing returned"


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _is_path(left: ast.expr, right: ast.expr) -> bool:
    """Whether a division looks like one of a path by a name, which any other operator would only break."""
    words = re.compile(r"path|folder|parent|root|home|directory|place", re.IGNORECASE)
    return words.search(ast.dump(left)) is not None or words.search(ast.dump(right)) is not None


def _comparisons(node: ast.Compare, text: _Text) -> Iterator[tuple[int, int, str, str]]:
    sides = [node.left, *node.comparators]
    for table, kind in ((BOUNDARIES, "boundary"), (OPPOSITES, "comparison"), (REVERSES, "comparison")):
        yield from _operators(sides, text, table, kind)


def _connections(node: ast.BoolOp, text: _Text) -> Iterator[tuple[int, int, str, str]]:
    yield from _operators(node.values, text, {"and": "or", "or": "and"}, "and, or")
    neutral = "True" if isinstance(node.op, ast.And) else "False"
    for value in node.values:
        yield *text.span(value), neutral, "part left out"


def _operators(
    sides: list[ast.expr], text: _Text, table: dict[str, str], kind: str
) -> Iterator[tuple[int, int, str, str]]:
    """Exchange the operators between operands; brackets and line breaks may stand there, too."""
    for left, right in pairwise(sides):
        start, end = text.span(left)[1], text.span(right)[0]
        for found in OPERATOR.finditer(text.source[start:end].decode(errors="replace")):
            name = " ".join(found.group().split())
            if name in table:
                yield start + found.start(), start + found.end(), table[name], kind
            break


def _other_constants(value: object) -> list[str]:
    if isinstance(value, bool):
        return [str(not value)]
    if isinstance(value, int):
        return [str(value + 1), *(["0"] if value == 1 else [])]
    if isinstance(value, float):
        return [repr(value * 2 if value else 1.0)]
    if isinstance(value, str) and KEY.fullmatch(value):
        return [repr(value + "_")]
    return []


def _conditions(
    test: ast.expr, text: _Text, constants: tuple[str, ...]
) -> Iterator[tuple[int, int, str, str]]:
    start, end = text.span(test)
    opposite = isinstance(test, ast.UnaryOp) or (isinstance(test, ast.Compare) and len(test.ops) == 1)
    if not (opposite and _has_opposite(test)):
        yield start, end, f"not ({text.of(test)})", "condition"
    for constant in constants:
        yield start, end, constant, "condition"


def _has_opposite(test: ast.expr) -> bool:
    """Whether another edit already makes the opposite of a condition."""
    ordered = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
    return not (isinstance(test, ast.Compare) and isinstance(test.ops[0], ordered))


def _calls(node: ast.Call, text: _Text) -> Iterator[tuple[int, int, str, str]]:
    start, end = text.span(node)
    arguments = [*node.args, *node.keywords]
    if isinstance(node.func, (ast.Name, ast.Attribute)):
        name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
        name_end = text.span(node.func)[1]
        if name in TWINS:
            yield name_end - len(name), name_end, TWINS[name], "twin"
        if isinstance(node.func, ast.Name) and name in UNWRAPPED and len(arguments) == 1 and node.args:
            yield start, end, f"({text.of(node.args[0])})", "call left out"
        if isinstance(node.func, ast.Attribute) and name in LEFT_OUT and not arguments:
            yield start, end, text.of(node.func.value), "call left out"
    for keyword in node.keywords:
        if keyword.arg is not None:
            yield *_with_comma(text, *text.span(keyword)), "", "argument left out"
    checks = isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "hasattr", "getattr")
    if (
        len(node.args) == 2
        and not checks
        and all(isinstance(value, (ast.Name, ast.Attribute)) for value in node.args)
    ):
        first, second = node.args
        stretch = text.source[text.span(first)[1] : text.span(second)[0]].decode()
        yield text.span(first)[0], text.span(second)[1], text.of(second) + stretch + text.of(first), "order"


def _with_comma(text: _Text, start: int, end: int) -> tuple[int, int]:
    """Return a stretch with the comma after it, or, where there is none, with the one before it."""
    after = re.compile(rb"\s*,\s*").match(text.source, end)
    if after:
        return start, after.end()
    before = re.search(rb"\s*,\s*$", text.source[:start])
    return (before.start(), end) if before else (start, end)
