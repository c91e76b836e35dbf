"""Settings and tokenizers from strangers: refused fast, and without the memory that they ask for."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import recipe

from llmshrink import run
from llmshrink.cli import main
from llmshrink.progress import Silent
from llmshrink.report.schema import Check

Refused = Callable[..., tuple[int, str, set[str]]]
CONTENTS: dict[str, str | bytes] = {
    "a list": "[1, 2]",
    "a text": '"config"',
    "a number": "1",
    "nothing": "",
    "deep": "[" * 200_000,
    "deep objects": '{"a":' * 500 + "1" + "}" * 500,
    "deeper than it may be walked": '{"model_type": "llama", "a":' + "[" * 100 + "]" * 100 + "}",
    "an integer of 10,000 digits": '{"model_type": "llama", "hidden_size": ' + "9" * 10_000 + "}",
    "bytes": b"\xff\xfe\x00\x01",
    "50 MB": b'{"a": "' + b"x" * 50_000_000 + b'"}',
    "a type that is a list": '{"model_type": ["llama"]}',
    "a type that is an object": '{"model_type": {"llama": 1}}',
    "no type": "{}",
    "a path for a type": '{"model_type": "../../../etc"}',
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_a_configuration_that_is_none(attack: Callable[..., str], model: Path, content: str | bytes) -> None:
    (model / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert "config.json" in attack(8, model)


HUGE = 10**12
CLAIMS: dict[str, dict[str, Any]] = {
    "hidden_size": {"hidden_size": HUGE},
    "layers": {"num_hidden_layers": 10**9},
    "layers, fewer": {"num_hidden_layers": 999_999},
    "layers of qwen2": {"model_type": "qwen2", "num_hidden_layers": 10**9},
    "layers in text_config": {"text_config": {"num_hidden_layers": 10**9}},
    "layers, as a float": {"num_hidden_layers": 1e18},
    "layers, infinite": {"num_hidden_layers": float("inf")},
    "layers, no number": {"num_hidden_layers": float("nan")},
    "tiny layers": {"num_hidden_layers": 900_000, "hidden_size": 2, "intermediate_size": 1, "head_dim": 2},
    "labels": {"num_labels": 10**9},
    "vocabulary": {"vocab_size": HUGE},
    "intermediate_size": {"intermediate_size": HUGE},
    "heads": {"num_attention_heads": 10**9},
    "head_dim": {"head_dim": 10**15},
    "sizes that overflow": {"hidden_size": 2**62, "vocab_size": 2**62},
    "experts": {"model_type": "mixtral", "num_local_experts": 10**6, "intermediate_size": 10**6},
    "more experts": {"model_type": "qwen3_moe", "num_experts": 10**9},
    "dense layers": {"model_type": "deepseek_v3", "first_k_dense_replace": 10**9},
    "negative": {"hidden_size": -5},
    "zero": {"hidden_size": 0},
    "no heads": {"num_attention_heads": 0},
    "no key heads": {"num_key_value_heads": 0},
    "text": {"hidden_size": "big"},
    "null": {"hidden_size": None},
    "a list": {"hidden_size": [32]},
    "true": {"vocab_size": True},
    "an activation that is none": {"hidden_act": "os.system"},
    "a dtype that is none": {"dtype": "load"},
    "a dtype that is code": {"dtype": "__import__('os').system"},
    "a dtype that is a module": {"dtype": "nn"},
    "an architecture that is none": {"architectures": 5},
    "rope": {"rope_scaling": {"rope_type": "evil", "factor": -1.0}},
    "rope as text": {"rope_parameters": "evil"},
    "positions": {"model_type": "gpt2", "n_positions": 10**9},
    "parts": {"text_config": [1, 2, 3]},
    "architectures of architectures": {"architectures": [["LlamaForCausalLM"]]},
    "model types of model types": {"model_type": ["llama"]},
}


@pytest.mark.parametrize("keys", CLAIMS.values(), ids=CLAIMS)
def test_a_configuration_that_asks_for_the_impossible(
    attack: Callable[..., str], model: Path, keys: dict[str, Any]
) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    attack(8, model, "--plan")


@pytest.mark.parametrize("keys", [{"num_hidden_layers": 0}, {"num_hidden_layers": -1}, {"model_type": "bert"}], ids=str)
def test_a_configuration_of_a_model_without_blocks(
    attack: Callable[..., str], model: Path, keys: dict[str, Any]
) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    attack(3, model, "--plan")


@pytest.fixture(scope="session")
def compressed(
    models_folder: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A small model in each format."""
    root, found = tmp_path_factory.mktemp("compressed"), {}
    rtn = {"name": "rtn", "bits": 4, "group_size": 32}
    methods = {"gptq": rtn, "awq": {**rtn, "symmetric": False}, "compressed-tensors": rtn, "bnb": {"name": "nf4"}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmshrink.job.check_reader", lambda *_: Check(name="reader", passed=True, detail="left out"))
        for name, method in methods.items():
            found[name] = root / name
            wanted = recipe(models_folder("llama"), found[name], text_file, method, stage={"format": {"name": name}})
            run.execute(wanted, progress=Silent())
    return found


VALUES: list[Any] = [0, -1, 10**12, 2**70, 1.5, "4", "x", None, [], {}, True, [[]], "__import__('os')", float("nan")]
KEYS = {
    "gptq": [
        "bits",
        "group_size",
        "checkpoint_format",
        "sym",
        "desc_act",
        "dynamic",
        "pack_dtype",
        "modules_in_block_to_quantize",
    ],
    "awq": ["bits", "group_size", "version", "zero_point", "modules_to_not_convert"],
    "compressed-tensors": ["config_groups", "format", "ignore", "kv_cache_scheme", "quantization_status"],
    "bnb": ["load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_quant_storage", "llm_int8_skip_modules"],
}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in KEYS.items() for key in keys])
def test_quantization_settings_of_any_value_are_told_or_make_no_difference(
    compressed: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, key: str
) -> None:
    folder = shutil.copytree(
        compressed[name], tmp_path / "model", ignore=shutil.ignore_patterns("quantize_config.json")
    )
    config = json.loads((folder / "config.json").read_text())
    for value in VALUES:
        changed = {**config, "quantization_config": {**config["quantization_config"], key: value}}
        (folder / "config.json").write_text(json.dumps(changed))
        arguments = ["export", str(folder), "--to", "dense", "--output", str(tmp_path / "out"), "--plan"]
        code, said = main(arguments), capsys.readouterr().err
        assert code in (0, 3, 8) and "internal error" not in said and "Traceback" not in said, (value, said)


GROUP = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


@pytest.mark.parametrize("key", [*GROUP, "targets", "weights"])
def test_settings_of_a_group_of_any_value_are_told_or_make_no_difference(
    compressed: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    folder = shutil.copytree(compressed["compressed-tensors"], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for value in VALUES:
        group: dict[str, Any] = {"targets": ["Linear"], "weights": dict(GROUP)}
        (group["weights"] if key in GROUP else group)[key] = value
        changed = {**config["quantization_config"], "config_groups": {"group_0": group}}
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": changed}))
        arguments = ["export", str(folder), "--to", "dense", "--output", str(tmp_path / "out"), "--plan"]
        code, said = main(arguments), capsys.readouterr().err
        assert code in (0, 3, 8) and "internal error" not in said and "Traceback" not in said, (value, said)


def test_an_endless_expression_in_quantization_settings(
    attack: Callable[..., str], compressed: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(compressed["compressed-tensors"], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    groups = {"group_0": {"targets": [r"re:(?:(?:(.)|(..)|(...))*\1)*(?<=[0-9])$"], "weights": GROUP}}
    config["quantization_config"]["config_groups"] = groups
    (folder / "config.json").write_text(json.dumps(config))
    assert "takes longer than 1 s" in attack(5, folder)


TOKENIZERS: dict[str, str | bytes] = {
    "nothing": "",
    "no JSON": "{",
    "a list": "[]",
    "an object": "{}",
    "deep": "[" * 100_000,
    "a model that is none": '{"model": {"type": "Evil"}}',
    "null": '{"version": "1.0", "model": null}',
    "bytes": b"\xff\xfe",
    "huge ids": '{"added_tokens": [{"id": 4294967295, "content": "x", "special": true}], "model": {"type": "BPE"}}',
    "merges of nothing": '{"version":"1.0","model":{"type":"BPE","vocab":{},"merges":[["a","b"]]}}',
    "a vocabulary of text": '{"version":"1.0","model":{"type":"WordLevel","vocab":"x","unk_token":"u"}}',
}


@pytest.mark.parametrize("content", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_tokenizer_that_is_none(attack: Callable[..., str], model: Path, content: str | bytes) -> None:
    (model / "tokenizer.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    attack(8, model)


@pytest.mark.parametrize("seed", range(10))
def test_a_tokenizer_with_bytes_changed(refused: Refused, model: Path, without_reader: None, seed: int) -> None:
    path, chance = model / "tokenizer.json", random.Random(seed)
    content = bytearray(path.read_bytes())
    for _ in range(5):
        content[chance.randrange(len(content))] = chance.randrange(256)
    path.write_bytes(bytes(content))
    code, said, left = refused(model)
    assert code in (0, 8) and "internal error" not in said and left == ({"out"} if code == 0 else set()), said


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, '{"bos_token": 5}', '{"model_max_length": "x"}'])
def test_settings_of_a_tokenizer_that_are_none(
    refused: Refused, model: Path, without_reader: None, content: str
) -> None:
    (model / "tokenizer_config.json").write_text(content)
    code, said, left = refused(model)
    assert code in (0, 8) and "internal error" not in said and left == ({"out"} if code == 0 else set()), said
