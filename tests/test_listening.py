"""Who listens: a run is deaf to Pyro's handlers unless it was asked to listen, and one listens at a time."""

import threading
from collections.abc import Callable

import pytest
import torch
from problems import weak
from pyro import poutine

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.handlers import listening

UNIFORM = dd.Uniform(3, dd.Linear())
MODEL = weak().denoiser(UNIFORM, predicts="loo")
SAMPLER = dd.Sampler(UNIFORM, MODEL, S.Ancestral(), steps=3)


def sites(fn: Callable[[], object]) -> list[str]:
    """The names of the sites that Pyro hears."""
    trace = poutine.trace(fn).get_trace()
    return [name for name, site in trace.nodes.items() if site["type"] == "sample"]


def in_thread(fn: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """A started thread, and what becomes of its function: the value or the error."""
    ended: list[object] = []

    def caught() -> None:
        try:
            ended.append(fn())
        except BaseException as error:  # the test looks at it
            ended.append(error)

    thread = threading.Thread(target=caught)
    thread.start()
    return thread, ended


def test_a_run_is_deaf_unless_it_listens() -> None:
    plain = SAMPLER.sample(4, seed=0).tokens
    assert sites(lambda: SAMPLER.sample(4, seed=0)) == []
    heard = poutine.trace(lambda: SAMPLER.sample(4, seed=0, listen=True).tokens).get_trace()
    assert torch.equal(heard.nodes["_RETURN"]["value"], plain)
    assert len(heard.nodes) == 2 + 1 + 3 * 5  # input and return, the prior, five choices a step
    with poutine.replay(trace=heard):
        assert torch.equal(SAMPLER.sample(4, seed=1, listen=True).tokens, plain)
        assert torch.equal(SAMPLER.sample(4, seed=1).tokens, SAMPLER.sample(4, seed=1).tokens)
        assert not torch.equal(SAMPLER.sample(4, seed=1).tokens, plain)


def test_no_kernel_stands_in_for_choices_that_are_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from discdiff.kernels import dispatch

    monkeypatch.setattr(dispatch, "fuses", lambda device: True)
    monkeypatch.setattr(dispatch, "step", lambda *args: pytest.fail("a kernel made choices that nobody heard"))
    SAMPLER.sample(4, seed=0, listen=True)
    with pytest.raises(pytest.fail.Exception):
        SAMPLER.sample(4, seed=0)


@pytest.mark.parametrize(
    "second",
    [
        lambda: SAMPLER.sample(2, seed=0, listen=True),
        lambda: dd.Blockwise(UNIFORM, MODEL, S.Ancestral(), block=3, steps=2).sample(2, 3, listen=True),
        lambda: T.kernel(S.Gibbs(), UNIFORM, MODEL, t=0.5),
    ],
    ids=["sample", "Blockwise", "kernel"],
)
def test_one_listens_at_a_time(second: Callable[[], object]) -> None:
    with listening():
        with pytest.raises(RuntimeError, match="inside another one of the same thread"):
            second()
        SAMPLER.sample(2, seed=0)
        thread, ended = in_thread(second)
        thread.join(0.2)
        assert thread.is_alive()
        assert ended == []
    thread.join(30)
    assert not thread.is_alive()
    assert not isinstance(ended[0], BaseException), ended[0]
    second()


def test_a_run_that_fails_lets_the_next_one_listen() -> None:
    with pytest.raises(ValueError, match="batch"):
        SAMPLER.sample(0, listen=True)
    SAMPLER.sample(1, listen=True)


def test_a_denoiser_that_listens_inside_a_listening_run_is_told() -> None:
    inner = dd.Denoiser(lambda x, t: SAMPLER.sample(1, listen=True) and torch.zeros(*x.shape, 3), UNIFORM, "loo")
    with pytest.raises(RuntimeError, match="inside another one"):
        dd.Sampler(UNIFORM, inner, S.Ancestral(), steps=1).sample(2, 3, listen=True)
    dd.Sampler(UNIFORM, inner, S.Ancestral(), steps=1).sample(2, 3)


def test_threads_do_not_hear_each_other() -> None:
    """One thread replays and enumerates while another samples: every token is what it is alone."""
    alone = [SAMPLER.sample(4, seed=seed).tokens for seed in range(4)]
    kernel = T.kernel(S.Gibbs(), UNIFORM, MODEL, t=0.5)
    trace = poutine.trace(lambda: SAMPLER.sample(4, seed=9, listen=True)).get_trace()

    def listener() -> bool:
        for _ in range(10):
            poutine.replay(lambda: SAMPLER.sample(4, seed=9, listen=True), trace=trace)()
            if not torch.equal(T.kernel(S.Gibbs(), UNIFORM, MODEL, t=0.5), kernel):
                return False
        return True

    thread, ended = in_thread(listener)
    runs = 0
    while thread.is_alive() or runs == 0:
        assert torch.equal(SAMPLER.sample(4, seed=runs % 4).tokens, alone[runs % 4])
        runs += 1
    assert ended == [True]
