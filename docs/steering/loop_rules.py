r"""What is asked of a third loop: properties of a text, the same as a function of tokens, and the hard conditions.

Hard: no motif N-[^P]-[ST], which is a site of N-glycosylation, within the loop or across its borders; no cysteine; a
net charge from ``LOWEST`` to ``HIGHEST``. Soft: a small mean of Kyte and Doolittle's hydropathy. The reward is

    r(x) = -mean hydropathy - motifs - cysteines - distance of the charge to its window,    W = exp(r / TAU)

so that methods that know no hard condition are told of it too. Where the hard conditions hold, r is minus the mean
hydropathy.

Reference: Kyte and Doolittle (1982, https://doi.org/10.1016/0022-2836(82)90515-0).
"""

import re
import sys
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor

import discdiff as dd

DOCS = Path(__file__).parents[1]
sys.path.append(str(DOCS))
from antibodies import DATA, FIRST, LETTERS, antiberty, letters, tokens  # noqa: E402

LENGTHS, LOWEST, HIGHEST, TAU = range(8, 17), 0, 1, 0.25
DOMAIN = re.compile(r"(.*C)([^C]+)(WG.G.{3,12})")  # up to C104, the third loop, from W118 on
MOTIF = "N[^P][ST]"
CHARGES = {"K": 1, "R": 1, "D": -1, "E": -1}  # at pH 7.4; histidine, mostly neutral there, and the ends count nothing
HYDROPATHY = {
    "A": 1.8, "R": -4.5, "N": -3.5, "D": -3.5, "C": 2.5, "Q": -3.5, "E": -3.5, "G": -0.4, "H": -3.2, "I": 4.5,
    "L": 3.8, "K": -3.9, "M": 1.9, "F": 2.8, "P": -1.6, "S": -0.8, "T": -0.7, "W": -0.9, "Y": -1.3, "V": 4.2,
}  # fmt: skip
VOCABULARY = [None] * FIRST + list(LETTERS)  # of the network; special tokens are no residues


# --- of texts ---------------------------------------------------------------------------------------------------------


def charge(loop: str) -> int:
    """The net charge: K and R count 1, D and E -1, all others 0."""
    return sum(CHARGES.get(residue, 0) for residue in loop)


def hydropathy(loop: str) -> float:
    """The mean of Kyte and Doolittle's numbers; large is hydrophobic."""
    return sum(HYDROPATHY[residue] for residue in loop) / len(loop)


@dataclass(frozen=True)
class Framework:
    """A domain without its third loop.

    Args:
        name: its name.
        before: the residues up to cysteine 104.
        natural: its own loop.
        after: the residues from tryptophan 118 on.
    """

    name: str
    before: str
    natural: str
    after: str

    def motifs(self, loop: str) -> int:
        """The number of motifs that have a residue in the loop."""
        around = self.before[-2:] + loop + self.after[:2]
        return len(re.findall(f"(?={MOTIF})", around))

    def meets(self, loop: str) -> bool:
        """Whether a loop meets the hard conditions."""
        return not self.motifs(loop) and "C" not in loop and LOWEST <= charge(loop) <= HIGHEST

    def reward(self, loop: str) -> float:
        """The reward r."""
        outside = max(0, LOWEST - charge(loop), charge(loop) - HIGHEST)
        return -hydropathy(loop) - self.motifs(loop) - loop.count("C") - outside

    # --- of tokens ----------------------------------------------------------------------------------------------------

    def measured(self, numbers: Tensor) -> Tensor:
        """Return r (N,) of loops given by the numbers (N, L, 6) of their sites, see ``features``.

        It is linear in the numbers of each site, the window of charges aside. So numbers between those of residues are
        allowed, and there is a gradient.
        """
        edge = [features()[tokens(part)].expand(len(numbers), -1, -1) for part in (self.before[-2:], self.after[:2])]
        hydropathic, charged, cysteine = numbers[..., :3].unbind(-1)
        asparagine, other, hydroxyl = torch.cat([edge[0], numbers, edge[1]], 1)[..., 3:].unbind(-1)
        motifs = (asparagine[:, :-2] * other[:, 1:-1] * hydroxyl[:, 2:]).sum(-1)
        net = charged.sum(-1)
        outside = (LOWEST - net).clamp(min=0) + (net - HIGHEST).clamp(min=0)
        return -hydropathic.mean(-1) - motifs - cysteine.sum(-1) - outside

    def log_weight(self, x: Tensor) -> Tensor:
        """Return log W = r / TAU (N,) of loops x (N, L); -inf for a special token.

        A masked site has the mean numbers of natural loops, so that this is also an estimate at noisy states.
        """
        special = (x < FIRST) & (x != MASK)
        found = self.measured(features()[x]) / TAU
        return found.masked_fill(special.any(-1), -torch.inf)

    def of_embedded(self, e: Tensor) -> Tensor:
        """Return log W (N,) of loops whose sites are mixtures e (N, L, 25) of tokens."""
        return self.measured(e @ features()) / TAU

    def choice(self, x: Tensor) -> Tensor:
        """Return what the best of several loops x (N, L) is chosen by: r, and 100 less without the hard conditions."""
        accepted = self.constraint.accepts(x)
        return TAU * self.log_weight(x) - 100.0 * ~accepted

    @cached_property
    def constraint(self) -> dd.Constraint:
        """The hard conditions as an automaton that reads the loop alone."""
        first, second, third = "N", "[^P]", "[ST]"
        text = "(?s:.*)"
        wrong = [text + first + second + third + text]  # and motifs that begin before the loop or end behind it
        before, after = self.before[-2:], self.after[:2]
        wrong += [third + text] * bool(re.fullmatch(first + second, before))
        wrong += [second + third + text] * bool(re.fullmatch(first, before[1]))
        wrong += [text + first + second] * bool(re.fullmatch(third, after[0]))
        wrong += [text + first] * bool(re.fullmatch(second + third, after))
        found = dd.Constraint.regex("[^C]*", VOCABULARY) & window(LOWEST, HIGHEST)
        for pattern in wrong:
            found = found & ~dd.Constraint.regex(pattern, VOCABULARY)
        return found


MASK = 4


@cache
def features() -> Tensor:
    """The numbers (25, 6) of each token: hydropathy, charge, whether C, whether N, not P, and whether S or T.

    The mask has the mean of the residues of natural loops. Other special tokens have zeros.
    """
    found = torch.zeros(len(VOCABULARY), 6, dtype=torch.float64)
    for place, residue in enumerate(LETTERS, FIRST):
        kinds = [residue == "C", residue == "N", residue != "P", residue in "ST"]
        found[place] = found.new_tensor([HYDROPATHY[residue], CHARGES.get(residue, 0), *kinds])
    found[MASK] = found[tokens("".join(one.natural for one in natural()))].mean(0)
    return found


def window(lowest: int, highest: int) -> dd.Constraint:
    """The constraint that the net charge of at most 16 residues lies in a window: the automaton counts."""
    most = LENGTHS[-1]
    step = torch.tensor([0] * FIRST + [CHARGES.get(residue, 0) for residue in LETTERS])
    net = torch.arange(-most, most + 1)
    moves = (net[:, None] + step).clamp(-most, most) + most
    return dd.Constraint(moves, most, (net >= lowest) & (net <= highest))


# --- data -------------------------------------------------------------------------------------------------------------


@cache
def natural() -> list[Framework]:
    """The heavy chains of docs/antibodies.csv from the PDB whose loop has 8 to 16 residues, in their order there."""
    lines = [line.split(",") for line in DATA.read_text().splitlines()]
    heavy = [(source, found) for source, text in lines if source[:3] == "PDB" and (found := DOMAIN.fullmatch(text))]
    return [Framework(source[4:], *found.groups()) for source, found in heavy if len(found[2]) in LENGTHS]


def frameworks() -> list[Framework]:
    """The first three of them, whose loops are designed."""
    return natural()[:3]


__all__ = [
    "FIRST", "HIGHEST", "LENGTHS", "LETTERS", "LOWEST", "MASK", "TAU", "VOCABULARY", "Framework", "antiberty",
    "charge", "features", "frameworks", "hydropathy", "letters", "natural", "tokens", "window",
]  # fmt: skip
