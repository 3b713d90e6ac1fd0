"""Regular expressions and JSON over tokens of several characters, against ``re`` and ``json``; brackets; errors."""

import json
import re
import sys

import pytest
import torch
from places import ROOT

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.theory.world import all_states

pytestmark = pytest.mark.usefixtures("as_user")
PIECES = ["a", "b", "ab", "ba", "aab", "c", "bc", "", "é", "\n", None, "<pad>"]
PAD = len(PIECES) - 1


def text(tokens: list[int], vocabulary: list[str | None], pad: int | None = None) -> str | None:
    """The text of a sequence; None if it holds a special token, or a pad in front of another token."""
    while pad is not None and tokens and tokens[-1] == pad:
        tokens = tokens[:-1]
    parts = [vocabulary[token] for token in tokens]
    return None if None in parts or pad in tokens else "".join(part for part in parts if part)


def some(vocabulary: int, length: int, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))


def random_pattern(depth: int, generator: torch.Generator) -> str:
    """A regular expression of the characters of the pieces."""

    def pick(*options: str) -> str:
        return options[int(torch.randint(len(options), (1,), generator=generator))]

    if depth == 0:
        return pick("a", "b", "ab", ".", "[ab]", "[^a]", r"\w", "c", "é", "[a-c]")
    one, other = (random_pattern(depth - 1, generator) for _ in range(2))
    return pick(
        f"{one}{other}", f"({one}|{other})", f"({one})*", f"({one})+", f"(?:{one})?", f"({one}){{1,3}}", f"({one}|)",
        f"({one}){{2}}", f"({one})*?{other}",
    )  # fmt: skip


# --- against re ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [None, PAD])
def test_random_expressions_accept_what_re_accepts(pad: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    counts = {True: 0, False: 0}
    vocabulary = PIECES if pad is not None else PIECES[:-1]
    for number in range(60):
        pattern = random_pattern(int(torch.randint(1, 4, (1,), generator=generator)), generator)
        try:
            made = dd.Constraint.regex(pattern, vocabulary, pad=pad)
        except ValueError as error:
            assert "no sequence is accepted" in str(error)
            continue
        for length in (1, 2, 4):
            x = some(len(vocabulary), length, 150, seed=number)
            if pad is not None:
                x[: length * 30] = x[: length * 30].where(torch.arange(length) < length - 1, pad)
            for row, found in zip(x.tolist(), made.accepts(x).tolist(), strict=True):
                said = text(row, vocabulary, pad)
                right = said is not None and re.fullmatch(pattern, said, re.ASCII) is not None
                assert found == right, (pattern, row)
                counts[right] += 1
    assert min(counts.values()) > 1000


def test_a_token_moves_by_all_its_characters() -> None:
    made = dd.Constraint.regex("a(b|c)*", PIECES)
    x = torch.tensor([[0, 1], [2, 6], [3, 5], [4, 1], [0, 7], [2, 10]])
    assert made.accepts(x).tolist() == [True, True, False, False, True, False]
    firsts = dd.Constraint.regex("a(b|c)*", [piece and piece[0] for piece in PIECES])
    assert firsts.accepts(x).tolist() != made.accepts(x).tolist(), "planted: the first character of each token"


def test_equal_languages_are_equal_and_small() -> None:
    assert dd.Constraint.regex("a|b", PIECES) == dd.Constraint.regex("[ab]", PIECES)
    assert dd.Constraint.regex("(a|b)*", PIECES) == dd.Constraint.regex("(a*b*)*", PIECES)
    assert dd.Constraint.regex("(a|b)*", PIECES) != dd.Constraint.regex("(a|b)+", PIECES)
    assert dd.Constraint.regex("((a|b)(a|b))*|(a|b)((a|b)(a|b))*", ["a", "b"]).automaton.states == 1
    assert dd.Constraint.regex("(a|b){30}", ["a", "b"]).automaton.states == 31


def test_no_letter_and_no_motif_are_complements() -> None:
    proteins = list("ACDEFGHIKLMNPQRSTVWY")
    motif = ~dd.Constraint.regex("(?s:.*)N[^P][ST](?s:.*)", proteins)
    x = some(20, 40, 2000)
    right = [re.search("N[^P][ST]", "".join(proteins[v] for v in row)) is None for row in x.tolist()]
    assert motif.accepts(x).tolist() == right
    assert 0 < sum(right) < len(right)
    assert motif.automaton.states == 4
    words = ["the", "a", "cat", "sat", " ", "e", "mat", "és", None]
    assert dd.Constraint.regex("[^e]*", words) == ~dd.Constraint.regex("(?s:.*)e(?s:.*)", words) & dd.Constraint.regex(
        "(?s:.*)", words
    )


def balanced(depth: int, inside: str = "[^()]") -> str:
    """Balanced brackets, at most ``depth`` within each other."""
    pattern = f"{inside}*"
    for _ in range(depth):
        pattern = rf"({inside}|\({pattern}\))*"
    return pattern


def deepest(said: str) -> int | None:
    """The depth of balanced brackets; None if they are not balanced."""
    depth = most = 0
    for letter in said:
        depth += (letter == "(") - (letter == ")")
        most = max(most, depth)
        if depth < 0:
            return None
    return most if depth == 0 else None


def test_balanced_brackets_of_bounded_depth() -> None:
    pieces = ["(", ")", "x", "((", "))", ")(", "(x)"]
    for depth in (1, 2, 3):
        made = dd.Constraint.regex(balanced(depth), pieces)
        assert made.automaton.states == depth + 1
        x = some(len(pieces), 5, 4000, seed=depth)
        right = []
        for row in x.tolist():
            found = deepest("".join(pieces[token] for token in row))
            right.append(found is not None and found <= depth)
        assert made.accepts(x).tolist() == right
        assert sum(right) > 20


# --- samples ---------------------------------------------------------------------------------------------------------


def blind(vocabulary: int, seed: int = 0) -> dd.Denoiser:
    process = dd.Masked(vocabulary, dd.Linear())
    logits = torch.randn(vocabulary + 1, vocabulary, generator=torch.Generator().manual_seed(seed))
    return dd.Denoiser(lambda x, t: logits[x], process, "denoiser")


def test_samples_match_and_may_be_shorter() -> None:
    pattern = r"(a|b){2,4}c?"
    model = blind(len(PIECES)).guided(dd.Constraint.regex(pattern, PIECES, pad=PAD))
    for operator in (S.Ancestral(), S.Unmask("max_prob"), S.P2(0.0), S.ReMDM(0.3)):
        tokens = dd.Sampler(model.process, model, operator, steps=4).sample(200, 8, seed=0).tokens
        said = [text(row, PIECES, PAD) for row in tokens.tolist()]
        assert all(one is not None and re.fullmatch(pattern, one) for one in said)
        assert len({len(one or "") for one in said}) > 2
    law = T.law(dd.Sampler(model.process, model, S.Ancestral(), steps=1), length=2)
    for row, p in zip(all_states(len(PIECES), 2).tolist(), law.tolist(), strict=True):
        said = text(row, PIECES, PAD)
        assert (p > 0) == (said is not None and re.fullmatch(pattern, said) is not None)


LETTERS: list[str | None] = [*'ab{}[]",:0123-.', "true", "false", "null", '":', "12", '"a', None, "<pad>"]
SHAPES: list[tuple[object, object]] = [
    (int, int),
    (float, (int, float)),
    (str, str),
    ((bool, None), (bool, type(None))),
    ([int], list),
    ({"a": int, "b": [bool]}, dict),
    (("a", 3, True), (str, int)),
    ({}, dict),
    (object, object),
]


def fits(value: object, shape: object) -> bool:
    """Whether a JSON value has a shape."""
    if shape is object:
        return True
    if isinstance(shape, tuple):
        return any(fits(value, one) for one in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(one, shape[0]) for one in value)
    if isinstance(shape, dict):
        return isinstance(value, dict) and list(value) == list(shape) and all(fits(value[k], shape[k]) for k in shape)
    if shape is None or isinstance(shape, str | bool):
        return value == shape and type(value) is type(shape)
    if shape is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(shape, type):
        return type(value) is shape
    return value == shape


@pytest.mark.parametrize(("shape", "_kind"), SHAPES, ids=str)
def test_samples_are_json_of_the_shape(shape: object, _kind: object) -> None:
    model = blind(len(LETTERS)).guided(dd.Constraint.json(shape, LETTERS, depth=1, pad=len(LETTERS) - 1))
    tokens = dd.Sampler(model.process, model, S.Ancestral(), steps=3).sample(60, 14, seed=0).tokens
    for row in tokens.tolist():
        said = text(row, LETTERS, len(LETTERS) - 1)
        assert said is not None
        assert fits(json.loads(said), shape), said


def test_json_is_accepted_and_what_is_none_is_not() -> None:
    characters: list[str | None] = [*map(chr, range(32, 127)), "é", "\n", "<pad>"]
    number = {text: n for n, text in enumerate(characters)}
    pad = number["<pad>"]

    def accepted(made: dd.Constraint, said: str) -> bool:
        row = [number[letter] for letter in said]
        return bool(made.accepts(torch.tensor([row + [pad] * (40 - len(row))])))

    every = dd.Constraint.json(object, characters, depth=2, pad=pad)
    values = [
        0, -12, 3.5, -1e-7, 1e300, True, None, "", "é\"\\\n\u2028", [], [[], [1, "a"]], {}, {"k": {"l": 1}}, [{"a": 2}],
        {"": [True, False, None]},
    ]  # fmt: skip
    for value in values:
        said = json.dumps(value, separators=(",", ":"))
        assert accepted(every, said), said
    for said in (
        "01",
        "+1",
        "1.",
        ".5",
        "1e",
        "'a'",
        "[1,]",
        "{1:2}",
        '{"a":}',
        "tru",
        "nul",
        '"\n"',
        "[[[1]]]",
        "NaN",
        "1 ",
    ):
        assert not accepted(every, said), said
    shaped = dd.Constraint.json({"name": str, "ages": [int], "kind": ("x", None)}, characters, pad=pad)
    assert accepted(shaped, '{"name":"a b","ages":[1,20],"kind":"x"}')
    assert not accepted(shaped, '{"ages":[1],"name":"a","kind":null}')
    small = dd.Constraint.json([str], characters, characters="[ab]", pad=pad)
    assert accepted(small, '["ab","","b"]')
    assert not accepted(small, '["c"]')


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "kind", "said"),
    [
        ("(", ValueError, "is no regular expression: missing"),
        ("[[a]", ValueError, "is no regular expression: Possible nested set"),
        ("a(?=b)", ValueError, "looks ahead or behind; combine constraints with & and ~ instead"),
        ("(?!a).*", ValueError, "looks ahead or behind"),
        ("(?<=a)b", ValueError, "looks ahead or behind"),
        (r"(a)\1", ValueError, "is not supported: Group references"),
        ("^a$", ValueError, "is not supported: '.'"),
        (r"\bfoo", ValueError, "is not supported: Escape"),
        ("[]a]", ValueError, "has a bracket at the beginning of a set"),
        ("z", ValueError, "Constraint.regex: no sequence is accepted"),
        ("[^\\w\\W]", ValueError, "no text matches"),
        (3, TypeError, "pattern must be a text, got 3"),
        (b"a", TypeError, "pattern must be a text"),
    ],
)
def test_bad_expressions_are_refused(pattern: object, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=f"Constraint.regex: .*{said}|{said}"):
        dd.Constraint.regex(pattern, ["a", "b"])  # type: ignore[arg-type]


def test_what_only_looks_like_look_ahead_is_read() -> None:
    marks = ["(", "?", "=", "a", "[", "]"]
    assert bool(dd.Constraint.regex(r"\(\?=a", marks).accepts(torch.tensor([[0, 1, 2, 3]])))
    assert bool(dd.Constraint.regex(r"[(?=]*", marks).accepts(torch.tensor([[0, 1, 2]])))
    assert bool(dd.Constraint.regex(r"\[]", marks).accepts(torch.tensor([[4, 5]])))


@pytest.mark.parametrize(
    ("vocabulary", "pad", "kind", "said"),
    [
        ("ab", None, TypeError, "vocabulary must be a sequence"),
        (3, None, TypeError, "vocabulary must be a sequence"),
        (["a", 3], None, TypeError, "vocabulary must hold texts or None, got 3 at id 1"),
        (["a", "b"], 2, ValueError, r"pad must lie in 0\.\.1, got 2"),
        (["a", "b"], "b", TypeError, "pad must be a whole number"),
        ([], None, ValueError, "no sequence is accepted"),
        ([None, None], None, ValueError, "no sequence is accepted"),
    ],
)
def test_bad_vocabularies_are_refused(vocabulary: object, pad: object, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=f"Constraint.regex: {said}"):
        dd.Constraint.regex("a*", vocabulary, pad=pad)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [list, [], [int, str], (), {1: int}, b"a", float("nan"), {"a": {"b": set()}}])
def test_bad_shapes_are_refused(shape: object) -> None:
    with pytest.raises(ValueError, match="a shape is str, int, float, bool, None, object"):
        dd.Constraint.json(shape, LETTERS)
    with pytest.raises(TypeError, match="characters must be a regular expression"):
        dd.Constraint.json(str, LETTERS, characters=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="depth must be at least 0"):
        dd.Constraint.json(object, LETTERS, depth=-1)


def test_without_interegular_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "interegular", None)
    with pytest.raises(ImportError, match=r"takes the package interegular; pip install 'discdiff\[steer\]'"):
        dd.Constraint.regex("a", ["a"])
    assert '"discdiff[demo,bench,antibody,steer,' in (ROOT / "pyproject.toml").read_text()
    assert dd.Constraint([[0, 0]], 0, [True]).automaton.states == 1  # tables need no package
