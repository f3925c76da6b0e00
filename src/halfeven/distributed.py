"""The processes of a distributed run: rank, number, smallest numbers, averages, and a check that all agree."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from halfeven.renamed import renamed_attributes


def is_distributed() -> bool:
    """Return True where several processes work together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """Return the number of processes that work together."""
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if is_distributed() else 0


def smallest(number: int, device: torch.device | str) -> int:
    """Return the smallest of the numbers that the processes give; `device` is where they exchange tensors."""
    if not is_distributed():
        return number
    shared = torch.tensor(int(number), device=device)
    dist.all_reduce(shared, dist.ReduceOp.MIN)
    return int(shared)


@torch.no_grad()
def average(tensors: Iterable[Tensor]) -> None:
    """Replace floating-point tensors, in place, by their means over all processes, in one exchange for each dtype."""
    if not is_distributed():
        return
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    for group in groups.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        dist.all_reduce(flat)
        flat /= world_size()
        for tensor, part in zip(group, torch.split(flat, [tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(part.view_as(tensor))


@torch.no_grad()
def differing(model: nn.Module) -> list[str]:
    """Return the names of the model's tensors that differ between processes in any bit; [] where all agree."""
    if not is_distributed():
        return []
    state = model.state_dict()
    sums = torch.stack([_checksum(tensor) for tensor in state.values()])
    # The smallest and the largest sum are equal only where all processes have the same.
    low = sums.clone()
    high = sums.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    return [name for name, same in zip(state, (low == high).tolist(), strict=True) if not same]


def _checksum(tensor: Tensor) -> Tensor:
    """Return a number made of all bits of a tensor: the sum of its 64-bit words, weighted by position."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    padded = torch.nn.functional.pad(data, (0, -len(data) % 8)).view(torch.int64)
    # Integer overflow wraps around; a change of a word always changes the sum, since odd weights are invertible.
    weights = torch.arange(1, 2 * len(padded), 2, dtype=torch.int64, device=padded.device)
    return (padded * weights).sum()


__getattr__ = renamed_attributes(
    __name__,
    average_batchnorm="layerwise.batchnorm_statistics.average_batchnorm",
    batchnorms="layerwise.batchnorm_statistics.batchnorms",
)
