"""Canonical sampling ``tw-gumbel-1`` on a GPU: Triton kernels over fp32 rows of logits.

The meaning is that of ``trueweight.protos.sampling``. Every kernel is one step of its order, so
that a launch is the only barrier between steps, and a step that no row of a batch needs is not
launched. A row belongs to a request, a *slot*; what a request asks for lies in tables by slot
(``device_rules``). Rows of slots whose ``kind`` is 0 are nobody's here and are not touched.

As on CPUs, noise is bounded by an integer operation on the bits of ``u`` and its logarithms, in
fp64, are taken only for blocks in which a bound beats the best value so far.
"""

# Triton infers types; annotations would be read as its own.
# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False, check-untyped-defs=False
# mypy: disallow-untyped-decorators=False, ignore-errors=True
# ruff: noqa: ANN001, ANN201, ANN202, PLR0917

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 1024
_NONE = tl.constexpr(float("-inf"))
_STEPS = tl.constexpr(33)  # bisections of a range of 2^32 keys


# --- noise --------------------------------------------------------------------------------------


@triton.jit
def _mix(h, word):
    word = word * 0xCC9E2D51
    word = (word << 15) | (word >> 17)
    h = h ^ (word * 0x1B873593)
    h = (h << 13) | (h >> 19)
    return h * 5 + 0xE6546B64


@triton.jit
def _row_state(seed, pos):
    """The hash after the words that all tokens of a row share."""
    seed = seed.to(tl.int64)
    pos = pos.to(tl.int64)
    h = (seed ^ seed).to(tl.uint32)
    h = _mix(h, (seed & 0xFFFFFFFF).to(tl.uint32))
    h = _mix(h, ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32))
    return _mix(h, (pos & 0xFFFFFFFF).to(tl.uint32))


@triton.jit
def _uniform(state, ids):
    h = _mix(state, ids.to(tl.uint32)) ^ 16
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    h = h ^ (h >> 16)
    high = (h >> 16).to(tl.int32).to(tl.float32)
    low = (h & 0xFFFF).to(tl.int32).to(tl.float32)
    return high * 1.52587890625e-05 + (low + 0.5) * 2.3283064365386963e-10


@triton.jit
def _noise(u):
    """-ln(-log1p(-u)) in fp64, rounded once; 1 - u is at least 2^-24."""
    v = tl.minimum(u.to(tl.float64), 1.0 - 5.960464477539063e-08)
    series = v * (1.0 + v * (0.5 + v * (1.0 / 3.0 + v * 0.25)))
    exponential = tl.where(v < 0.0001, series, -tl.log(1.0 - v))
    return (-tl.log(exponential)).to(tl.float32)


@triton.jit
def _noise_bound(u):
    """At least ``_noise(u)`` and less than 0.4 above it; see ``kernels._noise_bound``."""
    bits = u.to(tl.int32, bitcast=True).to(tl.float32)
    return 88.0298 - bits * 8.262958e-08


# --- processing: steps 1 to 4 of the order -----------------------------------------------------


@triton.jit
def copy_rows(
    out, logits, logits_stride, slots, kinds, static, static_rows, masks, mask_rows, size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grammar mask, then bias and allowed ids (``static``: what to add, -inf for "never")."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if tl.load(kinds + slot) != 0:
        ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        ok = ids < size
        x = tl.load(logits + row * logits_stride + ids, mask=ok, other=_NONE).to(tl.float32)
        mask_row = tl.load(mask_rows + row).to(tl.int64)
        if mask_row >= 0:
            allowed = tl.load(masks + mask_row * size + ids, mask=ok, other=0)
            x = tl.where(allowed != 0, x, _NONE)
        static_row = tl.load(static_rows + slot).to(tl.int64)
        if static_row >= 0:
            x = x + tl.load(static + static_row * size + ids, mask=ok, other=0.0)
        tl.store(out + row * size + ids, x, mask=ok)


@triton.jit
def forbid_stops(
    out, slots, positions, prompt_lens, min_tokens, stops, stop_rows, mask_rows, size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """min_tokens; a grammar that leaves nothing else keeps its stop ids."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    stop_row = tl.load(stop_rows + slot).to(tl.int64)
    length = tl.load(positions + row) + 1 - tl.load(prompt_lens + slot)
    if (stop_row >= 0) & (length < tl.load(min_tokens + slot)):
        left = tl.full((), _NONE, tl.float32)
        for start in range(0, size, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            ok = ids < size
            stop = tl.load(stops + stop_row * size + ids, mask=ok, other=1)
            x = tl.load(out + row * size + ids, mask=ok, other=_NONE)
            left = tl.maximum(left, tl.max(tl.where(stop != 0, _NONE, x)))
        if (left > float("-inf")) | (tl.load(mask_rows + row) < 0):
            for start in range(0, size, BLOCK):
                ids = start + tl.arange(0, BLOCK)
                stop = tl.load(stops + stop_row * size + ids, mask=ids < size, other=0)
                tl.store(
                    out + row * size + ids, tl.full((BLOCK,), _NONE, tl.float32), mask=stop != 0
                )


@triton.jit
def count_tokens(
    counts, slots, positions, prompt_lens, penalised, tokens, tokens_stride, size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """How often each id is in the output; bit 30 says that it is in the prompt."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    end = tl.load(positions + row) + 1
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if tl.load(penalised + slot) != 0:
        ids = tl.load(tokens + slot * tokens_stride + at, mask=at < end, other=0).to(tl.int64)
        ok = (at < end) & (ids >= 0) & (ids < size)
        prompt = at < tl.load(prompt_lens + slot)
        tl.atomic_add(counts + row * size + ids, 1, mask=ok & (prompt == 0))
        tl.atomic_or(counts + row * size + ids, 1 << 30, mask=ok & prompt)


@triton.jit
def penalise(
    out, counts, slots, penalised, repetitions, frequencies, presences, size, BLOCK: tl.constexpr
):
    """Repetition, frequency and presence penalties."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if tl.load(penalised + slot) != 0:
        ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        ok = ids < size
        x = tl.load(out + row * size + ids, mask=ok, other=_NONE)
        count = tl.load(counts + row * size + ids, mask=ok, other=0)
        made = (count & ((1 << 30) - 1)).to(tl.float32)
        repetition = tl.load(repetitions + slot)
        factor = tl.where(x > 0, tl.div_rn(1.0, repetition), repetition)
        x = tl.where(count > 0, x * factor, x)  # neutral is exactly 1
        x = x - tl.load(frequencies + slot) * made
        x = x - tl.load(presences + slot) * (made > 0).to(tl.float32)
        tl.store(out + row * size + ids, x, mask=ok)


@triton.jit
def forbid_words(
    out, slots, positions, prompt_lens, word_slots, word_starts, word_ids, tokens, tokens_stride,
    size, MOST: tl.constexpr,
):  # fmt: skip
    """The id that would complete a bad word. One program per row and word of the table."""
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    if tl.load(word_slots + word) == slot:
        first = tl.load(word_starts + word)
        last = tl.load(word_starts + word + 1) - 1
        prompt_len = tl.load(prompt_lens + slot)
        start = tl.load(positions + row) + 1 - (last - first)
        if start >= prompt_len:
            at = tl.arange(0, MOST)
            inside = at < last - first
            made = tl.load(tokens + slot * tokens_stride + start + at, mask=inside, other=0)
            wanted = tl.load(word_ids + first + at, mask=inside, other=0)
            if tl.sum(((made != wanted) & inside).to(tl.int32)) == 0:
                tl.store(out + row * size + tl.load(word_ids + last), float("-inf"))


# --- cuts -----------------------------------------------------------------------------------------


@triton.jit
def _key(x):
    """An integer in the order of the floats."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit
def _value(key):
    bits = key.to(tl.int32)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def _scaled(row, ids, temperature, size):
    x = tl.load(row + ids, mask=ids < size, other=_NONE)
    return tl.div_rn(x, temperature)


@triton.jit
def find_cuts(
    floors, x, slots, temperatures, log_min_ps, top_ks, top_ps, size, BLOCK: tl.constexpr
):
    """The smallest allowed ``x / T`` of each row: the highest of the min-p, top-k and top-p cuts;
    -inf without one. Bisection over the order of the floats, so that ties are kept."""
    index = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + index)
    temperature = tl.load(temperatures + slot)
    log_min_p = tl.load(log_min_ps + slot)
    top_k = tl.load(top_ks + slot)
    top_p = tl.load(top_ps + slot)
    cuts = (log_min_p > float("-inf")) | ((top_k > 0) & (top_k < size)) | (top_p < 1.0)
    floor = tl.full((), _NONE, tl.float32)
    if (temperature > 0.0) & cuts:
        row = x + index * size
        best = _largest_scaled(row, temperature, size, BLOCK)
        if best > float("-inf"):
            floor = _before_top_p(row, temperature, size, log_min_p, best, top_k, BLOCK)
            if top_p < 1.0:
                floor = _top_p(row, temperature, size, floor, best, top_p, BLOCK)
    tl.store(floors + index, floor)


@triton.jit
def _largest_scaled(row, temperature, size, BLOCK: tl.constexpr):
    best = tl.full((), _NONE, tl.float32)
    for start in range(0, size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        best = tl.maximum(best, tl.max(_scaled(row, ids, temperature, size)))
    return best


@triton.jit
def _before_top_p(row, temperature, size, log_min_p, best, top_k, BLOCK: tl.constexpr):
    """The higher of the min-p and top-k cuts; -inf without."""
    floor = best + log_min_p
    if (top_k > 0) & (top_k < size):
        floor = _top_k(row, temperature, size, floor, best, top_k, BLOCK)
    return floor


@triton.jit
def _lowest_key(floor):
    """Of the values that ``floor`` leaves; minus infinity is none."""
    return tl.maximum(_key(floor), _key(tl.full((), -3.4028234663852886e38, tl.float32)))


@triton.jit
def _top_k(row, temperature, size, floor, best, top_k, BLOCK: tl.constexpr):
    """The k-th largest value if k values are not below ``floor``; otherwise ``floor``."""
    low = _lowest_key(floor) - 1  # stays there if there are fewer than k
    high = _key(best)
    for _ in range(_STEPS):
        if low < high:
            middle = low + (high - low + 1) // 2
            count = tl.full((), 0, tl.int32)
            for start in range(0, size, BLOCK):
                ids = start + tl.arange(0, BLOCK)
                s = _scaled(row, ids, temperature, size)
                count += tl.sum(((_key(s) >= middle) & (ids < size)).to(tl.int32))
            if count >= top_k:
                low = middle
            else:
                high = middle - 1
    return tl.where(low >= _lowest_key(floor), _value(low), floor)


@triton.jit
def _top_p(row, temperature, size, floor, best, top_p, BLOCK: tl.constexpr):
    """The smallest value kept: that above which lies less than ``top_p`` of the mass."""
    first = _lowest_key(floor)
    total = _mass_above(row, temperature, size, first - 1, best, BLOCK)
    low = first
    high = _key(best)
    for _ in range(_STEPS):
        if low < high:
            middle = low + (high - low) // 2
            if _mass_above(row, temperature, size, middle, best, BLOCK) < top_p * total:
                high = middle
            else:
                low = middle + 1
    # The bound of the search need not be a value of the row.
    least = best
    for start in range(0, size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        s = _scaled(row, ids, temperature, size)
        least = tl.minimum(least, tl.min(tl.where(_key(s) >= low, s, best)))
    return least


@triton.jit
def _mass_above(row, temperature, size, key, best, BLOCK: tl.constexpr):
    total = tl.full((), 0.0, tl.float64)
    for start in range(0, size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        s = _scaled(row, ids, temperature, size)
        total += tl.sum(tl.where(_key(s) > key, tl.exp(s - best), 0.0)).to(tl.float64)
    return total


# --- sampling -------------------------------------------------------------------------------------


@triton.jit
def _noisy_best(row, temperature, state, floor, best, size, BLOCK: tl.constexpr):
    """Largest ``x / T + noise`` above ``best`` among values not below ``floor``, and its lowest id;
    (0, best) if there is none."""
    winner = tl.full((), 0, tl.int64)
    for start in range(0, size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        s = _scaled(row, ids, temperature, size)
        u = _uniform(state, ids)
        bound = tl.where(s >= floor, s + _noise_bound(u), _NONE)
        if tl.max(bound) > best:
            z = tl.where(bound > best, s + _noise(u), _NONE)
            most = tl.max(z)
            if most > best:
                best = most
                winner = tl.min(tl.where(z == most, ids, size)).to(tl.int64)
    return winner, best


@triton.jit
def _largest(row, size, BLOCK: tl.constexpr):
    """The largest value and its lowest id."""
    best = tl.full((), _NONE, tl.float32)
    winner = tl.full((), 0, tl.int64)
    for start in range(0, size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = tl.load(row + ids, mask=ids < size, other=_NONE)
        most = tl.max(x)
        if most > best:
            best = most
            winner = tl.min(tl.where(x == most, ids, size)).to(tl.int64)
    return winner, best


@triton.jit
def _is_valid(row, size, BLOCK: tl.constexpr):
    """No NaN and no plus infinity."""
    bad = tl.full((), 0, tl.int32)
    for start in range(0, size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = tl.load(row + ids, mask=ids < size, other=_NONE)
        bad += tl.sum(((x < float("inf")) == 0).to(tl.int32))
    return bad == 0


@triton.jit
def sample(
    winners, logits, logits_stride, x, floors, slots, kinds, seeds, temperatures, positions, size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The canonical token of each row; -1 for an invalid row, -2 for a row that is nobody's."""
    index = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + index)
    winner = tl.full((), -2, tl.int64)
    if tl.load(kinds + slot) != 0:
        row = x + index * size
        temperature = tl.load(temperatures + slot)
        if _is_valid(logits + index * logits_stride, size, BLOCK) == 0:
            winner = tl.full((), -1, tl.int64)
        elif temperature == 0.0:
            winner, _ = _largest(row, size, BLOCK)
        else:
            state = _row_state(tl.load(seeds + slot), tl.load(positions + index))
            floor = tl.load(floors + index)
            none = tl.full((), _NONE, tl.float32)
            winner, _ = _noisy_best(row, temperature, state, floor, none, size, BLOCK)
    tl.store(winners + index, winner)


# --- scoring --------------------------------------------------------------------------------------


@triton.jit
def score_raw(logprobs, ranks, logits, logits_stride, claimed, size, BLOCK: tl.constexpr):
    """Log-probability and rank of claimed tokens under the raw logits; rank -1: invalid row."""
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * logits_stride
    own = tl.load(row + tl.load(claimed + index))
    _, best = _largest(row, size, BLOCK)
    total = tl.full((), 0.0, tl.float64)
    rank = tl.full((), 0, tl.int64)
    for start in range(0, size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = tl.load(row + ids, mask=ids < size, other=_NONE)
        total += tl.sum(tl.exp(x - best)).to(tl.float64)
        rank += tl.sum((x > own).to(tl.int64))
    logprob = own.to(tl.float64) - best.to(tl.float64) - tl.log(total)
    tl.store(logprobs + index, logprob)
    tl.store(ranks + index, tl.where(_is_valid(row, size, BLOCK), rank, -1))


@triton.jit
def find_rivals(
    noisy, x, floors, slots, seeds, temperatures, positions, claimed, size, BLOCK: tl.constexpr
):
    """Noisy values of the tokens that beat the claimed one, -inf for others; rows with a cut."""
    index = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + index)
    if tl.load(floors + index) > float("-inf"):
        row = x + index * size
        temperature = tl.load(temperatures + slot)
        state = _row_state(tl.load(seeds + slot), tl.load(positions + index))
        own = _own(row, temperature, state, tl.load(claimed + index))
        ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        s = _scaled(row, ids, temperature, size)
        z = s + _noise(_uniform(state, ids))
        tl.store(noisy + index * size + ids, tl.where(z > own, z, _NONE), mask=ids < size)


@triton.jit
def _own(row, temperature, state, token):
    return tl.div_rn(tl.load(row + token), temperature) + _noise(_uniform(state, token))


@triton.jit
def score_margins(
    margins, x, noisy, floors, slots, seeds, temperatures, positions, claimed, clip, size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Distance in logits of each claimed token from the canonical one, fp64, at most 1000."""
    index = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + index)
    row = x + index * size
    temperature = tl.load(temperatures + slot)
    token = tl.load(claimed + index)
    mine = tl.load(row + token)
    _, best = _largest(row, size, BLOCK)
    margin = tl.full((), 0.0, tl.float64)
    if mine == float("-inf"):
        nothing = (token == 0) & (best == float("-inf"))
        margin = tl.where(nothing, margin, 1000.0)
    elif temperature == 0.0:
        margin = best.to(tl.float64) - mine.to(tl.float64)
    else:
        state = _row_state(tl.load(seeds + slot), tl.load(positions + index))
        own = _own(row, temperature, state, token)
        floor = tl.load(floors + index)
        scale = temperature.to(tl.float64)
        if floor == float("-inf"):
            none = tl.full((), _NONE, tl.float32)
            _, most = _noisy_best(row, temperature, state, none, own, size, BLOCK)
            margin = scale * (most.to(tl.float64) - own.to(tl.float64))
        else:
            top = tl.div_rn(best, temperature)
            margin = _cut_margin(
                row, noisy + index * size, temperature, floor, top,
                tl.div_rn(mine, temperature), own, clip, size, BLOCK,
            )  # fmt: skip
    tl.store(margins + index, tl.minimum(tl.maximum(margin, 0.0), 1000.0))


@triton.jit
def _gap_above(row, noisy, temperature, key, own, size, BLOCK: tl.constexpr):
    """How far the best rival whose value lies above ``key`` is ahead, in logits."""
    most = own
    for start in range(0, size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        z = tl.load(noisy + ids, mask=ids < size, other=_NONE)
        s = _scaled(row, ids, temperature, size)
        most = tl.maximum(most, tl.max(tl.where(_key(s) > key, z, _NONE)))
    return temperature.to(tl.float64) * (most.to(tl.float64) - own.to(tl.float64))


@triton.jit
def _cost(move, short):
    return tl.maximum(tl.maximum(tl.abs(move), short + move), 0.0)


@triton.jit
def _cut_margin(row, noisy, temperature, floor, top, mine, own, clip, size, BLOCK: tl.constexpr):
    """min over |s| <= clip of max(|s|, gap(s), below(s)); see the reference's ``_cut_margin``.

    From s0 on the cost of moving the cut grows and the gap that is left falls, so the best cut is
    where they meet: bisection finds the lowest value above which the gap is not above the cost.
    """
    scale = temperature.to(tl.float64)
    theta = scale * floor.to(tl.float64)
    short = theta - scale * mine.to(tl.float64)
    start = tl.maximum(-tl.maximum(short, 0.0) / 2, -clip)
    # Everything not below this is left by the lowest cut that can be best.
    lowest = theta + start
    low = _key((lowest / scale).to(tl.float32)) - 2
    for _ in range(4):
        if scale * _value(low).to(tl.float64) < lowest:
            low += 1
    low -= 1  # the highest key that the lowest cut cuts off
    margin = tl.maximum(
        _cost(start, short), _gap_above(row, noisy, temperature, low, own, size, BLOCK)
    )
    high = tl.minimum(_key(((theta + clip) / scale).to(tl.float32)), _key(top))
    found = low
    last = high
    for _ in range(_STEPS):
        if low < high:
            middle = low + (high - low) // 2
            move = tl.maximum(scale * _value(middle).to(tl.float64) - theta, start)
            gap = _gap_above(row, noisy, temperature, middle, own, size, BLOCK)
            if gap <= _cost(move, short):
                high = middle
            else:
                low = middle + 1
    for key in range(2):
        at = high - key
        move = tl.maximum(scale * _value(at).to(tl.float64) - theta, start)
        if (at > found) & (at <= last) & (move <= clip):
            gap = _gap_above(row, noisy, temperature, at, own, size, BLOCK)
            margin = tl.minimum(margin, tl.maximum(_cost(move, short), gap))
    return margin


@triton.jit
def explain_margins(
    margins, x, noisy, floors, slots, seeds, temperatures, positions, claimed, log_min_ps, top_ks,
    top_ps, rounding, size, BLOCK: tl.constexpr,
):  # fmt: skip
    """``rounding`` for each larger margin of a row with top-p whose claimed token is explained by
    logits off by at most half of that; see the reference's ``_is_explained``."""
    index = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + index)
    top_p = tl.load(top_ps + slot)
    token = tl.load(claimed + index)
    row = x + index * size
    is_cut = (tl.load(floors + index) > float("-inf")) & (tl.load(row + token) > float("-inf"))
    if is_cut & (top_p < 1.0) & (tl.load(margins + index) > rounding):
        temperature = tl.load(temperatures + slot)
        step = tl.div_rn(rounding, temperature)
        best = _largest_scaled(row, temperature, size, BLOCK)
        before = _before_top_p(
            row, temperature, size, tl.load(log_min_ps + slot), best, tl.load(top_ks + slot), BLOCK
        )
        shift = tl.full((), 0.0, tl.float64) + rounding
        shift = shift / temperature.to(tl.float64)
        more, less = _shifted(top_p, shift), _shifted(top_p, -shift)
        lowest = _top_p(row, temperature, size, before - step, best, more, BLOCK)
        high = tl.minimum(before + step, best)
        highest = _top_p(row, temperature, size, high, best, less, BLOCK)
        mine = tl.div_rn(tl.load(row + token), temperature)
        cut = tl.minimum(highest, mine) + step
        if cut >= lowest - step:
            state = _row_state(tl.load(seeds + slot), tl.load(positions + index))
            most = _own(row, temperature, state, token) + step
            rival = tl.full((), 0, tl.int32)
            for start in range(0, size, BLOCK):
                ids = start + tl.arange(0, BLOCK)
                z = tl.load(noisy + index * size + ids, mask=ids < size, other=_NONE)
                s = _scaled(row, ids, temperature, size)
                rival += tl.sum(((s >= cut) & (z > most)).to(tl.int32))
            if rival == 0:
                tl.store(margins + index, tl.full((), 0.0, tl.float64) + rounding)


@triton.jit
def _shifted(top_p, shift):
    """``top_p`` moved by ``shift`` in log-odds, fp64."""
    p = top_p.to(tl.float64)
    return 1.0 / (1.0 + (1.0 - p) / p * tl.exp(-shift))
