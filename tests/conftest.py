"""Eight virtual CPU devices in one process, for every test of the suite.

Compilation dominates the suite, and tiny programs gain nothing from the costly passes: they are off,
but in tests that assert what a compiled program needs (the fixture `optimized`).
"""

import jax
import pytest

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_disable_most_optimizations', True)


@pytest.fixture
def optimized():
  """Compiles as in a real run."""
  jax.config.update('jax_disable_most_optimizations', False)
  yield
  jax.config.update('jax_disable_most_optimizations', True)
