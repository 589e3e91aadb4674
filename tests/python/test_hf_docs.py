"""The program of docs/hf.md runs as it stands there, and prints what stands below it."""

import contextlib
import io
import re
from pathlib import Path

import pytest

pytest.importorskip("hf_models", reason="PyTorch and transformers are not installed")

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_true(monkeypatch):
    monkeypatch.chdir(ROOT)
    code, printed = re.search(
        r"```python\n(.*?)```\n\nIt prints\n\n```\n(.*?)```", (ROOT / "docs" / "hf.md").read_text(), re.DOTALL
    ).groups()
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "docs/hf.md", "exec"), {})
    assert out.getvalue() == printed
