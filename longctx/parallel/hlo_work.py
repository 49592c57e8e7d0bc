"""The arithmetic and the memory traffic of a compiled program, loops multiplied by their turns.

XLA's own `cost_analysis` counts the body of a loop once. Here it counts as often as it turns where
that is known; where it is not, once, and the loop is listed as unknown: the sum is a lower bound.
Held by: tests/test_hlo.py (closed forms).
"""

import math
import re
from typing import NamedTuple

from longctx.parallel.hlo import (
    Instruction,
    Program,
    arrays,
    by_name,
    computes,
    num_bytes,
    trip_count,
)


def matmul_flops(body: dict[str, Instruction], x: Instruction) -> float:
  """2 a multiply-add of a dot or a convolution, padding and dilation not counted as XLA does."""
  out = math.prod(arrays(x.shape)[0][1])
  left, right = (arrays(body[name].shape)[0][1] for name in x.operands[:2])
  if x.opcode == 'dot':
    dims = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', x.attributes)
    return 2.0 * out * math.prod(left[int(d)] for d in (dims[1] if dims else '').split(',') if d)
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', x.attributes)
  window = dict(re.findall(r'(\w+)=(\S+?)(?=[\s}])',
                           (re.search(r'window=\{[^}]*\}', x.attributes) or [''])[0]
                           .removeprefix('window={').replace('}', ' }')))
  shapes = [dict(zip(names, dims)) for names, dims in
            zip(labels.groups(), (left, right, arrays(x.shape)[0][1]))]
  pairs = 1   # of output and kernel places that meet a number of the input, over all spatial dims
  spatial = sorted(name for name in labels[1] if name.isdigit())
  for i, name in enumerate(spatial):
    at = lambda key, default, i=i: window[key].split('x')[i] if key in window else default
    pairs *= _meeting(shapes[0][name], shapes[1][name], shapes[2][name],
                      stride=int(at('stride', 1)), low=int(str(at('pad', '0_0')).split('_')[0]),
                      spread=int(at('lhs_dilate', 1)), kernel_spread=int(at('rhs_dilate', 1)))
  return 2.0 * pairs * shapes[2]['b'] * shapes[2]['f'] * shapes[1]['i'] / _batches(x)


def _batches(x: Instruction) -> int:
  found = re.search(r'batch_group_count=(\d+)', x.attributes)
  return int(found[1]) if found else 1


def _meeting(size: int, kernel: int, out: int, *, stride: int, low: int, spread: int,
             kernel_spread: int) -> int:
  reach = (size - 1) * spread + 1
  count = 0
  for k in range(kernel):
    first = k * kernel_spread - low   # place in the spread input of output 0
    count += sum(1 for o in range(out)
                 if 0 <= (at := first + o * stride) < reach and at % spread == 0)
  return count


class Work(NamedTuple):
  """Arithmetic of a program; a lower bound where something is unknown."""

  flops: float
  unknown_loops: int       # loops whose body counts once
  unknown_kernels: int     # custom calls that say nothing of their work


def work(program: Program) -> Work:
  """FLOPs of one device, loops multiplied; of a conditional the branch with the most."""
  done: dict[str, Work] = {}

  def total(name: str) -> Work:
    if name not in done:
      done[name] = Work(*map(sum, zip((0.0, 0, 0), *map(one, program.computations[name]))))
    return done[name]

  def one(x: Instruction) -> Work:
    body = bodies[id(x)]
    if x.opcode in ('dot', 'convolution'):
      return Work(matmul_flops(by_name(body), x), 0, 0)
    if x.opcode == 'custom-call' and computes(program, x):
      said = re.search(r'\\?"flops\\?":\s*\\?"?(\d+)', x.attributes)
      return Work(float(said[1]), 0, 0) if said else Work(0.0, 0, 1)
    if x.opcode == 'while':
      turns, inner = trip_count(program, body, x), total(x.attribute('body'))
      hides = turns is None and inner.flops > 0
      return Work((1 if turns is None else turns) * inner.flops, inner.unknown_loops + hides,
                  inner.unknown_kernels)
    if x.opcode == 'conditional':
      return max(map(total, x.branches()))
    if x.opcode in ('fusion', 'call', 'async-start'):
      return Work(*map(sum, zip((0.0, 0, 0), *map(total, x.called()))))
    return Work(0.0, 0, 0)

  bodies = {id(x): body for body in program.computations.values() for x in body}
  return total(program.entry)


# What goes to and from the device's memory.

FREE = ('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'iota',
        'partition-id', 'replica-id', 'optimization-barrier', 'async-done', 'async-update')


def traffic(program: Program) -> float:
  """Bytes that one device reads from and writes to its main memory.

  Each scheduled instruction reads its operands and writes its result, except those that the
  schedule keeps in a nearer memory; a slice is read, an update written, and not the whole.
  """
  done: dict[str, float] = {}

  def total(name: str) -> float:
    if name not in done:
      body = program.computations[name]
      names = by_name(body)
      done[name] = sum(one(body, names, x) for x in body)
    return done[name]

  def one(body, names, x: Instruction) -> float:
    if x.opcode in FREE or x.opcode.endswith('-done'):
      return 0.0
    if x.opcode == 'while':
      return (trip_count(program, body, x) or 1) * total(x.attribute('body'))
    if x.opcode == 'conditional':
      return max(map(total, x.branches()))
    if x.opcode == 'call':
      return total(x.called()[0])
    read = [main_memory(names[name].shape) for name in x.operands]
    written = main_memory(x.shape)
    if x.opcode.endswith('-start'):   # its shape is a tuple of operand, result and flags
      return 2.0 * sum(read)
    if x.opcode == 'dynamic-slice':
      return 2.0 * written
    if x.opcode == 'dynamic-update-slice':
      return 2.0 * read[1]
    if x.opcode == 'fusion':
      read, written = _of_fusion(program.computations[x.called()[0]], read, written)
    return float(sum(read) + written)

  return total(program.entry)


def _of_fusion(body: list[Instruction], read: list[int], written: int) -> tuple[list[int], int]:
  """A fusion's (reads, writes), where it slices or updates what it is given."""
  names, read = by_name(body), list(read)
  users = {x.name: [y for y in body if x.name in y.operands] for x in body}
  for x in body:
    if x.opcode != 'parameter' or not users[x.name]:
      continue
    i, used = int(x.literal), users[x.name]
    if all(y.opcode in ('dynamic-slice', 'slice', 'gather') for y in used):
      read[i] = min(read[i], sum(num_bytes(y.shape) for y in used))
    elif all(y.opcode == 'dynamic-update-slice' and y.operands[0] == x.name for y in used):
      read[i] = 0
  root = next(x for x in body if x.root)
  while root.opcode == 'bitcast':
    root = names[root.operands[0]]
  if root.opcode == 'dynamic-update-slice':
    written = min(written, num_bytes(names[root.operands[1]].shape))
  return read, written


def main_memory(shape: str) -> int:
  """Bytes of those arrays of a shape that have no memory space of their own, S(1) and so on."""
  far = re.sub(r'\w+\[[\d,]*\]\{[^}]*S\([1-9]\d*\)[^}]*\}', '', shape)
  return num_bytes(far)
