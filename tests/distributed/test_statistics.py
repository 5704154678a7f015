"""Claims about SIGReg on two processes that talk through gloo: value and gradient are those of one process."""

from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

from jepa_hf.models.losses import NUM_SLICES, sigreg

WIDTH, SIZES = 6, (5, 11)
SAMPLES = (2, 3)


def part(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A rank's vectors, of which the last one is invalid."""
    states = 1.5 * torch.randn(SIZES[rank], WIDTH, generator=torch.Generator().manual_seed(10 + rank)) + rank
    return states, torch.arange(SIZES[rank]) < SIZES[rank] - 1


def of_rank(rank: int, folder: str) -> None:
    """Write the value, and the gradient of this rank's vectors of its share of the loss: 1/4 and 3/4."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    states, valid = part(rank)
    states.requires_grad_()
    torch.manual_seed(rank)
    value = sigreg(states, valid, torch.tensor(SAMPLES[rank]))
    (value * (0.25, 0.75)[rank]).backward()
    torch.save((value.detach(), states.grad), f"{folder}/rank-{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    """With parts of different sizes, generators in different states, and losses that count differently."""
    multiprocessing.start_processes(of_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    actual = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1)]
    states, valid = (torch.cat(both) for both in zip(*map(part, (0, 1)), strict=True))
    draws = [torch.randn(WIDTH, NUM_SLICES, generator=torch.Generator().manual_seed(rank)) for rank in (0, 1)]
    states.requires_grad_()
    value = sigreg(states, valid, torch.tensor(sum(SAMPLES)), sum(draws))
    value.backward()
    assert value > 1
    for of_one, _ in actual:
        torch.testing.assert_close(of_one, value.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.cat([gradient for _, gradient in actual]), states.grad, rtol=1e-4, atol=1e-6)
