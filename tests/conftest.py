"""Eight virtual CPU devices in one process, for every test of the suite.

Compilation dominates the suite, and tiny programs gain nothing from the costly passes: they are off,
but in tests that assert what a compiled program needs (the fixture `optimized`).
"""

import gc
import os

import jax
import pytest

from longctx.errors import ConfigError
from longctx.parallel import aot

# Eight devices share two cores, or fewer where other work goes on: XLA ends a process whose devices wait
# longer than this for each other, 40 seconds unless told.
# A program a kernel, made the older way, compiles in half the time.
os.environ['XLA_FLAGS'] = (os.environ.get('XLA_FLAGS', '')
                           + ' --xla_cpu_collective_call_terminate_timeout_seconds=600'
                           + ' --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1')
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_disable_most_optimizations', True)


def pytest_collection_modifyitems(items):
  """tests/test_ring.py first, in a young process.

  Its rings of three devices hung for ten minutes, or gave NaN, in processes that had run 900 other tests, twice
  in three runs of the suite, and never in a new one (14,000 calls beside other work). Not understood.
  """
  items.sort(key=lambda item: item.path.name != 'test_ring.py')


@pytest.fixture
def optimized():
  """Compiles as in a real run."""
  jax.config.update('jax_disable_most_optimizations', False)
  yield
  jax.config.update('jax_disable_most_optimizations', True)


@pytest.fixture
def tpu_devices(monkeypatch):
  """The devices of a slice that is not here, by its name; the test is skipped where the compiler is not installed."""
  jax.devices()   # they have read their flags
  monkeypatch.delenv('XLA_FLAGS', raising=False)   # libtpu ends the process for one of CPUs that it does not know
  def devices(topology):
    try:
      return aot.topology_devices(topology)
    except ConfigError as e:
      pytest.skip(str(e))
  return devices


@pytest.fixture
def drawn(monkeypatch):
  """The figures that were saved."""
  from matplotlib.figure import Figure
  figures, save = [], Figure.savefig
  def keep(self, *args, **kwargs):
    figures.append(self)
    save(self, *args, **kwargs)
  monkeypatch.setattr(Figure, 'savefig', keep)
  return figures


MAPPINGS = 15_000   # of the 65,530 that Linux lets a process have: each compiled program takes some


@pytest.fixture(autouse=True, scope='module')
def few_programs():
  """Forgets compiled programs before a worker has too many: the compiler then crashes.

  Between modules only: in the midst of one its programs may still be running on other devices.
  """
  yield
  try:
    with open('/proc/self/maps', 'rb') as file:
      mappings = sum(1 for _ in file)
  except OSError:   # not Linux
    return
  if mappings > MAPPINGS:
    jax.block_until_ready(jax.live_arrays())   # none of them is being computed
    jax.clear_caches()
    gc.collect()
