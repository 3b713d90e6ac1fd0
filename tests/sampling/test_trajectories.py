"""Runs whose choices are recorded: the same run again, weighed under other weights with gradients, and forked."""

import copy
import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gradients import CLOCKS, Network, denoiser, derivatives
from problems import families, named, pairs, processes
from pyro import poutine
from safetensors.torch import load_file, save_file
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff.choices import Choices
from discdiff.command.bench import Meter
from discdiff.command.cli import parse_operator
from discdiff.command.verify import SHIPPED
from discdiff.kernels.reference import Reading
from discdiff.sampling import trajectory

B, L, V, N = 3, 2, 3, 3
PREDICTS = ("denoiser", "loo", "ratio")
# what an operator says that is not for the process or the prediction
REFUSALS = (" needs ", "is undefined", "is never reached")
MIXED = dd.mix({S.Ancestral(): 0.5, S.SplitLeap() >> S.Gibbs(): 0.5})


# Hundreds of steps end so near alpha = 1 that a denoiser's last digits decide, and differences are noise.
COARSE = {"adaptive": "adaptive(0.3, 0.2)"}


def whole_step(text: str) -> dd.Operator:
    operator = parse_operator(COARSE.get(text, text))
    return operator if operator.moves else S.Ancestral() >> operator


def run_of(
    operator: dd.Operator, process: dd.Process, predicts: str = "loo", batch: int = B, **options: object
) -> tuple[dd.Sampler, dd.Samples, Network]:
    """A sampler with a small random network in float64, samples of it with their choices, and the network."""
    torch.manual_seed(0)
    network = Network(process.states)
    model = denoiser(process, predicts, network)
    if predicts == "ratio" and not process.absorbing:  # a ratio says nothing at alpha = 0, so the run begins later
        torch.manual_seed(1)
        options = {"initial": process.marginal(torch.randint(V, (batch, L)), 0.9).sample()} | options
        sampler = dd.Sampler(process, model, operator, grid=[0.9, 0.6, 0.3, 0.0])
    else:
        sampler = dd.Sampler(process, model, operator, steps=N)
    asked = {"batch": batch, "seed": 7, "record": "choices"} | options
    return sampler, sampler.sample(**asked), network  # type: ignore[arg-type]


def known(out: dd.Samples) -> tuple[Choices, Tensor, Tensor]:
    """The choices, the log-probability and the trajectory, which none of these samples lacks."""
    assert out.choices is not None
    assert out.log_prob is not None
    assert out.trajectory is not None
    return out.choices, out.log_prob, out.trajectory


def edited(out: dd.Samples, choices: Choices) -> dd.Samples:
    return replace(out, choices=choices)


def moved(out: dd.Samples, site: str, value: Tensor, rows: slice = slice(None)) -> dd.Samples:
    """The same samples with another value of a site, in some of its rows."""
    choices = known(out)[0].copy()
    choices.keep(site, value, choices.rows(site)[rows] + choices.first_row)
    return edited(out, choices)


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", [S.Ancestral(), S.Gillespie(), MIXED, S.Unmask(noise=1.0)], ids=repr)
def test_the_choices_are_the_sites_of_the_same_run_in_pyro(operator: dd.Operator) -> None:
    sampler, out, _ = run_of(operator, dd.Masked(V, dd.Linear()), batch=6, first_row=4)
    choices, log_prob, _ = known(out)
    trace = poutine.trace(lambda: sampler.sample(6, seed=7, first_row=4, listen=True)).get_trace()
    sites = {name: node for name, node in trace.nodes.items() if node["type"] == "sample"}
    assert [*choices] == [*sites]
    total = torch.zeros(6, dtype=torch.float64)
    for name, value in choices.items():
        torch.testing.assert_close(value, sites[name]["value"], rtol=0, atol=0)
        assert torch.equal(choices.rows(name) + 4, sites[name]["fn"].key.ids)
        total = total.index_add(0, choices.rows(name), sites[name]["fn"].log_prob(value).double())
    torch.testing.assert_close(total, log_prob, rtol=0, atol=1e-13)


def test_a_choice_of_some_rows_says_which() -> None:
    _, out, _ = run_of(MIXED, dd.Uniform(V, dd.Linear()), batch=16)
    choices = known(out)[0]
    branch = choices["1.0.branch"]
    assert choices["1.0.branch"].shape == (16,)
    for k, site in enumerate(("1.1.where", "1.2.where")):
        assert torch.equal(choices.rows(site), (branch == k).nonzero()[:, 0])
        assert choices[site].shape == (len(choices.rows(site)), L)
    assert repr(choices) == f"Choices({len(choices)} sites, 16 rows, 3 steps)"


@pytest.mark.parametrize(("vocab", "kind"), [(3, torch.uint8), (300, torch.int16), (40_000, torch.int32)])
def test_values_are_kept_in_the_smallest_dtype(vocab: int, kind: torch.dtype) -> None:
    process = dd.Uniform(vocab, dd.Linear())
    model = dd.Denoiser(lambda x, t: torch.zeros(1, 1, 1).expand(*x.shape, vocab), process, "loo")
    out = dd.Sampler(process, model, S.Ancestral(), steps=2).sample(8, 16, seed=0, record="choices")
    choices = known(out)[0]
    held = choices.tensors()
    assert held["value/0.0.prior"].dtype == kind
    assert held["value/1.0.data"].dtype == torch.bool
    assert choices["0.0.prior"].dtype == torch.int64
    assert set(held) == {"start"} | {f"value/{site}" for site in choices}


def test_a_record_is_kept_only_if_it_is_asked_for() -> None:
    sampler, out, _ = run_of(S.Ancestral(), dd.Uniform(V, dd.Linear()))
    plain, recorded = sampler.sample(B, seed=7), sampler.sample(B, seed=7, record=True)
    assert torch.equal(plain.tokens, out.tokens)
    assert (plain.choices, recorded.choices) == (None, None)
    assert replace(out, choices=None) == recorded
    assert repr(out).endswith("trajectory, log_prob, choices)")


# --- equal and on disk ------------------------------------------------------------------------------------------------


def test_choices_come_back_from_a_file(tmp_path: Path) -> None:
    sampler, out, _ = run_of(MIXED, dd.Uniform(V, dd.Linear()), batch=16, prompt=[1], first_row=5)
    out.save(tmp_path / "out")
    back = dd.Samples.load(tmp_path / "out")
    assert back == out
    assert back.choices == out.choices
    assert torch.equal(sampler.log_prob(back), sampler.log_prob(out))
    assert sampler.fork(back, step=1, seed=3) == sampler.fork(out, step=1, seed=3)
    site = "2.0.branch"
    assert moved(out, site, 1 - known(out)[0][site]) != out, "planted: other values"
    assert edited(out, known(out)[0].without(site)) != out, "planted: a site less"
    assert edited(out, replace(known(out)[0], first_row=6)) != out, "planted: other rows"
    assert known(out)[0] != 5


@pytest.mark.usefixtures("as_user")
def test_a_damaged_file_of_choices_is_refused(tmp_path: Path) -> None:
    _, out, _ = run_of(MIXED, dd.Uniform(V, dd.Linear()), batch=16)
    out.save(tmp_path / "out")
    held = load_file(tmp_path / "out")
    head = {"discdiff": "Samples", "numbers": '{"nfe": 1, "seed": 1, "choices": %s}'}
    right = '{"first_row": 0, "drawn": true, "times": [1.0, 0.5], "guided": []}'
    some = next(name for name in held if name.startswith("choices/rows/"))
    for numbers, change, text in (
        (right, {"choices/start": None}, "start must"),
        (right, {"choices/start": held["choices/start"][:2]}, "a value a row"),
        (right, {"choices/frozen": torch.ones(2)}, "frozen must"),
        (right, {"choices/other": torch.ones(2)}, "'other' is not known"),
        (right, {"choices/rows/9.0.x": torch.ones(2)}, "'rows/9.0.x' is not known"),
        (right, {"choices/value/x": torch.ones(16)}, "takes a name"),
        (right, {"choices/value/1.0.branch": torch.ones(5)}, "a value a row"),
        (right, {some: held[some] + 16}, "rows must have ids"),
        (right, {some: held[some].double()}, "for each of its rows"),
        ("null", {}, "first_row"),
        ('{"first_row": -1, "drawn": true, "times": []}', {}, "first_row"),
        ('{"first_row": 0, "drawn": true, "times": ["1"]}', {}, "first_row"),
        ('{"first_row": 0, "drawn": true, "times": [], "more": 1}', {}, "first_row"),
    ):
        tensors = {name: value for name, value in (held | change).items() if value is not None}
        save_file(tensors, tmp_path / "bad", head | {"numbers": head["numbers"] % numbers})
        with pytest.raises(ValueError, match=text):
            dd.Samples.load(tmp_path / "bad")


# --- the same run again -----------------------------------------------------------------------------------------------


def slopes(sampler: dd.Sampler, out: dd.Samples, network: Network) -> float:
    """The least relative error of the gradient, over the steps of the differences."""
    errors = []
    for step in (1e-4, 1e-5, 1e-6):  # a smaller one where a kink, or another number of events, lies within the first
        try:
            found, right = derivatives(lambda: sampler.log_prob(out).sum(), [*network.parameters()], step)
        except ValueError as error:
            assert "recorded" in str(error)
            continue
        errors.append(float((found - right).abs() / (right.abs() + 1e-4)))
        if errors[-1] <= 1e-6:
            break
    return min(errors)


def agree(text: str, process: dd.Process, kinds: Iterable[str], differences: int) -> int:
    """How many kinds of predictions the operator accepts; rescoring agrees in all, and its gradient in the first few.

    The log-probability is that of the run, and the gradient that of central differences.
    """
    accepted = 0
    for predicts in kinds:
        try:
            sampler, out, network = run_of(whole_step(text), process, predicts)
        except ValueError as error:
            assert any(words in str(error) for words in REFUSALS)
            continue
        torch.testing.assert_close(sampler.log_prob(out).detach(), known(out)[1], rtol=0, atol=1e-10)
        if accepted < differences:
            assert slopes(sampler, out, network) <= 1e-6, predicts
        accepted += 1
    return accepted


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize("process", processes(), ids=repr)
@pytest.mark.parametrize("text", SHIPPED)
def test_rescoring_is_the_recorded_log_probability_and_its_gradient_that_of_differences(
    text: str, process: dd.Process
) -> None:
    """Of one kind of prediction by turns; the slow test is of all."""
    turn = SHIPPED.index(text) % len(PREDICTS)
    if not agree(text, process, PREDICTS[turn:] + PREDICTS[:turn], differences=1):
        pytest.skip("not for this process")


@pytest.mark.slow
@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize("process", families()[2:] + pairs(V), ids=named)
@pytest.mark.parametrize("text", SHIPPED)
def test_rescoring_on_every_other_family(text: str, process: dd.Process) -> None:
    if not agree(text, process, PREDICTS, differences=3):
        pytest.skip("not for this process")


@pytest.mark.slow
@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize("process", processes(), ids=repr)
@pytest.mark.parametrize("text", SHIPPED)
def test_rescoring_of_every_kind_of_prediction(text: str, process: dd.Process) -> None:
    if not agree(text, process, PREDICTS, differences=3):
        pytest.skip("not for this process")


def test_a_detached_reading_gives_another_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reading, "along", lambda self, path: self)
    assert slopes(*run_of(S.Ancestral(), dd.Uniform(V, dd.Linear()))) > 1e-3, "planted: what was read is a constant"


@pytest.mark.parametrize("operator", [S.Ancestral(), S.Multistep(), S.ThetaTrapezoidal()], ids=repr)
def test_a_clock_has_the_gradient_of_differences_too(operator: dd.Operator) -> None:
    learned = torch.nn.ParameterDict()
    sampler, out, _ = run_of(operator, dd.Uniform(V, CLOCKS["learned function"](learned)), "denoiser")
    found, right = derivatives(lambda: sampler.log_prob(out).sum(), [*learned.parameters()], 1e-4)
    assert float((found - right).abs()) <= 1e-6 * float(right.abs())
    assert float(right.abs()) > 1e-2


@pytest.mark.parametrize("operator", [S.Ancestral(), MIXED, S.Multistep(), S.ThetaTrapezoidal()], ids=repr)
def test_other_weights_give_the_log_probability_of_a_run_under_them(operator: dd.Operator) -> None:
    """As Pyro's replay of the same values under these weights says."""
    process = dd.Uniform(V, dd.Linear())
    sampler, out, network = run_of(operator, process, batch=8)
    choices, log_prob, _ = known(out)
    perturbed = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in perturbed.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    other = denoiser(process, "loo", perturbed)
    found = sampler.log_prob(out, model=other).detach()
    assert bool(((found - log_prob).abs() > 1e-3).all()), "planted: other weights"
    values = poutine.trace(lambda: sampler.sample(8, seed=7, listen=True)).get_trace()
    again = dd.Sampler(process, other, operator, steps=N)
    with torch.no_grad():
        trace = poutine.trace(poutine.replay(lambda: again.sample(8, seed=9, listen=True), trace=values)).get_trace()
    total = torch.zeros(8, dtype=torch.float64)
    for name in choices:
        node = trace.nodes[name]
        total = total.index_add(0, choices.rows(name), node["fn"].log_prob(node["value"]).double())
    torch.testing.assert_close(found, total, rtol=0, atol=1e-12)


def test_the_mean_of_the_ratio_is_one() -> None:
    """E[p / q] = 1 over all runs of one step at one site, with the runs enumerated by their tokens."""
    process = dd.Masked(V, dd.Linear())
    logits = torch.tensor([[0.3, -0.2, 1.0]], dtype=torch.float64)
    models = [dd.Denoiser(lambda x, t, k=k: (k * logits).expand(*x.shape, V), process, "denoiser") for k in (1.0, -2.0)]
    sampler = dd.Sampler(process, models[0], S.Ancestral(), steps=1)
    out = sampler.sample(64, 1, seed=0, record="choices")
    first = {int(token): row for row, token in reversed([*enumerate(out.tokens[:, 0])])}
    assert len(first) == V
    for model, k in zip(models, (1.0, -2.0), strict=True):
        found = sampler.log_prob(out, model=model)
        right = (k * logits).log_softmax(-1)[0]
        torch.testing.assert_close(found[[*first.values()]], right[[*first]], rtol=0, atol=1e-12)
        assert float(found[[*first.values()]].exp().sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("process", processes(), ids=repr)
def test_prompts_given_states_and_correctors_alone(process: dd.Process) -> None:
    frozen = torch.tensor([False, True])
    for options in (
        {"prompt": [2]},
        {"prompt": torch.tensor([[0, 1], [1, 2], [2, 0]]), "frozen": frozen, "first_row": 9},
        {"initial": process.prior(B, L).sample()},
    ):
        sampler, out, _ = run_of(S.Ancestral() >> S.Gibbs(), process, **options)
        torch.testing.assert_close(sampler.log_prob(out), known(out)[1], rtol=0, atol=1e-12)
        assert known(out)[0].drawn == ("initial" not in options)
    model = denoiser(process, "loo", Network(process.states))
    alone = dd.Sampler(process, model, S.Gibbs() ** 3, time=0.4)
    out = alone.sample(initial=process.marginal(torch.zeros(B, L).long(), 0.4).sample(), seed=0, record="choices")
    torch.testing.assert_close(alone.log_prob(out), known(out)[1], rtol=0, atol=1e-12)


def test_a_frozen_site_that_is_forgotten_is_caught() -> None:
    sampler, out, _ = run_of(S.Ancestral(), dd.Uniform(V, dd.Linear()), batch=16, prompt=[2])
    for frozen in (torch.ones(16, L, dtype=torch.bool), None):
        with pytest.raises(ValueError, match="impossible"):
            sampler.log_prob(edited(out, replace(known(out)[0], frozen=frozen)))


def test_what_a_context_tells_a_row_belongs_to_its_id() -> None:
    process = dd.Uniform(V, dd.Linear())
    condition = torch.randn(4, V, dtype=torch.float64)
    model = dd.Denoiser(lambda x, t, y: y[:, None].expand(*x.shape, V), process, "loo").with_condition(condition, 3)  # type: ignore[call-arg,misc,arg-type]
    sampler = dd.Sampler(process, model, S.Ancestral(), steps=N)
    out = sampler.sample(4, L, seed=1, first_row=3, record="choices")
    torch.testing.assert_close(sampler.log_prob(out), known(out)[1], rtol=0, atol=1e-12)
    assert torch.equal(sampler.fork(out, step=1, seed=1).tokens, out.tokens)
    # the copies have ids of their own: they need a condition each
    branches = model.with_condition(condition.repeat_interleave(2, 0), 6)
    twice = dd.Sampler(process, branches, S.Ancestral(), steps=N)
    forked = twice.fork(out, step=2, copies=2, seed=5)
    assert torch.equal(known(forked)[2][2], known(out)[2][2].repeat_interleave(2, 0))
    torch.testing.assert_close(twice.log_prob(forked), known(forked)[1], rtol=0, atol=1e-12)


# --- what is wrong is said --------------------------------------------------------------------------------------------


def test_a_wrong_value_is_caught() -> None:
    sampler, out, _ = run_of(S.Unmask(), dd.Masked(V, dd.Linear()), batch=8)
    choices, log_prob, _ = known(out)
    assert moved(out, "3.0.token", choices["3.0.token"]) == out
    where, token = choices["3.0.order"], choices["3.0.token"]
    wrong = moved(out, "3.0.token", torch.where(where, (token + 1) % V, token))
    with pytest.raises(ValueError, match=r"log_prob: row 0: .* other tokens than those of the samples"):
        sampler.log_prob(wrong)
    consistent = replace(wrong, tokens=torch.where(where, (out.tokens + 1) % V, out.tokens))
    assert bool(((sampler.log_prob(consistent) - log_prob).abs() > 1e-3).all()), "planted: other tokens, all the same"
    with pytest.raises(ValueError, match=r"row 0 has a recorded value that is impossible .* at site 3.0.token"):
        sampler.log_prob(moved(out, "3.0.token", token + V))
    with pytest.raises(ValueError, match=r"row 0 has a recorded value that is impossible .* at site 3.0.order"):
        sampler.log_prob(moved(out, "3.0.order", ~where))
    with pytest.raises(ValueError, match=r"site 3.0.order takes torch.bool of shape \(8, 2\)"):
        sampler.log_prob(moved(out, "3.0.order", where.long()))


def test_what_another_model_rules_out_names_site_and_row() -> None:
    process = dd.Masked(V, dd.Linear())
    sampler, out, _ = run_of(S.Ancestral(), process, "denoiser", batch=8, first_row=20)
    never = dd.Denoiser(lambda x, t: torch.zeros(*x.shape, V), process, "denoiser", suppress=(1,))
    row = int((out.tokens == 1).any(-1).nonzero()[0]) + 20
    with pytest.raises(ValueError, match=rf"row (20|{row}|2\d) .* impossible under this model at site \d.0.token"):
        sampler.log_prob(out, model=never)


def test_a_dropped_or_a_spare_answer_is_named() -> None:
    sampler, out, _ = run_of(MIXED, dd.Uniform(V, dd.Linear()), batch=16, first_row=2)
    choices = known(out)[0]
    for site in ("0.0.prior", "1.0.branch", "2.1.where", "3.3.data"):
        with pytest.raises(ValueError, match=rf"log_prob: site {site} has no recorded value, for row \d+"):
            sampler.log_prob(edited(out, choices.without(site)))
    part = choices.rows("2.1.where")
    with pytest.raises(ValueError, match=rf"row {int(part[0]) + 2} has no recorded value at site 2.1.where"):
        sampler.log_prob(moved(out, "2.1.where", choices["2.1.where"][1:], slice(1, None)))
    spare = choices.copy()
    spare.keep("2.7.more", torch.ones(16, dtype=torch.bool), torch.arange(16) + 2)
    with pytest.raises(ValueError, match=r"site 2.7.more was recorded, for row 2, and the run makes no such choice"):
        sampler.log_prob(edited(out, spare))
    spare = choices.copy()
    every = torch.zeros(16, L, dtype=torch.bool)
    every[part] = choices["2.1.where"]
    spare.keep("2.1.where", every, torch.arange(16) + 2)
    with pytest.raises(ValueError, match=r"row \d+ has a recorded value and makes no such choice at site 2.1.where"):
        sampler.log_prob(edited(out, spare))


def test_a_decision_without_a_choice_that_turns_out_otherwise_is_said() -> None:
    process = dd.Masked(V, dd.Linear())
    sampler, out, _ = run_of(S.Greedy(), process, "denoiser")
    logits = 50 * torch.eye(V)[int(out.tokens[0, 0] + 1) % V]
    other = dd.Denoiser(lambda x, t: logits.expand(*x.shape, V), process, "denoiser")
    with pytest.raises(ValueError, match=r"log_prob: row 0: .* decides by the prediction, without a choice"):
        sampler.log_prob(out, model=other)
    with pytest.raises(ValueError, match=r"fork: row 0: .* decides by the prediction, without a choice"):
        dd.Sampler(process, other, S.Greedy(), steps=N).fork(out, step=N - 1)


@pytest.mark.usefixtures("as_user")
def test_what_cannot_be_is_refused() -> None:
    process = dd.Uniform(V, dd.Linear())
    sampler, out, _ = run_of(S.Ancestral(), process)
    choices = known(out)[0]
    plain = sampler.sample(B, seed=7, record=True)
    other = denoiser(dd.Masked(V, dd.Linear()), "denoiser", Network(V + 1))
    for call, error, text in (
        (lambda: sampler.sample(B, record="view"), ValueError, "reserved for the viewer"),
        (lambda: sampler.sample(B, record="all"), TypeError, 'record must be True, False or "choices"'),
        (lambda: sampler.sample(B, record=1), TypeError, "record must be"),
        (lambda: sampler.log_prob(plain), ValueError, "hold no choices"),
        (lambda: sampler.log_prob(out.tokens), TypeError, "takes the Samples"),
        (lambda: sampler.log_prob(out, model=other), ValueError, "the model is for"),
        (lambda: sampler.log_prob(out, model=Network(V)), TypeError, "must be a Denoiser"),
        (lambda: sampler.on_grid([1.0, 0.5, 0.0]).log_prob(out), ValueError, "made at the times"),
        (lambda: sampler.log_prob(replace(out, tokens=out.tokens[:2])), ValueError, "do not go with"),
        (lambda: sampler.log_prob(edited(out, replace(choices, times=()))), ValueError, "do not go with"),
        (lambda: sampler.fork(plain, step=1), ValueError, "fork: these samples hold no choices"),
        (lambda: sampler.fork(out, step=3), ValueError, "fork: step"),
        (lambda: sampler.fork(out, step=-1), ValueError, "fork: step"),
        (lambda: sampler.fork(out, step=1, copies=0), ValueError, "fork: copies"),
        (lambda: sampler.fork(out, step=1, seed="no"), TypeError, "fork: seed"),
        (lambda: sampler.fork(out, step=1, copies=2**31), ValueError, "fork: "),
        (lambda: choices.keep("prior", torch.ones(B), torch.arange(B)), ValueError, "takes a name"),
        (lambda: choices.keep("1.0.x", torch.ones(B), torch.arange(B) + 1), ValueError, "must have ids"),
        (lambda: choices.without("9.0.x"), KeyError, "9.0.x"),
        (lambda: choices.rows("9.0.x"), KeyError, "9.0.x"),
    ):
        with pytest.raises(error, match=text):
            call()


# --- cut and resumed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", [S.Ancestral(), S.Multistep(), MIXED, S.Gillespie()], ids=repr)
def test_the_choices_of_a_cut_run_are_those_of_the_uncut_one(operator: dd.Operator) -> None:
    sampler, out, _ = run_of(operator, dd.Masked(V, dd.Linear()), batch=6)
    choices, log_prob, path = known(out)
    for cut in range(1, N):
        part = sampler.sample(6, seed=7, record="choices", until=cut)
        rest = sampler.sample(resume=part.state, record="choices")
        assert rest.choices == choices
        assert part.choices == choices.until(sampler.grid[: cut + 1])
        assert known(part)[0].steps == cut
        assert {int(site[0]) for site in known(part)[0]} == set(range(cut + 1))
        torch.testing.assert_close(sampler.log_prob(part), known(part)[1], rtol=0, atol=1e-12)
        torch.testing.assert_close(sampler.log_prob(rest), log_prob, rtol=0, atol=1e-12)
        assert torch.equal(known(sampler.fork(part, step=cut, seed=7))[2], path)
        assert sampler.sample(resume=part.state, record=True).choices is None
    stopped = sampler.sample(6, seed=7, record="choices", on_step=lambda step, state, info: step < 2)
    assert stopped.choices == choices.until(sampler.grid[:3])
    part = sampler.sample(6, seed=7, record=True, until=1)
    with pytest.raises(ValueError, match='choices of the run to resume were not kept; give record="choices"'):
        sampler.sample(resume=part.state, record="choices")


# --- forks ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize("process", processes(), ids=repr)
@pytest.mark.parametrize("text", SHIPPED)
def test_a_fork_shares_its_past_token_for_token(text: str, process: dd.Process) -> None:
    try:
        sampler, out, _ = run_of(whole_step(text), process)
    except ValueError as error:
        assert any(words in str(error) for words in REFUSALS)
        pytest.skip("not for this process")
    choices, log_prob, path = known(out)
    for step in (0, N - 1):
        same = sampler.fork(out, step=step, seed=7)
        assert torch.equal(same.tokens, out.tokens)
        assert same.choices == choices
        assert torch.equal(known(same)[2], path)
        torch.testing.assert_close(known(same)[1], log_prob, rtol=0, atol=1e-12)
        forked = sampler.fork(out, step=step, copies=3, seed=11)
        shared = path[: step + 1].repeat_interleave(3, 1)
        assert torch.equal(known(forked)[2][: step + 1], shared)
        torch.testing.assert_close(sampler.log_prob(forked).detach(), known(forked)[1], rtol=0, atol=1e-10)
        again = sampler.fork(forked, step=step, seed=11)
        assert torch.equal(again.tokens, forked.tokens)


def test_forks_differ_after_the_shared_steps_and_only_there() -> None:
    sampler, out, _ = run_of(S.Ancestral() >> S.Gibbs(), dd.Uniform(V, dd.Linear()), batch=32)
    path = known(out)[2]
    forked = sampler.fork(out, step=1, copies=2, seed=11)
    branches = known(forked)[2].unflatten(1, (32, 2))
    assert branches.shape == (N + 1, 32, 2, L)
    assert torch.equal(branches[:2], path[:2, :, None].expand(-1, -1, 2, -1))
    assert bool((branches[2, :, 0] != branches[2, :, 1]).any())
    assert bool((branches[2] != path[2, :, None]).any()), "planted: the fork with the run's seed would be the run"
    assert not torch.equal(forked.tokens, sampler.fork(out, step=1, copies=2, seed=12).tokens)
    assert forked.seed == 11
    assert forked.nfe == 2 * (N - 1), "the shared steps are not counted"
    assert torch.equal(forked.nfe_rows, torch.full((64,), 2 * (N - 1)))
    assert torch.equal(
        sampler.log_prob(sampler.fork(out, step=0, seed=11)), known(sampler.fork(out, step=0, seed=11))[1]
    )


@pytest.mark.parametrize("parts", [(1,) * 8, (3, 5)])
def test_forks_do_not_depend_on_a_split_of_the_batch(parts: tuple[int, ...]) -> None:
    sampler, out, _ = run_of(S.Ancestral() >> S.Gibbs(), dd.Uniform(V, dd.Linear()), batch=8, first_row=5)
    whole = sampler.fork(out, step=1, copies=3, seed=11)
    assert known(whole)[0].first_row == 15
    found = []
    for size, first in zip(parts, itertools.accumulate((5, *parts)), strict=False):
        part = sampler.sample(size, seed=7, first_row=first, record="choices")
        found.append(sampler.fork(part, step=1, copies=3, seed=11).tokens)
    assert torch.equal(torch.cat(found), whole.tokens)


# --- memory -----------------------------------------------------------------------------------------------------------


def peaks(operator: dd.Operator, process: dd.Process) -> tuple[int, int]:
    """Peak bytes of log_prob and its backward pass, for the first 8 of 32 equal steps and for all; V = 2000, L = 64."""
    torch.manual_seed(0)
    embed, out = torch.nn.Embedding(process.states, 16), torch.nn.Linear(16, 2000)
    model = dd.Denoiser(lambda x, t: out(embed(x)).log_softmax(-1), process, "loo")
    sampler = dd.Sampler(process, model, operator, steps=32)
    found = []
    for until in (8, 32):
        run = sampler.sample(4, 64, seed=3, record="choices", until=until)
        with Meter() as meter:
            sampler.log_prob(run).sum().backward()
        found.append(meter.peak)
        assert embed.weight.grad is not None
        embed.weight.grad = out.weight.grad = out.bias.grad = None
    return found[0], found[1]


CASES = [(S.Ancestral(), dd.Masked(2000, dd.Linear())), (S.Multistep(), dd.Masked(2000, dd.Linear()))]


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(("operator", "process"), CASES, ids=repr)
def test_memory_does_not_depend_on_the_number_of_steps(operator: dd.Operator, process: dd.Process) -> None:
    eight, all_steps = peaks(operator, process)
    assert abs(all_steps - eight) <= 0.1 * eight, (eight, all_steps)


def plain(function: Callable[..., object], *args: object, use_reentrant: bool) -> object:
    return function(*args)


@pytest.mark.usefixtures("as_user")
def test_steps_that_keep_their_graph_or_their_logits_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(trajectory, "checkpoint", plain)
        eight, all_steps = peaks(*CASES[0])
        assert all_steps > 2 * eight, "planted: the graph of each step is kept"
    monkeypatch.setattr(trajectory, "unloaded", lambda state, made: (state, []))
    eight, all_steps = peaks(*CASES[1])
    assert all_steps > 1.5 * eight, "planted: the logits that a state carries are kept"


# --- by step, and of the later steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("process", processes(), ids=repr)
@pytest.mark.parametrize("operator", [S.Ancestral() >> S.Gibbs(), S.Multistep(), MIXED], ids=repr)
def test_the_log_probabilities_of_the_steps_sum_to_the_runs(operator: dd.Operator, process: dd.Process) -> None:
    sampler, out, network = run_of(operator, process, batch=6)
    weights = [*network.parameters()]
    every, plain = sampler.log_prob(out, by_step=True), sampler.log_prob(out)
    assert every.shape == (6, N)
    torch.testing.assert_close(every.sum(1), plain, rtol=0, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(sampler.log_prob(out, by_step=True), every)
    for since in range(N):
        columns, later = sampler.log_prob(out, since=since, by_step=True), sampler.log_prob(out, since=since)
        assert torch.equal(columns, every[:, since:])
        torch.testing.assert_close(later, every[:, since:].sum(1), rtol=0, atol=1e-12)
        right = torch.autograd.grad(every[:, since:].sum(), weights, retain_graph=True)
        for found in (torch.autograd.grad(later.sum(), weights), torch.autograd.grad(columns.sum(), weights)):
            for one, other in zip(found, right, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        if since:
            before = sampler.sample(6, seed=7, record="choices", until=since)
            torch.testing.assert_close(later + sampler.log_prob(before), plain, rtol=0, atol=1e-12)
            whole = torch.autograd.grad(plain.sum(), weights, retain_graph=True)
            assert any(float((one - other).abs().max()) > 1e-3 for one, other in zip(whole, right, strict=True))


@pytest.mark.parametrize("process", processes(), ids=repr)
def test_the_gradient_of_later_steps_is_that_of_differences(process: dd.Process) -> None:
    """Also through the prediction that a step takes from the one before it."""
    sampler, out, network = run_of(S.Multistep(), process)
    found, right = derivatives(lambda: sampler.log_prob(out, since=1).sum(), [*network.parameters()], 1e-4)
    assert float((found - right).abs()) <= 1e-6 * (float(right.abs()) + 1e-2)


def test_the_draw_from_the_prior_belongs_to_the_first_step() -> None:
    process = dd.Uniform(V, dd.Linear())
    sampler, out, _ = run_of(S.Ancestral(), process)
    given = sampler.sample(initial=known(out)[0].start, seed=7, record="choices")
    drawn = sampler.log_prob(out, by_step=True) - sampler.log_prob(
        edited(out, replace(known(out)[0], drawn=False).without("0.0.prior")), by_step=True
    )
    torch.testing.assert_close(drawn[:, 0].exp(), torch.full((B,), 1 / V**L).double(), rtol=0, atol=1e-8)  # float32
    assert not bool(drawn[:, 1:].any())
    assert not known(given)[0].drawn


@pytest.mark.usefixtures("as_user")
def test_steps_that_are_not_there_are_refused() -> None:
    sampler, out, _ = run_of(S.Ancestral(), dd.Uniform(V, dd.Linear()))
    part = sampler.sample(B, seed=7, record="choices", until=1)
    for call, error, text in (
        (lambda: sampler.log_prob(out, since=N), ValueError, r"log_prob: since must lie in 0\.\.2"),
        (lambda: sampler.log_prob(part, since=1), ValueError, r"log_prob: since must lie in 0\.\.0"),
        (lambda: sampler.log_prob(out, since=-1), ValueError, "log_prob: since"),
        (lambda: sampler.log_prob(out, since=0.5), TypeError, "log_prob: since"),
        (lambda: sampler.log_prob(out, by_step=1), TypeError, "log_prob: by_step must be True or False"),
    ):
        with pytest.raises(error, match=text):
            call()
