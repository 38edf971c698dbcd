"""Runs of decode steps in closed form: what `StepCosts.decode_step` would say step after step, added up without visiting them.

Three cases, of which the first is nearly all of them: everything read grows in straight lines; the longest sequence may set the
pace; some sequences are in a short sawtooth.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

from kvsim.curves import Curve, steps_to_reach

if TYPE_CHECKING:
    from kvsim.batch import DecodeBatch
    from kvsim.cost import StepCosts
    from kvsim.pricing import BatchTable

_NEVER = 1 << 60


class Piece(NamedTuple):
    """Steps of straight length inside a run: `steps` steps, the first of `first_ps`, each `growth_ps` longer."""

    start_ps: int
    first_ps: int
    growth_ps: int
    steps: int


class Run(NamedTuple):
    """A run of decode steps: how many, how long together, and its pieces. Pieces of a sawtooth interleave."""

    steps: int
    elapsed_ps: int
    pieces: list[Piece]


def decode_run(costs: StepCosts, batch: DecodeBatch, limit_ps: int | None, max_steps: int) -> Run:
    """See `StepCosts.decode_run`."""
    table: BatchTable = costs.tables[batch.size]
    limit = _NEVER if limit_ps is None else limit_ps
    if batch.num_periodic:
        return _sawtooth(costs, batch, table, limit, max_steps)
    done = elapsed = 0
    pieces: list[Piece] = []
    if batch.acting:  # what policies do in the first step makes it unlike the others
        elapsed, done = costs.decode_step(batch), 1
        pieces.append(Piece(0, elapsed, 0, 1))
        if max_steps == 1 or elapsed >= limit:
            return Run(1, elapsed, pieces)
    if batch.size > 1 and _may_be_skewed(costs, batch, table):
        return _skewed(costs, batch, table, limit, max_steps, done, elapsed, pieces)
    return _straight(costs, batch, table, limit, max_steps, done, elapsed, pieces)


def _may_be_skewed(costs: StepCosts, batch: DecodeBatch, table: BatchTable) -> bool:
    """False where even the longest sequence at its end costs less alone than the batch does now."""
    for i, curve in enumerate(table.attention):
        bound = batch.longest_bound[i]
        alone = costs.alone_ps[i].get(bound)
        if alone is None:
            alone = costs.alone_ps[i][bound] = costs.single[i](bound)
        if alone > curve(batch.read[i]):
            return True
    return False


def _straight(
    costs: StepCosts, batch: DecodeBatch, table: BatchTable, limit: int, max_steps: int,
    done: int, elapsed: int, pieces: list[Piece],
) -> Run:  # fmt: skip
    floor_ps, host_ps = table.floor_ps, table.host_ps
    first_of_run, time_before = done, elapsed
    while done < max_steps:
        steps, first, slope = max_steps - done, table.fixed.total_ps, 0
        cells = []
        for i, curve in table.curves:
            d = batch.growth[i]
            x = batch.read[i] + d * done
            xs = curve.xs
            cell = bisect_right(xs, x) - 1
            m = curve.ms[cell]
            inside = x - xs[cell]
            first += curve.ys[cell] + m * inside
            if d:
                slope += m * d
                room = -((x - xs[cell + 1]) // d)  # steps that begin inside the cell
                if room < steps:
                    steps = room
            cells.append((curve, cell, inside, d))
        if first < floor_ps:
            if slope and first + slope * (steps - 1) > floor_ps:
                steps = -((first - floor_ps) // slope)  # the steps that stay below what the host takes
            first, slope = floor_ps, 0
        first += host_ps
        if limit < _NEVER:
            steps = steps_to_reach(limit - elapsed, first, slope, steps)
        pieces.append(Piece(elapsed, first, slope, steps))
        triangle = steps * (steps - 1) // 2
        elapsed += steps * first + slope * triangle
        done += steps
        for curve, cell, inside, d in cells:
            curve.count[cell] += steps
            curve.offset[cell] += steps * inside + d * triangle
        if elapsed >= limit:
            break
    table.fixed.times += done - first_of_run
    costs.busy_ps += elapsed - time_before
    return Run(done, elapsed, pieces)


# -- the longest sequence sets the pace ------------------------------------------------------------------------------


def _skewed(
    costs: StepCosts, batch: DecodeBatch, table: BatchTable, limit: int, max_steps: int,
    done: int, elapsed: int, pieces: list[Piece],
) -> Run:  # fmt: skip
    """Pieces also end where the longest sequence starts or stops to cost more alone than the batch together."""
    lines = [batch.longest_lines(i) for i in range(len(table.attention))]
    first_of_run, time_before = done, elapsed
    while done < max_steps:
        steps, first, slope = max_steps - done, table.fixed.total_ps, 0
        account: list[tuple[Curve, int, int]] = []
        ahead = ahead_slope = 0
        for i, curve in enumerate(table.attention):
            d = batch.growth[i]
            x = batch.read[i] + d * done
            a, b, room = _line(curve, x, d)
            longest, grows, leads = _leader(lines[i], done)
            alone_a, alone_b, alone_room = _line(costs.single[i], longest, grows)
            steps = min(steps, room, leads, alone_room)
            lead, gains = alone_a - a, alone_b - b
            if lead > 0:
                ahead, ahead_slope = ahead + lead, ahead_slope + gains
                if gains < 0:
                    steps = min(steps, -(-lead // -gains))  # while still ahead
            elif gains > 0:
                steps = min(steps, -lead // gains + 1)  # while not ahead yet
            first, slope = first + a, slope + b
            account.append((curve, x, d))
        for i, curve in table.others:
            d = batch.growth[i]
            x = batch.read[i] + d * done
            a, b, room = _line(curve, x, d)
            steps = min(steps, room)
            first, slope = first + a, slope + b
            account.append((curve, x, d))
        first, slope = first + ahead, slope + ahead_slope
        if first < table.floor_ps:
            if slope > 0 and first + slope * (steps - 1) > table.floor_ps:
                steps = -((first - table.floor_ps) // slope)
            first, slope = table.floor_ps, 0
        elif slope < 0 and first + slope * (steps - 1) < table.floor_ps:
            steps = (first - table.floor_ps) // -slope + 1
        first += table.host_ps
        if limit < _NEVER:
            steps = steps_to_reach(limit - elapsed, first, slope, steps)
        pieces.append(Piece(elapsed, first, slope, steps))
        triangle = steps * (steps - 1) // 2
        elapsed += steps * first + slope * triangle
        done += steps
        costs.attention_ps += steps * ahead + ahead_slope * triangle
        for curve, x, d in account:
            cell = bisect_right(curve.xs, x) - 1
            curve.count[cell] += steps
            curve.offset[cell] += steps * (x - curve.xs[cell]) + d * triangle
        if elapsed >= limit:
            break
    table.fixed.times += done - first_of_run
    costs.busy_ps += elapsed - time_before
    return Run(done, elapsed, pieces)


def _line(curve: Curve, x: int, d: int) -> tuple[int, int, int]:
    """(value, growth a step, steps until the next knot) of a curve at x when x grows by d a step."""
    cell = bisect_right(curve.xs, x) - 1
    m = curve.ms[cell]
    room = -(-(curve.xs[cell + 1] - x) // d) if d else _NEVER
    return curve.ys[cell] + m * (x - curve.xs[cell]), m * d, room


def _leader(lines: list[tuple[int, int]], offset: int) -> tuple[int, int, int]:
    """(value, growth, steps it leads) of the greatest of some straight lines from `offset` on."""
    value, slope = max((value + slope * offset, slope) for value, slope in lines)
    steps = _NEVER
    for other, steeper in lines:
        if steeper > slope:
            behind = value - (other + steeper * offset)
            steps = min(steps, behind // (steeper - slope) + 1)
    return value, slope, steps


# -- short sawtooths --------------------------------------------------------------------------------------------------


def _sawtooth(costs: StepCosts, batch: DecodeBatch, table: BatchTable, limit: int, max_steps: int) -> Run:
    """One period is costed step by step, then repeated while nothing else grows."""
    period, teeth, number = batch.period, batch.teeth, batch.num_periodic
    read, growth, units, curves = batch.read, batch.growth, batch.tooth_units, table.curves
    floor_ps, host_ps = table.floor_ps, table.host_ps
    skewed = batch.size > 1 and _may_be_skewed(costs, batch, table)
    flat = not any(growth)
    done = elapsed = 0
    pieces: list[Piece] = []
    while done < max_steps:
        residue = (batch.step + 1 + done) % period
        phases = batch.tooth_sum(residue)
        reached, lengths = elapsed, []
        charges: list[tuple[Curve, int, int]] = []  # curve, cell, units into the cell
        ahead_ps = 0
        for offset in range(done, min(done + period, max_steps)):
            device = table.fixed.total_ps
            for i, curve in curves:
                x = read[i] + growth[i] * offset + units[i] * phases
                cell = bisect_right(curve.xs, x) - 1
                x -= curve.xs[cell]
                device += curve.ys[cell] + curve.ms[cell] * x
                charges.append((curve, cell, x))
            if skewed:
                for i, curve in enumerate(table.attention):
                    value = curve(read[i] + growth[i] * offset + units[i] * phases)
                    ahead = max(0, costs.single[i](batch.longest(i, offset)) - value)
                    device += ahead
                    ahead_ps += ahead
            for i, by_residue in enumerate(batch.tooth_actions):
                slots = by_residue[residue]
                if not offset:  # what sequences do that have just turned happens in the run's first step alone
                    slots += batch.actions[i]
                if slots:
                    curve = costs.actions[i]
                    cell = bisect_right(curve.xs, slots) - 1
                    x = slots - curve.xs[cell]
                    device += curve.ys[cell] + curve.ms[cell] * x
                    charges.append((curve, cell, x))
            step = (device if device > floor_ps else floor_ps) + host_ps
            lengths.append(step)
            reached += step
            if reached >= limit:
                break
            residue = residue + 1 if residue + 1 < period else 0
            phases += number - period * teeth[residue]
        repeats = 1
        if flat and len(lengths) == period and reached < limit and (done or not batch.acting):
            repeats = (max_steps - done) // period
            if limit < _NEVER:  # whole periods that end before the limit
                repeats = min(repeats, (limit - elapsed - 1) // (reached - elapsed))
        start = elapsed
        for step in lengths:
            pieces.append(Piece(start, step, 0, repeats))
            if repeats == 1:
                start += step
        for curve, cell, x in charges:
            curve.count[cell] += repeats
            curve.offset[cell] += repeats * x
        costs.attention_ps += repeats * ahead_ps
        elapsed += repeats * (reached - elapsed)
        done += repeats * len(lengths)
        if elapsed >= limit:
            break
    table.fixed.times += done
    costs.busy_ps += elapsed
    return Run(done, elapsed, pieces)
