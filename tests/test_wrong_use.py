"""The mistakes of people who connect an engine: each gives one paragraph that says what is wrong and what to change."""

import math

import numpy as np
import pytest
import torch

import llmkernels

HEADS, KV_HEADS, DIM, PAGES, PAGE = 8, 2, 64, 8, 16


def step(**change):
    """A right call of paged_attention, but for `change`: two sequences, one decoding, one with two new tokens."""
    generator = torch.Generator().manual_seed(0)
    call = {
        "q": torch.randn(3, HEADS, DIM, generator=generator),
        "k_cache": torch.randn(PAGES, PAGE, KV_HEADS, DIM, generator=generator),
        "v_cache": torch.randn(PAGES, PAGE, KV_HEADS, DIM, generator=generator),
        "block_table": torch.arange(PAGES, dtype=torch.int32).view(2, 4),
        "seq_lens": torch.tensor([20, 33], dtype=torch.int32),
        "cu_seqlens_q": torch.tensor([0, 1, 3], dtype=torch.int32),
    }
    return call | {name: edit(call[name]) if callable(edit) else edit for name, edit in change.items()}


def write(**change):
    """A right call of write_kv, but for `change`."""
    call = {"k": torch.randn(3, KV_HEADS, DIM), "v": torch.randn(3, KV_HEADS, DIM)}
    call |= {name: torch.zeros(PAGES, PAGE, KV_HEADS, DIM) for name in ("k_cache", "v_cache")}
    call["slots"] = torch.tensor([20, 64, 65])
    return call | {name: edit(call[name]) if callable(edit) else edit for name, edit in change.items()}


def hnd(cache):
    """The same cache as engines of the other layout keep it."""
    return cache.transpose(1, 2).contiguous()


HND = {"k_cache": hnd, "v_cache": hnd}
ATTENTION = {
    "HND given as NHD": (
        HND,
        "heads=8 is not a multiple of kv_heads=16",
        "second dimension, 2, divides heads: if that is kv_heads, they are HND; pass k_cache.transpose(1, 2)",
    ),
    "HND given as NHD, a page size that divides heads": (
        HND | {"q": torch.randn(3, 16, DIM)},
        "seq_lens[0] is 20; block_table has room for 4 pages of 2",
        "pass k_cache.transpose(1, 2)",
    ),
    "heads that are no multiple": ({"q": torch.randn(3, 7, DIM)}, "heads=7", "repeat or drop heads"),
    "float64": ({"q": torch.Tensor.double}, "q is float64", "float32 or bfloat16 or float16: cast it"),
    "a cache of another dtype": ({"q": torch.Tensor.bfloat16}, "caches are float32 and q is bfloat16", "cast one"),
    "an int64 table": ({"block_table": torch.Tensor.long}, "block_table is int64", "says int32: cast it"),
    "int64 lengths": ({"seq_lens": torch.Tensor.long}, "seq_lens is int64", "says int32: cast it"),
    "a table elsewhere": (
        {"block_table": lambda x: x.to("meta")},
        "q is on cpu but block_table is on meta",
        "put them on one device",
    ),
    "a NumPy table": (
        {"block_table": torch.Tensor.numpy},
        "q is a torch array but block_table is a numpy array",
        "one library",
    ),
    "a list of lengths": ({"seq_lens": [20, 33]}, "of type list", "pass an array, seq_lens[seqs]:int32"),
    "a flat table": ({"block_table": torch.Tensor.flatten}, "shape (8,)", "block_table[seqs max_pages]:int32"),
    "a flat cache": ({"k_cache": lambda x: x.flatten(0, 1)}, "shape (128, 2, 64)", "[pages page_size kv_heads dim]"),
    "q without heads": ({"q": lambda x: x.flatten(1)}, "shape (3, 512)", "q[tokens heads dim]"),
    "lengths for starts": ({"cu_seqlens_q": lambda x: x.diff()}, "shape (2,)", "cu_seqlens_q[seqs+1]"),
    "starts that do not end at tokens": (
        {"cu_seqlens_q": torch.tensor([0, 1, 2], dtype=torch.int32)},
        "cu_seqlens_q is [0, 1, 2]",
        "rise from 0 to tokens=3",
    ),
    "a length beyond the table": (
        {"seq_lens": torch.tensor([20, 65], dtype=torch.int32)},
        "seq_lens[1] is 65",
        "room for 4 pages of 16: widen it",
    ),
    "lengths without the new tokens": (
        {"seq_lens": torch.tensor([20, 1], dtype=torch.int32)},
        "seq_lens[1] is 1",
        "has 2 new tokens, which are keys too",
    ),
    "a page that is none": (
        {"block_table": lambda x: x + PAGES // 2},
        "block_table[1, 0] is 8",
        "the cache has pages 0 to 7",
    ),
    "a bound too low": ({"max_seqlen_k": 20}, "max_seqlen_k is 20", "the longest is 33"),
    "a window of one side": ({"window": 4}, "window is 4, of type int", "give a tuple of 2, like (-1, -1)"),
    "a scale that is a tensor": ({"scale": torch.tensor(0.125)}, "scale is tensor(0.1250)", "give a Python number"),
    "scales without a quantized cache": ({"k_scale": torch.ones(1)}, "k_scale is for int8 and FP8", "leave it out"),
}
WRITE = {
    "HND given as NHD": (HND, "k_cache has shape (8, 2, 16, 64)", "k_cache.transpose(1, 2) would fit"),
    "no slots": ({"slots": None}, "slots is missing", "pass an array, slots[tokens]:int64"),
    "too few slots": ({"slots": lambda x: x[:2]}, "slots has shape (2,)", "with tokens=3"),
    "int32 slots": ({"slots": torch.Tensor.int}, "slots is int32", "says int64: cast it"),
    "pages for slots": ({"slots": torch.tensor([1, 1, 2])}, "slot 1 is given to tokens [0, 1]", "a slot of its own"),
    "a slot past the end": ({"slots": torch.tensor([0, 1, 128])}, "slots[2] is 128", "slots 0 to 127, and -1 skips"),
    "values without a cache": ({"v_cache": None}, "v is given and v_cache is None", "give both, or neither"),
    "float64": ({"k": torch.Tensor.double}, "k is float64", "float32 or bfloat16 or float16: cast it"),
}


def paragraph(error):
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


@pytest.mark.parametrize(("change", "what", "remedy"), ATTENTION.values(), ids=ATTENTION)
def test_paged_attention(change, what, remedy):
    with pytest.raises(ValueError, match=r"^paged_attention: ") as error:
        llmkernels.paged_attention(**step(**change))
    assert what in paragraph(error)
    assert remedy in str(error.value)


@pytest.mark.parametrize(("change", "what", "remedy"), WRITE.values(), ids=WRITE)
def test_write_kv(change, what, remedy):
    with pytest.raises(ValueError, match=r"^write_kv: ") as error:
        llmkernels.write_kv(**write(**change))
    assert what in paragraph(error)
    assert remedy in str(error.value)


def jagged(x):
    return torch.nested.nested_tensor([x], layout=torch.jagged)


NO_PLAIN_MEMORY = {
    "sparse": (torch.Tensor.to_sparse, "x is a tensor of layout sparse_coo", "to_dense() makes it"),
    "nested": (jagged, "x is a nested tensor", "its values in one tensor"),
    "negated": (torch._neg_view, "x is a view that negates what lies in memory", "pass resolve_neg() of it"),
    "masked": (lambda x: np.ma.masked_array(x.numpy()), "x is a masked array", "pass filled() of it"),
    "reversed": (lambda x: x.numpy()[::-1], "x is an array of strides (-32, 4), in bytes", "numpy.ascontiguousarray"),
    "other bytes first": (lambda x: x.numpy().astype(">f4"), "x is >f4", "cast it"),
}


@pytest.mark.parametrize(("made", "what", "remedy"), NO_PLAIN_MEMORY.values(), ids=NO_PLAIN_MEMORY)
def test_arrays_that_are_no_plain_memory(made, what, remedy):
    """Kernels read what lies at the strides, and nothing else of an array."""
    x = made(torch.ones(4, 8))
    weight = np.ones(8, np.float32) if isinstance(x, np.ndarray) else torch.ones(8)
    with pytest.raises(ValueError, match=r"^rms_norm: ") as error:
        llmkernels.rms_norm(x, weight)
    assert what in paragraph(error)
    assert remedy in str(error.value)


def test_inside_a_transform_of_torch_func():
    with pytest.raises(ValueError, match=r"x is inside a transform of torch.func .* call it outside"):
        torch.func.vmap(lambda x: llmkernels.rms_norm(x, torch.ones(8)))(torch.ones(3, 4, 8))


def test_a_read_only_cache_of_numpy():
    call = {name: value.numpy() for name, value in write().items()}
    call["v_cache"].flags.writeable = False  # as a file mapped for reading is
    with pytest.raises(ValueError, match="write_kv: v_cache is read-only, and the call writes it; pass a copy"):
        llmkernels.write_kv(**call, backend="reference")


@pytest.mark.parametrize("compiled", [False, True])
def test_an_expanded_cache(compiled):
    call = write(k_cache=lambda cache: cache[:1].expand_as(cache))
    step = torch.compile(llmkernels.write_kv, fullgraph=True) if compiled else llmkernels.write_kv
    with pytest.raises(
        Exception, match="write_kv: k_cache is expanded, one element for several, and the call writes it"
    ):
        step(**call)


@pytest.mark.parametrize(
    ("eps", "remedy"),
    [
        (2**70, "a number that fits in 64 bits"),
        (math.nan, "a finite number"),
        (math.inf, "a finite number"),
        (-1e-6, "a number above 0"),
        (0, "a number above 0"),
    ],
)
def test_numbers_that_no_kernel_could_use(eps, remedy):
    with pytest.raises(ValueError, match=f"rms_norm: eps is {eps}.* give {remedy}"):
        llmkernels.rms_norm(torch.ones(4, 8), torch.ones(8), eps=eps)


def test_a_whole_number_where_a_float_is_usual():
    """jax takes Python integers for int32."""
    x, weight = torch.ones(4, 8), torch.ones(8)
    for backend in ("reference", "cpu", "vendor", "xla"):
        y = llmkernels.rms_norm(x, weight, eps=2**40, backend=backend)
        torch.testing.assert_close(y, torch.full_like(y, 2.0**-20))


@pytest.mark.parametrize("backend", ["reference", "cpu", "vendor", "xla"])
def test_a_group_far_beyond_the_row_is_the_row(backend):
    """Rows padded to the group would not fit into memory."""
    x = torch.randn(3, 100)
    got = llmkernels.quantize_activation(x, group=2**62, backend=backend)
    want = llmkernels.quantize_activation(x, backend=backend)
    assert all(map(torch.equal, got, want))


def test_the_calls_are_right_otherwise():
    llmkernels.write_kv(**write())
    right = step()
    other = right | {name: hnd(right[name]).transpose(1, 2) for name in HND}  # HND, declared as what it is
    assert torch.equal(llmkernels.paged_attention(**right), llmkernels.paged_attention(**other))


def test_an_argument_left_out():
    call = write()
    del call["slots"]
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'slots'"):
        llmkernels.write_kv(**call)
    with pytest.raises(ValueError, match=r"missing a required argument: 'slots'; call it as write_kv\(k, v, k_cache"):
        llmkernels.explain("write_kv", **call)


def test_a_weight_stored_the_other_way_round():
    with pytest.raises(ValueError, match=r"weight\.transpose\(0, 1\) would fit") as error:
        llmkernels.norm_linear_activation(torch.randn(3, 64), torch.randn(64, 32), norm="none")
    paragraph(error)


@pytest.mark.parametrize("op", ["rms_norm", "silu_and_mul", "paged_attention", "write_kv", "sample"])
def test_arrays_where_no_backend_computes(op):
    """As tensors on a GPU without a backend for it: `meta` is a device that none of ours has, on every machine.

    A backend that does not ask where its arrays lie would read their pointers.
    """
    calls = {
        "rms_norm": {"x": torch.ones(2, 8), "weight": torch.ones(8)},
        "silu_and_mul": {"x": torch.ones(2, 8)},
        "paged_attention": step(),
        "write_kv": write(),
        "sample": {"logits": torch.ones(2, 8), "uniform": torch.ones(2)},
    }
    away = {name: value.to("meta") for name, value in calls[op].items()}
    with llmkernels.use(policy="strict"), pytest.raises(llmkernels.Unsupported) as error:
        getattr(llmkernels, op)(**away)
    assert {reason.code for reasons in error.value.refusals.values() for reason in reasons} <= {
        "DEVICE",
        "NOT_BUILT",
        "ABSENT",
    }
    assert "on meta; computes on cpu; move the arrays to cpu" in str(error.value)
