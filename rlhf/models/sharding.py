"""Shard the frozen base over the processes with torch's FSDP2: each holds a share of the weights of every block.

The weights of a block are gathered before it runs and freed afterwards, in the forward and again in the backward pass.
Adapters, heads and everything outside of the blocks (embeddings, final norm, language-model head) stay whole in each
process. Optimiser, checkpoints and exports are therefore the same as with data parallelism.
"""

from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from rlhf.distributed import collectives, lockstep
from rlhf.errors import ModelError
from rlhf.models.blocks import transformer_blocks
from rlhf.models.roles import Roles
from rlhf.models.sequences import Sequences


def shard(roles: Roles, device: str) -> None:
    """Keep only this process's share of the base, on `device` ("cpu" or "cuda").

    From then on, every forward pass through the base is one of all processes (`collectives.keep_step`).

    Raises:
        ModelError: the model does not declare which modules are its blocks.
    """
    base = roles.trunk("reference")
    blocks = transformer_blocks(base)
    if not blocks:
        raise ModelError(f"trainer=fsdp: {type(base).__name__} does not say what its blocks are; allowed: trainer=ddp")
    mesh = init_device_mesh(device, (collectives.size(),))
    whole = set(base.parameters()) - {
        parameter for block in blocks for name, parameter in block.named_parameters() if ".lora_" not in name
    }
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    fully_shard(base.base_model, mesh=mesh, ignored_params=whole)  # holds no shards itself; prefetches
    roles.sharded = True
    # Processes may need different numbers of forward passes between collectives. Those that have finished join the
    # passes of the others with one token.
    smallest = Sequences.from_lists([[0]], [[0]])
    lockstep.enable(base.base_model, lambda: roles.hidden("reference", smallest))


def full_weights(roles: Roles) -> dict[str, Tensor]:
    """The weights of the base without adapters, on the CPU, in the process of rank 0; empty in the others."""
    found: dict[str, Tensor] = {}
    for name, value in roles.trunk("reference").state_dict().items():
        if ".lora_" not in name:
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if collectives.is_rank_zero():
                found[name.replace(".base_layer.", ".")] = whole.cpu()
    return found
