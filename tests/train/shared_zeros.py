"""Run by `test_zeros.py` in two processes at a time: zeros of a model that both train, whole or in shards."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from llmshrink.train.zeros import Zeros


def main(how: str, folder: Path) -> None:
    distributed.init_process_group("gloo")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight[layer.weight.abs() < layer.weight.abs().flatten().quantile(0.5)] = 0
    zeros = Zeros(model, ["0.weight", "2.weight"], "auto")
    shared = DistributedDataParallel(model) if how == "ddp" else fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    for step in range(5):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + distributed.get_rank()))
        shared(x).square().sum().backward()
        zeros.hold(model)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for state in optimizer.state.values():  # an optimizer that leaves zeros where they are proves nothing
            state["exp_avg"].add_(0.01)
        zeros.on_optimizer_step()
        optimizer.zero_grad()
    assert isinstance(model[0].weight, DTensor) == (how == "fsdp")
    whole = {n: p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for n, p in model.named_parameters()}
    found = {"norm": norm.full_tensor() if isinstance(norm, DTensor) else norm, **whole}
    torch.save(found, folder / f"{how}-{distributed.get_rank()}.pt")
    distributed.destroy_process_group()


main(sys.argv[1], Path(sys.argv[2]))
