"""The template of a backend: two ops in NumPy, for NumPy arrays and for torch tensors on the CPU."""

ARRAYS = ("numpy", "torch")  # whose arrays it takes
DEVICES = ("cpu",)  # on which kinds of device torch tensors may lie; leave it out where refuse() decides
NATIVE = False  # nothing here is compiled, so nothing is checked at first use
EMULATION = None  # there is no other machine to stand in for


def absent():
    """Why this machine cannot use the backend, as (code, reason, fix); None when it can."""
    try:
        import numpy  # noqa: F401
    except ImportError:
        return "ABSENT", "NumPy is not installed", "pip install numpy"
    return None
