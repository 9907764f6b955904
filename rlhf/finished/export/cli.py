"""The `rlhf-export` command: writes a run's model as a folder for others, and uploads it to the Hub."""

import argparse
import glob
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from rlhf.errors import FAILURE, RunError, first_line
from rlhf.errors.explaining import one_sentence_errors
from rlhf.files import sync
from rlhf.finished.run import FinishedRun

DTYPES = ("float32", "bfloat16")
BYTES = {"float32": 4, "bfloat16": 2}


def main(arguments: Sequence[str] | None = None) -> None:
    """`rlhf-export RUN DESTINATION [--dtype D] [--adapter [--base ID]] [--license ID] [--push ID] [--dry-run]`."""
    parser = argparse.ArgumentParser(
        prog="rlhf-export", description="A run's model with its adapter merged in, for plain transformers."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or a model in outputs/cache")
    parser.add_argument("destination", type=Path, metavar="DESTINATION", help="a new folder")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: the run's model.dtype)")
    parser.add_argument("--adapter", action="store_true", help="write the adapter alone (dtype: float32 by default)")
    parser.add_argument("--base", metavar="OWNER/NAME", help="with --adapter: the repository of its SFT model")
    parser.add_argument(
        "--license", metavar="ID", help="licence in the model card (default: that in the card of the base model)"
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the folder to this repository of the Hub")
    parser.add_argument("--private", action="store_true", help="with --push: make a new repository private")
    parser.add_argument("--dry-run", action="store_true", help="print what would be written and pushed, and do neither")
    options = parser.parse_args(arguments)
    with one_sentence_errors(parser.prog):
        run = FinishedRun.open(options.run)
        _check(run, options)
        if options.dry_run:
            _describe(run, options)
            return
        _write(run, options)
        print(options.destination)
        if options.push:
            print(_push(options))


def _check(run: FinishedRun, options: argparse.Namespace) -> None:
    """Check the options before anything is loaded.

    Raises:
        RunError: an option does not fit the run or the other options.
    """
    if options.destination.exists():
        raise RunError(f"{options.destination} exists already; allowed: a new folder")
    if options.adapter and run.base is None:
        raise RunError(f"--adapter: {run.folder} trained all weights and has no adapter; allowed: without --adapter")
    if options.base and not options.adapter:
        raise RunError("--base names the base of an adapter; allowed: with --adapter")
    if options.private and not options.push:
        raise RunError("--private is for a repository of the Hub; allowed: with --push")
    for key in ("push", "base"):
        _check_id(f"--{key}", getattr(options, key))
    if options.push and options.adapter and not options.base:
        raise RunError("--adapter: only this machine has its SFT model; allowed: export that too and name it by --base")
    if options.push and not options.dry_run and get_token() is None:
        raise RunError("--push needs a login to the Hub; allowed: `hf auth login`, or a token in HF_TOKEN")


def _check_id(key: str, name: str | None) -> None:
    """Check that an option names a repository of the Hub, if it is given.

    Raises:
        RunError: it does not have the form OWNER/NAME.
    """
    if name is None:
        return
    try:
        validate_repo_id(name)
    except HFValidationError:
        name = ""
    if name.count("/") != 1:
        raise RunError(f"{key} is not the name of a repository on the Hub; allowed: OWNER/NAME")


def _card(run: FinishedRun, options: argparse.Namespace) -> str:
    """The model card, under the name of the repository or of the folder."""
    from rlhf.finished.export.card import model_card

    name = options.push or options.destination.resolve().name
    return model_card(run, name, options.license, _dtype(run, options), options.base, options.adapter)


def _dtype(run: FinishedRun, options: argparse.Namespace) -> str:
    """The dtype of the exported weights; an adapter, which was trained in float32, stays so by default."""
    return options.dtype or ("float32" if options.adapter else run.settings.dtype)


def _describe(run: FinishedRun, options: argparse.Namespace) -> None:
    """Print the card and what would be written and pushed."""
    from rlhf.finished.export.merging import count_parameters

    dtype = _dtype(run, options)
    size = count_parameters(run.model if options.adapter else run.base or run.model) * BYTES[dtype] / 2**20
    print(_card(run, options))
    what = "the adapter" if options.adapter else "the merged model" if run.base else "the model"
    print(f"would write {what}, about {size:,.1f} MiB of {dtype}, tokenizer and the card above: {options.destination}")
    if options.push:
        login = "" if get_token() else ", which needs a login (`hf auth login`)"
        print(f"would push it to {options.push}{' (private)' if options.private else ''}{login}")


def _write(run: FinishedRun, options: argparse.Namespace) -> None:
    """Write weights, tokenizer and card into the destination."""
    # imported here so that a mistake in the options is reported without waiting for torch
    from rlhf.finished.export.merging import merged_model, write_adapter
    from rlhf.models.export import save_tokenizer
    from rlhf.models.loading import DTYPES as TORCH
    from rlhf.pipeline.quiet import quieten

    quieten()
    dtype = TORCH[_dtype(run, options)]
    with atomic_folder(options.destination) as folder:
        if options.adapter:
            write_adapter(run, options.base, dtype, folder)
        else:
            merged_model(run, dtype).save_pretrained(folder)
        save_tokenizer(run.tokenizer(), folder, scoring=run.stage == "reward")
        (folder / "README.md").write_text(_card(run, options), encoding="utf-8")


def _push(options: argparse.Namespace) -> str:
    """Upload the destination to the Hub; returns the repository's URL.

    Raises:
        SystemExit: the upload failed. The folder stays, and the message names the command that tries again.
    """
    hub = HfApi()
    try:
        url = hub.create_repo(options.push, private=options.private or None, exist_ok=True)
        hub.upload_folder(repo_id=options.push, folder_path=options.destination, commit_message="Export of a run")
    except Exception as error:  # network, Hub or permissions: any library may raise
        again = f"`hf upload {options.push} {options.destination}` tries again"
        print(f"rlhf-export: {options.push} could not be pushed ({first_line(error)}); {again}", file=sys.stderr)
        raise SystemExit(FAILURE) from None
    return str(url)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, renamed to `path` once its files are on disk; removed on failure.

    Raises:
        RunError: no folder can be made there, or another process made it meanwhile.
    """
    path = path.resolve()
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.unfinished"):
        process = left.name.split(".")[-2]
        if process.isdecimal() and not _is_running(int(process)):  # it was killed
            shutil.rmtree(left, ignore_errors=True)
    work = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise RunError(
            f"{path}: no folder can be made there ({error.strerror}); allowed: a place to write to"
        ) from None
    try:
        yield work
        for file in work.rglob("*"):
            if file.is_file():
                sync(file)
        if path.exists():
            raise RunError(f"{path} was made by another process meanwhile; allowed: a new folder")
        os.replace(work, path)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
