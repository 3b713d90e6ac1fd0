"""Base class of all random choices: a Pyro distribution over a batch of rows with keyed randomness."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributions import constraints

from discdiff.kernels.dispatch import Key

if TYPE_CHECKING:  # Pyro's class is not annotated, and a type checker would not know what derives from it

    class TorchDistribution(torch.distributions.Distribution):
        def shape(self, sample_shape: Sequence[int] = ()) -> torch.Size: ...
else:
    from pyro.distributions import TorchDistribution

__all__ = ["Choice", "Key", "Repeated"]


class _Possible(constraints.Constraint):
    """The constraint that a value has positive probability under a choice."""

    is_discrete = True

    def __init__(self, choice: "Choice") -> None:
        self.choice, self.event_dim = choice, len(choice.event_shape)
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        return self.choice.log_prob(value) > -torch.inf


class Choice(TorchDistribution):
    """Random choice of one value for each batch row; a subclass defines ``_draw``, ``_log_prob`` and ``fork``.

    The batch has one axis, the rows, because the randomness is keyed by row id. Only a choice of one row can be
    expanded. ``_log_prob`` gets values of the shape (*sample, B, *event), with whole numbers as int64.

    Shapes: values (*sample, B, *event), their log-probabilities (*sample, B), entropies (B,); ``fork`` lists M values,
    with their row indices (M,) and log-probabilities (M,).

    Attributes:
        kind: the dtype of values.
        key: the key of the randomness, set by a run; None outside a run.
        faults: the run's list of flags of bad rows (see ``Watch``); None outside a run.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_enumerate_support: bool = True
    kind: ClassVar[torch.dtype] = torch.int64

    def __init__(self, batch: int, event: tuple[int, ...], device: torch.device) -> None:
        super().__init__(torch.Size([batch]), torch.Size(event), validate_args=False)
        self.key: Key | None = None
        self.faults: list[Tensor] | None = None
        self.device = device

    @abstractmethod
    def _draw(self, key: Key) -> Tensor: ...

    @abstractmethod
    def _log_prob(self, value: Tensor) -> Tensor: ...

    @abstractmethod
    def fork(self) -> tuple[Int[Tensor, " M"], Tensor, Float[Tensor, " M"]]:
        """List every possible value of every row: row indices (M,), values, log-probabilities (M,).

        Raises:
            TypeError: if the values are real numbers, which cannot be listed.
        """

    def __repr__(self) -> str:
        event = f", event {tuple(self.event_shape)}" if self.event_shape else ""
        return f"{type(self).__name__}({self.batch_shape[0]} rows{event})"

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw a value for each row; the randomness is a function of ``key``.

        If ``key`` is None, or a sample shape is given, fresh keys from torch's generator are used instead.
        """
        batch = self.batch_shape[0]
        if not sample_shape:
            return self._draw(self.key or Key.fresh(batch, self.device))
        count = math.prod(sample_shape)
        draws = torch.stack([self._draw(Key.fresh(batch, self.device)) for _ in range(max(count, 1))])
        return draws[:count].reshape(*sample_shape, *self.batch_shape, *self.event_shape)

    def log_prob(self, value: Tensor) -> Float[Tensor, "*sample B"]:
        """Return the log-probability of each value, -inf for an impossible one.

        Args:
            value: (*sample, B, *event); B may be 1 or absent if all rows have the same value. If this choice has one
                row, B may be any number.

        Raises:
            ValueError: if ``value`` differs from this choice in event shape or number of rows.
        """
        shape, events = self.batch_shape + self.event_shape, len(self.event_shape)
        rows = value.shape[-1 - events] if value.ndim > events else 1
        if rows != 1 and self.batch_shape == (1,):
            return self.log_prob(value.unsqueeze(-1 - events)).squeeze(-1)
        if value.shape[value.ndim - events :] != self.event_shape or rows not in (1, self.batch_shape[0]):
            raise ValueError(
                f"{type(self).__name__}: a value must have the shape {tuple(shape)}, rows and event, or more such "
                f"before it; got {tuple(value.shape)}"
            )
        value = value.expand(torch.broadcast_shapes(value.shape, shape))
        if self.kind.is_floating_point:
            return self._log_prob(value.double())
        if not value.is_floating_point():
            return self._log_prob(value.long())
        whole = value == value.trunc()
        log_p = self._log_prob(value.where(whole, 0.0).long())
        return log_p.where(whole.flatten(value.ndim - events).all(-1) if events else whole, -torch.inf)

    def entropy(self) -> Float[Tensor, " B"]:
        """Return the entropy of each row in nats, by a sum over all possible values."""
        parent, _, log_p = self.fork()
        return log_p.new_zeros(self.batch_shape).index_add(0, parent, -log_p.exp() * log_p)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        """The set of possible values, as a constraint."""
        return _Possible(self)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return every value that is possible in some row, (M, B, *event), or (M, 1, *event) if ``expand`` is False.

        ``log_prob`` gives -inf in the rows where a value is impossible.
        """
        values = self.fork()[1]
        values = (values if self.batch_shape == (1,) else values.unique(dim=0))[:, None]
        return values.expand(-1, *self.batch_shape, *self.event_shape) if expand else values

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> "Choice":
        """Expand the choice of one row to many rows, each with its own randomness.

        Raises:
            ValueError: if this choice has several rows, or the new shape has several axes.
        """
        if tuple(batch_shape) == tuple(self.batch_shape):
            return self
        if self.batch_shape == (1,) and len(batch_shape) == 1 and batch_shape[0] > 0:
            return Repeated(self, batch_shape[0])
        raise ValueError(
            f"{type(self).__name__}: one row can be expanded to (B,) rows; batch shape {tuple(self.batch_shape)} "
            f"cannot become {tuple(batch_shape)}"
        )

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> "Choice":
        """Return this choice unchanged if ``reinterpreted_batch_ndims`` is 0; raise TypeError otherwise."""
        return self if reinterpreted_batch_ndims == 0 else self._refuse("to_event")

    def independent(self, reinterpreted_batch_ndims: int | None = None) -> "Choice":
        """Return this choice unchanged if ``reinterpreted_batch_ndims`` is 0; raise TypeError otherwise."""
        return self.to_event(reinterpreted_batch_ndims)

    def mask(self, mask: bool | Tensor) -> "Choice":
        """Return this choice unchanged if ``mask`` is True; raise TypeError otherwise."""
        return self if mask is True else self._refuse("mask")

    def _refuse(self, what: str) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__}.{what}: would no longer be a choice of rows, so its randomness could not be keyed; "
            "put a handler such as pyro.poutine.mask, or a pyro.plate, around the run instead"
        )


class Repeated(Choice):
    """The law of one row, repeated for B rows, each with its own randomness.

    Args:
        one: a choice of one row.
        batch: B, the number of rows.
    """

    def __init__(self, one: Choice, batch: int) -> None:
        super().__init__(batch, tuple(one.event_shape), one.device)
        self.one: Choice = one
        self.kind: torch.dtype = one.kind  # type: ignore[misc]
        self.has_enumerate_support: bool = one.has_enumerate_support

    def _draw(self, key: Key) -> Tensor:
        self.one.faults = self.faults
        return torch.cat([self.one._draw(key[row : row + 1]) for row in range(len(key.ids))])

    def _log_prob(self, value: Tensor) -> Tensor:
        return self.one._log_prob(value.unsqueeze(-1 - len(self.event_shape))).squeeze(-1)

    def fork(self) -> tuple[Tensor, Tensor, Tensor]:
        _, value, log_p = self.one.fork()
        batch, events = self.batch_shape[0], [1] * len(self.event_shape)
        parent = torch.arange(batch, device=self.device).repeat_interleave(len(value))
        return parent, value.repeat(batch, *events), log_p.repeat(batch)

    def entropy(self) -> Float[Tensor, " B"]:
        return self.one.entropy().expand(self.batch_shape)

    @property
    def support(self) -> constraints.Constraint:
        return self.one.support if self.kind.is_floating_point else _Possible(self)
