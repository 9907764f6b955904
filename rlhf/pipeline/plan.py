"""What a composed configuration amounts to: the run's identity, the models that it needs, and where they all lie."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, flag_override

from rlhf.data.records import SPLITS, DataSource, Split
from rlhf.evaluation.preferences import FromData, Simulated
from rlhf.files import EARLIER
from rlhf.pipeline import cache, earlier, identity
from rlhf.pipeline.config import instantiate, needs, needs_reward_model, settings_of
from rlhf.pipeline.taken import IDS, TEXT, Taken, taken_of
from rlhf.policy_settings import FROM_COMPARISONS, METHODS
from rlhf.settings import Settings, is_quantized
from rlhf.tracking.summary import read_summary

# Keys that name, place or present a run but do not decide its result. What `preferences` decides is in the name of the
# reward model, which is part of the identity by itself. `replicate` counts by the seeds that it sets.
IGNORED_GROUPS = ("name", "output_dir", "resume", "dry_run", "logger", "trainer", "report", "variant", "guards",
                "objectives", "preferences", "replicate")  # fmt: skip
# The splits that each product of the cache is built from.
READS: dict[str, Collection[Split]] = {
    "sft": ("sft", "sft_validation"),
    "preferences": SPLITS,  # the prompts may come from any split
    "reward": ("preference", "preference_validation"),
}
ORDER = ("sft", "preferences", "reward_sft", "reward")  # in which the products decide a run


class Plan:
    """A run before anything is loaded; `folder` is where Hydra put it."""

    def __init__(
        self,
        config: DictConfig,
        settings: Settings,
        source: DataSource,
        folder: Path,
        overrides: Sequence[str] = (),
    ):
        self.config, self.settings, self.source, self.folder = config, settings, source, folder
        self.overrides = list(overrides)
        self.plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
        # of a finished run that is measured: the models that it was made from, whatever code made them
        self.made_from: dict[str, Path] | None = None
        self.trained_scorer: Mapping[str, Any] | None = None  # that of a finished run, if it is measured by another one
        self.quantization = settings.quantization if is_quantized(settings.quantization) else None

    @property
    def stage(self) -> str:
        """`sft`, `preferences`, `reward`, one of `METHODS`, or `evaluate`."""
        return str(self.config.stage.name)

    @property
    def outputs(self) -> Path:
        """The folder of all runs and of the cache."""
        return Path(self.plain["output_dir"])

    # -- the models and comparisons that it needs ----------------------------------------------------------------------

    @cached_property
    def comparisons(self) -> FromData | Simulated:
        """The source of the comparisons for the reward model."""
        return instantiate(self.plain["preferences"], "preferences", _recursive_=False)

    @property
    def needs_reward_model(self) -> bool:
        """Whether the scorer or the judge uses the reward model."""
        return needs_reward_model(self.config)

    @property
    def learns_from_reward_model(self) -> bool:
        """Whether the policy learns from the reward model, so that PPO's value function starts from it."""
        return self.stage not in FROM_COMPARISONS and needs(self.config, "scorer", "needs_reward_model")

    @cached_property
    def taken(self) -> dict[str, Taken]:
        """What is not trained here but taken from others (`sft.from`, `reward.from`), by product."""
        return taken_of(self.settings, self.source)

    @cached_property
    def beside(self) -> "Plan | None":
        """The plan of a reward model on a model of its own (`reward.model`), which is fine-tuned first as ours is.

        What else refers to `model`, such as the chat template that writes the prompts, stays the policy's.
        """
        if self.settings.reward.model is None:
            return None
        config = self.config.copy()
        with flag_override(config, ["struct", "readonly"], [False, False]):
            OmegaConf.resolve(config)
            config.model = config.reward.model
            config.reward.model = None
            config.sft.update({"from": None, "difference_to": None})
        return Plan(config, settings_of(config), self.source, self.folder, self.overrides)

    @cached_property
    def sft_folder(self) -> Path:
        """Where the SFT model of this configuration is, or will be."""
        return self.in_place("sft") or self._cached("sft", {})

    @cached_property
    def preferences_folder(self) -> Path | None:
        """Where the simulated comparisons are, or will be; None if the comparisons come from the data set."""
        if not self.comparisons.simulated:
            return None
        # temperature and length of the sampled answers are keys of `preferences` itself
        sampled = {key: self.plain["generation"][key] for key in ("engine", "batch_size")}
        return self._cached("preferences", {"sft_model": self.sft_folder.name, **sampled})

    @cached_property
    def reward_folder(self) -> Path:
        """Where the reward model of this configuration is, or will be."""
        if "reward" in self.taken:
            demonstrations = {"demonstrations": self._data(READS["sft"])}
            limits = {
                key: self.plain["reward"][key] for key in ("baseline_rows", "max_length", "template", "validation_size")
            }
            return self.in_place("reward") or self._cached("reward", demonstrations | limits)
        plan = self.beside or self
        upstream = {"sft_model": plan.sft_folder.name}
        if self.preferences_folder:
            upstream["preferences"] = self.preferences_folder.name
        return plan._cached("reward", upstream)

    def needed(self) -> dict[str, Path]:
        """The cached folders that this run needs, by product and in the order of building."""
        if self.made_from is not None:
            return self.made_from
        folders = {"sft": self.sft_folder}
        beside = {"reward_sft": self.beside.sft_folder} if self.beside else {}
        reward = self.stage == "reward" or (self.stage in (*METHODS, "evaluate") and self.needs_reward_model)
        trained = reward and "reward" not in self.taken
        if self.preferences_folder and (trained or self.stage in ("preferences", *FROM_COMPARISONS)):
            folders["preferences"] = self.preferences_folder
        if reward:
            folders |= {**beside, "reward": self.reward_folder}
            if self.stage == "reward" and beside and not self.preferences_folder:
                del folders["sft"]
        # what is taken comes first, so that nothing is trained if it cannot be read
        return dict(sorted(folders.items(), key=lambda item: item[0] not in self.taken))

    def _cached(self, product: str, upstream: dict[str, Any]) -> Path:
        """`cache/<product>-<digest>`: the digest is of the keys, the rows, the upstream models and the code."""
        model = dict(self.plain["model"])
        if product != "preferences":
            del model["max_prompt_tokens"]  # it limits prompts to be answered, and training answers none
        taken = self.taken.get(product)
        determinants = {
            "model": model,
            "data": self._data(READS[product]),
            "quantization": self.plain["quantization"],
            product: taken.identity(self._digests) if taken else self.plain[product],
            **upstream,
            **self._also_decisive,
        }
        builder = f"rlhf.pipeline.builders.{'taken' if taken else product}"
        code = identity.code_of(builder, type(self.source).__module__)
        name = identity.digest(identity.decisive(determinants), code, self._digests)
        return (self.outputs / "cache" / f"{product}-{name}").resolve()

    @cached_property
    def reward_reads(self) -> str:
        """What the reward model reads: `ids` of the policy, as a role beside it, or texts (`Taken.reads`)."""
        return self.taken["reward"].reads if "reward" in self.taken else TEXT if self.beside else IDS

    def in_place(self, product: str) -> Path | None:
        """The folder of the cache that is taken as it is; None if the product has to be made."""
        taken, reward = self.taken.get(product), product == "reward"
        if taken is None or (reward and not taken.centred_as(self.plain, self.source)):
            return None
        return taken.in_place(self.outputs / "cache", self.sft_folder if reward else None)

    def _data(self, splits: Collection[Split]) -> dict[str, Any]:
        return identity.of_data(self.plain["data"], self.source, splits)

    # -- the run itself ------------------------------------------------------------------------------------------------

    @cached_property
    def identity(self) -> str:
        """A digest of what decides the run and of the models it starts from: equal identities are the same run.

        An evaluation is decided by the whole configuration, everything else by what trains it (`identity.of_training`).
        PPO's own code is no part of it: a corrected line does not discard a week of runs. Reports name the commits.
        """
        return self._identity_of(self.plain)

    @cached_property
    def evaluation(self) -> str:
        """A digest of what the evaluations of the run measure, which is the same for all runs measured alike."""
        return self.evaluation_of(self.plain)

    def evaluation_of(self, config: Mapping[str, Any]) -> str:
        """The digest `evaluation` of another resolved configuration of this run.

        The scorer counts only if it is another one than that of the training, which is part of the run, and a reward
        model that judges or scores only if it is no part of the run.
        """
        measured = identity.decisive(identity.of_evaluation(config, self.source))
        trained = config["scorer"] if self.trained_scorer is None else self.trained_scorer
        unscored = self.stage in FROM_COMPARISONS
        if unscored or identity.decisive(config["scorer"]) != identity.decisive(trained):
            measured["scorer"] = identity.decisive(config["scorer"])
        watching = OmegaConf.create({key: config[key] for key in ("judge", "scorer") if key == "judge" or unscored})
        if needs_reward_model(watching) and not self.learns_from_reward_model:
            measured["reward_model"] = self.reward_folder.name
        return identity.digest(measured, known=self._digests)

    @property
    def noted(self) -> str:
        """The identity under which the run is noted in its folder: that of an earlier version's formula, if it is so.

        It is the present run of the folder, one moved aside there, or `identity` if there is none.
        """
        return next((noted for folder, noted in self._noted_here() if self._is_this(folder, noted)), self.identity)

    def finished(self) -> Path | None:
        """The folder of this very run if it is finished: here, moved aside from here, or under another name."""
        for folder in (self.folder, earlier.place(self.folder, self.noted)):
            summary = read_summary(folder)
            if summary is not None and summary.get("identity") in (self.identity, self.noted):
                return folder
        return cache.find_run(self.outputs, self.identity) or self._finished_by_former_identity()

    def _finished_by_former_identity(self) -> Path | None:
        """A finished run of an earlier version, under any name, that is this one (`_is_this`)."""
        for pointer in sorted((self.outputs / "cache" / "runs").glob("[!.]*.json")):
            folder = cache.find_run(self.outputs, pointer.stem)
            if folder is not None and self._is_this(folder, pointer.stem):
                return folder
        return None

    def _noted_here(self) -> Iterator[tuple[Path, str]]:
        """The runs in the folder, with their noted identities; those that must not be brought back are left out."""
        for folder in (self.folder, *sorted((self.folder / EARLIER).glob("*/"))):
            noted = earlier.identity_of(folder)
            if (noted is not None and folder.name == noted) or folder == self.folder:
                yield folder, noted or ""

    def _is_this(self, folder: Path, noted: str) -> bool:
        """Whether the run noted in a folder is this one.

        The identity of versions before `evaluation` was noted covered all keys. If it is that of the configuration that
        the run recorded, then files and models are what they were, and only what is trained has to agree.
        """
        if noted == self.identity:
            return True
        note = earlier.read_note(folder)
        config = note.get("config") or {}
        if self.stage == "evaluate" or "evaluation" in note or not {"ppo", "data"} <= config.keys():
            return False
        former = {key: value for key, value in config.items() if key not in IGNORED_GROUPS}
        return noted == self._digest_of(former) and self._identity_of(config) == self.identity

    def _identity_of(self, config: Mapping[str, Any]) -> str:
        trained = config if self.stage == "evaluate" else identity.of_training(config, self.source, self.stage)
        ignored = {*IGNORED_GROUPS, *identity.idle(self.stage), *(("policy",) if trained.get("policy") is None else ())}
        chosen = {key: value for key, value in trained.items() if key not in ignored}
        for product, taken in self.taken.items():  # the keys of a training that does not happen decide nothing
            if product in chosen and config[product].get("from") == self.plain[product]["from"]:
                chosen[product] = taken.settings() if self.in_place(product) else taken.identity(self._digests)
        return self._digest_of(chosen)

    def _digest_of(self, chosen: Mapping[str, Any]) -> str:
        determinants = {
            **identity.decisive({**chosen, **self._also_decisive}),
            "stage": self.stage,
            "needed": self._starting_points,
        }
        return identity.digest(determinants, known=self._digests)

    @property
    def _starting_points(self) -> list[str]:
        """The names of the models and comparisons that decide the run; a reward model that only judges does not."""
        needed = self.needed()
        if self.stage in METHODS and not self.learns_from_reward_model:
            learnt = ("sft", "preferences") if self.stage in FROM_COMPARISONS else ("sft",)
            needed = {product: needed[product] for product in learnt if product in needed}
        return [needed[product].name for product in ORDER if product in needed]

    @property
    def present(self) -> str:
        """A description of the run that is in the folder now, for when it has to move aside."""
        measuring = () if self.stage == "evaluate" else identity.MEASURING
        return earlier.describe(self.folder, self.plain, (*IGNORED_GROUPS, *measuring, *identity.idle(self.stage)))

    @property
    def _also_decisive(self) -> dict[str, Any]:
        """What decides a result among keys that mostly do not: trainers of the user, and skipped updates."""
        skips = self.settings.guards.non_finite.action != "off"
        return {"trainer": identity.of_trainer(self.plain["trainer"]), "skips_non_finite": skips}

    @property
    def _digests(self) -> Path:
        """Where digests of files are kept."""
        return self.outputs / "cache" / "digests"
