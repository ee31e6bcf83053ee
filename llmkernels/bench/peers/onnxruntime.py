"""ONNX Runtime's MatMulNBits beside quantized_gemm, on the CPU, where onnxruntime and onnx are installed."""

from collections.abc import Callable
from importlib import util
from typing import Any

import torch

from llmkernels.bench.peers import Call, peer

FLOAT32, INT8 = 1, 4  # accuracy_level: what the products are made of


@peer("quantized_gemm", "ONNX Runtime", needs="onnxruntime")
def float32(call: Call) -> Callable[[], Any] | None:
    """4-bit weights, products in float32."""
    return _session(call, FLOAT32) if call["weight"].scheme.activation is None else None


@peer("quantized_gemm", "ONNX Runtime, int8", needs="onnxruntime", own_rounding=True)
def int8(call: Call) -> Callable[[], Any] | None:
    """4-bit weights; x is rounded to int8 in the call, in groups as wide as those of the weight."""
    return _session(call, INT8) if call["weight"].scheme.activation == "int8" else None


def _session(call: Call, accuracy: int) -> Callable[[], Any] | None:
    """A model of one node; None for what MatMulNBits does not have.

    x goes in as float32, the only float its CPU kernels are fast in; the answer is rounded to the dtype of x.
    Its nibbles lie as ours do, low first, and 8 is its zero point where none is given.
    """
    x, weight = call["x"], call["weight"]
    scheme, (out, columns) = weight.scheme, weight.shape
    if not util.find_spec("onnx") or x.device.type != "cpu" or x.ndim != 2 or call["bias"] is not None:
        return None
    plain = scheme.weight == "int4" and scheme.symmetric and not scheme.act_order and scheme.granularity == "group"
    if not plain or columns % scheme.group:
        return None
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    shape = {"K": columns, "N": out, "bits": 4, "block_size": scheme.group, "accuracy_level": accuracy}
    node = helper.make_node("MatMulNBits", ["x", "values", "scales"], ["y"], domain="com.microsoft", **shape)
    values = weight.values.view(out, columns // scheme.group, scheme.group // 2).contiguous().numpy()
    constants = [
        numpy_helper.from_array(values, "values"),
        numpy_helper.from_array(weight.scales.float().flatten().numpy(), "scales"),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", w]) for n, w in (("x", columns), ("y", out))]
    graph = helper.make_graph([node], "one product", ends[:1], ends[1:], constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {"x": x.float().numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0]).to(x.dtype)
