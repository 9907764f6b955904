"""The `rlhf-chat` command: several runs answer prompts that are typed, or piped one per line."""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rlhf import import_from_here
from rlhf.errors import RunError, missing_package
from rlhf.errors.explaining import one_sentence_errors
from rlhf.finished.run import FinishedRun

if TYPE_CHECKING:
    from rlhf.finished.chat.responders import Answer, Responder, Sampling

COMMANDS = "/seed NUMBER, /temperature NUMBER (0 is greedy), /new (conversation), /quit"


def main(arguments: Sequence[str] | None = None) -> None:
    """`rlhf-chat RUN… [--temperature T] [--max-new-tokens N] [--seed S] [--no-score] [--web]`."""
    parser = argparse.ArgumentParser(
        prog="rlhf-chat",
        description="Ask one or several runs. With a chat template, lines are the turns of a conversation; "
        "in another template of the run's data, each line is a prompt by itself.",
        epilog=f"While talking: {COMMANDS}.",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or an SFT model in outputs/cache"
    )
    parser.add_argument("--temperature", type=_temperature, help="default: that of the run's evaluation")
    parser.add_argument("--max-new-tokens", type=_positive, help="default: that of the run's evaluation")
    parser.add_argument("--seed", type=_seed, default=0, help="of the sampling (default: 0)")
    parser.add_argument(
        "--score", action=argparse.BooleanOptionalAction, default=True, help="score answers (default: yes)"
    )
    parser.add_argument("--web", action="store_true", help="a page in the browser (needs the extra web)")
    options = parser.parse_args(arguments)
    with one_sentence_errors(parser.prog):
        runs = [FinishedRun.open(folder) for folder in options.runs]
        if options.web:
            _check_gradio()
        # imported here so that mistakes do not wait for torch
        from rlhf.finished.chat.responders import Sampling, examples, open_responders
        from rlhf.pipeline.numerics import settle_numerics
        from rlhf.pipeline.quiet import quieten

        import_from_here()
        quieten()
        settle_numerics()
        responders = open_responders(runs, options.score, options.seed)
        sampling = Sampling(options.temperature, options.max_new_tokens)
        if options.web:
            from rlhf.finished.chat.web import page

            served = page(responders, sampling, options.seed, examples(runs[0]))
            # quiet: no advertisement of a public link
            _, address, _ = served.launch(server_name="127.0.0.1", quiet=True, prevent_thread_lock=True)
            print(f"Ctrl-C ends the page at {address}", flush=True)
            served.block_thread()
        else:
            talk(responders, sampling)


def talk(responders: "Sequence[Responder]", sampling: "Sampling") -> None:
    """Answer prompts, and obey COMMANDS, until the input ends or /quit."""
    from rlhf.finished.chat.responders import reseed

    console = Console(highlight=False)
    if sys.stdin.isatty():
        console.print(
            f"{', '.join(responder.label for responder in responders)}   {COMMANDS}", style="dim", markup=False
        )
    for line in _lines(console):
        command, _, value = line.partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/new":
                for responder in responders:
                    responder.forget()
            elif command == "/seed":
                reseed(responders, _seed(value))
            elif command == "/temperature":
                sampling.temperature = _temperature(value)
            elif line.startswith("/"):
                raise RunError(f"there is no command {command}; allowed: {COMMANDS}")
            else:
                _answer(console, responders, line, sampling)
        except (RunError, argparse.ArgumentTypeError) as error:
            print(error, file=sys.stderr, flush=True)
        except KeyboardInterrupt:  # ends this answer only
            console.print()


def _lines(console: Console) -> Iterator[str]:
    """The lines that are typed or piped, without empty ones."""
    terminal = sys.stdin.isatty()
    while True:
        try:
            line = console.input("[bold]>[/] ") if terminal else sys.stdin.readline()
        except EOFError:
            return
        if not terminal and not line:
            return
        if line.strip():
            yield line.strip()


def _answer(console: Console, responders: "Sequence[Responder]", prompt: str, sampling: "Sampling") -> None:
    """Print the answers: on a terminal in columns while they are generated, elsewhere as plain text at their end."""
    from rlhf.finished.chat.responders import answer_together

    answers: list[Answer] = []
    if not (console.is_terminal and sys.stdin.isatty()):
        for answers in answer_together(responders, prompt, sampling):  # noqa: B007
            pass
        print(f"> {prompt}")
        for responder, answer in zip(responders, answers, strict=True):
            print(f"{responder.label}: {answer.text}\n  ({answer.note})")
        print(flush=True)
        return
    with Live(console=console, refresh_per_second=12) as live:
        for answers in answer_together(responders, prompt, sampling):
            live.update(columns(console, responders, answers))


def columns(console: Console, responders: "Sequence[Responder]", answers: "Sequence[Answer]") -> Table:
    """The answers side by side; until all are done, only as many of their last lines as fit on the terminal."""
    grid = Table.grid(expand=True)
    unfinished = not all(answer.done for answer in answers)
    width = console.width // len(responders) - 4
    cells = []
    for responder, answer in zip(responders, answers, strict=True):
        grid.add_column(ratio=1)
        lines = Text(answer.text).wrap(console, max(width, 1))
        shown = lines[-max(console.height - 6, 1) :] if unfinished else lines
        cells.append(Panel(Group(*shown, Text(answer.note, style="dim")), title=Text(responder.label)))
    grid.add_row(*cells)
    return grid


def _check_gradio() -> None:
    from importlib.util import find_spec

    if find_spec("gradio") is None:
        raise RunError(missing_package("--web", "gradio", "web"))


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"temperature {text!r} is not allowed; allowed: a number of 0 or above")
    return value


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"seed {text!r} is not allowed; allowed: a whole number of 0 or above")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed: a whole number above 0")
    return int(text)
