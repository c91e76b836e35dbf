"""The model card: README.md of a result, with the front matter that the Hub reads.

Names, licences and messages come from untrusted files. The front matter is dumped as YAML data; in the text they are
escaped, so that none of them can become markup, a link or HTML.
"""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from llmshrink.formats.runtimes import PACKAGES
from llmshrink.report.rows import (
    clean,
    comparison,
    course_names,
    gate_line,
    grouped_events,
    protocols,
    source_name,
    stage_lines,
    stage_titles,
)
from llmshrink.report.schema import Check, Report, RuntimeSupport, StageReport

TRANSFORMERS = """\
```python
# pip install {packages}
from transformers import {auto}, AutoTokenizer

folder = "path/to/this/folder"
model = {auto}.from_pretrained(folder{more})
tokenizer = AutoTokenizer.from_pretrained(folder)
{use}
```"""
USE = {
    "text-generation": """\
tokens = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=50)[0]))""",
    "fill-mask": """\
tokens = tokenizer(f"Once upon a {tokenizer.mask_token}.", return_tensors="pt")
print(tokenizer.decode(model(**tokens).logits[0].argmax(-1)))""",
    "text-classification": """\
tokens = tokenizer("Once upon a time", return_tensors="pt")
print(model.config.id2label, model(**tokens).logits)""",
    "token-classification": """\
tokens = tokenizer("Once upon a time", return_tensors="pt")
print(model.config.id2label, model(**tokens).logits.argmax(-1))""",
    "feature-extraction": """\
tokens = tokenizer("Once upon a time", return_tensors="pt")
print(model(**tokens).last_hidden_state)  # one vector for each token; pool them as the original's users do""",
}
FOUR_BITS = """\
four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
"""
ADAPTER = """\
from {package} import {reader}
from transformers import {auto}, AutoTokenizer{config}

{four}base = {auto}.from_pretrained({base}{more})
model = {reader}.from_pretrained(base, "path/to/this/folder").eval()
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
tokens = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=50)[0]))"""
CLASSES = """\
import json
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = "path/to/this/folder"
names = json.loads(Path(folder, "classes.json").read_text())
numbers = {{name: number for number, name in enumerate(names)}}
base = AutoModelForSequenceClassification.from_pretrained(
    {base}, num_labels=len(names), id2label=dict(enumerate(names)), label2id=numbers
)
model = PeftModel.from_pretrained(base, folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
tokens = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
print(names[int(model(**tokens).logits.argmax())])"""
VLLM = """\
```sh
vllm serve path/to/this/folder{file}
```"""
GGUF_FILE = ', gguf_file="model.gguf", config=AutoConfig.from_pretrained(folder)'
LLAMA_CPP = """\
```sh
llama-cli -m path/to/this/folder/model.gguf -p "Once upon a time" -n 50
```"""


def model_card(report: Report, recipe_yaml: str) -> str:
    """The text of README.md.

    Args:
        report: The whole report; only what it holds is told.
        recipe_yaml: The resolved recipe, shown as it is.
    """
    name = escape(source_name(report.model))
    exported = next((stage.format for stage in report.stages if stage.task == "export"), None)
    title = f"{name}, stored as {escape(exported)}" if exported else f"{name}, made smaller"
    if adapter := next((stage.adapter for stage in report.stages if stage.adapter), None):
        title = f"{name}, adapted by {escape(adapter.name)}"
    parts = [front_matter(report), f"# {title}\n", _introduction(report, name)]
    parts += ["## Before and after\n", _table(report), *(f"- {escape(line)}" for line in protocols(report)), ""]
    courses = course_names(report)
    for number, (title, stage) in enumerate(zip(stage_titles(report), report.stages, strict=True), 1):
        parts += [f"## {escape(title)}\n", *(f"- {escape(line)}" for line in stage_lines(stage)), ""]
        if number in courses:
            parts += [f"![The loss, step by step]({courses[number]}.png)", ""]
    parts += _usage(report)
    checks = [check for stage in report.stages for check in stage.checks]
    if checks:
        parts += ["## Verified\n", *(_check(check) for check in checks), ""]
    gates = [gate for stage in report.stages for gate in stage.gates]
    if gates:
        lines = [f"- {'passed' if gate.passed else '**FAILED**'}: {escape(gate_line(gate))}" for gate in gates]
        parts += ["## Gates\n", *lines, ""]
    if report.events:
        parts += ["## Worth knowing\n", *(f"- {escape(line)}" for line in grouped_events(report.events)), ""]
    return "\n".join([*parts, "## Recipe\n", fenced(recipe_yaml, "yaml"), ""])


def front_matter(report: Report) -> str:
    """The YAML block at the top; a base model only where it is on the Hub, a licence only where it is known."""
    data: dict[str, Any] = {}
    if report.model.source == "hub":
        data["base_model"] = clean(report.model.id)
        if any(stage.format != "dense" for stage in report.stages):
            adapters = any(stage.adapter and stage.adapter.bytes for stage in report.stages)
            data["base_model_relation"] = "adapter" if adapters else "quantized"
    if report.model.licence:
        data["license"] = clean(report.model.licence)
    formats = [stage.format for stage in report.stages]
    classes = any(stage.adapter and stage.adapter.classes for stage in report.stages)
    tags = dict.fromkeys(["llmshrink", *(clean(name) for name in formats), *_methods(report)])
    data |= {
        "library_name": next((name for name in ("gguf", "peft") if name in formats), "transformers"),
        "pipeline_tag": "text-classification" if classes else report.model.task,
        "tags": list(tags),
    }
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n"


def escape(text: str) -> str:
    """Untrusted text on one line that Markdown and HTML show as it is."""
    plain = clean(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    escaped = re.sub(r"([\\`*_{}\[\]()#+!|~$])", r"\\\1", plain)
    return re.sub(r"://|(?<=www)\.|@", lambda m: "".join(f"&#{ord(c)};" for c in m[0]), escaped)


def fenced(text: str, language: str) -> str:
    """A block of code that its own text cannot end."""
    visible = "".join(c for c in text if c.isprintable() or c == "\n").strip("\n")
    longest = max((len(run) for run in re.findall(r"`+", visible)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{visible}\n{fence}"


def _methods(report: Report) -> list[str]:
    return [
        clean(str(stage.method["name"]))
        for stage in report.stages
        if stage.task != "export" and stage.method.get("name")
    ]


def _introduction(report: Report, name: str) -> str:
    commit = f" at commit {escape(report.model.commit)}" if report.model.commit else ""
    text = [f"Made from {name}{commit} with llmshrink {escape(report.llmshrink_version)} on {report.created:%Y-%m-%d}."]
    if report.calibration is not None:
        data = report.calibration
        learned = len(report.stages) == 1 and report.stages[0].trained is not None
        how = "It learned from" if learned else "Calibrated on"
        text.append(f"{how} {data.rows} rows of {data.length} tokens: {escape(data.origin)}.")
    if report.model.licence:
        text.append(f"The licence of the original holds: {escape(report.model.licence)}.")
    else:
        text.append("The licence of the original is not known to llmshrink: look it up before you share this model.")
    return " ".join(text) + "\n"


def _table(report: Report) -> str:
    lines = ["| | before | after | change |", "|---|--:|--:|--:|"]
    for row in comparison(report):
        cells = (row.label.strip(), row.before, row.after, row.change)
        lines.append(f"| {' | '.join(escape(cell) for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _check(check: Check) -> str:
    value = "" if check.value is None else f" ({check.value:.3g})"
    verdict = {True: "passed", False: "**FAILED**", None: "not run"}[check.passed]
    return f"- {escape(check.name)}: {verdict}{value}" + (f". {escape(check.detail)}" if check.detail else "")


def _usage(report: Report) -> list[str]:
    """Snippets for the runtimes that load this very format, and a line for each that does not."""
    if (adapted := next((stage for stage in report.stages if stage.adapter and stage.adapter.bytes), None)) is not None:
        return _adapter_usage(report, adapted)
    stage = next((stage for stage in reversed(report.stages) if stage.loads_in), None)
    if stage is None:
        return []
    parts = ["## How to load it\n"]
    parts += [_support(line) for line in stage.loads_in] + [""]
    for line in stage.loads_in:
        if line.support == "no":
            continue
        gguf = stage.format == "gguf"
        if line.runtime == "transformers":
            packages = " ".join(["torch transformers", *PACKAGES[stage.format]])
            model, more = report.model, GGUF_FILE if gguf else ""
            snippet = TRANSFORMERS.format(packages=packages, auto=model.auto_class, more=more, use=USE[model.task])
            if gguf:
                snippet = snippet.replace("AutoTokenizer", "AutoConfig, AutoTokenizer", 1)
            parts += [snippet, ""]
        elif line.runtime == "vllm":
            parts += [VLLM.format(file="/model.gguf" if gguf else ""), ""]
        else:
            parts += [LLAMA_CPP, ""]
    return parts


def _adapter_usage(report: Report, stage: StageReport) -> list[str]:
    """How an adapter is put beside its model."""
    assert stage.adapter is not None
    base = source_name(report.model)
    if stage.adapter.classes:
        return ["## How to load it\n", fenced(CLASSES.format(base=json.dumps(base)), "python"), ""]
    own = stage.adapter.name == "adapter"
    reader, package = ("BottleneckModel", "llmshrink.bottleneck") if own else ("PeftModel", "peft")
    four, more, config = "", "", ""
    if stage.adapter.four_bits and stage.adapter.name == "qlora":
        four, config = FOUR_BITS, ", BitsAndBytesConfig"
        more = ", quantization_config=four_bits"
    path = '"path/to/this/folder/base"' if stage.adapter.name == "loftq" else json.dumps(base)
    snippet = ADAPTER.format(
        package=package, reader=reader, auto=report.model.auto_class, base=path, four=four, more=more, config=config
    )
    return ["## How to load it\n", fenced(snippet, "python"), ""]


def _support(line: RuntimeSupport) -> str:
    words = {"native": "yes", "plugin": "with a plugin", "dense-only": "yes, but dense in memory", "no": "no"}
    return f"- {escape(line.runtime)}: {words[line.support]}; {escape(line.reason)} ({escape(line.proof)})"


__all__ = ["escape", "fenced", "front_matter", "model_card"]
