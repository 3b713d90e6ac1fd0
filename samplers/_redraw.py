r"""Redraw chosen sites from O Q_alpha, a move that reverse steps and Gibbs correctors share.

O is the leave-one-out prediction and Q_alpha the forward transition at survival probability alpha. So O Q_alpha is the
law of a site given the other sites: draw a clean token from O, then noise it. On a rank-one process the choice between
data and noise is made before the token is drawn. So the law is exact in float32, and logits are read only at sites that
become data.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.choices import BAD_LOGITS, Coins, Sites
from discdiff.kernels import dispatch as kernels
from discdiff.operator import At, State, choose
from discdiff.prediction import Prediction
from discdiff.process import Survival

__all__ = ["fused_step", "redraw"]


def redraw(
    state: State,
    where: Bool[Tensor, "B L"],
    alpha: float | Float[Tensor, "#B #L"],
    at: At,
    read: Sites | None = None,
) -> Int[Tensor, "B L"]:
    """Redraw the chosen sites from O Q_alpha and return all tokens (B, L).

    O is the leave-one-out prediction and Q_alpha the forward transition. The random choices have the names "data",
    "token" and "noise".

    Args:
        state: the state whose sites are redrawn. If ``state.seen`` is None, the denoiser is called only if some
            site becomes data.
        where: (B, L) the sites to redraw.
        alpha: the survival probability at which the sites are redrawn.
        at: the process, run and address of the operator.
        read: the rows of O, if the operator has read them already. They may cover more sites than ``where``.

    Raises:
        TypeError: if ``state.seen`` is a tensor: logits alone do not tell whether they are of O or of the denoiser.
    """
    if not isinstance(state.seen, Prediction | None):
        raise TypeError(
            f"redraw takes a Prediction, which knows its leave-one-out form, got {type(state.seen).__name__}: "
            "a denoiser plugged in its place samples another law"
        )
    process, x = at.process, state.tokens
    data = choose("data", Coins(where.double() * process.kept(alpha)), state, at)
    if state.seen is not None or bool(data.any()):
        said = at.predict(state)
        done = fused_step(state, said, alpha, at, where=where, data=data)
        if done is not None:
            return done
        law = said.tokens(data, process.column(x), None if read is None else read.narrow(data))
        tokens = choose("token", law, state, at)
        x = torch.where(data, process.place(tokens, x), x)
    return choose("noise", process.renoise(x, where, where & ~data, alpha), state, at)


def fused_step(
    state: State,
    said: Prediction,
    alpha: Survival,
    at: At,
    *,
    bound: Float[Tensor, "B L"] | None = None,
    where: Bool[Tensor, "B L"] | None = None,
    data: Bool[Tensor, "B L"] | None = None,
    odds: Float[Tensor, "B L"] | None = None,
) -> Int[Tensor, "B L"] | None:
    """Make the remaining choices of a reverse step in one kernel; return all tokens (B, L), or None if no kernel can.

    The tokens equal those of separate choices. The kernel needs a rank-one process without an anchor and logits that it
    can read. It is not used if choices are recorded or Pyro's handlers see them.

    Args:
        state: the state whose sites are redrawn.
        said: the prediction at this state.
        alpha: the survival probability at which the sites are redrawn.
        at: the process, run and address of the operator.
        bound: (B, L) the probability that a site is proposed. Given on a GPU: there the kernel also chooses "where".
        where: (B, L) the proposed sites. Given on a CPU: there the choice "where" is already made.
        data: (B, L) the sites that become data, if the choice "data" is already made.
        odds: (B, L) the noise odds of the sites' own tokens, as in ``RankOne.odds``; None if every proposed site is
            accepted.
    """
    process, z = at.process.rank_one, state.tokens
    if not at.fused or process is None or process.anchor(z) is not None:
        return None
    rows = said.loo_everywhere()
    if rows is None or not kernels.steps(rows, whole=where is None):
        return None
    made = {"where": where is not None, "accept": odds is None, "data": data is not None}
    names = ("where", "accept", "data", "token", "noise")
    keys = {name: at.key(name, state) for name in names if not made.get(name, False)}
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
