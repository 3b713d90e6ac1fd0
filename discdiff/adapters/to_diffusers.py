"""Run operators as schedulers in the pipelines of diffusers; they draw the same tokens as this package's samplers.

Import this module only where diffusers is installed; nothing else of discdiff needs it.
"""

import ast
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.checks import LAST_SEED, whole
from discdiff.denoiser import Denoiser
from discdiff.kernels import dispatch as kernels
from discdiff.operator import At, Operator, Run, State, choose, stream
from discdiff.prediction import Predicts, Truncation, check_predicts
from discdiff.process import Masked, Process, Schedule, Uniform, grid
from discdiff.process import schedule as schedules
from discdiff.samplers.expression import parse_operator

try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.schedulers.scheduling_utils import SchedulerMixin
    from diffusers.utils.outputs import BaseOutput
except ImportError as _error:
    raise ImportError("an operator as a scheduler needs diffusers: pip install 'discdiff[bench]'") from _error

__all__ = ["OperatorScheduler", "OperatorSchedulerOutput"]


@dataclass
class OperatorSchedulerOutput(BaseOutput):
    """Result of a step, with the fields that diffusers' block pipelines read.

    Attributes:
        prev_sample: (B, L) the next tokens.
        transfer_index: (B, L) True where a mask became a token; on a process without a mask, where a token changed.
        editing_transfer_index: (B, L) True where a token changed or was masked again; on a process without a mask,
            False everywhere.
        sampled_tokens: (B, L) the same as ``prev_sample``.
        sampled_probs: (B, L) the softmax of the model's output at these tokens; 0 for a mask.
    """

    prev_sample: Int[Tensor, "B L"]
    transfer_index: Bool[Tensor, "B L"]
    editing_transfer_index: Bool[Tensor, "B L"]
    sampled_tokens: Int[Tensor, "B L"]
    sampled_probs: Float[Tensor, "B L"]


class OperatorScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Scheduler of diffusers (``set_timesteps``, ``step``, ``add_noise``) whose step is an operator.

    Randomness is keyed by (seed, row, step, site). So a run gives the tokens of ``dd.Sampler(...).sample(seed=seed)``;
    a run in blocks gives those of ``dd.Blockwise``. If a generator is passed to the first step of a run, the generator
    draws the seed of the run. Options of other schedulers that would overrule the operator are refused.

    Shapes: tokens are (B, L), or (B, n) in a block. Model outputs are (B, L, C), for C columns. Timesteps and flags of
    rows are (B,).

    Args:
        operator: an expression such as "ancestral" or "remdm(eta=0.2)"; each step must take one denoiser call.
        process: "masked" or "uniform".
        vocab_size: V, the number of token ids; if the mask id is below V, the mask is one of them.
        mask_token_id: the mask of a masked process; V by default.
        schedule: an expression such as "Linear()" or "LogLinear(eps=0.001)".
        predicts: the meaning of the model's output, as for ``Denoiser``.
        seed: the key of the randomness.
        block_length: the block length; only block pipelines read it.

    Raises:
        ValueError: if a step of the operator does not advance the time or does not take exactly one denoiser call. Also
            if an argument is not accepted.
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
        vocab_size = whole(vocab_size, "OperatorScheduler: vocab_size", 1)
        seed = whole(seed, "OperatorScheduler: seed", 0, LAST_SEED)
        whole(block_length, "OperatorScheduler: block_length", 1)
        self.operator: Operator = parse_operator(operator, "OperatorScheduler")
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
        self.timesteps: Tensor = torch.zeros(0, dtype=torch.int64)
        self._grid: tuple[float, ...] = ()
        self._begin()

    def _begin(self) -> None:
        """Forget the previous run."""
        self._block, self._uncounted = -1, 0  # uncounted: steps of a block that a pipeline did not count
        self._run_seed: int | None = None

    def set_timesteps(
        self, num_inference_steps: int, device: torch.device | str | None = None, block_length: int | None = None
    ) -> None:
        """Set equal steps of t from 1 to 0 and start a new run.

        The timesteps are the numbers of the steps: 0, 1, ...

        Raises:
            TypeError, ValueError: if a number is not whole, or is below 1.
        """
        steps = whole(num_inference_steps, "set_timesteps: num_inference_steps", 1)
        if block_length is not None:
            whole(block_length, "set_timesteps: block_length", 1)
        self._grid = grid.by_time(steps)
        self.timesteps = torch.arange(steps, device=device)
        self._begin()

    def prior(self, batch: int, length: int) -> Int[Tensor, "B L"]:
        """Return the initial noise (B, L) of a run of ``dd.Sampler`` with this seed; all masks on a masked process.

        Raises:
            ValueError: if ``set_timesteps`` was not called before.
        """
        if not self._grid:
            raise ValueError("prior: call set_timesteps first")
        state, at = self._place(torch.zeros(batch, length, dtype=torch.int64), 0, None, None, -1)
        return choose("prior", self.process.prior(batch, length), state, at)

    def scale_model_input(self, sample: Int[Tensor, "B L"], timestep: int | None = None) -> Int[Tensor, "B L"]:
        """Return the sample (B, L) unchanged, as tokens have no scale."""
        return sample

    @torch.no_grad()
    def step(
        self,
        model_output: Float[Tensor, "B L C"],
        timestep: int | Tensor,
        sample: Int[Tensor, "B L"],
        *,
        mask_token_id: int | None = None,
        temperature: float = 1.0,
        top_p: float | None = None,
        top_k: int | None = None,
        sampling_method: str = "multinomial",
        threshold: float | None = None,
        editing_threshold: float | None = None,
        minimal_topk: int | None = None,
        prompt_mask: Bool[Tensor, " L"] | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> OperatorSchedulerOutput | tuple[Tensor]:
        """Make one step of the operator.

        Args:
            model_output: (B, L, C) logits, or log ratios, of the model at ``sample``.
            timestep: the number of the step, from 0. If step 0 comes again in a run, it begins the next block.
            sample: (B, L) tokens.
            mask_token_id: the pipeline's mask id; it must be that of the process.
            temperature, top_k, top_p: truncation of the prediction, as in ``dd.Truncation``; temperature 0 takes the
                most probable token.
            sampling_method: "multinomial" or "auto" to draw tokens; "greedy" for temperature 0.
            threshold, editing_threshold, minimal_topk: refused, except for the pipelines' defaults (.7, .5 and 1), as
                the operator decides what is revealed or edited.
            prompt_mask: (L,) True at given sites.
            generator: draws the seed of the run in its first step; None to use the configured seed.
            return_dict: whether to return an object rather than a tuple.

        Raises:
            TypeError, ValueError: if ``set_timesteps`` was not called, or the timestep is not one of its steps. Also
                if a token is not a state of the process, ``mask_token_id`` is not the process's mask, or an option
                is invalid or would overrule the operator.
        """
        number = whole(timestep, "step: timestep") + self._uncounted
        if not 0 <= number < len(self._grid) - 1:
            raise ValueError(f"step: timestep {number} is not in 0..{len(self._grid) - 2}; call set_timesteps first")
        self.process.check_states(sample, "sample")
        if mask_token_id is not None and mask_token_id != self.process.mask_id:
            raise ValueError(
                f"step: mask_token_id = {mask_token_id}, but the mask of {self.process} is {self.process.mask_id}"
            )
        _refuse_others(threshold, editing_threshold, minimal_topk)
        if sampling_method not in ("auto", "greedy", "multinomial"):
            accepted = "'auto', 'greedy' or 'multinomial'"
            raise ValueError(f"step: sampling_method must be {accepted}, got {sampling_method!r}")

        cut = Truncation(0.0 if sampling_method == "greedy" else temperature, top_k, top_p)
        self._block += number == 0
        self._seeded(generator, number)
        frozen = None if prompt_mask is None else prompt_mask.expand(sample.shape)
        state, at = self._place(sample, number + 1, frozen, model_output, max(self._block, 0), cut)
        tokens = self.operator(state, at).tokens
        if at.s == 0:
            at.run.finish(tokens, self.operator)
        else:
            at.run.check_faults()
        if not return_dict:
            return (tokens,)
        changed, filled = tokens != sample, torch.ones_like(tokens, dtype=torch.bool)
        if self.process.mask_id is not None:
            filled = sample == self.process.mask_id
        rows = model_output.flatten(0, 1)[:, : self._kept]
        said = kernels.log_prob(rows, tokens.flatten()).exp().view(tokens.shape)
        return OperatorSchedulerOutput(tokens, changed & filled, changed & ~filled, tokens, said)

    def _seeded(self, generator: torch.Generator | None, number: int) -> None:
        """Draw the seed of the run from the generator, if there is one, in the first step of the run."""
        if generator is None or self._run_seed is not None:
            return
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"step: generator must be one torch.Generator, got {type(generator).__name__}")
        if number or self._block > 0:
            raise ValueError("step: a generator draws the seed of a run; it must be given from the first step on")

        self._run_seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))

    def add_noise(
        self, original_samples: Int[Tensor, "B L"], noise: Tensor | None, timesteps: Int[Tensor, " B"]
    ) -> Int[Tensor, "B L"]:
        """Draw noised tokens from q_t(. | x0), with t the time at which step number ``timesteps`` begins.

        Raises:
            ValueError: if ``noise`` is not None, as the process draws its own, or if timesteps are unknown.
        """
        if noise is not None:
            raise ValueError("add_noise: the process draws its noise; noise must be None")
        if not self._grid or bool(((timesteps < 0) | (timesteps >= len(self._grid))).any()):
            raise ValueError(f"add_noise: timesteps must lie in 0..{len(self._grid) - 1}; call set_timesteps first")
        t = torch.tensor(self._grid, dtype=torch.float64)[timesteps.cpu()]
        return self.process.marginal(original_samples, t).sample()

    def check_eos_finished(
        self,
        *,
        cur_x: Int[Tensor, "B L"],
        sampled_tokens: Int[Tensor, "B n"],
        final_transfer: Bool[Tensor, "B n"],
        finished: Bool[Tensor, " B"],
        eos_token_id: int,
        mask_token_id: int,
        prompt_length: int,
    ) -> Bool[Tensor, " B"]:
        """Return True (B,) for rows that have ended: they have an end token after the prompt, with no mask before it.

        Rows that are True in ``finished`` stay True.
        """
        new = cur_x[:, prompt_length:]
        ends = (new == eos_token_id).int()
        known = (new != mask_token_id).int().cumprod(-1).bool()
        return finished | (known & (ends == 1)).any(-1)

    def check_block_should_continue(
        self,
        *,
        step_idx: int,
        masks_remaining: Tensor | bool,
        editing_enabled: bool,
        editing_transfer_index: Bool[Tensor, "B L"],
        post_steps: int,
        max_post_steps: int,
        finished: Bool[Tensor, " B"],
    ) -> bool:
        """Return False if all steps of a block are made or all rows have ended, else True.

        Steps also go on when no mask remains, as an operator may mask revealed tokens again.

        Raises:
            ValueError: if ``max_post_steps`` is not the pipelines' default 16, as nothing is edited after the steps.
        """
        if max_post_steps != 16:
            raise ValueError(f"max_post_steps = {max_post_steps}: nothing is edited after the operator's steps")
        if bool(finished.all()):
            self._uncounted = 0
            return False
        self._uncounted += not bool(masks_remaining)  # a pipeline does not count a step that began without masks
        more = step_idx + self._uncounted < len(self._grid) - 1
        self._uncounted = self._uncounted if more else 0
        return more

    def _place(
        self,
        tokens: Tensor,
        number: int,
        frozen: Tensor | None,
        output: Tensor | None,
        block: int,
        cut: Truncation | None = None,
    ) -> tuple[State, At]:
        """Return the state and its address in a run at the start of step ``number``; steps count from 1 here."""
        handed = [] if output is None else [output]

        def model(x: Tensor, time: Tensor | None) -> Tensor:
            if not handed:
                raise ValueError(f"step: {self.operator} asked for a second call; use dd.Sampler")
            return handed.pop()[..., : self._kept]

        denoiser = Denoiser(model, self.process, self._predicts)
        if cut is not None and cut != Truncation():
            denoiser = denoiser.guided(cut)
        seed = stream(self._seed if self._run_seed is None else self._run_seed, 1, max(block, 0))
        run = Run.start(denoiser, len(tokens), seed, device=tokens.device)
        return run.begin(tokens, self._grid[max(number - 1, 0)], self._grid[number], number, frozen)

    @property
    def _kept(self) -> int:
        """The number of columns that are read of a model's output."""
        return self.process.columns if self._predicts == "ratio" else self.process.vocab_size


def _refuse_others(threshold: float | None, editing_threshold: float | None, minimal_topk: int | None) -> None:
    """Raise ValueError for options that the operator decides, except for the values that pipelines always pass."""
    told = ""
    if threshold not in (None, 0.7):
        told = f"threshold = {threshold}: give operator='threshold({threshold})'"
    elif editing_threshold not in (None, 0.5) and editing_threshold > 0:
        told = f"editing_threshold = {editing_threshold}: give an operator that edits, such as 'remdm' or a corrector"
    elif minimal_topk not in (None, 1):
        told = f"minimal_topk = {minimal_topk}: give fewer steps"
    if told:
        raise ValueError(f"step: what is revealed is the operator's to say, not {told}")


def _schedule(text: str) -> Schedule:
    """Make a schedule from its repr, a name with literal arguments; the text is parsed, not run."""
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
