"""A miniature AlpacaFarm whose ground truth is known, so that RLHF can be studied on a tiny model."""

from rlhf.data.farm.dataset import Farm
from rlhf.data.farm.judge import Facts

__all__ = ["Facts", "Farm"]
