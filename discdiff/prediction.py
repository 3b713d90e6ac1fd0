r"""What a denoiser says about x0, with its meaning attached.

Three objects describe the same belief about site i of z, and each converts to the others exactly, for every process:

    denoiser       D(v) = p(x0_i = v | z)                      what cross-entropy learns
    leave-one-out  O(v) = p(x0_i = v | z without z_i)          what the plug-in ELBO of a uniform process learns
    concrete score r(v) = p_t(z with z_i = v) / p_t(z)         what score entropy learns

    D(v) ~ O(v) q_t(z_i | v)                 rank one: a single scalar a site, O(v) w^{1(v = z_i)}
    c = O Q_t,  r(v) = c(v) / c(z_i)         rank one: c = alpha O + b_t
    O = c Q_t^{-1},  c(v) = r(v) / sum_u r(u)

The bridge must be given the LOO: with the denoiser in its place the token's own evidence is counted twice, and the
error does not vanish with more steps. So operators take a ``Prediction`` and never a tensor of logits.

Where the conversions hold:

* D to O: wherever no token is ruled out by z_i itself. As alpha -> 1 the evidence grows as 1 / (1 - alpha) and O keeps
  about -log10(1 - alpha) digits fewer than D has in its small entries; in log space there is no other loss. At alpha =
  1, at a revealed site of an absorbing process, or where q_t(z_i | v) = 0, D does not determine O and asking is an
  error.
* O to D, O to r: for every alpha, ends included (at alpha = 1 the limit: the token itself, if O allows it).
* r to O: the error of r is divided by alpha: 1e-7 in r is 1e-3 in O at alpha = 1e-4. At alpha = 0 it is an error.

References: Uniform Diffusion Models Revisited (2026); SEDD (Lou et al., 2024).
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.process import Process, Survival

__all__ = ["Prediction", "Predicts"]

Predicts = Literal["denoiser", "loo", "ratio"]


class Prediction:
    """A denoiser's output at noisy tokens, convertible between its three meanings.

    Args:
        logits: (B, L, V) unnormalised log-probabilities of the denoiser or the LOO; for "ratio" the log ratios (B,
            L, S), or (B, L, V) on a masked process. (For pairs of a token and a source token the site moves among V
            columns, not S.)
        predicts: which of the three they are.
        x: (B, L) the noisy tokens they were computed from.
        alpha: the survival at each site: float, (B, 1) or (B, L) float64.
        process: the forward process.

    Raises:
        ValueError: for an unknown meaning or a wrong shape.
    """

    def __init__(
        self,
        logits: Float[Tensor, "B L _"],
        predicts: Predicts,
        x: Int[Tensor, "B L"],
        alpha: float | Float[Tensor, "#B #L"],
        process: Process,
    ) -> None:
        widths = {process.vocab_size} if predicts != "ratio" or _has_mask(process) else set()
        if predicts == "ratio":
            widths.add(process.columns)
        check_predicts(predicts)
        if logits.shape[:2] != x.shape or logits.ndim != 3 or logits.shape[2] not in widths:
            accepted = " or ".join(str((*x.shape, width)) for width in sorted(widths))
            raise ValueError(f"a denoiser that predicts {predicts!r} must return {accepted}, got {tuple(logits.shape)}")
        self.logits, self.predicts, self.x, self.process = logits, predicts, x, process
        self.alpha = torch.as_tensor(alpha, dtype=torch.float64, device=x.device).expand(x.shape)

    # --- the three meanings, normalised -------------------------------------------------------------------------------

    @property
    def denoiser(self) -> Float[Tensor, "B L V"]:
        """log D, (B, L, V): one-hot at a revealed site of an absorbing process."""
        return self._everywhere(self.denoiser_rows).log_softmax(-1)

    @property
    def loo(self) -> Float[Tensor, "B L V"]:
        """log O, (B, L, V).

        Raises:
            ValueError: at a site where the prediction does not determine it (named), such as a revealed site of a
                masked process.
        """
        return self._everywhere(self.loo_rows).log_softmax(-1)

    @property
    def ratio(self) -> Float[Tensor, "B L C"]:
        """log r, (B, L, S); 0 at the site's own state.

        Raises:
            ValueError: where the LOO is undefined.
        """
        return self._everywhere(self.ratio_rows)

    @property
    def rates(self) -> Float[Tensor, "B L C"]:
        """The reverse rates R(z -> z with z_i = v) = Q(v, z_i) r(v) per unit of sigma = -log alpha; 0 at v = z_i.

        A state that no noise leads to, such as a revealed token of a masked process, is never left and needs no ratio.

        Raises:
            ValueError: where the LOO is undefined and a ratio is needed.
        """
        inflow = self.process.inflow(self.x, self.alpha)
        moving = (inflow > 0).any(-1)
        ratio = inflow.new_zeros(*self.x.shape, self.process.columns)
        ratio = ratio.index_put((moving,), self.ratio_rows(moving).double().exp())
        return (inflow * ratio).scatter(-1, self.process.column(self.x)[..., None], 0.0)

    def conditional(self, log_loo: Float[Tensor, "B L V"]) -> Float[Tensor, "B L C"]:
        """log c = log(O Q_t), the conditional p_t(z_i | rest) over the states of a site, from a normalised LOO."""
        rows = self.process.conditional(log_loo.flatten(0, 1), self.x.flatten(), self.alpha.flatten())
        return rows.unflatten(0, tuple(self.x.shape))

    def reverse_rows(self, where: Bool[Tensor, "B L"], alpha_s: Survival) -> Float[Tensor, "N C"]:
        """The exact one-site reverse marginal p(z_s^i | z_t) at the chosen sites, as log-probabilities (N, C).

        It is the bridge with the LOO plugged in, and equally the mixture of bridges under the denoiser.

        Raises:
            ValueError: where the LOO is undefined.
        """
        x, alpha_t = self.x[where], self.alpha[where]
        log_o = self.loo_rows(where).double().log_softmax(-1)
        return self.process.plug_in(log_o, x, alpha_t, Process.sitewise(alpha_s, self.x)[where])

    # --- rows: what operators read ------------------------------------------------------------------------------------

    def loo_rows(self, where: Bool[Tensor, "B L"]) -> Float[Tensor, "N V"]:
        """Unnormalised log O at the chosen sites only, (N, V) in row-major order.

        Raises:
            ValueError: if it is undefined at a chosen site, naming the site.
        """
        rows, x, alpha = self._read(where)
        process = self.process
        if self.predicts == "loo":
            return rows
        if self.predicts == "denoiser":
            self._refuse(
                where,
                process.settled(x, alpha),
                "the denoiser is a point mass there and does not determine it; let the model predict 'loo', or keep "
                "what needs it away from clean sites, for instance with when() from a step that ends at t = 0",
            )
            return process.forget(rows, x, alpha)
        if _has_mask(process):
            if rows.shape[-1] < process.columns:
                self._refuse(
                    where, process.settled(x, alpha), "a ratio without the mask's column does not determine it"
                )
            return self._hide_mask(rows[:, : process.vocab_size])
        self._refuse(where, alpha == 0, "a ratio carries no information at alpha = 0; start the grid below t = 1")
        return process.unmix(rows.double().softmax(-1), x, alpha).log().to(rows.dtype)

    def ratio_rows(self, where: Bool[Tensor, "B L"]) -> Float[Tensor, "N C"]:
        """log r at the chosen sites only, (N, C) in row-major order; 0 at a site's own state.

        Raises:
            ValueError: where it must be found from an undefined LOO.
        """
        if self.predicts == "ratio" and self.logits.shape[-1] == self.process.columns:
            return self.logits[where]
        x = self.x[where]
        log_c = self.process.conditional(self.loo_rows(where).log_softmax(-1), x, self.alpha[where])
        own = log_c.gather(-1, self.process.column(x)[:, None])
        return torch.where(own > -torch.inf, log_c - own, 0.0)

    def denoiser_rows(self, where: Bool[Tensor, "B L"]) -> Float[Tensor, "N V"]:
        """Unnormalised log D at the chosen sites only, (N, V) in row-major order.

        Raises:
            ValueError: where it must be found from an undefined LOO.
        """
        rows, x, alpha = self._read(where)
        process = self.process
        if self.predicts == "denoiser" and not process.absorbing:
            return rows
        revealed = process.revealed(x, alpha)
        if self.predicts == "ratio":
            rows = rows.new_zeros(len(rows), process.vocab_size)
            rows[~revealed] = self.loo_rows(where.masked_scatter(where, ~revealed))
        # A revealed site is its own token, unless O has no place for it: then O itself is the limit alpha -> 1.
        column = process.column(x)
        inside = column < rows.shape[-1]
        own = rows.gather(-1, column.where(inside, 0)[:, None])[:, 0]
        settled = revealed & inside & ((own > -torch.inf) | (self.predicts == "denoiser"))
        if self.predicts != "denoiser":
            rows = rows.index_put((~revealed,), process.observe(rows[~revealed], x[~revealed], alpha[~revealed]))
        one_hot = column[:, None] == torch.arange(rows.shape[-1], device=rows.device)
        return torch.where(settled[:, None], torch.where(one_hot, 0.0, -torch.inf).to(rows.dtype), rows)

    def log_own(self, where: Bool[Tensor, "B L"]) -> Float[Tensor, "B L"]:
        """log O at each chosen site's own token, 0 elsewhere; float64."""
        column = self.process.column(self.x[where])
        token = column < self.process.vocab_size  # a mask is none, and has no probability
        rows = self.loo_rows(where).double().log_softmax(-1)
        own = rows.gather(-1, column.where(token, 0)[:, None])[:, 0].masked_fill(~token, -torch.inf)
        return torch.zeros_like(self.alpha).masked_scatter(where, own)

    # --- plumbing -----------------------------------------------------------------------------------------------------

    def _read(self, where: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The raw rows, states and survivals of the chosen sites."""
        rows = self.logits[where]
        return (rows if self.predicts == "ratio" else self._hide_mask(rows)), self.x[where], self.alpha[where]

    def _hide_mask(self, rows: Tensor) -> Tensor:
        mask_id = self.process.mask_id
        if mask_id is None or mask_id >= rows.shape[-1]:
            return rows
        return rows.index_fill(-1, torch.tensor([mask_id], device=rows.device), -torch.inf)

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
        return f"Prediction({self.predicts!r}, {tuple(self.logits.shape)}, {self.process})"


def check_predicts(predicts: str) -> None:
    """Raise ValueError for an unknown meaning."""
    if predicts not in get_args(Predicts):
        raise ValueError(f"predicts must be one of {', '.join(map(repr, get_args(Predicts)))}, got {predicts!r}")


def _has_mask(process: Process) -> bool:
    """Whether noise is one state of its own: a ratio there is alpha O / c(z) at every token."""
    return process.absorbing and process.mask_id is not None
