"""How small numbers are written: two 4-bit codes a byte, e2m1, powers of two."""

import torch

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the value of codes 0 to 7; bit 3 is the sign
E8M0_BIAS = 127
E8M0_NAN = 255


def pack(codes: torch.Tensor) -> torch.Tensor:
    """codes[out in], each 0 to 15, as uint8[out ceil(in/2)]: the even column in the low nibble, 0 behind an odd end."""
    codes = torch.nn.functional.pad(codes.to(torch.uint8), (0, codes.shape[1] % 2))
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpack(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """What `pack` packed: uint8[out columns], each 0 to 15."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(1)[:, :columns]


def e2m1_codes(x: torch.Tensor) -> torch.Tensor:
    """The code of the e2m1 number nearest to x, ties to the even code; what lies beyond 6 becomes 6."""
    grid = torch.tensor(E2M1, dtype=x.dtype, device=x.device)
    middles, size = (grid[:-1] + grid[1:]) / 2, x.abs().contiguous()
    below, above = torch.bucketize(size, middles), torch.bucketize(size, middles, right=True)  # differ in ties
    return torch.where(below % 2 == 0, below, above) + 8 * torch.signbit(x)


def e2m1_values(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers that e2m1 codes stand for."""
    grid = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=dtype, device=codes.device)
    return grid[codes.long()]


def e8m0_values(exponents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """2 ** (exponent - 127), exact down to 2 ** -127, which is subnormal in float32."""
    return torch.exp2(exponents.double() - E8M0_BIAS).to(dtype)
