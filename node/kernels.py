"""Canonical sampling ``tw-gumbel-1``, fused for rows of fp32 logits.

Compiled with numba, single-threaded, and without the interpreter lock. The meaning is that of
``trueweight.protos.sampling`` (the reference); this file only avoids its temporaries. The trick:
noise is a decreasing function of one hash, so its upper bound is an integer operation on the bits
of ``u``, and logarithms are taken only for tokens whose bound beats the best value so far (about
ten of 2,048).

Everything compiled stays in this one file: numba's cache notices changes of the file that holds a
function, not of files it calls.
"""

# Numba infers the types of compiled functions; annotations there would only claim to.
# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False, check-untyped-defs=False
# ruff: noqa: ANN001, ANN201, ANN202, PLR0917

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

CLIPPED_MARGIN = 1000.0
"""Largest margin; also that of a token that is not allowed at all."""

MASS_LADDER = (1 / 32, 1 / 16, 1 / 8)
"""The reference's; here once more, because it is compiled in."""

INVALID_ROW = -1
"""Winner of a row that holds NaN or plus infinity."""

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False}


def _compile(function: Callable[..., Any], **more: Any) -> Any:
    """Compile on first call and keep the machine code on disk where that is possible.

    With neither the source folder nor a home directory writable, numba refuses ``cache=True`` at
    decoration: then compile in memory.
    """
    try:
        return numba.njit(cache=True, **_OPTIONS, **more)(function)
    except RuntimeError:
        return numba.njit(**_OPTIONS, **more)(function)


def _compiled(function: Callable[..., Any]) -> Any:
    return _compile(function)


def _compiled_sum(function: Callable[..., Any]) -> Any:
    """For sums and maxima whose order does not matter: lets the compiler use vector lanes."""
    return _compile(function, fastmath={"reassoc", "nsz"})


@_compiled
def _rotate(x, r):
    return np.uint32((x << np.uint32(r)) | (x >> np.uint32(32 - r)))


@_compiled
def _mix_word(h, word):
    """One four-byte block of MurmurHash3 x86 32."""
    k = np.uint32(word * np.uint32(0xCC9E2D51))
    k = np.uint32(_rotate(k, 15) * np.uint32(0x1B873593))
    return np.uint32(_rotate(np.uint32(h ^ k), 13) * np.uint32(5) + np.uint32(0xE6546B64))


@_compiled
def _row_state(seed_lo, seed_hi, pos):
    """The hash after the three words that all tokens of a row share."""
    return _mix_word(_mix_word(_mix_word(np.uint32(0), seed_lo), seed_hi), pos)


@_compiled
def _uniform(state, token):
    """u in (0, 1], fp32, of one token."""
    h = np.uint32(_mix_word(state, np.uint32(token)) ^ np.uint32(16))
    h = np.uint32((h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    h = np.uint32((h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    h = np.uint32(h ^ (h >> np.uint32(16)))
    high = np.float32(np.int32(h >> np.uint32(16)))
    low = np.float32(np.int32(h & np.uint32(0xFFFF)))
    return np.float32(high * np.float32(2.0**-16) + (low + np.float32(0.5)) * np.float32(2.0**-32))


@_compiled
def _noise(u):
    """g = -ln(-log1p(-u)), rounded once to fp32; 1 - u is at least 2^-24."""
    exponential = -math.log1p(-min(np.float64(u), 1.0 - 2.0**-24))
    return np.float32(-math.log(exponential))


@_compiled
def _noise_bound(u):
    """At least ``_noise(u)`` and less than 0.4 above it, without a logarithm.

    -ln(-ln(1 - u)) <= -ln(u), and for u = 2^e (1 + m) the float's bits, read as an integer over
    2^23, are e + 127 + m <= log2(u) + 127. The constant is 127 ln 2 plus
    1e-4, far above the rounding of this line.
    """
    bits = np.float32(u).view(np.int32)
    return np.float32(np.float32(88.0298) - np.float32(bits) * np.float32(8.262958e-08))


@_compiled
def _exponential(x):
    """exp(x) for x <= 0 in fp32 within 2e-7 relative, in a form the compiler vectorises."""
    x = max(x, np.float32(-87.0))
    n = np.float32(np.floor(x * np.float32(1.44269504) + np.float32(0.5)))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    return np.float32(p * np.int32((np.int32(n) + 127) << 23).view(np.float32))


@_compiled_sum
def _exponential_sum(row, largest, start, end):
    total = np.float32(0)
    for token in range(start, end):
        total += _exponential(row[token] - largest)
    return total


@_compiled
def _log_sum_exp(row, largest):
    """ln(sum(exp(row))), summed in fp64 blocks so that the vocabulary's size costs no digits."""
    total = 0.0
    for start in range(0, row.size, 1024):
        end = min(start + 1024, row.size)
        total += np.float64(_exponential_sum(row, largest, start, end))
    return np.float64(largest) + math.log(total)


@_compiled
def _is_valid(row):
    """No NaN and no plus infinity, read off the bits."""
    bad = 0
    for token in range(row.size):
        bits = np.float32(row[token]).view(np.int32)
        bad += (bits >= 0x7F800000) or ((bits & 0x7FFFFFFF) > 0x7F800000)
    return bad == 0


@_compiled
def _largest(row):
    """As integers in the order of the floats, whose maximum the compiler vectorises."""
    best = np.int32(-0x80000000)
    for token in range(row.size):
        bits = np.float32(row[token]).view(np.int32)
        best = max(best, np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))))
    return np.int32(best ^ ((best >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)


@_compiled
def _first_equal(row, value):
    for token in range(row.size):
        if row[token] == value:
            return token
    return 0


@_compiled
def _seed_state(seed, pos):
    low = np.uint32(seed & 0xFFFFFFFF)
    high = np.uint32((seed >> 32) & 0xFFFFFFFF)
    return _row_state(low, high, np.uint32(pos & 0xFFFFFFFF))


@_compiled
def _noisy_best(row, temperature, state, floor, start, bounds):
    """Lowest id with the largest ``row / temperature + noise`` above ``start`` among
    ``row >= floor``, and that value; (0, start) if there is none.

    ``bounds`` is scratch of the row's length. Rounding is monotone, so a token whose bound is not
    above the best value cannot win.
    """
    for token in range(row.size):
        bounds[token] = row[token] / temperature + _noise_bound(_uniform(state, token))
    best = start
    winner = 0
    for token in range(row.size):
        if bounds[token] > best and row[token] >= floor:
            value = np.float32(row[token] / temperature + _noise(_uniform(state, token)))
            if value > best:
                best = value
                winner = token
    return winner, best


@_compiled
def sample_plain_rows(logits, rows, seeds, positions, temperatures, winners, bounds):
    """Sample ``rows`` of ``logits`` (float32) that have no rule but a temperature.

    ``seeds`` int64, ``positions`` int64, ``temperatures`` float32 (0 is greedy) and ``winners``
    int64 (written) belong to ``rows`` one by one; ``bounds`` is float32 scratch, one row long.
    """
    for i in range(rows.size):
        row = logits[rows[i]]
        if not _is_valid(row):
            winners[i] = INVALID_ROW
        elif temperatures[i] == np.float32(0):
            winners[i] = _first_equal(row, _largest(row))
        else:
            state = _seed_state(seeds[i], positions[i])
            low = np.float32(-np.inf)
            winners[i] = _noisy_best(row, temperatures[i], state, low, low, bounds)[0]


# --- forward half: the same for generation and scoring ------------------------------------------


@_compiled
def _apply_masks(out, rules, mask, length):
    """Grammar mask, logit bias, allowed ids, min_tokens."""
    for token in range(mask.size):
        if not mask[token]:
            out[token] = -np.inf
    for i in range(rules.bias_ids.size):
        out[rules.bias_ids[i]] += rules.biases[i]
    for token in range(rules.allowed.size):
        if not rules.allowed[token]:
            out[token] = -np.inf
    if length >= rules.min_tokens or rules.stop_ids.size == 0:
        return
    kept = np.empty(rules.stop_ids.size, np.float32)
    for i in range(kept.size):
        kept[i] = out[rules.stop_ids[i]]
        out[rules.stop_ids[i]] = -np.inf
    # A grammar that allows nothing but the end wins over min_tokens.
    if mask.size and _largest(out) == -np.inf:
        for i in range(kept.size):
            out[rules.stop_ids[i]] = kept[i]


@_compiled
def _apply_penalties(out, rules, prompt, history, length, counts):
    """Repetition (prompt and output), then frequency and presence (output). ``counts`` is int32
    scratch: occurrences in the output, or -1 for a token that is only in the prompt."""
    for token in range(counts.size):
        counts[token] = 0
    for i in range(prompt.size):
        if prompt[i] < counts.size:
            counts[prompt[i]] = -1
    for i in range(length):
        if history[i] < counts.size:
            counts[history[i]] = max(counts[history[i]], 0) + 1
    shrink = np.float32(np.float32(1) / rules.repetition)
    for token in range(out.size):
        count = counts[token]
        if count != 0 and rules.repetition != np.float32(1):
            out[token] *= shrink if out[token] > 0 else rules.repetition
        if count > 0:
            out[token] -= np.float32(rules.frequency * np.float32(count))
            out[token] -= rules.presence


@_compiled
def _apply_bad_words(out, rules, history, length):
    """Forbid the token that would complete a bad word. Only output counts."""
    for word in range(rules.bad_offsets.size - 1):
        first, last = rules.bad_offsets[word], rules.bad_offsets[word + 1] - 1
        start = length - (last - first)
        if start < 0:
            continue
        matches = True
        for i in range(last - first):
            matches = matches and history[start + i] == rules.bad_ids[first + i]
        if matches:
            out[rules.bad_ids[last]] = -np.inf


@_compiled
def _process(row, out, rules, mask, prompt, history, length, counts):
    """The row after masks, biases, penalties and bad words: ``row`` itself if there are none."""
    if not rules.changes_logits and mask.size == 0:
        return row
    for token in range(row.size):  # a slice assignment would compile string formatting: seconds
        out[token] = row[token]
    _apply_masks(out, rules, mask, length)
    if rules.has_penalties:
        _apply_penalties(out, rules, prompt, history, length, counts)
    _apply_bad_words(out, rules, history, length)
    return out


@_compiled
def _sift(heap, at, size):
    """Restore the max-heap below ``at``. Rows of ``heap`` are (key, value)."""
    while True:
        child = 2 * at + 1
        if child >= size:
            return
        if child + 1 < size and heap[child + 1, 0] > heap[child, 0]:
            child += 1
        if heap[at, 0] >= heap[child, 0]:
            return
        key, value = heap[at, 0], heap[at, 1]
        heap[at, 0], heap[at, 1] = heap[child, 0], heap[child, 1]
        heap[child, 0], heap[child, 1] = key, value
        at = child


@_compiled
def _heapify(heap, size):
    for at in range(size // 2 - 1, -1, -1):
        _sift(heap, at, size)


@_compiled
def _pop(heap, size):
    """Take the row with the largest key out of a heap of ``size`` rows: it is now the last one."""
    key, value = heap[0, 0], heap[0, 1]
    heap[0, 0], heap[0, 1] = heap[size - 1, 0], heap[size - 1, 1]
    heap[size - 1, 0], heap[size - 1, 1] = key, value
    _sift(heap, 0, size - 1)


@_compiled
def _threshold(scaled, rules, best, buffer):
    """Smallest allowed value of ``scaled``: the highest of the min-p, top-k and top-p cuts.
    ``buffer`` is scratch of the row's length."""
    if best == np.float32(-np.inf):
        return best
    threshold = _cut_before_top_p(scaled, rules, best)
    if rules.top_p < 1.0:
        threshold = max(threshold, _top_p_threshold(scaled, threshold, rules.top_p, best, buffer))
    return threshold


@_compiled
def _cut_before_top_p(scaled, rules, best):
    """The higher of the min-p and top-k cuts; minus infinity without."""
    threshold = np.float32(-np.inf)
    if rules.log_min_p > threshold:
        threshold = np.float32(best + rules.log_min_p)
    if 0 < rules.top_k < scaled.size:
        threshold = max(threshold, _kth_largest(scaled, threshold, rules.top_k))
    return threshold


@_compiled
def _kth_largest(scaled, above, k):
    """The k-th largest value if there are k not below ``above``; otherwise ``above``."""
    # The k largest so far, negated, so that the heap's root is the one to drop.
    heap = np.empty((k, 2), np.float64)
    size = 0
    for token in range(scaled.size):
        value = scaled[token]
        if value < above or value == -np.inf:
            continue
        if size < k:
            heap[size, 0] = -np.float64(value)
            heap[size, 1] = 0.0
            size += 1
            if size == k:
                _heapify(heap, k)
        elif -np.float64(value) < heap[0, 0]:
            heap[0, 0] = -np.float64(value)
            _sift(heap, 0, k)
    return np.float32(-heap[0, 0]) if size == k else above


@_compiled
def _bin(value, best):
    """Which of 512 bins, each 1/16 wide, ``value`` lies in below ``best``."""
    # Clamped before the conversion: models mask with -3e38, and int(inf) is anything.
    return np.int64(min((best - value) * np.float32(16), np.float32(511)))


@_compiled_sum
def _partial_mass(scaled, lowest, best, start, end):
    total = np.float32(0)
    for token in range(start, end):
        mass = _exponential(scaled[token] - best)
        total += mass if scaled[token] >= lowest else np.float32(0)
    return total


@_compiled
def _mass(scaled, lowest, best):
    """Sum of ``exp(scaled - best)`` not below ``lowest``, in fp64 over vectorised blocks."""
    total = 0.0
    for start in range(0, scaled.size, 1024):
        end = min(start + 1024, scaled.size)
        total += np.float64(_partial_mass(scaled, lowest, best, start, end))
    return total


@_compiled
def _head(scaled, lowest, head):
    """Writes the values not below ``lowest`` to ``head``; how many. Without a branch: which
    values are kept is as good as random."""
    size = 0
    for token in range(scaled.size):
        head[size] = scaled[token]
        size += scaled[token] >= lowest
    return size


@_compiled
def _top_p_threshold(scaled, above, top_p, best, buffer):
    """Value of the last token of the smallest set that holds ``top_p`` of what is ``above``.

    Only the head of the distribution is looked at one by one: probabilities are summed in bins by
    value, and only the bin where the sum passes ``top_p`` is put in order.
    """
    above = max(above, np.float32(-3.4028235e38))
    wanted = top_p * _mass(scaled, above, best)
    head = buffer[:0]
    for depth in (4.0, 10.0, 1e9):
        lowest = max(above, np.float32(best - np.float32(depth)))
        head = buffer[: _head(scaled, lowest, buffer)]
        if lowest == above or _mass(head, lowest, best) > wanted * 1.0001:
            break
    masses = np.zeros(512, np.float64)
    counts = np.zeros(512, np.int64)
    for value in head:
        at = _bin(value, best)
        masses[at] += np.float64(_exponential(value - best))
        counts[at] += 1
    before = 0.0
    crossed = 0
    for at in range(512):
        if counts[at]:
            crossed = at
            if before + masses[at] >= wanted:
                break
            before += masses[at]
    else:
        before -= masses[crossed]
    heap = np.empty((counts[crossed], 2), np.float64)
    size = 0
    for value in head:
        if _bin(value, best) == crossed:
            heap[size, 0] = value
            heap[size, 1] = 0.0
            size += 1
    _heapify(heap, size)
    last = heap[0, 0]
    while size > 0 and before < wanted:
        last = heap[0, 0]
        before += np.float64(_exponential(np.float32(last) - best))
        _pop(heap, size)
        size -= 1
    return np.float32(last)


@_compiled
def _scale(processed, temperature, scaled):
    for token in range(processed.size):
        scaled[token] = processed[token] / temperature


@_compiled
def sample_row(row, rules, mask, prompt, history, length, seed, scratch, counts):
    """The canonical token after ``history[:length]``, or INVALID_ROW.

    ``rules`` is a ``Rules``; ``mask`` is the grammar's (bool, empty for none); ``prompt`` and
    ``history`` are int32; ``scratch`` is float32 of shape (3, vocabulary), ``counts`` int32.
    """
    if not _is_valid(row):
        return INVALID_ROW
    processed = _process(row, scratch[0], rules, mask, prompt, history, length, counts)
    if rules.temperature == np.float32(0):
        return _first_equal(processed, _largest(processed))
    state = _seed_state(seed, prompt.size + length - 1)
    low = np.float32(-np.inf)
    if not rules.has_cuts:
        return _noisy_best(processed, rules.temperature, state, low, low, scratch[1])[0]
    scaled = scratch[2]
    _scale(processed, rules.temperature, scaled)
    floor = _threshold(scaled, rules, _largest(scaled), scratch[1])
    return _noisy_best(scaled, np.float32(1), state, floor, low, scratch[1])[0]


# --- scoring --------------------------------------------------------------------------------------


@_compiled
def _move_cost(move, short):
    return max(abs(move), short + move, 0.0)


@_compiled
def _rivals(scaled, state, own, lowest, scale, bounds):
    """A heap of (logit, gap) of the tokens at or above the logit ``lowest`` that beat ``own``."""
    count = 0
    for token in range(scaled.size):
        bounds[token] = scaled[token] + _noise_bound(_uniform(state, token))
    for token in range(scaled.size):
        count += bounds[token] > own
    heap = np.empty((count, 2), np.float64)
    size = 0
    for token in range(scaled.size):
        height = np.float64(scaled[token]) * scale
        if bounds[token] > own and height >= lowest:
            value = np.float32(scaled[token] + _noise(_uniform(state, token)))
            if value > own:
                heap[size, 0] = height
                heap[size, 1] = scale * (np.float64(value) - np.float64(own))
                size += 1
    _heapify(heap, size)
    return heap, size


@_compiled
def _cut_margin(scaled, state, rules, claimed, clip, bounds):
    """min over |s| <= clip of max(|s|, gap(s), below(s)); see the reference's ``_cut_margin``.

    Rivals are taken from the highest down: with the cut just above one, only those before it
    are left.
    """
    scale = np.float64(rules.temperature)
    best = _largest(scaled)
    theta = scale * np.float64(_threshold(scaled, rules, best, bounds))
    short = theta - scale * np.float64(scaled[claimed])
    start = max(-max(short, 0.0) / 2, -clip)
    own = np.float32(scaled[claimed] + _noise(_uniform(state, claimed)))
    heap, size = _rivals(scaled, state, own, theta + start, scale, bounds)
    least = np.inf
    gap = 0.0
    while size > 0:
        move = max(heap[0, 0] - theta, start)
        if move <= clip:
            least = min(least, max(_move_cost(move, short), gap))
        gap = max(gap, heap[0, 1])
        _pop(heap, size)
        size -= 1
    return min(least, max(_move_cost(start, short), gap))


@_compiled
def _shifted_top_p(top_p, shift):
    return 1.0 / (1.0 + (1.0 - top_p) / top_p * math.exp(-shift))


@_compiled
def _is_explained(scaled, state, rules, claimed, rounding, buffer):
    """Whether logits off by at most ``rounding / 2`` each explain ``claimed`` under top-p; see the
    reference's ``_is_explained``."""
    step = np.float32(np.float32(rounding) / rules.temperature)
    shift = rounding / np.float64(rules.temperature)
    best = _largest(scaled)
    before = _cut_before_top_p(scaled, rules, best)
    low, high = np.float32(before - step), min(np.float32(before + step), best)
    more, less = _shifted_top_p(rules.top_p, shift), _shifted_top_p(rules.top_p, -shift)
    lowest = _top_p_threshold(scaled, low, more, best, buffer)
    highest = _top_p_threshold(scaled, high, less, best, buffer)
    cut = np.float32(min(highest, scaled[claimed]) + step)
    if cut < np.float32(lowest - step):
        return False
    own = np.float32(scaled[claimed] + _noise(_uniform(state, claimed)))
    most = np.float32(own + step)
    return _noisy_best(scaled, np.float32(1), state, cut, most, buffer)[1] == most


@_compiled
def _margin(processed, rules, seed, pos, claimed, clip, scratch):
    """Distance in logits of ``claimed`` from what the sampler takes."""
    if processed[claimed] == -np.inf:
        nothing = claimed == 0 and _largest(processed) == -np.inf
        return 0.0 if nothing else CLIPPED_MARGIN
    if rules.temperature == np.float32(0):
        return np.float64(_largest(processed)) - np.float64(processed[claimed])
    state = _seed_state(seed, pos)
    if rules.has_cuts:
        _scale(processed, rules.temperature, scratch[2])
        margin = _cut_margin(scratch[2], state, rules, claimed, clip, scratch[1])
        if rules.top_p < 1.0:
            for rounding in MASS_LADDER:
                if rounding >= margin:
                    break
                if _is_explained(scratch[2], state, rules, claimed, rounding, scratch[1]):
                    return rounding
        return margin
    low = np.float32(-np.inf)
    own = np.float32(processed[claimed] / rules.temperature + _noise(_uniform(state, claimed)))
    best = _noisy_best(processed, rules.temperature, state, low, own, scratch[1])[1]
    return np.float64(rules.temperature) * (np.float64(best) - np.float64(own))


@_compiled
def score_rows(
    logits, rules, masks, prompt, history, first, seed, clip, margins, logprobs, ranks,
    scratch, counts,
):  # fmt: skip
    """Score ``history[first + i]`` against row i of ``logits``; False if a row is invalid.

    Writes float64 ``margins`` (clipped to [0, 1000]), float64 ``logprobs`` and int64 ``ranks``
    (0 is the best), both under the raw logits. ``masks`` is bool of the shape of ``logits``, or
    has no rows. Other arguments as in ``sample_row``.
    """
    no_mask = np.empty(0, np.bool_)
    for i in range(logits.shape[0]):
        row = logits[i]
        if not _is_valid(row):
            return False
        length = first + i
        claimed = history[length]
        mask = masks[i] if masks.shape[0] else no_mask
        processed = _process(row, scratch[0], rules, mask, prompt, history, length, counts)
        pos = prompt.size + length - 1
        margin = _margin(processed, rules, seed, pos, claimed, clip, scratch)
        margins[i] = min(max(margin, 0.0), CLIPPED_MARGIN)
        logprobs[i] = np.float64(row[claimed]) - _log_sum_exp(row, _largest(row))
        rank = 0
        for token in range(row.size):
            rank += row[token] > row[claimed]
        ranks[i] = rank
    return True
