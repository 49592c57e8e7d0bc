"""A context: everything that a model remembers in mid-document, as named arrays, and whose it is.

The state of one row, whatever pytree of arrays it is; the tokens given or made that the state has
not read yet (`tail`); how many it has read. Restored, it is carried on as if nothing had happened,
bit for bit.
Held by: tests/test_store.py.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longctx.errors import check
from longctx.store.identity import Identity, check_same


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
  """What is known of a context without its arrays."""

  identity: Identity
  capacity: int             # tokens that the state has room for, as `init_state` was told
  tokens: int               # that the state has read
  tail: tuple[int, ...]     # tokens of the document that it has not read yet
  dtype: str                # of the arrays: 'float32, int32'
  created: int              # seconds since 1970


@dataclasses.dataclass(frozen=True)
class Context:
  """A header and its arrays, each of one row: {'layers.0.k': [1, ...], ...}."""

  header: Header
  arrays: dict[str, np.ndarray]

  @property
  def num_bytes(self) -> int:
    return sum(x.nbytes for x in self.arrays.values())


def named(state: Any) -> dict[str, Any]:
  """{'layers.0.k': leaf, ...} of a state; the names are its paths."""
  paths, _ = jax.tree_util.tree_flatten_with_path(state)
  leaves = {jax.tree_util.keystr(path, simple=True, separator='.') or 'state': leaf
            for path, leaf in paths}
  if len(leaves) != len(paths):
    raise ValueError('two arrays of the state have one name; let no key of it hold a dot')
  return leaves


@jax.jit
def _finite(leaves: list[jax.Array], row: int) -> list[jax.Array]:
  return [jnp.isfinite(x if x.shape[0] == 1 else x[row]).all() for x in leaves]


def spoilt(state: Any, row: int = 0) -> str:
  """What of a row holds NaN or infinity: 'layers.0.S', or 'layers.0.S and 2 more'; '' where all is finite.

  No state has an infinity of its own: running maxima begin at 0, and what stands for minus infinity in a
  sum or a mask is finite (-1e30).
  """
  leaves = {name: leaf for name, leaf in named(state).items() if jnp.issubdtype(leaf.dtype, jnp.inexact)}
  finite = jax.device_get(_finite(list(leaves.values()), row))
  bad = [name for name, is_finite in zip(leaves, finite) if not is_finite]
  return f'{bad[0]}{f" and {len(bad) - 1} more" * (len(bad) > 1)}' if bad else ''


def check_finite(state: Any, what: str = 'the state', row: int = 0) -> None:
  """FloatingPointError where a row holds NaN or infinity: nothing that is read on from it is worth saving."""
  if bad := spoilt(state, row):
    raise FloatingPointError(f'{what}: {bad} of what is remembered is NaN or infinite, and must be finite; go '
                             'on from what was saved before, without what was read since, or with other '
                             'parameters')


def take(state: Any, identity: Identity, *, row: int = 0, capacity: int = 0, tokens: int,
         tail: Sequence[int] = ()) -> Context:
  """One row of a state as a context of its own; the state itself is left as it is.

  FloatingPointError where the row is not finite, so that it takes the place of nothing that was saved.
  """
  arrays = {}
  for name, leaf in named(state).items():
    shape = np.shape(leaf)
    if not shape or not 0 <= row < shape[0]:
      raise ValueError(f'row={row}: {name} of the state has shape {shape}; every array must begin '
                       'with the rows, and have this one')
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
      raise ValueError(f'{name} of the state is {leaf.dtype}, which no file holds; keep its words '
                       '(jax.random.key_data) in the state')
    arrays[name] = np.array(leaf if shape[0] == 1 else leaf[row:row + 1], order='C')
  check_finite(state, row=row)
  dtypes = ', '.join(sorted({str(x.dtype) for x in arrays.values()}))
  return Context(Header(identity=identity, capacity=capacity, tokens=int(tokens),
                        tail=tuple(map(int, tail)), dtype=dtypes, created=int(time.time())), arrays)


def state_of(context: Context, init_state: Callable[..., Any], where: str = 'the context') -> Any:
  """The state, a pytree of NumPy arrays with one row, as `init_state(1, capacity=...)` makes it.

  `init_state` is only traced: what it would allocate is not.
  """
  template = jax.eval_shape(lambda: init_state(1, capacity=context.header.capacity))
  asked, held = named(template), context.arrays
  kind = lambda x: 'absent' if x is None else f'{x.dtype}{list(x.shape)}'
  wrong = [f'{name} is {kind(held.get(name))} in the file, {kind(asked.get(name))} in this model'
           for name in dict.fromkeys((*asked, *held))
           if kind(held.get(name)) != kind(asked.get(name))]
  check(not wrong, f'{where}: with room for {context.header.capacity} tokens this model remembers '
        f'other arrays: {"; ".join(wrong[:3])}{f"; and {len(wrong) - 3} more" * (len(wrong) > 3)}; '
        'load it with the version of longctx that saved it')
  return jax.tree.structure(template).unflatten([held[name] for name in asked])


def check_merge(identities: tuple[Identity, Identity], rooms: tuple[int, int],
                merge_states: Callable[[Any, Any], Any] | None) -> None:
  """ConfigError unless the two are of one model, one that adds, and have the same room."""
  check(merge_states is not None, f'merge: the memory of model.name={identities[0].model!r} is no '
        'sum over what was read, so two cannot be added; only those of a decoder of '
        "model.layers=('linear_attention',) and of infini's model.memory_variant='linear' are. "
        'Read both texts into one context')
  check_same(identities[1], identities[0], 'merge: the second context')
  check(rooms[0] == rooms[1], f'merge: the contexts have room for {rooms[0]} and {rooms[1]} '
        'tokens; must be equal')


def merge(a: Context, b: Context, merge_states: Callable[[Any, Any], Any] | None,
          init_state: Callable[..., Any]) -> Context:
  """The memory of both texts, each as if read alone; for models whose memories add.

  `merge_states(a, b)`: the model's own rule, or None where it has none.
  """
  x, y = a.header, b.header
  check_merge((x.identity, y.identity), (x.capacity, y.capacity), merge_states)
  check(not x.tail and not y.tail, f'merge: {len(x.tail)} and {len(y.tail)} tokens are not read '
        'yet; read them first, so that they are remembered')
  state = merge_states(state_of(a, init_state), state_of(b, init_state))
  return take(state, x.identity, capacity=x.capacity, tokens=x.tokens + y.tokens)
