"""Base class of unmasking rules in which the prediction, not the schedule, decides how many masks to reveal."""

from abc import abstractmethod
from dataclasses import replace

from jaxtyping import Bool
from torch import Tensor

from discdiff.operator import At, Predictor, State
from discdiff.process import Process
from discdiff.samplers._choosing import check_mask, draw_clean, hidden

__all__ = ["Sure"]


class Sure(Predictor):
    """Reveal the masks that a subclass picks; the step that ends at time 0 reveals all that are left.

    A step makes one denoiser call, or none if no mask is left.

    Shapes: masks (B, L).
    """

    @abstractmethod
    def pick(self, state: State, masks: Bool[Tensor, "B L"], at: At) -> Bool[Tensor, "B L"]:
        """Return which of ``masks`` (B, L) to reveal: at least one in each row that has a mask."""

    def check(self, process: Process) -> None:
        check_mask(self, process)

    def __call__(self, state: State, at: At) -> State:
        masks = hidden(state, at)
        if not bool(masks.any()):
            return state.at(state.tokens, at.s)
        state = replace(state, seen=at.predict(state))
        where = self.pick(state, masks, at) if at.s > 0 else masks
        return state.at(draw_clean(state, where, at), at.s)
