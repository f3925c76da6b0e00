"""What processes agree on: averages, and whether they hold the same model. Two real processes, exchanging by gloo."""

import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from halfeven.distributed import average, differing, rank, world_size
from halfeven.layerwise.batchnorm_statistics import average_batchnorm
from processes import forked


def net(number: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[1].running_mean += number
    with torch.no_grad():
        model[2].bias[[0, 1]] = torch.tensor([1.0, 2.0] if number == 0 else [2.0, 1.0])
    return model


def work(number: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2)
    model = net(number)
    before = differing(model)
    average_batchnorm(model)
    mixed = [torch.tensor([1.0, 3.0]) * (number + 1), torch.tensor(5.0, dtype=torch.float64) + number]
    average(mixed)
    found = {
        "place": (rank(), world_size()),
        "before": before,
        "after": differing(model),
        "mean": model[1].running_mean,
        "mixed": mixed,
    }
    torch.save(found, os.path.join(folder, f"{number}.pt"))
    dist.destroy_process_group()


def test_what_two_processes_exchange(tmp_path):
    mp.start_processes(work, args=(str(tmp_path),), nprocs=2, start_method=forked().get_start_method())
    for number in range(2):
        found = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        assert found["place"] == (number, 2)
        assert found["before"] == ["1.running_mean", "2.bias"], "values in another order are seen too"
        assert found["after"] == ["2.bias"]
        assert torch.equal(found["mean"], torch.full((3,), 0.5))
        assert torch.equal(found["mixed"][0], torch.tensor([1.5, 4.5]))
        assert found["mixed"][1] == 5.5


def test_a_process_alone_agrees_with_itself():
    model = net(1)
    assert (rank(), world_size(), differing(model)) == (0, 1, [])
    average_batchnorm(model)
    assert torch.equal(model[1].running_mean, torch.ones(3))
