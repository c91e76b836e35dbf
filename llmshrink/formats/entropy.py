"""Entropy coding of codes: fewer bits for those that are frequent.

Codes repeat nothing, so there is nothing to gain but from how often each stands there: Huffman's code, which zlib makes
of bytes if told to do nothing else (RFC 1951, section 3.2.7). That says something of codes as long as none crosses a
byte: as many whole codes as fit lie in each, one of 5 to 8 bits, two of 3 or 4, four of 2, eight of 1.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator

import torch
from torch import Tensor

from llmshrink.formats import bits as bitpack

CODEC = "huffman"  # of aligned codes, as zlib stores it (RFC 1950), with a checksum
MOST = 8  # bytes that a byte can stand for: no symbol takes less than a bit
CHUNK = 1 << 20  # codes that are looked at together: multiples of 32, whatever their bits, end with a word


def pack(plain: Tensor, bits: int) -> Tensor | None:
    """Entropy-code what `bits.pack_flat` made; the same bytes whatever the threads, with one version of zlib.

    Args:
        plain: uint8 [bytes], whole words of 32 bits.
        bits: of a code, 1 to 8.

    Returns:
        uint8 [fewer bytes], or None where they would be no fewer.
    """
    coder, packed = zlib.compressobj(memLevel=9, strategy=zlib.Z_HUFFMAN_ONLY), bytearray()
    for count, _, part in _stretches(len(plain), bits):
        packed += coder.compress(_align(plain[part].cpu().contiguous(), bits, count).numpy().data)
    packed += coder.flush()
    return torch.frombuffer(packed, dtype=torch.uint8) if len(packed) < len(plain) else None


def unpack(packed: Tensor, bits: int, size: int) -> Tensor:
    """The inverse of `pack`: uint8 [size], on the device of `packed`.

    Raises:
        ValueError: the bytes are damaged, or not of so many codes; no more than these are ever decoded.
    """
    whole = _aligned(size, bits)
    if len(packed) * MOST < whole:
        raise ValueError(f"{len(packed)} packed bytes cannot be {whole} bytes of codes")
    coder = zlib.decompressobj()
    try:
        found = bytearray(coder.decompress(packed.cpu().contiguous().numpy().data, whole + 1))
    except zlib.error as error:
        raise ValueError(f"packed codes are damaged: {error}") from None
    if len(found) != whole or not coder.eof or coder.unused_data:
        raise ValueError(f"packed codes are not those of {whole} bytes")
    aligned, plain = torch.frombuffer(found, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
    for count, place, part in _stretches(size, bits):
        plain[part] = _close_up(aligned[place], bits, count)
    return plain.to(packed.device)


def _align(plain: Tensor, bits: int, count: int) -> Tensor:
    """uint8 [bytes] of `count` codes -> uint8 [bytes], of which no code crosses any."""
    if 8 % bits == 0:
        return plain  # they are so already
    per = 8 // bits
    codes = torch.nn.functional.pad(bitpack.unpack_flat(plain, bits, count), (0, -count % per)).view(-1, per)
    return (codes << bits * torch.arange(per, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _close_up(aligned: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `_align`."""
    if 8 % bits == 0:
        return aligned
    codes = aligned[:, None] >> bits * torch.arange(8 // bits, dtype=torch.uint8) & (1 << bits) - 1
    return bitpack.pack_flat(codes.flatten()[:count], bits)


def _aligned(size: int, bits: int) -> int:
    """Bytes of the codes that `size` bytes hold, as many whole ones in each as fit."""
    return math.ceil(8 * size // bits / (8 // bits))


def _stretches(size: int, bits: int) -> Iterator[tuple[int, slice, slice]]:
    """Stretches of the codes in `size` bytes: how many there are, and where they lie, aligned and plain."""
    per, number = 8 // bits, 8 * size // bits
    for start in range(0, number, CHUNK):
        stop = min(start + CHUNK, number)
        end = size if stop == number else stop * bits // 8
        yield stop - start, slice(start // per, math.ceil(stop / per)), slice(start * bits // 8, end)
