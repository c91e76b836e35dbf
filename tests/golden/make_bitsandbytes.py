"""Golden files of bitsandbytes 0.50.2: a random Llama of one block, quantized and saved by transformers 5.23.

    .venv/bin/python tests/golden/make_bitsandbytes.py

Of each case the tensors of one linear, as transformers saved them, and `dequantized` float16 [out, in] as bitsandbytes
decodes them.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import bitsandbytes
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
LAYER = "model.layers.0.self_attn.k_proj"  # [32, 64]; of double quantization [128, 130]: two blocks of 256 scales
SHAPE = {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64, "intermediate_size": 64}
CASES: dict[str, dict[str, Any]] = {
    "nf4": {"bnb_4bit_quant_type": "nf4"},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "nf4-double": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}


def main() -> None:
    tensors, configs = {}, {}
    with TemporaryDirectory() as folder:
        for name, settings in CASES.items():
            found, configs[name] = quantize(Path(folder) / name, settings)
            tensors |= {f"{name}/{key}": tensor for key, tensor in found.items()}
    save_file(tensors, HERE / "bitsandbytes.safetensors")
    (HERE / "bitsandbytes.json").write_text(json.dumps(configs, indent=1) + "\n")


def quantize(folder: Path, settings: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    wide = settings.get("bnb_4bit_use_double_quant", False)
    sizes = {"hidden_size": 130, "head_dim": 64, "num_key_value_heads": 2} if wide else {"hidden_size": 64}
    torch.manual_seed(0)
    shape = {"num_key_value_heads": 1, **SHAPE, **sizes}
    LlamaForCausalLM(LlamaConfig(**shape)).half().save_pretrained(folder / "source")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16, **settings)
    model = AutoModelForCausalLM.from_pretrained(
        folder / "source", dtype=torch.float16, quantization_config=config, device_map="cpu"
    )
    model.save_pretrained(folder / "out")
    stored = load_file(folder / "out" / "model.safetensors")
    weight = model.get_submodule(LAYER).weight
    dense = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    found = {key.removeprefix(LAYER + "."): tensor for key, tensor in stored.items() if key.startswith(LAYER + ".")}
    written = json.loads((folder / "out" / "config.json").read_bytes())["quantization_config"]
    return {**found, "dequantized": dense.contiguous()}, written


if __name__ == "__main__":
    main()
