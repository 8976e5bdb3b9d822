"""The precision in which networks train."""

from __future__ import annotations

import torch


def autocast(device: torch.device) -> torch.autocast:
    """bf16 where the device computes it natively, float32 elsewhere."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.autocast("cuda", dtype=torch.bfloat16, enabled=native)
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=_cpu_has_bf16())


def _cpu_has_bf16() -> bool:
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported is not None and supported())
