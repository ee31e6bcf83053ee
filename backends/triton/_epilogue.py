"""What follows a product: row factors, bias, activation, gate, store.  Parts of the kernels in _product.py."""

import triton
import triton.language as tl


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    """ACTIVATION of z, float32; of the gate, where it is a gated one."""
    if ACTIVATION == "silu" or ACTIVATION == "swiglu":
        z = z / (1.0 + tl.exp(-z))
    elif ACTIVATION == "gelu" or ACTIVATION == "geglu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        z = z / (1.0 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
    elif ACTIVATION == "relu":
        z = tl.where(z < 0.0, 0.0, z)  # a NaN stays one
    return z


@triton.jit
def finished(
    z, bias, feature, features,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """act(z + bias) for a tile z [BLOCK_M, BLOCK_N] of float32, of the `feature`s that features_of told.

    Where GATED, the first half of the tile's columns are gates and the second what they gate, and what comes is half.
    """
    if bias is not None:
        z += tl.load(bias + feature, mask=feature < features, other=0.0).to(tl.float32)[None, :]
    if GATED:
        gate, value = tl.split(tl.permute(tl.reshape(z, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        z = activated(gate, ACTIVATION) * value
    else:
        z = activated(z, ACTIVATION)
    return z


@triton.jit
def store(z, y, row, tile, rows, features, GATED: tl.constexpr, BLOCK_N: tl.constexpr):
    """What is `finished` to y [rows, features, or half of them where GATED], contiguous."""
    WIDE: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    width = features // 2 if GATED else features
    column = tile * WIDE + tl.arange(0, WIDE)  # half of `feature`, but seen to be contiguous
    at = y + row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(at, z.to(y.dtype.element_ty), mask=(row < rows)[:, None] & (column < width)[None, :])


@triton.jit
def features_of(tile, features, GATED: tl.constexpr, BLOCK_N: tl.constexpr):
    """The rows of the weight that a tile of outputs needs; at least `features` where there is none.

    Where GATED, the weight's rows are gates [0 .. features / 2) and then what they gate: half a tile of each.
    """
    index = tl.arange(0, BLOCK_N)
    feature = tile * BLOCK_N + index
    if GATED:
        half = features // 2
        gate = tile * (BLOCK_N // 2) + index % (BLOCK_N // 2)
        feature = tl.where(gate < half, gate + index // (BLOCK_N // 2) * half, features)
    return feature
