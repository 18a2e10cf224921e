"""Several processes: replicas (DDP) or shards (FSDP2) of the model, and tensors that are whole on one side and sharded on the other."""

import contextlib
import warnings

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from configurator import InputError


def distribute(model, kind: str, place, rows: int, compiled: bool):
    """The module to call in training: `model` itself for one process, else wrapped by DDP or sharded in place by torch's fully_shard.

    `rows` is the global batch. `compiled` compiles the blocks one by one: between them the gradients of one block are exchanged while the one before
    it is still computing, and under fsdp each is one shard group. Raises InputError for a batch that cannot be cut.
    """
    if place.world == 1:
        return model
    if rows < place.world:
        raise InputError(f"the global batch of {rows} sequences is too small for {place.world} processes: raise --gradient_accumulation_steps")
    if compiled:  # one function for all blocks, of which layers with other keys are other variants
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(model.transformer.h))
        for block in model.transformer.h:
            block.compile(dynamic=False)
    if kind == "ddp":
        buffers = "forward_sync_buffers" if torch.__version__ >= (2, 13) else "broadcast_buffers"  # a new name for the same
        return DistributedDataParallel(model, gradient_as_bucket_view=True, **{buffers: False})
    from torch.distributed.fsdp import fully_shard

    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")  # the logits, which nobody changes in place

    if rows % place.world:  # all processes gather the same shards at the same time, so each must run as many micro-batches
        raise InputError(f"--parallel=fsdp: the global batch of {rows} sequences is not divisible by {place.world} processes")
    for block in model.transformer.h:
        fully_shard(block)
    return fully_shard(model)


@contextlib.contextmanager
def gradient_sync(network, on: bool):
    """Gradients are exchanged in the backward pass inside only if `on`: the last micro-batch of a step."""
    if hasattr(network, "set_requires_gradient_sync"):
        network.set_requires_gradient_sync(on)
        yield
    elif isinstance(network, DistributedDataParallel) and not on:
        with network.no_sync():
            yield
    else:
        yield


def reshard(network):
    """After a forward pass without a backward one, a sharded root still holds its whole parameters in place of its shards."""
    if hasattr(network, "reshard"):
        network.reshard()


def whole(tensor):
    """A sharded tensor gathered on every process (all must call it); any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def assign(tensor, value):
    """Copies a whole `value` into `tensor`, in place, each process its shard."""
    if isinstance(tensor, DTensor):
        value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(value)


def gather(value, place) -> list:
    """The small objects of all processes, in order of rank."""
    values = [value]
    if place.world > 1:
        values = [None] * place.world
        dist.all_gather_object(values, value)
    return values
