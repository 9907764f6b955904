"""How many variants torch.compile may make of a block, and what is said when there are more."""

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch._dynamo.utils import counters

from rlhf.models import blocks
from rlhf.models.blocks import _LIMIT as LIMIT
from rlhf.models.blocks import VARIANTS, compile_block, uncompiled

DYNAMOS_OWN_LIMIT = 8


class Block(nn.Module):
    """A block that torch.compile makes another variant of for each mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.mode = nn.Linear(4, 4), ""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * len(self.mode)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing is compiled or warned of, and the limit is the one that torch comes with."""
    before = getattr(dynamo, LIMIT)
    torch.compiler.reset()
    counters.clear()
    blocks._warn_of_variants.cache_clear()
    setattr(dynamo, LIMIT, DYNAMOS_OWN_LIMIT)
    yield
    setattr(dynamo, LIMIT, before)
    torch.compiler.reset()
    counters.clear()
    blocks._warn_of_variants.cache_clear()


def warnings_in(modes: int, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Run two compiled blocks in so many modes, check their outputs, and return what was warned of."""
    pair = [Block(), Block()]
    for block in pair:
        compile_block(block, backend="eager", dynamic=True)
    x = torch.randn(3, 4)
    with caplog.at_level(logging.WARNING, blocks.__name__):
        for mode in range(modes):
            for block in pair:
                block.mode = "m" * mode
                with uncompiled(pair):
                    expected = block(x)
                torch.testing.assert_close(block(x), expected)
    return [record.getMessage() for record in caplog.records if record.name == blocks.__name__]


@pytest.mark.usefixtures("fresh_compiler")
def test_more_variants_than_torch_allows_are_compiled(caplog: pytest.LogCaptureFixture) -> None:
    modes = DYNAMOS_OWN_LIMIT + 4
    assert warnings_in(modes, caplog) == []
    assert counters["stats"]["unique_graphs"] == modes  # and the two blocks share them


@pytest.mark.usefixtures("fresh_compiler")
def test_a_block_that_is_no_longer_compiled_is_told_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "VARIANTS", DYNAMOS_OWN_LIMIT)
    told = warnings_in(DYNAMOS_OWN_LIMIT + 4, caplog)
    assert counters["stats"]["unique_graphs"] == DYNAMOS_OWN_LIMIT
    assert len(told) == 1
    assert told[0].startswith("model.compile=true: torch.compile has made as many variants of a function as it may (8 ")
    assert "\n" not in told[0]


@pytest.mark.usefixtures("fresh_compiler")
def test_a_higher_limit_is_kept() -> None:
    setattr(dynamo, LIMIT, VARIANTS + 1)
    compile_block(Block(), backend="eager")
    assert getattr(dynamo, LIMIT) == VARIANTS + 1
