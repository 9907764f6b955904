"""Every family of models through SFT, reward model and PPO: what runs compute is what plain transformers computes."""

import logging
from collections.abc import Iterator

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from rlhf.models.architecture import has_classifier
from rlhf.models.merging import merged
from rlhf.models.sequences import Sequences
from rlhf.models.tokens import stop_ids
from rlhf.rollout.engine import Engine, GenerationRequest
from rlhf.rollout.huggingface import TransformersEngine
from rlhf.rollout.native import NativeEngine
from tests.helpers.rollouts import response_rows
from tests.helpers.zoo import ZOO
from tests.helpers.zoo_runs import ADAPTERS, WHOLE, Trained, train_animal

CLOSE = {"rtol": 1e-4, "atol": 2e-4}
NEW = 15
LENGTHS = [(3, 14), (17, 5), (1, 1), (9, 20)]  # of prompts and responses: most exceed the windows of the zoo
QUICK = ["llama3", "gemma3", "phi3 with a window", "gpt2", "opt-350m", "falcon with alibi", "gpt_oss"]


def members() -> Iterator[object]:
    """Adapters on every family, and whole models of it; the quick suite has a few of each."""
    for name in ZOO:
        marks = [] if name in QUICK else [pytest.mark.long]
        yield pytest.param((name, "adapters"), id=f"{name}-adapters", marks=marks)
        yield pytest.param((name, "whole"), id=f"{name}-whole", marks=marks)


@pytest.fixture(scope="module", params=list(members()))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A model of the zoo after a step of each stage."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    name, mode = request.param
    lora = ADAPTERS if mode == "adapters" else WHOLE
    return train_animal(name, lora, tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def plain(trained: Trained) -> PreTrainedModel:
    """The saved policy, loaded by plain transformers and peft."""
    kind = AutoPeftModelForCausalLM if trained.stage.config.lora.r else AutoModelForCausalLM
    return kind.from_pretrained(trained.policy).eval()


@pytest.fixture(scope="module")
def texts(trained: Trained) -> Sequences:
    """Random prompts and responses of many lengths."""
    generator = torch.Generator().manual_seed(0)
    rows = [[torch.randint(3, 250, (n,), generator=generator).tolist() for n in lengths] for lengths in LENGTHS]
    return Sequences.from_lists([prompt for prompt, _ in rows], [response for _, response in rows])


def alone(texts: Sequences) -> Iterator[Tensor]:
    """Each text as a batch of its own."""
    for ids, length in zip(texts.ids, texts.lengths.tolist(), strict=True):
        yield ids[None, :length]


def own_logprobs(model: PreTrainedModel, texts: Sequences) -> Tensor:
    """Log-probs of the responses by the model's forward pass over one text at a time."""
    rows = []
    for ids, prompt in zip(alone(texts), texts.prompt_lengths.tolist(), strict=True):
        logprobs = model(input_ids=ids, use_cache=False).logits[0, prompt - 1 : -1].log_softmax(-1)
        rows.append(logprobs.gather(-1, ids[0, prompt:, None])[:, 0])
    return torch.cat(rows)


def test_logprobs_are_those_of_the_models_own_forward(
    trained: Trained, plain: PreTrainedModel, texts: Sequences
) -> None:
    """Without padding where that is possible, padded, and with the adapter merged."""
    roles, where = trained.roles, texts.predicting
    with torch.no_grad():
        expected = own_logprobs(plain, texts)
        found = [roles.states("policy", texts, where), roles.hidden("policy", texts)[where]]
        with roles.scoring("policy"):
            found.append(roles.states("policy", texts, where))
        for states in found:
            logprobs = roles.token_stats("policy", states, texts.target_ids).logprobs
            torch.testing.assert_close(logprobs, expected, **CLOSE)


def test_gradients_are_those_of_the_models_own_forward(
    trained: Trained, plain: PreTrainedModel, texts: Sequences
) -> None:
    roles = trained.roles
    for parameter in plain.parameters():
        parameter.requires_grad_()
    own = {name.replace("base_model.model.", "").replace(".default.", "."): p for name, p in plain.named_parameters()}
    trunk, adapter = roles.table["policy"]
    ours = roles.adapter_parameters(trunk, adapter) if adapter else dict(roles.trunks[trunk].named_parameters())
    stats = roles.token_stats("policy", roles.states("policy", texts, texts.predicting), texts.target_ids)
    found = torch.autograd.grad(stats.logprobs.sum(), list(ours.values()))
    expected = torch.autograd.grad(own_logprobs(plain, texts).sum(), [own[name] for name in ours])
    largest = max(float(gradient.abs().max()) for gradient in expected)
    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-4 * largest)


def test_saved_models_have_the_same_logits_in_plain_transformers(
    trained: Trained, plain: PreTrainedModel, texts: Sequences
) -> None:
    """The policy, also merged as for an export; the SFT model is the reference; and training has changed something."""
    roles = trained.roles
    models = [("policy", plain), ("reference", AutoModelForCausalLM.from_pretrained(trained.sft).eval())]
    if trained.stage.config.lora.r:
        models.append(("policy", merged(AutoModelForCausalLM, trained.sft, trained.policy).eval()))
    with torch.no_grad():
        for ids in alone(texts):
            logits = {}
            for role in ("policy", "reference"):
                with roles.using_adapter(role) as model:
                    logits[role] = model(input_ids=ids, use_cache=False).logits
            for role, model in models:
                torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, logits[role], **CLOSE)
    assert (logits["policy"] - logits["reference"]).abs().max() > 1e-3


def test_decoding_is_that_of_generate(trained: Trained, plain: PreTrainedModel, texts: Sequences) -> None:
    """Greedily, with prompts of different lengths; and sampled log-probs are the model's own."""
    stops, roles = stop_ids(trained.tokenizer, plain), trained.roles
    prompts = [ids[0, :length].tolist() for ids, length in zip(alone(texts), [3, 17, 1, 9], strict=True)]
    own = [generated(plain, prompt, stops) for prompt in prompts]
    for engine in engines(trained, stops):
        greedy = engine.generate(roles, "policy", GenerationRequest(prompts, NEW, 0.0, torch.Generator()))
        assert response_rows(greedy) == own
        stream = torch.Generator().manual_seed(0)
        sampled = engine.generate(roles, "policy", GenerationRequest(prompts, NEW, 1.0, stream))
        if sampled.logprobs is None:
            continue
        rows = zip(sampled.logprobs, sampled.lengths.tolist(), strict=True)
        with torch.no_grad():
            expected = own_logprobs(plain, Sequences.from_lists(prompts, response_rows(sampled)))
        torch.testing.assert_close(torch.cat([row[:length] for row, length in rows]), expected, **CLOSE)


def engines(trained: Trained, stops: tuple[int, ...]) -> list[Engine]:
    """The engines that sample from this model: the native one also at fixed shapes, as for CUDA graphs."""
    if trained.stage.config.generation.engine == "native":
        return [NativeEngine(stops), NativeEngine(stops, fixed=True)]
    return [TransformersEngine(stops, trained.tokenizer.pad_token_id)]


def generated(model: PreTrainedModel, prompt: list[int], stops: tuple[int, ...]) -> list[int]:
    """transformers' greedy answer to a prompt alone."""
    ids = torch.tensor([prompt])
    found = model.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False, eos_token_id=list(stops))
    return found[0, len(prompt) :].tolist()


def test_a_saved_reward_model_has_the_same_scores_in_plain_transformers(trained: Trained, texts: Sequences) -> None:
    if not has_classifier(trained.roles.trunk("reference")):
        pytest.skip("transformers has no classifier of this family")
    if trained.stage.config.reward.lora.r:
        base = AutoModelForSequenceClassification.from_pretrained(trained.sft, num_labels=1)
        model = PeftModel.from_pretrained(base, trained.reward).eval()
    else:
        model = AutoModelForSequenceClassification.from_pretrained(trained.reward).eval()
    with torch.no_grad():
        expected = torch.stack([model(input_ids=ids).logits[0, 0] for ids in alone(texts)])
        torch.testing.assert_close(trained.roles.last_token_scores("reward", texts), expected, **CLOSE)


def test_ppo_starts_from_the_policy_that_sampled(trained: Trained) -> None:
    assert trained.metrics["ppo/first_ratio"] == pytest.approx(1, abs=1e-4)
    if trained.stage.config.generation.engine == "native":  # the other engine captures no log-probs
        assert trained.metrics["ppo/sampling_gap"] < 1e-4
