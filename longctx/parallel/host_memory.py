"""Keeps the memory that a CPU step frees, instead of giving it back and asking again at every step.

XLA:CPU takes one block for all temporaries of a step and frees it after; the C library maps and
unmaps a block of that size, and the kernel clears each of its pages anew: 37,000 page faults and a
fifth of all CPU time of a small model's step.
Held by: tests/test_host_memory.py. Numbers: experiments/00_speed_of_one_device.
"""

import ctypes
import sys

# Names and numbers of <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8


def keep_freed_memory() -> bool:
  """Whether it could be set (glibc); call it once, before the first computation on CPU.

  The process then keeps its peak of memory until it ends.
  """
  return _set((M_MMAP_MAX, 0), (M_ARENA_MAX, 1), (M_TRIM_THRESHOLD, 2**31 - 1))


def return_freed_memory() -> bool:
  """The other way: what is freed goes back at once, for a step that only just fits.

  Else a long step's blocks, of many sizes and threads, leave holes that no other block fits into: 13 GiB
  held for 5 GiB in use (experiments/01_cost_of_attention/long_step.py).
  """
  return _set((M_ARENA_MAX, 1), (M_MMAP_THRESHOLD, 2**16), (M_TRIM_THRESHOLD, 2**16))


def _set(*settings: tuple[int, int]) -> bool:
  if not sys.platform.startswith('linux'):
    return False
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt is None:   # musl
    return False
  return all(mallopt(name, value) == 1 for name, value in settings)
