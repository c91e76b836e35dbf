"""What each kind of adapter is to peft, and how many numbers it has: one place for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, islice, repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmshrink.errors import PlanError
from llmshrink.model.anatomy import block_list
from llmshrink.recipe.adapter import WRITES_MODEL, AdapterSpec

if TYPE_CHECKING:
    from peft import PeftConfig

PRODUCTS = ("lora", "rslora", "dora", "qlora", "loftq")  # kinds that are LoRA to peft
PROMPTS = ("prefix", "prompt", "p-tuning")
IN_FOUR_BITS = ("qlora", "loftq")  # kinds whose model is in memory as NF4
WARM, COOL, EVERY = 0.1, 0.3, 100  # of AdaLoRA: shares of the steps before and after ranks move, times that they do
WIDER = 1.5  # the ranks that AdaLoRA begins with, over those that it ends with
INTO_THE_MLP = "feedforward"


@dataclass(frozen=True)
class Linears:
    """The linears that get an adapter, by their modules' names in memory.

    Attributes:
        names: As short as is enough to tell them from all other modules.
        wide: Those of them that narrow what is inside an MLP.
        transposed: Whether they are Conv1Ds, which hold [in, out].
    """

    names: tuple[str, ...]
    wide: tuple[str, ...]
    transposed: bool


def peft_config(
    spec: AdapterSpec, linears: Linears, *, steps: int, task: str = "CAUSAL_LM", heads: list[str] | None = None
) -> PeftConfig:
    """What peft calls an adapter.

    Args:
        spec: what the recipe says.
        linears: beside which it stands.
        steps: of gradient, over which AdaLoRA moves its ranks.
        task: in peft's words.
        heads: modules that are not of the model that comes in: they learn as a whole.
    """
    import peft  # seconds, which only those who adapt should pay for

    common: dict[str, Any] = {"task_type": task}
    beside = {**common, "target_modules": list(linears.names), "modules_to_save": heads}
    if spec.name in PRODUCTS:
        return peft.LoraConfig(
            **beside,
            **_product(spec, linears),
            r=spec.rank,
            use_rslora=spec.name == "rslora",
            use_dora=spec.name == "dora",
        )
    if spec.name == "adalora":
        assert spec.rank is not None
        return peft.AdaLoraConfig(
            **beside,
            **_product(spec, linears),
            target_r=spec.rank,
            init_r=max(spec.rank + 1, round(WIDER * spec.rank)),
            total_step=max(steps, 3),
            tinit=round(WARM * steps),
            tfinal=round(COOL * steps),
            deltaT=max(1, steps // EVERY),
        )
    if spec.name == "vera":
        return peft.VeraConfig(
            **beside, r=spec.rank, vera_dropout=spec.dropout, d_initial=0.1, fan_in_fan_out=linears.transposed
        )
    if spec.name == "ia3":
        return peft.IA3Config(**beside, feedforward_modules=list(linears.wide), fan_in_fan_out=linears.transposed)
    common["num_virtual_tokens"] = spec.tokens
    if spec.name == "prefix":
        return peft.PrefixTuningConfig(**common)
    if spec.name == "prompt":
        return peft.PromptTuningConfig(**common)
    return peft.PromptEncoderConfig(**common, encoder_hidden_size=spec.width)


def _product(spec: AdapterSpec, linears: Linears) -> dict[str, Any]:
    return {"lora_alpha": spec.alpha, "lora_dropout": spec.dropout, "fan_in_fan_out": linears.transposed}


def first_tokens(spec: AdapterSpec, tokenizer: PreTrainedTokenizerBase | None, *, vocabulary: int, seed: int) -> Tensor:
    """Ids [1, tokens] that a prompt or a prefix begins as: those of its text over and over, or drawn.

    Args:
        spec: how many, and of which text.
        tokenizer: reads the text; None where there is none.
        vocabulary: how many tokens there are.
        seed: of what is drawn.

    Raises:
        PlanError: the text has no tokens.
    """
    assert spec.tokens is not None
    if spec.text is None or tokenizer is None:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, vocabulary, (1, spec.tokens), generator=generator)
    ids = tokenizer(spec.text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise PlanError(f"method.text: {spec.text!r} has no tokens.")
    return torch.tensor([list(islice(chain.from_iterable(repeat(ids)), spec.tokens))])


def let_learn(model: PreTrainedModel, spec: AdapterSpec) -> None:
    """Of a model's own weights, let those learn that `full` or `freeze` means, and no others."""
    model.requires_grad_(spec.name == "full")
    if spec.name == "full":
        return
    modules: list[nn.Module] = list(block_list(model)[1])[-spec.blocks :] if spec.blocks else []
    parts = spec.parts or []
    if "norms" in parts:
        modules += [module for module in model.modules() if type(module).__name__.endswith("Norm")]
    if "head" in parts:
        modules.append(model.get_output_embeddings())
    if "embedding" in parts:
        modules.append(model.get_input_embeddings())
    for module in modules:
        module.requires_grad_(True)


@dataclass(frozen=True)
class AdapterSize:
    """How large an adapter is."""

    learns: int  # numbers that learn
    bytes: int  # of all its tensors
    at_most: bool = False  # the bytes are a bound: what is left over when it has learned is known then


def adapter_size(spec: AdapterSpec, config: PeftConfig, model: PreTrainedModel) -> AdapterSize:
    """What peft makes of a model without data; of prompts, for which it needs data, the same in closed form.

    Args:
        spec: what the recipe says.
        config: that, in peft's words.
        model: on `meta`; it is changed.
    """
    import peft

    if spec.name in PROMPTS:
        return _prompt_size(spec, model)
    if spec.name in WRITES_MODEL:
        let_learn(model, spec)
        return AdapterSize(sum(p.numel() for p in model.parameters() if p.requires_grad), 0)
    adapted = peft.get_peft_model(model, config)
    learns = sum(p.numel() for name, p in adapted.named_parameters() if p.requires_grad and "ranknum" not in name)
    state = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return AdapterSize(learns, sum(tensor.nbytes for tensor in state.values()), at_most=spec.name == "adalora")


def _prompt_size(spec: AdapterSpec, model: PreTrainedModel) -> AdapterSize:
    assert spec.tokens is not None
    config = model.config.get_text_config(decoder=True)
    width = model.get_input_embeddings().embedding_dim
    numbers = spec.tokens * width
    if spec.name == "prefix":
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        numbers = spec.tokens * 2 * config.num_hidden_layers * heads * size
    saved = numbers * torch.float32.itemsize
    if spec.name != "p-tuning":
        return AdapterSize(numbers, saved)
    assert spec.width is not None
    hidden = spec.width
    return AdapterSize(numbers + (width + 1) * hidden + (hidden + 1) * hidden + (hidden + 1) * width, saved)
