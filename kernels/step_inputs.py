"""The inputs of a fused reverse step."""

from dataclasses import dataclass

from torch import Tensor

from discdiff.kernels.keys import Key

__all__ = ["Step"]


@dataclass(frozen=True, eq=False)
class Step:
    """The inputs of a fused reverse step except its rows, for N = B L sites in row-major order.

    Attributes:
        tokens: (N,) states before the step.
        length: L.
        bound: (N,) float64 probability that a site is proposed; None if the choice "where" has been made.
        where: (N,) the proposed sites, on a CPU; None if the choice "where" has not been made.
        data: (N,) the sites that become data; None if the choice "data" has not been made.
        odds: (N,) float64 noise odds of each token; None if every proposed site is accepted.
        kept: (N,) float64 probability of "data"; None if the choice "data" has been made.
        noise: (S,) float64 cumulative sums of the noise law.
        last: the last state of positive noise mass.
        keys: by name, the keys of the choices to make: "token", "noise", and those of "where", "accept" and
            "data" that are still to be made.
    """

    tokens: Tensor
    length: int
    bound: Tensor | None
    where: Tensor | None
    data: Tensor | None
    odds: Tensor | None
    kept: Tensor | None
    noise: Tensor
    last: int
    keys: dict[str, Key]
