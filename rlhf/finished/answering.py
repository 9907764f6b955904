"""Samples answers of a loaded model to evaluation prompts, as a run's own evaluation does."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from rlhf.data.records import Prompt
from rlhf.data.templates import Template
from rlhf.errors import RunError, explained
from rlhf.evaluation.prompts import instruction_or_prompt
from rlhf.finished.chat.models import LoadedRole
from rlhf.models.loading import DTYPES, load_causal_lm, load_tokenizer
from rlhf.models.roles import Roles
from rlhf.models.tokenizing import keep_template
from rlhf.rollout.factory import make_engine
from rlhf.rollout.sample import rollout
from rlhf.seeding import generator
from rlhf.settings import Settings, is_quantized

TOKENIZER = "tokenizer_config.json"
MARK = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands for the instruction while a chat template is rendered


def sample(
    part: LoadedRole, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], settings: Settings, source: Any
) -> list[str]:
    """One answer per text, at the temperature and up to the length of `settings.evaluation`.

    Batches and random streams are those of a run's evaluation, so that the policy of a run gives the answers that the
    run recorded. `source` has the template of the texts, if they have one.

    Returns:
        Answers of the class `Response`, with their token ids.
    """
    config, roles = settings.evaluation, part.roles
    keep_template(tokenizer, source)
    engine = make_engine(settings.generation, tokenizer, roles)
    answers: list[str] = []
    size = settings.generation.batch_size
    for index, start in enumerate(range(0, len(texts), size)):
        stream = generator(settings.seed, "evaluation", index, str(roles.device))
        batch = texts[start : start + size]
        with torch.no_grad():
            answers += rollout(
                engine, roles, part.role, tokenizer, batch, settings.generation, stream,
                config.temperature, config.max_new_tokens,
            ).responses  # fmt: skip
    return answers


def load_outside(folder: Path, base: Path | None, settings: Settings) -> tuple[LoadedRole, PreTrainedTokenizerBase]:
    """The model in `folder`, or the adapter there merged into the model in `base`, and the tokenizer.

    `settings` says the dtype, the quantization and whether the model's own code may run.

    Raises:
        ModelError: model, adapter or tokenizer cannot be loaded.
    """
    # 1. The model or the base, in float32 if an adapter is to be merged, so that it is rounded once.
    whole = base or folder
    own = folder if (folder / TOKENIZER).exists() else whole
    where = replace(settings.model, name_or_path=str(whole), tokenizer=str(own), gguf_file=None, config=None)
    tokenizer = load_tokenizer(where)
    quantization = settings.quantization if is_quantized(settings.quantization) else None
    merging = base is not None and not quantization
    dtype = DTYPES[settings.model.dtype]
    lm = load_causal_lm(where, tokenizer, quantization=quantization, dtype=torch.float32 if merging else dtype)
    # 2. The adapter.
    if base is not None:
        with explained(f"{folder}: no adapter could be put on {base}"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice of peft
            warnings.filterwarnings("error", message="Found missing adapter keys")
            lm = PeftModel.from_pretrained(lm, folder).merge_and_unload()
        lm = lm.to(dtype) if merging else lm
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return LoadedRole(Roles(lm.eval(), dtype).to(device), "reference"), tokenizer


def in_chat_template(
    label: str, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]
) -> tuple[list[str], SimpleNamespace]:
    """The bare instructions in the tokenizer's chat template, and an object that has it as its `template`.

    Raises:
        RunError: the tokenizer has no chat template, or it changes what it is given.
    """
    if not tokenizer.chat_template:
        raise RunError(f"{label}: the model has no chat template; allowed: the same without `chat:`")
    message = [{"role": "user", "content": MARK}]
    text = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    before, mark, after = text.partition(MARK)
    if not mark or MARK in after:
        raise RunError(f"{label}: the chat template does not show an instruction exactly once; allowed: another model")
    fixed = [part.replace("{", "{{").replace("}", "}}") for part in (before, after)]
    template = Template("{instruction} {input}".join(fixed), "{instruction}".join(fixed))
    return [template.render(instruction_or_prompt(row)) for row in prompts], SimpleNamespace(template=template)
