"""What plain transformers with gptqmodel makes of folders: runs in the readers' environment, without llmshrink.

    python read.py WORK

WORK/requests.json is a list of {"folder": path, "tokens": rows of ids, "dtype": name}. Of number i of them come
WORK/<i>.json ("misplaced": keys that did not fit; "error": what stopped it, or null) and WORK/<i>.safetensors: under
the name of each quantized module the matrix [out, in] that it computes with, and `logits` float32 [rows, T, V].
"""

import json
import sys
import traceback
from pathlib import Path

import torch
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def main(work: Path) -> None:
    for number, request in enumerate(json.loads((work / "requests.json").read_text())):
        found, tensors = {"misplaced": [], "error": None}, {}
        try:
            read(found, tensors, **request)
        except Exception:  # the other folders are read all the same
            found["error"] = traceback.format_exc()
        save_file(tensors, work / f"{number}.safetensors")
        (work / f"{number}.json").write_text(json.dumps(found))


@torch.inference_mode()
def read(found: dict, tensors: dict, folder: str, tokens: list, dtype: str) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map="cpu", local_files_only=True, output_loading_info=True
    )
    found["misplaced"] = [str(key) for kind in ("missing", "unexpected", "mismatched") for key in info[f"{kind}_keys"]]
    for name, module in model.eval().named_modules():
        if isinstance(module, BaseQuantLinear):
            tensors[name] = weight(module)
    tensors["logits"] = model(torch.tensor(tokens), use_cache=False).logits.float()


def weight(module: BaseQuantLinear) -> torch.Tensor:
    """The matrix [out, in], decoded by the library before its first forward pass packs it anew."""
    if hasattr(module, "dequantize_weight"):
        return module.dequantize_weight().T.contiguous()
    parts = module.qweight, module.qzeros, module.scales
    return dequantize_gemm(*parts, module.bits, module.group_size).T.contiguous()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
