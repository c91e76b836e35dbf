"""A GGUF mix such as Q4_K_M as a method for every matrix."""

from __future__ import annotations

from collections.abc import Iterable

from llmshrink.errors import PlanError
from llmshrink.formats.gguf import FLOATS
from llmshrink.formats.gguf_mix import MIXES, ROLES, SAID, Place, tensor_type, wanted_type
from llmshrink.forms import Event
from llmshrink.gguf.names import family_of
from llmshrink.methods import load_method
from llmshrink.model.anatomy import Matrix
from llmshrink.model.streamed import StreamedModel
from llmshrink.recipe.method import DEFAULT_METHOD, MethodSpec
from llmshrink.recipe.stages import MatrixStage

CAST = {name: str(dtype).removeprefix("torch.") for name, dtype in FLOATS.items()}  # what `cast` calls the floats
BY_BITS = {2: "Q2_K", 3: "Q3_K_M", 4: "Q4_K_M", 8: "Q8_0"}  # the mix that people mean by a number


def mix_of(stage: MatrixStage) -> str | None:
    """The mix that a stage asks for; None where it does not write GGUF.

    Raises:
        PlanError: it names a mix, and bits or groups too.
    """
    if stage.format is None or stage.format.name != "gguf":
        return None
    settings, name = (stage.method.settings, stage.method.name) if stage.method else ({}, None)
    said = sorted(settings.keys() & SAID)
    if name == "cast":
        usual = settings.get("dtype") or CAST.get(stage.format.type or "F16")
        floats = {dtype: kind for kind, dtype in CAST.items()}.get(str(usual))
        if floats is None or stage.format.type not in (None, floats):
            made = floats or " or ".join(CAST)
            raise PlanError(f"The method cast gives {made}, and the type is {stage.format.type}.")
        return floats
    if said == ["bits"] and stage.format.type is None:
        return BY_BITS[settings["bits"]]
    if said:
        raise PlanError(
            f"A GGUF type says the bits and the groups of every matrix: {', '.join(said)} cannot be chosen beside it.",
            hint=f"Choose a type: --type {' | '.join(MIXES)}; or the bits alone (--bits 4 is {BY_BITS[4]}).",
        )
    return stage.format.type or BY_BITS[4]


def mix_specs(
    mix: str, stage: MatrixStage, model: StreamedModel, events: list[Event]
) -> dict[Matrix, MethodSpec | None]:
    """The method of every matrix, the embedding's and the head's too; None leaves one as it is.

    Raises:
        PlanError: `layers` names bits or groups, which the type says.
    """
    typed = stage.method or MethodSpec.model_validate({})
    kept = {key: value for key, value in typed.settings.items() if key != "bits"}
    if typed.name == "cast":
        kept["dtype"] = CAST[mix]
    method = MethodSpec.model_validate({**kept, "name": typed.name or DEFAULT_METHOD})
    found: dict[Matrix, MethodSpec | None] = {}
    for matrix in model.anatomy.matrices:
        spec = stage.method_for(matrix.name, method)
        if spec is None:
            found[matrix] = None
            continue
        if said := sorted(spec.settings.keys() & (SAID - {"type"})):
            raise PlanError(
                f"`layers` sets {', '.join(said)} of {matrix.name}, which a GGUF type says.",
                hint="Give the layer a type: {type: Q6_K}, or {name: cast} for 16 bits.",
            )
        weighted = load_method(spec.name or DEFAULT_METHOD).needs.bytes(1) > 0
        place = _place(matrix, model, weighted)
        wanted, kind = wanted_type(mix, place), tensor_type(mix, place)
        found[matrix] = _typed(spec, matrix, kind)
        if kind != wanted and "type" not in spec.settings:
            message = f"{kind} in place of {wanted}, whose blocks do not divide the width {matrix.shape[1]}"
            events.append(Event("block_type", message, matrix.name))
    return found


def says_types(stage: MatrixStage, method: MethodSpec, matrices: Iterable[Matrix]) -> bool:
    """Whether the mix says the type of any matrix: where `layers` gives all of them types, its name says nothing."""
    specs = (stage.method_for(matrix.name, method) for matrix in matrices)
    return any(
        spec is not None and "type" not in spec.settings and "cast" not in {spec.name} - {method.name} for spec in specs
    )


def _typed(spec: MethodSpec, matrix: Matrix, usual: str) -> MethodSpec:
    """A method with the type that a matrix gets; another method where the type or the matrix asks for it."""
    cls, kind = load_method(spec.name or DEFAULT_METHOD), str(spec.settings.get("type", usual))
    if "type" not in cls.Config.model_fields:
        return spec
    if kind in CAST:
        return MethodSpec.model_validate({"name": "cast", "dtype": CAST[kind]})
    if matrix.kind != "embedding" or cls.baseline is None:
        return MethodSpec.model_validate({**spec.settings, "name": spec.name, "type": kind})
    # Its rows are looked up, not multiplied with inputs: only its weights count.
    fields = load_method(cls.baseline).Config.model_fields
    settings = {key: value for key, value in spec.settings.items() if key in fields}
    return MethodSpec.model_validate({**settings, "name": cls.baseline, "type": kind})


def _place(matrix: Matrix, model: StreamedModel, weighted: bool) -> Place:
    config = model.source.config
    name = family_of(config.model_type).name(matrix.key) or ""
    part = name.removesuffix(".weight")
    block, _, role = part.rpartition(".")
    return Place(
        role=ROLES.get(role, "other"),
        width=matrix.shape[1],
        layer=int(block.removeprefix("blk.") or 0),
        layers=len(model.anatomy.blocks),
        heads_per_kv=config.num_attention_heads
        // (getattr(config, "num_key_value_heads", None) or config.num_attention_heads),
        tied=bool(config.tie_word_embeddings),
        importance=weighted,
    )
