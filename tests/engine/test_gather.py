"""What the engine gathers block by block is what hooks on the whole model see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import load
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmshrink.engine.gather import LOOKED_UP, gather, gather_tied
from llmshrink.engine.hidden import Hidden, save_states
from llmshrink.errors import InputError, LlmshrinkError
from llmshrink.model.anatomy import Block, Group, Site
from llmshrink.model.source import open_source
from llmshrink.model.streamed import Decoded, StreamedModel
from llmshrink.statistics import Cross, Hessian, Norm, NoStatistic, Statistic

CPU = torch.device("cpu")
Models = Callable[..., Path]


def batches() -> list[Tensor]:
    """Two batches of different shapes."""
    source = torch.Generator().manual_seed(3)
    return [torch.randint(0, 160, shape, generator=source) for shape in ((3, 20), (2, 31))]


def full_model(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


@contextmanager
def hooked(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Inputs [tokens, in] of every linear, and of the experts (`<module>.<expert>.<leaf>`), by module name."""
    seen: dict[str, list[Tensor]] = {}

    def add(name: str, x: Tensor) -> None:
        seen.setdefault(name, []).append(x.reshape(-1, x.shape[-1]))

    def experts(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        hidden, chosen, _ = args
        for expert in range(module.num_experts):  # type: ignore[arg-type]
            x = hidden[(chosen == expert).any(-1)]
            gate, up = (x @ module.gate_up_proj[expert].T).chunk(2, -1)  # type: ignore[index]
            add(f"{name}.{expert}.gate_up_proj", x)
            add(f"{name}.{expert}.down_proj", nn.functional.silu(gate) * up)

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            hook = lambda _m, args, name=name: add(name, args[0])  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook))
        elif hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, nn.Parameter):
            hook = lambda m, args, name=name: experts(name, m, args)  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook))
    yield seen
    for handle in handles:
        handle.remove()


def name_of(site: Site) -> str:
    return site.module if site.expert is None else f"{site.module}.{site.expert}.{site.leaf}"


def gathered(
    model: StreamedModel, hidden: Hidden, block: Block, groups: tuple[Group, ...], kind: type[Statistic] = Hessian
) -> dict[Group, Statistic]:
    """The statistics of a block whose predecessors were run."""
    for index in range(block.index):
        model.load_block(index)
        hidden.advance(index)
        model.drop_block(index)
    model.load_block(block.index)
    found = gather(model, block, list(groups), dict.fromkeys(groups, (NoStatistic, kind)), hidden)
    assert all(statistics[NoStatistic].tokens == statistics[kind].tokens for statistics in found.values())
    return {group: statistics[kind] for group, statistics in found.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3-moe"])
@pytest.mark.parametrize("index", [0, 1])
def test_hessians_are_those_of_hooks_on_the_full_model(models_folder: Models, family: str, index: int) -> None:
    folder = models_folder(family)
    with hooked(full := full_model(folder)) as seen, torch.no_grad():
        for tokens in batches():
            full(tokens)
    model = StreamedModel(open_source(str(folder)), CPU)
    block = model.anatomy.blocks[index]
    found = gathered(model, Hidden(model, batches()), block, block.groups)
    assert len(found) == len(block.groups) >= 4
    for group, statistic in found.items():
        for site in group.sites:  # every member of a group, not only the one that was observed first
            x = torch.cat(seen[name_of(site)]).double()
            assert statistic.tokens == len(x)
            assert isinstance(statistic, Hessian)
            expected = x.T @ x / max(len(x), 1)
            assert (statistic.matrix - expected).abs().max() <= 1e-5 * expected.abs().max(), site


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_inputs_are_put_in_pairs_with_the_original_s(models_folder: Models, family: str) -> None:
    """Block 0 is compressed by setting a part of its weights to zero; what block 1 gets is then another input."""
    folder = models_folder(family)
    with hooked(full := full_model(folder)) as originals, torch.no_grad():
        for tokens in batches():
            full(tokens)
    model = StreamedModel(open_source(str(folder)), CPU)
    cut = {m.key: model.read(m).clone() for m in model.anatomy.blocks[0].matrices}
    for matrix in model.anatomy.blocks[0].matrices:
        cut[matrix.key][::2] = 0
        weight = full.get_parameter(matrix.parameter)
        weight.data.copy_(matrix.seen(cut[matrix.key]))
    with hooked(full) as seen, torch.no_grad():
        for tokens in batches():
            full(tokens)
    hidden = Hidden(model, batches(), originals=True)
    model.load_block(0)
    hidden.advance_originals(0)
    model.load_block(0, {key: Decoded(lambda weight=weight: weight) for key, weight in cut.items()})
    hidden.advance(0)
    block = model.anatomy.blocks[1]
    model.load_block(1)
    found = gather(model, block, list(block.groups), dict.fromkeys(block.groups, (Cross,)), hidden)
    for group in block.groups:
        x, y = (torch.cat(inputs[name_of(group.sites[0])]).double() for inputs in (seen, originals))
        statistic, expected = found[group][Cross], (y - x).T @ x / len(x)
        assert isinstance(statistic, Cross) and statistic.tokens == len(x) and expected.abs().max() > 0
        assert (statistic.shift - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert (statistic.matrix - x.T @ x / len(x)).abs().max() <= 1e-5 * statistic.matrix.abs().max()


def test_norms_are_the_diagonal_of_the_hessian(models_folder: Models) -> None:
    model = StreamedModel(open_source(str(models_folder("llama"))), CPU)
    block = model.anatomy.blocks[0]
    hidden = Hidden(model, batches())
    norms, hessians = (gathered(model, hidden, block, block.groups, kind) for kind in (Norm, Hessian))
    for group in block.groups:
        torch.testing.assert_close(norms[group].square, hessians[group].matrix.diagonal())  # type: ignore[attr-defined]


def test_nothing_behind_the_last_wanted_input_is_run(models_folder: Models) -> None:
    model = StreamedModel(open_source(str(models_folder("llama"))), CPU)
    block, hidden = model.anatomy.blocks[0], Hidden(model, batches())
    ran: list[str] = []
    for name, module in model.model.get_submodule(block.prefix).named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    before = [state.clone() for state in hidden.states]
    found = gathered(model, hidden, block, block.groups[:1])
    assert {m.key.split(".")[-2] for g in found for m in g.matrices} == {"q_proj", "k_proj", "v_proj"}
    assert "input_layernorm" in ran and not any("o_proj" in name or "mlp" in name for name in ran)
    assert all(torch.equal(a, b) for a, b in zip(before, hidden.states, strict=True))


def test_only_the_calibration_batches_count(models_folder: Models) -> None:
    model = StreamedModel(open_source(str(models_folder("llama"))), CPU)
    calibration, probe = batches()
    block, hidden = model.anatomy.blocks[0], Hidden(model, [calibration], probe)
    model.load_block(0)
    found = gather(model, block, [block.groups[0]], {block.groups[0]: (Hessian,)}, hidden)
    assert found[block.groups[0]][Hessian].tokens == 60


def test_linears_that_do_not_share_an_input_are_not_put_together(models_folder: Models) -> None:
    model = StreamedModel(open_source(str(models_folder("llama"))), CPU)
    block = model.anatomy.blocks[0]
    queries, out = block.groups[0], block.groups[1]
    wrong = Group(queries.sites + out.sites, queries.matrices + out.matrices)
    with pytest.raises(LlmshrinkError, match=r"o_proj: its input is not the tensor that .*q_proj gets"):
        gathered(model, Hidden(model, batches()), block, (wrong,))


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_the_number_of_lanes_changes_no_bit(models_folder: Models, family: str) -> None:
    model = StreamedModel(open_source(str(models_folder(family))), CPU)
    block, many = model.anatomy.blocks[0], [tokens for tokens in batches() for _ in range(6)]
    before = torch.get_num_threads()
    found = []
    for lanes in (1, 2):
        torch.set_num_threads(lanes)  # one core for each lane
        found.append(gathered(model, Hidden(model, many), block, block.groups))
    torch.set_num_threads(before)
    for group in block.groups:
        one, two = (statistics[group] for statistics in found)
        assert isinstance(one, Hessian) and isinstance(two, Hessian)
        assert one.tokens == two.tokens and torch.equal(one.matrix, two.matrix)


# --- hidden states


def test_states_come_back_bit_for_bit(models_folder: Models, tmp_path: Path) -> None:
    model = StreamedModel(open_source(str(models_folder("llama", torch.bfloat16))), CPU)
    hidden = Hidden(model, batches())
    model.load_block(0)
    hidden.advance(0)
    digest = save_states(tmp_path / "states.safetensors", hidden.states)
    again = Hidden(model, batches())
    assert not torch.equal(again.states[0], hidden.states[0])
    again.load(tmp_path / "states.safetensors")
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(again.states, hidden.states, strict=True))
    assert save_states(tmp_path / "more.safetensors", again.states) == digest


def test_infinite_activations_are_refused(models_folder: Models) -> None:
    model = StreamedModel(open_source(str(models_folder("llama"))), CPU)
    hidden = Hidden(model, batches())
    model.load_block(0)
    model.model.get_submodule("model.layers.0.mlp.down_proj").weight.data.fill_(float("inf"))  # type: ignore[union-attr]
    with pytest.raises(InputError, match="Block 0 gives infinite"):
        hidden.advance(0)


@pytest.mark.parametrize("family", ["llama-tied", "gemma3", "opt-projected", "bert-masked"])
def test_a_tied_matrix_is_weighed_by_what_the_whole_model_gives_its_head(models_folder: Models, family: str) -> None:
    folder = models_folder(family)
    whole = load(folder)[0]
    seen: list[Tensor] = []
    hook = whole.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for tokens in batches():
            whole(tokens)
    hook.remove()
    x = torch.cat(seen).double()
    right = x.T @ x / len(x)
    right += LOOKED_UP * right.diagonal().mean() * torch.eye(len(right), dtype=torch.float64)
    model = StreamedModel(open_source(str(folder)), CPU)
    table = model.anatomy.embedding
    assert table is not None and model.anatomy.tied
    group = Group((table.site,), (table,))
    found = gather_tied(model, group, (Hessian,), Hidden(model, batches()))[Hessian]
    assert isinstance(found, Hessian) and found.tokens == len(x)
    assert torch.allclose(found.matrix.double(), right, rtol=1e-4, atol=1e-4 * float(right.abs().max()))
