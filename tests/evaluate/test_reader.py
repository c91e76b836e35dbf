"""The foreign reader on tiny random models: what it finds, and that a broken folder is told, not read in silence."""

import json
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llmshrink.evaluate import foreign, reader
from llmshrink.evaluate.reader import ReadRequest, ReadResult, measure, read

TOKENS = torch.randint(128, (2, 24), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("models") / "dense"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def copied(folder: Path, to: Path, **changes: torch.Tensor | None) -> Path:
    """The same folder with tensors replaced, added or (None) deleted; dots in names are written `__`."""
    to.mkdir()
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_a_dense_folder_is_read_in_a_child(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    exact, stored, gone = measure(
        [
            ReadRequest(folder=str(folder), tokens=TOKENS, dtype="float32", speed=True),
            ReadRequest(folder=str(folder), tokens=TOKENS),
            ReadRequest(folder=str(folder / "nowhere")),
        ],
        timeout=120,
    )
    assert gone.found is None and gone.error is not None and "config.json" in gone.error
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    capfd.readouterr()
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor([row])).logits for row in TOKENS])
    assert exact.error is None and exact.found is not None and exact.output is not None
    assert expected.std() > 1
    torch.testing.assert_close(exact.output, expected, atol=1e-5, rtol=0)
    found = exact.found
    assert not found.misplaced() and found.class_name == "LlamaForCausalLM"
    inverse_frequencies = 2 * 4 * 8  # two float32 buffers of half a head
    weights = sum(p.numel() for p in model.parameters())
    assert found.loaded_bytes == 4 * weights + inverse_frequencies
    assert stored.found is not None and stored.found.loaded_bytes == 2 * weights + inverse_frequencies
    assert found.prefill_tokens_per_second and found.decode_tokens_per_second
    assert found.load_seconds > 0 and found.peak_bytes > 0
    assert stored.found.prefill_tokens_per_second is None and stored.found.sample is None


def test_the_child_is_silent(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    broken = copied(folder, tmp_path / "x", lm_head__weight=None)  # transformers prints a table about it
    [result] = measure([ReadRequest(folder=str(broken))], timeout=120)
    assert result.found is not None
    assert capfd.readouterr() == ("", "")


def test_keys_that_do_not_fit_are_told(folder: Path, tmp_path: Path) -> None:
    name = "model__layers__1__mlp__down_proj__weight"
    deleted = copied(folder, tmp_path / "deleted", **{name: None})
    added = copied(folder, tmp_path / "added", model__surprise=torch.ones(2))
    shape = copied(folder, tmp_path / "shape", **{name: torch.ones(3, 3)})
    first, second, third = measure([ReadRequest(folder=str(f)) for f in (deleted, added, shape)], timeout=120)
    assert first.found is not None and second.found is not None
    assert first.found.missing == ["model.layers.1.mlp.down_proj.weight"]
    assert second.found.unexpected == ["model.surprise"]
    told = third.error or ", ".join(third.found.mismatched if third.found else [])
    assert "mismatch" in told or "down_proj" in told


def test_one_changed_weight_moves_the_logits(folder: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    weight = load_file(folder / "model.safetensors")[name]
    weight[3, 5] += 1
    changed = copied(folder, tmp_path / "changed", **{name.replace(".", "__"): weight})
    good, bad = (read(ReadRequest(folder=str(f), tokens=TOKENS, dtype="float32")) for f in (folder, changed))
    assert good.output is not None and bad.output is not None
    assert (good.output - bad.output).abs().max() > 1e-3


def die(sender: Connection, request: str, threads: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang(sender: Connection, request: str, threads: int) -> None:
    time.sleep(60)


def test_a_death_and_a_hang_come_back_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_answer", die)
    assert "SIGKILL" in (measure([ReadRequest(folder="x")], timeout=120)[0].error or "")
    monkeypatch.setattr(reader, "_answer", hang)
    start = time.perf_counter()
    assert "no answer within 0.5 s" in (measure([ReadRequest(folder="x")], timeout=0.5)[0].error or "")
    assert time.perf_counter() - start < 30


def test_greedy_continues_as_generate_does(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = TOKENS[0][:8]
    with torch.inference_mode():
        new, prefill, decode = foreign.greedy(model, prompt, 10)
        expected = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, 8), max_new_tokens=10, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    assert new == expected[0, 8:].tolist() and prefill > 0 and decode > 0


def test_shared_memory_and_bitsandbytes_tables_count_once() -> None:
    from bitsandbytes.nn import Linear4bit

    shared = torch.nn.Linear(64, 64, bias=False)
    assert foreign.loaded_bytes(torch.nn.ModuleList([shared, shared])) == 4 * 64 * 64
    linear = Linear4bit(64, 64, bias=False, quant_type="nf4", compress_statistics=False)
    linear.load_state_dict({"weight": torch.randn(64, 64)})
    blocks = 64 * 64 // 64
    assert foreign.loaded_bytes(linear.to("cpu")) == 64 * 64 // 2 + 4 * blocks + 4 * 16


def test_an_answer_is_data(folder: Path) -> None:
    result = ReadResult(error="x")
    assert json.loads(result.model_dump_json(exclude={"output"})) == {"found": None, "error": "x", "unable": False}
