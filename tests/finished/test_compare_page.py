"""docs/compare.md: its commands are run, on models as small as possible."""

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlhf import root
from rlhf.data.records import as_records
from rlhf.finished.compare import agreement, cli
from rlhf.finished.compare.configuration import compose
from rlhf.finished.policies import open_policy
from rlhf.finished.run import FinishedRun
from rlhf.pipeline.config import data_source
from tests.helpers.command_line import TINY, run_in_process
from tests.helpers.hub_cache import on_the_hub
from tests.helpers.openai_server import serving

pytestmark = pytest.mark.slow
PAGE = (root() / "docs" / "compare.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for text in (PAGE, (root() / "README.md").read_text(encoding="utf-8"))
    for block in re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
    if line.startswith(("rlhf-compare", "rlhf-agreement"))
]
PRODUCTS = ("reward", "preferences")
STAND_INS = {
    "OWNER/NAME": "us/model",
    "REVISION": "v1",
    **{f"default/{kept}": f"seed-1/{kept}" for kept in ("model_best", "kept")},
}
LONGEST = ["generation.max_new_tokens=16", "ppo.lr=0.03"]
PAIRS = [
    "preferences=simulated",
    "preferences.pairs=20",
    "preferences.validation_pairs=5",
    "preferences.max_new_tokens=8",
]


@pytest.fixture(scope="module")
def replaced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What the names on the page stand for, in a new current folder with all of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(Path("hub").absolute()))
        # 1. Two runs, and simulated preferences.
        for name, *words in (("default",), ("seed-1", "seed=1"), ("pairs", "stage=preferences", *PAIRS)):
            assert run_in_process(*TINY, *LONGEST, "name=made", *words) == 0
            (made,) = Path("outputs/made").glob("*/summary.json")
            Path("outputs/rlhf").mkdir(exist_ok=True)
            shutil.move(made.parent, f"outputs/rlhf/{name}")
        shutil.copytree("outputs/rlhf/default/model", "outputs/rlhf/seed-1/model_best")
        shutil.copytree("outputs/rlhf/default/model", "outputs/rlhf/seed-1/kept/step-000020")
        # 2. Models and outputs from elsewhere.
        run = FinishedRun.open(Path("outputs/rlhf/default"))
        assert run.base is not None
        shutil.copytree(run.base, "my-model")
        Path("my-model/chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
        on_the_hub(Path("hub"), "us/model", {"1" * 40: Path("my-model")})
        rows = as_records(data_source(compose([], run)).load("eval"), "eval")
        task = {"instruction": rows[0].prompt, "input": "", "output_1": "No.", "output_2": "Yes.", "preference": 1}
        Path("annotations.json").write_text(json.dumps([task] * 3))
        outputs = [{"instruction": row.instruction, "output": "No.", "generator": "nobody"} for row in rows]
        Path("outputs.json").write_text(json.dumps(outputs))
        # 3. A comparison and an endpoint.
        cli.main(["outputs/rlhf/default", "reference", "--out", "outputs/comparisons/0123456789ab"])
        cached = {product: next(Path("outputs/cache").glob(f"{product}-*[0-9a-f]")) for product in PRODUCTS}
        with serving(lambda request, number: "Final verdict: 1") as server:
            yield {
                "OWNER/NAME@REVISION": "us/model@v1",
                "http://localhost:8000/v1": server.url,
                "data=alpaca_farm": "data=alpaca",
                **{f"outputs/cache/{product}-0123456789ab": str(path) for product, path in cached.items()},
            }


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_page_does_what_it_says(
    replaced: dict[str, str], line: str, capsys: pytest.CaptureFixture
) -> None:
    for name, stands_for in replaced.items():
        line = line.replace(name, stands_for)
    command, *words = shlex.split(line, comments=True)
    main: Callable = {"rlhf-compare": cli.main, "rlhf-agreement": agreement.main}[command]
    main(words)
    said = capsys.readouterr().out
    folder = Path(said.splitlines()[-1].removeprefix("would write "))
    assert folder.exists() != ("--dry-run" in words)
    assert "| " in said or "--dry-run" in words


def test_every_kind_of_player_opens(replaced: dict[str, str]) -> None:
    """All words in the first table."""
    table = PAGE.partition("| word | policy |")[2].partition("\n\n")[0]
    words = [
        word for cell in re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE) for word in re.findall(r"`(.+?)`", cell)
    ]
    assert len(words) == 11
    for word in words:
        for name, stands_for in STAND_INS.items():
            word = word.replace(name, stands_for)
        assert open_policy(word).label
