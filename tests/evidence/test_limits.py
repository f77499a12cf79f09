"""The check of machine code itself: it reads SASS rightly, and it finds what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from step37_kernels.evidence.limits import Limits, faults, specialised
from step37_kernels.evidence.machine_code import (
    Kernel,
    compile_launches,
    parse_sass,
    pipeline_buffers,
)
from step37_kernels.launch import Launch

SASS = """
.text.example:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/              @!P0 LDGSTS.E.BYPASS.128 [R2], [R4.64] ;
        /*0020*/                   HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR4] ;
        /*0030*/                   LOP3.LUT R5, R5, 0x1, RZ, 0xc0, !PT ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   STL [R1], R5 ;
        /*0060*/                   BRA `(.L_x_2) ;
.L_x_2:
        /*0070*/                   EXIT ;
"""
TTGIR = """
    %w = ttg.local_alloc : () -> !ttg.memdesc<3x128x32xi32, #shared, #smem, mutable> loc(#loc)
    %x = ttg.local_alloc : () -> !ttg.memdesc<3x16x128xbf16, #shared1, #smem, mutable> loc(#loc)
    %k = ttg.local_alloc : () -> !ttg.memdesc<2x64x128xf8E4M3FN, #shared1, #smem, mutable>
    %one = ttg.local_alloc %v : (tensor<16x16xbf16>) -> !ttg.memdesc<16x16xbf16, #shared, #smem>
"""


def example(**changes: object) -> Kernel:
    instructions, loops = parse_sass(SASS)
    launched = Launch(type("Named", (), {"__name__": "example", "params": ()}), (1,), (), {})
    values: dict[str, object] = {
        "launch": launched, "arch": 90, "registers": 168, "shared_bytes": 60 * 1024,
        "num_warps": 4, "instructions": instructions, "loops": loops, "ttgir": TTGIR,
    }  # fmt: skip
    return Kernel(**(values | changes))  # type: ignore[arg-type]


def test_sass_is_read() -> None:
    kernel = example()
    assert [i.opcode for i in kernel.instructions][:3] == ["MOV", "LDGSTS", "HGMMA"]
    assert kernel.loops == ((1, 4),) and kernel.spills == 1 and kernel.async_copies == 1
    assert kernel.tensor_core == {"HGMMA"}
    loop = kernel.main_loop
    assert loop is not None and len(loop.body) == 4
    assert loop.per(units=128 * 4) == 1.0  # 4 instructions x 128 lanes


def test_occupancy_and_bytes_in_flight() -> None:
    kernel = example()
    # 65536 / (168 x 128) = 3 by registers; 227 KB / 61 KB = 3 by shared memory.
    assert kernel.blocks_per_sm == 3
    assert example(registers=255).blocks_per_sm == 2
    assert example(shared_bytes=100 * 1024).blocks_per_sm == 2
    assert pipeline_buffers(TTGIR) == [(3, 128 * 32 * 4), (3, 16 * 128 * 2), (2, 64 * 128)]
    assert kernel.bytes_in_flight == 3 * (2 * 16384 + 2 * 4096 + 8192)


@pytest.mark.parametrize(
    ("limits", "fault"),
    [
        (Limits("", tensor_core="UTCHMMA"), "no UTCHMMA, only ['HGMMA']"),
        (Limits("", blocks_per_sm=4), "3 blocks per SM, at least 4"),
        (Limits("", units=128, per_unit=3.9), "4.00 instructions per unit in the main loop"),
        (Limits("", units=128, alu_per_unit=0.9), "1.00 ALU instructions per unit"),
        (Limits("", loop_forbids=("LOP3",)), "1 LOP3 in the main loop"),
        (Limits("", bytes_in_flight=2**20), "bytes in flight per SM, at least 1048576"),
    ],
)
def test_each_limit_finds_its_fault(limits: Limits, fault: str) -> None:
    found = faults(example(), limits)
    assert len(found) == 2 and found[0] == "1 spills to local memory" and fault in found[1]


def test_what_keeps_its_limits_has_no_fault() -> None:
    clean = SASS.replace("STL", "STG")
    instructions, loops = parse_sass(clean)
    kernel = example(instructions=instructions, loops=loops)
    limits = Limits("", "HGMMA", 3, 128, 4.0, 1.0, ("STS",), True, 32 * 1024)
    assert faults(kernel, limits) == []
    no_copies = parse_sass(clean.replace("LDGSTS", "LDG"))
    assert faults(example(instructions=no_copies[0], loops=no_copies[1]), limits) == [
        "no asynchronous copies"
    ]
    straight = parse_sass(clean.replace("@P1 BRA", "@P1 NOP"))
    assert faults(example(instructions=straight[0], loops=straight[1]), limits) == [
        "no loop with a tensor-core instruction"
    ]


def test_compiling_needs_the_interpreter_off() -> None:
    with pytest.raises(RuntimeError, match="interpreter"):
        compile_launches(90, lambda: None)


COMPILE = """
import json, torch, triton, triton.language as tl
from step37_kernels.evidence.machine_code import compile_launches
from step37_kernels.launch import launch

@triton.jit
def product(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, K, BLOCK):
        left = tl.load(a + m[:, None] * K + start + k[None, :])
        right = tl.load(b + n[:, None] * K + start + k[None, :])
        total = tl.dot(left, tl.trans(right), total)
    tl.store(c + m[:, None] * N + n[None, :], total)

def run():
    a, b = (torch.empty(128, 4096, dtype=torch.bfloat16, device="meta") for _ in range(2))
    out = torch.empty(128, 128, device="meta")
    launch(product, (1,), a, b, out, 128, 128, 4096, 64, num_warps=4, num_stages=3)

found = {}
for arch in (90, 100):
    (kernel,) = compile_launches(arch, run)
    found[arch] = [kernel.name, sorted(kernel.tensor_core), kernel.async_copies, kernel.spills,
                   kernel.main_loop is not None, kernel.bytes_in_flight > 0]
print(json.dumps(found))
"""


def test_a_kernel_is_compiled_for_both_architectures(tmp_path: Path) -> None:
    script = tmp_path / "script.py"  # Triton reads a kernel's source from its file
    script.write_text(COMPILE)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["90"][:2] == ["product", ["HGMMA"]]
    assert found["100"][:2] == ["product", ["UTCHMMA"]]
    for one in found.values():
        assert one[2] > 0 and one[3] == 0 and one[4:] == [True, True]


def test_a_count_may_not_be_specialised_and_a_stride_may():
    def parameter(name: str, constexpr: bool = False, free: bool = False) -> SimpleNamespace:
        return SimpleNamespace(name=name, is_constexpr=constexpr, do_not_specialize=free)

    kernel = SimpleNamespace(
        params=[
            parameter("x"),
            parameter("scale"),
            parameter("num_tokens"),
            parameter("num_pages", free=True),
            parameter("page_stride"),
            parameter("BLOCK", constexpr=True),
        ]
    )
    launch = Launch(kernel, (1,), ("a tensor", 0.5, 16, 16, 16, 16), {})
    assert specialised(launch) == ["num_tokens"]
