"""RWKV-7 as a Composer model, with its loss summed by stream.

Shapes: T targets in a microbatch, K packs, S streams.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from composer.models import ComposerModel
from composer.utils.parallelism import FSDP2Config
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchmetrics import Metric

from streaming_rwkv.data.batch import NO_STREAM, Batch
from streaming_rwkv.distributed import world_size
from streaming_rwkv.model.rwkv7 import RWKV7
from streaming_rwkv.train.position import BINS, sums_by_position

REPLICAS, SHARDS = "replicas", "shards"  # the mesh's dimensions


def build_mesh(replicas: int, *, device: str, timeout_seconds: float) -> DeviceMesh | None:
    """Return the ranks as a mesh of replicas × shards, or None for a single process. Collective.

    A replica has consecutive ranks, so that with as many replicas as machines each is sharded within a machine.

    Args:
        timeout_seconds: of a collective within the mesh.
    """
    ranks = torch.arange(world_size()).view(replicas, -1)
    if ranks.numel() == 1:
        return None
    device_type = "cuda" if device == "gpu" else device
    if replicas == 1:
        return init_device_mesh(device_type, (ranks.numel(),), mesh_dim_names=(SHARDS,))
    timeout = timedelta(seconds=timeout_seconds)
    groups = [
        torch.distributed.new_subgroups_by_enumeration(along, timeout=timeout)[0]
        for along in (ranks.T.tolist(), ranks.tolist())
    ]
    return DeviceMesh.from_group(groups, device_type, mesh=ranks, mesh_dim_names=(REPLICAS, SHARDS))


class Sharding(FSDP2Config):
    """FSDP2 config that keeps its mesh: Composer's trainer would replace it with one dimension of all ranks."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "device_mesh" or self.device_mesh is None:
            super().__setattr__(name, value)


def sharding(mesh: DeviceMesh) -> Sharding:
    """Return the FSDP2 config: shard parameters in their own dtype, and leave mixed precision to autocast.

    Parameters are sharded within each replica; `average_gradients` connects the replicas.

    Composer's default casts the weights and all arguments of every block to bfloat16, the residual stream and the
    carried states included, so that several processes would train differently from one.
    """
    return Sharding(device_mesh=mesh[SHARDS], mixed_precision="FULL")


class RWKV7ForTraining(ComposerModel):
    """Composer model whose only child is the network, so that FSDP2 wraps the network and each of its blocks."""

    def __init__(self, network: RWKV7, *, num_streams: int, flops_per_token: int) -> None:
        super().__init__()
        self.network = network
        self.num_streams = num_streams
        self.flops_per_token = flops_per_token

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return nll, the (1, T) negative log-likelihood of each target (0 if ignored), and pack_nll, its (K,) sums."""
        nll = self.network(batch["tokens"], cu_seqlens=batch["cu_seqlens"], targets=batch["targets"])
        running = torch.nn.functional.pad(nll.detach()[0].double().cumsum(0), (1, 0))
        starts = batch["pack_starts"].long()
        return {"nll": nll, "pack_nll": running[starts[1:]] - running[starts[:-1]]}

    def loss(self, outputs: dict[str, Tensor], batch: Batch, *args: Any, **kwargs: Any) -> Tensor:
        """Return the mean over the microbatch's targets; Composer weights microbatches and ranks by their targets."""
        return outputs["nll"].sum() / max(1, batch["num_targets"])

    def eval_forward(self, batch: Batch, outputs: Any = None) -> dict[str, Tensor]:
        return outputs if outputs is not None else self(batch)

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        return {} if is_train else {"loss": LossByStream(self.num_streams)}

    def update_metric(self, batch: Batch, outputs: dict[str, Tensor], metric: Metric) -> None:
        metric.update(outputs["pack_nll"], batch, outputs["nll"])

    def flops_per_batch(self, batch: Batch) -> int:
        return self.flops_per_token * batch["tokens"].numel()


def add_by_stream(sums: Tensor, values: Tensor, streams: Tensor) -> None:
    """Add the (K,) `values` of packs to the (S,) `sums` of their streams; blank packs are not counted."""
    counted = streams != NO_STREAM
    # Blank packs are added as zeros to stream 0: removing them would need their number from the device.
    sums.index_add_(0, streams.clamp(min=0), torch.where(counted, values.to(sums.dtype), 0))


class LossByStream(Metric):
    """Sums of loss, targets and text bytes by stream, and by position, over all ranks; the value is the whole loss."""

    full_state_update = False

    def __init__(self, num_streams: int) -> None:
        super().__init__(dist_sync_on_step=False)
        for name in ("nll", "targets", "text_bytes"):
            self.add_state(name, default=torch.zeros(num_streams, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("position_nll", "position_targets"):
            self.add_state(name, default=torch.zeros(BINS, dtype=torch.float64), dist_reduce_fx="sum")
        self.totals: dict[str, list[float]] = {}

    def update(self, pack_nll: Tensor, batch: Batch, nll: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            pack_nll: (K,) sums of packs.
            nll: (1, T) losses of targets, for the sums by position.
        """
        if nll is not None:
            of_bins, counts = sums_by_position(nll, batch)
            self.position_nll += of_bins
            self.position_targets += counts
        add_by_stream(self.nll, pack_nll, batch["streams"])
        add_by_stream(self.targets, batch["pack_starts"].diff(), batch["streams"])
        add_by_stream(self.text_bytes, batch["text_bytes"], batch["streams"])

    def compute(self) -> Tensor:
        # Called when the states hold the sums of all ranks; ValidationReport reads them.
        names = ("nll", "targets", "text_bytes", "position_nll", "position_targets")
        self.totals = {name: getattr(self, name).tolist() for name in names}
        return self.nll.sum() / self.targets.sum().clamp(min=1)


def average_gradients(network: RWKV7, mesh: DeviceMesh | None) -> None:
    """Make the gradient of every parameter the mean over all ranks: FSDP2 reduces it within a replica.

    The replicas' gradients are added by FSDP2's hook for this, after each reduce-scatter. FSDP2's own reduction over a
    mesh of two dimensions asks the backend for a mean, which gloo refuses.

    Some backends return their sum for the mean within a replica (gloo on torch 2.7). AdamW is nearly invariant to a
    common factor, but gradient norms and clipping are not. The backend's result is checked, not its version.
    """
    if mesh is None:
        return
    sharded = next(network.parameters())
    assert isinstance(sharded, DTensor), "not sharded"
    assert sharded.device_mesh == mesh[SHARDS], "not sharded within a replica"
    shards, replicas = mesh[SHARDS], mesh[REPLICAS] if mesh.ndim == 2 else None
    ones = torch.ones(shards.size(), device=sharded.device)
    mean = torch.empty(1, device=ones.device)
    torch.distributed.reduce_scatter_tensor(mean, ones, op=torch.distributed.ReduceOp.AVG, group=shards.get_group())
    divisor = (1 if replicas is None else replicas.size()) * round(mean.item())
    if divisor == 1:
        return

    def average(gradient: Tensor) -> None:
        if replicas is not None:
            torch.distributed.all_reduce(gradient, group=replicas.get_group())
        gradient.div_(divisor)
        if gradient.is_cuda:
            # The hook has a stream of its own: keep the allocator from giving the memory away before it is done.
            gradient.record_stream(torch.cuda.current_stream())

    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_all_reduce_hook(average)
