r"""Guide by Doob's transform: tilt a model by the expected weight of the clean sequences that it would lead to.

    h(z) = E[W(x0) | z_t = z]                              of noisy sequences
    g_i(v) = E[W(x0) | z_t = z, x0_i = v]                  of a clean value at one site

The model of the tilted law p0 W / Z has the leave-one-out prediction O' that follows from O in either of two ways. Both
are exact, for every process:

    neighbours     c'(v) ~ c(v) h(z with z_i = v),  O' = c' Q_t^{-1}
    clean values   O'(v) ~ O(v) g_i(v)

Here c = O Q_t is the law of the state of one site given the others. With O' in place of O every predictor and corrector
is that of the tilted law, at its own order. A weight that is scaled changes nothing. Two approximations are cheaper, or
usual elsewhere:

    factorised     c_s'(v) ~ c_s(v) h_t(z with z_i = v),  O' = c_s' Q_s^{-1}     in a step from t to s
    gradient       log h(z with z_i = v) - log h(z) by the first-order Taylor expansion in the one-hot code of z

"factorised" multiplies the law of each site after the step, p(z_s^i = v | z_t), by the classifier of the state z_t with
that site set to v. Each site takes this tilt alone (predictor guidance, D-CBG). On a masked process it equals
"neighbours", on other processes it has order 1 with every predictor. The law is that of the samples as far as an O' has
it: O' is at least 0, and the share of masks in hybrid noise stays. "gradient" is exact only where log h is a sum over
sites, and its error does not vanish with more steps.

References: the tilt of rates (Nisonoff et al., 2025, https://arxiv.org/abs/2406.01572); factorised and first-order
forms (Schiff et al., 2025, https://arxiv.org/abs/2412.10193).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, SupportsIndex, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.checks import LAST_SEED, affordable, placed, shown, whole
from discdiff.choices import Key
from discdiff.denoiser import Guide
from discdiff.guidance.noisy import Noisy, noisy_of
from discdiff.guidance.reading import Kept, changed
from discdiff.kernels import dispatch as kernels
from discdiff.operator import GuideAt, State
from discdiff.prediction import Prediction
from discdiff.process import Process

__all__ = ["Doob"]

_LEAST = 1e-4  # alpha: c' Q^{-1} has about -log10(alpha) correct digits fewer than c'
Form = Literal["neighbours", "factorised", "gradient"]
LogH = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, repr=False)
class Doob(Guide):
    r"""Guide that tilts a model by log h of noisy sequences, or by log g of clean values; natural logs.

    The functions get one time for each row, (N,). If the sites of a row have different times, they get (N, L); frozen
    sites and a prefix have time 0. On a masked process a row always has one time, since a token that is shown is clean.
    In ``Blockwise`` the functions get whole sequences: the clean prefix and the noisy block. A sequence with a shorter
    prefix than others has -1 at its end.

    Q_t^{-1} loses digits where noise is strong. There "neighbours" sets the site to v with time 0, so the times are
    (N, L). This gives g_i(v) and needs no inverse. It does so on a process that is not rank-one, such as Ordinal, and
    at alpha < 1e-4 on one that is not masked. The other two forms refuse a process that is not rank-one, and leave O
    unchanged at alpha < 1e-4.

    A row where h, or g, is 0 for every token that O allows stays unchanged in every form. Truncations of earlier guides
    are applied after the tilt. Gradients do not flow through log h and log g.

    Args:
        log_h: maps noisy states (N, L) and times to (N,), log h; -inf where h is 0. With "gradient" it gets one-hot
            codes (N, L, S) in float64 of the S states, and must be differentiable in them. ``world.log_h`` of an oracle
            is the exact one.
        form: "neighbours", exact: one state for each value of each site that is read, V of them on a masked process and
            S elsewhere. "factorised" takes as many, "gradient" one state and one derivative for each row. The formulas
            are at the top of guidance/doob.py.
        clean: maps noisy states (N, L) and times to (N, L, V), log g; instead of ``log_h``. ``world.log_clean`` is the
            exact one.
        at_once: the most states in one call of a function.

    Attributes:
        exact: whether O' is that of the tilted law if log h or log g is exact.

    Raises:
        TypeError: unless exactly one of ``log_h`` and ``clean`` is given, as a function.
        ValueError: for an unknown form, or one with ``clean``; in sampling, for a result of another shape, NaN or +inf,
            or if the operator asks for an autoregressive prediction, which has no noisy state.
    """

    log_h: LogH | None = None
    form: Form = "neighbours"
    clean: LogH | None = None
    at_once: int = 4096

    def __post_init__(self) -> None:
        given = [one for one in (self.log_h, self.clean) if one is not None]
        if len(given) != 1 or not callable(given[0]) or isinstance(given[0], type):
            raise TypeError(f"Doob: give one function, log_h of noisy states or clean for log g, got {shown(given)}")
        if self.form not in get_args(Form):
            raise ValueError(f"Doob: form must be one of {', '.join(map(repr, get_args(Form)))}, got {self.form!r}")
        if self.clean is not None and self.form != "neighbours":
            raise ValueError(f"Doob: form={self.form!r} is one of log_h; clean= has one form alone")
        object.__setattr__(self, "at_once", whole(self.at_once, "Doob: at_once", 1))

    @property
    def exact(self) -> bool:
        return self.form == "neighbours"

    def __call__(self, prediction: Prediction, state: State, at: GuideAt) -> Prediction:
        here, process, x, alpha = noisy_of(prediction, at), prediction.process, prediction.x, prediction.alpha
        if self.clean is not None:
            log_g = here.in_block(here.values(self.clean, self.at_once, process.vocab_size))
            return changed(prediction, lambda log_o, row, position: log_o + log_g[row, position])
        clean = torch.zeros_like(x, dtype=torch.bool)
        if self.exact and not process.masks:
            clean = (alpha < _LEAST) | (process.rank_one is None)
        if self.form == "gradient":
            assert self.log_h is not None
            slope = here.in_block(here.slopes(self.log_h, self.at_once))
            found: Callable[[Tensor, Tensor], Tensor] = partial(_first_order, here, slope)
        else:
            found = Kept(partial(self._around, here, clean), x)
        after = alpha  # that of the law which takes the tilt
        if self.form == "factorised" and not process.masks:
            after = torch.maximum(alpha, Process.sitewise(at.alpha(at.s), x))

        def change(log_o: Tensor, row: Tensor, position: Tensor) -> Tensor:
            log_h = found(row, position)
            if process.masks:
                return log_o.index_add(-1, process.data_tokens.to(x.device), log_h)
            place = row, position
            return _through_states(process, log_o, log_h, x[place], after[place], clean[place])

        return changed(prediction, change)

    def check(self, process: Process) -> None:
        if not self.exact and process.rank_one is None:
            raise ValueError(
                f"Doob: form={self.form!r} takes a rank-one process, such as Uniform, because it inverts Q; got "
                f"{process}. form='neighbours' and clean= take any"
            )

    def _around(self, here: Noisy, direct: Tensor, row: Tensor, position: Tensor) -> Float[Tensor, "n K"]:
        """Return log h (n, K) of the neighbours of n sites, set with time 0 where ``direct`` (B, L)."""
        assert self.log_h is not None
        clean = direct[row, position]
        if not bool(clean.any()) or bool(clean.all()):
            return here.neighbours(self.log_h, row, position, self.at_once, bool(clean.any()))
        parts = [(~clean).nonzero()[:, 0], clean.nonzero()[:, 0]]  # apart, as they differ in the shape of the times
        values = [here.neighbours(self.log_h, row[n], position[n], self.at_once, n is parts[1]) for n in parts]
        return torch.cat(values)[torch.cat(parts).argsort()]

    def initial(
        self,
        process: Process,
        batch: SupportsIndex,
        length: SupportsIndex,
        *,
        seed: SupportsIndex,
        first_row: SupportsIndex = 0,
        candidates: SupportsIndex = 64,
        device: torch.device | str = "cpu",
    ) -> Int[Tensor, "B L"]:
        """Draw initial states (B, L) from the prior times h_1, for ``sample(initial=...)`` of runs without a prompt.

        They are needed where alpha(1) > 0, because then h_1 is not constant on the prior; a run that starts from the
        prior leaves this part of the tilt out. Each row draws ``candidates`` states from the prior and takes one of
        them with probability proportional to h_1. The law tends to the tilted prior as 1 / candidates. A row depends on
        the seed and its id alone.

        Args:
            process: the forward process.
            batch, length: B and L.
            seed: 64-bit key of the randomness; that of the run may be used again.
            first_row: the id of the first row.
            candidates: the states among which a row chooses.
            device: where to draw.

        Raises:
            TypeError: if the guide was given ``clean``, which tells no h; or for an argument that is no whole number.
            ValueError: for an argument out of range, or if h is 0 at all candidates of a row.
        """
        size, sites = whole(batch, "Doob.initial: batch", 1), whole(length, "Doob.initial: length", 1)
        number = whole(candidates, "Doob.initial: candidates", 1)
        first = whole(first_row, "Doob.initial: first_row", 0, 2**32 - size)
        affordable(size * number * sites, f"Doob.initial: {size} x {number} states of length {sites}")
        rows = torch.arange(first, first + size, device=placed(device, "Doob.initial: device"))
        key = Key(whole(seed, "Doob.initial: seed", 0, LAST_SEED), rows, name="prior")
        prior = process.prior(size, number * sites, rows.device)
        prior.key = key
        states = prior.sample().view(size, number, sites)
        log_h = self._of_prior(process, states.flatten(0, 1), rows.repeat_interleave(number)).view(size, number)
        chosen = kernels.drawn(kernels.Rows.of(log_h), replace(key, name="initial"), torch.zeros_like(rows))
        if bool((chosen < 0).any()):
            row = int(rows[chosen < 0][0])
            raise ValueError(f"Doob.initial: h is 0 at all {number} candidates of row {row}; give more candidates=")
        return states[torch.arange(size, device=rows.device), chosen]

    def initial_law(self, process: Process, length: SupportsIndex) -> Float[Tensor, " N"]:
        """Return the prior times h_1, normalised, over the N = S**L states, (N,), for ``theory.law(initial=...)``.

        Raises:
            TypeError: if the guide was given ``clean``, which tells no h.
            ValueError: for more states than memory holds, or if h is 0 at all states of the prior.
        """
        sites = whole(length, "Doob.initial_law: length", 1)
        affordable(process.states**sites, f"Doob.initial_law: a law over {process.states}**{sites} states")
        _, states, log_p = process.prior(1, sites).fork()
        log_p = log_p + self._of_prior(process, states, torch.zeros(len(states), dtype=torch.int64))
        if not bool((log_p > -torch.inf).any()):
            raise ValueError("Doob.initial_law: h is 0 at all states of the prior")
        index = (states * process.states ** torch.arange(sites - 1, -1, -1)).sum(-1)
        return log_p.new_zeros(process.states**sites).index_add(0, index, log_p.softmax(0))

    def _of_prior(self, process: Process, x: Tensor, rows: Tensor) -> Tensor:
        """Return log h (N,) of states (N, L) at time 1."""
        if self.log_h is None or self.form == "gradient":
            raise TypeError(f"{self}: the initial tilt takes log_h of noisy states; make Doob(log_h) for it")
        times = torch.ones_like(x, dtype=torch.float64)
        here = Noisy(process, x, times, torch.zeros_like(rows), x.shape[1], rows, self)
        return here.values(self.log_h, self.at_once)

    def __repr__(self) -> str:
        given = f"log_h={shown(self.log_h)}, form={self.form!r}" if self.clean is None else f"clean={shown(self.clean)}"
        return f"Doob({given}, exact={self.exact})"


def _first_order(here: Noisy, slope: Tensor, row: Tensor, position: Tensor) -> Tensor:
    """Return log h (n, K) of the neighbours of n sites, relative to that of the state, from its slopes (B, L, S)."""
    own = here.x[row, here.offset[row] + position][:, None]
    rows = slope[row, position]
    return rows.gather(-1, here.states(row, position)) - rows.gather(-1, own)


def _through_states(
    process: Process, log_o: Tensor, log_h: Tensor, x: Tensor, alpha: Tensor, clean: Tensor
) -> Float[Tensor, "n V"]:
    """Return log O h at the sites ``clean``; elsewhere log O' of c' ~ c h, c = O Q, O' = c' Q^{-1}; O at small alpha.

    Shapes: rows (n, V) of O and (n, C) of h, states, alpha and ``clean`` (n,).
    """
    known = ~clean & (alpha >= _LEAST)
    log_c = process.conditional(log_o[known], x[known], alpha[known]) + log_h[known]
    total = kernels.log_sum_exp(log_c)[:, None]
    c = (log_c - total.where(total > -torch.inf, 0.0)).exp()
    found = kernels.log(process.conditional_to_loo(c, x[known], alpha[known]))
    rest = torch.where(clean[:, None], log_o + log_h[:, : process.vocab_size], log_o)
    return rest.index_put((known,), found)
