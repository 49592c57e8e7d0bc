"""Quick compilation, for tests whose programs are many and small: hardly optimised, and kept.

A module asks for the former with `pytestmark = pytest.mark.usefixtures('quick_compilation')` and the
fixture's import.
"""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

QUICK = {'jax_disable_most_optimizations': True, 'jax_persistent_cache_min_compile_time_secs': 0.0}


def _set(settings):
  for name, value in settings.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture(scope='module')
def quick_compilation(tmp_path_factory):
  """Programs compiled in a third of the time, and each one once a module."""
  quick = QUICK | {'jax_compilation_cache_dir': str(tmp_path_factory.mktemp('xla'))}
  before = {name: jax.config.values[name] for name in quick}
  _set(quick)
  yield
  _set(before)   # what tests/conftest.py chose: other numbers, and other times, come of others
