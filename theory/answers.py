r"""Check what operators, predictions and losses use of a process against its own transition matrix.

These are conversions between forms of a prediction; laws of sites that are noised, noised further or drawn again; and
the rates and probabilities with which the reverse process leaves a state. Each function yields errors and their places.
"""

import torch
from torch import Tensor

from discdiff.process import Interpolant, Process, RankOne
from discdiff.theory.dense import beliefs, far, gathered, given, instants, pairs, rows
from discdiff.theory.report import Errors, NotChecked

__all__ = [
    "candidates", "columns", "conditional", "conditional_to_loo", "denoiser_to_loo", "evidence", "exits", "hides",
    "inflow", "loo_to_denoiser", "noised_further", "own_weight", "pairs_of_source", "plug_in", "posterior_where",
    "propagates", "renoise", "revealed", "row_by_row", "settled",
]  # fmt: skip

LEAST = 1e-15  # limits at alpha = 0 are tested with the oracles


# --- evidence and conversions -----------------------------------------------------------------------------------------


def evidence(process: Process) -> Errors:
    """Check q_t(x | v) of every token v up to a factor a state; states that are nearly impossible count less."""
    x = torch.arange(process.states)[:, None]
    for t, where in instants(process, LEAST):
        q = process.marginals(t).T
        reached = q.sum(-1) > 0
        said = process.evidence(x, process.schedule.alpha(t))[:, 0]
        weight = (q.amax(-1) / 1e-4).clamp(max=1)[reached, None]
        yield far(said[reached] * weight, (q / q.amax(-1, keepdim=True))[reached] * weight), where


def conditional(process: Process) -> Errors:
    """Check c = O Q_t against the transition matrix."""
    for t, where in instants(process, LEAST):
        log_o, o, x, alpha = beliefs(process, t)
        said = process.conditional(log_o, x, alpha).exp()
        yield far(said, gathered(process, x, o @ given(process, x, t))), where


def conditional_to_loo(process: Process) -> Errors:
    """Check O from c where alpha is large enough for c to determine O."""
    for t, where in instants(process, 0.01):
        log_o, _, x, alpha = beliefs(process, t)
        c = process.conditional(log_o, x, alpha).exp()
        yield far(process.conditional_to_loo(c, x, alpha), log_o.exp()), where


def loo_to_denoiser(process: Process) -> Errors:
    """Check D ~ O(v) q_t(x | v) wherever the state is not revealed; states that are nearly impossible count less."""
    for t, where in instants(process, LEAST):
        log_o, o, x, alpha = beliefs(process, t)
        open_ = ~process.revealed(x, alpha)
        said = process.loo_to_denoiser(log_o, x, alpha)[open_].softmax(-1)[:, process.data_tokens]
        d = o * process.marginals(t)[:, x].T
        mass = d.sum(-1, keepdim=True)
        weight = (mass / 1e-4).clamp(max=1)[open_]
        yield far(said * weight, (d / mass)[open_] * weight), where


def denoiser_to_loo(process: Process) -> Errors:
    """Check the conversion of D to O at all states x with q_t(x | v) > 0 for every token v.

    Raises:
        NotChecked: if there is no such state.
    """
    found = False
    for t, where in instants(process, LEAST):
        log_o, _, x, alpha = beliefs(process, t)
        open_ = ~process.settled(x, alpha)
        if bool(open_.any()):
            found = True
            log_d = process.loo_to_denoiser(log_o, x, alpha)[open_].log_softmax(-1)
            said = process.denoiser_to_loo(log_d, x[open_], alpha[open_]).softmax(-1)
            yield far(said, log_o[open_].exp()), where
    if not found:
        raise NotChecked("every state settles its token")


def own_weight(process: Process) -> Errors:
    """Check D ~ O w^{1(v = x)}: the weight applies to the state's own token only."""
    for t, where in instants(process, LEAST):
        log_o, _, x, alpha = beliefs(process, t)
        log_w = process.own_weight(x, alpha)
        assert log_w is not None
        open_ = torch.isfinite(log_w)
        own = process.column(x)[:, None] == torch.arange(process.vocab_size)
        said = (log_o + torch.where(own, log_w[:, None], 0.0))[open_].softmax(-1)
        yield far(said, process.loo_to_denoiser(log_o, x, alpha)[open_].softmax(-1)), where


def plug_in(process: Process) -> Errors:
    """Check q(x_s | x) with O in place of x0 against Bayes' rule."""
    for t, s, where in pairs(process):
        if float(process.schedule.alpha(t)) == 0:
            continue
        log_o, o, x, alpha_t = beliefs(process, t)
        alpha_s = torch.full_like(alpha_t, process.schedule.alpha(s))
        said = process.plug_in(log_o, x, alpha_t, alpha_s).exp()
        exact = _reverse(process, o, x, t, s)
        possible = exact.sum(-1) > 0
        yield far(said[possible], exact[possible]), where


def _reverse(process: Process, o: Tensor, x: Tensor, t: float, s: float) -> Tensor:
    """Compute the one-site reverse marginal by Bayes' rule, over columns; rows of 0 where x is impossible."""
    c = gathered(process, x, o @ given(process, x, s))
    exact = c * gathered(process, x, process.kernel(t, s)[:, x].T)
    return exact / exact.sum(-1, keepdim=True).clamp(min=1e-300)


def settled(process: Process) -> Errors:
    """Check which states have q_t(x | v) = 0 for some token v."""
    for t, where in instants(process, LEAST):
        x = (process.marginals(t).sum(0) > 0).nonzero()[:, 0]
        alpha = torch.full((len(x),), process.schedule.alpha(t), dtype=torch.float64)
        exact = (process.marginals(t)[:, x] == 0).any(0)
        yield float((process.settled(x, alpha) != exact).sum()), f"states that rule tokens out, {where}"


def revealed(process: Process) -> Errors:
    """Check that states called revealed determine their token; on an absorbing process, that all such are called so."""
    for t, where in instants(process, LEAST):
        q = process.marginals(t)
        x = (q.sum(0) > 0).nonzero()[:, 0]
        alpha = torch.full((len(x),), process.schedule.alpha(t), dtype=torch.float64)
        said = process.revealed(x, alpha)
        own = torch.searchsorted(process.data_tokens, process.column(x)).clamp(max=len(q) - 1)
        sure = ((q[:, x] > 0).sum(0) == 1) & (q[own, x] > 0)
        yield float((said & ~sure).sum()), f"states that are said to be clean, {where}"
        if process.absorbing:
            yield float((sure & ~said).sum()), f"clean states that are not said to be, {where}"


# --- states and columns -----------------------------------------------------------------------------------------------


def columns(process: Process) -> Errors:
    """Check that ``column`` and ``place`` are inverse to each other."""
    x = torch.arange(process.states)
    yield float((process.place(process.column(x), x) != x).sum()), "place(column(x), x) is x"
    for c in range(process.columns):
        placed = process.place(torch.full_like(x, c), x)
        yield float((process.column(placed) != c).sum()), f"column(place({c}, x))"


def hides(process: Process) -> Errors:
    """Check that a hidden state is equally likely from every token but its own column's, and possible from each."""
    for t, where in instants(process, 0.01, 0.99):
        q = process.transition(float(process.schedule.alpha(t)), 1.0)
        for row in range(process.states):
            if row == process.mask_id:
                continue
            hidden = process.hide(torch.tensor([row]))
            tokens = process.data_tokens[process.data_tokens != process.column(hidden)]
            clean = process.place(tokens, torch.full_like(tokens, row))
            yield far(q[clean, hidden], q[clean, hidden].mean()), f"state {row}, {where}"
            yield float((q[clean, hidden] == 0).sum()), f"state {row} is not hidden, {where}"


def pairs_of_source(process: Interpolant) -> Errors:
    """Check ``join``, ``split`` and ``noised_pair`` on all pairs of data and source tokens."""
    v = torch.arange(process.vocab_size)
    x0, x1 = (part[:, None] for part in torch.cartesian_prod(v, v).T)
    joined = process.join(x0, x1)
    z, u = process.split(joined)
    yield float((z != x0).sum() + (u != x1).sum()), "split(join(x0, x1))"
    for t, where in instants(process):
        exact = process.transition(float(process.schedule.alpha(t)), 1.0)[joined[:, 0]]
        yield far(rows(process.noised_pair(x0, x1, t), process.states), exact), where


# --- laws that operators draw from ------------------------------------------------------------------------------------


def _both(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return pairs with every state at the first of two sites, and a mask of the first site, both (N, 2)."""
    pair = torch.stack([x, x.flip(0)], -1)
    return pair, torch.tensor([True, False]).expand_as(pair)


def _first(law: object, pair: Tensor, states: int) -> Tensor:
    """Compute the law of the first site, with the second keeping its state, (N, S)."""
    values = (torch.stack([torch.full_like(pair[:, 0], z), pair[:, 1]], -1) for z in range(states))
    return torch.stack([law.log_prob(value).exp() for value in values], -1)  # type: ignore[attr-defined]


def renoise(process: Process) -> Errors:
    """Check that ``kept`` and ``renoise`` together give q_t of a clean token, and leave other sites unchanged."""
    clean = torch.cat([process.place(process.data_tokens, torch.full_like(process.data_tokens, x))
                       for x in range(process.states) if x != process.mask_id]).unique()  # fmt: skip
    pair, where = _both(clean)
    for t, place in instants(process):
        alpha = float(process.schedule.alpha(t))
        kept = float(process.kept(alpha))
        total = kept * _first(process.renoise(pair, where, where & False, alpha), pair, process.states)
        if kept < 1:
            total = total + (1 - kept) * _first(process.renoise(pair, where, where, alpha), pair, process.states)
        yield far(total, process.transition(alpha, 1.0)[clean]), place


def noised_further(process: Process) -> Errors:
    """Check the law of the forward process from t to a later u at chosen sites; the others keep their state."""
    pair, where = _both(torch.arange(process.states))
    for u, t, place in pairs(process):
        alpha_t, alpha_u = float(process.schedule.alpha(t)), float(process.schedule.alpha(u))
        law = process.noised_further(pair, where, alpha_t, alpha_u)
        yield far(_first(law, pair, process.states), process.kernel(u, t)), place


def posterior_where(process: Process) -> Errors:
    """Check the bridge at chosen sites; the others keep their state."""
    for t, s, place in pairs(process):
        x0, x_t = (process.marginals(t) > 0).nonzero(as_tuple=True)
        pair, where = _both(x_t)
        clean = process.data_tokens[x0][:, None].expand_as(pair)
        alpha_t, alpha_s = float(process.schedule.alpha(t)), float(process.schedule.alpha(s))
        said = _first(process.posterior(pair, clean, alpha_t, alpha_s, where), pair, process.states)
        yield far(said, rows(process.bridge(x_t[:, None], clean[:, :1], t, s), process.states)), place


# --- rates of the reverse process -------------------------------------------------------------------------------------


def inflow(process: Process) -> Errors:
    """Check the rates into each state against the generator."""
    x = torch.arange(process.states)
    for t, where in instants(process, LEAST):
        alpha = process.schedule.alpha(t)
        said = process.inflow(x[:, None], alpha)[:, 0].expand(-1, process.columns)
        exact = gathered(process, x, process.generator(alpha).T)
        other = torch.arange(process.columns) != process.column(x)[:, None]
        yield far(said * other, exact * other), where


def exits(process: RankOne) -> Errors:
    """Check the rates of ``exit`` and their bound over all O.

    Its total and its parts must give R(x -> v) = Q(v, x) c(v) / (alpha c(x)) per unit of alpha.
    """
    for t, where in instants(process, LEAST, 0.999):
        log_o, o, x, alpha = beliefs(process, t)
        c = gathered(process, x, o @ given(process, x, t))
        own = process.column(x)[:, None]
        rates = gathered(process, x, process.generator(float(alpha[0])).T) * c / (alpha[:, None] * c.gather(-1, own))
        rates = rates.scatter(-1, own, 0.0)
        belief = torch.nn.functional.pad(log_o.exp(), (0, max(0, process.columns - process.vocab_size)))
        said = process.exit(x[:, None], float(alpha[0]), belief.gather(-1, own))
        sites = torch.ones_like(x[:, None], dtype=torch.bool)
        noise = rows(process.elsewhere(x[:, None], sites, said.anchored), process.states)
        token = belief.scatter(-1, own, 0.0)
        data = said.data * token / token.sum(-1, keepdim=True).clamp(min=1e-300)
        total = said.total * (data + (1 - said.data) * gathered(process, x, noise))
        scale = 1 + rates.sum(-1, keepdim=True)
        yield far(total / scale, rates / scale), where
        bound = process.exit(x[:, None], float(alpha[0]), 0.0).total
        yield float(((said.total - bound) / (1 + bound)).clamp(min=0).nan_to_num(0.0).max()), f"the bound, {where}"


def candidates(process: RankOne) -> Errors:
    """Check that a redraw from c_s with probability candidate times acceptance gives the reverse marginal."""
    for t, s, where in pairs(process):
        if float(process.schedule.alpha(t)) == 0:
            continue
        log_o, o, x, alpha_t = beliefs(process, t)
        alpha_s = torch.full_like(alpha_t, process.schedule.alpha(s))
        own = process.column(x)[:, None]
        padded = torch.nn.functional.pad(log_o, (0, max(0, process.columns - process.vocab_size)), value=-torch.inf)
        site, a_t = x[:, None], alpha_t[:, None]
        asked = process.candidate(site, a_t, alpha_s[:, None])
        accepted = process.acceptance(padded.gather(-1, own), site, a_t)
        redrawn = torch.where(asked > 0, asked * accepted, 0.0)
        c = gathered(process, x, o @ given(process, x, s))
        said = (redrawn * c).scatter_add(-1, own, 1 - redrawn)
        exact = _reverse(process, o, x, t, s)
        possible = exact.sum(-1) > 0
        yield far(said[possible], exact[possible]), where


# --- rows with different survivals ------------------------------------------------------------------------------------


def propagates(process: Process) -> Errors:
    """Check rows times q_{t|s}, and q_{t|s} times rows, with a pair of times for each row."""
    generator = torch.Generator().manual_seed(5)
    found = [(t, s) for t, s, _ in pairs(process)]
    start = torch.rand(len(found), process.states, generator=generator, dtype=torch.float64)
    alpha_t, alpha_s = (process.schedule.alpha(torch.tensor(part, dtype=torch.float64)) for part in zip(*found))  # noqa: B905
    for backward in (False, True):
        matrices = [process.transition(float(a), float(b)) for a, b in zip(alpha_t, alpha_s, strict=True)]
        exact = torch.stack([m @ r if backward else r @ m for m, r in zip(matrices, start, strict=True)])
        yield far(process.propagate(start, alpha_t, alpha_s, backward), exact), "backward" if backward else "forward"


def row_by_row(process: Process) -> Errors:
    """Check that rows with different survivals give the same results together as each alone."""
    times = [t for t, _ in instants(process, 0.01, 0.999)]
    parts = [beliefs(process, t) for t in times]
    log_o, x, alpha = (torch.cat([part[k] for part in parts]) for k in (0, 2, 3))
    earlier = 1 - (1 - alpha) / 2
    answers = {
        "conditional": lambda o, x, a, b: process.conditional(o, x, a),
        "loo_to_denoiser": lambda o, x, a, b: process.loo_to_denoiser(o, x, a).log_softmax(-1),
        "plug_in": lambda o, x, a, b: process.plug_in(o, x, a, b),
        "settled": lambda o, x, a, b: process.settled(x, a),
        "evidence": lambda o, x, a, b: process.evidence(x[:, None], a[:, None])[:, 0],
        "inflow": lambda o, x, a, b: process.inflow(x[:, None], a[:, None])[:, 0],
    }
    sizes = [len(part[2]) for part in parts]
    for name, ask in answers.items():
        together = ask(log_o, x, alpha, earlier)
        pieces = zip(*(part.split(sizes) for part in (log_o, x, alpha, earlier)), strict=True)
        apart = torch.cat([ask(*piece) for piece in pieces])
        equal = (together == apart) | ((together.double() - apart.double()).abs() < 1e-12)
        yield float((~equal & ~(together.isnan() & apart.isnan())).sum()), f"{name}, a survival for every row"
        none = ask(log_o[:0], x[:0], alpha[:0], earlier[:0])
        yield float(none.shape != together[:0].shape or none.dtype != together.dtype), f"{name} of no rows"
