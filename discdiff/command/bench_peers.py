"""Steps of packages from the index, from logits to tokens, called as their documentation says.

They must be installed (the ``bench`` extra); ImportError says so where they are not.
"""

import contextlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["block_refinement", "ddim", "euler", "installed"]

_NEEDED = "other packages' steps need them: pip install 'discdiff[bench]'"


def installed() -> bool:
    """Whether both packages are."""
    return all(importlib.util.find_spec(name) is not None for name in ("diffusers", "flow_matching"))


def ddim(logits: Tensor, tokens: Tensor, t: float, s: float) -> Callable[[], Tensor]:
    """A step t -> s of diffusers' ``DiscreteDDIMScheduler`` at temperature 1; t - s divides 1 - t.

    Args:
        logits: (B, L, V).
        tokens: (B, L) states of the uniform process.
        t, s: times of the linear clock, alpha = 1 - t.

    Raises:
        ImportError: without diffusers.
    """
    try:
        from diffusers import DiscreteDDIMScheduler
    except ImportError as error:
        raise ImportError(_NEEDED) from error
    steps = round(1 / (t - s))
    scheduler: Any = DiscreteDDIMScheduler(num_inference_steps=steps)
    return lambda: scheduler.step(logits, round((1 - t) * steps), tokens, temperature=1.0).prev_sample


def euler(logits: Tensor, states: Tensor, t: float, s: float, vocab: int) -> Callable[[], Tensor]:
    """A step t -> s of flow_matching's ``MixtureDiscreteEulerSolver`` on the linear path.

    Args:
        logits: (B, L, V).
        states: (B, L), tokens for a uniform source, or masks among them.
        t, s: times of the linear clock; their time is 1 - t.
        vocab: number of states, V or V + 1.

    Raises:
        ImportError: without flow_matching.
    """
    try:
        from flow_matching.path import MixtureDiscreteProbPath
        from flow_matching.path.scheduler import PolynomialConvexScheduler
        from flow_matching.solver import MixtureDiscreteEulerSolver
    except ImportError as error:
        raise ImportError(_NEEDED) from error

    class Stop(Exception):  # the solver's last step is another one, so the second call of the model ends it
        pass

    given: list[Tensor] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        given.append(x)
        if len(given) == 1:
            return logits.softmax(-1)
        raise Stop

    path = MixtureDiscreteProbPath(PolynomialConvexScheduler(1.0))
    solver: Any = MixtureDiscreteEulerSolver(model, path, vocab)
    times = torch.tensor([1 - t, 1 - s, 1.0])

    def step() -> Tensor:
        given.clear()
        with contextlib.suppress(Stop):
            solver.sample(states, step_size=None, time_grid=times)
        return given[-1]

    return step


def block_refinement(logits: Tensor, z: Tensor, steps: int, sites: int) -> Callable[[], Tensor]:
    """A step of diffusers' ``BlockRefinementScheduler`` on the first ``sites``: the surest draws are kept.

    Args:
        logits: (B, L, V), of which a block of ``sites`` is read.
        z: (B, L) states, V where masked.
        steps: the number of steps in which a block is filled.
        sites: of the block.

    Raises:
        ImportError: without diffusers.
    """
    try:
        from diffusers import BlockRefinementScheduler
    except ImportError as error:
        raise ImportError(_NEEDED) from error
    scheduler: Any = BlockRefinementScheduler(sites, steps)
    scheduler.set_timesteps(steps)
    block, mask = logits[:, :sites].contiguous(), logits.shape[-1]
    state = z[:, :sites].contiguous()
    return lambda: (
        scheduler.step(block, 0, state, mask_token_id=mask, temperature=1.0, sampling_method="multinomial").prev_sample
    )
