r"""The output of a denoiser about x0, together with its meaning.

Three quantities describe the same posterior of site i given z. Each converts to the others exactly, for every process:

    denoiser       D(v) = p(x0_i = v | z)                      optimum of cross-entropy
    leave-one-out  O(v) = p(x0_i = v | z without z_i)          optimum of the plug-in ELBO of a uniform process
    concrete score r(v) = p_t(z with z_i = v) / p_t(z)         optimum of score entropy

    D(v) ~ O(v) q_t(z_i | v)                 rank one: a single number a site, O(v) w^{1(v = z_i)}
    c = O Q_t,  r(v) = c(v) / c(z_i)         rank one: c = alpha O + b_t
    O = c Q_t^{-1},  c(v) = r(v) / sum_u r(u)

The bridge needs the leave-one-out (LOO). With D in its place the evidence of z_i is counted twice, and the error does
not vanish with more steps. Therefore operators take a ``Prediction`` and never a tensor of logits.

Where the conversions hold:

* D to O: wherever z_i rules out no token. As alpha -> 1 the evidence grows as 1 / (1 - alpha), and O has about
  -log10(1 - alpha) correct digits fewer than the small entries of D. In log space nothing else is lost. D does not
  determine O, and the conversion is an error, at alpha = 1, at a revealed site of an absorbing process, or where
  q_t(z_i | v) = 0.
* O to D, O to r: for every alpha from 0 to 1. At alpha = 1 the result is the limit: the token itself, if O allows it.
* r to O: the error of r is divided by alpha: 1e-7 in r is 1e-3 in O at alpha = 1e-4. At alpha = 0 it is an error.

References: Uniform Diffusion Models Revisited (2026, https://arxiv.org/abs/2605.22765); SEDD (Lou et al., 2024,
https://arxiv.org/abs/2310.16834).
"""

import copy
from collections.abc import Callable
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.checks import Renamed, shown
from discdiff.choices import AT_ONCE, Sites
from discdiff.kernels import dispatch as kernels
from discdiff.prediction.output import Output
from discdiff.prediction.view import View, said_rows, to_loo
from discdiff.process import Process

__all__ = ["Prediction", "Predicts", "check_predicts"]

Predicts = Literal["denoiser", "loo", "ratio"]
# maps rows of O, with their (N,) states and survival probabilities, to other rows
Truncate = Callable[[kernels.Rows, Tensor, Tensor], kernels.Source]


class Prediction(Renamed):
    """A denoiser's output at noisy tokens, convertible between D, O and r.

    Args:
        logits: (B, L, V) unnormalised log-probabilities of the denoiser or the LOO. For "ratio" the log ratios (B, L,
            C) over the C columns that a site moves among (V for pairs of a token and a source token, else S), or
            (B, L, V) on a masked process. Or an ``Output`` that gives them.
        predicts: which of the three they are.
        x: (B, L) the noisy tokens they were computed from.
        alpha: the survival at each site: float, (B, 1) or (B, L) float64.
        process: the forward process.

    Raises:
        ValueError: for an unknown ``predicts`` or a wrong shape.
    """

    _now: ClassVar[dict[str, str]] = {
        "loo_at": "prediction[where].loo", "loo_rows": "prediction[where].loo.dense()",
        "denoiser_at": "prediction[where].denoiser", "denoiser_rows": "prediction[where].denoiser.dense()",
        "ratio_rows": "prediction[where].ratio.dense()", "rates_at": "prediction[where].rates",
        "others_at": "prediction[where].others", "reverse": "prediction[where].reverse(alpha_s)",
        "reverse_rows": "prediction[where].reverse(alpha_s).dense()", "log_own": "prediction[where].own",
        "read": "prediction[where].reading", "conditional": "prediction[where].conditional",
    }  # fmt: skip

    def __init__(
        self,
        logits: Float[Tensor, "B L _"] | Output,
        predicts: Predicts,
        x: Int[Tensor, "B L"],
        alpha: float | Float[Tensor, "#B #L"],
        process: Process,
    ) -> None:
        widths = {process.vocab_size} if predicts != "ratio" or process.masks else set()
        if predicts == "ratio":
            widths.add(process.columns)
        check_predicts(predicts)
        output = logits if isinstance(logits, Output) else Output(logits, logits.shape[-1])
        if output.source.shape[:2] != x.shape or output.source.ndim != 3 or output.width not in widths:
            accepted = " or ".join(str((*x.shape, width)) for width in sorted(widths))
            got = (*output.source.shape[:2], output.width)
            raise ValueError(f"a denoiser that predicts {predicts!r} must return {accepted}, got {got}")
        self.output, self.predicts, self.x, self.process = output, predicts, x, process
        self.alpha = torch.as_tensor(alpha, dtype=torch.float64, device=x.device).expand(x.shape)
        self.watch = AT_ONCE  # a run replaces it by its own
        self.truncate: Truncate | None = None

    @property
    def logits(self) -> Float[Tensor, "B L _"]:
        """Return the denoiser's logits, (B, L, V) or (B, L, C); on hidden states its head runs at every site."""
        return self.output.logits()

    # --- the three meanings, normalised -------------------------------------------------------------------------------

    @property
    def denoiser(self) -> Float[Tensor, "B L V"]:
        """The posterior log D, (B, L, V); one-hot at a revealed site of an absorbing process."""
        return self._spread(self._everywhere.denoiser).log_softmax(-1)

    @property
    def loo(self) -> Float[Tensor, "B L V"]:
        """The leave-one-out prediction log O, (B, L, V).

        Raises:
            ValueError: where the prediction does not determine it, such as at a revealed site of a masked process;
                the error names the site.
        """
        return self._spread(self._everywhere.loo).log_softmax(-1)

    @property
    def ratio(self) -> Float[Tensor, "B L C"]:
        """The concrete score log r, (B, L, C); 0 at the site's own state.

        Raises:
            ValueError: where the LOO is undefined.
        """
        return self._spread(self._everywhere.ratio)

    @property
    def rates(self) -> Float[Tensor, "B L C"]:
        """The reverse rates R(z -> z with z_i = v) = Q(v, z_i) r(v) per unit of sigma = -log alpha; 0 at v = z_i.

        A state that noise never leads to, such as a revealed token of a masked process, has rate 0 and needs no ratio.

        Raises:
            ValueError: where the LOO is undefined and a ratio is needed.
        """
        inflow = self.process.inflow(self.x, self.alpha)
        moving = (inflow > 0).any(-1)
        ratio = inflow.new_zeros(*self.x.shape, self.process.columns)
        ratio = ratio.index_put((moving,), self[moving].ratio.dense().double().exp())
        return (inflow * ratio).scatter(-1, self.process.column(self.x)[..., None], 0.0)

    # --- at chosen sites, for operators -------------------------------------------------------------------------------

    def __getitem__(self, where: Bool[Tensor, "B L"]) -> View:
        """Return the view of the chosen sites, which answers the same questions without reading logits.

        Raises:
            ValueError: unless ``where`` is a bool tensor (B, L).
        """
        if getattr(where, "dtype", None) is not torch.bool or where.shape != self.x.shape:
            raise ValueError(f"prediction[where] takes a bool tensor {tuple(self.x.shape)}, got {shown(where)}")
        row, position = where.nonzero(as_tuple=True)
        return View(self, where, (row, position))

    def loo_everywhere(self) -> kernels.Rows | None:
        """Return O at every site, unchecked; rows where O is undefined hold garbage, which the caller must not read.

        None if no kernel can read it: logits behind a head, a conversion of whole rows, or a truncation.
        """
        rows = to_loo(self, said_rows(self, None), self.x.flatten(), self.alpha.flatten())
        return rows if rows.convert is None and self.truncate is None else None

    def truncated(self, truncate: Truncate) -> "Prediction":
        """Return the same prediction with its LOO changed by ``truncate`` whenever it is read.

        Raises:
            ValueError: if the prediction is truncated already.
        """
        if self.truncate is not None:
            raise ValueError("a prediction is truncated once; give one Truncation all its options")
        other = copy.copy(self)
        other.truncate = truncate
        return other

    @property
    def untruncated(self) -> "Prediction":
        """The prediction of the denoiser before any truncation; confidences are computed from it."""
        if self.truncate is None:
            return self
        other = copy.copy(self)
        other.truncate = None
        return other

    def select(self, index: Int[Tensor, " R"]) -> "Prediction":
        """Return the prediction of chosen batch rows (R,)."""
        other = copy.copy(self)
        other.output, other.x, other.alpha = self.output.select(index), self.x[index], self.alpha[index]
        other.watch = self.watch.select(index)
        return other

    # --- internal -----------------------------------------------------------------------------------------------------

    @property
    def _everywhere(self) -> View:
        return self[torch.ones_like(self.x, dtype=torch.bool)]

    def _spread(self, sites: Sites) -> Float[Tensor, "B L _"]:
        return sites.dense().unflatten(0, tuple(self.x.shape))

    def __repr__(self) -> str:
        return f"Prediction({self.predicts!r}, {(*self.x.shape, self.output.width)}, {self.process})"


def check_predicts(predicts: str) -> None:
    """Raise ValueError for an unknown ``predicts``."""
    if predicts not in get_args(Predicts):
        raise ValueError(f"predicts must be one of {', '.join(map(repr, get_args(Predicts)))}, got {predicts!r}")
