"""Fail unless the main job was healthy: PPO clearly above SFT, longer responses, true KL above zero."""

import json
import sys
from pathlib import Path

summary = json.loads((Path(sys.argv[1]) / "summary.json").read_text())
before, after = summary["sft_metrics"], summary["metrics"]
checks = {
    "win rate at least 10 points above SFT": after["eval/win_rate"] - before["eval/win_rate"] >= 0.1,
    "gold utility above SFT": after["eval/gold_utility"] > before["eval/gold_utility"],
    "longer responses": after["eval/response_tokens"] > before["eval/response_tokens"],
    "true KL above zero, and zero before": after["eval/true_kl"] > 0.01 and abs(before["eval/true_kl"]) < 1e-6,
}
for name, passed in checks.items():
    print(f"{'ok' if passed else 'FAILED'}: {name}")
sys.exit(not all(checks.values()))
