"""The yardstick's kernel."""

from __future__ import annotations

import torch

from benchmarks.harness.limits import read_stream
from step37_kernels.launch import counted


def test_the_read_stream_depends_on_every_element(device):
    source = torch.arange(1 << 14, dtype=torch.int32, device=device).mul_(2654435761 % 2**31)
    with counted() as names:
        found = read_stream(source, per_program=1 << 12, block=1 << 10)
    assert names == ["read_stream_kernel"]
    expected = [0] * 4
    for place, value in enumerate(source.tolist()):
        expected[place >> 12] ^= value
    assert found.tolist() == expected
