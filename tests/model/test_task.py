"""What a model is for follows from its config.json; what cannot be done is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tiny import config

from llmshrink.errors import PlanError
from llmshrink.model.skeleton import build
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.model.task import task_of


@pytest.mark.parametrize(
    ("family", "named", "built"),
    [
        ("llama", None, "LlamaForCausalLM"),
        ("llama", "LlamaForCausalLM", "LlamaForCausalLM"),
        ("llama", "LlamaModel", "LlamaForCausalLM"),
        ("llama", "SomebodysLlama", "LlamaForCausalLM"),
        ("llama", "LlamaForSequenceClassification", "LlamaForSequenceClassification"),
        ("gemma3", "Gemma3ForCausalLM", "Gemma3ForCausalLM"),
        ("opt", "OPTModel", "OPTForCausalLM"),
        ("bert", None, "BertModel"),
        ("bert", "BertModel", "BertModel"),
        ("bert", "BertForMaskedLM", "BertForMaskedLM"),
        ("bert", "BertForSequenceClassification", "BertForSequenceClassification"),
        ("bert", "BertForTokenClassification", "BertForTokenClassification"),
        ("mpnet", "MPNetForMaskedLM", "MPNetForMaskedLM"),
    ],
)
def test_the_class_is_the_one_that_the_config_names(family: str, named: str | None, built: str) -> None:
    made = config(family, architectures=None if named is None else [named])
    model = build(made, torch.float32)
    assert type(model).__name__ == built
    assert task_of(made).causal == built.endswith("CausalLM")


def test_an_encoder_set_up_as_a_decoder_is_one() -> None:
    assert task_of(config("bert", architectures=["BertLMHeadModel"], is_decoder=True)).causal


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (transformers.T5Config(architectures=["T5ForConditionalGeneration"]), "T5ForConditionalGeneration: .*decoder"),
        (transformers.BartConfig(), "bart: models of an encoder and a decoder are not supported"),
        (transformers.BertConfig(architectures=["BertForQuestionAnswering"]), "BertForQuestionAnswering: .*this head"),
        (transformers.BertConfig(architectures=["BertLMHeadModel"]), "BertLMHeadModel: encoders with this head"),
        (transformers.ViTConfig(), "no text-generation model of 'vit'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(made: transformers.PretrainedConfig, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        build(made, torch.float32)


@pytest.mark.parametrize(("family", "count"), [("llama", 128), ("opt", 128), ("bert", 128), ("roberta", 126)])
def test_no_row_is_longer_than_the_table_of_positions(
    models_folder: Callable[..., Path], family: str, count: int
) -> None:
    model = StreamedModel(open_source(str(models_folder(family))), torch.device("cpu"))
    assert model.positions == count
    model.record(torch.full((1, count), 7))
    if family != "llama":  # it computes its positions
        with pytest.raises((RuntimeError, PlanError), match="bound|range|expanded"):
            model.record(torch.full((1, count + 1), 7))
