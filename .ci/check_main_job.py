"""Fail unless the main job was healthy: a good reward model, PPO clearly above SFT, true KL above zero.

Any seed of a sound program passes. What fails it are a reward model that learned little, a policy that did not learn or
over-optimised, and one that was not the SFT model before its first step.
"""

import json
import sys
from pathlib import Path

run = Path(sys.argv[1])
summary = json.loads((run / "summary.json").read_text())
reward = json.loads((run.parents[1] / "cache" / summary["reward_model"] / "summary.json").read_text())["metrics"]
before, after = summary["sft_metrics"], summary["metrics"]
checks = {
    "reward model right on 75 % of held-out comparisons": reward["reward/accuracy"] >= 0.75,
    "reward model 10 points better than length alone": reward["reward/accuracy"] - reward["reward/longer_accuracy"]
    >= 0.1,
    "win rate at least 10 points above SFT": after["eval/win_rate"] - before["eval/win_rate"] >= 0.1,
    "gold utility above SFT": after["eval/gold_utility"] > before["eval/gold_utility"],
    "true KL above zero, and zero before": after["eval/true_kl"] > 0.01 and abs(before["eval/true_kl"]) < 1e-6,
}
for name, passed in checks.items():
    print(f"{'ok' if passed else 'FAILED'}: {name}")
sys.exit(not all(checks.values()))
