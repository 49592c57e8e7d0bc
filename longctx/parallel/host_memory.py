"""Keeps the memory that a CPU step frees, instead of giving it back and asking again at every step.

XLA:CPU takes one block for all temporaries of a step and frees it after; the C library maps and
unmaps a block of that size, and the kernel clears each of its pages anew: 37,000 page faults and a
fifth of all CPU time of a small model's step.
Held by: tests/test_host_memory.py. Numbers: experiments/00_speed_of_one_device.
"""

import ctypes
import sys

# Names and numbers of <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
  """Whether it could be set (glibc); call it once, before the first computation on CPU.

  The process then keeps its peak of memory until it ends.
  """
  if not sys.platform.startswith('linux'):
    return False
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt is None:   # musl
    return False
  settings = ((M_MMAP_MAX, 0), (M_ARENA_MAX, 1), (M_TRIM_THRESHOLD, 2**31 - 1))
  return all(mallopt(name, value) == 1 for name, value in settings)
