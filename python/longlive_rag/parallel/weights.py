"""Weights split over ranks: each holds a share of every tensor, and those of one block are gathered while it works.

torch's FSDP2 does the work (`fully_shard`); what is here loads a share without ever holding the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

# Under this name in every version from 2.5 on.
from torch.distributed._composable.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from longlive_rag.parallel.shards import Group


def load_shares(
    model: nn.Module,
    shares: Mapping[str, Tensor],
    group: Group,
    *,
    blocks: Iterable[nn.Module],
    methods: Iterable[tuple[nn.Module, str]],
) -> None:
    """Give a model on the meta device its weights, of which each rank of the group holds a share.

    What lies in no block, embeddings and head, stays gathered from the first pass on: every pass needs it.

    Args:
        shares: of each tensor of the model's `state_dict`, `own_rows`, all on one device.
        blocks: modules that work one after another; their weights are gathered when it is their turn.
        methods: of the model or of blocks, besides `forward`, that use weights.
    """
    device = next(iter(shares.values())).device.type
    mesh = group if isinstance(group, DeviceMesh) else DeviceMesh.from_group(group, device)
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh)
    for module, name in methods:
        register_fsdp_forward_method(module, name)
    whole = model.state_dict()
    state = {
        name: DTensor.from_local(
            share, mesh, [Shard(0)], run_check=False, shape=whole[name].shape, stride=whole[name].stride()
        )
        for name, share in shares.items()
    }
    model.load_state_dict(state, assign=True)
