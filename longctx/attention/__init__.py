"""Softmax attention of any length, with a mask that is an interval of key indices per query."""

from longctx.attention.dispatch import IMPLEMENTATIONS, attend
from longctx.attention.merge import merge

__all__ = ['IMPLEMENTATIONS', 'attend', 'merge']
