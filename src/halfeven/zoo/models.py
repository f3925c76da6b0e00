"""Float models by name: from timm, from torchvision, or from any function of yours, with their weights."""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from torch import nn

from halfeven.errors import ConfigError
from halfeven.imports import call_function, extra, import_function
from halfeven.nearest import did_you_mean
from halfeven.options import Options, PositiveInt
from halfeven.zoo.tensor_part import tensor_part
from halfeven.zoo.weights import load_weights

PRETRAINED = "pretrained"


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """The float model and its weights."""

    source: Literal["timm", "torchvision", "transformers", "effdet", "callable"] = "timm"
    """Library that makes the model; "callable": your own function."""
    name: str = "resnet18"
    """Name of the model in that library; for "timm" also "hf-hub:NAME" or "local-dir:FOLDER", for "transformers" a
    folder or a name of its hub, for "callable" "package.module:function"."""
    weights: str = ""
    """Float weights: "pretrained" (the library's own), the path of a file, or "" for random ones."""
    weights_entry: str = "auto"
    """Key of the weights in a .pth file that holds several sets, such as "state_dict_ema"; "auto": "state_dict" or
    "model" before averaged ones."""
    num_classes: PositiveInt = 1000
    """Classes of the head; segmentation and detection count the background as one of them."""
    in_chans: PositiveInt = 3
    """Channels of the input image (timm; torchvision's models take 3)."""
    arguments: dict[str, bool | int | float | str | tuple[int, ...]] = field(default_factory=dict)
    """Further keyword arguments of the model's function."""


def create_model(options: ModelOptions) -> nn.Module:
    """Make the float model and load its weights.

    Raises:
        ConfigError: there is no such model, it does not take the arguments, or its library is not installed.
        CheckpointError: the weights are not this model's.
    """
    makers = {
        "timm": _from_timm,
        "torchvision": _from_torchvision,
        "transformers": _from_transformers,
        "effdet": effdet_model,
        "callable": _from_callable,
    }
    pretrained = options.weights == PRETRAINED
    model = makers[options.source](options, pretrained)
    if options.weights and not pretrained:
        load_weights(model, options.weights, options.weights_entry)
    return model


def _from_timm(options: ModelOptions, pretrained: bool) -> nn.Module:
    with extra("train", 'model.source="timm"'):
        import timm

    # "hf-hub:NAME" and "local-dir:FOLDER" are read by timm itself.
    if ":" not in options.name and not timm.is_model(options.name):
        raise ConfigError(
            f'timm has no model "{options.name}", so there is nothing to quantize. '
            f"{_did_you_mean(options.name, timm.list_models())}"
        )
    sizes = {"num_classes": options.num_classes, "in_chans": options.in_chans}
    try:
        return cast(nn.Module, timm.create_model(options.name, pretrained=pretrained, **sizes, **options.arguments))
    except Exception as error:  # of whatever kind the library raises
        raise _no_model_error(options, pretrained, error) from error


def _from_torchvision(options: ModelOptions, pretrained: bool) -> nn.Module:
    return tensor_part(torchvision_model(options, pretrained))


def torchvision_model(options: ModelOptions, pretrained: bool = False) -> nn.Module:
    """Make a model of torchvision; a detector has its anchors, losses and post-processing in it.

    Raises:
        ConfigError: there is no such model, its weights cannot be loaded, or torchvision is not installed.
    """
    with extra("train", 'model.source="torchvision"'):
        from torchvision import models

    if options.in_chans != 3:
        raise ConfigError(
            f"model.in_chans={options.in_chans} is not available in torchvision, whose models take images of 3 "
            'channels. Use model.source="timm", or repeat the channel in your data.'
        )
    if options.name not in models.list_models():
        raise ConfigError(
            f'torchvision has no model "{options.name}", so there is nothing to quantize. '
            f"{_did_you_mean(options.name, models.list_models())}"
        )
    arguments: dict[str, Any] = {"weights": "DEFAULT" if pretrained else None, **options.arguments}
    if "weights_backbone" in inspect.signature(models.get_model_builder(options.name)).parameters:
        arguments.setdefault("weights_backbone", None)  # else torchvision downloads it
    try:
        return cast(nn.Module, models.get_model(options.name, num_classes=options.num_classes, **arguments))
    except Exception as error:  # of whatever kind the library raises
        raise _no_model_error(options, pretrained, error) from error


def _from_transformers(options: ModelOptions, pretrained: bool) -> nn.Module:
    return tensor_part(transformers_model(options, pretrained))


def transformers_model(options: ModelOptions, pretrained: bool = False) -> nn.Module:
    """Make a detector where the config is of a network that only detects, else a classifier of texts.

    Its head is new where the weights are of a model without a head.

    Raises:
        ConfigError: there is no such model, its weights cannot be loaded, or transformers is not installed.
    """
    with extra("text", 'model.source="transformers"'):
        import transformers
    arguments = {"num_labels": options.num_classes, **options.arguments}
    try:
        config = transformers.AutoConfig.from_pretrained(options.name, **arguments)
        classifies = type(config) in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        kind: Any = (
            transformers.AutoModelForSequenceClassification if classifies else transformers.AutoModelForObjectDetection
        )
        model = kind.from_pretrained(options.name, **arguments) if pretrained else kind.from_config(config)
    except Exception as error:  # of whatever kind the library raises
        raise _no_model_error(options, pretrained, error) from error
    return cast(nn.Module, model)


def effdet_model(options: ModelOptions, pretrained: bool = False) -> nn.Module:
    """Make an EfficientDet of effdet: the network, with its config.

    Raises:
        ConfigError: there is no such model, its weights cannot be loaded, or effdet is not installed.
    """
    with extra("detection", 'model.source="effdet"'):
        import effdet
    arguments: dict[str, Any] = {"pretrained_backbone": False, **options.arguments}
    if isinstance(side := arguments.get("image_size"), int):
        arguments["image_size"] = (side, side)
    try:
        return cast(
            nn.Module,
            # effdet does not count the background among the classes.
            effdet.create_model(options.name, pretrained=pretrained, num_classes=options.num_classes - 1, **arguments),
        )
    except Exception as error:  # of whatever kind the library raises
        raise _no_model_error(options, pretrained, error) from error


def _from_callable(options: ModelOptions, pretrained: bool) -> nn.Module:
    return tensor_part(callable_model(options, pretrained))


def callable_model(options: ModelOptions, pretrained: bool = False) -> nn.Module:
    """Make a model by the user's function; a detector has its loss and post-processing in it.

    Raises:
        ConfigError: the function does not take the arguments, or returns no module.
    """
    if pretrained:
        raise ConfigError(
            'model.weights="pretrained" names the weights of a library, and the model is made by your own function '
            '(model.source="callable"). Let the function load its weights, or give the path of a file.'
        )
    function = import_function(options.name, "model.name")
    try:
        inspect.signature(function).bind(**options.arguments)
    except TypeError as error:
        raise _no_model_error(options, pretrained, error) from error
    except ValueError:  # written in C, without a signature: the call itself says it
        pass
    model = call_function(options.name, "model.name", **options.arguments)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"{options.name} returned a {type(model).__name__}, which cannot be quantized. It must return a "
            "torch.nn.Module."
        )
    return model


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    return did_you_mean(name, names, most=4, otherwise="See the library's list of models.")


def _no_model_error(options: ModelOptions, pretrained: bool, error: Exception) -> ConfigError:
    if isinstance(error, TypeError):
        return ConfigError(
            f"The model {options.name} of {options.source} could not be created with "
            f"model.arguments={options.arguments}: {error}. Remove the arguments that it does not take."
        )
    with_weights = " with its own weights" if pretrained else ""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    way_out = (
        "Set model.weights to a file if they cannot be downloaded here." if pretrained else "Check the error above."
    )
    return ConfigError(
        f"The model {options.name} of {options.source} could not be created{with_weights}: {reason} {way_out}"
    )
