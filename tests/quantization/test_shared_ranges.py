"""Observed ranges in training on two real processes, which exchange by gloo."""

import copy
import io

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import halfeven as he
from halfeven.errors import CalibrationError
from halfeven.quantization.arithmetic import RANGE_MOMENTUM
from halfeven.quantization.model_quantizers import quantizers
from processes import forked


def prepared() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    images = torch.randn(4, 3, 8, 8)
    return he.calibrate(he.prepare(net, images[:2]), [images]).train()


def pickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def batches() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 4, 3, 8, 8) * torch.tensor([1.0, 5.0])[:, None, None, None, None]


def work(number: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2)
    exchanges = []
    exchange = dist.all_reduce
    dist.all_reduce = lambda *given, **options: exchanges.append(given) or exchange(*given, **options)
    model = prepared()
    models = {"": model, "deepcopy": copy.deepcopy(model), "pickle": pickled(model)}
    found = {}
    exchanges.clear()
    for name, each in models.items():
        each(batches()[number])
        found[name] = tensors(each)
    found["exchanges"] = len(exchanges)
    model.eval()(batches()[number])
    found["in evaluation"] = len(exchanges) - found["exchanges"]
    bad = batches()[number]
    if number:
        bad[0, 0, 0, 0] = torch.nan
    try:
        model.train()(bad)
        found["said"] = ""
    except CalibrationError as error:
        found["said"] = str(error)
    torch.save(found, f"{folder}/{number}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("found")
    mp.start_processes(work, args=(str(folder),), nprocs=2, start_method=forked().get_start_method())
    return [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(2)]


@pytest.mark.parametrize("which", ["", "deepcopy", "pickle"])
def test_all_processes_have_the_ranges_of_all_batches(found, which):
    first, second = (each[which] for each in found)
    assert all(torch.equal(first[name], second[name]) for name in first)
    model = prepared()
    before = tensors(model)
    image = next(name for name, q in quantizers(model).items() if not q.weight and q.low < 0)
    expected = torch.lerp(before[f"{image}.high"], batches().max(), RANGE_MOMENTUM)
    torch.testing.assert_close(first[f"{image}.high"], expected)
    assert not torch.equal(before[f"{image}.scale"], first[f"{image}.scale"])


def test_a_step_has_one_exchange_and_an_evaluation_none(found):
    assert [each["exchanges"] for each in found] == [3, 3], "three models, a step each"
    assert [each["in evaluation"] for each in found] == [0, 0]


def test_a_nan_that_one_process_meets_stops_all_by_name(found):
    assert found[0]["said"] == found[1]["said"]
    assert found[0]["said"].startswith("No range can be set for input: a batch holds NaN or infinite values")
