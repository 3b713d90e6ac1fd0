r"""A sampler as a Pyro model: for trace, replay, condition, SVI, importance weights and exact enumeration.

Pyro's parallel enumeration gives a site all its values at once, along an axis of its own to the left of the rows. An
operator handles rows only, so the program runs again whenever a site gets an axis, with a row for every combination of
values:

    shape of the rows   (B,)  ->  (M1, B)  ->  (M2, M1, B)  ->  ...

Sites that have a value already are not sent to Pyro again.

``infer_discrete`` supports scalar values only, so a coded program has scalars: a value v of n positions is the number

    sum_i (v_i + 1) K^(n - 1 - i),        K = max(S, L) + 1      for S states and length L
"""

from collections.abc import Sequence
from typing import Any

import pyro
import torch
from jaxtyping import Int, Shaped
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints

from discdiff.checks import seeded
from discdiff.choices import Choice
from discdiff.operator import alone
from discdiff.sampling.sampler import Sampler

__all__ = ["Program", "program"]


def program(sampler: Sampler, *, coded: bool = False) -> "Program":
    """Make a Pyro model of a sampler.

    Args:
        sampler: the sampler.
        coded: whether sites have the scalar values of ``Program.code``, for ``infer_discrete``. For small programs
            only.

    Raises:
        TypeError: if ``sampler`` is not a ``Sampler``.
    """
    if not isinstance(sampler, Sampler):
        raise TypeError(f"program: takes a Sampler, got {sampler!r}")
    return Program(sampler, coded)


class Program:
    """A Pyro model of a sampler: its sites are the choices of a run, "step.slot.name", and it returns the tokens.

    If there are several rows, they are in a plate "rows" at dim -1. Any choice with finite support can be enumerated in
    parallel. If there is only one row, choices can also be enumerated sequentially. ``config_enumerate``,
    ``TraceEnum_ELBO`` and ``infer_discrete`` work as usual; the model has no plate besides "rows". Parallel enumeration
    multiplies the number of rows in memory by the number of combinations of values.

    Args:
        sampler: the sampler.
        coded: whether the values of sites are scalars (see ``code``).
    """

    def __init__(self, sampler: Sampler, coded: bool = False) -> None:
        self.sampler: Sampler = sampler
        self.coded: bool = coded

    def code(self, value: Shaped[Tensor, "*rows n"]) -> Int[Tensor, "*rows"]:
        """Return the numbers (*rows) that encode values (*rows, n) in a coded program."""
        return _Code(self._base(value.shape[-1]))(value)

    def _base(self, length: int) -> int:
        return max(self.sampler.process.states, length) + 1

    def __call__(
        self,
        batch: int = 1,
        length: int | None = None,
        *,
        seed: int | None = None,
        first_row: int = 0,
        prompt: Tensor | Sequence[int] | None = None,
        frozen: Tensor | Sequence[bool] | None = None,
        initial: Tensor | Sequence[Sequence[int]] | None = None,
        device: torch.device | str = "cpu",
    ) -> Int[Tensor, "*combinations B L"]:
        """Run the program with arguments as in ``Sampler.sample`` and return the tokens.

        If ``seed`` is None, each call takes a fresh seed from torch's generator. Gradients are kept, unless torch's
        grad mode is off. If sites are enumerated, the tokens of all combinations are returned, (*combinations, B, L).

        Raises:
            TypeError, ValueError: for a seed or another argument that ``Sampler.sample`` refuses.
        """
        seed = seeded(seed, "program: seed")
        code = _Code(self._base(length or self.sampler.model.length or 1)) if self.coded else None
        rows = _Rows(torch.Size([batch]), first_row, code)
        given = tuple(None if each is None else torch.as_tensor(each) for each in (prompt, frozen, initial))
        with alone():
            if batch == 1:
                return self._through(rows, length, seed, given, device)
            with pyro.plate("rows", batch, dim=-1):
                return self._through(rows, length, seed, given, device)

    def _through(
        self,
        rows: "_Rows",
        length: int | None,
        seed: int,
        given: tuple[Tensor | None, ...],
        device: torch.device | str,
    ) -> Tensor:
        while True:
            prompt, frozen, initial = (rows.of_each(each) for each in given)
            try:
                with rows:
                    tokens = self.sampler.sample(
                        rows.shape.numel(),
                        length,
                        seed=seed,
                        first_row=rows.first_row,
                        prompt=prompt,
                        frozen=frozen,
                        initial=initial,
                        listen=True,
                        device=device,
                    ).tokens
                return tokens.view(*rows.shape, -1)
            except _Wider:
                continue

    def __repr__(self) -> str:
        return f"program({self.sampler}{', coded=True' if self.coded else ''})"


class _Wider(Exception):
    """Raised when a site gets an axis of values; the program must then run again with more rows."""


class _Rows(Messenger):
    """Send each site to the outer handlers once, in the shape of the rows, and give each row its value.

    Attributes:
        shape: the shape of the rows: the axes of enumerated values, then the batch.
        batch: the number of rows of one combination of values.
        first_row: the id of the first row.
        code: encodes values as scalars; or None.
    """

    def __init__(self, shape: torch.Size, first_row: int, code: "_Code | None") -> None:
        super().__init__()
        self.shape, self.batch, self.first_row, self.code = shape, shape[-1], first_row, code
        self._values: dict[str, tuple[Tensor, bool]] = {}  # of sites with a value; True if all values were enumerated

    def of_each(self, given: Tensor | None) -> Tensor | None:
        """Repeat an argument (B, n) for every combination of values; return other arguments unchanged."""
        if given is None or given.ndim != 2 or len(given) != self.batch:  # the sampler raises the error if it is wrong
            return given
        return given.expand(*self.shape, given.shape[1]).reshape(-1, given.shape[1])

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self._values:
            msg["value"], msg["done"], msg["stop"] = self._of(msg["name"], msg["fn"]), True, True
        elif self.code is not None or msg["fn"].batch_shape != self.shape:
            msg["fn"] = _Spread(msg["fn"], self._places(msg["fn"]), self.shape, self.code)

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self._values or msg["value"] is None:  # None until a sequential enumeration sets it
            return
        law, value, tried = msg["fn"], msg["value"], msg["infer"].get("_enumerate_dim") is not None
        choice = law.choice if isinstance(law, _Spread) else law
        events = value.ndim - len(law.event_shape)
        try:
            shape = torch.broadcast_shapes(value.shape[:events], self.shape)
        except RuntimeError:
            shape = torch.Size()
        if value.shape[events:] != law.event_shape or not (tried or shape == self.shape):
            raise ValueError(
                f"site {msg['name']}: takes a value of shape {tuple(law.shape())}, rows and event; a handler gave "
                f"{tuple(value.shape)}"
            )
        self._values[msg["name"]] = value, tried
        if shape != self.shape:
            self.shape = shape
            raise _Wider
        msg["value"] = self._of(msg["name"], choice)

    def _places(self, choice: Choice) -> Tensor:
        assert choice.key is not None
        return choice.key.ids - self.first_row

    def _of(self, name: str, choice: Choice) -> Tensor:
        """Return the value of a site in the rows of a choice, with possible values in place of impossible ones.

        A row with an impossible value has probability 0 whatever follows, but a program must not get such a state.
        """
        value, tried = self._values[name]
        if self.code is not None and choice.event_shape:
            value = self.code.value(value, choice.event_shape[0])
        value = value.expand(*self.shape, *choice.event_shape).reshape(-1, *choice.event_shape)[self._places(choice)]
        if not tried:
            return value
        with torch.no_grad():
            possible = (choice.log_prob(value) > -torch.inf).view(-1, *[1] * len(choice.event_shape))
            return value.to(choice.kind).where(possible, choice.sample())


class _Spread(TorchDistribution):
    """A choice in the shape of all rows, coded or not; a row that does not make this choice has the value 0."""

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012

    def __init__(self, choice: Choice, places: Tensor, shape: torch.Size, code: "_Code | None") -> None:
        if code is not None and choice.kind.is_floating_point:
            raise TypeError(f"program: {type(choice).__name__} has real values, which cannot be coded")
        super().__init__(shape, torch.Size() if code else choice.event_shape, validate_args=False)
        self.choice, self.places = choice, places
        self.code = code if code and choice.event_shape else _identity
        self.has_enumerate_support = choice.has_enumerate_support

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        drawn = self.choice.sample()
        value = drawn.new_zeros(self.batch_shape.numel(), *self.choice.event_shape)
        value[self.places] = drawn
        return self.code(value).view(self.shape())

    def log_prob(self, value: Tensor) -> Tensor:
        value = value.expand(torch.broadcast_shapes(value.shape, self.shape()))
        before, events = value.shape[: value.ndim - len(self.shape())], len(self.choice.event_shape)
        if isinstance(self.code, _Code):
            value = self.code.value(value, self.choice.event_shape[0])
        flat = value.reshape(*before, self.batch_shape.numel(), *self.choice.event_shape)
        chosen = self.choice.log_prob(flat.index_select(len(before), self.places))
        nothing = (flat == 0).flatten(flat.ndim - events).all(-1) if events else flat == 0
        absent = chosen.new_zeros(nothing.shape).where(nothing, -torch.inf)
        return absent.index_copy(-1, self.places, chosen).reshape(*before, *self.batch_shape)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        values = self.choice.fork()[1]
        if len(self.places) < self.batch_shape.numel():
            values = torch.cat([torch.zeros_like(values[:1]), values])
        values = self.code(values.unique(dim=0)).view(-1, *[1] * len(self.batch_shape), *self.event_shape)
        return values.expand(-1, *self.shape()) if expand else values

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> "_Spread":
        if tuple(batch_shape) != tuple(self.batch_shape):
            raise ValueError(f"the rows of a program have shape {tuple(self.batch_shape)}, not {tuple(batch_shape)}")
        return self


class _Code:
    """Encodes vectors of whole numbers from -1 to base - 2 as single numbers."""

    def __init__(self, base: int) -> None:
        self.base = base

    def __call__(self, value: Tensor) -> Tensor:
        return ((value.long() + 1) * self._powers(value.shape[-1])).sum(-1)

    def value(self, number: Tensor, n: int) -> Tensor:
        """Decode numbers to the values of n positions."""
        return number[..., None] // self._powers(n) % self.base - 1

    def _powers(self, n: int) -> Tensor:
        if self.base**n >= 2**63:
            raise ValueError(f"program: {n} positions of {self.base - 1} values are too many to be coded as one number")
        return torch.tensor([self.base ** (n - 1 - i) for i in range(n)])


def _identity(value: Tensor) -> Tensor:
    return value
