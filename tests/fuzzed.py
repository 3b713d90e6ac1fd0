"""``discdiff.load`` on damaged and odd files: each in a child with limits of time and memory, and what came of it.

    python tests/fuzzed.py            all files, and their number by what came of them
    python tests/fuzzed.py --show     those that were not loaded rightly and not refused by us, too

A child is forked from this process, which has imported everything, so that what a file makes load import is seen. What
may come of a file:

    right     it loaded, and says what the undamaged one says where that can be known
    refused   an error of load's own: ValueError, FileNotFoundError, TypeError or ImportError, beginning with "load"
    foreign   any other error, of load or of the first call; or the child died
    hang      more than five seconds
    memory    more than 2 GB beside what the parent has
    code      something was run, imported, written or asked for over the net; or the hub's kernels were called
    silent    it loaded and says something else, though what was damaged is no matter of choice
"""

import faulthandler
import json
import os
import resource
import select
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
import traceback
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff.denoiser import Denoiser

SECONDS, BYTES = 5, 2 * 2**30
KINDS = ("right", "refused", "foreign", "hang", "memory", "code", "silent")
_OURS = (ValueError, FileNotFoundError, TypeError, ImportError)
_ROOT = str(Path(__file__).parent.parent)
_TRUSTED = (_ROOT, *{sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_WAIT = 12 * SECONDS  # on the wall: others use this machine too; what counts is the time of the child itself

Loader = Callable[[Path], Denoiser]


@dataclass(frozen=True)
class Case:
    """A file or folder that load is shown.

    Attributes:
        name: what was damaged, and how.
        make: writes it into an empty folder, and gives what load is given.
        like: the undamaged fixture that it was made from.
        same: whether it must say what that says, if it loads: what was damaged leaves no choice.
    """

    name: str
    make: Callable[[Path], Path]
    like: str = ""
    same: bool = True


@dataclass(frozen=True)
class Outcome:
    kind: str
    text: str


# --- the undamaged ----------------------------------------------------------------------------------------------------


@cache
def fixtures() -> Path:
    """A folder with every fixture, by its name, written once."""
    from every_checkpoint import EVERY

    folder = Path(tempfile.mkdtemp(prefix="fuzzed-"))
    for name, write in EVERY.items():
        if name != "DiffusionGemma" or _has_gemma():
            path = write(folder / name)
            if not path.is_relative_to(folder):  # what is shipped
                (folder / name).mkdir()
                shutil.copy(path, folder / name)
    return folder


def given(name: str, folder: Path) -> Path:
    """What load is given of a fixture in a folder: the folder, or the one file in it."""
    files = list(folder.iterdir())
    alone = len(files) == 1 and files[0].is_file() and not name.endswith("trainer")
    return files[0] if alone else folder


def names() -> list[str]:
    """Of all fixtures."""
    return sorted(path.name for path in fixtures().iterdir())


def _has_gemma() -> bool:
    import transformers

    return hasattr(transformers, "DiffusionGemmaConfig")


@cache
def said_by(name: str) -> tuple[Tensor, Tensor, dd.Process]:
    """States, what the undamaged one says of them, and its process."""
    model = dd.load(given(name, fixtures() / name), quiet=True)
    length = 64 if name == "discdiff" else 8
    x = torch.randint(model.process.states, (2, length), generator=torch.Generator().manual_seed(1))
    _sample(model, x)  # once here, so that what is compiled for it is there
    return x, _said(model, x), model.process


def _said(model: Denoiser, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x, 0.5).output.source


# --- a child ----------------------------------------------------------------------------------------------------------


def _watch(ran: list[str]) -> None:
    """Write down what code does that only reads: an audit hook, and stubs of what asks the hub for kernels."""

    def asked(name: str) -> Callable[..., object]:
        def ask(*arguments: object, **named: object) -> None:
            ran.append(f"kernels: {name}{arguments}")
            raise OSError("no kernels here")

        return ask

    stub: Any = types.ModuleType("kernels")
    stub.__getattr__ = asked
    for name in ("get_kernel", "get_local_kernel", "load_kernel", "kernelize", "has_kernel"):
        setattr(stub, name, asked(name))
    sys.modules["kernels"] = stub
    hub = sys.modules.get("transformers.integrations.hub_kernels")
    for name in ("get_kernel", "lazy_load_kernel", "load_and_register_attn_kernel"):
        if hasattr(hub, name):
            setattr(hub, name, asked(name))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        told = _suspicious(event, arguments)
        if told:
            ran.append(f"{event}: {told}"[:300])

    sys.addaudithook(hook)


_ACTS = ("os.system", "os.exec", "os.fork", "os.forkpty", "os.spawn", "os.posix_spawn", "os.startfile", "os.remove")
_ACTS += ("os.rename", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.chmod", "os.truncate", "os.putenv")
_ACTS += ("subprocess.Popen", "pty.spawn", "socket.", "urllib.", "http.", "ftplib.", "smtplib.", "shutil.")
_ACTS += ("webbrowser", "pickle.find_class", "code.__new__", "ctypes.dlopen")


def _of_an_import(frame: types.FrameType | None) -> bool:
    """Whether a module is being imported, which is looked at itself, or the suite's checker of shapes writes code."""
    checker = frame is not None and frame.f_code.co_filename.endswith(("/utilfuncmake.py", "/jaxtyping/_decorator.py"))
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return checker or frame is not None


def _suspicious(event: str, arguments: tuple[Any, ...]) -> str:
    """What is said of an event that reading files has no use for; "" for one that it has."""
    if event.startswith(_ACTS):
        return str(arguments)
    if event == "open":
        path, mode, flags = arguments
        writes = (isinstance(mode, str) and set(mode) & set("wax+")) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return str(path) if writes and path != os.devnull else ""
    if event in ("exec", "compile") and _of_an_import(sys._getframe(2)):
        return ""
    if event == "exec":
        return "" if arguments[0].co_filename.startswith((*_TRUSTED, "<frozen")) else arguments[0].co_filename
    if event == "compile":  # the parser alone, as of ast.literal_eval, says "<unknown>"
        name = arguments[1]
        name = name.decode() if isinstance(name, bytes) else str(name)
        return "" if name == "<unknown>" or name.startswith(_TRUSTED) else name
    if event == "import":
        file = arguments[1]
        return "" if file is None or str(file).startswith(_TRUSTED) else str(file)
    return ""


def _child(case: Case, folder: Path, load: Loader) -> Outcome:
    """Load it here and now."""
    made = case.make(folder)
    reference = said_by(case.like) if case.like else None
    memory = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    _limited(resource.RLIMIT_AS, memory + BYTES)
    _limited(resource.RLIMIT_CPU, int(time.process_time()) + 1 + SECONDS)
    ran: list[str] = []
    _watch(ran)
    try:
        found = _examined(made, reference, case.same, load)
    except MemoryError as error:
        found = Outcome("memory", repr(error))
    _limited(resource.RLIMIT_AS, resource.getrlimit(resource.RLIMIT_AS)[1])
    return Outcome("code", ran[0]) if ran else found


def _limited(what: int, most: int) -> None:
    resource.setrlimit(what, (most, resource.getrlimit(what)[1]))


def _examined(made: Path, reference: tuple[Tensor, Tensor, dd.Process] | None, same: bool, load: Loader) -> Outcome:
    try:
        model = load(made)
    except BaseException as error:
        ours = isinstance(error, _OURS) and str(error).startswith("load")
        return Outcome("memory" if _of_memory(error) else "refused" if ours else "foreign", _told(error))
    if reference is None:
        return Outcome("right", str(model.process))
    x, expected, process = reference
    try:
        said = _said(model, x)
        if not bool(said.isfinite().all()) and bool(expected.isfinite().all()):
            return _of_nothing(model, x)
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1].filename
        ours = isinstance(error, ValueError | TypeError) and place.startswith(_ROOT)
        return Outcome("memory" if _of_memory(error) else "refused" if ours else "foreign", _told(error))
    if not same:
        return Outcome("right", str(model.process))
    if said.shape != expected.shape or not torch.allclose(said.double(), expected.double(), rtol=1e-2, atol=1e-2):
        return Outcome("silent", f"other logits; {model.process}")
    if model.process != process:
        return Outcome("silent", f"{model.process} in place of {process}")
    return Outcome("right", str(model.process))


def _of_nothing(model: Denoiser, x: Tensor) -> Outcome:
    """Logits that are none must be told before a token is made of them."""
    try:
        _sample(model, x)
    except ValueError as error:
        return Outcome("refused", _told(error))
    return Outcome("silent", "logits that are not finite, and no error")


def _sample(model: Denoiser, x: Tensor) -> None:
    operator = S.Euler() if model.predicts == "ratio" else S.Ancestral()
    dd.Sampler(model.process, model, operator, grid=[0.9, 0.5, 0.0]).sample(*x.shape, seed=0, initial=x)


def _of_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError) or "allocate memory" in str(error) or "Cannot allocate" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _told(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    name = "/".join(Path(last.filename).parts[-2:])
    return f"{type(error).__name__} at {name}:{last.lineno}: {str(error)[:200]}".encode("utf-8", "replace").decode()


# --- the parent -------------------------------------------------------------------------------------------------------


def examined(case: Case, load: Loader = lambda path: dd.load(path, quiet=True)) -> Outcome:
    """What comes of a case, in a child."""
    if case.like:
        said_by(case.like)
    folder = Path(tempfile.mkdtemp(prefix="case-"))
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        _be_child(case, folder, load, writes)
    os.close(writes)
    try:
        return _awaited(child, reads)
    finally:
        os.close(reads)
        shutil.rmtree(folder, ignore_errors=True)


def _be_child(case: Case, folder: Path, load: Loader, writes: int) -> None:
    """Never returns."""
    try:
        silent = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(silent, stream)
        faulthandler.disable()
        warnings.simplefilter("ignore")
        sys.dont_write_bytecode = True
        found = _child(case, folder, load)
        os.write(writes, json.dumps([found.kind, found.text]).encode())
    except BaseException as error:
        os.write(writes, json.dumps(["foreign", f"the harness: {_told(error)}"]).encode())
    finally:
        os._exit(0)


def _awaited(child: int, reads: int) -> Outcome:
    said = b""
    until = time.monotonic() + _WAIT
    while time.monotonic() < until:
        ready, _, _ = select.select([reads], [], [], max(0.0, until - time.monotonic()))
        part = os.read(reads, 1 << 16) if ready else b""
        if ready and not part:
            break
        said += part
    else:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if said:
        return Outcome(*json.loads(said))
    killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if killed in (signal.SIGKILL, signal.SIGXCPU):
        return Outcome("hang", f"more than {SECONDS} s")
    return Outcome("foreign", f"the child died of signal {killed}")


def run(cases: list[Case]) -> Iterator[tuple[Case, Outcome]]:
    """Every case with what came of it."""
    for case in cases:
        yield case, examined(case)


def line(outcomes: list[Outcome]) -> str:
    """Their number by kind."""
    count = Counter(outcome.kind for outcome in outcomes)
    return f"{len(outcomes)} files: " + ", ".join(f"{count[kind]} {kind}" for kind in KINDS)


def main() -> int:
    from fuzz_files import cases

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    wanted = [word for word in sys.argv[1:] if not word.startswith("-")]
    for name in names():
        said_by(name)  # so that a child has nothing left to import
    found = []
    for case, outcome in run([one for one in cases() if not wanted or any(word in one.name for word in wanted)]):
        found.append(outcome)
        if "--show" in sys.argv and outcome.kind not in ("right", "refused"):
            print(f"{outcome.kind:8} {case.name}: {outcome.text}", flush=True)
        if "--all" in sys.argv and outcome.kind in ("right", "refused"):
            print(f"{outcome.kind:8} {case.name}: {outcome.text}", flush=True)
    shutil.rmtree(fixtures())
    print(line(found))
    return int(any(outcome.kind not in ("right", "refused") for outcome in found))


if __name__ == "__main__":
    sys.exit(main())
