"""Calls that must not work: what is called, and what the one error must say. ``python tests/bad_calls.py`` counts them.

A call ends well in a ValueError, TypeError, KeyError, FileNotFoundError or ImportError that a ``raise`` of this library
made and whose text names what was wrong. It is *foreign* if another package, the interpreter or an assertion ended it,
*mute* if the text does not name what was wrong, *silent* if nothing was raised, and a *hang* after five seconds.
"""

import dis
import re
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from bad_arguments import BAD_LOGITS, COMMAND, FILES, KERNELS, LAWS, MODELS, OPERATORS, SHAPES, SIZES, TYPES, Refused
from bad_numbers import NO_REAL, NO_WHOLE, REAL, RIGHT, WHOLE

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {ROOT / name for name in ("discdiff", "samplers", "theory", "kernels")}
OURS = (ValueError, TypeError, KeyError, FileNotFoundError, ImportError)
SECONDS = 5


@dataclass(frozen=True)
class Bad:
    """A call that must not work.

    Attributes:
        area: what it belongs to.
        name: what it is, for people.
        call: the call.
        says: what the error must say, as a regular expression.
    """

    area: str
    name: str
    call: Callable[[], object]
    says: str


class Hang(BaseException):
    """The call took too long."""


def raised_by_us(error: BaseException) -> bool:
    """Whether the last frame of the traceback is this library's and stands at a ``raise``."""
    last: TracebackType | None = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    code = last.tb_frame.f_code
    operation = dis.opname[code.co_code[last.tb_lasti]]
    return bool(ROOMS & {*Path(code.co_filename).resolve().parents}) and operation in ("RAISE_VARARGS", "RERAISE")


def judged(case: Bad) -> tuple[str, str]:
    """How a call ended, in a word, and what was said."""

    def stop(number: int, frame: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            returned = case.call()
    except Hang:
        return "hang", f"more than {SECONDS} s"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        if time.perf_counter() - start > SECONDS:
            return "hang", said
        if not isinstance(error, OURS) or not (raised_by_us(error) or isinstance(error, Refused)):
            where = traceback.extract_tb(error.__traceback__)[-1]
            return "foreign", f"{said} ({Path(where.filename).name}:{where.lineno})"
        return ("ours" if re.search(case.says, str(error), re.DOTALL) else "mute"), said
    else:
        return "silent", f"returned {type(returned).__name__}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def bad_calls() -> Iterator[Bad]:
    """All of them."""
    for table, values in ((WHOLE, NO_WHOLE), (REAL, NO_REAL)):
        for name, (call, says) in table.items():
            for what, value in values.items():
                if what not in NOT_BAD.get(name, ()):
                    yield Bad("numbers", f"{name} = {what}", lambda call=call, value=value: call(value), says)
    for area, rows in AREAS.items():
        for name, call, says in rows:
            yield Bad(area, name, call, says)


AREAS = {
    "models": MODELS, "types": TYPES, "shapes": SHAPES, "laws": LAWS, "kernels": KERNELS, "logits": BAD_LOGITS,
    "sizes": SIZES, "files": FILES, "command": COMMAND, "operators": OPERATORS,
}  # fmt: skip

# Where what is bad for others is right.
TENSORS = (
    "alpha(t)",
    "time(alpha)",
    "marginal: t",
    "bridge: t",
    "Denoiser call: t",
    "posterior: t",
    "loo_sensitivity: t",
)
NEGATIVE = ("before: t", "after: t", "between: s", "between: t", "ClassifierFree: scale")
NOT_BAD = {name: {"two of them"} for name in TENSORS} | {name: {"-1.0"} for name in NEGATIVE}
NOT_BAD["BlockMixture: block"] = {"None in a list"}


def good_calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """The same calls with numpy's and torch's whole numbers, which must be accepted."""
    for name, (call, _) in WHOLE.items():
        right = RIGHT.get(name, 2)
        if right is not None:
            for kind, made in (
                ("int", int),
                ("numpy", np.int64),
                ("numpy, one byte", np.uint8),
                ("torch", torch.tensor),
            ):
                if right < 256 or kind != "numpy, one byte":
                    yield f"{name} = {right} of {kind}", lambda call=call, made=made, right=right: call(made(right))


def shown(cases: list[Bad]) -> Counter[str]:
    """Judge calls, print those that do not end well, and count."""
    counts: Counter[str] = Counter()
    for case in cases:
        verdict, said = judged(case)
        counts[verdict] += 1
        if verdict != "ours":
            print(f"{verdict:8} {case.area}: {case.name}: {said[:200]}")
    return counts


if __name__ == "__main__":
    chosen = [case for case in bad_calls() if not sys.argv[1:] or case.area in sys.argv[1:]]
    found = shown(chosen)
    refused = 0
    for name, call in good_calls() if not sys.argv[1:] else ():
        try:
            call()
        except Exception as error:
            refused += 1
            print(f"refused  {name}: {type(error).__name__}: {str(error)[:150]}")
    print(
        f"{len(chosen)} bad calls: "
        + ", ".join(f"{found[kind]} {kind}" for kind in ("ours", "foreign", "mute", "silent", "hang"))
    )
    print(f"{refused} good calls refused")
    sys.exit(int(found["ours"] < len(chosen) or refused > 0))
