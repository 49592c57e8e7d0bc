"""How much memory a device has left, as far as it can be told.

Held by: tests/test_chat.py.
"""

import os
import re
from typing import Any

from longctx.parallel import chips


def free_bytes(device: Any) -> int | None:
  """Of an accelerator, what it may still hold; of a CPU, what the machine has available; else None."""
  if device.platform == 'cpu':
    return available_memory()
  stats = device.memory_stats() or {}
  chip = chips.chip_of(device.device_kind)
  limit = stats.get('bytes_limit') or (chip.memory_bytes if chip else None)
  return None if limit is None else limit - stats.get('bytes_in_use', 0)


def available_memory() -> int | None:
  """Of the machine, without swapping; None where it does not tell."""
  try:
    with open('/proc/meminfo') as file:
      found = re.search(r'^MemAvailable:\s+(\d+) kB', file.read(), re.MULTILINE)
    if found:
      return int(found[1]) * 1024
    return os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  except (OSError, ValueError):
    return None
