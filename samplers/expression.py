"""Build operators from text, which is parsed and never evaluated."""

import ast
import inspect
import re
from collections.abc import Callable, Sequence

from discdiff import samplers
from discdiff.checks import meant, shown
from discdiff.operator import Operator
from discdiff.plugins import plugged

__all__ = ["known_operators", "parse_operator"]

_LONGEST = 2000  # most characters of an expression; deeper nesting could overflow the parser's stack


def parse_operator(expression: str, option: str = "--sampler") -> Operator:
    """Parse an operator from text such as "ancestral >> gibbs(sites=2) ** 3".

    Names are the classes of ``discdiff.samplers`` in snake case, and the operators that other packages plug in. A name
    may have literal arguments. Operators are joined by >>, ** and parentheses. The text is never evaluated. ``option``
    is the setting that an error message names.

    Raises:
        ValueError: for text of any other form; the message states what is accepted.
        TypeError: for an ill-formed composition, such as two predictors.
    """
    if not isinstance(expression, str) or len(expression) > _LONGEST:
        raise ValueError(
            f"{option}: an expression of at most {_LONGEST} characters is read, such as 'ancestral >> gibbs', "
            f"got {shown(expression)}"
        )
    known = known_operators()[0]

    def refuse(node: ast.AST) -> ValueError:
        part = ast.unparse(node)
        name = node.func if isinstance(node, ast.Call) else node
        hint = meant(name.id, known) if isinstance(name, ast.Name) else ""
        return ValueError(
            f"{option}: cannot read {part!r} in {expression!r}{hint}; "
            f"accepted: {', '.join(sorted(known))}, literal arguments, >>, ** n"
        )

    def build(node: ast.expr) -> Operator:
        match node:
            case ast.Name(id=name) if name in known:
                return make(known[name], [], [])
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if name in known:
                return make(known[name], args, keywords)
            case ast.BinOp(left=left, op=ast.RShift(), right=right):
                return build(left) >> build(right)
            case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=int(times))):
                return build(left) ** times
        raise refuse(node)

    def literal(node: ast.expr) -> object:
        try:
            return ast.literal_eval(node)
        except ValueError as error:
            raise refuse(node) from error

    def make(kind: Callable[..., Operator], args: Sequence[ast.expr], keywords: Sequence[ast.keyword]) -> Operator:
        named = {keyword.arg or "**": literal(keyword.value) for keyword in keywords}
        try:
            return kind(*(literal(arg) for arg in args), **named)
        except TypeError as error:
            takes = inspect.signature(kind).parameters
            unknown = [name for name in named if name not in takes]
            hint = meant(unknown[0], takes) if unknown else ""
            raise ValueError(f"{option}: {error} in {expression!r}{hint}; it takes ({', '.join(takes)})") from error

    try:
        read = ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        said = error.msg if isinstance(error, SyntaxError) else error
        raise ValueError(f"{option}: {shown(expression)} is not an expression: {said}") from error
    try:
        return build(read)
    except RecursionError as error:
        raise ValueError(f"{option}: {shown(expression)} is too deep to be read") from error


def known_operators() -> tuple[dict[str, Callable[..., Operator]], dict[str, str]]:
    """Return two dicts by name: the operators, and the errors of plugged-in operators that cannot be used.

    An operator of this library takes precedence over one of the same name from another package.
    """
    found, broken = plugged("operators")
    others = {name: one for name, one in found.items() if isinstance(one, type) and issubclass(one, Operator)}
    broken |= dict.fromkeys(found.keys() - others.keys(), "is no Operator class")
    return others | {_snake(name): getattr(samplers, name) for name in samplers.__all__}, broken


def _snake(name: str) -> str:
    """Convert to snake case: ThetaRK2 -> theta_rk2, DFM -> dfm."""
    name = name.replace("ReMDM", "Remdm").replace("RePaint", "Repaint")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
