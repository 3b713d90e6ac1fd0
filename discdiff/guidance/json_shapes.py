r"""Regular expressions of JSON of a given shape, without white space.

    int, float, bool, None, str     a number, true or false, null, a text
    {"key": shape, ...}             an object with these keys in this order
    [shape]                         an array of any length
    (shape, ...)                    one of the shapes
    "text", 3, 0.5, True            this value
    object                          any JSON, of bounded depth

Reference: JSON (RFC 8259, https://doi.org/10.17487/RFC8259).
"""

import json
import math
import re

from discdiff.checks import shown

__all__ = ["ANY_CHARACTER", "json_pattern"]

ANY_CHARACTER = r'[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4}'
_INTEGER = r"-?(0|[1-9][0-9]*)"
_SIMPLE: dict[object, str] = {
    int: _INTEGER,
    float: rf"{_INTEGER}(\.[0-9]+)?([eE][+\-]?[0-9]+)?",
    bool: "true|false",
    None: "null",
}


def json_pattern(shape: object, depth: int, characters: str) -> str:
    """Return the regular expression of a shape, see above.

    Args:
        shape: the shape.
        depth: how many arrays and objects may lie within each other in an ``object``.
        characters: a regular expression of one character of a text, without quotes.

    Raises:
        TypeError: if ``characters`` is no text.
        ValueError: for another shape.
    """
    if not isinstance(characters, str):
        raise TypeError(f"Constraint.json: characters must be a regular expression, got {shown(characters)}")
    text = f'"({characters})*"'
    if shape is object:
        return _any(depth, text)
    if shape is str:
        return text
    if shape is None or (isinstance(shape, type) and shape in _SIMPLE):
        return f"({_SIMPLE[shape]})"
    if isinstance(shape, dict) and all(isinstance(key, str) for key in shape):
        parts = (f"{_literal(key)}:{json_pattern(inner, depth, characters)}" for key, inner in shape.items())
        return rf"\{{{','.join(parts)}\}}"
    if isinstance(shape, list) and len(shape) == 1:
        return _array(json_pattern(shape[0], depth, characters))
    if isinstance(shape, tuple) and shape:
        return f"({'|'.join(json_pattern(inner, depth, characters) for inner in shape)})"
    if isinstance(shape, str | int) or (isinstance(shape, float) and math.isfinite(shape)):
        return _literal(shape)
    raise ValueError(
        "Constraint.json: a shape is str, int, float, bool, None, object, a dict of shapes by key, a list of one "
        f"shape, a tuple of shapes, a text or a number; got {shown(shape)}"
    )


def _literal(value: str | float) -> str:
    return re.escape(json.dumps(value, ensure_ascii=False))


def _array(inner: str) -> str:
    return rf"\[({inner}(,{inner})*)?\]"


def _any(depth: int, text: str) -> str:
    simple = f"({text}|{_SIMPLE[float]}|true|false|null)"
    value = simple
    for _ in range(depth):
        member = f"{text}:{value}"
        value = rf"({simple}|{_array(value)}|\{{({member}(,{member})*)?\}})"
    return value
