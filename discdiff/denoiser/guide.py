"""Guides: programs that change a prediction before an operator uses it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from discdiff.checks import decided, real, shown
from discdiff.prediction import Prediction
from discdiff.process import Process

if TYPE_CHECKING:
    from discdiff.denoiser.base import Denoiser
    from discdiff.operator import GuideAt, State

__all__ = ["Change", "Guide", "WhenGuide", "acting_at", "check_guide", "drawing", "refuse_asking"]

Change = Callable[[Prediction], Prediction]  # a guide that reads nothing but the prediction


class Guide(ABC):
    """Program that changes a prediction and may draw, call other networks or read the state of the run.

    A guide is called after the network, whenever an operator needs a prediction. It returns a prediction of the same
    noisy tokens, survival probabilities and process. A guide that needs the prediction alone can be any function of it.

    Attributes:
        random: whether it makes random choices with ``choose``. They have a key of their own, and their
            log-probability is no part of a run's log-probability.
        models: the denoisers that it asks, or their names in the mapping that a ``Sampler`` is given.
        nfe: the number of calls of these denoisers for one prediction.
        whole: whether it needs the sites after a block. ``Blockwise`` refuses such a guide.
    """

    random: bool = False
    models: "tuple[Denoiser | str, ...]" = ()
    nfe: float = 0.0
    whole: bool = False

    @abstractmethod
    def __call__(self, prediction: Prediction, state: "State", at: "GuideAt") -> Prediction:
        """Return the changed prediction.

        Args:
            prediction: the prediction so far. Noise levels are read from its ``alpha`` and ``x``, because an operator
                may have told the network another time than ``state.t``.
            state: the ``State`` of the rows: their ids, frozen sites and tokens.
            at: the ``GuideAt`` of this guide: the process, the step's times, and the functions ``ask`` and ``reward``.
        """

    def check(self, process: Process) -> None:  # noqa: B027  # most guides have nothing to check
        """Raise ValueError if the guide is not defined on a process; called when a denoiser is given the guide."""

    def __repr__(self) -> str:
        declared = ("random", "models", "nfe", "whole")
        fields = (f"{name}={shown(value)}" for name, value in vars(self).items() if name not in declared)
        return f"{type(self).__name__}({', '.join(fields)})"


@dataclass(frozen=True, repr=False)
class WhenGuide(Guide):
    """Guide that applies ``yes`` in steps whose start time meets a condition, else ``no``; made by ``when``.

    Args:
        condition: a function of the start time t of the step.
        yes: a guide.
        no: a guide, or None to leave the prediction unchanged.
    """

    condition: Callable[[float], bool]
    yes: Guide | Change
    no: Guide | Change | None = None

    def __post_init__(self) -> None:
        """Declare what either guide declares; ``acting_at`` tells which one acts."""
        both = [one for one in (self.yes, self.no) if isinstance(one, Guide)]
        vars(self).update(
            random=any(one.random for one in both),
            models=tuple(dict.fromkeys(model for one in both for model in one.models)),
            nfe=max([0.0, *(one.nfe for one in both)]),
            whole=any(one.whole for one in both),
        )

    def __call__(self, prediction: Prediction, state: "State", at: "GuideAt") -> Prediction:
        for guide in acting_at((self,), at.t):
            prediction = guide(prediction, state, at) if isinstance(guide, Guide) else guide(prediction)
        return prediction

    def check(self, process: Process) -> None:
        for guide in (self.yes, self.no):
            if isinstance(guide, Guide):
                guide.check(process)

    def __repr__(self) -> str:
        other = "" if self.no is None else f", {self.no}"
        return f"when({getattr(self.condition, '__name__', self.condition)}, {self.yes}{other})"


def acting_at(guides: tuple[Guide | Change, ...], t: float) -> Iterator[Guide | Change]:
    """Yield the guides that act in a step that starts at time t, with every ``when`` resolved."""
    for guide in guides:
        if not isinstance(guide, WhenGuide):
            yield guide
        elif (chosen := guide.yes if guide.condition(t) else guide.no) is not None:
            yield from acting_at((chosen,), t)


def drawing(guides: Iterable[object], named: "Mapping[str, Denoiser] | None" = None) -> Guide | None:
    """Return the first of some guides that draws, or asks a denoiser with a guide that draws; None if there is none.

    ``named`` are the denoisers by name.
    """
    for guide in (one for one in guides if isinstance(one, Guide)):
        asked = ((named or {}).get(one) if isinstance(one, str) else one for one in guide.models)
        if guide.random or any(drawing(one.guides, named) is not None for one in asked if one is not None):
            return guide
    return None


def refuse_asking(model: "Denoiser", where: str) -> None:
    """Raise ValueError if a guide of a denoiser asks others, to which a context of the denoiser would be unknown."""
    guide = next((one for one in model.guides if isinstance(one, Guide) and one.models), None)
    if guide is not None:
        raise ValueError(
            f"{where}: {shown(guide)} asks other denoisers, which would not know the held sites; hold them in each "
            f"denoiser first, and guide the result: model.{where}(...).guided(...)"
        )


def _asked(one: object) -> bool:
    """Return whether an object is a denoiser or the name of one."""
    return isinstance(one, str) or (hasattr(one, "process") and not isinstance(one, type))


def check_guide(guide: object, process: Process, where: str) -> Guide | Change:
    """Return the guide if it is one for the process.

    Raises:
        TypeError: if it cannot be called, is a class, or its attributes have a wrong type.
        ValueError: if it is not defined on the process, or asks a denoiser of another process.
    """
    if isinstance(guide, type):
        raise TypeError(f"{where}: a guide is called as guide(prediction), got the class {guide.__name__}; add ()")
    if not callable(guide):
        raise TypeError(f"{where}: a guide is called as guide(prediction), got {guide!r}")
    if hasattr(guide, "moves"):
        raise TypeError(f"{where}: a guide changes predictions, and {guide} is an operator; it is a part of a step")
    if isinstance(guide, Guide):
        name = type(guide).__name__
        decided(guide.random, f"{name}.random")
        decided(guide.whole, f"{name}.whole")
        real(guide.nfe, f"{name}.nfe", "[0, inf)")
        if not isinstance(guide.models, tuple) or not all(_asked(one) for one in guide.models):
            raise TypeError(f"{name}.models must be a tuple of denoisers or their names, got {shown(guide.models)}")
        for model in guide.models:
            own = None if isinstance(model, str) else getattr(model, "process", None)
            if not isinstance(model, str) and own != process:
                raise ValueError(f"{where}: {guide} asks {model!r}, but the model it guides is for {process}")
        guide.check(process)
    return guide
