"""Fail unless each of the main jobs was healthy: PPO clearly above SFT, longer responses, true KL above zero.

python .ci/check_main_job.py RUN_FOLDER…
"""

import json
import sys
from pathlib import Path


def checks(folder: Path) -> dict[str, bool]:
    """What a healthy run of the main job must have done, and whether it did."""
    if not (folder / "summary.json").exists():
        return {"it ended": False}
    summary = json.loads((folder / "summary.json").read_text())
    before, after = summary["sft_metrics"], summary["metrics"]
    gain, gold = (100 * (after["eval/win_rate"] - before["eval/win_rate"]), after["eval/gold_utility"])
    return {
        f"win rate at least 10 points above SFT ({gain:+.1f})": gain >= 10,
        f"gold utility above SFT ({before['eval/gold_utility']:.2f} → {gold:.2f})": gold > before["eval/gold_utility"],
        "longer responses": after["eval/response_tokens"] > before["eval/response_tokens"],
        "true KL above zero, and zero before": after["eval/true_kl"] > 0.01 and abs(before["eval/true_kl"]) < 1e-6,
    }


folders = [Path(argument) for argument in sys.argv[1:]]
results = {folder: checks(folder) for folder in folders if folder.name != "report"}
for folder, found in results.items():
    for name, passed in found.items():
        print(f"{'ok' if passed else 'FAILED'}: {name}{f' in {folder.name}' if len(folders) > 1 else ''}")
sys.exit(not (results and all(all(found.values()) for found in results.values())))
