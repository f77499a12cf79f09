"""The memory plan's sizes against the releases' own, and its sums."""

import math

import pytest

from step37_ext.checkpoint.release_layout import tensor_shapes
from step37_ext.checkpoint.spec import FULL, SLIDING, TinySpec
from step37_ext.deploy.hardware import GIB, GPUS
from step37_ext.deploy.memory import (
    Settings,
    Workload,
    cache_cost,
    plan_memory,
    release,
    sliding_tokens,
    weights_per_gpu,
)
from step37_ext.model.dense_format import DENSE_FORMATS as FORMATS

MTP_TENSORS = tuple(f"model.layers.{layer}." for layer in (45, 46, 47))
RELEASE = TinySpec(  # the release in the words of the small model's layout, written down apart
    hidden_size=4096,
    head_dim=128,
    full_heads=64,
    sliding_heads=96,
    kv_heads=8,
    layer_types=tuple(FULL if layer % 4 == 0 else SLIDING for layer in range(45)),
    dense_layers=3,
    dense_intermediate=11264,
    experts=288,
    top_k=8,
    expert_intermediate=1280,
    shared_intermediate=1280,
    vocab_size=128896,
    vision_width=1536,
    vision_layers=47,
    vision_heads=16,
    vision_intermediate=8960,
)


def stored(quant: str, drafts: bool = False) -> int:
    """Weights of one GPU that holds everything."""
    return sum(weights_per_gpu(release(), quant, 1, drafts).values())


def test_nvfp4_release_to_the_byte():
    """`total_size` in the index of the first NVFP4 release, which had no MTP layers."""
    moe_layers, layers, experts = 42, 45, 288
    input_scales = 3 * moe_layers * experts * 4  # skipped while loading
    cache_scales = 2 * layers * 4
    wider_bias = moe_layers * experts * 2  # router_bias is stored in float32, planned in BF16
    assert stored("nvfp4") + input_scales + cache_scales + wider_bias == 124_385_012_840


def test_fp8_release():
    """212.5 GB in four digits, so known to 0.05 GB, with the MTP layers."""
    assert stored("fp8", drafts=True) == pytest.approx(212.5e9, abs=0.05e9)


def test_bf16_release_tensor_by_tensor():
    shapes = tensor_shapes(RELEASE)
    sizes = {name: 2 * math.prod(shape) for name, shape in shapes.items()}
    drafts = sum(size for name, size in sizes.items() if name.startswith(MTP_TENSORS))
    assert stored("bf16") == sum(sizes.values()) - drafts
    assert stored("bf16", drafts=True) - stored("bf16") == drafts


def test_ranks_share_the_drafts_but_for_their_joining_matrix():
    one, four = (weights_per_gpu(release(), "nvfp4", tp, True)["drafts"] for tp in (1, 4))
    whole = 3 * 4096 * 8192 * 2  # eh_proj of three layers
    assert (one - whole) / 4 + whole == pytest.approx(four, rel=1e-3)  # norms are not cut either


# Weights [N, K] of the attention, the dense MLPs and the shared experts, and layers of each.
PROJECTIONS = (
    (12, 10240, 4096), (33, 14336, 4096), (3, 22528, 4096), (42, 2560, 4096),  # N is split
    (12, 4096, 8192), (33, 4096, 12288), (3, 4096, 11264), (42, 4096, 1280),  # K is split
)  # fmt: skip
NUMBERS = sum(layers * rows * columns for layers, rows, columns in PROJECTIONS)


@pytest.mark.parametrize("quant, tp_size", [("bf16", 1), ("nvfp4", 4), ("nvfp4", 8)])
def test_dense_weights_in_fp8_are_half_and_a_scale_for_each_row(quant, tp_size):
    bf16, fp8 = (weights_per_gpu(release(), quant, tp_size, True, x) for x in ("bf16", "fp8"))
    saved = {part: bf16[part] - fp8[part] for part in bf16 if bf16[part] != fp8[part]}
    rows = sum(layers * rows for layers, rows, _ in PROJECTIONS[:4]) // tp_size
    rows += sum(layers * rows for layers, rows, _ in PROJECTIONS[4:])
    assert set(saved) == {"attention", "dense"}
    assert sum(saved.values()) == NUMBERS // tp_size - 4 * rows


@pytest.mark.parametrize("quant", ["bf16", "fp8", "nvfp4"])
def test_loading_dense_weights_as_bf16_takes_less_than_serving_reserves(quant):
    """Before the KV cache is there: all in BF16, and beside it what the way to FP8 takes of the
    largest projection, 9 bytes a number, or one layer of NVFP4 experts in two layouts.
    """
    bf16, fp8 = (sum(weights_per_gpu(release(), quant, 1, False, x).values()) for x in FORMATS)
    experts = 288 * 3 * 1280 * 4096 * 9 // 16 + GIB // 10 if quant == "nvfp4" else 0
    loading = bf16 + max(9 * 22528 * 4096, experts)
    # Every plan leaves at least this free beside the weights and the cache.
    assert loading - fp8 < 10 * GIB


@pytest.mark.parametrize("quant", ["bf16", "fp8", "nvfp4"])
def test_ranks_share_the_weights(quant):
    one, four = (weights_per_gpu(release(), quant, tp, False) for tp in (1, 4))
    # Only scales per expert are not cut: 4 bytes for 3 MB, counted three times too often.
    assert one["experts"] <= 4 * four["experts"] < one["experts"] * (1 + 1e-5)
    for part in one:
        assert one[part] / 4 <= four[part] < one[part] / 2


def test_kv_heads_are_repeated_beyond_eight_ranks():
    text = release().text
    eight, sixteen = (cache_cost(text, "bf16", tp, False) for tp in (8, 16))
    assert eight == sixteen
    attention = [weights_per_gpu(release(), "bf16", tp, False)["attention"] for tp in (8, 16)]
    kv = 45 * 2 * 128 * 4096 * 2  # k_proj and v_proj of one head in every layer
    halved = (attention[0] - kv) / 2 + kv
    assert attention[1] == pytest.approx(halved, rel=1e-3)  # norms are not cut either


def test_cache_of_one_token():
    """12 full layers of 8 heads, keys and values of 128: 24576 numbers; 33 sliding layers."""
    cost = cache_cost(release().text, "bf16", 1, False)
    assert (cost.full, cost.sliding) == (2 * 24576, 2 * 24576 * 33 // 12)
    fp8 = cache_cost(release().text, "fp8_e4m3", 4, False)
    assert (8 * fp8.full, 8 * fp8.sliding) == (cost.full, cost.sliding)
    drafts = cache_cost(release().text, "bf16", 1, True)
    assert drafts.sliding * 33 == cost.sliding * 36


def test_sliding_pool_holds_windows_and_chunks():
    assert sliding_tokens(Workload(1000, 1), 512, 8192) == 1000  # never more than the request
    one = sliding_tokens(Workload(262144, 1), 512, 8192)
    assert 512 + 2 * 8192 <= one < 512 + 2 * 8192 + 200
    ten = sliding_tokens(Workload(262144, 10), 512, 8192)
    assert 9 * 512 <= ten - one < 9 * 700


@pytest.mark.parametrize("ratio", [0.8, 0.1])
def test_the_parts_add_up(ratio):
    gpu, workload = GPUS["h200"], Workload(32768, 4)
    weights = weights_per_gpu(release(), "nvfp4", 1, False)
    cost = cache_cost(release().text, "fp8_e4m3", 1, False)
    plan = plan_memory(
        gpu,
        weights,
        cost,
        workload,
        Settings(8192, ratio),
        tp_size=1,
        graph_batch=256,
        window=512,
    )
    used = plan.outside + plan.reserve + plan.image_cache + sum(weights.values()) + plan.pool
    assert used == plan.total == gpu.memory
    assert plan.left == plan.pool - plan.needed
    # SGLang's pools: so many tokens of the full layers, and `ratio` of them of the sliding ones.
    full = plan.capacity
    assert full * cost.full + ratio * full * cost.sliding <= plan.pool
    assert (full + 1) * (cost.full + ratio * cost.sliding) > plan.pool


def test_a_small_sliding_pool_still_holds_what_is_alive():
    """Where the ratio is too small for the windows, the full pool has to grow with it."""
    cost = cache_cost(release().text, "fp8_e4m3", 1, False)
    workload, settings = Workload(32768, 1), Settings(8192, 0.01)
    plan = plan_memory(
        GPUS["b200"], {}, cost, workload, settings, tp_size=1, graph_batch=1, window=512
    )
    tokens = plan.needed / cost.per_token(0.01)
    assert tokens * 0.01 >= sliding_tokens(workload, 512, 8192) > 32768 * 0.01
