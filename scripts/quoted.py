"""Pages that quote results: what stands between a line "<!-- TOOL NAME -->" and the next "<!-- /TOOL -->" is written by a
script of that name, never by hand, and a test compares (tests/install/CMakeLists.txt)."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def table(head, rows):
    """The lines of a Markdown table."""
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(str(cell) for cell in row) + " |"


def fill(tool, pages, lines_of, check):
    """Replaces each block of `tool` in `pages` by lines_of(name). With `check` nothing is written, and the script ends
    with status 1 and a sentence where a block differs or a page has none."""
    block = re.compile(rf"(<!-- {tool} ([\w-]+) -->\n).*?(<!-- /{tool} -->)", re.DOTALL)
    for page in pages:
        path = ROOT / page
        old = path.read_text()
        new, count = block.subn(lambda m: m[1] + "\n".join(lines_of(m[2])) + "\n" + m[3], old)
        if count == 0:
            sys.exit(f"scripts/{tool}: {page} has no block <!-- {tool} NAME -->")
        if new != old and check:
            sys.exit(f"scripts/{tool}: {page} differs from the results; run scripts/{tool}")
        if new != old:
            path.write_text(new)
