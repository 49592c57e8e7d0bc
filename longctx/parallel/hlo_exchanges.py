"""The exchanges between devices in a compiled program: which, how many bytes, how many exposed.

An exchange is exposed when nothing that computes (a matrix product, a kernel, a loop or a fusion
with one of these in it) is scheduled between its start and its end; one that is not split into
start and end is always exposed. The order of a schedule is evidence of overlap, not a timing.
XLA's CPU backend splits none, and sends bfloat16 as float32: read bytes there in float32 programs.
Held by: tests/test_hlo.py.
"""

import math
import re
from typing import NamedTuple

from longctx.parallel.hlo import (
    COLLECTIVES,
    Instruction,
    Program,
    by_name,
    computes,
    num_bytes,
    trip_count,
)


class Exchange(NamedTuple):
  """One collective of the program."""

  kind: str
  axis: str                # mesh axes along which its groups lie; '?' where not derivable
  group: int               # devices that take part in one group
  bytes: int               # that a device sends in one turn
  times: int               # turns of the loops around it that are known
  exposed: bool
  split: bool              # into start and end
  name: str
  where: str               # the source operation, as the program's metadata has it


def exchanges(program: Program, mesh: dict[str, int]) -> list[Exchange]:
  """Every collective on the way from the entry, with the turns of the loops around it."""
  found = []

  def walk(name: str, times: int) -> None:
    body = program.computations[name]
    names = by_name(body)
    for i, x in enumerate(body):
      for inner, collective, done in _begins(program, names, x):
        end = next((j for j in range(i + 1, len(body)) if done(body[j])), None) if done else None
        hidden = end is not None and any(computes(program, y) for y in body[i + 1:end])
        found.append(_exchange(inner, collective, mesh, times, not hidden, done is not None))
      if x.opcode == 'while':
        walk(x.attribute('body'), times * (trip_count(program, body, x) or 1))
      elif x.opcode in ('call', 'conditional'):
        for inner_name in [*x.called(), *x.branches()]:
          walk(inner_name, times)

  walk(program.entry, 1)
  return found


def _begins(program, names, x):
  """[(names of its computation, collective, test of its end or None if it is not split)]."""
  if x.opcode in COLLECTIVES:
    return [(names, x, None)]
  if x.opcode.removesuffix('-start') in COLLECTIVES:
    return [(names, x, lambda y: y.opcode.endswith('-done') and y.operands[:1] == (x.name,))]
  if x.opcode == 'async-start':
    inner = program.computations[x.called()[0]]
    return [(by_name(inner), y, lambda z: z.opcode == 'async-done' and _leads(names, z, x.name))
            for y in inner if y.opcode in COLLECTIVES]
  if x.opcode != 'fusion':
    return []
  # TPU: the exchange begins in one fusion, goes on inside others that compute, ends in a third.
  called = x.called()[0]
  inner = by_name(program.computations[called])
  if called.startswith('all-reduce-scatter'):   # TPU: its reduce-scatter, a sum of which each keeps a part
    return [(inner, y._replace(opcode='reduce-scatter', attributes=f'{y.attributes} {x.attributes}'), None)
            for y in inner.values() if y.opcode == 'all-reduce']
  chained = lambda body: {_chain(body[operand]) for y in body.values()
                          if y.target == 'AsyncCollectiveDone' for operand in y.operands
                          if operand in body and body[operand].opcode in COLLECTIVES}
  def ends(collective):
    return lambda y: y.opcode == 'fusion' and _chain(collective) in chained(
        by_name(program.computations[y.called()[0]]))
  return [(inner, inner[y.operands[0]], ends(inner[y.operands[0]])) for y in inner.values()
          if y.target == 'AsyncCollectiveStart' and inner[y.operands[0]].opcode in COLLECTIVES]


def _leads(names, x, start) -> bool:
  """Whether an async-done ends the exchange `start`, through its async-updates."""
  while x.operands and x.operands[0] in names:
    if x.operands[0] == start:
      return True
    x = names[x.operands[0]]
    if x.opcode != 'async-update':
      return False
  return False


def _chain(x: Instruction) -> str:
  found = re.search(r'chain_id="(\d+)"', x.attributes)
  return found[1] if found else x.name


def _exchange(names, x, mesh, times, exposed, split) -> Exchange:
  kind = x.opcode.removesuffix('-start')
  size = sum(num_bytes(names[name].shape) for name in x.operands if name in names)
  found = groups(x.attributes, math.prod(mesh.values()))
  n = len(found[0]) if found and kind != 'collective-permute' else len(found)
  others = (n - 1) / n if n else 0
  sent = {'collective-permute': size, 'collective-broadcast': size, 'all-gather': size * (n - 1),
          'all-reduce': 2 * size * others}.get(kind, size * others)
  said = re.search(r'op_name="([^"]*)"', x.attributes)
  return Exchange(kind, axes_of(found, mesh), n, int(sent), times, exposed, split, x.name,
                  said[1] if said else '')


def groups(attributes: str, devices: int) -> list[list[int]]:
  """Which devices exchange with one another: replica groups, or pairs of a permutation.

  Written as {{0,1},{2,3}}, as [2,4]<=[4,2]T(1,0), or as mesh['a'=2,'b'=4] {'b'}, whose devices
  may be listed in an order of their own.
  """
  listed = re.search(r'(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?\s*)*)\}', attributes)
  if listed:
    return ([_numbers(group) for group in re.findall(r'\{([\d,]*)\}', listed[1])]
            or [list(range(devices))])
  iota = re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', attributes)
  if iota:
    shape, source = _numbers(iota[1]), _numbers(iota[2])
    order = _numbers(iota[3]) if iota[3] else list(range(len(source)))
    return _rows(source, order, shape[-1])
  named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}",
                    attributes)
  return _of_mesh(*named.groups()) if named else []


def _of_mesh(axes: str, devices: str | None, used: str) -> list[list[int]]:
  """Groups along some axes of a mesh of the compiler's own; 'a':(2)4 is a part of an axis."""
  chosen = {name: (int(before or 1), int(size or 0))
            for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", used)}
  shape, picked, rest = [], [], []
  for name, size in re.findall(r"'(\w+)'=(\d+)", axes):
    before, part = chosen.get(name, (int(size), 1))
    part = part or int(size)
    shape += [before, part, int(size) // before // part]
    rest += [len(shape) - 3, len(shape) - 1]
    picked.append(len(shape) - 2)
  found = _rows(shape, rest + picked, math.prod(shape[i] for i in picked))
  if not devices:
    return found
  iota = re.fullmatch(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', devices)
  if iota:
    source = _numbers(iota[1])
    order = _numbers(iota[2]) if iota[2] else list(range(len(source)))
    ids = _rows(source, order, math.prod(source))[0]
  else:
    ids = _numbers(devices)
  return [[ids[i] for i in group] for group in found]


def _numbers(text: str) -> list[int]:
  return [int(n) for n in text.split(',') if n]


def _rows(source: list[int], order: list[int], width: int) -> list[list[int]]:
  """range(n) shaped as `source`, its dims put in `order`, cut into rows of `width`."""
  strides = [math.prod(source[i + 1:]) for i in range(len(source))]
  flat = [0]
  for dim in order:
    flat = [base + i * strides[dim] for base in flat for i in range(source[dim])]
  return [flat[i:i + width] for i in range(0, len(flat), width)]


def axes_of(found: list[list[int]], mesh: dict[str, int]) -> str:
  """'seq', 'data+seq': the mesh axes along which the members of a group differ."""
  if not found or max(map(max, found)) >= math.prod(mesh.values()):
    return '?'
  sizes = list(mesh.values())
  strides = [math.prod(sizes[i + 1:]) for i in range(len(sizes))]
  at = lambda device: [device // stride % size for stride, size in zip(strides, sizes)]
  differ = {i for group in found for a in map(at, group)
            for i, (p, q) in enumerate(zip(a, at(group[0]))) if p != q}
  return '+'.join(name for i, name in enumerate(mesh) if i in differ) or 'none'
