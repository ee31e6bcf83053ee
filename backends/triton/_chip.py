"""The chip that a kernel is tiled for, as far as tiles depend on it."""

import functools
from typing import NamedTuple

import torch

from ._launch import INTERPRETED


class Chip(NamedTuple):
    """arch is 'sm_90', 'gfx942', ... or 'interpreter'; shared is the bytes of shared memory that a block may have."""

    arch: str
    processors: int
    shared: int

    @property
    def amd(self):
        return self.arch.startswith("gfx")

    @property
    def rdna(self):
        """AMD's waves of 32, whose matrix instructions want each operand twice in registers."""
        return self.arch.startswith(("gfx11", "gfx12"))

    @property
    def hopper(self):
        """Hopper or later: matrix instructions that read shared memory, and more than 200 KiB of it."""
        return self.arch.startswith(("sm_9", "sm_10"))

    @property
    def fp8(self):
        """Whether the chip itself converts e4m3fn and e5m2.  gfx942 knows only their fnuz cousins."""
        if self.amd:
            return self.arch.startswith(("gfx950", "gfx12"))
        return self.arch.startswith("sm_") and int(self.arch[3:]) >= 89


INTERPRETER = Chip("interpreter", 4, 1 << 30)


def chip_of(x):
    return INTERPRETER if INTERPRETED else _chip(x.device.index)


@functools.cache
def _chip(index):
    known = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch = known.gcnArchName.partition(":")[0]
        return Chip(arch, known.multi_processor_count, (160 if arch == "gfx950" else 64) << 10)
    arch = f"sm_{known.major}{known.minor}"
    return Chip(arch, known.multi_processor_count, known.shared_memory_per_block_optin)  # type: ignore[attr-defined]
