"""The model card: how the model was trained, how it was evaluated, and metadata for the search of the Hub."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache
from omegaconf import OmegaConf

from rlhf.data.options import as_list
from rlhf.data.sources import Source
from rlhf.data.templates import Template
from rlhf.errors import DataError
from rlhf.finished.export.evidence import Result, bare_format, continued, found_by_guards, results, samples
from rlhf.finished.run import FinishedRun
from rlhf.policy_settings import METHODS
from rlhf.report.metric_info import metric_info

TRAINED_BY = {  # stage → the config groups that determined its model
    "sft": ("model", "data", "quantization", "sft"),
    "reward": ("model", "data", "quantization", "sft", "preferences", "reward"),
    "ppo": ("seed", "model", "data", "quantization", "sft", "preferences", "reward", "lora", "ppo", "divergence", "kl",
            "reference", "advantages", "loss_terms", "scorer", "generation", "evaluation"),
    "dpo": ("seed", "model", "data", "quantization", "sft", "preferences", "lora", "dpo", "generation", "evaluation"),
    **{method: ("seed", "model", "data", "quantization", "sft", "preferences", "reward", "lora", method, "scorer",
                "generation", "evaluation") for method in ("best_of_n", "expert_iteration")},
}  # fmt: skip
TASKS = {"sft": "text-generation", "reward": "text-classification", **dict.fromkeys(METHODS, "text-generation")}
TEMPLATE = (Path(__file__).parent / "card.md").read_text(encoding="utf-8")
_HUB_DATA = re.compile(r"(?:hf://datasets/)?([\w-][\w.-]*/[\w.-]+?)(?:@[^/]+)?(?:/.*)?")
_LOCAL = re.compile(r"[/~.].*/")
_INSIDE = re.compile(r"(?<![\w/.])~?/(?!/)(?:[^/\s]+/)+")  # an absolute path within a text, but for its last component


def model_card(run: FinishedRun, name: str, licence: str | None, dtype: str, base: str | None, adapter: bool) -> str:
    """The text of the model card (README.md).

    Args:
        run: the run whose model is exported.
        name: what the model is called.
        licence: the Hub's identifier of a licence; None for that of the base model's own card, else `unknown`.
        dtype: of the exported weights.
        base: with `adapter`, the Hub's name of the SFT model that the adapter belongs to.
        adapter: whether the adapter is exported alone.
    """
    origin, found = hub_id(run.config["model"]["name_or_path"]), list(results(run))
    below = base if adapter else origin
    data = _metadata(run, name, licence, below, adapter, found)
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        run=run,
        name=name,
        adapter=adapter,
        below=below or "the SFT model",
        origin=origin or _without_path(run.config["model"]["name_or_path"]) or "a model made from scratch",
        dataset=_dataset(run),
        template=run.template,
        question=_question(run),
        bare_format=bare_format(run) or "{instruction}",
        results=found,
        samples=[{key: fenced(text) for key, text in sample.items()} for sample in samples(run)],
        guards=found_by_guards(run),
        reference=_reference(run.config),
        continued=continued(run),
        licence=data.license,
        dtype=dtype,
        settings=OmegaConf.to_yaml(
            {key: shareable(run.config[key]) for key in TRAINED_BY[run.stage] if key in run.config}
        ),
    )
    return str(card)


def _metadata(
    run: FinishedRun, name: str, licence: str | None, below: str | None, adapter: bool, found: list[Result]
) -> ModelCardData:
    """The head of the card, for the search of the Hub; `below` is the Hub's name of the model it is based on."""
    config, dataset = run.config, _dataset(run)
    evaluated = [
        EvalResult(
            TASKS[run.stage], dataset.lower(), dataset, result.metric.partition("/")[2], result.value,
            metric_name=metric_info(result.metric).name,
        )
        for result in found
    ]  # fmt: skip
    return ModelCardData(
        license=licence or licence_of(config["model"]["name_or_path"]) or "unknown",
        library_name="peft" if adapter else "transformers",
        base_model=below,
        base_model_relation=("adapter" if adapter else "finetune") if below else None,
        datasets=sorted(set(hub_datasets(config["data"]))) or None,
        pipeline_tag=TASKS[run.stage],
        tags=tags(run, adapter),
        model_name=name,
        eval_results=evaluated or None,
    )


def _dataset(run: FinishedRun) -> str:
    """The data that the run was trained on: by the Hub's names, or else by the class, but for files (`data=hub`)."""
    name = str(run.config["data"]["_target_"]).rpartition(".")[2]
    return ", ".join(sorted(set(hub_datasets(run.config["data"])))) or "local files" if name == "Hub" else name


def tags(run: FinishedRun, adapter: bool) -> list[str]:
    """Tags for the search of the Hub: stage, lora, adapter, reward-model."""
    lora = run.config["lora"] if run.stage in METHODS else run.config[run.stage]["lora"]
    found = ["rlhf", run.stage, *(["lora"] if lora["r"] else []), *(["adapter"] if adapter else [])]
    return [*found, "reward-model"] if run.stage == "reward" else found


def _reference(config: dict[str, Any]) -> str | None:
    """The rule by which the penalty's reference or the policy moves; None if neither does, as before there were any."""
    rule = (config.get("reference") or {}).get("_target_")
    return None if rule == "rlhf.stages.reference.Fixed" else rule


def hub_id(name_or_path: str | None) -> str | None:
    """The Hub's name of a model; None if `name_or_path` is a folder."""
    name = name_or_path or ""
    return name if re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) and not Path(name).exists() else None


def hub_datasets(data: dict[str, Any]) -> Iterator[str]:
    """Yield the names of the Hub's data sets in the config group `data`, those of a mixture's parts included."""
    for part in (data.get("parts") or {}).values():
        yield from hub_datasets(part)
    root = Path(str(data.get("root") or "."))
    for key in data.keys() - {"_target_", "root", "template", "parts"}:
        for spec in as_list(data[key]):
            try:
                hub = Source.parse(spec["source"] if isinstance(spec, dict) and "source" in spec else spec, root).hub
            except DataError:  # a key that names no source
                continue
            found = _HUB_DATA.fullmatch(str(hub.get("data_files") or hub.get("path") or ""))
            if found and not str(spec).endswith((".xml", ".xml.gz")):
                yield found[1]


def licence_of(name_or_path: str | None) -> str | None:
    """The licence in the card of a model, if the card is on this machine; nothing is downloaded."""
    if name_or_path is None:
        return None
    place = hub_id(name_or_path)
    path = try_to_load_from_cache(place, "README.md") if place else Path(name_or_path).expanduser() / "README.md"
    if not isinstance(path, str | Path) or not Path(path).exists():
        return None
    return ModelCard.load(path, ignore_metadata_errors=True).data.license


def shareable(node: Any) -> Any:
    """A part of the configuration without details of this machine and its network.

    Local paths are cut to their last component; endpoints (`client`) and null values are left out.
    """
    if isinstance(node, dict):
        return {key: shareable(value) for key, value in node.items() if value is not None and key != "client"}
    if isinstance(node, list):
        return [shareable(value) for value in node]
    return _without_path(node) if isinstance(node, str) else node


def _without_path(text: str | None) -> str | None:
    """A text with local paths cut to their last component; texts of several lines, such as templates, as they are."""
    if not text or "\n" in text:
        return text
    return _INSIDE.sub("", _LOCAL.sub("", text, count=1) if _LOCAL.match(text) else text)


def fenced(text: str) -> str:
    """A text as a block of code in Markdown, whatever it contains."""
    fence = "`" * max([3, *(len(found) + 1 for found in re.findall("`+", text))])
    return f"{fence}\n{text.rstrip()}\n{fence}"


def _question(run: FinishedRun) -> str:
    """What the card's example asks: the first instruction of the evaluation as the model read it, else a plain one."""
    shown = samples(run)
    if run.template is None:
        return shown[0]["prompt"] if shown else "Who are you?"
    return run.template.render("Who are you?") if isinstance(run.template, Template) else "Who are you?"
