"""Chips in a cycle: each linked to the next."""

import dataclasses
import itertools
import math

import pytest

from longctx.parallel import aot, mesh, neighbours

SLICES = sorted({tuple(map(int, size.split('x'))) for sizes in aot.TOPOLOGIES.values()
                 for size in sizes if math.prod(map(int, size.split('x'))) <= 1024})


def linked(a, b):
  return sum(abs(p - q) for p, q in zip(a, b)) == 1


@pytest.mark.parametrize('sizes', [*SLICES, (3, 4), (4, 3), (2, 3), (3, 2, 1), (3, 5, 2), (1, 2)])
def test_a_cycle_visits_every_chip_over_links(sizes):
  found = neighbours.cycle(sizes)
  assert sorted(found) == sorted(neighbours.path(sizes)) and len(set(found)) == math.prod(sizes)
  assert all(linked(a, b) for a, b in itertools.pairwise(found))
  assert len(found) < 3 or linked(found[-1], found[0])


@pytest.mark.parametrize('sizes', [(3, 3), (1, 3), (8,), (1, 1, 5), (3, 3, 3)])
def test_where_there_is_no_cycle_there_is_none(sizes):
  assert neighbours.cycle(sizes) is None


@dataclasses.dataclass(frozen=True)
class Chip:
  id: int
  coords: tuple[int, ...]
  platform: str = 'tpu'
  process_index: int = 0


def chips(sizes, shift=0):
  return [Chip(i, tuple(c + shift for c in point))
          for i, point in enumerate(sorted(neighbours.path(sizes)))]


def test_a_mesh_of_one_ring_goes_round_the_chips():
  devices = chips((4, 4, 1), shift=4)
  layout = mesh.make_layout(mesh.Config(data=1, seq=16, layout='sequence'), devices)
  ring = [d.coords for d in layout.mesh.devices.flat]
  assert all(linked(a, b) for a, b in zip(ring, ring[1:] + ring[:1]))
  assert {d.id for d in layout.mesh.devices.flat} == set(range(16))


@pytest.mark.parametrize('sizes, data, seq', [((4, 4, 1), 2, 8), ((8, 8, 1), 4, 16), ((4, 4, 4), 4, 16), ((4, 8, 8), 4, 64)])
def test_every_ring_of_a_mesh_goes_round_chips_of_its_own(sizes, data, seq):
  """And the chips that share a place in their rings are equally far apart."""
  layout = mesh.make_layout(mesh.Config(data=data, seq=seq, layout='sequence'), chips(sizes))
  rings = [[d.coords for d in ring] for ring in layout.mesh.devices[:, :, 0]]
  assert len({point for ring in rings for point in ring}) == data * seq
  for ring in rings:
    assert all(linked(a, b) for a, b in zip(ring, ring[1:] + ring[:1]))
    assert len({tuple(p - q for p, q in zip(a, b)) for a, b in zip(ring, rings[0])}) == 1


def test_a_host_reads_rings_that_follow_each_other():
  of = lambda sizes, host: [dataclasses.replace(d, process_index=host(*d.coords)) for d in chips(sizes)]
  halves = of((4, 2, 1), lambda x, y, z: x // 2)
  found = neighbours.in_cycles(halves, 2)
  assert [d.process_index for d in found] == [0] * 4 + [1] * 4
  assert all(linked(a.coords, b.coords) for a, b in itertools.pairwise(found[:4]))
  # Four rings of two: the second host would read the second and the third, which is no half of the rows.
  across = of((8, 1, 1), lambda x, y, z: (x + 2) // 4)
  assert neighbours.in_cycles(across, 4) == across
  layout = mesh.make_layout(mesh.Config(data=2, seq=4, layout='sequence'), halves)
  assert [d.process_index for d in layout.mesh.devices[:, 0, 0]] == [0, 1]


def test_other_meshes_and_devices_keep_their_order():
  devices = chips((4, 4, 1))
  layout = mesh.make_layout(mesh.Config(data=2, seq=4, model=2, layout='sequence'), devices)
  assert [d.id for d in layout.mesh.devices.flat] == list(range(16))
  broken = devices[:-1]   # no grid
  assert neighbours.in_cycles(broken, 1) == broken
  assert neighbours.in_cycles(chips((3, 3, 1)), 3) == chips((3, 3, 1))   # rows of three are no cycle
  twins = [Chip(0, (0, 0, 0)), Chip(1, (0, 0, 0))]
  assert neighbours.in_cycles(twins, 1) == twins
  stand_ins = aot.stand_ins(aot.check_topology('v5e:2x2')[0], 4)
  assert neighbours.in_cycles(stand_ins, 1) == stand_ins
