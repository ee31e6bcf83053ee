"""Numbers of a TPU kernel: stored values made into what the matrix unit multiplies, and the product."""

import jax.numpy as jnp
from jax import lax

LANES = 128  # of a vector register
SUBLANES = 8  # of 32 bits each; two bfloat16 or four int8 lie in one
LARGEST = {jnp.dtype(jnp.int8): 127.0, jnp.dtype(jnp.float8_e4m3fn): 448.0, jnp.dtype(jnp.float8_e5m2): 57344.0}


def tile_rows(dtype):
    """Rows of a native tile: 8 of 32-bit numbers, 16 of bfloat16, 32 of bytes."""
    return SUBLANES * 4 // jnp.dtype(dtype).itemsize


def carried(x):
    """float16 as uint16, since no TPU loads it; everything else as it is."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.float16 else x


def restored(x, like):
    """What was carried, in the dtype of `like` again."""
    return lax.bitcast_convert_type(x, like.dtype) if like.dtype == jnp.float16 else x


def multiplied_as(dtype):
    """What a product of activations of this dtype is computed in."""
    return jnp.dtype(jnp.float32) if jnp.dtype(dtype) == jnp.float16 else jnp.dtype(dtype)


def converted(x, dtype):
    """`x` as bfloat16 or float32; uint16 holds the bits of a float16.  Exact, but for float32 as bfloat16."""
    if x.dtype == jnp.uint16:
        return half_as_float(x).astype(dtype)
    if x.dtype == dtype:
        return x
    if x.dtype.itemsize == 1 and dtype != jnp.float32:  # all compilers have bytes to float32
        return x.astype(jnp.float32).astype(dtype)
    return x.astype(dtype)


def half_as_float(bits):
    """The float16 with these bits, as float32.  The vector unit flushes subnormal numbers, so integers make them."""
    wide = bits.astype(jnp.int32)
    sign, magnitude = (wide & 0x8000) << 16, wide & 0x7FFF
    special = magnitude >= 0x7C00
    normal = lax.bitcast_convert_type(
        (magnitude << 13) + jnp.where(special, (255 - 31) << 23, (127 - 15) << 23), jnp.float32
    )
    small = magnitude.astype(jnp.float32) * 2.0**-24
    positive = jnp.where(magnitude < 0x0400, small, normal)
    return lax.bitcast_convert_type(lax.bitcast_convert_type(positive, jnp.int32) | sign, jnp.float32)


def rows_of_pages(pages, dtype):
    """[pages page_size dim] as stored -> [keys dim] in `dtype`; joined where a page is whole tiles: no move."""
    _, page_size, dim = pages.shape
    via = next((kind for kind in (pages.dtype, dtype) if page_size % tile_rows(kind) == 0), jnp.dtype(jnp.float32))
    if pages.dtype == jnp.uint16 and via == pages.dtype:
        via = jnp.dtype(jnp.float32)
    return converted(converted(pages, via).reshape(-1, dim), dtype)


def multiply(a, b, transposed=False):
    """a [m k] times b [k n], or times the transpose of b [n k].

    float32 [m n], of factors that are not rounded; int32 where both are int8.  Products of float32 are summed in runs
    of 128, of 64 where k is no multiple: a CPU that interprets adds all k one after the other, and 256 lose a bit more.
    It costs a TPU nothing; runs of 64 everywhere would spill.
    """
    total = jnp.int32 if a.dtype == jnp.int8 else jnp.float32
    contract = (((1,), (1 if transposed else 0,)), ((), ()))
    if a.dtype != jnp.float32:
        return lax.dot_general(a, b, contract, preferred_element_type=total)
    k = a.shape[1]
    run = LANES if k % LANES == 0 else LANES // 2
    sums = [
        lax.dot_general(
            a[:, at : at + run], b[:, at : at + run] if transposed else b[at : at + run], contract,
            precision=lax.Precision.HIGHEST, preferred_element_type=total,
        )
        for at in range(0, max(k, 1), run)
    ]  # fmt: skip
    return sum(sums[1:], sums[0])


def cleared(values, kept):
    """`values` where kept, else zeros; bytes are selected as 32 bits, which every generation has."""
    if values.dtype.itemsize == 4:
        return jnp.where(kept, values, jnp.zeros_like(values))
    if values.dtype in (jnp.int8, jnp.uint16):
        return jnp.where(kept, values.astype(jnp.int32), 0).astype(values.dtype)
    return jnp.where(kept, values.astype(jnp.float32), 0.0).astype(values.dtype)
