"""The one table of what loads where: family x format x runtime, each line with its reason and its source.

Plan refusals, the report's `loads_in`, the README's table and the tests' matrix all come from here. `native` loads and
runs it as it is; `plugin` needs an add-on; `dense-only` loads, but decompresses into full-size weights; `no` does not.
What a format can hold at all (codes on an even grid, whole words) is the format's own `check`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from llmshrink.formats.base import Kind
from llmshrink.forms import Scheme

Support = Literal["native", "plugin", "dense-only", "no"]
Runtime = Literal["transformers", "vllm", "llama.cpp"]

FORMATS = ("compressed-tensors", "gptq", "awq", "bnb", "gguf", "sparse", "codebook", "low-rank", "dense")
# What transformers needs to read each, beside itself, by its names on PyPI.
PACKAGES: dict[str, tuple[str, ...]] = {
    "compressed-tensors": ("compressed-tensors",),
    "gptq": ("optimum", "gptqmodel"),
    "awq": ("gptqmodel",),
    "bnb": ("accelerate", "bitsandbytes"),
    "gguf": ("gguf",),
    "sparse": ("llmshrink",),
    "codebook": ("llmshrink",),
    "low-rank": ("llmshrink",),
    "dense": (),
    "bitnet": ("accelerate",),
}
RUNTIMES: tuple[Runtime, ...] = ("transformers", "vllm", "llama.cpp")
# Of whose tensors llmshrink knows the names in GGUF.
GGUF_FAMILIES = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2"}
ORDER: tuple[Support, ...] = ("no", "plugin", "dense-only", "native")  # from the weakest


@dataclass(frozen=True)
class Family:
    """A family of models as loaders see it: what holds its matrices in memory."""

    name: str
    model_types: tuple[str, ...]  # of config.json
    kinds: tuple[Kind, ...] = ("linear",)
    causal: bool = True  # its models predict the next token; encoders do not


FAMILIES = (
    Family("Llama", ("llama",)),
    Family("Mistral", ("mistral",)),
    Family("Qwen2", ("qwen2",)),
    Family("Qwen3", ("qwen3",)),
    Family("Qwen3-MoE", ("qwen3_moe",), ("linear", "experts")),
    Family("Mixtral", ("mixtral",), ("linear", "experts")),
    Family("Gemma 2, Gemma 3", ("gemma2", "gemma3", "gemma3_text")),
    Family("Phi-3", ("phi3",)),
    Family("OLMo 2", ("olmo2",)),
    Family("GPT-2", ("gpt2",), ("conv1d",)),
    Family("OPT", ("opt",)),
    Family("GPT-NeoX, Pythia", ("gpt_neox",)),
    Family("Falcon", ("falcon",), ("subclass",)),
    Family("BLOOM", ("bloom",)),
    Family("BERT", ("bert",), causal=False),
    Family("RoBERTa, XLM-RoBERTa", ("roberta", "xlm-roberta"), causal=False),
    Family("DistilBERT", ("distilbert",), causal=False),
    Family("ELECTRA", ("electra",), causal=False),
    Family("MPNet", ("mpnet",), causal=False),
    Family("ModernBERT", ("modernbert",), causal=False),
)


@dataclass(frozen=True)
class Stored:
    """A checkpoint as a loader meets it: all that the rules below look at."""

    format: str
    kinds: frozenset[Kind]  # of the compressed matrices
    schemes: frozenset[Scheme] = frozenset()  # none: weights of a level table, or dense
    fused_alike: bool = True  # q/k/v share one scheme, gate/up too
    head: bool = False  # the output head is compressed
    model_type: str = ""  # of config.json, where a loader treats a family in a way of its own
    causal: bool = True  # the model predicts the next token

    @property
    def symmetric(self) -> bool:
        """Whether no scheme has zero points."""
        return all(scheme.symmetric for scheme in self.schemes)

    @property
    def inputs(self) -> frozenset[tuple[str, str]]:
        """How inputs are rounded, where they are: to int or float, by dynamic or static scales."""
        return frozenset(scheme.inputs for scheme in self.schemes if scheme.inputs is not None)

    @property
    def bits(self) -> frozenset[int]:
        """All that occur."""
        return frozenset(scheme.bits for scheme in self.schemes)


@dataclass(frozen=True)
class Entry:
    """How one runtime takes one format, where `when` holds."""

    support: Support
    reason: str
    source: str  # where the rule stands; a test of ours where it was tried
    when: Callable[[Stored], bool] = lambda stored: True


def _with(kind: Kind) -> Callable[[Stored], bool]:
    return lambda stored: kind in stored.kinds


def _four_bits_per_channel(stored: Stored) -> bool:
    return any(scheme.bits == 4 and scheme.group_size is None for scheme in stored.schemes)


def _dense_in_memory(stored: Stored) -> bool:
    """Whether transformers decodes matrices while it loads them, into modules that round no inputs."""
    return not stored.kinds.isdisjoint(("experts", "subclass"))


def _inputs(kind: str) -> Callable[[Stored], bool]:
    return lambda stored: any(found == kind for found, _ in stored.inputs)


def _llm_int8(stored: Stored) -> bool:
    return ("llm-int8", "dynamic") in stored.inputs


def _not_causal(stored: Stored) -> bool:
    return not stored.causal


def _no_gguf(stored: Stored) -> bool:
    return stored.model_type not in GGUF_FAMILIES


TRIED = "tests/e2e/test_families.py"
GGUF = "tests/e2e/test_gguf.py"
LLAMACPP = "tests/readers/test_llamacpp.py"
NO_NAMES = "llmshrink has no names for this family in GGUF"
ROUNDED = "tests/e2e/test_inputs.py"
PLUGIN = "tests/e2e/test_prune.py"
DECOMPRESSES = "needs compressed-tensors >= 0.18; decompresses at the first forward pass"
FLAT_INPUTS = {"opt"}  # families that hand some linears [tokens, in]: compressed-tensors gives all of them one scale
READERS = "tests/readers/test_gptqmodel.py"
GPTQ, AWQ = "vLLM auto_gptq.py", "vLLM auto_awq.py"
WNA16 = "vLLM compressed_tensors_wNa16.py"
BERT, UNTRIED = "vLLM models/bert.py", "untried where no next token is predicted"
MARLIN_GROUPS = {None, 32, 64, 128}  # None: one scale per output channel
CPU_KERNEL = "its CPU kernel runs 4 bits only in groups of 32 to 256"
# Where AWQ also scales what an activation gives: transformers wants these scales from the file.
SCALED_ACTIVATIONS = {"falcon", "bloom", "gpt_neox"}
FUSED = "it fuses q/k/v and gate/up: these must be stored alike"


def _vllm_rules(conv1d: str, fused: str, head: str) -> tuple[Entry, ...]:
    """What all its kernels for integer codes have in common, each with its source."""
    return (
        Entry("no", "it knows no Conv1D", conv1d, _with("conv1d")),
        Entry("no", FUSED, fused, lambda s: not s.fused_alike),
        Entry("no", "no compressed head", head, lambda s: s.head),
        Entry("no", UNTRIED, BERT, _not_causal),
    )


def _own(tried: str, how: str = "decodes a layer whenever it is used") -> tuple[Entry, ...]:
    """How transformers takes a format of llmshrink's own."""
    return (
        Entry("plugin", f"needs `import llmshrink`; {how}", tried),
        Entry("no", "it fuses experts into one parameter, for which there is no module", tried, _with("experts")),
    )


# Of the entries that hold for a checkpoint, the weakest counts.
TABLE: dict[tuple[str, Runtime], tuple[Entry, ...]] = {
    ("dense", "transformers"): (Entry("native", "plain weights", TRIED),),
    ("dense", "vllm"): (
        Entry("native", "plain weights", "vLLM's list of models"),
        Entry("no", UNTRIED, "vLLM's list of models", _not_causal),
    ),
    ("compressed-tensors", "transformers"): (
        Entry("dense-only", DECOMPRESSES, TRIED),
        Entry("dense-only", f"{DECOMPRESSES}, then rounds inputs", ROUNDED, lambda s: bool(s.inputs)),
        Entry(
            "dense-only",
            f"{DECOMPRESSES}, then rounds inputs, some by one scale for all tokens of a row",
            ROUNDED,
            lambda s: s.model_type in FLAT_INPUTS and any(how == "dynamic" for _, how in s.inputs),
        ),
        Entry(
            "dense-only",
            "needs compressed-tensors >= 0.18; decompresses experts, and linears of a class of their own, while "
            "loading, and does not round their inputs",
            ROUNDED,
            lambda s: bool(s.inputs) and _dense_in_memory(s),
        ),
        Entry("no", "it fills Conv1D layers with random weights", TRIED, _with("conv1d")),
        Entry(
            "no",
            "it has no place for static scales of inputs of experts, and of linears of a class of their own",
            ROUNDED,
            lambda s: any(how == "static" for _, how in s.inputs) and _dense_in_memory(s),
        ),
        Entry(
            "no",
            "of fused experts it reads integers only packed, and these meet no rounded inputs",
            ROUNDED,
            lambda s: "experts" in s.kinds and _inputs("int")(s),
        ),
        Entry(
            "no",
            "it cannot load asymmetric codes of fused experts",
            "transformers PR 47430",
            lambda s: "experts" in s.kinds and not s.symmetric,
        ),
        Entry(
            "no",
            "it loads asymmetric codes, and linears of a class of their own, only where all layers share one scheme",
            TRIED,
            lambda s: len(s.schemes) > 1 and (not s.symmetric or "subclass" in s.kinds),
        ),
    ),
    ("compressed-tensors", "vllm"): (
        Entry("native", "WNA16 kernels", WNA16),
        Entry("native", "int8 kernels, inputs rounded", "vLLM compressed_tensors_w8a8_int8.py", _inputs("int")),
        Entry(
            "native",
            "FP8 kernels, inputs rounded, from compute capability 8.9 on; before that weights alone (Marlin)",
            "vLLM compressed_tensors_w8a8_fp8.py",
            _inputs("float"),
        ),
        Entry(
            "native",
            "FP8 weights alone (Marlin kernels)",
            "vLLM compressed_tensors_w8a16_fp8.py",
            lambda s: any(scheme.kind == "float" and scheme.inputs is None for scheme in s.schemes),
        ),
        Entry("native", "2 and 3 bits need a recent vLLM (humming kernels)", WNA16, lambda s: bool(s.bits - {4, 8})),
        Entry(
            "no",
            "asymmetric codes only with 4 or 8 bits",
            WNA16,
            lambda s: any(not scheme.symmetric and scheme.bits not in (4, 8) for scheme in s.schemes),
        ),
        Entry(
            "no",
            "no asymmetric codes of experts",
            "llm-compressor issue 2628",
            lambda s: "experts" in s.kinds and not s.symmetric,
        ),
        *_vllm_rules(WNA16, "vLLM compressed_tensors/utils.py", "llm-compressor issue 1820"),
    ),
    ("gptq", "transformers"): (
        Entry("native", "needs optimum and gptqmodel", READERS),
        Entry("native", f"needs optimum and gptqmodel; {CPU_KERNEL}", READERS, _four_bits_per_channel),
        Entry("no", "it leaves fused experts dense", READERS, _with("experts")),
        Entry("no", "it leaves linears of a class of their own dense", READERS, _with("subclass")),
        Entry("no", "GPT-2 sets up weights that its modules do not have", READERS, _with("conv1d")),
        Entry("no", "it knows one scheme for all layers", "transformers GPTQConfig", lambda s: len(s.schemes) > 1),
        Entry("no", "it finds the blocks of causal models only", "optimum gptq/constants.py", _not_causal),
    ),
    ("gptq", "vllm"): (
        Entry("native", "Marlin kernels", GPTQ),
        Entry(
            "no",
            "only symmetric codes of 4 or 8 bits",
            "vLLM PR 38288",
            lambda s: not s.symmetric or bool(s.bits - {4, 8}),
        ),
        Entry(
            "no",
            "only groups of 32, 64, 128, or one scale per channel",
            "vLLM marlin_utils.py",
            lambda s: any(scheme.group_size not in MARLIN_GROUPS for scheme in s.schemes),
        ),
        *_vllm_rules(GPTQ, GPTQ, GPTQ),
    ),
    ("awq", "transformers"): (
        Entry("native", "needs gptqmodel", READERS),
        Entry("native", f"needs gptqmodel; {CPU_KERNEL}", READERS, _four_bits_per_channel),
        Entry("no", "it leaves fused experts dense", READERS, _with("experts")),
        Entry("no", "it knows no Conv1D", READERS, _with("conv1d")),
        Entry(
            "no",
            "it wants scales of activations, which only AWQ itself has",
            READERS,
            lambda s: s.model_type in SCALED_ACTIVATIONS,
        ),
        Entry("no", UNTRIED, "transformers quantizer_awq.py", _not_causal),
    ),
    ("awq", "vllm"): (
        Entry("native", "Marlin kernels", AWQ),
        *_vllm_rules(AWQ, AWQ, AWQ),
    ),
    ("bnb", "transformers"): (
        Entry("native", "needs bitsandbytes", TRIED),
        Entry("native", "needs bitsandbytes; rounds inputs but for outliers", "tests/formats/test_bnb.py", _llm_int8),
        Entry("no", "it leaves fused experts dense, so the file does not fit the model", TRIED, _with("experts")),
        Entry("no", "it leaves linears of a class of their own dense", TRIED, _with("subclass")),
    ),
    ("bnb", "vllm"): (
        Entry("plugin", "needs vllm-bnb-plugin since vLLM 0.28", "vLLM PR 43529"),
        Entry("no", UNTRIED, BERT, _not_causal),
    ),
    ("gguf", "transformers"): (
        Entry("dense-only", "needs gguf, and the config.json beside the file; decodes all weights while loading", GGUF),
        Entry(
            "no",
            "it takes a file named after Mistral for a family that gguf has no names for",
            "transformers modeling_gguf_pytorch_utils.py",
            lambda s: s.model_type == "mistral",
        ),
        Entry("no", NO_NAMES, LLAMACPP, _no_gguf),
    ),
    ("gguf", "vllm"): (
        Entry("plugin", "needs vllm-gguf-plugin since vLLM 0.24", "vLLM PR 39612"),
        Entry("no", NO_NAMES, LLAMACPP, _no_gguf),
    ),
    ("gguf", "llama.cpp"): (
        Entry("native", "its own format", LLAMACPP),
        Entry("no", NO_NAMES, LLAMACPP, _no_gguf),
    ),
    ("sparse", "transformers"): _own(PLUGIN),
    ("sparse", "vllm"): (Entry("no", "it removed sparse formats", "vLLM PR 36799"),),
    ("codebook", "transformers"): _own("tests/e2e/test_cluster.py"),
    ("codebook", "vllm"): (Entry("no", "it has no kernels for tables of values", "vLLM PR 7971"),),
    ("low-rank", "transformers"): _own("tests/e2e/test_factorize.py", "multiplies by one factor after the other"),
    ("low-rank", "vllm"): (Entry("no", "it has no layers of two factors", "vLLM's list of quantization methods"),),
    **{
        (name, "llama.cpp"): (Entry("no", "it reads GGUF files only", "ggml docs/gguf.md"),)
        for name in FORMATS
        if name != "gguf"
    },
}


def missing_packages(name: str) -> list[str]:
    """What transformers would need to read this format, and is not installed here."""
    return [package for package in PACKAGES[name] if find_spec(package.replace("-", "_")) is None]


def entry(stored: Stored, runtime: Runtime) -> Entry:
    """How a runtime takes a checkpoint: the weakest entry that holds, of equals the last."""
    held = [e for e in TABLE[stored.format, runtime] if e.when(stored)]
    return min(reversed(held), key=lambda e: ORDER.index(e.support))


def usual(family: Family, name: str) -> Stored:
    """What `--bits 4 --format ...` writes for a family."""
    schemes = frozenset([Scheme(4, True, 128)]) if name in ("compressed-tensors", "gptq", "awq") else frozenset()
    return Stored(name, frozenset(family.kinds), schemes, causal=family.causal, model_type=family.model_types[0])


def markdown() -> str:
    """The README's table: families x formats x runtimes, families that load alike on one line."""
    lines = ["| format | family | " + " | ".join(RUNTIMES) + " |", "|---" * (2 + len(RUNTIMES)) + "|"]
    for name in FORMATS:
        alike: dict[tuple[Entry, ...], list[str]] = {}
        for family in FAMILIES:
            alike.setdefault(tuple(entry(usual(family, name), r) for r in RUNTIMES), []).append(family.name)
        for entries, names in alike.items():
            cells = [f"{e.support}: {e.reason} ({e.source})" for e in entries]
            lines.append(f"| {name} | {', '.join(names)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
