"""Run guides: their positions in a run, what they may call, and their application to a prediction."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.checks import shown
from discdiff.choices import Key
from discdiff.denoiser import Change, Denoiser, Guide, WhenGuide, acting_at, drawing, frozen_time
from discdiff.operator.run import At, Run, stream
from discdiff.operator.state import State
from discdiff.prediction import Prediction
from discdiff.process import learned

__all__ = ["GuideAt", "guided", "guided_alone"]


@dataclass(frozen=True, kw_only=True)
class GuideAt(At):
    """The position of a guide in a run: that of the operator whose prediction it changes, and what a guide may use.

    Attributes:
        seed: the seed of the guide's own stream of random numbers.
        path: the beginning of the names of its choices as Pyro sites.
        times: (B, L) the times at which the network was called, or None for an autoregressive prediction.
        guide: the guide.
        rows: (R,) ids of the rows of the prediction.
    """

    seed: int
    path: str
    times: Float[Tensor, "#B #L"] | None
    guide: Guide | Change
    rows: Int[Tensor, " R"]

    def ask(
        self,
        model: Denoiser | str,
        state: State,
        time: float | Float[Tensor, "B 1"] | None = None,
        name: str = "",
    ) -> Prediction:
        """Return the prediction of another denoiser at a state, with that denoiser's own guides; the call is counted.

        Args:
            model: one of the denoisers, or of their names, in the guide's ``models``.
            state: the state; its rows may be some of the prediction's, in any order and several times.
            time: the time given to the denoiser, a float or (B, 1); by default that of the main denoiser.
            name: the name of the question, for a guide that asks one denoiser several times; it tells the random
                choices of the denoiser's guides apart.

        Raises:
            ValueError: if the denoiser is not in ``models``, is for another process, or has a name without denoiser; or
                if the state has other rows than the prediction.
        """
        declared = self.guide.models if isinstance(self.guide, Guide) else ()
        if not any(model is one or (isinstance(model, str) and model == one) for one in declared):
            raise ValueError(f"{self.guide}: asks {model!r}, which is not in its models, {list(declared)}")
        counter = self.run.counter(model)
        if counter.denoiser.process != self.process:
            raise ValueError(f"{self.guide}: asks {counter.denoiser}, but the process of the run is {self.process}")
        path = f"{self.path}{list(declared).index(model)}{'.' if name else ''}{name}"
        if self.times is None and time is None:
            said, told = counter.score(state.tokens, state.rows), None
        else:
            if time is not None:
                told = frozen_time(learned(time), state.frozen, state.tokens.device)
            else:
                told = self._times_of(state.rows)
            said = counter(state.tokens, told, state.rows)
        return guided(said, counter.denoiser, state, self, told, path)

    def _times_of(self, rows: Int[Tensor, " R"]) -> Float[Tensor, "#R #L"]:
        """Return the times at which the network was called for rows with these ids."""
        assert self.times is not None
        if len(self.times) == 1 or torch.equal(rows, self.rows):
            return self.times
        known, order = self.rows.sort()
        place = torch.searchsorted(known, rows).clamp(max=len(known) - 1)
        if not torch.equal(known[place], rows):
            other = int(rows[known[place] != rows][0])
            raise ValueError(f"{self.guide}: asks about row {other}, which the prediction does not have")
        return self.times[order[place]]

    def predict(self, state: State, time: float | Tensor | None = None, name: str = "") -> Prediction:
        """Raise TypeError, as a guide that asked for a guided prediction would never end."""
        raise TypeError(f"{self.guide}: a guide is given its prediction; at.ask(model, state) asks another denoiser")

    def reward(
        self, function: Callable[[Tensor], Tensor], x: Int[Tensor, "N L"], rows: Int[Tensor, " N"] | None = None
    ) -> Float[Tensor, " N"]:
        """Return the rewards (N,) float64 of N sequences x (N, L); each counts in ``Samples.rewards``.

        ``rows`` (N,) are the ids of the rows for which the sequences were drawn, for errors.

        Raises:
            ValueError: if ``function`` gives another shape, NaN or +inf; the error names the row.
        """
        return self.run.rewards(function, x, self.guide, rows)

    @property
    def prefix(self) -> Int[Tensor, "R P"]:
        """The clean tokens before the block of each row, (R, P); a row with fewer than P has -1 after them."""
        return self._before[0]

    @property
    def offset(self) -> Int[Tensor, " R"]:
        """The position of the first site of each row's block in the whole sequence; 0 without blocks."""
        return self._before[1]

    @property
    def given(self) -> Int[Tensor, "R W"] | None:
        """The given tokens of the whole sequences of W sites, -1 at other sites, (R, W); None without blocks."""
        if self.run.before is None:
            return None
        return self.run.before[2][torch.searchsorted(self.run.rows, self.rows)]

    def sequence(self, x: Int[Tensor, "R *M n"]) -> Int[Tensor, "R *M W"]:
        """Return whole sequences (R, *M, W): the tokens x (R, *M, n) of each row's block behind its prefix.

        A row with a shorter prefix than the longest has -1 at its end.
        """
        prefix, offset = self._before
        lead, block = x.shape[1:-1], x.shape[-1]
        known = prefix.view(len(x), *[1] * len(lead), -1).expand(-1, *lead, -1)
        whole = torch.cat([known, x.new_full(x.shape, -1)], -1)
        place = offset[:, None] + torch.arange(block, device=x.device)
        return whole.scatter(-1, place.view(len(x), *[1] * len(lead), block).expand(x.shape), x)

    @property
    def _before(self) -> tuple[Int[Tensor, "R P"], Int[Tensor, " R"]]:
        if self.run.before is None:
            return self.rows.new_zeros(len(self.rows), 0), torch.zeros_like(self.rows)
        prefix, offset, _ = self.run.before
        index = torch.searchsorted(self.run.rows, self.rows)
        columns = torch.arange(prefix.shape[1], device=prefix.device)
        return prefix[index].where(columns < offset[index][:, None], -1), offset[index]

    @property
    def scored(self) -> bool:
        return False

    def key(self, name: str, state: State) -> Key:
        """Return the key of the randomness of a choice, in the guide's own stream of random numbers.

        Raises:
            TypeError: if the guide declares that it makes no random choice.
            ValueError: as ``Run.key``.
        """
        if not (isinstance(self.guide, Guide) and self.guide.random):
            raise TypeError(f"{self.guide}: makes the random choice {name!r}; declare random = True in its class")
        return self.run.key(self.path + name, state, self.step, self.slot, self.turn, self.seed)

    def site(self, name: str) -> str:
        return super().site(self.path + name)


def guided(
    said: Prediction, model: Denoiser, state: State, at: At, times: Float[Tensor, "#B #L"] | None, name: str = ""
) -> Prediction:
    """Return the prediction of a denoiser after its guides, in their order.

    Args:
        said: the prediction that the network made.
        model: the denoiser.
        state: the state of R rows at which it was made.
        at: the position of the operator, or of the guide, that needs the prediction.
        times: the times given to the network, broadcastable to (B, L); None for an autoregressive prediction.
        name: the name of the prediction, if it is not the only one in its slot.

    Raises:
        TypeError, ValueError: if a guide returns no prediction of the same tokens, noise and process.
    """
    said.watch = at.watch(state)
    seen = said
    state = replace(state, tokens=state.tokens if times is None else said.x, past=None, seen=None)
    for number, guide in enumerate(model.guides):
        place = GuideAt(
            at.process, at.run, at.t, at.s, at.step, at.slot, at.turn,
            seed=stream(at.seed if isinstance(at, GuideAt) else at.run.seed, 3, number),
            path=f"{name}{'.' if name else ''}guide{number}.", times=times, guide=guide, rows=state.rows,
        )  # fmt: skip
        seen = at.run.guide(guide, seen, state, place)
        if not isinstance(seen, Prediction):
            raise TypeError(f"{guide}: a guide returns a Prediction, got {shown(seen)}")
        pairs = ((seen.x, said.x), (seen.alpha, said.alpha))
        if seen.process != said.process or not all(one is other or torch.equal(one, other) for one, other in pairs):
            raise ValueError(f"{guide}: a guide returns a prediction of the same tokens, alpha and process, got {seen}")
    seen.watch = replace(said.watch, guides=model.guides)
    return seen


def guided_alone(
    model: Denoiser, said: Prediction, x: Int[Tensor, "B L"], times: Float[Tensor, "#B #L"], sequential: bool = False
) -> Prediction:
    """Return the prediction of a denoiser after its guides, outside of a run.

    A ``when`` looks at the largest time of a row.

    Args:
        model: the denoiser.
        said: the prediction that the network made.
        x: (B, L) the noisy tokens, or the clean ones of an autoregressive prediction.
        times: the times of the sites, broadcastable to (B, L).
        sequential: whether the prediction is autoregressive.

    Raises:
        TypeError: for a guide that draws, because a run keys the randomness.
        ValueError: if rows have times at which different guides act.
    """
    random = drawing(model.guides)
    if random is not None:
        raise TypeError(f"{random}: draws, so it takes a run, such as Sampler.sample; model(x, t) has no seed")
    if any(isinstance(guide, WhenGuide) for guide in model.guides):
        acting = {tuple(map(id, acting_at(model.guides, t))): t for t in times.amax(-1).unique().tolist()}
        if len(acting) > 1:
            raise ValueError(
                f"{model}: rows have times at which different guides act, such as {sorted(acting.values())}; call the "
                "model for the rows of each alone"
            )
    state, at = Run.start(model, len(x), 0, device=x.device).begin(x, float(times.max()) if len(times) else 1.0)
    return guided(said, model, state, at, None if sequential else times)
