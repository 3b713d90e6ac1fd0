r"""Run steps of other packages as operators: ``choose`` replaces torch's random functions.

A step of another package draws by ``torch.multinomial``, ``randint`` and ``rand``. Inside ``Answered`` each such call
is a named choice of the operator that runs the step. So the draws are keyed by (seed, row, step, site) and recorded as
in any operator here. If each draw has finitely many values, the step's exact transition matrix can be enumerated.
The rest of the step's code runs unchanged.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import constraints
from torch.overrides import TorchFunctionMode

from discdiff.choices import Choice, Key, Sites, Tokens
from discdiff.kernels.dispatch import coins
from discdiff.operator import At, State, choose

__all__ = ["Answered", "Uniforms"]

_UNKEYED = {
    *(getattr(torch, name) for name in ("bernoulli", "normal", "poisson", "randn", "randn_like", "randperm")),
    *(torch.randint_like, torch.dropout, torch.nn.functional.dropout, torch.nn.functional.gumbel_softmax),
    *(getattr(Tensor, name) for name in ("bernoulli", "bernoulli_", "cauchy_", "exponential_", "geometric_")),
    *(getattr(Tensor, name) for name in ("log_normal_", "normal_", "random_")),
}


class Uniforms(Choice):
    """Independent uniforms on [0, 1) at E positions of each row: continuous, so they cannot be enumerated."""

    has_enumerate_support: bool = False
    kind: ClassVar[torch.dtype] = torch.float64

    def __init__(self, batch: int, positions: int, device: torch.device) -> None:
        super().__init__(batch, (positions,), device)

    def _draw(self, key: Key) -> Float[Tensor, "B E"]:
        return coins(key, self.event_shape[0])[0]

    def _log_prob(self, value: Float[Tensor, "*sample B E"]) -> Float[Tensor, "*sample B"]:
        inside = ((value >= 0) & (value < 1)).all(-1)
        return torch.zeros_like(value[..., 0]).where(inside, -torch.inf)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.half_open_interval(0.0, 1.0), 1)

    def entropy(self) -> Float[Tensor, " B"]:
        return torch.zeros(self.batch_shape, dtype=torch.float64, device=self.device)

    def fork(self) -> NoReturn:
        raise TypeError("a step that draws by torch.rand cannot be enumerated; wrap it with enumerable=False")


class Answered(TorchFunctionMode):
    """Context in which torch's random functions return named choices of an operator.

    A choice is named by the function and the number of the draw, as in "rand1". Each draw must have the same number of
    values for every row of the state, in the order of the rows. Generators are ignored.

    Args:
        state: the state whose rows the draws are for.
        at: the address of the operator.

    Raises:
        ValueError: if the size of a draw is not a multiple of the number of rows, or a random function of torch is
            called that is not supported.
    """

    def __init__(self, state: State, at: At) -> None:
        super().__init__()
        self.state: State = state
        self.at: At = at
        self._turns = 0

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        known: dict[object, Callable[..., Tensor]] = {
            torch.multinomial: self._multinomial,
            Tensor.multinomial: self._multinomial,
            torch.randint: self._randint,
            torch.rand: self._rand,
            torch.rand_like: self._rand_like,
            Tensor.uniform_: self._uniform,
        }
        if func in _UNKEYED:
            name = getattr(func, "__name__", func)
            accepted = "multinomial, randint, rand, rand_like and uniform_"
            raise ValueError(f"the step draws by torch's {name}, which is not keyed; answered are {accepted}")
        answer = known.get(func)
        return func(*args, **kwargs) if answer is None else answer(*args, **kwargs)

    def _multinomial(
        self, input: Tensor, num_samples: int, replacement: bool = False, generator: object = None
    ) -> Tensor:
        if num_samples != 1 or input.ndim != 2:
            raise ValueError(
                f"the step draws {num_samples} values from weights {tuple(input.shape)}; answered is one from (N, K)"
            )
        shape, weights = self._event("multinomial", torch.Size([len(input)])), input.double()
        sites = Sites.computed(
            torch.ones(shape, dtype=torch.bool, device=input.device), lambda n: weights[n].log(), input.shape[1]
        )
        keep = torch.zeros(shape, dtype=torch.int64, device=input.device)
        return self._choose("multinomial", Tokens(sites, keep)).view(-1, 1)

    def _randint(
        self,
        *bounds: int | Sequence[int],
        low: int = 0,
        high: int = 0,
        size: Sequence[int] = (),
        generator: object = None,
        dtype: torch.dtype = torch.int64,
        device: torch.device | str | None = None,
    ) -> Tensor:
        *ends, last = (*bounds, size) if size else bounds  # torch's argument order: (high, size) or (low, high, size)
        given = [end for end in ends if isinstance(end, int)]
        low, high = (given[0] if len(given) == 2 else low), (given[-1] if given else high)
        assert not isinstance(last, int)
        shape, wide = self._event("randint", torch.Size(last)), high - low
        where = torch.ones(shape, dtype=torch.bool, device=self.state.rows.device)
        sites = Sites.computed(where, lambda n: torch.zeros(len(n), wide, dtype=torch.float64, device=n.device), wide)
        drawn = self._choose("randint", Tokens(sites, where.long()))
        return (drawn + low).view(*last).to(device=device, dtype=dtype)

    def _rand(
        self,
        *sizes: int | Sequence[int],
        size: Sequence[int] = (),
        generator: object = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        first = sizes[0] if sizes else size
        whole = torch.Size(first) if not isinstance(first, int) else torch.Size(int(n) for n in sizes)  # type: ignore[arg-type]
        dtype = dtype or torch.get_default_dtype()
        shape = self._event("rand", whole)
        u = self._choose("rand", Uniforms(*shape, self.state.rows.device))
        grid = torch.finfo(dtype).eps / 2  # rounded down to the grid of the dtype, so that it stays below 1
        return ((u / grid).floor() * grid).to(device=device, dtype=dtype).view(whole)

    def _rand_like(self, input: Tensor, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
        return self._rand(input.shape, dtype=dtype or input.dtype, device=device or input.device)

    def _uniform(self, tensor: Tensor, a: float | int = 0, b: float | int = 1, generator: object = None) -> Tensor:
        return tensor.copy_(a + (b - a) * self._rand(tensor.shape, dtype=tensor.dtype, device=tensor.device))

    def _event(self, name: str, shape: torch.Size) -> tuple[int, int]:
        """Return (B, E): the number of rows, and of values that a draw of this shape has for each row."""
        rows = len(self.state.rows)
        if shape.numel() % rows:
            raise ValueError(f"the step's {name} of shape {tuple(shape)} is not one of the {rows} rows of the state")
        return rows, shape.numel() // rows

    def _choose(self, name: str, choice: Choice) -> Tensor:
        self._turns += 1
        return choose(f"{name}{self._turns}", choice, self.state, self.at)
