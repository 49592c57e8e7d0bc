"""What a target drew on, of an encoder-decoder: the source, by cross attention, and the target so far.

An Inspection (inspect.py) of source and target one after the other: a row for each token of the target but
the last, which are read one at a time against their caches, as in decoding. The encoder's own attention has
no row for an answer's token and is not shown; nor is occlusion, or a state's norms.
Held by: tests/test_inspect.py (softmax in NumPy of queries and keys of a pass without caches).

R rows  N heads  S source tokens  T tokens of source and target  V vocab
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from longctx import watch
from longctx.errors import check, check_range
from longctx.evaluation import reads
from longctx.evaluation.inspect import Inspection, Layer, Norms

NOTE = 'of an encoder-decoder: the prompt below is the source; what the encoder read of itself is not shown'


def inspect_pair(graphdef: nnx.GraphDef, params: Any, source: np.ndarray, target: np.ndarray, *,
                 layers: Sequence[int] = ()) -> Inspection:
  """Reads a source (its separator last) and a target (the separator first), on one device.

  Args:
    graphdef, params: the two halves of `nnx.split(model)`.
    layers: of the decoder, whose maps are kept; (): all.
  """
  check(len(target) > 1, 'inspect: the answer is empty, so no token of it drew on anything; give a source '
        'that the model writes something of')
  depth = nnx.merge(graphdef, params).config.num_layers
  for i in layers:
    check_range('--layers', i, 0, depth - 1)
  chosen = tuple(layers) or tuple(range(depth))
  encode, step = _programs(graphdef, chosen, len(target))
  state = encode(params, np.asarray(source, np.int32)[None])
  rows, logprobs = [], []
  for token, following in itertools.pairwise(target):
    logprob_V, state, told = step(params, state, np.full((1, 1), token, np.int32))
    rows.append(jax.tree.map(np.asarray, told))
    logprobs.append(float(logprob_V[following]))
  S = len(source)
  found = []
  for place, i in enumerate(chosen):
    # The target's tokens stand behind the source's.
    maps = {name: _joined([row[place][j] for row in rows], first, length, S + len(target))
            for j, (name, first, length) in enumerate((('attention', S, len(target)), ('cross attention', 0, S)))}
    found.append(Layer(i, 'attention', maps, None, {}))
  return Inspection(np.concatenate([source, target]).astype(np.int32), S + 1, np.array(logprobs), tuple(found),
                    Norms(np.zeros(0, int), {}), None, (NOTE,))


def _joined(told: Sequence[tuple[np.ndarray, np.ndarray]], first: int, length: int, total: int) -> reads.Read:
  """Rows of one map over `length` tokens that stand at `first` among all."""
  rows = [reads.by_index(weights_N1S, index_S, length) for weights_N1S, index_S in told]
  tokens_NRT, other_NR = (np.concatenate(x, axis=1) for x in zip(*rows))
  around = ((0, 0), (0, 0), (first, total - first - length))
  return reads.Read(np.pad(tokens_NRT, around), other_NR)


@functools.lru_cache(maxsize=4)
def _programs(graphdef: nnx.GraphDef, chosen: tuple[int, ...], capacity: int) -> tuple[Any, Any]:
  """((params, source) -> state, (params, state, token) -> log p, state, each layer's two readings)."""
  def encode(params, source_BS):
    return nnx.merge(graphdef, params).encode(source_BS, capacity=capacity)

  def step(params, state, token_B1):
    model = nnx.merge(graphdef, params)
    # What is told inside of a rematerialised layer cannot be carried out of it.
    model.layers_config = dataclasses.replace(model.layers_config, remat='none')
    with watch.told() as calls:
      hidden_B1D, state = model(token_B1, state)
    told = reads.layers(calls)
    attended = [[call for call in told[i] if call.name == 'attention'] for i in chosen]
    # A layer reads its own tokens, those kept and the new one in one softmax; last the source.
    found = [[reads.weights(part, slice(0, 1)) for part in (one[:-1], one[-1:])] for one in attended]
    return jax.nn.log_softmax(model.logits(hidden_B1D)[0, 0]), state, found

  return jax.jit(encode), jax.jit(step, donate_argnums=1)
