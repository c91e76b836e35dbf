"""Files that other tools wrote, decoded to the weights that those tools decode themselves (`tests/golden/README.md`).

The tools compute in float16 or bfloat16, llmshrink in float32. A difference of codes is exact in each, and a product is
rounded to nearest: each of their weights is ours rounded once, and equals ours in their dtype bit for bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llmshrink.errors import InputError
from llmshrink.formats import format_of
from llmshrink.formats.base import Slot
from llmshrink.forms import decode

GOLDEN = Path(__file__).parent.parent / "golden"
MODULE = "model.layers.0.self_attn.k_proj"
TOOLS = ("gptqmodel", "bitsandbytes", "compressed_tensors", "compressed_tensors_old")
OLD_LAYOUT = ("compressed_tensors_old", "3-group")
CASES = [(tool, name) for tool in TOOLS for name in json.loads((GOLDEN / f"{tool}.json").read_bytes())]
CASES.remove(OLD_LAYOUT)


def golden(tool: str, name: str) -> tuple[dict[str, Tensor], Tensor, dict[str, Any]]:
    """The stored tensors by their names on disk, what the tool decodes them to [out, in], its `quantization_config`."""
    tensors = load_file(GOLDEN / f"{tool}.safetensors")
    found = {key.removeprefix(f"{name}/"): tensor for key, tensor in tensors.items() if key.startswith(f"{name}/")}
    dense = found.pop("dequantized")
    config = json.loads((GOLDEN / f"{tool}.json").read_bytes())[name]
    return {f"{MODULE}.{key}": tensor for key, tensor in found.items()}, dense, config


@pytest.mark.parametrize(("tool", "name"), CASES)
def test_a_foreign_file_is_decoded_to_the_weights_of_its_tool(tool: str, name: str) -> None:
    stored, dense, config = golden(tool, name)
    fmt = format_of(config)
    assert fmt is not None and fmt.cannot_read(config) is None
    key = f"{MODULE}.weight"
    assert set(fmt.dense_names(stored)) == {key}
    assert sorted(fmt.companions(key, stored)) == sorted(stored)
    shape, dtype = fmt.dense_info(key, stored.__getitem__, config)
    assert shape == tuple(dense.shape)
    ours = decode(fmt.unpack(Slot(key, MODULE, (shape[0], shape[1]), dtype), stored.__getitem__, config))
    assert torch.equal(ours.to(dense.dtype), dense)


@pytest.mark.parametrize(
    ("name", "kind", "scale"),
    [
        ("8-channel", None, False),
        ("8-channel-token", "int", False),
        ("8-channel-static", "int", True),
        ("fp8-channel-token", "float", False),
        ("fp8-tensor-static", "float", True),
    ],
)
def test_rounded_inputs_of_a_foreign_file_are_known(name: str, kind: str | None, scale: bool) -> None:
    stored, dense, config = golden("compressed_tensors", name)
    fmt = format_of(config)
    assert fmt is not None
    slot = Slot(f"{MODULE}.weight", MODULE, (dense.shape[0], dense.shape[1]), dense.dtype)
    found = fmt.unpack_input(slot, stored.__getitem__, config)
    assert (found and found.kind) == kind
    assert (found is not None and found.scale is not None) == scale
    if found is not None and found.scale is not None:
        assert torch.equal(found.scale, stored[f"{MODULE}.input_scale"]) and float(found.scale) > 0


def test_files_have_groups_in_another_order() -> None:
    for tool, name, key in (
        ("gptqmodel", "gptq-4", "g_idx"),
        ("compressed_tensors_old", "4-reordered", "weight_g_idx"),
    ):
        groups = golden(tool, name)[0][f"{MODULE}.{key}"]
        assert (groups.diff() < 0).any()


def test_codes_in_the_layout_of_older_releases_are_refused() -> None:
    stored, dense, config = golden(*OLD_LAYOUT)
    fmt = format_of(config)
    slot = Slot(f"{MODULE}.weight", MODULE, (dense.shape[0], dense.shape[1]), dense.dtype)
    assert fmt is not None
    with pytest.raises(InputError, match=r"7 words.*before 0\.18"):
        fmt.unpack(slot, stored.__getitem__, config)
