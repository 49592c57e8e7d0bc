"""--mode=describe: the model of a config, before anything is trained or compiled.

Layers, parameters, state (and whether it grows), dependency class, FLOPs a token, memory of a device.
Parameters and state are those of the model itself, by shape; FLOPs and the layers' table are the
closed forms that stand next to each mixer, which tests hold to the model and to compiled programs.
Held by: tests/test_describe.py.
"""

import itertools
import math
from typing import Any, NamedTuple

import jax
from flax import nnx

from longctx import assembly, plan
from longctx.models.facts import CLASSES, LayerFacts
from longctx.parallel import aot


class StateSize(NamedTuple):
  """Bytes that a row keeps between calls."""

  constant: int
  a_token: int       # besides, for each token of capacity
  capacity: int      # tokens up to which it grows; 0: it does not


def run(config: Any, folder: str, topology: str) -> int:
  """Prints the description; 0."""
  del folder
  devices = aot.stand_ins(*aot.check_topology(topology)) if topology else None
  a = assembly.assemble(config, devices)
  print('\n'.join(describe(a, plan.plan(config, devices))), flush=True)
  return 0


def describe(a: assembly.Assembly, memory: list[plan.Part]) -> list[str]:
  model, length = a.model_config, a.parts.data.length
  count = sum(x.size for x in jax.tree.leaves(a.abstract.params))
  state, layers = state_size(a), model.layer_facts(length)
  dependency = max(layer.dependency for layer in layers)
  moment, total = plan.peak(memory)
  width = max(18, 2 + max(len(layer.name) for layer in layers))
  lines = [f'{model.name}: {count:,} parameters, {model.num_layers} layers, vocabulary '
           f'{model.vocab_size:,}', '',
           f'{"layers":<16}{"mixer":<{width}}{"parameters":>12}{"FLOPs a token":>15}{"state":>12}'
           f'{"a token adds":>14}  class']
  for where, layer in grouped(layers):
    lines.append(f'{where:<16}{layer.name:<{width}}{layer.parameters:>12,}{layer.flops:>15,.0f}'
                 f'{layer.state:>12,}{layer.grows:>14,}  {layer.dependency}')
  grows = (f'grows by {state.a_token:,} bytes a token, to {state.constant + state.a_token * state.capacity:,} '
           f'bytes at {state.capacity:,} tokens' if state.capacity else 'does not grow')
  return [*lines, '',
          f'state of a row: {state.constant:,} bytes; {grows}',
          f'dependency class {dependency}: {CLASSES[dependency]}',
          f'FLOPs a token, forward and backward, in rows of {length:,}: '
          f'{model.flops_per_token(length, model.mean_keys(length)):,.0f}',
          f'memory of a device, training: {total / 2**30:.3f} GiB, most of it in the {moment} '
          '(--mode=plan has its parts)']


def grouped(layers: list[LayerFacts]) -> list[tuple[str, LayerFacts]]:
  """Equal layers once, with their numbers: ('0-3', layer)."""
  found: dict[LayerFacts, list[int]] = {}
  for i, layer in enumerate(layers):
    found.setdefault(layer, []).append(i)
  return [(_ranges(numbers), layer) for layer, numbers in found.items()]


def _ranges(numbers: list[int]) -> str:
  """[0, 1, 2, 4] -> '0-2, 4'; steps of a pattern as '0, 3 .. 9'."""
  steps = {b - a for a, b in itertools.pairwise(numbers)}
  if len(numbers) > 2 and len(steps) == 1:
    step = steps.pop()
    return (f'{numbers[0]}-{numbers[-1]}' if step == 1 else
            f'{numbers[0]}, {numbers[1]} .. {numbers[-1]}')
  return ', '.join(map(str, numbers)) if len(numbers) < 5 else f'{len(numbers)} layers'


def state_size(a: assembly.Assembly) -> StateSize:
  """Of the state itself, at two capacities."""
  model = nnx.merge(a.graphdef, a.abstract.params)
  size = lambda capacity: sum(
      math.prod(x.shape) * x.dtype.itemsize
      for x in jax.tree.leaves(jax.eval_shape(lambda: model.init_state(1, capacity=capacity))))
  if not a.state_grows:
    return StateSize(size(0), 0, 0)
  step, base = 4096, 2 ** 16   # where caches are of whole parts, and windows are full
  a_token = (size(base + step) - size(base)) // step
  return StateSize(size(base) - a_token * base, a_token, a.model_config.max_length)
