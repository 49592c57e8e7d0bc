"""Freed memory stays with the process: taking a large block again costs no page faults."""

import subprocess
import sys

import pytest

PROGRAM = '''
import ctypes, resource, sys
from longctx.parallel import host_memory
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
c.free.argtypes, c.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
if sys.argv[1] == 'keep':
  assert host_memory.keep_freed_memory()
def turn():
  p = c.malloc(64 << 20)
  c.memset(p, 1, 64 << 20)
  c.free(p)
turn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
  turn()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
'''


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='mallopt is of glibc')
def test_large_blocks_are_kept():
  faults = {how: int(subprocess.run([sys.executable, '-c', PROGRAM, how], capture_output=True,
                                    text=True, check=True).stdout) for how in ('keep', 'as it is')}
  assert faults['keep'] < 100
  assert faults['keep'] < faults['as it is']


HOLES = '''
import ctypes
from longctx.parallel import host_memory
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
c.free.argtypes, c.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def resident():
  with open('/proc/self/statm') as file:
    return int(file.read().split()[1]) * 4096
import sys
assert getattr(host_memory, sys.argv[1])()
before = resident()
blocks = [c.malloc(1 << 18) for _ in range(400)]
for block in blocks:
  c.memset(block, 1, 1 << 18)
for block in blocks[:-1]:   # the last stands behind the hole that the others leave
  c.free(block)
print(resident() - before)
'''


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='mallopt is of glibc')
def test_freed_blocks_go_back_though_one_behind_them_stays():
  held = {how: int(subprocess.run([sys.executable, '-c', HOLES, how], capture_output=True, text=True,
                                  check=True).stdout)
          for how in ('keep_freed_memory', 'return_freed_memory')}
  assert held['keep_freed_memory'] > 90 << 20
  assert held['return_freed_memory'] < 10 << 20
