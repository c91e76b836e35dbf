"""Code in a model's folder: pickles, Python files, kernels from the Hub, templates. None of it runs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
import pytest
from hub import Hub

from llmshrink.cli import main

Refused = Callable[..., tuple[int, str, set[str]]]


class Trap:
    """Unpickled, it writes to the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"echo run > {self.canary}",)


def trapped(canary: Path) -> bytes:
    import pickle

    return pickle.dumps(Trap(canary))


def edit(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; those of `text_config` are added to it."""
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**data, **changes}))


PICKLES = ["pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "model.pt", "consolidated.00.pth"]
PICKLES += ["rng_state.pth", "model.ckpt", "tokenizer.pkl", "vocab.pkl", "pytorch_model-00001-of-00002.bin"]


def test_the_trap_works(tmp_path: Path) -> None:
    """A canary that cannot sing proves nothing."""
    import pickle

    pickle.loads(trapped(tmp_path / "sung"))
    assert (tmp_path / "sung").read_text() == "run\n"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt"])
def test_a_model_of_pickles_is_refused(attack: Callable[..., str], model: Path, canary: Path, name: str) -> None:
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(trapped(canary))
    said = attack(5, model)
    assert name in said and "pickle is not read" in said


def test_pickles_and_code_beside_good_weights_are_neither_read_nor_copied(
    refused: Refused, model: Path, canary: Path, tmp_path: Path
) -> None:
    """With the reader: what transformers loads is the output, and for `eval` the source."""
    code = f"open({str(canary)!r}, 'w').write('run')\n"
    for name in PICKLES:
        (model / name).write_bytes(trapped(canary))
    scripts = [
        "modeling_llama.py",
        "tokenization.py",
        "LICENSE.py",
        "chat_template.py",
        "tokenizer.json.py",
        "setup.py",
    ]
    for folder in ("", "LICENSES", "tokenizer_x", "1_Pooling", "custom_generate"):
        (model / folder).mkdir(exist_ok=True)
        for name in (*scripts, "generate.py", "__init__.py", "sitecustomize.py", "conftest.so"):
            (model / folder / name).write_text(code)
    found, said, left = refused(model, "--method", "rtn")
    assert (found, left) == (0, {"out"}), said
    written = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert not [name for name in written if not name.endswith((".json", ".safetensors", ".yaml", ".md"))], written
    assert main(["eval", str(model), "--set", "evaluation.data=[]"]) == 0


def test_the_reader_takes_no_pickle_where_weights_have_a_name_of_their_own(model: Path, canary: Path) -> None:
    """transformers looks for model.safetensors first and for pytorch_model.bin next."""
    (model / "model.safetensors").rename(model / "weights-4bit.safetensors")
    (model / "pytorch_model.bin").write_bytes(trapped(canary))
    assert main(["eval", str(model), "--set", "evaluation.data=[]"]) == 0


AUTO_MAP = {
    "AutoConfig": "code.Surprise",
    "AutoModelForCausalLM": "code.Surprise",
    "AutoTokenizer": ["code.Surprise"] * 2,
}
WITH_CODE: dict[str, Callable[[Path], object]] = {
    "in config.json": lambda f: edit(f / "config.json", model_type="surprise", auto_map=AUTO_MAP),
    "without a type": lambda f: edit(f / "config.json", model_type=None, auto_map=AUTO_MAP),
    "in text_config": lambda f: edit(f / "config.json", model_type="surprise", text_config={"auto_map": AUTO_MAP}),
    "in a list": lambda f: edit(f / "config.json", model_type="surprise", parts=[[{"auto_map": AUTO_MAP}]]),
    "of a repository": lambda f: edit(f / "config.json", model_type="x", auto_map={"AutoConfig": "evil/repo--code.X"}),
    "in tokenizer_config.json": lambda f: edit(
        f / "tokenizer_config.json", tokenizer_class="Surprise", auto_map=AUTO_MAP
    ),
}


@pytest.mark.parametrize("harm", WITH_CODE.values(), ids=WITH_CODE)
def test_a_model_that_needs_its_own_code_is_refused(
    attack: Callable[..., str], model: Path, canary: Path, harm: Callable[[Path], object]
) -> None:
    (model / "code.py").write_text(f"open({str(canary)!r}, 'w').write('run')\n")
    harm(model)
    assert "auto_map" in attack(5, model)
    assert "code" not in sys.modules or str(model) not in str(sys.modules["code"].__file__)


UNNEEDED: dict[str, Callable[[Path], object]] = {
    "in config.json": lambda f: edit(f / "config.json", auto_map=AUTO_MAP),
    "in tokenizer_config.json": lambda f: edit(f / "tokenizer_config.json", auto_map=AUTO_MAP),
    "in processor_config.json": lambda f: edit(
        f / "processor_config.json", auto_map={"AutoProcessor": "code.Surprise"}
    ),
    "in preprocessor_config.json": lambda f: edit(f / "preprocessor_config.json", auto_map=AUTO_MAP),
    "in generation_config.json": lambda f: edit(f / "generation_config.json", auto_map=AUTO_MAP),
    "custom_generate": lambda f: edit(f / "generation_config.json", custom_generate="evil/repo"),
}


@pytest.mark.parametrize("harm", UNNEEDED.values(), ids=UNNEEDED)
def test_code_that_transformers_does_not_need_is_not_run(
    refused: Refused, model: Path, canary: Path, without_reader: None, harm: Callable[[Path], object]
) -> None:
    (model / "code.py").write_text(f"open({str(canary)!r}, 'w').write('run')\n")
    harm(model)
    found, said, left = refused(model, "--method", "gptq")
    assert (found, left) == (0, {"out"}), said


KERNELS: dict[str, dict[str, Any]] = {
    "attention": {"attn_implementation": "kernels-community/flash-attn2"},
    "of another owner": {"attn_implementation": "evil/kernel@main:function"},
    "the old name": {"_attn_implementation": "evil/kernel"},
    "the internal name": {"_attn_implementation_internal": "evil/kernel"},
    "experts": {"experts_implementation": "evil/kernel"},
    "experts, the internal name": {"_experts_implementation_internal": "evil/kernel"},
    "for parts": {"attn_implementation": {"": "sdpa", "text_config": "evil/kernel"}},
    "in text_config": {"text_config": {"attn_implementation": "evil/kernel"}},
}


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked of the package `kernels`, which fetches code from the Hub and runs it; it seems installed."""
    from transformers import modeling_utils
    from transformers.integrations import hub_kernels

    asked: list[str] = []
    package = ModuleType("kernels")
    package.get_kernel = lambda name, *_, **__: asked.append(name)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kernels", package)
    for place in (modeling_utils, hub_kernels):
        for name in ("is_kernels_available", "_kernels_available"):
            if hasattr(place, name):
                monkeypatch.setattr(place, name, (lambda *_, **__: True) if name[0] == "i" else True)
    monkeypatch.setattr(hub_kernels, "get_kernel", package.get_kernel, raising=False)  # type: ignore[attr-defined]
    return asked


@pytest.mark.parametrize("keys", KERNELS.values(), ids=KERNELS)
def test_kernels_from_the_hub_are_refused(
    attack: Callable[..., str], model: Path, kernels: list[str], keys: dict[str, Any]
) -> None:
    edit(model / "config.json", **keys)
    assert "code from the Hub" in attack(5, model)
    assert not kernels


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "paged|flash_attention_2", "nonsense"])
def test_a_named_implementation_is_not_fetched(
    refused: Refused, model: Path, kernels: list[str], without_reader: None, name: str
) -> None:
    """transformers takes one from the Hub where a package is not installed."""
    edit(model / "config.json", attn_implementation=name, _attn_implementation_autoset=True)
    found, said, left = refused(model, "--method", "rtn")
    assert (found, left, kernels) == (0, {"out"}, []), said


def test_templates_are_never_rendered(
    refused: Refused, model: Path, without_reader: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(jinja2.Environment, "compile", lambda _, source, *__, **___: compiled.append(source))
    evil = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for i in range(10**9) %}x{% endfor %}"
    (model / "chat_template.jinja").write_text(evil)
    edit(model / "tokenizer_config.json", chat_template=evil)
    assert refused(model, "--method", "gptq")[0] == 0
    assert not compiled and (tmp_path / "out" / "chat_template.jinja").read_text() == evil


@pytest.mark.parametrize("name", ["os.system", "subprocess.Popen", "__import__", "../../code", "builtins.eval", "Path"])
def test_a_tokenizer_class_that_names_something_else(
    refused: Refused, model: Path, canary: Path, without_reader: None, name: str
) -> None:
    (model / "code.py").write_text(f"open({str(canary)!r}, 'w').write('run')\n")
    edit(model / "tokenizer_config.json", tokenizer_class=name, name_or_path=f"touch {canary}")
    edit(model / "config.json", tokenizer_class=name, architectures=[name])
    found, said, left = refused(model)
    assert (found, left) in ((0, {"out"}), (8, set()), (3, set())) and "internal error" not in said, said


def test_a_data_set_with_a_script_is_refused(hub: Hub, refused: Refused, model: Path, canary: Path) -> None:
    script = f"open({str(canary)!r}, 'w').write('run')\n"
    hub.add("datasets/owner/texts", {"texts.py": script.encode(), "README.md": b"x"})
    found, said, left = refused(model, "--calibration", "owner/texts")
    assert (found, left) == (5, {"home"}) and "does not run code" in said
