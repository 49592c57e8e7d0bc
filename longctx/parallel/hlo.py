"""Reads the text of a compiled program: computations, instructions, how often a loop turns.

A program is what one device runs. A loop's turns are known where the compiler says them or its
condition compares a counter with a constant; else `trip_count` is None.
Held by: tests/test_hlo.py.
"""

import math
import re
from typing import NamedTuple

ITEM_BYTES = {'pred': 1, 's4': .5, 'u4': .5, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 's32': 4,
              'u32': 4, 's64': 8, 'u64': 8, 'bf16': 2, 'f16': 2, 'f32': 4, 'f64': 8, 'c64': 8,
              'c128': 16, 'f8e4m3fn': 1, 'f8e5m2': 1, 'f8e4m3b11fnuz': 1}
ARRAY = re.compile(r'\b([a-z]+[0-9]*(?:e[0-9]m[0-9]\w*)?)\[([0-9,]*)\]')
INSTRUCTION = re.compile(r'\s+(ROOT )?%?([\w.\-]+) = (.*)')
END = re.compile(r'\}(, execution_thread="\w+")?\s*')   # of a computation
COLLECTIVES = ('collective-permute', 'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all',
               'ragged-all-to-all', 'collective-broadcast')
# Custom calls that compute nothing: allocation, layout, and the ends of fused exchanges.
BOOKKEEPING = ('AllocateBuffer', 'ConcatBitcast', 'AsyncCollectiveStart', 'AsyncCollectiveDone',
               'AssumeGatherIndicesInBound', 'GatherScatterIndicesBitpacked', 'Sharding',
               'SPMDFullToShardShape', 'SPMDShardToFullShape', 'MoveToHost', 'MoveToDevice',
               'annotate_device_placement', 'PinToDevice')


class Instruction(NamedTuple):
  """One line: `name = shape opcode(operands), attributes`."""

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  literal: str               # what stands between the parentheses, as written
  attributes: str
  root: bool

  def attribute(self, key: str) -> str:
    """'%body' of 'body=%body'; '' where it has none."""
    found = re.search(rf'\b{key}=%?([\w.\-]+)', self.attributes)
    return found[1] if found else ''

  @property
  def target(self) -> str:
    found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
    return found[1] if found else ''

  def called(self) -> list[str]:
    """Computations that run as part of this one, but for a loop's and a conditional's."""
    return [name for name in (self.attribute('calls'), self.attribute('to_apply')) if name]

  def branches(self) -> list[str]:
    listed = re.search(r'branch_computations=\{([^}]*)\}', self.attributes)
    if listed:
      return [name.strip().lstrip('%') for name in listed[1].split(',')]
    pair = [self.attribute('true_computation'), self.attribute('false_computation')]
    return [name for name in pair if name]


class Program(NamedTuple):
  entry: str
  computations: dict[str, list[Instruction]]
  scheduled: bool


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
  """[('f32', (4, 8)), ...] of a shape, tuples taken apart."""
  return [(kind, tuple(int(n) for n in dims.split(',') if n))
          for kind, dims in ARRAY.findall(shape) if kind in ITEM_BYTES]


def num_bytes(shape: str) -> int:
  """Bytes of the numbers, without what a layout pads."""
  return int(sum(math.prod(dims) * ITEM_BYTES[kind] for kind, dims in arrays(shape)))


def parse(text: str) -> Program:
  computations, entry, body = {}, '', None
  for line in _whole_lines(text):
    if line[:1].strip() and line.rstrip().endswith('{'):
      name = re.match(r'(?:ENTRY )?%?([\w.\-]+)', line)[1]
      body = computations.setdefault(name, [])
      entry = name if line.startswith('ENTRY') else entry
    elif re.fullmatch(END, line):
      body = None
    elif body is not None:
      found = re.match(INSTRUCTION, line)
      if found:
        body.append(_instruction(found[2], found[3], bool(found[1])))
  if not entry:
    raise ValueError('this text is no HLO module: it has no line that begins with ENTRY.')
  return Program(entry, computations, 'is_scheduled=true' in text.split('\n', 1)[0])


def _whole_lines(text: str) -> list[str]:
  """Lines, those joined over which one instruction's attributes are spread (a kernel's notes)."""
  lines, inside = [], False
  for line in text.splitlines():
    begins = line[:1].strip() and line.rstrip().endswith('{')
    ends = re.fullmatch(END, line)
    if inside and not ends and not begins and not re.match(INSTRUCTION, line):
      lines[-1] += ' ' + line
      continue
    lines.append(line)
    inside = not ends and (inside or bool(begins))
  return lines


def _instruction(name: str, rest: str, root: bool) -> Instruction:
  # Index comments in long tuples, /*index=5*/, hold an equals sign but no parenthesis.
  end = _closing(rest, 0) + 1 if rest.startswith('(') else rest.index(' ')
  shape, rest = rest[:end], rest[end:].lstrip()
  opening = rest.index('(')
  closing = _closing(rest, opening)
  literal = rest[opening + 1:closing]
  # Before optimisation names stand without their %, and without their shapes.
  names = r'%([\w.\-]+)' if '%' in literal else r'(?:^|, )([\w.\-]+)(?=,|$)'
  return Instruction(name, shape, rest[:opening], tuple(re.findall(names, literal)), literal,
                     rest[closing + 1:], root)


def _closing(text: str, opening: int) -> int:
  depth = 0
  for i in range(opening, len(text)):
    depth += (text[i] == '(') - (text[i] == ')')
    if depth == 0:
      return i
  raise ValueError(f'unbalanced parentheses in {text[:80]!r}')


# How often a loop turns.


def trip_count(program: Program, where: list[Instruction], loop: Instruction) -> int | None:
  """Turns of the while loop `loop`, an instruction of the computation `where`; None: unknown."""
  said = re.search(r'known_trip_count[\\":{]+n[\\":]+(\d+)', loop.attributes)
  if said:
    return int(said[1])
  condition = program.computations[loop.attribute('condition')]
  body = program.computations[loop.attribute('body')]
  compare = _find(program, condition, _root(condition), {})
  if compare is None or compare[0] != 'LT':
    return None
  (_, counter, shift), limit = compare[1], compare[2]
  initial = by_name(where)[loop.operands[0]]
  if initial.opcode != 'tuple':
    return None
  start = _find(program, where, by_name(where)[initial.operands[counter]], {})
  after = _root(body)
  if after.opcode != 'tuple':
    return None
  step = _find(program, body, by_name(body)[after.operands[counter]], {})
  if limit[0] == 'argument':   # compared with another element of the loop's tuple, if that is fixed
    stays = _find(program, body, by_name(body)[after.operands[limit[1]]], {})
    if stays != ('argument', limit[1], 0) or limit[2]:
      return None
    limit = _find(program, where, by_name(where)[initial.operands[limit[1]]], {})
  if (start is None or start[0] != 'constant' or limit is None or limit[0] != 'constant'
      or step is None or step[:2] != ('argument', counter) or step[2] < 1):
    return None
  return max(0, math.ceil((limit[1] - start[1] - shift) / step[2]))


def by_name(body: list[Instruction]) -> dict[str, Instruction]:
  return {instruction.name: instruction for instruction in body}


def _root(body: list[Instruction]) -> Instruction:
  return next(instruction for instruction in body if instruction.root)


def _find(program, body, x, given):
  """What a scalar is: ('constant', n), ('argument', element, shift), ('LT', a, b), or None.

  `given`: values of the parameters, where the computation is a fusion's.
  """
  names = by_name(body)
  operand = lambda i: _find(program, body, names[x.operands[i]], given)
  if x.opcode == 'constant':
    return ('constant', int(x.literal)) if re.fullmatch(r'-?\d+', x.literal) else None
  if x.opcode == 'parameter':
    return given.get(int(x.literal))
  if x.opcode == 'get-tuple-element' and names[x.operands[0]].opcode == 'parameter' and not given:
    return 'argument', int(re.search(r'index=(\d+)', x.attributes)[1]), 0
  if x.opcode in ('copy', 'bitcast', 'reshape', 'convert', 'broadcast'):
    return operand(0)
  if x.opcode in ('fusion', 'call') and x.called():
    inner = program.computations[x.called()[0]]
    return _find(program, inner, _root(inner), dict(enumerate(map(operand, range(len(x.operands))))))
  if x.opcode == 'add':
    a, b = sorted((operand(0), operand(1)), key=lambda v: v is None or v[0] == 'constant')
    if a is not None and b is not None and b[0] == 'constant':
      return (*a[:-1], a[-1] + b[1])
  if x.opcode == 'compare' and 'direction=LT' in x.attributes:
    a, b = operand(0), operand(1)
    return ('LT', a, b) if a and a[0] == 'argument' and b else None
  return None


# What computes.


def computes(program: Program, x: Instruction, seen: dict[str, bool] | None = None) -> bool:
  """Whether an instruction multiplies matrices or runs a kernel, itself or inside."""
  seen = {} if seen is None else seen
  if x.opcode in ('dot', 'convolution'):
    return True
  if x.opcode == 'custom-call':
    return x.target not in BOOKKEEPING
  if x.opcode not in ('fusion', 'call', 'while', 'conditional'):
    return False
  for name in [*x.called(), *x.branches(), x.attribute('body')]:
    if name and name not in seen:
      seen[name] = False
      seen[name] = any(computes(program, y, seen) for y in program.computations[name])
    if name and seen[name]:
      return True
  return False
