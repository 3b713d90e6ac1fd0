"""Pictures: the numbers drawn are exact ones; labels have units; bad input is refused; matplotlib is late."""

import subprocess
import sys
from collections.abc import Iterator

import matplotlib
import numpy as np
import pytest
import torch
from places import ROOT
from problems import strong

import discdiff as dd
from discdiff import plots
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.plots import runs

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

MASKED = dd.Masked(3, dd.Linear())
WORLD = strong()
STEPS = (2, 4, 8, 16)


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    pyplot.close("all")


@pytest.fixture(scope="module")
def errors() -> list[tuple[float, float]]:
    """The exact (KL, TV) of Ancestral with 2, 4, 8 and 16 calls."""
    model = WORLD.denoiser(MASKED)
    laws = [T.law(dd.Sampler(MASKED, model, S.Ancestral(), steps=n)) for n in STEPS]
    return [(T.kl(WORLD.p0, law), T.tv(WORLD.p0, law)) for law in laws]


def lines(axis: Axes) -> dict[str, Line2D]:
    """The drawn lines by label; error bars have theirs on the container."""
    named = {str(line.get_label()): line for line in axis.get_lines()}
    return named | {str(box.get_label()): box.lines[0] for box in axis.containers if hasattr(box, "lines")}


def labels(axis: Axes) -> tuple[str, str]:
    return axis.get_xlabel(), axis.get_ylabel()


# --- curves -----------------------------------------------------------------------------------------------------------


def test_kl_against_calls_draws_the_exact_errors(errors: list[tuple[float, float]]) -> None:
    kl = [one for one, _ in errors]
    axis = plots.kl_against_calls({"Ancestral": (STEPS, kl), "exact": (STEPS, [0.0, -1e-16, 0.0, 0.0], [0.0] * 4)})
    found = lines(axis)
    np.testing.assert_array_equal(found["Ancestral"].get_xdata(), STEPS)
    np.testing.assert_array_equal(found["Ancestral"].get_ydata(), kl)
    assert (found["exact"].get_ydata() == 1e-12).all()
    assert (found["at most 1e-12"].get_ydata() == np.array([1e-12, 1e-12])).all()
    assert labels(axis) == ("denoiser calls", "KL(p0 || law of the samples), nats")
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["2", "4", "8", "16"]


def test_a_planted_fault_is_seen_in_the_line(errors: list[tuple[float, float]]) -> None:
    """The comparison fails if the curve drawn is the total variation in place of the KL, or calls are off by one."""
    axis = plots.kl_against_calls({"tv": (STEPS, [tv for _, tv in errors]), "late": ([3, 5, 9, 17], [1.0] * 4)})
    found = lines(axis)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(found["tv"].get_ydata(), [kl for kl, _ in errors])
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(found["late"].get_xdata(), STEPS)


def test_convergence_fits_the_order_that_theory_gives(errors: list[tuple[float, float]]) -> None:
    tv = [one for _, one in errors]
    order = T.order(STEPS, lambda n: dd.Sampler(MASKED, WORLD.denoiser(MASKED), S.Ancestral(), steps=n))
    axis = plots.convergence({"Ancestral": (STEPS, tv), "second": (STEPS, [n**-2.0 for n in STEPS])})
    first, fit, second, exact = axis.get_lines()
    assert first.get_label() == f"Ancestral: order {order:.2f}"
    assert second.get_label() == "second: order 2.00"
    np.testing.assert_array_equal(first.get_ydata(), tv)
    np.testing.assert_allclose(exact.get_ydata(), second.get_ydata())  # the line through a power law is itself
    slope = np.diff(np.log(fit.get_ydata())) / np.diff(np.log(STEPS))
    np.testing.assert_allclose(slope, -order)
    assert labels(axis) == ("steps", "total variation from the target")


def test_frontier_has_entropy_across_and_the_data_as_a_star() -> None:
    given = {"Ancestral": ([2.0, 2.5], [1.4, 1.2]), "Gibbs": ([2.2], [1.1], [0.1], [0.2])}
    axis = plots.frontier(given, data=(2.6, 1.0), quality="nats a token", looks={"Gibbs": {"color": "C3"}})
    found = lines(axis)
    assert found["Ancestral"].get_xydata().tolist() == [[2.0, 1.4], [2.5, 1.2]]
    assert found["data"].get_xydata().tolist() == [[2.6, 1.0]]
    assert found["Gibbs"].get_color() == "C3"
    across, up = axis.containers[1].lines[2]
    assert across.get_segments()[0][:, 0].tolist() == pytest.approx([2.1, 2.3])
    assert up.get_segments()[0][:, 1].tolist() == pytest.approx([0.9, 1.3])
    assert labels(axis) == ("entropy, nats", "nats a token")


def test_the_axes_given_are_drawn_on() -> None:
    figure, axes = pyplot.subplots(1, 2)
    assert plots.frontier({"a": ([1.0], [1.0])}, axes[1]) is axes[1]
    assert not axes[0].get_lines()
    assert pyplot.get_fignums() == [figure.number]


# --- runs -------------------------------------------------------------------------------------------------------------

M = 3  # the mask
PATH = torch.tensor([[[1, M, M, M], [M, M, M, M]], [[1, 0, M, M], [2, M, M, M]], [[1, 0, M, 2], [M, 1, M, 0]]])
PATH = torch.cat([PATH, torch.tensor([[[1, 0, M, 1], [0, 1, 2, 0]]])])  # site 0 of row 1 was masked again


def recorded() -> dd.Samples:
    return dd.Samples(PATH[-1], 3, torch.full((2,), 3), 0, trajectory=PATH.clone())


def test_the_order_of_unmasking_is_the_last_step_that_revealed() -> None:
    expected = torch.tensor([[0, 1, torch.nan, 2], [3, 2, 3, 2]], dtype=torch.float64)
    torch.testing.assert_close(runs.revealed(PATH, MASKED), expected, equal_nan=True)
    axis = plots.unmasking_order(recorded(), MASKED)
    drawn = axis.get_images()[0].get_array()
    np.testing.assert_array_equal(drawn.mask, expected.isnan())
    np.testing.assert_array_equal(drawn.filled(-1), expected.nan_to_num(nan=-1))
    assert labels(axis) == ("position", "sample")
    assert axis.figure.axes[1].get_ylabel() == "step of unmasking"
    image = plots.unmasking_order(recorded(), MASKED, shape=(2, 2))
    assert image.get_images()[0].get_array().tolist() == [[1.5, 1.5], [3, 2]]
    assert labels(image) == ("column", "line")
    with pytest.raises(AssertionError):  # a planted fault: the first step that revealed
        torch.testing.assert_close(
            torch.tensor([[0, 1, torch.nan, 2], [1, 2, 3, 2]]).double(), expected, equal_nan=True
        )


def test_a_run_of_one_site_a_step_is_an_order() -> None:
    out = dd.Sampler(MASKED, WORLD.denoiser(MASKED), S.AnyOrder(), steps=3).sample(5, 3, seed=0, record=True)
    drawn = plots.unmasking_order(out, MASKED).get_images()[0].get_array()
    assert sorted({tuple(sorted(row)) for row in drawn.tolist()}) == [(1.0, 2.0, 3.0)]


def test_a_trajectory_shows_each_state() -> None:
    axis = plots.trajectory(recorded(), MASKED, row=1, decode=lambda ids: "abc"[int(ids)])
    drawn = axis.get_images()[0].get_array()
    np.testing.assert_array_equal(drawn.mask, PATH[:, 1] == M)
    assert drawn.filled(M).tolist() == PATH[:, 1].tolist()
    written = {(int(text.get_position()[1]), int(text.get_position()[0])): text.get_text() for text in axis.texts}
    assert written == {
        (line, site): "abc"[token]
        for line, row in enumerate(PATH[:, 1].tolist())
        for site, token in enumerate(row)
        if token != M
    }
    assert labels(axis) == ("position", "step (0: start)")
    uniform = dd.Uniform(3, dd.Linear())
    out = dd.Sampler(uniform, WORLD.denoiser(uniform), S.Ancestral(), steps=4).sample(2, 3, seed=0, record=True)
    drawn = plots.trajectory(out, uniform).get_images()[0].get_array()
    assert not np.ma.getmaskarray(drawn).any()
    assert drawn.tolist() == out.trajectory[:, 0].tolist()


# --- probes and particles ---------------------------------------------------------------------------------------------


def test_sensitivity_is_what_the_probe_found() -> None:
    uniform = dd.Uniform(3, dd.Linear())
    model = WORLD.denoiser(uniform, predicts="loo")
    curves = dd.diagnostics.sensitivity_curve(model, WORLD.denoiser(uniform).process.prior(32, 3).sample(), [0.3, 0.7])
    axis = plots.loo_sensitivity(curves, [0.3, 0.7], declared="loo")
    found = lines(axis)
    assert {"read as loo, as declared", "read as denoiser"} <= set(found)
    assert found["read as loo, as declared"].get_ydata().max() < 1e-12  # an exact leave-one-out does not look
    for name, label in (("loo", "read as loo, as declared"), ("denoiser", "read as denoiser")):
        np.testing.assert_array_equal(found[label].get_ydata(), curves[name][:, 0])
        assert found[label].get_xdata().tolist() == [0.3, 0.7]
    assert labels(axis)[0] == "alpha, the share of clean tokens"


def test_effective_sample_size_is_a_line_for_each_group() -> None:
    sampler = dd.Sampler(MASKED, WORLD.denoiser(MASKED), S.Ancestral(), steps=4)
    particles = dd.Particles(sampler, lambda x, t: -1.5 * (x == 0).sum(-1).double(), 4, ess=0.75)
    seen: list[torch.Tensor] = []
    particles.sample(12, 3, seed=0, on_step=lambda step, state, info: seen.append(info["ess"]))
    axis = plots.effective_sample_size(seen, particles)
    *groups, mean, due = axis.get_lines()
    assert len(groups) == 3
    for number, line in enumerate(groups):
        assert line.get_xdata().tolist() == [1, 2, 3, 4]
        assert line.get_ydata().tolist() == [float(one[4 * number]) for one in seen]
    np.testing.assert_allclose(mean.get_ydata(), [float(one.mean()) for one in seen])
    assert due.get_ydata()[0] == 3
    assert min(groups[0].get_ydata()) < 4
    assert labels(axis) == ("step", "effective sample size, of 4 particles")


# --- bad input --------------------------------------------------------------------------------------------------------

RUN = recorded()
PARTICLES = dd.Particles(dd.Sampler(MASKED, WORLD.denoiser(MASKED), S.Ancestral(), steps=2), None, 2)


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: plots.kl_against_calls([1, 2]), TypeError, r"curves must be a mapping such as {'Ancestral': \(calls"),
        (lambda: plots.kl_against_calls({}), ValueError, "got an empty one"),
        (lambda: plots.kl_against_calls({"a": ([1],)}), ValueError, r"the curve 'a' must be \(calls, KL, \[standard"),
        (lambda: plots.kl_against_calls({"a": ([1, 2], [1])}), ValueError, "KL of 'a' must be a list of 2 numbers"),
        (lambda: plots.kl_against_calls({"a": ([1], ["x"])}), TypeError, "KL of 'a' must be an array of numbers"),
        (lambda: plots.kl_against_calls({"a": ([1], [float("nan")])}), ValueError, "must hold finite numbers"),
        (lambda: plots.kl_against_calls({"a": ([0], [1])}), ValueError, "calls of 'a' must be at least 1"),
        (lambda: plots.kl_against_calls({"a": ([1], [-1])}), ValueError, "at least 0, got -1; both laws"),
        (lambda: plots.kl_against_calls({"a": ([1], [1])}, floor=0), ValueError, r"floor must lie in \(0, inf\)"),
        (lambda: plots.kl_against_calls({"a": ([1], [1])}, [None]), TypeError, "one matplotlib.axes.Axes or None"),
        (lambda: plots.convergence({"a": ([1, 2], [1, 1])}), ValueError, "a list of at least 3 numbers"),
        (lambda: plots.convergence({"a": ([1, 2, 2], [1, 1, 1])}), ValueError, "at least 1 and increase"),
        (lambda: plots.convergence({"a": ([1, 2, 3], [1, 1, 0])}), ValueError, "an exact sampler has no order"),
        (lambda: plots.frontier({"a": ([1], [1])}, data=3), ValueError, r"data must be \(entropy, quality\)"),
        (lambda: plots.frontier({"a": ([1], [1])}, quality=3), TypeError, "label of an axis"),
        (lambda: plots.trajectory(PATH, MASKED), TypeError, "samples must be what a sampler returns"),
        (lambda: plots.trajectory(RUN, "masked"), TypeError, "process must be a Process, such as sampler.process"),
        (lambda: plots.trajectory(RUN, MASKED, row=2), ValueError, r"row must lie in 0..1, got 2"),
        (lambda: plots.trajectory(RUN, MASKED, decode="abc"), TypeError, "decode is called with ids"),
        (
            lambda: plots.unmasking_order(dd.Samples(PATH[-1], 3, torch.ones(2).long(), 0), MASKED),
            ValueError,
            "no trajectory; give record=True",
        ),
        (lambda: plots.unmasking_order(RUN, dd.Uniform(3, dd.Linear())), ValueError, "needs a process with a mask"),
        (lambda: plots.unmasking_order(RUN, MASKED, shape=(3, 3)), ValueError, r"\(height, width\) of 4 sites"),
        (lambda: plots.loo_sensitivity([1], [0.5]), TypeError, "what sensitivity_curve returns"),
        (lambda: plots.loo_sensitivity({"loo": torch.zeros(2, 2)}, [0.5]), ValueError, r"shape \(1, 2\), got"),
        (lambda: plots.loo_sensitivity({"loo": torch.zeros(1, 2)}, [1.5]), ValueError, r"must lie in \(0, 1\)"),
        (
            lambda: plots.loo_sensitivity({"loo": torch.zeros(1, 2)}, [0.5], declared="ratio"),
            ValueError,
            r"declared must be one of \['loo'\], got 'ratio'",
        ),
        (lambda: plots.effective_sample_size([], PARTICLES), ValueError, r"a list of tensors \(B,\), one a step"),
        (lambda: plots.effective_sample_size([torch.ones(3)], PARTICLES), ValueError, "multiple of per_group = 2"),
        (lambda: plots.effective_sample_size([torch.ones(2) * 3], PARTICLES), ValueError, r"lie in \[1, 2\], got 3"),
        (lambda: plots.effective_sample_size([torch.ones(2)], 2), TypeError, "the Particles that ran"),
    ],
)
def test_bad_input_is_refused(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()  # type: ignore[operator]
    assert pyplot.get_fignums() == []  # nothing is drawn before the input is checked


def test_matplotlib_is_imported_by_the_first_picture_and_named_if_missing() -> None:
    code = (
        "import sys; import discdiff as dd; dd.plots.frontier; print('matplotlib' in sys.modules);"
        "sys.modules['matplotlib'] = None\n"
        "try: dd.plots.frontier({'a': ([1.0], [1.0])})\n"
        "except ImportError as error: print(error)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert told.splitlines() == ["False", "discdiff.plots needs matplotlib: pip install 'discdiff[demo]'"]
