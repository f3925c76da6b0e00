"""What the processor's 8-bit products mean for a file that is run here."""

import os

import torch

WITHOUT_VNNI = {"SSE41", "AVX", "AVX2", "AVX512_CORE"}
"""Values of ONEDNN_MAX_CPU_ISA that make oneDNN, and so OpenVINO, take the processor for one without VNNI."""


def overflows() -> bool:
    """Whether kernels add pairs of 8-bit products in 16 bits here, which weights of more than 7 bits overflow.

    So do x86 processors without VNNI. False where this torch cannot say what the processor has.
    """
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in WITHOUT_VNNI:
        return True
    if not hasattr(torch.cpu, "get_capabilities"):
        return False
    has = torch.cpu.get_capabilities()
    return "x86" in str(has["architecture"]) and not (has["avx512_vnni"] or has["avx_vnni"])


def pair_fits(levels: int, factor: int) -> bool:
    """Whether two products of activations up to `levels` with factors up to `factor` fit in 16 bits together: weights
    of 7 bits do with activations of 8, 2 * 255 * 63 < 2 ** 15."""
    return 2 * levels * factor < 2**15
