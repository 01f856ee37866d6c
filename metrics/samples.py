"""Samples as files: ADM's .npz, which its evaluator and this one read, and a picture of them."""

import io
import zipfile
from pathlib import Path

import numpy as np

from models.artifacts import replace_file
from models.errors import InputError
from models.pictures import class_grid, save_figure


def write_samples(out: Path, images_NHWC: np.ndarray, label_N: np.ndarray, classes: list) -> None:
    """Write samples.npz (arr_0 uint8 NHWC, arr_1 labels: ADM's convention) and samples.png."""
    packed = io.BytesIO()
    np.savez(packed, arr_0=images_NHWC, arr_1=label_N)
    replace_file(out / "samples.npz", lambda file: file.write(packed.getbuffer()))
    present = [k for k in range(len(classes)) if (label_N == k).any()]
    columns = min(10, *(int((label_N == k).sum()) for k in present))
    shown = np.concatenate([np.flatnonzero(label_N == k)[:columns] for k in present])
    figure = class_grid(images_NHWC[shown], label_N[shown], [classes[k] for k in present])
    save_figure(figure, out / "samples.png", dpi=150)


def read_samples(path: Path, size: int, classes: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Return (images uint8 (N, size, size, 3), labels int64 (N,) or None) of an .npz.

    Raises InputError unless arr_0 is such an array, and arr_1, if there, labels in 0..classes-1.
    """
    try:
        with np.load(path, allow_pickle=False) as packed:
            images_NHWC = packed["arr_0"]
            label_N = packed["arr_1"] if "arr_1" in packed.files else None
    except FileNotFoundError:
        raise InputError(f"expected samples at {path}, found nothing") from None
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as e:
        reason = " ".join(str(e).split())[:100]
        raise InputError(f"{path} is no .npz of samples with an arr_0: {reason}") from None
    if images_NHWC.dtype != np.uint8 or images_NHWC.shape[1:] != (size, size, 3):
        raise InputError(
            f"{path}: expected arr_0 uint8 (N, {size}, {size}, 3), "
            f"found {images_NHWC.dtype} {images_NHWC.shape}"
        )
    if label_N is None:
        return images_NHWC, None
    integers = np.issubdtype(label_N.dtype, np.integer) and label_N.shape == images_NHWC.shape[:1]
    if not integers or not ((label_N >= 0) & (label_N < classes)).all():
        raise InputError(
            f"{path}: expected arr_1 to hold {len(images_NHWC)} labels in 0..{classes - 1}, "
            f"found {label_N.dtype} {label_N.shape}"
        )
    return images_NHWC, label_N.astype(np.int64)
