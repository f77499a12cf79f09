"""Every kernel keeps to the limits of its machine code, in one of its configurations."""

from __future__ import annotations

from typing import Any

_WORDS = (
    "route", "sort", "gate_up", "down", "combine", "linear", "page_tables", "prologue", "decode",
    "extend",
)  # fmt: skip


def test_every_shipped_kernel_keeps_its_limits(findings: list[dict[str, Any]]) -> None:
    broken = [
        f"sm_{one['arch']} {one['case']}: {one['kernel']}: {fault}"
        for one in findings
        for fault in one["faults"]
    ]
    assert not broken, "\n".join(broken)


def test_both_architectures_and_every_operation_are_among_them(
    findings: list[dict[str, Any]],
) -> None:
    for arch in (90, 100):
        kernels = {one["kernel"] for one in findings if one["arch"] == arch}
        for word in _WORDS:
            assert any(word in name for name in kernels), (arch, word, sorted(kernels))
