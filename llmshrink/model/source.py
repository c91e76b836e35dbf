"""Where a model comes from: a folder, or a Hub id resolved once to a commit; checked before anything is loaded."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llmshrink.errors import InputError, ModelNotFoundError, UnsafeError, UsageError
from llmshrink.gguf.checkpoint import SINGLE as GGUF
from llmshrink.gguf.checkpoint import GgufCheckpoint
from llmshrink.io.files import parse_json, sha256
from llmshrink.io.safetensors import INDEX, Checkpoint, leads_outside, refuse_outside
from llmshrink.model.hub import download

COMPANIONS = re.compile(
    r"tokenizer[^/]*\.(json|model)|vocab\.(json|txt)|merges\.txt|spiece\.model|sentencepiece[^/]*\.model|added_tokens\.json"
    r"|special_tokens_map\.json|generation_config\.json|chat_template[^/]*\.(json|jinja)"
    r"|(LICENSE|LICENCE|NOTICE|USE_POLICY)[^/.]*(\.(txt|md|rst|html|pdf))?"
    # sentence-transformers: how token vectors become one, in folders such as 1_Pooling
    r"|modules\.json|(config_sentence_transformers|sentence_\w+_config)\.json|\d+_\w+/(config\.json|model\.safetensors)"
)

IMPLEMENTATION = "_implementation"  # of attention and experts, in all spellings of its key
MAX_SETTINGS = 10_000_000  # bytes of config.json
MAX_CARD = 1_000_000  # characters in which the licence stands, if it does
MANY = 1_000_000  # of anything that a configuration makes a list of
COUNTED = re.compile(r"layer|block|label|dense|stage|depth|expert|head")
SETTINGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # of AutoGPTQ and AutoAWQ -> quant_method


@dataclass(frozen=True)
class Source:
    """A model folder that passed the safety checks."""

    id: str  # as the user named it
    folder: Path
    commit: str | None  # of a Hub repository

    @cached_property
    def config_dict(self) -> dict[str, Any]:
        """config.json as it is on disk, but for what it says of the machine: see `forget_kernels`."""
        path = self.folder / "config.json"
        found: dict[str, Any] = _without_kernels(_read_object(path, "it is not a Hugging Face model folder"))
        return found

    @cached_property
    def config(self) -> PretrainedConfig:
        """The configuration, as transformers understands it."""
        _ = self.quantization  # transformers would trip over settings that are no object
        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(
                self.folder, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # noqa: BLE001 - constructors of 400 families, given what a stranger wrote
            raise InputError(
                f"{self.folder / 'config.json'} is not a configuration transformers accepts: {error}"
            ) from error
        forget_kernels(config)
        return config

    @cached_property
    def quantization(self) -> dict[str, Any] | None:
        """The `quantization_config`; older tools put it into a file of its own, with keys of its own.

        A GGUF file says itself how it is quantized.
        """
        if self.gguf:
            return {"quant_method": "gguf"}
        if "quantization_config" in self.config_dict:
            found: dict[str, Any] | None = self.config_dict["quantization_config"]
            if found is not None and not isinstance(found, dict):
                raise InputError(f"{self.folder / 'config.json'}: quantization_config must be an object.")
            return found
        for name, method in SETTINGS.items():
            if (path := self.folder / name).is_file():
                return {"quant_method": method, **_read_object(path)}
        return None

    @cached_property
    def checkpoint(self) -> Checkpoint | GgufCheckpoint:
        """The weights, mapped."""
        return GgufCheckpoint.open(self.folder) if self.gguf else Checkpoint.open(self.folder)

    @property
    def gguf(self) -> bool:
        """Whether a GGUF file is all the weights there are."""
        names = {path.name for path in self.folder.iterdir()}
        return GGUF in names and not any(name.endswith((".safetensors", INDEX)) for name in names)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own tokenizer."""
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                self.folder, trust_remote_code=False, local_files_only=True
            )
            tokenizer("a")  # some faults show only then
        except Exception as error:  # noqa: BLE001 - the tokenizers of Rust raise this very class
            if "trust_remote_code" in str(error):
                raise UnsafeError(
                    f"{self.id} brings its own Python code (auto_map in tokenizer_config.json) and transformers has no "
                    "tokenizer of its own for it; llmshrink does not run code from a model."
                ) from error
            raise InputError(
                f"{self.folder} has no tokenizer that transformers can load: {error}",
                hint="Calibration and evaluation text must be tokenized; copy the tokenizer files into the folder.",
            ) from error
        return tokenizer

    @cached_property
    def companions(self) -> dict[str, Path]:
        """Files that go into the output byte for byte, by their names in the folder: tokenizer, licence, pooling."""
        files = sorted([*self.folder.glob("*"), *self.folder.glob("*/*")])
        named = {path.relative_to(self.folder).as_posix(): path for path in files if path.is_file()}
        found = {name: path for name, path in named.items() if COMPANIONS.fullmatch(name)}
        for path in found.values():
            refuse_outside(path.parent)
            refuse_outside(path)
        return found

    def refuse_unsafe(self) -> None:
        """Look for what would run code that is not in transformers, or take all memory, before anything is loaded.

        Raises:
            UnsafeError: code of the model's own, or kernels from a repository.
            InputError: transformers does not know the model, or it has billions of layers.
        """
        path = self.folder / "config.json"
        config = _read_object(path, "it is not a Hugging Face model folder")
        model_type, architectures = config.get("model_type"), config.get("architectures") or []
        known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
        for key, value in _entries(config):
            if key == "auto_map" and not known:
                raise UnsafeError(
                    f"{self.id} brings its own Python code (auto_map in config.json) and transformers has no class of "
                    f"its own for model_type {model_type!r}; llmshrink does not run code from a model.",
                )
            if IMPLEMENTATION in key and "/" in str(value):
                raise UnsafeError(f"{path} asks for code from the Hub: {key} is {str(value)[:100]!r}.")
            if COUNTED.search(key) and isinstance(value, int | float) and not value <= MANY:
                raise InputError(f"{path}: {key} is {value}: no model has so many.")
        if not known:
            raise InputError(f"{path}: transformers knows no model_type {str(model_type)[:100]!r}.")
        if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
            raise InputError(f"{path}: its architectures must be a list of names.")

    @cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of every file that decides the result."""
        settings = [name for name in SETTINGS if (self.folder / name).is_file()]
        names = ["config.json", *settings, *self.checkpoint.files, *self.companions]
        return {name: _content_hash(self.folder / name) for name in sorted(names)}

    @property
    def licence(self) -> str | None:
        """The licence its model card declares."""
        card = self.folder / "README.md"
        if not card.is_file() or leads_outside(card):
            return None
        with card.open(encoding="utf-8", errors="replace") as file:
            found = re.match(r"---\n(?:.*\n)*?license:\s*([\w.\-]+)", file.read(MAX_CARD))
        return found.group(1) if found else None


def _content_hash(path: Path) -> str:
    """SHA-256 of a file, which in the Hub's cache must be the content that its blob is named for.

    The Hub's client checks the length of what it got, not the content: large files are named by their SHA-256, small
    ones by git's SHA-1 of a header and the bytes.
    """
    found = sha256(path)
    blob = path.readlink().name if path.is_symlink() else ""
    same = True
    if re.fullmatch(r"[0-9a-f]{64}", blob):
        same = blob == found
    elif re.fullmatch(r"[0-9a-f]{40}", blob):
        content = path.read_bytes()
        same = blob == hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    if not same:
        raise InputError(
            f"{path} is damaged: its content is not what the Hub lists for it ({blob}).",
            hint=f"Delete {path.resolve()} and {path}, and run again: it is downloaded anew.",
        )
    return found


def _read_object(path: Path, absent: str = "") -> dict[str, Any]:
    refuse_outside(path)
    if not path.is_file():
        raise InputError(f"{path.parent} has no {path.name}: {absent}.")
    if path.stat().st_size > MAX_SETTINGS:
        raise InputError(f"{path} is larger than any real one ({path.stat().st_size:,} bytes).")
    try:
        value = parse_json(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object.")
    return value


def open_source(model_id: str, revision: str | None = None) -> Source:
    """Find a model: a folder on disk, else a Hub id (downloaded into the Hub's own cache).

    Raises:
        ModelNotFoundError: neither exists, access is refused, or there is no network.
        UnsafeError: the model can only be loaded by running its own code, or by unpickling.
        InputError: the folder is not a model, or a file came damaged.
        ResourceError: no room to download it.
    """
    path = Path(model_id).expanduser()
    if path.is_dir():
        if revision is not None:
            raise UsageError(f"{model_id} is a folder: it has no revision {revision!r}.")
        source = Source(model_id, path.resolve(), None)
    elif path.exists():
        raise InputError(f"{model_id} is a file; give the folder of the model.")
    elif re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", model_id) and ".." not in model_id and "--" not in model_id:
        folder = download(model_id, revision)
        source = Source(model_id, folder, folder.name)
    else:
        raise ModelNotFoundError(f"There is no folder {model_id!r}, and it is not a Hub id (owner/name) either.")
    source.refuse_unsafe()
    return source


def forget_kernels(config: PretrainedConfig) -> None:
    """Compute with what fits this machine: transformers may fetch a kernel for a named implementation."""
    config._attn_implementation = None
    config._experts_implementation = None


def _without_kernels(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_kernels(below) for key, below in value.items() if IMPLEMENTATION not in key}
    return [_without_kernels(below) for below in value] if isinstance(value, list) else value


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth; those of a list have the list's key."""
    left = [("", config)]
    while left:
        key, value = left.pop()
        yield key, value
        if isinstance(value, dict):
            left += value.items()
        elif isinstance(value, list):
            left += [(key, item) for item in value]
