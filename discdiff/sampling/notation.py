"""Write operators, guides and conditions as text, and read such text without evaluating it."""

import ast
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from discdiff import samplers
from discdiff.checks import LAST_SEED, meant, shown
from discdiff.denoiser import WhenGuide
from discdiff.guidance import Allow, ClassifierFree, Forbid
from discdiff.operator import Between, Mix, Operator, Repeat, Then, When, after, before, between, mix, when
from discdiff.prediction import Truncation

__all__ = ["parsed", "written"]

# A file chooses no code: these names alone are read.
_GUIDES = (Allow, ClassifierFree, Forbid, Truncation)
_CLASSES: dict[str, Any] = {name: getattr(samplers, name) for name in samplers.__all__}
_CLASSES |= {kind.__name__: kind for kind in _GUIDES}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "mix": mix, "when": when, "before": before, "after": after, "between": between,
}  # fmt: skip
_NUMBERS = {"inf": float("inf"), "nan": float("nan")}
_LONGEST = 1 << 19  # most characters: Python's parser takes up to 500 bytes of memory for each


def written(thing: object, where: str) -> str:
    """Return the text of an operator, a guide or a condition; ``parsed`` makes an equal object of it.

    Args:
        thing: made of what ``discdiff.samplers`` and ``discdiff`` export, with numbers, strings and lists of them.
        where: the caller, for the error.

    Raises:
        ValueError: for anything else, such as a function or an operator of your own, or for a text that ``parsed``
            would refuse for its length or depth; the error names it.
    """
    try:
        text = _written(thing, where)
    except RecursionError as error:
        raise ValueError(f"{where}: {shown(type(thing))} is nested too deep to be written to a file") from error
    if len(text) > _LONGEST:
        raise ValueError(f"{where}: {shown(thing)} takes {len(text)} characters in a file, and {_LONGEST} are accepted")
    parsed(text, where)  # what cannot be read is not written
    return text


def _written(thing: object, where: str) -> str:
    kind = type(thing)  # a class of your own that derives from one of these has code of its own
    if isinstance(thing, Then) and kind is Then:
        return f"{_written(thing.left, where)} >> {_inner(thing.right, where)}"
    if isinstance(thing, Repeat) and kind is Repeat:
        return f"{_inner(thing.operator, where)} ** {thing.times}"
    if isinstance(thing, Mix) and kind is Mix:
        pairs = zip(thing.operators, thing.weights, strict=True)
        return f"mix({{{', '.join(f'{_written(one, where)}: {weight!r}' for one, weight in pairs)}}})"
    if isinstance(thing, When | WhenGuide) and kind in (When, WhenGuide):
        if type(thing.condition) is not Between:
            raise _refused(thing.condition, f"{where}: when: the condition")
        branches = [thing.yes] if thing.no is None else [thing.yes, thing.no]
        return f"when({thing.condition!r}, {', '.join(_written(part, where) for part in branches)})"
    if isinstance(thing, Tensor):
        return repr(thing.tolist())
    if thing is None or kind in (bool, int, float, str):
        return repr(thing)
    if isinstance(thing, list | tuple):
        return f"[{', '.join(_written(each, where) for each in thing)}]"
    if _CLASSES.get(kind.__name__) is kind:
        names = [one.name for one in fields(thing) if one.init] if is_dataclass(thing) else list(vars(thing))
        parts = (f"{name}={_written(getattr(thing, name), f'{where}: {kind.__name__}: {name}')}" for name in names)
        return f"{kind.__name__}({', '.join(parts)})"
    raise _refused(thing, where)


def _refused(thing: object, where: str) -> ValueError:
    return ValueError(
        f"{where}: {shown(thing)} cannot be written to a file, which holds the operators and guides that "
        "discdiff exports, the conditions before(t), after(t), between(s, t), the names of models, and numbers"
    )


def _inner(operator: Operator, where: str) -> str:
    text = _written(operator, where)
    return f"({text})" if isinstance(operator, Then | Repeat) else text


def parsed(text: object, where: str) -> Any:  # noqa: ANN401  # an operator, a guide or a condition
    """Return the object that a text of ``written`` describes.

    Raises:
        ValueError: for any other text; the error quotes the part that cannot be read.
        TypeError: for an ill-formed composition, such as two predictors.
    """
    if not isinstance(text, str) or len(text) > _LONGEST:
        raise ValueError(f"{where}: takes text such as 'Ancestral() >> Gibbs(sites=2) ** 3', got {shown(text)}")
    try:
        return _built(_tree(text))
    except RecursionError as error:
        raise ValueError(f"{where}: {shown(text)} is too deep") from error
    except TypeError as error:  # of a class or a function that the text names
        raise TypeError(f"{where}: {error} in {shown(text)}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error} in {shown(text)}") from error


def _tree(text: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError) as error:
        said = f": {error.msg}" if isinstance(error, SyntaxError) else ""
        raise ValueError(f"no description of an operator or a guide{said}") from error


def _unread(node: ast.AST) -> ValueError:
    name = node.func if isinstance(node, ast.Call) else node
    hint = meant(name.id, [*_CLASSES, *_FUNCTIONS]) if isinstance(name, ast.Name) else ""
    return ValueError(
        f"cannot read {shown(ast.unparse(node))}{hint}; accepted: names that discdiff exports "
        f"({', '.join([*_CLASSES, *_FUNCTIONS])}), literal arguments, >>, ** n"
    )


def _built(node: ast.expr) -> Any:  # noqa: ANN401
    match node:
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if name in _CLASSES | _FUNCTIONS:
            named = {keyword.arg: _built(keyword.value) for keyword in keywords if keyword.arg is not None}
            given = [_built(each) for each in args]
            conditions = [named.get("condition"), *given[:1]] if name == "when" else []
            if len(named) < len(keywords) or not all(each is None or type(each) is Between for each in conditions):
                raise _unread(node)
            return (_CLASSES | _FUNCTIONS)[name](*given, **named)
        case ast.BinOp(left=left, op=ast.RShift(), right=right):
            return _operator(left) >> _operator(right)
        case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=int()) as times):
            return _operator(left) ** _built(times)
        case ast.Dict(keys=keys, values=values):
            pairs = {_built(key): _built(value) for key, value in zip(keys, values, strict=True) if key is not None}
            if len(pairs) == len(keys):
                return pairs
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return [_built(part) for part in parts]
        case ast.Constant(value=int(value)) if abs(value) > LAST_SEED:
            raise ValueError("a whole number of more than 64 bits")
        case ast.Constant(value=None | bool() | int() | float() | str() as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand) if isinstance(value := _built(operand), int | float):
            return -value
        case ast.Name(id=name) if name in _NUMBERS:
            return _NUMBERS[name]
    raise _unread(node)


def _operator(node: ast.expr) -> Operator:
    made = _built(node)
    if not isinstance(made, Operator):
        raise _unread(node)
    return made
