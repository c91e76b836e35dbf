"""No option is dead: each leaf of the recipe and each flag changes the plan, the report or the bytes.

A new leaf is in neither table below, so `test_a_leaf_changes_something` fails with its name: add a line to TRIALS, or,
where what it does cannot be seen in one run, a reason and the test that shows it to ELSEWHERE.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import typer.core
import typer.main
from helpers import content
from pydantic import BaseModel
from tiny import TEXT, build_model, config

from llmshrink import cli, run
from llmshrink.cli.options import CALIBRATING, RECIPE_KEYS
from llmshrink.errors import LlmshrinkError
from llmshrink.evaluate import measure
from llmshrink.evaluate.reader import Found, ReadResult
from llmshrink.methods import load_method, method_names
from llmshrink.progress import Silent
from llmshrink.recipe.distill import DistillStage
from llmshrink.recipe.load import apply_overrides, validate
from llmshrink.recipe.lora import LoraStage
from llmshrink.recipe.method import MethodSpec
from llmshrink.recipe.qat import AS_ASKED, QatSpec
from llmshrink.recipe.schema import Recipe
from llmshrink.recipe.stages import ClusterStage, CutStage, FactorizeStage, MatrixStage, PruneStage
from llmshrink.recipe.transform import TransformSpec
from llmshrink.transforms import load_transform, transform_names

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("without_reader")


@dataclass(frozen=True)
class Trial:
    """Another value of a leaf, and what else the recipe must say for it to matter; {names} are those of `places`."""

    value: Any
    context: dict[str, Any] = field(default_factory=dict)


DENSE = {"stages.0.format": {"name": "dense"}}
NF4 = {"model.id": "{wide_model}", "stages": [{"task": "quantize", "method": {"name": "nf4"}}]}
FP4 = {"model.id": "{wide_model}", "stages": [{"task": "quantize", "method": {"name": "fp4"}}]}
RTN = {"stages": [{"task": "quantize", "method": {"name": "rtn"}}]}
GPTQ = {"stages": [{"task": "quantize", "method": {"name": "gptq"}}]}
CAST = {"stages": [{"task": "quantize", "method": {"name": "cast"}, "format": {"name": "gguf"}}]}
RTN_32 = {"stages": [{"task": "quantize", "method": {"name": "rtn", "group_size": 32}}]}
HQQ = {"stages": [{"task": "quantize", "method": {"name": "hqq", "group_size": 32}}], **DENSE}
TERNARY = {"stages": [{"task": "quantize", "method": {"name": "ternary", "group_size": 32}}]}
BINARY = {"stages": [{"task": "quantize", "method": {"name": "binary", "group_size": 32}}]}
LLM_INT8 = {"stages": [{"task": "quantize", "method": {"name": "int8"}}]}
EXPORT = {"model.id": "{quantized}", "stages": [{"task": "export", "format": {"name": "compressed-tensors"}}]}
EVAL = {"stages": [{"task": "eval"}], "evaluation.data": ["{text}"]}
INT8 = {**RTN, "stages.0.method.bits": 8, "stages.0.inputs": {"type": "int8"}}
STATIC = {**INT8, "stages.0.inputs": {"type": "int8", "scales": "static"}}
FP8 = {"stages": [{"task": "quantize", "method": {"name": "fp8"}}]}
LEARNED = {
    "stages": [{"task": "quantize", "method": {"name": "rtn", "bits": 2, "group_size": 32}}],
    "stages.0.reconstruct": {"steps": 8, "tokens": 32},
    "calibration.samples": 12,
}
SCALED = {**RTN_32, "stages.0.transform": [{"name": "awq"}], "calibration.samples": 12}
SMOOTHED = {**RTN_32, "stages.0.transform": [{"name": "smoothquant"}]}
TURNED = {**RTN_32, "stages.0.transform": [{"name": "hadamard"}]}
ALLOCATED = {
    "stages": [{"task": "quantize", "method": {"name": "rtn"}}],
    "stages.0.allocate": {
        "bpw": 15.5,
        "candidates": [{"bits": bits, "group_size": 32} for bits in (2, 3, 8)],
        "rows": 2,
        "length": 12,
    },
}
SIZED = {**ALLOCATED, "stages.0.allocate.bpw": None, "stages.0.allocate.size": 60_000}
TUNED = {
    "stages": [{"task": "quantize", "method": {"name": "rtn", "bits": 2, "group_size": 32}}],
    "stages.0.tune": {"steps": 8, "tokens": 32},
    "calibration.samples": 12,
}
SCORED = {**RTN_32, "evaluation.data": ["{text}"]}
PRUNED = {
    name: {"stages": [{"task": "prune", "method": {"name": name}}]}
    for name in ("magnitude", "random", "wanda", "sparsegpt")
}
REFITTED = {name: {**context, "stages.0.method.refit": 5} for name, context in PRUNED.items()}
SHARED = {name: {**PRUNED["magnitude"], "stages.0.ratios": {"name": name}} for name in ("owl", "global")}
SPARSE_W4 = {**PRUNED["sparsegpt"], "stages.0.method.bits": 4, "stages.0.method.group_size": 32}


PRODUCTS = {
    name: {"stages": [{"task": "factorize", "method": {"name": name}, "ratios": None}]}
    for name in ("svd", "asvd", "svdllm")
}
TIED = {"stages": [{"task": "factorize", "method": {"name": "tie"}, "ratios": None}]}
CLUSTERED = {"stages": [{"task": "cluster", "method": {"name": "kmeans", "bits": 2, "rows": 8}}]}


def cut(**what: Any) -> dict[str, Any]:
    return {"model.id": "{wide_model}", "stages": [{"task": "prune", "cut": what}], "calibration.samples": 12}


DISTILLED: dict[str, Any] = {
    "stages": [{"task": "distill", "student": {"layers": [0], "repair": False}}],
    "stages.0.train": {"data": "{text}", "length": 16, "batch": 2, "max_steps": 12},
}
KEPT = {**DISTILLED, "stages.0.cache": {"tokens": 8}}
LOTTERY: dict[str, Any] = {
    "stages": [{"task": "distill", "lottery": {"rounds": 2}}],
    "stages.0.train": {**DISTILLED["stages.0.train"], "max_steps": 4},
}
TAUGHT = {
    "teacher": "{other_model}",
    **{f"loss.{k}": v for k, v in {"name": "jsd", "temperature": 1.0, "alpha": 0.5}.items()},
    **{f"train.{k}": v for k, v in {"data": "{other_text}", "length": 12, "batch": 3, "accumulate": 2}.items()},
    **{f"train.{k}": v for k, v in {"max_steps": 10, "max_tokens": 64, "rate": 0.1, "schedule": "constant"}.items()},
    **{f"train.{k}": v for k, v in {"warmup": 0.9, "weight_decay": 0.5, "clip": 1e-3, "hold": "50%"}.items()},
    **{f"train.{k}": v for k, v in {"evaluations": 1, "seed": 1, "optimizer": "sgd"}.items()},
}
DRAWN = {**DISTILLED, "stages.0.hidden": {}}
ASKED = {**DISTILLED, "stages.0.policy": {}}


ADAPTED: dict[str, Any] = {
    "stages": [{"task": "lora"}],
    "stages.0.train": {"data": "{text}", "length": 16, "batch": 2, "max_steps": 2},
}


def adapting(**method: Any) -> dict[str, Any]:
    return {**ADAPTED, "stages.0.method": method}


LEARNS = {
    "name": Trial("ia3", ADAPTED),
    "rank": Trial(2, ADAPTED),
    "alpha": Trial(1.0, ADAPTED),
    "dropout": Trial(0.5, ADAPTED),
    "tokens": Trial(3, adapting(name="prompt")),
    "width": Trial(4, adapting(name="adapter")),
    "placement": Trial("houlsby", adapting(name="adapter")),
    "blocks": Trial(1, adapting(name="freeze")),
    "parts": Trial(["head"], adapting(name="freeze")),
}


TRIALS = {
    "model.id": Trial("{other_model}"),
    "stages.quantize.method.name": Trial("rtn"),
    "stages.quantize.method.gptq.bits": Trial(3),
    "stages.quantize.method.gptq.group_size": Trial(16),
    "stages.quantize.method.gptq.symmetric": Trial(False, DENSE),
    "stages.quantize.method.gptq.scales": Trial("minmax"),
    "stages.quantize.method.gptq.type": Trial("Q4_0", {**GPTQ, **DENSE}),
    "stages.quantize.method.gptq.act_order": Trial(False),
    "stages.quantize.method.gptq.damp": Trial(0.5),
    "stages.quantize.method.gptq.refine": Trial(0),
    "stages.quantize.method.gptq.propagate": Trial(0.5),
    "stages.quantize.method.gptq.weighting": Trial("gradient"),
    "stages.quantize.method.rtn.bits": Trial(3, RTN_32),
    "stages.quantize.method.rtn.group_size": Trial(16, RTN_32),
    "stages.quantize.method.rtn.symmetric": Trial(False, {**RTN_32, **DENSE}),
    "stages.quantize.method.rtn.scales": Trial("minmax", RTN_32),
    "stages.quantize.method.rtn.type": Trial("Q4_0", {**RTN, **DENSE}),
    "stages.quantize.method.cast.dtype": Trial("bfloat16", CAST),
    "stages.quantize.method.nf4.block_size": Trial(32, NF4),
    "stages.quantize.method.nf4.double_quant": Trial(True, NF4),
    "stages.quantize.method.fp4.block_size": Trial(32, FP4),
    "stages.quantize.method.fp4.double_quant": Trial(True, FP4),
    "stages.quantize.method.hqq.bits": Trial(3, HQQ),
    "stages.quantize.method.hqq.group_size": Trial(16, HQQ),
    "stages.quantize.method.hqq.symmetric": Trial(True, HQQ),
    "stages.quantize.method.hqq.scales": Trial("minmax", HQQ),
    "stages.quantize.method.hqq.norm": Trial(0.3, {**HQQ, "stages.0.method.bits": 2, "stages.0.method.beta": 30}),
    "stages.quantize.method.hqq.beta": Trial(30, {**HQQ, "stages.0.method.bits": 2}),
    "stages.quantize.method.ternary.group_size": Trial(16, TERNARY),
    "stages.quantize.method.binary.group_size": Trial(16, BINARY),
    "stages.quantize.method.int8.threshold": Trial(1.5, LLM_INT8),
    "stages.quantize.method.fp8.scale_per": Trial("tensor", FP8),
    "stages.quantize.method.fp8.scales": Trial("minmax", FP8),
    "stages.quantize.inputs.type": Trial("fp8", {"stages": [{"task": "quantize", "inputs": {"type": "int8"}}]}),
    "stages.quantize.inputs.scales": Trial("static", INT8),
    "stages.quantize.inputs.observer": Trial("minmax", STATIC),
    "stages.quantize.transform.name": Trial("awq", RTN_32),
    "stages.quantize.transform.awq.steps": Trial(2, SCALED),
    "stages.quantize.transform.awq.rows": Trial(4, SCALED),
    "stages.quantize.transform.smoothquant.alpha": Trial(0.8, SMOOTHED),
    "stages.quantize.transform.hadamard.residual": Trial(False, TURNED),
    "stages.quantize.transform.hadamard.heads": Trial(False, TURNED),
    "stages.quantize.transform.hadamard.allow_untie": Trial(True, {**TURNED, "model.id": "{tied_model}"}),
    "stages.quantize.transform.hadamard.seed": Trial(1, TURNED),
    "stages.quantize.allocate.size": Trial(62_000, SIZED),
    "stages.quantize.allocate.bpw": Trial(16.0, ALLOCATED),
    "stages.quantize.allocate.candidates": Trial([{"bits": bits, "group_size": 32} for bits in (2, 4, 8)], ALLOCATED),
    "stages.quantize.allocate.score": Trial("block", ALLOCATED),
    "stages.quantize.allocate.rows": Trial(3, ALLOCATED),
    "stages.quantize.allocate.length": Trial(9, ALLOCATED),
    "stages.quantize.reconstruct.steps": Trial(4, LEARNED),
    "stages.quantize.reconstruct.tokens": Trial(64, LEARNED),
    "stages.quantize.reconstruct.rate": Trial(0.05, LEARNED),
    "stages.quantize.reconstruct.scale_rate": Trial(0.01, LEARNED),
    "stages.quantize.reconstruct.weight_rate": Trial(
        0.01, {**PRUNED["magnitude"], "stages.0.reconstruct": {"steps": 8, "tokens": 32}, "calibration.samples": 12}
    ),
    "stages.quantize.tune.steps": Trial(4, TUNED),
    "stages.quantize.tune.tokens": Trial(64, TUNED),
    "stages.quantize.tune.rate": Trial(0.01, TUNED),
    "stages.quantize.tune.norm_rate": Trial(0.01, TUNED),
    "stages.quantize.layers": Trial({".*down_proj": {"bits": 8}}),
    "stages.quantize.ignore": Trial([".*k_proj"]),
    "stages.quantize.format.name": Trial("dense"),
    "stages.quantize.format.type": Trial("Q8_0", {**RTN, "stages.0.format": {"name": "gguf"}}),
    "stages.quantize.on_indivisible": Trial("channel", RTN),
    "stages.prune.method.name": Trial("wanda", PRUNED["magnitude"]),
    **{f"stages.prune.method.{name}.sparsity": Trial(0.3, context) for name, context in PRUNED.items()},
    **{f"stages.prune.method.{name}.pattern": Trial("2:4", context) for name, context in PRUNED.items()},
    **{f"stages.prune.method.{name}.refit": Trial(3, context) for name, context in REFITTED.items()},
    **{f"stages.prune.method.{name}.damp": Trial(0.9, context) for name, context in REFITTED.items()},
    "stages.prune.method.magnitude.per": Trial("row", PRUNED["magnitude"]),
    "stages.prune.method.random.per": Trial("matrix", PRUNED["random"]),
    "stages.prune.method.random.seed": Trial(1, PRUNED["random"]),
    "stages.prune.method.wanda.per": Trial("matrix", PRUNED["wanda"]),
    "stages.prune.ratios.name": Trial("owl", SHARED["global"]),
    "stages.prune.ratios.threshold": Trial(2.0, SHARED["owl"]),
    "stages.prune.ratios.spread": Trial(0.2, SHARED["owl"]),
    "stages.prune.method.sparsegpt.bits": Trial(3, SPARSE_W4),
    "stages.prune.method.sparsegpt.group_size": Trial(16, SPARSE_W4),
    "stages.prune.method.sparsegpt.symmetric": Trial(False, SPARSE_W4),
    **{
        f"stages.factorize.method.{name}.{key}": Trial(value, context)
        for name, context in PRODUCTS.items()
        for key, value in {"keep": 0.5, "rank": 3, "pivots": False, "bits": 2, "factor_bits": 8}.items()
    },
    **{
        f"stages.factorize.method.{name}.rounds": Trial(
            1, {**context, "stages.0.method.bits": 2, "stages.0.method.rank": 2}
        )
        for name, context in PRODUCTS.items()
    },
    "stages.factorize.method.tie.keep": Trial(0.6, {**TIED, "stages.0.ratios": {"name": "similarity"}}),
    "stages.factorize.method.tie.damp": Trial(0.9, TIED),
    "stages.factorize.method.asvd.alpha": Trial(1.0, PRODUCTS["asvd"]),
    "stages.factorize.method.svdllm.blocks": Trial(2, PRODUCTS["svdllm"]),
    "stages.factorize.method.svdllm.damp": Trial(0.9, PRODUCTS["svdllm"]),
    "stages.factorize.method.name": Trial("svd", PRODUCTS["svdllm"]),
    "stages.cluster.method.kmeans.bits": Trial(3, CLUSTERED),
    "stages.cluster.method.kmeans.dim": Trial(2, CLUSTERED),
    "stages.cluster.method.kmeans.outliers": Trial(0.01, CLUSTERED),
    "stages.cluster.method.kmeans.scales": Trial(False, CLUSTERED),
    "stages.cluster.method.kmeans.rows": Trial(16, CLUSTERED),
    "stages.cluster.method.kmeans.weighting": Trial("none", CLUSTERED),
    "stages.cluster.method.kmeans.feedback": Trial(False, CLUSTERED),
    "stages.cluster.method.kmeans.refine": Trial(0, CLUSTERED),
    "stages.cluster.method.kmeans.damp": Trial(0.9, CLUSTERED),
    "stages.prune.cut.neurons": Trial(64, cut(neurons=96)),
    "stages.prune.cut.heads": Trial(2, cut(neurons=96)),
    "stages.prune.cut.hidden": Trial(48, cut(neurons=96)),
    "stages.prune.cut.experts": Trial(3, {**cut(experts=2), "model.id": "{experts_model}"}),
    "stages.prune.cut.layers": Trial([1], cut(neurons=96)),
    "stages.prune.cut.params": Trial("70%", cut(params="80%")),
    "stages.prune.cut.size": Trial("70%", cut(size="80%")),
    "stages.prune.cut.criterion": Trial("magnitude", cut(neurons=96)),
    "stages.prune.cut.layer_criterion": Trial("angular", cut(layers=1, layer_criterion="influence")),
    "stages.prune.cut.repair": Trial(False, cut(neurons=96)),
    "stages.prune.cut.damp": Trial(0.5, cut(neurons=96)),
    "stages.prune.cut.round_to": Trial(5, cut(neurons="60%")),
    "stages.prune.cut.rows": Trial(2, cut(params="80%", rows=1)),
    "stages.cluster.targets": Trial(["head", "linears"], CLUSTERED),
    "stages.factorize.targets": Trial(["embedding"], PRODUCTS["svd"]),
    **{f"stages.distill.{key}": Trial(value, DISTILLED) for key, value in TAUGHT.items()},
    "stages.distill.hidden.weight": Trial(0.1, DRAWN),
    "stages.distill.policy.share": Trial(1.0, ASKED),
    "stages.distill.exits": Trial([0], {**DISTILLED, "stages": [{"task": "distill", "teacher": "{model}"}]}),
    "stages.distill.qat.scale_rate": Trial(0.1, {**DISTILLED, "stages.0.qat": {"method": {"name": "rtn", "bits": 2}}}),
    "stages.distill.loss.beta": Trial(0.1, {**DISTILLED, "stages.0.loss": {"name": "jsd"}}),
    "stages.distill.cache.method": Trial("topk", KEPT),
    "stages.distill.cache.tokens": Trial(4, KEPT),
    "stages.distill.train.epochs": Trial(2.0, {**DISTILLED, "stages.0.train.max_steps": None}),
    "stages.distill.train.split": Trial("test", {**DISTILLED, "stages.0.train.data": "generator"}),
    "stages.distill.train.column": Trial("answer", {**DISTILLED, "stages.0.train.data": "{columns}"}),
    "stages.distill.train.kind": Trial("text", {**DISTILLED, "stages.0.train.data": "{prompts}"}),
    "stages.distill.train.answers_only": Trial(False, {**DISTILLED, "stages.0.train.data": "{prompts}"}),
    "stages.distill.train.packing": Trial(False, DISTILLED),
    "stages.distill.lottery.rounds": Trial(1, LOTTERY),
    "stages.distill.lottery.sparsity": Trial("30%", LOTTERY),
    "stages.distill.lottery.rewind": Trial("50%", LOTTERY),
    "stages.distill.lottery.per": Trial("model", LOTTERY),
    **{f"stages.lora.method.{key}": trial for key, trial in LEARNS.items()},
    "stages.lora.target": Trial(["v_proj"], ADAPTED),
    "stages.lora.anchor": Trial(0.9, ADAPTED),
    "stages.lora.train.data": Trial("{other_text}", ADAPTED),
    "stages.lora.train.batch": Trial(3, ADAPTED),
    "stages.lora.train.rate": Trial(0.1, ADAPTED),
    "stages.lora.train.max_steps": Trial(1, ADAPTED),
    "stages.lora.train.max_tokens": Trial(32, ADAPTED),
    "stages.export.format.name": Trial("dense", EXPORT),
    "calibration.data": Trial("{other_text}"),
    "calibration.split": Trial("test", {"calibration.data": "generator"}),
    "calibration.column": Trial("answer", {"calibration.data": "{columns}"}),
    "calibration.samples": Trial(5),
    "calibration.length": Trial(12),
    "calibration.seed": Trial(1),
    "calibration.packed": Trial(False),
    "evaluation.data": Trial(["{text}"], RTN_32),
    "evaluation.baseline": Trial("{other_model}", EVAL),
    "evaluation.split": Trial("train", {**SCORED, "evaluation.data": ["generator"]}),
    "evaluation.column": Trial("answer", {**SCORED, "evaluation.data": ["{columns}"]}),
    "evaluation.rows": Trial(3, SCORED),
    "evaluation.length": Trial(12, SCORED),
    "evaluation.packed": Trial(False, SCORED),
    "evaluation.speed": Trial(True, RTN_32),
    "run.threads": Trial(2),
    "run.sequential": Trial("subset"),
    "run.batch_tokens": Trial(64),
    "run.memory": Trial("1MiB"),
    "output": Trial("{elsewhere}"),
}
GATES = {"max_ppl_increase": "50%", "max_kl": 5, "min_top1": "1%", "max_size": "90%"}
JUDGED = {"quantize": SCORED, "export": {**EXPORT, "evaluation.data": ["{text}"]}}
JUDGED["eval"] = {**EVAL, "evaluation.baseline": "{other_model}"}
TRIALS |= {f"stages.{task}.gate.{n}": Trial(v, context) for task, context in JUDGED.items() for n, v in GATES.items()}
ELSEWHERE = {
    "stages.quantize.format.pack": "of other tasks: tests/e2e/test_pack.py::test_fewer_bytes_and_the_same_model",
    "stages.export.format.pack": "of codebook and low-rank: tests/e2e/test_pack.py::test_the_commands",
    "stages.cluster.method.name": "there is one: tests/e2e/test_cluster.py::test_the_command",
    "model.revision": "only on the Hub: tests/model/test_hub.py::test_a_branch_is_resolved_once_to_its_commit",
    "run.device": "how, not what: tests/e2e/test_gpu.py::test_a_gpu_gives_the_cpu_s_result",
    "run.resume": "how, not what: tests/e2e/test_resume.py::test_no_resume_starts_anew",
    "stages.quantize.tune.optional": "what is refused: tests/e2e/test_tune.py::test_a_format_without_scales_is_refused",
    "stages.factorize.method.tie.blocks": "tests/e2e/test_factorize.py::test_all_become_one_but_the_lone",
    "stages.factorize.ratios.name": "tests/e2e/test_factorize.py::test_tying_is_planned_stopped_and_refused",
    "stages.distill.cache.folder": "tests/e2e/test_offline.py::test_others_learn_from_what_is_there",
    "stages.distill.hidden.layers": "tests/train/test_hidden.py::test_the_term_is_that_of_whole_models",
    "stages.distill.hidden.loss": "tests/train/test_hidden.py::test_a_distance_is_its_sum",
    "stages.distill.hidden.projection": "tests/train/test_hidden.py::test_projections_begin_as_the_best_there_are",
    "stages.distill.policy.prompt": "tests/train/test_policy.py::test_rows_go_on_as_the_student_does",
    "stages.distill.policy.tokens": "tests/train/test_policy.py::test_rows_go_on_as_the_student_does",
    "stages.distill.policy.temperature": "tests/train/test_policy.py::test_tokens_are_as_frequent_as_they_are_likely",
    "stages.distill.loss.shared": "tests/train/test_uld.py::test_the_distance_is_its_sum",
    "stages.distill.train.patience": "tests/e2e/test_distill.py::test_it_ends_where_nothing_is_gained",
    "stages.distill.train.report_to": "tests/train/test_run.py::test_a_tracker_is_told",
    "stages.distill.train.keep_zeros": "tests/e2e/test_distill.py::test_zeros_that_may_learn_are_written_dense",
    "stages.distill.train.max_minutes": "tests/e2e/test_distill.py::test_it_ends_when_its_time_is_up",
    "stages.distill.train.checkpointing": "tests/e2e/test_distill.py::test_less_is_kept_on_the_way",
    "stages.distill.train.save_minutes": "tests/e2e/test_distill.py::test_a_killed_run_goes_on_from_what_was_saved",
    "stages.lora.method.iterations": "tests/train/test_loftq.py::test_codes_and_product_are_nearer_in_each_turn",
    "stages.lora.method.text": "tests/e2e/test_lora.py::test_what_stands_before_begins_as_words",
    "stages.lora.label": "tests/e2e/test_lora.py::test_classes_are_told_apart",
    "stages.lora.train.keep_zeros": "tests/e2e/test_lora.py::test_what_was_pruned_stays_pruned",
    "stages.lora.merge": "tests/e2e/test_lora.py::test_merged_is_the_same_function",
    "run.keep": "tests/e2e/test_pipeline.py::test_each_stage_goes_on_with_what_the_one_before_made",
    "run.strict": "the exit code: tests/e2e/test_quantize.py::test_strict_fails_on_events_and_keeps_the_result",
}
AS_DISTILLED = (
    "accumulate",
    "answers_only",
    "kind",
    "packing",
    "report_to",
    "checkpointing",
    "clip",
    "column",
    "epochs",
    "evaluations",
    "hold",
    "length",
)
AS_DISTILLED += ("max_minutes", "optimizer", "patience", "save_minutes", "schedule", "seed", "split", "warmup")
ELSEWHERE |= {  # the same section, carried out by the same code
    f"stages.lora.train.{key}": f"{key} of distill: tests/e2e/test_every_leaf.py::test_a_leaf_changes_something"
    for key in (*AS_DISTILLED, "weight_decay")
}


# --- the leaves of the schema


def branches(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that a field's type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) is Annotated:
        yield from branches(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType, list):
        for part in get_args(annotation):
            yield from branches(part)


def leaves(model: type[BaseModel], at: str = "") -> Iterator[str]:
    """Paths of all that a recipe may say; a stage is named by its task, a setting by its method."""
    for name, info in model.model_fields.items():
        if model in (PruneStage, ClusterStage, FactorizeStage, CutStage) and name in MatrixStage.model_fields.keys() - {
            "method"
        }:
            continue  # the same as of quantize, and done by the same code
        if model is LoraStage and name == "gate":
            continue  # as of others: tests/e2e/test_lora.py::test_what_was_learned_is_judged
        if model is DistillStage and name in ("student", "gate"):
            continue  # the same as `cut` of prune, and the gates of others
        if model is QatSpec and name in AS_ASKED:
            continue  # the same as of quantize, by which it is begun: tests/e2e/test_qat.py
        below = list(branches(info.annotation))
        for branch in below:
            task = branch.model_fields.get("task")
            tag = f".{get_args(task.annotation)[0]}" if task else ""
            yield from leaves(branch, f"{at}{name}{tag}.")
            if branch is MethodSpec:
                for method in (m for m in method_names() if load_method(m).task == at.split(".")[1]):
                    yield from leaves(load_method(method).Config, f"{at}{name}.{method}.")
            if branch is TransformSpec:
                for transform in transform_names():
                    yield from leaves(load_transform(transform).Config, f"{at}{name}.{transform}.")
        one_value = get_origin(info.annotation) is Literal and len(get_args(info.annotation)) == 1
        if not below and not one_value:
            yield f"{at}{name}"


LEAVES = sorted(leaves(Recipe))


def key_of(leaf: str) -> str:
    """The leaf's path in a recipe: stages by number, settings without their method; a transform's name alone is one."""
    methods, transforms = "|".join(method_names()), "|".join(transform_names())
    key = re.sub(rf"\.method\.({methods})\.", ".method.", re.sub(r"^stages\.\w+", "stages.0", leaf))
    return re.sub(rf"\.transform\.({transforms})\.", ".transform.0.", key).replace(".transform.name", ".transform")


# --- what a recipe leads to


@pytest.fixture(scope="module")
def places(
    smallest: Path,
    models_folder: Callable[..., Path],
    text_file: Path,
    other_text: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """Files and folders by the names that trials use."""
    folder = tmp_path_factory.mktemp("leaves")
    shape = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
    build_model(folder / "other-model", config("llama", **shape))
    build_model(folder / "tied-model", config("llama", **shape, tie_word_embeddings=True))
    columns = [{"text": question, "answer": answer} for question, answer in zip(TEXT, reversed(TEXT), strict=True)]
    (folder / "columns.json").write_text(json.dumps(columns))
    prompts = [{"prompt": text[:9], "completion": text[9:]} for text in TEXT]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    found = {
        "model": smallest,
        "text": text_file,
        "other_text": other_text,
        "other_model": folder / "other-model",
        "tied_model": folder / "tied-model",
        "wide_model": models_folder("llama"),
        "experts_model": models_folder("mixtral"),
        "columns": folder / "columns.json",
        "prompts": folder / "prompts.json",
        "quantized": folder / "quantized",
        "output": folder / "output",
        "elsewhere": folder / "elsewhere",
    }
    run.execute(validate({**base(found), "output": str(found["quantized"])}), progress=Silent())
    return found


def base(places: dict[str, Path]) -> dict[str, Any]:
    return {
        "version": 1,
        "model": {"id": str(places["model"])},
        "stages": [{"task": "quantize", "method": {"name": "gptq", "bits": 4, "group_size": 32}}],
        "calibration": {"data": str(places["text"]), "samples": 4, "length": 16},
        "evaluation": {"data": [], "rows": 2, "length": 16, "speed": False},
        "run": {"threads": 1, "batch_tokens": 32},
        "output": str(places["output"]),
    }


def filled(value: Any, places: dict[str, Path]) -> Any:
    """A value with the places it names."""
    return json.loads(re.sub(r"\{(\w+)\}", lambda m: str(places[m[1]]), json.dumps(value)))


Outcome = Callable[..., Any]


@pytest.fixture(scope="module")
def outcome(places: dict[str, Path]) -> Iterator[Outcome]:
    """What a recipe's data leads to: the plan alone, or all that can be seen of a run; each recipe runs once."""
    known: dict[str, Any] = {}

    def find(data: dict[str, Any], *, plan: bool) -> Any:
        key = f"{plan} {json.dumps(data, sort_keys=True)}"
        if key not in known:
            wanted = validate(data)
            known[key] = planned(wanted) if plan else made(wanted)
        return known[key]

    nothing: dict[str, Any] = {"missing": [], "unexpected": [], "mismatched": []}
    found = Found(class_name="Llama", loaded_bytes=1, load_seconds=1, peak_bytes=1, **nothing)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "measure", lambda *_: [ReadResult(found=found)])  # a process of its own takes seconds
        yield find


def planned(recipe: Recipe) -> Any:
    if recipe.stages[0].task == "eval":
        return None
    return run.make_plan(recipe).model_dump(mode="json", exclude={"disk_free"})


# Of a report: what the clock says, and what only repeats the recipe.
UNTOLD = {"recipe", "recipe_hash", "command", "created", "seconds", "memory", "seed", "output"}


def made(recipe: Recipe) -> Any:
    report = run.execute(recipe, progress=Silent())
    told = without(report.model_dump(mode="json"), UNTOLD)
    for stage in told["stages"]:
        del stage["method"]
    written = content(Path(report.output)) if report.output else {}
    if report.output:
        shutil.rmtree(report.output)
    return told, written


def without(value: Any, keys: set[str]) -> Any:
    if isinstance(value, dict):
        return {k: without(v, keys) for k, v in value.items() if k not in keys}
    return [without(v, keys) for v in value] if isinstance(value, list) else value


def trials() -> list[Any]:
    """A leaf each; how a training goes is tried in the slow tests, but for a few."""
    seldom = tuple(f"stages.distill.{part}." for part in ("train", "loss", "lottery", "cache")) + ("stages.lora.",)
    often = {"stages.distill.train.rate", "stages.distill.loss.alpha", "stages.lora.method.rank", "stages.lora.anchor"}
    slow = {leaf for leaf in LEAVES if leaf.startswith(seldom) and leaf not in often}
    return [pytest.param(n, marks=pytest.mark.slow if n in slow else ()) for n in LEAVES if n not in ELSEWHERE]


@pytest.mark.parametrize("leaf", trials())
def test_a_leaf_changes_something(leaf: str, places: dict[str, Path], outcome: Outcome) -> None:
    assert leaf in TRIALS, f"{leaf} is new: does it change anything? Say how in TRIALS, or where in ELSEWHERE."
    trial, key = TRIALS[leaf], key_of(leaf)
    before = base(places)
    for path, value in trial.context.items():
        before = apply_overrides(before, [f"{path}={json.dumps(filled(value, places))}"])
    after = apply_overrides(before, [f"{key}={json.dumps(filled(trial.value, places))}"])
    assert validate(before) != validate(after)
    if outcome(before, plan=True) == outcome(after, plan=True):
        assert outcome(before, plan=False) != outcome(after, plan=False), f"{leaf} changes nothing"


def test_the_tables_name_leaves_and_tests_that_are_there() -> None:
    assert sorted(TRIALS.keys() | ELSEWHERE.keys()) == LEAVES
    assert not TRIALS.keys() & ELSEWHERE.keys()
    for reason in (*ELSEWHERE.values(), *FLAGS_ELSEWHERE.values()):
        path, name = re.findall(r"(tests/\S+\.py)::(\w+)", reason)[0]
        assert f"def {name}(" in (ROOT / path).read_text(), reason


# --- flags

APP = "tests/cli/test_app.py"
FLAGS_ELSEWHERE = {
    "preset": "names for keys: tests/e2e/test_reconstruct.py::test_presets_are_names_for_keys",
    "recipe": f"another base for all keys: {APP}::test_recipe_then_flags_then_set",
    "set": f"any key: {APP}::test_recipe_then_flags_then_set",
    "overwrite": "tests/e2e/test_resume.py::test_overwrite_keeps_the_old_output_until_the_new_one_is_there",
    "plan": f"{APP}::test_plan",
    "cache_only": "tests/e2e/test_offline.py::test_others_learn_from_what_is_there",
    "qat": "tests/e2e/test_qat.py::test_the_command",
    "smoke": f"{APP}::test_smoke_and_verify",
    "json": f"{APP}::test_json_alone_on_stdout",
    "quiet": f"{APP}::test_quiet_prints_only_the_path",
    "verbose": "tests/cli/test_progress.py::test_verbose_tells_every_note",
    "version": f"{APP}::test_version_and_no_arguments",
    "save": "tests/e2e/test_allocate.py::test_measure",
    "folder": f"what is verified: {APP}::test_smoke_and_verify",
    "results": "tests/report/test_compare.py::test_the_commands_tell_it",
    "markdown": "tests/report/test_compare.py::test_the_commands_tell_it",
    **{
        f"adapters {name}": "tests/e2e/test_adapters.py::test_adapters_are_listed_compared_and_merged"
        for name in ("ls folders", "compare folders", "compare model", "merge parts", "merge how", "merge into")
    },
    "recipes ls as_json": f"{APP}::test_json_alone_on_stdout",
    "recipes show name": "tests/cli/test_recipes.py::test_show",
    "recipes show full": "tests/cli/test_recipes.py::test_show",
    "recipes cp name": "tests/cli/test_recipes.py::test_copy",
    "recipes cp target": "tests/cli/test_recipes.py::test_copy",
    "recipes cp overwrite": "tests/cli/test_recipes.py::test_copy",
    "recipes validate names": "tests/cli/test_recipes.py::test_validate",
    "recipes validate quiet": "tests/cli/test_recipes.py::test_validate",
}


def flags(command: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every parameter of every command, below the command's name."""
    for parameter in command.params:
        if parameter.name not in ("help", "install_completion", "show_completion"):
            yield name, parameter
    for below, inner in getattr(command, "commands", {}).items():
        yield from flags(inner, f"{name} {below}".strip())


FLAGS = list(flags(typer.main.get_command(cli.app.app)))
OWN = ("adapters", "recipes")  # commands without a recipe
FOR_RECIPES = [(name, p) for name, p in FLAGS if p.name in RECIPE_KEYS and name.partition(" ")[0] not in OWN]


def test_every_flag_is_a_key_or_is_shown_elsewhere() -> None:
    others = [(name, p.name) for name, p in FLAGS if p.name not in RECIPE_KEYS]
    unknown = [f"{name} {flag}" for name, flag in others if {flag, f"{name} {flag}"}.isdisjoint(FLAGS_ELSEWHERE)]
    assert not unknown, f"{unknown}: new flags belong into RECIPE_KEYS, or with their test into FLAGS_ELSEWHERE"


@pytest.mark.parametrize(("command", "flag"), FOR_RECIPES, ids=[f"{name} {p.name}" for name, p in FOR_RECIPES])
def test_a_flag_for_a_key_reaches_it(
    command: str, flag: Any, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Recipe] = []

    def look(recipe: Recipe, **_: object) -> None:
        seen.append(recipe)
        raise LlmshrinkError("seen")

    monkeypatch.setattr(run, "execute", look)
    monkeypatch.setattr(run, "make_plan", look)
    monkeypatch.setattr(run, "measure", look)
    key = RECIPE_KEYS[flag.name]
    task = command if command in ("prune", "cluster", "factorize", "distill", "lora", "export", "eval") else "quantize"
    task = "distill" if command == "run" else task
    first = (f"stages.{task}.", "stages.quantize.")  # how a student is rounded is said in the words of quantize
    own = sorted(LEAVES, key=lambda leaf: [not leaf.startswith(stage) for stage in first])
    leaf = next(leaf for leaf in own if key_of(leaf).removeprefix("stages.0.") == key)
    base = [command, *(["somewhere", "--to", "codebook"] if command == "export" else [])]
    base += ["--qat"] if command == "distill" else []
    base += ["prune-distill-quantize"] if command == "run" else []
    base += ["--merge"] if command == "lora" and flag.name in CALIBRATING else []  # else nothing is calibrated
    value = {"revision": "main", "device": "cpu", "to": "dense", "max_minutes": 2, "report_to": "wandb"}.get(flag.name)
    value = filled(TRIALS[leaf].value, places) if value is None and leaf in TRIALS else value
    if flag.param_type_name == "argument":
        base, given = [command, *base[1 if command == "run" else 2 :]], [str(value)]
    elif flag.is_flag:
        given = [(flag.secondary_opts or flag.opts)[0]]
    else:
        given = [flag.opts[0], str(value[0] if isinstance(value, list) else value)]
    plain = [*base, "somewhere"] if flag.param_type_name == "argument" else base
    for arguments in (plain, [*base, *given]):
        cli.main(arguments)
    one, other = (found.model_dump(mode="json") for found in seen)
    assert one != other
