r"""Classifier-free guidance of a conditional model by an unconditional one.

    O'(v)  ~  O_c(v)^{1 + w} O_u(v)^{-w}

O_c and O_u are the leave-one-out predictions of the two models. As the exponents sum to 1, the denoisers are combined
by the same formula. At w = 0 the law of the samples is that of the conditional model, at w = -1 that of the
unconditional one. At any other w the samples do not follow the tilted law p_c^{1+w} / p_u^w, not even with infinitely
many steps: the tilted law of noisy states is not the law of noised tilted data. docs/guidance.md has the figures.

References: classifier-free guidance (Ho and Salimans, 2022, https://arxiv.org/abs/2207.12598); its discrete form
(Schiff et al., 2025, https://arxiv.org/abs/2412.10193).
"""

from dataclasses import dataclass

from discdiff.checks import real
from discdiff.denoiser import Denoiser, Guide, check_denoiser
from discdiff.operator import GuideAt, State
from discdiff.prediction import Prediction

__all__ = ["ClassifierFree", "classifier_free"]


@dataclass(frozen=True)
class ClassifierFree(Guide):
    """Guide of a conditional model by an unconditional one, which it calls once for each prediction.

    Args:
        unconditional: the unconditional denoiser, for the same process, or its name in the mapping of models that a
            ``Sampler`` is given.
        scale: w. At 0 the unconditional model is not called.

    Raises:
        TypeError: if ``unconditional`` is no denoiser.
        ValueError: if the scale is not finite; in sampling at w > 0, if only the unconditional model rules a token out.
    """

    unconditional: Denoiser | str
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.unconditional, str):
            check_denoiser(self.unconditional, "ClassifierFree")
        scale = real(self.scale, "ClassifierFree: scale")
        vars(self).update(scale=scale, models=(self.unconditional,), nfe=0.0 if scale == 0 else 1.0)

    def __call__(self, prediction: Prediction, state: State, at: GuideAt) -> Prediction:
        if self.scale == 0:
            return prediction
        return prediction.combined([at.ask(self.unconditional, state)], [1 + self.scale, -self.scale])


def classifier_free(conditional: Denoiser, unconditional: Denoiser, scale: float = 1.0) -> Denoiser:
    """Return the conditional denoiser, guided by ``ClassifierFree(unconditional, scale)``.

    Raises:
        TypeError, ValueError: for other arguments than ``ClassifierFree`` takes, or models of different processes.
    """
    return check_denoiser(conditional, "classifier_free").guided(ClassifierFree(unconditional, scale))
