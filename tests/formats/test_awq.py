"""AWQ files against a decoder written from the layout's description."""

from __future__ import annotations

import pytest
import torch

from llmshrink.formats import load_format
from llmshrink.formats.base import Slot
from llmshrink.forms import Dense, Layer, Quantized, decode

OUT, IN, GROUP = 48, 64, 32
FORMAT = load_format("awq")
SLOT = Slot("a.b.weight", "a.b", (OUT, IN), torch.bfloat16)


def layer(symmetric: bool) -> Layer:
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (OUT, IN), generator=draw, dtype=torch.int8)
    scale = torch.randn(OUT, IN // GROUP, generator=draw).half()
    zero = None if symmetric else torch.randint(-8, 8, (OUT, IN // GROUP), generator=draw, dtype=torch.int8)
    return Layer(Quantized(codes, Dense(scale), zero, None, (1, GROUP), 4))


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_file_says_what_the_form_says(symmetric: bool) -> None:
    made = layer(symmetric)
    packed = FORMAT.pack(SLOT, made)
    qweight, qzeros, scales = (packed[f"a.b.{n}"].tolist() for n in ("qweight", "qzeros", "scales"))
    place = {output: nibble for nibble, output in enumerate([0, 2, 4, 6, 1, 3, 5, 7])}
    found = torch.empty(OUT, IN)
    for o in range(OUT):
        for i in range(IN):
            group, shift = i // GROUP, 4 * place[o % 8]
            code, zero = qweight[i][o // 8] >> shift & 15, qzeros[group][o // 8] >> shift & 15
            found[o, i] = scales[group][o] * (code - zero)
    assert torch.equal(found, decode(made.weight))
    assert packed["a.b.qweight"].shape == (IN, OUT // 8) and packed["a.b.qzeros"].shape == (IN // GROUP, OUT // 8)


def test_what_does_not_fit_is_refused() -> None:
    made = layer(symmetric=True)
    assert isinstance(made.weight, Quantized)
    three = Layer(Quantized(made.weight.codes, made.weight.scale, None, None, (1, GROUP), 3))
    assert "4-bit" in (FORMAT.check(SLOT, three) or "")
    assert "outputs" in (FORMAT.check(Slot("a.weight", "a", (44, IN), torch.half), made) or "")
    whole = Layer(Quantized(made.weight.codes, made.weight.scale, None, None, (1, IN), 4))
    assert "one scheme" in (FORMAT.check_all([(SLOT, made), (SLOT, whole)], []) or "")
    assert "gemv" in (FORMAT.cannot_read({"quant_method": "awq", "version": "gemv"}) or "")
