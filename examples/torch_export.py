"""torch.export and AOTInductor with torch.ops.llmkernels.*: a model as a file that runs without its Python.

    python examples/torch_export.py            export, save, load, run
    python examples/torch_export.py --aot      also compile it ahead of time with AOTInductor: a C++ compiler, a minute

The schema of an op is that of its public function, with two differences that torch.ops has no words for: an op whose
options decide how many arrays it returns gives a list, and a quantized weight travels as its parts
(llmkernels.torch_library.parts).  Whoever loads the file imports llmkernels.torch_library first, which defines the ops.
"""

import sys
import tempfile
from pathlib import Path

import torch

import llmkernels.torch_library

ops = torch.ops.llmkernels


class MLP(torch.nn.Module):
    """Norm, gated product, product; the first as int4 with a scale for each 32 weights."""

    def __init__(self, hidden: int = 64, inner: int = 96):
        super().__init__()
        self.norm = torch.nn.Parameter(torch.ones(hidden), requires_grad=False)
        self.down = torch.nn.Parameter(torch.randn(hidden, inner) / inner**0.5, requires_grad=False)
        gate_up = llmkernels.quant.quantize(torch.randn(2 * inner, hidden) / hidden**0.5, "w4a16_g32")
        self.register_buffer("values", gate_up.values)
        parts = llmkernels.torch_library.parts(gate_up)
        self.options = {name: x for name, x in parts.items() if not isinstance(x, torch.Tensor)}
        for name in parts.keys() - self.options.keys():
            self.register_buffer(name, parts[name])

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, residual = ops.rms_norm(x, self.norm, residual=residual)  # a list of two, as a residual is given
        weight = self.options | {name: x for name, x in self.named_buffers() if name != "values"}
        (h,) = ops.norm_linear_activation(y, self.values, norm="none", activation="swiglu", **weight)
        (out,) = ops.norm_linear_activation(h, self.down, norm="none")
        return out, residual


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model, rows = MLP(), torch.export.Dim("rows", min=2)
    example = (torch.randn(5, 64), torch.randn(5, 64))
    program = torch.export.export(model, example, dynamic_shapes=({0: rows}, {0: rows}))
    nodes = [str(node.target) for node in program.graph.nodes if "llmkernels" in str(node.target)]
    print("in the graph:", ", ".join(nodes))
    with tempfile.TemporaryDirectory() as folder:
        torch.export.save(program, file := Path(folder, "mlp.pt2"))
        check("exported, saved, loaded", torch.export.load(file).module(), model)
        if "--aot" in sys.argv:
            package = torch._inductor.aoti_compile_and_package(program, package_path=str(Path(folder, "compiled.pt2")))
            check("compiled by AOTInductor", torch._inductor.aoti_load_package(package), model)


def check(name: str, run, model: MLP) -> None:
    for count in (3, 17, 64):
        given = (torch.randn(count, 64), torch.randn(count, 64))
        difference = max((a - b).abs().max() for a, b in zip(run(*given), model(*given), strict=True))
        print(f"{name}, {count} rows: differs by {difference:.1e}")
        assert difference < 1e-5


if __name__ == "__main__":
    main()
