"""docs/python_vllm.md: its program runs and prints what stands below it, and its names are where it says."""

import re
from pathlib import Path

from compat import torch

from quire.compat import vllm, vllm_quant_kv

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "python_vllm.md").read_text()


def test_the_program(capsys):
    program, printed = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", PAGE, re.DOTALL).groups()
    torch.manual_seed(0)
    exec(compile(program, "docs/python_vllm.md", "exec"), {})
    assert capsys.readouterr().out == printed


def test_the_table_of_names():
    rows = re.findall(r"^\| `(\w+)`[^|]* \| (yes|-)[^|]* \| (yes|-)[^|]* \|$", PAGE, re.MULTILINE)
    for name, new, old in rows:
        assert hasattr(vllm, name) == (new == "yes") and hasattr(vllm_quant_kv, name) == (old == "yes"), name
    listed = {name for name, _, _ in rows}
    assert set(vllm.__all__) <= listed
    assert set(vllm_quant_kv.__all__) - listed == {"AttentionType"}
