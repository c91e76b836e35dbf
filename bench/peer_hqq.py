"""HQQ through its own library, what it makes written out dense so that one function scores all tools.

    cd ../shared/bench && PYTHON THIS_FILE MODEL OUT --bits 3 --group 128

PYTHON is that of an environment with torch, transformers and hqq. It prints its seconds, saving left out.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path.cwd()))  # the shared scripts: `common` below is one, hence imports after code

import json  # noqa: E402

import torch  # noqa: E402
from common import Stopwatch, arguments  # noqa: E402
from hqq.core.quantize import BaseQuantizeConfig, Quantizer  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402


def main() -> None:
    """Quantize and save."""
    args = arguments()
    torch.set_num_threads(args.threads)
    config = BaseQuantizeConfig(nbits=args.bits, group_size=args.group)["weight_quant_params"]
    with Stopwatch() as clock:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                codes, facts = Quantizer.quantize(
                    module.weight.data, device="cpu", compute_dtype=torch.float32, **config
                )
                module.weight.data = Quantizer.dequantize(codes, facts).view_as(module.weight).float()
    model.save_pretrained(args.out)
    print(json.dumps({"seconds": clock.seconds}))


if __name__ == "__main__":
    main()
