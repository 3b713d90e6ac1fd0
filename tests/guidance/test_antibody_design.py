"""Third loops of antibodies: their conditions in three independent ways, the methods, and what the page says."""

import csv
import itertools
import random
import re
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from places import ROOT
from scipy import stats

import discdiff as dd

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "steering"))


@pytest.fixture
def rules(here: None) -> ModuleType:
    """docs/steering/loop_rules.py."""
    import loop_rules

    return loop_rules


@pytest.fixture
def methods(here: None) -> ModuleType:
    """docs/steering/loop_methods.py."""
    import loop_methods

    return loop_methods


@pytest.fixture
def third(here: None) -> ModuleType:
    """docs/steering/third_loops.py."""
    import third_loops

    return third_loops


@pytest.fixture
def borders(rules: ModuleType) -> list[object]:
    """Frameworks in which a motif may begin before the loop or end behind it, after a real one."""
    ends = ["YN", "NG", "NP", "NN", "YC"], ["WG", "SG", "PS", "AT"]
    made = [rules.Framework("made", before, "", after) for before, after in itertools.product(*ends)]
    return [rules.frameworks()[0], *made]


def loops(count: int, seed: int, letters: str = RESIDUES) -> list[str]:
    """Random loops of 8 to 16 residues."""
    draw = random.Random(seed)
    return ["".join(draw.choices(letters, k=draw.randint(8, 16))) for _ in range(count)]


def ids(rules: ModuleType, loop: str) -> torch.Tensor:
    return torch.tensor([rules.tokens(loop)])


# --- conditions -------------------------------------------------------------------------------------------------------


def test_charge_and_hydropathy_of_loops_that_were_counted_by_hand(rules: ModuleType) -> None:
    assert [rules.charge(loop) for loop in ("ARDYYGSSYFDY", "AKKRHHHE", "AAAAAAAA")] == [-1, 2, 0]
    assert rules.hydropathy("ARDYYGSSYFDY") == pytest.approx(-14.1 / 12)
    assert rules.hydropathy("IIIIVVVV") == pytest.approx(4.35)
    # a published mean over the twenty residues: -0.49
    assert rules.hydropathy(RESIDUES) == pytest.approx(-0.49, abs=0.005)


def test_the_automaton_accepts_what_meets_the_conditions(rules: ModuleType, borders: list[object]) -> None:
    """All loops of 2 and 3 residues, some of which make motifs with the residues around them; and longer ones."""
    for framework in borders[:1] + borders[1::3]:
        for length in (2, 3):
            short = ["".join(loop) for loop in itertools.product("ACDKNPSTY", repeat=length)]
            x = torch.tensor([rules.tokens(loop) for loop in short])
            assert framework.constraint.accepts(x).tolist() == [framework.meets(loop) for loop in short]
    found = set()
    for loop in loops(400, 0) + loops(400, 1, "AGNNSTPYKD"):
        for framework in borders[::5]:
            meets = framework.meets(loop)
            found.add((meets, bool(framework.motifs(loop))))
            assert bool(framework.constraint.accepts(ids(rules, loop))) == meets, (framework, loop)
    assert found == {(True, False), (False, False), (False, True)}


def test_an_automaton_of_the_loop_alone_is_caught(rules: ModuleType, borders: list[object]) -> None:
    """The planted fault: motifs across the borders are not seen."""
    wrong = next(one for one in borders if one.before == "YN")
    blind = replace(wrong, before="YC").constraint
    missed = [loop for loop in loops(400, 2, "AGSTY") if bool(blind.accepts(ids(rules, loop))) != wrong.meets(loop)]
    assert missed
    assert all(re.match("[^P][ST]", loop) for loop in missed)
    assert all(bool(wrong.constraint.accepts(ids(rules, loop))) == wrong.meets(loop) for loop in missed)


def test_the_window_counts_charges(rules: ModuleType) -> None:
    for lowest, highest in ((0, 1), (-2, -2), (3, 16)):
        window = rules.window(lowest, highest)
        for loop in loops(100, 3) + loops(100, 4, "KRDEA") + ["K" * 16, "D" * 16]:
            assert bool(window.accepts(ids(rules, loop))) == (lowest <= rules.charge(loop) <= highest), loop


def test_the_reward_of_tokens_is_that_of_texts(rules: ModuleType, borders: list[object]) -> None:
    eye = torch.eye(25, dtype=torch.float64)
    for loop in loops(100, 5) + loops(100, 6, "NNSTPACDK"):
        for framework in borders[::4]:
            x, right = ids(rules, loop), framework.reward(loop)
            assert float(framework.log_weight(x)) * rules.TAU == pytest.approx(right, abs=1e-12)
            assert float(framework.of_embedded(eye[x])) * rules.TAU == pytest.approx(right, abs=1e-12)
            chosen = right - (0 if framework.meets(loop) else 100)
            assert float(framework.choice(x)) == pytest.approx(chosen, abs=1e-9)
            if framework.meets(loop):
                assert right == pytest.approx(-rules.hydropathy(loop), abs=1e-12)


def test_special_tokens_have_no_weight_and_a_mask_is_a_mean(rules: ModuleType) -> None:
    framework = rules.frameworks()[0]
    x = ids(rules, "ARDYYGSSYFDY")
    for special in (0, 1, 2, 3):
        other = x.clone()
        other[0, 3] = special
        assert float(framework.log_weight(other)) == -torch.inf
    own = "".join(one.natural for one in rules.natural())
    hidden = torch.full_like(x, 4)
    mean = -sum(rules.HYDROPATHY[residue] for residue in own) / len(own)
    shares = [sum(residue in some for residue in own) / len(own) for some in ("KR", "DE", "N", "P", "ST", "C")]
    charge = 12 * (shares[0] - shares[1])
    assert abs(charge) < 1
    motifs = 10 * shares[2] * (1 - shares[3]) * shares[4]  # no border of this framework can be part of one
    right = mean - motifs - max(0.0, -charge) - 12 * shares[5]
    assert float(framework.log_weight(hidden)) * rules.TAU == pytest.approx(right, abs=1e-12)


def test_the_gradient_is_that_of_swaps_where_the_window_is_not_left(rules: ModuleType) -> None:
    """The reward is linear in each site, so that the gradient at a text gives the rewards of its neighbours."""
    framework = rules.frameworks()[0]
    x = ids(rules, "ARKNYYSTGFDY")
    e = torch.eye(25, dtype=torch.float64)[x].requires_grad_()
    value = framework.of_embedded(e)
    (slope,) = torch.autograd.grad(value.sum(), e)
    tried = 0
    for site, residue in itertools.product(range(12), RESIDUES):
        text = rules.letters(x[0].tolist())
        swapped = text[:site] + residue + text[site + 1 :]
        if rules.charge(swapped) == rules.charge(text):
            gap = float(slope[0, site, rules.tokens(residue)[0]] - slope[0, site, x[0, site]])
            right = (framework.reward(swapped) - framework.reward(text)) / rules.TAU
            assert gap == pytest.approx(right, abs=1e-9)
            tried += 1
    assert tried == 150


def test_frameworks_are_the_first_of_their_kind(rules: ModuleType) -> None:
    with rules.DATA.open() as file:
        rows = [row for row in csv.DictReader(file) if row["source"].startswith("PDB")]
    whole = {row["source"][4:]: row["sequence"] for row in rows}
    assert all(one.before + one.natural + one.after == whole[one.name] for one in rules.natural())
    assert all(one.before[-1] == "C" and re.match("WG.G", one.after) for one in rules.natural())
    heavy = [row["source"][4:] for row in rows if row["source"].endswith("H")]
    assert [one.name for one in rules.frameworks()] == heavy[:3]


# --- methods ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def toy(methods: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dd.Denoiser:
    """A network of the right shape whose residues depend on their neighbours, in place of the trained one."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(2, 25, 25, generator=generator, dtype=torch.float64)
    table[..., :5] = -torch.inf  # special tokens

    def logits(x: torch.Tensor, t: object) -> torch.Tensor:
        return table[0][x.roll(1, 1)] + table[1][x.roll(-1, 1)]

    made = dd.Denoiser(logits, dd.Masked(25, dd.Linear(), mask_id=4), "denoiser")
    monkeypatch.setattr(methods, "network", lambda: made)
    return made


def check(methods: ModuleType, task: object, designs: list[object]) -> None:
    """What holds of the designs of a task whatever the network is."""
    framework, length = task.framework, task.length
    assert [one.method for one in designs] == list(methods.METHODS)
    most = methods.ROWS * (12 * length * (length + 1) + length + 1)
    for one in designs:
        assert len(one.loop) == length
        assert one.calls == methods.ROWS * length + (one.method == methods.VARIATIONAL)
        assert one.rewards <= most
        if one.method in methods.CONSTRAINED:
            assert framework.meets(one.loop)
            assert one.met == one.rows == methods.ROWS
    rewards = {one.method: one.rewards for one in designs}
    assert rewards[methods.CANDIDATES] == rewards[methods.STEERED] == most
    assert rewards[methods.BEST] == methods.ROWS


@pytest.mark.usefixtures("as_user")
def test_methods_keep_to_the_budget_and_to_the_conditions(
    methods: ModuleType, rules: ModuleType, toy: dd.Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "PROPOSALS", 50)
    tasks = [methods.Task(rules.frameworks()[1], 8, seed) for seed in (0, 1)]
    designs = methods.designed(tasks)
    assert [one.seed for one in designs] == [0] * len(methods.METHODS) + [1] * len(methods.METHODS)
    for task in tasks:
        mine = [one for one in designs if one.seed == task.seed]
        check(methods, task, mine)
        found = {one.method: task.framework.reward(one.loop) for one in mine}
        assert found[methods.CANDIDATES] >= found[methods.BEST]
        assert found[methods.STEERED_BEST] >= found[methods.STEERED]
    # the random numbers of a task are its own, whatever was designed before it
    assert [*tasks[1].steered()] == [replace(one, natural=0.0) for one in designs[-2:]]


def test_looking_at_candidates_changes_no_row(methods: ModuleType, rules: ModuleType, toy: dd.Denoiser) -> None:
    task = methods.Task(rules.frameworks()[0], 9, 1)
    best, candidate = task.unguided()
    plain = task.sampler().sample(methods.ROWS, 9, seed=task.key)
    values = task.framework.choice(plain.tokens)
    assert best.loop == rules.letters(plain.tokens[values.argmax()].tolist())
    assert best.met == int(task.framework.constraint.accepts(plain.tokens).sum())
    assert best.calls == candidate.calls == 72


def test_no_two_tasks_share_random_numbers(methods: ModuleType, third: ModuleType, rules: ModuleType) -> None:
    keys = [
        methods.Task(one, n, seed).key + more
        for one in rules.frameworks() for seed in range(third.SEEDS) for n in rules.LENGTHS for more in (0, 50)
    ]  # fmt: skip
    assert len(set(keys)) == len(keys) == 2 * 135


def test_naturalness_is_a_mean_over_single_masks(methods: ModuleType, rules: ModuleType, toy: dd.Denoiser) -> None:
    """By hand, one site after another, on whole domains."""
    framework, some = rules.frameworks()[2], ["ARPTGRLWFSY", "ARNNNKLWFDY"]
    for loop, value in zip(some, methods.naturalness(framework, some), strict=True):
        whole, first, total = rules.tokens(framework.before + loop + framework.after), len(framework.before), 0.0
        for site in range(first, first + len(loop)):
            x = torch.tensor([whole])
            x[0, site] = 4
            total += float(toy.fn(x, None)[0, site].log_softmax(-1)[whole[site]])
        assert value == pytest.approx(total / len(loop), abs=1e-9)


# --- figures ----------------------------------------------------------------------------------------------------------


def test_differences_are_paired(third: ModuleType) -> None:
    one, other = [1.0, 2.5, 3.0, 4.5], [0.5, 1.5, 3.0, 3.0]
    gaps = np.subtract(one, other)
    half = stats.t.ppf(0.975, 3) * gaps.std(ddof=1) / 2
    assert third.difference(one, other, 4) == f"+0.7500 ({0.75 - half:+.4f} to {0.75 + half:+.4f})"
    assert third.difference(one, [0.5, 2.0, 2.5, 4.0]) == "+0.50"
    unpaired = stats.ttest_ind(one, other).confidence_interval(0.95)  # the planted fault: a wider interval
    assert f"{unpaired.low:+.4f}" not in third.difference(one, other, 4)


def test_loops_are_apart_by_the_share_of_sites(third: ModuleType) -> None:
    assert third.apart(["AAAA", "AAAC", "CCAC"]) == pytest.approx((1 / 4 + 3 / 4 + 2 / 4) / 3)


def test_letters_of_the_logo_are_in_bits(third: ModuleType) -> None:
    same = third.heights(["ARDYYGFDYY"] * 4)
    assert same.sum(-1) == pytest.approx(np.log2(20))
    mixed = third.heights(["ARDYYGFDYY", "GRDYYGFDYY"])
    assert mixed[0].sum() == pytest.approx(np.log2(20) - 1)
    assert mixed[1].sum() == pytest.approx(np.log2(20))


# --- the data of the page ---------------------------------------------------------------------------------------------


def test_the_designs_that_are_kept(third: ModuleType, methods: ModuleType, rules: ModuleType) -> None:
    groups = third.by(third.read(), "framework", "length", "seed")
    for one, length, seed in itertools.product(rules.frameworks(), rules.LENGTHS, range(third.SEEDS)):
        designs = [design for design in groups[one.name, length, seed] if design.method != third.OWN]
        check(methods, methods.Task(one, length, seed), designs)
        assert all(design.natural < 0 for design in designs)
    own = third.by(third.read(), "method")[third.OWN,]
    assert [(one.framework, one.loop) for one in own] == [(one.name, one.natural) for one in rules.natural()]
    assert third.FASTA.read_text() == third.fasta(third.read())
    found = re.findall(r">(\S+?) ?\|(\d+)\|(\d)\|(.*)\n(.*)", third.FASTA.read_text())
    assert len(found) == 270
    wholes = {one.name.replace(" ", "_"): one for one in rules.frameworks()}
    for name, length, _, _, domain in found:
        one = wholes[name]
        assert domain.startswith(one.before)
        assert domain.endswith(one.after)
        loop = domain[len(one.before) : -len(one.after)]
        assert len(loop) == int(length)
        assert "C" not in loop
        assert not re.search("N[^P][ST]", domain[len(one.before) - 2 : len(domain) - len(one.after) + 2])


def test_the_page_has_the_tables_of_its_designs(third: ModuleType) -> None:
    page = (ROOT / "docs" / "steering.md").read_text()
    for name, table in third.tables().items():
        (held,) = re.findall(rf"<!-- {name} -->\n(.*?)\n<!-- end -->", page, re.S)
        assert held == table, name


@pytest.mark.slow
def test_the_trained_network_designs_loops(methods: ModuleType, rules: ModuleType) -> None:
    """One loop by each method; the natural loop is more natural than the same residues in another order."""
    import importlib.metadata

    try:
        rules.antiberty()
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the extra antibody")
    task = methods.Task(rules.frameworks()[0], 8, 0)
    check(methods, task, methods.designed([task]))
    framework = rules.frameworks()[0]
    own, turned = methods.naturalness(framework, [framework.natural, framework.natural[::-1]])
    assert own > turned + 1
