"""The table of differences in every evaluated metric."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from rlhf.report.column_differences import column_differences
from rlhf.report.column_table import column_table
from rlhf.report.comparisons import origins
from rlhf.report.runs import load
from tests.helpers.made_up_sweeps import write_pipelines


def test_every_column_of_the_table_is_compared_with_sft(tmp_path: Path) -> None:
    sweep = load([write_pipelines(tmp_path / "s", {"baseline": "lora_none"})])
    sft, baseline = origins(sweep)
    table = column_table(sweep, column_differences(sweep, sft), sft)
    assert list(table.header)[:3] == ["row", "win rate (points)", "true KL (nats per token)"]
    assert [line[0] for line in table.texts()] == ["variant=lora_kl", "variant=lora_none"]
    # the true KL has no value per instruction: Student's t over the pipelines
    cell = table.rows[0][2]
    kl = np.array(sweep.trained[0].values("eval/true_kl"))
    half = stats.t.ppf(0.975, len(kl) - 1) * kl.std(ddof=1) / len(kl) ** 0.5
    assert (cell.low, cell.value, cell.high) == pytest.approx((kl.mean() - half, kl.mean(), kl.mean() + half))  # type: ignore[union-attr]
    assert "*" in str(cell)
    assert "the 2 comparisons in win rate are one family and the other 12 another" in table.caption
    against = column_table(sweep, column_differences(sweep, baseline), baseline)
    assert [line[0] for line in against.texts()] == ["variant=lora_kl"]
    assert "Each row minus “variant=lora_none”" in against.caption
