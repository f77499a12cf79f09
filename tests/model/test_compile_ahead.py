"""What a start compiles: every kernel that any pass of the released model launches after it."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import triton
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from step37_ext import attention_backend
from step37_ext.attention_backend import Step37AttentionBackend
from step37_ext.deploy.memory import release
from step37_ext.model import compile_ahead, forward
from step37_ext.model.config import LayerShape
from step37_ext.model.experts import ExpertShard, RoutedExperts
from step37_kernels import implementations  # noqa: F401  (makes the kernels known)
from step37_kernels.attention.pages import MAX_BATCH
from step37_kernels.compile_ahead import launches_of, token_counts
from step37_kernels.dispatch import Implementation, Target, choose
from step37_kernels.evidence.nvfp4_cases import meta_tiles
from step37_kernels.formats.fp8_words import FP8Words
from step37_kernels.launch import Launch

TEXT = release().text
SLOTS, WINDOW = 50_000, TEXT.window or 0


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def triton_kernels(operation: str, weights: str = "-") -> Implementation:
    return choose(operation, Target("cuda", (9, 0), weights))


@cache
def compiled(kernel: Any) -> triton.JITFunction:
    """The kernel as it is without the interpreter, which does not say what it specialises."""
    interpreted = not isinstance(kernel, triton.JITFunction)
    return triton.JITFunction(kernel.fn, **kernel.kwargs) if interpreted else kernel


@pytest.fixture(autouse=True)
def compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEP37_IMPL", raising=False)
    variant = Launch.variant
    monkeypatch.setattr(
        Launch, "variant", lambda called: variant(replace(called, kernel=compiled(called.kernel)))
    )


class Linear:
    """A projection of a rank, as SGLang's are called."""

    def __init__(self, rows: int, columns: int, operation: Implementation | None) -> None:
        self.operation = operation
        self.weight: Any = meta(rows, columns)
        if operation is not None:
            words, scale = meta(rows, columns // 4, dtype=torch.int32), meta(rows).float()
            self.weight = FP8Words(words, scale, meta(-(-rows // 64), dtype=torch.int32))

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        if self.operation is None:
            return x @ self.weight.T, None
        return self.operation(x, self.weight), None


class Pool:
    """A full and a sliding cache in FP8, of one rank."""

    full_layer_nums = 1

    def __init__(self, kv_heads: int, dim: int) -> None:
        self.cache = meta(SLOTS, kv_heads, dim, dtype=torch.float8_e4m3fn)
        self.full_to_swa_index_mapping = meta(SLOTS, dtype=torch.int64)

    def get_key_buffer(self, layer: int) -> torch.Tensor:
        return self.cache

    get_value_buffer = get_key_buffer


class Rank:
    """One rank of the released model: a layer of each kind, and the attention backend."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, weights: str, dense: str, ranks: int
    ) -> None:
        self.weights, self.dense, self.ranks = weights, dense, ranks
        kinds = {
            (one.attention.kind, one.is_moe, one.routed_limit, one.shared_limit): one
            for one in TEXT.layers
        }
        self.layers = [self.layer(shape) for shape in kinds.values()]
        shape = TEXT.layers[0].attention
        monkeypatch.setattr(attention_backend, "SWAKVPool", Pool)
        table = meta(MAX_BATCH, TEXT.max_position + 4, dtype=torch.int32)
        runner: Any = SimpleNamespace(
            token_to_kv_pool=Pool(shape.num_kv_heads // ranks, shape.head_dim),
            req_to_token_pool=SimpleNamespace(req_to_token=table),
            page_size=1,
            sliding_window_size=WINDOW - 1,
            device="cpu",
            dtype=torch.bfloat16,
        )
        self.backend = Step37AttentionBackend(runner)
        self.backend.page_tables = triton_kernels("page_tables")

    def layer(self, shape: LayerShape) -> SimpleNamespace:
        block = self.moe(shape) if shape.is_moe else self.mlp(shape)
        return SimpleNamespace(
            input_layernorm=SimpleNamespace(weight=meta(TEXT.hidden_size)),
            self_attn=self.attention(shape),
            feed_forward=block,
        )

    def attention(self, shape: LayerShape) -> SimpleNamespace:
        one, linear = shape.attention, self.linear
        heads, kv_heads = one.num_heads // self.ranks, one.num_kv_heads // self.ranks
        window = -1 if one.window is None else one.window - 1
        return SimpleNamespace(
            fused=True,
            prologue=triton_kernels("prologue"),
            attend=triton_kernels("attend"),
            linear=linear,
            qkv_proj=Linear((heads + 2 * kv_heads) * one.head_dim, TEXT.hidden_size, linear),
            o_proj=Linear(TEXT.hidden_size, heads * one.head_dim, linear),
            g_proj=Linear(heads, TEXT.hidden_size, None),
            q_norm=meta(one.head_dim),
            k_norm=meta(one.head_dim),
            cos_sin_cache=meta(TEXT.max_position, one.rotary_dim, dtype=torch.float32),
            num_heads=heads,
            num_kv_heads=kv_heads,
            eps=TEXT.rms_norm_eps,
            scaling=one.head_dim**-0.5,
            attn=SimpleNamespace(
                layer_id=0, sliding_window_size=window, k_scale_float=None, v_scale_float=None
            ),
        )

    def mlp(self, shape: LayerShape) -> SimpleNamespace:
        size = TEXT.dense_intermediate // self.ranks
        return SimpleNamespace(
            gate_up_proj=Linear(2 * size, TEXT.hidden_size, self.linear),
            down_proj=Linear(TEXT.hidden_size, size, self.linear),
            activation=triton_kernels("activation", "bf16"),
            linear=self.linear,
            limit=shape.shared_limit,
        )

    def moe(self, shape: LayerShape) -> SimpleNamespace:
        size = TEXT.shared_intermediate // self.ranks
        with torch.device("meta"):
            shard = ExpertShard.of_rank(TEXT, 0, 1, self.ranks - 1, self.ranks)
            experts = RoutedExperts(TEXT, shard, self.weights, torch.bfloat16)
        if self.weights == "nvfp4":
            experts.weights = meta_tiles(shard.num_rows)
        block = SimpleNamespace(
            text=TEXT,
            gate=meta(TEXT.num_experts, TEXT.hidden_size, dtype=torch.float32),
            router_bias=meta(TEXT.num_experts, dtype=torch.float32),
            experts=experts,
            share_expert=SimpleNamespace(
                gate_up_proj=Linear(2 * size, TEXT.hidden_size, self.linear),
                down_proj=Linear(TEXT.hidden_size, size, self.linear),
                limit=shape.shared_limit,
            ),
            route=triton_kernels("route", "bf16"),
            run_shared=triton_kernels("shared_expert", self.dense),
            run_experts=triton_kernels("experts", self.weights),
            limit=shape.routed_limit,
        )
        block.routed = partial(forward.routed_experts, block)
        return block

    @property
    def linear(self) -> Implementation | None:
        return triton_kernels("linear", "fp8") if self.dense == "fp8" else None

    def ahead(self) -> list[Launch]:
        return compile_ahead.all_launches(self.layers, self.backend, decodes=True)

    def serve(self, mode: ForwardMode, tokens: int, sequences: int) -> None:
        """One pass of all layers."""
        number = partial(meta, sequences, dtype=torch.int64)
        batch: Any = SimpleNamespace(
            forward_mode=mode,
            batch_size=sequences,
            req_pool_indices=number(),
            seq_lens=number(),
            seq_lens_cpu=torch.tensor([random.randrange(tokens, TEXT.max_position)]),
            extend_seq_lens=number(dtype=torch.int32),
            out_cache_loc=meta(tokens, dtype=torch.int64),
            spec_info=None,
        )
        self.backend.init_forward_metadata(batch)
        positions, hidden = meta(tokens, dtype=torch.int64), meta(tokens, TEXT.hidden_size)
        for layer in self.layers:
            cache = self.backend.layer_cache(layer.self_attn.attn)
            forward.attention(layer.self_attn, positions, hidden, cache)
            run = forward.moe if hasattr(layer.feed_forward, "route") else forward.mlp
            run(layer.feed_forward, hidden)

    def serve_anything(self) -> None:
        """Prompts of up to 16384 tokens in up to 512 sequences, and decode batches."""
        random.seed(0)
        for _ in range(40):
            tokens = int(2 ** random.uniform(0, 14))
            sequences = min(tokens, int(2 ** random.uniform(0, 9)))
            self.serve(ForwardMode.EXTEND, tokens, sequences)
            self.serve(ForwardMode.DECODE, sequences, sequences)


@pytest.mark.parametrize(
    ("weights", "dense", "ranks", "most"),
    [
        ("nvfp4", "bf16", 4, 54),
        ("nvfp4", "fp8", 8, 89),
        ("fp8", "bf16", 8, 50),
        ("bf16", "bf16", 1, 51),
    ],
)
def test_nothing_is_left_to_compile(
    monkeypatch: pytest.MonkeyPatch, weights: str, dense: str, ranks: int, most: int
) -> None:
    rank = Rank(monkeypatch, weights, dense, ranks)
    ahead = {called.variant() for called in rank.ahead()}
    served = set(launches_of(rank.serve_anything))
    assert not served - ahead
    # `most` is how many there are: one more costs a start a second, and is to have a reason.
    assert len(ahead) <= most


def test_experts_of_another_kind_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of FlashInfer launch no Triton kernels; router and shared expert do as ever."""
    rank = Rank(monkeypatch, "nvfp4", "bf16", 4)
    rank.layers = [layer for layer in rank.layers if hasattr(layer.feed_forward, "route")]
    for layer in rank.layers:
        block = layer.feed_forward
        block.run_experts = replace(block.run_experts, name="flashinfer")
        block.routed = lambda *given: None
    ahead = {called.variant() for called in rank.ahead()}
    assert not set(launches_of(rank.serve_anything)) - ahead
    assert "sort_and_prepare_kernel" not in {variant[0] for variant in ahead}


@pytest.mark.parametrize("dropped", [4, -1])
def test_every_token_count_is_needed(monkeypatch: pytest.MonkeyPatch, dropped: int) -> None:
    rank = Rank(monkeypatch, "nvfp4", "bf16", 4)
    complete = {called.variant() for called in rank.ahead()}

    def fewer(tiles: Sequence[Callable[[int], Hashable]]) -> list[int]:
        counts = token_counts(tiles)
        return [n for n in counts if n == 1 or n != counts[dropped % len(counts)]]

    monkeypatch.setattr(compile_ahead, "token_counts", fewer)
    assert {called.variant() for called in rank.ahead()} < complete


def test_token_counts_take_every_tile() -> None:
    tiles: list[Callable[[int], Hashable]] = [lambda n: n // 7, lambda n: min(n, 3)]
    counts = token_counts(tiles, 30)
    assert counts == [1, 2, 3, 7, 14, 21, 28]
    assert token_counts([], 30) == [1]


def test_a_start_on_a_gpu_compiles_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    from step37_ext import hooks
    from step37_ext.model import text

    class Layer(torch.nn.Linear):
        pass

    monkeypatch.setattr(text, "DecoderLayer", Layer)
    monkeypatch.setattr(hooks, "get_parallel", lambda: SimpleNamespace(tp_rank=2, tp_size=4))
    given: list[Any] = []
    monkeypatch.setattr(compile_ahead, "compile_ahead", lambda *args: given.append(args))
    layers = [Layer(1, 1), Layer(1, 1)]
    model = torch.nn.Sequential(layers[0], torch.nn.Sequential(layers[1]))
    runner = SimpleNamespace(model=model, spec_algorithm=SimpleNamespace(is_none=lambda: True))
    for is_cuda in (False, True):
        backend = SimpleNamespace(req_to_token=SimpleNamespace(is_cuda=is_cuda))
        monkeypatch.setattr(
            attention_backend, "Step37AttentionBackend", lambda runner, made=backend: made
        )
        assert hooks.attention_backend(runner) is backend
    assert given == [(layers, backend, True, 2, 4)]


def test_ranks_begin_at_different_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    orders: list[list[int]] = []
    monkeypatch.setattr(compile_ahead, "all_launches", lambda *_: list(range(50)))
    monkeypatch.setattr(compile_ahead, "compile_all", orders.append)
    for number in range(4):
        compile_ahead.compile_ahead([], cast(Any, None), True, number, 4)
    assert len({order[0] for order in orders}) == 4
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_a_start_goes_on_where_a_layer_cannot_be_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rank = Rank(monkeypatch, "nvfp4", "bf16", 4)
    del rank.layers[0].self_attn.scaling
    compile_ahead.compile_ahead(rank.layers, rank.backend, True, 0, 4)
    assert "compiled when they are first needed (AttributeError: " in caplog.text


def test_verification_instead_of_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """With drafts no sequence decodes one token: only prompts' attention is compiled."""
    rank = Rank(monkeypatch, "nvfp4", "bf16", 4)
    names = {
        called.name
        for called in compile_ahead.all_launches(rank.layers, rank.backend, decodes=False)
    }
    assert "extend_kernel" in names and "decode_split_kernel" not in names
