"""What one rendering of a template may cost: steps, of which what is handled counts as more the larger it is.

Whatever makes a value grow is asked about its size before it is made: a budget spent after the fact is memory already
taken.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from jinja2.utils import Namespace

MAX_STEPS = 500_000
"""A few for each message and each call in it: more than any conversation takes, and about a second of work."""
MAX_CHARS = 2**23
"""Of one text that a template makes, its output among them."""
MAX_WIDTH = 1000
"""Characters that text is padded or indented to, and items that lists are cut into."""
_CHARS_SHIFT = 8  # 256 characters are a step
_ITEMS_SHIFT = 4


class TemplateLimitError(Exception):
    """A template that does more than it may."""


class Budget:
    """The steps that are left. Each thread has its own, begun anew with each rendering."""

    __slots__ = ("left", "plain")

    def __init__(self, steps: int) -> None:
        self.left = steps
        self.plain: set[int] = set()  # ids of the request's own containers: trees, nothing is in them twice

    def spend(self, steps: int) -> None:
        """Take steps.

        Raises:
            TemplateLimitError: there are not so many.
        """
        self.left -= steps
        if self.left < 0:
            raise TemplateLimitError(f"took more than {MAX_STEPS} steps (loops, calls, and the text they make)")

    def make(self, chars: int) -> None:
        """A text of so many characters is made."""
        if chars > MAX_CHARS:
            raise TemplateLimitError(f"made a text of more than {MAX_CHARS} characters")
        self.left -= 1 + (chars >> _CHARS_SHIFT)
        if self.left < 0:
            self.spend(0)

    def size(self, value: Any) -> None:
        """A value is handled, at a cost of its own length."""
        kind = type(value)
        if kind is str or kind is bytes:
            self.make(len(value))
        elif kind is list or kind is tuple or kind is dict or kind is range:
            self.spend(1 + (len(value) >> _ITEMS_SHIFT))
        else:
            self.spend(1)

    def weigh(self, value: Any) -> None:
        """A value is handled to its depths; one that is held many times counts as often."""
        stack = [value]
        steps = 0
        while stack:
            item = stack.pop()
            kind = type(item)
            steps += 1
            if kind is str or kind is bytes:
                steps += len(item) >> _CHARS_SHIFT
            elif kind is dict:
                stack += item.keys()
                stack += item.values()
            elif isinstance(item, list | tuple):
                stack += item
            elif isinstance(item, Namespace):
                stack.append(object.__getattribute__(item, "_Namespace__attrs"))
            if steps > self.left:
                break
        self.spend(steps)

    def counted(self, items: Iterable[Any], chars: int = 0) -> Iterator[Any]:
        """The items, a step each, and what text of ``chars`` characters for each takes."""
        steps = 1 + (chars >> _CHARS_SHIFT)
        for item in items:
            self.left -= steps
            if self.left < 0:
                self.spend(0)
            yield item


class _Thread(threading.local):
    def __init__(self) -> None:
        self.most = MAX_STEPS
        self.budget = Budget(MAX_STEPS)


thread = _Thread()
"""Its ``budget`` is that of the rendering in this thread."""


def begin() -> Budget:
    """A new budget for this thread."""
    thread.budget = made = Budget(min(MAX_STEPS, thread.most))
    return made


@contextmanager
def at_most(steps: int) -> Iterator[None]:
    """Renderings in this thread may take so many steps only."""
    before, thread.most = thread.most, steps
    try:
        yield
    finally:
        thread.most = before


def check_width(value: Any) -> None:
    """Refuse a number of characters or items that no prompt needs.

    Raises:
        TemplateLimitError.
    """
    if isinstance(value, int) and abs(value) > MAX_WIDTH:
        raise TemplateLimitError(f"asked for a width or count of {value}: at most {MAX_WIDTH}")
