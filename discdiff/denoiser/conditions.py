r"""Conditional and marginal denoisers from one joint denoiser, and denoisers with an extra input.

A denoiser that takes a time for every site also gives every conditional and marginal law of its sites:

    joint         every site moves from noise to data      the model itself
    conditional   the sites B hold clean tokens, time 0    p(x_A | x_B)
    marginal      the sites B hold noise, time 1           p(x_A), B summed out

At time 0 a site is known exactly; at time 1 its state carries no information. If the network is
exact, so are the conditional and the marginal law. On an absorbing process the states show which sites are noise, so
any masked denoiser works.

Reference: UniDiffuser, one model of all these laws with a time for each modality (Bao et al., 2023,
https://arxiv.org/abs/2303.06555).
"""

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.denoiser.call import Call, Network
from discdiff.denoiser.context import Context
from discdiff.prediction import unshifted

__all__ = ["Along", "HeldSites"]


@dataclass(repr=False)
class HeldSites(Context):
    """Context for some sites of a longer sequence; the other sites have fixed states and times.

    Attributes:
        rows: (B,) ids of the rows; if there is only one row, it is used for every id.
        moving: (L,) the sites whose logits are returned.
        states: (B, L) the states of the other sites; those of moving sites are ignored.
        time: (L,) the times of the other sites.
    """

    rows: Int[Tensor, " B"]
    moving: Bool[Tensor, " L"]
    states: Int[Tensor, "B L"]
    time: Float[Tensor, " L"]

    def logits(self, call: Call, fn: Network, x: Int[Tensor, "R n"], t: Float[Tensor, "#R #n"], rows: Tensor) -> Tensor:
        moving = self.moving.to(x.device)
        whole = self.states.to(x.device)[self.places(rows)]
        whole[:, moving] = x
        time = self.time.to(t.device, t.dtype).expand(len(x), -1).clone()
        time[:, moving] = t.expand(x.shape)
        out = call(fn, whole, time, fresh=True)
        return (unshifted(out) if call.shift else out)[:, moving]

    def queries(self, width: int, rows: Tensor) -> int:
        return len(self.moving) * len(rows)

    def __repr__(self) -> str:
        return f"HeldSites({int(self.moving.sum())} of {len(self.moving)} sites move)"


@dataclass
class Along(Context):
    """Context that gives the function a condition for every row as third argument: fn(x, time, condition).

    Attributes:
        condition: (B, ...), one entry for each row.
    """

    rows: Int[Tensor, " B"]
    condition: Tensor

    def logits(self, call: Call, fn: Network, x: Int[Tensor, "R n"], t: Float[Tensor, "#R #n"], rows: Tensor) -> Tensor:
        return fn(x, call.argument(t.expand(len(x), -1)), self.condition[self.places(rows)])  # type: ignore[call-arg]

    def queries(self, width: int, rows: Tensor) -> int:
        return width * len(rows)
