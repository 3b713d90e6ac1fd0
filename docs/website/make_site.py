"""Build the site: ``python docs/website/make_site.py [FOLDER]`` (make docs); every warning is an error.

The pages are those of docs/, the pages beside README.md, and the reference, which is written from the code. They are
put together in FOLDER/source, so that nothing generated lies in docs/.
"""

import argparse
import os
import re
import shutil
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(HERE)]
ABOUT = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")


def main() -> int:
    """Put the pages together, run Sphinx and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "build" / "site")
    parser.add_argument("--no-pictures", action="store_true", help="leave the pictures of the reference out")
    arguments = parser.parse_args()
    began = time.perf_counter()
    folder = arguments.folder.resolve()
    source = folder / "source"
    gathered(source)
    import reference

    captions: dict[str, str] = {}
    if not arguments.no_pictures:
        import pictures

        captions = pictures.draw(source / "pictures")
    reference.write(source / "reference", captions)
    prepared = time.perf_counter()
    from sphinx.cmd.build import build_main

    out = folder / "html"
    shutil.rmtree(out, ignore_errors=True)
    words = ["-b", "html", "-W", "--keep-going", "-q", "-E", "-j", "2", "-d", str(folder / "doctrees")]
    status = build_main([*words, "-c", str(HERE), str(source), str(out)])
    pages = len(list(out.rglob("*.html")))
    took = time.perf_counter() - began
    print(f"{pages} pages in {out}, {took:.0f} s ({prepared - began:.0f} s before Sphinx)")
    return status


def gathered(source: Path) -> None:
    """Copy the pages and pictures that the site is made of into a folder, with their links as they must be there."""
    shutil.rmtree(source, ignore_errors=True)
    files = [*DOCS.glob("*.md"), *DOCS.glob("guide/*.md"), *DOCS.glob("**/*.png")]
    placed = {file: source / file.relative_to(DOCS) for file in files}
    placed |= {ROOT / name: source / "about" / name.lower() for name in ABOUT}
    for file, target in placed.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".md":
            target.write_text(linked(file.read_text(), file, placed))
        else:
            shutil.copy(file, target)


def linked(text: str, page: Path, placed: dict[Path, Path]) -> str:
    """Return a page's text with links that lead to the places of pages; files outside the site lose their link."""

    def moved(found: re.Match[str]) -> str:
        words, target, anchor = found[1], found[2], found[3] or ""
        if "://" in target or target.startswith(("mailto:", "#")):
            return found[0]
        file = (page.parent / target).resolve()
        if file in placed:
            return f"[{words}]({os.path.relpath(placed[file], placed[page].parent)}{anchor})"
        if not file.exists():
            return found[0]  # Sphinx says that it leads nowhere
        return words

    return re.sub(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#\s]+)(#[^)]*)?\)", moved, text)


if __name__ == "__main__":
    sys.exit(main())
