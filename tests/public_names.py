"""The public names of modules given as text, read by ``ast``: their definitions, bases, docstrings and errors."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def text(node: ast.AST | None) -> str:
    return (node and ast.get_docstring(node)) or ""  # type: ignore[arg-type]


@dataclass(frozen=True)
class Unit:
    """A public class, function or method, with the class it belongs to and that class's bases."""

    module: str
    name: str
    node: Definition
    family: tuple[ast.ClassDef, ...] = ()

    @property
    def dunder(self) -> bool:
        return self.node.name[:2] == "__"

    @cached_property
    def above(self) -> str:
        """The docstrings of the methods that it overrides."""
        parts = (part for owner in self.family[1:] for part in owner.body if isinstance(part, FUNCTION))
        return "\n".join(text(part) for part in parts if part.name == self.node.name)

    @cached_property
    def near(self) -> str:
        """All docstrings that may state its shapes: its own, the overridden methods', its class's and the bases'."""
        return "\n".join([text(self.node), self.above, *map(text, self.family)])


class Library:
    """Modules as text, read by ``ast``: which names are public, where they are defined, what they inherit and raise."""

    def __init__(self, texts: dict[str, str]) -> None:
        self.trees = {name: ast.parse(source) for name, source in texts.items()}
        self.names = {name: self._names(tree) for name, tree in self.trees.items()}

    @staticmethod
    def _names(tree: ast.Module) -> dict[str, Definition | str]:
        """Map each name of a module to its definition, or to the full name that it is imported from."""
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        names = {alias.asname or alias.name: f"{node.module}.{alias.name}" for node in imports for alias in node.names}
        return names | {node.name: node for node in tree.body if isinstance(node, Definition)}

    def find(self, module: str, name: str) -> tuple[str, Definition] | tuple[None, None]:
        """Return the module and definition that a name, or a name in a module, stands for, if it is one of ours."""
        first, _, last = name.rpartition(".")
        if first:
            inner = self.names[module].get(first)
            return self.find(inner, last) if inner in self.trees else (None, None)
        found = self.names[module].get(name)
        if isinstance(found, str):
            origin, _, name = found.rpartition(".")
            return (
                self.find(origin, name)
                if origin in self.trees.keys() - {module} and found not in self.trees
                else (None, None)
            )
        return (module, found) if found is not None else (None, None)

    def family(self, module: str, node: ast.ClassDef) -> list[ast.ClassDef]:
        """List a class and its bases, itself first."""
        bases = (self.find(module, ast.unparse(base).partition("[")[0]) for base in node.bases)
        return [node, *(one for origin, base in bases if base for one in self.family(origin, base))]

    def public(self) -> Iterator[Unit]:
        """Yield each class and function in an ``__all__`` once, with its public methods and its dunders."""
        lists = (
            (module, node.value)
            for module, tree in self.trees.items()
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        )
        names = ((module, name.value) for module, listed in lists for name in listed.elts if hasattr(name, "value"))
        found = {self.find(module, str(name)) for module, name in names} - {(None, None)}  # the others are constants
        for module, node in sorted(found, key=lambda one: (one[0], one[1].lineno)):
            family = tuple(self.family(module, node)) if isinstance(node, ast.ClassDef) else ()
            yield Unit(module, node.name, node, family)
            for part in node.body if family else ():
                if isinstance(part, FUNCTION) and (part.name[0] != "_" or part.name[:2] == "__"):
                    yield Unit(module, f"{node.name}.{part.name}", part, family)

    def raised(self, module: str, node: Definition, owner: ast.ClassDef | None, *seen: ast.AST) -> set[str]:
        """Return the errors that a function raises itself, by private helpers of its module or class, or by checks.py.

        An error without a name, and those of checks.py, are "". An AssertionError marks what cannot happen. What a
        ``try`` encloses may be caught; what a function or class inside it does is not its own.
        """
        errors, todo = set(), list(node.body)
        while todo:
            part = todo.pop()
            if isinstance(part, ast.Try) and part.handlers:
                todo += [*part.handlers, *part.orelse, *part.finalbody]
            elif not isinstance(part, (Definition, ast.Lambda)):
                todo += ast.iter_child_nodes(part)
            if isinstance(part, ast.Raise):
                name = ast.unparse(getattr(part.exc, "func", part.exc) or part)
                errors.add(name if name[0].isupper() else "")
            elif isinstance(part, ast.Call):
                called = ast.unparse(part.func)
                own = [one for one in owner.body if f"self.{getattr(one, 'name', '')}" == called] if owner else []
                origin, helper = (module, own[0]) if own else self.find(module, called)
                if not isinstance(helper, FUNCTION) or helper in (node, *seen):
                    continue
                inner = self.raised(origin, helper, owner if own else None, node, *seen)
                if origin == module and helper.name[0] == "_":
                    errors |= inner
                elif origin.endswith(".checks") and inner:
                    errors.add("")
        return errors - {"AssertionError"}
