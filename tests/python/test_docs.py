"""The programs of docs/python.md run as they stand there, and print what stands below them."""

import contextlib
import io
import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"


def test_the_page_is_true():
    names = {}
    programs = 0
    # A program, then at most a line of prose, then what it prints.
    for code, printed in re.findall(
        r"```python\n(.*?)```\n(?:\n(?:It prints\n\n)?```\n(.*?)```)?", PAGE.read_text(), re.DOTALL
    ):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, str(PAGE), "exec"), names)
        assert out.getvalue() == printed
        programs += 1
    assert programs == 4


def test_the_first_program_has_thirty_lines_at_most():
    first = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    assert len(first.splitlines()) <= 30
