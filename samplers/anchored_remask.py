r"""Keep the tokens in which the guided prediction is most confident as anchors, and mask the others again. A heuristic.

    draw      a token x_i ~ O'_i at every mask, from the guided leave-one-out prediction O'
    score     log O'_i(x_i) at these sites
    keep      the round(alpha_s n) sites of the n free ones with the largest scores, the anchors; mask the others

A tilted prediction is confident where the measurement or the reward says much about a site, so these sites are revealed
early. The choice of sites depends on the drawn tokens, so the end law is BIASED, with exact predictions too. It is the
law of ``P2`` with the guided denoiser as planner: eta = 0 where anchors stay, eta = 1 where they compete again.

Reference: Anchored Posterior Sampling (Rout et al., 2025, https://arxiv.org/abs/2510.02291), whose other part is the
guide ``APS``.
"""

from dataclasses import dataclass

from discdiff.checks import decided
from discdiff.operator import At, Predictor, Reads, State
from discdiff.process import Process
from discdiff.samplers._choosing import check_mask
from discdiff.samplers.p2 import P2

__all__ = ["AnchoredRemask"]


@dataclass(frozen=True)
class AnchoredRemask(Predictor):
    """Draw tokens at all masks, keep the most confident ones as anchors and mask the others; one denoiser call a step.

    Confidence is that of the prediction after its guides. Anchors stay, unless ``again`` is set.

    Args:
        again: whether anchors of earlier steps are scored again and may be masked. The model must then determine the
            leave-one-out prediction at revealed sites.

    Raises:
        TypeError: if ``again`` is no bool.
    """

    again: bool = False

    def __post_init__(self) -> None:
        decided(self.again, "AnchoredRemask: again")

    @property
    def reads(self) -> Reads | None:
        return self._rule.reads

    @property
    def weighable(self) -> bool:
        return self._rule.weighable

    def check(self, process: Process) -> None:
        check_mask(self, process)

    def __call__(self, state: State, at: At) -> State:
        return self._rule(state, at)

    @property
    def _rule(self) -> P2:
        return P2(eta=1.0 if self.again else 0.0)
