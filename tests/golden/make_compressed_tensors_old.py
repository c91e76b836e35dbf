"""Golden files of what compressed-tensors 0.11.0 wrote and later releases dropped: groups in the order of activations.

    python -m venv old && old/bin/pip install torch==2.4.1 "numpy<2" transformers==4.45.2 compressed-tensors==0.11.0
    old/bin/python tests/golden/make_compressed_tensors_old.py

`4-reordered` has `weight_g_idx` (`actorder: "group"`); `3-group` has 3-bit codes in the layout before 0.18. Of each the
tensors of one linear, and `dequantized` float16 [32, 64], as compressed-tensors decodes them.
"""

import json
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file

HERE = Path(__file__).parent
OUT, IN, GROUP = 32, 64, 16
CASES = {"4-reordered": {"num_bits": 4, "actorder": "group"}, "3-group": {"num_bits": 3}}


def main() -> None:
    tensors, configs = {}, {}
    for name, settings in CASES.items():
        args = QuantizationArgs(strategy="group", group_size=GROUP, symmetric=True, **settings)
        tensors |= {f"{name}/{key}": tensor for key, tensor in quantize(args).items()}
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        config = QuantizationConfig(
            config_groups={"group_0": scheme}, quantization_status="compressed", ignore=["lm_head"]
        )
        configs[name] = {**json.loads(config.model_dump_json()), "format": "pack-quantized"}
    save_file(tensors, HERE / "compressed_tensors_old.safetensors")
    (HERE / "compressed_tensors_old.json").write_text(json.dumps(configs, indent=1) + "\n")


def quantize(args: QuantizationArgs) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(OUT, IN).half()
    groups = torch.arange(IN, dtype=torch.int32) // GROUP
    if args.actorder is not None:
        groups = groups[torch.randperm(IN)]
    parts = torch.stack([weight[:, groups == group] for group in range(IN // GROUP)])
    scale, zero = calculate_qparams(parts.amin(-1).T, parts.amax(-1).T, args)
    packer = BaseCompressor.get_value_from_registry("pack-quantized")()
    g_idx = None if args.actorder is None else groups
    stored = {"weight_scale": scale, **packer.compress_weight(weight, scale, args, zero, g_idx=g_idx)}
    if g_idx is not None:
        stored["weight_g_idx"] = g_idx
    stored["dequantized"] = packer.decompress_weight(stored, args)
    return {name: tensor.contiguous() for name, tensor in stored.items()}


if __name__ == "__main__":
    main()
