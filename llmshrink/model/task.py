"""What a model is for: the class of transformers that loads it, and what it gives out that can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from llmshrink.errors import PlanError


@dataclass(frozen=True)
class Task:
    """One kind of model."""

    name: str  # the Hub's pipeline_tag
    auto: str  # the class that loads such a model whatever its family
    gives: str  # what comes out, in words
    classes: Mapping[str, Any] = field(repr=False, compare=False)  # model_type -> name(s) of its class
    by_row: bool = False  # one result for a row, not one for each token

    @property
    def causal(self) -> bool:
        """Whether it predicts the next token: only such a model has a perplexity and can be sampled from."""
        return self.auto == "AutoModelForCausalLM"

    @property
    def loader(self) -> Any:
        """The Auto class itself."""
        return getattr(transformers, self.auto)

    def output(self, result: Any) -> Tensor:
        """Of what a forward pass returns, the tensor to compare: [rows, length, width]; length 1 with `by_row`."""
        values: Tensor = result.last_hidden_state if self.auto == "AutoModel" else result.logits
        return values[:, None] if self.by_row else values


CAUSAL = Task("text-generation", "AutoModelForCausalLM", "logits", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
MASKED = Task("fill-mask", "AutoModelForMaskedLM", "logits", MODEL_FOR_MASKED_LM_MAPPING_NAMES)
SEQUENCES = Task(
    "text-classification",
    "AutoModelForSequenceClassification",
    "class logits",
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    by_row=True,
)
TOKENS = Task(
    "token-classification",
    "AutoModelForTokenClassification",
    "class logits",
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)
STATES = Task("feature-extraction", "AutoModel", "hidden states", MODEL_MAPPING_NAMES)


def task_of(config: PretrainedConfig) -> Task:
    """What a model is for, by the class that its config.json names.

    A decoder is a causal language model unless its class is a classifier: many folders name no class, their own, or
    the one without a head. An encoder may have any of many heads, and none may be lost: its class must be known.

    Raises:
        PlanError: a model of encoder and decoder, or an encoder with a head that is not supported.
    """
    name = next(iter(config.architectures or ()), None)
    if getattr(config, "is_encoder_decoder", False):
        raise PlanError(f"{name or config.model_type}: models of an encoder and a decoder are not supported.")
    encoder = config.model_type in MASKED.classes and not getattr(config, "is_decoder", False)
    if encoder and name is None:
        return STATES
    for task in (MASKED, SEQUENCES, TOKENS, STATES) if encoder else (SEQUENCES, TOKENS):
        known = task.classes.get(config.model_type, ())
        if name in ((known,) if isinstance(known, str) else known):
            return task
    if encoder:
        raise PlanError(
            f"{name}: encoders with this head are not supported.",
            hint="Supported: without a head, for masked tokens, and for the classification of rows or of tokens.",
        )
    return CAUSAL


def positions(model: PreTrainedModel) -> int | None:
    """Tokens that a row can have at most, or None where nothing bounds them.

    RoBERTa and its kin number positions from behind the padding index, so the first rows of their table are not used.
    """
    longest: int | None = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not longest:
        return None
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding) and m is not model.get_input_embeddings())
    skipped = (t.padding_idx + 1 for t in tables if t.num_embeddings == longest and t.padding_idx is not None)
    return longest - max(skipped, default=0)
