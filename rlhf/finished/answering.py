"""Samples answers of a loaded model to evaluation prompts, as a run's own evaluation does."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from rlhf.data.records import DataSource, Prompt
from rlhf.data.templates import PromptTemplate, conversation_of
from rlhf.errors import RowError, RunError, explained
from rlhf.finished.chat.models import LoadedRole
from rlhf.models.loading import DTYPES, load_causal_lm, load_tokenizer
from rlhf.models.released import Checkpoint
from rlhf.models.roles import Roles
from rlhf.models.tokenizing import keep_template
from rlhf.rollout.factory import make_engine
from rlhf.rollout.sample import rollout
from rlhf.seeding import generator
from rlhf.settings import Settings, is_quantized

TOKENIZER = "tokenizer_config.json"


def sample(
    label: str,
    part: LoadedRole,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: Settings,
    source: DataSource,
    template: PromptTemplate | None,
) -> list[str]:
    """One answer per prompt, at the temperature and up to the length of `settings.evaluation`.

    Batches and random streams are those of a run's evaluation, so that the policy of a run gives the answers that the
    run recorded.

    Args:
        label: names the policy in messages.
        part: the model.
        tokenizer: the model's.
        prompts: of `source`.
        settings: how to decode.
        source: the data set.
        template: which the model reads prompts in; None for that of the data. Prompts that are in no template, as those
            of the farm, stay as they are.

    Returns:
        Answers of the class `Response`, with their token ids.

    Raises:
        RunError: the template refuses a prompt.
    """
    asked: PromptTemplate | None = getattr(source, "template", None)
    texts = _in_template(label, [row.prompt for row in prompts], asked, template)
    keep_template(tokenizer, SimpleNamespace(template=template or asked))
    config, roles, size = settings.evaluation, part.roles, settings.generation.batch_size
    engine = make_engine(settings.generation, tokenizer, roles)
    answers: list[str] = []
    for index, start in enumerate(range(0, len(texts), size)):
        stream = generator(settings.seed, "evaluation", index, str(roles.device))
        with torch.no_grad():
            answers += rollout(
                engine, roles, part.role, tokenizer, texts[start : start + size], settings.generation, stream,
                config.temperature, config.max_new_tokens,
            ).responses  # fmt: skip
    return answers


def _in_template(label: str, prompts: list[str], asked: PromptTemplate | None, own: PromptTemplate | None) -> list[str]:
    """Prompts that are in the template `asked`, in the model's `own` instead."""
    if own is None or asked is None or own == asked:
        return prompts
    try:
        return [own.render_messages(conversation_of(prompt, asked)) for prompt in prompts]
    except RowError as error:
        raise RunError(f"{label}: its template cannot render a prompt: {error}") from None


def load_outside(model: Checkpoint, settings: Settings) -> tuple[LoadedRole, PreTrainedTokenizerBase]:
    """A model that was not trained here, with its adapter merged in, and its tokenizer.

    `settings` says the dtype, the quantization and whether the model's own code may run.

    Raises:
        ConfigError: the weights cannot be fetched.
        ModelError: model, adapter or tokenizer cannot be loaded.
    """
    # 1. The model or the base, in float32 if an adapter is to be merged, so that it is rounded once.
    folder, whole = model.complete(), model.whole.complete()
    own = folder if (folder / TOKENIZER).exists() else whole
    where = replace(settings.model, name_or_path=str(whole), tokenizer=str(own), gguf_file=None, config=None)
    tokenizer = load_tokenizer(where)
    quantization = settings.quantization if is_quantized(settings.quantization) else None
    merging = folder != whole and not quantization
    dtype = DTYPES[settings.model.dtype]
    lm = load_causal_lm(where, tokenizer, quantization=quantization, dtype=torch.float32 if merging else dtype)
    # 2. The adapter.
    if folder != whole:
        with explained(f"{folder}: no adapter could be put on {whole}"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice of peft
            warnings.filterwarnings("error", message="Found missing adapter keys")
            lm = PeftModel.from_pretrained(lm, folder).merge_and_unload()
        lm = lm.to(dtype) if merging else lm
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return LoadedRole(Roles(lm.eval(), dtype).to(device), "reference"), tokenizer
