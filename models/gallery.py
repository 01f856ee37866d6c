"""One HTML page that holds everything it shows: pictures and animations are inside the file.

Functions from values to HTML or image bytes; `page` puts the pieces together. The page needs no
script, no network and no file beside it.
"""

import base64
import html
import io
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from models.pictures import tile

GREY = 205
"""what a cell shows before it is generated"""
TITLE = 14
"""height in pixels of a name above an animation"""

STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --quiet: #5a6068; --line: #e3e6ea;
        --panel: #f5f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e2e5e9; --quiet: #a0a7b0; --line: #363b42; --panel: #24282d; }
}
body { margin: 0 auto; max-width: 66rem; padding: 1rem 1.25rem 4rem; color: var(--text);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 1.5rem 0 0.5rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 0.5rem; }
p { max-width: 44rem; }
figure { margin: 0; min-width: 0; }
figcaption { color: var(--quiet); font-size: 0.9rem; margin-top: 0.35rem; }
img { background: white; display: block; width: 100%; height: auto; }
img.pixels { image-rendering: pixelated; }
.pair { display: grid; gap: 1.5rem 2rem; margin-bottom: 1rem;
        grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); }
.pair figure { max-width: 36rem; }
.wide { margin-bottom: 1rem; overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.9rem 0.3rem 0; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { min-width: 7rem; text-align: left; white-space: normal; }
th { font-weight: 600; }
td { white-space: nowrap; }
pre { background: var(--panel); border-radius: 6px; margin: 0.3rem 0 1rem; padding: 0.6rem 0.8rem;
      font-size: 0.8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def reveal_frames(
    images_NHWC: np.ndarray, order_NS: np.ndarray, grid: int, sizes: Sequence[int] | None = None
) -> list[np.ndarray]:
    """Return pictures of all images side by side, one more than there are `sizes`.

    Each shows as many cells of each order more than the last, all ones by default. The cells that
    are still to come are grey.
    """
    sizes = [1] * order_NS.shape[1] if sizes is None else sizes
    side = images_NHWC.shape[1] // grid
    rank_NT = order_NS.argsort(axis=1)
    rank_Nhw = rank_NT.reshape(-1, grid, grid).repeat(side, axis=1).repeat(side, axis=2)
    frames = []
    for shown in itertools.accumulate(sizes, initial=0):
        shown_NHWC = np.where((rank_Nhw < shown)[..., None], images_NHWC, np.uint8(GREY))
        frames.append(tile(shown_NHWC, columns=len(images_NHWC)))
    return frames


def stacked_frames(
    rows: Sequence[tuple[str, list[np.ndarray]]], scale: int = 2
) -> list[np.ndarray]:
    """Return pictures of animations one above the other, each under its name, `scale` as large.

    They start together, and one that is over waits for the others.
    """

    def titled(name: str, frame_HWC: np.ndarray) -> np.ndarray:
        large_HWC = frame_HWC.repeat(scale, axis=0).repeat(scale, axis=1)
        strip = Image.new("RGB", (large_HWC.shape[1], TITLE), "white")
        ImageDraw.Draw(strip).text((2, 1), name, fill="black")
        return np.concatenate((np.asarray(strip), large_HWC))

    return [
        np.concatenate([titled(name, frames[min(t, len(frames) - 1)]) for name, frames in rows])
        for t in range(max(len(frames) for _, frames in rows))
    ]


def gif(frames: Sequence[np.ndarray], milliseconds: int = 80, pause: int = 2400) -> bytes:
    """Return an endless GIF of uint8 (H, W, 3) frames; the last one stays for `pause`.

    One palette, made from the first and the last frame, so that no colour flickers.
    """
    both = Image.fromarray(np.concatenate((frames[0], frames[-1])))
    palette = both.quantize(256)
    first, *others = (
        Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)
        for frame in frames
    )
    file = io.BytesIO()
    durations = [milliseconds] * len(others) + [pause]
    first.save(file, "GIF", save_all=True, append_images=others, duration=durations, loop=0)
    return file.getvalue()


def picture(content: bytes, kind: str, caption: str, pixels: bool = False) -> str:
    """Return a figure that holds a `kind` ("png", "gif") picture itself, not a link to it.

    `pixels` shows the picture's own pixels when it is enlarged.
    """
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    look = ' class="pixels"' if pixels else ""
    text = html.escape(caption)
    return (
        f'<figure><img{look} alt="{text}" src="{source}"><figcaption>{text}</figcaption></figure>'
    )


def png_file(path: Path, caption: str) -> str:
    """Return a figure with the PNG at `path` in it."""
    return picture(Path(path).read_bytes(), "png", caption)


def pair(figures: Sequence[str]) -> str:
    """Lay figures side by side, or one above the other where the screen is narrow."""
    return f'<div class="pair">{"".join(figures)}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; every row has as many cells as the head, whose names may break at `_`."""

    def line(tag: str, cells: Iterable[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"

    names = [html.escape(name).replace("_", "_<wbr>") for name in head]
    body = "".join(line("td", map(html.escape, row)) for row in rows)
    return f'<div class="wide"><table>{line("th", names)}{body}</table></div>'


def command(line: str) -> str:
    """Return a command to copy."""
    return f"<pre>{html.escape(line)}</pre>"


def page(title: str, introduction: str, sections: dict[str, str]) -> str:
    """Return the whole page: plain text title and introduction, then HTML under each heading."""
    body = "".join(f"<h2>{html.escape(name)}</h2>{part}" for name, part in sections.items())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><h1>{html.escape(title)}</h1><p>{html.escape(introduction)}</p>{body}"
        "</body></html>\n"
    )
