"""The result of a sampler, with comparison by content and storage in a file."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from jaxtyping import Float, Int, Integer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from discdiff.choices import INTEGERS, Choices, narrowest
from discdiff.operator import State

__all__ = ["Samples", "narrowest"]

S = TypeVar("S", bound="Samples")


class Widened:
    """A field of whole numbers, stored in any dtype and converted to int64 when first read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, held: object, owner: type) -> Tensor | None:
        found: Tensor | None = None if held is None else vars(held)[self.name]
        if found is not None and found.dtype in INTEGERS:
            found = vars(held)[self.name] = found.to(torch.int64)  # stored, so that edits of it persist
        return found

    def __set__(self, held: object, value: Tensor | None) -> None:
        vars(held)[self.name] = value


@dataclass(frozen=True, eq=False, repr=False)
class Samples:
    """Result of a sampler; two results are equal if all their fields are equal, on any device.

    Attributes:
        tokens: (B, L) int64, the tokens if the grid ends at time 0, otherwise the states at its last time.
        nfe: batched denoiser calls made.
        nfe_rows: (B,) calls that included each row.
        seed: the seed that reproduces these tokens.
        trajectory: (N, B, L) int64 states at the N times of the grid, or None without ``record=True``. Until it is
            read, and in files, it is stored in the smallest dtype that holds it.
        log_prob: (B,) float64 log-probability of all choices made, auxiliary ones included, or None without
            ``record=True``. Of a run that was resumed it is the whole run's.
        queries: tokens that the network evaluated, over all rows.
        frame: ids of the start and end tokens that the network put around every row (``Convention.frame``), or None.
        calls: batched calls by the name of the denoiser: its key in the mapping given to ``Sampler``, or its ``name``.
        rewards: the sequences whose reward guides computed.
        choices: the values of all choices made, for ``Sampler.log_prob`` and ``Sampler.fork``, or None without
            ``record="choices"``. Of a run that was resumed they are the whole run's, from its first step on.
    """

    tokens: Int[Tensor, "B L"]
    nfe: int
    nfe_rows: Int[Tensor, " B"]
    seed: int
    trajectory: Integer[Tensor, "N B L"] | None = Widened()  # type: ignore[assignment]  # None by default
    log_prob: Float[Tensor, " B"] | None = None
    queries: int = 0
    frame: tuple[int, int] | None = None
    calls: dict[str, int] = field(default_factory=dict)
    rewards: int = 0
    choices: Choices | None = field(default=None, kw_only=True)

    @property
    def state(self) -> State:
        """The last state with its run, for ``resume=`` and ``Sampler.step``; files, pickles and copies do not hold it.

        Raises:
            ValueError: if the samples come from a file, a pickle or a copy.
        """
        state = vars(self).get("_state")
        if state is None:
            raise ValueError("Samples.state: these samples have no state: they come from a file or a copy")
        return state

    def __getstate__(self) -> dict[str, object]:
        """Return the fields without the run, as its functions may not be picklable."""
        return {name: value for name, value in vars(self).items() if name != "_state"}

    def framed(self) -> Int[Tensor, "B N"]:
        """Return the tokens with the network's start token before and its end token after them, (B, N), N = L + 2.

        Raises:
            ValueError: if the network has no such tokens.
        """
        if self.frame is None:
            raise ValueError(
                "framed: these tokens were made by a model without start and end tokens (Convention.frame is None); "
                "take .tokens"
            )
        found = torch.nn.functional.pad(self.tokens, (1, 1))
        found[:, 0], found[:, -1] = self.frame
        return found

    def save(self, path: str | Path) -> None:
        """Write all fields to a safetensors file; fields that are numbers go into its metadata.

        Raises:
            ValueError: if the folder does not exist.
        """
        path = Path(path)
        if not path.parent.is_dir():
            raise ValueError(f"save: there is no folder {path.parent}")
        held = self._held()
        choices = held.pop("choices", None)
        if isinstance(choices, Choices):
            held |= {f"choices/{name}": value for name, value in choices.tensors().items()}
            held["choices"] = choices.numbers()
        tensors = {name: value.cpu().contiguous() for name, value in held.items() if isinstance(value, Tensor)}
        numbers = {name: value for name, value in held.items() if not isinstance(value, Tensor)}
        save_file(tensors, path, {"discdiff": type(self).__name__, "numbers": json.dumps(numbers)})

    @classmethod
    def load(cls: type[S], path: str | Path) -> S:
        """Read a file written by ``save``.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is of another kind, or damaged.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"load: there is no file {path}")
        try:
            with safe_open(path, framework="pt") as file:
                said = file.metadata() or {}
                held: dict[str, object] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            numbers = json.loads(said.get("numbers", "null"))
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"load: {path} is no safetensors file of samples: {error}") from error
        if said.get("discdiff") != cls.__name__ or not isinstance(numbers, dict):
            found = said.get("discdiff", "another program's")
            raise ValueError(f"load: {path} must hold what {cls.__name__}.save wrote, and its contents are {found}")
        held |= {name: tuple(value) if isinstance(value, list) else value for name, value in numbers.items()}
        choices = _taken(held, path)
        cls._check(held, path)
        if choices is not None and choices.start.shape != held["tokens"].shape:  # type: ignore[attr-defined]
            raise ValueError(f"load: {path}: the choices do not go with the tokens")
        return cls(**held, choices=choices)  # type: ignore[arg-type]

    @classmethod
    def _check(cls, held: dict[str, object], path: Path) -> None:
        """Raise ValueError for missing or unknown entries, or a wrong type or shape."""
        known = {field.name: field for field in fields(cls)}
        needed = {"tokens", "nfe", "nfe_rows", "seed"}
        if not needed <= held.keys() <= known.keys():
            wrong = sorted((needed - held.keys()) | (held.keys() - known.keys()))
            raise ValueError(f"load: {path} lacks or does not know {wrong}; samples hold {sorted(known)}")
        frame = held.get("frame", (0, 0))
        if not isinstance(frame, tuple) or [type(v) for v in frame] != [int, int]:
            raise ValueError(f"load: {path}: frame must be two ids, got {frame!r}")
        calls = held.get("calls", {})
        if not isinstance(calls, dict) or any(type(count) is not int for count in calls.values()):
            raise ValueError(f"load: {path}: calls must map names to numbers, got {calls!r}")
        for name, value in held.items():
            if name in ("frame", "calls"):
                continue
            counted = name in ("nfe", "seed", "queries", "rewards", "per_group")
            if counted != (type(value) is int) or counted == isinstance(value, Tensor):
                raise ValueError(f"load: {path}: {name} must be {'a number' if counted else 'an array'}, got {value!r}")
        tokens = held["tokens"]
        assert isinstance(tokens, Tensor)
        shape = tuple(tokens.shape)
        for name, value in held.items():
            if isinstance(value, Tensor):
                whole = name not in ("log_prob", "log_weight", "reward", "accepted")
                fits = (
                    tuple(value.shape[-2:]) == shape if name in ("tokens", "trajectory") else value.shape == shape[:1]
                )
                fits &= value.ndim == (3 if name == "trajectory" else 2 if name == "tokens" else 1)
                dtypes = INTEGERS if name == "trajectory" else (torch.int64 if whole else torch.float64,)
                if not fits or value.dtype not in dtypes:
                    raise ValueError(
                        f"load: {path}: {name} does not go with tokens of shape {shape}, got {value.dtype} of "
                        f"{tuple(value.shape)}"
                    )

    def _held(self) -> dict[str, object]:
        """Return the fields by name; a trajectory in the smallest dtype, whether or not it was read."""
        held = {name: value for field in fields(self) if (value := vars(self)[name := field.name]) is not None}
        if isinstance(path := held.get("trajectory"), Tensor) and path.dtype in INTEGERS:
            low, high = (int(x) for x in path.aminmax()) if path.numel() else (0, 0)
            held["trajectory"] = path.to(narrowest(low, high))
        return held

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Samples) or type(self) is not type(other):
            return NotImplemented
        ours, theirs = self._held(), other._held()
        return ours.keys() == theirs.keys() and all(_same(ours[name], theirs[name]) for name in ours)

    __hash__: ClassVar[None] = None  # type: ignore[assignment]  # equal by content that may be edited in place

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.tokens.shape))
        where = "" if self.tokens.device.type == "cpu" else f", on {self.tokens.device}"
        kept = "".join(f", {name}" for name in ("trajectory", "log_prob", "choices") if vars(self)[name] is not None)
        return f"{type(self).__name__}({size} tokens, nfe={self.nfe}, seed={self.seed}{where}{kept})"


def _same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())
    return one == other


def _taken(held: dict[str, object], path: Path) -> Choices | None:
    """Take the choices out of what a file holds; None if there are none."""
    told = held.pop("choices", None)
    parts = {name: held.pop(name) for name in [*held] if name.startswith("choices/")}
    if told is None and not parts:
        return None
    tensors = {name.removeprefix("choices/"): part for name, part in parts.items() if isinstance(part, Tensor)}
    try:
        return Choices.of(tensors, told)
    except ValueError as error:
        raise ValueError(f"load: {path}: {error}") from error
