"""What of a forward torch.fx cannot see, read in its source.

A trace holds the operations of one call. Whether every call makes the same ones is in the source:
in the forwards read here, all that decides about operations are attributes of the module.
"""

import ast
import dis
import inspect
import textwrap
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


class UnprovableError(Exception):
    """Why a forward cannot be proved."""


class Reads(NamedTuple):
    """What the forward of a class reads, and the methods it is made of.

    Attributes:
        names: of the module's attributes.
        decisive: those of them by whose truth or value it decides.
        methods: by name, ``forward`` among them.
    """

    names: frozenset[str]
    decisive: frozenset[str]
    methods: dict[str, Callable[..., Any]]


#: What a forward may call: all that it does is in the trace, whatever it is called with.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"{prefix}.{name}": getattr(source, name)
    for prefix, source, names in (
        ("F", F, "relu relu6 silu gelu leaky_relu softmax log_softmax pad interpolate dropout"),
        ("F", F, "max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d"),
        ("torch", torch, "add mul sub cat flatten relu sigmoid tanh mean amax softmax permute"),
    )
    for name in names.split()
}


def reads_of(kind: type) -> Reads:
    """What the forward of a class of modules reads.

    Raises:
        UnprovableError: it does something else, too.
    """
    reader = _Reader(kind)
    reader.follow("forward")
    return Reads(frozenset(reader.names), frozenset(reader.decisive), reader.methods)


class _Reader(ast.NodeVisitor):
    """Visits what it knows; anything else is a reason."""

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.names: set[str] = set()
        self.decisive: set[str] = set()
        self.methods: dict[str, Callable[..., Any]] = {}
        self.globals: dict[str, Any] = {}
        self.locals: tuple[str, ...] = ()

    def follow(self, name: str) -> None:
        """Read a method of the class."""
        if name in self.methods:
            return
        function = getattr(self.kind, name)
        self.methods[name] = function
        tree = _tree(name, function)
        outside = self.globals, self.locals
        self.globals, self.locals = function.__globals__, function.__code__.co_varnames[1:]
        for statement in tree.body[0].body:
            self.visit(statement)
        self.globals, self.locals = outside
        # The file may have been changed since it was imported.
        module = compile(tree, "", "exec", dont_inherit=True)
        (code,) = (c for c in module.co_consts if isinstance(c, types.CodeType))
        if _operands(code) != _operands(function.__code__):
            raise UnprovableError(f"its {name} is not what its source says")

    def generic_visit(self, node: ast.AST) -> None:
        text = ast.unparse(node).splitlines()[0]
        raise UnprovableError(f"its forward has {text!r}, which a trace does not prove")

    def children(self, node: ast.AST) -> None:
        super().generic_visit(node)

    visit_Return = visit_Tuple = visit_List = visit_Dict = visit_Slice = visit_keyword = children  # noqa: N815
    visit_Load = visit_Store = children  # noqa: N815

    def visit_Constant(self, node: ast.Constant) -> None:
        pass

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):
            self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            named = target.elts if isinstance(target, ast.Tuple) else [target]
            if not all(isinstance(name, ast.Name) and name.id != "self" for name in named):
                self.generic_visit(node)
        self.visit(node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if not isinstance(node.target, ast.Name):
            self.generic_visit(node)
        self.visit(node.value)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        self.visit(node.left)
        self.visit(node.right)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self.generic_visit(node)
        self.visit(node.operand)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.visit(node.value)
        self.visit(node.slice)

    def visit_If(self, node: ast.If) -> None:
        self.test(node.test)
        for statement in (*node.body, *node.orelse):
            self.visit(statement)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.test(node.test)
        self.visit(node.body)
        self.visit(node.orelse)

    def test(self, node: ast.expr) -> None:
        """What a branch asks: the module's attributes and nothing else."""
        if isinstance(node, ast.BoolOp):
            for value in node.values:
                self.test(value)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            self.test(node.operand)
        elif isinstance(node, ast.Compare):
            absent = isinstance(node.ops[0], ast.Is | ast.IsNot) and _is_none(node.comparators[0])
            for value in (node.left, *node.comparators):
                self.decide(value, absent)
        else:
            self.decide(node, absent=False)

    def decide(self, node: ast.expr, absent: bool) -> None:
        if isinstance(node, ast.Constant):
            return
        if (name := _own(node)) is None:
            text = ast.unparse(node)
            raise UnprovableError(f"its forward decides by {text!r}, which a trace does not prove")
        self.names.add(name)
        if not absent:
            self.decisive.add(name)

    def visit_Name(self, node: ast.Name) -> None:
        if node.id not in self.locals:
            self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if (name := _own(node)) is not None:
            self.names.add(name)
        elif _own(node.value) is None and node.attr in ("device", "dtype", "ndim", "shape"):
            self.visit(node.value)
        else:  # what a child keeps may change between calls, and x.data be written to
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        called = node.func
        if (name := _own(called)) is not None:
            self.names.add(name)
            if isinstance(getattr(self.kind, name, None), types.FunctionType):
                self.follow(name)
        elif isinstance(called, ast.Subscript) and _own(called.value) is not None:
            self.visit(called)
        elif (function := self.resolve(called)) is not None:
            if not any(function is known for known in FUNCTIONS.values()):
                self.generic_visit(node)
        elif isinstance(called, ast.Attribute) and _own(called.value) is None:  # of a value
            self.visit(called.value)
        else:
            self.generic_visit(node)
        for argument in (*node.args, *node.keywords):
            self.visit(argument)

    def resolve(self, node: ast.expr) -> Any:
        """What a dotted name of the module's globals stands for, or None."""
        if isinstance(node, ast.Attribute):
            return getattr(self.resolve(node.value), node.attr, None)
        if not isinstance(node, ast.Name) or node.id in (*self.locals, "self"):
            return None
        return self.globals.get(node.id)


def _own(node: ast.AST) -> str | None:
    """The name of an attribute of the module, if it is one."""
    attribute = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    return node.attr if attribute and node.value.id == "self" else None  # type: ignore[attr-defined]


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _operands(code: types.CodeType) -> list[tuple[str, Any]]:
    """What code reads, computes and writes; how it calls depends on the rest of its file."""
    return [
        (i.opname.replace("METHOD", "ATTR"), i.argval)
        for i in dis.get_instructions(code)
        if i.opname.startswith(("LOAD", "STORE", "BINARY", "UNARY"))
    ]


def _tree(name: str, function: Any) -> Any:
    """The source of a method that takes positional arguments, and nothing else."""
    if not isinstance(function, types.FunctionType):
        raise UnprovableError(f"its {name} is not a function")
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError, TypeError) as error:
        raise UnprovableError(f"the source of its {name} cannot be read") from error
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef) or definition.decorator_list:
        raise UnprovableError(f"its {name} is decorated, or not a plain function")
    taken = definition.args
    if taken.vararg or taken.kwarg or taken.kwonlyargs or taken.defaults:
        raise UnprovableError(f"its {name} takes more than positional arguments")
    if not taken.args or taken.args[0].arg != "self":
        raise UnprovableError(f"the first argument of its {name} is not called self")
    return tree
