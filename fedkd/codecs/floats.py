"""IEEE floats of 2, 4 and 8 bytes, little-endian.

float16 reaches 65504 and no further. A larger value is refused by name rather than clipped or scaled:
clipping would be silent damage, and a scale per tensor would make one outlier erase the rest. Ask for float32
where it happens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor

from fedkd.codecs.base import Coder, Stream, Symbols
from fedkd.payloads import PayloadError

_TORCH = {2: torch.float16, 4: torch.float32, 8: torch.float64}
_EXPONENT = {2: 0x7C00, 4: 0x7F800000, 8: 0x7FF0000000000000}
_EXACT = {
    2: (torch.float16,),
    4: (torch.float16, torch.bfloat16, torch.float32),
    8: (torch.float16, torch.bfloat16, torch.float32, torch.float64),
}


@final
class FloatCoder(Coder):
    """One symbol per value: the bits of its IEEE representation. Decodes to float32, or float64 from 8
    bytes."""

    def __init__(self, size: int) -> None:
        self.wire = f"f{size}"
        self.size = size

    def exact_for(self, dtype: torch.dtype) -> bool:
        """Tell whether every value of ``dtype`` has the same value here."""
        return dtype in _EXACT[self.size]

    def streams(self, shape: tuple[int, ...]) -> tuple[Stream, ...]:
        count = 1
        for size in shape:
            count *= size
        return (Stream(count, 1 << (8 * self.size), np.dtype(f"<u{self.size}"), 8 * self.size),)

    def to_symbols(self, name: str, value: Tensor) -> tuple[Symbols, ...]:
        value = value.detach()
        bits = value.to(device="cpu", dtype=_TORCH[self.size]).numpy().reshape(-1).view(f"<u{self.size}")
        # Non-finite values have all bits of the exponent set; integer arithmetic beats isfinite on float16.
        if bits.size and (bits & _EXPONENT[self.size]).max() == _EXPONENT[self.size]:
            self._refuse(name, value)
        return (bits,)

    def _refuse(self, name: str, value: Tensor) -> None:
        if not bool(torch.isfinite(value).all()):
            raise PayloadError("finite", f"{name}: NaN or infinity, expected finite numbers to send")
        most = float(value.abs().max())
        raise PayloadError(
            "range", f"{name}: magnitude {most:.3g} does not fit float{8 * self.size}; use a wider codec"
        )

    def from_symbols(self, name: str, symbols: Sequence[Symbols], shape: tuple[int, ...]) -> Tensor:
        value = torch.from_numpy(symbols[0].view(f"f{self.size}")).reshape(shape)
        return value if self.size > 2 else value.float()
