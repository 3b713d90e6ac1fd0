"""The conformance suite: a process of the user's own passes, and each planted error is found and named."""

import pytest
import torch
from planted import BiasedDraws, Crashes, Cyclic, NotMonotone, NotNormalised, Reset, WrongNoise, WrongWeight

import discdiff as dd
from discdiff import theory as T


@pytest.mark.parametrize("process", [Reset(3, dd.Linear()), Cyclic(3, dd.Linear())], ids=lambda p: type(p).__name__)
def test_a_users_own_process_conforms(process: dd.Process) -> None:
    report = T.check_process(process)
    assert report.ok, str(report)
    assert str(report).count("ok  ") == len(report.checks) - len(report.unchecked) >= 33


class Fixed(dd.Uniform):
    """It comes in one size."""

    def __init__(self) -> None:
        super().__init__(3, dd.LogLinear())

    def with_schedule(self, schedule: dd.Schedule) -> dd.Process:
        made = Fixed()
        made.schedule = schedule
        return made


def test_what_cannot_be_checked_is_not_passed(as_user: None) -> None:
    """A prior at alpha(1) > 0 is no law of the kernel, and this process comes in one size."""
    report = T.check_process(Fixed())
    assert report.ok, str(report)
    assert set(report.unchecked) == {"prior: where the kernel ends", "another vocabulary and clock"}
    assert not any(check.ok or check.failed for check in report.checks if check.name in report.unchecked)
    assert report.summary.endswith("0 do not hold, 2 not checked")


def test_a_users_own_process_samples() -> None:
    """Nothing but its transition matrix was written, and the exact sampler of one site has the data's law."""
    world = T.Enumeration(torch.tensor([0.6, 0.1, 0.3]), vocab_size=3, length=1)
    process = Cyclic(3, dd.Linear())
    law = T.law(dd.Sampler(process, world.denoiser(process), dd.samplers.Ancestral(), steps=3))
    torch.testing.assert_close(law, world.p0, atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", [WrongNoise, BiasedDraws, Crashes, WrongWeight])
def test_only_what_is_wrong_is_named(kind: type[dd.Process], as_user: None) -> None:
    report = T.check_process(kind(3, dd.Linear()))
    assert report.failed
    innocent = {"kernel: rows are laws", "kernel: nothing happens in no time", "generator: rates are rates"}
    assert not innocent & set(report.failed)
    with pytest.raises(AssertionError, match="FAIL"):
        T.check_process(kind(3, dd.Linear()), strict=True)


def test_a_report_says_where(as_user: None) -> None:
    text = str(T.check_process(NotNormalised(3, dd.Linear())))
    assert "FAIL kernel: rows are laws: 0.001 (allowed 1e-12), a row does not sum to 1 at alpha = " in text
    assert "RuntimeError: not written yet" in str(T.check_process(Crashes(3, dd.Linear())))
    assert "alpha(" in str(T.check_process(dd.Uniform(3, NotMonotone())))
