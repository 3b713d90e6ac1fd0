"""The three inverse problems of docs/steering/digits.py: images, measurements, potentials, and what judges an answer.

The images are scikit-learn's, 8 x 8 pixels with grey levels 0 to 16. The networks have seen every other image. The ten
true images, one of each digit, are among those that they have not seen.
"""

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import discdiff as dd
from discdiff.adapters.own import load_trained
from discdiff.demo.data import GREY_LEVELS

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "parameterisations")]
import networks as judged  # noqa: E402

SIDE, LENGTH = 8, 64
LEVELS = torch.arange(GREY_LEVELS).double()
DIGITS = "0123456789abcdefg"  # a grey level is one character of a stored image


def text_of(image: Tensor) -> str:
    """Return an image (64,) as a text of 64 characters."""
    return "".join(DIGITS[level] for level in image.tolist())


def image_of(text: str) -> Tensor:
    """Return the image (64,) of a text."""
    return torch.tensor([DIGITS.index(character) for character in text])


# --- data and networks ----------------------------------------------------------------------------------------------


@functools.cache
def labels() -> Tensor:
    """The digits (1797,) that the images show."""
    from sklearn.datasets import load_digits

    return torch.as_tensor(load_digits().target)


@functools.cache
def truths() -> tuple[Tensor, Tensor]:
    """The true images (10, 64), the first unseen image of each digit, and what they show (10,)."""
    _, unseen = judged.halves("digits")
    shown = labels()[1::2]
    first = torch.stack([(shown == digit).nonzero()[0, 0] for digit in range(10)])
    return unseen[first], shown[first]


@functools.cache
def network(process: str) -> dd.Denoiser:
    """The network of a process, "masked" or "uniform", which has seen half of the images."""
    masked = HERE / "digits-masked.safetensors"
    uniform = HERE.parent / "parameterisations" / "digits-loo.safetensors"
    return load_trained(masked if process == "masked" else uniform)


# --- measurements ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Problem:
    """A kind of measurement, and what was measured at each true image.

    Attributes:
        name: its name.
        measurements: one for each true image.
        potentials: log p(y | z) of noisy images z (N, 64) if hidden pixels were independent, with the mean frequencies
            of each pixel; at time 0 it is the measurement itself.
        errors: maps images (T, 64), one for each true image, to how far each is from what was measured, (T,).
        scored: the pixels (64,) whose distance to the true image counts.
    """

    name: str
    measurements: list[dd.Measurement]
    potentials: list[Callable[[Tensor, float], Tensor]]
    errors: Callable[[Tensor], Tensor]
    scored: Tensor

    def log_likelihood(self, images: Tensor) -> Tensor:
        """log p(y | x) of images (T, n, 64), n for each true image, (T, n)."""
        return torch.stack([measured(x) for measured, x in zip(self.measurements, images, strict=True)])


@functools.cache
def frequencies() -> Tensor:
    """How often each pixel has each grey level in the images that the networks have seen, (64, 17)."""
    seen, _ = judged.halves("digits")
    counts = torch.nn.functional.one_hot(seen, GREY_LEVELS).sum(0).double() + 0.1
    return counts / counts.sum(-1, keepdim=True)


def known(z: Tensor) -> Tensor:
    """The law of each pixel of images with masks (N, 64): a point where it is known, else its frequencies."""
    one = torch.nn.functional.one_hot(z, GREY_LEVELS + 1)[..., :GREY_LEVELS].double()
    return torch.where((z == GREY_LEVELS)[..., None], frequencies(), one)


def linear(name: str, matrix: Tensor, scale: float, noisy: bool, scored: Tensor) -> Problem:
    """Weighted sums of the grey levels, with normal noise."""
    images, _ = truths()
    noise = torch.randn(len(images), len(matrix), generator=torch.Generator().manual_seed(1)).double()
    y = images.double() @ matrix.T + scale * noise * noisy

    def potential(y: Tensor) -> Callable[[Tensor, float], Tensor]:
        def log_psi(z: Tensor, t: float) -> Tensor:
            law = known(z)
            mean = law @ LEVELS
            variance = scale**2 + (law @ LEVELS**2 - mean**2).clamp(min=0) @ (matrix**2).T
            return (-((y - mean @ matrix.T) ** 2) / variance - (2 * math.pi * variance).log()).sum(-1) / 2

        return log_psi

    def errors(x: Tensor) -> Tensor:
        return (x.double() @ matrix.T - y).square().mean(-1).sqrt()

    measured = [dd.Measurement(LEVELS, matrix, dd.GaussianNoise(one, scale)) for one in y]
    return Problem(name, measured, list(map(potential, y)), errors, scored)


def inpainting() -> Problem:
    """The upper half is known. As a likelihood, its grey levels have a standard deviation of 1."""
    lower = torch.arange(LENGTH) >= LENGTH // 2
    return linear("inpainting", torch.eye(LENGTH).double()[: LENGTH // 2], 1.0, noisy=False, scored=lower)


def super_resolution() -> Problem:
    """The means of the 16 blocks of 2 x 2 pixels, with normal noise of half a grey level."""
    block = torch.arange(LENGTH) // (2 * SIDE) * (SIDE // 2) + torch.arange(LENGTH) % SIDE // 2
    matrix = torch.nn.functional.one_hot(block).T.double() / 4
    return linear("super-resolution", matrix, 0.5, noisy=True, scored=torch.ones(LENGTH, dtype=torch.bool))


RIGHT = 0.98  # the probability that a sum modulo 3 is read rightly; the two wrong ones share the rest


def remainders(x: Tensor) -> Tensor:
    """The sum of each of the eight rows of images (..., 64), modulo 3, (..., 8)."""
    return x.unflatten(-1, (SIDE, SIDE)).sum(-1) % 3


class Phases:
    """log p(y | s) of the angles 2 pi s / 3 of sums s of rows, smooth in s: kappa cos(2 pi (s - y) / 3) + const."""

    kappa = math.log(2 * RIGHT / (1 - RIGHT)) / 1.5

    def __init__(self, y: Tensor) -> None:
        self.y = y

    def __call__(self, angle: Tensor) -> Tensor:
        log_p = self.kappa * (angle - 2 * math.pi / 3 * self.y).cos()
        return (log_p - math.log(math.exp(self.kappa) + 2 * math.exp(-self.kappa / 2))).sum(-1)


def modulo() -> Problem:
    """The remainder of each row's sum modulo 3; each is read rightly with probability .98."""
    images, _ = truths()
    y = remainders(images)

    def angles(e: Tensor) -> Tensor:
        return 2 * math.pi / 3 * e[..., 0].unflatten(-1, (SIDE, SIDE)).sum(-1)

    turn = torch.exp(2j * math.pi / 3 * LEVELS[:3, None] * LEVELS)  # (3, 17): e^{2 pi i k v / 3}
    back = turn[:, :3].conj() / 3  # the inverse transform, (3 powers, 3 remainders)

    def potential(y: Tensor) -> Callable[[Tensor, float], Tensor]:
        read = torch.full((SIDE, 3), (1 - RIGHT) / 2, dtype=torch.float64).scatter(1, y[:, None], RIGHT)

        def log_psi(z: Tensor, t: float) -> Tensor:
            waves = (known(z).to(torch.complex128) @ turn.T).unflatten(1, (SIDE, SIDE)).prod(2)
            p = (waves @ back).real.clamp(min=0)  # the law of each row's remainder
            return (p * read).sum(-1).log().sum(-1)

        return log_psi

    def errors(x: Tensor) -> Tensor:
        return (remainders(x) != y).sum(-1).double()

    measured = [dd.Measurement(LEVELS, angles, Phases(one)) for one in y]
    whole = torch.ones(LENGTH, dtype=torch.bool)
    return Problem("row sums modulo 3", measured, list(map(potential, y)), errors, whole)


def same_remainders(y: Tensor) -> dd.Constraint:
    """The constraint that the sums of all rows have the remainders y (8,): states are a pixel and a sum modulo 3."""
    moves = torch.full((LENGTH * 3 + 4, GREY_LEVELS), LENGTH * 3 + 3)
    for pixel in range(LENGTH):
        last = pixel % SIDE == SIDE - 1
        for before in range(3):
            after = (before + torch.arange(GREY_LEVELS)) % 3
            there = torch.where(after == y[pixel // SIDE], 3 * (pixel + 1), LENGTH * 3 + 3) if last else None
            moves[3 * pixel + before] = 3 * (pixel + 1) + after if there is None else there
    accept = torch.zeros(len(moves), dtype=torch.bool)
    accept[LENGTH * 3] = True
    return dd.Constraint(moves, 0, accept)


def same_pixels(image: Tensor) -> dd.Constraint:
    """The constraint that the upper half is that of an image."""
    moves = torch.full((LENGTH + 2, GREY_LEVELS), LENGTH + 1)
    for pixel in range(LENGTH):
        moves[pixel, image[pixel] if pixel < LENGTH // 2 else slice(None)] = pixel + 1
    accept = torch.arange(len(moves)) == LENGTH
    return dd.Constraint(moves, 0, accept)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "inpainting": inpainting, "super-resolution": super_resolution, "row sums modulo 3": modulo,
}  # fmt: skip


def observed(problem: Problem) -> Tensor:
    """What was measured, as images (T, 8, 8) with NaN where nothing was."""
    images = truths()[0].double().view(-1, SIDE, SIDE)
    if problem.name == "inpainting":
        images[:, SIDE // 2 :] = torch.nan
        return images
    if problem.name == "super-resolution":
        y = torch.stack([measured.noise.y for measured in problem.measurements])  # type: ignore[attr-defined]
        return y.view(-1, SIDE // 2, SIDE // 2).repeat_interleave(2, 1).repeat_interleave(2, 2)
    return (remainders(truths()[0]) * 8.0)[..., None].expand(-1, -1, SIDE)


# --- what judges an answer ------------------------------------------------------------------------------------------


@functools.cache
def classifier() -> Callable[[Tensor], Tensor]:
    """A support vector machine that was fitted to the images that the networks have seen: (N, 64) -> (N,) digits."""
    from sklearn.svm import SVC

    seen, _ = judged.halves("digits")
    fitted = SVC(gamma=0.001).fit(seen.numpy(), labels()[::2].numpy())
    return lambda images: torch.as_tensor(fitted.predict(images.numpy()))


def nats(images: Tensor) -> Tensor:
    """-log p of images (N, 64) a pixel under an autoregressive network that has seen the other half, (N,) nats."""
    with torch.no_grad():
        return judged.judge("digits")(images).mean(-1).double()


def apart(images: Tensor) -> Tensor:
    """The mean distance between answers to one true image, by pairs of seeds: (S, T, 64) -> (), grey levels."""
    x = images.double()
    distance = (x[:, None] - x[None]).square().mean(-1).sqrt()
    return distance.sum((0, 1)).mean() / (len(x) * (len(x) - 1))
