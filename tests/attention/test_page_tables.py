"""The page table kernel against its reference, and both against positions looked up one by one."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from step37_kernels.attention import tiles
from step37_kernels.attention.page_tables import page_tables
from step37_kernels.launch import counted
from step37_kernels.reference import page_tables as reference

UNTOUCHED, WINDOW, PAGES = -7, 100, 40
TABLES = ("full", "sliding")


@dataclass
class Inputs:
    """Requests of shuffled pages, each with slots of its own; what is written begins UNTOUCHED."""

    page_size: int
    lengths: list[int]
    drafts: int = 0
    query_lens: list[int] | int | None = None
    window: int | None = WINDOW
    pools: str = "both"
    index: torch.dtype = torch.int64
    pages: int = PAGES
    padding: int = 0
    req_to_token: Tensor = field(init=False)
    mapping: Tensor = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        rows, size = len(self.lengths) + 2, self.page_size
        in_page = torch.arange(size)
        pages = 1 + torch.randperm(rows * self.pages).view(rows, self.pages, 1)
        slots = (pages * size + in_page).view(rows, -1).int()
        # There is more memory around it, whose slots are not to be found.
        around = torch.full((rows + 1, slots.shape[1] + 3), 3, dtype=torch.int32)
        around[:rows, : slots.shape[1]] = slots
        self.around, self.req_to_token = around, around[:rows, : slots.shape[1]]
        others = torch.randperm(rows * self.pages + 1).view(-1, 1) * size + in_page
        self.mapping = torch.cat((others.view(-1), torch.tensor([-1]))).to(self.index)
        self.requests = torch.randperm(rows)[: len(self.lengths)].to(self.index)
        last = [min(max(length - 1, 0), slots.shape[1] - 1) for length in self.lengths]
        self.new = self.req_to_token[self.requests.long(), last].to(self.index)

    def run(self, function: object, device: torch.device) -> dict[str, Tensor]:
        """Call kernel or reference, on tables with memory beside them; all that is there then."""
        batch = len(self.lengths)

        def fresh(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full(shape, UNTOUCHED, dtype=dtype, device=device)

        written = {"lengths": fresh(batch)}
        if self.pools != "sliding":
            written["full"] = fresh(batch, self.pages + 5)
        if self.pools != "full":
            written["sliding"] = fresh(batch, self.pages + 5)
            written["sliding_slots"] = fresh(batch + self.padding, dtype=torch.int64)
        both = {"full_to_sliding": self.mapping.to(device), "new_slots": self.new.to(device)}
        query_lens = self.query_lens
        tables = {name: written[name][:, : self.pages] for name in written if name in TABLES}
        function(  # type: ignore[operator]
            self.around.to(device)[: len(self.req_to_token), : self.req_to_token.shape[1]],
            self.requests.to(device),
            torch.tensor(self.lengths, dtype=self.index, device=device),
            self.drafts,
            torch.tensor(query_lens, dtype=self.index, device=device)
            if isinstance(query_lens, list) else query_lens,
            self.page_size,
            window=self.window,
            **({"full": None} | written | tables),
            **(both if "sliding" in written else {}),
        )  # fmt: skip
        return {name: tensor.cpu() for name, tensor in written.items()}

    def looked_up(self) -> dict[str, Tensor]:
        """The same, one position after the other."""
        lengths = [length + self.drafts for length in self.lengths]
        if isinstance(self.query_lens, int):
            lengths = [max(length, self.query_lens) for length in lengths]
        batch = len(lengths)
        full = torch.full((batch, self.pages + 5), UNTOUCHED, dtype=torch.int32)
        sliding = full.clone()
        for row, length in enumerate(lengths):
            new = self.query_lens[row] if isinstance(self.query_lens, list) else self.query_lens
            oldest = length - (1 if new is None else new)
            seen = 0 if self.window is None else oldest - self.window + 1
            for position in range(min(length, self.pages * self.page_size)):
                slot = int(self.req_to_token[int(self.requests[row]), position])
                page = position // self.page_size
                full[row, page] = slot // self.page_size
                if position >= seen:
                    sliding[row, page] = int(self.mapping[slot]) // self.page_size
        slots = torch.cat((self.mapping[self.new.long()], torch.zeros(self.padding)))
        found = {"lengths": torch.tensor(lengths, dtype=torch.int32)}
        if self.pools != "sliding":
            found["full"] = full
        if self.pools != "full":
            found |= {"sliding": sliding, "sliding_slots": slots.long()}
        return found


def check(inputs: Inputs, device: torch.device) -> None:
    """Kernel and reference write what was looked up, in one launch."""
    expected = inputs.looked_up()
    with counted() as launches:
        got = inputs.run(page_tables, device)
    assert launches == ["page_tables_kernel"]
    for of in (got, inputs.run(reference.page_tables, torch.device("cpu"))):
        assert of.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(of[name], tensor), name


@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_lengths_around_pages_and_windows(
    device: torch.device, page_size: int, index: torch.dtype
) -> None:
    pages = 700 if page_size == 1 else PAGES  # more than a trip of one program
    assert (pages > tiles.PAGE_TABLE_BLOCK) == (page_size == 1)
    lengths = [0, 1, page_size - 1, page_size, page_size + 1, WINDOW, WINDOW + 1, 650, 699]
    check(Inputs(page_size, lengths, index=index, pages=pages, padding=3), device)


@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize(
    "query_lens, drafts", [(4, 4), (4, 0), ([1, 90, 0, 300, 7], 0)], ids=["verify", "draft", "long"]
)
def test_new_queries_see_further_back(
    device: torch.device, page_size: int, query_lens: list[int] | int, drafts: int
) -> None:
    """Padding rows are shorter than their queries; a window reaches back from the first query."""
    lengths = [1, 90, 0, 500, 333]
    check(Inputs(page_size, lengths, drafts, query_lens, pages=520), device)


@pytest.mark.parametrize("pools", ["full", "sliding"])
@pytest.mark.parametrize("window", [None, 1, 600])
def test_one_pool_and_any_window(device: torch.device, pools: str, window: int | None) -> None:
    check(Inputs(1, [3, 650, 0], pools=pools, window=window, pages=700), device)


def test_what_does_not_fit_the_table_is_cut(device: torch.device) -> None:
    check(Inputs(16, [16 * PAGES + 40, 3], drafts=2), device)


def test_long_rows_are_shared_by_programs(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs take turns, also where the first one's block is before every window."""
    assert tiles.page_table_programs(1 << 18, 1) == 512
    assert tiles.page_table_programs(1 << 18, 512) == 2
    assert tiles.page_table_programs(0, 0) == 1
    monkeypatch.setattr(tiles, "page_table_programs", lambda pages, batch: 2)
    for pools in ("both", "sliding"):
        check(Inputs(1, [2500, 1100, 10], pools=pools, pages=2600), device)


def test_nothing_outside_is_read_or_raised(device: torch.device) -> None:
    """Slots of -1 and requests or slots that there are none of: pages of -1."""
    inputs = Inputs(64, [200, 130, 70])
    inputs.requests[1], inputs.mapping = len(inputs.req_to_token), inputs.mapping[:1]
    inputs.req_to_token[inputs.requests[0], 64:128] = -1
    inputs.new[0] = -1
    got = inputs.run(page_tables, device)
    assert got["full"][0, 1] == -1 and (got["full"][0, [0, 2]] > 0).all()
    assert got["full"][1, :3].tolist() == [-1, -1, -1]
    for row, (first, pages) in enumerate(((1, 4), (0, 3), (0, 2))):
        assert (got["sliding"][row, first:pages] == -1).all()
        assert (got["sliding"][row, pages:] == UNTOUCHED).all()
    assert got["sliding_slots"].tolist() == [-1, -1, -1]


def test_no_sequences_are_no_launch(device: torch.device) -> None:
    with counted() as launches:
        Inputs(1, []).run(page_tables, device)
    assert launches == []
    assert Inputs(1, []).run(reference.page_tables, device)["lengths"].numel() == 0


def test_rows_beyond_2_to_the_32_elements(device: torch.device) -> None:
    """Rows far apart in memory that is not touched: in 32 bits the last would be the first."""
    apart, keys = 1 << 30, torch.arange(8, dtype=torch.int32, device=device)
    try:
        far = torch.empty(4 * apart + 24, dtype=torch.int32, device=device)
    except RuntimeError:
        pytest.skip("no address space of 17 GB")
    slots, full, sliding = (far[n:].as_strided((5, 8), (apart, 1)) for n in (0, 8, 16))
    five = torch.arange(5, device=device)
    slots.copy_(10 * five[:, None] + keys)
    full.fill_(UNTOUCHED)
    sliding.fill_(UNTOUCHED)
    page_tables(
        slots, five, 3 + five, 0, None, 1, torch.empty_like(five, dtype=torch.int32), full, sliding,
        torch.arange(100, 200, device=device), None, five, five.clone(),
    )  # fmt: skip
    expected = torch.where(keys < 3 + five[:, None], 10 * five[:, None] + keys, UNTOUCHED)
    assert torch.equal(full, expected.int())
    expected = torch.where(expected == UNTOUCHED, UNTOUCHED, expected + 100)
    assert torch.equal(sliding, expected.int())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"page_size": 3}, "page_size is 3, expected one of"),
        ({"window": 0}, "window is 0, expected a positive number"),
        ({"lengths": torch.zeros(1, dtype=torch.int64)}, "lengths has dtype torch.int64"),
        ({"seq_lens": torch.zeros(2, dtype=torch.int64)}, r"seq_lens has shape \[2\]"),
        ({"full": None}, "full and sliding are None"),
        (
            {"full": torch.zeros(1, 9, dtype=torch.int32)},
            "full has 9 pages, expected at most the 8",
        ),
        ({"full": torch.zeros(4, 1, dtype=torch.int32).T.expand(1, 4)[:, ::2]}, "full has strides"),
        ({"new_slots": torch.zeros(1, dtype=torch.int64)}, "are None, expected all or none"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, object], message: str) -> None:
    one = torch.zeros(1, dtype=torch.int64)
    arguments: dict[str, object] = {
        "req_to_token": torch.zeros(2, 8, dtype=torch.int32), "requests": one, "seq_lens": one,
        "drafts": 0, "query_lens": None, "page_size": 1,
        "lengths": torch.zeros(1, dtype=torch.int32),
        "full": torch.zeros(1, 8, dtype=torch.int32),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        page_tables(**(arguments | change))  # type: ignore[arg-type]
