r"""Draw chosen sites from O Q_alpha: the move shared by reverse steps and Gibbs correctors.

That is p(z_i | the other sites) at survival alpha, with O the leave-one-out prediction: draw a clean token, then noise
it. On a rank-one process "data or noise" is drawn before the token. This is exact in float32 and reads logits only at
sites that become data.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.choices import BAD_LOGITS, Coins, Tokens
from discdiff.kernels import dispatch as kernels
from discdiff.operator import At, State, choose
from discdiff.prediction import Prediction
from discdiff.process import RankOne, Survival

__all__ = ["fused_step", "redraw"]


def redraw(
    state: State,
    where: Bool[Tensor, "B L"],
    prediction: Prediction | Callable[[], Prediction],
    alpha: float | Float[Tensor, "#B #L"],
    at: At,
) -> State:
    """Redraw the chosen sites from O Q_alpha; choices "data", "token", "noise".

    Args:
        state: the state whose sites are redrawn.
        where: (B, L) the sites.
        prediction: the denoiser's output; O is read at the sites that become data. Or a function that returns it,
            called only if there are such sites.
        alpha: the survival probability at which they are drawn.
        at: the process, run and address of the operator.

    Raises:
        TypeError: if ``prediction`` is a tensor: logits alone do not tell whether they are of O or of D.
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
        done = fused_step(state, said, at, alpha, where=where, data=data)
        if done is not None:
            return state.at(done)
        tokens = choose("token", Tokens(said.loo_at(data), process.column(x)), state, at)
        x = torch.where(data, process.place(tokens, x), x)
    return state.at(choose("noise", process.renoise(x, where, where & ~data, alpha), state, at))


def fused_step(
    state: State,
    said: Prediction,
    at: At,
    alpha: Survival,
    bound: Float[Tensor, "B L"] | None = None,
    where: Bool[Tensor, "B L"] | None = None,
    data: Bool[Tensor, "B L"] | None = None,
    odds: Float[Tensor, "B L"] | None = None,
) -> Int[Tensor, "B L"] | None:
    """Make the remaining choices of a reverse step in one kernel, with the same tokens; None if it does not apply.

    It applies if choices are neither recorded nor listened to, the process is rank-one with one noise law, and the
    kernel can read the logits.

    Args:
        state: the state whose sites are redrawn.
        said: the denoiser's output.
        at: the process, run and address of the operator.
        alpha: the survival probability at which they are drawn.
        bound: (B, L) probability of ``where``, on a GPU, where the kernel makes that choice too.
        where: (B, L) the chosen sites, on a CPU.
        data: (B, L) which of them become data, if that choice is already made.
        odds: (B, L) noise odds of the sites' own tokens; None if every proposed site is accepted.
    """
    process, z = at.process, state.tokens
    if not at.fused or not isinstance(process, RankOne) or process.anchor(z) is not None:
        return None
    rows = said.loo_everywhere()
    if rows is None or not kernels.steps(rows, whole=where is None):
        return None
    made = {"where": where is not None, "accept": odds is None, "data": data is not None}
    names = ("where", "accept", "data", "token", "noise")
    keys = {name: at.run.key(name, state, at.step, at.slot, at.turn) for name in names if not made.get(name, False)}
    noise = process.noise(z.device)
    what = kernels.Step(
        tokens=z.flatten(),
        length=z.shape[1],
        bound=None if bound is None else bound.flatten(),
        where=None if where is None else where.flatten(),
        data=None if data is None else data.flatten(),
        odds=None if odds is None else odds.flatten(),
        kept=None if data is not None else process.sitewise(alpha, z).flatten(),
        noise=noise.cumulated,
        last=noise.last,
        keys=keys,
    )
    tokens, wrong = kernels.step(rows, what)
    at.watch(state).refuse(wrong.view(z.shape), BAD_LOGITS)
    return tokens.view(z.shape)
