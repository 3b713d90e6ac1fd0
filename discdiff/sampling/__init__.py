"""The loop over a time grid: samplers, block by block, in cascades, and as a Pyro program."""

from discdiff.sampling.as_program import Program, program
from discdiff.sampling.beginning import check_rows
from discdiff.sampling.blockwise import BlockSamples, Blockwise
from discdiff.sampling.budget import predictor_corrector
from discdiff.sampling.cascade import Cascade, Stages
from discdiff.sampling.loop import OnStep
from discdiff.sampling.plan import Plan, Step
from discdiff.sampling.planned import acting, anew, check_model
from discdiff.sampling.sampler import Sampler
from discdiff.sampling.samples import Samples, narrowest

__all__ = [
    "BlockSamples", "Blockwise", "Cascade", "OnStep", "Plan", "Program", "Sampler", "Samples", "Stages", "Step",
    "acting", "anew", "check_model", "check_rows", "narrowest", "predictor_corrector", "program",
]  # fmt: skip
