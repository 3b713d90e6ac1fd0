r"""What a denoiser says about x0, with its meaning attached.

Three objects describe the same belief about site i of z, and each converts to the others exactly:

    denoiser       D(v) = p(x0_i = v | z)                      what cross-entropy learns
    leave-one-out  O(v) = p(x0_i = v | z without z_i)          what the plug-in ELBO of a uniform process learns
    concrete score r(v) = p_t(z with z_i = v) / p_t(z)         what score entropy learns

    D(v) = O(v) w^{1(v = z)} / Z        one scalar a site, w the observation weight (process.log_weight)
    r(v) = c(v) / c(z),   c = alpha O + (1 - alpha) pi
    O(v) = [r(v) / sum_u r(u) - (1 - alpha) pi(v)] / alpha

The bridge must be given the LOO: with the denoiser in its place the token's own evidence is counted twice, and the
    error does not
vanish with more steps. So operators take a ``Prediction`` and never a tensor of logits.

References: Uniform Diffusion Models Revisited (2026); SEDD (Lou et al., 2024).
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.process import Process

__all__ = ["Prediction", "Predicts"]

Predicts = Literal["denoiser", "loo", "ratio"]


class Prediction:
    """A denoiser's output at noisy tokens, convertible between its three meanings.

    Args:
        logits: (B, L, V) unnormalised log-probabilities of the denoiser or the LOO; for "ratio" the log ratios (B,
            L, S), or (B, L, V) on an absorbing process.
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
        widths = {process.vocab_size} if predicts != "ratio" or process.absorbing else set()
        if predicts == "ratio":
            widths.add(process.states)
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
    def ratio(self) -> Float[Tensor, "B L S"]:
        """log r, (B, L, S); 0 at the site's own state.

        Raises:
            ValueError: where the LOO is undefined.
        """
        if self.predicts == "ratio" and self.logits.shape[-1] == self.process.states:
            return self.logits
        log_c = self.conditional(self.loo)
        return log_c - log_c.gather(-1, self.x[..., None])

    def conditional(self, log_loo: Float[Tensor, "B L V"]) -> Float[Tensor, "B L S"]:
        """log c = log(alpha O + (1 - alpha) pi), the conditional p_t(z_i | rest) over the S states, from an LOO."""
        log_pi = self.process.pi.to(log_loo.device).log()
        padding = self.process.states - self.process.vocab_size
        log_o = torch.nn.functional.pad(log_loo, (0, padding), value=-torch.inf)
        alpha = self.alpha[..., None]
        return torch.logaddexp(alpha.log() + log_o, (1 - alpha).log() + log_pi)

    # --- rows: what operators read ------------------------------------------------------------------------------------

    def loo_rows(self, where: Bool[Tensor, "B L"]) -> Float[Tensor, "N V"]:
        """Unnormalised log O at the chosen sites only, (N, V) in row-major order.

        Raises:
            ValueError: if it is undefined at a chosen site, naming the site.
        """
        rows, x, log_weight = self._read(where)
        if self.predicts == "loo":
            return rows
        if self.predicts == "denoiser":
            self._refuse(
                where,
                log_weight == torch.inf,
                "the denoiser is a point mass there and does not determine it; let the model predict 'loo', or keep "
                "what needs it away from clean sites, for instance with when() from a step that ends at t = 0",
            )
            return _shift(rows, x, -log_weight)
        alpha = self.alpha[where][:, None]
        if self.process.absorbing:
            if rows.shape[-1] < self.process.states:
                self._refuse(where, log_weight == torch.inf, "a ratio without the mask's column does not determine it")
            return self._hide_mask(rows[:, : self.process.vocab_size])
        self._refuse(where, alpha[:, 0] == 0, "a ratio carries no information at alpha = 0; start the grid below t = 1")
        noise = (1 - alpha) * self.process.pi.to(rows.device)
        return ((rows.double().softmax(-1) - noise) / alpha).clamp(min=0).log().to(rows.dtype)

    def denoiser_rows(self, where: Bool[Tensor, "B L"]) -> Float[Tensor, "N V"]:
        """Unnormalised log D at the chosen sites only, (N, V) in row-major order.

        Raises:
            ValueError: where it must be found from an undefined LOO.
        """
        rows, x, log_weight = self._read(where)
        if self.predicts == "denoiser" and not self.process.absorbing:
            return rows
        settled = log_weight == torch.inf
        if self.predicts == "ratio":
            rows = rows.new_zeros(len(rows), self.process.vocab_size)
            rows[~settled] = self.loo_rows(where.masked_scatter(where, ~settled))
        if self.predicts != "denoiser":
            rows = _shift(rows, x, log_weight.masked_fill(settled, 0.0))
            # An LOO that excludes the observed token (its limit alpha -> 1 is the LOO itself) is left alone.
            settled = settled & (rows.gather(-1, x.where(settled, 0)[:, None])[:, 0] > -torch.inf)
        own = x[:, None] == torch.arange(rows.shape[-1], device=rows.device)
        return torch.where(settled[:, None], torch.where(own, 0.0, -torch.inf).to(rows.dtype), rows)

    def log_own(self, where: Bool[Tensor, "B L"]) -> Float[Tensor, "B L"]:
        """log O at each chosen site's own token, 0 elsewhere; float64."""
        own = self.loo_rows(where).double().log_softmax(-1).gather(-1, self.x[where][:, None])[:, 0]
        return torch.zeros_like(self.alpha).masked_scatter(where, own)

    # --- plumbing -----------------------------------------------------------------------------------------------------

    def _read(self, where: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The raw rows, own tokens and log weights of the chosen sites."""
        log_weight = self.process.log_weight(self.x, self.alpha)[where]
        rows = self.logits[where]
        return (rows if self.predicts == "ratio" else self._hide_mask(rows)), self.x[where], log_weight

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


def _shift(rows: Tensor, x: Tensor, amount: Tensor) -> Tensor:
    """Add ``amount`` to each row's own column; a mask has none."""
    inside = x < rows.shape[-1]
    column = x.where(inside, 0)[:, None]
    shift = amount.where(inside, 0.0).to(rows.dtype)[:, None]
    return rows.scatter_add(-1, column, shift)
