"""What the stages record of their own speed and size, and the machine they ran on."""

import json
import platform
import re
import statistics
from pathlib import Path

from models.errors import InputError


def of_training(log: Path) -> dict[str, float]:
    """Return images_per_second, the median of a log's rows but the first, which is the warm-up.

    And peak_memory_gb, if the training was on a GPU.
    """
    _, *rows = [json.loads(line) for line in log.read_text().splitlines()]
    if not rows:
        raise InputError(f"{log} has one row, the warm-up: expected more steps")
    speed = statistics.median(row["images_per_second"] for row in rows)
    return {"images_per_second": speed} | _memory(rows[-1])


def of_encoding(said: str) -> dict[str, float]:
    """Return images_per_second of the test split from what stage 3 printed.

    The train split was encoded before it and is the warm-up.
    """
    found = re.search(r"test_codes\.npy .*; ([\d.]+) images/s", said)
    if found is None:
        raise InputError("stage 3 printed no speed of the test split")
    return {"images_per_second": float(found[1])}


def of_sampling(folder: Path) -> dict[str, float]:
    """Return images_per_second, network_calls and parameters in stage 5's metrics.json.

    And peak_memory_gb, if it sampled on a GPU.
    """
    found = json.loads((folder / "metrics.json").read_text())
    wanted = ("images_per_second", "network_calls", "parameters")
    return {key: found[key] for key in wanted} | _memory(found)


def _memory(record: dict) -> dict[str, float]:
    return {key: record[key] for key in ("peak_memory_gb",) if key in record}


def processor() -> str:
    """Return the name of the CPU, as far as the system tells."""
    about = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", about.read_text()) if about.exists() else []
    return names[0] if names else platform.processor() or platform.machine()
