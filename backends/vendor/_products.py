r"""x @ wT for dense and quantized weights: which of torch's kernels answers which shape.

Times of a 4096 x 4096 weight on one thread of an EPYC 7003, which has AVX2 and no AVX-512, in ms, at 1, 4, 16, 64 rows:

    F.linear in bfloat16                     3.2   12.6    49    195
    converted to float32 in cache, sgemm     4.2    9.2    14     32
    int8 codes, the same                     3.1    8.1    13     33     1.5 more with a scale for 128 columns
    _weight_int4pack_mm_for_cpu, bfloat16    2.5    4.5    19     75     36 at one row in float32, 40 in float16
    _weight_int8pack_mm, bfloat16            2.0    3.6    19     65     16 at one row in float32, 19 in float16
    torch._int_mm                             12     46   218    817
    torch._scaled_mm                         192           225

the first of them by

    python -m timeit -s "import torch; torch.set_num_threads(1); x = torch.randn(1, 4096).bfloat16()" \
        -s "w = torch.randn(4096, 4096).bfloat16()" "torch.nn.functional.linear(x, w)"

and so on.  So half precision is converted a piece at a time, unless the CPU multiplies bfloat16 itself.
"""

import math

import torch
from torch.nn.functional import linear

from . import _common
from ._codes import Codes, codes, int4_kernel, kept
from ._rounding import DTYPES, rounded

PIECE = 1 << 19  # elements converted at a time: 2 MB of float32, which stay in the cache

_CAPABILITY = torch.backends.cpu.get_cpu_capability()
CPU_BFLOAT16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
CPU_INT8 = torch.cpu._is_vnni_supported()  # without VNNI, oneDNN's int8 kernels saturate: errors of 20 %
FEW_DENSE_ROWS = 2
FEW_ROWS_CUDA = 64
FEW_ROWS = math.inf if _CAPABILITY.startswith("AVX512") else 8 if _CAPABILITY == "AVX2" else 0


def dense(x, weight, dtype):
    """x [rows, in] @ weight[out, in]T, computed in `dtype` where the hardware multiplies that.

    In float32, or in the dtype of the weight where the kernel that multiplies it rounds to that.
    """
    if not _common.on_host(x):
        x, weight = x.to(dtype), weight.to(dtype)
        return linear(x, weight) if dtype == torch.float32 else torch.mm(x, weight.t(), out_dtype=torch.float32)
    if weight.dtype == torch.float32:
        return linear(x.float(), weight)
    if x.shape[0] <= FEW_DENSE_ROWS or (weight.dtype == torch.bfloat16 and CPU_BFLOAT16):
        return linear(x.to(weight.dtype), weight)
    return _converted(x.float(), Codes(weight))


def quantized(x, weight, dtype):
    """x [rows, in] @ weightT in float32 for a QuantizedWeight; its scheme may round x first.  Sizes are not 0."""
    scheme = weight.scheme
    if weight.permutation is not None:
        x = x.index_select(1, weight.permutation)
    if scheme.activation is None:
        return _few_rows(x, weight) if _wants_few_rows(x, weight, dtype) else _times(x, codes(weight), dtype)
    values, scales = rounded(
        x.float().contiguous(), DTYPES[scheme.activation], scheme.activation_group, weight.input_scale
    )
    if scheme.activation_group:
        spread = scales.repeat_interleave(scheme.activation_group, 1)[:, : values.shape[1]]
        return _times(values.float().mul_(spread), codes(weight), dtype)
    if scheme.group:
        return _by_group(values.float(), codes(weight)).mul_(scales)
    return _eight_bits(values, weight, dtype).mul_(scales)


def _wants_few_rows(x, weight, dtype):
    if dtype != torch.bfloat16 or x.shape[0] > (FEW_ROWS if _common.on_host(x) else FEW_ROWS_CUDA):
        return False
    scheme, (out, columns) = weight.scheme, weight.shape
    if scheme.weight == "int8":  # on CPU, its kernel reads past the end of rows of other lengths
        plain = scheme.symmetric and not scheme.group and _common.on_host(x)
        return plain and out % 16 == 0 and columns % 64 == 0
    # With zero points it adds (8 - zero) * scale, rounded to bfloat16, to (q - 8) * scale: where outliers push q to the
    # zero point, y is off by 2.4e-2 of its row's largest value, three times the tolerance.
    # On CUDA it rounds scale * (q - 8) to bfloat16, which averages out over a row and does not in a sum of one.
    return scheme.weight == "int4" and scheme.symmetric and (_common.on_host(x) or columns >= 32)


def _few_rows(x, weight):
    """torch's kernels for bfloat16 activations and integer weights; they round their result to bfloat16."""
    x = x.bfloat16().contiguous()
    if weight.scheme.weight == "int8":
        scales = kept(weight, "int8", lambda weight: weight.scales.flatten().bfloat16())
        return torch.ops.aten._weight_int8pack_mm(x, weight.values.contiguous(), scales).float()
    packed, group, both = int4_kernel(weight)
    kernel = torch.ops.aten._weight_int4pack_mm_for_cpu if _common.on_host(x) else torch.ops.aten._weight_int4pack_mm
    x = torch.nn.functional.pad(x, (0, both.shape[0] * group - x.shape[1]))
    return kernel(x, packed, group, both)[:, : weight.shape[0]].float()


def _eight_bits(values, weight, dtype):
    """values [rows, in], int8 or e4m3, times the weight."""
    rows, (out, columns) = values.shape[0], weight.shape
    plain = weight.scheme.symmetric and weight.scheme.weight != "int4"
    row_scales = weight.scales.float().flatten()
    whole = columns % 16 == 0 and out % 16 == 0  # what cuBLASLt takes
    if plain and values.dtype == torch.int8:
        if not _common.on_host(values) and whole:
            padded = torch.nn.functional.pad(values, (0, 0, 0, max(0, 32 - rows)))  # and more than 16 rows
            return torch._int_mm(padded, weight.values.contiguous().t())[:rows].float().mul_(row_scales)
        if _common.on_host(values) and CPU_INT8:
            return _onednn(values, weight).mul_(row_scales)
    elif plain and not _common.on_host(values) and whole and dtype == torch.bfloat16 and _has_fp8(values):
        one = torch.ones((), device=values.device)  # Hopper's FP8 sums are too coarse for wider outputs
        product = torch._scaled_mm(values, weight.values.contiguous().t(), one, one, out_dtype=torch.float32)
        return product.mul_(row_scales)
    return _times(values.float(), codes(weight), dtype)


def _onednn(values, weight):
    """The integer product, through oneDNN: x is shifted to unsigned, and oneDNN takes the shift out again."""
    packed, ones, zeros = kept(weight, "onednn", _for_onednn)
    shifted = (values.short() + 128).to(torch.uint8)
    return torch.ops.onednn.qlinear_pointwise(
        shifted, 1.0, 128, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def _for_onednn(weight):
    out = weight.shape[0]
    return (
        torch.ops.onednn.qlinear_prepack(weight.values.contiguous(), None),
        torch.ones(out),
        torch.zeros(out, dtype=torch.int64),
    )


def _has_fp8(x):
    return torch.cuda.get_device_capability(x.device) >= (8, 9)


def _by_group(x, weight):
    """Integers x [rows, in] times Codes: the products of a group are exact in float32, then its scale is applied."""
    values, scales, group = weight
    x = torch.nn.functional.pad(x, (0, values.shape[1] - x.shape[1])).unflatten(1, (-1, group)).transpose(0, 1)
    y = torch.empty(x.shape[1], values.shape[0], device=x.device)
    step = max(16, PIECE // max(values.shape[1], x.shape[0] * x.shape[1]))
    for begin in range(0, values.shape[0], step):
        rows = slice(begin, begin + step)
        piece = values[rows].float().unflatten(1, (-1, group)).permute(1, 2, 0)  # [groups, group, out]
        y[:, rows] = torch.bmm(x, piece).mul_(scales[rows].t()[:, None]).sum(0)
    return y


def _times(x, weight, dtype):
    """x [rows, in] times Codes."""
    if _common.on_host(x):
        return _converted(x.float(), weight)
    values, scales, group = weight
    if group:
        values = (values.float().unflatten(1, (-1, group)) * scales[..., None]).flatten(1)[:, : x.shape[1]]
    y = dense(x, values.to(dtype), dtype)
    return y if group else y.mul_(scales.flatten())


def _converted(x, weight):
    """x float32 times Codes on CPU, converted to float32 a piece at a time."""
    values, scales, group = weight
    out, columns = values.shape
    step = max(16, PIECE // columns)
    if out <= step and not group:
        y = linear(x, values.float())
        return y if scales is None else y.mul_(scales.flatten())
    y = torch.empty(x.shape[0], out)
    buffer = torch.empty(min(step, out), columns)
    for begin in range(0, out, step):
        rows = slice(begin, min(begin + step, out))
        piece = buffer[: rows.stop - begin].copy_(values[rows])
        if group:
            piece.view(piece.shape[0], -1, group).mul_(scales[rows, :, None])
        y[:, rows] = linear(x, piece[:, : x.shape[1]])
    return y if group or scales is None else y.mul_(scales.flatten())
