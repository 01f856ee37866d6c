"""The parts of README.md that are made from the kept runs: all that stands between two comments.

`<!-- report:NAME -->` and `<!-- /report -->`, each alone on its line, hold the block NAME; what
stood between them is replaced, and nothing else.
"""

import re
from pathlib import Path

from metrics.readme_prose import PROSE_BLOCKS
from metrics.readme_seeds import training_seeds
from metrics.readme_tables import TABLE_BLOCKS
from models.errors import InputError

MARKER = re.compile(r"^<!-- (?:report:(?P<name>\w+)|/report) -->[ \t\r]*$", re.MULTILINE)
BLOCKS = PROSE_BLOCKS | TABLE_BLOCKS | {"training_seeds": training_seeds}
"""{name: what makes its text from the folder of kept runs}"""


def regenerate(text: str, kept: Path) -> tuple[str, list[str]]:
    """Return README.md with its blocks made anew from the kept runs, and their names.

    Raises InputError for an unknown block, one that is not closed, none at all, or one whose runs
    or files are not kept.
    """
    markers = list(MARKER.finditer(text))
    opened = [marker["name"] for marker in markers]
    if not markers or None in opened[::2] or any(opened[1::2]) or len(opened) % 2:
        raise InputError(
            "expected README.md to hold <!-- report:NAME --> and <!-- /report --> by turns, each "
            f"alone on its line, got {[m.group().strip() for m in markers] or 'none'}"
        )
    unknown = sorted(set(opened[::2]) - set(BLOCKS))
    if unknown:
        raise InputError(f"expected blocks of {', '.join(BLOCKS)}, got {', '.join(unknown)}")
    parts, end = [], 0
    for first, last in zip(markers[::2], markers[1::2], strict=True):
        parts += [text[end : first.end()], "\n", BLOCKS[first["name"]](kept)]
        end = last.start()
    return "".join(parts) + text[end:], opened[::2]
