"""Noise all free sites from t to u and run a predictor back to t (resampling).

The only bias is that of the predictor. Frozen sites keep their tokens, so resampling adapts an infill to its prompt.

Reference: RePaint (Lugmayr et al., 2022, https://arxiv.org/abs/2201.09865).
"""

from dataclasses import dataclass, field, replace

from discdiff.checks import real, whole
from discdiff.operator import At, Corrector, Invariance, Operator, State, check_operator, choose
from discdiff.process import Process
from discdiff.samplers.ancestral import Ancestral

__all__ = ["RePaint"]


@dataclass(frozen=True)
class RePaint(Corrector):
    """Noise every free site from the current time t to u, and run a predictor back from u to t.

    Args:
        u: the time up to which noise is added. If t >= u the corrector is the identity.
        predictor: the operator that runs from u back to t.
        steps: the number of equal steps back.

    Raises:
        TypeError: if ``predictor`` does not move in time.
        ValueError: for ``u`` outside (0, 1], or ``steps`` below 1.
    """

    u: float = 0.6
    predictor: Operator = field(default_factory=Ancestral)
    steps: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "u", real(self.u, "RePaint: u", "(0, 1]"))
        if not check_operator(self.predictor, "RePaint").moves:
            raise TypeError(f"RePaint: {self.predictor} does not move in time; it takes a predictor")
        object.__setattr__(self, "steps", whole(self.steps, "RePaint: steps", 1))

    @property
    def invariant(self) -> Invariance:
        return "approximate"

    @property
    def nfe(self) -> float | None:
        return None if self.predictor.nfe is None else self.steps * self.predictor.nfe

    @property
    def enumerable(self) -> bool:
        return self.predictor.enumerable

    @property
    def width(self) -> int:
        return 1 + self.steps * self.predictor.width

    def check(self, process: Process) -> None:
        self.predictor.check(process)

    def __call__(self, state: State, at: At) -> State:
        t = state.t
        if self.u <= t:
            return state
        noisy = at.process.noised_further(state.tokens, state.free, at.alpha(t), at.alpha(self.u))
        now = state.at(choose("noised", noisy, state, at), self.u)
        times = [self.u + (t - self.u) * k / self.steps for k in range(self.steps)] + [t]
        for k in range(self.steps):
            place = replace(at, t=times[k], s=times[k + 1]).moved(1 + k * self.predictor.width)
            now = self.predictor(now, place)
        return now
