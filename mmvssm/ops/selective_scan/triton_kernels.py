"""Triton kernels of the selective scan. Needs Triton at import.

A program owns a tile of channels of one batch element and group, with all
their states, and walks a stretch of positions with the states in registers;
B and C are loaded once for the whole tile. Every array comes with its strides,
so that any layout is read in place: as a tuple (pointer, stride of the batch,
of the channel or group, ...), in the order of the array's axes.

A stretch is a whole number of chunks of CHUNK positions. Positions behind the
end of the sequence are masked: a step of zero leaves the state as it is.

The positions may be those of a map of ``height`` rows, in the order of the image
in memory. ROUTE is the order to scan them in: 0 row by row (so is a plain
sequence), 1 column by column, 2 and 3 the same from the end. With ADD, outputs
and gradients of u are added to what is there.
"""

import triton
import triton.language as tl

from mmvssm.ops.triton.functions import (
    FLOAT32_MAX,
    LN_2,
    LOG2_E,
    load,
    sigmoid,
    softplus,
)


@triton.jit
def _place(sizes, BLOCK_D: tl.constexpr):
    """Batch element, group, tile, stretch, channels of this program, their mask."""
    _, groups, group_size, tiles, stretches = sizes
    index = tl.program_id(0).to(tl.int64)
    stretch = index % stretches
    index = index // stretches
    tile = index % tiles
    index = index // tiles
    inside = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    group = index % groups
    return (
        index // groups,
        group,
        tile,
        stretch,
        group * group_size + inside,
        inside < group_size,
    )


@triton.jit
def _matrix(STATES: tl.constexpr, BLOCK_N: tl.constexpr, valid):
    """State numbers (BLOCK_N,), their mask, and the mask of (BLOCK_N, BLOCK_D)."""
    states = tl.arange(0, BLOCK_N).to(tl.int64)
    real = states < STATES
    return states, real, real[:, None] & valid[None, :]


@triton.jit
def _load_rates(A, channels, states, mask):
    """A log2(e), (BLOCK_N, BLOCK_D): exp2 of it is what the hardware has."""
    pointer, by_channel, by_state = A
    places = pointer + channels[None, :] * by_channel + states[:, None] * by_state
    return load(places, mask) * LOG2_E


@triton.jit
def _load_vector(x, channels, valid):
    """A parameter of the channels (BLOCK_D,), zeros for None."""
    if x is None:
        return tl.zeros(channels.shape, tl.float32)
    else:
        pointer, by_channel = x
        return load(pointer + channels * by_channel, valid)


@triton.jit
def _places(x, batch, channels, t):
    """Pointers to the channels (BLOCK_D,) at position t.

    What is not of the channels stays a scalar: it takes no register of a thread.
    """
    return x[0] + batch * x[1] + t * x[3] + channels * x[2]


@triton.jit
def _position(t, length, height, ROUTE: tl.constexpr):
    """Where the sequence's position t is in memory, see the head of the file."""
    if ROUTE >= 2:
        t = length - 1 - t
    if ROUTE % 2 == 1:
        t = t % height * (length // height) + t // height
    return t


@triton.jit
def _store(x, batch, channels, t, values, mask):
    """Store the channels at position t in the dtype of the array."""
    values = values.to(x[0].dtype.element_ty)
    tl.store(_places(x, batch, channels, t), values, mask)


@triton.jit
def _load_weights(x, batch, group, states, t, mask):
    """B or C at position t, (BLOCK_N,)."""
    pointer, by_batch, by_group, by_state, by_position = x
    here = pointer + batch * by_batch + group * by_group + t * by_position
    return load(here + states * by_state, mask)


@triton.jit
def _state_places(x, index, batch, sizes, channels, states, STATES: tl.constexpr):
    """Pointers into contiguous states (index, batch, channels, STATES)."""
    row = (index * sizes[0] + batch) * (sizes[1] * sizes[2])
    return x + (row + channels[None, :]) * STATES + states[:, None]


@triton.jit
def _load_steps(delta, batch, channels, t, shift, mask, SOFTPLUS: tl.constexpr):
    """Step sizes before the softplus, and after it zero where the mask is False."""
    raw = load(_places(delta, batch, channels, t), mask) + shift
    dt = softplus(raw) if SOFTPLUS else raw
    return raw, tl.where(mask, dt, 0.0)


@triton.jit
def _advance(h, dt, x, B, rates):
    """The recurrence: exp(Δ A) h + Δ B x."""
    return tl.exp2(dt[None, :] * rates) * h + B[:, None] * (dt * x)[None, :]


@triton.jit
def _load_state(x, index, batch, sizes, channels, states, mask, STATES: tl.constexpr):
    """The state (BLOCK_N, BLOCK_D) number ``index``, zero for one below 0."""
    places = _state_places(x, index, batch, sizes, channels, states, STATES)
    return load(places, mask & (index >= 0))


@triton.jit
def forward_kernel(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    bias,
    out,
    last_state,
    saved,
    starts,
    sizes,
    length,
    stretch_length,
    height,
    ROUTE: tl.constexpr,
    ADD: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    STATES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Outputs and, unless None, the last state and the states before the chunks.

    ``starts`` are the states before the stretches, None for zero.
    """
    batch, group, _, stretch, channels, valid = _place(sizes, BLOCK_D)
    states, real, mask = _matrix(STATES, BLOCK_N, valid)
    rates = _load_rates(A, channels, states, mask)
    skip = _load_vector(D, channels, valid)
    shift = _load_vector(bias, channels, valid)

    h = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if starts is not None:
        h = _load_state(starts, stretch, batch, sizes, channels, states, mask, STATES)
    begin = stretch * stretch_length
    end = tl.minimum(begin + stretch_length, length)
    for number in range((end - begin + CHUNK - 1) // CHUNK):
        first = begin + number * CHUNK
        if saved is not None:
            index = first // CHUNK - 1
            places = _state_places(saved, index, batch, sizes, channels, states, STATES)
            tl.store(places, h, mask & (index >= 0))
        for i in tl.static_range(CHUNK):
            inside = first + i < length
            here = valid & inside
            t = _position(first + i, length, height, ROUTE)
            x = load(_places(u, batch, channels, t), here)
            raw, dt = _load_steps(delta, batch, channels, t, shift, here, SOFTPLUS)
            B_t = _load_weights(B, batch, group, states, t, real & inside)
            h = _advance(h, dt, x, B_t, rates)
            C_t = _load_weights(C, batch, group, states, t, real & inside)
            y = tl.sum(h * C_t[:, None], axis=0) + skip * x
            if z is not None:
                gate = load(_places(z, batch, channels, t), here)
                y *= gate * sigmoid(gate)
            if ADD:
                y += load(_places(out, batch, channels, t), here)
            _store(out, batch, channels, t, y, here)
    if last_state is not None:
        places = _state_places(last_state, 0, batch, sizes, channels, states, STATES)
        tl.store(places, h, mask & (end == length))


@triton.jit
def forward_ends_kernel(
    u,
    delta,
    A,
    B,
    bias,
    ends,
    steps,
    sizes,
    length,
    stretch_length,
    height,
    ROUTE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    STATES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """States after the stretches from zero states, and their sums of steps."""
    batch, group, _, stretch, channels, valid = _place(sizes, BLOCK_D)
    states, real, mask = _matrix(STATES, BLOCK_N, valid)
    rates = _load_rates(A, channels, states, mask)
    shift = _load_vector(bias, channels, valid)

    h = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    begin = stretch * stretch_length
    end = tl.minimum(begin + stretch_length, length)
    for number in range((end - begin + CHUNK - 1) // CHUNK):
        first = begin + number * CHUNK
        for i in tl.static_range(CHUNK):
            inside = first + i < length
            here = valid & inside
            t = _position(first + i, length, height, ROUTE)
            x = load(_places(u, batch, channels, t), here)
            raw, dt = _load_steps(delta, batch, channels, t, shift, here, SOFTPLUS)
            B_t = _load_weights(B, batch, group, states, t, real & inside)
            h = _advance(h, dt, x, B_t, rates)
            total += dt
    places = _state_places(ends, stretch, batch, sizes, channels, states, STATES)
    tl.store(places, h, mask)
    _store_total(steps, total, stretch, batch, sizes, channels, valid)


@triton.jit
def _store_total(steps, total, stretch, batch, sizes, channels, valid):
    """Store a sum of steps into (stretches, batch, channels)."""
    row = (stretch * sizes[0] + batch) * (sizes[1] * sizes[2])
    tl.store(steps + row + channels, total, valid)


@triton.jit
def join_kernel(
    A,
    ends,
    steps,
    first,
    sizes,
    REVERSE: tl.constexpr,
    STATES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Turn what each stretch adds to a zero state into what each one starts from.

    In place of ``ends``, one stretch after the other, the other way round with
    REVERSE. ``first`` (batch, channels, STATES) is what the first one starts
    from, None for zero.
    """
    batch, _, _, _, channels, valid = _place(
        (sizes[0], sizes[1], sizes[2], sizes[3], 1), BLOCK_D
    )
    states, _, mask = _matrix(STATES, BLOCK_N, valid)
    rates = _load_rates(A, channels, states, mask)
    h = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if first is not None:
        h = _load_state(first, 0, batch, sizes, channels, states, mask, STATES)
    stretches = sizes[4]
    for number in range(stretches):
        stretch = number
        if REVERSE:
            stretch = stretches - 1 - number
        row = (stretch * sizes[0] + batch) * (sizes[1] * sizes[2])
        total = load(steps + row + channels, valid)
        # An overflowing growth must not turn a zero state into NaN.
        decay = tl.minimum(tl.exp2(total[None, :] * rates), FLOAT32_MAX)
        places = _state_places(ends, stretch, batch, sizes, channels, states, STATES)
        added = load(places, mask)
        tl.store(places, h, mask)
        h = decay * h + added


@triton.jit
def backward_ends_kernel(
    delta,
    A,
    C,
    z,
    bias,
    grad_out,
    ends,
    steps,
    sizes,
    length,
    stretch_length,
    height,
    ROUTE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    STATES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Gradients of the states before the stretches, if nothing came behind them."""
    batch, group, _, stretch, channels, valid = _place(sizes, BLOCK_D)
    states, real, mask = _matrix(STATES, BLOCK_N, valid)
    rates = _load_rates(A, channels, states, mask)
    shift = _load_vector(bias, channels, valid)

    carry = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    begin = stretch * stretch_length
    end = tl.minimum(begin + stretch_length, length)
    chunks = (end - begin + CHUNK - 1) // CHUNK
    for back in range(chunks):
        first = begin + (chunks - 1 - back) * CHUNK
        for i in tl.static_range(CHUNK):
            inside = first + CHUNK - 1 - i < length
            here = valid & inside
            t = _position(first + CHUNK - 1 - i, length, height, ROUTE)
            raw, dt = _load_steps(delta, batch, channels, t, shift, here, SOFTPLUS)
            grad_y = load(_places(grad_out, batch, channels, t), here)
            if z is not None:
                gate = load(_places(z, batch, channels, t), here)
                grad_y *= gate * sigmoid(gate)
            C_t = _load_weights(C, batch, group, states, t, real & inside)
            grad_h = carry + C_t[:, None] * grad_y[None, :]
            carry = tl.exp2(dt[None, :] * rates) * grad_h
            total += dt
    places = _state_places(ends, stretch, batch, sizes, channels, states, STATES)
    tl.store(places, carry, mask)
    _store_total(steps, total, stretch, batch, sizes, channels, valid)


@triton.jit
def backward_kernel(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    bias,
    saved,
    grad_out,
    carries,
    grad_u,
    grad_delta,
    grad_z,
    grad_B,
    grad_C,
    grad_A,
    grad_D,
    grad_bias,
    sizes,
    length,
    stretch_length,
    height,
    ROUTE: tl.constexpr,
    ADD: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    STATES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    PART: tl.constexpr,
):
    """All gradients; those of A, B, C, D and the bias in parts to be summed.

    Chunks, and parts of PART positions in them, run backwards. For every part
    the states are computed once more, from the saved state before its chunk,
    and held in registers. ``carries`` are the gradients of the states after the
    stretches, None for zero.
    """
    batch, group, tile, stretch, channels, valid = _place(sizes, BLOCK_D)
    states, real, mask = _matrix(STATES, BLOCK_N, valid)
    rates = _load_rates(A, channels, states, mask)
    # Parts of the gradients of B and C: (tiles, batch, groups, length, STATES).
    row = ((tile * sizes[0] + batch) * sizes[1] + group) * length * STATES + states
    skip = _load_vector(D, channels, valid)
    shift = _load_vector(bias, channels, valid)

    carry = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if carries is not None:
        carry = _load_state(
            carries, stretch, batch, sizes, channels, states, mask, STATES
        )
    sum_A = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    sum_D = tl.zeros((BLOCK_D,), tl.float32)
    sum_bias = tl.zeros((BLOCK_D,), tl.float32)
    begin = stretch * stretch_length
    end = tl.minimum(begin + stretch_length, length)
    parts = (end - begin + PART - 1) // PART
    for back in range(parts):
        first = begin + (parts - 1 - back) * PART
        chunk = first // CHUNK
        h = _load_state(saved, chunk - 1, batch, sizes, channels, states, mask, STATES)
        for i in range(first - chunk * CHUNK):
            t = _position(chunk * CHUNK + i, length, height, ROUTE)
            x = load(_places(u, batch, channels, t), valid)
            raw, dt = _load_steps(delta, batch, channels, t, shift, valid, SOFTPLUS)
            B_t = _load_weights(B, batch, group, states, t, real)
            h = _advance(h, dt, x, B_t, rates)
        before = ()
        for i in tl.static_range(PART):
            inside = first + i < length
            here = valid & inside
            t = _position(first + i, length, height, ROUTE)
            x = load(_places(u, batch, channels, t), here)
            raw, dt = _load_steps(delta, batch, channels, t, shift, here, SOFTPLUS)
            before = before + (h,)
            B_t = _load_weights(B, batch, group, states, t, real & inside)
            h = _advance(h, dt, x, B_t, rates)
        for i in tl.static_range(PART):
            inside = first + PART - 1 - i < length
            here = valid & inside
            t = _position(first + PART - 1 - i, length, height, ROUTE)
            x = load(_places(u, batch, channels, t), here)
            raw, dt = _load_steps(delta, batch, channels, t, shift, here, SOFTPLUS)
            B_t = _load_weights(B, batch, group, states, t, real & inside)
            C_t = _load_weights(C, batch, group, states, t, real & inside)
            decay = tl.exp2(dt[None, :] * rates)
            grad_y = load(_places(grad_out, batch, channels, t), here)
            if z is not None:
                gate = load(_places(z, batch, channels, t), here)
                opened = sigmoid(gate)
                y = tl.sum(h * C_t[:, None], axis=0) + skip * x
                grad_gate = grad_y * y * opened * (1.0 + gate * (1.0 - opened))
                _store(grad_z, batch, channels, t, grad_gate, here)
                grad_y *= gate * opened
            grad_h = carry + C_t[:, None] * grad_y[None, :]
            part = row + t * STATES
            tl.store(grad_C + part, tl.sum(h * grad_y[None, :], axis=1), real & inside)
            tl.store(
                grad_B + part,
                tl.sum(grad_h * (dt * x)[None, :], axis=1),
                real & inside,
            )
            grad_fed = tl.sum(grad_h * B_t[:, None], axis=0)
            h = before[PART - 1 - i]
            carry = decay * grad_h
            # Of the exponent Δ A.
            grad_exponent = carry * h
            sum_A += grad_exponent * dt[None, :]
            grad_dt = tl.sum(grad_exponent * rates, axis=0) * LN_2 + grad_fed * x
            if SOFTPLUS:
                grad_dt *= sigmoid(raw)
            grad_x = grad_fed * dt + skip * grad_y
            sum_D += grad_y * x
            sum_bias += tl.where(here, grad_dt, 0.0)
            if ADD:
                grad_x += load(_places(grad_u, batch, channels, t), here)
            _store(grad_u, batch, channels, t, grad_x, here)
            _store(grad_delta, batch, channels, t, grad_dt, here)
    places = _state_places(grad_A, stretch, batch, sizes, channels, states, STATES)
    tl.store(places, sum_A, mask)
    if D is not None:
        _store_total(grad_D, sum_D, stretch, batch, sizes, channels, valid)
    if bias is not None:
        _store_total(grad_bias, sum_bias, stretch, batch, sizes, channels, valid)
