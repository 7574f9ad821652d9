"""Writes tensors as a safetensors file straight from host memory: no copy is made, and any sink will do.

The format is a header, JSON padded to eight bytes behind its length, and the tensors' bytes in the header's order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor


class Writable(Protocol):
    """Something that takes bytes in order."""

    def write(self, data: Any) -> int:
        """Append a bytes-like object."""
        ...


def write_tensors(sink: Writable, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write contiguous fp32 tensors that lie in host memory, and some words about them."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, tensor in tensors.items():
        size = 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    sink.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        sink.write(tensor.numpy().data)
