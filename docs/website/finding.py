"""Ask the search index of a built site as its page of search does in a browser: ``python docs/website/finding.py``.

The ranking is that of Sphinx's searchtools.js with scorer.js: titles, objects and words, the best score first.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

NAME, PART, PRIORITY = 11, 6, {0: 15, 1: 5, 2: -5}
TITLE, PART_OF_TITLE, WORD, PART_OF_WORD = 15, 7, 5, 2
GUIDE = 4


def index(folder: Path) -> dict[str, object]:
    """Read searchindex.js."""
    text = (folder / "searchindex.js").read_text()
    return json.loads(text[text.index("(") + 1 : text.rindex(")")])


def stopwords(folder: Path) -> set[str]:
    """Read the words that the search skips."""
    found = re.search(r"new Set\((\[.*?\])\)", (folder / "_static" / "language_data.js").read_text(), re.DOTALL)
    return set(json.loads(found[1])) if found else set()


def listed(found: int | list[int] | None) -> list[int]:
    """Return the pages of an entry, which are a number if there is one."""
    return [] if found is None else found if isinstance(found, list) else [found]


def find(folder: Path, question: str, stem: Callable[[str], str]) -> list[str]:
    """Return the pages for a question, the best first, each once. ``stem`` maps a word to its stem."""
    known, skipped = index(folder), stopwords(folder)
    words = [word for word in re.split(r"\W+", question.lower()) if word]
    stems = {stem(word) for word in words if word not in skipped and not word.isdigit()}
    scored = [*_titles(known, question.lower().strip()), *_objects(known, words), *_words(known, stems)]
    best: dict[str, float] = {}
    for page, score in scored:
        name = known["docnames"][page]
        best[name] = max(best.get(name, -100), score + GUIDE * name.startswith("guide/"))
    titles = dict(zip(known["docnames"], known["titles"], strict=True))
    return sorted(best, key=lambda name: (-best[name], titles[name].lower()))


def _titles(known: dict, asked: str) -> Iterator[tuple[int, float]]:
    for title, places in known["alltitles"].items():
        if asked in title.lower() and len(asked) >= len(title) / 2:
            for page, _ in places:
                yield page, round(TITLE * len(asked) / len(title)) + (known["titles"][page] == title)
    for entry, places in known["indexentries"].items():
        if asked in entry and len(asked) >= len(entry) / 2:
            yield from ((page, round(100 * len(asked) / len(entry))) for page, _, main in places if main)


def _objects(known: dict, words: list[str]) -> Iterator[tuple[int, float]]:
    for prefix, entries in known["objects"].items():
        for page, kind, priority, _, name in entries:
            full = f"{prefix}.{name}".lower() if prefix else name.lower()
            last = full.rpartition(".")[2]
            near = f"{prefix} {name} {known['objnames'][str(kind)][2]} {known['titles'][page]}".lower()
            for word in words:
                if word in full and all(other in near for other in words if other != word):
                    match = NAME if word in (full, last) else PART if word in last else 0
                    yield page, match + PRIORITY.get(priority, 0)


def _words(known: dict, stems: set[str]) -> Iterator[tuple[int, float]]:
    found: dict[int, dict[str, int]] = {}
    for word in stems:
        for table, whole, part in (("terms", WORD, PART_OF_WORD), ("titleterms", TITLE, PART_OF_TITLE)):
            terms = known[table]
            if word in terms:
                matches = [(terms[word], whole)]
            else:
                matches = [(terms[term], part) for term in terms if len(word) > 2 and word in term]
            for pages, score in matches:
                for page in listed(pages):
                    found.setdefault(page, {})[word] = score
    long = sum(len(word) > 2 for word in stems)
    yield from ((page, max(has.values())) for page, has in found.items() if len(has) in (len(stems), long))


if __name__ == "__main__":
    import snowballstemmer

    english = snowballstemmer.stemmer("english")
    for asked in sys.argv[2:]:
        print(asked, find(Path(sys.argv[1]), asked, english.stemWord)[:5])
