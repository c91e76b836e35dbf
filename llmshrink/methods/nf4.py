"""NF4: 16 levels at the quantiles of a normal distribution (Dettmers et al. 2023, arXiv 2305.14314), by bitsandbytes.

The matrix is cut into flat blocks; each block stores its largest magnitude as scale and 4-bit indices into a fixed
table. With double quantization the float32 scales are themselves stored as 8-bit indices into a second table.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from bitsandbytes.functional import get_4bit_type, quantize_4bit
from pydantic import Field
from torch import Tensor

from llmshrink.forms import Dense, Form, Layer, Quantized
from llmshrink.methods.base import Method, MethodConfig, Prepared, Task
from llmshrink.statistics import NoStatistic

NESTED_BLOCK = 256  # scales per second-level scale: fixed by bitsandbytes' readers
VECTOR = 16  # weights that its AVX-512 kernel reads at once


class BnbConfig(MethodConfig):
    """Settings of the 4-bit types of bitsandbytes."""

    bits: Literal[4] = Field(4, description="bits per weight")
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = Field(
        64, description="weights of the flattened matrix that share a scale"
    )
    double_quant: bool = Field(False, description="store the scales in 8 bits too")


class Nf4(Method[BnbConfig]):
    """NF4 codes, bit for bit those of bitsandbytes on a CPU."""

    task: ClassVar[Task] = "quantize"
    needs = NoStatistic
    baseline = None
    Config = BnbConfig
    kind: ClassVar[Literal["nf4", "fp4"]] = "nf4"

    def check(self, shape: tuple[int, int]) -> str | None:
        """Why a matrix [out, in] of this shape cannot be compressed, or None.

        bitsandbytes 0.50 on a processor with AVX-512 reads widths that are whole vectors row by row, and gives a block
        that goes on in the next row the wrong scale. No error is raised there, so it is refused here.
        """
        width, block = shape[1], self.config.block_size
        if width % block and width % VECTOR == 0:
            return (
                f"bitsandbytes misreads rows of {width} weights in blocks of {block}: choose a block_size that divides"
            )
        return None

    def compress(self, weight: Tensor, prepared: Prepared) -> Layer:
        """Quantize one matrix [out, in] in blocks of the flattened matrix."""
        packed, state = quantize_4bit(
            weight.contiguous(),
            blocksize=self.config.block_size,
            compress_statistics=self.config.double_quant,
            quant_type=self.kind,
        )
        pairs = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1)  # the high half comes first
        codes = pairs.flatten()[: weight.numel()].view(weight.shape)
        scale: Form = Dense(state.absmax)
        if self.config.double_quant:
            second = state.state2
            table = Dense(second.absmax)
            scale = Quantized(state.absmax, table, None, second.code, NESTED_BLOCK, 8, offset=state.offset)
        return Layer(Quantized(codes, scale, None, state.code, self.config.block_size, 4))

    def form(self, shape: tuple[int, int], dtype: torch.dtype) -> Layer:
        """The same structure on the `meta` device."""
        blocks = -(-shape[0] * shape[1] // self.config.block_size)
        scale: Form = Dense(torch.empty(blocks, device="meta"))
        if self.config.double_quant:
            table = Dense(torch.empty(-(-blocks // NESTED_BLOCK), device="meta"))
            indices = torch.empty(blocks, dtype=torch.uint8, device="meta")
            levels = torch.empty(256, device="meta")
            offset = torch.empty((), device="meta")
            scale = Quantized(indices, table, None, levels, NESTED_BLOCK, 8, offset=offset)
        codes = torch.empty(shape, dtype=torch.uint8, device="meta")
        levels = get_4bit_type(self.kind, device="cpu")  # real: a format tells the kinds apart by it
        return Layer(Quantized(codes, scale, None, levels, self.config.block_size, 4))


METHOD = Nf4
