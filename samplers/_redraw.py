r"""Draw chosen sites from O Q_alpha: the move shared by reverse steps and Gibbs correctors.

That is p(z_i | the other sites) at survival alpha, with O the leave-one-out prediction: draw a clean token, then noise
it. On a rank-one process "data or noise" is drawn before the token. This is exact in float32 and reads logits only at
sites that become data.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.choices import BAD_LOGITS, Coins, Sites, Tokens
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
    """Redraw the chosen sites from O Q_alpha and return all tokens; choices "data", "token", "noise".

    Args:
        state: the state whose sites are redrawn. If it has not been seen, the denoiser is called only if some site
            becomes data.
        where: (B, L) the sites.
        alpha: the survival probability at which they are drawn.
        at: the process, run and address of the operator.
        read: O at these sites and perhaps others, if it has been read already.

    Raises:
        TypeError: if the state has seen a tensor: logits alone do not tell whether they are of O or of D.
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
        sites = said[data].loo if read is None else read.narrow(data)
        tokens = choose("token", Tokens(sites, process.column(x)), state, at)
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
    """Make the remaining choices of a reverse step in one kernel, with the same tokens; None if it does not apply.

    It applies if choices are neither recorded nor listened to, the process is rank-one with one noise law, and the
    kernel can read the logits.

    Args:
        state: the state whose sites are redrawn.
        said: the denoiser's output.
        alpha: the survival probability at which they are drawn.
        at: the process, run and address of the operator.
        bound: (B, L) probability of ``where``, on a GPU, where the kernel makes that choice too.
        where: (B, L) the chosen sites, on a CPU.
        data: (B, L) which of them become data, if that choice is already made.
        odds: (B, L) noise odds of the sites' own tokens; None if every proposed site is accepted.
    """
    process, z = at.process.rank_one, state.tokens
    if not at.fused or process is None or process.anchor(z) is not None:
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
