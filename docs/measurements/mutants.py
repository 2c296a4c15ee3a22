"""Planted errors in a Python file, one at a time: the mutants that docs/measurements/mutations.py runs."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

UNTOUCHED_CALLS = {
    "Field",
    "progress",
    "say",
    "heartbeat",
    "note",
    "main_only",
    "print",
    "super",
    "write_text",
    "lru_cache",
}
"""Limits of recipe fields, and what is only shown."""
UNTOUCHED_FUNCTIONS = {"cost", "_real_runs", "check", "lora_parameters", "__repr__", "__hash__"}
"""The plan's estimates and refusals, which have tests of their own."""

ALIASES = {"Callable", "Mapping", "Literal", "tuple", "dict"}
"""What names of types begin with."""

EXCHANGED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


@dataclass(frozen=True)
class Mutant:
    """One planted error; `make` gives the whole file with it."""

    file: str
    line: str
    what: str
    make: Callable[[], str]

    @property
    def key(self) -> str:
        return f"{self.file} | {self.line} | {self.what}"


def mutants(file: Path, root: Path) -> Iterator[Mutant]:
    """All mutants of a file, in the order of their places."""
    text = file.read_text(encoding="utf-8")
    lines, tree = text.splitlines(), ast.parse(text)
    seen: dict[str, int] = {}
    for place, node in enumerate(ast.walk(tree)):
        node.place = place  # type: ignore[attr-defined]
    for node in touched(tree):
        for number, (what, _) in enumerate(changes(node)):
            line = lines[node.lineno - 1].strip()  # type: ignore[attr-defined]
            seen[line + what] = seen.get(line + what, 0) + 1
            again = f" ({seen[line + what]})" if seen[line + what] > 1 else ""
            make = partial(changed, tree, node.place, number)  # type: ignore[attr-defined]
            yield Mutant(str(file.relative_to(root)), line, what + again, make)


def changed(tree: ast.Module, place: int, number: int) -> str:
    """The source of a file after one of the changes of one of its nodes."""
    whole = copy.deepcopy(tree)
    target = next(one for one in ast.walk(whole) if vars(one)["place"] == place)
    _, change = list(changes(target))[number]
    change()
    return ast.unparse(ast.fix_missing_locations(whole)) + "\n"


def touched(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that may be changed: no annotations, messages, docstrings, or what is only shown."""
    if isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom | ast.Assert):
        return
    call = node.value if isinstance(node, ast.Expr) else node
    if isinstance(call, ast.Call) and name_of(call.func) in UNTOUCHED_CALLS:
        return
    if isinstance(node, ast.FunctionDef) and node.name in UNTOUCHED_FUNCTIONS:
        return
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript) and name_of(node.value.value) in ALIASES:
        return
    if hasattr(node, "lineno"):
        yield node
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, ast.AST):
                yield from touched(one)


def name_of(function: ast.expr) -> str:
    """The last part of what is called."""
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def changes(node: ast.AST) -> Iterator[tuple[str, Callable[[], None]]]:
    """(what it does, a function that does it to the node itself) of each mutation that fits a node."""

    def setter(name: str, value: object) -> Callable[[], None]:
        return lambda: setattr(node, name, value)

    def become(other: ast.AST) -> Callable[[], None]:
        def change() -> None:
            node.__class__ = other.__class__
            vars(node).update(vars(other))

        return change

    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in EXCHANGED:
        new = EXCHANGED[type(node.op)]
        yield f"{type(node.op).__name__} -> {new.__name__}", setter("op", new())
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        yield "right of | dropped", become(node.left)
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in EXCHANGED:
        new = EXCHANGED[type(node.ops[0])]
        yield f"{type(node.ops[0]).__name__} -> {new.__name__}", setter("ops", [new()])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        yield f"{type(node.op).__name__} dropped", become(node.operand)
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        old = node.value
        if isinstance(old, bool):
            yield f"{old} -> {not old}", setter("value", not old)
        else:
            for value in dict.fromkeys((old + 1 if old in (0, 1) else old * 2, 0 if old == 1 else 1)):
                if value != old:
                    yield f"{old} -> {value}", setter("value", type(old)(value))
    if isinstance(node, ast.Call) and len(node.args) >= 2:
        for place, (one, other) in enumerate(pairwise(node.args)):
            if type(one) is type(other) and isinstance(one, ast.Name | ast.Attribute):
                arguments = list(node.args)
                arguments[place : place + 2] = other, one
                yield f"arguments {ast.unparse(one)}, {ast.unparse(other)} swapped", setter("args", arguments)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "call left out", become(ast.Pass())
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        yield "condition negated", setter("test", ast.UnaryOp(ast.Not(), node.test))
    if isinstance(node, ast.Return) and node.value is not None and not is_none(node.value):
        yield "None returned", setter("value", ast.Constant(None))


def is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
