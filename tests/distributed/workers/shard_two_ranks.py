"""Two ranks that share a model's parameters (FSDP2), and one process that does not, take the same steps.

Started by `torchrun`; `test_sharded.py` calls `steps` too.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from helpers.batches import text_batch, tiny_jepa
from jepa_hf.training.ema import match_parameters, relative_parameter_distance, update_target


def steps(sharded: bool) -> list[dict[str, Any]]:
    """Evaluate, then twice: a step of SGD, the EMA, an evaluation. What each evaluation saw.

    The steps are on four rows, of which each rank has two of its own: FSDP2 averages the gradients of both.
    """
    model, batch = tiny_jepa("bert", "drop", mlm_weight=0.5), text_batch("bert", "drop", count=4)
    own, total = batch, batch["target_valid"].sum()
    if sharded:
        own = {name: value[dist.get_rank() :: dist.get_world_size()] for name, value in batch.items()}
        total = total / dist.get_world_size()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for encoder in (model.context_encoder, model.target_encoder):
            for layer in encoder.encoder.layer:
                fully_shard(layer, mesh=mesh)
        fully_shard(model.get_input_embeddings(), mesh=mesh)  # as accelerate does
        fully_shard(model, mesh=mesh)
    pairs = match_parameters(model.context_encoder.named_parameters(), model.target_encoder.named_parameters())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    seen = []
    for step in range(3):
        if step:
            model.train()(**own, num_items_in_batch=total).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            update_target(*pairs, 0.9)
        with torch.no_grad():
            output = model.eval()(**batch, output_hidden_states=True)
        values = {"loss": output.loss, "context": output.context_state, "targets": output.targets}
        seen.append({**values, "distance": relative_parameter_distance(*pairs)})
    return seen


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.save(steps(sharded=True), Path(sys.argv[1]) / f"rank-{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()
