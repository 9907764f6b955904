"""A frozen base spread over the processes (torch's FSDP2): each holds its share of the weights of every block.

A block's weights are gathered when its turn comes and let go behind it, in the backward pass once more. Adapters and
heads, and what lies outside of the blocks (embeddings, the last norm, the language-model head), stay whole in each
process, so that optimiser, checkpoints and exports are those of data parallel.
"""

from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from rlhf.distributed import collectives, lockstep
from rlhf.errors import ModelError
from rlhf.models.roles import Roles, blocks_of
from rlhf.models.sequences import Sequences


def shard(roles: Roles, device: str) -> None:
    """Leave this process its share of the base, on `device`; from now on the processes pass through it together.

    Raises:
        ModelError: the model does not say what its blocks are.
    """
    base = roles.trunk("reference")
    blocks = blocks_of(base)
    if not blocks:
        raise ModelError(f"trainer=fsdp: {type(base).__name__} does not say what its blocks are; allowed: trainer=ddp")
    mesh = init_device_mesh(device, (collectives.size(),))
    whole = set(base.parameters()) - {
        parameter for block in blocks for name, parameter in block.named_parameters() if ".lora_" not in name
    }
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    fully_shard(base.base_model, mesh=mesh, ignored_params=whole)  # nothing of its own: it knows which block is next
    roles.sharded = True
    least = Sequences.from_lists([[0]], [[0]])
    lockstep.enable(base.base_model, lambda: roles.hidden("reference", least.to(roles.device)))


def gathered(roles: Roles) -> dict[str, Tensor]:
    """The weights of the base without its adapters, on the CPU of the first process; in the others nothing."""
    found: dict[str, Tensor] = {}
    for name, value in roles.trunk("reference").state_dict().items():
        if ".lora_" not in name:
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if collectives.is_rank_zero():
                found[name.replace(".base_layer.", ".")] = whole.cpu()
    return found
