"""Find the special tokens of networks that were trained between a start and an end token."""

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
    """The special tokens of a type of tokenizer, by kind: "cls", "sep", "bos", "eos", "pad", "unk", "mask".

    Attributes:
        names: the usual name of each kind in tokenizers of this type.
        rows: the size of the vocabulary, if all tokenizers of this type share one; else None.
        ids: the ids of the special tokens in that shared vocabulary.
    """

    names: Mapping[str, str]
    rows: int | None = None
    ids: Mapping[str, int] = field(default_factory=dict)

    def id(self, files: Files, rows: int, *kinds: str) -> int | None:
        """Return the id of a special token of one of these kinds, or None if none is found.

        Three sources are searched in this order, each for all kinds: the declarations in the tokenizer's files; the
        ids in config.json, except those that the network lacks; the ids that ``usual`` returns.

        Args:
            files: the checkpoint.
            rows: the number of ids that the network has.
            kinds: the kinds, the preferred one first.

        Raises:
            Refused: if the tokenizer's id is not one of the network's.
        """
        for kind in kinds:
            for number in files.special(f"{kind}_token"):
                if number >= rows:
                    raise Refused(f"the tokenizer's {kind}_token is {number}, but the network knows ids 0..{rows - 1}")
                return number
        config = files.config if isinstance(files.config, Settings) else Settings(files.config, "config.json")
        for kind in kinds:
            configured = config.whole(f"{kind}_token_id", default=None)
            if configured is not None and 0 <= configured < rows:  # a class's saved default may be out of range
                return configured
        usual = (self.usual(files, rows, kind) for kind in kinds)
        return next((number for number in usual if number is not None), None)

    def usual(self, files: Files, rows: int, kind: str) -> int | None:
        """Return the id of the special token of a kind, found by its usual name, or None.

        If the files list no tokens, the id comes from ``ids``, provided that ``rows`` is the size of the shared
        vocabulary.
        """
        if not files.tokens:
            return self.ids.get(kind) if self.rows == rows else None
        number = files.tokens.get(self.names.get(kind, ""))
        return number if number is not None and number < rows else None

    def frame(self, files: Files, rows: int) -> tuple[int, int] | None:
        """Return the ids of the start and the end token (cls or bos, sep or eos), or None if they are not found."""
        start, end = self.id(files, rows, "cls", "bos"), self.id(files, rows, "sep", "eos")
        return None if start is None or end is None else (start, end)

    def unpredicted(self, files: Files, rows: int) -> tuple[int, ...]:
        """Return the ids of all special tokens except the mask."""
        found = (self.id(files, rows, kind) for kind in ("bos", "cls", "sep", "eos", "pad", "unk"))
        return tuple(sorted({number for number in found if number is not None}))


BERT_TOKENS = Specials({"mask": "[MASK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "unk": "[UNK]"})
ROBERTA_TOKENS = Specials({"mask": "<mask>", "cls": "<s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>"})
ESM_TOKENS = Specials(
    {"mask": "<mask>", "cls": "<cls>", "eos": "<eos>", "pad": "<pad>", "unk": "<unk>"},
    33,
    {"cls": 0, "pad": 1, "eos": 2, "unk": 3, "mask": 32},
)
