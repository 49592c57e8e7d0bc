"""What a ring calls hop by hop, for kernels that only know forward and backward of whole arrays.

Parts are merged by their log-sum-exp; nothing is folded. A kernel that needs its mask's kind to be
known (`KNOWS_KINDS`) gets the device's own tokens apart from those that travel. `Foreign` makes a
kernel of a module that adapts somebody else's, imported when it is first asked.
Held by: tests/test_ring.py.

B batch  T queries  S keys  N query heads  K kv heads  H head dim
"""

import functools
import importlib
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from longctx.attention.intervals import Intervals, Options
from longctx.parallel.merge import merge

NEG_INF = -1e30


class Sums(NamedTuple):
  dq: jax.Array
  dk: jax.Array
  dv: jax.Array
  dbias: Any


class Whole:
  """A kernel: subclasses give cannot, forward and backward."""

  LSE_GRADIENT = False
  KNOWS_KINDS = False
  platform = ''   # where it runs; '' anywhere

  def fold(self, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
    return q, k, v

  def nothing(self, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    wide = jnp.promote_types(jnp.float32, q.dtype)
    return jnp.zeros(q.shape, wide), jnp.full(q.shape[:3], NEG_INF, wide)

  def add(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: Intervals, options: Options,
          result: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    return merge(result, self.forward(q, k, v, mask, options))

  def unfold(self, result: tuple[jax.Array, jax.Array], length: int
             ) -> tuple[jax.Array, jax.Array]:
    del length
    return result

  def saved(self, q: jax.Array, k: jax.Array, *results: jax.Array | None) -> tuple:
    """(out, lse, dout, dlse)."""
    del q, k
    return results

  def no_dq(self, q: jax.Array) -> jax.Array:
    return jnp.zeros(q.shape, jnp.promote_types(jnp.float32, q.dtype))

  def no_dkv(self, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    return self.no_dq(k), self.no_dq(v)

  def no_dbias(self, q: jax.Array, options: Options) -> Any:
    del q
    return jax.tree.map(self.no_dq, options.bias)

  def add_gradients(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: Intervals,
                    options: Options, saved: tuple, sums: Any) -> Sums:
    parts = self.backward(q, k, v, mask, options, *saved)
    return Sums(*jax.tree.map(lambda a, b: a + b.astype(a.dtype), tuple(sums), tuple(parts)))

  def finish_dq(self, dq: jax.Array, options: Options, length: int) -> jax.Array:
    del options, length
    return dq

  def finish_dkv(self, dk: jax.Array, dv: jax.Array, options: Options, num_keys: int
                 ) -> tuple[jax.Array, jax.Array]:
    del options, num_keys
    return dk, dv

  def finish_dbias(self, dbias: Any) -> Any:
    return dbias


class Foreign(Whole):
  """The kernel of longctx/attention/NAME.py, which has cannot, forward and backward."""

  def __init__(self, name: str, platform: str):
    self.name, self.platform = name, platform

  @functools.cached_property
  def module(self) -> ModuleType:
    return importlib.import_module(f'longctx.attention.{self.name}')

  @property
  def LSE_GRADIENT(self) -> bool:
    return self.module.LSE_GRADIENT

  @property
  def KNOWS_KINDS(self) -> bool:
    return self.module.KNOWS_KINDS

  def cannot(self, *call: Any) -> str:
    return self.module.cannot(*call)

  def forward(self, *call: Any) -> tuple[jax.Array, jax.Array]:
    return self.module.forward(*call)

  def backward(self, *call: Any) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
    return self.module.backward(*call)
