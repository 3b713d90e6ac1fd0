"""The loop over a time grid: samplers, block by block, in cascades, and as a Pyro program."""

from discdiff.sampling.as_program import Program, program
from discdiff.sampling.beginning import check_rows
from discdiff.sampling.best_of_n import BestSamples, best_of
from discdiff.sampling.blockwise import BlockSamples, Blockwise
from discdiff.sampling.budget import predictor_corrector
from discdiff.sampling.cascade import Cascade, Stages
from discdiff.sampling.loop import OnStep
from discdiff.sampling.particles import Particles, ParticleSamples
from discdiff.sampling.plan import Plan, Step
from discdiff.sampling.planned import acting, anew, check_model
from discdiff.sampling.sampler import Sampler
from discdiff.sampling.samples import Samples, narrowest
from discdiff.sampling.split_gibbs import SplitGibbs, SplitMoves, SplitSamples
from discdiff.sampling.weighing import Potential, Weighed, Weighing

__all__ = [
    "BestSamples", "BlockSamples", "Blockwise", "Cascade", "OnStep", "ParticleSamples", "Particles", "Plan",
    "Potential", "Program", "Sampler", "Samples", "SplitGibbs", "SplitMoves", "SplitSamples", "Stages", "Step",
    "Weighed", "Weighing", "acting", "anew", "best_of", "check_model", "check_rows", "narrowest", "predictor_corrector",
    "program",
]  # fmt: skip
