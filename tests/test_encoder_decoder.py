"""The encoder-decoder against its definition, against T5, and its laws with a source."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.inference import sampling
from longctx.models import encoder_config, encoder_decoder
from longctx.parallel import mesh
from tests import oracles, test_mesh

VOCAB, B, S, T = 29, 2, 11, 9
small = functools.partial(
    encoder_config.PairConfig, vocab_size=VOCAB, num_layers=2, embed_dim=16, num_heads=4, max_length=16,
    source_length=12, init_std=0.3, layer_loop='unrolled')
MODELS = {
    'rope': small(num_kv_heads=2, qk_norm=True),
    'sinusoidal': small(position='sinusoidal', encoder_layers=1, tied=False),
    'learned': small(position='learned', layer_loop='scan', remat='dots', encoder_layers=4),
    't5': small(position='t5', position_buckets=8, position_distance=9, num_layers=1),
}
LENGTHS = (11, 4)   # of the sources of the two rows


@functools.cache
def made(name):
  model = encoder_decoder.EncoderDecoder(MODELS[name], rngs=nnx.Rngs(0))
  graphdef, params = nnx.split(model)
  jitted = lambda f: functools.partial(jax.jit(f), params)
  call = jitted(lambda params, *args, **kwargs: nnx.merge(graphdef, params)(*args, **kwargs))
  encode = jitted(lambda params, *args: nnx.merge(graphdef, params).encode(*args, capacity=12))
  return model, call, encode


@functools.cache
def tokens():
  source, target = (jax.random.randint(jax.random.key(i), shape, 0, VOCAB)
                    for i, shape in enumerate(((B, S), (B, T))))
  return source, target, jnp.arange(S) < jnp.array(LENGTHS)[:, None]


@functools.cache
def whole(name):
  source, target, valid = tokens()
  return np.asarray(made(name)[1](target, None, source_BS=source, source_valid_BS=valid)[0])


def as_numpy(name):
  """Parameters as nested dicts of float64, layers as lists."""
  model = made(name)[0]
  def tree(state):
    if hasattr(state, 'get_value'):
      return np.asarray(state.get_value(), np.float64)
    return {k: tree(v) for k, v in state.items()}
  params = tree(nnx.state(model, nnx.Param))
  def layers(blocks):
    if MODELS[name].layer_loop == 'unrolled':
      return [blocks[i] for i in sorted(blocks)]
    count = len(jax.tree.leaves(blocks)[0])
    return [jax.tree.map(lambda x, i=i: x[i], blocks[0]) for i in range(count)]
  params['blocks'] = layers(params['blocks'])
  params['encoder']['blocks'] = layers(params['encoder']['blocks'])
  return params


@pytest.mark.parametrize('name', ['rope', 'sinusoidal', 'learned'])
def test_it_is_its_definition(name):
  source, target, _ = tokens()
  params = as_numpy(name)
  for row, count in enumerate(LENGTHS):
    expected = oracles.encoder_decoder(params, source[row, :count], target[row],
                                       position=MODELS[name].position)
    np.testing.assert_allclose(whole(name)[row], expected, atol=2e-5, rtol=2e-5)


@functools.cache
def t5():
  """transformers' T5 with the weights of the model 't5'; torch is heavy, so it is imported here."""
  import torch
  import transformers
  c = MODELS['t5'].resolved(VOCAB)
  theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(
      vocab_size=VOCAB, d_model=c.embed_dim, d_kv=c.head_dim, d_ff=c.mlp_dim, num_layers=1,
      num_decoder_layers=1, num_heads=4, relative_attention_num_buckets=8,
      relative_attention_max_distance=9, dropout_rate=0.0, layer_norm_epsilon=c.norm_epsilon,
      feed_forward_proj='gated-silu', tie_word_embeddings=True, decoder_start_token_id=0,
      pad_token_id=0, eos_token_id=1)).eval()
  p = as_numpy('t5')
  put = {'shared.weight': p['embedding']['table']}
  sides = (('encoder', p['encoder'], (('mixer', 'SelfAttention'),)),
           ('decoder', p, (('mixer', 'SelfAttention'), ('source', 'EncDecAttention'))))
  for side, mine, attentions in sides:
    block = mine['blocks'][0]
    put[f'{side}.final_layer_norm.weight'] = mine['norm']['scale']
    put[f'{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight'] = (
        mine['positions']['table'].T)
    for i, (ours, name) in enumerate(attentions):
      at, w = f'{side}.block.0.layer.{i}', block[ours]
      flat = lambda x: x.reshape(x.shape[0], -1).T
      put[f'{at}.layer_norm.weight'] = block[f'{ours}_norm']['scale']
      put[f'{at}.{name}.q.weight'] = flat(w['w_q']) * c.head_dim ** -0.5   # T5 does not scale
      put[f'{at}.{name}.k.weight'], put[f'{at}.{name}.v.weight'] = (
          flat(w['w_kv'][:, j]) for j in range(2))
      put[f'{at}.{name}.o.weight'] = w['w_out'].reshape(-1, c.embed_dim).T
    at = f'{side}.block.0.layer.{len(attentions)}'
    put[f'{at}.layer_norm.weight'] = block['mlp_norm']['scale']
    for j in range(2):
      put[f'{at}.DenseReluDense.wi_{j}.weight'] = block['mlp']['w_in'][:, j].T
    put[f'{at}.DenseReluDense.wo.weight'] = block['mlp']['w_out'].T
  left = set(theirs.state_dict()) - {'encoder.embed_tokens.weight', 'decoder.embed_tokens.weight',
                                     'lm_head.weight'}
  assert set(put) == left, set(put) ^ left
  theirs.load_state_dict({k: torch.tensor(v) for k, v in put.items()}, strict=False)
  return theirs.double()


def of_t5():
  """Hidden states of the target, and gradients of the sum of their squares, by parameter."""
  import torch
  source, target, valid = (torch.tensor(np.asarray(x)) for x in tokens())
  theirs = t5()
  theirs.zero_grad()
  hidden = theirs.model if hasattr(theirs, 'model') else theirs
  encoded = hidden.encoder(input_ids=source.long(), attention_mask=valid.long())[0]
  out = hidden.decoder(input_ids=target.long(), encoder_hidden_states=encoded,
                       encoder_attention_mask=valid.long())[0]
  (out ** 2 * torch.arange(16)).sum().backward()
  return out.detach().numpy(), {k: x.grad.numpy() for k, x in theirs.named_parameters()
                                if x.grad is not None}


def test_it_is_t5_with_gradients():
  source, target, valid = tokens()
  expected, theirs = of_t5()
  np.testing.assert_allclose(whole('t5'), expected, atol=1e-5, rtol=1e-5)
  graphdef, params = nnx.split(made('t5')[0])
  def loss(params):
    hidden, _ = nnx.merge(graphdef, params)(target, None, source_BS=source, source_valid_BS=valid)
    return (hidden ** 2 * jnp.arange(16)).sum()
  grads = jax.jit(jax.grad(loss))(params)
  pairs = {
      'shared.weight': grads['embedding']['table'],
      'encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight':
          grads['encoder']['positions']['table'],
      'decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight':
          grads['positions']['table'],
      'encoder.block.0.layer.0.SelfAttention.o.weight': grads['encoder']['blocks'][0]['mixer']['w_out'],
      'decoder.block.0.layer.1.EncDecAttention.o.weight': grads['blocks'][0]['source']['w_out'],
      'decoder.block.0.layer.2.DenseReluDense.wo.weight': grads['blocks'][0]['mlp']['w_out'],
      'encoder.final_layer_norm.weight': grads['encoder']['norm']['scale'],
  }
  for name, mine in pairs.items():
    mine, other = np.asarray(mine.get_value()), theirs[name]
    if name != 'shared.weight' and other.ndim == 2:
      other = other.T
    scale = np.abs(other).max()
    np.testing.assert_allclose(mine.reshape(other.shape), other, atol=2e-4 * scale, err_msg=name)


@pytest.mark.parametrize('edges', [(0, 4, 8, 9), tuple(range(10))], ids=['pieces', 'one by one'])
@pytest.mark.parametrize('name', [
    pytest.param(name, marks=[] if name in ('rope', 't5') else pytest.mark.slow) for name in MODELS])
def test_what_was_encoded_is_carried(name, edges):
  """Encoded once and read in any pieces: what the whole call says."""
  _, call, encode = made(name)
  source, target, valid = tokens()
  state, pieces = encode(source, valid), []
  for a, b in itertools.pairwise(edges):
    hidden, state = call(target[:, a:b], state)
    pieces.append(hidden)
  np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole(name), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('name', ['rope', 't5'])
def test_padding_of_the_source_is_not_heard_and_all_else_is(name):
  _, call, _ = made(name)
  source, target, valid = tokens()
  says = lambda source: np.asarray(
      call(target, None, source_BS=source, source_valid_BS=valid)[0])
  np.testing.assert_array_equal(says(source.at[1, 4:].add(1) % VOCAB), whole(name))
  for row, at in ((0, 0), (0, S - 1), (1, 3)):   # every place of a source, the last one too
    moved = np.any(says(source.at[row, at].add(1) % VOCAB) != whole(name), axis=-1)
    assert moved[row].all() and not moved[1 - row].any()


def test_the_future_of_the_target_is_not_seen():
  _, call, _ = made('rope')
  source, target, valid = tokens()
  other, _ = call(target.at[0, 5].add(1) % VOCAB, None, source_BS=source, source_valid_BS=valid)
  moved = np.any(np.asarray(other) != whole('rope'), axis=-1)
  assert not moved[0, :5].any() and moved[0, 5:].all() and not moved[1].any()


def test_padding_may_stand_anywhere_in_a_source():
  """Positions are counted over what is there."""
  _, call, _ = made('rope')
  source, target, _ = tokens()
  order = np.array([0, 4, 5, 9, 1, 2, 3, 6, 7, 8, 10])   # four tokens of row 1, among padding
  spread = np.zeros((B, S), np.int32)
  spread[0], spread[1, order[:4]] = source[0], source[1, :4]
  valid = np.zeros((B, S), bool)
  valid[0], valid[1, order[:4]] = True, True
  hidden, _ = call(target, None, source_BS=jnp.asarray(spread), source_valid_BS=jnp.asarray(valid))
  np.testing.assert_allclose(hidden, whole('rope'), atol=1e-5, rtol=1e-5)


def test_a_row_that_outgrows_its_state_is_not_a_number():
  _, call, encode = made('t5')
  source, target, valid = tokens()
  hidden, state = call(target, encode(source, valid))
  hidden, _ = call(target, state)
  assert np.isfinite(hidden[:, :3]).all() and np.isnan(hidden[:, 3:]).all()


@pytest.mark.parametrize('name', MODELS)
def test_parameter_count_is_the_closed_form(name):
  model, config = made(name)[0], MODELS[name].resolved(VOCAB)
  assert sum(x.size for x in jax.tree.leaves(nnx.state(model))) == config.num_parameters()


def test_a_source_and_a_state_are_refused():
  model, _, encode = made('rope')
  source, target, valid = tokens()
  with pytest.raises(ValueError, match='give one of them'):
    model(target, encode(source, valid), source_BS=source)


# Over a mesh.

CUT = encoder_config.PairConfig(
    vocab_size=64, num_layers=1, embed_dim=32, num_heads=8, mlp_dim=64, max_length=32,
    source_length=64, init_std=0.2, position='t5', attention='blockwise').resolved(64)


@functools.cache
def pairs():
  """A batch as test_mesh has it, with sources twice as long."""
  rng, rows = np.random.default_rng(3), test_mesh.batch()
  counts = rng.integers(8, 65, (test_mesh.B, 1))
  return rows | dict(source=rng.integers(0, 64, (test_mesh.B, 64)).astype(np.int32),
                     source_valid=np.arange(64) < counts)


@functools.cache
def alone():
  return test_mesh.two_steps(CUT, mesh.make_layout(mesh.Config(layout='single')), rows=pairs())


@pytest.mark.parametrize('layout,sizes,strategy', [
    ('sequence', (2, 2, 2), 'ring'),
    pytest.param('fsdp', (8, 1, 1), 'ring', marks=pytest.mark.slow),
    pytest.param('sequence', (1, 8, 1), 'ring', marks=pytest.mark.slow),
    pytest.param('sequence', (2, 4, 1), 'ulysses', marks=pytest.mark.slow)])
def test_the_loss_does_not_depend_on_the_layout(layout, sizes, strategy):
  cut = mesh.make_layout(mesh.Config(data=sizes[0], seq=sizes[1], model=sizes[2], layout=layout,
                                     strategy=strategy))
  losses, norm, params = test_mesh.two_steps(CUT, cut, rows=pairs())
  np.testing.assert_allclose(losses, alone()[0], rtol=1e-5)
  np.testing.assert_allclose(norm, alone()[1], rtol=1e-4)
  for a, b in zip(params, alone()[2]):
    np.testing.assert_allclose(a, b, atol=3e-4)


@pytest.mark.slow
def test_devices_share_the_source_while_a_target_is_written():
  """The source's keys cut over `seq`, as --seq does: the tokens of one device."""
  graphdef, params = nnx.split(made('t5')[0])
  source, _, _ = tokens()
  given = dict(prompts=[[1, 2], [3]], max_new_tokens=5, chunk=8, sampling=sampling.Sampling(temperature=0),
               sources=[list(map(int, source[0])), list(map(int, source[1, :4]))])
  alone = list(sampling.generate_batch(graphdef, params, **given))
  cut = mesh.make_layout(mesh.Config(data=1, seq=8, layout='sequence'))
  shared = list(sampling.generate_batch(graphdef, params, layout=cut, **given))
  np.testing.assert_array_equal(shared, alone)
