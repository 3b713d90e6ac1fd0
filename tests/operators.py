"""Every shipped operator in its variants, as whole steps: what is claimed of all of them is tried on all of them."""

import discdiff as dd
from discdiff import samplers as S

__all__ = ["CORRECTORS", "PREDICTORS", "STEPS", "accepted"]

PREDICTORS: list[dd.Operator] = [
    S.Ancestral(),
    S.Adaptive(),
    S.AnchoredRemask(),
    S.AnchoredRemask(again=True),
    S.AnyOrder(),
    S.AnyOrder(select="margin"),
    *(S.ARPC(score) for score in ("nll", "gap", "entropy", "kl", "reverse_kl", "tv", "random", "forward")),
    S.ARPC("nll", temperature=0.5),
    S.DFM(1.0),
    S.EntropyBounded(0.5),
    S.Euler(),
    S.FirstHitting(),
    S.Gillespie(),
    S.Greedy(),
    S.KLStable(),
    S.KLStable(threshold=0.0, kl=10.0),
    S.MaximalCoupling(),
    S.Multistep(),
    S.P2(eta=0.0),
    S.P2(),
    S.P2(planner=lambda x: -x.double()),
    S.ReMDM(eta=0.2),
    S.ReMDM(eta=0.5, confident=True),
    S.Renoising(),
    S.Reveal(calls=2),
    S.Reveal("spread", calls=3, block=2, growth=2.0),
    S.SplitLeap(),
    S.TauLeaping(),
    S.TauLeaping("reject"),
    S.ThetaRK2(),
    S.ThetaTrapezoidal(),
    S.Thinning(),
    S.Threshold(),
    S.Uniformization(),
    *(S.Unmask(select) for select in ("random", "max_prob", "entropy", "margin", "left_to_right", "spread")),
    S.Unmask("max_prob", noise=1.0),
    S.Unmask("margin", block=2),
    S.Unmask(draw_first=True),
]

CORRECTORS: list[dd.Operator] = [
    S.EntropyRedraw(),
    S.EntropyRedraw(sites=1),
    S.RePaint(),
    S.ForwardBackward(),
    S.Gibbs(),
    S.Gibbs(sites=2, scan="systematic"),
    S.InformedGibbs(),
    S.InformedGibbs("max_prob"),
    S.InformedGibbs("current_prob"),
    S.InformedGibbs(exact=True),
    S.LocallyBalanced(),
    S.LocallyBalanced("max"),
    S.Remask(),
    S.TauForwardBackward(),
    S.TauLocallyBalanced(),
]

STEPS: list[dd.Operator] = [
    *PREDICTORS,
    S.Ancestral() >> S.Gibbs(),
    *(S.Ancestral() >> corrector for corrector in CORRECTORS),
]


def accepted(operator: dd.Operator, process: dd.Process) -> bool:
    """Whether the operator has a meaning on the process, by its own word; one says so only when it runs."""
    if isinstance(operator, S.ARPC) and isinstance(process, dd.TimeVarying):
        return False  # it adds noise from alpha = 0, which this process never reaches
    try:
        operator.check(process)
    except ValueError:
        return False
    return True
