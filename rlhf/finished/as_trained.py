"""The configuration by which a finished run is measured: its own, but for what the command line measures by."""

from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from rlhf.errors import ConfigError
from rlhf.finished.outside_evaluation import FINISHED
from rlhf.finished.run import FinishedRun
from rlhf.policy_settings import METHODS

# What the command line may change of a run's configuration, because it only measures; and what only names and watches.
MEASURES = ("judge", "evaluation", "scorer", "data")
HOW = (
    "name",
    "output_dir",
    "resume",
    "dry_run",
    "logger",
    "trainer",
    "report",
    "guards",
    "objectives",
    "policy",
    "stage",
)


def as_trained(config: DictConfig, run: FinishedRun, given: Sequence[str]) -> DictConfig:
    """The configuration of a run, except for what the command line says about measuring.

    Keys that are newer than the run have their defaults, which is why no option that changes several groups at once
    (`experiments`, `debug`) is taken. Other data are put into the template of the run's own.

    Raises:
        ConfigError: the command line would change what the run was trained with, or the template that it reads.
    """
    template = run.config["data"].get("template")
    changed = [key for override in given if (key := _measuring_key(override, config.policy, bool(template)))]
    newer = {"reference": config.reference}  # a group that runs of earlier versions do not have
    found = OmegaConf.create({**newer, **run.config, **{key: config[key] for key in HOW if key in config}})
    for key in ("model", "lora", "sft", "reward", *METHODS, "generation", "evaluation"):
        if key in run.config and key in config:
            defaults = OmegaConf.create(OmegaConf.to_container(config[key]))  # an option may lack keys of the run's
            found[key] = OmegaConf.merge(defaults, run.config[key])
        elif key in run.config or key in config:
            found[key] = run.config[key] if key in run.config else config[key]
    found.stage, found.policy = {"name": run.stage}, None
    for key in changed:
        for name in ("evaluation", "judge") if key == "evaluation" else (key,):
            OmegaConf.update(found, name, OmegaConf.select(config, name), merge=False, force_add=True)
    if template and "template" in found.data:
        OmegaConf.update(found, "data.template", template, merge=False)
    return found


def _measuring_key(override: str, policy: str, templated: bool) -> str | None:
    """The key that an override changes, if it only measures; None if it only says how.

    Raises:
        ConfigError: it would change what the run was trained with, or its template.
    """
    key = override.lstrip("+~").partition("=")[0]
    key = (key.partition("@")[2] or key).replace("/", ".")
    group = key.partition(".")[0]
    if templated and key.startswith("data.template"):
        raise ConfigError(f"{override}: policy={policy} reads prompts in the template of its training")
    if group in MEASURES:
        return key
    if group not in (*HOW, "hydra", "sweeps", "cluster"):
        raise ConfigError(
            f"{override}: policy={policy} is measured as it was trained; allowed: {', '.join(MEASURES)}, and "
            f"policy={FINISHED} for the run of the command's own configuration"
        )
    return None
