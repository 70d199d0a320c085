"""What each of two processes does; importable, since spawned processes import it anew."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from contract_table import ROWS, applied, inputs
from torch.nn.parallel import DistributedDataParallel

STEPS = (((0.05, 0.1), (0.95, 0.8)), ((0.3, 0.3), (0.05, 0.95)), ((0.9, 0.9), (0.9, 0.6)))  # [step][rank]


def rank_gradients(row: Any, levels: tuple[float, ...], seed: int) -> dict[str, torch.Tensor]:
    """Gradients of one process's batch, without DDP."""
    transformer = applied(row, "dit").train()
    _loss(transformer, levels, seed).backward()
    return {name: p.grad for name, p in transformer.named_parameters() if p.grad is not None}


def _loss(transformer: torch.nn.Module, levels: tuple[float, ...], seed: int) -> torch.Tensor:
    loss: torch.Tensor = transformer(**inputs(levels, seed=seed), return_dict=False)[0].square().mean()
    return loss


def work(rank: int, store: str, checkpointing: bool) -> None:
    """Raises where DDP or the comparison does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for row in ROWS:
        if row.name not in ("mod", "diffcr schedule", "diffcr learning"):
            continue
        transformer = applied(row, "dit").train()
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        wrapped = DistributedDataParallel(transformer)
        for step, levels in enumerate(STEPS):
            wrapped.zero_grad()
            # the second forward raises where the first left a parameter without gradient
            _loss(wrapped, levels[rank], seed=10 * step + rank).backward()
            for name, parameter in transformer.named_parameters():
                if not parameter.requires_grad:
                    continue
                assert parameter.grad is not None, name
                both = [torch.empty_like(parameter.grad) for _ in range(2)]
                dist.all_gather(both, parameter.grad.contiguous())
                assert torch.equal(both[0], both[1]), (row.name, name)
            expected = [rank_gradients(row, levels[r], seed=10 * step + r) for r in range(2)]
            for name, parameter in transformer.named_parameters():
                if parameter.requires_grad:
                    mean = (expected[0][name] + expected[1][name]) / 2
                    torch.testing.assert_close(parameter.grad, mean, atol=1e-6, rtol=1e-4)
    dist.destroy_process_group()
