"""What the files of this backend share."""

DEVICES = ("cpu", "cuda")


def refuse_device(x):
    """The refusal of arrays that torch's CPU and CUDA libraries do not reach."""
    if x.device.type not in DEVICES:
        yield "DEVICE", f"arrays are on {x.device.type}", f"move them to {' or '.join(DEVICES)}"


def on_host(x):
    """Whether a look at the values of x is free.  On a GPU it would stall the stream and break a CUDA graph."""
    return not x.is_cuda
