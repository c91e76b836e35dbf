"""Files planned from shapes alone, written one tensor at a time, read back by us and by transformers."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import pytest
import torch
from gguf_files import CHANGES, FAMILIES, plan, rounded, shards, write
from tiny import VOCABULARY, build_model, config
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llmshrink.demo import MODEL_DIR
from llmshrink.errors import PlanError
from llmshrink.gguf.blueprint import CAST, PREFIX
from llmshrink.gguf.checkpoint import SINGLE, GgufCheckpoint
from llmshrink.io.files import sha256
from llmshrink.io.gguf import GgufFile

TOKENS = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
FLOAT32 = ("position_embd.weight", "transformer.wpe.weight")  # besides vectors


@pytest.fixture(scope="module")
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    build_model(folder, config(request.param, **CHANGES.get(request.param, {})))
    return folder


def expected(key: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.ndim == 1 or key in FLOAT32 else tensor


@pytest.mark.parametrize("type", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("source", FAMILIES, indirect=True)
def test_what_is_read_back_is_what_was_given(source: Path, tmp_path: Path, type: str) -> None:
    tensors = shards(source, type)
    found = GgufCheckpoint.open(write(source, tmp_path / "out", type).parent)
    assert found.infos.keys() == tensors.keys()
    for key, tensor in tensors.items():
        read, info = found.get(key), found.infos[key]
        assert (read.dtype, tuple(read.shape)) == (info.dtype, info.shape)
        if "norm" in key and "gemma" in str(source):  # 1 was added and taken away in float32
            assert torch.allclose(read, tensor, rtol=0, atol=2**-23)
        else:
            assert torch.equal(read, expected(key, tensor)) and read.dtype == expected(key, tensor).dtype


@pytest.mark.parametrize("source", FAMILIES, indirect=True)
def test_sizes_are_exact_and_bytes_the_same_each_time(source: Path, tmp_path: Path) -> None:
    tensors = shards(source, "F16")
    blueprint = plan(source, tensors, "F16")
    first = blueprint.write(tmp_path / "1.gguf", tensors.__getitem__)
    second = plan(source, dict(reversed(tensors.items())), "F16").write(tmp_path / "2.gguf", tensors.__getitem__)
    assert first == second == sha256(tmp_path / "2.gguf")
    assert (tmp_path / "1.gguf").stat().st_size == blueprint.size


@pytest.mark.filterwarnings("ignore")  # transformers' reader of GGUF files warns of its own code
@pytest.mark.parametrize("type", ["F32", "F16"])
@pytest.mark.parametrize("source", FAMILIES, indirect=True)
def test_transformers_computes_the_same_from_it(source: Path, tmp_path: Path, type: str) -> None:
    write(source, tmp_path / "out", type)
    known = AutoConfig.from_pretrained(source)
    # It makes a configuration from the metadata, but leaves out some of it for these.
    more = {"config": known} if known.model_type in ("qwen3", "gemma2", "gemma3_text", "phi3", "gpt2") else {}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=SINGLE, dtype=torch.float32, **more)
    with torch.no_grad():
        ours = rounded(source, type)(TOKENS[:, :16]).logits  # within the window, which it forgets for mistral
        assert ours.std() > 0.5
        assert torch.equal(model(TOKENS[:, :16]).logits, ours)


@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_the_vocabulary(tmp_path: Path) -> None:
    write(MODEL_DIR, tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=SINGLE)
    text = "Once upon a time there were 12 foxes."
    ours = AutoTokenizer.from_pretrained(MODEL_DIR)
    assert theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) == text
    assert theirs.convert_ids_to_tokens(range(1024)) == ours.convert_ids_to_tokens(range(1024))


@pytest.mark.parametrize("source", ["llama"], indirect=True)
def test_quantized_rows_are_carried_as_they_are(source: Path, tmp_path: Path) -> None:
    tensors = shards(source)
    wanted = {"self_attn.q_proj": "Q8_0", "self_attn.k_proj": "Q4_0", "mlp.down_proj": "Q5_1"}
    for name, kind in wanted.items():
        weight = tensors.pop(f"model.layers.1.{name}.weight")
        packed = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])
        tensors[f"model.layers.1.{name}.weight.{kind}"] = torch.from_numpy(packed)
    blueprint = plan(source, tensors, "Q4_K_M")
    blueprint.write(tmp_path / SINGLE, tensors.__getitem__)
    assert (tmp_path / SINGLE).stat().st_size == blueprint.size
    found = GgufCheckpoint.open(tmp_path)
    assert found.infos.keys() == tensors.keys()
    assert all(torch.equal(found.get(key), tensor) for key, tensor in tensors.items())
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / SINGLE).tensors}
    queries = theirs["blk.1.attn_q.weight"]
    assert queries.tensor_type.name == "Q8_0" and queries.shape.tolist() == [64, 64]
    # Quantized or not, rows are moved alike.
    moved = gguf.quants.dequantize(queries.data, queries.tensor_type)
    ours = gguf.quants.dequantize(tensors["model.layers.1.self_attn.q_proj.weight.Q8_0"].numpy(), queries.tensor_type)
    assert torch.equal(
        torch.from_numpy(ours.copy()).view(4, 2, 8, 64).transpose(1, 2).reshape(64, 64), torch.tensor(moved)
    )
    assert found.infos["model.layers.1.mlp.down_proj.weight.Q5_1"].shape == (64, 96)


@pytest.mark.parametrize("source", ["llama-tied"], indirect=True)
def test_a_head_that_is_the_embedding_is_written_once(source: Path, tmp_path: Path) -> None:
    tensors = shards(source)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    plan(source, tensors).write(tmp_path / SINGLE, tensors.__getitem__)
    assert "output.weight" not in GgufFile.open(tmp_path / SINGLE).entries


@pytest.mark.parametrize("source", ["gpt2"], indirect=True)
def test_keys_without_a_prefix_and_tables_of_old_checkpoints(source: Path, tmp_path: Path) -> None:
    tensors = {key.removeprefix("transformer."): tensor for key, tensor in shards(source).items()}
    old = {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    plan(source, {**tensors, **old}).write(tmp_path / SINGLE, tensors.__getitem__)
    assert GgufFile.open(tmp_path / SINGLE).metadata[PREFIX] == ""
    assert GgufCheckpoint.open(tmp_path).infos.keys() == tensors.keys()


@pytest.mark.parametrize("source", ["gemma2"], indirect=True)
def test_what_cannot_be_written_is_refused(source: Path) -> None:
    tensors = shards(source)
    with pytest.raises(PlanError, match="float64"):
        plan(source, {**tensors, "model.norm.weight": torch.zeros(64, dtype=torch.float64)})
    with pytest.raises(PlanError, match="no embedding"):
        plan(source, {key: tensor for key, tensor in tensors.items() if "embed" not in key})
    shutil.copytree(source, source / "untied", ignore=shutil.ignore_patterns("untied"))
    settings = AutoConfig.from_pretrained(source)
    settings.tie_word_embeddings = False
    settings.save_pretrained(source / "untied")
    with pytest.raises(PlanError, match="tied"):
        plan(source / "untied", tensors)


@pytest.mark.parametrize("source", ["llama"], indirect=True)
def test_what_is_said_of_the_whole_file(source: Path, tmp_path: Path) -> None:
    found = GgufFile.open(write(source, tmp_path / "out", "BF16")).metadata
    assert (found["general.architecture"], found["general.name"], found["general.license"]) == (
        "llama",
        "tiny",
        "apache-2.0",
    )
    assert (found["general.file_type"], found["general.quantization_version"]) == (32, 2)
    assert len(found[CAST].values()) == 14  # type: ignore[union-attr]
    assert PREFIX not in found
