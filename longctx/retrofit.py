"""A memory for a model that was trained without one: its parameters, and the new ones as they begin.

`run.init_from` names the workdir of a run. Every parameter of the new model that has a name and a shape
of the old one's begins with its values; the rest begin as the config draws them. With a gate that is closed
at first (model.gate='tanh'), or a memory that says nothing at first (ARMT), the new model is then the old one:
as long as a row is within one segment its logits are equal, and beyond it is the old model with a window.
There is such a gate where heads read a memory (infini, memorizing) and where a memory is added to attention
(block_recurrent; behind a window ttt, memory_caching, and titans as 'memory').

Refused: a setting of both models that differs and changes what the parameters mean (all but FREE);
and a new gate of model.gate='sigmoid', which is half open at first and takes half of what attention
says away. Memories that are heard from the first token on (Block.identity is False: compressive, rmt, other Titans,
and those that are added without a gate) are a choice: the line that says what began as in the old run says so.
Held by: tests/test_retrofit.py.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
from flax import nnx

from longctx import assembly
from longctx.errors import check
from longctx.models.memories import MEMORIES
from longctx.training import step

# What two runs of the same parameters may differ in: how it is computed, trained and drawn, and the
# memory, which is what is new; of the same memory how much it keeps and looks up.
FREE = frozenset((
    'name', 'vocab_size', 'max_length', 'dropout', 'init_std', 'dtype', 'attention', 'layer_loop',
    'remat', 'mlp_block', 'mixer_form', 'mixer_chunk', 'schedule', 'truncate', 'segment',
    'short_term', 'long_term', 'memory_layers', 'memory_size', 'memory_top', 'num_classes'))
# Of a memory, and so compared where both have the same.
OWN = ('gate', 'memory_variant', 'memory_tokens', 'memory_width', 'memory_depth', 'memory_chunk', 'memory_rate')


def begin_from(a: assembly.Assembly, state: step.TrainState, folder: str
               ) -> tuple[step.TrainState, str]:
  """(the state with the other run's parameters, a line that says which)."""
  old = assembly.load_for_inference(folder)
  check(old.tokenizer.fingerprint == a.tokenizer.fingerprint,
        f'run.init_from={folder}: its tokenizer is another one; set data.tokenizer to its own')
  differ = differences(old.model_config, a.model_config)
  check(not differ, f'run.init_from={folder}: its parameters mean something else here: '
        f'{"; ".join(differ)}; set the model\'s as there')
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
  heard = heard_at_first(a.model_config, fresh)
  if left or heard:
    line += ('; the new model does not begin as that one'
             + (f': model.long_term={heard!r} is heard from the first token on' if heard else ''))
  return state._replace(params=params, ema=ema), line


def differences(old: Any, new: Any) -> list[str]:
  """'model.rope_base is 500000.0 there and 10000.0 here', one a setting that must not differ."""
  theirs, mine = dataclasses.asdict(old), dataclasses.asdict(new)
  same_memory = theirs.get('long_term') == mine.get('long_term')
  found = [f'model.{name} is {theirs[name]!r} there and {mine[name]!r} here' for name in mine
           if name in theirs and name not in FREE and (same_memory or name not in OWN)
           and theirs[name] != mine[name]]
  segment = mine.get('segment', 0)
  if any(0 < window < segment for window in theirs.get('window', ())):
    found.append(f'model.window is {theirs["window"]!r} there, and here each token sees all of its '
                 f'model.segment={segment} up to itself')
  return found


def heard_at_first(config: Any, fresh: Collection[str]) -> str:
  """The memory that cannot begin as if it were not there, if `fresh` parameters are of one; or ''."""
  fresh = [name for name in fresh if name.split('/')[0] in ('blocks', 'tokens')]
  if not fresh or not hasattr(config, 'long_term'):
    return ''
  gates = [name for name in fresh if name.split('/')[-1] == 'gate']
  check(not gates or config.gate == 'tanh', f'model.gate={config.gate!r}: a new gate of it is half '
        "open at first, and halves what attention says; set model.gate='tanh', which begins closed")
  return '' if all(MEMORIES[kind].identity(config.settings()) for kind in config.kinds()) else config.long_term


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
