"""A stand-in for vLLM, which needs a GPU: it samples nothing, and refuses what vLLM's memory does not allow."""

import sys
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from rlhf.rollout import vllm as engine

RESPONSE = [9, 7]


class LLM:
    """The methods of `vllm.LLM` that the engine calls, with a record of the calls.

    Raises AssertionError if two instances hold memory at once, and for a call in the wrong state.
    """

    calls: ClassVar[list[str]]
    sampling: ClassVar[list[dict]]
    options: ClassVar[dict]
    on_card: ClassVar["LLM | None"]

    def __init__(self, **options: Any):
        assert LLM.on_card is None, "the card is full"
        assert options["enable_sleep_mode"]
        self.awake = True
        LLM.on_card, LLM.options = self, options
        LLM.calls.append("start")
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=self._shutdown))

    def generate(self, prompts: list, sampling: list, **_: Any) -> list:
        """The same response to each prompt."""
        assert self.awake
        assert LLM.on_card is self
        LLM.sampling = sampling
        LLM.calls.append("generate")
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=RESPONSE, logprobs=None)]) for _ in prompts]

    def sleep(self, level: int) -> None:
        """Give the memory back, but not the weights."""
        assert self.awake
        assert level == 1
        self.awake = False
        LLM.calls.append("sleep")

    def wake_up(self) -> None:
        """Take the memory."""
        assert not self.awake
        self.awake = True
        LLM.calls.append("wake up")

    def _shutdown(self) -> None:
        assert self.awake, "asleep its memory is unmapped, and cannot be freed"
        LLM.on_card = None
        LLM.calls.append("shut down")


def install(monkeypatch: pytest.MonkeyPatch) -> type[LLM]:
    """Make `import vllm` give the stand-in, with an empty card."""
    LLM.calls, LLM.sampling, LLM.options, LLM.on_card = [], [], {}, None
    fake = SimpleNamespace(LLM=LLM, SamplingParams=lambda **options: options, TokensPrompt=dict)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setitem(sys.modules, "vllm.lora", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vllm.lora.request", SimpleNamespace(LoRARequest=lambda *_: None))
    monkeypatch.setattr(engine, "_serving", {})
    return LLM
