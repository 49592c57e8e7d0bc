"""What the processes of one distributed run must agree on; of a single process nothing is asked.

Held by: tests/test_checkpoint.py, tests/test_distributed.py (two processes).
"""

import itertools
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from longctx.errors import ConfigError, RunError

_barriers = itertools.count()   # a barrier's name serves once; all processes make the same calls
_asides = itertools.count()


def coordinator() -> Any:
  """The client of the service that JAX's processes share, with its key-value store; None of a single process.

  jax 0.10 has no public road to it: jax.distributed starts and ends it.
  """
  if jax.process_count() == 1:
    return None
  from jax._src import distributed
  return distributed.global_state.client


def gather(value: Any) -> list:
  """`value` of every process, in their order; JSON."""
  if jax.process_count() == 1:
    return [value]
  from jax.experimental import multihost_utils

  data = json.dumps(value).encode()
  size = int(multihost_utils.process_allgather(np.int32(len(data))).max())
  size = 1 << size.bit_length()  # few sizes, few compilations
  rows = multihost_utils.process_allgather(np.frombuffer(data.ljust(size, b' '), np.uint8))
  return [json.loads(bytes(row)) for row in rows]


class Aside:
  """What the processes tell each other in a thread beside the training's, whose collectives it leaves alone.

  All processes make theirs in the same order, and then make the same calls.
  """

  def __init__(self):
    self._folder, self._calls = f'longctx/aside/{next(_asides)}', itertools.count()

  def gather(self, value: Any, minutes: float = 60) -> list:
    """`value` of every process, in their order; JSON. An error where one does not come in time."""
    client, name = coordinator(), f'{self._folder}/{next(self._calls)}'
    if client is None:
      return [value]
    wait = lambda key: json.loads(client.blocking_key_value_get(f'{name}/{key}', int(minutes * 60_000)))
    me = jax.process_index()
    if me:
      client.key_value_set(f'{name}/{me}', json.dumps(value))
      return wait('all')
    found = [value, *map(wait, range(1, jax.process_count()))]
    client.key_value_set(f'{name}/all', json.dumps(found))
    return found


def of_first(value: Any) -> Any:
  """The first process's `value`, everywhere."""
  return gather(value)[0]


def first_fault(fault: str) -> str:
  """The first process's fault that has one: all must turn to the same checkpoint."""
  return next(filter(None, gather(fault)), '')


def together(call: Callable[[], Any]) -> Any:
  """call(); a ConfigError or RunError of one process is raised in all, so that none waits for it in vain."""
  result, fault = None, None
  try:
    result = call()
  except (ConfigError, RunError) as e:
    fault = [isinstance(e, RunError), str(e)]
  if fault := next(filter(None, gather(fault)), None):
    raise (RunError if fault[0] else ConfigError)(fault[1])
  return result


def barrier(name: str, minutes: float = 60) -> None:
  """Returns when every process is here.

  It asks the coordinator, who has patience; a collective of CPUs gives up after 30 seconds, which
  is less than one process may compile or read longer than another.
  """
  if jax.process_count() > 1:
    from orbax.checkpoint import multihost

    wait = multihost.get_barrier_sync_fn()
    wait(key=f'longctx {next(_barriers)} {name}', timeout_ms=int(minutes * 60_000))
