"""YAML 1.2 through PyYAML: its core types, no tags, no duplicate keys, and limits for files from strangers.

PyYAML speaks YAML 1.1, where `no` is false, `010` is 8, `12:30` is 750 and `1e-4` is a string.

What only an attack needs (tags, many aliases, megabytes) is refused as unsafe; a mistake is an error of the recipe.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.events import AliasEvent
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from llmshrink.errors import RecipeError, UnsafeError

MAX_BYTES = 1_000_000
MAX_DEPTH = 32
MAX_DIGITS = 1000
MAX_ALIASES = 100
MAX_NODES = 20_000  # with every alias written out: 80 nested aliases can mean 10^9 nodes

# https://yaml.org/spec/1.2.2/#103-core-schema: tag, what it looks like, which characters it can start with
_CORE = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)


class _Attack(yaml.MarkedYAMLError):
    pass


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}
    depth = 0
    nodes = 0
    aliases = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        self.aliases += isinstance(event, AliasEvent)
        if self.aliases > MAX_ALIASES:
            raise _attack(f"more than {MAX_ALIASES} aliases", event)
        if getattr(event, "tag", None):
            raise _attack(f"the tag {event.tag[:100]} is not allowed", event)
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise _attack(f"more than {MAX_NODES:,} values", event)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _attack(f"nested deeper than {MAX_DEPTH} levels", event)
        node: Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, ScalarNode):
                raise _refusal("a key must be one word", key)
            if key.value in seen:
                raise _refusal(f"the key '{key.value[:100]}' is there twice", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_int(self, node: ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        if len(text) > MAX_DIGITS:
            raise _refusal(f"a number of {len(text):,} digits", node)
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _CORE:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)


def parse(text: str, origin: str) -> Any:
    """Plain data from YAML text.

    Args:
        text: one document.
        origin: where it comes from, for messages.

    Raises:
        RecipeError: not YAML; the message has line and column.
        UnsafeError: a tag, or more than the limits allow.
    """
    if len(text) > MAX_BYTES:
        raise UnsafeError(f"{origin[:100]}: larger than {MAX_BYTES:,} bytes; a recipe is a page of text")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _expanded(node, {}) > MAX_NODES:
            raise _attack(f"its aliases stand for more than {MAX_NODES:,} values", node)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise (UnsafeError if isinstance(error, _Attack) else RecipeError)(f"{origin}{where}: {what}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise RecipeError(f"{origin}: not YAML: {error}") from None


def write(data: Any) -> str:
    """YAML text of plain data, in the order of its keys; `parse` gives the same data back."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=120)
    return text


def _refusal(problem: str, at: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


def _attack(problem: str, at: Any) -> _Attack:
    return _Attack(problem=problem, problem_mark=at.start_mark)


def _expanded(node: Node, known: dict[int, int]) -> int:
    """Number of values below a node, each alias counted in full; 0 in `known` marks a node that is being counted."""
    if id(node) not in known:
        known[id(node)] = 0
        below: list[Node] = []
        if isinstance(node, SequenceNode):
            below = node.value
        elif isinstance(node, MappingNode):
            below = [value for _, value in node.value]
        known[id(node)] = 1 + sum(_expanded(child, known) for child in below)
    elif known[id(node)] == 0:
        raise _attack("an alias contains itself", node)
    return known[id(node)]
