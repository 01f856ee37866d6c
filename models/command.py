"""Bad input ends in one clear line, and every command starts here: `run(main, ItsConfig)`.

A config is a frozen dataclass below `Config`. The range of a number is declared with its field
(`steps: Count = 100`) and checked when the config is made, before anything is loaded; so is that a
command writes over nothing that it reads.
"""

import contextlib
import ctypes
import dataclasses
import io
import numbers
import signal
import socket
import sys
import types
import typing
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal


class InputError(ValueError):
    """Something the user gave is wrong; one line says what was expected, found, and to run."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


@dataclasses.dataclass(frozen=True)
class Range:
    """The values that a field may have: from `least` to `most`, both included, and finite."""

    least: float
    most: float
    below: bool = False
    """`most` is no value of it"""
    or_zero: bool = False
    """0 is one, below `least`"""

    def __contains__(self, value: float) -> bool:  # NaN is in no range
        if self.or_zero and value == 0:
            return True
        return self.least <= value and (value < self.most if self.below else value <= self.most)

    def __str__(self) -> str:
        zero, end = "0 or " * self.or_zero, ")" if self.below else "]"
        return f"{zero}in [{self.least:g}, {self.most:g}{end}"


Count = Annotated[int, Range(1, 10**9)]
Natural = Annotated[int, Range(0, 10**9)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Batch = Annotated[int, Range(1, 2**16)]
Vocabulary = Annotated[int, Range(2, 2**16)]
"""stage 3 writes codes as uint16"""
Images = Annotated[int, Range(10, 10**7)]
"""of which fewer say nothing"""
ImagesOrNone = Annotated[int, Range(10, 10**7, or_zero=True)]
Devices = Annotated[int, Range(1, 64)]
Fraction = Annotated[float, Range(0, 1, below=True)]
"""rates of dropout, decays: 1 would leave nothing"""
Share = Annotated[float, Range(0, 1)]
Amount = Annotated[float, Range(0, 1e6)]
"""weights of losses, guidance scales, temperatures"""
DeviceName = Literal["auto", "cpu", "cuda"]


@dataclasses.dataclass(frozen=True)
class Output:
    """A path that a command writes: a file with this suffix, or a folder if there is none."""

    suffix: str = ""


OutFile = Annotated[Path, Output(".pth")]
OutFolder = Annotated[Path, Output()]


@dataclasses.dataclass(frozen=True)
class Config:
    """What a command is told; made only of values in their ranges, and with outputs apart."""

    def __post_init__(self) -> None:
        paths = {}
        for name, value, hint in fields_of(self):
            flag, marks = "--" + name.replace("_", "-"), marks_of(hint)
            if not _fits(value, hint):
                raise InputError(f"expected {flag} to be {_type_name(hint)}, got {value!r:.100}")
            for allowed in (mark for mark in marks if isinstance(mark, Range)):
                for one in value if isinstance(value, tuple) else (value,):
                    if one not in allowed:
                        raise InputError(f"expected {flag} {allowed}, got {one}")
            if isinstance(value, Path):
                paths[flag] = value, next((m for m in marks if isinstance(m, Output)), None)
        _check_outputs(paths)
        self.check()

    def check(self) -> None:
        """Raise InputError for values that do not go together."""


def fields_of(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, value, type) of every field that is set, nested ones by a dot."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            bare = marks_of(hints[field.name])  # OmitArgPrefixes
            yield from fields_of(value, prefix if bare else f"{prefix}{field.name}.")
        elif value is not None:
            yield prefix + field.name, value, hints[field.name]


def _fits(value: Any, hint: Any) -> bool:
    """Tell whether a value, perhaps out of a file, is of a type; paths may be text."""
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind is Literal:
        return value in parts
    if kind is Annotated:
        return _fits(value, parts[0])
    if kind in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is tuple:
        return isinstance(value, tuple | list) and all(_fits(one, parts[0]) for one in value)
    number = {int: numbers.Integral, float: numbers.Real}.get(hint)
    if number:
        return isinstance(value, number) and not isinstance(value, bool)
    return hint not in (str, bool) or isinstance(value, hint)


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Annotated:
        return _type_name(typing.get_args(hint)[0])
    parts = [_type_name(p) if isinstance(p, type) or typing.get_origin(p) else repr(p)
             for p in typing.get_args(hint) if p is not ...]  # fmt: skip
    return " or ".join(parts) or getattr(hint, "__name__", str(hint))


def marks_of(hint: Any) -> tuple:
    """Return what stands in the Annotated types that a type is made of."""
    inner = [mark for part in typing.get_args(hint) for mark in marks_of(part)]
    return (*getattr(hint, "__metadata__", ()), *inner)


def _check_outputs(paths: dict[str, tuple[Path, Output | None]]) -> None:
    """Raise InputError for an output that is an input, or not what it has to be."""
    for flag, (path, output) in paths.items():
        if output is None:
            continue
        if output.suffix and (path.suffix != output.suffix or path.is_dir()):
            raise InputError(f"expected {flag} to be a {output.suffix} file, got {path}")
        if not output.suffix and path.exists() and not path.is_dir():
            raise InputError(f"expected {flag} to be a folder, and {path} is a file")
        for other, (read, mark) in paths.items():
            if mark is None and read.resolve() == path.resolve():
                raise InputError(f"{flag} {path} would overwrite {other}; choose another")


def run(main: Callable[[Any], Any], config: type[Config]) -> None:
    """Call `main` with the `config` that the command line says."""
    import tyro

    for stream in (sys.stdout, sys.stderr):  # a terminal without unicode prints a `?` for it
        stream.reconfigure(errors="replace")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {one_line(message)}\n"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    usage = io.StringIO()
    with one_line_errors():
        script, here = Path(main.__code__.co_filename).resolve(), Path(__file__).resolve()
        if not script.is_relative_to(here.parents[1]):  # by another folder's Python
            raise InputError(f"{script} would run the code of {here.parents[1]}; run: uv sync")
        try:
            with contextlib.redirect_stderr(usage):
                cfg = tyro.cli(config)
        except SystemExit as e:
            if not e.code:
                raise
            raise InputError(_unboxed(usage.getvalue())) from None
        keep_freed_memory()
        main(cfg)


@contextlib.contextmanager
def answered_within(seconds: float) -> Iterator[None]:
    """Let a download wait no longer for a silent server: the libraries that fetch set no limit."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def keep_freed_memory() -> None:
    """Keep up to 2 GiB of freed memory for what comes next, where the C library can be told so.

    It gives large tensors back to the system; to take as much again, page by page, costs 2 to 15%
    of a training step (gpt, width 256, 8 layers, batch 64: 50,000 pages).
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-4, 0)  # M_MMAP_MAX


def _unboxed(text: str) -> str:
    """Return the message of tyro's box, without its frame, its title and its help."""
    lines = [line.strip("│╭╮╰╯ ") for line in text.splitlines()]
    end = next((i for i, line in enumerate(lines) if i and set(line) == {"─"}), len(lines))
    message = " ".join(lines[1:end])
    if message.startswith("Error parsing ") and "--" not in message.split(": ")[0]:
        message = message.partition(": ")[2]  # of a config, whose own message names the flag
    return f"{message} (see --help)"


def one_line(text: Any, length: int | None = None) -> str:
    """Return text without line breaks, its first `length` characters."""
    return " ".join(str(text).split())[:length]


INTERRUPTED = "interrupted: run the same command again to go on"


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn the errors that a user can mend into `error: ...` on stderr and exit status 1.

    Our own bugs (any other exception) keep their traceback.
    """
    try:
        yield
    except BaseException as e:
        first: BaseException | None = e
        while first and not isinstance(first, KeyboardInterrupt):
            first = first.__context__  # compiled modules and torch.save make errors of their own
        if not first and not isinstance(e, InputError | OSError):
            raise
        message = INTERRUPTED if first else f"error: {one_line(e)}"
    else:
        return
    if "tqdm" in sys.modules:  # a progress bar that is being drawn would share its line
        for bar in list(sys.modules["tqdm"].tqdm._instances):
            bar.leave = True  # with a line of its own, in whatever order they are closed
            bar.close()
    raise SystemExit(message)
