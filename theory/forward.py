r"""Check a process's clock, kernel, generator, marginals and bridges against its own transition matrix.

Each function takes a process and yields errors with the place where they occurred.
"""

import math

import torch
from torch import Tensor

from discdiff.process import Polynomial, Process
from discdiff.theory.dense import far, instants, pairs, rows, spread
from discdiff.theory.fit import improbable
from discdiff.theory.report import Errors, NotChecked

__all__ = [
    "bridge_is_bayes", "bridge_is_law", "bridge_keeps", "bridge_refuses", "chapman_kolmogorov", "derivative", "falls",
    "generator_rows", "identity", "inverse", "kolmogorov", "marginal", "other_clock", "prior", "products", "rate",
    "rows_are_laws", "sampling", "starts_at_one",
]  # fmt: skip


def _grid() -> Tensor:
    return torch.linspace(0, 1, 201, dtype=torch.float64)


def starts_at_one(process: Process) -> Errors:
    """Check alpha(0) = 1."""
    yield abs(process.schedule.alpha(0.0) - 1), "t = 0"


def falls(process: Process) -> Errors:
    """Check that alpha(t) never increases and stays in [0, 1]."""
    t = _grid()
    alpha = process.schedule.alpha(t)
    for k in range(len(t) - 1):
        rise = float(alpha[k + 1] - alpha[k])
        # a flat stretch is allowed: the process rests in it
        place = f"alpha({t[k]:.3g}) = {alpha[k]:.6g}, alpha({t[k + 1]:.3g}) = {alpha[k + 1]:.6g}"
        yield max(rise, 0.0) if rise == rise else rise, place
    yield max(float(-alpha.min()), float(alpha.max()) - 1, 0.0), "the range of alpha"


def derivative(process: Process) -> Errors:
    """Check the derivative of alpha against a difference quotient."""
    t, h = _grid()[2:-2], 1e-5
    alpha = process.schedule.alpha
    measured = (alpha(t + h) - alpha(t - h)) / (2 * h)
    error = (process.schedule.alpha_derivative(t) - measured).abs() / (1 + measured.abs())
    yield float(error.max()), f"t = {float(t[int(error.argmax())]):.3g}"


def inverse(process: Process) -> Errors:
    """Check that ``time`` inverts alpha: the time that it returns has the same alpha."""
    for t in (1.0, 0.9, 0.5, 0.1, 0.02):
        alpha = process.schedule.alpha(t)
        yield abs(process.schedule.alpha(process.schedule.time(alpha)) - alpha), f"t = {t}"


def other_clock(process: Process) -> Errors:
    """Check ``with_schedule``, which returns the same kind of process with another clock.

    Given the process's own clock, the result must equal the process.
    """
    same = process.with_schedule(process.schedule)
    yield float(same != process or hash(same) != hash(process)), "with_schedule(its own) is not equal to it"
    try:
        other = process.with_schedule(Polynomial(1.7))
    except ValueError:  # the process may refuse a clock that ends at alpha = 0
        return
    yield float(other == process or other.schedule != Polynomial(1.7)), "with_schedule(another)"
    yield float(other.states != process.states or type(other) is not type(process)), "with_schedule(another) is another"


# --- kernel, generator, rate ------------------------------------------------------------------------------------------


def rows_are_laws(process: Process) -> Errors:
    """Check that the rows of q_{t|s} are laws: they sum to 1 and no entry is negative."""
    for t, s, where in pairs(process):
        kernel = process.kernel(t, s)
        yield far(kernel.sum(-1), torch.ones(())), f"a row does not sum to 1 at {where}"
        yield max(float(-kernel.min()), 0.0), f"a negative entry at {where}"


def identity(process: Process) -> Errors:
    """Check that the transition matrix q_{t|t} is the identity."""
    for t, where in instants(process):
        yield far(process.kernel(t, t), torch.eye(process.states).double()), where


def chapman_kolmogorov(process: Process) -> Errors:
    """Check the Chapman-Kolmogorov equation q_{s|0} q_{t|s} = q_{t|0}."""
    for t, s, where in pairs(process):
        yield far(process.kernel(s) @ process.kernel(t, s), process.kernel(t)), where


def generator_rows(process: Process) -> Errors:
    """Check that the generator's rows sum to 0 and that no rate is negative."""
    for t, where in instants(process, 1e-15):
        rates = process.generator(process.schedule.alpha(t))
        yield far(rates.sum(-1), torch.zeros(())), f"a row does not sum to 0 at {where}"
        off = rates - torch.diag(rates.diagonal())
        yield max(float(-off.min()), 0.0), f"a negative rate at {where}"


def kolmogorov(process: Process) -> Errors:
    """Check dq_t / dsigma = q_t Q for the generator Q and sigma = -log alpha, by a difference quotient."""
    end = float(process.schedule.alpha(1.0))
    for t, where in instants(process, max(1e-15, end * 1.001), 0.999):
        alpha, h = process.schedule.alpha(t), 1e-5
        slope = (process.transition(alpha * math.exp(-h), 1.0) - process.transition(alpha * math.exp(h), 1.0)) / (2 * h)
        yield far(slope, process.transition(alpha, 1.0) @ process.generator(alpha)), where


def rate(process: Process) -> Errors:
    """Check dq_t / dt = q_t R for the matrix R of ``rate``, by a difference quotient."""
    h = 1e-5
    for t in (0.23, 0.51, 0.83):
        slope = (process.kernel(t + h) - process.kernel(t - h)) / (2 * h)
        yield far(slope, process.kernel(t) @ process.rate(t)) / (1 + float(slope.abs().max())), f"t = {t}"


# --- laws -------------------------------------------------------------------------------------------------------------


def prior(process: Process) -> Errors:
    """Check that the prior of a site is q_t at alpha = 0, and that two sites are independent.

    Raises:
        NotChecked: if alpha does not reach 0.
    """
    if process.schedule.alpha(1.0) != 0:
        raise NotChecked(f"alpha(1) = {process.schedule.alpha(1.0):g}: the prior is no law of the kernel")
    end = process.marginals(1.0)
    yield far(rows(process.prior(1, 1), process.states), end), "alpha = 0"
    z = torch.cartesian_prod(torch.arange(process.states), torch.arange(process.states))
    pair = process.prior(len(z), 2).log_prob(z).exp()
    yield far(pair, torch.kron(end[0], end[0])), "alpha = 0, two sites"


def marginal(process: Process) -> Errors:
    """Check ``marginal``, the law q_t(. | x0) of a site, against the transition matrix."""
    x0 = process.data_tokens[:, None]
    for t, where in instants(process):
        yield far(rows(process.marginal(x0, t), process.states), process.marginals(t)), where


def _ends(process: Process, t: float) -> tuple[Tensor, Tensor, Tensor]:
    """List all pairs x0, x_t with q_t(x_t | x0) > 0, (N, 1) each, and this probability, (N,)."""
    q = process.marginals(t)
    x0, x_t = (q > 0).nonzero(as_tuple=True)
    return process.data_tokens[x0][:, None], x_t[:, None], q[x0, x_t]


def _bridge_rows(process: Process, t: float, s: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x0, x_t, q = _ends(process, t)
    return x0, x_t, q, rows(process.bridge(x_t, x0, t, s), process.states)


def bridge_is_law(process: Process) -> Errors:
    """Check that the bridge's probabilities sum to 1 and none is negative."""
    for t, s, where in pairs(process):
        found = _bridge_rows(process, t, s)[3]
        yield far(found.sum(-1), torch.ones(())), where
        yield max(float(-found.min()), 0.0), f"a negative entry at {where}"


def bridge_is_bayes(process: Process) -> Errors:
    """Check the bridge q(x_s | x_t, x0) against Bayes' rule.

    Where q = q_t(x_t | x0) < 1e-4, errors have weight q / 1e-4, since the division by q loses digits.
    """
    for t, s, where in pairs(process):
        x0, x_t, q, found = _bridge_rows(process, t, s)
        rank = torch.searchsorted(process.data_tokens, x0[:, 0])
        expected = process.marginals(s)[rank] * process.kernel(t, s)[:, x_t[:, 0]].T / q[:, None]
        weight = (q / 1e-4).clamp(max=1)[:, None]
        yield far(found * weight, expected * weight), where


def bridge_keeps(process: Process) -> Errors:
    """Check that x_s has the law q_s(. | x0) if x_t is drawn from q_t(. | x0) and x_s from the bridge."""
    for t, s, where in pairs(process):
        x0, _, q, found = _bridge_rows(process, t, s)
        for rank, v in enumerate(process.data_tokens.tolist()):
            of = x0[:, 0] == v
            yield far(q[of] @ found[of], process.marginals(s)[rank]), f"x0 = {v}, {where}"


def bridge_refuses(process: Process) -> Errors:
    """Check that ``bridge`` raises ValueError for a state that cannot come from x0.

    Raises:
        NotChecked: if every state can come from every token.
    """
    found = False
    for t, where in instants(process, 1e-15):  # at alpha = 0 every state can come from every token, in the limit
        x0, x_t = (process.marginals(t) == 0).nonzero(as_tuple=True)
        for v, z in list(zip(process.data_tokens[x0].tolist(), x_t.tolist(), strict=True))[:4]:
            found = True
            try:
                process.bridge(torch.tensor([[z]]), torch.tensor([[v]]), t, t / 2)
            except ValueError:
                yield 0.0, where
            else:
                yield 1.0, f"x_t = {z} from x0 = {v}, {where}"
    if not found:
        raise NotChecked("every state can come from every token")


def products(process: Process) -> Errors:
    """Check, for three sites with their own times, that the law of a row is the product of its sites' laws."""
    times, _ = spread(process)
    generator = torch.Generator().manual_seed(4)
    data = process.data_tokens
    x0 = data[torch.randint(len(data), times.shape, generator=generator)]
    rank = torch.searchsorted(data, x0)
    tables = {float(t): process.marginals(float(t)) for t in times.unique()}
    z = _possible(tables, rank, times, generator)
    exact = torch.stack([tables[float(t)][v, y] for t, v, y in _flat(times, rank, z)]).view(z.shape)
    yield far(process.marginal(x0, times).log_prob(z), exact.log().sum(-1)), "marginal, a time for every site"
    early = times * 0.5
    bridge = process.bridge(z, x0, times, early)
    before = {float(s): process.marginals(float(s)) for s in early.unique()}
    y = _possible(before, rank, early, generator)
    y = torch.where(torch.rand(y.shape, generator=generator) < 0.5, z, y)
    kernels = {float(t): process.kernel(float(t), float(t) / 2) for t in times.unique()}
    parts = [
        before[float(t) / 2][v, a] * kernels[float(t)][a, b] / tables[float(t)][v, b]
        for (t, v, b), a in zip(_flat(times, rank, z), y.flatten().tolist(), strict=True)
    ]
    law, said = torch.stack(parts).view(z.shape).prod(-1), bridge.log_prob(y).exp()
    yield far(said, law), "bridge, a time for every site"
    column = times[:, 0]
    one = process.marginal(x0, column).log_prob(z).exp()
    other = process.marginal(x0, column[:, None].expand_as(times)).log_prob(z).exp()
    yield far(one, other), "marginal, a time for every row"


def _flat(times: Tensor, rank: Tensor, z: Tensor) -> list[tuple[float, int, int]]:
    return list(zip(times.flatten().tolist(), rank.flatten().tolist(), z.flatten().tolist(), strict=True))


def _possible(tables: dict[float, Tensor], rank: Tensor, times: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a state for every site from the marginal at its time, given its token."""
    law = torch.stack([tables[float(t)][v] for t, v in zip(times.flatten(), rank.flatten(), strict=True)])
    return torch.multinomial(law, 1, generator=generator).view(times.shape)


def sampling(process: Process) -> Errors:
    """Test draws of two sites from marginal, prior and bridge by chi-square; yield -log10 p."""
    draws, size = 20_000, process.states
    x0 = process.data_tokens[[0, -1]].expand(draws, 2)
    late, early = (torch.tensor(part).expand(draws, 2) for part in ([0.5, 0.8], [0.3, 0.4]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        laws = [("marginal", process.marginal(x0, late)), ("prior", process.prior(draws, 2))]
        reached = [(process.marginals(t)[rank] > 0).nonzero()[-1] for t, rank in ((0.5, 0), (0.8, -1))]
        laws.append(("bridge", process.bridge(torch.cat(reached).expand(draws, 2), x0, late, early)))
        for name, law in laws:
            z = torch.cartesian_prod(torch.arange(size), torch.arange(size))
            p = torch.stack([law.log_prob(row.expand(draws, 2))[0].exp() for row in z])
            count = torch.bincount(law.sample() @ torch.tensor([size, 1]), minlength=size**2).double()
            yield improbable(count, draws * p / p.sum()), name
