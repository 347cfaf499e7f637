"""The demo's picture: what every model of the table drew for the same classes from the same random numbers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ptq4arvg.files import replacing

__all__ = ["Panel", "Strip", "draw_picture", "save_grid"]

TILE = 28
GAP = 3  # between pictures of one class
CLASS_GAP = 10  # between classes
ROW_GAP = 6
PAPER = 1.0


@dataclass(frozen=True)
class Strip:
    """One row of a panel: its name, figures, and pictures float ``[classes, per_class, 28, 28]`` in [0, 1]."""

    name: str
    note: str
    pictures: Tensor


@dataclass(frozen=True)
class Panel:
    """A titled group of strips."""

    title: str
    subtitle: str
    strips: Sequence[Strip]


def _offsets(classes: int, per_class: int) -> np.ndarray:
    """Left edge ``[classes, per_class]`` of every tile, in pixels of the tiles."""
    width = per_class * TILE + (per_class - 1) * GAP
    return np.arange(classes)[:, None] * (width + CLASS_GAP) + np.arange(per_class)[None] * (TILE + GAP)


def _canvas(strips: Sequence[Strip], left: np.ndarray) -> np.ndarray:
    """All tiles of a panel on one sheet, 0 = black ink; the pictures are inverted (dark on light paper)."""
    sheet = np.full((len(strips) * (TILE + ROW_GAP) - ROW_GAP, int(left.max()) + TILE), PAPER, np.float32)
    for i, strip in enumerate(strips):
        top = i * (TILE + ROW_GAP)
        for (c, j), x in np.ndenumerate(left):
            sheet[top : top + TILE, x : x + TILE] = 1 - strip.pictures[c, j].numpy()
    return sheet


def draw_picture(path: str | os.PathLike[str], panels: Sequence[Panel], class_names: Sequence[str]) -> None:
    """Write a PNG with one row of pictures per strip and one group of columns per class, labelled; atomically."""
    # Figure, not pyplot: no global state and no display needed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    classes, per_class = panels[0].strips[0].pictures.shape[:2]
    left = _offsets(classes, per_class)
    width = int(left.max()) + TILE
    names, notes, margin = 98.0, 74.0, 10.0  # all in tile pixels
    head, title, bottom = 14.0, 40.0, 12.0
    heights = [len(panel.strips) * (TILE + ROW_GAP) - ROW_GAP for panel in panels]
    total_w = margin + names + width + notes + margin
    total_h = sum(heights) + len(panels) * (head + title) + bottom
    scale = 1 / 50  # inches per tile pixel; with 130 dpi a pixel of a picture covers 2.6 on the sheet
    figure = Figure(figsize=(total_w * scale, total_h * scale), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, total_w)
    axes.set_ylim(total_h, 0)
    axes.axis("off")
    x0, y = margin + names, 0.0
    ink, soft = "#1b1f24", "#667080"
    for panel, height in zip(panels, heights, strict=True):
        axes.text(margin, y + 18, panel.title, fontsize=15, fontweight="bold", color=ink, va="center")
        axes.text(margin, y + 31, panel.subtitle, fontsize=10, color=soft, va="center")
        y += title
        for c, name in enumerate(class_names):
            centre = x0 + (left[c, 0] + left[c, -1] + TILE) / 2
            axes.text(centre, y + head / 2 + 1, name, fontsize=10, color=soft, ha="center", va="center")
        y += head
        axes.imshow(
            _canvas(panel.strips, left),
            cmap="gray",
            vmin=0,
            vmax=1,
            extent=(x0, x0 + width, y + height, y),
            aspect="auto",
            interpolation="nearest",
        )
        for i, strip in enumerate(panel.strips):
            middle = y + i * (TILE + ROW_GAP) + TILE / 2
            axes.text(x0 - 8, middle, strip.name, fontsize=11, fontweight="bold", color=ink, ha="right", va="center")
            axes.text(x0 + width + 8, middle, strip.note, fontsize=9, color=soft, va="center", linespacing=1.35)
        y += height
    # imshow moves the limits to the image; put the sheet's back.
    axes.set_xlim(0, total_w)
    axes.set_ylim(total_h, 0)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def save_grid(path: str | os.PathLike[str], images: Tensor, columns: int, zoom: int = 1) -> None:
    """Write images uint8 ``[n, C, h, w]``, C = 1 or 3, row by row as a PNG grid of ``columns`` columns; atomically."""
    from PIL import Image

    count, channels, height, width = images.shape
    if zoom > 1:
        images = images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
        height, width = height * zoom, width * zoom
    gap = max(2, width // 14)
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, side = (i // columns) * (height + gap) + gap, (i % columns) * (width + gap) + gap
        sheet[top : top + height, side : side + width] = image.permute(1, 2, 0).numpy()
    with replacing(path) as temporary:
        Image.fromarray(sheet[..., 0] if channels == 1 else sheet).save(temporary, format="PNG")
