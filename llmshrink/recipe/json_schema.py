"""The recipe's JSON schema (draft 2020-12), so that an editor completes and checks a recipe while it is written."""

from __future__ import annotations

from typing import Any

from llmshrink.formats import format_names
from llmshrink.methods import load_method, method_names
from llmshrink.recipe.method import DEFAULT_METHOD
from llmshrink.recipe.schema import Recipe
from llmshrink.transforms import load_transform, transform_names

Schema = dict[str, Any]
_REF = "#/$defs/{model}"


def json_schema() -> Schema:
    """The schema of `Recipe`, in which a method is one of all methods there are, each with its own settings."""
    schema = Recipe.model_json_schema(ref_template=_REF)
    definitions = schema["$defs"]
    branches = []
    for name in method_names():
        settings = load_method(name).Config.model_json_schema(ref_template=_REF)
        definitions.update(settings.pop("$defs", {}))
        branches.append(_named(settings, name))
    definitions["MethodSpec"] = {"anyOf": branches, "description": "A method's name and its own settings."}
    definitions["FormatSpec"]["properties"]["name"]["enum"] = format_names()
    transforms = []
    for name in transform_names():
        settings = load_transform(name).Config.model_json_schema(ref_template=_REF)
        transforms.append(_named(settings, name))
    definitions["TransformSpec"] = {"anyOf": transforms, "description": "A transform's name and its own settings."}
    for name in ("QuantizeStage", "PruneStage", "ClusterStage", "FactorizeStage"):
        _complete(definitions[name]["properties"], branches)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "llmshrink recipe",
        **{key: part for key, part in schema.items() if key != "title"},
    }


def _complete(stage: Schema, branches: list[Schema]) -> None:
    """What pydantic does not say of a stage whose matrices get methods: short forms, and the keys of one layer."""
    one: Schema = {"anyOf": [{"$ref": "#/$defs/TransformSpec"}, {"enum": transform_names()}]}
    several = {"items": one, "type": "array"}
    stage["transform"] = {
        "anyOf": [several, *one["anyOf"], {"type": "null"}],
        "default": [],
        "description": stage["transform"]["description"],
    }
    stage["inputs"]["anyOf"].append({"enum": ["int8", "fp8"]})  # a mapping's type alone
    overrides = [
        {key: part for key, part in branch.items() if key != "required"}
        | {"properties": {**branch["properties"], "inputs": stage["inputs"]}}
        for branch in branches
    ]
    layers = stage["layers"]
    layers["additionalProperties"] = {"anyOf": [*overrides, {"type": "null"}, {"const": "skip"}]}


def _named(settings: Schema, name: str) -> Schema:
    """One method's settings with its name; only the default method may go without."""
    constant: Schema = {"enum": [name, None]} if name == DEFAULT_METHOD else {"const": name}
    properties = {"name": {**constant, "description": "the algorithm"}, **settings["properties"]}
    branch = {**settings, "title": name, "properties": properties}
    return branch if name == DEFAULT_METHOD else {**branch, "required": ["name"]}
