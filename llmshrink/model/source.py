"""Where a model comes from: a folder, or a Hub id resolved once to a commit; checked before anything is loaded."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llmshrink.errors import InputError, ModelNotFoundError, UnsafeError, UsageError
from llmshrink.io.files import parse_json, sha256
from llmshrink.io.safetensors import Checkpoint, refuse_outside
from llmshrink.model.hub import download

COMPANIONS = re.compile(
    r"tokenizer.*\.(json|model)|vocab\.(json|txt)|merges\.txt|spiece\.model|sentencepiece.*\.model|added_tokens\.json"
    r"|special_tokens_map\.json|generation_config\.json|chat_template.*|(LICENSE|LICENCE|NOTICE|USE_POLICY).*"
    # sentence-transformers: how token vectors become one, in folders such as 1_Pooling
    r"|modules\.json|(config_sentence_transformers|sentence_\w+_config)\.json|\d+_\w+/(config\.json|model\.safetensors)"
)

SETTINGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # of AutoGPTQ and AutoAWQ -> quant_method


# What transformers raises on settings and files that it was not made for.
FOREIGN = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError),
    StrictDataclassError,
)
DEEPEST = 64  # levels of a configuration


@dataclass(frozen=True)
class Source:
    """A model folder that passed the safety checks."""

    id: str  # as the user named it
    folder: Path
    commit: str | None  # of a Hub repository

    @cached_property
    def config_dict(self) -> dict[str, Any]:
        """config.json as it is on disk."""
        return _read_object(self.folder / "config.json", "it is not a Hugging Face model folder")

    @cached_property
    def config(self) -> PretrainedConfig:
        """The configuration, as transformers understands it."""
        _ = self.quantization  # transformers would trip over settings that are no object
        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(
                self.folder, trust_remote_code=False, local_files_only=True
            )
        except (*FOREIGN, OSError) as error:
            raise InputError(
                f"{self.folder / 'config.json'} is not a configuration transformers accepts: {error}"
            ) from error
        names = config.architectures
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise InputError(f"{self.folder / 'config.json'}: architectures must be a list of names.")
        return config

    @cached_property
    def quantization(self) -> dict[str, Any] | None:
        """The `quantization_config`; older tools put it into a file of its own, with keys of its own."""
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
    def checkpoint(self) -> Checkpoint:
        """The weights, mapped."""
        return Checkpoint.open(self.folder)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own tokenizer."""
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                self.folder, trust_remote_code=False, local_files_only=True
            )
        except (*FOREIGN, OSError) as error:
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
        if not card.is_file():
            return None
        found = re.match(r"---\n(?:.*\n)*?license:\s*([\w.\-]+)", card.read_text(encoding="utf-8", errors="replace"))
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
    try:
        value = parse_json(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{path.parent} has no {path.name}: {absent}.") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object.")
    if _deeper(value, DEEPEST):
        raise InputError(f"{path} is nested deeper than {DEEPEST} levels.")
    return value


def _deeper(value: Any, levels: int) -> bool:
    below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_deeper(part, levels - 1) for part in below)


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
    _refuse_remote_code(source)
    return source


def _refuse_remote_code(source: Source) -> None:
    """A model with `auto_map` is used only where transformers has its own class for the same `model_type`."""
    config = source.config_dict
    model_type = config.get("model_type")
    known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    if _has_key(config, "auto_map") and not known:
        raise UnsafeError(
            f"{source.id} brings its own Python code (auto_map in config.json) and transformers has no class of its "
            f"own for model_type {model_type!r}; llmshrink does not run code from a model.",
        )
    if not known:
        raise InputError(f"{source.folder / 'config.json'}: transformers knows no model_type {model_type!r}.")


def _has_key(value: Any, key: str) -> bool:
    if isinstance(value, Mapping):
        return key in value or any(_has_key(v, key) for v in value.values())
    return isinstance(value, list) and any(_has_key(v, key) for v in value)
