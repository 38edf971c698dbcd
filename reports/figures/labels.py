"""Labels beside points, each where it covers neither a point nor another label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from kvsim.reports.figures.chart import PAPER, literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE = 8.5
_HEIGHT, _DIGIT_WIDTH, _GAP, _POINT = 9.0, 5.6, 5.0, 5.0
"""In points, of text of that size: a little more than it takes."""
_PLACES = ((1, 0), (0, 1), (-1, 0), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1), (2, 0), (0, 2), (-2, 0), (0, -2))
"""Tried in order: beside, above, below, then the corners and further away."""


def place_labels(axis: Axes, points: Sequence[tuple[float, float]], labels: Sequence[str]) -> None:
    """The limits of the axis must be set. Where nothing is free, the place that covers least."""
    axis.autoscale_view()
    # Of the axis as it stands, in points; laying out changes its size a little, and there is room for that.
    where = axis.transData.transform(np.array(points, float).reshape(-1, 2)) * 72 / axis.figure.dpi
    taken = [_box(x, y, _POINT, _POINT) for x, y in where]
    for (x, y), point, label in zip(where, points, labels, strict=True):
        width = _DIGIT_WIDTH * len(label)
        boxes = [_box(x + right * (_GAP + width / 2), y + up * (_GAP + _HEIGHT / 2), width, _HEIGHT) for right, up in _PLACES]
        own = _box(x, y, _POINT, _POINT)
        best = min(range(len(boxes)), key=lambda i: (sum(_overlap(boxes[i], box) for box in taken if box != own), i))
        box = boxes[best]
        taken.append(box)
        axis.annotate(
            literal(label), point, ((box[0] + box[2]) / 2 - x, (box[1] + box[3]) / 2 - y), textcoords="offset points",
            ha="center", va="center", fontsize=_SIZE, annotation_clip=False, bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.4},
        )  # fmt: skip


def _box(x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """Area in square points."""
    across, along = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(across, 0.0) * max(along, 0.0)
