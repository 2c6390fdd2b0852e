"""Sequences of a micro-batch in buckets of similar length, for decoders that compute pads too.

lengths  12 3 4 11 3      one bucket of 12 takes 5 * 12 = 60 places for 33 tokens
buckets  12 11 | 3 4 3    take 2 * 12 + 3 * 4 = 36
"""

from __future__ import annotations

import numpy as np

# A further bucket is worth this many places: it launches every kernel, and reads or dequantizes every weight, once more. On an H200
# with a base of 7B in 4 bits some 60 ms, and a pad 10 us, by what both move through memory.
PLACES_PER_BUCKET = 2048


def length_buckets(lengths: np.ndarray, places_per_bucket: int = PLACES_PER_BUCKET) -> list[np.ndarray]:
    """The sequences of each bucket, the longest first, so that the places of all buckets and the buckets' own price are fewest.

    In order of length a bucket is a stretch of the sequences, so the best buckets of the first j are the best of the first i, and one
    more from i to j, for the best i.
    """
    order = np.argsort(lengths, kind="stable")
    ascending = lengths[order]
    count = len(lengths)
    price = np.zeros(count + 1)
    start = np.zeros(count + 1, dtype=int)
    for end in range(1, count + 1):
        # A bucket of the sequences i to end - 1, for every i.
        prices = price[:end] + (end - np.arange(end)) * ascending[end - 1] + places_per_bucket
        start[end] = int(prices.argmin())
        price[end] = prices[start[end]]
    buckets: list[np.ndarray] = []
    end = count
    while end:
        buckets.append(np.sort(order[start[end] : end]))
        end = int(start[end])
    return buckets
