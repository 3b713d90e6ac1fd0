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
from discdiff.operator import listening

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
    monkeypatch.setattr(dispatch, "steps_whole", lambda device: True)
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


def test_threads_that_put_up_handlers_alone_hear_themselves() -> None:
    """Two threads trace at once, and a third enumerates: each trace has its own run's sites and no other."""
    expected = {seed: SAMPLER.sample(4, seed=seed).tokens for seed in (1, 2)}

    def traced(seed: int) -> bool:
        for _ in range(10):
            with dd.alone():
                trace = poutine.trace(lambda: SAMPLER.sample(4, seed=seed, listen=True).tokens).get_trace()
            if len(trace.nodes) != 18 or not torch.equal(trace.nodes["_RETURN"]["value"], expected[seed]):
                return False
        return True

    jobs = [in_thread(job) for job in (lambda: traced(1), lambda: traced(2))]
    for _ in range(5):
        T.kernel(S.Gibbs(), UNIFORM, MODEL, t=0.5)
    for thread, ended in jobs:
        thread.join(30)
        assert ended == [True]


# --- names ----------------------------------------------------------------------------------------------------------

MASKED = dd.Masked(3, dd.Linear())


def cascade(first: dd.Sampler | dd.Blockwise) -> dd.Cascade:
    table = torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(0))
    model = dd.Denoiser(lambda x, time, y: table[x, y], UNIFORM, "loo")
    return dd.Cascade(first, dd.Sampler(UNIFORM, model, S.Ancestral() >> S.Gibbs() ** 2, steps=2))


def blockwise(process: dd.Process, block: int | list[int] | dict[int, float]) -> dd.Blockwise:
    return dd.Blockwise(process, weak().denoiser(process), S.Ancestral(), block=block, steps=2)


def generated(seed: int, listen: bool) -> torch.Tensor:
    """Prompts of three lengths, one of them twice, in blocks."""
    table = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    model = dd.Denoiser(lambda x, t: table[x], MASKED, "denoiser")
    prompts = torch.tensor([[0, 1, 2], [1, 1, 2], [0, 0, 1], [2, 0, 1], [0, 1, 2]])
    given = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 0, 1], [0, 1, 1], [1, 1, 1]])
    return dd.generate(
        model, prompts, given, max_new_tokens=5, block_length=2, steps=2, eos_token_id=0, seed=seed, listen=listen
    )


PROGRAMS = {
    "correctors": dd.Sampler(
        UNIFORM, MODEL, S.Ancestral() >> S.Gibbs() ** 2 >> S.ForwardBackward(0.6), grid=[1.0, 0.5, 0.1]
    ),
    "mix": dd.Sampler(UNIFORM, MODEL, S.Ancestral() >> dd.mix({S.Gibbs(): 0.5, S.Gibbs(2): 0.5}), steps=3),
    "two stages": dd.Sampler(UNIFORM, MODEL, S.ThetaTrapezoidal(0.5), steps=3),
    "jumps": dd.Sampler(UNIFORM, MODEL, S.Uniformization(), grid=[1.0, 0.5, 0.1]),
    "hitting": dd.Sampler(MASKED, weak().denoiser(MASKED), S.FirstHitting(), steps=2),
    "blocks": blockwise(UNIFORM, 2),
    "blocks of two sizes": blockwise(MASKED, {1: 0.5, 2: 0.5}),
    "first a sampler": cascade(SAMPLER),
    "first blocks": cascade(blockwise(UNIFORM, [2, 1])),
    "generate": generated,
}


def tokens(program: object, seed: int, listen: bool = True) -> list[torch.Tensor]:
    """What a program makes of six rows."""
    match program:
        case dd.Sampler():
            return [program.sample(6, 3, seed=seed, listen=listen).tokens]
        case dd.Blockwise():
            more = {"stop": 1, "prompt": [[], [], [2], [2, 0], [2], []]}
            return [program.sample(6, 3, seed=seed, listen=listen, **more).tokens]
        case dd.Cascade():
            return [stage.tokens for stage in program.sample(6, (3, 3), seed=seed, listen=listen)]
    return [program(seed, listen)]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_trace_has_every_choice_once_and_replays(name: str) -> None:
    program = PROGRAMS[name]
    trace = poutine.trace(lambda: tokens(program, 5)).get_trace()
    heard = trace.nodes["_RETURN"]["value"]
    names = [name for name, site in trace.nodes.items() if site["type"] == "sample"]
    assert len(names) == len(set(names)) > 3
    with poutine.replay(trace=trace):
        again, other = tokens(program, 6), tokens(program, 6, listen=False)
    for listened, deaf, replayed in zip(heard, tokens(program, 5, listen=False), again, strict=True):
        assert torch.equal(listened, deaf), "listening changed the tokens"
        assert torch.equal(replayed, deaf)
    assert not all(torch.equal(a, b) for a, b in zip(other, again, strict=True)), "another seed gives the same: no test"


def test_names_say_where_they_are() -> None:
    assert sites(lambda: tokens(PROGRAMS["blocks"], 5))[:2] == ["0.0.future", "b0/0.0.prior"]
    names = set(sites(lambda: tokens(PROGRAMS["first blocks"], 5)))
    assert {"first/b0/0.0.prior", "first/b1/1.0.token", "second/0.0.prior", "second/2.1.where"} <= names
    assert {name.split("/")[0] for name in sites(lambda: generated(5, True))} == {"row0", "row2", "row3", "row4"}


@pytest.mark.parametrize("listen", [1, "no", None])
def test_listen_is_true_or_false(listen: object, as_user: None) -> None:
    process = dd.Uniform(3, dd.Linear())
    model = dd.Denoiser(lambda x, t: torch.zeros(*x.shape, 3), process, "loo")
    with pytest.raises(TypeError, match="listen must be True or False"):
        dd.Sampler(process, model, S.Ancestral(), steps=2).sample(2, 3, seed=0, listen=listen)  # type: ignore[arg-type]
