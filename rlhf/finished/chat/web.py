"""`rlhf-chat --web`: a page with a column per run, served to this machine only."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr

from rlhf.errors import RunError
from rlhf.finished.chat.responders import Responder, Sampling, answer_together, reseed

NOTE = "note"  # the role of a turn that holds the scores of the answer before it, which no model reads
Turns = list[dict[str, str]]  # of one run: role and content, as the page shows them


def page(responders: Sequence[Responder], sampling: Sampling, seed: int, examples: Sequence[str] = ()) -> gr.Blocks:
    """The page, to be launched by the caller; `examples` are prompts to choose from.

    One prompt is answered at a time, because the runs share models and switch adapters on them. A run with a chat
    template continues the conversation in its column. With another template each prompt stands alone, and the column
    is a record.
    """

    def answer(prompt: str, temperature: float, number: float, turns: list[Turns]) -> Iterator[list[Any]]:
        reseed(responders, int(number))
        before = turns or [[] for _ in responders]
        for responder, own in zip(responders, before, strict=True):
            responder.forget()
            if responder.chat:
                responder.conversation = [turn for turn in own if turn["role"] != NOTE]
        chosen, asked = Sampling(temperature, sampling.max_new_tokens), prompt.strip()
        try:
            for answers in answer_together(responders, asked, chosen):
                now = [
                    [*own, _turn("user", asked), _turn("assistant", text.text), _turn(NOTE, text.note)]
                    for own, text in zip(before, answers, strict=True)
                ]
                yield [now, *map(_shown, now)]
        except RunError as error:
            raise gr.Error(str(error), print_exception=False) from None

    def forget() -> list[Any]:
        return [[], *([] for _ in responders)]

    start = responders[0].evaluation["temperature"] if sampling.temperature is None else sampling.temperature
    with gr.Blocks(title="rlhf-chat") as blocks:
        gr.Markdown(f"# rlhf-chat\n{', '.join(f'`{responder.label}`' for responder in responders)}")
        turns = gr.State([])
        with gr.Row():
            columns = [gr.Chatbot(label=responder.label, height=420, min_width=320) for responder in responders]
        with gr.Row():
            prompt = gr.Textbox(label="Prompt", autofocus=True, scale=8, min_width=320)
            send = gr.Button("Send", variant="primary", scale=1)
            new = gr.Button("New conversation", scale=1, min_width=220)
        with gr.Row():
            temperature = gr.Slider(0, max(2.0, start), value=start, label="Temperature (0 is greedy)")
            number = gr.Number(seed, precision=0, minimum=0, label="Seed")
        if examples:
            gr.Examples(list(examples), prompt, label="Prompts of the evaluation set")
        inputs, outputs = [prompt, temperature, number, turns], [turns, *columns]
        gr.on([prompt.submit, send.click], answer, inputs, outputs, api_name="answer", concurrency_limit=1)
        new.click(forget, None, outputs, api_name="forget")
    return blocks


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _shown(turns: Turns) -> list[dict[str, str]]:
    """The turns as the page shows them: the scores of an answer in italics under it."""
    return [_turn("assistant", f"*{turn['content']}*") if turn["role"] == NOTE else turn for turn in turns]
