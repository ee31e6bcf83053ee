"""The example of docs/transformers.md runs, and its tables are what the code knows."""

import re
from pathlib import Path

from llmkernels import ledger
from llmkernels.engine import shipped_model
from llmkernels.quant import formats

PAGE = (Path(__file__).parent.parent / "docs" / "transformers.md").read_text()


def test_the_example_runs(capsys):
    example = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
    assert len(example.strip().splitlines()) <= 12
    exec(example, {"path": str(shipped_model())})
    said = capsys.readouterr().out
    assert "replaced  model.layers.5.input_layernorm -> self_attn" in said
    assert "tensor([[" in said
    assert {"paged_attention", "norm_linear_activation", "quantized_gemm"} <= set(ledger.read())


def test_every_format_is_named():
    table = re.findall(r"^\| `([\w-]+)` \|", PAGE, re.MULTILINE)
    assert table == list(formats.READERS)
