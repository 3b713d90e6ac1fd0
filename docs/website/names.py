"""The public names of discdiff: one address for each object, at the shortest door that offers it."""

import importlib
import inspect
import pkgutil
from dataclasses import dataclass
from types import ModuleType

# Doors in the order in which they are tried. What several offer is documented at the first.
DOORS = (
    "discdiff", "discdiff.samplers", "discdiff.theory", "discdiff.theory.fit", "discdiff.losses", "discdiff.kernels",
    "discdiff.diagnostics", "discdiff.bridge", "discdiff.grid", "discdiff.sampling", "discdiff.guidance",
    "discdiff.process", "discdiff.prediction", "discdiff.denoiser", "discdiff.operator", "discdiff.choices",
    "discdiff.adapters",
)  # fmt: skip
# The example and the command: networks of a few layers, and what reads command lines.
APART = ("discdiff.demo", "discdiff.command")


@dataclass(frozen=True)
class Name:
    """A public name: its door, the object, and what kind of object that is."""

    door: str
    name: str
    value: object

    @property
    def address(self) -> str:
        return f"{self.door}.{self.name}"

    @property
    def kind(self) -> str:
        if inspect.isclass(self.value):
            return "class"
        if isinstance(self.value, ModuleType):
            return "module"
        return "function" if inspect.isroutine(self.value) else "data"

    @property
    def origin(self) -> str:
        """The address at which the object is defined."""
        return f"{getattr(self.value, '__module__', self.door)}.{getattr(self.value, '__qualname__', self.name)}"


def door(path: str) -> ModuleType:
    """Return the module of a door; ``discdiff.grid`` is an attribute, not a module of that address."""
    value: object = importlib.import_module("discdiff")
    for part in path.split(".")[1:]:
        value = getattr(value, part) if hasattr(value, part) else importlib.import_module(path)
    if not isinstance(value, ModuleType):
        raise TypeError(f"{path} is no module")
    return value


def doors() -> tuple[str, ...]:
    """List the doors: those above, then every other module that discdiff offers, and every other room with names."""
    package = door("discdiff")
    modules = [f"discdiff.{name}" for name in package.__all__ if isinstance(getattr(package, name), ModuleType)]
    rooms = [f"discdiff.{found.name}" for found in pkgutil.iter_modules(package.__path__) if found.ispkg]
    return (*DOORS, *dict.fromkeys(room for room in (*modules, *rooms) if room not in (*DOORS, *APART)))


def offered(module: ModuleType) -> list[str]:
    """List the names of a door: its ``__all__``, for the kernels that of their dispatcher."""
    listed = getattr(module, "__all__", None) or module.dispatch.__all__  # kernels has no file of its own
    return list(listed)


def public() -> dict[str, Name]:
    """Map the address of each public object to it; doors themselves are left out."""
    modules = {path: door(path) for path in doors()}
    seen = {id(module) for module in modules.values()}
    found: dict[str, Name] = {}
    for path, module in modules.items():
        for name in offered(module):
            value = getattr(module, name)
            identity = id(value) if callable(value) or isinstance(value, ModuleType) else hash((path, name))
            if identity not in seen:
                seen.add(identity)
                one = Name(path, name, value)
                found[one.address] = one
    return found
