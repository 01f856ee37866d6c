"""Bad input ends in one clear line: `InputError` says it, `one_line_errors` prints it."""

import contextlib
from collections.abc import Iterator
from typing import Any


class InputError(ValueError):
    """Something the user gave is wrong; the message says what was expected, found, and to run."""


def expect_at_least(config: Any, **least: float) -> None:
    """Raise InputError, naming the flag, for a field under its least value; None passes."""
    for name, low in least.items():
        value = getattr(config, name)
        if value is not None and not value >= low:  # NaN fails too
            raise InputError(f"expected {_flag(name)} >= {low}, got {value}")


def expect_fraction(config: Any, *names: str) -> None:
    """Raise InputError, naming the flag, for a field outside [0, 1)."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise InputError(f"expected {_flag(name)} in [0, 1), got {getattr(config, name)}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn the errors that a user can mend into `error: ...` on stderr and exit status 1.

    Our own bugs (any other exception) keep their traceback.
    """
    try:
        yield
    except (InputError, OSError) as e:
        raise SystemExit(f"error: {' '.join(str(e).split())}") from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted: run the same command again to go on") from None
