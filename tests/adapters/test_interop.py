"""Other packages' schedulers as operators, judged by their own code's exact law; our operators behind a flow solver."""

import importlib
import sys
import warnings

import pytest
import torch
from peers import amused, ddim
from problems import V, dirichlet, strong, weak
from scipy.stats import chi2_contingency, chisquare
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.adapters.flow_matching import Kappa, OperatorSolver, flow_denoiser, flow_process
from discdiff.adapters.from_diffusers import SchedulerCorrection, SchedulerStep
from discdiff.adapters.torch_draws import Answered
from discdiff.operator import Run

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import AmusedScheduler, BlockRefinementScheduler, DiscreteDDIMScheduler, EntropyBoundScheduler
    from flow_matching.path import MixtureDiscreteProbPath
    from flow_matching.path.scheduler import CosineScheduler, PolynomialConvexScheduler
    from flow_matching.solver import MixtureDiscreteEulerSolver
    from flow_matching.utils import ModelWrapper

MASKED, UNIFORM = dd.Masked(V, dd.Linear()), dd.Uniform(V, dd.Linear())
DRAWS = 20_000


def predictor(**options: float) -> SchedulerStep:
    """diffusers' own predictor; its default temperature is 0."""
    return SchedulerStep(DiscreteDDIMScheduler(), options, process=dd.Uniform, order=1.0)


def maskgit(temperature: int = 0) -> SchedulerStep:
    settings = {"temperature": (temperature, 0)}
    scheduler = AmusedScheduler(V, "linear")
    return SchedulerStep(scheduler, process=dd.Masked, enumerable=False, settings=settings, numbered=False)


def counts(tokens: Tensor) -> Tensor:
    index = (tokens * V ** torch.arange(tokens.shape[1] - 1, -1, -1)).sum(-1)
    return torch.bincount(index, minlength=V ** tokens.shape[1])


# --- diffusers -> discdiff --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("t", "s"), [(1.0, 0.75), (0.6, 0.4), (0.2, 0.0)])
def test_the_matrix_of_their_predictor_is_that_of_ancestral(t: float, s: float) -> None:
    model = dirichlet(0.5, 3, V, 2).denoiser(UNIFORM, predicts="denoiser")
    ours = T.kernel(S.Ancestral(), UNIFORM, model, t=t, s=s)
    theirs = T.kernel(predictor(temperature=1.0), UNIFORM, model, t=t, s=s)
    assert (theirs - ours).abs().max() < 1e-6  # they draw from float32
    assert (theirs.sum(1) - 1).abs().max() < 1e-12
    assert (T.kernel(predictor(), UNIFORM, model, t=t, s=s) - ours).abs().max() > 0.01


def test_their_predictor_has_order_one_and_by_default_none() -> None:
    world = dirichlet(0.5, 3, V, 2)
    model = world.denoiser(UNIFORM, predicts="denoiser")

    def slope(operator: SchedulerStep) -> float:
        return T.order([8, 16, 32], lambda n: dd.Sampler(UNIFORM, model, operator, steps=n), target=world.p0)

    assert slope(predictor(temperature=1.0)) == pytest.approx(1.0, abs=0.1)
    assert abs(slope(predictor())) < 0.2  # its error does not fall


def test_answered_draws_leave_their_law_as_it_is(failure_rate: float) -> None:
    """Draws by torch's own generator, against the exact law of the same code when ``choose`` draws."""
    model = weak().denoiser(UNIFORM, predicts="denoiser")
    torch_drew = ddim()(weak(), 2, DRAWS)
    assert torch_drew is not None
    seen = counts(torch_drew).numpy()
    for temperature, agrees in ((1.0, True), (0.5, False)):
        law = T.law(dd.Sampler(UNIFORM, model, predictor(temperature=temperature), steps=2))
        assert (chisquare(seen, law.numpy() * DRAWS).pvalue > failure_rate) == agrees


def test_steps_that_draw_continuous_numbers_run_too(failure_rate: float) -> None:
    model = weak().denoiser(MASKED, predicts="denoiser")
    torch_drew = amused((2, 0), "linear")(weak(), 3, DRAWS)
    assert torch_drew is not None
    for temperature, agrees in ((2, True), (0, False)):
        ours = dd.Sampler(MASKED, model, maskgit(temperature), steps=3).sample(DRAWS, seed=1).tokens
        table = torch.stack([counts(ours), counts(torch_drew)]).numpy()
        assert (chi2_contingency(table).pvalue > failure_rate) == agrees


def test_their_tokens_are_keyed_by_row() -> None:
    for process, operator in ((UNIFORM, predictor(temperature=1.0)), (MASKED, maskgit())):
        sampler = dd.Sampler(process, strong().denoiser(process, predicts="denoiser"), operator, steps=3)
        whole = sampler.sample(8, seed=5).tokens
        assert torch.equal(sampler.sample(3, seed=5, first_row=4).tokens, whole[4:7])
        assert not torch.equal(sampler.sample(8, seed=6).tokens, whole)
        assert bool((sampler.sample(8, seed=5, record=True).log_prob < 0).all())  # of all that was drawn
        given = sampler.sample(8, seed=5, prompt=[1]).tokens
        assert bool((given[:, 0] == 1).all())


def test_verify_examines_their_predictor(as_user: None) -> None:
    """All but its order, which the test above has measured: that takes as many matrices as steps."""
    step = SchedulerStep(DiscreteDDIMScheduler(), {"temperature": 1.0}, process=dd.Uniform)
    report = T.check_operator(step, processes=[UNIFORM])
    assert report.ok, str(report)
    names = [check.name for check in report.checks if check.checked]
    assert names[3:] == [
        "takes 1 calls a step", "rows of the kernel are laws", "draws follow the kernel (-log10 p)",
        "the step to 0 ends on data",
    ]  # fmt: skip


def test_verify_passes_their_random_corrector_and_catches_their_default(as_user: None) -> None:
    def corrector(selection: str) -> SchedulerCorrection:
        scheduler = DiscreteDDIMScheduler(corrector_selection=selection)
        return SchedulerCorrection(scheduler, process=dd.Uniform, enumerable=False, invariant="exact")

    assert T.check_operator(corrector("random")).ok
    assert DiscreteDDIMScheduler().config.corrector_selection == "lowest_log_margin"
    report = T.check_operator(corrector("lowest_log_margin"))
    assert len(report.failed) == 1
    assert "keeps p_t" in report.failed[0]


@pytest.mark.parametrize(
    ("operator", "process", "far"),
    [
        (SchedulerStep(EntropyBoundScheduler(t_max=1.0, t_min=1.0), process=dd.Uniform), UNIFORM, True),
        (SchedulerStep(BlockRefinementScheduler(V), {"mask_token_id": V, "temperature": 1.0}), MASKED, True),
        (predictor(temperature=1.0), UNIFORM, False),
    ],
)
def test_the_exact_law_of_other_schedulers(operator: SchedulerStep, process: dd.Process, far: bool) -> None:
    model = weak().denoiser(process, predicts="denoiser")
    law = T.law(dd.Sampler(process, model, operator, steps=3))
    assert float(law.sum()) == pytest.approx(1, abs=1e-6)
    assert (T.kl(weak().p0, law) > 0.05) == far  # confident sites first is another law than the data's


def test_what_is_no_kernel_on_tokens_or_no_step_of_theirs_is_refused() -> None:
    model = weak().denoiser(UNIFORM, predicts="denoiser")
    memory = SchedulerStep(BlockRefinementScheduler(V), {"temperature": 1.0})
    with pytest.raises(ValueError, match="keeps _committed for its next step"):
        dd.Sampler(UNIFORM, model, memory, steps=3).sample(2, seed=0)
    with pytest.raises(ValueError, match="N equal ones"):
        dd.Sampler(UNIFORM, model, predictor(), grid=[1.0, 0.3, 0.0]).sample(2, seed=0)
    with pytest.raises(ValueError, match="is for Uniform"):
        dd.Sampler(MASKED, weak().denoiser(MASKED), predictor(), steps=2)
    with pytest.raises(TypeError, match=r"AmusedScheduler has no step_correct\(\)"):
        SchedulerCorrection(AmusedScheduler(V))
    careless = SchedulerStep(AmusedScheduler(V), numbered=False)
    with pytest.raises(TypeError, match="enumerable=False"):
        T.law(dd.Sampler(MASKED, weak().denoiser(MASKED), careless, steps=2))
    correction = SchedulerCorrection(DiscreteDDIMScheduler())
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        dd.Sampler(UNIFORM, model, correction >> S.Ancestral(), steps=2).sample(2, seed=0)
    with pytest.raises(ValueError, match="falls linearly"):
        predictor().check(dd.Uniform(3, dd.Cosine()))


def test_draws_that_cannot_be_keyed_are_refused() -> None:
    state, at = Run.start(weak().denoiser(UNIFORM), 4, 0).begin(torch.zeros(4, 3).long(), 1.0, 0.5, 1)
    with Answered(state, at):
        whole = torch.rand(4, 2), torch.rand_like(torch.zeros(4, 3)), torch.zeros(4, 1).uniform_(2, 3)
        numbers = torch.randint(2, 5, (4, 50)), torch.randint(high=2, size=(4, 50))
    assert [tuple(u.shape) for u in whole] == [(4, 2), (4, 3), (4, 1)]
    assert all(bool((u >= 0).all()) for u in whole[:2])
    assert bool((whole[2] >= 2).all())
    assert [sorted(set(drawn.flatten().tolist())) for drawn in numbers] == [[2, 3, 4], [0, 1]]
    for draw, message in (
        (lambda: torch.randn(4, 2), "by torch's randn, which is not keyed"),
        (lambda: torch.zeros(4).exponential_(), "exponential_, which is not keyed"),
        (lambda: torch.rand(3, 3), "not one of the 4 rows"),
        (lambda: torch.multinomial(torch.ones(4, 3), 2), "answered is one from"),
    ):
        with Answered(state, at), pytest.raises(ValueError, match=message):
            draw()


def test_without_diffusers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for name in [name for name in sys.modules if name.startswith("diffusers.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "discdiff.adapters.to_diffusers", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'discdiff\[bench\]'"):
        importlib.import_module("discdiff.adapters.to_diffusers")


# --- flow matching ----------------------------------------------------------------------------------------------------


class Posterior(ModelWrapper):  # type: ignore[misc]
    """An exact model as theirs: probabilities of V columns at their time, a mask's among them."""

    def __init__(self, world: T.Enumeration, process: dd.Process, clock: dd.Schedule, reverse: bool = True) -> None:
        super().__init__(None)
        self.exact, self.width = world.denoiser(process, predicts="denoiser"), process.states
        self.clock, self.reverse = clock, reverse

    def forward(self, x: Tensor, t: Tensor, **extras: object) -> Tensor:
        kappa = float(self.clock.alpha(1 - float(t[0]) if self.reverse else float(t[0])))
        said = self.exact(x, self.exact.process.schedule.time(kappa)).denoiser.exp()
        return torch.nn.functional.pad(said, (0, self.width - said.shape[-1]))


def flow(masked: bool, power: float = 1.0) -> tuple[MixtureDiscreteProbPath, Tensor, Posterior]:
    """A path, its source law and an exact model on three sites."""
    path = MixtureDiscreteProbPath(PolynomialConvexScheduler(power))
    size = V + 1 if masked else V
    source = torch.nn.functional.one_hot(torch.tensor(V), size).float() if masked else torch.full((size,), 1 / size)
    return path, source, Posterior(weak(), MASKED if masked else UNIFORM, Kappa(path.scheduler))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_a_flow_model_has_the_law_of_the_same_denoiser(masked: bool, power: float) -> None:
    path, source, model = flow(masked, power)
    process = flow_process(path, source)
    assert type(process) is type(MASKED if masked else UNIFORM)
    clock = dd.process.FromFunction(lambda t: (1 - t) ** power)
    own: dd.Process = (MASKED if masked else UNIFORM).with_schedule(clock)
    exact = T.law(dd.Sampler(own, weak().denoiser(own), S.Ancestral(), steps=4))

    def law(denoiser: dd.Denoiser) -> Tensor:
        return T.law(dd.Sampler(process, denoiser, S.Ancestral(), steps=4))

    assert T.tv(law(flow_denoiser(model, process, length=3)), exact) < 1e-6  # times are float32
    assert T.tv(law(flow_denoiser(model, process, length=3, logits=True)), exact) > 0.05
    backwards = Posterior(weak(), MASKED if masked else UNIFORM, Kappa(path.scheduler), reverse=False)
    if not masked:  # a masked posterior does not look at the time
        assert T.tv(law(flow_denoiser(backwards, process, length=3)), exact) > 0.01


def test_the_euler_solver_has_the_law_of_dfm(failure_rate: float) -> None:
    path, source, model = flow(masked=True)
    theirs = MixtureDiscreteEulerSolver(model, path, V + 1, source)
    seen = counts(theirs.sample(torch.full((DRAWS, 3), V), step_size=0.25)).numpy()
    for operator, agrees in ((S.DFM(), True), (S.DFM(eta=20.0), False)):
        solver = OperatorSolver(model, path, V + 1, source, operator=operator)
        law = T.law(solver.sampler(0.25, length=3))
        assert (chisquare(seen, law.numpy() * DRAWS).pvalue > failure_rate) == agrees
        drawn = counts(solver.sample(torch.full((DRAWS, 3), V), step_size=0.25, seed=1)).numpy()
        assert chisquare(drawn, law.numpy() * DRAWS).pvalue > failure_rate


def test_the_solver_gives_the_tokens_of_the_sampler() -> None:
    path, source, model = flow(masked=False, power=2.0)
    operator = S.Ancestral() >> S.Gibbs(sites=1)
    solver = OperatorSolver(model, path, V, source, operator=dd.when(lambda t: t > 0.3, operator, S.Ancestral()))
    x = torch.randint(V, (6, 3))
    tokens = solver.sample(x, 0.3, seed=4, verbose=False, dtype_categorical=torch.float64, label=1)
    grid = [1.0, 0.7, 0.4, 1 - 0.3 * 3, 0.0]
    ours = dd.Sampler(solver.process, flow_denoiser(model, solver.process), solver.operator, grid=grid)
    assert torch.equal(tokens, ours.sample(6, 3, seed=4, initial=x).tokens)
    times = torch.tensor([0.0, 0.3, 1.0])
    path_of = solver.sample(x, 0.3, time_grid=times, return_intermediates=True, seed=4)
    assert torch.equal(path_of[0], x)
    assert torch.equal(path_of[-1], tokens)
    plain = OperatorSolver(model, path, V, source, operator=S.Ancestral())
    own_grid = dd.Sampler(plain.process, flow_denoiser(model, plain.process), plain.operator, grid=[1.0, 0.7, 0.0])
    on_grid = plain.sample(x, None, time_grid=torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64), seed=4)
    assert torch.equal(on_grid, own_grid.sample(6, 3, seed=4, initial=x).tokens)


@pytest.mark.usefixtures("as_user")
def test_bad_paths_and_sources_are_refused() -> None:
    path, source, model = flow(masked=False)
    assert isinstance(flow_process(path, torch.tensor([0.5, 0.3, 0.2])), dd.Marginal)
    with pytest.raises(ValueError, match="needs a convex scheduler"):
        Kappa(CosineScheduler())
    with pytest.raises(ValueError, match="source must hold probabilities"):
        flow_process(path, torch.ones(3))
    with pytest.raises(ValueError, match=r"must be \(4,\), got \(3,\)"):
        OperatorSolver(model, path, 4, source, operator=S.Ancestral())
    with pytest.raises(TypeError, match="needs a predictor"):
        OperatorSolver(model, path, 3, source, operator=S.Gibbs())
    solver = OperatorSolver(model, path, 3, source, operator=S.Ancestral())
    x = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="div_free must be 0"):
        solver.sample(x, 0.5, div_free=1.0)
    with pytest.raises(ValueError, match="step_size must lie in"):
        solver.sample(x, 0.0)
