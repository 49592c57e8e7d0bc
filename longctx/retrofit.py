"""A memory for a model that was trained without one: its parameters, and the new ones as they begin.

`run.init_from` names the workdir of a run. Every parameter of the new model that has a name and a shape
of the old one's begins with its values; the rest begin as the config draws them. With a gate that is closed
at first (model.gate='tanh'), or a memory that begins empty, the new model is then the old one: as long as
a row is within one segment its logits are equal, and beyond it is the old model with a window.
Held by: tests/test_retrofit.py.
"""

from typing import Any

import jax
from flax import nnx

from longctx import assembly
from longctx.errors import check
from longctx.training import step


def begin_from(a: assembly.Assembly, state: step.TrainState, folder: str
               ) -> tuple[step.TrainState, str]:
  """(the state with the other run's parameters, a line that says which)."""
  old = assembly.load_for_inference(folder)
  check(old.tokenizer.fingerprint == a.tokenizer.fingerprint,
        f'run.init_from={folder}: its tokenizer is another one; set data.tokenizer to its own')
  theirs = by_layer(old.params, old.model_config)
  found, fresh = {}, []
  flat = nnx.to_flat_state(state.params)
  for path, leaf in flat:
    name, mine = _name(path), leaf.get_value()
    if name not in theirs:
      fresh.append(name)
      continue
    check(theirs[name].shape == mine.shape, f'run.init_from={folder}: its {name} has shape '
          f'{theirs[name].shape}, and this model\'s {mine.shape}; give the model the sizes of that run')
    # A copy: the state is donated step by step, averages too.
    found[name] = jax.device_put(theirs[name], mine.sharding)
  check(bool(found), f'run.init_from={folder}: none of its parameters is one of this model; it has '
        f'{", ".join(sorted(theirs)[:4])}, ...')
  params = _replaced(state.params, found)
  ema = None if state.ema is None else jax.tree.map(lambda x: x + 0, params)
  new = sum(leaf.get_value().size for path, leaf in flat if _name(path) not in found)
  left = len(set(theirs) - set(found))
  line = (f'{len(found)} parameters begin as in {folder}, {len(fresh)} ({new:,} numbers) anew'
          + (f'; {left} of its have no place here' if left else ''))
  return state._replace(params=params, ema=ema), line


def _name(path: tuple) -> str:
  return '/'.join(map(str, path))


def _replaced(params: Any, values: dict[str, jax.Array]) -> Any:
  """The same tree, with these values where they are named."""
  return nnx.from_flat_state([
      (path, leaf.replace(values[_name(path)]) if _name(path) in values else leaf)
      for path, leaf in nnx.to_flat_state(params)])


def by_layer(params: Any, config: Any) -> dict[str, jax.Array]:
  """Parameters by name, those of layers that stand stacked apart: blocks/LAYER/..."""
  scanned = getattr(config, 'layer_loop', 'unrolled') == 'scan'
  named = {}
  for path, leaf in nnx.to_flat_state(params):
    value = leaf.get_value()
    if not scanned or path[0] != 'blocks':
      named[_name(path)] = value
      continue
    for i in range(config.num_layers // config.period):
      named[_name(('blocks', i * config.period + int(path[1]), *path[2:]))] = value[i]
  return named
