"""Public numbers, and what is none: for every argument a call of it, and the values that it must refuse."""

import math
from collections.abc import Callable

import numpy as np
import torch

import discdiff as dd
from discdiff import kernels
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.losses import BlockMixture, Blocks
from discdiff.losses import base as losses
from discdiff.process import grid

# --- what is called -------------------------------------------------------------------------------------------------

MASKED, UNIFORM = dd.Masked(3, dd.Linear()), dd.Uniform(3, dd.Linear())
LATE = dd.Uniform(3, dd.LogLinear())
ZEROS = torch.zeros(2, 3, dtype=torch.int64)
WORLD = T.Enumeration(torch.full((9,), 1 / 9), vocab_size=3, length=2)
PAIR = WORLD.denoiser(UNIFORM, predicts="loo")
HIDDEN = WORLD.denoiser(MASKED)
CHAIN = T.MarkovChain(torch.ones(3) / 3, torch.ones(3, 3) / 3, length=3)
CLOCKS = dd.PerSite(dd.Linear(), torch.zeros(4))
LOGITS = torch.zeros(4, 3)
FLIP = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])
ROWS = torch.arange(4)


def model(process: dd.Process = UNIFORM, value: float = 0.0, width: int = 3, predicts: str = "loo") -> dd.Denoiser:
    """A denoiser whose logits are all the same."""
    return dd.Denoiser(lambda x, t: torch.full((*x.shape, width), value), process, predicts)  # type: ignore[arg-type]


PLAIN, OF_MASKS = model(), model(MASKED, predicts="denoiser")


def sampler(of: dd.Denoiser = PLAIN, operator: dd.Operator | None = None, steps: int = 2) -> dd.Sampler:
    """A short run."""
    return dd.Sampler(of.process, of, operator or S.Ancestral(), steps=steps)


def blockwise(**options: object) -> dd.Blockwise:
    """A short run in blocks."""
    return dd.Blockwise(MASKED, OF_MASKS, S.Ancestral(), **{"block": 2, "steps": 2, **options})  # type: ignore[arg-type]


def cascade() -> dd.Cascade:
    """Two short runs."""
    second = dd.Denoiser(lambda x, t, y: torch.zeros(*x.shape, 3), MASKED, "denoiser")  # type: ignore[arg-type]
    return dd.Cascade(sampler(OF_MASKS), sampler(second))


def drawn(**options: object) -> torch.Tensor:
    """A draw of four rows."""
    told = {"logits": LOGITS, "seed": 0, "rows": ROWS, "positions": ROWS, **options}
    return kernels.draw(told.pop("logits"), **told)  # type: ignore[arg-type]


# --- numbers ----------------------------------------------------------------------------------------------------------

NO_WHOLE: dict[str, object] = {
    "True": True, "1.5": 1.5, "2.0": 2.0, "nan": math.nan, "'3'": "3", "None in a list": [None], "-1": -1,
    "numpy float": np.float64(2.0), "numpy bool": np.bool_(True), "torch float": torch.tensor(2.0),
    "torch bool": torch.tensor(True), "two of them": torch.tensor([1, 2]),
}  # fmt: skip

WHOLE: dict[str, tuple[Callable[..., object], str]] = {
    "Uniform: vocab_size": (lambda n: dd.Uniform(n, dd.Linear()), "vocab_size"),
    "Masked: vocab_size": (lambda n: dd.Masked(n, dd.Linear()), "vocab_size"),
    "Masked: mask_id": (lambda n: dd.Masked(3, dd.Linear(), mask_id=n), "mask_id"),
    "Hybrid: vocab_size": (lambda n: dd.Hybrid(n, dd.Linear()), "vocab_size"),
    "Ordinal: vocab_size": (lambda n: dd.Ordinal(n, dd.Linear()), "vocab_size"),
    "Ordinal.gaussian: vocab_size": (lambda n: dd.Ordinal.gaussian(n, dd.Linear(), 1.0), "vocab_size"),
    "Interpolant: vocab_size": (lambda n: dd.Interpolant(n, dd.Linear()), "vocab_size"),
    "AbsorbingUniform: vocab_size": (lambda n: dd.AbsorbingUniform(n, dd.Linear()), "vocab_size"),
    "General: mask_id": (lambda n: dd.General([[-1.0, 1.0], [0.0, 0.0]], dd.Linear(), mask_id=n), "mask_id"),
    "TimeVarying: pieces": (lambda n: dd.TimeVarying(lambda t: FLIP, dd.LogLinear(), n), "pieces"),
    "Denoiser: length": (lambda n: dd.Denoiser(lambda x, t: x, UNIFORM, "loo", length=n), "length"),
    "Denoiser: suppress": (lambda n: dd.Denoiser(lambda x, t: x, UNIFORM, "loo", suppress=[n]), "suppress"),
    "Sampler: steps": (lambda n: dd.Sampler(UNIFORM, PLAIN, S.Ancestral(), steps=n), "steps"),
    "sample: batch": (lambda n: sampler().sample(n, 3, seed=0), "batch"),
    "sample: length": (lambda n: sampler().sample(2, n, seed=0), "length"),
    "sample: seed": (lambda n: sampler().sample(2, 3, seed=n), "seed"),
    "sample: first_row": (lambda n: sampler().sample(2, 3, seed=0, first_row=n), "row"),
    "predictor_corrector: nfe": (
        lambda n: dd.predictor_corrector(UNIFORM, PLAIN, S.Ancestral(), S.Gibbs(), nfe=n), "nfe",
    ),
    "predictor_corrector: repeats": (
        lambda n: dd.predictor_corrector(UNIFORM, PLAIN, S.Ancestral(), S.Gibbs(), nfe=8, repeats=n), "repeats",
    ),
    "Blockwise: block": (lambda n: blockwise(block=n), "block"),
    "Blockwise: one of several blocks": (lambda n: blockwise(block=[2, n]), "block"),
    "Blockwise: window": (lambda n: blockwise(window=n, block=1), "window"),
    "Blockwise: steps": (lambda n: blockwise(steps=n), "steps"),
    "Blockwise.sample: batch": (lambda n: blockwise().sample(n, 3, seed=0), "batch"),
    "Blockwise.sample: length": (lambda n: blockwise().sample(2, n, seed=0), "length"),
    "Blockwise.sample: seed": (lambda n: blockwise().sample(2, 3, seed=n), "seed"),
    "Blockwise.sample: first_row": (lambda n: blockwise().sample(2, 3, seed=0, first_row=n), "row"),
    "Blockwise.sample: stop": (lambda n: blockwise().sample(2, 3, seed=0, stop=[n]), "stop"),
    "Cascade.sample: batch": (lambda n: cascade().sample(n, (2, 2), seed=0), "batch"),
    "Cascade.sample: lengths": (lambda n: cascade().sample(2, (2, n), seed=0), "length"),
    "Cascade.sample: seed": (lambda n: cascade().sample(2, (2, 2), seed=n), "seed"),
    "generate: max_new_tokens": (lambda n: dd.generate(OF_MASKS, ZEROS, max_new_tokens=n, seed=0), "max_new_tokens"),
    "generate: steps": (lambda n: dd.generate(OF_MASKS, ZEROS, max_new_tokens=2, steps=n, seed=0), "steps"),
    "generate: block_length": (
        lambda n: dd.generate(OF_MASKS, ZEROS, max_new_tokens=2, block_length=n, seed=0), "block_length",
    ),
    "generate: eos_token_id": (
        lambda n: dd.generate(OF_MASKS, ZEROS, max_new_tokens=2, eos_token_id=[n], seed=0), "eos_token_id",
    ),
    "generate: pad_token_id": (
        lambda n: dd.generate(OF_MASKS, ZEROS, max_new_tokens=2, pad_token_id=n, seed=0), "pad_token_id",
    ),
    "generate: seed": (lambda n: dd.generate(OF_MASKS, ZEROS, max_new_tokens=2, seed=n), "seed"),
    "** n": (lambda n: S.Gibbs() ** n, r"\*\*"),
    "Gibbs: sites": (lambda n: S.Gibbs(sites=n), "sites"),
    "InformedGibbs: sites": (lambda n: S.InformedGibbs(sites=n), "sites"),
    "ForwardBackward: sites": (lambda n: S.ForwardBackward(sites=n), "sites"),
    "EntropyRedraw: sites": (lambda n: S.EntropyRedraw(sites=n), "sites"),
    "Remask: sites": (lambda n: S.Remask(sites=n), "sites"),
    "RePaint: steps": (lambda n: S.RePaint(steps=n), "steps"),
    "Unmask: block": (lambda n: S.Unmask(block=n), "block"),
    "AnyOrder: block": (lambda n: S.AnyOrder(block=n), "block"),
    "ARPC.scheduled: steps": (lambda n: S.ARPC().scheduled(n), "steps"),
    "ARPC.scheduled: warmup": (lambda n: S.ARPC().scheduled(4, warmup=n), "warmup"),
    "ARPC.scheduled: period": (lambda n: S.ARPC().scheduled(4, period=n), "period"),
    "Forbid: tokens": (lambda n: dd.Forbid([n]), "tokens"),
    "Truncation: top_k": (lambda n: dd.Truncation(top_k=n), "top_k"),
    "DiscreteBound: steps": (lambda n: losses.DiscreteBound(n), "steps"),
    "Blocks: block": (lambda n: Blocks(losses.MaskedNELBO(), n), "block"),
    "BlockMixture: block": (lambda n: BlockMixture(losses.MaskedNELBO(), {n: 1.0}), "block"),
    "estimate: draws": (lambda n: losses.MaskedNELBO().estimate(OF_MASKS, ZEROS, n, 0), "draws"),
    "estimate: seed": (lambda n: losses.MaskedNELBO().estimate(OF_MASKS, ZEROS, 2, n), "seed"),
    "grid.by_time: steps": (lambda n: grid.by_time(n), "steps"),
    "grid.by_alpha: steps": (lambda n: grid.by_alpha(dd.Linear(), n), "steps"),
    "kernels.draw: seed": (lambda n: drawn(seed=n), "seed"),
    "kernels.draw: step": (lambda n: drawn(step=n), "step"),
    "kernels.draw: tag": (lambda n: drawn(tag=n), "tag"),
    "kernels.race: first_column": (
        lambda n: kernels.race(LOGITS, seed=0, rows=ROWS, positions=ROWS, first_column=n), "first_column",
    ),
    "kernels.threshold: top_k": (lambda n: kernels.threshold(LOGITS, top_k=n), "top_k"),
    "probe: seed": (lambda n: dd.probe(PLAIN, ZEROS, seed=n), "seed"),
    "quantize: levels": (
        lambda n: dd.quantize(dd.Denoiser(torch.nn.Linear(2, 2), UNIFORM, "loo"), levels=n), "levels",
    ),
    "marginal: seed": (lambda n: OF_MASKS.marginal(torch.tensor([True, False]), n), "seed"),
    "loo_sensitivity: seed": (lambda n: dd.diagnostics.loo_sensitivity(PLAIN, ZEROS, 0.5, n), "seed"),
    "cycle_residual: seed": (lambda n: dd.diagnostics.cycle_residual(PLAIN, ZEROS, 0.5, n), "seed"),
    "T.Enumeration: vocab_size": (lambda n: T.Enumeration(torch.ones(9) / 9, vocab_size=n, length=2), "vocab_size"),
    "T.Enumeration: length": (lambda n: T.Enumeration(torch.ones(9) / 9, vocab_size=3, length=n), "length"),
    "T.MarkovChain: length": (lambda n: T.MarkovChain(torch.ones(2) / 2, torch.ones(2, 2) / 2, length=n), "length"),
    "T.Tree: parents": (lambda n: T.Tree([-1, n, 0], torch.ones(2) / 2, torch.ones(2, 2) / 2), "parent"),
    "Oracle.sample: batch": (lambda n: CHAIN.sample(n, seed=0), "batch"),
    "Oracle.sample: seed": (lambda n: CHAIN.sample(2, seed=n), "seed"),
    "Oracle.posterior: seed": (lambda n: CHAIN.posterior(UNIFORM, ZEROS, 0.5, n), "seed"),
    "T.kernel: length": (lambda n: T.kernel(S.Gibbs(), UNIFORM, PLAIN, 0.5, length=n), "length"),
    "T.kernel: most": (lambda n: T.kernel(S.Gibbs(), UNIFORM, PAIR, 0.5, most=n), "most"),
    "T.law: length": (lambda n: T.law(sampler(), length=n), "length"),
    "T.order: steps": (lambda n: T.order([n, 4, 8], lambda k: sampler(PAIR, steps=4)), "steps"),
    "T.reverse_law: length": (lambda n: T.reverse_law(PLAIN, n), "length"),
    "T.model_generator: length": (lambda n: T.model_generator(PLAIN, 0.5, n), "length"),
    "joint_generator: length": (lambda n: T.reversal.joint_generator(UNIFORM, n, 0.5), "length"),
    "T.fit.energy_test: permutations": (lambda n: T.fit.energy_test(ZEROS, ZEROS, n), "permutations"),
    "prior: batch": (lambda n: UNIFORM.prior(n, 3), "batch"),
    "prior: length": (lambda n: MASKED.prior(2, n), "length"),
}  # fmt: skip

# A whole number that is right, where 2 is not.
RIGHT = {"kernels.race: first_column": 1024, "predictor_corrector: nfe": 8, "T.Enumeration: vocab_size": 3,
         "General: mask_id": 1, "Masked: mask_id": 3, "T.Tree: parents": 0, "T.order: steps": 2,
         "quantize: levels": None, "estimate: draws": 3,
         "T.reverse_law: length": None, "T.kernel: most": 1000}  # fmt: skip

NO_REAL: dict[str, object] = {
    "True": True, "nan": math.nan, "inf": math.inf, "'0.5'": "0.5", "-1.0": -1.0, "a list": [0.5],
    "torch bool": torch.tensor(True), "two of them": torch.tensor([0.5, 0.6]), "None in a list": [None],
    "complex": 1j, "torch nan": torch.tensor(math.nan), "numpy inf": np.float32(math.inf),
}  # fmt: skip

REAL: dict[str, tuple[Callable[..., object], str]] = {
    "LogLinear: eps": (lambda v: dd.LogLinear(v), "eps"),
    "Polynomial: k": (lambda v: dd.Polynomial(v), "k"),
    "Geometric: smin": (lambda v: dd.Geometric(v, 20.0), "smin"),
    "Geometric: smax": (lambda v: dd.Geometric(1e-3, v), "smax"),
    "Sigmoid: k": (lambda v: dd.Sigmoid(v), "k"),
    "alpha(t)": (lambda v: dd.Linear().alpha(v), "time t"),
    "time(alpha)": (lambda v: dd.Linear().time(v), "alpha"),
    "Hybrid: p_uniform": (lambda v: dd.Hybrid(3, dd.Linear(), v), "p_uniform"),
    "Interpolant: p_uniform": (lambda v: dd.Interpolant(3, dd.Linear(), p_uniform=v), "p_uniform"),
    "Ordinal.gaussian: std": (lambda v: dd.Ordinal.gaussian(4, dd.Linear(), v), "std"),
    "marginal: t": (lambda v: UNIFORM.marginal(ZEROS, v), "time t|t must"),
    "bridge: t": (lambda v: UNIFORM.bridge(ZEROS, ZEROS, v, 0.1), "time t|t = "),
    "process.kernel: t": (lambda v: UNIFORM.kernel(v), "t must"),
    "process.kernel: s": (lambda v: UNIFORM.kernel(1.0, v), "s must"),
    "rate: t": (lambda v: LATE.rate(v), "t must"),
    "Denoiser call: t": (lambda v: PLAIN(ZEROS, v), "time t"),
    "grid: a time": (lambda v: dd.Sampler(UNIFORM, PLAIN, S.Ancestral(), grid=[1.0, v, 0.0]), "time"),
    "grid.by_time: start": (lambda v: grid.by_time(4, start=v), "start"),
    "grid.by_log_noise: last": (lambda v: grid.by_log_noise(dd.Linear(), 4, last=v), "last"),
    "mix: weight": (lambda v: dd.mix({S.Gibbs(): v, S.Gibbs(2): 0.5}), "weight"),
    "Blockwise: weight": (lambda v: blockwise(block={1: v, 2: 0.5}), "weight"),
    "BlockMixture: weight": (lambda v: BlockMixture(losses.MaskedNELBO(), {1: v, 2: 0.5}), "weight"),
    "Adaptive: tolerance": (lambda v: S.Adaptive(tolerance=v), "tolerance"),
    "Adaptive: first": (lambda v: S.Adaptive(first=v), "first"),
    "ARPC: temperature": (lambda v: S.ARPC(temperature=v), "temperature"),
    "EntropyRedraw: budget": (lambda v: S.EntropyRedraw(v), "budget"),
    "DFM: eta": (lambda v: S.DFM(v), "eta"),
    "EntropyBounded: gamma": (lambda v: S.EntropyBounded(v), "gamma"),
    "ForwardBackward: u": (lambda v: S.ForwardBackward(v), "u must"),
    "TauForwardBackward: h": (lambda v: S.TauForwardBackward(v), "h must"),
    "RePaint: u": (lambda v: S.RePaint(v), "u must"),
    "InformedGibbs: temperature": (lambda v: S.InformedGibbs(temperature=v), "temperature"),
    "KLStable: threshold": (lambda v: S.KLStable(threshold=v), "threshold"),
    "KLStable: kl": (lambda v: S.KLStable(kl=v), "kl"),
    "TauLocallyBalanced: h": (lambda v: S.TauLocallyBalanced(v), "h must"),
    "P2: eta": (lambda v: S.P2(v), "eta"),
    "ReMDM: eta": (lambda v: S.ReMDM(v), "eta"),
    "ReMDM: eta of a rate": (lambda v: S.ReMDM(v, "rate"), "eta"),
    "Remask: sigma": (lambda v: S.Remask(v), "sigma"),
    "ThetaTrapezoidal: theta": (lambda v: S.ThetaTrapezoidal(v), "theta"),
    "ThetaRK2: theta": (lambda v: S.ThetaRK2(v), "theta"),
    "Threshold: threshold": (lambda v: S.Threshold(v), "threshold"),
    "Uniformization: bound": (lambda v: S.Uniformization(v), "bound"),
    "Unmask: noise": (lambda v: S.Unmask(noise=v), "noise"),
    "before: t": (dd.before, "before: t"),
    "after: t": (dd.after, "after: t"),
    "between: s": (lambda v: dd.between(v, 9.0), "between: s"),
    "between: t": (lambda v: dd.between(-9.0, v), "between: t"),
    "ClassifierFree: scale": (lambda v: dd.ClassifierFree("u", v), "scale"),
    "Denoiser: cost": (lambda v: dd.Denoiser(lambda x, t: x, UNIFORM, "loo", cost=v), "cost"),
    "Plan: the time": (lambda v: dd.Plan([v], [dd.Step(S.Gibbs())]), "Plan: grid"),
    "Plan: a time": (lambda v: dd.Plan([v, 0.0], [dd.Step(S.Ancestral())]), "Plan: grid"),
    "Truncation: temperature": (lambda v: dd.Truncation(temperature=v), "temperature"),
    "Truncation: top_p": (lambda v: dd.Truncation(top_p=v), "top_p"),
    "Truncation: min_p": (lambda v: dd.Truncation(min_p=v), "min_p"),
    "bridge.ReMDM: sigma": (lambda v: dd.bridge.ReMDM(v), "sigma"),
    "kernels.threshold: top_p": (lambda v: kernels.threshold(LOGITS, top_p=v), "top_p"),
    "T.kernel: t": (lambda v: T.kernel(S.Gibbs(), UNIFORM, PAIR, v), r"\bt\b"),
    "T.kernel: s": (lambda v: T.kernel(S.Ancestral(), UNIFORM, PAIR, 0.5, v), r"\bs\b"),
    "T.reverse_law: tolerance": (lambda v: T.reverse_law(PAIR, tolerance=v), "tolerance"),
    "T.fit.holds: rate": (lambda v: T.fit.holds(lambda seed: 1.0, v), "rate"),
    "joint_generator: alpha": (lambda v: T.reversal.joint_generator(UNIFORM, 2, v), "alpha"),
    "Enumeration.marginal: t": (lambda v: WORLD.marginal(UNIFORM, v), r"\bt\b"),
    "Enumeration.reachable: t": (lambda v: WORLD.reachable(UNIFORM, v), r"\bt\b"),
    "log_marginal: t": (lambda v: CHAIN.log_marginal(UNIFORM, ZEROS, v), r"\bt\b"),
    "posterior: t": (lambda v: CHAIN.posterior(UNIFORM, ZEROS, v, 0), r"\bt\b"),
    "loo_sensitivity: t": (lambda v: dd.diagnostics.loo_sensitivity(PLAIN, ZEROS, v), r"\bt\b"),
    "sensitivity_curve: alphas": (lambda v: dd.diagnostics.sensitivity_curve(PLAIN, ZEROS, [v]), "alpha"),
}
