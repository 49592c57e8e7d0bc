"""--mode=compile: the config's real train step, compiled and read, but not run.

For the devices of this machine, or for a topology that is not here (--topology=v5e:8x8). Nothing
is allocated and no corpus is looked for: the state and the batch are shapes with shardings.
Held by: tests/test_aot.py.
"""

import json
import os
import time
from typing import Any

from longctx import assembly, train
from longctx.parallel import aot
from longctx.training import workdir


def run(config: Any, folder: str, topology: str) -> int:
  """Prints the table, writes folder/compile.json; 1 where the program does not fit, else 0."""
  devices = aot.topology_devices(topology) if topology else None
  a = assembly.assemble(config, devices)
  found = dict(topology=topology, parameters=a.model_config.num_parameters(),
               length=a.parts.data.length, batch_size=a.parts.data.batch_size)
  began = time.perf_counter()
  try:
    compiled, text = aot.compile_to_read(train.jit_step(a).lower(a.abstract, a.abstract_batch()))
    found |= aot.report(compiled, dict(a.layout.mesh.shape), model_flops=model_flops(a), text=text,
                        chip=aot.chip_of(a.layout.mesh.devices.flat[0].device_kind))
  except aot.DoesNotFitError as e:
    found |= dict(fits=False, memory=dict(total=e.used, chip=e.limit))
  found['compile_seconds'] = time.perf_counter() - began
  if 'exchanges' in found:
    print(aot.table(found), flush=True)
  else:
    m = found['memory']
    print(f'DOES NOT FIT: the compiler needs {m["total"] / 2**30:.2f} GiB of '
          f'{m["chip"] / 2**30:.2f} GiB a device; --mode=plan shows what takes it', flush=True)
  path = write(folder, 'compile.json', found)
  print(f'compiled in {found["compile_seconds"]:.0f} s; {path}', flush=True)
  return 1 if found['fits'] is False else 0


def write(folder: str, name: str, found: dict[str, Any]) -> str:
  """Writes JSON into the workdir, or the current directory where none was given; its path."""
  folder = folder or '.'
  os.makedirs(folder, exist_ok=True)
  path = os.path.join(folder, name)
  workdir.atomic_write(path, (json.dumps(found, indent=2) + '\n').encode())
  return path


def model_flops(a: assembly.Assembly) -> float:
  """Of one device and one step, by the model's formula with what a causal query sees of a row."""
  length = a.parts.data.length
  each = a.model_config.flops_per_token(length, a.model_config.mean_keys(length))
  return each * length * a.parts.data.batch_size / a.layout.mesh.size
