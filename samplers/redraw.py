r"""The move that reverse steps and Gibbs correctors share: draw chosen sites from O Q_alpha.

That is p(z_i | the other sites) at survival alpha, with O the leave-one-out prediction: a fresh clean token, noised.
On a process of rank one "data or noise?" comes first and the token after, which is exact in float32 and reads logits
only where the answer is "data".
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from discdiff.distributions import Coins, Tokens
from discdiff.handlers import At, choose
from discdiff.prediction import Prediction
from discdiff.state import State

__all__ = ["redraw"]


def redraw(
    state: State,
    where: Bool[Tensor, "B L"],
    prediction: Prediction | Callable[[], Prediction],
    alpha: float | Float[Tensor, "#B #L"],
    at: At,
) -> State:
    """Redraw the chosen sites from O Q_alpha; three sites: "data", "token", "noise".

    Args:
        state: the state whose sites are redrawn.
        where: (B, L) the sites.
        prediction: the denoiser's output; O is read from it at the sites that become data. Or a function that asks for
            it, called only if there are such sites.
        alpha: the survival at which they are drawn.
        at: where the operator stands.

    Raises:
        TypeError: if ``prediction`` is a tensor: logits without their meaning cannot be plugged in.
    """
    if not isinstance(prediction, Prediction) and not callable(prediction):
        raise TypeError(
            f"redraw takes a Prediction, which knows its leave-one-out form, got {type(prediction).__name__}: "
            "a denoiser plugged in its place samples another law"
        )
    process, x = at.process, state.tokens
    data = choose("data", Coins(where.double() * process.kept(alpha)), state, at)
    if isinstance(prediction, Prediction) or bool(data.any()):
        said = prediction if isinstance(prediction, Prediction) else prediction()
        tokens = choose("token", Tokens(said.loo_at(data), process.column(x)), state, at)
        x = torch.where(data, process.place(tokens, x), x)
    return state.at(choose("noise", process.renoise(x, where, where & ~data, alpha), state, at))
