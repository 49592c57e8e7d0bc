"""The loss and the gradient do not depend on the layout; a mesh that does not fit is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import assembly
from longctx.errors import ConfigError
from longctx.models import decoder, encoder, encoder_decoder, recurrent
from longctx.parallel import mesh
from longctx.training import loss, optim, step

B, T, V = 8, 32, 64
DECODER = decoder.Config(vocab_size=V, num_layers=2, embed_dim=32, num_heads=8, num_kv_heads=8,
                         mlp_dim=64, max_length=T, init_std=0.2, window=(9,)).resolved(V)
GROUPED = decoder.Config(vocab_size=V, num_layers=1, embed_dim=32, num_heads=8, num_kv_heads=2,
                         mlp_dim=64, max_length=T, init_std=0.2, attention='blockwise').resolved(V)
LSTM = recurrent.Config(vocab_size=V, embed_dim=32, hidden_dim=32, init_std=0.3)
CLASSES = {'decoder': decoder.Decoder, 'lstm': recurrent.Recurrent,
           'encoder': encoder.Encoder, 'encoder_decoder': encoder_decoder.EncoderDecoder}


def batch():
  rng = np.random.default_rng(0)
  segments = np.sort(rng.integers(1, 4, (B, T)), axis=1)
  starts = np.diff(segments, axis=1, prepend=0) > 0
  index = np.arange(T)
  positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
  return dict(tokens=rng.integers(0, V, (B, T)).astype(np.int32),
              targets=rng.integers(0, V, (B, T)).astype(np.int32),
              loss_mask=(rng.random((B, T)) < 0.8).astype(np.float32),
              positions=positions.astype(np.int32), segment_ids=segments.astype(np.int32),
              document_start=starts)


def two_steps(config, layout, accumulate=1, rows=None):
  """Losses of two updates, the last one's gradient norm, and the parameters after them."""
  settings = optim.Config(learning_rate=3e-3)
  new_model = lambda key: CLASSES[config.name](config, rngs=nnx.Rngs(key))
  graphdef, abstract = nnx.split(nnx.eval_shape(lambda: new_model(jax.random.key(0))), nnx.Param)
  make_tx = functools.partial(optim.make_optimizer, settings, 10)
  init = functools.partial(step.init_state, new_model, make_tx, seed=0, batch_size=B,
                           carries=False, ema=0.0)
  update = functools.partial(step.train_step, graphdef, make_tx(abstract), loss.Config(chunk=8),
                             accumulate, 0.0)
  shardings = assembly.state_shardings(layout, jax.eval_shape(init))
  state = jax.device_put(fresh(config), shardings)
  update = jax.jit(mesh.under(layout, update), out_shardings=(shardings, layout.sharding()))
  placed = layout.place(layout.lay_out(batch() if rows is None else rows), B)
  losses = []
  for _ in range(2):
    state, metrics = update(state, placed)
    losses.append(float(metrics['loss']))
  return losses, float(metrics['grad_norm']), jax.device_get(jax.tree.leaves(state.params))


@functools.cache
def fresh(config):
  new_model = lambda key: CLASSES[config.name](config, rngs=nnx.Rngs(key))
  make_tx = functools.partial(optim.make_optimizer, optim.Config(learning_rate=3e-3), 10)
  return jax.jit(lambda: step.init_state(new_model, make_tx, seed=0, batch_size=B, carries=False,
                                         ema=0.0))()


@functools.cache
def alone(name):
  return two_steps({'decoder': DECODER, 'grouped': GROUPED, 'lstm': LSTM}[name],
                     mesh.make_layout(mesh.Config(layout='single')))


MESHES = [('decoder', 'sequence', (8, 1, 1)), ('decoder', 'sequence', (2, 2, 2)),
          ('decoder', 'sequence', (1, 4, 2)), ('decoder', 'sequence', (1, 1, 8)),
          ('decoder', 'fsdp', (8, 1, 1)), ('grouped', 'sequence', (2, 2, 2)),
          ('grouped', 'data', (8, 1, 1)),
          ('lstm', 'tensor', (2, 1, 4))]


def fast(cases, chosen):
  """The chosen of the cases; the others, whose parts these have too, are slow."""
  return [case if i in chosen else pytest.param(*case, marks=pytest.mark.slow)
          for i, case in enumerate(cases)]


@pytest.mark.parametrize('name,layout,sizes', fast(MESHES, (0, 1, 4, 5, 7)))
def test_the_loss_does_not_depend_on_the_layout(name, layout, sizes):
  config = {'decoder': DECODER, 'grouped': GROUPED, 'lstm': LSTM}[name]
  cut = mesh.make_layout(mesh.Config(data=sizes[0], seq=sizes[1], model=sizes[2], layout=layout))
  losses, norm, params = two_steps(config, cut)
  expected_losses, expected_norm, expected_params = alone(name)
  np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
  np.testing.assert_allclose(norm, expected_norm, rtol=1e-4)
  # Adam divides by its own size: a gradient near zero may turn, so parameters agree to a tenth of
  # a step of the learning rate.
  for a, b in zip(params, expected_params):
    np.testing.assert_allclose(a, b, atol=3e-4)


CUTS = [('decoder', (1, 8, 1), dict(strategy='ring', order='striped', unit=2)),
        ('decoder', (2, 4, 1), dict(strategy='bidirectional', order='zigzag')),
        ('decoder', (2, 2, 2), dict(strategy='ulysses', order='striped', unit=4)),
        ('decoder', (1, 4, 2), dict(strategy='hybrid', ulysses=2, order='zigzag')),
        ('decoder', (4, 2, 1), dict(strategy='allgather', order='striped', unit=5)),
        ('grouped', (1, 2, 4), dict(strategy='ring'))]   # 2 kv heads for 4 devices


@pytest.mark.parametrize('name,sizes,settings', fast(CUTS, (0, 2, 3, 5)))
def test_nor_on_how_the_sequence_is_cut(name, sizes, settings):
  """Strategy and order by config alone; unit=5 pads 32 tokens to 40."""
  config = {'decoder': DECODER, 'grouped': GROUPED}[name]
  cut = mesh.make_layout(mesh.Config(data=sizes[0], seq=sizes[1], model=sizes[2],
                                     layout='sequence', **settings))
  losses, norm, _ = two_steps(config, cut)
  np.testing.assert_allclose(losses, alone(name)[0], rtol=1e-5)
  np.testing.assert_allclose(norm, alone(name)[1], rtol=1e-4)


def test_any_length_is_padded_to_the_mesh():
  """31 tokens over 4 devices: the loss of the 31."""
  rows = {k: v[:, :31] for k, v in batch().items()}
  cut = mesh.make_layout(mesh.Config(data=2, seq=4, layout='sequence'))
  one = mesh.make_layout(mesh.Config(layout='single'))
  np.testing.assert_allclose(two_steps(DECODER, cut, rows=rows)[0],
                             two_steps(DECODER, one, rows=rows)[0], rtol=1e-5)


@pytest.mark.parametrize('layout,sizes', [('sequence', (2, 2, 2))])
def test_accumulated_gradients_equal_the_large_batch(layout, sizes):
  cut = mesh.make_layout(mesh.Config(data=sizes[0], seq=sizes[1], model=sizes[2], layout=layout))
  losses, norm, _ = two_steps(DECODER, cut, accumulate=4)
  np.testing.assert_allclose(losses, alone('decoder')[0], rtol=1e-5)
  np.testing.assert_allclose(norm, alone('decoder')[1], rtol=1e-4)


def test_parameters_are_cut_as_the_table_says():
  layout = mesh.make_layout(mesh.Config(data=2, seq=1, model=4, layout='tensor'))
  shapes = nnx.state(nnx.eval_shape(lambda: decoder.Decoder(DECODER, rngs=nnx.Rngs(0))))
  shardings = layout.params_sharding(shapes)
  spec = shardings['blocks'][0]['mixer']['w_q'].spec
  assert spec == jax.sharding.PartitionSpec(None, 'data', 'model', None)
  spec = shardings['embedding']['table'].spec
  assert spec == jax.sharding.PartitionSpec('model', 'data')


def test_a_vocabulary_that_the_axis_does_not_divide_stays_whole():
  layout = mesh.make_layout(mesh.Config(data=2, seq=1, model=4, layout='tensor'))
  assert layout.spec('vocab', 'embed', shape=(257, 32)) == jax.sharding.PartitionSpec(None, 'data')
  assert layout.spec('vocab', 'embed', shape=(256, 32)) == jax.sharding.PartitionSpec(
      'model', 'data')


@pytest.mark.parametrize('settings,words', [
    (dict(data=3), 'product must be equal'),
    (dict(seq=2), "layout 'tensor' cuts nothing over 'seq'"),
    (dict(layout='fdsp'), 'did you mean "fsdp"'),
    (dict(data=0), 'mesh.data=0'),
    (dict(seq=-1), 'mesh.seq=-1'),
])
def test_meshes_that_do_not_fit_are_refused(settings, words):
  with pytest.raises(ConfigError, match=words):
    mesh.make_layout(mesh.Config(**settings))


def test_a_parameter_that_the_mesh_does_not_divide_is_named():
  config = decoder.Config(vocab_size=V, embed_dim=36, num_heads=6, mlp_dim=64).resolved(V)
  layout = mesh.make_layout(mesh.Config(data=2, model=4))
  shapes = nnx.state(nnx.eval_shape(lambda: decoder.Decoder(config, rngs=nnx.Rngs(0))))
  with pytest.raises(ConfigError, match=r'mesh.model=4: must divide (kv_)?heads=6'):
    layout.params_sharding(shapes)


def test_place_puts_each_row_where_it_belongs():
  layout = mesh.make_layout(mesh.Config(data=2, seq=2, model=2, layout='sequence'))
  x = np.arange(B * T).reshape(B, T)
  placed = layout.place(x, B)
  np.testing.assert_array_equal(placed, x)
  shard = next(s for s in placed.addressable_shards if s.index == (slice(4, 8), slice(16, 32)))
  np.testing.assert_array_equal(shard.data, x[4:, 16:])
  assert placed.sharding.spec == jax.sharding.PartitionSpec('data', 'seq')


def test_constrain_is_the_identity_without_a_layout():
  x = jnp.ones((2, 3))
  assert mesh.constrain(x, 'batch', 'length') is x
