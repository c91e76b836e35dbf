"""What is done to weights before they are compressed: decided, or refused, before any compute."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from llmshrink.errors import PlanError
from llmshrink.forms import Event
from llmshrink.methods.base import Method, method_name
from llmshrink.model.anatomy import Matrix
from llmshrink.model.families import family_of
from llmshrink.model.flow import Flow, Link, flow_of
from llmshrink.model.streamed import StreamedModel
from llmshrink.model.untied import Untied
from llmshrink.recipe.transform import TransformSpec
from llmshrink.transforms import load_transform
from llmshrink.transforms.base import Rotating, Scaling, Transform
from llmshrink.transforms.rotation import Rotation

TRAINED = ("ternary", "binary")  # methods that find the levels of models that have no others


@dataclass(frozen=True)
class Transforms:
    """The transforms of a stage, on one model."""

    flow: Flow
    names: tuple[str, ...]  # in the order in which they are made
    stream: Callable[[int], Rotation] | None  # of a width: turns the states between blocks; None: they stay
    values: Callable[[int], Rotation] | None  # turns the values of each head
    scalings: tuple[Scaling[Any], ...]
    compressed: frozenset[str]  # keys of the matrices for which it is done

    @property
    def outside(self) -> frozenset[str]:
        """Keys of the tensors outside of the blocks that are changed where states are turned."""
        final, embedding = self.flow.final, self.flow.embedding
        ends = () if final is None else (*final.producers, *final.consumers)
        return frozenset(place.key for place in (*ends, *([embedding] if embedding else [])))

    @property
    def words(self) -> str:
        """What is done, for people."""
        turned = [what for what, how in (("states", self.stream), ("values", self.values)) if how is not None]
        first = f"{self.names[0]} ({' and '.join(turned)})" if turned else self.names[0]
        return ", ".join((first, *self.names[1:]))

    def links(self, block: int, scaling: Scaling[Any]) -> list[Link]:
        """Where a transform works in a block: what feeds a matrix that is compressed."""
        found = (link for link in self.flow.blocks[block].links if link.kind in scaling.links)
        return [link for link in found if any(place.key in self.compressed for place in link.consumers)]


def changeable(specs: Iterable[TransformSpec], model: StreamedModel) -> StreamedModel:
    """A second model of the same source, beside which the original stays; its head untied where that is allowed."""
    wanted, source = [_made(spec) for spec in specs], model.source
    family, table = family_of(source.config), model.anatomy.embedding
    allowed = any(isinstance(each, Rotating) and each.config.allow_untie for each in wanted)
    tied = source.config.get_text_config(decoder=True).tie_word_embeddings and not source.gguf
    if allowed and tied and family is not None and family.writers and table is not None:
        module = model.model.get_output_embeddings()
        head = next(f"{name}.weight" for name, each in model.model.named_modules() if each is module)
        source = Untied(source.id, source.folder, source.commit, table.key, head)
    return StreamedModel(source, model.device)


def _made(spec: TransformSpec) -> Transform[Any]:
    cls = load_transform(spec.name)
    return cls(cls.Config(**spec.settings))


def plan_transforms(
    specs: Iterable[TransformSpec], model: StreamedModel, methods: dict[Matrix, Method[Any]], events: list[Event]
) -> Transforms | None:
    """What the stage's transforms do to this model; None where it has none.

    Raises:
        PlanError: they cannot be done.
    """
    wanted = {spec.name: _made(spec) for spec in specs}
    if not wanted:
        return None
    kind = model.source.config.model_type
    if (flow := flow_of(model)) is None:
        raise PlanError(
            f"No flow is known for model_type {kind!r}: transforms must know what follows what in a block.",
            hint="Leave out `transform`, or describe the family in llmshrink/model/families.py.",
        )
    trained = [name for name in map(method_name, methods.values()) if name in TRAINED]
    if trained:
        message = f"{trained[0]} stores what a model was trained to be, and {next(iter(wanted))} would change that"
        raise PlanError(f"{message}.", hint="Leave out `transform`.")
    stream, values = _rotations(wanted, flow, kind, events)
    if isinstance(source := model.source, Untied):
        size = model.weights.infos[source.head].bytes
        events.append(Event("untied", f"the head gets a tensor of its own, {source.head}: {size:,} bytes before"))
    scalings = tuple(each for each in wanted.values() if isinstance(each, Scaling))
    found = Transforms(flow, tuple(wanted), stream, values, scalings, frozenset(m.key for m in methods))
    for name, scaling in wanted.items():
        if isinstance(scaling, Scaling) and not any(found.links(i, scaling) for i in range(len(flow.blocks))):
            raise PlanError(f"{name}: {kind} has no place for it that feeds a compressed layer.")
    if scalings:
        events += [Event("left_unscaled", f"gets no scales: {why}", name) for name, why in flow.missing]
    return found


def _rotations(
    wanted: dict[str, Transform[Any]], flow: Flow, kind: str, events: list[Event]
) -> tuple[Callable[[int], Rotation] | None, Callable[[int], Rotation] | None]:
    """What turns the states between blocks, and the values of each head."""
    turning = {name: each for name, each in wanted.items() if isinstance(each, Rotating)}
    if not turning:
        return None, None
    (name, rotating), first = next(iter(turning.items())), next(iter(wanted))
    if name != first:
        raise PlanError(f"{name} turns the whole model, and {first} looks at its blocks: put {name} first.")
    stream: Callable[[int], Rotation] | None = rotating.stream if rotating.config.residual is not False else None
    if stream is not None and flow.fixed is not None:
        why = f"the states between the blocks of {kind} cannot be turned: {flow.fixed}"
        if rotating.config.residual:
            raise PlanError(f"{name}: {why}.", hint="Set `residual: false`: the values of each head can be.")
        events.append(Event("not_turned", f"{name}: {why}"))
        stream = None
    some = any(block.of("values") for block in flow.blocks)
    values: Callable[[int], Rotation] | None = rotating.values if rotating.config.heads and some else None
    if stream is None and values is None:
        raise PlanError(f"{name}: nothing is left to turn.", hint="Set `residual` or `heads`, or leave it out.")
    return stream, values
