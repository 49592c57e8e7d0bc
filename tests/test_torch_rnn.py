"""nn.RNN, nn.LSTM and nn.GRU of PyTorch: weights in and out, values and gradients of whole models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.errors import ConfigError
from longctx.interop import torch_rnn
from longctx.models import context, recurrent

torch = pytest.importorskip('torch', reason='torch is a development requirement')

MODULES = {'elman': 'RNN', 'lstm': 'LSTM', 'gru': 'GRU'}
V, D, E, B, T = 11, 6, 8, 3, 7


def module(name, *, layers=2, bidirectional=False, bias=True, seed=0):
  torch.manual_seed(seed)
  return getattr(torch.nn, MODULES[name])(D, E, num_layers=layers, batch_first=True, bias=bias,
                                          bidirectional=bidirectional)


def weights_of(theirs):
  return {name: x.detach().numpy() for name, x in theirs.state_dict().items()}


def stack_of(weights):
  stack = recurrent.Stack(recurrent.Config(**torch_rnn.shape_of(weights)), rngs=nnx.Rngs(0))
  torch_rnn.load(stack, weights)
  return stack


@functools.cache
def tokens():
  return np.random.default_rng(0).integers(0, V, (B, T + 1))


@pytest.mark.parametrize('name', MODULES)
def test_a_language_model_has_torchs_values_and_gradients(name):
  theirs, table = module(name), torch.nn.Embedding(V, D)
  head = torch.nn.Linear(E, V, bias=False)
  h, after = theirs(table(torch.tensor(tokens()[:, :-1])))
  loss = torch.nn.functional.cross_entropy(head(h).flatten(0, 1),
                                           torch.tensor(tokens()[:, 1:]).flatten())
  loss.backward()

  config = recurrent.Config(vocab_size=V, **torch_rnn.shape_of(weights_of(theirs)))
  model = recurrent.Recurrent(config, rngs=nnx.Rngs(0))
  torch_rnn.load(model.stack, weights_of(theirs))
  model.embedding.table.set_value(jnp.asarray(table.weight.detach().numpy()))
  model.head.table.set_value(jnp.asarray(head.weight.detach().numpy()))
  graphdef, params = nnx.split(model)

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def ours(params):
    model = nnx.merge(graphdef, params)
    hidden, state = model(jnp.asarray(tokens()[:, :-1]), model.init_state(B))
    nll = -jax.nn.log_softmax(model.logits(hidden))
    picked = jnp.take_along_axis(nll, jnp.asarray(tokens()[:, 1:, None]), -1)
    return picked.mean(), (hidden, state.layers)

  (value, (hidden, states)), grads = ours(params)
  np.testing.assert_allclose(value, loss.detach().numpy(), rtol=1e-6)
  np.testing.assert_allclose(hidden, h.detach().numpy(), atol=1e-6)
  after = after if name == 'lstm' else (after,)
  for n, state in enumerate(states):
    for a, b in zip(state, after):
      np.testing.assert_allclose(a, b[n].detach().numpy(), atol=1e-6)
  close = functools.partial(np.testing.assert_allclose, atol=1e-7, rtol=1e-5)
  close(grads['embedding']['table'].get_value(), table.weight.grad)
  close(grads['head']['table'].get_value(), head.weight.grad)
  turned = nnx.merge(graphdef, grads).stack   # gradients where the weights stood
  for key, gradient in torch_rnn.dump(turned).items():
    if name == 'gru' and key.startswith('bias_hh'):
      gradient, want = gradient[2 * E:], getattr(theirs, key).grad[2 * E:]
    elif key.startswith('bias_hh'):   # both biases have the gradient of their sum
      gradient, want = torch_rnn.dump(turned)[key.replace('hh', 'ih')], getattr(theirs, key).grad
    else:
      want = getattr(theirs, key).grad
    close(gradient, want, err_msg=key)


@pytest.mark.parametrize('name', ['lstm', 'gru'])
def test_both_ways_over_rows_padded_on_the_right(name):
  theirs = module(name, bidirectional=True)
  stack = stack_of(weights_of(theirs))
  x = np.random.default_rng(1).standard_normal((B, T, D)).astype(np.float32)
  lengths = np.array([T, 4, 1])
  packed = torch.nn.utils.rnn.pack_padded_sequence(torch.tensor(x), lengths, batch_first=True)
  want, _ = torch.nn.utils.rnn.pad_packed_sequence(theirs(packed)[0], batch_first=True)
  valid = jnp.asarray(np.arange(T) < lengths[:, None])
  seen = [context.place_tokens(jnp.zeros((B, T), jnp.int32), None, None, None, v)[0]
          for v in (valid, valid[:, ::-1])]
  got, _ = jax.jit(lambda x: stack(x, stack.init_state(B), tuple(seen)))(jnp.asarray(x))
  np.testing.assert_allclose(np.asarray(got)[valid], want.detach().numpy()[valid], atol=1e-6)


@pytest.mark.parametrize('bidirectional', [False, True])
@pytest.mark.parametrize('layers', [1, 3])
@pytest.mark.parametrize('name', MODULES)
def test_round_trips_bit_for_bit(name, layers, bidirectional):
  given = weights_of(module(name, layers=layers, bidirectional=bidirectional))
  assert torch_rnn.shape_of(given) == dict(name=name, num_layers=layers, embed_dim=D, hidden_dim=E,
                                           bidirectional=bidirectional)
  stack = stack_of(given)
  back = torch_rnn.dump(stack)
  assert list(back) == list(given)   # the order of a state_dict too
  for key, x in given.items():
    assert back[key].dtype == np.float32 and back[key].shape == x.shape
    if key.startswith('weight'):
      np.testing.assert_array_equal(back[key], x)
    elif key.startswith('bias_ih'):
      other, n = given[key.replace('ih', 'hh')], (2 if name == 'gru' else 4) * E
      np.testing.assert_array_equal(back[key], np.concatenate([x[:n] + other[:n], x[n:]]))
      n = n if name == 'gru' else 0
      np.testing.assert_array_equal(back[key.replace('ih', 'hh')][n:], other[n:] if n else 0)
      assert not back[key.replace('ih', 'hh')][:n].any()
  again = stack_of(back)
  for a, b in zip(jax.tree.leaves(nnx.state(stack)), jax.tree.leaves(nnx.state(again))):
    np.testing.assert_array_equal(a, b)
  theirs = module(name, layers=layers, bidirectional=bidirectional, seed=1)
  theirs.load_state_dict({key: torch.from_numpy(x) for key, x in back.items()}, strict=True)
  x = torch.randn(1, 4, D)
  original = module(name, layers=layers, bidirectional=bidirectional)
  np.testing.assert_allclose(theirs(x)[0].detach(), original(x)[0].detach(), atol=1e-6)


def test_a_network_without_biases_has_zeros():
  stack = stack_of(weights_of(module('gru', bias=False)))
  assert not any(np.asarray(x).any() for layer in stack.layers
                 for x in (layer.bias.get_value(), layer.bias_hidden.get_value()))


def test_weights_that_do_not_fit_change_nothing():
  given = weights_of(module('lstm'))
  def refused(message, weights, **changes):
    config = recurrent.Config(**(torch_rnn.shape_of(given) | changes))
    stack = recurrent.Stack(config, rngs=nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.state(stack))
    with pytest.raises(ConfigError, match=message):
      torch_rnn.load(stack, weights)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(nnx.state(stack))):
      np.testing.assert_array_equal(a, b)
  refused(r'weight_ih_l2: is missing .*model.num_layers=3', given, num_layers=3)
  refused(r'bias_hh_l1, bias_ih_l1, weight_hh_l1, weight_ih_l1: no place for', given, num_layers=1)
  refused(r'weight_ih_l0 has shape \(32, 6\): must be \(24, 6\)', given, name='gru')
  refused(r'weight_ih_l0 has shape \(32, 6\): must be \(32, 5\)', given, embed_dim=5)
  refused(r"model.name='slstm': PyTorch has no such network", given, name='slstm')
  refused(r'model.layer_norm=True: .* set model.layer_norm=False', given, layer_norm=True)
  with pytest.raises(ConfigError, match=r'weight_hh_l0: is missing .* they have weight_ih_l0, '):
    torch_rnn.shape_of({k: v for k, v in given.items() if k != 'weight_hh_l0'})
  projected = torch.nn.LSTM(D, E, proj_size=3)
  with pytest.raises(ConfigError, match=r'weight_hh_l0 has shape \(32, 3\): .*without proj_size'):
    torch_rnn.shape_of(weights_of(projected))
  stack = recurrent.Stack(recurrent.Config(name='slstm', embed_dim=D, hidden_dim=E),
                          rngs=nnx.Rngs(0))
  with pytest.raises(ConfigError, match=r"model.name='slstm'.*PyTorch's networks are elman, lstm"):
    torch_rnn.dump(stack)
