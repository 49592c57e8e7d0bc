"""Do the devices that should hold the same bits hold them? A checksum of each device's own part.

    checksum = sum_i word_i * (2 i + 1)  mod 2^32     words of 32 bits, in their order

An odd factor keeps every change of one word visible, and unequal ones an exchange of two. Each device
sums what lies in its own memory; nothing is gathered but the sums. Parts of an array at equal places
are replicas, along every mesh axis that its spec does not name.
Held by: tests/test_replicas.py.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from longctx.parallel.mesh import AXES


def make_checksums(mesh: Mesh, specs: list[PartitionSpec]) -> Callable[[list[jax.Array]], jax.Array]:
  """Jitted: arrays cut by `specs` -> uint32 [data, seq, model, arrays], the same everywhere."""
  own = lambda arrays: jnp.stack([checksum(x) for x in arrays])[None, None, None]
  # Not checked for replication: that it may be violated is the question.
  sums = jax.shard_map(own, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(*AXES), check_vma=False)
  return jax.jit(sums, out_shardings=jax.sharding.NamedSharding(mesh, PartitionSpec()))


def checksum(x: jax.Array) -> jax.Array:
  """uint32 of the bits of one device's array."""
  bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
  words = jax.lax.bitcast_convert_type(x, bits).astype(jnp.uint32).ravel()
  return (words * (2 * jnp.arange(words.size, dtype=jnp.uint32) + 1)).sum(dtype=jnp.uint32)


def first_difference(sums: np.ndarray, specs: list[PartitionSpec]) -> tuple[int, Any] | None:
  """(array, index of a device in the mesh) of the first part that is not as its replica; None: all are.

  Of several replicas the one that fewest agree with is named.
  """
  for i, spec in enumerate(specs):
    used = {axis for entry in spec if entry for axis in ((entry,) if isinstance(entry, str) else entry)}
    along = tuple(a for a, axis in enumerate(AXES) if axis not in used)
    own = sums[..., i]
    alike = np.zeros(own.shape, int)   # how many replicas have this sum, itself among them
    for at in np.ndindex(*(own.shape[a] for a in along)):
      index = [slice(None)] * own.ndim
      for a, n in zip(along, at):
        index[a] = slice(n, n + 1)
      alike += own == own[tuple(index)]
    if (alike < np.prod([own.shape[a] for a in along], dtype=int)).any():
      return i, np.unravel_index(int(alike.argmin()), own.shape)
  return None
