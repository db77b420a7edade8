"""Data-flow analysis of one Python file: imports and aliases, possible values of names, calls and blocks.

The analysis prefers missing a problem to a false report. It follows a name to the assignments that may reach its use, a
parameter to the calls of its function in this file, and a call to what the function returns. Values from other files
are unknown. A rule that meets an unknown value reports nothing.
"""

import ast
import builtins
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef, ast.Module)
_DEPTH = 20  # the most steps that a name is followed
_BRANCHES = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.Match)

# The canonical name of each library, whichever way it is imported. Longer prefixes come first.
_LIBRARIES = {
    "horovod.tensorflow.keras": "hvd",
    "horovod.tensorflow": "hvd",
    "horovod.keras": "hvd",
    "hvdkit": "hvd",
    "tensorflow.compat.v1.keras": "keras",
    "tensorflow.python.keras": "keras",
    "tensorflow.keras": "keras",
    "tensorflow.optimizers": "keras.optimizers",
    "tensorflow.losses": "keras.losses",
    "tensorflow": "tf",
    "tf_keras": "keras",
    "keras.api": "keras",
    "numpy": "np",
    "pandas": "pd",
    "tensorflow_datasets": "tfds",
}
# Only these modules stay in a canonical name: hvdkit.callbacks.x is hvd.callbacks.x, hvdkit.world.rank is hvd.rank.
_PUBLIC_MODULES = {"callbacks", "data", "elastic", "strategies"}
# The results of these libraries' functions depend on their arguments only, not on other files of the project.
_KNOWN = {"tf", "keras", "np", "pd", "tfds", "sklearn", "scipy", "PIL", "cv2", "h5py", "yaml", "absl", "hvd", "horovod"}


class Binding(NamedTuple):
    """An assignment of a value to a name.

    Attributes:
        at: the end of the statement, as (line, column). Later uses see the value.
        value: the expression; None if it is unknown.
        exact: whether the name holds the value itself, not a part of it (`for x in value`, `x, y = value`).
        node: the statement.
    """

    at: tuple[int, int]
    value: ast.AST | None
    exact: bool
    node: ast.AST


class Derivation(NamedTuple):
    """All syntax nodes that a value is computed from, and whether an unknown value is among its inputs."""

    nodes: list[ast.AST]
    unknown: bool

    def calls(self) -> Iterator[ast.Call]:
        """The calls among the nodes."""
        return (node for node in self.nodes if isinstance(node, ast.Call))


class Script:
    """A parsed file.

    Args:
        source: the text.
        path: the path to show in findings.

    Raises:
        SyntaxError, ValueError, RecursionError: the text is not Python.
    """

    def __init__(self, source: str, path: str) -> None:
        self.source = source
        self.path = path
        self.tree = ast.parse(source, filename=path)
        self._lines = source.splitlines()
        self.imports: dict[str, str] = {}
        self._bindings: dict[tuple[ast.AST, str], list[Binding]] = {}
        self._parents: dict[ast.AST, tuple[ast.AST, str]] = {}
        self._link(self.tree)
        self.nodes = list(ast.walk(self.tree))
        for node in self.nodes:
            self._bind(node)
        self.calls = [node for node in self.nodes if isinstance(node, ast.Call)]
        self.calls.sort(key=start)
        self.libraries = {self._canonical(name).partition(".")[0] for name in self.imports.values()}
        self._used = {node.id for node in self.nodes if isinstance(node, ast.Name)}
        # Caches.
        self._names: dict[ast.AST, str | None] = {}
        self._reaching_bindings: dict[ast.AST, list[Binding]] = {}
        self._values: dict[ast.AST, list[ast.AST | None]] = {}
        self._callers: dict[ast.AST, list[ast.Call]] = {}
        for call in self.calls:
            function = self.function_of(call)
            if function:
                self._callers.setdefault(function, []).append(call)
        self._reaching_bindings.clear()  # computed before the callers were known

    # Places -----------------------------------------------------------------------------------------------------------

    def column(self, node: ast.AST) -> int:
        """The node's column in characters from 1, as editors count it. (`ast` counts bytes from 0.)"""
        line, offset = start(node)
        return len(self._lines[line - 1].encode()[:offset].decode(errors="replace")) + 1

    def ancestors(self, node: ast.AST) -> Iterator[tuple[ast.AST, str, ast.AST]]:
        """Yields (parent, field of the parent, child) from the node outwards to the module."""
        while node in self._parents:
            parent, field = self._parents[node]
            yield parent, field, node
            node = parent

    def scope(self, node: ast.AST) -> ast.AST:
        """The function, class or module in which the node is evaluated."""
        for parent, field, _ in self.ancestors(node):
            if isinstance(parent, _SCOPES) and field == "body":
                return parent
        return self.tree

    def statement(self, node: ast.AST) -> ast.AST:
        """The statement that the node is part of."""
        return next((child for _, _, child in self.ancestors(node) if isinstance(child, ast.stmt)), node)

    # Names ------------------------------------------------------------------------------------------------------------

    def raw_name(self, node: ast.AST) -> str | None:
        """The dotted name that an expression refers to, as imported: `tensorflow.keras.Model`."""
        if isinstance(node, ast.Attribute):
            inner = self.raw_name(node.value)
            return inner and f"{inner}.{node.attr}"
        if not isinstance(node, ast.Name):
            return None
        bindings = self._reaching(node)
        if not bindings:
            return self.imports.get(node.id) or (node.id if hasattr(builtins, node.id) else None)
        # K = keras.backend; Adam = keras.optimizers.Adam
        only = bindings[0].value if len(bindings) == 1 and bindings[0].exact else None
        return self.raw_name(only) if isinstance(only, ast.Attribute) else None

    def name(self, node: ast.AST) -> str | None:
        """The same with the library's canonical name: `hvd.rank`, `keras.Model`, `tf.constant`, `np.load`."""
        if node not in self._names:
            raw = self.raw_name(node)
            self._names[node] = raw and self._canonical(raw)
        return self._names[node]

    def called(self, node: ast.AST) -> str:
        """The name of the called function; empty if the node is not a call or the function is unknown."""
        return (isinstance(node, ast.Call) and self.name(node.func)) or ""

    def calls_of(self, *names: str) -> list[ast.Call]:
        """The calls of these functions, by line."""
        return [call for call in self.calls if self.called(call) in names]

    @staticmethod
    def _canonical(raw: str) -> str:
        prefix = next((p for p in _LIBRARIES if raw == p or raw.startswith(p + ".")), "")
        rest = [part for part in raw[len(prefix) :].split(".") if part]
        library = _LIBRARIES.get(prefix)
        if library == "hvd" and len(rest) > 1 and rest[0].islower():
            rest = [rest[0], rest[-1]] if rest[0] in _PUBLIC_MODULES else rest[-1:]
        return ".".join([library, *rest] if library else rest)

    # Values -----------------------------------------------------------------------------------------------------------

    def values(self, node: ast.AST) -> list[ast.AST | None]:
        """The expressions that this one may evaluate to, latest assignment first. None is an unknown one."""
        if node not in self._values:
            self._values[node] = self._followed(node, frozenset())
        return self._values[node]

    def _followed(self, node: ast.AST, seen: frozenset) -> list[ast.AST | None]:
        if node in seen:
            return []
        if len(seen) > _DEPTH:
            return [None]
        seen |= {node}
        sources: list[ast.AST | None]
        if isinstance(node, ast.IfExp):
            sources = [node.body, node.orelse]
        elif isinstance(node, ast.NamedExpr):
            sources = [node.value]
        elif isinstance(node, ast.Call) and isinstance(self.function_of(node), Function):
            sources = list(self.returned(self.function_of(node)))
        elif is_variable(node) and not self.name(node):
            sources = [b.value if b.exact else None for b in self._reaching(node)] or [None]
        else:
            return [node]
        found = [value for source in sources for value in (self._followed(source, seen) if source else [None])]
        return list(dict.fromkeys(found))

    def derivation(self, node: ast.AST, cut: Callable[[ast.AST], bool] = lambda _: False) -> Derivation:
        """All nodes that a value is computed from: through names, parameters, local functions and enclosing tests.

        Args:
            node: the expression.
            cut: returns true for nodes to leave out and not to follow.
        """
        nodes: list[ast.AST] = []
        seen: set[ast.AST] = set()
        unknown = False
        todo = [node]
        while todo:
            node = todo.pop()
            if node in seen or cut(node):
                continue
            seen.add(node)
            nodes.append(node)
            more, known = self._made_from(node)
            unknown |= not known
            todo += more
        return Derivation(nodes, unknown)

    def _made_from(self, node: ast.AST) -> tuple[list[ast.AST], bool]:
        children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Name | ast.Attribute) and self.name(node):
            return [], self._is_known(node) or self._is_mapped(node)
        if isinstance(node, ast.Call):
            function = self.function_of(node)
            if function:
                children.remove(node.func)
                return [*children, *self.returned(function)], True
            return children, self._is_known(node.func)
        if is_variable(node) and isinstance(node.ctx, ast.Load):  # type: ignore[attr-defined]
            bindings = self._reaching(node)
            sources = [b.value for b in bindings if b.value]
            tests = [test for b in bindings for test in self._tests(b.node)]
            return [*sources, *tests], bool(bindings) and len(sources) == len(bindings)
        return children, True

    def _is_known(self, function: ast.AST) -> bool:
        name = self.name(function)
        if name:
            library = name.partition(".")[0]
            return library in _KNOWN or library in sys.stdlib_module_names or hasattr(builtins, library)
        return isinstance(function, ast.Attribute)  # a method depends on its object, which is followed

    def _is_mapped(self, node: ast.AST) -> bool:
        """Whether `map` applies the function to each element. Such a function cannot select elements."""
        parent, field = self._parents.get(node, (None, ""))
        function = parent.func if isinstance(parent, ast.Call) and field == "args" else None
        return isinstance(function, ast.Attribute) and function.attr == "map"

    def _tests(self, node: ast.AST) -> list[ast.AST]:
        within = self.scope(node)
        return [
            parent.test
            for parent, field, _ in self.ancestors(node)
            if isinstance(parent, ast.If) and field != "test" and self.scope(parent) is within
        ]

    # Functions --------------------------------------------------------------------------------------------------------

    def function_of(self, call: ast.Call) -> Function | ast.ClassDef | None:
        """The called function or class, if it is one of this file and there is only one candidate."""
        if not is_variable(call.func):
            return None
        bindings = self._reaching(call.func)
        value = bindings[0].value if len(bindings) == 1 else None
        return value if isinstance(value, Function | ast.ClassDef) else None

    def callers(self, function: ast.AST) -> list[ast.Call]:
        """The calls in this file of a function or class of this file."""
        return self._callers.get(function, [])

    def returned(self, function: Function | ast.ClassDef | None) -> list[ast.AST]:
        """The expressions that a function returns or yields; for a class, the class itself."""
        if isinstance(function, ast.Lambda):
            return [function.body]
        if isinstance(function, ast.ClassDef) or function is None:
            return [function] if function else []
        kinds = (ast.Return, ast.Yield, ast.YieldFrom)
        inside = [n for n in ast.walk(function) if isinstance(n, kinds) and self.scope(n) is function]
        return [n.value for n in inside if n.value]

    def argument(self, call: ast.Call, name: str, position: int | None = None) -> ast.expr | None:
        """The argument with this name or position; None if the call does not show it."""
        for keyword in call.keywords:
            if keyword.arg == name:
                return keyword.value
        if position is not None and len(call.args) > position:
            before = call.args[: position + 1]
            if not any(isinstance(argument, ast.Starred) for argument in before):
                return call.args[position]
        return None

    # Building ---------------------------------------------------------------------------------------------------------

    def _link(self, root: ast.AST) -> None:
        todo = [root]
        while todo:
            node = todo.pop()
            for field, value in ast.iter_fields(node):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        # All nodes share one object for a context such as ast.Load(), so it has no parent.
                        if not isinstance(child, ast.expr_context | ast.operator | ast.cmpop | ast.boolop):
                            self._parents[child] = (node, field)
                        todo.append(child)

    def _bind(self, node: ast.AST) -> None:
        binder = _BINDERS.get(type(node))
        if binder:
            binder(self, node)

    def _bind_import(self, node: Any) -> None:
        for alias in node.names:
            if isinstance(node, ast.ImportFrom):
                if not node.level:
                    self.imports.setdefault(alias.asname or alias.name, f"{node.module}.{alias.name}")
            elif alias.asname:
                self.imports.setdefault(alias.asname, alias.name)
            else:
                root = alias.name.partition(".")[0]
                self.imports.setdefault(root, root)
                self.imports.setdefault(alias.name, alias.name)  # records which library is used

    def _bind_assignment(self, node: Any) -> None:
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if node.value:
                self._bind_target(target, node.value, node)

    def _bind_augmented(self, node: Any) -> None:
        """`x += y` is `x = x + y`."""
        before = ast.copy_location(_as_load(node.target), node.target)
        total = ast.copy_location(ast.BinOp(before, node.op, node.value), node)
        self._parents[before] = (total, "left")
        self._parents[total] = (node, "value")
        self._bind_target(node.target, total, node)

    def _bind_parts(self, node: Any) -> None:
        """Names that hold a part of something: loops, comprehensions and `with`."""
        if isinstance(node, ast.comprehension):  # the names are used before this place, too
            self._bind_target(node.target, node.iter, node.target, exact=False, at=start(self._parents[node][0]))
        elif isinstance(node, ast.withitem):
            if node.optional_vars:
                self._bind_target(node.optional_vars, node.context_expr, node.context_expr, exact=False)
        else:
            self._bind_target(node.target, node.iter, node.iter, exact=False)

    def _bind_definition(self, node: Any) -> None:
        if not isinstance(node, ast.Lambda):
            scope = self.scope(node)
            self._add(scope, node.name, Binding(start(node), node, True, node))
            if isinstance(scope, ast.ClassDef):
                self._add(self.tree, f"self.{node.name}", Binding(start(node), node, True, node))
        if isinstance(node, ast.ClassDef):
            return
        arguments = node.args
        plain = [*arguments.posonlyargs, *arguments.args]
        defaults = [None] * (len(plain) - len(arguments.defaults)) + arguments.defaults
        pairs = [*zip(plain, defaults, strict=True), *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
        for parameter, default in pairs:
            self._add(node, parameter.arg, Binding(start(node), _Parameter(node, parameter, default), True, node))
        for parameter in (arguments.vararg, arguments.kwarg):
            if parameter:
                self._add(node, parameter.arg, Binding(start(node), None, False, node))

    def _bind_target(
        self, target: ast.AST, value: ast.AST, node: ast.AST, exact: bool = True, at: tuple[int, int] | None = None
    ) -> None:
        if isinstance(target, ast.Tuple | ast.List):
            parts = value.elts if exact and isinstance(value, ast.Tuple | ast.List) else []
            same = len(parts) == len(target.elts)
            for i, part in enumerate(target.elts):
                self._bind_target(part, parts[i] if same else value, node, same, at)
        elif isinstance(target, ast.Starred):
            self._bind_target(target.value, value, node, False, at)
        elif is_variable(target):
            scope = self.scope(node) if isinstance(target, ast.Name) else self.tree
            self._add(scope, ast.unparse(target), Binding(at or end(node), value, exact, node))

    def _add(self, scope: ast.AST, name: str, binding: Binding) -> None:
        self._bindings.setdefault((scope, name), []).append(binding)

    # Reaching assignments ---------------------------------------------------------------------------------------------

    def _reaching(self, use: ast.AST) -> list[Binding]:
        """The assignments that may reach a use of a name, latest first. Parameters resolve to their arguments."""
        if use not in self._reaching_bindings:
            self._reaching_bindings[use] = self._find_reaching(use)
        return self._reaching_bindings[use]

    def _find_reaching(self, use: ast.AST) -> list[Binding]:
        if isinstance(use, ast.Attribute):
            bindings = self._bindings.get((self.tree, ast.unparse(use)), []) if is_variable(use) else []
            return sorted(bindings, key=lambda b: b.at, reverse=True)
        if not isinstance(use, ast.Name):
            return []
        scope = self.scope(use)
        bindings = self._latest(use, self._bindings.get((scope, use.id), []))
        while not bindings and scope is not self.tree:
            scope = self.scope(scope)
            if not isinstance(scope, ast.ClassDef):  # functions do not see the names of their class
                bindings = sorted(self._bindings.get((scope, use.id), []), key=lambda b: b.at, reverse=True)
        return [b for binding in bindings for b in self._arguments(binding)]

    def _latest(self, use: ast.AST, bindings: list[Binding]) -> list[Binding]:
        place = self._place(use)
        reaching = []
        for binding in sorted(bindings, key=lambda b: b.at, reverse=True):
            if binding.at > start(use) or _excluded(self._place(binding.node), place):
                continue
            reaching.append(binding)
            if set(self._place(binding.node)) <= set(place):
                break  # it always runs before the use, so it hides all earlier ones
        return reaching

    def _place(self, node: ast.AST) -> list[tuple[ast.AST, str]]:
        """The branches and loops around a node, within its scope."""
        place: list[tuple[ast.AST, str]] = []
        for parent, field, _ in self.ancestors(node):
            if isinstance(parent, _SCOPES):
                break
            if isinstance(parent, _BRANCHES) and field in ("body", "orelse"):
                place.append((parent, field))
        return place

    def _arguments(self, binding: Binding) -> list[Binding]:
        parameter = binding.value
        if not isinstance(parameter, _Parameter):
            return [binding]
        callers = self.callers(parameter.function)
        if not callers and self._is_passed_on(parameter.function):  # a library calls it, independently of the rank
            return [binding._replace(exact=False)]
        values = [self._passed(call, parameter) for call in callers] or [None]
        return [binding._replace(value=value) for value in values]

    def _is_passed_on(self, function: Function) -> bool:
        name = getattr(function, "name", None)
        return name is None or name in self._used

    def _passed(self, call: ast.Call, parameter: "_Parameter") -> ast.AST | None:
        arguments = parameter.function.args
        names = [a.arg for a in [*arguments.posonlyargs, *arguments.args]]
        if isinstance(call.func, ast.Attribute):  # self.method(...)
            del names[:1]
        name = parameter.parameter.arg
        given = self.argument(call, name, names.index(name) if name in names else None)
        starred = any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords)
        return given or (None if starred else parameter.default)


class _Parameter(ast.AST):
    """The value of a function's parameter."""

    def __init__(self, function: Function, parameter: ast.arg, default: ast.AST | None) -> None:
        super().__init__()
        self.function = function
        self.parameter = parameter
        self.default = default


_BINDERS: dict[type, Callable[[Script, Any], None]] = {
    ast.Import: Script._bind_import,
    ast.ImportFrom: Script._bind_import,
    ast.Assign: Script._bind_assignment,
    ast.AnnAssign: Script._bind_assignment,
    ast.NamedExpr: Script._bind_assignment,
    ast.AugAssign: Script._bind_augmented,
    ast.For: Script._bind_parts,
    ast.AsyncFor: Script._bind_parts,
    ast.comprehension: Script._bind_parts,
    ast.withitem: Script._bind_parts,
    ast.FunctionDef: Script._bind_definition,
    ast.AsyncFunctionDef: Script._bind_definition,
    ast.Lambda: Script._bind_definition,
    ast.ClassDef: Script._bind_definition,
}


def start(node: ast.AST) -> tuple[int, int]:
    """Where a node starts: (line from 1, byte from 0)."""
    return node.lineno, node.col_offset  # type: ignore[attr-defined]


def end(node: ast.AST) -> tuple[int, int]:
    """Where a node ends."""
    return node.end_lineno, node.end_col_offset  # type: ignore[attr-defined]


def is_variable(node: ast.AST) -> bool:
    """Whether it is a name or an attribute of `self`, which this module follows to the assignments."""
    if isinstance(node, ast.Attribute):
        return isinstance(node.value, ast.Name) and node.value.id == "self"
    return isinstance(node, ast.Name)


def is_constant(node: ast.AST | None, *values: Any) -> bool:
    """Whether a node is one of these literals."""
    return isinstance(node, ast.Constant) and any(node.value is v or node.value == v for v in values)


def _as_load(target: ast.AST) -> Any:
    copy = type(target)(**dict(ast.iter_fields(target)))
    copy.ctx = ast.Load()  # type: ignore[attr-defined]
    return copy


def _excluded(one: list[tuple[ast.AST, str]], other: list[tuple[ast.AST, str]]) -> bool:
    """Whether two places lie in different branches of one `if`."""
    branches: dict[ast.AST, str] = {parent: field for parent, field in one if isinstance(parent, ast.If)}
    return any(branches.get(parent, field) != field for parent, field in other)
