"""Fashion-MNIST from its four gzipped IDX files."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["load"]

# Where Debian's package puts the files; PTQ4ARVG_FASHION_MNIST names another folder.
DEFAULT_FOLDER = "/usr/share/datasets/fashion-mnist"


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes as an array of the shape its header states."""
    with gzip.open(path) as file:
        zero, kind, dims = struct.unpack(">HBB", file.read(4))
        if zero != 0 or kind != 8:
            raise ValueError(f"{path} is not an IDX file of unsigned bytes")
        shape = struct.unpack(f">{dims}I", file.read(4 * dims))
        return np.frombuffer(file.read(), np.uint8).reshape(shape)


def load(split: str) -> tuple[Tensor, Tensor]:
    """Images float32 ``[n, 1, 28, 28]`` in [0, 1] and labels int64 ``[n]``; ``split`` is ``"train"`` or ``"t10k"``.

    Raises:
        FileNotFoundError: the dataset is not installed; the message says how to get it.
    """
    folder = Path(os.environ.get("PTQ4ARVG_FASHION_MNIST", DEFAULT_FOLDER))
    images, labels = folder / f"{split}-images-idx3-ubyte.gz", folder / f"{split}-labels-idx1-ubyte.gz"
    if not images.exists():
        raise FileNotFoundError(
            f"{images} not found: install Debian's package dataset-fashion-mnist, or set PTQ4ARVG_FASHION_MNIST to a "
            "folder with the four IDX files"
        )
    return torch.from_numpy(read_idx(images)[:, None] / np.float32(255)), torch.from_numpy(
        read_idx(labels).astype(np.int64)
    )
