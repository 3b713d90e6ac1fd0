r"""Random choices of a run: ``choose`` is the only source of randomness.

An operator is a program of random choices named "step.slot.name", or "step.slot.name@turn" in a loop. A
choice has three uses:

    sampling                its value is drawn as a function of (seed, row, step, slot, name, position)
    ``pyro.poutine.trace``  the value and its log-probability are recorded; ``replay`` sets values
    ``theory.kernel``       every possible value is tried, which gives the exact transition matrix

The distribution carries the key of its randomness, so a run needs no handler. All threads share Pyro's handler stack.
So a run ignores handlers unless it is called with listen=True, and only one run listens at a time.
"""

import pyro
from torch import Tensor

from discdiff.choices import Choice
from discdiff.operator.run import At
from discdiff.operator.state import State

__all__ = ["choose"]


def choose(name: str, distribution: Choice, state: State, at: "At") -> Tensor:
    """Make one random choice for every row; operators draw all their randomness through this function.

    Args:
        name: the choice's name, unique in its operator.
        distribution: the law, of batch shape (B,) with B rows in ``state``.
        state: the state in which the choice is made; its row ids key the randomness.
        at: the address of the operator.

    Returns:
        The value, (B, *event).

    Raises:
        TypeError: if the law is not a ``Choice``, because its randomness cannot be keyed.
        ValueError: if the batch shape is not (B,), the name was used before in this step and slot, or a handler
            gives a value of another shape.
    """
    rows = len(state.rows)
    if not isinstance(distribution, Choice):
        raise TypeError(
            f"choice {name!r}: takes a Choice, such as Coins, Tokens or PointMixture, whose randomness is keyed; "
            f"got {distribution!r}"
        )
    if distribution.batch_shape != (rows,):
        raise ValueError(
            f"choice {name!r}: batch shape must be ({rows},), one law a row, got {tuple(distribution.batch_shape)}"
        )
    run, site = at.run, at.site(name)
    distribution.key, distribution.faults = at.key(name, state), run.faults
    if run.given is not None:
        value = run.given(site, distribution, state.rows, at.scored)
    elif run.listen:
        value = pyro.sample(site, distribution).to(distribution.kind)  # type: ignore[arg-type]
        if value.shape != distribution.shape():
            raise ValueError(
                f"site {site}: takes a value of shape {tuple(distribution.shape())}, rows and event; a "
                f"handler gave {tuple(value.shape)}"
            )
    else:
        value = distribution.sample()
    run.keep(site, distribution, value, state.rows, at.scored)
    return value
