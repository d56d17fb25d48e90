"""Errors by their text."""

import re

import pytest


def raises(error, *parts):
    """The parts of the message, in their order, with anything between them."""
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, parts)))
