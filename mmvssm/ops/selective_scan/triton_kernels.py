"""Triton kernels of the selective scan. Needs Triton at import.

A program owns a tile of channels of one batch element and group, with all
their states, and walks a stretch of positions with the states in registers;
B and C are loaded once for the whole tile. Arguments are those of
``triton_plan.py``: ``inputs`` of the scan and ``work``, how it is divided.

A stretch is a whole number of chunks of CHUNK positions. Those behind the end of
the sequence are masked: a step of zero leaves the state as it is.

What is scanned may be a map of ``work.height`` rows, in the order of the image in
memory. ROUTE is the order to scan it in: 0 row by row (so is a plain sequence), 1
column by column, 2 and 3 the same from the end. Any other order is in
``work.table``, the places of all positions; a place below 0 is padded: there u, B,
C and the low-rank steps are zero, and nothing is stored. In the kernels positions
are counted along the order, t is the place of one in memory, ``inside`` says that
the position is not behind the end, and ``there`` that it has a place, too.

With a RANK the steps are not in ``inputs.delta`` but the products of RANK numbers
in it with ``inputs.delta_weight``.
"""

from typing import Any, NamedTuple

import triton.language as tl

from mmvssm.ops.triton.functions import (
    FLOAT32_MAX,
    LN_2,
    LOG2_E,
    jit,
    load,
    nothing,
    sigmoid,
    softplus,
)


class Tile(NamedTuple):
    """What a program owns, and what it loads once.

    Attributes:
        batch, group, number, stretch: Which ones of each.
        channels, valid: Numbers of the channels (BLOCK_D,) and their mask.
        states, real: Numbers of the states (BLOCK_N,) and their mask.
        mask: Of both, (BLOCK_N, BLOCK_D).
        rates: A log2(e), (BLOCK_N, BLOCK_D): exp2 of it is what hardware has.
        skip, shift: D and the bias of the steps (BLOCK_D,).
        factors: RANK rows (BLOCK_D,) of the weight of the steps.
    """

    batch: Any
    group: Any
    number: Any
    stretch: Any
    channels: Any
    valid: Any
    states: Any
    real: Any
    mask: Any
    rates: Any
    skip: Any
    shift: Any
    factors: Any


@jit
def _tile(
    inputs: tl.tuple,
    work: tl.tuple,
    STATES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RANK: tl.constexpr,
) -> Tile:
    """The tile of this program."""
    index = tl.program_id(0).to(tl.int64)
    stretch = index % work.stretches
    index = index // work.stretches
    number = index % work.tiles
    index = index // work.tiles
    group = index % work.groups
    inside = number * BLOCK_D + tl.arange(0, BLOCK_D)
    channels = group * work.group_size + inside
    valid = inside < work.group_size
    states = tl.arange(0, BLOCK_N).to(tl.int64)
    real = states < STATES
    mask = real[:, None] & valid[None, :]
    by_channel, by_state = inputs.A.strides
    places = channels[None, :] * by_channel + states[:, None] * by_state
    factors = nothing()
    for r in tl.static_range(RANK):
        factors = factors + (_load_vector(inputs.delta_weight, channels, valid, r),)
    return Tile(
        index // work.groups,
        group,
        number,
        stretch,
        channels,
        valid,
        states,
        real,
        mask,
        load(inputs.A.pointer + places, mask) * LOG2_E,
        _load_vector(inputs.D, channels, valid, 0),
        _load_vector(inputs.delta_bias, channels, valid, 0),
        factors,
    )


@jit
def _load_vector(
    x: tl.tuple, channels: tl.tensor, valid: tl.tensor, column: tl.tensor
) -> Any:
    """A column of a parameter of the channels (BLOCK_D,), zeros for None."""
    if x is None:
        return tl.zeros(channels.shape, tl.float32)
    else:
        places = x.pointer + channels * x.strides[0]
        if len(x.strides) == 2:
            places += column * x.strides[1]
        return load(places, valid)


@jit
def _place(position: tl.tensor, work: tl.tuple, ROUTE: tl.constexpr) -> Any:
    """The place of a position in memory."""
    if work.table is not None:
        inside = position < work.length
        place = tl.load(work.table + position, mask=inside, other=0)
        return place.to(tl.int64)
    if ROUTE >= 2:
        position = work.length - 1 - position
    if ROUTE % 2 == 1:
        row = position % work.height
        position = row * work.width + position // work.height
    return position


@jit
def _next(
    t: tl.tensor, position: tl.tensor, work: tl.tuple, ROUTE: tl.constexpr
) -> Any:
    """The place of a position that follows the one at t, without a division."""
    if work.table is not None:
        return _place(position, work, ROUTE)
    step = work.width if ROUTE % 2 == 1 else 1
    t = t - step if ROUTE >= 2 else t + step
    if ROUTE == 1:
        t = tl.where(t < work.length, t, t - (work.length - 1))
    if ROUTE == 3:
        t = tl.where(t >= 0, t, t + (work.length - 1))
    return t


@jit
def _walk(
    first: tl.tensor, work: tl.tuple, ROUTE: tl.constexpr, COUNT: tl.constexpr
) -> Any:
    """Places of COUNT positions, of no meaning behind the end of the sequence."""
    t = _place(first, work, ROUTE)
    found = nothing()
    for i in tl.static_range(COUNT):
        found = found + (t,)
        if i < COUNT - 1:
            t = _next(t, first + i + 1, work, ROUTE)
    return found


@jit
def _there(t: tl.tensor, inside: tl.tensor, work: tl.tuple) -> Any:
    """Whether a position inside has a place."""
    if work.table is not None:
        inside = (t >= 0) & inside
    return inside


@jit
def _places(x: tl.tuple, tile: Tile, t: tl.tensor) -> Any:
    """Pointers to the channels (BLOCK_D,) at position t.

    What is not of the channels stays a scalar: it takes no register of a thread.
    """
    here = x.pointer + tile.batch * x.strides[0] + t * x.strides[2]
    return here + tile.channels * x.strides[1]


@jit
def _store(
    x: tl.tuple, tile: Tile, t: tl.tensor, values: tl.tensor, mask: tl.tensor
) -> None:
    """Store the channels at position t in the dtype of the array."""
    tl.store(_places(x, tile, t), values.to(x.pointer.dtype.element_ty), mask)


@jit
def _load_weights(x: tl.tuple, tile: Tile, t: tl.tensor, there: tl.tensor) -> Any:
    """B or C at place t, (BLOCK_N,)."""
    by_batch, by_group, by_state, by_position = x.strides
    here = x.pointer + tile.batch * by_batch + tile.group * by_group + t * by_position
    return load(here + tile.states * by_state, tile.real & there)


@jit
def _load_steps(
    inputs: tl.tuple,
    tile: Tile,
    t: tl.tensor,
    inside: tl.tensor,
    there: tl.tensor,
    SOFTPLUS: tl.constexpr,
    RANK: tl.constexpr,
) -> Any:
    """Step sizes before the softplus, and after it zero outside."""
    raw = tile.shift
    if RANK == 0:
        raw += load(_places(inputs.delta, tile, t), tile.valid & there)
    else:
        x = inputs.delta
        row = x.pointer + tile.batch * x.strides[0] + t * x.strides[2]
        for r in tl.static_range(RANK):
            raw += load(row + r * x.strides[1], there) * tile.factors[r]
    dt = softplus(raw) if SOFTPLUS else raw
    return raw, tl.where(tile.valid & inside, dt, 0.0)


@jit
def _load_fed(
    inputs: tl.tuple,
    tile: Tile,
    t: tl.tensor,
    inside: tl.tensor,
    there: tl.tensor,
    SOFTPLUS: tl.constexpr,
    RANK: tl.constexpr,
) -> Any:
    """What feeds the state: u, the steps before and after softplus, B."""
    x = load(_places(inputs.u, tile, t), tile.valid & there)
    raw, dt = _load_steps(inputs, tile, t, inside, there, SOFTPLUS, RANK)
    return x, raw, dt, _load_weights(inputs.B, tile, t, there)


@jit
def _advance(
    h: tl.tensor, tile: Tile, x: tl.tensor, dt: tl.tensor, B: tl.tensor
) -> Any:
    """The recurrence: exp(Δ A) h + Δ B x."""
    return tl.exp2(dt[None, :] * tile.rates) * h + B[:, None] * (dt * x)[None, :]


@jit
def _state_places(
    x: tl.tensor, index: tl.tensor, tile: Tile, work: tl.tuple, STATES: tl.constexpr
) -> Any:
    """Pointers into contiguous states (index, batch, channels, STATES)."""
    row = (index * work.batch + tile.batch) * (work.groups * work.group_size)
    return x + (row + tile.channels[None, :]) * STATES + tile.states[:, None]


@jit
def _load_state(
    x: tl.tensor, index: tl.tensor, tile: Tile, work: tl.tuple, STATES: tl.constexpr
) -> Any:
    """The state (BLOCK_N, BLOCK_D) number ``index``, zero below 0 or for None."""
    if x is None:
        return tl.zeros(tile.mask.shape, tl.float32)
    else:
        return load(
            _state_places(x, index, tile, work, STATES), tile.mask & (index >= 0)
        )


@jit
def _store_state(
    x: tl.tensor,
    index: tl.tensor,
    tile: Tile,
    work: tl.tuple,
    h: tl.tensor,
    STATES: tl.constexpr,
) -> None:
    """Store the state number ``index``, nothing below 0."""
    places = _state_places(x, index, tile, work, STATES)
    tl.store(places, h, tile.mask & (index >= 0))


@jit
def _totals(x: tl.tensor, stretch: tl.tensor, tile: Tile, work: tl.tuple) -> Any:
    """Pointers into numbers of the channels (stretches, batch, channels)."""
    row = (stretch * work.batch + tile.batch) * (work.groups * work.group_size)
    return x + row + tile.channels


@jit
def _ends(tile: Tile, work: tl.tuple) -> Any:
    """First position of the stretch, and the first one behind it."""
    begin = tile.stretch * work.stretch_length
    return begin, tl.minimum(begin + work.stretch_length, work.length)


@jit
def forward_kernel(
    inputs: tl.tuple,
    work: tl.tuple,
    out: tl.tuple,
    added: tl.tuple,
    total: tl.tuple,
    last_state: tl.tensor,
    saved: tl.tensor,
    starts: tl.tensor,
    ROUTE: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    RANK: tl.constexpr,
    STATES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Outputs and, unless None, the last state and the states before the chunks.

    ``added`` is added to what the scan gives, ``total`` (None for nowhere)
    takes the sum, ``out`` the sum gated by z and scaled. ``starts`` are the
    states before the stretches, None for zero.
    """
    tile = _tile(inputs, work, STATES, BLOCK_N, BLOCK_D, RANK)
    h = _load_state(starts, tile.stretch, tile, work, STATES)
    begin, end = _ends(tile, work)
    for number in range((end - begin + CHUNK - 1) // CHUNK):
        first = begin + number * CHUNK
        if saved is not None:
            _store_state(saved, first // CHUNK - 1, tile, work, h, STATES)
        ts = _walk(first, work, ROUTE, CHUNK)
        for i in tl.static_range(CHUNK):
            t = ts[i]
            inside = first + i < work.length
            there = _there(t, inside, work)
            here = tile.valid & there
            x, raw, dt, B = _load_fed(inputs, tile, t, inside, there, SOFTPLUS, RANK)
            h = _advance(h, tile, x, dt, B)
            C = _load_weights(inputs.C, tile, t, there)
            y = tl.sum(h * C[:, None], axis=0) + tile.skip * x
            if added is not None:
                y += load(_places(added, tile, t), here)
            if total is not None:
                _store(total, tile, t, y, here)
            if inputs.z is not None:
                gate = load(_places(inputs.z, tile, t), here)
                y *= gate * sigmoid(gate) * SCALE
            _store(out, tile, t, y, here)
    if last_state is not None:
        places = _state_places(last_state, 0, tile, work, STATES)
        tl.store(places, h, tile.mask & (end == work.length))


@jit
def forward_ends_kernel(
    inputs: tl.tuple,
    work: tl.tuple,
    ends: tl.tensor,
    steps: tl.tensor,
    ROUTE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    RANK: tl.constexpr,
    STATES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """States after the stretches from zero states, and their sums of steps."""
    tile = _tile(inputs, work, STATES, BLOCK_N, BLOCK_D, RANK)
    h = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    begin, end = _ends(tile, work)
    for number in range((end - begin + CHUNK - 1) // CHUNK):
        first = begin + number * CHUNK
        ts = _walk(first, work, ROUTE, CHUNK)
        for i in tl.static_range(CHUNK):
            t = ts[i]
            inside = first + i < work.length
            there = _there(t, inside, work)
            x, raw, dt, B = _load_fed(inputs, tile, t, inside, there, SOFTPLUS, RANK)
            h = _advance(h, tile, x, dt, B)
            total += dt
    _store_state(ends, tile.stretch, tile, work, h, STATES)
    tl.store(_totals(steps, tile.stretch, tile, work), total, tile.valid)


@jit
def join_kernel(
    inputs: tl.tuple,
    work: tl.tuple,
    stretches: tl.tensor,
    ends: tl.tensor,
    steps: tl.tensor,
    start: tl.tensor,
    REVERSE: tl.constexpr,
    STATES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Turn what each stretch adds to a zero state into what each one starts from.

    In place of ``ends``, one stretch after the other, the other way round with
    REVERSE. ``start`` (batch, channels, STATES) is what the first one starts
    from, None for zero. ``work`` is of one stretch.
    """
    tile = _tile(inputs, work, STATES, BLOCK_N, BLOCK_D, 0)
    h = _load_state(start, 0, tile, work, STATES)
    for number in range(stretches):
        stretch = number
        if REVERSE:
            stretch = stretches - 1 - number
        total = load(_totals(steps, stretch, tile, work), tile.valid)
        # An overflowing growth must not turn a zero state into NaN.
        decay = tl.minimum(tl.exp2(total[None, :] * tile.rates), FLOAT32_MAX)
        added = _load_state(ends, stretch, tile, work, STATES)
        _store_state(ends, stretch, tile, work, h, STATES)
        h = decay * h + added


@jit
def backward_ends_kernel(
    inputs: tl.tuple,
    work: tl.tuple,
    grad_out: tl.tuple,
    ends: tl.tensor,
    steps: tl.tensor,
    ROUTE: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    RANK: tl.constexpr,
    STATES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Gradients of the states before the stretches, if nothing came behind them."""
    tile = _tile(inputs, work, STATES, BLOCK_N, BLOCK_D, RANK)
    carry = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    begin, end = _ends(tile, work)
    chunks = (end - begin + CHUNK - 1) // CHUNK
    for back in range(chunks):
        first = begin + (chunks - 1 - back) * CHUNK
        ts = _walk(first, work, ROUTE, CHUNK)
        for i in tl.static_range(CHUNK):
            t = ts[CHUNK - 1 - i]
            inside = first + CHUNK - 1 - i < work.length
            there = _there(t, inside, work)
            here = tile.valid & there
            raw, dt = _load_steps(inputs, tile, t, inside, there, SOFTPLUS, RANK)
            grad_y = load(_places(grad_out, tile, t), here)
            if inputs.z is not None:
                gate = load(_places(inputs.z, tile, t), here)
                grad_y *= gate * sigmoid(gate) * SCALE
            C = _load_weights(inputs.C, tile, t, there)
            grad_h = carry + C[:, None] * grad_y[None, :]
            carry = tl.exp2(dt[None, :] * tile.rates) * grad_h
            total += dt
    _store_state(ends, tile.stretch, tile, work, carry, STATES)
    tl.store(_totals(steps, tile.stretch, tile, work), total, tile.valid)


@jit
def backward_kernel(
    inputs: tl.tuple,
    work: tl.tuple,
    saved: tl.tensor,
    grad_out: tl.tuple,
    carries: tl.tensor,
    added: tl.tuple,
    total: tl.tuple,
    grads: tl.tuple,
    ROUTE: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    RANK: tl.constexpr,
    STATES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    PART: tl.constexpr,
) -> None:
    """All gradients; those of A, B, C, D and the bias in parts to be summed.

    Chunks, and parts of PART positions in them, run backwards. For every part
    the states are computed once more, from the saved state before its chunk,
    and held in registers. ``carries`` are the gradients of the states after the
    stretches, None for zero. ``added`` is added to the gradient of u, ``total``
    is that of the forward kernel, None if it is the scan itself.
    """
    tile = _tile(inputs, work, STATES, BLOCK_N, BLOCK_D, RANK)
    # Parts of the gradients of B and C: (tiles, batch, groups, places, STATES).
    row = (tile.number * work.batch + tile.batch) * work.groups + tile.group
    row = row * (work.height * work.width) * STATES + tile.states
    carry = _load_state(carries, tile.stretch, tile, work, STATES)
    sum_A = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    sum_D = tl.zeros((BLOCK_D,), tl.float32)
    sum_bias = tl.zeros((BLOCK_D,), tl.float32)
    begin, end = _ends(tile, work)
    parts = (end - begin + PART - 1) // PART
    for back in range(parts):
        first = begin + (parts - 1 - back) * PART
        chunk = first // CHUNK
        h = _load_state(saved, chunk - 1, tile, work, STATES)
        start = chunk * CHUNK
        t = _place(start, work, ROUTE)
        for i in range(first - start):
            there = _there(t, True, work)
            x, raw, dt, B = _load_fed(inputs, tile, t, True, there, SOFTPLUS, RANK)
            h = _advance(h, tile, x, dt, B)
            t = _next(t, start + i + 1, work, ROUTE)
        before = nothing()
        ts = _walk(first, work, ROUTE, PART)
        for i in tl.static_range(PART):
            before = before + (h,)
            t = ts[i]
            inside = first + i < work.length
            there = _there(t, inside, work)
            x, raw, dt, B = _load_fed(inputs, tile, t, inside, there, SOFTPLUS, RANK)
            h = _advance(h, tile, x, dt, B)
        for i in tl.static_range(PART):
            t = ts[PART - 1 - i]
            if work.table is not None:
                # Read once more, which keeps registers free.
                t = _place(first + PART - 1 - i, work, ROUTE)
            inside = first + PART - 1 - i < work.length
            there = _there(t, inside, work)
            here = tile.valid & there
            x, raw, dt, B = _load_fed(inputs, tile, t, inside, there, SOFTPLUS, RANK)
            C = _load_weights(inputs.C, tile, t, there)
            grad_y = load(_places(grad_out, tile, t), here)
            if inputs.z is not None:
                gate = load(_places(inputs.z, tile, t), here)
                opened = sigmoid(gate)
                if grads.z is not None:
                    if total is None:
                        y = tl.sum(h * C[:, None], axis=0) + tile.skip * x
                    else:
                        y = load(_places(total, tile, t), here)
                    slope = opened * (1.0 + gate * (1.0 - opened))
                    _store(grads.z, tile, t, grad_y * y * slope * SCALE, here)
                grad_y *= gate * opened * SCALE
            grad_h = carry + C[:, None] * grad_y[None, :]
            places = row + t * STATES
            real = tile.real & there
            grad_C = tl.sum(h * grad_y[None, :], axis=1)
            tl.store(grads.C + places, grad_C, real)
            grad_B = tl.sum(grad_h * (dt * x)[None, :], axis=1)
            tl.store(grads.B + places, grad_B, real)
            grad_fed = tl.sum(grad_h * B[:, None], axis=0)
            h = before[PART - 1 - i]
            carry = tl.exp2(dt[None, :] * tile.rates) * grad_h
            # Of the exponent Δ A.
            grad_exponent = carry * h
            sum_A += grad_exponent * dt[None, :]
            grad_dt = tl.sum(grad_exponent * tile.rates, axis=0) * LN_2 + grad_fed * x
            if SOFTPLUS:
                grad_dt *= sigmoid(raw)
            grad_x = grad_fed * dt + tile.skip * grad_y
            sum_D += grad_y * x
            sum_bias += tl.where(tile.valid & inside, grad_dt, 0.0)
            if added is not None:
                grad_x += load(_places(added, tile, t), here)
            _store(grads.u, tile, t, grad_x, here)
            _store(grads.delta, tile, t, grad_dt, here)
    _store_state(grads.A, tile.stretch, tile, work, sum_A, STATES)
    if grads.D is not None:
        tl.store(_totals(grads.D, tile.stretch, tile, work), sum_D, tile.valid)
    if grads.delta_bias is not None:
        places = _totals(grads.delta_bias, tile.stretch, tile, work)
        tl.store(places, sum_bias, tile.valid)
