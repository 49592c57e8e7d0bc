"""Softmax attention of any length, with a mask that is an interval of token indices per query."""

from longctx.attention.dispatch import IMPLEMENTATIONS, attend, attention
from longctx.attention.intervals import Intervals
from longctx.parallel.merge import merge

__all__ = ['IMPLEMENTATIONS', 'Intervals', 'attend', 'attention', 'merge']
