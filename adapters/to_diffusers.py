"""Any operator of ours as a scheduler of diffusers': it runs in their pipelines, token for token what ours would draw.

Import this module where diffusers is installed; nothing else of discdiff needs it.
"""

import ast
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff import grid
from discdiff import schedule as schedules
from discdiff.denoiser import Counter, Denoiser
from discdiff.expression import parse_operator
from discdiff.handlers import At, Run, stream
from discdiff.prediction import Predicts, check_predicts
from discdiff.process import Process
from discdiff.rank_one import Masked, Uniform
from discdiff.schedule import Schedule
from discdiff.state import State

try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.schedulers.scheduling_utils import SchedulerMixin
    from diffusers.utils.outputs import BaseOutput
except ImportError as error:
    raise ImportError("an operator as a scheduler needs diffusers: pip install 'discdiff[bench]'") from error

__all__ = ["OperatorScheduler", "OperatorSchedulerOutput"]


@dataclass
class OperatorSchedulerOutput(BaseOutput):
    """What a step made of a sample, with what diffusers' block pipelines look at.

    Attributes:
        prev_sample: (B, L) the next tokens.
        transfer_index: (B, L) where they are to be written: everywhere.
        editing_transfer_index: (B, L) nowhere.
        sampled_tokens: (B, L) the same as ``prev_sample``.
        sampled_probs: (B, L) ones.
    """

    prev_sample: Int[Tensor, "B L"]
    transfer_index: Bool[Tensor, "B L"]
    editing_transfer_index: Bool[Tensor, "B L"]
    sampled_tokens: Int[Tensor, "B L"]
    sampled_probs: Float[Tensor, "B L"]


class OperatorScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """An operator, its process and its seed, behind ``set_timesteps``, ``step`` and ``add_noise``.

    Randomness is keyed by (seed, row, step, site) as everywhere here, so that generators given to ``step`` are not
    looked at, and a run gives the tokens of ``dd.Sampler(...).sample(seed=seed)``; block after block those of
    ``dd.Blockwise``.

    Args:
        operator: an expression such as "ancestral" or "remdm(eta=0.2)"; a step must take one denoiser call.
        process: "masked" or "uniform".
        vocab_size: V; with a mask id below it the mask is one of the V.
        mask_token_id: of a masked process; V by default.
        schedule: an expression such as "Linear()" or "LogLinear(eps=0.001)".
        predicts: what the model's output means, as for ``Denoiser``.
        seed: the key of the randomness.
        block_length: what block pipelines take for their own.

    Raises:
        ValueError: for an operator of more than one call a step, or words that are not known.
    """

    order = 1

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        operator: str = "ancestral",
        process: str = "masked",
        vocab_size: int = 2,
        mask_token_id: int | None = None,
        schedule: str = "Linear()",
        predicts: Predicts = "denoiser",
        seed: int = 0,
        block_length: int = 32,
    ) -> None:
        check_predicts(predicts)
        self.operator = parse_operator(operator, "OperatorScheduler")
        if self.operator.nfe != 1 or not self.operator.moves:
            raise ValueError(
                f"OperatorScheduler: step() is handed one model output, and {self.operator} needs {self.operator.nfe} "
                "calls a step; use dd.Sampler, which makes them"
            )
        clock = _schedule(schedule)
        if process not in ("masked", "uniform"):
            raise ValueError(f"OperatorScheduler: process must be 'masked' or 'uniform', got {process!r}")
        self.process: Process = Uniform(vocab_size, clock)
        if process == "masked":
            self.process = Masked(vocab_size, clock, mask_id=vocab_size if mask_token_id is None else mask_token_id)
        self.operator.check(self.process)
        self._predicts, self._seed = predicts, seed
        self.timesteps = torch.zeros(0, dtype=torch.int64)
        self._grid: tuple[float, ...] = ()
        self._block = -1

    def set_timesteps(
        self, num_inference_steps: int, device: torch.device | str | None = None, block_length: int | None = None
    ) -> None:
        """Equal steps of t from 1 to 0; step n is called with timestep n, from 0."""
        self._grid = grid.by_time(num_inference_steps)
        self.timesteps = torch.arange(num_inference_steps, device=device)
        self._block = -1

    def prior(self, batch: int, length: int) -> Int[Tensor, "B L"]:
        """The noise that a run of ``dd.Sampler`` with this seed starts from; a masked one is all masks."""
        from discdiff.handlers import choose

        state, at = self._place(torch.zeros(batch, length, dtype=torch.int64), 0, None, None, -1)
        return choose("prior", self.process.prior(batch, length), state, at)

    def scale_model_input(self, sample: Int[Tensor, "B L"], timestep: int | None = None) -> Int[Tensor, "B L"]:
        """Tokens have no scale."""
        return sample

    @torch.no_grad()
    def step(
        self,
        model_output: Float[Tensor, "B L C"],
        timestep: int | Tensor,
        sample: Int[Tensor, "B L"],
        *,
        prompt_mask: Bool[Tensor, " L"] | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        **others: object,
    ) -> OperatorSchedulerOutput | tuple[Tensor]:
        """One step of the operator.

        Args:
            model_output: logits, or log ratios, of the model at ``sample``.
            timestep: which step, from 0; 0 again is the beginning of the next block.
            sample: (B, L) tokens.
            prompt_mask: (L,) sites that are given.
            generator: not looked at.
            return_dict: whether to return an object rather than a tuple.
            others: options of other schedulers, which a pipeline passes to all; not looked at.

        Raises:
            ValueError: before ``set_timesteps``, for a timestep that it does not have, or tokens out of range.
        """
        number = int(timestep)
        if not 0 <= number < len(self._grid) - 1:
            raise ValueError(f"step: timestep {number} is not in 0..{len(self._grid) - 2}; call set_timesteps first")
        self.process.check_states(sample, "sample")
        self._block += number == 0
        frozen = None if prompt_mask is None else prompt_mask.expand(sample.shape)
        state, at = self._place(sample, number + 1, frozen, model_output, max(self._block, 0))
        tokens = self.operator(state, at).tokens
        if not return_dict:
            return (tokens,)
        everywhere = torch.ones_like(tokens, dtype=torch.bool)
        return OperatorSchedulerOutput(tokens, everywhere, ~everywhere, tokens, torch.ones(tokens.shape))

    def add_noise(
        self, original_samples: Int[Tensor, "B L"], noise: Tensor | None, timesteps: Int[Tensor, " B"]
    ) -> Int[Tensor, "B L"]:
        """A draw of q_t(. | x0), t the time at which step ``timesteps`` begins; ``noise`` is not looked at."""
        t = torch.tensor(self._grid, dtype=torch.float64)[timesteps.cpu()]
        return self.process.marginal(original_samples, t).sample()

    def check_eos_finished(self, *, finished: Tensor, **others: object) -> Tensor:
        """Rows are not stopped here."""
        return finished

    def check_block_should_continue(self, *, step_idx: int, masks_remaining: Tensor | bool, **others: object) -> bool:
        """Until the steps are over, or nothing is masked any more."""
        return step_idx < len(self._grid) - 1 and bool(masks_remaining)

    def _place(
        self, tokens: Tensor, number: int, frozen: Tensor | None, output: Tensor | None, block: int
    ) -> tuple[State, At]:
        """The state, and where in a run it stands: at the start of step ``number``, from 1."""
        handed = [] if output is None else [output]

        def model(x: Tensor, time: Tensor | None) -> Tensor:
            if not handed:
                raise ValueError(f"step: {self.operator} asked for a second call; use dd.Sampler")
            kept = self.process.columns if self._predicts == "ratio" else self.process.vocab_size
            return handed.pop()[..., :kept]

        rows = torch.arange(len(tokens), device=tokens.device)
        counter = Counter(Denoiser(model, self.process, self._predicts), 0, torch.zeros_like(rows))
        t, s = self._grid[max(number - 1, 0)], self._grid[number]
        run = Run(stream(self._seed, 1, max(block, 0)), counter)
        return State(tokens, t, rows, frozen), At(self.process, run, t, s, number)


def _schedule(text: str) -> Schedule:
    """A schedule from its repr: a name and literal arguments, parsed and never evaluated."""
    known = {
        name: getattr(schedules, name)
        for name in ("Linear", "LogLinear", "Cosine", "Polynomial", "Geometric", "Sigmoid")
    }
    try:
        match ast.parse(text, mode="eval").body:
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if name in known:
                named = {keyword.arg or "": ast.literal_eval(keyword.value) for keyword in keywords}
                return known[name](*(ast.literal_eval(arg) for arg in args), **named)
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"OperatorScheduler: cannot read the schedule {text!r}: {error}") from error
    raise ValueError(f"OperatorScheduler: cannot read the schedule {text!r}; accepted: {', '.join(known)}, as Linear()")
