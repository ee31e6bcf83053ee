"""Every folder here is a backend.  The first in ORDER that takes a call answers it."""

ORDER = ("cpu", "triton", "vendor", "xla")
