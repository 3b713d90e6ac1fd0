"""The special tokens of networks that were trained between a start and an end token, and what names them on disk."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from discdiff.adapters.files import Files
from discdiff.adapters.settings import Refused, Settings

__all__ = ["BERT_TOKENS", "ESM_TOKENS", "ROBERTA_TOKENS", "UNFRAMED", "Specials"]

UNFRAMED = (
    "nothing on disk names its start and end tokens, so it is sampled without them: "
    "replace(convention, frame=(start, end)) adds them"
)


@dataclass(frozen=True)
class Specials:
    """The special tokens of a kind of tokenizer, by kind: "cls", "sep", "bos", "eos", "pad", "unk", "mask".

    Attributes:
        names: what they are called in every tokenizer of this kind.
        rows: the size of the kind's one vocabulary, if it has one.
        ids: the special tokens of that vocabulary.
    """

    names: Mapping[str, str]
    rows: int | None = None
    ids: Mapping[str, int] = field(default_factory=dict)

    def id(self, files: Files, rows: int, *kinds: str) -> int | None:
        """The id of the first of these kinds that something says, or None.

        What the tokenizer's files declare counts first; then config.json, where the network knows the id; then a token
        of the usual name; last the kind's own vocabulary.

        Args:
            files: the checkpoint.
            rows: ids that the network knows.
            kinds: the kinds.

        Raises:
            Refused: for an id of the tokenizer that the network does not know.
        """
        for kind in kinds:
            for number in files.special(f"{kind}_token"):
                if number >= rows:
                    raise Refused(f"the tokenizer's {kind}_token is {number}, but the network knows ids 0..{rows - 1}")
                return number
        config = files.config if isinstance(files.config, Settings) else Settings(files.config, "config.json")
        for kind in kinds:
            configured = config.whole(f"{kind}_token_id", default=None)
            if configured is not None and 0 <= configured < rows:  # saved defaults of the class may lie beyond
                return configured
        usual = (self.usual(files, rows, kind) for kind in kinds)
        return next((number for number in usual if number is not None), None)

    def usual(self, files: Files, rows: int, kind: str) -> int | None:
        """The id of the token of the usual name, or the kind's in its own vocabulary; None where there is neither."""
        if not files.tokens:
            return self.ids.get(kind) if self.rows == rows else None
        number = files.tokens.get(self.names.get(kind, ""))
        return number if number is not None and number < rows else None

    def frame(self, files: Files, rows: int) -> tuple[int, int] | None:
        """The ids of the start and the end token (cls or bos, sep or eos), or None where nothing says them."""
        start, end = self.id(files, rows, "cls", "bos"), self.id(files, rows, "sep", "eos")
        return None if start is None or end is None else (start, end)

    def unpredicted(self, files: Files, rows: int) -> tuple[int, ...]:
        """The ids of all special tokens but the mask."""
        found = (self.id(files, rows, kind) for kind in ("bos", "cls", "sep", "eos", "pad", "unk"))
        return tuple(sorted({number for number in found if number is not None}))


BERT_TOKENS = Specials({"mask": "[MASK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "unk": "[UNK]"})
ROBERTA_TOKENS = Specials({"mask": "<mask>", "cls": "<s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>"})
ESM_TOKENS = Specials(
    {"mask": "<mask>", "cls": "<cls>", "eos": "<eos>", "pad": "<pad>", "unk": "<unk>"},
    33,
    {"cls": 0, "pad": 1, "eos": 2, "unk": 3, "mask": 32},
)
