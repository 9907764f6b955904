"""`rlhf-chat --web`: a page with a column per run, served to this machine only."""

import os
from collections.abc import Iterator, Sequence

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr

from rlhf.errors import RunError
from rlhf.finished.chat.responders import Responder, Sampling, answer_together, reseed


def page(responders: Sequence[Responder], sampling: Sampling, seed: int) -> gr.Blocks:
    """The page, to be launched by the caller.

    One prompt is answered at a time, because the runs share models and switch adapters on them. Each stands alone.
    """

    def answer(prompt: str, temperature: float, number: float) -> Iterator[list[str]]:
        reseed(responders, int(number))
        for responder in responders:
            responder.forget()
        chosen = Sampling(temperature, sampling.max_new_tokens)
        try:
            for answers in answer_together(responders, prompt.strip(), chosen):
                yield [text for now in answers for text in (now.text, now.note)]
        except RunError as error:
            raise gr.Error(str(error), print_exception=False) from None

    start = responders[0].evaluation["temperature"] if sampling.temperature is None else sampling.temperature
    with gr.Blocks(title="rlhf-chat") as blocks:
        prompt = gr.Textbox(label="Prompt", autofocus=True)
        with gr.Row():
            temperature = gr.Slider(0, max(2.0, start), value=start, label="Temperature (0 is greedy)")
            number = gr.Number(seed, precision=0, minimum=0, label="Seed")
        shown: list[gr.Textbox] = []
        with gr.Row():
            for responder in responders:
                with gr.Column():
                    shown.append(gr.Textbox(label=responder.label, lines=8, interactive=False))
                    shown.append(gr.Textbox(show_label=False, interactive=False))
        prompt.submit(answer, [prompt, temperature, number], shown, concurrency_limit=1)
    return blocks
