"""Pages of the site that other files hold: the README, results, speed, the notebook, and the option files.

Run by mkdocs (`gen-files` in mkdocs.yml).
"""

import json
import posixpath
import re

import mkdocs_gen_files

from rlhf import reference, root

RESULTS = sorted((root() / "experiments" / "results").glob("*.md"))
# file → page
COPIED = {"README.md": "index.md", "experiments/README.md": "results/index.md", "benchmarks/RESULTS.md": "speed.md"}
COPIED |= {str(path.relative_to(root())): f"results/{path.name}" for path in RESULTS}


def relinked(text: str, file: str) -> str:
    """Links to files of the repository as links to pages of the site; those to other files become plain text."""

    def page(match: re.Match[str]) -> str:
        label, target, anchor = match[1], match[2], match[3] or ""
        path = str((root() / file).parent.joinpath(target).resolve().relative_to(root()))
        if path not in COPIED and not path.startswith("docs/"):
            return label
        linked = COPIED.get(path, path.removeprefix("docs/"))
        return f"[{label}]({posixpath.relpath(linked, posixpath.dirname(COPIED[file]))}{anchor})"

    return re.sub(r"\[([^\]]+)\]\((?!https?:|#)([^)#\s]+)(#[^)]+)?\)", page, text)


def cell(text: str) -> str:
    """Text for a table's cell."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def configuration() -> str:
    """Every group with its options, and every key with the value of the default option and its comment."""
    lines = [
        "# Configuration",
        "",
        "Made from the files in `conf`, `experiments` and `sweeps`.",
        "",
        "## Keys of a run",
        "",
    ]
    lines += table(reference.run_keys(), "")
    chosen = reference.defaults()
    for group, files in reference.option_files().items():
        lines += ["", f"## {group}", "", "| option | |", "|---|---|"]
        for file in files:
            default = " (the default)" if chosen.get(group) == file.stem else ""
            lines.append(f"| `{group}={file.stem}`{default} | {cell(reference.description(file))} |")
        for file in files:
            if "# @package" in file.read_text() or not (keys := reference.keys(file)):
                continue
            lines += ["", f"**`{group}={file.stem}`**", "", *table(keys, f"{group.split('/')[0]}.")]
    return "\n".join(lines) + "\n"


def table(keys: list[reference.Key], prefix: str) -> list[str]:
    """A table of keys."""
    rows = [f"| `{prefix}{key.name}` | `{cell(key.value)}` | {cell(key.comment)} |" for key in keys]
    return ["| key | value | |", "|---|---|---|", *rows]


def notebook() -> str:
    """The notebook's texts and code; its results are those of whoever runs it."""
    cells = json.loads((root() / "docs" / "notebook.ipynb").read_text())["cells"]
    parts = [
        "".join(cell["source"]) if cell["cell_type"] == "markdown" else f"```python\n{''.join(cell['source'])}\n```"
        for cell in cells
    ]
    return "\n\n".join(parts) + "\n"


pages = {page: relinked((root() / file).read_text(), file) for file, page in COPIED.items()}
pages |= {"configuration.md": configuration(), "notebook.md": notebook()}
for name, text in pages.items():
    with mkdocs_gen_files.open(name, "w") as page:
        page.write(text)
