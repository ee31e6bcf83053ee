"""Small calls of the Pallas kernels, interpreted: what test_pallas.py and pallas_faults.py run.

    python tests/pallas_calls.py          one line a call and mode: what is wrong, or nothing

The interpreter simulates copies and semaphores.  Copies that happen at once show races; copies that happen as late as
they may, at the wait for them, show a missing wait, because what nobody wrote is NaN.  A wait too many never ends, so
callers set a time limit.
"""

import json
import os
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from unittest import mock

import numpy as np

MODES = ("eager", "on_wait")
PAGE, PAGES, KV_HEADS, GROUP, DIM = 8, 8, 2, 2, 128
# name -> (new tokens, keys, dtype of the cache, options)
CALLS = {
    "decode": ((1, 1), (37, 16), "float32", {}),
    "mixed": ((1, 9), (33, 9), "float32", {"return_lse": True}),
    # a tile of queries 45 to 48, blocks of keys 16 to 31 and 32 to 47: some rows see all of each block, and some do not
    "window": ((5,), (50,), "float32", {"window": (29, 0)}),
    "int8 cache": ((1, 1), (37, 24), "int8", {"scales": True}),
    "a step that writes": ((1, 1, 1), (37, 16, 9), "float32", {"writes": True}),
}


def main(names):
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(Path(__file__).parents[1]))
    print(json.dumps({f"{name}, {mode}": complaint(name, mode) for name in names or CALLS for mode in MODES}))


def complaint(name, mode, rows=None):
    """What is wrong with a call, or None.  rows: block tables as they are not, to plant a page that does not exist."""
    import jax.numpy as jnp
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call
    from jax.experimental.pallas import tpu as pltpu
    from llmkernels.backends.xla.tpu import _attention, _tiles

    new, lengths, stored, options = CALLS[name]
    arrays = made(new, lengths, stored)
    if rows:
        arrays["block_table"] = arrays["block_table"].copy()
        arrays["block_table"][0, 0] = rows
    scales = arrays.pop("scales") if options.get("scales") else {}
    asked = {key: value for key, value in options.items() if key not in ("scales", "writes")}
    size = max(1, min(4, max(new)))
    tiles = _tiles.Tiles(
        size, 8 * -(-size * GROUP // 8), 2, 1 if size > 1 else 2, 8 * -(-size * GROUP // 8), PAGE, size == 1, 0, 0
    )
    params = pltpu.InterpretParams(
        dma_execution_mode=mode, uninitialized_memory="nan", detect_races=mode == "eager", out_of_bounds_reads="raise"
    )
    before = arrays
    if options.get("writes"):
        before, asked["new"] = without_last(arrays)
    given = {key: jnp.asarray(before[key]) for key in ("q", "k_pages", "v_pages", "block_table", "seq_lens", "starts")}
    try:
        out, _, *pages = _attention.attend(
            *given.values(), scale=DIM**-0.5, tiles=tiles, interpret=params,
            **asked, **{key: jnp.asarray(value) for key, value in scales.items()},
        )  # fmt: skip
        out = np.asarray(out)
    except Exception as error:  # whatever the interpreter says of a copy is what it noticed
        raised = f"{type(error).__name__}: {' '.join(str(error).split())[-200:]}"
        return raised
    if mode == "eager" and interpret_pallas_call.races.races_found:
        return "a race"
    for name, written in zip(("k_pages", "v_pages"), pages, strict=False):
        if not np.array_equal(np.asarray(written), arrays[name], equal_nan=True):
            return f"{name} are not what was written"
    want = expected(arrays, scales, new, lengths, asked.get("window", (-1, -1))[0])
    error = float(np.abs(out - want).max())
    return None if error < 1e-5 else f"off by {error}"


def made(new, lengths, stored):
    """Arrays of a call: pages at random, NaN in slots past the end, unused table entries that point nowhere."""
    rng = np.random.default_rng(0)
    pages = sum(-(-n // PAGE) for n in lengths) + 1
    table, order = np.full((len(new), PAGES), 10**6, np.int32), iter(rng.permutation(pages))
    live = np.zeros((pages, PAGE), bool)
    for s, keys in enumerate(lengths):
        for i in range(-(-keys // PAGE)):
            table[s, i] = next(order)
            live[table[s, i]] = np.arange(i * PAGE, (i + 1) * PAGE) < keys
    shape = (pages, KV_HEADS, PAGE, DIM)
    caches = {}
    for name in ("k_pages", "v_pages"):
        values = rng.standard_normal(shape).astype(np.float32)
        caches[name] = (40 * values).round().clip(-127, 127).astype(np.int8) if stored == "int8" else values
        if stored != "int8":
            caches[name][~np.broadcast_to(live[:, None, :, None], shape)] = np.nan
    q = rng.standard_normal((sum(new), KV_HEADS * GROUP, DIM)).astype(np.float32)
    scales = {name: rng.uniform(0.01, 0.04, KV_HEADS).astype(np.float32) for name in ("k_scale", "v_scale")}
    lens, starts = np.array(lengths, np.int32), np.cumsum([0, *new], dtype=np.int32)
    return {"q": q, **caches, "block_table": table, "seq_lens": lens, "starts": starts, "scales": scales}


def without_last(arrays):
    """(the arrays with NaN where the last key and value of each sequence lie, those keys and values)."""
    at = arrays["seq_lens"] - 1
    pages, slots = arrays["block_table"][np.arange(len(at)), at // PAGE], at % PAGE
    before, new = dict(arrays), []
    for name in ("k_pages", "v_pages"):
        new.append(arrays[name][pages, :, slots])
        before[name] = arrays[name].copy()
        before[name][pages, :, slots] = np.nan
    return before, new


def expected(arrays, scales, new, lengths, left):
    """The same in float64, one query at a time."""
    out, row = [], 0
    scale = {name: scales.get(f"{name}_scale", np.ones(KV_HEADS))[:, None, None] for name in "kv"}
    for s, (count, keys) in enumerate(zip(new, lengths, strict=True)):
        pages = arrays["block_table"][s, : -(-keys // PAGE)] % arrays["k_pages"].shape[0]
        k, v = (
            arrays[f"{n}_pages"][pages].astype(np.float64).swapaxes(0, 1).reshape(KV_HEADS, -1, DIM) * scale[n]
            for n in "kv"
        )
        for i in range(count):
            at = keys - count + i
            seen = slice(max(0, at - left) if left >= 0 else 0, at + 1)
            q = arrays["q"][row].astype(np.float64).reshape(KV_HEADS, GROUP, DIM)
            scores = np.einsum("hgd,hkd->hgk", q, k[:, seen]) * DIM**-0.5
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            out.append(np.einsum("hgk,hkd->hgd", weights, v[:, seen]).reshape(-1, DIM))
            row += 1
    return np.stack(out)


def product_like(like, op, scheme, sizes):
    """Parity of a product that is interpreted as it would run on a chip, in a shape that nobody else compiled."""
    from llmkernels import testing
    from llmkernels.contract import Case
    from llmkernels.discovery import emulated
    from llmkernels.registry import OPS

    linear, chips = (import_module(f"llmkernels.backends.xla.tpu.{name}") for name in ("_linear", "_chips"))
    taken = {
        name: getattr(chips.CHIPS[like], name) for name in ("matrix", "longest", "features", "runs", "byte_to", "fp8")
    }
    chip = replace(chips.INTERPRETER, **taken)
    features = "out" if "out" in sizes else "features"
    unique = sizes[features] + 128 * (1 + list(chips.CHIPS).index(like))
    case = Case("a chip's", {"scheme": scheme, "bias": True, **sizes, features: unique})
    with mock.patch.object(linear, "current", return_value=chip), emulated("xla"):
        return testing.check(OPS[op].contract, "bfloat16", case, "xla")


if __name__ == "__main__":
    main(sys.argv[1:])
