"""Golden files of compressed-tensors 0.19.0: a random Llama of one block, quantized by llm-compressor 0.14.0.1.

    python -m venv llmc && llmc/bin/pip install llmcompressor==0.14.0.1 compressed-tensors==0.19.0
    llmc/bin/python tests/golden/make_compressed_tensors.py

Of each case the tensors of one linear, as llm-compressor saved them, and `dequantized` bfloat16 [out, in] as
compressed-tensors decodes them.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
LAYER = "model.layers.0.self_attn.k_proj"  # [32, 64]
SHAPE = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
REST = {"num_hidden_layers": 1, "vocab_size": 64, "max_position_embeddings": 64, "initializer_range": 0.2}
GROUP, CHANNEL = {"strategy": "group", "group_size": 16}, {"strategy": "channel"}
TOKEN, TENSOR = {"strategy": "token", "dynamic": True}, {"strategy": "tensor", "dynamic": False}
CASES = {
    "3-group": {"num_bits": 3, "symmetric": True, **GROUP},
    "4-group": {"num_bits": 4, "symmetric": True, **GROUP},
    "4-group-asymmetric": {"num_bits": 4, "symmetric": False, **GROUP},
    "4-channel-asymmetric": {"num_bits": 4, "symmetric": False, **CHANNEL},
    "8-channel": {"num_bits": 8, "symmetric": True, **CHANNEL},
    "8-group-asymmetric": {"num_bits": 8, "symmetric": False, **GROUP},
    "8-channel-token": {"num_bits": 8, **CHANNEL, "inputs": TOKEN},
    "8-channel-static": {"num_bits": 8, **CHANNEL, "inputs": TENSOR},
    "fp8-channel-token": {"num_bits": 8, "type": "float", **CHANNEL, "inputs": TOKEN},
    "fp8-tensor-static": {"num_bits": 8, "type": "float", "strategy": "tensor", "inputs": TENSOR},
}


def main() -> None:
    tensors, configs = {}, {}
    with TemporaryDirectory() as folder:
        for name, settings in CASES.items():
            inputs = settings.pop("inputs", None)
            weights = QuantizationArgs(**settings)
            rounded = inputs and QuantizationArgs(num_bits=8, type=weights.type, **inputs)
            found, configs[name] = quantize(Path(folder) / name, weights, rounded)
            tensors |= {f"{name}/{key}": tensor for key, tensor in found.items()}
    save_file(tensors, HERE / "compressed_tensors.safetensors")
    (HERE / "compressed_tensors.json").write_text(json.dumps(configs, indent=1) + "\n")


def quantize(
    folder: Path, weights: QuantizationArgs, inputs: QuantizationArgs | None
) -> tuple[dict[str, torch.Tensor], dict]:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, **REST)).bfloat16().save_pretrained(folder / "source")
    model = LlamaForCausalLM.from_pretrained(folder / "source", dtype="auto")
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"w": 0}, unk_token="w"))
    )  # asked for, not used
    recipe = QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    rows = torch.randint(64, (4, 32)).tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * 32] * 4})
    text = {"dataset": data, "num_calibration_samples": 4, "max_seq_length": 32} if inputs else {}
    oneshot(model=model, tokenizer=words, recipe=recipe, **text)
    model.save_pretrained(folder / "out", save_compressed=True)
    stored = load_file(folder / "out" / "model.safetensors")
    found = {key.removeprefix(LAYER + "."): tensor for key, tensor in stored.items() if key.startswith(LAYER + ".")}
    config = json.loads((folder / "out" / "config.json").read_text())["quantization_config"]
    dense = BaseCompressor.get_value_from_registry(config["format"]).decompress(found, scheme)["weight"]
    return {**found, "dequantized": dense.contiguous()}, config


if __name__ == "__main__":
    main()
