"""Golden files of GPTQ and AWQ: a random Llama of one block, quantized and decoded by gptqmodel 7.7.0.

    GPTQMODEL_CPU_WORKERS=2 TORCHDYNAMO_DISABLE=1 .venv-readers/bin/python tests/golden/make_gptqmodel.py

Of each case the tensors of one linear, as gptqmodel saved them, and `dequantized` float16 [out, in] as it decodes them.
"""

import json
from contextlib import chdir
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
LAYER = "model.layers.0.self_attn.k_proj"  # [32, 64]; of AWQ [64, 64], its packer wants that many outputs
SHAPE = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
SHAPE |= {"vocab_size": 64, "max_position_embeddings": 64, "initializer_range": 0.2}
GROUPS = {"group_size": 16, "offload_to_disk": False}
REORDERED = {**GROUPS, "sym": False, "desc_act": True, "act_group_aware": False}
CASES = {
    **{f"gptq-{bits}": {"bits": bits, **REORDERED} for bits in (2, 3, 4, 8)},
    "gptq-4-v2": {"bits": 4, "format": "gptq_v2", **REORDERED},
    "gptq-4-symmetric": {"bits": 4, "sym": True, "desc_act": False, **GROUPS},
    "awq-4": {"bits": 4, "quant_method": "awq", "format": "gemm", "sym": False, **GROUPS},
}


def main() -> None:
    tensors, configs = {}, {}
    with TemporaryDirectory() as folder, chdir(folder):  # it writes logs to where it runs
        for name, settings in CASES.items():
            found, configs[name] = quantize(Path(folder) / name, settings)
            tensors |= {f"{name}/{key}": tensor for key, tensor in found.items()}
    save_file(tensors, HERE / "gptqmodel.safetensors")
    (HERE / "gptqmodel.json").write_text(json.dumps(configs, indent=1) + "\n")


def save_source(folder: Path, key_heads: int) -> None:
    torch.manual_seed(0)
    shape = LlamaConfig(**SHAPE, num_key_value_heads=key_heads, dtype="float16")
    LlamaForCausalLM(shape).half().save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(64)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2").save_pretrained(folder)


def quantize(folder: Path, settings: dict) -> tuple[dict[str, torch.Tensor], dict]:
    source, out, awq = folder / "source", folder / "quantized", "quant_method" in settings
    save_source(source, 2 if awq else 1)
    rows = torch.randint(64, (64, 48), generator=torch.Generator().manual_seed(1))
    calibration = [{"input_ids": row[None], "attention_mask": torch.ones(1, 48, dtype=torch.long)} for row in rows]
    model = GPTQModel.load(str(source), QuantizeConfig(**settings), device="cpu")
    model.quantize(calibration, batch_size=8, calibration_data_min_length=1)
    model.save(str(out))
    stored = {}
    for path in out.glob("*.safetensors"):
        stored |= load_file(path)
    backend = BACKEND.AWQ_TORCH if awq else BACKEND.GPTQ_TORCH
    module = GPTQModel.load(str(out), device="cpu", backend=backend, dtype=torch.float16).model.get_submodule(LAYER)
    if awq:
        dense = dequantize_gemm(module.qweight, module.qzeros, module.scales, module.bits, module.group_size)
    else:
        dense = module.dequantize_weight()
    found = {key.removeprefix(LAYER + "."): tensor for key, tensor in stored.items() if key.startswith(LAYER + ".")}
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    return {**found, "dequantized": dense.T.contiguous()}, config


if __name__ == "__main__":
    main()
