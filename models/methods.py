"""The methods by name. To add one: write a file beside this one, and a line here."""

from pathlib import Path

from models.arpg import ARPG
from models.command import InputError
from models.gpt import GPT
from models.method import Method, ModelConfig
from models.orders import CHANCE, CHOSEN
from models.par import PAR
from models.randar import RandAR
from models.rar import RAR

METHODS: dict[str, type[Method]] = {
    "gpt": GPT,
    "randar": RandAR,
    "rar": RAR,
    "arpg": ARPG,
    "par": PAR,
}


def build(method: str, config: ModelConfig) -> Method:
    """Return a freshly initialised method. Raises InputError for an unknown name."""
    if method not in METHODS:
        raise InputError(f"expected a method of {', '.join(METHODS)}, got {method}")
    return METHODS[method](config)


def check_order(method: str, order: str, trained: str | None = None) -> None:
    """Raise InputError for a method and an --order that make no sense together, saying why.

    `trained` is the scan that a checkpoint was trained in, None before training.
    """
    fixed = not METHODS[method].any_order
    if order in CHOSEN and (fixed or not METHODS[method].parallel):
        raise InputError(
            f"--order {order} asks for all open cells at once, which {method} cannot; take "
            + ", ".join(n for n, m in METHODS.items() if m.any_order and m.parallel)
        )
    if fixed and trained not in (None, order, Path(order).name):
        raise InputError(
            f"this {method} was trained in {trained} order and cannot be asked for {order}"
        )
    own = METHODS[method].scans
    if fixed and (order in CHANCE or (own is not Method.scans and order not in own)):
        raise InputError(
            f"--order {order} needs a method that is told which cell comes next; {method} is not: "
            f"take --method {', '.join(n for n, m in METHODS.items() if m.any_order)}, "
            f"or --order {', '.join(METHODS[method].scans)}"
        )
