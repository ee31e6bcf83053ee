"""What only a GPU can show of the Triton backend: CUDA graphs, torch.compile without a break, code for NVIDIA.

`python tests/triton_gpu.py [PART] [--jobs N]` makes every check, or those whose name contains PART, each in a process
of its own, and needs no pytest; tests/test_triton_gpu.py makes them too.
"""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import llmkernels
from llmkernels import use
from llmkernels.bench.subject import Subject, bound
from llmkernels.contract import Case
from llmkernels.discovery import implementation
from llmkernels.inputs import inputs
from llmkernels.memory import bits
from llmkernels.registry import OPS, get

get("rms_norm")  # declares every op
WARM = 3  # calls before a capture: they compile, and pack weights
DTYPES = ("bfloat16", "float16")


def results(contract, run, call):
    """Everything a call returns and writes."""
    found = bound(contract, run, call)()
    found = [] if found is None else list(found) if isinstance(found, tuple) else [found]
    return found + [call[p.name] for p in contract.shapes.inputs.values() if p.mutated and call[p.name] is not None]


def same(got, want):
    return len(got) == len(want) and all(
        torch.equal(bits(g.contiguous()), bits(w.contiguous())) for g, w in zip(got, want, strict=True)
    )


def captured(contract, run, call):
    """(replay, what a replay leaves its results in)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM):
            results(contract, run, call)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = results(contract, run, call)
    return graph.replay, kept


def tensors(call):
    return [value for value in call.values() if isinstance(value, torch.Tensor)]


def graph_of(op, dtype):
    """A captured call of each easy case gives the bits of an eager one, again after its inputs changed."""
    contract, run = OPS[op].contract, implementation("triton", op).run
    taken = 0
    for case in contract.cases:
        call = inputs(contract, case, dtype, "cuda") if not case.hostile else None
        if call is None or list(implementation("triton", op).refuse(**call)):
            continue
        taken += 1
        fresh = partial(inputs, contract, case, dtype, "cuda")
        replay, kept = captured(contract, run, call)
        for turn in range(2):
            other = fresh()
            for mine, theirs in zip(tensors(call), tensors(other), strict=True):
                if turn and mine.dtype == getattr(torch, dtype):
                    theirs.mul_(0.5)
                mine.copy_(theirs)
            replay()
            torch.cuda.synchronize()
            assert same(kept, results(contract, run, other)), f"{op} {dtype} {case.name!r}: replay {turn} differs"
    assert taken, f"triton takes no easy case of {op} in {dtype}"


def graph_of_a_smaller_batch(dtype):
    """Captured for long sequences, replayed for shorter ones on other pages; freed pages and their bytes stay."""
    contract, run = OPS["paged_attention"].contract, implementation("triton", "paged_attention").run
    make = partial(_decode, dtype=getattr(torch, dtype))
    call = contract.bind(**make((700, 1300, 64)))
    replay, kept = captured(contract, run, call)
    for lengths in ((1, 17, 64), (0, 1300, 16), (699, 3, 5)):
        other = make(lengths)
        for name in ("q", "block_table", "seq_lens"):
            call[name].copy_(other[name])
        before = call["k_cache"].clone()
        replay()
        torch.cuda.synchronize()
        eager = dict(call) | {name: call[name].clone() for name in ("q", "block_table", "seq_lens")}
        assert same(kept, results(contract, run, eager)), f"lengths {lengths} differ"
        assert torch.equal(before, call["k_cache"]), "a page was written"


def _decode(lengths, dtype, heads=8, kv_heads=2, dim=128, page=16, pages=300):
    draw = torch.Generator().manual_seed(sum(lengths))
    cache = torch.Generator().manual_seed(0)
    k, v = (torch.randn(pages, page, kv_heads, dim, generator=cache).to("cuda", dtype) for _ in range(2))
    table = torch.stack([torch.randperm(pages, generator=draw)[: -(-1300 // page)] for _ in lengths]).int()
    return {
        "q": torch.randn(len(lengths), heads, dim, generator=draw).to("cuda", dtype),
        "k_cache": k,
        "v_cache": v,
        "block_table": table.cuda(),
        "seq_lens": torch.tensor(lengths, dtype=torch.int32, device="cuda"),
        "cu_seqlens_q": torch.arange(len(lengths) + 1, dtype=torch.int32, device="cuda"),
        "max_seqlen_q": 1,
        "max_seqlen_k": 1300,
        "return_lse": True,
    }


def compiled_into_one_graph(dtype):
    """A layer under torch.compile(fullgraph=True), its launches in CUDA graphs, gives what eager calls give."""
    kind = getattr(torch, dtype)

    def layer(x, weight, gain):
        y, residual = llmkernels.rms_norm(x, gain, residual=x)
        return llmkernels.norm_linear_activation(y, weight, norm="none", activation="swiglu"), residual

    make = partial(torch.randn, device="cuda", dtype=kind)
    with use("triton", policy="strict"), torch.no_grad():
        run = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
        weight, gain = make(256, 128) / 16, make(128)
        for _ in range(WARM):
            x = make(7, 128)
            assert same([part.clone() for part in run(x, weight, gain)], list(layer(x, weight, gain)))


def words_of_two_codes():
    """What unpacks them on NVIDIA, and in Triton's own words what does elsewhere."""
    from triton_codes import words_become_float16

    nvidia = not torch.version.hip
    converts = nvidia and torch.cuda.get_device_capability() >= (8, 9)
    words_become_float16("cuda", nvidia, converts)
    words_become_float16("cuda")


def every_code(dtype):
    """In the keys and in the values of attention."""
    from triton_codes import CACHES, attention_reads_codes

    for cache in CACHES:
        attention_reads_codes("cuda", getattr(torch, dtype), cache)


MANY = (  # rows, features, more: beyond the contract's cases, where tensor descriptors and long-lived programs begin
    (256, 520, {}),
    (300, 24 * 1024 + 8, {"activation": "silu", "bias": True}),
    (1000, 4104, {"residual": True}),
    (2049, 4096, {}),
    (512, 16384, {"activation": "swiglu", "bias": True}),
    (1027, 8208, {"activation": "geglu"}),
    (300, 1002, {}),  # rows of y that no descriptor takes
    *((777, 2056, {"scheme": scheme}) for scheme in ("w4a16_g128", "w4a8_g128", "w8a8", "w8a16", "fp8_row", "mxfp4")),
    (513, 6144, {"scheme": "fp8_block"}),
    (2100, 3080, {"scheme": "fp8_block"}),
    (3000, 3080, {"scheme": "w8a8"}),
    (3000, 3080, {"scheme": "fp8_row", "activation": "swiglu"}),
)


def products_of_many_rows(dtype):
    """Against the float64 oracle; features and rows that no tile divides."""
    contract, run = OPS["norm_linear_activation"].contract, implementation("triton", "norm_linear_activation").run
    for rows, features, more in MANY:
        case = Case("many rows", {"rows": rows, "features": features, "in_": 640, "norm_weight": True} | more)
        subject = Subject(contract, case.name, dtype, inputs(contract, case, dtype, "cuda"), "cuda")
        wrong, _, _ = subject.judge(subject.answers(run, subject.copy()))
        assert not wrong, f"{rows} x {features} {more}: {wrong}"


CHECKS = {
    **{f"graph of {op} {dtype}": partial(graph_of, op, dtype) for op in sorted(OPS) for dtype in DTYPES},
    **{f"graph of a smaller batch {dtype}": partial(graph_of_a_smaller_batch, dtype) for dtype in DTYPES},
    "words of two codes": words_of_two_codes,
    **{f"every code {dtype}": partial(every_code, dtype) for dtype in DTYPES},
    **{f"products of many rows {dtype}": partial(products_of_many_rows, dtype) for dtype in (*DTYPES, "float32")},
    **{f"torch.compile {dtype}": partial(compiled_into_one_graph, dtype) for dtype in DTYPES},
}


def alone(name):
    """Make a check in a process of its own: a fault in a kernel ends the CUDA context, or the process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(CHECKS[name]).result()


def raised(error):
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", nargs="?", default="", help="only checks whose name contains this")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="processes at once: they compile")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU here")
    names = [name for name in CHECKS if options.part in name]
    failed = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for done in as_completed(waiting := {pool.submit(alone, name): name for name in names}):
            error = done.exception()  # every check is made, and each failure told
            failed += error is not None
            told = f"failed {waiting[done]}: {raised(error)}" if error else f"passed {waiting[done]}"
            print(told, flush=True)
    print(f"{len(names) - failed} passed, {failed} failed on {torch.cuda.get_device_name()}")
    sys.exit(failed > 0 or not names)


if __name__ == "__main__":
    main()
