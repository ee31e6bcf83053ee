"""ONNX Runtime's MatMulNBits beside quantized_gemm, on the CPU, where onnxruntime and onnx are installed."""

from collections.abc import Callable
from importlib import util
from typing import Any

import torch

from llmkernels.bench.peers import Call, peer


@peer("quantized_gemm", "ONNX Runtime", needs="onnxruntime")
def quantized_gemm(call: Call) -> Callable[[], Any] | None:
    x, weight = call["x"], call["weight"]
    scheme = weight.scheme
    if not util.find_spec("onnx") or x.dtype != torch.float32 or x.device.type != "cpu" or call["bias"] is not None:
        return None
    plain = scheme.weight == "int4" and not scheme.act_order and scheme.activation is None and scheme.symmetric
    if not plain or scheme.granularity != "group" or x.ndim != 2 or x.shape[1] % scheme.group:
        return None
    session = _session(weight, scheme.group)
    feed = {"x": x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def _session(weight: Any, group: int) -> Any:
    """A model of one node.  Its nibbles lie as ours do, low first, and 8 is its zero point where none is given."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    out, columns = weight.shape
    shape = {"K": columns, "N": out, "bits": 4, "block_size": group, "accuracy_level": 1}  # 1: products in float32
    node = helper.make_node("MatMulNBits", ["x", "values", "scales"], ["y"], domain="com.microsoft", **shape)
    values = weight.values.view(out, columns // group, group // 2).contiguous().numpy()
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
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
