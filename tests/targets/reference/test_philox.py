"""Philox4x32-10 against Random123's known-answer vectors, and the uniform made of it."""

from __future__ import annotations

import numpy as np
import pytest

from llmctl.targets.reference.philox import philox4x32, uniform


# Random123 (D. E. Shaw Research), tests/kat_vectors, lines "philox4x32 10".
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    words = [np.array([int(w, 16) for w in text.split()], np.uint32) for text in (counter, key, expected)]
    np.testing.assert_array_equal(philox4x32(words[0], words[1]), words[2])


def test_uniform_is_the_documented_function_of_seed_and_position() -> None:
    seed, position = 0x299F31D0A4093822, 0x85A308D3243F6A88 & 0x7FFFFFFFFFFFFFFF
    counter = np.array([position & 0xFFFFFFFF, position >> 32, 0, 0], np.uint32)
    words = [int(w) for w in philox4x32(counter, np.array([0xA4093822, 0x299F31D0], np.uint32))]
    expected = ((words[1] << 32 | words[0]) >> 11) / 2**53
    assert uniform(np.array([seed], np.uint64), np.array([position], np.int64))[0] == expected


def test_uniform_rows_are_independent_of_one_another() -> None:
    seeds, positions = np.arange(50, dtype=np.uint64) % 7, np.arange(50, dtype=np.int64) % 5
    together = uniform(seeds, positions)
    alone = [uniform(seeds[i : i + 1], positions[i : i + 1])[0] for i in range(50)]
    np.testing.assert_array_equal(together, alone)
    assert len(set(together)) == 35


def test_uniform_looks_uniform() -> None:
    draws = uniform(np.full(20000, 42, np.uint64), np.arange(20000, dtype=np.int64))
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    # Chi-squared with 19 degrees of freedom; a fixed seed, so this cannot flake.
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8
