"""The implicit matrix product behind ``conv_bn_act`` and ``conv_dgrad``.

Rows are output pixels, columns output channels of one group, and the sum runs over the taps of the
kernel and the input channels of the group. Images and weights are channels_last, so that both
operands are read along channels. The gradient of an input is the same product with input and output
exchanged; with a stride it falls into phases, pixels of equal remainder, which each read their own
taps of the kernel and are one axis of the launch.
"""

import triton
import triton.language as tl

from . import tiles


@triton.jit
def operand(
    x,
    other,
    scale,
    slope,
    shift,
    center,
    channel,
    present,
    RELU: tl.constexpr,
):
    """``relu(x * scale + other * slope + shift) - center``, rounded to x's type before and behind
    the subtraction, of tiles whose columns are channels.

    Any but x may be None; the others are a tile and vectors. ``present``: the channels there are.
    """
    z = tiles.wide(x)
    if scale is not None:
        z = z * tl.load(scale + channel, mask=present, other=0.0)[None, :]
    if other is not None:
        z = z + tiles.wide(other) * tl.load(slope + channel, mask=present, other=0.0)[None, :]
    if shift is not None:
        z = z + tl.load(shift + channel, mask=present, other=0.0)[None, :]
    z = tiles.activate(z, RELU).to(x.dtype)
    if center is not None:
        about = tl.load(center + channel, mask=present, other=0.0)[None, :]
        z = (tiles.wide(z) - about).to(x.dtype)
    return z


@triton.jit
def phase_taps(
    phase,
    offset,
    KERNEL: tl.constexpr,
    PHASES: tl.constexpr,
    DILATION: tl.constexpr,
    SPARSE: tl.constexpr,
):
    """Along one dimension: the first of a phase's taps, how many they are, ``SPARSE`` apart, and
    the place that its first row reads by the first tap."""
    start = 0
    if PHASES > 1:
        start = KERNEL
        for tap in tl.static_range(min(SPARSE, KERNEL)):
            # (phase + offset - tap * DILATION) divides, said without a negative dividend.
            divides = (phase + offset + tap * (PHASES - 1) * DILATION) % PHASES == 0
            start = tl.where(divides, tap, start)
    taps = (KERNEL - start + SPARSE - 1) // SPARSE
    return start, taps, (phase + offset - start * DILATION) // PHASES


@triton.jit
def conv_gemm(
    x,  # images, [batch, x_h, x_w, groups * reduced]
    in_other,  # prologue, by input channel, see operand; in_other as x
    in_scale,
    in_slope,
    in_shift,
    weight,  # of the convolution, channels_last
    x2,  # images, [batch, x2_h, x2_w, x2's channels], whose product with weight2 is added; or None
    x2_scale,  # its prologue
    x2_shift,
    x2_center,
    weight2,  # as weight is, of one tap and one group
    scale2,  # by output channel, of that product; or None
    scale,  # epilogue, by output channel; or None
    shift,
    residual,  # as out, see SPREAD; or None; may be out itself
    mask_x,  # as out: out passes only where relu(mask_x * mask_scale + mask_shift) does; or None
    mask_scale,
    mask_shift,
    mask_mean,
    out,  # images, [batch, out_h, out_w, groups * columns]; see SUMS
    first,  # of each tile's rows, [tiles, groups * columns]: mean and squared deviations; with a
    second,  # mask, sums of out and of out * (mask_x - mask_mean); or None
    batch,
    x_h,
    x_w,
    out_h,
    out_w,
    offset_h,
    offset_w,
    groups,
    reduced_units,  # channels of a group of x, in units of REDUCED_UNIT
    column_units,  # channels of a group of out, in units of COLUMN_UNIT
    x2_h,
    x2_w,
    x2_units,  # channels of x2, in units of X2_UNIT
    REDUCED_UNIT: tl.constexpr,
    COLUMN_UNIT: tl.constexpr,
    X2_UNIT: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    # Row i of a phase is output row (phase + i * PHASES), which by its tap t reads input row
    # (i * STEP + first + t * ADVANCE); its taps are SPARSE apart in the kernel.
    STEP_H: tl.constexpr,
    STEP_W: tl.constexpr,
    ADVANCE_H: tl.constexpr,
    ADVANCE_W: tl.constexpr,
    PHASES_H: tl.constexpr,
    PHASES_W: tl.constexpr,
    SPARSE_H: tl.constexpr,
    SPARSE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    STRIDE2_H: tl.constexpr,  # of x2
    STRIDE2_W: tl.constexpr,
    SPREAD: tl.constexpr,  # residual is of every SPREAD-th row and column of out
    BACKWARD: tl.constexpr,  # a group's weight is [reduced, taps, columns], and not the reverse
    PACKED: tl.constexpr,  # a step goes through several taps; REDUCED_UNIT is a group's channels
    PLAIN: tl.constexpr,  # one tap, and the pixels of x are those of out
    SUMS: tl.constexpr,  # a tile is of one image, and out has its sums, [images' tiles, channels]
    DESCRIPTORS: tl.constexpr,  # a plain one of one group loads x and weight by descriptors
    SPECIALIZE: tl.constexpr,  # in warps of their own
    IN_RELU: tl.constexpr,
    X2_RELU: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,  # the type that counts rows
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    reduced = REDUCED_UNIT if PACKED else reduced_units * REDUCED_UNIT
    columns = column_units * COLUMN_UNIT

    # Programs that read the same rows run side by side.
    column_tiles = tl.cdiv(columns, BLOCK_N)
    program = tl.program_id(0)
    tile = program // (column_tiles * groups)
    group = program // column_tiles % groups
    column = program % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = column < columns

    phase_h = tl.program_id(1) // PHASES_W
    phase_w = tl.program_id(1) % PHASES_W
    start_h, taps_h, first_h = phase_taps(
        phase_h, offset_h, KERNEL_H, PHASES_H, DILATION_H, SPARSE_H
    )
    start_w, taps_w, first_w = phase_taps(
        phase_w, offset_w, KERNEL_W, PHASES_W, DILATION_W, SPARSE_W
    )
    taps = taps_h * taps_w
    rows_h = tl.cdiv(out_h - phase_h, PHASES_H)
    rows_w = tl.cdiv(out_w - phase_w, PHASES_W)
    rows = tl.cast(batch, INDEX) * rows_h * rows_w
    rows_h = tl.maximum(rows_h, 1)  # a phase may have no rows at all
    rows_w = tl.maximum(rows_w, 1)
    row = tile.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = row < rows
    if SUMS:
        image_tiles = tl.cdiv(rows_h * rows_w, BLOCK_M)
        row = tile % image_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        is_row = row < rows_h * rows_w
        row += (tile // image_tiles).to(INDEX) * rows_h * rows_w

    x_channels = groups * reduced
    pixel = row.to(tl.int64)
    if not PLAIN or STRIDE2_H * STRIDE2_W > 1 or SPREAD > 1:
        image = row // (rows_h * rows_w)
        i = (row // rows_w % rows_h).to(tl.int32)
        j = (row % rows_w).to(tl.int32)
    if not PLAIN:
        h = i * STEP_H + first_h
        w = j * STEP_W + first_w
        pixel = (image.to(tl.int64) * x_h + h) * x_w + w
    x_row = pixel * x_channels + group * reduced

    row_stride = KERNEL_H * KERNEL_W * (columns if BACKWARD else reduced)
    weight += group.to(tl.int64) * columns * reduced * (KERNEL_H * KERNEL_W)
    if BACKWARD:
        weight_column = weight + column[None, :]
    else:
        weight_column = weight + (column.to(tl.int64) * row_stride)[None, :]

    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    depth = tl.arange(0, BLOCK_K)
    if DESCRIPTORS:
        first_row = tile * BLOCK_M
        first_column = program % column_tiles * BLOCK_N
        x_tiles = tl.make_tensor_descriptor(x, [rows, reduced], [reduced, 1], [BLOCK_M, BLOCK_K])
        if BACKWARD:
            weight_tiles = tl.make_tensor_descriptor(
                weight, [reduced, columns], [columns, 1], [BLOCK_K, BLOCK_N]
            )
        else:
            weight_tiles = tl.make_tensor_descriptor(
                weight, [columns, reduced], [reduced, 1], [BLOCK_N, BLOCK_K]
            )
    steps = tl.cdiv(taps * reduced, BLOCK_K) if PACKED else tl.cdiv(reduced, BLOCK_K) * taps
    for step in tl.range(steps, warp_specialize=SPECIALIZE):
        if PACKED:
            place = step * BLOCK_K + depth
            channel = place % REDUCED_UNIT
            tap = place // REDUCED_UNIT
            is_channel = tap < taps
        else:
            channel = step // taps * BLOCK_K + depth
            tap = step % taps
            is_channel = channel < reduced
        tap_h = tap // taps_w
        tap_w = tap % taps_w
        mask = is_row[:, None] & is_channel[None, :]
        if PLAIN:
            at = x_row[:, None] + channel[None, :]
        elif PACKED:
            step_h = tap_h * ADVANCE_H
            step_w = tap_w * ADVANCE_W
            at_h = h[:, None] + step_h[None, :]
            at_w = w[:, None] + step_w[None, :]
            mask = mask & (at_h >= 0) & (at_h < x_h) & (at_w >= 0) & (at_w < x_w)
            moved = (step_h.to(tl.int64) * x_w + step_w) * x_channels
            at = x_row[:, None] + (moved + channel)[None, :]
        else:
            at_h = h + tap_h * ADVANCE_H
            at_w = w + tap_w * ADVANCE_W
            inside = (at_h >= 0) & (at_h < x_h) & (at_w >= 0) & (at_w < x_w)
            mask = mask & inside[:, None]
            moved = (tl.cast(tap_h * ADVANCE_H, tl.int64) * x_w + tap_w * ADVANCE_W) * x_channels
            at = (x_row + moved)[:, None] + channel[None, :]
        if DESCRIPTORS:
            a = x_tiles.load([first_row, step * BLOCK_K])
        else:
            a = tl.load(x + at, mask=mask, other=0.0)
        if IN_RELU or in_scale is not None:
            other = None
            if in_other is not None:
                other = tl.load(in_other + at, mask=mask, other=0.0)
            c = group * reduced + channel
            z = operand(a, other, in_scale, in_slope, in_shift, None, c, is_channel, IN_RELU)
            a = tl.where(mask, z, 0.0)  # padding comes after the activation

        place_in_kernel = (start_h + tap_h * SPARSE_H) * KERNEL_W + start_w + tap_w * SPARSE_W
        if BACKWARD:
            moved_weight = channel.to(tl.int64) * row_stride + place_in_kernel * columns
        else:
            moved_weight = (place_in_kernel * reduced + channel).to(tl.int64)
        if DESCRIPTORS:
            if BACKWARD:
                b = weight_tiles.load([step * BLOCK_K, first_column])
            else:
                b = weight_tiles.load([first_column, step * BLOCK_K]).T
        else:
            b = tl.load(
                weight_column + moved_weight[:, None],
                mask=is_channel[:, None] & is_column[None, :],
                other=0.0,
            )
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)

    out_channels = groups * columns
    out_channel = group * columns + column
    pixel = row.to(tl.int64)
    if PHASES_H * PHASES_W > 1:
        i = phase_h + i * PHASES_H
        j = phase_w + j * PHASES_W
        pixel = (image.to(tl.int64) * out_h + i) * out_w + j
    if scale is not None:
        acc = acc * tl.load(scale + out_channel, mask=is_column, other=0.0)[None, :]
    if x2 is not None:
        x2_channels = x2_units * X2_UNIT
        x2_pixel = pixel
        if STRIDE2_H * STRIDE2_W > 1:
            x2_pixel = (image.to(tl.int64) * x2_h + i * STRIDE2_H) * x2_w + j * STRIDE2_W
        if BACKWARD:
            weight2_column = weight2 + out_channel[None, :]
        else:
            weight2_column = weight2 + (out_channel.to(tl.int64) * x2_channels)[None, :]
        # What has a scale of its own has a sum of its own: neither operand can be rounded for it.
        product = acc if scale2 is None else tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
        for step in range(tl.cdiv(x2_channels, BLOCK_K)):
            channel = step * BLOCK_K + depth
            is_channel = channel < x2_channels
            mask = is_row[:, None] & is_channel[None, :]
            a = tl.load(
                x2 + (x2_pixel * x2_channels)[:, None] + channel[None, :], mask=mask, other=0.0
            )
            if X2_RELU or x2_scale is not None or x2_center is not None:
                z = operand(
                    a, None, x2_scale, None, x2_shift, x2_center, channel, is_channel, X2_RELU
                )
                a = tl.where(mask, z, 0.0)
            moved_weight = channel.to(tl.int64) * (out_channels if BACKWARD else 1)
            b = tl.load(
                weight2_column + moved_weight[:, None],
                mask=is_channel[:, None] & is_column[None, :],
                other=0.0,
            )
            product = tl.dot(a, b, product, input_precision=PRECISION, out_dtype=ACC)
        if scale2 is None:
            acc = product
        else:
            scales = tl.load(scale2 + out_channel, mask=is_column, other=0.0)
            acc = acc + product * scales[None, :]

    place = (pixel * out_channels)[:, None] + out_channel[None, :]
    mask = is_row[:, None] & is_column[None, :]
    if shift is not None:
        acc = acc + tl.load(shift + out_channel, mask=is_column, other=0.0)[None, :]
    if residual is not None:
        if SPREAD > 1:
            across = tl.cdiv(out_w, SPREAD)
            r = (image.to(tl.int64) * tl.cdiv(out_h, SPREAD) + i // SPREAD) * across + j // SPREAD
            at = (r * out_channels)[:, None] + out_channel[None, :]
            taken = mask & ((i % SPREAD == 0) & (j % SPREAD == 0))[:, None]
            acc = acc + tiles.load(residual, at, taken)
        else:
            acc = acc + tiles.load(residual, place, mask)
    acc = tiles.activate(acc, RELU)
    if mask_x is not None:
        raw = tl.load(mask_x + place, mask=mask, other=0.0)
        z = operand(raw, None, mask_scale, None, mask_shift, None, out_channel, is_column, False)
        acc = tiles.relu_backward(z, acc)
    y = acc.to(x.dtype.element_ty)
    if SUMS:
        total = tl.sum(tl.where(mask, tiles.wide(y), 0.0), axis=0)
        tl.store(out + tile.to(tl.int64) * out_channels + out_channel, total, mask=is_column)
    else:
        tl.store(out + place, y, mask=mask)

    if first is not None:
        # Of what was stored, as a pass over it would find.
        value = tl.where(mask, tiles.wide(y), 0.0)
        at = (tl.program_id(1) * tl.cdiv(tl.num_programs(0), column_tiles * groups) + tile).to(
            tl.int64
        ) * out_channels + out_channel
        total = tl.sum(value, axis=0)
        if mask_x is not None:
            about = tl.load(mask_mean + out_channel, mask=is_column, other=0.0)
            moment = tl.sum(value * (tiles.wide(raw) - about[None, :]), axis=0)
        else:
            count = tl.minimum(rows - tile.to(INDEX) * BLOCK_M, BLOCK_M).to(ACC)
            total = total / count
            deviation = tl.where(mask, value - total[None, :], 0.0)
            moment = tl.sum(deviation * deviation, axis=0)
        tl.store(first + at, total, mask=is_column)
        tl.store(second + at, moment, mask=is_column)
