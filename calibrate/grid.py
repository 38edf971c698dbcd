"""Penalised least squares for corrections: sums of piecewise linear tables, smooth where rows are few, near 0 where there are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sparse
from scipy.linalg import solve
from scipy.sparse.linalg import LinearOperator, cg

from kvsim.correction import Correction, Term

RIDGE = 1e-3
"""Pull of every number towards 0, in rows: what no row says anything about stays with the physics."""
LATER_TERMS_RIDGE = 3.0
"""Later terms are for what the first cannot say, so they are pulled harder."""
OUTLIER_LOG = 0.15
"""Rows further off than this (16 %) count less, in proportion: tables hold single wild rows."""
ROUNDS = 3
DENSE_SIZE = 1500
"""Numbers that are solved for at once: a second's work."""
TOLERANCE, MAX_ITERATIONS = 1e-5, 20_000
"""Of the right side's length; numbers are stored in thousandths."""


@dataclass(frozen=True)
class TermSpec:
    """A term to fit. where: coordinates; knots: log2 along each; smooth: weight of squared second differences along each."""

    where: tuple[int, ...]
    knots: tuple[np.ndarray, ...]
    smooth: tuple[float, ...]

    @property
    def size(self) -> int:
        return int(np.prod([len(axis) for axis in self.knots]))


def fit_correction(
    places: np.ndarray, log_ratios: np.ndarray, specs: Sequence[TermSpec], centred: bool = False
) -> Correction:
    """places: [rows, coordinates] log2; log_ratios: [rows] log(measured / physics).

    centred: what no row says anything about stays with the rows' median ratio instead of the physics.
    """
    centre = float(np.median(log_ratios)) if centred else 0.0
    log_ratios = log_ratios - centre
    design = sparse.hstack([_design(places, spec) for spec in specs]).tocsr()
    penalty = sparse.block_diag(
        [_penalty(spec, RIDGE * (LATER_TERMS_RIDGE if i else 1.0)) for i, spec in enumerate(specs)]
    )
    penalty = penalty.tocsr()
    weights, solution = np.ones(len(log_ratios)), np.zeros(design.shape[1])
    for _ in range(ROUNDS):
        weighted = design.multiply(weights[:, None]).tocsr()
        solution = _solve((design.T @ weighted + penalty).tocsr(), weighted.T @ log_ratios, solution)
        weights = OUTLIER_LOG / np.maximum(OUTLIER_LOG, np.abs(log_ratios - design @ solution))
    solution[: specs[0].size] += centre  # weights of a term sum to 1 everywhere
    terms, start = [], 0
    for spec in specs:
        terms.append(Term(spec.where, [axis.tolist() for axis in spec.knots], solution[start : start + spec.size].tolist()))
        start += spec.size
    return Correction(terms)


def _solve(matrix: sparse.csr_matrix, right: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The matrix is symmetric and positive definite. Conjugate gradients where it is large, as no factor of it is sparse."""
    if len(right) <= DENSE_SIZE:
        return np.asarray(solve(matrix.toarray(), right, assume_a="pos"))
    diagonal = matrix.diagonal()
    scaled = LinearOperator(matrix.shape, matvec=lambda x: x / diagonal)
    solution, failed = cg(matrix, right, start, rtol=TOLERANCE, maxiter=MAX_ITERATIONS, M=scaled)
    if failed:
        raise ArithmeticError(f"the fit of {len(right)} numbers did not converge in {MAX_ITERATIONS} iterations")
    return solution


def evaluate(correction: Correction, places: np.ndarray) -> np.ndarray:
    """`Correction.at` of many places: log ratios [rows]."""
    total = np.zeros(len(places))
    for term in correction.terms:
        spec = TermSpec(term.where, tuple(np.array(axis) for axis in term.knots), ())
        total += _design(places, spec) @ np.array(term.values)
    return total


def _design(places: np.ndarray, spec: TermSpec) -> sparse.csr_matrix:
    """Weights of the knots for each place: rows sum to 1."""
    rows = len(places)
    index, weight = np.zeros((rows, 1), np.int64), np.ones((rows, 1))
    for which, knots in zip(spec.where, spec.knots, strict=True):
        cell = np.clip(np.searchsorted(knots, places[:, which], side="right") - 1, 0, max(len(knots) - 2, 0))
        if len(knots) == 1:
            index = index * 1 + cell[:, None]
            continue
        share = np.clip((places[:, which] - knots[cell]) / (knots[cell + 1] - knots[cell]), 0.0, 1.0)
        index = (index[:, :, None] * len(knots) + np.stack([cell, cell + 1], 1)[:, None, :]).reshape(rows, -1)
        weight = (weight[:, :, None] * np.stack([1.0 - share, share], 1)[:, None, :]).reshape(rows, -1)
    where = np.repeat(np.arange(rows), index.shape[1])
    return sparse.csr_matrix((weight.ravel(), (where, index.ravel())), shape=(rows, spec.size))


def _penalty(spec: TermSpec, ridge: float) -> sparse.csr_matrix:
    total = ridge * sparse.identity(spec.size, format="csr")
    for axis, (knots, smooth) in enumerate(zip(spec.knots, spec.smooth, strict=True)):
        if len(knots) < 3 or smooth <= 0.0:
            continue
        matrix = sparse.identity(1)
        for other, others in enumerate(spec.knots):
            factor = _second_differences(knots) if other == axis else sparse.identity(len(others))
            matrix = sparse.kron(matrix, factor, format="csr")
        total = total + smooth * (matrix.T @ matrix)
    return total


def _second_differences(knots: np.ndarray) -> sparse.csr_matrix:
    """Divided second differences along unevenly spaced knots."""
    left, right = np.diff(knots)[:-1], np.diff(knots)[1:]
    diagonals = [2 / (left * (left + right)), -2 / (left * right), 2 / (right * (left + right))]
    return sparse.diags(diagonals, [0, 1, 2], shape=(len(knots) - 2, len(knots))).tocsr()
