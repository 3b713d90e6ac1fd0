"""A prediction at chosen sites: every law that an operator draws from, in rows that are read as late as possible."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.choices import Sites
from discdiff.kernels import dispatch as kernels
from discdiff.process import Process, Survival

if TYPE_CHECKING:
    from discdiff.prediction.base import Prediction

__all__ = ["View", "said_rows", "to_loo"]


def said_rows(said: "Prediction", place: tuple[Tensor, Tensor] | None) -> kernels.Rows:
    """Return a prediction's unconverted rows at ``place`` (at all sites if None), without the mask's logit."""
    rows, mask = said.output.rows(place), said.process.mask_id
    return rows if mask is None or mask >= said.process.vocab_size else replace(rows, hidden=(*rows.hidden, mask))


def to_loo(said: "Prediction", rows: kernels.Rows, x: Int[Tensor, " N"], alpha: Float[Tensor, " N"]) -> kernels.Rows:
    """Convert a prediction's rows at states x (N,) and survivals alpha (N,) to rows of O, before any change."""
    process = said.process
    if said.predicts == "denoiser" and not process.masks:  # at a mask D and O agree
        weight = process.own_weight(x, alpha)
        if weight is not None:
            return replace(rows, own=process.column(x), shift=-weight)
        return rows.then(lambda raw, n: process.denoiser_to_loo(raw, x[n], alpha[n]))
    if said.predicts == "ratio":
        if not process.masks:
            rows = rows.then(
                lambda c, n: kernels.log(process.conditional_to_loo(c.double().softmax(-1), x[n], alpha[n]))
            )
        return replace(rows, width=process.vocab_size)
    return rows


def _of_loo(said: "Prediction") -> bool:
    """Return whether all networks behind a prediction predict "loo", so that O is known at revealed sites too."""
    return said.predicts == "loo" and all(_of_loo(part) for change in said.changes for part in change.parts)


@dataclass(frozen=True, eq=False)
class View:
    """A prediction at N chosen sites, ``prediction[where]``; no logit is read before its row is used.

    Attributes:
        prediction: the prediction.
        where: (B, L) the chosen sites.
        place: the batch row and the position of each chosen site, (N,) each, in row-major order.
        checked: whether to refuse sites where a law is undefined; if not, the caller must not use their rows.
    """

    prediction: "Prediction"
    where: Bool[Tensor, "B L"]
    place: tuple[Int[Tensor, " N"], Int[Tensor, " N"]]
    checked: bool = True

    @cached_property
    def x(self) -> Int[Tensor, " N"]:
        """The states of the sites."""
        return self.prediction.x[self.place]

    @cached_property
    def alpha(self) -> Float[Tensor, " N"]:
        """The survival probability at each site."""
        return self.prediction.alpha[self.place]

    @cached_property
    def loo(self) -> Sites:
        """The unnormalised leave-one-out log O, (N, V).

        Raises:
            ValueError: if O is undefined at a chosen site; the error names the site.
        """
        said, process = self.prediction, self.prediction.process
        if said.predicts == "loo" and not said.changes:
            return self._sites(said_rows(said, self.place))
        if said.predicts == "denoiser":
            self._refuse(
                process.settled(self.x, self.alpha),
                "the denoiser is a point mass there and does not determine it; let the model predict 'loo', or keep "
                "what needs it away from clean sites, for instance with when() from a step that ends at t = 0",
            )
        elif said.predicts == "ratio" and not process.masks:
            self._refuse(self.alpha == 0, "a ratio carries no information at alpha = 0; start the grid below t = 1")
        elif said.predicts == "ratio" and said.output.width < process.columns:
            why = "a ratio without the mask's column does not determine it"
            self._refuse(process.settled(self.x, self.alpha), why)
        rows = to_loo(said, said_rows(said, self.place), self.x, self.alpha)
        source: kernels.Source = rows
        for change in said.changes:
            source = change(source, self)
        return self._sites(source)

    @cached_property
    def denoiser(self) -> Sites:
        """The unnormalised denoiser log D, (N, V).

        Raises:
            ValueError: if D must be computed from a leave-one-out that is undefined at a chosen site.
        """
        x, alpha, process = self.x, self.alpha, self.prediction.process
        said = self.prediction.predicts == "denoiser" and not self.prediction.changes
        if said and not process.absorbing:
            return self._sites(said_rows(self.prediction, self.place))
        # At a revealed site D is its token, unless O excludes the token: then D is O, the limit alpha -> 1.
        revealed, column = process.revealed(x, alpha), process.column(x)
        unknown = torch.zeros_like(revealed) if said or _of_loo(self.prediction) else revealed
        source = said_rows(self.prediction, self.place) if said else self.narrow(~unknown).loo.rows
        weight = None if said else process.own_weight(x, alpha)
        if weight is not None and isinstance(source, kernels.Rows) and source.raw and not bool(revealed.any()):
            return self._sites(replace(source, own=column, shift=weight))
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
                rows = rows.index_put((noisy,), process.loo_to_denoiser(rows[noisy], x[n][noisy], alpha[n][noisy]))
            one_hot = own[:, None] == torch.arange(process.vocab_size, device=x.device)
            return torch.where(settled[:, None], torch.where(one_hot, 0.0, -torch.inf).to(rows.dtype), rows)

        return self.computed(denoiser, process.vocab_size, source.dtype)

    @property
    def ratio(self) -> Sites:
        """The concrete score log r, (N, C); 0 at each site's own state.

        Raises:
            ValueError: if r must be computed from a leave-one-out that is undefined at a chosen site.
        """
        said, process = self.prediction, self.prediction.process
        if said.predicts == "ratio" and said.output.width == process.columns and not said.changes:
            return self._sites(said.output.rows(self.place))
        conditional = self.conditional.rows

        def ratio(n: Tensor) -> Tensor:
            log_c = conditional.dense(n)
            own = log_c.gather(-1, process.column(self.x[n])[:, None])
            return torch.where(own == -torch.inf, 0.0, log_c - own)

        return self.computed(ratio)

    @property
    def rates(self) -> Sites:
        r"""The log of the reverse rates per unit of alpha, (N, C); -inf at each site's own state.

            R(z -> v) = Q(v, z) c(v) / (alpha c(z))

        Here c is the law ``conditional``. At a site whose state noise cannot produce, all rates are 0. Whole rows
        are computed; on a process of rank one ``RankOne.exit`` is cheaper.
        """
        process, x = self.prediction.process, self.x
        alpha = self.alpha.clamp(min=1e-290)  # at alpha = 0 the limit
        moving = (process.inflow(x[None], alpha[None])[0] > 0).any(-1)
        loo, place = self.narrow(moving).loo.rows, moving.cumsum(0) - 1

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

        return self.computed(rates, empty=True)

    def reverse(self, alpha_s: Survival, alpha_t: Survival | None = None) -> Sites:
        """Return the exact one-site reverse marginal log p(z_s^i | z_t), (N, C).

        It is the exact bridge q(z_s | z_t, x0) with O in place of x0. That bridge, averaged over the denoiser D, gives
        the same law. ``alpha_t``, if given, is used instead of the survival probability at which O was computed.

        Raises:
            ValueError: if the leave-one-out O is undefined at a chosen site.
        """
        loo, process, x = self.loo.rows, self.prediction.process, self.x
        a_t = self.alpha if alpha_t is None else Process.sitewise(alpha_t, self.prediction.x)[self.place]
        a_s = Process.sitewise(alpha_s, self.prediction.x)[self.place]
        return self.computed(
            lambda n: process.plug_in(kernels.log_softmax(loo.dense(n).double()), x[n], a_t[n], a_s[n])
        )

    @property
    def conditional(self) -> Sites:
        """The log of the conditional law c = O Q_t, c(v) = p_t(z_i = v | other sites), of each site, (N, C).

        Raises:
            ValueError: if the leave-one-out is undefined at a chosen site, such as a revealed site of a masked process.
        """
        # alpha is found here: rows are first read without a graph, and what is cached there would have no gradient
        loo, process, x, alpha = self.loo.rows, self.prediction.process, self.x, self.alpha
        mixture = self._mixture(loo, alpha)
        return self.computed(
            lambda n: process.conditional(kernels.log_softmax(loo.dense(n).double()), x[n], alpha[n]),
            mixed=None if mixture is None else kernels.Mixed((mixture,)),
        )

    @property
    def others(self) -> Sites:
        """The law of a jump's new token: log O, (N, V), with -inf at the site's own token, so not normalised."""
        rows, own = self.loo.rows, self._own
        if isinstance(rows, kernels.Rows):
            rows = rows.settled() if rows.summed else rows
            return self._sites(replace(rows, own=own, shift=torch.full_like(self.alpha, -torch.inf)))
        columns = torch.arange(rows.width, device=own.device)
        return self.computed(
            lambda n: rows.dense(n).masked_fill(own[n][:, None] == columns, -torch.inf), rows.width, rows.dtype
        )

    @cached_property
    def reading(self) -> kernels.Reading:
        """Two results of one reading of O: each site's log-sum-exp, and the log-probability of the site's own token."""
        return self.loo.known(at=self._own)

    @property
    def own(self) -> Float[Tensor, " N"]:
        """The leave-one-out log-probability log O(z_i) of each site's own token z_i, (N,) float64."""
        return self.reading.log_prob

    def narrow(self, keep: Bool[Tensor, " N"]) -> "View":
        """Return the view of the sites where ``keep`` (N,) is True."""
        row, position = self.place
        where = self.where.masked_scatter(self.where, keep)
        return View(self.prediction, where, (row[keep], position[keep]))

    def computed(
        self,
        function: Callable[[Int[Tensor, " n"]], Float[Tensor, "n _"]],
        width: int | None = None,
        dtype: torch.dtype = torch.float64,
        empty: bool = False,
        mixed: kernels.Mixed | None = None,
    ) -> Sites:
        """Return ``Sites`` whose rows are computed when they are read; ``function`` maps indices (n,) to (n, C)."""
        width, watch = self.prediction.process.columns if width is None else width, self.prediction.watch
        return Sites.computed(self.where, function, width, dtype, watch, empty, self.place, mixed)

    def mixed_rates(self, weight: Float[Tensor, " N"]) -> kernels.Mixture | None:
        """Return ``weight`` (N,) times the ``rates`` as mixtures of O and noise, which a compiled pass can read.

        The result is None if the process is not of rank one, or O is not read directly from logits.

        Raises:
            ValueError: if the leave-one-out is undefined at a site whose state noise can produce.
        """
        rank_one, alpha = self.prediction.process.rank_one, self.alpha.clamp(min=1e-290)
        if rank_one is None:
            return None
        inflow = rank_one.inflow(self.x[None], alpha[None])[0, :, 0]
        moving = inflow > 0
        made = self._mixture(self.narrow(moving).loo.rows, alpha)
        place = torch.where(moving, moving.cumsum(0) - 1, -1)
        return made and replace(made, place=place, scale=weight * inflow / alpha, relative=True)

    def _mixture(self, loo: kernels.Source, alpha: Float[Tensor, " N"]) -> kernels.Mixture | None:
        """Return the conditional c as a mixture of rows of O and noise; None if it has no such form."""
        rank_one, x = self.prediction.process.rank_one, self.x
        if rank_one is None or not isinstance(loo, kernels.Rows):
            return None
        level, spike, anchor = rank_one.noise_parts(x, alpha)
        return kernels.Mixture(
            loo,
            torch.arange(len(x), device=x.device),
            weight=alpha,
            level=level,
            scale=torch.ones_like(alpha),
            pi=rank_one.noise(x.device).pi,
            spike=None if anchor is None else spike,
            anchor=anchor,
            own=rank_one.column(x),
        )

    def _sites(self, rows: kernels.Source) -> Sites:
        return Sites(self.where, rows, watch=self.prediction.watch, place=self.place)

    @property
    def _own(self) -> Int[Tensor, " N"]:
        """The column of each site's own token; -1 at a mask."""
        column = self.prediction.process.column(self.x)
        return torch.where(column < self.prediction.process.vocab_size, column, -1)

    def _refuse(self, wrong: Bool[Tensor, " N"], why: str) -> None:
        if self.checked and bool(wrong.any()):
            row, site = (int(place[wrong][0]) for place in self.place)
            said, state, alpha = self.prediction, int(self.x[wrong][0]), float(self.alpha[wrong][0])
            raise ValueError(
                f"the leave-one-out prediction is undefined at row {row}, position {site} "
                f"(state {state}, alpha {alpha:.6g}) of a model that predicts {said.predicts!r}: {why}"
            )
