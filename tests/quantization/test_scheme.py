"""Integer grids and scheme names."""

import dataclasses

import pytest

from halfeven.errors import ConfigError
from halfeven.quantization.scheme import Scheme, parse_bits


@pytest.mark.parametrize(
    ("fields", "quant_min", "quant_max", "levels"),
    [
        ({}, 0, 255, 256),
        ({"signed": True}, -128, 127, 256),
        ({"signed": True, "narrow": True}, -127, 127, 255),
        ({"bits": 4}, 0, 15, 16),
        ({"bits": 4, "signed": True, "narrow": True}, -7, 7, 15),
        ({"bits": 2, "signed": True, "narrow": True}, -1, 1, 3),
        ({"bits": 16}, 0, 65535, 65536),
        ({"bits": 16, "signed": True}, -32768, 32767, 65536),
    ],
)
def test_the_ends_of_a_grid(fields, quant_min, quant_max, levels):
    scheme = Scheme(**fields)
    assert (scheme.quant_min, scheme.quant_max, scheme.levels) == (quant_min, quant_max, levels)


@pytest.mark.parametrize("bits", [-8, 0, 1, 17, 32])
def test_bits_out_of_bounds(bits):
    with pytest.raises(ConfigError, match=rf"bits={bits} must be an integer \(at least 2 and at most 16\)"):
        Scheme(bits=bits)


def test_unsigned_narrow_is_an_error():
    with pytest.raises(ConfigError, match="no most negative integer"):
        Scheme(narrow=True)


def test_frozen_and_hashable():
    scheme = Scheme(bits=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        scheme.bits = 8
    assert {scheme, Scheme(bits=4)} == {scheme}


def test_a_scheme_as_it_is_printed():
    assert str(Scheme()) == "u8 asymmetric per tensor"
    assert (
        str(Scheme(bits=4, signed=True, symmetric=True, narrow=True, axis=0))
        == "s4 symmetric narrow per channel (axis 0)"
    )


@pytest.mark.parametrize(("name", "bits"), [("w8a8", (8, 8)), ("w4a8", (4, 8)), ("W6A16", (6, 16)), ("w2a4", (2, 4))])
def test_bits_are_read_from_a_schemes_name(name, bits):
    assert parse_bits(name) == bits


@pytest.mark.parametrize("name", ["", "int8", "w8", "a8w8", "w8a8 ", "w-8a8", "w8a8x"])
def test_unreadable_names_are_refused(name):
    with pytest.raises(ConfigError, match=r"cannot be read.*w8a8"):
        parse_bits(name)


@pytest.mark.parametrize("name", ["w1a8", "w8a17"])
def test_named_bits_out_of_bounds(name):
    with pytest.raises(ConfigError, match="2 to 16"):
        parse_bits(name)
