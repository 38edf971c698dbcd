"""Runs of decode steps in closed form: what `StepCosts.decode_step` would say step after step, added up without visiting them.

Three cases, of which the first is nearly all of them: everything read grows in straight lines; the longest sequence may set the
pace; some sequences are in a short sawtooth.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

from kvsim.cost_types import Piece, Run
from kvsim.curves import Curve, steps_to_reach

if TYPE_CHECKING:
    from kvsim.batch import DecodeBatch
    from kvsim.cost import StepCosts
    from kvsim.pricing import BatchTable

_NEVER = 1 << 60


def decode_run(costs: StepCosts, batch: DecodeBatch, limit_ps: int | None, max_steps: int, decided: bool = False) -> Run:
    """Decode steps from the batch's next one on: `max_steps`, or fewer where an arrival `limit_ps` ahead is noticed.

    The run ends with the first step that ends at or after the arrival. No sequence may finish or turn before its
    last step. Equals that many calls of `StepCosts.decode_step`, to the picosecond.

    decided: the step after that one is decided on already, and may be part of the run.
    """
    table: BatchTable = costs.tables[batch.size]
    limit = _NEVER if limit_ps is None else limit_ps
    if batch.num_periodic:
        return _sawtooth(costs, batch, table, limit, max_steps)
    if table.lone is not None and not batch.acting:
        return _lone(costs, batch, table, table.lone, limit, max_steps, decided)
    done = elapsed = 0
    pieces: list[Piece] = []
    if batch.acting:  # what policies do in the first step makes it unlike the others
        elapsed, done = costs.decode_step(batch), 1
        pieces.append((0, elapsed, 0, 1))
        if max_steps == 1 or elapsed >= limit:
            return 1, elapsed, pieces
    if batch.size > 1 and _may_be_skewed(costs, batch, table):
        return _skewed(costs, batch, table, limit, max_steps, done, elapsed, pieces)
    return _straight(costs, batch, table, limit, max_steps, done, elapsed, pieces)


def _alone_ps(costs: StepCosts, layer_group: int, units: int) -> int:
    """Attention of one sequence alone that reads so many units; the same few are asked again and again."""
    memo = costs.alone_ps[layer_group]
    value = memo.get(units)
    if value is None:
        value = memo[units] = costs.single[layer_group](units)
    return value


def _may_be_skewed(costs: StepCosts, batch: DecodeBatch, table: BatchTable) -> bool:
    """False where even the longest sequence at its end costs less alone than the batch does now."""
    read, bounds = batch.read, batch.longest_bound
    return any(_alone_ps(costs, i, bounds[i]) > curve(read[i]) for i, curve in enumerate(table.attention))


def _straight(
    costs: StepCosts, batch: DecodeBatch, table: BatchTable, limit: int, max_steps: int,
    done: int, elapsed: int, pieces: list[Piece],
) -> Run:  # fmt: skip
    """Every curve is followed along its cells; a piece ends where one of them comes to a knot."""
    read, growth = batch.read, batch.growth
    first_of_run, time_before = done, elapsed
    while done < max_steps and elapsed < limit:
        steps, first, slope = max_steps - done, table.fixed.total_ps, 0
        cells = []
        for i, curve in table.curves:
            d = growth[i]
            x = read[i] + d * done
            cell = bisect_right(curve.xs, x) - 1
            if d:
                slope += curve.ms[cell] * d
                steps = min(steps, -((x - curve.xs[cell + 1]) // d))  # steps that begin inside the cell
            x -= curve.xs[cell]
            first += curve.ys[cell] + curve.ms[cell] * x
            cells.append((curve, cell, x, d))
        if first < table.floor_ps:
            if slope and first + slope * (steps - 1) > table.floor_ps:
                steps = -((first - table.floor_ps) // slope)  # the steps that stay below what the host takes
            first, slope = table.floor_ps, 0
        first += table.host_ps
        steps = steps_to_reach(limit - elapsed, first, slope, steps)
        pieces.append((elapsed, first, slope, steps))
        triangle = steps * (steps - 1) // 2
        elapsed += steps * first + slope * triangle
        done += steps
        for curve, cell, x, d in cells:
            curve.count[cell] += steps
            curve.offset[cell] += steps * x + d * triangle
    table.fixed.times += done - first_of_run
    costs.busy_ps += elapsed - time_before
    return done, elapsed, pieces


def _lone(
    costs: StepCosts, batch: DecodeBatch, table: BatchTable, curve: Curve, limit: int, max_steps: int, decided: bool
) -> Run:
    """`_straight` over one scalar, which is what nearly every run is: written out, since whole simulations hang on it."""
    xs, d, x = curve.xs, batch.growth[0], batch.read[0]
    cell = bisect_right(xs, x) - 1
    m = curve.ms[cell]
    inside = x - xs[cell]
    first = curve.ys[cell] + m * inside
    if batch.size > 1:
        attention = first if curve is table.attention[0] else table.attention[0](x)
        if _alone_ps(costs, 0, batch.longest_bound[0]) > attention:
            return _skewed(costs, batch, table, limit, max_steps, 0, 0, [])
    done = elapsed = 0
    pieces: list[Piece] = []
    fixed, floor_ps = table.fixed, table.floor_ps
    while True:
        steps, first, slope = max_steps - done, first + fixed.total_ps, m * d
        if d:
            room = -((x - xs[cell + 1]) // d)
            if room < steps:
                steps = room
        if first < floor_ps:
            if slope and first + slope * (steps - 1) > floor_ps:
                steps = -((first - floor_ps) // slope)
            first, slope = floor_ps, 0
        first += table.host_ps
        triangle = steps * (steps - 1) // 2
        ends = elapsed + steps * first + slope * triangle
        if ends > limit:
            reached = steps_to_reach(limit - elapsed, first, slope, steps)
            steps = reached + 1 if decided and reached < steps else reached
            triangle = steps * (steps - 1) // 2
            ends = elapsed + steps * first + slope * triangle
        pieces.append((elapsed, first, slope, steps))
        curve.count[cell] += steps
        curve.offset[cell] += steps * inside + d * triangle
        elapsed = ends
        done += steps
        if done == max_steps or elapsed >= limit:
            fixed.times += done
            costs.busy_ps += elapsed
            return done, elapsed, pieces
        x += d * steps
        cell = bisect_right(xs, x) - 1
        m = curve.ms[cell]
        inside = x - xs[cell]
        first = curve.ys[cell] + m * inside


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
        pieces.append((elapsed, first, slope, steps))
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
    return done, elapsed, pieces


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
    """One period is costed step by step, then repeated while nothing else grows. Plans with sawtooths have one scalar."""
    period, teeth, number, curve = batch.period, batch.teeth, batch.num_periodic, table.lone
    assert curve is not None
    xs, ys, ms = curve.xs, curve.ys, curve.ms
    base, growth, unit = batch.read[0], batch.growth[0], batch.tooth_units[0]
    fixed_ps, floor_ps, host_ps = table.fixed.total_ps, table.floor_ps, table.host_ps
    skewed = batch.size > 1 and _may_be_skewed(costs, batch, table)
    done = elapsed = 0
    pieces: list[Piece] = []
    while done < max_steps:
        residue = (batch.step + 1 + done) % period
        phases = batch.tooth_sum(residue)
        reached, lengths, cells, ahead_ps = elapsed, [], [], 0
        acted: list[tuple[Curve, int, int]] = []  # curve, cell, units into the cell
        for offset in range(done, min(done + period, max_steps)):
            x = base + growth * offset + unit * phases
            cell = bisect_right(xs, x) - 1
            inside = x - xs[cell]
            device = fixed_ps + ys[cell] + ms[cell] * inside
            cells.append((cell, inside))
            if skewed:
                ahead = costs.single[0](batch.longest(0, offset)) - table.attention[0](x)
                if ahead > 0:
                    device += ahead
                    ahead_ps += ahead
            if teeth[residue] or not offset:  # what sequences do that have just turned happens in the run's first step alone
                for i, by_residue in enumerate(batch.tooth_actions):
                    slots = by_residue[residue] if offset else by_residue[residue] + batch.actions[i]
                    if slots:
                        action = costs.actions[i]
                        cell = bisect_right(action.xs, slots) - 1
                        inside = slots - action.xs[cell]
                        device += action.ys[cell] + action.ms[cell] * inside
                        acted.append((action, cell, inside))
            step = (device if device > floor_ps else floor_ps) + host_ps
            lengths.append(step)
            reached += step
            if reached >= limit:
                break
            residue = residue + 1 if residue + 1 < period else 0
            phases += number - period * teeth[residue]
        repeats = 1
        if not growth and len(lengths) == period and reached < limit and (done or not batch.acting):
            repeats = (max_steps - done) // period
            if limit < _NEVER:  # whole periods that end before the limit
                repeats = min(repeats, (limit - elapsed - 1) // (reached - elapsed))
        start = elapsed
        for step in lengths:
            pieces.append((start, step, 0, repeats))
            if repeats == 1:
                start += step
        for cell, inside in cells:
            curve.count[cell] += repeats
            curve.offset[cell] += repeats * inside
        for action, cell, inside in acted:
            action.count[cell] += repeats
            action.offset[cell] += repeats * inside
        costs.attention_ps += repeats * ahead_ps
        elapsed += repeats * (reached - elapsed)
        done += repeats * len(lengths)
        if elapsed >= limit:
            break
    table.fixed.times += done
    costs.busy_ps += elapsed
    return done, elapsed, pieces
