"""Weights of PyTorch's nn.RNN (tanh), nn.LSTM and nn.GRU into and out of `recurrent.Stack`.

    weights = {name: tensor.numpy() for name, tensor in torch_module.state_dict().items()}
    stack = Stack(Config(**shape_of(weights), ...), rngs=rngs);  load(stack, weights)
    torch_module.load_state_dict({name: torch.from_numpy(x) for name, x in dump(stack).items()})

PyTorch's gates have our order (lstm i, f, g, o; gru r, z, n), its matrices are [C * E, input]. It has
two biases that are only ever added up: ours is their sum, and goes back as bias_ih with bias_hh zero.
The GRU's bias_hh of n is multiplied by r, so that one is kept apart and goes back where it was.
Hence stack -> PyTorch -> stack is the same bit for bit, and PyTorch -> stack -> PyTorch is but for the
sums. Layers, directions (`_reverse`) and modules without biases are covered; projections are not.
Held by: tests/test_torch_rnn.py.

C gates  E recurrent width  D layer input
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from longctx.errors import ConfigError, check, nearest
from longctx.models.recurrent import CELLS, Stack

CELL_OF_GATES = {CELLS[name].gates: name for name in ('elman', 'lstm', 'gru')}


def shape_of(weights: Mapping[str, np.ndarray]) -> dict[str, int | str | bool]:
  """The fields of recurrent.Config that these weights determine."""
  for name in ('weight_ih_l0', 'weight_hh_l0'):
    check(name in weights, f'{name}: is missing from the weights of a recurrent network; '
          f'they have {", ".join(list(weights)[:4])}{nearest(name, weights)}')
  rows, width = weights['weight_hh_l0'].shape
  check(rows % width == 0 and rows // width in CELL_OF_GATES, f'weight_hh_l0 has shape '
        f'{(rows, width)}: must be [E, E], [3 E, E] or [4 E, E] (nn.LSTM without proj_size)')
  layers = 0
  while f'weight_hh_l{layers}' in weights:
    layers += 1
  return dict(name=CELL_OF_GATES[rows // width], num_layers=layers, hidden_dim=width,
              embed_dim=weights['weight_ih_l0'].shape[1],
              bidirectional='weight_hh_l0_reverse' in weights)


def _suffixes(stack: Stack) -> list[str]:
  """PyTorch's ending for each of the stack's layers: l0, l0_reverse, l1, ..."""
  ways = ('', '_reverse')[:stack.config.directions]
  return [f'l{n}{way}' for n in range(stack.config.num_layers) for way in ways]


def load(stack: Stack, weights: Mapping[str, np.ndarray]) -> None:
  """Sets the stack's parameters; ConfigError where names or shapes are not those of its config."""
  config = stack.config
  gates, width = CELLS[config.name].gates, config.hidden_dim
  check(config.name in CELL_OF_GATES.values(), f'model.name={config.name!r}: PyTorch has no such '
        f'network; it has those of {", ".join(CELL_OF_GATES.values())}')
  check(not config.layer_norm, "model.layer_norm=True: PyTorch's networks have no LayerNorm; set "
        'model.layer_norm=False')
  left = dict(weights)
  biased = any(name.startswith('bias') for name in weights)

  def take(name, *shape):
    if name not in left:
      raise ConfigError(f'{name}: is missing from the weights; model.num_layers={config.num_layers} '
                        f'and model.bidirectional={config.bidirectional} need it')
    found = np.asarray(left.pop(name), np.float32)
    check(found.shape == shape, f'{name} has shape {found.shape}: must be {shape} with '
          f'model.name={config.name!r}, model.embed_dim={config.embed_dim}, model.hidden_dim={width}')
    return found

  def bias(name):
    return take(name, gates * width).reshape(gates, width) if biased else np.zeros(
        (gates, width), np.float32)

  made = []
  for layer, end in zip(stack.layers, _suffixes(stack)):
    input_dim = layer.w_in.get_value().shape[0]
    w_in = take(f'weight_ih_{end}', gates * width, input_dim).reshape(gates, width, input_dim)
    w_hidden = take(f'weight_hh_{end}', gates * width, width).reshape(gates, width, width)
    b_in, b_hidden = bias(f'bias_ih_{end}'), bias(f'bias_hh_{end}')
    values = dict(w_in=w_in.transpose(2, 0, 1), w_hidden=w_hidden.transpose(2, 0, 1))
    if config.name == 'gru':
      values['bias_hidden'] = b_hidden[2]
      b_hidden = np.concatenate([b_hidden[:2], np.zeros((1, width), np.float32)])
    made.append(values | dict(bias=b_in + b_hidden))
  check(not left, f'{", ".join(sorted(left)[:4])}: no place for these weights with model.num_layers='
        f'{config.num_layers}, model.bidirectional={config.bidirectional}')
  for layer, values in zip(stack.layers, made):   # nothing was set before all was checked
    for name, value in values.items():
      getattr(layer, name).set_value(jnp.asarray(value))


def dump(stack: Stack) -> dict[str, np.ndarray]:
  """A state_dict for PyTorch's module of the same shape."""
  config = stack.config
  check(config.name in CELL_OF_GATES.values() and not config.layer_norm, f'model.name='
        f"{config.name!r}, model.layer_norm={config.layer_norm}: PyTorch's networks are "
        f'{", ".join(CELL_OF_GATES.values())} without LayerNorm')
  weights = {}
  for layer, end in zip(stack.layers, _suffixes(stack)):
    flat = lambda p: np.array(
        np.moveaxis(np.asarray(p.get_value()), 0, -1).reshape(-1, p.get_value().shape[0]), order='C')
    b_in = np.array(layer.bias.get_value())
    b_hidden = np.zeros_like(b_in)
    if config.name == 'gru':
      b_hidden[2] = np.asarray(layer.bias_hidden.get_value())
    weights |= {f'weight_ih_{end}': flat(layer.w_in), f'weight_hh_{end}': flat(layer.w_hidden),
                f'bias_ih_{end}': b_in.ravel(), f'bias_hh_{end}': b_hidden.ravel()}
  return weights
