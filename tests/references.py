"""Slow and obvious versions of what the package computes, on lists, ints and Fractions.

Nothing here uses torch or code of the package. Tensors are lists; a stack of matrices is `[batch][row][column]`.
"""

import math
import struct
from decimal import Decimal, localcontext
from fractions import Fraction

# ---- Numbers ----


def float32(value):
    """The float32 nearest to a Python float."""
    return struct.unpack("f", struct.pack("f", value))[0]


def written(value):
    """The number that a person wrote: 0.29 is 29/100."""
    return value if isinstance(value, Fraction) else Fraction(Decimal(repr(value)))


def half_even(value):
    """A Fraction rounded to a whole number, halves to the even neighbour."""
    below = value.numerator // value.denominator
    rest = value - below
    if rest > Fraction(1, 2) or (rest == Fraction(1, 2) and below % 2 == 1):
        return below + 1
    return below


def count(sparsity, units):
    return half_even(written(sparsity) * units)


# ---- Schedules ----


def schedule(name, fraction, initial, final):
    """The value of a schedule between its first and last update."""
    fraction, initial, final = written(fraction), written(initial), written(final)
    way = final - initial
    if name == "one_shot":
        return float(final)
    if name == "linear":
        return float(initial + way * fraction)
    if name == "cubic":
        return float(initial + way * (1 - (1 - fraction) ** 3))
    if name == "cosine":
        return float(initial) + float(way) * math.sin(math.pi / 2 * float(fraction)) ** 2
    if name == "exponential":
        with localcontext() as context:
            context.prec = 40
            before, after, share = (
                Decimal(part.numerator) / Decimal(part.denominator) for part in (1 - initial, 1 - final, fraction)
            )
            return float(1 - before * ((after.ln() - before.ln()) * share).exp())
    raise KeyError(name)


def sparsity_after(name, step, begin, end, initial, final):
    """The sparsity once `step` optimizer steps are completed."""
    if initial >= final or step < begin:
        return initial
    if name == "one_shot" or step >= end:
        return final
    return schedule(name, Fraction(step - begin, end - begin), initial, final)


def update_steps(begin, end, frequency):
    return [step for step in range(begin, end + 1) if step == end or (step - begin) % frequency == 0]


def steps_of(value, total):
    """A configured time in optimizer steps."""
    if value is None:
        return total
    return int(value) if value >= 1 else half_even(written(value) * total)


# ---- Criteria ----


def magnitude(weights):
    return [float32(abs(weight)) for weight in weights]


def crc32(data):
    """The checksum of zlib and PNG, bit by bit."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = (register >> 1) ^ (0xEDB88320 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def fmix32(number):
    """The finalizer of MurmurHash3."""
    number ^= number >> 16
    number = number * 0x85EBCA6B % 2**32
    number ^= number >> 13
    number = number * 0xC2B2AE35 % 2**32
    return number ^ (number >> 16)


def random_score(seed, name, index):
    high, low = divmod(index, 2**32)
    first = fmix32(low ^ crc32(f"{seed}/{name}".encode()))
    return fmix32((first + high) % 2**32) // 2


# ---- Selection ----


def lowest(scores, dropped, how_many):
    """Positions of the `how_many` that go: those dropped already, then the lowest scores, a lower index first."""
    order = sorted(range(len(scores)), key=lambda index: (not dropped[index], scores[index], index))
    return set(order[:how_many])


def lowest_of_many(tensors, dropped, how_many):
    """`lowest` over several tensors in one ranking: for each tensor a list of whether a position goes."""
    sizes = [len(tensor) for tensor in tensors]
    gone = lowest(
        [score for tensor in tensors for score in tensor], [is_ for part in dropped for is_ in part], how_many
    )
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [[start + offset in gone for offset in range(size)] for start, size in zip(starts, sizes, strict=True)]


# ---- Patterns: (scores, mask, how many units are dropped in all) -> mask ----


def copy_of(mask):
    return [[list(row) for row in matrix] for matrix in mask]


def drop_weights(scores, mask, how_many):
    places = [(b, r, c) for b, matrix in enumerate(scores) for r, row in enumerate(matrix) for c in range(len(row))]
    return _drop_units([[place] for place in places], [scores[b][r][c] for b, r, c in places], mask, 0, how_many)


def drop_blocks(scores, mask, rows, columns, norm, how_many):
    """Blocks of rows x columns, worth their L1 or L2 norm as float32; int scores are averaged, rounded down."""
    units = [
        [(b, top + r, left + c) for r in range(rows) for c in range(columns)]
        for b, matrix in enumerate(scores)
        for top in range(0, len(matrix), rows)
        for left in range(0, len(matrix[0]), columns)
    ]
    worth = []
    for unit in units:
        values = [scores[b][r][c] for b, r, c in unit]
        if isinstance(values[0], int):
            worth.append(sum(values) // len(values))
        else:
            worth.append(
                float32(math.sqrt(sum_of(value * value for value in values)) if norm == "l2" else sum_of(values))
            )
    return _drop_units(units, worth, mask, 0, how_many)


def drop_in_groups(scores, mask, n, m, how_many):
    """Of every m weights in a row keep n, in `how_many` groups: those where the lost scores add up to least."""
    losers, worth, dropped = [], [], []
    for b, matrix in enumerate(scores):
        for r, row in enumerate(matrix):
            for left in range(0, len(row), m):
                group = range(left, left + m)
                order = sorted(group, key=lambda c, b=b, r=r, row=row: (mask[b][r][c], row[c], c))
                lost = sorted(order[: m - n])
                losers.append([(b, r, c) for c in lost])
                values = [row[c] for c in lost]
                worth.append(sum(values) // (m - n) if isinstance(values[0], int) else float32(sum_of(values)))
                dropped.append(sum(mask[b][r][c] for c in group) <= n)
    result = copy_of(mask)
    for unit in lowest(worth, dropped, how_many):
        for b, r, c in losers[unit]:
            result[b][r][c] = False
    return result


def _drop_units(units, worth, mask, most_kept, how_many):
    dropped = [sum(mask[b][r][c] for b, r, c in unit) <= most_kept for unit in units]
    result = copy_of(mask)
    for unit in lowest(worth, dropped, how_many):
        for b, r, c in units[unit]:
            result[b][r][c] = False
    return result


def sum_of(values):
    """Added up in float64 from the first to the last: `sum` of newer Pythons corrects its rounding."""
    total = 0.0
    for value in values:
        total += value
    return total


# ---- Allocation: how many units are dropped, of each tensor (layer, erk) or of all (global) ----


def layer_counts(units, dropped, sparsity):
    return [max(count(sparsity, of_all), already) for of_all, already in zip(units, dropped, strict=True)]


def global_count(units, dropped, sparsity):
    return max(count(sparsity, sum(units)), sum(dropped))


def erk_counts(units, dropped, sides, sparsity):
    """Erdős–Rényi-kernel, with `sides` of one kernel or matrix: densities as sum(sides) / prod(sides), capped.

    Tensors are filled up one at a time, the first to run out first, until the rest can share what is left.
    """
    room = [of_all - already for of_all, already in zip(units, dropped, strict=True)]
    wanted = min(sum(units) - count(sparsity, sum(units)), sum(room))
    pull = [of_all * Fraction(sum(side), max(math.prod(side), 1)) for of_all, side in zip(units, sides, strict=True)]
    shares = [Fraction(0)] * len(units)
    left = Fraction(wanted)
    open_ = [index for index in range(len(units)) if room[index] > 0]
    open_.sort(key=lambda index: room[index] / pull[index])
    while open_:
        scale = left / sum(pull[index] for index in open_)
        first = open_[0]
        if scale * pull[first] < room[first]:
            for index in open_:
                shares[index] = scale * pull[index]
            break
        shares[first] = Fraction(room[first])
        left -= room[first]
        open_.pop(0)
    kept = largest_remainder(shares, wanted)
    return [of_all - keep for of_all, keep in zip(units, kept, strict=True)]


def largest_remainder(shares, total):
    """Whole numbers adding up to `total`: rounded down, then one more for the largest remainders, lower index first."""
    whole = [share.numerator // share.denominator for share in shares]
    for _ in range(total - sum(whole)):
        rests = [share - part for share, part in zip(shares, whole, strict=True)]
        whole[rests.index(max(rests))] += 1
    return whole
