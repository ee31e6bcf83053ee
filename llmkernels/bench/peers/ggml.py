"""ggml, the library under llama.cpp, beside quantized_gemm and paged_attention, where llama-cpp-python is installed.

Its shared library is called through ctypes (ggml.h, ggml-alloc.h, ggml-backend.h).  What is made here lives until the
program ends, apart from the arrays: their memory is freed with the Graph.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from importlib import util
from pathlib import Path
from typing import Any

import torch

from llmkernels.bench.peers import Call, peer
from llmkernels.bench.peers.attention import batch
from llmkernels.quant.codes import unpack

FLOAT32, FLOAT16, Q4_0, BFLOAT16 = 0, 1, 2, 30  # enum ggml_type
TYPES = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}
BLOCK = 32  # weights that share a scale in q4_0
CPU = 0  # enum ggml_backend_dev_type
ROOM = 1 << 20  # bytes for the descriptions of a few tensors and a graph

SIGNATURES = {  # name -> what it returns (p pointer, f float, n integer), then its arguments
    "ggml_new_tensor_4d": "ppnnnnn",
    "ggml_mul_mat": "pppp",
    "ggml_flash_attn_ext": "ppppppfff",
    "ggml_new_graph": "pp",
    "ggml_build_forward_expand": "npp",
    "ggml_free": "np",
    "ggml_log_set": "npp",
    "ggml_backend_cpu_init": "p",
    "ggml_backend_cpu_set_n_threads": "npn",
    "ggml_backend_graph_compute": "npp",
    "ggml_backend_alloc_ctx_tensors": "ppp",
    "ggml_backend_alloc_ctx_tensors_from_buft": "ppp",
    "ggml_backend_buffer_free": "np",
    "ggml_backend_tensor_set": "nppnn",
    "ggml_get_data": "pp",
    "ggml_backend_dev_by_type": "pn",
    "ggml_backend_dev_backend_reg": "pp",
    "ggml_backend_reg_get_proc_address": "pps",
}
KINDS: dict[str, Any] = {"p": ctypes.c_void_p, "f": ctypes.c_float, "n": ctypes.c_int64, "s": ctypes.c_char_p}


class InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Library:
    """The functions of SIGNATURES without their prefix, and a backend on as many threads as torch has."""

    def __init__(self) -> None:
        spec = util.find_spec("llama_cpp")
        assert spec is not None  # or this peer would not have been registered
        folder = Path(str(spec.origin)).parent / "lib"
        # Each library names the ones below it, which the loader finds once they are loaded.
        parts = [ctypes.CDLL(str(next(folder.glob(f"lib{n}.*")))) for n in ("ggml-base", "ggml-cpu", "ggml")]
        for name, signature in SIGNATURES.items():
            function = next(getattr(part, name) for part in parts if hasattr(part, name))
            function.restype, *function.argtypes = [KINDS[kind] for kind in signature]
            setattr(self, name.removeprefix("ggml_"), function)
        self.quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *message: None)
        self.log_set(ctypes.cast(self.quiet, ctypes.c_void_p), None)  # it tells of every weight that it repacks
        self.init = parts[0].ggml_init
        self.init.restype, self.init.argtypes = ctypes.c_void_p, [InitParams]
        self.backend = self.backend_cpu_init()
        device = self.backend_dev_by_type(CPU)
        found = self.backend_reg_get_proc_address(
            self.backend_dev_backend_reg(device), b"ggml_backend_dev_get_extra_bufts"
        )
        # The kinds of memory in which it keeps weights repacked for this processor, the best first, ended by NULL.
        list_kinds = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)
        self.repacked = list_kinds(found)(device)[0] if found else None

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"ggml_{name} is not in SIGNATURES")


@cache
def library() -> Library:
    return Library()


class Graph:
    """Tensors in ggml's memory and one operation on them."""

    def __init__(self) -> None:
        self.ggml = library()
        self.ggml.backend_cpu_set_n_threads(self.ggml.backend, torch.get_num_threads())
        self.contexts: list[Any] = []
        self.buffers: list[Any] = []

    def __del__(self) -> None:
        for buffer in self.buffers:
            self.ggml.backend_buffer_free(buffer)
        for context in self.contexts:
            self.ggml.free(context)

    def context(self) -> Any:
        self.contexts.append(self.ggml.init(InitParams(ROOM, None, True)))
        return self.contexts[-1]

    def tensor(self, context: Any, kind: int, shape: tuple[int, ...]) -> Any:
        """A tensor of a torch shape: ggml counts dimensions from the last one."""
        return self.ggml.new_tensor_4d(context, kind, *reversed(shape), *(1,) * (4 - len(shape)))

    def fill(self, tensor: Any, values: torch.Tensor) -> None:
        values = values.contiguous()
        self.ggml.backend_tensor_set(tensor, values.data_ptr(), 0, values.nbytes)

    def weight(self, blocks: torch.Tensor, shape: tuple[int, ...]) -> Any:
        """A q4_0 weight, repacked if ggml has an order for this processor."""
        context = self.context()
        weight = self.tensor(context, Q4_0, shape)
        if self.ggml.repacked:
            self.buffers.append(self.ggml.backend_alloc_ctx_tensors_from_buft(context, self.ggml.repacked))
        else:
            self.buffers.append(self.ggml.backend_alloc_ctx_tensors(context, self.ggml.backend))
        self.fill(weight, blocks)
        return weight

    def ready(self, context: Any, result: Any, shape: tuple[int, ...]) -> Callable[[], torch.Tensor]:
        """Plan the graph that ends in `result` [shape], float32, and return what computes it."""
        graph = self.ggml.new_graph(context)
        self.ggml.build_forward_expand(graph, result)
        self.buffers.append(self.ggml.backend_alloc_ctx_tensors(context, self.ggml.backend))
        memory = (ctypes.c_float * torch.Size(shape).numel()).from_address(self.ggml.get_data(result))
        answer = torch.frombuffer(memory, dtype=torch.float32).view(shape)

        def run() -> torch.Tensor:
            if status := self.ggml.backend_graph_compute(self.ggml.backend, graph):
                raise RuntimeError(f"ggml_backend_graph_compute returned {status}")
            return answer

        return run


@peer("quantized_gemm", "ggml q4_0", needs="llama_cpp", own_rounding=True)
def quantized_gemm(call: Call) -> Callable[[], Any] | None:
    """The same 4-bit weight as q4_0, its scales rounded to float16; ggml rounds x to int8 in groups of 32 columns."""
    x, weight = call["x"], call["weight"]
    scheme, (out, columns) = weight.scheme, weight.shape
    plain = scheme.weight == "int4" and scheme.symmetric and not scheme.act_order and scheme.activation == "int8"
    if not plain or not scheme.group or columns % scheme.group or x.ndim != 2 or call["bias"] is not None:
        return None
    if x.device.type != "cpu" or not x.numel():
        return None
    graph = Graph()
    held = graph.weight(_q4_0(weight), (out, columns))
    context = graph.context()
    rows = graph.tensor(context, FLOAT32, tuple(x.shape))
    run = graph.ready(context, graph.ggml.mul_mat(context, held, rows), (x.shape[0], out))
    graph.fill(rows, x.float())
    return lambda: run().to(x.dtype)


def _q4_0(weight: Any) -> torch.Tensor:
    """uint8[out, in/32, 18]: a float16 scale, then 32 codes, the first 16 of them in the low nibbles."""
    out, columns = weight.shape
    codes = unpack(weight.values, columns).view(out, -1, 2, BLOCK // 2)
    nibbles = codes[:, :, 0] | codes[:, :, 1] << 4
    scales = weight.scales.repeat_interleave(weight.scheme.group // BLOCK, 1).half()[..., None]
    return torch.cat([scales.view(torch.uint8), nibbles], -1)


@peer("paged_attention", "ggml flash attention, no pages", needs="llama_cpp")
def paged_attention(call: Call) -> Callable[[], Any] | None:
    """Keys and values contiguous for each head, copied there beforehand."""
    q, found = call["q"], batch(call)
    if not found or q.dtype == torch.float32 or q.device.type != "cpu":
        return None
    k, v = (found.keys(call[name]).contiguous() for name in ("k_cache", "v_cache"))  # [seqs kv_heads length dim]
    queries = q.float().unflatten(0, (-1, found.new)).transpose(1, 2)  # [seqs heads new dim]
    seen = found.mask
    if found.is_causal:
        seen = torch.ones(found.new, found.length, dtype=torch.bool).tril()
    graph = Graph()
    context = graph.context()
    tensors = [graph.tensor(context, TYPES[t.dtype], tuple(t.shape)) for t in (queries, k, v)]
    mask = graph.tensor(context, FLOAT16, tuple(seen.shape)) if seen is not None else None
    scale = q.shape[-1] ** -0.5 if call["scale"] is None else call["scale"]
    result = graph.ggml.flash_attn_ext(context, *tensors, mask, scale, 0.0, 0.0)
    run = graph.ready(context, result, (*q.shape[:2], v.shape[-1]))
    for tensor, values in zip(tensors, (queries, k, v), strict=True):
        graph.fill(tensor, values)
    if seen is not None:
        graph.fill(mask, torch.zeros(seen.shape).masked_fill(~seen, -torch.inf).half())
    return lambda: run().to(q.dtype)
