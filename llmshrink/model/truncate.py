"""A model cut to its first blocks, in a folder of its own: what a smoke test runs on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmshrink.io import safetensors
from llmshrink.io.files import copy_file, write_json
from llmshrink.model.source import Source
from llmshrink.model.streamed import StreamedModel


def truncate(model: StreamedModel, folder: Path, blocks: int = 1) -> None:
    """Write the first blocks of a model, with its embedding, norm and head, to `folder`."""
    source, anatomy = model.source, model.anatomy
    keys = [*anatomy.others, *(key for block in anatomy.blocks[:blocks] for key in block.keys)]
    safetensors.write(folder / safetensors.SINGLE, {key: model.weights.dense(key) for key in keys})
    config = {name: value for name, value in source.config_dict.items() if name != "quantization_config"}
    write_json(folder / "config.json", _cut(source, config, len(anatomy.blocks), blocks))
    for name, path in source.companions.items():
        copy_file(path, folder / name)


def _cut(source: Source, config: dict[str, Any], old: int, new: int) -> dict[str, Any]:
    """The configuration with `new` blocks: the count under whatever key the family uses, lists per layer cut."""
    text = source.config.get_text_config(decoder=True)
    key = text.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    cut: dict[str, Any] = {}
    for name, value in config.items():
        if name in (key, "num_hidden_layers"):
            cut[name] = new
        elif isinstance(value, dict):
            cut[name] = _cut(source, value, old, new)
        elif isinstance(value, list) and len(value) == old and name.endswith("layer_types"):
            cut[name] = value[:new]
        else:
            cut[name] = value
    return cut
