"""Turn discdiff's docstrings into reStructuredText: indented blocks are formulas, and names are in backquotes."""

import re

SECTIONS = ("Args", "Attributes", "Raises", "Returns", "Yields", "Example")


def converted(lines: list[str]) -> list[str]:
    """Return the lines with formulas as literal blocks, lists set apart and other signs escaped."""
    out: list[str] = []
    k = 0
    while k < len(lines):
        line = lines[k]
        depth = len(line) - len(line.lstrip())
        if re.fullmatch(rf"({'|'.join(SECTIONS)}):", line):
            last = k + 1
            while last < len(lines) and (not lines[last].strip() or lines[last].startswith(" ")):
                last += 1
            out += ["", line, *map(escaped, lines[k + 1 : last])]
            k = last
        elif line.strip() and depth >= 4 and not (out and re.match(r" *\* ", out[-1])):
            last = k
            while last < len(lines) and (not lines[last].strip() or lines[last].startswith("    ")):
                last += 1
            block = lines[k:last]
            while not block[-1].strip():
                block.pop()
            out += ["", "::", "", *block, ""]
            k = last
        else:
            if re.match(r"\* ", line) and out and out[-1].strip() and not re.match(r"\* |  ", out[-1]):
                out.append("")
            if line.startswith(("Reference:", "References:")) and out and out[-1].strip():
                out.append("")
            out.append(escaped(line))
            k += 1
    return out


def escaped(line: str) -> str:
    """Return a line in which only double backquotes, roles, bullets and links mean something."""
    bullet = re.match(r" *\* ", line)
    start = bullet[0] if bullet else ""
    parts = re.split(r"(``.+?``(?!`)|https?://[^\s,;)]+)", line[len(start) :])
    return start + "".join(part if k % 2 else _plain(part) for k, part in enumerate(parts))


def _plain(text: str) -> str:
    text = re.sub(r"`([^`]+)`", r"``\1``", text)
    text = re.sub(r"(^|[ (])(\w)\. ", r"\1\2\\. ", text)  # "w. At 0" is no list
    parts = re.split(r"(``.+?``)", text)
    return "".join(part if k % 2 else re.sub(r"([*|]|_(?!\w))", r"\\\1", part) for k, part in enumerate(parts))
