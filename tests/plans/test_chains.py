"""Plans on Markov chains of V = 8 and L = 256, searched or measured on one chain and used on others.

The transition rows are Dirichlet(3) ("weak") or Dirichlet(0.3) ("strong"), and the first token is stationary. The KL
of an order by position is exact (``theory.total_correlation``). That of ancestral steps is bounded from below: for each
event A the data-processing inequality gives KL(p0 || law) >= kl(p0(A), law(A)). A is {log p0(x) < c}, c is
chosen on other samples, and both probabilities are Clopper-Pearson limits. The deficit E_law[-log p0] - H(p0) stands
beside it; it is no divergence, and 0 is necessary but not sufficient for law = p0.

Run with -s to see the figures.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from problems import states
from scipy import stats
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T

P = dd.plans
V, L = 8, 256
MASKED, UNIFORM = dd.Masked(V, dd.Linear()), dd.Uniform(V, dd.Linear())
SWEEP = S.Gibbs(L // 2, scan="systematic")  # every second site, then the others: 2 calls
SEEN, HELD_OUT = 0, (1, 2)
slow = pytest.mark.slow


def chain(coupling: str, seed: int, length: int = L, vocab_size: int = V) -> T.MarkovChain:
    rng = np.random.default_rng(seed)
    rows = rng.dirichlet(np.full(vocab_size, {"weak": 3.0, "strong": 0.3}[coupling]), size=vocab_size)
    step = torch.as_tensor(rows)
    return T.MarkovChain(torch.linalg.matrix_power(step, 10_000)[0], step, length)


def even(steps: int) -> tuple[float, ...]:
    return (*(1 - n / steps for n in range(steps)), 0.0)


def plan(grid: tuple[float, ...], step: dd.Operator, last: dd.Operator | None = None) -> dd.Plan:
    count = len(grid) - 1
    return dd.Plan(grid, [dd.Step(step)] * (count - 1) + [dd.Step(step if last is None else last)])


def draw(process: dd.Process, law: T.MarkovChain, made: dd.Plan, rows: int, seed: int = 1) -> Tensor:
    return dd.Sampler(process, law.denoiser(process), plan=made).sample(rows, seed=seed).tokens


def deficit(law: T.MarkovChain, tokens: Tensor) -> tuple[float, float]:
    """Return E_law[-log p0] - H(p0) in nats, and its standard error."""
    surprise = -law.log_prob(tokens)
    return float(surprise.mean()) + law.log_prob_moments()[0], float(surprise.std()) / len(tokens) ** 0.5


def binary(p: float, q: float) -> float:
    """kl(p, q) of two coins, nats."""
    return sum(a * math.log(a / b) for a, b in ((p, q), (1 - p, 1 - q)) if a > 0)


def at_least(law: T.MarkovChain, first: Tensor, tokens: Tensor, failure_rate: float) -> float:
    """Return a lower bound of KL(p0 || law of the tokens) that fails with at most this probability.

    ``first`` are other samples of the same law; they choose c, together with other samples of p0.
    """
    own = law.log_prob(law.sample(2000, 77)), law.log_prob(law.sample(4000, 78))
    other = law.log_prob(first), law.log_prob(tokens)
    cuts = torch.quantile(torch.cat([own[0], other[0]]), torch.linspace(0.05, 0.95, 37, dtype=torch.float64)).tolist()
    c = max(cuts, key=lambda cut: _limit(own[0], other[0], cut, 0.05))
    return _limit(own[1], other[1], c, failure_rate)


def _limit(own: Tensor, other: Tensor, cut: float, failure_rate: float) -> float:
    p, q = (int((x < cut).sum()) for x in (own, other))
    # each limit fails with half of the rate: p0(A) is at most `most`, law(A) is at least `least`
    most = float(stats.beta.ppf(1 - failure_rate / 2, p + 1, len(own) - p)) if p < len(own) else 1.0
    least = float(stats.beta.ppf(failure_rate / 2, q, len(other) - q + 1)) if q else 0.0
    return binary(most, least) if most < least else 0.0


def found_order(process: dd.Process, law: T.MarkovChain) -> "P.Found":
    """Return the best order by position of at most 8 calls on a chain: all 70 of a list are scored."""
    orders = [S.Reveal(select, calls=calls, growth=growth) for select in ("spread", "left_to_right")
              for calls in range(2, 9) for growth in (1.0, 1.2, 1.4, 1.7, 2.0)]  # fmt: skip
    return P.search(process, law.denoiser(process), calls=8, operators=orders, times=1, method=P.Random(len(orders)),
                    objective=P.TotalCorrelation(law))  # fmt: skip


def exact(law: T.MarkovChain, made: dd.Plan) -> float:
    """KL(p0 || law) of a plan of one step of ``Reveal``, by its groups."""
    (step,) = made.steps
    assert isinstance(step.operator, S.Reveal)
    return T.total_correlation(law, step.operator.groups(law.length))


# --- orders by position ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("process", "coupling", "seeds", "rows"),
    [
        pytest.param(MASKED, "strong", HELD_OUT[:1], 300, id="short"),
        *(
            pytest.param(process, coupling, HELD_OUT, rows, marks=slow, id=f"{process}-{coupling}")
            for process in (MASKED, UNIFORM)
            for coupling, rows in (("weak", 800), ("strong", 300))
        ),
    ],
)
def test_a_found_order_of_8_calls_is_ahead_of_16_ancestral_calls(
    process: dd.Process, coupling: str, seeds: tuple[int, ...], rows: int, failure_rate: float
) -> None:
    """On held-out chains the exact KL of the order is below a lower bound of that of ancestral steps."""
    found = found_order(process, chain(coupling, SEEN))
    planted = plan((1.0, 0.0), S.Reveal("left_to_right", calls=8))
    for seed in seeds:
        law = chain(coupling, seed)
        first, tokens = draw(process, law, plan(even(16), S.Ancestral()), rows + 200).split([200, rows])
        limit, mine, fault = at_least(law, first, tokens, failure_rate), exact(law, found), exact(law, planted)
        gap, error = deficit(law, tokens)
        print(f"{process} {coupling} {seed}: {found.steps[0].operator} KL {mine:.2e}; ancestral 16: KL >= {limit:.3f}, "
              f"deficit {gap:.2f} +- {error:.2f}; blocks of 32: {fault:.2f}")  # fmt: skip
        assert mine <= limit
        assert mine < 1e-9, "groups that double: every site is drawn between two that are known"
        assert fault > limit, "planted: groups of neighbours"
        assert at_least(law, law.sample(200, 5), law.sample(rows, 6), failure_rate) == 0, "planted: p0 itself"


@pytest.mark.parametrize("coupling", [pytest.param("weak", marks=slow), "strong"])
def test_a_spread_order_leaves_nothing_on_a_uniform_chain(coupling: str) -> None:
    """8, 16 and 32 calls: the exact KL of the order, and the deficit of samples beside that of ancestral steps."""
    law = chain(coupling, HELD_OUT[0])
    ancestral = []
    for calls in (8, 16, 32):
        step = S.Reveal("spread", calls=calls)
        kl = T.total_correlation(law, step.groups(L))
        gap, error = deficit(law, draw(UNIFORM, law, plan((1.0, 0.0), step), 200))
        ancestral.append(deficit(law, draw(UNIFORM, law, plan(even(calls), S.Ancestral()), 200)))
        print(f"uniform {coupling} {calls} calls: Reveal KL {kl:.1e}, deficit {gap:.2f} +- {error:.2f}; "
              f"ancestral {ancestral[-1][0]:.2f} +- {ancestral[-1][1]:.2f}")  # fmt: skip
        assert kl < 0.2
        assert abs(gap) < 5 * error
    assert all(gap > 5 * error for gap, error in ancestral[: 2 if coupling == "weak" else 3]), "planted: other steps"
    assert ancestral[0][0] > ancestral[1][0] > ancestral[2][0]


# --- networks with one time a row ------------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize("coupling", ["weak", "strong"])
def test_eight_calls_of_a_network_with_one_time_a_row(coupling: str) -> None:
    """Best of 10 plans on one chain, then on held-out ones. A sweep at time 0 redraws every second site exactly."""
    seen = chain(coupling, SEEN)
    measured = P.measure(UNIFORM, seen.denoiser(UNIFORM), seen.sample(32, 5), even(16), seed=7)
    square = {n: tuple(t**2 for t in even(n)) for n in (4, 6, 8)}
    plain, leap = S.Ancestral(), S.SplitLeap()
    plans = {
        "ancestral, even": plan(even(8), plain),
        "ancestral, measured": plan(measured.grid(8), plain),
        "ancestral, t^2": plan(square[8], plain),
        "split leap, even": plan(even(4), leap),
        "split leap, t^2": plan(square[4], leap),
        "ancestral and Gibbs(64), t^2": plan(square[4], plain >> S.Gibbs(64)),
        "sweep at the end, even": plan(even(6), plain, plain >> SWEEP),
        "sweep at the end, measured": plan(measured.grid(6), plain, plain >> SWEEP),
        "sweep at the end, t^2": plan(square[6], plain, plain >> SWEEP),
        "two sweeps at the end, t^2": plan(square[4], plain, plain >> SWEEP >> SWEEP),
    }
    gaps = {name: deficit(seen, draw(UNIFORM, seen, each, 200)) for name, each in plans.items()}
    for name, (gap, error) in gaps.items():
        print(f"uniform {coupling} seen, 8 calls, {name}: deficit {gap:.2f} +- {error:.2f}")
    best = min(gaps, key=lambda name: abs(gaps[name][0]))
    assert "sweep" in best
    for seed in HELD_OUT:
        law = chain(coupling, seed)
        run = dd.Sampler(UNIFORM, law.denoiser(UNIFORM), plan=plans[best]).sample(300, seed=3)
        assert run.nfe <= 8
        (gap, error), half = deficit(law, run.tokens), deficit(_half(law), run.tokens[:, ::2])
        other, spread = deficit(law, draw(UNIFORM, law, plan(even(16), plain), 300))
        print(f"uniform {coupling} {seed}, {best}: deficit {gap:.2f} +- {error:.2f}, of the even sites {half[0]:.2f} "
              f"+- {half[1]:.2f}; ancestral 16: {other:.2f} +- {spread:.2f}")  # fmt: skip
        assert gap < other - 5 * math.hypot(error, spread)


def _half(law: T.MarkovChain) -> T.MarkovChain:
    """The law of every second site. After a sweep KL(p0 || law) is that of these sites, since the rest is exact."""
    return T.MarkovChain(law.initial, law.transition @ law.transition, L // 2)


# --- measured grids ---------------------------------------------------------------------------------------------------


def entropies(law: T.MarkovChain, times: tuple[float, ...], reach: int = 64) -> list[float]:
    r"""Return h(t) = sum_i H(x_i | the other sites, each seen with probability 1 - t) for alpha = 1 - t.

    A masked ancestral step from t to s has the bound's part (t - s) h(t), so a grid's bound is a Riemann sum of h.
    Neighbours farther than ``reach`` count as unseen; their correlation is below 1e-6 here.
    """
    powers = torch.stack([torch.linalg.matrix_power(law.transition, n) for n in range(1, reach + 1)])
    nowhere = law.initial.expand(1, V, V)
    left = torch.cat([nowhere, powers])  # p(x_i | x_{i-d}); "unseen" says nothing
    right = torch.cat([torch.full((1, V, V), 1 / V, dtype=torch.float64), powers])
    table = torch.zeros(reach + 1, reach + 1, dtype=torch.float64)
    for d in range(reach + 1):
        joint = (law.initial[:, None] * left[d])[None, :, :, None] * right[:, None]  # (e, left, own, right)
        both = joint.sum(2)
        table[d] = torch.special.xlogy(both, both).sum((1, 2)) - torch.special.xlogy(joint, joint).sum((1, 2, 3))
    found = []
    distance = torch.arange(reach + 1).double()
    for t in times:
        weight = (1 - t) * torch.pow(t, (distance - 1).clamp(min=0))
        rows = [weight.where((distance >= 1) & (distance <= room), torch.zeros(())) for room in range(L)]
        sides = torch.stack([torch.cat([1 - row.sum()[None], row[1:]]) for row in rows])
        found.append(float(torch.einsum("id,de,ie->", sides, table, sides.flip(0))))
    return found


def exact_excess(law: T.MarkovChain, process: dd.Process, grid: tuple[float, ...]) -> float:
    """The bound of ancestral steps on a masked chain less H(p0), exact, for any schedule."""
    noise = tuple(1 - float(process.schedule.alpha(t)) for t in grid)
    h = entropies(law, noise)
    return sum((t - s) * h[n] for n, (t, s) in enumerate(itertools.pairwise(noise))) + law.log_prob_moments()[0]


def held_out_difference(
    process: dd.Process, law: T.MarkovChain, one: tuple[float, ...], other: tuple[float, ...], batches: int
) -> tuple[float, float]:
    """The bound of one grid less that of another, on new data and new noise, which both share; with its error."""
    times = tuple(sorted({*one, *other}, reverse=True))
    found = []
    for number in range(batches):
        bound = P.measure(process, law.denoiser(process), law.sample(8, 1000 + number), times, seed=2000 + number).bound
        sums = [sum(float(bound[times.index(t), times.index(s)]) for t, s in itertools.pairwise(grid))
                for grid in (one, other)]  # fmt: skip
        found.append(sums[0] - sums[1])
    return float(np.mean(found)), float(np.std(found, ddof=1)) / batches**0.5


def compared(process: dd.Process, coupling: str, batches: int) -> tuple[tuple[float, ...], float, float]:
    """Measure a grid of 8 steps on 64 rows; return it and its held-out bound less that of equal steps of t."""
    law = chain(coupling, SEEN)
    grid = P.measure(process, law.denoiser(process), law.sample(64, 5), even(16), seed=7).grid(8)
    difference, error = held_out_difference(process, law, grid, even(8), batches) if grid != even(8) else (0.0, 0.0)
    gaps = [deficit(law, draw(process, law, plan(each, S.Ancestral()), 300)) for each in (grid, even(8))]
    print(f"{process} {coupling}: grid {[round(t, 3) for t in grid]}, bound less that of equal steps {difference:.2f} "
          f"+- {error:.2f}, deficits {gaps[0][0]:.2f} and {gaps[1][0]:.2f} +- {gaps[1][1]:.2f}")  # fmt: skip
    return grid, difference, error


@slow
@pytest.mark.parametrize("coupling", ["weak", "strong"])
@pytest.mark.parametrize("process", [UNIFORM, dd.Masked(V, dd.Cosine())], ids=repr)
def test_a_measured_grid_has_the_smaller_bound(process: dd.Process, coupling: str) -> None:
    """Beyond 3 standard errors, wherever equal steps of t are not the best already."""
    grid, difference, error = compared(process, coupling, 24)
    assert difference < -3 * error
    if process.masks:
        law = chain(coupling, SEEN)
        wanted = exact_excess(law, process, grid) - exact_excess(law, process, even(8))
        print(f"    exact difference {wanted:.3f}")
        assert abs(difference - wanted) < 4 * error
        turned = tuple(1 - t for t in reversed(grid))
        assert exact_excess(law, process, turned) > exact_excess(law, process, grid), "planted: its steps reversed"


@pytest.mark.parametrize("coupling", ["weak", "strong"])
def test_equal_steps_are_the_best_grid_of_a_masked_chain(coupling: str) -> None:
    """Linear schedule: h is all but linear in t, so a measured grid has nothing to win and loses by its noise alone."""
    law, times = chain(coupling, SEEN), even(16)
    h = entropies(law, times)
    assert h[0] == pytest.approx(L * T.entropy(law.initial), abs=1e-9)
    sums = {}
    for inner in itertools.combinations(range(1, 16), 7):
        path = (0, *inner, 16)
        sums[path] = sum((times[i] - times[j]) * h[i] for i, j in itertools.pairwise(path))
    assert min(sums, key=lambda path: sums[path]) == tuple(range(0, 17, 2))
    least = min(sums.values()) + law.log_prob_moments()[0]
    measured = P.measure(MASKED, law.denoiser(MASKED), law.sample(64, 5), times, seed=7)
    mine = exact_excess(law, MASKED, measured.grid(8))
    print(f"masked {coupling}: bound - H of equal steps {least:.3f}, of the measured grid {mine:.3f}")
    assert least - 1e-9 <= mine <= least + float(measured.standard_error[0, 16])
    assert max(sums.values()) + law.log_prob_moments()[0] > 1.5 * least, "planted: the worst grid"


def test_bound_kl_and_deficit_order_masked_grids_alike() -> None:
    """So the direction of the KL is not why a measured grid loses in the deficit: all 10 grids of 3 of 6 steps."""
    law = chain("strong", 0, length=3, vocab_size=3)
    p0 = 0.98 * law.log_prob(states(3, 3)).exp() + 0.02 / 27
    world, process = T.Enumeration(p0, vocab_size=3, length=3), dd.Masked(3, dd.Linear())
    bound, kl, model, found = P.KLUB(world), P.KL(world), world.denoiser(process), []
    for inner in itertools.combinations(range(1, 6), 2):
        sampler = dd.Sampler(process, model, S.Ancestral(), grid=[1.0, *(1 - n / 6 for n in inner), 0.0])
        end = T.law(sampler)
        found.append((bound.score(sampler), kl.score(sampler), float((world.p0 - end) @ world.p0.log())))
    upper, exactly, gaps = (list(column) for column in zip(*found, strict=True))
    assert stats.spearmanr(upper, exactly).statistic > 0.95
    assert stats.spearmanr(upper, gaps).statistic > 0.95
    assert gaps[int(np.argmin(upper))] < 1.02 * min(gaps)
    assert abs(stats.spearmanr(upper, gaps[::-1]).statistic) < 0.95, "planted: other grids' deficits"
