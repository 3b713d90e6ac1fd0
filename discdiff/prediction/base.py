r"""The output of a denoiser about x0, together with its meaning.

Three quantities describe the same posterior of site i given z. Each converts to the others exactly, for every process:

    denoiser       D(v) = p(x0_i = v | z)                      optimum of cross-entropy
    leave-one-out  O(v) = p(x0_i = v | z without z_i)          optimum of the plug-in ELBO of a uniform process
    concrete score r(v) = p_t(z with z_i = v) / p_t(z)         optimum of score entropy

    D(v) ~ O(v) q_t(z_i | v)                 rank one: D(v) ~ O(v) w^{1(v = z_i)}, one number w a site
    c = O Q_t,  r(v) = c(v) / c(z_i)         rank one: c = alpha O + b_t
    O = c Q_t^{-1},  c(v) = r(v) / sum_u r(u)

The bridge needs the leave-one-out (LOO). With D in its place the evidence of z_i is counted twice, and the error does
not vanish with more steps. Therefore operators take a ``Prediction`` and never a tensor of logits.

Where the conversions hold:

* D to O: wherever z_i rules out no token. As alpha -> 1 the evidence grows as 1 / (1 - alpha), and O has about
  -log10(1 - alpha) correct digits fewer than the small entries of D. In log space nothing else is lost. D does not
  determine O at alpha = 1, at a revealed site of an absorbing process, or where q_t(z_i | v) = 0 for some token v. The
  conversion raises an error there.
* O to D, O to r: for every alpha from 0 to 1. At alpha = 1 the result is the limit: the token itself, if O allows it.
* r to O: the error of r is divided by alpha: 1e-7 in r is 1e-3 in O at alpha = 1e-4. At alpha = 0 it raises an error.

References: Uniform Diffusion Models Revisited (2026, https://arxiv.org/abs/2605.22765); SEDD (Lou et al., 2024,
https://arxiv.org/abs/2310.16834).
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.checks import Renamed, listing, real, shown
from discdiff.choices import AT_ONCE, Choice, Sites, Tokens
from discdiff.kernels import dispatch as kernels
from discdiff.prediction.change import Combination, Cut, LogWeight, RowChange, Tilt, Truncate
from discdiff.prediction.output import Output
from discdiff.prediction.view import View, said_rows, to_loo
from discdiff.process import Process

__all__ = ["Prediction", "Predicts", "check_predicts"]

Predicts = Literal["denoiser", "loo", "ratio"]
# maps a prediction of R rows, the indices (R,) of these rows where the law was given, chosen sites (R, L) and tokens
# (R, L) to a law (R, L) of clean tokens at the chosen sites; other positions keep the given tokens
Law = Callable[["Prediction", Tensor, Tensor, Tensor], Choice]


class Prediction(Renamed):
    """A denoiser's output at noisy tokens, convertible between denoiser D, leave-one-out O and concrete score r.

    Args:
        logits: (B, L, V) unnormalised log-probabilities of the denoiser or the LOO. For "ratio" they are log ratios
            (B, L, C) over the C states among which a site moves (``process.columns``), or (B, L, V) on a masked
            process. An ``Output`` may take the place of the tensor.
        predicts: what the logits are: "denoiser" (D), "loo" (O) or "ratio" (r).
        x: (B, L) the noisy tokens from which the logits were computed.
        alpha: the survival probability at each site: a float, (B, 1) or (B, L) float64.
        process: the forward process.

    Raises:
        ValueError: if ``predicts`` is unknown or the logits have a wrong shape.
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
            raise ValueError(f"a denoiser that predicts {predicts!r} must return {accepted} = (B, L, V), got {got}")
        self.output: Output = output
        self.predicts = predicts
        self.x: Tensor = x
        self.process: Process = process
        self.alpha: Tensor = torch.as_tensor(alpha, dtype=torch.float64, device=x.device).expand(x.shape)
        self.watch = AT_ONCE  # a run replaces it by its own
        self.changes: tuple[RowChange, ...] = ()
        self.law: Law | None = None
        self._law_rows: Tensor | None = None  # (R,) the selected rows of the law; None for all in order

    @property
    def logits(self) -> Float[Tensor, "B L _"]:
        """The logits of the denoiser, (B, L, V); if a head computes them, it runs at every site."""
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
            ValueError: if the prediction does not determine O at some site, such as a revealed site of a masked
                process; the error names the site.
        """
        return self._spread(self._everywhere.loo).log_softmax(-1)

    @property
    def ratio(self) -> Float[Tensor, "B L C"]:
        """The concrete score log r, (B, L, C); 0 at the site's own state.

        Raises:
            ValueError: if the leave-one-out is undefined at some site.
        """
        return self._spread(self._everywhere.ratio)

    @property
    def rates(self) -> Float[Tensor, "B L C"]:
        """The reverse rates R(z -> z with z_i = v) = Q(v, z_i) r(v) per unit of sigma = -log alpha; 0 at v = z_i.

        At a site whose state noise cannot produce, such as a revealed token of a masked process, all rates are 0, and
        no ratio is needed.

        Raises:
            ValueError: if a ratio is needed at a site where the leave-one-out is undefined.
        """
        inflow = self.process.inflow(self.x, self.alpha)
        moving = (inflow > 0).any(-1)
        ratio = inflow.new_zeros(*self.x.shape, self.process.columns)
        ratio = ratio.index_put((moving,), self[moving].ratio.dense().double().exp())
        return (inflow * ratio).scatter(-1, self.process.column(self.x)[..., None], 0.0)

    # --- at chosen sites, for operators -------------------------------------------------------------------------------

    def __getitem__(self, where: Bool[Tensor, "B L"]) -> View:
        """Return a ``View`` of the chosen sites: the same laws, whose logits are read only when they are used.

        Raises:
            ValueError: unless ``where`` is a bool tensor (B, L); or if the clean tokens have a joint law, which a law
                of single sites would ignore.
        """
        if self.law is not None:
            raise ValueError(
                "prediction[where]: a guide gave a joint law of the clean tokens, and this operator draws or weighs "
                "sites one by one. Accepted are operators that draw by prediction.tokens, such as Ancestral, Unmask, "
                "P2, ReMDM and Gibbs; prediction.untruncated has the laws of single sites"
            )
        if getattr(where, "dtype", None) is not torch.bool or where.shape != self.x.shape:
            raise ValueError(f"prediction[where] takes a bool tensor {tuple(self.x.shape)}, got {shown(where)}")
        row, position = where.nonzero(as_tuple=True)
        return View(self, where, (row, position))

    def loo_everywhere(self) -> kernels.Rows | None:
        """Return rows of the leave-one-out prediction O at every site, without checks.

        The caller must not use a row where O is undefined. The result is None if a head computes the
        logits, the conversion needs whole rows, or the prediction is tilted or truncated: no kernel can then read O.
        """
        if self.law is not None or not all(isinstance(change, Combination) for change in self.changes):
            return None
        if self.changes:
            source = replace(self._everywhere, checked=False).loo.rows
        else:
            source = to_loo(self, said_rows(self, None), self.x.flatten(), self.alpha.flatten())
        return source if isinstance(source, kernels.Rows) and source.convert is None else None

    # --- changes, for guides ------------------------------------------------------------------------------------------

    def tilted(self, log_g: Float[Tensor, "B L V"] | LogWeight) -> "Prediction":
        """Return the prediction with O' ~ O g, whose rows are computed when they are read.

        Args:
            log_g: natural logs (B, L, V), -inf for tokens that are ruled out; or a function that maps batch rows (n,)
                and positions (n,) of chosen sites to (n, V).

        Raises:
            ValueError: for a tensor of another shape; when a row is read, for a row without mass, a NaN or +inf.
        """
        shape = (*self.x.shape, self.process.vocab_size)
        if not callable(log_g) and (not isinstance(log_g, Tensor) or log_g.shape != shape):
            raise ValueError(f"tilted: log_g must be (B, L, V) = {shape}, or a function of sites; got {shown(log_g)}")
        return self.changed(Tilt(log_g))

    def combined(self, others: "Sequence[Prediction]", weights: Sequence[float]) -> "Prediction":
        r"""Return the prediction with O' ~ prod_k O_k^{w_k}, for instance O_1^{1 + w} O_2^{-w}.

        If the weights sum to 1, D' is the same product of the D_k. A token that a prediction of positive weight rules
        out is ruled out.

        Args:
            others: other predictions of the same tokens, noise and process.
            weights: the exponents, the first for this prediction.

        Raises:
            ValueError: if the predictions differ in tokens, noise or process, another one has a joint law, or there is
                not one finite weight for each; when a row is read, if only predictions of negative weight rule a token
                out.
        """
        kept = tuple(real(weight, "combined: a weight") for weight in listing(weights, "combined: weights"))
        others = tuple(listing(others, "combined: others"))
        if len(kept) != 1 + len(others):
            raise ValueError(f"combined: takes one weight for each of {1 + len(others)} predictions, got {kept}")
        for other in others:
            same = isinstance(other, Prediction) and other.process == self.process
            pairs = ((other.x, self.x), (other.alpha, self.alpha)) if same else ()
            if not same or not all(one is mine or torch.equal(one, mine) for one, mine in pairs):
                raise ValueError(f"combined: takes predictions of the same tokens, noise and process, got {other!r}")
            if other.law is not None:
                raise ValueError(f"combined: {other!r} has a joint law of its tokens; guide the combination instead")
        return self.changed(Combination(others, kept))

    def truncated(self, truncate: Truncate) -> "Prediction":
        """Return the same prediction with ``truncate`` applied to its leave-one-out at each reading."""
        return self.changed(Cut(truncate))

    def joint(self, law: Law) -> "Prediction":
        """Return the same prediction with a joint law of the clean tokens that operators draw together.

        An operator draws from it by ``tokens``. Any other reading of the prediction, such as ``prediction[where].loo``,
        is refused, because it would ignore the joint law. Changes that follow act on the prediction that the law gets.

        Args:
            law: called as law(prediction, row, where, keep), see ``tokens``. ``prediction`` has no joint law and may be
                a selection of rows; ``row`` (R,) holds the indices of these rows in this prediction.

        Raises:
            TypeError: if ``law`` cannot be called.
            ValueError: if the process is not absorbing, because a clean token then depends on the state of its site; if
                there is a joint law already.
        """
        if not callable(law):
            raise TypeError(f"joint: law is called as law(prediction, row, where, keep), got {shown(law)}")
        if self.law is not None:
            raise ValueError(f"joint: another guide gave a joint law of the clean tokens already, {shown(self.law)}")
        if not self.process.absorbing:
            raise ValueError(f"joint: takes a prediction of an absorbing process, such as Masked, got {self.process}")
        other = copy.copy(self)
        other.law, other._law_rows = law, None
        return other

    def tokens(self, where: Bool[Tensor, "B L"], keep: Int[Tensor, "B L"], sites: Sites | None = None) -> Choice:
        """Return the law from which an operator draws clean tokens at the sites ``where``; others keep ``keep``.

        By default the sites are independent, with rows ``sites``, or O if it is None; a guide may bring a joint law.

        Raises:
            ValueError: if the joint law has another shape than ``keep``.
        """
        if self.law is not None:
            row = torch.arange(len(self.x), device=self.x.device) if self._law_rows is None else self._law_rows
            made = self.law(self._alone, row, where, keep)
            if not isinstance(made, Choice) or made.shape() != keep.shape:
                raise ValueError(f"joint: law must return a Choice of shape {tuple(keep.shape)}, got {shown(made)}")
            return made
        return Tokens(self[where].loo if sites is None else sites, keep)

    def changed(self, change: RowChange) -> "Prediction":
        """Return the same prediction with one more change of its rows."""
        other = copy.copy(self)
        other.changes = (*self.changes, change)
        return other

    def without(self, kind: type[RowChange]) -> "Prediction":
        """Return the prediction without joint law and without its changes of a class."""
        other = copy.copy(self._alone)
        other.changes = tuple(change for change in self.changes if not isinstance(change, kind))
        return other

    @property
    def untruncated(self) -> "Prediction":
        """The prediction with its tilts, without truncations and joint law; confidences are computed from it."""
        other = self._alone
        if not self.changes:
            return other
        other = copy.copy(other)
        found = (change.untruncated() for change in self.changes)
        other.changes = tuple(change for change in found if change is not None)
        return other

    def select(self, index: Int[Tensor, " R"]) -> "Prediction":
        """Return the prediction for the batch rows with indices ``index`` (R,)."""
        other = copy.copy(self)
        other.output, other.x, other.alpha = self.output.select(index), self.x[index], self.alpha[index]
        other.watch = self.watch.select(index)
        other.changes = tuple(change.select(index) for change in self.changes)
        if self.law is not None:
            other._law_rows = index if self._law_rows is None else self._law_rows[index]
        return other

    # --- internal -----------------------------------------------------------------------------------------------------

    @property
    def _alone(self) -> "Prediction":
        """The prediction without a joint law."""
        if self.law is None:
            return self
        other = copy.copy(self)
        other.law, other._law_rows = None, None
        return other

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
        accepted = ", ".join(map(repr, get_args(Predicts)))
        raise ValueError(
            f"predicts must be one of {accepted}, got {predicts!r}; a network trained by cross-entropy on clean tokens "
            "predicts 'denoiser', one trained by a score entropy 'ratio'"
        )
