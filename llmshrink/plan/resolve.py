"""From a recipe and a model to the work: a method and a place on disk for every matrix, or all that cannot be done."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError
from torch import nn

from llmshrink import patterns
from llmshrink.errors import PlanError
from llmshrink.formats import format_names, load_format
from llmshrink.formats.base import Format
from llmshrink.formats.runtimes import Stored, entry
from llmshrink.forms import Codebook, CodeKind, Event, LowRank, Scheme, Sparse, Sum, learnable
from llmshrink.methods import by_weights, load_method
from llmshrink.methods.base import Method, method_name
from llmshrink.methods.inputs import Inputs
from llmshrink.model.anatomy import Matrix, Site
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.layout import lay_out, refuse
from llmshrink.plan.mix import mix_of, mix_specs, says_types
from llmshrink.plan.stacks import placed
from llmshrink.plan.targets import kind_of, targeted, with_names
from llmshrink.plan.transform import plan_transforms
from llmshrink.plan.work import Work
from llmshrink.recipe.inputs import InputSpec
from llmshrink.recipe.method import MethodSpec
from llmshrink.recipe.schema import Recipe
from llmshrink.recipe.stages import MatrixStage, TargetStage
from llmshrink.recipe.tune import TuneSpec
from llmshrink.statistics import Cross, Fisher

GROUP_SIZES = (128, 64, 32)  # what runtimes have kernels for, largest first
# Shares of weights. Of those in the blocks: without the first there is little to gain; without the second it is told.
ENOUGH, NEARLY_ALL = 0.5, 0.9
UNUSED = 0.2  # of what is on disk: heads for several tokens ahead are less, a whole encoder is more
OWN = {Sparse: "sparse", Codebook: "codebook", LowRank: "low-rank"}  # how a form is usually written
HINT = "set on_indivisible to smaller_group, skip or channel, or choose another group_size"
HINTS = {
    "cluster": "choose other bits or rows, or leave the layers out with `ignore`",
    "factorize": "choose another rank or keep, or leave the layers out with `ignore`",
}
TOWERS = 0.05  # of all weights


def resolve(recipe: Recipe, stage: MatrixStage, model: StreamedModel) -> Work:
    """Decide what happens to every matrix.

    Raises:
        PlanError: layers that cannot be done as asked (all are listed), an expression that matches nothing.
    """
    stage, mix = with_names(stage, model), mix_of(stage)
    matrices = [m for block in model.anatomy.blocks for m in block.matrices]
    targets = targeted(stage, model)
    if not matrices:
        raise PlanError(
            f"{type(model.model).__name__}: no linear layers were found in its blocks; nothing to compress."
        )
    events = _coverage(model)
    if model.weights.compressed:
        message = f"the model is stored as {model.weights.format.name}: what its codes mean is compressed again"
        events.append(Event("requantized", message))
    default = _default_method(stage, matrices, events)
    try:
        named = mix
        if mix is None:
            specs = {m: stage.method_for(m.name, default) for m in targets}
        else:
            specs = mix_specs(mix, stage, model, events)
            named = mix if says_types(stage, default, specs) else None
    except ValidationError as error:
        raise PlanError(f"The keys of the method, or in `layers`, do not fit {default.name}: {_first(error)}") from None
    _check_patterns(stage, list(specs), model)
    usual = _usual_group(stage, default, matrices, events) if mix is None else GROUP_SIZES[0]
    methods: dict[Matrix, Method[Any]] = {}
    left = {m: "`targets` does not name it" for m in matrices if m not in specs}
    for matrix, spec in specs.items():
        if spec is None:
            left[matrix] = "the recipe leaves it out"
            continue
        size = usual if stage.inputs_for(matrix.name) is None else -1  # what meets rounded inputs has no groups
        method, reason = _fit(spec, stage, matrix, size, events)
        if method is not None and mix is None and matrix.kind == "embedding" and not model.anatomy.tied:
            method = by_weights(method)  # its rows are looked up, not multiplied with inputs
        if method is None:
            left[matrix] = reason or ""
        else:
            methods[matrix] = method
    methods = placed(methods, model.anatomy.blocks)
    for matrix in list(methods):
        if why := methods[matrix].pointless(matrix.shape):
            del methods[matrix]
            left[matrix] = why
            events.append(Event("skipped", f"left as it is: {why}", matrix.name))
    problems = [f"{m.name} {list(m.shape)}: {why}" for m, method in methods.items() if (why := method.check(m.shape))]
    refuse(problems, HINTS.get(stage.task, HINT))
    if not methods:
        raise PlanError("The recipe leaves out every layer; nothing would be compressed.")
    _propagated(recipe, methods, events)
    events += [Event("caution", why, m.name) for m, method in methods.items() if (why := _caution(method))]
    chosen = _choose_format(stage, methods, events)
    if chosen.name not in ("gguf", "dense") and any(getattr(m.config, "block", None) for m in methods.values()):
        message = f"`type` names a block type of GGUF, and this is {chosen.name}"
        raise PlanError(f"{message}.", hint="Choose --format gguf, or bits and group_size in place of the type.")
    if chosen.name != "gguf" and (cast := [m.name for m, method in methods.items() if method_name(method) == "cast"]):
        message = f"{cast[0]}: other floats than the model's own are stored in GGUF only, and this is {chosen.name}"
        raise PlanError(f"{message}.", hint="Choose --type F16, BF16 or F32, or --format gguf.")
    methods = {m: type(method)(method.config, chosen.scale_dtype(m.dtype)) for m, method in methods.items()}
    methods = placed(methods, model.anatomy.blocks)
    transforms = plan_transforms(stage.transform, model, methods, events)
    pack = stage.format is not None and stage.format.pack
    work = lay_out(recipe, model, chosen, methods, _inputs(stage, methods), left, events, named, pack=pack)
    inside = [m for block in model.anatomy.blocks for m in block.matrices if m in methods and methods[m].learnable]
    if stage.reconstruct is not None and not any(learnable(work.form(m).weight) for m in inside):
        name = method_name(next(iter(methods.values())))
        raise PlanError(
            f"`reconstruct` learns integer codes, tables or floats in the blocks, and {name} has none that it can.",
            hint="Choose method gptq or rtn (for GPT-2 with --format dense or gguf), factors without `factor_bits`, or "
            "leave out `reconstruct` (--preset best).",
        )
    if work.stacks and transforms is not None:
        message = "What blocks share is made of the weights as they are before any transform"
        raise PlanError(f"{message}.", hint="Leave out `transform`, or method.blocks.")
    work.transforms, work.reconstruct = transforms, stage.reconstruct
    work.tune = _tune(stage, work)
    _check_slopes(work)
    return work


def _check_slopes(work: Work) -> None:
    """What weighing by gradients cannot do.

    Raises:
        PlanError: the model gives out no logits.
    """
    model, asked = work.model, {m for m, method in work.methods.items() if method.statistic is Fisher}
    if not asked:
        return
    if model.task.gives != "logits" or not model.distribution:
        message = f"gradients need a model that gives out logits of tokens, and this one gives out {model.task.gives}"
        raise PlanError(f"{message}.", hint="Choose weighting: hessian (--set method.weighting=hessian).")
    groups = [group for part in work.parts for group in part.groups if Fisher not in work.needs(group)]
    if plain := [m.name for group in groups for m in group.matrices if m in asked]:
        message = "experts, the embedding and the head are weighed by their inputs alone, not by gradients"
        work.events.append(Event("not_weighed", message, plain[0]))


def _tune(stage: MatrixStage, work: Work) -> TuneSpec | None:
    """How the model is tuned, or None.

    Raises:
        PlanError: it cannot be, and it is not optional.
    """
    if stage.tune is None or (why := _cannot_tune(work)) is None:
        return stage.tune
    if not stage.tune.optional:
        hint = "Leave out `tune`, or choose a method and a format that keep integer codes, such as gptq."
        raise PlanError(f"`tune` cannot be done here: {why}.", hint=hint)
    work.events.append(Event("not_tuned", f"scales and norms stay as they are: {why}"))
    return None


def _cannot_tune(work: Work) -> str | None:
    """Why scales and norms cannot be tuned, or None."""
    model = work.model
    if model.task.gives != "logits" or not model.distribution:
        return f"it learns from the original's logits of tokens, and this model gives out {model.task.gives}"
    if not work.scale_shapes:
        return f"{work.format.name} stores no scales of {method_name(next(iter(work.methods.values())))} that it learns"
    return None


def _propagated(recipe: Recipe, methods: dict[Matrix, Method[Any]], events: list[Event]) -> None:
    """What `propagate` cannot do: within a block, and for experts.

    Raises:
        PlanError: layers are to see what was compressed in their own block.
    """
    asked = [m for m, method in methods.items() if method.statistic is Cross]
    if asked and recipe.run.sequential == "subset":
        raise PlanError(
            f"{asked[0].name}: `propagate` needs the original block, and with `sequential: subset` it is partly "
            "compressed.",
            hint="Choose --sequential block, or propagate 0.",
        )
    if experts := [m.name for m in asked if m.site.expert is not None]:
        message = "`propagate` leaves out experts, which may get other tokens in the original"
        events.append(Event("not_propagated", f"{message}: {len(experts)} matrices", experts[0]))


def _first(error: ValidationError) -> str:
    found = error.errors()[0]
    return f"{'.'.join(map(str, found['loc']))}: {found['msg']}" if found["loc"] else str(found["msg"])


def _caution(method: Method[Any]) -> str | None:
    """What the user should know of a method; block types of three levels are what `ternary` makes."""
    block = getattr(method.config, "block", None)
    return load_method("ternary").caution if block is not None and block.levels is not None else method.caution


def _inputs(stage: MatrixStage, methods: Iterable[Matrix]) -> dict[Matrix, Inputs]:
    """How inputs are rounded, where they are.

    Raises:
        PlanError: matrices that are one in memory are to have other inputs.
    """
    asked = {m: stage.inputs_for(m.name) for m in methods}
    sites: dict[Site, set[InputSpec | None]] = {}
    for matrix, spec in asked.items():
        sites.setdefault(matrix.site, set()).add(spec)
    apart = [m.name for m in asked if len(sites[m.site]) > 1]
    refuse([f"{name}: another matrix gets the very same inputs, with other `inputs`" for name in apart], "say the same")
    kinds: dict[str, CodeKind] = {"int8": "int", "fp8": "float"}
    return {
        m: Inputs(kinds[spec.type], (spec.observer or "mse") if spec.scales == "static" else None)
        for m, spec in asked.items()
        if spec is not None
    }


def _coverage(model: StreamedModel) -> list[Event]:
    """What no method will see of a model whose structure nobody named.

    Raises:
        PlanError: it is the larger part.
    """
    infos, anatomy, name = model.weights.infos, model.anatomy, type(model.model).__name__
    left = {key: why for block in anatomy.blocks for key, why in block.left}
    seen = sum(m.numel for block in anatomy.blocks for m in block.matrices)
    unseen = sum(infos[key].numel for key in left)
    reasons = "; ".join(dict.fromkeys(left.values()))
    if seen < ENOUGH * (seen + unseen):
        message = f"only {seen / (seen + unseen):.0%} of the weights in its blocks can be compressed"
        raise PlanError(f"{name}: {message}: {reasons}.")
    events = []
    if seen < NEARLY_ALL * (seen + unseen):
        message = f"{unseen / (seen + unseen):.0%} of the weights in the blocks cannot be compressed: {reasons}"
        events.append(Event("uncovered", message))
    unused = sum(infos[key].numel for key in anatomy.unused if len(infos[key].shape) > 1)
    if unused > UNUSED * (unused + model.parameters):
        raise PlanError(
            f"{name}: {unused / (unused + model.parameters):.0%} of what is on disk belongs to no part of it "
            f"({anatomy.unused[0]}, ...).",
            hint="config.json names another kind of model than the weights are, or a part that is not supported.",
        )
    towers = _towers(model)
    if towers and (size := sum(infos[key].numel for key in towers)) > TOWERS * model.parameters:
        message = f"{size / model.parameters:.0%} of the weights lie outside the blocks and are left as they are"
        events.append(Event("left_dense", f"{message}: {towers[0]}, ..."))
    return events


def _towers(model: StreamedModel) -> list[str]:
    """Weights outside the blocks that are neither embeddings nor the head, the largest first: vision, audio."""
    usual = {id(m) for m in model.model.modules() if isinstance(m, nn.Embedding)}
    usual.add(id(model.model.get_output_embeddings()))
    outside = set(model.anatomy.others)
    found = [
        key
        for name, origin in model.map.origins.items()
        for key in origin.keys
        if key in outside and id(model.model.get_submodule(name.rpartition(".")[0])) not in usual
    ]
    return sorted(found, key=lambda key: -model.weights.infos[key].numel)


def _default_method(stage: MatrixStage, matrices: list[Matrix], events: list[Event]) -> MethodSpec:
    """gptq, or nf4 where transformers does not read what gptq is usually written as."""
    typed = stage.method or MethodSpec.model_validate({})
    if typed.name is not None:
        return typed
    settings = typed.settings
    if stage.inputs is not None:
        fitting = {"name": "fp8"} if stage.inputs.type == "fp8" else {"name": "gptq", "bits": 8}
        try:
            return MethodSpec.model_validate({**fitting, **settings})
        except ValidationError as error:
            what = f"Inputs {stage.inputs.type} go with method {fitting['name']}, where none is named"
            raise PlanError(f"{what}: {_first(error)}") from error
    usual = entry(Stored("compressed-tensors", frozenset(m.kind for m in matrices)), "transformers")
    plain = stage.format is None and settings.get("bits", 4) == 4 and not settings.keys() - {"bits"}
    if plain and usual.support == "no":
        events.append(Event("default_method", f"nf4 in place of gptq, as compressed-tensors: {usual.reason}"))
        return MethodSpec.model_validate({"name": "nf4"})
    return MethodSpec.model_validate({"name": "gptq", **settings})


def _usual_group(stage: MatrixStage, default: MethodSpec, matrices: list[Matrix], events: list[Event]) -> int:
    """The group size that nobody typed: 128, or one for all layers where transformers reads only one scheme."""
    name = stage.format.name if stage.format else "compressed-tensors"
    config = load_method(default.name or "gptq").Config(**default.settings)
    if getattr(config, "bits", 0) is None:  # of a pruning that rounds nothing
        return GROUP_SIZES[0]
    two = frozenset(Scheme(4, getattr(config, "symmetric", True), size) for size in GROUP_SIZES[:2])
    if entry(Stored(name, frozenset(m.kind for m in matrices), two), "transformers").support != "no":
        return GROUP_SIZES[0]
    widths = {m.shape[1] for m in matrices}  # one group as wide as a layer is another scheme: one scale per channel
    size = next((g for g in GROUP_SIZES if all(w % g == 0 for w in widths) and g not in widths), -1)
    if stage.inputs is None and size != GROUP_SIZES[0] and getattr(config, "group_size", -1) is None:
        what = f"groups of {size}" if size > 0 else "one scale per channel"
        events.append(Event("group_size", f"{what} for all layers: transformers reads one scheme for this model"))
    return size


def _fit(
    spec: MethodSpec, stage: MatrixStage, matrix: Matrix, usual: int, events: list[Event]
) -> tuple[Method[Any] | None, str | None]:
    """The method with a group size that fits the matrix, or None and why it is left out."""
    cls = load_method(spec.name or "gptq")
    config = cls.Config(**spec.settings)
    rounds_nothing = "group_size" not in cls.Config.model_fields or getattr(config, "bits", 0) is None
    if rounds_nothing or getattr(config, "type", None) is not None:
        return cls(config), None
    width, asked = matrix.shape[1], getattr(config, "group_size")  # noqa: B009 - not every Config has it
    size = usual if asked is None else asked
    if size != -1 and width % size:
        policy = stage.indivisible
        if policy == "skip":
            reason = f"group size {size} does not divide its width {width}"
            events.append(Event("skipped", f"left as it is: {reason}", matrix.name))
            return None, reason
        if policy in ("smaller_group", "channel"):
            smaller = [g for g in GROUP_SIZES if g < size and width % g == 0] if policy == "smaller_group" else []
            chosen = smaller[0] if smaller else -1
            what = f"groups of {chosen}" if smaller else "one scale per channel"
            events.append(Event("group_size", f"{what} in place of {size}, which does not divide {width}", matrix.name))
            size = chosen
    return cls(config.model_copy(update={"group_size": size})), None


def _check_patterns(stage: MatrixStage, matrices: list[Matrix], model: StreamedModel) -> None:
    for pattern in (*stage.layers, *stage.ignore):
        if any(patterns.matches(pattern, m.name) for m in matrices):
            continue
        outside = next((m for m in model.anatomy.matrices if patterns.matches(pattern, m.name)), None)
        if outside is not None and isinstance(stage, TargetStage):
            hint = f"{outside.name} is not among the `targets`: name it there (--targets {kind_of(outside)})."
        else:
            hint = f"Layers are named like: {', '.join(m.name for m in matrices[:3])}"
        raise PlanError(f"The expression {pattern!r} matches no layer.", hint=hint)


def _choose_format(stage: MatrixStage, methods: dict[Matrix, Method[Any]], events: list[Event]) -> Format:
    if stage.format is not None:
        if stage.format.name not in format_names():
            raise PlanError(f"There is no format {stage.format.name!r}; known: {', '.join(format_names())}.")
        return load_format(stage.format.name)
    matrix, method = next(iter(methods.items()))
    layer = method.form(matrix.shape, matrix.dtype)
    own = OWN.get(type(layer.weight.parts[0] if isinstance(layer.weight, Sum) else layer.weight))
    if own is not None:
        if not any(m.kind == "experts" for m in methods):
            return load_format(own)
        events.append(Event("default_format", f"written dense, which is no smaller: no loader takes {own} experts"))
        return load_format("dense")
    bitsandbytes = getattr(layer.weight, "levels", None) is not None or layer.input is not None
    return load_format("bnb" if bitsandbytes else "compressed-tensors")
