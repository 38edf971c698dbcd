"""``kvsim calibrate report``: what a profile rests on, and its answers beside the rows it was fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kvsim.calibrate.build import size_classes
from kvsim.calibrate.importers import aiconfigurator, plain_csv
from kvsim.calibrate.rows import MeasuredRow, without_suspect
from kvsim.catalogue import is_path
from kvsim.coordinates import locate
from kvsim.errors import InputError
from kvsim.hardware import load_gpu
from kvsim.measured import MeasuredProfile
from kvsim.profile_file import ProfileFile, load_profile_file, shipped

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
"""Okabe and Ito's, which colour-blind readers tell apart."""
PLOTTED_ROWS = 4000


def find_profile(name: str) -> ProfileFile:
    """By a shipped name or by path."""
    there = shipped()
    if name in there:
        return load_profile_file(there[name])
    if is_path(name):
        return load_profile_file(Path(name).expanduser())
    raise InputError("profile", name, "must be a shipped profile or a path", "see kvsim list profiles")


def measured_rows(profile: ProfileFile, root: Path | None, csv: Path | None) -> list[MeasuredRow]:
    """The rows again: from the package, or from the CSV that the profile was made of."""
    gpu = load_gpu(profile.gpu)
    if csv is not None:
        found = plain_csv.read(csv, gpu, profile.engine, profile.engine_version)
    else:
        found = aiconfigurator.read(gpu, profile.engine, profile.engine_version, root)
    rows, _ = without_suspect(found.rows, found.rejected)
    return rows


class Comparison:
    """A profile's answers beside measurements, by Op kind and size class."""

    def __init__(self, profile: ProfileFile, rows: Sequence[MeasuredRow]) -> None:
        gpu = load_gpu(profile.gpu)
        answerer = MeasuredProfile(profile, gpu, gpu)
        known = [row for row in rows if answerer.knows(locate(row.op, gpu.num_sms), True)]
        self.measured_s = np.array([row.seconds for row in known])
        self.predicted_s = np.array([answerer.answer(row.op).seconds for row in known])
        self.labels = [f"{row.op.kind} {name}" for row, name in zip(known, size_classes(gpu, known), strict=True)]
        self.kinds = [row.op.kind for row in known]

    def lines(self) -> list[tuple[str, str, str, str, str, str]]:
        """(class, rows, mean, median, 90 % and signed mean of predicted / measured - 1) by class."""
        errors, found = self.predicted_s / self.measured_s - 1.0, []
        labels = np.array(self.labels)
        for label in sorted(set(self.labels)):
            chosen = errors[labels == label]
            size = np.abs(chosen)
            found.append((
                label, f"{len(chosen):,}", f"{size.mean():.1%}", f"{np.median(size):.1%}", f"{np.percentile(size, 90):.1%}",
                f"{chosen.mean():+.1%}",
            ))  # fmt: skip
        return found

    def plot(self, folder: Path, title: str) -> list[Path]:
        """One figure a kind: predicted against measured, and their ratio by size; PNG files, written whole or not at all."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        folder.mkdir(parents=True, exist_ok=True)
        written = []
        kinds, labels = np.array(self.kinds), np.array(self.labels)
        for kind in sorted(set(self.kinds)):
            figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
            for colour, label in zip(COLOURS * 4, sorted(set(labels[kinds == kind])), strict=False):
                chosen = np.flatnonzero(labels == label)
                chosen = chosen[:: max(1, len(chosen) // PLOTTED_ROWS)]
                measured_us, predicted_us = self.measured_s[chosen] * 1e6, self.predicted_s[chosen] * 1e6
                left.loglog(measured_us, predicted_us, ".", ms=3, color=colour, label=label.removeprefix(f"{kind} "))
                right.semilogx(measured_us, 100 * (predicted_us / measured_us - 1), ".", ms=3, color=colour)
            ends = left.get_xlim()
            left.plot(ends, ends, color="#666666", lw=1)
            right.axhline(0, color="#666666", lw=1)
            left.set(xlabel="measured, µs", ylabel="predicted, µs", title=f"{kind}: {title}")
            right.set(xlabel="measured, µs", ylabel="predicted / measured - 1, %", ylim=(-50, 50))
            left.legend(markerscale=4, fontsize=8)
            path = folder / f"{kind}.png"
            partial = path.with_suffix(".partial.png")
            figure.savefig(partial, dpi=110)
            plt.close(figure)
            partial.replace(path)
            written.append(path)
        return written


def stored_lines(profile: ProfileFile) -> list[tuple[str, str, str, str, str, str]]:
    """(class, rows, shapes, mean error, 16-84 % band, 2.5-97.5 % band) of the profile's file, shapes held out."""
    found = []
    for (kind, name), error in profile.errors.items():
        q = [f"{np.expm1(value):+.1%}" for value in error.quantiles]
        found.append(
            (f"{kind} {name}", f"{error.num_rows:,}", str(error.num_shapes), f"{error.mape:.1%}", f"{q[1]} .. {q[2]}", f"{q[0]} .. {q[3]}")
        )
    return found
