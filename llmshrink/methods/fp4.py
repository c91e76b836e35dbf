"""FP4: 16 levels of a float with two exponent bits and one mantissa bit, as bitsandbytes lays it out."""

from __future__ import annotations

from llmshrink.methods.nf4 import Nf4


class Fp4(Nf4):
    """FP4 codes, bit for bit those of bitsandbytes on a CPU."""

    kind = "fp4"


METHOD = Fp4
