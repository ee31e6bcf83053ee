"""Between the caller's arrays and NumPy's.  A name that begins with _ is not taken for an op."""

import numpy as np

DTYPES = ("float32", "float16")


def reasons(**arrays):
    """What NumPy cannot take, as refusals: bfloat16."""
    for name, array in arrays.items():
        dtype = str(array.dtype).rpartition(".")[2]
        if dtype not in DTYPES:
            yield "DTYPE", f"{name} is {dtype}; takes {' and '.join(DTYPES)}", f"cast {name} to float32"


def wide(array):
    """The values in float32, which every kernel here computes in."""
    return np.asarray(array, dtype=np.float32)


def like(values, array):
    """`values` rounded once to the dtype of `array`, as an array of its library."""
    if isinstance(array, np.ndarray):
        return values.astype(array.dtype)
    import torch

    return torch.from_numpy(np.ascontiguousarray(values)).to(array.dtype)
