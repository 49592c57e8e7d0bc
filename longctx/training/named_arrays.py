"""A state as named arrays, as checkpoints hold it: any pytree out, the same pytree back.

A name is the path through the tree ('params.layers.0.w'). A typed PRNG key is stored as its words, an
empty array by its type alone (Orbax can write neither as it is).

Held by: tests/test_checkpoint.py.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from longctx.errors import ConfigError


def named_leaves(tree: Any) -> dict[str, Any]:
  """{'params.layers.w': leaf, ...} in the tree's order."""
  paths, _ = jax.tree_util.tree_flatten_with_path(tree)
  named = {jax.tree_util.keystr(path, simple=True, separator='.') or 'state': leaf
           for path, leaf in paths}
  if len(named) != len(paths):
    raise ValueError('two leaves of the state have one name; let no key of it hold a dot')
  return named


def _is_key(leaf: Any) -> bool:
  return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def types(tree: Any) -> dict[str, str]:
  """{'params.layers.w': 'float32[3,4]', ...}"""
  return {name: f'{leaf.dtype}[{",".join(map(str, leaf.shape))}]'
          for name, leaf in named_leaves(tree).items()}


def to_write(state: Any) -> tuple[dict[str, Any], dict[str, str]]:
  """The arrays to write and the types of all; what cannot be written is the caller's fault."""
  arrays = {}
  for name, leaf in named_leaves(state).items():
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
      raise TypeError(f'state leaf {name} is a {type(leaf).__name__}, and must be an array')
    if isinstance(leaf, jax.Array):
      if leaf.is_deleted():
        raise ValueError(f'state leaf {name} was donated to a step; save what the step returned')
      leaf = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    else:
      leaf = np.array(leaf)  # the caller may write into its own
    if leaf.size:  # Orbax cannot write an empty array; its type alone tells all of it
      arrays[name] = leaf
  return arrays, types(state)


def _words_of(leaf: Any) -> jax.ShapeDtypeStruct:
  """The plain array that holds `leaf`: itself, or a PRNG key's words."""
  sharding = getattr(leaf, 'sharding', None)
  if not _is_key(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
  data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
  if isinstance(sharding, jax.sharding.NamedSharding):  # the words of one key stay together
    spec = [*sharding.spec, *[None] * (len(leaf.shape) - len(sharding.spec)), None]
    sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec))
  return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)


def read(folder: Path, abstract: Any, partial: bool) -> Any:
  """`abstract` with its arrays from `folder`, placed by its shardings (none: a NumPy array)."""
  wanted = named_leaves(abstract)
  words = {name: _words_of(leaf) for name, leaf in wanted.items()}
  arrays = _read_by_name(folder, {n: w for n, w in words.items() if w.size}, partial)
  return jax.tree.structure(abstract).unflatten(
      [_as_asked(leaf, words[name], arrays.get(name)) for name, leaf in wanted.items()])


def _read_by_name(folder: Path, wanted: dict[str, jax.ShapeDtypeStruct], partial: bool) -> dict:
  if not wanted:
    return {}
  import orbax.checkpoint as ocp

  how = {name: ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
         if leaf.sharding is None else
         ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
         for name, leaf in wanted.items()}
  # Not by the manager: it also reads files of its own, which no manifest covers.
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    return reader.restore(folder, args=ocp.args.PyTreeRestore(
        item=wanted, restore_args=how, partial_restore=partial))


def _as_asked(leaf: Any, words: jax.ShapeDtypeStruct, array: Any) -> Any:
  if array is None:
    array = np.zeros(words.shape, words.dtype)  # an empty one
    if words.sharding is not None:
      array = jax.make_array_from_callback(words.shape, words.sharding, lambda index: array[index])
  if _is_key(leaf):
    # Of an abstract key the implementation is told by tracing alone.
    impl = []
    jax.eval_shape(lambda key: impl.append(jax.random.key_impl(key)),
                   jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    array = jax.random.wrap_key_data(array, impl=impl[0])
  return array


def check_types(folder: Path, asked: dict[str, str], held: dict[str, str], partial: bool) -> None:
  """Raises for the first leaf that differs between the state asked for and the one that `folder` holds."""
  names = asked if partial else [*asked, *(name for name in held if name not in asked)]
  for name in names:
    if asked.get(name) != held.get(name):
      raise ConfigError(
          f'{folder}: is of another model or optimizer: {name} is {held.get(name, "absent")} in '
          f'the checkpoint and {asked.get(name, "absent")} in this config; give the config that '
          'it was trained with, or another workdir')
