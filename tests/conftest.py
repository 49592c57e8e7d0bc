"""Eight virtual CPU devices in one process, for every test of the suite."""

import jax

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
