"""Stacked recurrent networks: Elman, LSTM, GRU, sLSTM; a language model and an encoder of them.

Embedding, layers with dropout between them and, if wanted, LayerNorm on the input of each and on the
output of the last, an optional projection back to the embedding's width, and logits by a table that
may be tied to the embedding. The language model's state is one cell state a layer and a clock, of
constant size. `Stack` is the layers alone; `Encoder` may read both ways.
Sources: Zaremba et al. 2014, arXiv:1409.2329 (dropout on non-recurrent connections); Press & Wolf
2016, arXiv:1608.05859 (tying); Jozefowicz et al. 2015 (forget bias 1); the cells: longctx/recurrence.
Differs from Ba et al. 2016, arXiv:1607.06450, whose LayerNorm stands inside the recurrence.
Held by: tests/test_models.py, tests/test_recurrent_cells.py, tests/test_torch_rnn.py.

B batch  T tokens  C gates  E recurrent width  D embedding or layer input  V vocab  L layers
N heads  H head dim
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from longctx.errors import check, check_choice, check_range
from longctx.models.context import Clock, Context, new_clock, place_tokens, rebase
from longctx.models.facts import LayerFacts
from longctx.models.layers import DTYPES, Embedding, constant, dropout, linear, param
from longctx.parallel.mesh import constrain
from longctx.recurrence import cell, elman, gru, lstm, slstm

CELLS = {'elman': elman.CELL, 'lstm': lstm.CELL, 'gru': gru.CELL, 'slstm': slstm.CELL}
FORGET_GATE = 1   # of lstm and slstm, in the order of their gates


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Shape and arithmetic of a recurrent network; `name` is its cell."""

  name: str = 'lstm'            # elman, lstm, gru, slstm
  vocab_size: int = 0           # 0: the tokenizer's
  max_length: int = 0           # 0: no limit; the state does not grow
  num_layers: int = 2
  embed_dim: int = 256
  hidden_dim: int = 512
  cell_heads: int = 1           # slstm: diagonal blocks of the recurrent matrix
  bidirectional: bool = False   # of an encoder: hidden states are twice as wide
  layer_norm: bool = False
  tied: bool = False
  dropout: float = 0.0
  forget_bias: float = 1.0      # lstm, slstm
  init_std: float = 0.5         # of the embedding and the head; at 0.05 three layers see no input for
                                # a thousand steps (experiments/02_recurrences)
  init_uniform: float = 0.0     # x: all parameters from U(-x, x); 0: cells from U(+-1/sqrt(E))
  dtype: str = 'float32'

  def __post_init__(self):
    check_choice('model.name', self.name, CELLS)
    for name in ('num_layers', 'embed_dim', 'hidden_dim', 'cell_heads'):
      check_range(f'model.{name}', getattr(self, name), 1)
    for name in ('vocab_size', 'max_length', 'init_uniform'):
      check_range(f'model.{name}', getattr(self, name), 0)
    check_choice('model.dtype', self.dtype, DTYPES)
    check(0 <= self.dropout < 1, f'model.dropout={self.dropout}: must be at least 0 and below 1')
    check(self.init_std > 0, f'model.init_std={self.init_std}: must be greater than 0')
    check_range('model.forget_bias', self.forget_bias)
    check(self.cell_heads == 1 or self.name == 'slstm', f'model.cell_heads={self.cell_heads}: is '
          f"read with model.name='slstm' only, not {self.name!r}; set model.cell_heads=1")
    check(self.hidden_dim % self.cell_heads == 0, f'model.cell_heads={self.cell_heads}: must '
          f'divide model.hidden_dim={self.hidden_dim}')

  def resolved(self, vocab_size: int) -> 'Config':
    return dataclasses.replace(self, vocab_size=self.vocab_size or vocab_size)

  @property
  def directions(self) -> int:
    return 2 if self.bidirectional else 1

  @property
  def projects(self) -> bool:
    """Whether hidden states are brought back to the embedding's width for tied logits."""
    return self.tied and self.hidden_dim != self.embed_dim

  def input_dims(self) -> list[int]:
    """Width of what each layer reads."""
    return [self.embed_dim] + [self.directions * self.hidden_dim] * (self.num_layers - 1)

  def layer_costs(self) -> list[cell.Cost]:
    """Closed form of each layer and direction."""
    kind = CELLS[self.name]
    return [cell.cost(kind, n, self.hidden_dim, self.cell_heads, int(self.name == 'gru'))
            for n in self.input_dims() for _ in range(self.directions)]

  def stack_parameters(self) -> int:
    norms = sum(self.input_dims()) + self.directions * self.hidden_dim
    return sum(c.parameters for c in self.layer_costs()) + (2 * norms if self.layer_norm else 0)

  def num_parameters(self) -> int:
    """Closed form of the language model's parameter count (needs vocab_size)."""
    head = 0 if self.tied else self.vocab_size * self.hidden_dim
    projection = self.hidden_dim * self.embed_dim if self.projects else 0
    return self.vocab_size * self.embed_dim + self.stack_parameters() + projection + head

  def layer_facts(self, length: int) -> list[LayerFacts]:
    """Of each layer, all directions of it together."""
    del length
    costs, n = self.layer_costs(), self.directions
    sums = [costs[i:i + n] for i in range(0, len(costs), n)]
    total = lambda layer, name: sum(getattr(c, name) for c in layer)
    return [LayerFacts(self.name, 'P2', total(layer, 'parameters'),
                       2.0 * total(layer, 'matrices') + total(layer, 'flops'), total(layer, 'state'))
            for layer in sums]

  windows = ()   # no layer of it attends

  def mean_keys(self, length: int) -> dict[int, float]:
    del length
    return {}

  def state_floats(self) -> int:
    """Of a row, whatever it has read."""
    return sum(c.state for c in self.layer_costs())

  def flops_per_token(self, length: int, mean_keys: Mapping[int, float] | None = None) -> float:
    """FLOPs of forward and backward per token in matrices, 2 a multiply-add; none grow with length."""
    del length, mean_keys
    width = self.embed_dim if self.tied else self.hidden_dim
    projection = self.hidden_dim * self.embed_dim if self.projects else 0
    matrices = sum(c.matrices for c in self.layer_costs())
    return 6.0 * (matrices + projection + self.vocab_size * width)


class State(NamedTuple):
  clock: Clock
  layers: tuple[cell.State, ...]   # of each layer; of layer and direction where both are read


def uniform(limit: float):
  return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -limit, limit)


class LayerNorm(nnx.Module):
  """(x - mean) / std * scale + bias over the last dim, in float32 whatever the input's type."""

  def __init__(self, dim: int, *, rngs: nnx.Rngs):
    self.scale = param(rngs, constant(1.0), (dim,), (None,))
    self.bias = param(rngs, constant(0.0), (dim,), (None,))

  def __call__(self, x: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    y -= y.mean(-1, keepdims=True)
    y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-5)
    return (y * self.scale.get_value() + self.bias.get_value()).astype(x.dtype)


class Layer(nnx.Module):
  """One layer in one direction: the projection of all inputs at once, then the scan."""

  def __init__(self, config: Config, input_dim: int, *, rngs: nnx.Rngs):
    self.config = config
    gates, width, heads = CELLS[config.name].gates, config.hidden_dim, config.cell_heads
    init = uniform(config.init_uniform or width ** -0.5)
    self.w_in = param(rngs, init, (input_dim, gates, width), ('embed', None, 'recurrent'))
    if config.name == 'slstm':   # [H, N, C, H]
      self.w_hidden = param(rngs, uniform(config.init_uniform or (width // heads) ** -0.5),
                            (width // heads, heads, gates, width // heads), (None,) * 4)
    else:
      self.w_hidden = param(rngs, init, (width, gates, width), (None, None, 'recurrent'))
    bias = uniform(config.init_uniform) if config.init_uniform else constant(0.0)
    def with_forget(key, shape, dtype):
      forget = config.forget_bias if config.name in ('lstm', 'slstm') else 0.0
      return bias(key, shape, dtype).at[FORGET_GATE:FORGET_GATE + 1].add(forget)
    self.bias = param(rngs, with_forget, (gates, width), (None, 'recurrent'))
    self.bias_hidden = (param(rngs, bias, (width,), ('recurrent',)) if config.name == 'gru'
                        else None)

  def init_state(self, batch_size: int) -> cell.State:
    return cell.zero_state(CELLS[self.config.name], batch_size, self.config.hidden_dim)

  def __call__(self, x_BTD: jax.Array, state: cell.State, context: Context
               ) -> tuple[jax.Array, cell.State]:
    dtype = x_BTD.dtype
    length, batch = x_BTD.shape[1], x_BTD.shape[0]
    w_DCE = self.w_in.get_value()
    # Time first before the product, not after: its result has C times as many numbers.
    x_TBG = linear(jnp.swapaxes(x_BTD, 0, 1), w_DCE.reshape(w_DCE.shape[0], -1))
    x_TBCE = x_TBG.reshape(length, batch, *w_DCE.shape[1:])
    w, bias = self.w_hidden.get_value().astype(dtype), self.bias.get_value()
    given = (x_TBCE, w, state, *masks(context), bias)
    match self.config.name:
      case 'elman':
        y_TBE, state = elman.elman(*given)
      case 'lstm':
        y_TBE, state = lstm.lstm(*given)
      case 'gru':
        y_TBE, state = gru.gru(*given, self.bias_hidden.get_value())
      case 'slstm':
        y_TBE, state = slstm.slstm(*given)
    return jnp.swapaxes(y_TBE, 0, 1).astype(dtype), state


def masks(context: Context) -> tuple[jax.Array | None, jax.Array | None]:
  """(keep_TB1, valid_TB1) float32, time first; None where all are 1."""
  turned = lambda x: None if x is None else x.T[..., None].astype(jnp.float32)
  reset = None if context.reset_BT is None else ~context.reset_BT
  return turned(reset), turned(context.valid_BT)


class Stack(nnx.Module):
  """Layers over given vectors: y_BTE, states = stack(x_BTD, states, contexts, key).

  With config.bidirectional each layer is two, the second over the tokens from the last to the first,
  and y has both side by side. `contexts`: of the tokens as they stand, and, for the second, reversed.
  """

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    self.config = config
    self.layers = nnx.List([Layer(config, n, rngs=rngs) for n in config.input_dims()
                            for _ in range(config.directions)])
    widths = [*config.input_dims(), config.directions * config.hidden_dim]
    self.norms = (nnx.List([LayerNorm(n, rngs=rngs) for n in widths]) if config.layer_norm
                  else None)

  def init_state(self, batch_size: int) -> tuple[cell.State, ...]:
    return tuple(layer.init_state(batch_size) for layer in self.layers)

  def __call__(self, x_BTD: jax.Array, states: tuple[cell.State, ...],
               contexts: tuple[Context, ...], key: jax.Array | None = None
               ) -> tuple[jax.Array, tuple[cell.State, ...]]:
    """The last layer's output has no dropout."""
    config, ways = self.config, self.config.directions
    keys = (None,) * config.num_layers
    if key is not None and config.dropout:
      keys = jax.random.split(key, config.num_layers)
    after = []
    for n in range(config.num_layers):
      x_BTD = dropout(x_BTD, config.dropout, keys[n]) if n else x_BTD
      if self.norms is not None:
        x_BTD = self.norms[n](x_BTD)
      outs = []
      for way in range(ways):
        i, turn = ways * n + way, (lambda x: x) if way == 0 else (lambda x: jnp.flip(x, axis=1))
        y_BTE, state = self.layers[i](turn(x_BTD), states[i], contexts[way])
        outs.append(turn(y_BTE))
        after.append(state)
      x_BTD = outs[0] if ways == 1 else jnp.concatenate(outs, axis=-1)
      x_BTD = constrain(x_BTD, 'batch', 'length', None)
    if self.norms is not None:
      x_BTD = self.norms[config.num_layers](x_BTD)
    return x_BTD, tuple(after)


def table(config: Config, width: int, *, rngs: nnx.Rngs) -> Embedding:
  made = Embedding(config.vocab_size, width, config.init_std, rngs=rngs)
  if config.init_uniform:
    made.table = param(rngs, uniform(config.init_uniform), (config.vocab_size, width),
                       ('vocab', 'embed'))
  return made


class Encoder(nnx.Module):
  """Hidden states of whole rows of tokens, [B, T, directions * E]; reads both ways if configured."""

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    self.config = config
    self.embedding = table(config, config.embed_dim, rngs=rngs)
    self.stack = Stack(config, rngs=rngs)

  def __call__(self, tokens_BT: jax.Array, *, segment_ids_BT: jax.Array | None = None,
               valid_BT: jax.Array | None = None, dropout_key: jax.Array | None = None) -> jax.Array:
    """Padding (valid False) may stand anywhere; documents of a packed row do not see each other."""
    flip = lambda x: None if x is None else jnp.flip(x, axis=1)
    given = (tokens_BT, segment_ids_BT, valid_BT)
    contexts = [place_tokens(tokens, None, None, segments, valid)[0] for tokens, segments, valid
                in (given, map(flip, given))][:self.config.directions]
    keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
    x_BTD = self.embedding(tokens_BT, DTYPES[self.config.dtype])
    x_BTD = dropout(x_BTD, self.config.dropout, keys[0])
    return self.stack(x_BTD, self.stack.init_state(tokens_BT.shape[0]), tuple(contexts), keys[1])[0]


class Recurrent(nnx.Module):
  """The language model: hidden, state = model(tokens, state, ...); logits = model.logits(hidden)."""

  state_grows = False

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    check(not config.bidirectional, 'model.bidirectional=True: a language model must not see the '
          'tokens that follow; set model.bidirectional=False (recurrent.Encoder reads both ways)')
    self.config = config
    self.embedding = table(config, config.embed_dim, rngs=rngs)
    self.stack = Stack(config, rngs=rngs)
    limit = config.init_uniform or config.hidden_dim ** -0.5
    self.projection = (param(rngs, uniform(limit), (config.hidden_dim, config.embed_dim),
                             ('recurrent', 'embed')) if config.projects else None)
    self.head = None if config.tied else table(config, config.hidden_dim, rngs=rngs)

  def init_state(self, batch_size: int, capacity: int = 0) -> State:
    """Zeros; `capacity` means nothing to a state that does not grow."""
    del capacity
    return State(new_clock(batch_size), self.stack.init_state(batch_size))

  def __call__(self, tokens_BT: jax.Array, state: State | None = None, *,
               positions_BT: jax.Array | None = None, segment_ids_BT: jax.Array | None = None,
               valid_BT: jax.Array | None = None, dropout_key: jax.Array | None = None
               ) -> tuple[jax.Array, State | None]:
    """Hidden states [B, T, D or E] in the compute type, and the state after these tokens."""
    config = self.config
    context, clock = place_tokens(tokens_BT, state and state.clock, positions_BT,
                                  segment_ids_BT, valid_BT)
    states = (state or self.init_state(tokens_BT.shape[0])).layers
    keys = (None,) * 3 if dropout_key is None else jax.random.split(dropout_key, 3)
    x_BTD = dropout(self.embedding(tokens_BT, DTYPES[config.dtype]), config.dropout, keys[0])
    x_BTD, states = self.stack(x_BTD, states, (context,), keys[1])
    x_BTD = dropout(x_BTD, config.dropout, keys[2])
    if self.projection is not None:
      x_BTD = x_BTD @ self.projection.get_value().astype(x_BTD.dtype)
    return x_BTD, None if state is None else State(rebase(clock)[0], states)

  def output_embedding_VD(self) -> jax.Array:
    return (self.embedding if self.head is None else self.head).table.get_value()

  def logits(self, hidden_BTD: jax.Array) -> jax.Array:
    """float32 logits [B, T, V]."""
    table = self.output_embedding_VD().astype(hidden_BTD.dtype)
    return jnp.einsum('BTD,VD->BTV', hidden_BTD, table, preferred_element_type=jnp.float32)
