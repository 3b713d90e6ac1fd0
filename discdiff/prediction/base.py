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
from dataclasses import replace
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.choices import AT_ONCE, Sites
from discdiff.kernels import dispatch as kernels
from discdiff.prediction.output import Output
from discdiff.process import Process, Survival

__all__ = ["Prediction", "Predicts", "check_predicts"]

Predicts = Literal["denoiser", "loo", "ratio"]
# maps rows of O, with their (N,) states and survival probabilities, to other rows
Truncate = Callable[[kernels.Rows, Tensor, Tensor], kernels.Source]


class Prediction:
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
        self._known: Sites | None = None
        self._truncate: Truncate | None = None

    @property
    def logits(self) -> Float[Tensor, "B L _"]:
        """Return the logits (B, L, V) of the denoiser; a head that has not run yet runs at every site."""
        return self.output.logits()

    # --- the three meanings, normalised -------------------------------------------------------------------------------

    @property
    def denoiser(self) -> Float[Tensor, "B L V"]:
        """The posterior log D, (B, L, V); one-hot at a revealed site of an absorbing process."""
        return self._everywhere(self.denoiser_rows).log_softmax(-1)

    @property
    def loo(self) -> Float[Tensor, "B L V"]:
        """The leave-one-out prediction log O, (B, L, V).

        Raises:
            ValueError: where the prediction does not determine it, such as at a revealed site of a masked process;
                names the site.
        """
        return self._everywhere(self.loo_rows).log_softmax(-1)

    @property
    def ratio(self) -> Float[Tensor, "B L C"]:
        """The concrete score log r, (B, L, C); 0 at the site's own state.

        Raises:
            ValueError: where the LOO is undefined.
        """
        return self._everywhere(self.ratio_rows)

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
        ratio = ratio.index_put((moving,), self.ratio_rows(moving).double().exp())
        return (inflow * ratio).scatter(-1, self.process.column(self.x)[..., None], 0.0)

    def conditional(self, log_loo: Float[Tensor, "B L V"]) -> Float[Tensor, "B L C"]:
        """Return log c = log(O Q_t), the conditional p_t(z_i | rest) over a site's states, from a normalised LOO."""
        rows = self.process.conditional(log_loo.flatten(0, 1), self.x.flatten(), self.alpha.flatten())
        return rows.unflatten(0, tuple(self.x.shape))

    def reverse_rows(self, where: Bool[Tensor, "B L"], alpha_s: Survival) -> Float[Tensor, "N C"]:
        """Return the exact one-site reverse marginal log p(z_s^i | z_t) at the chosen sites, (N, C).

        It is the bridge with the LOO plugged in. The mixture of bridges under the denoiser is the same law.

        Raises:
            ValueError: where the LOO is undefined.
        """
        return self.reverse(where, alpha_s).dense()

    # --- at chosen sites, for operators -------------------------------------------------------------------------------

    def loo_at(self, where: Bool[Tensor, "B L"]) -> Sites:
        """Return O at the chosen sites without reading logits; where ``read`` has read them, its results are kept.

        Raises:
            ValueError: if it is undefined at a chosen site, naming the site.
        """
        if self._known is not None and not bool((where & ~self._known.where).any()):
            return self._known.narrow(where)
        if self.predicts == "loo" and self._truncate is None:
            return Sites(where, self._rows(where), watch=self.watch)
        x, alpha = self.x[where], self.alpha[where]
        if self.predicts == "denoiser":
            self._refuse(
                where,
                self.process.settled(x, alpha),
                "the denoiser is a point mass there and does not determine it; let the model predict 'loo', or keep "
                "what needs it away from clean sites, for instance with when() from a step that ends at t = 0",
            )
        elif self.predicts == "ratio" and not self.process.masks:
            self._refuse(where, alpha == 0, "a ratio carries no information at alpha = 0; start the grid below t = 1")
        elif self.predicts == "ratio" and self.output.width < self.process.columns:
            why = "a ratio without the mask's column does not determine it"
            self._refuse(where, self.process.settled(x, alpha), why)
        rows = self._loo(self._rows(where), x, alpha)
        return Sites(where, rows if self._truncate is None else self._truncate(rows, x, alpha), watch=self.watch)

    def loo_everywhere(self) -> kernels.Rows | None:
        """Return O at every site, unchecked; rows where O is undefined hold garbage, which the caller must not read.

        None if no kernel can read it: logits behind a head, a conversion of whole rows, or a truncation.
        """
        rows = self._loo(self._rows(None), self.x.flatten(), self.alpha.flatten())
        return rows if rows.convert is None and self._truncate is None else None

    def _loo(self, rows: kernels.Rows, x: Int[Tensor, " N"], alpha: Float[Tensor, " N"]) -> kernels.Rows:
        """Convert the denoiser's rows to those of O."""
        process = self.process
        if self.predicts == "denoiser" and not process.masks:  # at a mask D and O agree
            weight = process.own_weight(x, alpha)
            if weight is not None:
                return replace(rows, own=process.column(x), shift=-weight)
            return rows.then(lambda raw, n: process.forget(raw, x[n], alpha[n]))
        if self.predicts == "ratio" and process.masks:
            return replace(rows, width=process.vocab_size, hidden=(*rows.hidden, *self._mask_column()))
        if self.predicts == "ratio":
            rows = rows.then(lambda raw, n: kernels.log(process.unmix(raw.double().softmax(-1), x[n], alpha[n])))
            return replace(rows, width=process.vocab_size)
        return rows

    def denoiser_at(self, where: Bool[Tensor, "B L"]) -> Sites:
        """Return D at the chosen sites without reading logits.

        Raises:
            ValueError: where D would follow from an undefined LOO.
        """
        x, alpha, process = self.x[where], self.alpha[where], self.process
        said = self.predicts == "denoiser" and self._truncate is None
        if said and not process.absorbing:
            return Sites(where, self._rows(where), watch=self.watch)
        # At a revealed site D is its token, unless O excludes the token: then D is O, the limit alpha -> 1.
        revealed, column = process.revealed(x, alpha), process.column(x)
        unknown = torch.zeros_like(revealed) if said or self.predicts == "loo" else revealed
        source = self._rows(where) if said else self.loo_at(where.masked_scatter(where, ~unknown)).rows
        weight = None if said else process.own_weight(x, alpha)
        if weight is not None and isinstance(source, kernels.Rows) and source.raw and not bool(revealed.any()):
            return Sites(where, replace(source, own=column, shift=weight), watch=self.watch)
        place = (~unknown).cumsum(0) - 1  # rows that are unknown are not read

        def denoiser(n: Tensor) -> Tensor:
            read, own = ~unknown[n], column[n]
            rows = torch.zeros(len(n), process.vocab_size, dtype=source.dtype, device=x.device)
            rows = rows.index_put((read,), source.dense(place[n][read]))
            inside = own < process.vocab_size
            logit = rows.gather(-1, own.where(inside, 0)[:, None])[:, 0]
            settled = revealed[n] & inside & ((logit > -torch.inf) | said)
            if not said:
                noisy = ~revealed[n]
                rows = rows.index_put((noisy,), process.observe(rows[noisy], x[n][noisy], alpha[n][noisy]))
            one_hot = own[:, None] == torch.arange(process.vocab_size, device=x.device)
            return torch.where(settled[:, None], torch.where(one_hot, 0.0, -torch.inf).to(rows.dtype), rows)

        return Sites.computed(where, denoiser, process.vocab_size, source.dtype, self.watch)

    def truncated(self, truncate: Truncate) -> "Prediction":
        """Return the same prediction with its LOO changed by ``truncate`` whenever it is read.

        Raises:
            ValueError: if the prediction is truncated already.
        """
        if self._truncate is not None:
            raise ValueError("a prediction is truncated once; give one Truncation all its options")
        other = copy.copy(self)
        other._truncate, other._known = truncate, None
        return other

    @property
    def untruncated(self) -> "Prediction":
        """The prediction of the denoiser before any truncation; confidences are computed from it."""
        if self._truncate is None:
            return self
        other = copy.copy(self)
        other._truncate = other._known = None
        return other

    def select(self, index: Int[Tensor, " R"]) -> "Prediction":
        """Return the prediction of chosen batch rows (R,)."""
        other = copy.copy(self)
        other.output, other.x, other.alpha = self.output.select(index), self.x[index], self.alpha[index]
        other._known, other.watch = None, self.watch.select(index)
        return other

    def others_at(self, where: Bool[Tensor, "B L"]) -> Sites:
        """Return O at the chosen sites without the current token of the site, unread: the destinations of a jump."""
        fresh = copy.copy(self)
        fresh._known = None
        sites, own = fresh.loo_at(where), self._own_column(where)
        rows = sites.rows
        if isinstance(rows, kernels.Rows):
            return replace(sites, rows=replace(rows, own=own, shift=torch.full_like(self.alpha[where], -torch.inf)))
        columns = torch.arange(rows.width, device=own.device)

        def others(n: Tensor) -> Tensor:
            return rows.dense(n).masked_fill(own[n][:, None] == columns, -torch.inf)

        return Sites.computed(where, others, rows.width, rows.dtype, sites.watch, sites.empty)

    def rates_at(self, where: Bool[Tensor, "B L"]) -> Sites:
        r"""Return log R(z -> v) = log Q(v, z) c(v) / (alpha c(z)) per unit of alpha, own column -inf, unread.

        It computes whole rows, for processes without a form of few numbers a site. States without inflow never jump.
        """
        process, x = self.process, self.x[where]
        alpha = self.alpha[where].clamp(min=1e-290)  # at alpha = 0 the limit
        moving = (process.inflow(x[None], alpha[None])[0] > 0).any(-1)
        loo, place = self.loo_at(where.masked_scatter(where, moving)).rows, moving.cumsum(0) - 1

        def rates(n: Tensor) -> Tensor:
            n, known = n[moving[n]], moving[n]
            own = process.column(x[n])[:, None]
            log_c = process.conditional(kernels.log_softmax(loo.dense(place[n]).double()), x[n], alpha[n])
            inflow = kernels.log(process.inflow(x[n][None], alpha[n][None])[0])
            log_own = log_c.gather(-1, own)  # -inf where no data fits the state; then any jump is allowed
            log_own = torch.where(log_own > -torch.inf, log_own, 0.0)
            rows = (log_c + (inflow - log_own - alpha[n][:, None].log())).scatter(-1, own, -torch.inf)
            still = rows.new_full((len(known), process.columns), -torch.inf)
            return rows if len(rows) == len(known) else still.index_put((known,), rows)

        return Sites.computed(where, rates, process.columns, watch=self.watch, empty=True)

    def read(self, where: Bool[Tensor, "B L"]) -> "Prediction":
        """Read O at the chosen sites and return a prediction that keeps the results for ``loo_at``."""
        sites = self.loo_at(where)
        known = copy.copy(self)
        known._known = sites.read(self._own_column(where))
        return known

    def log_own(self, where: Bool[Tensor, "B L"]) -> Float[Tensor, "B L"]:
        """Return log O of each chosen site's current token, 0 elsewhere; float64."""
        sites = self.loo_at(where)
        if sites.reading is None:
            sites = sites.read(self._own_column(where))
        assert sites.reading is not None
        return torch.zeros_like(self.alpha).masked_scatter(where, sites.reading.log_prob)

    def reverse(self, where: Bool[Tensor, "B L"], alpha_s: Survival, alpha_t: Survival | None = None) -> Sites:
        """Return ``reverse_rows`` at the chosen sites, unread; ``alpha_t`` replaces the survival of the prediction.

        Raises:
            ValueError: where the LOO is undefined.
        """
        loo = self.loo_at(where).rows
        start = self.alpha if alpha_t is None else Process.sitewise(alpha_t, self.x)
        x, a_t, a_s = self.x[where], start[where], Process.sitewise(alpha_s, self.x)[where]

        def rows(n: Tensor) -> Tensor:
            return self.process.plug_in(kernels.log_softmax(loo.dense(n).double()), x[n], a_t[n], a_s[n])

        return Sites.computed(where, rows, self.process.columns, watch=self.watch)

    # --- as rows, for losses and theory -------------------------------------------------------------------------------

    def loo_rows(self, where: Bool[Tensor, "B L"]) -> Float[Tensor, "N V"]:
        """Return unnormalised log O at the chosen sites only, (N, V) in row-major order.

        Raises:
            ValueError: if it is undefined at a chosen site, naming the site.
        """
        return self.loo_at(where).dense()

    def ratio_rows(self, where: Bool[Tensor, "B L"]) -> Float[Tensor, "N C"]:
        """Return log r at the chosen sites only, (N, C) in row-major order; 0 at a site's current state.

        Raises:
            ValueError: where r would follow from an undefined LOO.
        """
        if self.predicts == "ratio" and self.output.width == self.process.columns and self._truncate is None:
            return Sites(where, self._rows(where), watch=self.watch).dense()
        x = self.x[where]
        log_c = self.process.conditional(self.loo_rows(where).log_softmax(-1), x, self.alpha[where])
        own = log_c.gather(-1, self.process.column(x)[:, None])
        return torch.where(own == -torch.inf, 0.0, log_c - own)

    def denoiser_rows(self, where: Bool[Tensor, "B L"]) -> Float[Tensor, "N V"]:
        """Return unnormalised log D at the chosen sites only, (N, V) in row-major order.

        Raises:
            ValueError: where D would follow from an undefined LOO.
        """
        return self.denoiser_at(where).dense()

    # --- internal -----------------------------------------------------------------------------------------------------

    def _rows(self, where: Tensor | None) -> kernels.Rows:
        """Return the denoiser's rows at the chosen sites, or at all; the mask's column is hidden, as it is no token."""
        rows = self.output.rows(where)
        hidden = () if self.predicts == "ratio" else self._mask_column()
        return replace(rows, hidden=(*rows.hidden, *hidden))

    def _mask_column(self) -> tuple[int, ...]:
        mask_id = self.process.mask_id
        return () if mask_id is None or mask_id >= self.process.vocab_size else (mask_id,)

    def _own_column(self, where: Tensor) -> Tensor:
        """Return the column of each chosen site's current token; -1 at a mask."""
        column = self.process.column(self.x[where])
        return torch.where(column < self.process.vocab_size, column, -1)

    def _everywhere(self, rows: Callable[[Tensor], Tensor]) -> Tensor:
        everywhere = torch.ones_like(self.x, dtype=torch.bool)
        return rows(everywhere).unflatten(0, tuple(self.x.shape))

    def _refuse(self, where: Tensor, wrong: Tensor, why: str) -> None:
        if bool(wrong.any()):
            row, site = where.nonzero()[wrong][0].tolist()
            state, alpha = int(self.x[row, site]), float(self.alpha[row, site])
            raise ValueError(
                f"the leave-one-out prediction is undefined at row {row}, position {site} "
                f"(state {state}, alpha {alpha:.6g}) of a model that predicts {self.predicts!r}: {why}"
            )

    def __repr__(self) -> str:
        return f"Prediction({self.predicts!r}, {(*self.x.shape, self.output.width)}, {self.process})"


def check_predicts(predicts: str) -> None:
    """Raise ValueError for an unknown ``predicts``."""
    if predicts not in get_args(Predicts):
        raise ValueError(f"predicts must be one of {', '.join(map(repr, get_args(Predicts)))}, got {predicts!r}")
