"""An op as one compiled program over jax arrays: the Pallas kernel or plain XLA."""

from functools import cache, partial
from importlib import import_module, util
from itertools import count

import jax
import jax.numpy as jnp
from jax import lax

from . import emulated
from ._weight import Weight

PALLAS, PLAIN, EITHER = "Pallas", "plain XLA", "Pallas on a TPU, plain XLA elsewhere"
MOST_INTERPRETED = 100  # calls; each compiles 75 to 300 mappings of memory, and Linux gives a process 65530


@cache
def kernel(op):
    """The module tpu/<op>.py; None where there is none."""
    name = f"{__package__}.tpu.{op}"
    return import_module(name) if util.find_spec(name) else None


def refusals(op, *arrays, **options):
    """Why this backend does not take a call: under an emulation, what the Pallas kernel says; else there is no why."""
    if not emulated():
        return []
    if kernel(op) is None:
        return [("NOT_BUILT", f"there is no Pallas kernel of {op}", "leave --emulated out: plain XLA answers")]
    return [*kernel(op).takes(*map(_described, arrays), **{name: _described(x) for name, x in options.items()})]


def chosen(op, *arrays, **options):
    """Which program answers a call that is taken: PALLAS, PLAIN, or EITHER where a trace decides it later."""
    if emulated():
        return PALLAS
    given = [x for x in jax.tree.leaves([arrays, options]) if isinstance(x, jax.Array)]
    traced = any(isinstance(x, jax.core.Tracer) for x in given)
    if not given or kernel(op) is None or not (traced or _on_tpu(given[0])):
        return PLAIN
    if [*kernel(op).takes(*arrays, **options)] or not _pays(op, *arrays, **options):
        return PLAIN
    return EITHER if traced else PALLAS


def notes(op, call):
    """What `explain` tells of a call that is taken: which program answers, and the blocks of the Pallas kernel."""
    yield f"here: {chosen(op, **call)}"
    described = {name: _described(x) for name, x in call.items()}
    if kernel(op) is None:
        yield "on a TPU: plain XLA; there is no Pallas kernel of this op"
    elif refused := [*kernel(op).takes(**described)]:
        yield f"on a TPU: plain XLA; the Pallas kernel does not take it: {refused[0][1]}"
    elif not _pays(op, **described):
        yield "on a TPU: plain XLA, which does as well by itself for arrays of this size"
    else:
        yield f"on a TPU: Pallas, {kernel(op).plan(**described)}"


def _pays(op, *arrays, **options):
    """Whether the Pallas kernel is worth its launch, where XLA would fuse the op with others: its module says when."""
    return getattr(kernel(op), "pays", lambda *_, **__: True)(*arrays, **options)


class Program:
    """plain(*arrays, **options), compiled, and the Pallas kernel of the same name in its place where that applies.

    Arrays are jax arrays, Weights or None; options are Python values, and each combination of them is a program.
    """

    def __init__(self, plain):
        self.op, self.plain = plain.__module__.rpartition(".")[2], plain
        self.compiled = jax.jit(self._answer, static_argnames=("options", "which"))

    def __call__(self, *arrays, **options):
        which = chosen(self.op, *arrays, **options)
        if emulated():
            _make_room()
        named = {name: x for name, x in options.items() if isinstance(x, jax.Array | Weight)}
        fixed = tuple((n, tuple(x) if isinstance(x, list) else x) for n, x in options.items() if n not in named)
        return self.compiled(arrays, named, options=fixed, which=which)

    def _answer(self, arrays, named, *, options, which):
        plain = partial(_call, self.plain, dict(options))
        pallas = partial(_call, partial(_in_32_bits, getattr(kernel(self.op), "run", None)), dict(options))
        if which == EITHER:
            return lax.platform_dependent(arrays, named, tpu=pallas, default=plain)
        return (pallas if which == PALLAS else plain)(arrays, named)


_interpreted = count(1)


def _make_room():
    """Forget what was compiled, now and then: after hundreds of interpreted programs LLVM finds no memory."""
    if next(_interpreted) % MOST_INTERPRETED == 0:
        jax.clear_caches()


def _in_32_bits(run, *arrays, **options):
    """A Pallas kernel, traced without jax_enable_x64: TPUs count in 32 bits, and each Python int would be wider.

    Integers beyond become the nearest int32: outside of what anything indexes, as they were.
    """
    if not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        return run(*arrays, **options)
    arrays, options = jax.tree.map(_narrowed, (arrays, options))
    with jax.enable_x64(False):
        return run(*arrays, **options)


def _narrowed(x):
    if getattr(x, "dtype", None) != jnp.int64:
        return x
    bounds = jnp.iinfo(jnp.int32)
    return jnp.clip(x, bounds.min, bounds.max).astype(jnp.int32)


def _call(function, options, arrays, named):
    return function(*arrays, **named, **options)


def _on_tpu(array):
    return next(iter(array.devices())).platform == "tpu"


def _described(value):
    """Shapes and dtypes of what torch and jax pass, in jax's words; options as they are."""
    if hasattr(value, "scheme"):
        return Weight.of(value).map(_described)
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return jax.ShapeDtypeStruct(tuple(value.shape), str(value.dtype).rpartition(".")[2])
    return value
