"""Conversions without their warnings, where what they warn of is what is measured."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """While it lasts, the logger ``normzoo`` tells of errors alone."""
    logger = logging.getLogger("normzoo")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
