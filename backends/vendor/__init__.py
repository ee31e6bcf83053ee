"""What the platform's own libraries offer through torch: SDPA, oneDNN, cuBLASLt, int4, int8 and FP8 products."""

ARRAYS = ("torch",)
NATIVE = True
EMULATION = None


def absent():
    try:
        import torch  # noqa: F401
    except ImportError:
        return "ABSENT", "torch is not installed", "pip install torch"
    return None
