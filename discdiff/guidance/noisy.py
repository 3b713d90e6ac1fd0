"""Noisy whole sequences of a prediction's rows, and the states in which one site differs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from discdiff.checks import shown
from discdiff.denoiser import clean_states
from discdiff.operator import GuideAt
from discdiff.prediction import Prediction
from discdiff.process import Process

__all__ = ["Noisy", "noisy_of", "refuse_autoregressive"]


@dataclass(frozen=True, eq=False)
class Noisy:
    """The noisy sequences of B rows, whole ones behind a prefix, with the times of their sites.

    Attributes:
        process: the forward process.
        x: (B, W) states; after the end of a row that is shorter than others -1.
        t: (B, W) times; 0 in a prefix.
        offset: (B,) the position of each row's first site in the whole sequence.
        length: L, the number of the prediction's sites.
        rows: (B,) ids of the rows, for errors.
        what: the guide, for errors.
    """

    process: Process
    x: Int[Tensor, "B W"]
    t: Float[Tensor, "B W"]
    offset: Int[Tensor, " B"]
    length: int
    rows: Int[Tensor, " B"]
    what: object

    @property
    def alike(self) -> bool:
        """Whether one time describes a row: sites that differ in it are clean ones of a masked process, if any."""
        return self.process.masks or bool((self.t == self.t[:, :1]).all())

    def states(self, row: Int[Tensor, " n"], position: Int[Tensor, " n"]) -> Int[Tensor, "n K"]:
        """Return the states (n, K) that the sites of rows (n,) may be set to: tokens on a masked process, else all."""
        process = self.process
        columns = process.data_tokens if process.masks else torch.arange(process.columns)
        here = self.x[row, self.offset[row] + position]
        return process.place(columns.to(here.device).expand(len(here), -1), here[:, None].expand(-1, len(columns)))

    def in_block(self, value: Shaped[Tensor, "B W *any"]) -> Shaped[Tensor, "B L *any"]:
        """Return the entries (B, L, *any) at the prediction's sites from those (B, W, *any) at all positions."""
        row = torch.arange(len(value), device=value.device)[:, None]
        return value[row, self.offset[:, None] + torch.arange(self.length, device=value.device)]

    def neighbours(
        self,
        function: Callable[[Tensor, Tensor], Tensor],
        row: Int[Tensor, " n"],
        position: Int[Tensor, " n"],
        at_once: int,
        clean: bool = False,
    ) -> Float[Tensor, "n K"]:
        """Return log h (n, K) at n sites for each of the K states that a site may be set to.

        Args:
            function: log h of states (N, W) and times (N,), or (N, W).
            row, position: the sites, (n,) each.
            at_once: the most states in one call.
            clean: whether a site that is set has time 0.

        Raises:
            ValueError: if the function gives another shape, NaN or +inf.
        """
        states = self.states(row, position)
        if not states.numel():
            return self.t.new_zeros(states.shape)
        each, alike, found = states.shape[1], self.alike and not clean, []
        for part in torch.arange(states.numel(), device=row.device).split(at_once):
            owner, place = row[part // each], (self.offset[row] + position)[part // each][:, None]
            x = self.x[owner].scatter(1, place, states.reshape(-1, 1)[part])
            t = self.t[owner].scatter(1, place, 0.0) if clean else self.t[owner]
            found.append(self._checked(function(x, t.amax(-1) if alike else t), (len(x),), x, owner))
        return torch.cat(found).view(states.shape)

    def values(
        self, function: Callable[[Tensor, Tensor], Tensor], at_once: int, width: int | None = None
    ) -> Float[Tensor, "B *any"]:
        """Return the values of a function at the rows, (B,), or (B, W, V) if the width V is given.

        It is called for at most ``at_once`` rows.

        Raises:
            ValueError: if the function gives another shape, NaN or +inf.
        """
        shape, alike = (() if width is None else (self.x.shape[1], width)), self.alike
        found = [self.t.new_zeros(0, *shape)]
        for part in torch.arange(len(self.x), device=self.x.device).split(at_once):
            x, t = self.x[part], self.t[part]
            found.append(self._checked(function(x, t.amax(-1) if alike else t), (len(x), *shape), x, part))
        return torch.cat(found)

    def slopes(self, function: Callable[[Tensor, Tensor], Tensor], at_once: int) -> Float[Tensor, "B W S"]:
        """Return the derivatives (B, W, S) of log h in the one-hot codes of the states; 0 in a row where h is 0.

        Raises:
            ValueError: if log h has another shape, is NaN or +inf, is not differentiable, or has an infinite slope.
        """
        found, alike = [], self.alike
        for part in torch.arange(len(self.x), device=self.x.device).split(at_once):
            x, t = self.x[part], self.t[part]
            with torch.inference_mode(False), torch.enable_grad():
                states = torch.arange(self.process.states, device=x.device)
                code = (x[..., None] == states).double().requires_grad_()
                log_h = self._checked(function(code, t.amax(-1) if alike else t.clone()), (len(x),), x, part)
                if not log_h.requires_grad:
                    raise ValueError(f"{self.what}: log_h must be differentiable in the one-hot codes (N, L, S)")
                (slope,) = torch.autograd.grad(log_h.sum(), code)
            slope = torch.where(log_h.detach()[:, None, None] > -torch.inf, slope, 0.0)
            wrong = ~slope.isfinite().flatten(1).all(1)
            if bool(wrong.any()):
                row = int(wrong.nonzero()[0])
                raise ValueError(f"{self.what}: the slope of log h of row {int(self.rows[part[row]])} is not finite")
            found.append(slope)
        return torch.cat(found) if found else self.t.new_zeros(*self.x.shape, self.process.states)

    def _checked(self, value: object, shape: tuple[int, ...], x: Tensor, owner: Tensor) -> Tensor:
        if not isinstance(value, Tensor) or value.shape != shape:
            raise ValueError(f"{self.what}: its function must give {shape} for {tuple(x.shape)}, got {shown(value)}")
        value = value.double()
        wrong = ~(value < torch.inf)
        if bool(wrong.any()):
            first = int(wrong.nonzero()[0, 0])
            row, number = int(self.rows[owner[first]]), float(value[wrong][0])
            raise ValueError(f"{self.what}: its function gives {number} for row {row}, the state {x[first].tolist()}")
        return value


def refuse_autoregressive(at: GuideAt) -> None:
    """Raise ValueError if the operator asks for an autoregressive prediction, which has no noisy state."""
    if at.times is None:
        raise ValueError(
            f"{at.guide}: changes predictions at noisy states, and this operator asks for an autoregressive one; "
            "let the guide act in steps of other operators alone"
        )


def noisy_of(prediction: Prediction, at: GuideAt) -> Noisy:
    """Return the noisy sequences at which a prediction was made, whole ones behind a prefix.

    Raises:
        ValueError: for an autoregressive prediction, which has none.
    """
    refuse_autoregressive(at)
    assert at.times is not None
    process, x, offset = prediction.process, prediction.x, at.offset
    t = at.times.detach().double().expand(x.shape)
    whole = at.sequence(x)
    if whole.shape[1] > x.shape[1]:
        position = torch.arange(whole.shape[1], device=x.device)
        whole = torch.where(position < offset[:, None], clean_states(process, whole), whole)
        place = offset[:, None] + position[: x.shape[1]]
        t = t.new_zeros(whole.shape).scatter(1, place, t)
    return Noisy(process, whole, t, offset, x.shape[1], at.rows, at.guide)
