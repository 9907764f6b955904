"""The configuration in `conf`, composed with overrides."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig

import rlhf.sweep.resolvers  # noqa: F401  (registers the resolvers that `conf` uses)
from rlhf import root
from rlhf.data.records import DataSource
from rlhf.pipeline.checks import check
from rlhf.pipeline.config import data_source, settings_of
from rlhf.pipeline.plan import Plan
from rlhf.settings import Settings


def composed(*overrides: str, name: str = "config", with_hydra: bool = False) -> DictConfig:
    """Compose `conf/<name>.yaml` with overrides; `with_hydra` keeps the node `hydra`."""
    with initialize_config_dir(version_base="1.3", config_dir=str(root() / "conf")):
        return compose(name, list(overrides), return_hydra_config=with_hydra)


def composed_from(folder: Path, *overrides: str) -> DictConfig:
    """Compose the default configuration with overrides that may name options of a folder of one's own."""
    with initialize_config_dir(version_base="1.3", config_dir=str(root() / "conf")):
        return compose("config", [f"hydra.searchpath=[file://{folder.resolve()}]", *overrides])


def composed_settings(*overrides: str) -> Settings:
    """The settings of the default configuration with the overrides."""
    return settings_of(composed(*overrides))


def composed_data(option: str, *overrides: str) -> DataSource:
    """The data set of `conf/data/<option>.yaml`; overrides start with `data.`."""
    return instantiate(composed(*overrides, name=f"data/{option}").data, _convert_="all")


def composed_plan(output_dir: Path, *overrides: str) -> Plan:
    """The plan of a run of the default configuration with the overrides, in `output_dir/run`."""
    config = composed(f"output_dir={output_dir}", *overrides)
    return Plan(config, settings_of(config), data_source(config), output_dir / "run")


def compose_and_check(*overrides: str) -> None:
    """Compose a configuration and make all checks that a run makes before it loads a model."""
    config = composed(*overrides)
    check(config, settings_of(config), data_source(config))
