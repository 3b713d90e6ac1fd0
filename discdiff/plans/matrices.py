"""Exact matrices of steps, computed once for each step and interval, for one process and its models."""

from collections.abc import Iterator, Mapping

from jaxtyping import Float
from torch import Tensor

from discdiff.denoiser import Denoiser
from discdiff.process import Process
from discdiff.sampling import Plan, Sampler, Step
from discdiff.theory import kernel

__all__ = ["Matrices", "Owner"]


class Owner:
    """The process and models for which numbers are kept; other ones make ``changed`` true once."""

    def __init__(self) -> None:
        self._process: Process | None = None
        self._parts: list[object] = []

    def changed(self, process: Process, models: Mapping[str, Denoiser]) -> bool:
        """Return whether the process or a model differs from that of the last call."""
        parts = [*_parts(models)]
        same = process == self._process and len(parts) == len(self._parts)
        same = same and all(one is other or one == other for one, other in zip(parts, self._parts, strict=True))
        self._process, self._parts = process, parts
        return not same


class Matrices:
    """Exact transition matrices (N, N) of steps; N = S**L."""

    def __init__(self, length: int) -> None:
        self.length: int = length
        self._owner = Owner()
        self._known: dict[tuple[Step, float, float], Tensor] = {}

    def of(self, sampler: Sampler, step: Step, t: float, s: float) -> Float[Tensor, "N N"]:
        """Return the matrix (N, N) of a step from t to s with a sampler's process and models; as ``theory.kernel``."""
        if self._owner.changed(sampler.process, sampler.models):
            self._known.clear()
        if (step, t, s) not in self._known:
            model = Sampler(sampler.process, sampler.models, plan=Plan([t, s], [step])).model
            self._known[step, t, s] = kernel(step.operator, sampler.process, model, t, s, length=self.length)
        return self._known[step, t, s]


def _parts(models: Mapping[str, Denoiser]) -> Iterator[object]:
    """Yield what makes the denoisers: a name makes a copy, which has the same function and guides."""
    for name, model in models.items():
        yield from (name, model.fn, model.call, model.predicts, model.context, *model.guides)
