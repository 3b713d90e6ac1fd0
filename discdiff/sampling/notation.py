"""Write operators, guides and conditions as text, and read such text without evaluating it."""

import ast
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from discdiff import samplers
from discdiff.checks import shown
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
_LONGEST = 1 << 20  # most characters; deeper nesting could overflow the parser's stack


def written(thing: object, where: str) -> str:
    """Return the text of an operator, a guide or a condition; ``parsed`` makes an equal object of it.

    Args:
        thing: made of what ``discdiff.samplers`` and ``discdiff`` export, with numbers, strings and lists of them.
        where: the caller, for the error.

    Raises:
        ValueError: for anything else, such as a function or an operator of your own; the error names it.
    """
    match thing:
        case Then(left, right):
            return f"{written(left, where)} >> {_inner(right, where)}"
        case Repeat(inner, times):
            return f"{_inner(inner, where)} ** {times}"
        case Mix(operators, weights):
            parts = (f"{written(one, where)}: {w!r}" for one, w in zip(operators, weights, strict=True))
            return f"mix({{{', '.join(parts)}}})"
        case When(condition, yes, no):
            return f"when({', '.join(written(part, where) for part in (condition, yes, no))})"
        case WhenGuide():
            branches = (thing.condition, thing.yes, *(() if thing.no is None else (thing.no,)))
            return f"when({', '.join(written(part, where) for part in branches)})"
        case Between():
            return repr(thing)
        case torch.Tensor():
            return repr(thing.tolist())
        case None | bool() | int() | float() | str():
            return repr(thing)
        case list() | tuple():
            return f"[{', '.join(written(each, where) for each in thing)}]"
    if _CLASSES.get(type(thing).__name__) is type(thing):
        names = [one.name for one in fields(thing) if one.init] if is_dataclass(thing) else list(vars(thing))
        return f"{type(thing).__name__}({', '.join(f'{n}={written(getattr(thing, n), where)}' for n in names)})"
    raise ValueError(
        f"{where}: {shown(thing)} cannot be written to a file, which holds the operators and guides that "
        "discdiff exports, the conditions before(t), after(t), between(s, t), the names of models, and numbers"
    )


def _inner(operator: Operator, where: str) -> str:
    text = written(operator, where)
    return f"({text})" if isinstance(operator, Then | Repeat) else text


def parsed(text: object, where: str) -> Any:  # noqa: ANN401  # an operator, a guide or a condition
    """Return the object that a text of ``written`` describes.

    Raises:
        ValueError: for any other text; the error quotes the part that cannot be read.
        TypeError: for an ill-formed composition, such as two predictors.
    """
    if not isinstance(text, str) or len(text) > _LONGEST:
        raise ValueError(f"{where}: takes text such as 'Ancestral() >> Gibbs(sites=2) ** 3', got {shown(text)}")

    def refuse(node: ast.AST) -> ValueError:
        return ValueError(
            f"{where}: cannot read {shown(ast.unparse(node))} in {shown(text)}; accepted: names that discdiff exports "
            f"({', '.join([*_CLASSES, *_FUNCTIONS])}), literal arguments, >>, ** n"
        )

    def build(node: ast.expr) -> Any:  # noqa: ANN401
        match node:
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if name in _CLASSES | _FUNCTIONS:
                names = [keyword.arg for keyword in keywords]
                if None in names or len({*names}) < len(names):
                    raise refuse(node)
                told = [build(arg) for arg in args]
                named = {str(keyword.arg): build(keyword.value) for keyword in keywords}
                try:
                    return (_CLASSES | _FUNCTIONS)[name](*told, **named)
                except (TypeError, ValueError) as error:
                    raise type(error)(f"{where}: {error} in {shown(text)}") from error
            case ast.BinOp(left=left, op=ast.RShift(), right=right):
                return _operator(build(left), left) >> _operator(build(right), right)
            case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=int(times))):
                return _operator(build(left), left) ** times
            case ast.Dict(keys=keys, values=values):
                pairs = zip(keys, values, strict=True)
                return {build(key): build(value) for key, value in pairs if key is not None}
            case ast.List(elts=parts) | ast.Tuple(elts=parts):
                return [build(part) for part in parts]
            case ast.Constant(value=None | bool() | int() | float() | str() as value):
                return value
            case ast.UnaryOp(op=ast.USub(), operand=operand) if isinstance(value := build(operand), int | float):
                return -value
            case ast.Name(id=name) if name in _NUMBERS:
                return _NUMBERS[name]
        raise refuse(node)

    def _operator(made: object, node: ast.expr) -> Operator:
        if not isinstance(made, Operator):
            raise refuse(node)
        return made

    try:
        return build(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, MemoryError, RecursionError) as error:
        said = error.msg if isinstance(error, SyntaxError) else "it is too deep"
        raise ValueError(f"{where}: {shown(text)} is no description of an operator or a guide: {said}") from error
