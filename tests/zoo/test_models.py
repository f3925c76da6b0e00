"""Float models from each source; what cannot be made says so."""

import json

import pytest
import torch

from halfeven.errors import CheckpointError, ConfigError
from halfeven.zoo.models import ModelOptions, create_model


@pytest.mark.parametrize(
    ("options", "channels"),
    [
        (ModelOptions(name="resnet18", num_classes=4, in_chans=1), 1),
        (ModelOptions(source="torchvision", name="resnet18", num_classes=4), 3),
        (
            ModelOptions(
                source="callable",
                name="torch.nn:Conv2d",
                arguments={"in_channels": 1, "out_channels": 4, "kernel_size": 32},
            ),
            1,
        ),
    ],
    ids=["timm", "torchvision", "callable"],
)
def test_each_source_makes_its_model(options, channels):
    logits = create_model(options).eval()(torch.zeros(2, channels, 32, 32)).flatten(1)
    assert logits.shape == (2, 4)


def test_weights_come_from_the_file(tmp_path):
    first = create_model(ModelOptions(name="resnet18", num_classes=4))
    torch.save(first.state_dict(), tmp_path / "w.pth")
    second = create_model(ModelOptions(name="resnet18", num_classes=4, weights=str(tmp_path / "w.pth")))
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(name="resnet81"), r'timm has no model "resnet81".*resnet18'),
        (dict(source="torchvision", name="resnet81"), r"torchvision has no model.*resnet18"),
        (dict(source="torchvision", name="resnet18", in_chans=1), "3 channels"),
        (dict(source="callable", name="torch.nn"), "names no function"),
        (
            dict(source="callable", name="code:network"),
            r"has no attribute .network. \(the module was read from .*code\.py\)",
        ),
        (dict(source="callable", name="no_such_module:f"), "no_such_module"),
        (dict(source="callable", name="builtins:list"), "returned a list"),
        (dict(source="callable", name="torch.nn:Linear", weights="pretrained"), "your own function"),
        (
            dict(source="callable", name="torch.nn:Linear", arguments={"size": 3}),
            "Linear of callable could not be created",
        ),
        (dict(name="resnet18", arguments={"no_such": 1}), "model resnet18 of timm could not be created"),
        (dict(num_classes=0), "num_classes=0"),
    ],
)
def test_wrong_model_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        create_model(ModelOptions(**options))


def test_missing_weights_file():
    with pytest.raises(CheckpointError, match=r"no weights file nowhere\.pth"):
        create_model(ModelOptions(name="resnet18", weights="nowhere.pth"))


def test_a_model_of_timm_from_a_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_resnet", "num_classes": 10}))
    model = create_model(ModelOptions(name=f"local-dir:{tmp_path}", num_classes=3))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    with pytest.raises(ConfigError, match="could not be created"):
        create_model(ModelOptions(name=f"local-dir:{tmp_path / 'none'}"))
