r"""EvoDiff: networks for proteins, and their noise processes.

The order-agnostic models (OA_DM) mask amino acids and take no time. The D3PM models take a step k in 1..T-1, T = 500.
At step k the noise is the product of the transition matrices Q_0 ... Q_k. The time here is t = k / (T - 1), and t = 0
is data.

    uniform    Q_k = (1 - beta_k) I + beta_k / K 11^T        beta_k = 1 / (T - k + 1)       exactly ``Uniform``
    BLOSUM     Q_k = I + beta_k G                            beta_k = e_k / e_{T-1} + 1/T   nearly ``General(G)``

K = 26 is the number of letters and e_k = 1e-5 + (0.999 - 1e-5) exp(6 k / (T - 1)). G holds the rates of substitution:
the off-diagonal part of exp(BLOSUM62), scaled to be doubly stochastic.

``General`` has exp(beta_k G) in place of Q_k. All these matrices commute. So the products differ only in their
eigenvalues: prod_j (1 + beta_j l) and exp(l sum_j beta_j) for an eigenvalue l of G. The rows of the marginals q_t
differ by at most 2e-3 in total variation at every k (a test checks it). A leave-one-out prediction depends on the
process only through q_t. No process in continuous time has exactly these Q_k: from k = 384 on log Q_k has negative
rates.

References: EvoDiff (Alamdari et al., 2023, https://doi.org/10.1101/2023.09.11.556673); D3PM (Austin et al., 2021,
https://arxiv.org/abs/2107.03006); BLOSUM62 (Henikoff and Henikoff, 1992, https://doi.org/10.1073/pnas.89.22.10915).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from discdiff.adapters.byte_net import bytenet
from discdiff.adapters.convention import Convention
from discdiff.adapters.files import Files
from discdiff.adapters.loading import Asked, Family, fit
from discdiff.adapters.settings import Refused
from discdiff.process import General, Linear, Masked, Process, Schedule, Uniform

__all__ = ["ALPHABET", "EVODIFF", "Squared", "Tabulated", "blosum", "blosum_rates", "uniform"]

ALPHABET = "ACDEFGHIKLMNPQRSTVWYBZXJOU-*#@!"  # gap, stop, mask, start, padding at the end
_STEPS, _MASK, _COMMON, _LETTERS = 500, ALPHABET.index("#"), 20, 26
_SCORED = "ARNDCQEGHILKMFPSTWYVBZX"
_SCORES = """
4
-1 5
-2 0 6
-2 -2 1 6
0 -3 -3 -3 9
-1 1 0 0 -3 5
-1 0 0 2 -4 2 5
0 -2 0 -1 -3 -2 -2 6
-2 0 1 -1 -3 0 0 -2 8
-1 -3 -3 -3 -1 -3 -3 -4 -3 4
-1 -2 -3 -4 -1 -2 -3 -4 -3 2 4
-1 2 0 -1 -3 1 1 -2 -1 -3 -2 5
-1 -1 -2 -3 -1 0 -2 -3 -2 1 2 -1 5
-2 -3 -3 -3 -2 -3 -3 -3 -1 0 0 -3 0 6
-1 -2 -2 -1 -3 -1 -1 -2 -2 -3 -3 -1 -2 -4 7
1 -1 1 0 -1 0 0 0 -1 -2 -2 0 -1 -2 -1 4
0 -1 0 -1 -1 -1 -1 -2 -2 -1 -1 -1 -1 -2 -1 1 5
-3 -3 -4 -4 -2 -2 -3 -2 -2 -3 -2 -3 -1 1 -4 -3 -2 11
-2 -2 -2 -3 -2 -1 -2 -3 2 -1 -1 -2 -1 3 -3 -2 -2 2 7
0 -3 -3 -3 -1 -2 -2 -3 -3 3 1 -2 1 -1 -2 -2 0 -3 -1 4
-2 -1 3 4 -3 0 1 -1 0 -3 -4 0 -3 -3 -2 0 -1 -4 -3 -3 4
-1 0 0 1 -3 3 4 -2 0 -3 -3 1 -1 -3 -1 0 -1 -3 -2 -2 1 4
0 -1 -1 -1 -2 -1 -1 -1 -1 -1 -1 -1 -1 -1 -2 0 0 -2 -1 -1 -1 -1 -1
"""


# --- the noise ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tabulated(Schedule):
    """Schedule alpha = exp(-sigma), where sigma is interpolated linearly between n + 1 equally spaced times.

    Args:
        sigmas: sigma at the times 0, 1/n, ..., 1; the first is 0, and they increase.

    Raises:
        ValueError: if the sigmas do not begin at 0, do not increase, or are fewer than two.
    """

    sigmas: tuple[float, ...]

    def __post_init__(self) -> None:
        growing = all(a < b < math.inf for a, b in zip(self.sigmas, self.sigmas[1:], strict=False))
        if len(self.sigmas) < 2 or self.sigmas[0] != 0 or not growing:
            raise ValueError("Tabulated: sigmas must be two or more numbers that begin at 0 and grow")

    def _piece(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """Return sigma at the beginning of piece number ``at``, and its increase over the piece."""
        table = torch.tensor(self.sigmas, dtype=torch.float64, device=at.device)
        return table[at], table[at + 1] - table[at]

    def _number(self, t: Tensor) -> Tensor:
        return (t * (len(self.sigmas) - 1)).floor().long().clamp(0, len(self.sigmas) - 2)

    def _alpha(self, t: Tensor) -> Tensor:
        number = self._number(t)
        start, length = self._piece(number)
        return torch.exp(-start - length * (t * (len(self.sigmas) - 1) - number))

    def _alpha_derivative(self, t: Tensor) -> Tensor:
        return -self._piece(self._number(t))[1] * (len(self.sigmas) - 1) * self._alpha(t)

    def _time(self, alpha: Tensor) -> Tensor:
        sigma = -alpha.log()
        table = torch.tensor(self.sigmas, dtype=torch.float64, device=alpha.device)
        number = (torch.searchsorted(table, sigma, right=True) - 1).clamp(0, len(self.sigmas) - 2)
        start, length = self._piece(number)
        return ((number + (sigma - start) / length) / (len(self.sigmas) - 1)).clamp(0.0, 1.0)

    def __repr__(self) -> str:
        return f"Tabulated({len(self.sigmas) - 1} pieces)"


def _clock(sigma: Float[Tensor, " T"]) -> Tabulated:
    """Make the schedule whose sigma at time k / (T - 1) is ``sigma[k]``, or 0 if k = 0.

    ``sigma[k]`` is the sum of the increases that belong to Q_0 ... Q_k.
    """
    return Tabulated((0.0, *sigma[1:].tolist()))


def uniform(steps: int = _STEPS) -> Uniform:
    """Make the process of the D3PM models with uniform substitutions, on the first 26 letters of the alphabet.

    The process has steps k = 1 ... T - 1 with T = ``steps``; step k is at time k / (T - 1).
    """
    survive = 1 - 1 / torch.arange(steps + 1, 1, -1, dtype=torch.float64)
    return Uniform(_LETTERS, _clock(-survive.log().cumsum(0)))


def blosum(steps: int = _STEPS) -> General:
    """Make the process of the D3PM models with BLOSUM substitutions.

    The process has steps k = 1 ... T - 1 with T = ``steps``; step k is at time k / (T - 1). With the default T, rows of
    its marginals differ from the models' own by at most 2e-3 in total variation.

    At t = 1 the marginal is far from the stationary law, which is uniform: 82 % of tryptophans are unchanged. The
    authors' sampler and ``prior`` nevertheless start from the stationary law.
    """
    rise = 1e-5 + (0.999 - 1e-5) * torch.linspace(0, 6, steps, dtype=torch.float64).exp()
    return General(blosum_rates(), _clock((rise / rise[-1] + 1 / steps).cumsum(0)))


def blosum_rates() -> Float[Tensor, "26 26"]:
    """Return G (26, 26), the symmetric rates of substitution that follow from BLOSUM62.

    Rates are per unit of beta. The matrix of exponentiated scores, with the gap as a letter, is scaled to be doubly
    stochastic. Then the gap is removed. J, O, U and the gap have score 4 with themselves and -4 with all other letters.
    """
    letters = ALPHABET[: _LETTERS + 1]
    score = torch.full((len(letters), len(letters)), -4.0, dtype=torch.float64).fill_diagonal_(4.0)
    for row, line in zip(_SCORED, _SCORES.split("\n")[1:], strict=False):
        for column, value in zip(_SCORED, line.split(), strict=False):
            a, b = letters.index(row), letters.index(column)
            score[a, b] = score[b, a] = float(value)
    weight, scale = score.exp(), torch.ones(len(letters), dtype=torch.float64)
    for _ in range(100):  # 38 iterations converge to the last digit
        scale = (scale / (weight @ scale)).sqrt()
    rates = (scale[:, None] * scale * weight)[:_LETTERS, :_LETTERS].fill_diagonal_(0.0)
    return rates - torch.diag(rates.sum(1))


# --- loading --------------------------------------------------------------------------------------------------------


class Squared(nn.Module):
    r"""A D3PM network of EvoDiff that returns leave-one-out logits.

    In training and in sampling, the authors' reverse step weights a clean token v by the square of the network's
    probability p(v):

        p(x_{k-1} | x_k) prop. to Q_k(x_{k-1}, x_k) sum_v p(v)^2 Qbar_{k-1}(v, x_{k-1}),    Qbar_k = Q_0 ... Q_k

    This is the exact posterior step if p^2 is proportional to the leave-one-out prediction. Training by the variational
    bound leads to such a p, and 2 log p are the logits of the leave-one-out prediction. (At k = 1 the loss is the
    cross-entropy instead.)
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Int[Tensor, "B L"], step: Int[Tensor, " B"]) -> Float[Tensor, "B L C"]:
        """Return twice the network's logits, (B, L, C), for tokens (B, L) at steps (B,); step 0 counts as 1."""
        return 2 * self.network(x, step.clamp(min=1))


_SQUARE = "as its authors sample, a clean token is weighted by the square of what the network says"
_MIXED = "in training the times of a batch were mixed among its rows, so it may make little of them"


@dataclass(frozen=True)
class _Kind:
    """A family of EvoDiff's networks.

    Attributes:
        name, about: fields of the ``Family``.
        said: words in a file's name, each of which identifies the family.
        process: makes the D3PM process; None for the masked models.
    """

    name: str
    about: str
    said: tuple[str, ...]
    process: Callable[[], Process] | None

    def family(self) -> Family:
        return Family(self.name, self.about, self.recognises, self.build)

    def recognises(self, files: Files) -> bool:
        """Return whether the file's name identifies the family; the contents of all families look the same."""
        if "model_type" in files.config:
            return False
        named = f"{files.path.name} {files.parts[0].name}".lower().replace("_", "-")
        return any(word in named for word in self.said) and any("sequence1.2.conv" in name for name in files.shapes)

    def build(self, files: Files, asked: Asked) -> tuple[nn.Module, Convention]:
        weights = files.weights
        shapes = {name: tuple(part.shape) for name, part in weights.items()}
        with torch.device("meta"):
            network = bytenet(shapes, files.config, self.process is not None)
        fit(network, weights, files)
        rows = network.decoder.conv.out_channels
        if rows != len(ALPHABET):
            raise Refused(f"{files.chosen} knows {rows} letters, and EvoDiff's alphabet has {len(ALPHABET)}")
        if asked.block is not None:
            raise Refused("EvoDiff is not in blocks, so block= is not to be given; sample it with Blockwise")
        if self.process is None:
            mask, source = files.mask_id(_MASK, asked.mask_id)
            if not 0 <= mask < rows:
                raise Refused(f"the mask id is {mask} ({source}), and the network knows 0..{rows - 1}")
            process = Masked(rows, asked.schedule or Linear(), mask_id=mask)
            rare = tuple(v for v in range(_COMMON, rows) if v != mask)
            return network, Convention(self.name, process, "denoiser", rows, source, suppress=rare, ids="")
        if asked.mask_id is not None or asked.schedule is not None:
            raise Refused("EvoDiff's D3PM models have no mask and a clock of their own; use load(...).with_schedule()")
        convention = Convention(
            self.name, self.process(), "loo", rows, time="t", time_scale=float(_STEPS - 1), integer_time=True,
            suppress=tuple(range(_COMMON, _LETTERS)), ids="", clock="", notes=(_SQUARE, _MIXED),
        )  # fmt: skip
        return Squared(network), convention


EVODIFF: tuple[Family, ...] = tuple(
    kind.family()
    for kind in (
        _Kind("EvoDiff-OADM", "EvoDiff, amino acids hidden in any order (Alamdari et al., 2023)",
              ("oaar", "oa-dm", "oadm"), None),
        _Kind("EvoDiff-uniform", "EvoDiff, amino acids replaced by any (Alamdari et al., 2023)",
              ("d3pm-uniform",), uniform),
        _Kind("EvoDiff-BLOSUM", "EvoDiff, amino acids replaced by similar ones (Alamdari et al., 2023)",
              ("d3pm-blosum",), blosum),
    )
)  # fmt: skip
