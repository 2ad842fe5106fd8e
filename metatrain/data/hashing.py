"""Stable 64-bit hashes of text: the same on every machine, process and release, vectorised over Arrow's buffers.

What goes through here (splits of users, hash buckets, partitions) must never depend on Python's salted `hash`, nor
on which optional package a hash comes from.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from metatrain.data.randomness import hashed

Hashes = np.ndarray  # uint64 [n]

_MULTIPLIER = 0x2545F4914F6CDD1D  # odd, so that its powers never vanish modulo 2^64
_BYTE_WORDS = hashed(0x6D65746174, np.arange(256))
_BLOCK = 1 << 15
#: Keeps the first so many bytes of a little-endian word.
_LOW_BYTES = np.array([(1 << (8 * n)) - 1 for n in range(9)], dtype=np.uint64)


def unit(hashes: Hashes) -> np.ndarray:
    """Hashes as numbers in [0, 1), 53 bits of each."""
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normal(hashes: Hashes) -> np.ndarray:
    """Hashes as draws of the standard normal distribution (Box and Muller)."""
    return np.sqrt(-2.0 * np.log1p(-unit(hashes))) * np.cos(2.0 * np.pi * unit(hashed(1, hashes)))


def hash_text(values: pa.Array | pa.ChunkedArray, salt: str) -> Hashes:
    """Hashes of strings under a salt: text [n] → uint64 [n]. A null hashes as the empty string.

    A polynomial over per-byte random words, finalised; two salts give independent hashes.
    """
    array = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    seed = _polynomial(pa.array([salt], type=pa.large_string()))
    return hashed(seed, _polynomial(array.cast(pa.large_string())))


def fingerprint(values: pa.Array | pa.ChunkedArray, salt: int = 0) -> Hashes:
    """Quick hashes of strings, eight bytes at a time: text [n] → uint64 [n]. A null hashes as the empty string.

    For what meets millions of keys and lives as long as one preparation: partitions, and texts that stand for others
    once they are known to differ. What is stored, or decides a split, goes through `hash_text`.
    """
    array = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    result = np.empty(len(array), np.uint64)
    for start in range(0, len(array), _BLOCK):  # so that what is computed on the way stays in the cache
        result[start : start + _BLOCK] = _fingerprint(array.slice(start, _BLOCK), salt)
    return result


def _fingerprint(array: pa.Array, salt: int) -> Hashes:
    starts, lengths, data = _bytes(array.cast(pa.large_string()))
    # Unaligned words, one from every byte on; the padding lets the last bytes begin one too.
    padded = np.concatenate([data, np.zeros(8, np.uint8)])
    words = np.ndarray((len(data) + 1,), dtype="<u8", buffer=padded.data, strides=(1,))
    result = hashed(salt, lengths)
    left, place = np.flatnonzero(lengths > 0), 0
    while len(left):
        rest = np.minimum(lengths[left] - place, 8)
        word = words[starts[left] + place] & _LOW_BYTES[rest]
        result[left] = hashed(result[left] ^ word)
        place += 8
        left = left[lengths[left] > place]
    return result


def _bytes(text: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each text starts, how many bytes it has, and the bytes."""
    if text.null_count:
        text = text.fill_null("")
    _, offsets_buffer, data_buffer = text.buffers()
    if len(text) == 0 or data_buffer is None:
        return np.zeros(len(text), np.int64), np.zeros(len(text), np.int64), np.zeros(0, np.uint8)
    offsets = np.frombuffer(offsets_buffer, dtype=np.int64)[text.offset : text.offset + len(text) + 1]
    first, last = int(offsets[0]), int(offsets[-1])
    return offsets[:-1] - first, np.diff(offsets), np.frombuffer(data_buffer, dtype=np.uint8)[first:last]


def _polynomial(text: pa.Array) -> Hashes:
    if len(text) == 0:
        return np.zeros(0, dtype=np.uint64)
    starts, lengths, data = _bytes(text)
    place = np.arange(len(data)) - np.repeat(starts, lengths)
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        powers = np.cumprod(np.full(max(int(lengths.max()), 1), _MULTIPLIER, dtype=np.uint64))
        terms = _BYTE_WORDS[data] * powers[place]
        total = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms, dtype=np.uint64)])
        return total[starts + lengths] - total[starts] + lengths.astype(np.uint64)
