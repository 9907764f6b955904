"""The farm: a miniature AlpacaFarm with a known truth, on which a tiny model shows what RLHF does to a large one."""

from rlhf.data.farm.dataset import Farm
from rlhf.data.farm.judge import Facts

__all__ = ["Facts", "Farm"]
