"""Real runs on digits and text: stored results obey what was asked and give the tables; tiny runs are made again."""

import itertools
import json
import math
import re
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from places import ROOT
from scipy.stats import norm, ttest_rel

import discdiff as dd

STEERING = ROOT / "docs" / "steering"
Row = dict[str, Any]
Answers = dict[str, dict[str, list[Row]]]


@pytest.fixture
def text(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(STEERING))
    import text as module

    return module


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "parameterisations"))
    monkeypatch.syspath_prepend(str(STEERING))
    import digits as module

    return module


@pytest.fixture
def texts() -> Row:
    return json.loads((STEERING / "text.json").read_text())


@pytest.fixture
def answers() -> Answers:
    return json.loads((STEERING / "digits.json").read_text())


def cells(table: str, row: str) -> list[str]:
    """The cells of the row of a table with a given first cell."""
    lines = [line.strip("| \n").split(" | ") for line in table.splitlines()]
    return next(line[1:] for line in lines if line[0] == row)


# --- text -------------------------------------------------------------------------------------------------------------


def test_every_constrained_text_matches(text: ModuleType, texts: Row) -> None:
    count = 0
    for name, pattern in text.PATTERNS.items():
        found = [t for row in texts["constrained"][name] for kind in KINDS for t in row[kind]["texts"]]
        assert all(len(t) == text.LENGTH and re.fullmatch(pattern, t) for t in found)
        count += len(found)
        free = [t for row in texts["unguided"] for t in row["texts"]]
        assert not all(re.fullmatch(pattern, t) for t in free)  # a text without the constraint need not match
    assert count == 4 * text.SEEDS * text.GROUPS * (text.GROUP + 2)
    table = text.tables()["text_accepted"]
    assert all(cells(table, name)[-2] == f"0 of {count // 4}" for name in text.PATTERNS)


KINDS = ("alone", "weights", "particles")


def test_brackets_are_those_of_a_stack(text: ModuleType) -> None:
    """At depths 1 and 2, for all texts of up to six characters."""
    for depth in (1, 2):
        found = re.compile(text.brackets(depth))
        for length in range(7):
            for letters in itertools.product("()[]a", repeat=length):
                assert bool(found.fullmatch("".join(letters))) == balanced("".join(letters), depth)


def balanced(letters: str, depth: int) -> bool:
    """Whether all brackets match, there is one, and at most ``depth`` are open at a time."""
    stack, deepest = [], 0
    for letter in letters:
        if letter in "([":
            stack.append(letter)
        elif letter in ")]" and (not stack or stack.pop() + letter not in ("()", "[]")):
            return False
        deepest = max(deepest, len(stack))
    return not stack and 0 < deepest <= depth


@pytest.mark.parametrize("kind", ["weights", "particles"])
def test_evidence_is_the_share_of_accepted_texts(text: ModuleType, texts: Row, kind: str, failure_rate: float) -> None:
    """Both estimate the probability that the sampler without a constraint makes a text with balanced brackets."""
    name = "balanced brackets"
    count = sum(row["rows"] for row in texts["unguided"])
    right = sum(len(row["accepted"][name]) for row in texts["unguided"]) / count
    evidence = np.exp([z for row in texts["constrained"][name] for z in row[kind]["log evidence"]])
    error = math.hypot(evidence.std(ddof=1) / len(evidence) ** 0.5, math.sqrt(right * (1 - right) / count))

    def pvalue(share: float) -> float:
        return float(2 * norm.sf(abs(evidence.mean() - share) / error))

    assert pvalue(right) > failure_rate
    assert pvalue(2 * right) < failure_rate  # planted: twice the share
    assert text.share(np.log(evidence).tolist())[0] == pytest.approx(evidence.mean())


def test_the_potential_is_the_probability_of_acceptance(text: ModuleType) -> None:
    """Of independent hidden characters, enumerated; at time 0 whether the text is accepted."""
    letters = ["a", "b", "("]
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
    process = dd.Masked(3, dd.Linear())
    model = dd.Denoiser(lambda x, t: logits.expand(len(x), -1, -1), process, "denoiser", length=4)
    constraint = dd.Constraint.regex(r"a[^(]*\(?", letters)
    ahead = text.Ahead(constraint, model)
    z = torch.tensor([[3, 1, 3, 3], [0, 3, 3, 2], [1, 3, 3, 3]])
    clean = torch.cartesian_prod(*[torch.arange(3)] * 4)
    log_p = logits.log_softmax(-1)
    for row, found in zip(z, ahead(z, 0.5), strict=True):
        hidden = row == 3
        fits = (clean[:, ~hidden] == row[~hidden]).all(-1) & constraint.accepts(clean)
        each = log_p[torch.arange(4), clean][fits][:, hidden].sum(-1).exp()
        assert float(found.exp()) == pytest.approx(float(each.sum()), abs=1e-12)
    assert torch.equal(ahead(clean, 0.0).exp() == 1, constraint.accepts(clean))


def test_tables_of_texts_are_the_stored_figures(text: ModuleType, texts: Row) -> None:
    tables = text.tables()
    for name in text.PATTERNS:
        rows = texts["constrained"][name]
        right = sum(len(row["accepted"][name]) for row in texts["unguided"])
        assert cells(tables["text_accepted"], name)[0].startswith(f"{right} of {text.SEEDS * text.ROWS}:")
        mean = np.mean([np.mean(row["alone"]["bits"]) for row in rows])
        assert cells(tables["text_bits"], name)[2].startswith(f"{mean:.2f} ±")
        for sample in rows[0]["particles"]["texts"][: text.SHOWN]:
            assert text.code(sample) in tables["text_samples"]
    assert text.code("a|b<&`") == "<code>a&#124;b&lt;&amp;&#96;</code>"
    assert text.interval([1.0, 2.0, 3.0]) == "2.00 ± 2.48"


@pytest.mark.slow
def test_a_part_of_the_texts_is_made_again(text: ModuleType, texts: Row) -> None:
    """Texts depend on the seed and their row alone, so that one group gives the first of the stored ones."""
    made, stored = text.constrained("a keyword", 1, groups=1), texts["constrained"]["a keyword"][1]
    same = [a == b for a, b in zip(made["alone"]["texts"], stored["alone"]["texts"], strict=False)]
    assert np.mean(same) > 0.7  # another machine rounds the network's sums in another way
    free, before = text.unguided(1, rows=text.SHOWN), texts["unguided"][1]
    assert np.mean([a == b for a, b in zip(free["texts"], before["texts"], strict=True)]) > 0.6


# --- digits -----------------------------------------------------------------------------------------------------------


def images(digits: ModuleType, rows: list[Row]) -> torch.Tensor:
    return torch.stack([torch.stack([digits.D.image_of(one) for one in row["images"]]) for row in rows])


def test_stored_measures_are_those_of_the_stored_images(digits: ModuleType, answers: Answers) -> None:
    truths, _ = digits.D.truths()
    assert list(answers) == list(digits.D.PROBLEMS)
    for name, found in answers.items():
        problem = digits.D.PROBLEMS[name]()
        assert list(found) == list(digits.methods(name))
        for rows in found.values():
            assert len(rows) == digits.SEEDS
            for row, x in zip(rows, images(digits, rows), strict=True):
                distance = (x - truths)[:, problem.scored].double().square().mean(-1).sqrt()
                torch.testing.assert_close(problem.errors(x), torch.tensor(row["error"]).double(), atol=1e-4, rtol=0)
                torch.testing.assert_close(distance, torch.tensor(row["distance"]).double(), atol=1e-4, rtol=0)
                assert [digits.D.text_of(one) for one in x] == row["images"]


def test_hard_conditions_hold_in_every_answer(digits: ModuleType, answers: Answers) -> None:
    truths, _ = digits.D.truths()
    for name, kind in (("inpainting", "frozen pixels"), ("inpainting", "Constraint"), ("inpainting", PARTICLES)):
        assert bool((images(digits, answers[name][kind])[..., :32] == truths[:, :32]).all())
    goal = digits.D.remainders(truths)
    for kind in ("Constraint", PARTICLES):
        found = images(digits, answers["row sums modulo 3"][kind])
        assert bool((digits.D.remainders(found) == goal).all())
        assert int((found != truths).any(-1).sum()) == found.shape[0] * found.shape[1]
    best = f"best of {digits.GROUP}"
    assert not bool((digits.D.remainders(images(digits, answers["row sums modulo 3"][best])) == goal).all())
    assert not bool((images(digits, answers["inpainting"][best])[..., :32] == truths[:, :32]).all())


PARTICLES = "Constraint, particles"


def test_intervals_are_those_of_paired_seeds(digits: ModuleType, answers: Answers) -> None:
    tables = digits.tables()
    for name, found in answers.items():
        for method, rows in found.items():
            means = [float(np.mean(row["distance"])) for row in rows]
            assert cells(tables[digits.NAMES[name]], method)[4] == f"{np.mean(means):.2f}"
            other = f"uniform: best of {digits.GROUP}" if method.startswith("uniform") else f"best of {digits.GROUP}"
            if method == other:
                continue
            test = ttest_rel(means, [float(np.mean(row["distance"])) for row in found[other]])
            low, high = test.confidence_interval(0.95)
            said = cells(tables[f"{digits.NAMES[name]}_differences"], method)[1]
            assert said == f"{(low + high) / 2:+.2f} ± {(high - low) / 2:.2f}"


def test_no_method_without_a_star_takes_more(digits: ModuleType, answers: Answers) -> None:
    for found in answers.values():
        for method, rows in found.items():
            cost = max(row["calls"] for row in rows), max(row["likelihoods"] for row in rows)
            within = cost[0] <= digits.GROUP * digits.STEPS and cost[1] <= digits.POOL
            assert within != method.endswith("*"), (method, cost)


def test_potentials_are_those_of_independent_pixels(digits: ModuleType) -> None:
    """At time 0 the likelihood; before, for two hidden pixels, the sum over their grey levels."""
    truths, _ = digits.D.truths()
    problems = {name: make() for name, make in digits.D.PROBLEMS.items()}
    for problem in problems.values():
        known = torch.cat([psi(x[None], 0.0) for psi, x in zip(problem.potentials, truths, strict=True)])
        torch.testing.assert_close(known, problem.log_likelihood(truths[:, None])[:, 0], atol=1e-9, rtol=0)
    z, law = truths[3].clone(), digits.D.frequencies()
    z[[17, 20]] = 17
    levels = torch.cartesian_prod(torch.arange(17), torch.arange(17))
    x = z.repeat(len(levels), 1)
    x[:, [17, 20]] = levels
    p = law[17][levels[:, 0]] * law[20][levels[:, 1]]
    problem = problems["row sums modulo 3"]
    exact = (p * problem.measurements[3](x).exp()).sum().log()
    assert float(problem.potentials[3](z[None], 0.5)) == pytest.approx(float(exact), abs=1e-9)
    matrix = problems["super-resolution"].measurements[3].forward
    mean = (p[:, None] * (x.double() @ matrix.T)).sum(0)
    variance = (p[:, None] * (x.double() @ matrix.T - mean) ** 2).sum(0) + 0.25
    y = problems["super-resolution"].measurements[3].noise.y
    normal = torch.distributions.Normal(mean, variance.sqrt()).log_prob(y).sum()
    assert float(problems["super-resolution"].potentials[3](z[None], 0.5)) == pytest.approx(float(normal), abs=1e-9)


def test_constraints_are_the_measurements_without_noise(digits: ModuleType) -> None:
    truths, _ = digits.D.truths()
    x = torch.randint(17, (4000, 64), generator=torch.Generator().manual_seed(0))
    x[:, :32] = torch.where(torch.arange(4000)[:, None] < 50, truths[2, :32], x[:, :32])
    y = digits.D.remainders(x[7])
    x[2000:] = x[7]  # with two pixels of a row exchanged or changed
    x[2000:3000, 9], x[2000:3000, 12] = x[7, 12], x[7, 9]
    x[3000:, 9] = (x[7, 9] + 1 + torch.arange(1000) % 2) % 17
    wrong = digits.D.remainders(x).ne(y).any(-1)
    assert torch.equal(digits.D.same_remainders(y).accepts(x), ~wrong)
    assert 0 < int(wrong.sum()) < 3000
    assert digits.D.same_pixels(truths[2]).accepts(x).sum() == 50


def test_a_remainder_is_read_rightly_with_its_probability(digits: ModuleType) -> None:
    sums = torch.arange(3)
    angles = (2 * math.pi / 3 * sums.double())[:, None]
    read = torch.stack([digits.D.Phases(torch.tensor([y]))(angles) for y in range(3)]).exp()
    torch.testing.assert_close(read.sum(0), torch.ones(3).double())
    torch.testing.assert_close(read.diag(), torch.full((3,), digits.D.RIGHT).double())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["frozen pixels", "best of 8", "swap, particles", "uniform: SplitGibbs"])
def test_a_part_of_the_images_is_made_again(digits: ModuleType, answers: Answers, method: str) -> None:
    made, stored = digits.run(("inpainting", method, 1)), answers["inpainting"][method][1]
    same = [a == b for a, b in zip(made["images"], stored["images"], strict=True)]
    assert np.mean(same) > 0.5  # another machine rounds the network's sums in another way
    assert (made["calls"], made["likelihoods"]) == pytest.approx((stored["calls"], stored["likelihoods"]), rel=0.05)
