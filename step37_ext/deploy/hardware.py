"""The GPUs that the released model is served on, and how much memory SGLang gives to what."""

from __future__ import annotations

from dataclasses import dataclass

from step37_ext.deploy.data_sheets import DATA_SHEETS, DataSheet

MIB, GIB = 1 << 20, 1 << 30

OUTSIDE_SGLANG = 2 * GIB
"""Assumed: what the driver, the CUDA context and NCCL hold before SGLang measures free memory."""

IMAGE_CACHE = 100 * MIB
"""SGLang's cache of image features (its default of SGLANG_VLM_CACHE_SIZE_MB)."""

_IMAGE_ENCODER_FACTOR = 0.95
"""What SGLang multiplies the static fraction of a multimodal model with."""


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        memory_mib: total memory as `nvidia-smi` prints it, in MiB; SGLang reads it there too.
        per_node: GPUs of one node as the systems are sold.
        family: what an answer about kernels depends on, "Hopper" or "Blackwell".
        sheet: the maker's figures of its speed.
    """

    name: str
    memory_mib: int
    per_node: int
    family: str
    sheet: DataSheet

    @property
    def memory(self) -> int:
        """Total memory in bytes."""
        return self.memory_mib * MIB

    @property
    def prefill_chunk(self) -> int:
        """SGLang's default of --chunked-prefill-size: 8192 tokens, 16384 from 160 GiB on."""
        return 8192 if self.memory < 160 * GIB else 16384

    def graph_batch(self, tp_size: int) -> int:
        """SGLang's default of the largest batch whose decode step is captured as a CUDA graph."""
        return 256 if self.memory < 160 * GIB and tp_size < 4 else 512


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", 81559, 8, "Hopper", DATA_SHEETS["H100 80GB HBM3"]),
        Gpu("h200", 143771, 8, "Hopper", DATA_SHEETS["H200"]),
        Gpu("b200", 183359, 8, "Blackwell", DATA_SHEETS["B200"]),
        Gpu("b300", 275040, 8, "Blackwell", DATA_SHEETS["B300"]),
        Gpu("gb200", 189471, 4, "Blackwell", DATA_SHEETS["GB200"]),
        Gpu("gb300", 284208, 4, "Blackwell", DATA_SHEETS["GB300"]),
    )
}


def static_fraction(gpu: Gpu, tp_size: int, prefill_chunk: int, graph_batch: int) -> float:
    """Share of the memory that SGLang 0.5.23 gives to weights and KV cache when not told.

    The rest is for activations (1.5 MiB for each token of a prefill chunk), CUDA graphs (2 MiB for
    each sequence of the largest batch) and, by the last factor, the image encoder. From SGLang's
    `arg_groups/memory_hook.py`, `handle_gpu_memory_settings`.

    Args:
        tp_size: ranks of tensor parallelism.
        prefill_chunk: tokens of one prefill chunk.
        graph_batch: sequences of the largest captured decode batch.
    """
    reserved = 512 + 1.5 * max(prefill_chunk, 2048) + tp_size * 1024 / 8 + 2 * graph_batch
    reserved = max(reserved, 10 * 1024)  # SGLang's least on a GPU of more than 60 GiB
    return round((gpu.memory_mib - reserved) / gpu.memory_mib, 3) * _IMAGE_ENCODER_FACTOR
