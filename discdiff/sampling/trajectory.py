r"""Weigh a recorded run anew under any weights, and fork it.

A run is a function of its choices, so the recorded values make it again. No draw is needed and no handler of Pyro's:

    log p(run) = sum_k log p(choices of step k | state before step k)

For gradients each step is checkpointed: its forward pass is made again when the backward pass gets there, so memory
holds one step at a time. A step needs the state before it, which is (B, L) whole numbers. If an operator remembers a
prediction of the step before, the network is called again for it, and the logits are not stored.

Reference: trading computation for memory, Chen et al. (2016, https://arxiv.org/abs/1604.06174).
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from discdiff.checks import affordable, decided, seeded, shown, whole
from discdiff.choices import Choice, Choices, narrowest, step_of
from discdiff.denoiser import Denoiser
from discdiff.operator import Asked, Calls, Run, State, choose, loaded, of_run, unloaded, watched
from discdiff.sampling.planned import named_models
from discdiff.sampling.samples import Samples

if TYPE_CHECKING:
    from discdiff.sampling.sampler import Sampler

__all__ = ["Keeps", "fork", "keeps", "kept", "log_prob", "resumed", "times_of"]

Keeps = bool | Literal["choices"]


# --- recording --------------------------------------------------------------------------------------------------------


def keeps(record: object) -> Keeps:
    """Return the argument ``record`` of ``sample`` if it is accepted.

    Raises:
        TypeError, ValueError: for anything but True, False and "choices".
    """
    if record == "view":
        raise ValueError('sample: record="view" is reserved for the viewer, which is not built yet; give "choices"')
    if not (isinstance(record, bool) or record == "choices"):
        raise TypeError(f'sample: record must be True, False or "choices", got {shown(record)}')
    return record


def resumed(run: Run, record: Keeps, listen: bool) -> Run:
    """Return a copy of a run that goes on, which records what ``record`` says.

    Raises:
        ValueError: if it shall record what it has not recorded from its first step on.
    """
    if record == "choices" and run.choices is None:
        raise ValueError('sample: the choices of the run to resume were not kept; give record="choices" from its first '
                         "step on")  # fmt: skip
    run = replace(run.copy(), listen=listen)
    run.log_prob = run.log_prob if record else None
    run.choices = run.choices if record == "choices" else None
    return run


def times_of(sampler: "Sampler") -> tuple[float, ...]:
    """Return the time at which a sampler begins, and the end time of each step."""
    return sampler.grid[0], *(s for _, _, s in sampler.intervals())


def kept(sampler: "Sampler", run: Run, state: State) -> Choices | None:
    """Return the choices of a run up to a state, or None if they were not recorded."""
    return None if run.choices is None else run.choices.until(times_of(sampler)[: state.step + 1])


# --- the same run again -----------------------------------------------------------------------------------------------


class _Answers:
    """Gives recorded values to the choices of one step and adds their log-probabilities to ``total``, (B,) float64."""

    def __init__(self, choices: Choices, sites: Iterable[str], total: Tensor, where: str) -> None:
        self.choices, self.left, self.total, self.where = choices, set(sites), total, where

    def __call__(self, site: str, law: Choice, ids: Int[Tensor, " R"], scored: bool) -> Tensor:
        index, kind = ids - self.choices.first_row, law.kind
        if site not in self.left:
            raise ValueError(f"{self.where}: site {site} has no recorded value, for row {_first(ids)}{_OTHER}")
        self.left.discard(site)
        value, rows = self.choices[site], self.choices.rows(site)
        if not torch.equal(rows, index):
            place = torch.full_like(self.total, -1, dtype=torch.int64)
            place[rows] = torch.arange(len(rows), device=rows.device)
            where = place[index]
            self._refuse(where < 0, ids, site, "has no recorded value")
            spare = torch.ones_like(rows, dtype=torch.bool).index_fill(0, where, False)
            self._refuse(spare, rows + self.choices.first_row, site, "has a recorded value and makes no such choice")
            value = value[where]
        if value.shape != law.shape() or value.dtype != kind:
            raise ValueError(
                f"{self.where}: site {site} takes {kind} of shape {tuple(law.shape())}, rows and event, and the "
                f"recorded value is {value.dtype} of {tuple(value.shape)}{_OTHER}"
            )
        log_p = law.log_prob(value).double()
        self._refuse(~(log_p > -torch.inf), ids, site, "has a recorded value that is impossible under this model")
        if scored:
            self.total = self.total.index_add(0, index, log_p)
        return value

    def _refuse(self, wrong: Tensor, ids: Tensor, site: str, what: str) -> None:
        if bool(wrong.any()):
            raise ValueError(f"{self.where}: row {_first(ids[wrong])} {what} at site {site}{_OTHER}")

    def finish(self) -> Float[Tensor, " B"]:
        """Return the total; raise ValueError if a recorded choice was not made."""
        if self.left:
            site = min(self.left)
            row = _first(self.choices.rows(site) + self.choices.first_row)
            raise ValueError(
                f"{self.where}: site {site} was recorded, for row {row}, and the run makes no such choice{_OTHER}"
            )
        return self.total


def _first(ids: Tensor) -> str:
    """Return the first of some row ids, for an error."""
    return ", ".join(map(str, ids[:1].tolist())) or "none"


_OTHER = "; the choices are those of another sampler or model, or were edited"


class _Replay:
    """A run made again, step by step, from its choices.

    Args:
        sampler: the sampler of the run, perhaps with other weights than the one that made it.
        choices: its choices.
        device: where to run.
        where: the name of the caller, for errors.
    """

    def __init__(self, sampler: "Sampler", choices: Choices, device: torch.device, where: str) -> None:
        self.sampler, self.choices, self.where = sampler, choices.to(device), where
        self.sites: dict[int, list[str]] = {}
        for site in choices.sites:
            self.sites.setdefault(step_of(site), []).append(site)

    def start(self) -> tuple[Tensor, State]:
        """Return the log-probability (B,) of the draw from the prior, 0 if there was none, and the first state."""
        batch, length = self.choices.start.shape
        none = torch.zeros(batch, dtype=torch.float64, device=self.choices.start.device)
        answers, run = self._run([], 0, none)
        state, at = run.begin(self.choices.start, self.sampler.grid[0], frozen=self.choices.frozen)
        if self.choices.drawn:
            choose("prior", self.sampler.process.prior(batch, length, state.tokens.device), state, at)
        return answers.finish(), state

    def after(self, total: Tensor, state: State, asked: list[Asked | None]) -> tuple[Tensor, State, list[Asked | None]]:
        """Make the next step; the arguments are what the step before returned.

        Returns:
            The log-probability (B,) of all choices so far, the state, and the calls that give the logits of its
            predictions. If gradients are enabled, the predictions in it are without logits.
        """
        made: Calls = []
        answers, run = self._run(made, state.step + 1, total)
        after = next(self.sampler.through(loaded(state, asked, made), run))
        run.check_faults()
        after, asked = unloaded(after, made) if torch.is_grad_enabled() else (after, [])
        return answers.finish(), after, asked

    def compare(self, tokens: Tensor, recorded: Tensor) -> None:
        """Raise ValueError unless the tokens (B, L) are those that the run had here."""
        wrong = (tokens != recorded.to(tokens.device)).any(-1).nonzero()[:, 0]
        if len(wrong):
            raise ValueError(
                f"{self.where}: row {_first(wrong + self.choices.first_row)}: the recorded choices lead to other "
                f"tokens than those of the samples. They were edited, or {self.sampler.operator} decides by the "
                "prediction, without a choice, and decides otherwise here"
            )

    def _run(self, made: Calls, step: int, total: Tensor) -> tuple[_Answers, Run]:
        choices, device = self.choices, self.choices.start.device
        answers = _Answers(choices, self.sites.get(step, ()), total, self.where)
        run = Run.start(self.sampler.model, len(choices.start), 0, first_row=choices.first_row, device=device)
        run = replace(run, given=answers, models=self.sampler.models, within=partial(watched, made=made), _used=None)
        return answers, run


def _choices_of(sampler: "Sampler", out: object, where: str) -> Choices:
    """Return the choices of samples, checked.

    Raises:
        TypeError: if ``out`` is no ``Samples``.
        ValueError: if it holds no choices, or those of another grid or other tokens.
    """
    if not isinstance(out, Samples):
        raise TypeError(f'{where}: takes the Samples of sample(record="choices"), got {shown(out)}')
    choices, times = out.choices, times_of(sampler)
    if choices is None:
        raise ValueError(f'{where}: these samples hold no choices; make them with sample(record="choices")')
    if choices.start.shape != out.tokens.shape or not choices.times:
        raise ValueError(f"{where}: the choices do not go with the tokens of these samples")
    if choices.times != times[: len(choices.times)]:
        raise ValueError(f"{where}: these samples were made at the times {choices.times}, and {sampler} has {times}")
    return choices


def _device(model: Denoiser, out: Samples) -> torch.device:
    """Return where a run is made again: where the model's parameters lie, or else the samples."""
    return out.tokens.device if model.device.type == "cpu" else model.device


def log_prob(
    sampler: "Sampler", out: Samples, model: object, since: SupportsIndex, by_step: bool
) -> Float[Tensor, "B *K"]:
    """Return the log-probability (B,) of a recorded run, or (B, K) by step, as ``Sampler.log_prob`` does.

    A step may use the prediction of the one before it, so the step before the first that counts has a gradient too.

    Raises:
        TypeError, ValueError: as ``Sampler.log_prob``.
    """
    if model is not None:
        models = named_models(sampler.process, model, "log_prob")
        sampler = type(sampler)(sampler.process, models, plan=sampler.plan)
    choices = _choices_of(sampler, out, "log_prob")
    since = whole(since, "log_prob: since", 0, choices.steps - 1)
    by_step, learns = decided(by_step, "log_prob: by_step"), torch.is_grad_enabled()
    replay = _Replay(sampler, choices, _device(sampler.model, out), "log_prob")
    with torch.set_grad_enabled(learns and since == 0):
        total, state = replay.start()
    asked: list[Asked | None] = []
    columns = []
    for made in range(choices.steps):
        if made and (by_step or made == since):
            total = torch.zeros_like(total)
        with torch.set_grad_enabled(learns and made >= since - 1):
            if torch.is_grad_enabled():
                total, state, asked = checkpoint(replay.after, total, state, asked, use_reentrant=False)
            else:
                total, state, asked = replay.after(total, state, asked)
        columns.append(total)
    last = sampler.grid[-1] == 0 and choices.steps == len(times_of(sampler)) - 1
    tokens = sampler.process.column(state.tokens) if last else state.tokens
    replay.compare(tokens, out.tokens)
    return torch.stack(columns[since:], 1) if by_step else total


# --- forks ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fork(sampler: "Sampler", out: Samples, step: object, copies: object, seed: object) -> Samples:
    """Return samples that share the first steps of a recorded run, as ``Sampler.fork`` does.

    Raises:
        TypeError, ValueError: as ``Sampler.fork``.
    """
    model, choices = sampler.model, _choices_of(sampler, out, "fork")
    most = min(choices.steps, len(times_of(sampler)) - 2)
    step, copies = whole(step, "fork: step", 0, most), whole(copies, "fork: copies", 1)
    seed, batch = seeded(seed, "fork: seed"), len(out.tokens) * copies
    affordable(batch * out.tokens.shape[1], f"fork: {copies} copies of {len(out.tokens)} rows")
    if (choices.first_row + len(out.tokens)) * copies > 2**32:
        raise ValueError(
            f"fork: row ids must lie in [0, 2**32); {copies} copies of row {choices.first_row} have others"
        )
    before = choices.until(times_of(sampler)[: step + 1])
    after = before.repeated(copies)
    alone = model.context is None  # a context knows rows by their ids, so there the copies are made again, not the rows
    replay = _Replay(sampler, before if alone else after, _device(model, out), "fork")
    total, state = replay.start()
    path = [state.tokens]
    for _ in range(step):
        total, state, _ = replay.after(total, state, [])
        path.append(state.tokens)
    held = vars(out)["trajectory"]  # of a run that was resumed, its last states
    if held is not None and (place := step - choices.steps - 1) >= -len(held):
        replay.compare(state.tokens, held[place] if alone else held[place].repeat_interleave(copies, 0))
    if alone:
        index = torch.arange(len(total), device=total.device).repeat_interleave(copies)
        total, state, path = total[index], state.select(index), [tokens[index] for tokens in path]
    run = Run.start(model, batch, seed, first_row=after.first_row, device=total.device, record=True)
    run.log_prob, run.choices, run.models = total, after.to(total.device), sampler.models
    found = sampler.sample(resume=replace(of_run(state, run), run=run), record="choices")
    assert found.trajectory is not None
    states = torch.stack([*path[:-1], *found.trajectory]).to(narrowest(0, sampler.process.states - 1))
    result = replace(found, trajectory=states)
    vars(result)["_state"] = found.state
    return result
