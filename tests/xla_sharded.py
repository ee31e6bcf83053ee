"""Run with eight simulated devices: attention over heads, products over columns and over rows, under shard_map."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import PartitionSpec as P

from llmkernels import jax_api
from llmkernels.quant import quantize

assert len(jax.devices()) == 8, "set XLA_FLAGS=--xla_force_host_platform_device_count=8"
MESH = jax.make_mesh((8,), ("chips",), axis_types=(jax.sharding.AxisType.Auto,))


def over(specs, out):
    return partial(jax.shard_map, mesh=MESH, in_specs=specs, out_specs=out, check_vma=False)


def same(name, sharded, single):
    np.testing.assert_allclose(np.asarray(sharded), np.asarray(single), rtol=2e-5, atol=2e-5)
    assert len(sharded.devices()) == 8
    print(name)


rng = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(rng.standard_normal(shape), "float32")


q, k, v = draw(7, 16, 64), draw(12, 16, 8, 64), draw(12, 16, 8, 64)
table = jnp.asarray(rng.permutation(12)[:9].reshape(3, 3), "int32")
lengths, starts = jnp.array([40, 17, 5], "int32"), jnp.array([0, 1, 5, 7], "int32")
heads, pages = P(None, "chips", None), P(None, None, "chips", None)
attend = partial(jax_api.paged_attention, backend="xla", window=(30, -1))
sharded = jax.jit(over((heads, pages, pages, P(), P(), P()), heads)(attend))
same("paged_attention", sharded(q, k, v, table, lengths, starts), attend(q, k, v, table, lengths, starts))

x, weight, gain = draw(5, 256), draw(64, 256), draw(256)
product = partial(jax_api.norm_linear_activation, backend="xla", activation="silu")
columns = over((P(), P("chips", None), P()), P(None, "chips"))
sharded = jax.jit(columns(lambda x, weight, gain: product(x, weight, norm_weight=gain)))
same("norm_linear_activation", sharded(x, weight, gain), product(x, weight, norm_weight=gain))

quantized = quantize(torch.from_numpy(np.array(weight)), "w4a16_g32_zp").map(lambda part: jnp.asarray(part.numpy()))
multiply = partial(jax_api.quantized_gemm, backend="xla")
sharded = jax.jit(columns(lambda x, weight, _: multiply(x, weight)))
same("quantized_gemm", sharded(x, quantized, gain), multiply(x, quantized))
