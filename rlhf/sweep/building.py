"""What runs build for the cache at this moment: SFT models, comparisons and reward models, from its locks and files."""

from pathlib import Path

from rlhf.files import METRICS, PROGRESS
from rlhf.files.locks import is_held, last_holder
from rlhf.tracking.reading import stepped_lines, try_object

PRODUCTS = {"sft": "SFT", "reward": "reward model", "preferences": "comparisons"}
Builders = dict[tuple[int, str], str]  # (process, host) → what it builds, such as `SFT 12/25`


def builders(folder: Path) -> Builders:
    """The processes that build something in the cache beside a sweep's folder, and what each of them builds."""
    cache = next((place / "cache" for place in folder.resolve().parents[:3] if (place / "cache").is_dir()), None)
    found: Builders = {}
    for lock in sorted(cache.glob("*.lock")) if cache else ():
        work, holder = lock.with_name(f".{lock.stem}.building"), last_holder(lock)
        if holder and work.is_dir() and is_held(lock) is not False:
            found[holder] = _described(lock.stem.partition("-")[0], work)
    return found


def _described(product: str, work: Path) -> str:
    """A product and how far it is: its last logged step and, while it trains, the number of steps."""
    steps = try_object(work / PROGRESS)[0].get("steps")
    lines = [line["step"] for line in stepped_lines(work / METRICS) if line["step"] is not None]
    name = PRODUCTS.get(product, product)
    return f"{name} {lines[-1]}/{steps}" if lines and isinstance(steps, int) else name
