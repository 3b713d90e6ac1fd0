"""Test whether a checkpoint's convention is right, with the network and a few sequences of its data.

A network predicts hidden tokens best if it is called as it was trained. So the tests call the network by the declared
convention and by others, with the same noise. They compare -log D of the hidden tokens in nats, where D is the
probability that the network gives to the true token.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.adapters.diagnostics import sensitivity_curve
from discdiff.checks import LAST_SEED, whole
from discdiff.denoiser import Denoiser, TimeArgument, check_denoiser
from discdiff.process import noise, noised

__all__ = ["Finding", "Findings", "probe"]

ALPHA = 0.5
NOISY = 0.2  # a noise level at which t, sigma and alpha differ much
_ERRORS, _NATS = 3.0, 0.02  # a difference counts if it exceeds so many standard errors and nats a token
_CANDIDATES = 8


@dataclass(frozen=True)
class Finding:
    """The result of one test.

    Attributes:
        name: the tested property of the convention.
        verdict: "right", "wrong", or "unknown" if the test could not decide.
        said: the reason, usually with the measured numbers.
    """

    name: Literal["shift", "mask id", "time", "predicts"]
    verdict: Literal["right", "wrong", "unknown"]
    said: str

    def __str__(self) -> str:
        return f"{self.name}: {self.verdict}: {self.said}"


@dataclass(frozen=True)
class Findings:
    """The results of ``probe``, a ``Finding`` for each test; ``print`` writes one line for each."""

    found: tuple[Finding, ...]

    @property
    def wrong(self) -> tuple[Finding, ...]:
        """The findings with the verdict "wrong"."""
        return tuple(finding for finding in self.found if finding.verdict == "wrong")

    def __getitem__(self, name: str) -> Finding:
        return next(finding for finding in self.found if finding.name == name)

    def __str__(self) -> str:
        return "\n".join(map(str, self.found))


@torch.no_grad()
def probe(model: Denoiser, x0: Int[Tensor, "B L"] | None = None, seed: int = 0) -> Findings:
    r"""Test the declared convention of a denoiser against its outputs.

    * **shift** compares the nats of hidden tokens, -log D(x0_i | x_t), with those that result if logits are read one
      position to the left or right.
    * **mask id** compares the nats of hidden tokens with those that result if another id is used as the mask. Up to 8
      ids are tried, such as suppressed ids and ids that are absent from the data.
    * **time** tests whether the output changes with time at all, and compares the nats with those of other time
      arguments.
    * **predicts** tests whether the output at a site depends on the input token at that site
      (``sensitivity_curve``). A denoiser's output depends on it; a leave-one-out prediction does not. The test needs a
      process whose noise consists of data tokens.

    Args:
        model: the denoiser with its declared convention.
        x0: (B, L), at least two rows of real data; more rows give smaller errors. Without it only "time" is tested.
        seed: the seed of the noise.

    Returns:
        A finding for each test. Its verdict is "wrong" if another convention is better by more than 3 standard errors
        over the rows; where nats are compared, it must also be better by more than .02 nats a token. The verdict of
        "time" is also "wrong" if the output does not change with time.

    Raises:
        ValueError: if ``x0`` has a token that is not a data token, or fewer than two rows.
    """
    check_denoiser(model, "probe")
    seed = whole(seed, "probe: seed", 0, LAST_SEED)
    if x0 is None:
        return Findings(tuple(_without_data(model, seed)))
    model.check_data(x0, "x0")
    if len(x0) < 2:
        raise ValueError("probe: needs at least 2 rows of data, to tell a difference from chance")
    case = _noised(model, x0, ALPHA, seed)
    return Findings((_shift(case), _mask(case), _time(_noised(model, x0, NOISY, seed)), _predicts(case, seed)))


def _noised(model: Denoiser, x0: Int[Tensor, "B L"], alpha: float, seed: int) -> "_Case":
    at = float(model.process.schedule.time(torch.tensor(alpha, dtype=torch.float64)))
    x = noised(model.process, x0, at, seed)
    return _Case(model, x0, x, torch.full((1, 1), at, dtype=torch.float64, device=x.device))


@dataclass(frozen=True)
class _Case:
    """A model, data x0, the noised data x and its time t."""

    model: Denoiser
    x0: Int[Tensor, "B L"]
    x: Int[Tensor, "B L"]
    t: Float[Tensor, "1 1"]

    def nats(self, model: Denoiser | None = None, shown: Tensor | None = None, moved: int = 0) -> Float[Tensor, " B"]:
        """Return the mean of -log D(x0_i | x) over a row's hidden tokens i.

        Logits are read ``moved`` positions to the right. The model gets the states ``shown``, by default x.
        """
        model = model or self.model
        out = model.output(self.x if shown is None else shown, self.t)
        out = replace(out, source=out.source.roll(-moved, 1)) if moved else out
        cost = -model.interpret(out, self.x, self.t).denoiser.gather(-1, self.x0[..., None])[..., 0].double()
        process = self.model.process
        hidden = torch.ones_like(self.x, dtype=torch.bool)
        if process.absorbing and process.mask_id is not None:
            hidden = self.x.eq(process.mask_id)
        hidden[:, [0, -1]] = False  # a moved reading has no logits beyond the ends
        cost = torch.where(hidden, cost.clamp(max=50.0), 0.0)  # a probability of 0 costs 50 nats, not infinity
        return cost.sum(-1) / hidden.sum(-1).clamp(min=1)

    def best(self, readings: dict[str, Callable[[], Tensor]]) -> tuple[str | None, str]:
        """Return the reading that is clearly better than the declared one, or None; also a text with all nats."""
        own = self.nats()
        told, better = [f"as declared {float(own.mean()):.3f} nats"], {}
        for name, cost in readings.items():
            gain = own - cost()
            told.append(f"{name} {float((own - gain).mean()):.3f}")
            error = float(gain.std()) / len(gain) ** 0.5
            if float(gain.mean()) > max(_ERRORS * error, _NATS):
                better[name] = float(gain.mean())
        return max(better, key=lambda name: better[name]) if better else None, ", ".join(told)


def _shift(case: _Case) -> Finding:
    readings = {
        "read one place to the left": lambda: case.nats(moved=-1),
        "one to the right": lambda: case.nats(moved=1),
    }
    if case.x.shape[1] < 4:
        return Finding("shift", "unknown", "sequences of at least 4 tokens are needed")
    better, told = case.best(readings)
    if better is None:
        return Finding("shift", "right", told)
    declared = f"shift={case.model.call.shift}"
    return Finding("shift", "wrong", f"{better} is better; the declared {declared} is off by one: {told}")


def _mask(case: _Case) -> Finding:
    process = case.model.process
    mask = process.mask_id
    if mask is None:
        return Finding("mask id", "unknown", "the process has none")
    held = set(case.x0.unique().tolist())
    others = sorted(set(range(process.states)) - {mask}, key=lambda v: (v in held, abs(v - mask)))
    candidates = list(dict.fromkeys([*case.model.call.suppress[:2], *others]))[:_CANDIDATES]

    def hidden_by(v: int) -> Callable[[], Tensor]:
        return lambda: case.nats(shown=case.x.masked_fill(case.x.eq(mask), v))

    better, told = case.best({f"hidden by {v}": hidden_by(v) for v in candidates})
    if better is None:
        return Finding("mask id", "right", told)
    return Finding(
        "mask id",
        "wrong",
        f"what is {better} costs less than by {mask}: that is the mask, and it is predicted like data: {told}",
    )


def _time(case: _Case) -> Finding:
    model = case.model
    found = _without_time(model, case.x)
    if found is not None:
        return found

    def told(argument: TimeArgument) -> Callable[[], Tensor]:
        other = copy.copy(model)
        other.call = replace(model.call, time=argument)
        return lambda: case.nats(other)

    names: tuple[TimeArgument, ...] = ("t", "sigma", "alpha")
    better, nats = case.best({f"time={name!r}": told(name) for name in names if name != model.call.time})
    return Finding("time", "right" if better is None else "wrong", nats if better is None else f"{better}: {nats}")


def _without_time(model: Denoiser, x: Int[Tensor, "B L"]) -> Finding | None:
    """Return the finding if the model gets no time or its output does not change with it; else None."""
    if model.call.time is None:
        return Finding("time", "unknown", "none is declared")
    early, late = (model.output(x, torch.full((1, 1), t, dtype=torch.float64)).logits().double() for t in (0.2, 0.8))
    finite = early.isfinite() & late.isfinite()
    if float((early - late)[finite].abs().max()) > 1e-6 * float(early[finite].abs().max()):
        return None
    said = f"time={model.call.time!r}"
    return Finding("time", "wrong", f"the output does not change with time, though {said}; pass None")


def _predicts(case: _Case, seed: int) -> Finding:
    model = case.model
    if model.process.absorbing or len(model.process.data_tokens) < 2:
        return Finding("predicts", "unknown", "hidden tokens say nothing; on them denoiser and leave-one-out agree")
    if model.predicts == "ratio":
        return Finding("predicts", "unknown", "a ratio has one reading only; see cycle_residual")
    curves = sensitivity_curve(model, case.x0, [0.3, 0.5, 0.7], seed)
    means = {name: float(curve[:, 0].mean()) for name, curve in curves.items()}
    error = sum(float((curve[:, 1] ** 2).sum()) / len(curve) ** 2 for curve in curves.values()) ** 0.5
    other: Literal["loo", "denoiser"] = "loo" if model.predicts == "denoiser" else "denoiser"
    gain = means[model.predicts] - means[other]
    told = ", ".join(f"read as {name} {mean:.3f}" for name, mean in means.items())
    if gain > _ERRORS * error:
        return Finding("predicts", "wrong", f"it is a {other!r}; change of the LOO with its own token: {told}")
    verdict: Literal["right", "unknown"] = "right" if -gain > _ERRORS * error else "unknown"
    return Finding("predicts", verdict, f"change of the LOO with its own token: {told}")


def _without_data(model: Denoiser, seed: int) -> Iterator[Finding]:
    length = model.length or 16
    x = noise(model.process, 2, length, seed)
    left: tuple[Literal["shift", "mask id", "predicts"], ...] = ("shift", "mask id", "predicts")
    needs = "pass a few rows of its data, probe(model, x0)"
    changes = Finding("time", "unknown", f"the output changes with time; whether in the right way: {needs}")
    yield _without_time(model, x) or changes
    yield from (Finding(name, "unknown", needs) for name in left)
