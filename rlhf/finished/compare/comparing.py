"""A comparison from its configuration to its folder of results."""

import json
import logging
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rlhf.data.records import Prompt, as_records
from rlhf.errors import ConfigError
from rlhf.files import read_object
from rlhf.finished.compare import results
from rlhf.finished.compare.configuration import check_judge
from rlhf.finished.compare.duels import ConfiguredJudge, answers_of, hash_of, is_known, judge_all
from rlhf.finished.compare.results import make_once
from rlhf.finished.outside import OutsideModel
from rlhf.finished.policies import Policy, tokenizer_of
from rlhf.finished.vocabulary import check_knows
from rlhf.pipeline import identity
from rlhf.pipeline.config import data_source, settings_of
from rlhf.pipeline.evaluating import check_judge_reads
from rlhf.pipeline.numerics import settle_numerics
from rlhf.pipeline.quiet import quieten
from rlhf.report.tables import Table
from rlhf.tracking.summary import environment

log = logging.getLogger(__name__)


class Comparison:
    """Players, prompts and a judge, checked but not yet loaded.

    Args:
        players: the policies by their labels.
        config: the composed configuration.
        out: where to write; None for `<output_dir>/comparisons/<digest>`.

    Raises:
        ConfigError: the configuration cannot be used.
        DataError: the data set, or the outputs of a player, cannot be used.
        RunError: `out` holds something else already.
    """

    def __init__(self, players: Mapping[str, Policy], config: DictConfig, out: Path | None = None):
        quieten()
        self.players, self.config = players, config
        self.settings, self.source = settings_of(config), data_source(config)
        self.outputs = Path(config.output_dir)
        if hasattr(self.source, "check"):
            self.source.check()
        self.judge_keys = check_judge(config, self.source)
        evaluation = self.settings.evaluation
        if evaluation.factscore:
            raise ConfigError("evaluation=factscore compares no answers; allowed: evaluation=default or paper")
        if evaluation.best_of > 1:
            raise ConfigError(
                f"evaluation.best_of={evaluation.best_of} needs the scorer of a run in training; allowed: 1"
            )
        self.prompts: list[Prompt] = as_records(self.source.load("eval"), "eval")[: evaluation.prompts]
        texts = [row.prompt for row in self.prompts]
        for label, player in players.items():
            check_knows(label, tokenizer_of(player), texts)
        check_judge_reads(config, [*texts, *(row.reference_output or "" for row in self.prompts)])
        self.known = {label: is_known(player, self.prompts, self.settings, self.source, self.cache)
                      for label, player in players.items()}  # fmt: skip
        self.folder = out or self.outputs / "comparisons" / self.identity
        self.finished = results.is_made(self.folder, results.COMPARISON, self.identity)

    @property
    def cache(self) -> Path:
        """The folder that this comparison shares with all runs and other comparisons."""
        return self.outputs / "cache"

    @cached_property
    def identity(self) -> str:
        """A digest of what decides the results: players and their labels, prompts, decoding, judge."""
        digests = self.cache / "digests"
        plain: dict[str, Any] = OmegaConf.to_container(self.config, resolve=True)  # type: ignore[assignment]
        chosen = {key: plain[key] for key in ("data", "evaluation", "generation", "judge", "quantization", "seed")}
        players = {label: player.identity(digests) for label, player in self.players.items()}
        prompts = hash_of([[row.prompt, row.reference_output, row.instruction] for row in self.prompts])
        decisive = identity.decisive({**chosen, "weights": plain["model"]["dtype"]})
        return identity.digest({**decisive, "players": players, "prompts": prompts}, known=digests)

    def plan(self) -> str:
        """What `run` would do."""
        if self.finished:
            return f"{self.folder} has been made already"
        count, pairs = len(self.prompts), len(self.players) * (len(self.players) - 1) // 2
        lines = [
            f"{label}: {'its answers are known' if self.known[label] else f'would answer {count} prompts'}"
            for label in self.players
        ]
        lines.append(
            f"{self.judge_keys['_target_'].rpartition('.')[2]} would judge {pairs} pairs of players on {count} prompts "
            f"in both orders: at most {2 * pairs * count} comparisons"
        )
        return "\n".join([*lines, f"would write {self.folder}"])

    def run(self) -> list[Table]:
        """Compare, unless that has been done already; return the tables that are in the folder.

        Raises:
            UserError: a player cannot answer, or the judge cannot be used.
            Interrupted: the judge's endpoint cannot be reached.
        """
        if self.finished:
            log.info("%s has been made already", self.folder)
        else:
            make_once(self.folder, results.COMPARISON, self.identity, self.cache, self._make)
        found = read_object(self.folder / results.COMPARISON, players=list, pairs=list)
        return [results.ranking_table(found), results.win_rate_table(found)]

    def _make(self, folder: Path) -> None:
        """Compare, and write all results into a folder, which is named when they are complete."""
        started = time.monotonic()
        settle_numerics(self.config.trainer.get("deterministic"))
        # 1. All answers first, one model in memory after the other; the judge may be a model too.
        for label, player in self.players.items():
            if isinstance(player, OutsideModel) and not self.known[label]:
                player.fetch()
        answers = [
            answers_of(player, self.prompts, self.settings, self.source, self.cache) for player in self.players.values()
        ]
        judge = ConfiguredJudge(self.config, self.source, self.cache)
        # 2. The comparisons.
        duels = judge_all(judge, self.prompts, answers)
        labels = list(self.players)
        found = {
            **results.results(labels, self.prompts, answers, duels),
            "usage": judge.usage,
            "identity": self.identity,
            "config": {
                key: json.loads(json.dumps(OmegaConf.to_container(self.config[key], resolve=True)))
                for key in ("data", "evaluation", "generation", "judge")
            },
            **environment(),
            "wall_seconds": round(time.monotonic() - started, 2),
        }
        # 3. The results.
        results.write(folder, found, labels, self.prompts, answers, duels)
