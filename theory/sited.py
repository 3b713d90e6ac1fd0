r"""Track on which site each number of a tensor depends, to find independent choices in a running program.

A ``Sited`` tensor holds numbers that depend on the choices made at *one* site of their row, and on the settled choices
of the row. ``origin`` gives the row and site, one entry for each index of the leading axes. A torch function called on
a sited tensor follows one of these rules:

    pointwise           combines numbers of the same site only                        stays sited
    data movement       ``origin`` is moved in the same way to find the new sites     stays sited, if one site each
    trailing axes       reductions and scatters on axes after those of the sites      stays sited
    the whole batch     any, all, sum, max over everything                            a plain number
    anything else       the tensor is *settled* first, and the function gets a plain tensor

Settling divides the rows in which the tensor takes different values. So a function without a rule costs more rows, but
sites are never treated as independent by mistake. A result over the whole batch needs no settling: by the contract of
operators a row's law does not depend on the other rows.
"""

# ruff: noqa: ANN401  (torch hands on functions of any arguments)
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Ledger", "Sited"]

Rule = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@runtime_checkable
class Ledger(Protocol):
    """Interface of the object that holds the rows on which a program runs.

    Attributes:
        grid: (rows, L) the origin of every site of the batch, row * L + site.
    """

    grid: Tensor

    def settle(self, values: "Sited") -> Tensor:
        """Return the values as a plain tensor if they are equal on all paths of a row; otherwise divide the rows."""
        ...


class Sited(Tensor):
    """Tensor of numbers each of which depends on the choices of one site.

    Attributes:
        origin: the site of each index of the leading axes, row * L + site.
        ledger: the object that holds the rows and settles the tensor.
    """

    origin: Tensor
    ledger: Ledger
    _chosen: tuple[int, Tensor, Tensor] | None = None

    @classmethod
    def of(cls, values: Tensor, origin: Tensor, ledger: Ledger) -> "Sited":
        """Make a sited tensor that shares the memory of ``values``."""
        made: Sited = values.as_subclass(cls)
        made.origin, made.ledger = origin, ledger
        return made

    @property
    def bare(self) -> Tensor:
        """Return the numbers as a plain tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    def like(self, values: Tensor) -> "Sited":
        """Make a sited tensor of other numbers with the same origin and ledger."""
        return Sited.of(values, self.origin, self.ledger)

    def chosen(self) -> tuple[Tensor, Tensor]:
        """Return the flat indices at which this mask is true, and the sites at these indices; both are cached."""
        mask = self.as_subclass(Tensor)
        if self._chosen is None or self._chosen[0] != mask._version:  # a write to any view of it raises the version
            index = mask.flatten().nonzero()[:, 0]
            self._chosen = mask._version, index, self.origin.flatten()[index]
        return self._chosen[1:]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            rule = _RULES.get(func)
            known = NotImplemented if rule is None else rule(func, args, kwargs)
            if known is not NotImplemented:
                return known
            return func(*_each(args, _settled), **_each(kwargs, _settled))


def _each(x: Any, change: Callable[[Any], Any]) -> Any:
    """Apply ``change`` to every tensor in nested arguments."""
    if isinstance(x, tuple | list):
        made = [_each(y, change) for y in x]
        return made if isinstance(x, list) else type(x)(*made) if hasattr(x, "_fields") else tuple(made)
    if isinstance(x, dict):
        return {key: _each(value, change) for key, value in x.items()}
    return change(x) if isinstance(x, Tensor) else x


def _settled(x: Tensor) -> Tensor:
    return x.ledger.settle(x) if isinstance(x, Sited) else x


def _bare(x: Tensor) -> Tensor:
    return x.as_subclass(Tensor) if isinstance(x, Sited) else x


def _tensors(*nest: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _each(nest, lambda x: found.append(x))
    return found


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and bool((one == other).all()))


def _one(args: Any, kwargs: Any) -> Sited | None:
    """Return the first sited argument if all sited arguments have the same sites, else None.

    For a list of chosen sites return None also if a plain argument has different entries for different sites.
    """
    everything = _tensors(args, kwargs)
    sited = [x for x in everything if isinstance(x, Sited)]
    first = sited[0]
    if not all(_same(x.origin, first.origin) for x in sited):
        return None
    if first.origin.ndim == 1:  # a list of chosen sites: a plain tensor must hold equal entries for all
        wide = max(x.ndim for x in everything)
        for x in everything:
            if not isinstance(x, Sited) and x.ndim == wide and not bool((x == x[:1]).all()):
                return None
    return first


def _pointwise(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    one = _one(args, kwargs)
    if one is None or "out" in kwargs:
        return NotImplemented
    out = func(*_each(args, _bare), **_each(kwargs, _bare))
    k, sited = one.origin.ndim, [x for x in _tensors(args, kwargs) if isinstance(x, Sited)]
    if not isinstance(out, Tensor) or out.shape[:k] != one.origin.shape or any(x.ndim != out.ndim for x in sited):
        return NotImplemented
    return one.like(out)


def _in_place(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Apply an in-place function of one tensor: each number changes by itself, so views stay valid."""
    if len(_tensors(args, kwargs)) > 1 or not isinstance(args[0], Sited):
        return NotImplemented
    func(args[0].as_subclass(Tensor), *args[1:], **kwargs)
    return args[0]


def _cast(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    out = func(*_each(args, _bare), **_each(kwargs, _bare))
    return args[0].like(out) if isinstance(args[0], Sited) else out


def _about(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Apply a function whose result does not depend on choices: a shape, a type or a constant of the same shape."""
    rest = (args[1:], {key: value for key, value in kwargs.items() if key != "input"})
    return NotImplemented if any(isinstance(x, Sited) for x in _tensors(rest)) else func(*args, **kwargs)


def _moved(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Move the numbers, and move a tensor of their sites in the same way to find the new sites."""
    x, rest = args[0], args[1:]
    if not isinstance(x, Sited):  # the sited argument is an index, or only its shape is used
        return func(*_each(args, _bare), **kwargs) if func in _TO_SHAPE else NotImplemented
    if any(isinstance(y, Sited) for y in _tensors(rest, kwargs)) and func not in _TO_SHAPE:
        return NotImplemented
    rest, k = _each(rest, _bare), x.origin.ndim
    whose = x.origin.reshape(*x.origin.shape, *[1] * (x.dim() - k)).expand(x.shape).contiguous()
    out, whose = func(x.as_subclass(Tensor), *rest, **kwargs), func(whose, *rest, **kwargs)
    for n in (1, 2) if k == 1 or out.shape[:2] != x.origin.shape else (2, 1):
        if out.ndim >= n and out.shape == whose.shape:
            lead = whose[(..., *[slice(0, 1)] * (out.ndim - n))] if out.ndim > n else whose
            if bool((whose == lead).all()) and (out.numel() or not lead.numel()):
                return Sited.of(out, lead.reshape(out.shape[:n]), x.ledger)
    return NotImplemented


def _item(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Apply x[index]: select chosen sites, or look up entries of a table."""
    x, index = args
    keys = index if isinstance(index, tuple) else (index,)
    if not any(isinstance(key, Sited) for key in keys):
        k, values = x.origin.ndim, x.as_subclass(Tensor)
        if all(key is None for key in keys[1:]) and (
            keys[0] is ... or (k == 1 and isinstance(keys[0], slice) and keys[0] == slice(None))
        ):
            return x.like(values[index])  # further axes
        if len(keys) == 1 and isinstance(index, Tensor) and index.ndim == 1:
            return Sited.of(values[index], x.origin[index], x.ledger)  # some rows
        return _moved(func, args, kwargs)
    first = keys[0]
    if not all(isinstance(key, Sited) and _same(key.origin, first.origin) for key in keys):
        return NotImplemented
    if first.dtype == torch.bool:
        lead = first.origin.shape
        if not isinstance(x, Sited) and len(lead) == x.dim() == 1 and x.dtype == torch.int64 and len(keys) == 1:
            return x[first.as_subclass(Tensor)]  # row numbers of the batch, which depend on no choice
        # in a list of chosen sites a plain tensor has no known sites
        known = _same(x.origin, first.origin) if isinstance(x, Sited) else len(lead) == 2
        if len(keys) > 1 or first.shape != lead or x.shape[: len(lead)] != lead or not known:
            return NotImplemented
        numbers, origin = first.chosen()
        return Sited.of(_bare(x).flatten(0, len(lead) - 1)[numbers], origin, first.ledger)
    found = tuple(key.as_subclass(Tensor) for key in keys)
    # the own site of each entry of a list, by row and position
    fits = not isinstance(x, Sited) or (len(keys) == x.origin.ndim == 2 and _same(x.origin[found], first.origin))
    if not fits or any(key.shape != first.shape for key in keys):
        return NotImplemented
    return first.like(_bare(x)[found])


def _nonzero(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    if x.dim() != 2 or x.origin.ndim != 2 or x.dtype != torch.bool:
        return NotImplemented
    origin = x.chosen()[1]
    return _each(func(x.as_subclass(Tensor), **kwargs), lambda y: Sited.of(y, origin, x.ledger))


def _scattered(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Apply x.masked_scatter(mask, source): put the numbers of chosen sites at their places."""
    x, mask, source = args
    ledger = next(y.ledger for y in args if isinstance(y, Sited))
    first = mask if isinstance(mask, Sited) else x
    grid = first.origin if isinstance(first, Sited) else ledger.grid
    if not mask.numel() or grid.ndim != 2 or x.shape != mask.shape or x.shape[:2] != grid.shape:
        return NotImplemented
    if isinstance(x, Sited) and not _same(x.origin, grid):
        return NotImplemented
    chosen = _bare(mask)
    lead = chosen.reshape(*grid.shape, -1)[..., :1]
    if not bool((chosen.reshape(*grid.shape, -1) == lead).all()):
        return NotImplemented
    if isinstance(source, Sited):
        fits = source.shape[1:] == x.shape[2:] and _same(source.origin, grid[lead[..., 0]])
    else:
        fits = not isinstance(mask, Sited)
    return Sited.of(func(_bare(x), chosen, _bare(source)), grid, ledger) if fits else NotImplemented


def _put(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Apply x.index_put((mask,), values): set the numbers of the sites that the mask chooses."""
    x, (mask, *more), values = args
    if more or kwargs or not isinstance(mask, Sited) or not isinstance(values, Sited) or mask.dtype != torch.bool:
        return NotImplemented
    if mask.shape != mask.origin.shape or x.shape[: mask.dim()] != mask.shape or _one((x, mask), {}) is None:
        return NotImplemented
    if not _same(values.origin, mask.chosen()[1]):
        return NotImplemented
    return mask.like(func(_bare(x), (mask.as_subclass(Tensor),), _bare(values)))


def _copied(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Apply x.index_copy(0, rows, source): replace some rows of the batch."""
    x, axis, rows, source = args
    if axis != 0 or isinstance(rows, Sited) or not isinstance(source, Sited):
        return NotImplemented
    grid = x.origin if isinstance(x, Sited) else source.ledger.grid
    if x.shape[: grid.ndim] != grid.shape or not _same(grid[rows], source.origin):
        return NotImplemented
    return Sited.of(func(_bare(x), axis, rows, _bare(source)), grid, source.ledger)


def _axes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return kwargs["dim"] if "dim" in kwargs else args[1] if len(args) > 1 else None


def _beside(axes: Any, x: Sited) -> bool:
    """Return whether these axes come after those of the sites."""
    chosen = axes if isinstance(axes, tuple | list) else (axes,)
    return all(type(axis) is int and axis % x.dim() >= x.origin.ndim for axis in chosen) if x.dim() else False


def _reduced(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, axes = args[0], _axes(args, kwargs)
    if axes is None and func in _OF_ALL:
        return func(x.as_subclass(Tensor), **kwargs)
    if not isinstance(x, Sited) or not _beside(axes, x) or len(_tensors(args, kwargs)) > 1:
        return NotImplemented
    return _each(func(x.as_subclass(Tensor), *args[1:], **kwargs), x.like)


def _along(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Apply gather, scatter or scatter_add along an axis after those of the sites."""
    one = _one(args, kwargs)
    if one is None or kwargs or not _beside(args[1], one):
        return NotImplemented
    if any(x.shape[: one.origin.ndim] != one.origin.shape or x.ndim != one.dim() for x in _tensors(args) if x.ndim):
        return NotImplemented
    return one.like(func(*_each(args, _bare)))


def _padded(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, pad = args[:2]
    if not isinstance(x, Sited) or len(pad) > 2 * (x.dim() - x.origin.ndim):
        return NotImplemented
    return x.like(func(x.as_subclass(Tensor), *args[1:], **kwargs))


def _joined(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Apply stack or cat along an axis after those of the sites, or cat of lists of chosen sites."""
    parts, axis = args[0], _axes(args, kwargs) or 0
    sited = [x for x in parts if isinstance(x, Sited)]
    if func is torch.cat and axis == 0:
        if not all(isinstance(x, Sited) and x.origin.ndim == 1 for x in parts if len(x)):
            return NotImplemented
        return Sited.of(func([_bare(x) for x in parts]), torch.cat([x.origin for x in sited]), sited[0].ledger)
    one = _one(args, kwargs)
    if one is None or any(x.shape[: one.origin.ndim] != one.origin.shape for x in parts):
        return NotImplemented
    if axis % (one.dim() + (func is torch.stack)) < one.origin.ndim:
        return NotImplemented
    return one.like(func([_bare(x) for x in parts], axis))


def _one_hot(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0].like(func(args[0].as_subclass(Tensor), *args[1:], **kwargs))


def _named(names: str) -> set[Callable[..., Any]]:
    """Find the functions and methods of torch with these names."""
    places = (torch, Tensor, functional, torch.special)
    found = {getattr(place, name, None) for name in names.split() for place in places}
    return {func for func in found if callable(func)}


_UNARY = """abs ceil exp expm1 floor isfinite isinf isnan log log1p logical_not bitwise_not neg negative nan_to_num
    reciprocal round sign sqrt square sigmoid logsigmoid softplus relu tanh"""
_BINARY = """add sub subtract mul multiply div divide true_divide floor_divide remainder fmod pow maximum minimum
    logaddexp logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor eq ne lt le gt ge where clamp
    clamp_min clamp_max masked_fill nextafter xlogy lerp"""
_SIGNS = """__abs__ __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __div__ __rdiv__
    __floordiv__ __rfloordiv__ __mod__ __rmod__ __pow__ __rpow__ __neg__ __invert__ __and__ __rand__ __or__ __ror__
    __xor__ __rxor__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__"""
_MOVES = """expand reshape view flatten unflatten unsqueeze squeeze permute transpose movedim moveaxis swapaxes select
    narrow index_select clone contiguous detach"""
_REDUCTIONS = "sum mean prod any all amax amin max min logsumexp softmax log_softmax argmax argmin cumsum count_nonzero"
_NEW = "zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_full new_tensor"
_ASKED = "size dim numel nelement stride is_contiguous is_floating_point is_complex __len__ __hash__ __repr__"
_FACTS = (
    "shape dtype device layout ndim is_cuda is_sparse is_meta is_mps is_quantized requires_grad is_leaf grad_fn grad"
)

_OF_ALL = _named("sum any all max min amax amin count_nonzero")
_TO_SHAPE = _named("expand_as view_as reshape_as")
_RULES: dict[Callable[..., Any], Rule] = {
    func: rule
    for rule, functions in (
        (_pointwise, _named(f"{_UNARY} {_BINARY} {_SIGNS}")),
        (_in_place, _named("clamp_ exp_ log_ neg_")),
        (_cast, _named("to double float long int bool type_as")),
        (_about, _named(f"{_NEW} {_ASKED}") | {getattr(Tensor, name).__get__ for name in _FACTS.split()}),
        (_moved, _named(_MOVES) | _TO_SHAPE),
        (_item, {Tensor.__getitem__}),
        (_nonzero, _named("nonzero")),
        (_scattered, _named("masked_scatter")),
        (_put, _named("index_put")),
        (_copied, _named("index_copy")),
        (_reduced, _named(_REDUCTIONS)),
        (_along, _named("gather scatter scatter_add")),
        (_padded, {functional.pad}),
        (_joined, {torch.stack, torch.cat}),
        (_one_hot, {functional.one_hot}),
    )
    for func in functions
}
