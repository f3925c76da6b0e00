"""The processor that files are run on: how it adds 8-bit products, and which instructions it has."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

WITHOUT_VNNI = {"SSE41", "AVX", "AVX2", "AVX512_CORE"}
"""Values of ONEDNN_MAX_CPU_ISA that make oneDNN, and what is built on it, take the processor for one without VNNI."""

WITHOUT_AVX512 = {"AVX2_VNNI", "AVX2_VNNI_2"}
"""Values that leave VNNI, and take away AVX-512."""


def adds_pairs_in_16_bits() -> bool:
    """Return True where kernels add pairs of 8-bit products in 16 bits, which weights of more than 7 bits overflow.

    So do x86 processors without VNNI. False where this torch cannot say what the processor has.
    """
    if _isa_limit() in WITHOUT_VNNI:
        return True
    # Without VNNI, x86 kernels multiply bytes by VPMADDUBSW, which adds pairs of products in 16 bits and saturates.
    has = _processor_features()
    return "x86" in str(has.get("architecture")) and not (has.get("avx512_vnni") or has.get("avx_vnni"))


def has_avx512_vnni() -> bool:
    """Return True for a processor with AVX-512 and its VNNI; False where this torch cannot say."""
    return _isa_limit() not in WITHOUT_VNNI | WITHOUT_AVX512 and bool(_processor_features().get("avx512_vnni"))


def pair_fits(largest: int, factor: int) -> bool:
    """Return True if two products of activations up to `largest` with factors up to `factor` fit in 16 bits together.

    Weights of 7 bits do with activations of 8: 2 * 255 * 63 < 2 ** 15.
    """
    return 2 * largest * factor < 2**15


def physical_cores() -> int:
    """Return the number of cores that this process may use; two threads of a core count once where Linux tells them."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    lists = (Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list") for number in usable)
    return len({path.read_text() if path.is_file() else path for path in lists})


def _isa_limit() -> str:
    return os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()


def _processor_features() -> Mapping[str, Any]:
    """Return the features of the processor; none where this torch cannot say."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
