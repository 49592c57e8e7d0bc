"""Compiles for hardware that is not here, and says what a compiled program needs and does.

`topology_devices('v5e:8x8')` are devices that programs can be compiled for and not run on; libtpu
brings the real compiler, so that memory and schedule are those of the chip. `report` reads a
compiled program: memory against the chip's, exchanges and how many are exposed, arithmetic, and the
least time that each of computing, memory and links takes. A roofline is a bound, not a timing: it
takes every chip's published peak, and each exchange over one link, one way, to a neighbour.
Held by: tests/test_aot.py.
"""

import dataclasses
import glob
import importlib.util
import itertools
import math
import os
import re
import tempfile
from typing import Any

import jax

from longctx.errors import ConfigError, check, nearest
from longctx.parallel import hlo, hlo_exchanges, hlo_work
from longctx.parallel.chips import CHIPS, Chip, chip_of

# Slices that exist, by chip: docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e}.
FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
TOPOLOGIES = {
    'v5e': FLAT,
    'v6e': FLAT,
    'v5p': ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8', '8x8x16',
            '8x16x16', '16x16x16', '16x16x24'),
}
# libtpu asks a TPU machine's metadata server, warns where there is none, and lets only one process
# load it; a process that only compiles needs none of it.
ENVIRONMENT = {'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
               'TPU_ACCELERATOR_TYPE': 'v5litepod-1', 'TPU_WORKER_HOSTNAMES': 'localhost'}


def check_topology(name: str) -> tuple[Chip, int]:
  """(chip, number of devices) of a topology by name; needs no libtpu."""
  kind, _, shape = name.partition(':')
  every = [f'{chip}:{size}' for chip, sizes in TOPOLOGIES.items() for size in sizes]
  known = '; '.join(f'{chip}: {", ".join(sizes)}' for chip, sizes in TOPOLOGIES.items())
  check(name in every, f'--topology={name}: no such topology{nearest(name, every)}; known are '
        f'{known}; write CHIP:SIZE, as in v5e:8x8')
  return next(c for c in CHIPS if c.name == kind), math.prod(map(int, shape.split('x')))


def topology_devices(name: str) -> list[jax.Device]:
  """The devices of a TPU topology that need not be here; ConfigError says what is missing."""
  check_topology(name)
  check(importlib.util.find_spec('libtpu') is not None, f'--topology={name}: the compiler for TPUs '
        'is not installed; pip install libtpu (Linux on x86-64)')
  for key, value in ENVIRONMENT.items():
    os.environ.setdefault(key, value)
  from jax.experimental import topologies
  try:
    return list(topologies.get_topology_desc(platform='tpu', topology_name=name).devices)
  except Exception as e:   # the plugin raises RuntimeError, ImportError and its own
    raise ConfigError(f'--topology={name}: libtpu cannot be loaded: {e}; pip install --upgrade '
                      'libtpu, or install the one that jax[tpu] asks for') from e


@dataclasses.dataclass(frozen=True)
class StandIn:
  """As much of a device as shapes and shardings ask for; nothing can be compiled for it."""

  id: int
  device_kind: str
  platform: str = 'tpu'
  process_index: int = 0
  num_cores: int = 1


def stand_ins(chip: Chip, count: int) -> list[StandIn]:
  """Devices for planning, where libtpu need not be installed."""
  kind = {'v5e': 'TPU v5e', 'v5p': 'TPU v5p', 'v6e': 'TPU v6e'}[chip.name]
  return [StandIn(i, kind) for i in range(count)]


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of one device."""

  arguments: int
  outputs: int     # those that take no argument's place
  temporary: int
  code: int
  host: int        # on the host beside it

  @property
  def total(self) -> int:
    return self.arguments + self.outputs + self.temporary + self.code


def memory_of(compiled: Any) -> Memory:
  m = compiled.memory_analysis()
  return Memory(arguments=m.argument_size_in_bytes,
                outputs=m.output_size_in_bytes - m.alias_size_in_bytes,
                temporary=m.temp_size_in_bytes, code=m.generated_code_size_in_bytes,
                host=m.host_argument_size_in_bytes + m.host_temp_size_in_bytes
                + m.host_output_size_in_bytes - m.host_alias_size_in_bytes)


class DoesNotFitError(Exception):
  """The compiler's own refusal: it needs `used` of `limit` bytes."""

  def __init__(self, used: int, limit: int):
    super().__init__(f'needs {used:,} of {limit:,} bytes')
    self.used, self.limit = used, limit


def compile_lowered(lowered: Any, options: dict | None = None) -> Any:
  """lowered.compile(), which raises DoesNotFitError where the compiler finds too little memory."""
  try:
    return lowered.compile(options)
  except jax.errors.JaxRuntimeError as e:
    said = (re.search(r'Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm', str(e)) or
            re.search(r'\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)', str(e)))
    if said is None:
      raise
    of = lambda number, unit: int(float(number) * 1024 ** ('KMGT'.index(unit) + 1))
    raise DoesNotFitError(of(*said.groups()[:2]), of(*said.groups()[2:])) from e


def compile_to_read(lowered: Any, options: dict | None = None) -> tuple[Any, str]:
  """(compiled, its text as scheduled), as `compile_lowered`.

  The compiler writes the text itself: jaxlib 0.10 cannot read back some programs for v5p
  ("async-update instruction should have 1 operands").
  """
  with tempfile.TemporaryDirectory() as folder:
    dump = dict(xla_dump_to=folder, xla_dump_hlo_as_text=True)
    compiled = compile_lowered(lowered, (options or {}) | dump)
    written = glob.glob(f'{folder}/*after_optimizations.txt')
    if len(written) == 1:
      with open(written[0]) as file:
        return compiled, file.read()
  return compiled, compiled.as_text()


def report(compiled: Any, mesh: dict[str, int], *, model_flops: float,
           chip: Chip | None = None, text: str = '') -> dict[str, Any]:
  """What a compiled program needs and does, of one device; JSON-able.

  `text`: from compile_to_read, where `compiled` may not give it. `mesh`: names and sizes of the axes in the order of the devices. `model_flops`: what the model's
  formula says of one device's part, counted instead where it is more than can be read.
  """
  program = hlo.parse(text or compiled.as_text())
  if chip is None:
    chip = chip_of(compiled.runtime_executable().local_devices()[0].device_kind)
  memory = memory_of(compiled)
  done, moved = hlo_work.work(program), hlo_work.traffic(program)
  found = hlo_exchanges.exchanges(program, mesh)
  complete = not (done.unknown_loops or done.unknown_kernels)
  flops = done.flops if complete else max(done.flops, model_flops)
  wire = sum(x.bytes * x.times for x in found)
  largest = sorted((x for x in found if x.exposed), key=lambda x: -x.bytes * x.times)[:8]
  out = dict(
      chip=chip.name if chip else '', devices=math.prod(mesh.values()), mesh=dict(mesh),
      memory=dict(dataclasses.asdict(memory), total=memory.total,
                  chip=chip.memory_bytes if chip else 0),
      fits=None if chip is None else memory.total <= chip.memory_bytes,
      flops=dict(counted=done.flops, complete=complete, unknown_loops=done.unknown_loops,
                 unknown_kernels=done.unknown_kernels, model=model_flops),
      traffic_bytes=moved, wire_bytes=wire, exchanges=grouped(found),
      exposed=sum(x.exposed for x in found), num_exchanges=len(found),
      largest_exposed=[dict(kind=x.kind, axis=x.axis, bytes=x.bytes, times=x.times, name=x.name,
                            where=x.where) for x in largest])
  if chip is not None:
    out['roofline'] = roofline(chip, flops, moved, wire, model_flops)
  return out


def roofline(chip: Chip, flops: float, moved: float, wire: float, model_flops: float
             ) -> dict[str, Any]:
  """The least seconds of a step if all three overlap, what binds, and the utilisation then."""
  seconds = dict(compute=flops / chip.flops, memory=moved / chip.bandwidth,
                 wire=wire / chip.link if chip.link else 0.0)
  binds = max(seconds, key=seconds.get)
  least = seconds[binds]
  return dict(seconds=seconds, binds=binds, least=least,
              utilization=model_flops / chip.flops / least if least else 0.0)


def grouped(found: list[hlo_exchanges.Exchange]) -> list[dict[str, Any]]:
  """A row for each kind of exchange over each axis, the most bytes first."""
  key = lambda x: (x.kind, x.axis)
  rows = []
  for (kind, axis), some in itertools.groupby(sorted(found, key=key), key):
    some = list(some)
    exposed = [x for x in some if x.exposed]
    rows.append(dict(
        kind=kind, axis=axis, count=len(some), turns=sum(x.times for x in some),
        bytes=sum(x.bytes * x.times for x in some), exposed=len(exposed),
        exposed_bytes=sum(x.bytes * x.times for x in exposed),
        largest_exposed=max((x.bytes for x in exposed), default=0)))
  return sorted(rows, key=lambda row: -row['bytes'])


def table(found: dict[str, Any]) -> str:
  """The report as lines to read."""
  m, gib = found['memory'], lambda n: f'{n / 2**30:8.2f} GiB'
  sizes = ' x '.join(f'{axis} {n}' for axis, n in found['mesh'].items())
  lines = [f'{found["devices"]} devices{" " + found["chip"] if found["chip"] else ""}: {sizes}',
           'memory of a device']
  lines += [f'  {name:<12}{gib(m[name])}' for name in ('arguments', 'outputs', 'temporary', 'code')]
  of = f' of {m["chip"] / 2**30:.0f} GiB: ' + ('fits' if found['fits'] else 'DOES NOT FIT')
  lines += [f'  {"total":<12}{gib(m["total"])}{of if m["chip"] else ""}']
  lines += [f'  {"on the host":<12}{gib(m["host"])}'] if m['host'] else []
  lines += [f'exchanges: {found["num_exchanges"]}, of which exposed {found["exposed"]}',
            '  kind                axis          count   turns   MiB a step  exposed  MiB exposed']
  lines += [f'  {r["kind"]:<19} {r["axis"]:<12} {r["count"]:>6} {r["turns"]:>7} '
            f'{r["bytes"] / 2**20:>12,.1f} {r["exposed"]:>8} {r["exposed_bytes"] / 2**20:>12,.1f}'
            for r in found['exchanges']]
  lines += ['  the largest exposed:'] * bool(found['largest_exposed'])
  lines += [f'    {x["bytes"] * x["times"] / 2**20:,.1f} MiB {x["kind"]} {x["where"][-80:]}'
            for x in found['largest_exposed'][:4]]
  f = found['flops']
  lines += [f'arithmetic of a device: {f["counted"] / 1e12:.4g} TFLOP read from the program'
            + ('' if f['complete'] else f', without {f["unknown_loops"]} loops of unknown length '
               f'and {f["unknown_kernels"]} kernels'),
            f'  {f["model"] / 1e12:.4g} TFLOP by the model\'s formula']
  if 'roofline' in found:
    r = found['roofline']
    seconds = ', '.join(f'{name} {s:.4g} s' for name, s in r['seconds'].items())
    lines += [f'at the published peaks: {seconds}',
              f'  at least {r["least"]:.4g} s a step; {r["binds"]} binds; model FLOPs utilisation '
              f'then {r["utilization"]:.1%}']
  return '\n'.join(lines)
