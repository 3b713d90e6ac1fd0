"""Exact predictions for a small law by listing every sequence of V^L."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.checks import array, real, whole
from discdiff.denoiser import Denoiser
from discdiff.process import Interpolant, Process
from discdiff.theory.log_sums import Listed
from discdiff.theory.oracles import Oracle, pick, uniforms
from discdiff.theory.tilt import Tilt, fitted, log_weights

__all__ = ["Coupling", "Enumeration", "all_states", "check_size", "law_of_data", "law_of_prior", "state_index"]

_MOST_BYTES = 2 << 30


def check_size(states: int, length: int, where: str, axes: int = 1) -> None:
    """Raise ValueError if arrays over all S**L states would exceed 2 GiB; call it before allocating them.

    Args:
        states: S, the number of states of one site.
        length: L.
        where: the caller's name, for the message.
        axes: how many axes of S**L float64 numbers the largest array has: 1 for a law, 2 for a matrix.
    """
    needed = 8 * states ** (length * axes)
    if needed > _MOST_BYTES:
        count = states**length
        number = f" = {count}" if count < 10**15 else f" (a number of {int(length * math.log10(states)) + 1} digits)"
        what = "a matrix over them takes" if axes == 2 else "a law over them takes"
        raise ValueError(
            f"{where}: {states}**{length}{number} states are too many to list: {what} {_told(needed)}, the limit is "
            f"{_told(_MOST_BYTES)}; take a smaller length or vocabulary, or draw samples and test them against a "
            "structured oracle (MarkovChain, HMM, Tree, ProductMixture) with theory.fit"
        )


def _told(size: int) -> str:
    return f"{size / 2**30:.3g} GiB" if size < 2**80 else f"2**{size.bit_length() - 1} bytes"


def all_states(states: int, length: int) -> Int[Tensor, "N L"]:
    """List every sequence over 0..states-1, (N, L), first site slowest: row i holds the base-``states`` digits of i.

    Raises:
        ValueError: for too many sequences (``check_size``).
    """
    check_size(states, length, "all_states")
    return torch.cartesian_prod(*[torch.arange(states)] * length).view(-1, length)


def state_index(tokens: Int[Tensor, "*B L"], states: int) -> Int[Tensor, "*B"]:
    """Return the row of ``all_states`` that holds each sequence of (*B, L)."""
    return (tokens * states ** torch.arange(tokens.shape[-1] - 1, -1, -1)).sum(-1)


def law_of_data(process: Process, law: Float[Tensor, " N"], length: int) -> Float[Tensor, " M"]:
    """Restrict a law (N,) over the S**L states at time 0 to the n**L data sequences, (M,).

    Mass on other states is left out.
    """
    rank = torch.full((max(process.columns, process.vocab_size),), -1)  # index of each column among the data tokens
    rank[process.data_tokens] = torch.arange(len(process.data_tokens))
    digits = rank[process.column(all_states(process.states, length))]
    clean = (digits >= 0).all(-1)
    on_data = torch.zeros(len(process.data_tokens) ** length, dtype=torch.float64)
    return on_data.index_add(0, state_index(digits[clean], len(process.data_tokens)), law[clean])


def law_of_prior(
    process: Process,
    length: int,
    prompt: Tensor | Sequence[int] | None = None,
    frozen: Tensor | Sequence[bool] | None = None,
) -> Float[Tensor, " N"]:
    """Compute the prior over the N = S**L states, (N,), with the prompt (L,) at frozen sites."""
    check_size(process.states, length, f"the prior of {process}")
    _, values, log_p = process.prior(1, length).fork()
    if prompt is not None and frozen is not None:
        given, where = torch.as_tensor(prompt).expand(values.shape), torch.as_tensor(frozen, dtype=torch.bool)
        values = torch.where(where, process.place(given, values), values)
    law = torch.zeros(process.states**length, dtype=torch.float64)
    return law.index_add(0, state_index(values, process.states), log_p.exp())


def sizes(vocab_size: object, length: object, where: str, axes: int = 1) -> tuple[int, int, int]:
    """Return V, L and V**L; raise TypeError or ValueError unless they are whole numbers small enough to list."""
    v, n = whole(vocab_size, f"{where}: vocab_size", 1), whole(length, f"{where}: length", 1)
    check_size(v, n, where, axes)
    return v, n, v**n


class Enumeration(Oracle):
    """Data law on V^L given by its probabilities.

    Shapes: the law (N,) with N = V**L; laws over the M = S**L noisy states (M,).

    Args:
        p0: (V**L,) probabilities, first site slowest.
        vocab_size: V.
        length: L.

    Raises:
        ValueError: if ``p0`` has another size or is not a law, or V^L is too large.
    """

    def __init__(self, p0: Float[Tensor, " N"], *, vocab_size: int, length: int) -> None:
        vocab_size, length, size = sizes(vocab_size, length, "Enumeration")
        p0 = array(p0, "p0", torch.float64)
        if p0.shape != (size,):
            raise ValueError(f"p0 must have shape ({size},) = (V**L,), got {tuple(p0.shape)}")
        if not bool((p0 >= 0).all()) or abs(float(p0.sum()) - 1) > 1e-6:
            raise ValueError(
                "p0 must be a law, with entries of at least 0 that sum to 1: its least entry is "
                f"{float(p0.min()):g} and its sum {float(p0.sum()):.12g}"
            )
        # float32 input sums to 1 only within 1e-6: normalised again in float64
        self.p0: Tensor = p0 / p0.sum()
        self.alphabet: int = vocab_size
        self.length: int = length

    def leave_one_out(self, evidence: Float[Tensor, "B L n"]) -> Float[Tensor, "B L n"]:
        sums = [self._sum_out(evidence, site).expand(len(evidence), -1) for site in range(self.length)]
        return torch.stack(sums, 1)

    def log_evidence(self, evidence: Float[Tensor, "B L n"]) -> Float[Tensor, " B"]:
        return self._sum_out(evidence, None).log()

    def draw(self, evidence: Float[Tensor, "B L n"], seed: int) -> Int[Tensor, "B L"]:
        weights = self.p0.expand(len(evidence), -1)
        for site, tokens in enumerate(all_states(self.alphabet, self.length).to(evidence.device).T):
            weights = weights * evidence[:, site, tokens]
        u = uniforms(1, len(evidence), seed, evidence.device)[0]
        return all_states(self.alphabet, self.length).to(evidence.device)[pick(weights, u)]

    def _sum_out(self, evidence: Tensor, kept: int | None) -> Tensor:
        """Compute sum_x p0(x) prod_{j != kept} e_j(x_j) for each value of x_kept; if ``kept`` is None, one sum."""
        total = self.p0.view(-1, *[self.alphabet] * self.length)
        axis = self.length
        for site in reversed(range(self.length)):
            if site != kept:
                shape = [len(evidence), *[1] * (total.ndim - 1)]
                shape[axis] = self.alphabet
                total = (total * evidence[:, site].reshape(shape)).sum(axis)
            axis -= 1
        return total

    def marginal(self, process: Process, t: float) -> Float[Tensor, " M"]:
        """Compute p_t over the S**L noisy states, first site slowest."""
        self._check(process)
        check_size(process.states, self.length, f"p_t of {process}")
        law = self.p0.view([self.alphabet] * self.length)
        forward = process.marginals(t)
        for _ in range(self.length):  # each pass contracts the first axis and puts it last
            law = torch.tensordot(law, forward, ([0], [0]))
        return law.flatten()

    def reachable(self, process: Process, t: float) -> Bool[Tensor, " M"]:
        """Return a mask of the S**L noisy states with p_t > 0; alpha = 0 means the limit alpha -> 0+.

        Raises:
            TypeError, ValueError: for a time outside [0, 1].
        """
        t = real(t, "reachable: t", "[0, 1]")
        z = all_states(process.states, self.length)
        alpha = torch.full(z.shape, float(process.schedule.alpha(t)), dtype=torch.float64)
        return self._sum_out(process.evidence(z, alpha), None) > 0

    def tilted(self, log_w: Tilt | Tensor) -> "Enumeration":
        """Return the law p0 W / Z.

        Args:
            log_w: (N,) natural logs of W with N = V**L, first site slowest; or a ``Tilt``.

        Raises:
            TypeError: for another type.
            ValueError: for another shape, NaN or +inf, or if Z = 0.
        """
        p0 = self._weighed(log_w).log_p.softmax(0)
        return Enumeration(p0, vocab_size=self.alphabet, length=self.length)

    def _plain(self) -> Listed:
        return Listed(self.p0.double().log(), self.alphabet, self.length)

    def _weighed(self, log_w: Tilt | Tensor) -> Listed:
        log_p = self.p0.double().log()
        if isinstance(log_w, Tilt):
            tilt = fitted(log_w, self.alphabet, self.length, "Enumeration")
            log_p = log_p + tilt(all_states(self.alphabet, self.length).to(log_p.device))
        else:
            size = len(log_p)
            accepted = f"({size},) = (V**L,), or a Tilt"
            log_p = log_p + log_weights(log_w, "Enumeration: log_w", accepted, (size,)).to(log_p.device)
        return Listed(log_p, self.alphabet, self.length)


class Coupling(Oracle):
    """Joint law of data and source on V^L, with the exact denoiser of an ``Interpolant`` between them.

    For a row with source tokens u, the data has the law p(x0 | u).

    Shapes: the joint law (N, N) with N = V**L; laws over the M = S**L noisy states (M,).

    Args:
        joint: (V**L, V**L) probabilities of (data, source), first site slowest in both.
        vocab_size: V.
        length: L.

    Raises:
        ValueError: if ``joint`` has another size or is not a law.
    """

    def __init__(self, joint: Float[Tensor, "N N"], *, vocab_size: int, length: int) -> None:
        vocab_size, length, size = sizes(vocab_size, length, "Coupling", axes=2)
        joint = array(joint, "joint", torch.float64)
        if joint.shape != (size, size):
            raise ValueError(f"joint must have shape ({size}, {size}) = (V**L, V**L), got {tuple(joint.shape)}")
        self.joint: Tensor = Enumeration(joint.flatten(), vocab_size=size, length=2).p0.view(size, size)
        self.alphabet: int = vocab_size
        self.length: int = length
        self.data: Enumeration = Enumeration(self.joint.sum(1), vocab_size=vocab_size, length=length)
        self.source: Enumeration = Enumeration(self.joint.sum(0), vocab_size=vocab_size, length=length)

    def log_marginal(self, process: Process, z: Int[Tensor, "B L"], t: float) -> Float[Tensor, " B"]:
        """Compute log p_t of states (z, u), natural log, including the probability of the source tokens u."""
        world, u = self.given(process, z), z % self.alphabet
        clean = process.place(torch.arange(self.alphabet), z[..., None])
        evidence = process.kernel(t)[clean, z[..., None]]
        return world.log_evidence(evidence) + self.source.p0.log()[state_index(u, self.alphabet)]

    def given(self, process: Process, x: Int[Tensor, "B L"]) -> Oracle:
        """Return the law of the data given the source tokens in each row.

        Raises:
            ValueError: if ``process`` is not an Interpolant.
        """
        if process.pairs is None:
            raise ValueError(f"a Coupling is the oracle of an Interpolant, whose states show the source; got {process}")
        rows = self.joint.T[state_index(process.pairs.split(x)[1], self.alphabet)]
        known = rows.sum(-1, keepdim=True)
        conditional = torch.where(known > 0, rows / known, 0.0)  # a source of probability 0 gets zeros
        world = Enumeration(self.data.p0, vocab_size=self.alphabet, length=self.length)
        world.p0 = conditional  # a law for each row
        return world

    def initial(self, process: Interpolant) -> Float[Tensor, " M"]:
        """Compute the law of a sampler's initial states (u, u), where u is drawn from the source.

        Pass the result to ``theory.law`` as ``initial``.
        """
        u = all_states(self.alphabet, self.length)
        law = torch.zeros(process.states**self.length, dtype=torch.float64)
        return law.index_add(0, state_index(process.join(u, u), process.states), self.source.p0)

    def without_source(self, process: Process) -> Denoiser:
        """Return the exact denoiser of p(x0_i | x_t) for a network that does not see the source.

        x_t has the token of x0 with probability alpha(t) at each site, else that of the source. ``dd.learning.Reflow``
        trains this denoiser on a process without pairs.

        Raises:
            ValueError: if the states of the process are not the V tokens, or its noise law changes with time.
        """
        if process.states != self.alphabet or not process.one_noise_law:
            raise ValueError(
                f"without_source: takes a process of {self.alphabet} states with one noise law, such as Uniform, "
                f"got {process}"
            )
        x, joint = all_states(self.alphabet, self.length), self.joint
        clean = torch.nn.functional.one_hot(x, self.alphabet).double().flatten(1)

        def log_d(z: Tensor, alpha: Tensor | None) -> Tensor:
            assert alpha is not None
            same = (z[:, None] == x).double()  # (B, N, L)
            a = alpha[:, None, None, None]
            law = (a * same[:, :, None] + (1 - a) * same[:, None]).prod(-1) * joint  # (B, data, source)
            rows = (law.sum(-1) @ clean).unflatten(-1, (self.length, self.alphabet))
            met = rows.sum(-1, keepdim=True) > 0
            return torch.where(met, rows, 1.0).log().log_softmax(-1)  # uniform at states that never occur

        return Denoiser(log_d, process, "denoiser", time="alpha", scalar_time=True, length=self.length,
                        time_dtype=torch.float64)  # fmt: skip

    def leave_one_out(self, evidence: Float[Tensor, "B L n"]) -> Float[Tensor, "B L n"]:
        return self.data.leave_one_out(evidence)

    def log_evidence(self, evidence: Float[Tensor, "B L n"]) -> Float[Tensor, " B"]:
        return self.data.log_evidence(evidence)

    def draw(self, evidence: Float[Tensor, "B L n"], seed: int) -> Int[Tensor, "B L"]:
        return self.data.draw(evidence, seed)
