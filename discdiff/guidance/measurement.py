r"""Describe measurements of clean sequences: log-likelihoods log p(y | x0) that a posterior is conditioned on.

    e_i = codebook(x0_i),    m = forward(e),    log p(y | x0) = noise(m)

A measurement has three parts: a codebook that embeds tokens, a forward function of the embedded sequence, and the law
of what is observed given the noiseless values m. Each part is an argument, so that linear, quantised and nonlinear
measurements are one class. A black box is any function of tokens, and needs no class.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.checks import array, check_ids, check_tokens, shown, wholes

__all__ = [
    "GaussianNoise", "LevelNoise", "LogLikelihood", "Measurement", "check_codebook", "check_likelihood",
    "embedded_gradient", "likelihoods",
]  # fmt: skip

# maps clean sequences (N, L) to natural logs (N,)
LogLikelihood = Callable[[Int[Tensor, "N L"]], Float[Tensor, " N"]]

# maps embedded sequences (N, L, E) to their noiseless values (N, K)
Forward = Callable[[Float[Tensor, "N L E"]], Float[Tensor, "N K"]]
# maps noiseless values (N, K) to log-likelihoods (N,)
Noise = Callable[[Float[Tensor, "N K"]], Float[Tensor, " N"]]


class Measurement:
    r"""The log-likelihood log p(y | x0) of a measurement of the embedded sequence, natural log.

    It is a function of tokens. So it can be the weight of ``Reward``, ``Doob``, ``MeanField`` and
    ``variational_posterior``; over all sequences it gives the table for ``world.tilted`` and ``world.log_h``. Its
    method ``of_embedded`` takes embedded sequences, also ones between the codes, and is differentiable.

    Shapes: N sequences of L tokens, V codes with E numbers each, K measured values.

    Args:
        codebook: (V, E) the code of each token, or (V,) numbers, for E = 1.
        forward: a matrix (K, D) for a linear measurement of the flattened embedding (L, E), so D = L E; or any
            differentiable function from (N, L, E) to (N, K), which treats every sequence on its own.
        noise: maps the noiseless values (N, K) to log p(y | x0), (N,): ``GaussianNoise(y, scale)``,
            ``LevelNoise(y, edges)``, or any other function.

    Raises:
        TypeError, ValueError: for a codebook or a matrix of another shape, or with NaN or an infinite entry; or if
            ``forward`` or ``noise`` cannot be called. Called, if the parts give other shapes or NaN.
    """

    def __init__(
        self,
        codebook: Float[Tensor, "V *E"] | Sequence[Sequence[float]] | Sequence[float],
        forward: Float[Tensor, "K D"] | Sequence[Sequence[float]] | Forward,
        noise: Noise,
    ) -> None:
        self.codebook: Tensor = check_codebook(codebook, "Measurement: codebook")
        if not callable(forward):
            forward = _finite(forward, "Measurement: forward", 2, "a matrix (K, L E) or a function of (N, L, E)")
        if not callable(noise) or isinstance(noise, type):
            raise TypeError(f"Measurement: noise must map values (N, K) to (N,), got {shown(noise)}")
        self.forward: Tensor | Forward = forward
        self.noise: Noise = noise

    def __call__(self, x: Int[Tensor, "N L"]) -> Float[Tensor, " N"]:
        """Return log p(y | x0) of clean sequences x (N, L), (N,) float64.

        Raises:
            ValueError: unless x is an int64 (N, L) tensor, and for a token without a code, such as a mask.
        """
        check_tokens(x, "Measurement: x")
        size = len(self.codebook)
        check_ids(x, "Measurement: x", f"0..{size - 1}, which have a code", (x < 0) | (x >= size))
        return self.of_embedded(self.codebook.to(x.device)[x])

    def of_embedded(self, e: Float[Tensor, "N L E"]) -> Float[Tensor, " N"]:
        """Return log p(y | e) of embedded sequences e (N, L, E), (N,) float64, with gradients.

        Raises:
            ValueError: for e of another shape; or if ``forward`` or ``noise`` give other shapes, NaN or +inf.
        """
        if not isinstance(e, Tensor) or e.ndim != 3 or e.shape[2] != self.codebook.shape[1]:
            raise ValueError(f"Measurement: e must be (N, L, {self.codebook.shape[1]}), got {_got(e)}")
        if isinstance(self.forward, Tensor):
            if e.shape[1] * e.shape[2] != self.forward.shape[1]:
                raise ValueError(
                    f"Measurement: forward is a matrix for L E = {self.forward.shape[1]} numbers, but a sequence of "
                    f"{e.shape[1]} tokens has {e.shape[1] * e.shape[2]}"
                )
            mean = e.double().flatten(1) @ self.forward.to(e.device).T
        else:
            mean = self.forward(e)
            if not isinstance(mean, Tensor) or mean.ndim != 2 or len(mean) != len(e):
                raise ValueError(f"Measurement: forward must give ({len(e)}, K) values, got {_got(mean)}")
        return _checked(self.noise(mean.double()), len(e), "Measurement: noise").double()

    def __repr__(self) -> str:
        forward = (
            f"({', '.join(map(str, self.forward.shape))}) matrix" if isinstance(self.forward, Tensor) else "function"
        )
        return f"Measurement({tuple(self.codebook.shape)} codebook, {forward}, {shown(self.noise)})"


class GaussianNoise:
    """Observation y = m + scale n of values m with standard normal n: log N(y; m, scale^2), with its constant.

    Args:
        y: (K,) the observed values.
        scale: the standard deviation, a number or one for each value, (K,).

    Raises:
        TypeError, ValueError: for y that is no vector of finite numbers, or a scale that is not positive.
    """

    def __init__(
        self, y: Float[Tensor, " K"] | Sequence[float], scale: float | Float[Tensor, " K"] | Sequence[float]
    ) -> None:
        self.y: Tensor = _finite(y, "GaussianNoise: y", 1, "(K,) numbers")
        self.scale: Tensor = _scale(scale, self.y, "GaussianNoise: scale")
        if not bool((self.scale > 0).all()):
            raise ValueError(f"GaussianNoise: scale must be positive, got {shown(scale)}")

    def __call__(self, mean: Float[Tensor, "N K"]) -> Float[Tensor, " N"]:
        """Return log p(y | m) of values m (N, K), (N,).

        Raises:
            ValueError: for another number of values.
        """
        _same_size(mean, self.y, "GaussianNoise: y")
        scale = self.scale.to(mean.device)
        z = (self.y.to(mean.device) - mean) / scale
        return (-z * z / 2 - scale.log()).sum(-1) - mean.shape[1] * _HALF_LOG_TWO_PI

    def __repr__(self) -> str:
        return f"GaussianNoise({len(self.y)} values)"


class LevelNoise:
    r"""Observation of the level of a quantiser in which each value lies, with or without Gaussian noise before it.

    Level k is the interval from edge k - 1 to edge k; level 0 begins at -inf and the last one ends at +inf:

        p(y | m) = Phi((edge_y - m) / scale) - Phi((edge_{y-1} - m) / scale)

    With scale = 0 the level is exact: p is 1 in the level, its lower edge included, and 0 outside. Then there is no
    gradient.

    Args:
        y: (K,) the observed levels, whole numbers from 0 to the number of edges.
        edges: (n,) the edges, in increasing order.
        scale: the standard deviation of the noise, a number or one for each value, (K,); 0 for none.

    Raises:
        TypeError, ValueError: for levels out of range, edges that do not increase, or a negative scale.
    """

    def __init__(
        self,
        y: Int[Tensor, " K"] | Sequence[int],
        edges: Float[Tensor, " n"] | Sequence[float],
        scale: float | Float[Tensor, " K"] | Sequence[float] = 0.0,
    ) -> None:
        self.edges: Tensor = _finite(edges, "LevelNoise: edges", 1, "(n,) numbers")
        if not len(self.edges) or not bool((self.edges.diff() > 0).all()):
            raise ValueError(f"LevelNoise: edges must increase, at least one, got {shown(self.edges.tolist())}")
        self.y: Tensor = torch.tensor(wholes(y, "LevelNoise: y", 0, len(self.edges)))
        self.scale: Tensor = _scale(scale, self.y, "LevelNoise: scale")
        exact = self.scale == 0
        if not bool((self.scale >= 0).all()) or bool(exact.any()) != bool(exact.all()):
            raise ValueError(f"LevelNoise: scale must be positive, or 0 for all values, got {shown(scale)}")

    def __call__(self, mean: Float[Tensor, "N K"]) -> Float[Tensor, " N"]:
        """Return log p(y | m) of values m (N, K), (N,).

        Raises:
            ValueError: for another number of values.
        """
        _same_size(mean, self.y, "LevelNoise: y")
        edges = torch.nn.functional.pad(self.edges, (1, 1), value=torch.inf)
        edges[0] = -torch.inf
        low, high = (edges[self.y + end].to(mean.device) for end in (0, 1))
        if not bool((self.scale > 0).all()):
            inside = ((mean >= low) & (mean < high)).all(-1)
            return torch.where(inside, 0.0, -torch.inf).double()
        scale = self.scale.to(mean.device)
        # log Phi has no derivative at infinity; at 1e8 standard deviations its value and derivative are exact limits
        a, b = (((end - mean) / scale).clamp(-_FAR, _FAR) for end in (low, high))
        # in the upper tail both Phi round to 1, so the interval is reflected to the lower tail
        a, b = torch.where(a > 0, -b, a), torch.where(a > 0, -a, b)
        log_a, log_b = torch.special.log_ndtr(a), torch.special.log_ndtr(b)
        return (log_b + torch.log1p(-(log_a - log_b).exp())).sum(-1)

    def __repr__(self) -> str:
        return f"LevelNoise({len(self.y)} values, {len(self.edges) + 1} levels)"


_HALF_LOG_TWO_PI, _FAR = 0.9189385332046727, 1e8


def check_codebook(value: object, name: str) -> Float[Tensor, "V E"]:
    """Return a codebook as float64 (V, E); numbers (V,) have E = 1.

    Raises:
        TypeError: if it is no array of numbers.
        ValueError: for another shape, NaN or infinite entries.
    """
    found = array(value, name, torch.float64).detach()
    return _finite(found[:, None] if found.ndim == 1 else found, name, 2, "(V, E) numbers, a code for each token")


def check_likelihood(value: object, name: str) -> LogLikelihood:
    """Return the value if it is a function of tokens; raise TypeError if it cannot be called or is a class."""
    if not callable(value) or isinstance(value, type):
        raise TypeError(f"{name} must be a Measurement or a function of tokens (N, L), got {shown(value)}")
    return value


def likelihoods(function: object, name: str) -> LogLikelihood:
    """Return a function of tokens with a check of what it gives, which is made float64.

    Raises:
        TypeError: if it cannot be called.
        ValueError: when it is called, for another shape, NaN or +inf.
    """
    found = check_likelihood(function, name)
    return lambda x: _checked(found(x), len(x), name).double()


def embedded_gradient(
    function: Callable[[Tensor], Tensor], e: Float[Tensor, "N L E"], where: str, rows: Int[Tensor, " N"]
) -> Float[Tensor, "N L E"]:
    """Return the gradient (N, L, E) of log-likelihoods at embedded sequences e (N, L, E).

    It is differentiable in what e was computed from, if gradients are enabled and e has any.

    Args:
        function: maps (N, L, E) to (N,).
        e: the embedded sequences.
        where: the caller's name, for errors.
        rows: (N,) the ids of the sequences, for errors.

    Raises:
        TypeError: if the function has no gradient.
        ValueError: if it gives another shape, NaN or +inf, or its gradient is not finite; the error names the row.
    """
    follow = torch.is_grad_enabled() and e.requires_grad
    with torch.enable_grad():
        e = e if follow else e.detach().requires_grad_()
        value = _checked(function(e), len(e), where, rows)
        if not value.requires_grad:
            raise TypeError(
                f"{where} must be differentiable in the embedded sequence, but it has no gradient there, as with exact "
                "levels (scale = 0); Reward and MeanField need no gradient"
            )
        (found,) = torch.autograd.grad(value.sum(), e, create_graph=follow)
    wrong = ~found.isfinite().flatten(1).all(-1)
    if bool(wrong.any()):
        row, said = int(rows[wrong][0]), float(value[wrong][0].detach())
        raise ValueError(f"{where}: the gradient at row {row} is not finite, where the log-likelihood is {said:g}")
    return found


def _checked(value: object, count: int, where: str, rows: Tensor | None = None) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != (count,):
        raise ValueError(f"{where} must give ({count},) log-likelihoods, one a sequence, got {_got(value)}")
    wrong = ~(value < torch.inf)
    if bool(wrong.any()):
        number = int(wrong.nonzero()[0])
        which = f"sequence {number}" if rows is None else f"row {int(rows[number])}"
        raise ValueError(f"{where}: the log-likelihood of {which} is {float(value[number].detach())}")
    return value


def _got(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else shown(value)


def _finite(value: object, name: str, axes: int, accepted: str) -> Tensor:
    found = array(value, name, torch.float64).detach()
    if found.ndim != axes or found.numel() == 0:
        raise ValueError(f"{name} must be {accepted}, got shape {tuple(found.shape)}")
    if not bool(found.isfinite().all()):
        raise ValueError(f"{name} must be finite, got {float(found[~found.isfinite()][0])}")
    return found


def _scale(value: object, y: Tensor, name: str) -> Tensor:
    scale = array(value, name, torch.float64).detach()
    if scale.shape not in ((), y.shape) or not bool(scale.isfinite().all()):
        raise ValueError(f"{name} must be a finite number, or one for each value, ({len(y)},), got {shown(value)}")
    return scale


def _same_size(mean: Tensor, y: Tensor, name: str) -> None:
    if mean.shape[1] != len(y):
        raise ValueError(f"{name} has {len(y)} values, but the forward function gives {mean.shape[1]}")
