"""Arithmetic of free sizes that the front end does not know: remainders, rounding, powers, the larger of two sizes."""

import math
import operator
from collections.abc import Callable
from typing import Any

import torch

Translation = Callable[[Any], list[Any]]
"""Returns the outputs of OpenVINO's operators for a call that the front end shows."""


def size_translations() -> dict[str, Translation]:
    """Return the translations of functions of sizes, by the names under which the front end meets the functions."""
    from openvino import opset13 as opset

    functions: dict[Any, Translation] = {
        operator.mod: lambda context: _of_two(context, opset.floor_mod),  # the divisor's sign, as in Python
        torch.sym_max: lambda context: _of_two(context, opset.maximum),
        torch.sym_min: lambda context: _of_two(context, opset.minimum),
        math.ceil: lambda context: _rounded(context, opset.ceiling),
        math.floor: lambda context: _rounded(context, opset.floor),
        round: lambda context: _rounded(context, lambda x: opset.round(x, "half_to_even")),
        operator.truediv: lambda context: [opset.divide(_as_float(context, 0), _as_float(context, 1)).output(0)],
        operator.pow: _translate_power,
        torch.sym_float: lambda context: [_as_float(context, 0)],
    }
    return {str(function): translation for function, translation in functions.items()}


def _of_two(context: Any, make: Callable[[Any, Any], Any]) -> list[Any]:
    from openvino import opset13 as opset

    first = context.get_input(0)
    return [make(first, opset.convert_like(context.get_input(1), first)).output(0)]


def _rounded(context: Any, make: Callable[[Any], Any]) -> list[Any]:
    from openvino import opset13 as opset

    return [opset.convert(make(_as_float(context, 0)), "i64").output(0)]


def _translate_power(context: Any) -> list[Any]:
    from openvino import opset13 as opset

    power = opset.power(_as_float(context, 0), _as_float(context, 1))
    integral = all(context.get_input(place).get_element_type().is_integral() for place in (0, 1))
    return [(opset.convert(power, "i64") if integral else power).output(0)]


def _as_float(context: Any, place: int) -> Any:
    from openvino import opset13 as opset

    return opset.convert(context.get_input(place), "f32").output(0)
