"""What the chunked recurrences share: tokens of a chunk by platform, documents within a chunk.

Held by: tests/test_elementwise.py, tests/test_decay.py.
"""

from typing import TypeVar

import jax

from longctx.parallel import mesh

Choice = TypeVar('Choice', int, str)


def platform() -> str:
  """Of the devices that the code being traced is for."""
  layout = mesh.current()
  return layout.mesh.devices.flat[0].platform if layout else jax.default_backend()


def choose(given: Choice, by_platform: dict[str, Choice]) -> Choice:
  """`given`, or where it is 0 or '' the platform's; the table's entry '' is for platforms not named."""
  return given or by_platform.get(platform(), by_platform[''])
