"""Names, files, overrides, and messages that tell every fault at once."""

import json
import re
import subprocess
import sys

import pytest

from llmshrink.errors import RecipeError, UnsafeError, UsageError
from llmshrink.recipe import load
from llmshrink.recipe.json_schema import json_schema

ONE = {"version": 1, "stages": [{"task": "quantize", "method": {"name": "gptq", "bits": 4}}]}


def problems(data):
    with pytest.raises(RecipeError) as caught:
        load.validate(data)
    return caught.value.problems


def stage(**keys):
    return {"version": 1, "stages": [{"task": "quantize", **keys}]}


@pytest.mark.parametrize("name", load.built_in())
def test_built_in_recipes(name):
    path = load.resolve_name(name)
    first, summary, modeline = path.read_text().splitlines()[:3]
    task = path.parent.name
    assert first.startswith(f"# llmshrink run {name} MODEL" if task == "run" else f"# llmshrink {task} MODEL -r {name}")
    assert re.fullmatch(r"# \S.*\.", summary)
    assert modeline == "# yaml-language-server: $schema=../schema.json"
    recipe = load.load(name)
    assert len(recipe.stages) > 1 if task == "run" else recipe.stages[0].task == task
    assert load.dump(load.validate(load.text.parse(load.dump(recipe), "dump"))) == load.dump(recipe)


def test_schema_is_fresh():
    text = (load.recipes_folder() / "schema.json").read_text()
    assert text == json.dumps(json_schema(), indent=2) + "\n", "run: llmshrink recipes schema > recipes/schema.json"


def test_schema_knows_each_methods_settings():
    branches = {b["title"]: b for b in json_schema()["$defs"]["MethodSpec"]["anyOf"]}
    assert {"gptq", "rtn", "nf4", "fp4"} <= set(branches)
    assert "group_size" in branches["gptq"]["properties"]
    assert "group_size" not in branches["nf4"]["properties"]
    assert branches["nf4"]["required"] == ["name"]
    assert "required" not in branches["gptq"]
    assert all(b["additionalProperties"] is False for b in branches.values())


def test_all_problems_at_once():
    found = problems(
        {
            "version": 2,
            "modl": {},
            "stages": [
                {"task": "quantise"},
                {},
                stage(method={"name": "gtpq"})["stages"][0],
                stage(method={"bits": 7, "group_sise": 1})["stages"][0],
                stage(layers={"(": None, r".*x\.y": {"bitz": 3}}, ignore=["ok", "*"])["stages"][0],
                {"task": "eval", "method": {}},
            ],
            "calibration": {"sample": 3, "length": "x"},
            "run": {"sequential": "layer", "threads": 0},
        }
    )
    for expected in (
        "version: Input should be 1; got 2",
        "modl: unknown key; did you mean 'model'?",
        "stages[0].task: there is no task 'quantise'; did you mean 'quantize'?",
        "stages[1].task: the key is missing",
        "stages[2].method.name: there is no method 'gtpq'; did you mean 'gptq'?",
        "stages[3].method.bits: Input should be 2, 3, 4 or 8; got 7",
        "stages[3].method.group_sise: unknown key; did you mean 'group_size'?",
        "stages[4].layers['(']: not a regular expression: missing ) at position 1",
        r"stages[4].layers['.*x\\.y'].bitz: unknown key; did you mean 'bits'?",
        "stages[4].ignore[1]: not a regular expression: nothing to repeat at position 0",
        "stages[5].method: unknown key; known: gate, task",
        "calibration.sample: unknown key; did you mean 'samples'?",
        "calibration.length: Input should be a valid integer; got 'x'",
        "run.sequential: Input should be 'block' or 'subset'; got 'layer'",
        "run.threads: Input should be greater than or equal to 1; got 0",
    ):
        assert expected in found
    assert len(found) == 15


@pytest.mark.parametrize("key", ["hf_token", "token", "api_key", "apiKey", "PASSWORD", "client-secret"])
def test_secrets_are_refused_and_not_shown(key):
    value = "hf_CANARYCANARYCANARYCANARY"
    for data in ({**ONE, key: value}, {**ONE, "model": {key: value}}, stage(method={key: value})):
        (line,) = problems(data)
        assert "no keys or passwords" in line
        assert value not in line


def test_a_near_miss_of_batch_tokens_is_no_secret():
    assert problems({**ONE, "run": {"batch_token": 1}}) == [
        "run.batch_token: unknown key; did you mean 'batch_tokens'?"
    ]


def test_types_are_strict():
    assert problems({**ONE, "calibration": {"samples": 4.0}})
    assert problems({**ONE, "run": {"resume": "no"}})
    assert problems({**ONE, "run": {"threads": True}})
    assert problems({**ONE, "stages": []})
    assert problems(stage(method={"bits": "4"}))
    assert problems(stage(on_indivisible="fail"))


def test_bits_alone_mean_the_default_method():
    method = load.validate(stage(method={"bits": 3})).stages[0].method
    assert method.name is None
    assert method.settings == {"bits": 3}


def test_layers_override_the_stage():
    data = stage(
        method={"name": "gptq", "bits": 4, "damp": 0.1},
        layers={".*proj": {"bits": 8}, ".*down_proj": {"name": "rtn"}, ".*o_proj": None, ".*q_proj": "skip"},
        ignore=[".*h.0.*"],
    )
    one = load.validate(data).stages[0]
    assert one.method_for("h.1.up_proj", one.method).complete()["bits"] == 8
    assert one.method_for("h.1.up_proj", one.method).settings["damp"] == 0.1
    assert one.method_for("h.1.down_proj", one.method).settings == {}
    assert one.method_for("h.1.fc", one.method) is one.method
    assert one.method_for("h.1.fc_proj_x", one.method) is one.method, "a pattern covers the whole name"
    for left_alone in ("h.1.o_proj", "h.1.q_proj", "h.0.up_proj"):
        assert one.method_for(left_alone, one.method) is None


def test_an_override_may_not_take_keys_its_method_does_not_know():
    layers = {"a": {"name": "nf4", "bits": 4, "act_order": True}}
    assert "stages[0].layers.a.act_order: unknown key" in problems(stage(layers=layers))[-1]


def test_a_typed_group_size_is_refused_where_it_does_not_divide():
    policies = {
        "smaller_group": stage(method={"bits": 4}),
        "refuse": stage(method={"group_size": 64}),
        "skip": stage(method={"group_size": 64}, on_indivisible="skip"),
    }
    for expected, data in policies.items():
        recipe = load.validate(data)
        assert recipe.stages[0].indivisible == expected
        written = load.text.parse(load.dump(recipe), "dump")
        assert written["stages"][0]["on_indivisible"] == expected
        again = load.validate(written)
        assert again.stages[0].indivisible == expected
    assert load.validate(stage(layers={"a": {"group_size": 32}})).stages[0].indivisible == "refuse"


OVERRIDES = [
    ("method.bits=3", lambda r: r.stages[0].method.settings["bits"], 3),
    ("stages.0.method.bits=3", lambda r: r.stages[0].method.settings["bits"], 3),
    ("stages[0].method.bits=3", lambda r: r.stages[0].method.settings["bits"], 3),
    ("method.damp=1e-4", lambda r: r.stages[0].method.settings["damp"], 1e-4),
    ("format.name=dense", lambda r: r.stages[0].format.name, "dense"),
    ("evaluation.data=[a.txt, b]", lambda r: r.evaluation.data, ["a.txt", "b"]),
    ('layers={".*x": {bits: 8}}', lambda r: r.stages[0].layers, {".*x": {"bits": 8}}),
    ("output=a=b", lambda r: r.output, "a=b"),
    ("output=", lambda r: r.output, None),
    ("method=null", lambda r: r.stages[0].method, None),
]


@pytest.mark.parametrize(("setting", "look", "expected"), OVERRIDES, ids=[o[0] for o in OVERRIDES])
def test_overrides(setting, look, expected):
    assert look(load.validate(load.apply_overrides(ONE, [setting]))) == expected


def test_overrides_leave_their_input_alone_and_follow_in_order():
    result = load.apply_overrides(ONE, ["method.bits=3", "method.bits=2"])
    assert result["stages"][0]["method"]["bits"] == 2
    assert ONE["stages"][0]["method"]["bits"] == 4


TWO = {"version": 1, "stages": [*ONE["stages"], {"task": "eval"}]}
TWICE = {"version": 1, "stages": [*ONE["stages"], *ONE["stages"]]}


def test_a_key_that_one_stage_alone_has_needs_no_number():
    assert load.apply_overrides(TWO, ["method.bits=3"])["stages"] == [
        {**ONE["stages"][0], "method": {**ONE["stages"][0]["method"], "bits": 3}},
        {"task": "eval"},
    ]


BAD_OVERRIDES = [
    (ONE, "metod.bits=3", "did you mean 'method'"),
    (ONE, "calibratoin.data=x", "did you mean 'calibration'"),
    (ONE, "stages.1.task=x", "'1' is not one of 0..0"),
    (ONE, "stages.-1.task=x", "'-1' is not one of 0..0"),
    (ONE, "version.x=2", "nothing below version"),
    (ONE, "method.bits={", "line 1"),
    (TWICE, "method.bits=3", "several stages have this key; write stages.0.method.bits, stages.1.method.bits"),
]


@pytest.mark.parametrize(("data", "setting", "message"), BAD_OVERRIDES, ids=[b[1] for b in BAD_OVERRIDES])
def test_bad_overrides(data, setting, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        load.apply_overrides(data, [setting])


def test_an_override_without_a_value_is_a_usage_error():
    with pytest.raises(UsageError, match="path=value"):
        load.apply_overrides(ONE, ["method.bits"])


def test_hash_follows_what_decides_the_weights():
    plain = load.recipe_hash(load.validate(ONE))
    for same in ("output=x", "evaluation.rows=3", "run.resume=false", "run.device=cpu", "method.group_size=null"):
        assert load.recipe_hash(load.validate(load.apply_overrides(ONE, [same]))) == plain, same
    for other in ("method.bits=3", "calibration.seed=1", "run.sequential=subset", "model.id=x", "ignore=[a]"):
        assert load.recipe_hash(load.validate(load.apply_overrides(ONE, [other]))) != plain, other


def test_files(tmp_path):
    def written(content, mode="w"):
        path = tmp_path / "r.yaml"
        path.write_bytes(content if mode == "b" else content.encode())
        return str(path)

    assert load.load(written("version: 1\nstages: [{task: eval}]")).stages[0].task == "eval"
    for content, message in (
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"", "mapping"),
        (b"- 1", "mapping"),
    ):
        with pytest.raises(RecipeError, match=message):
            load.load(written(content, "b"))
    with pytest.raises(UnsafeError, match="larger"):
        load.load(written(b"x" * 2_000_000, "b"))
    with pytest.raises(RecipeError, match="no built-in recipe of this name; did you mean 'gptq-w4g128'"):
        load.load("gptq-w4g12")
    with pytest.raises(RecipeError, match="no such file"):
        load.load(str(tmp_path / "none.yaml"))
    with pytest.raises(RecipeError, match="is a folder"):
        load.load(str(tmp_path))


def test_reading_does_not_import_torch():
    code = "import sys; from llmshrink.recipe import load; load.read('gptq-w8'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
