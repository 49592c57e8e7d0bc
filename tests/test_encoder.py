"""The encoder: its definition, both ways within a document and no further, classes, held-out scores."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import configuration, retrofit
from longctx.data import stream
from longctx.data.tokenizer import Bytes
from longctx.errors import ConfigError
from longctx.evaluation import held_out, perplexity
from longctx.models import encoder, encoder_config
from longctx.parallel import mesh
from tests import oracles, test_mesh

VOCAB, B, T = 29, 2, 12
small = functools.partial(encoder_config.Config, vocab_size=VOCAB, embed_dim=16, num_heads=4,
                          max_length=16, init_std=0.3)
MODELS = {'rope': small(num_layers=2, num_kv_heads=2, qk_norm=True, tied=False),
          'learned': small(num_layers=1, position='learned', num_classes=3, layer_loop='unrolled'),
          't5': small(num_layers=1, position='t5', position_buckets=8, position_distance=9)}
SEGMENTS = jnp.asarray([[1] * 5 + [2] * 4 + [0] * 3, [3] * 12])


@functools.cache
def made(name):
  model = encoder.Encoder(MODELS[name], rngs=nnx.Rngs(0))
  graphdef, params = nnx.split(model)
  call = jax.jit(lambda params, *args, **kwargs: nnx.merge(graphdef, params)(*args, **kwargs)[0])
  return model, functools.partial(call, params)


@functools.cache
def tokens():
  return jax.random.randint(jax.random.key(1), (B, T), 0, VOCAB)


@functools.cache
def packed(name):
  return np.asarray(made(name)[1](tokens(), segment_ids_BT=SEGMENTS))


def test_it_is_its_definition():
  """Of one layer with learned positions; more layers: the encoder-decoder's oracle."""
  model, _ = made('learned')
  wide = lambda x: np.asarray(x.get_value(), np.float64)
  block = model.layers.blocks[0]
  silu = lambda z: z / (1 + np.exp(-z))
  norm = lambda x, of: oracles.rms_norm(x, wide(of.scale), 1e-6)
  attention = {name: wide(getattr(block.mixer, name)) for name in ('w_q', 'w_kv', 'w_out')}
  for row, low, high in ((0, 0, 5), (0, 5, 9), (1, 0, 12)):
    x = wide(model.embedding.table)[tokens()[row, low:high]]
    x = x + wide(model.layers.positions.table)[:high - low]
    h = norm(x, block.mixer_norm)
    x = x + oracles.heads_of(h, h, attention, lambda t, s: True)
    h, w_in = norm(x, block.mlp_norm), wide(block.mlp.w_in)
    x = x + (silu(h @ w_in[:, 0]) * (h @ w_in[:, 1])) @ wide(block.mlp.w_out)
    np.testing.assert_allclose(packed('learned')[row, low:high], norm(x, model.layers.norm),
                               atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize('name', MODELS)
def test_a_token_sees_its_whole_document_and_nothing_else(name):
  """Bit for bit, by moving one token: the first, one amid, the last of a document, and padding."""
  _, call = made(name)
  for row, at, low, high in ((0, 0, 0, 5), (0, 8, 5, 9), (1, 6, 0, 12), (0, 10, 9, 12)):
    other = call(tokens().at[row, at].add(1) % VOCAB, segment_ids_BT=SEGMENTS)
    moved = np.any(np.asarray(other) != packed(name), axis=-1)
    assert moved[row, low:high].all()
    assert not moved[row, :low].any() and not moved[row, high:].any() and not moved[1 - row].any()


@pytest.mark.parametrize('name', MODELS)
def test_padding_anywhere_is_not_seen(name):
  _, call = made(name)
  whole = np.asarray(call(tokens()))
  valid = np.ones((B, T + 4), bool)
  valid[0, [0, 5, 6, 15]] = valid[1, [3, 4, 5, 6]] = False
  padded = np.full((B, T + 4), 7)
  padded[valid] = np.asarray(tokens()).ravel()
  found = np.asarray(call(jnp.asarray(padded), valid_BT=jnp.asarray(valid)))
  np.testing.assert_allclose(found[valid].reshape(whole.shape), whole, atol=1e-5, rtol=1e-5)
  assert np.isfinite(found).all()


@pytest.mark.parametrize('name', MODELS)
def test_parameter_count_is_the_closed_form(name):
  count = sum(x.size for x in jax.tree.leaves(nnx.state(made(name)[0])))
  assert count == MODELS[name].resolved(VOCAB).num_parameters()


def test_a_classifier_has_logits_of_classes_and_a_state_is_refused():
  model, call = made('learned')
  assert model.logits(call(tokens())).shape == (B, T, 3)
  with pytest.raises(ValueError, match='state must be None'):
    model(tokens(), ())
  assert model.init_state(3) == ()


def test_the_vocabulary_has_the_mask():
  assert encoder_config.Config().resolved(257).vocab_size == 258


def test_layers_are_as_configured_and_mistakes_have_names():
  for settings, message in ((dict(num_classes=1), 'model.num_classes=1: must be at least 2'),
                            (dict(position='alibi'), "model.position='alibi'"),
                            (dict(num_heads=3), 'model.num_heads=3: must divide model.embed_dim'),
                            (dict(position='t5', position_distance=16), 'greater than 16'),
                            (dict(num_classes=2, tied=False), 'model.tied=False')):
    with pytest.raises(ConfigError, match=message):
      encoder_config.Config(**settings)


@pytest.mark.parametrize('model,form,message', [
    ('decoder', 'masked', "data.form='masked': model.name='decoder' learns from packed or segments"),
    ('encoder', 'packed', "model.name='encoder' learns from masked or labels"),
    ('encoder_decoder', 'packed', "learns from pairs; set data.form to it, or model.name to decoder")])
def test_a_model_learns_from_its_forms_of_data_alone(model, form, message):
  config = configuration.base(model)
  config.data.form = form
  with pytest.raises(ConfigError, match=message):
    configuration.parts(config)


def test_a_classifier_may_begin_with_the_layers_of_a_model_that_guesses_tokens():
  guesses, says = small(num_layers=1), small(num_layers=1, num_classes=3)
  assert retrofit.differences(guesses, says) == []
  assert retrofit.differences(guesses, small(num_layers=1, num_classes=3, position='t5'))
  names = lambda config: {'/'.join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(
      nnx.eval_shape(lambda: encoder.Encoder(config, rngs=nnx.Rngs(0)))))}
  assert names(says) - names(guesses) == {'classes'} and not names(guesses) - names(says)


# Over a mesh.

CUT = encoder_config.Config(vocab_size=64, num_layers=1, embed_dim=32, num_heads=8, mlp_dim=64,
                            max_length=32, init_std=0.2, attention='blockwise').resolved(64)


@pytest.mark.parametrize('layout,sizes', [
    ('sequence', (2, 2, 2)), pytest.param('fsdp', (8, 1, 1), marks=pytest.mark.slow),
    pytest.param('sequence', (1, 8, 1), marks=pytest.mark.slow)])
def test_the_loss_does_not_depend_on_the_layout(layout, sizes):
  cut = mesh.make_layout(mesh.Config(data=sizes[0], seq=sizes[1], model=sizes[2], layout=layout))
  losses, norm, _ = test_mesh.two_steps(CUT, cut)
  expected, expected_norm, _ = test_mesh.two_steps(
      CUT, mesh.make_layout(mesh.Config(layout='single')))
  np.testing.assert_allclose(losses, expected, rtol=1e-5)
  np.testing.assert_allclose(norm, expected_norm, rtol=1e-4)


# Held-out scores.


@dataclasses.dataclass(frozen=True)
class Shape:
  max_length: int = 0


class Knows(nnx.Module):
  """Says p = 1/2 for one token at every place of every row, and 1/510 for the others of 256."""

  def __init__(self, token):
    self.config, self.token = Shape(), token

  def __call__(self, tokens_BT, state, **given):
    return jnp.zeros((*tokens_BT.shape, 1)), None

  def logits(self, hidden_BTD):
    p = jnp.full(256, 1 / 510).at[self.token].set(1 / 2)
    return jnp.broadcast_to(jnp.log(p), (*hidden_BTD.shape[:2], 256))


def score(config, token, **settings):
  layout = mesh.make_layout(mesh.Config(layout='single'))
  settings = perplexity.Config(batch_size=3, split='train', **settings)
  rows = held_out.open_rows(config, settings, layout)
  return held_out.evaluate(nnx.graphdef(Knows(token)), nnx.State({}), rows, config, Bytes(), settings,
                           layout=layout, loss_chunk=2)


def test_held_out_scores_by_hand(tmp_path):
  """Five pairs in batches of three; each target a, or ab and a separator that it can say no more of."""
  (tmp_path / 'a.tsv').write_text('1\ta\n2\taa\n3\tb\n4\tab\n5\taaaa\n')
  config = stream.Config(form='pairs', corpus='files', files=f'{tmp_path}/a.tsv', cache_dir=f'{tmp_path}/cache', length=5,
                         source_length=3, long_documents='drop', validation_fraction=0.0,
                         test_fraction=0.0, batch_size=2)
  found = score(config, ord('a'))
  # 1 + 2 + 1 + 4 = 8 times a is right; b twice and five separators are not.
  assert (found.rows, found.targets, found.right, found.right_rows, found.bytes) == (5, 15, 8, 0, 10)
  np.testing.assert_allclose(found.nats, 8 * np.log(2) + 7 * np.log(510), rtol=1e-6)
  assert score(config, ord('a'), max_tokens=1).rows == 3   # the first batch


def opened(**given):
  config = stream.Config(corpus='files', length=5, validation_fraction=0.0, test_fraction=0.0, batch_size=2, **given)
  return held_out.open_rows(config, perplexity.Config(batch_size=3, split='train'),
                            mesh.make_layout(mesh.Config(layout='single')))


@pytest.mark.parametrize('form', ['pairs', 'labels', 'masked'])
def test_rows_tell_what_they_hold(tmp_path, form):
  """So that what was read of one text is not carried on with another of equal lengths."""
  cache = str(tmp_path / 'cache')
  def content(word):
    if form == 'labels':
      for name in ('train/a/0.txt', 'train/b/0.txt', 'test/a/0.txt', 'test/b/0.txt'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(word)
      return opened(form='labels', files=str(tmp_path), long_documents='drop', cache_dir=cache).content
    (tmp_path / 'a.tsv').write_text(f'1\t{word}\n')
    more = dict(source_length=3, long_documents='drop') if form == 'pairs' else {}
    return opened(form=form, files=f'{tmp_path}/a.tsv', cache_dir=cache, **more).content
  assert content('ab') == content('ab') != content('ba')


def test_held_out_classes_by_hand(tmp_path):
  for i in range(4):
    for name in (f'train/{"a" if i else "b"}/{i}.txt', f'test/{"a" if i else "b"}/{i}.txt'):
      (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
      (tmp_path / name).write_text('x')
  config = stream.Config(form='labels', corpus='files', files=str(tmp_path), length=5, batch_size=2,
                         cache_dir=f'{tmp_path}/cache', long_documents='drop', validation_fraction=0.0, test_fraction=0.0)
  found = score(config, 0)
  assert (found.rows, found.right_rows, found.majority, found.bytes) == (4, 3, 3, 4)
  assert 'largest class alone: 75.00 %' in found.table() and '75.00 % of 4 right' in found.line()
  assert found.to_json()['right_rows'] == 0.75
  # Wilson's interval of 3 of 4, as tables have it.
  ends = found.to_json()['right_rows_low'], found.to_json()['right_rows_high']
  np.testing.assert_allclose(ends, (0.3006, 0.9544), atol=1e-4)
