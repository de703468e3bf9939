"""Loads that are made up, not sent; the fixture ``played`` has them in place of real ones."""

from __future__ import annotations


class Played(list[str]):
    """The prompts of loads that are made up. ``slower``: times as long as they take otherwise; ``noise``: a share that
    every load in turn takes longer."""

    slower = 1.0
    noise = 0.0
    loads = 0
