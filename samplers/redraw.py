r"""The move that reverse steps and Gibbs correctors share: draw chosen sites from alpha O + (1 - alpha) pi.

That mixture is p(z_i | the other sites) at survival alpha, with O the leave-one-out prediction. Drawn as "data or
noise?" first and the token after, it is exact in float32 and reads logits only where the answer is "data".
"""

from jaxtyping import Bool
from torch import Tensor

from discdiff.distributions import Coins, PointMixture, Tokens
from discdiff.handlers import At, choose
from discdiff.prediction import Prediction
from discdiff.state import State

__all__ = ["redraw"]


def redraw(state: State, where: Bool[Tensor, "B L"], prediction: Prediction, alpha: float, at: At) -> State:
    """Redraw the chosen sites from alpha O + (1 - alpha) pi; three sites: "data", "token", "noise".

    Args:
        state: the state whose sites are redrawn.
        where: (B, L) the sites.
        prediction: the denoiser's output; O is read from it at the sites that become data.
        alpha: the survival at which they are drawn.
        at: where the operator stands.

    Raises:
        TypeError: if ``prediction`` is a tensor: logits without their meaning cannot be plugged in.
    """
    if not isinstance(prediction, Prediction):
        raise TypeError(
            f"redraw takes a Prediction, which knows its leave-one-out form, got {type(prediction).__name__}: "
            "a denoiser plugged in its place samples another law"
        )
    data = choose("data", Coins(where.double() * alpha), state, at)
    tokens = choose("token", Tokens(prediction.loo_rows, data, state.tokens), state, at)
    noise = where & ~data
    pi = at.process.pi
    tokens = choose("noise", PointMixture(pi, [tokens], [(~noise).double()]), state, at)
    return state.at(tokens)
