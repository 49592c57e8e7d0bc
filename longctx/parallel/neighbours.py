"""Orders chips so that each is linked to the next, and the last to the first.

A ring then sends over one link a hop. Where it has to send further, over several links and across
other transfers, a TPU's compiler waits for the transfer (64 chips of v5e in the order of their
numbers: no exchange of a ring is hidden, experiments/01_cost_of_attention).

    path of a grid   along one line to its end, back along the next, and so on
    cycle            down the first column, back by such a path over the other columns
    several rings    each over a box of its own

Held by: tests/test_neighbours.py, tests/test_ring_tpu.py.
"""

import itertools
import math
from typing import Any


def cycle(sizes: tuple[int, ...]) -> list[tuple[int, ...]] | None:
  """Every point of a grid once, each next to the one before, the last next to the first.

  None where there is no such way: an odd number of points, or a line of more than two.
  """
  if math.prod(sizes) <= 2:
    return path(sizes)
  axes = sorted((n > 1, n % 2 == 1, axis) for axis, n in enumerate(sizes))
  first = max(axes)[2]   # of odd size, where one is: the others together are then even
  rest = path(sizes[:first] + sizes[first + 1:])
  if len(rest) < 2 or len(rest) % 2:
    return None
  columns = range(1, sizes[first])
  flat = [(0, line) for line in range(len(rest))]
  for turn, line in enumerate(reversed(range(len(rest)))):
    flat += [(column, line) for column in (reversed(columns) if turn % 2 else columns)]
  return [(*rest[line][:first], column, *rest[line][first:]) for column, line in flat]


def path(sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
  """Every point of a grid once, each next to the one before."""
  if not sizes:
    return [()]
  inner = path(sizes[1:])
  return [(i, *point) for i in range(sizes[0]) for point in (reversed(inner) if i % 2 else inner)]


def in_cycles(devices: list[Any], rings: int) -> list[Any]:
  """The devices ring by ring, each in the order of such a cycle, over one of `rings` equal boxes of the grid.

  As they are where they are not a grid of chips, or where no such boxes leave the chips of a host in one ring,
  or in some that follow each other: a host reads one part of a batch's rows.
  """
  at = {tuple(d.coords): d for d in devices if getattr(d, 'coords', None) is not None}
  if len(at) != len(devices):   # no TPUs, or two devices a chip
    return devices
  low = tuple(map(min, zip(*at)))
  sizes = tuple(max(c) - min(c) + 1 for c in zip(*at))
  if math.prod(sizes) != len(at):
    return devices
  cuts = [c for c in itertools.product(*(range(1, n + 1) for n in sizes))
          if math.prod(c) == rings and not any(n % k for n, k in zip(sizes, c))]
  for cut in sorted(cuts, key=lambda c: sum(n // k for n, k in zip(sizes, c))):   # the most compact box
    box = tuple(n // k for n, k in zip(sizes, cut))
    points = cycle(box)
    corners = itertools.product(*(range(start, start + n * k, n) for start, n, k in zip(low, box, cut)))
    found = points and [[at[tuple(a + b for a, b in zip(corner, point))] for point in points] for corner in corners]
    if found and _hosts_stay_together(found):
      return [d for ring in found for d in ring]
  return devices


def _hosts_stay_together(rings: list[list[Any]]) -> bool:
  of: dict[int, set[int]] = {}
  for i, ring in enumerate(rings):
    for d in ring:
      of.setdefault(d.process_index, set()).add(i)
  return all(min(own) % len(own) == 0 and max(own) - min(own) == len(own) - 1 for own in of.values())
