"""What the device of a process is capable of, and how much of its memory has been needed."""

from __future__ import annotations

import resource

import torch

_PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100": 989.0,
    "H800": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
}
"""Dense bf16 and fp16 products, as the makers state them, by a word in the device's name."""
_MB = 1e6


def peak_tflops(device: torch.device, precision: str) -> float | None:
    """The stated peak of products in bf16 or fp16; None where it is not known."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for word, peak in _PEAK_TFLOPS.items() if word in name), None)


def memory_mb(device: torch.device) -> float:
    """The most memory that tensors took on a GPU so far; on a CPU the most that the process took. In MB."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / _MB, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _MB, 1)
