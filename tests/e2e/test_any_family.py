"""Families that no table names: handled by structure and completely, or refused before any compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import recipe
from tiny import LIKE_LLAMA, build_model, save_tokenizer

from llmshrink import run
from llmshrink.checks.written import streamed_output
from llmshrink.errors import PlanError
from llmshrink.formats.runtimes import FAMILIES as NAMED
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.progress import Silent

pytestmark = pytest.mark.slow

ROUNDING = 1e-5  # of logits, as a share of their spread: sums in another order
SMALL = 0.04  # of a block's weights that may be left: routers, short convolutions, tables of state spaces
RTN = {"name": "rtn", "bits": 4, "group_size": 32}

EXPERTS = {"moe_intermediate_size": 64, "num_experts_per_tok": 2}
LATENT = {  # attention through a narrow latent
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
DELTA = {  # linear attention with a delta rule
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
HEADS = {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}

# Configuration class, where it differs from LIKE_LLAMA, and the kinds of modules whose large weights are left.
HANDLED: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "phi": ("PhiConfig", {}, set()),  # attention and MLP side by side, biases
    "stablelm": ("StableLmConfig", {}, set()),
    "starcoder2": ("Starcoder2Config", {}, set()),
    "gptj": ("GPTJConfig", {"n_positions": 128, "rotary_dim": 8, "n_inner": 128}, set()),
    "mpt": ("MptConfig", {"expansion_ratio": 2, "max_seq_len": 128, "tie_word_embeddings": True}, set()),
    "cohere": ("CohereConfig", {"tie_word_embeddings": True}, set()),
    "granite": ("GraniteConfig", {"attention_multiplier": 0.25, "residual_multiplier": 0.5}, set()),
    "glm4": ("Glm4Config", {"head_dim": 16}, set()),
    "nemotron": ("NemotronConfig", {}, set()),  # no gate in the MLP
    "smollm3": ("SmolLM3Config", {}, set()),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}, {"OlmoeTopKRouter"}),
    "deepseek-v3": (
        "DeepseekV3Config",  # a dense block, then one with experts of which one is shared
        {**EXPERTS, **LATENT, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
        {"DeepseekV3TopkRouter"},
    ),
    "qwen3-next": (
        "Qwen3NextConfig",
        {**EXPERTS, **DELTA, "num_experts": 4, "shared_expert_intermediate_size": 64, "head_dim": 16},
        {"Qwen3NextTopKRouter", "Conv1d"},
    ),
    "lfm2": (
        "Lfm2Config",
        {"layer_types": ["conv", "full_attention"], "block_ff_dim": 128, "block_auto_adjust_ff_dim": False},
        {"Conv1d"},
    ),
    "falcon-h1": ("FalconH1Config", {**HEADS, "head_dim": 16}, {"Conv1d"}),  # attention and a state space side by side
    "bamba": ("BambaConfig", {**HEADS, "attn_layer_indices": [1]}, {"Conv1d"}),  # its blocks return a pair
    "nemotron-h": (  # experts without a gate
        "NemotronHConfig",
        {
            **EXPERTS,
            "layers_block_type": ["mamba", "moe", "attention", "mlp"],
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "moe_shared_expert_intermediate_size": 64,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
            "head_dim": 16,
            "chunk_size": 16,
        },
        {"NemotronHTopkRouter", "Conv1d"},
    ),
    "phimoe": ("PhimoeConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}, {"it is a router"}),
    "hunyuan-moe": (  # its routers are linears
        "HunYuanMoEV1Config",
        {"num_experts": 4, "moe_topk": 2, "head_dim": 16, "moe_intermediate_size": 64, "use_qk_norm": True},
        {"it is a router"},
    ),
}

# Configuration class, where it differs, and the gist of the refusal.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt-oss": (
        "GptOssConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
        "GptOssForCausalLM: its fused experts are transposed, or have biases",
    ),
    "rwkv": (
        "RwkvConfig",
        {"context_length": 128, "attention_hidden_size": 64},
        "RwkvForCausalLM: its blocks cannot be run one by one",
    ),
    "granitemoe": (
        "GraniteMoeConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        r"GraniteMoeForCausalLM: only \d+% of the weights in its blocks can be compressed: GraniteMoeExperts",
    ),
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function family -> folder of its tiny random model, each built once."""
    root = tmp_path_factory.mktemp("any-family")

    def folder(family: str) -> Path:
        name, differs, _ = {**HANDLED, **REFUSED}[family]
        config = getattr(transformers, name)(**{**LIKE_LLAMA, **differs})
        assert all(config.model_type not in known.model_types for known in NAMED), "found by structure alone"
        if not (path := root / family).exists():
            build_model(path, config)
        return path

    return folder


@pytest.mark.parametrize("family", HANDLED)
def test_block_by_block_gives_the_logits_of_the_whole_model(folder_of: Callable[[str], Path], family: str) -> None:
    folder = folder_of(family)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.set_experts_implementation("eager")
    tokens = torch.randint(0, model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
    assert expected.std() > 0.05, "without a spread any comparison passes"
    found = streamed_output(StreamedModel(open_source(str(folder)), torch.device("cpu")), tokens)
    assert (found - expected).abs().max() <= ROUNDING * expected.std()


@pytest.mark.parametrize("family", HANDLED)
def test_every_large_weight_is_a_matrix_or_left_for_a_known_reason(
    folder_of: Callable[[str], Path], family: str
) -> None:
    model = StreamedModel(open_source(str(folder_of(family))), torch.device("cpu"))
    infos, anatomy = model.weights.infos, model.anatomy
    blocks, count = anatomy.blocks, model.source.config.num_hidden_layers
    assert len(blocks) == count and not anatomy.unused
    large = {key for block in blocks for key in block.keys if len(infos[key].shape) >= 2}
    matrices = {m.key for block in blocks for m in block.matrices}
    left = {key: why for block in blocks for key, why in block.left}
    assert matrices | left.keys() == large and not matrices & left.keys()
    assert {why.partition(".")[0] for why in left.values()} == HANDLED[family][2]
    assert sum(infos[key].numel for key in left) <= SMALL * sum(infos[key].numel for key in large)
    # Outside the blocks are tables and the head: looked up by token or position, never multiplied in a block.
    embeddings = (torch.nn.Embedding, type(model.model.get_output_embeddings()))
    outside = {k: p for p, origin in model.map.origins.items() for k in origin.keys if k in anatomy.others}
    owners = [model.model.get_submodule(p.rpartition(".")[0]) for k, p in outside.items() if len(infos[k].shape) >= 2]
    assert owners and all(isinstance(owner, embeddings) for owner in owners)


@pytest.mark.parametrize("family", HANDLED)
def test_quantized_it_verifies(folder_of: Callable[[str], Path], text_file: Path, tmp_path: Path, family: str) -> None:
    report = run.execute(recipe(folder_of(family), tmp_path / "out", text_file, RTN), progress=Silent())
    stage = report.stages[0]
    assert {c.name for c in stage.checks} == {"sizes", "hashes", "decode", "copied", "blocks", "reader"}
    assert all(check.passed for check in stage.checks)
    assert stage.planned_bytes_after == stage.bytes_after


@pytest.mark.parametrize("family", REFUSED)
def test_what_is_not_understood_is_refused_at_plan_time(
    folder_of: Callable[[str], Path], text_file: Path, tmp_path: Path, family: str
) -> None:
    with pytest.raises(PlanError, match=REFUSED[family][2]) as refusal:
        run.make_plan(recipe(folder_of(family), tmp_path / "out", text_file, RTN))
    assert refusal.value.exit_code == 3


def test_a_model_without_a_causal_head_is_refused(tmp_path: Path, text_file: Path) -> None:
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 160}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))
    model.save_pretrained(tmp_path / "t5")
    with pytest.raises(PlanError, match="T5ForConditionalGeneration: models of an encoder and a decoder"):
        run.make_plan(recipe(tmp_path / "t5", tmp_path / "out", text_file, RTN))


def test_the_language_part_of_a_model_that_sees(tmp_path: Path, text_file: Path) -> None:
    text = transformers.Gemma3TextConfig(**{**LIKE_LLAMA, "head_dim": 16, "tie_word_embeddings": True})
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 56, "patch_size": 14}, mm_tokens_per_image=4
    )
    torch.manual_seed(7)
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    # Two schemes: the settings then name each module, and its name in memory is not that on disk.
    wanted = recipe(
        tmp_path / "model", tmp_path / "out", text_file, RTN, stage={"layers": {".*down_proj": {"bits": 8}}}
    )
    report = run.execute(wanted, progress=Silent())
    assert all(check.passed for check in report.stages[0].checks) and len(report.stages[0].layers) == 14
    told = [event.message for event in report.events if event.kind == "left_dense"]
    assert len(told) == 1 and "lie outside the blocks" in told[0] and "vision_tower" in told[0]
    model, info = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
