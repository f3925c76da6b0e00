"""What is known of the processor."""

import pytest
import torch

from halfeven.runtimes.cpu import adds_pairs_in_16_bits, has_avx512_vnni, pair_fits


@pytest.mark.parametrize(
    ("architecture", "flags", "expected"),
    [
        ("x86_64", {"avx512_vnni": False, "avx_vnni": False}, True),
        ("x86_64", {"avx512_vnni": True, "avx_vnni": False}, False),
        ("x86_64", {"avx512_vnni": False, "avx_vnni": True}, False),
        ("aarch64", {"dot": True}, False),
    ],
)
def test_x86_without_vnni_overflows(architecture, flags, expected, monkeypatch):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": architecture, **flags}, raising=False)
    assert adds_pairs_in_16_bits() is expected


def test_onednn_can_be_told_to_be_a_lesser_processor(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "aarch64"}, raising=False)
    assert not adds_pairs_in_16_bits()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx2")
    assert adds_pairs_in_16_bits()


@pytest.mark.parametrize(
    ("flag", "told", "expected"),
    [
        ("avx512_vnni", "", True),
        ("avx512_vnni", "avx512_core_vnni", True),
        ("avx512_vnni", "AVX512_CORE", False),
        ("avx512_vnni", "avx2_vnni", False),
        ("avx_vnni", "", False),
    ],
)
def test_an_attention_is_one_operator_with_avx512_and_vnni(flag, told, expected, monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", told)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", flag: True}, raising=False)
    assert has_avx512_vnni() is expected


def test_an_older_torch_says_nothing(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not adds_pairs_in_16_bits()
    assert not has_avx512_vnni()


def test_which_pairs_of_products_fit_in_16_bits():
    assert pair_fits(255, 63)
    assert pair_fits(127, 127)
    assert not pair_fits(255, 127)
    assert not pair_fits(255, 128), "activations by activations"
