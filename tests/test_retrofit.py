"""A memory added to a trained model: it begins as that model, and what is missing or misfit is named."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import assembly, retrofit, train
from longctx.configuration import base
from longctx.errors import ConfigError
from longctx.models.memories import MEMORIES
from tests.compilation import quick_compilation  # noqa: F401
from tests.programs import tiny

pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
  """A workdir of a plain decoder of two stacked layers, trained for two steps; and its text."""
  folder = tmp_path_factory.mktemp('plain')
  text = {'files': tiny.write_corpus(folder / 'text'), 'cache_dir': str(folder / 'cache')}
  config = tiny.get_config()
  config.data.update(text)
  config.model.update(dict(num_layers=2, layer_loop='scan', qk_norm=True))
  config.run.update(dict(num_steps=2, eval_every=0))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(assembly, 'assemble', functools.partial(assembly.assemble, devices=jax.devices()[:1]))
    train.run(config, str(folder / 'w'))
  return str(folder / 'w'), text


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  real = assembly.assemble
  monkeypatch.setattr(assembly, 'assemble',
                      lambda config, devices=None: real(config, devices or jax.devices()[:1]))


def memory_config(text, **model):
  config = base('memory')
  config.data.update(tiny.get_config().data)
  config.data.update(text)
  config.model.update(dict(num_layers=2, embed_dim=16, num_heads=2, qk_norm=True, segment=16,
                           attention='reference') | model)
  config.run.update(dict(num_steps=2, log_every=1, compilation_cache='none'))
  return config


CLOSED = {
    'transformer_xl': dict(short_term=8),
    'infini': dict(long_term='infini', gate='tanh'),
    'memorizing': dict(long_term='memorizing', gate='tanh', memory_size=64, memory_layers=(1,)),
    'armt': dict(long_term='armt', memory_tokens=2, memory_width=4),
}


@pytest.mark.parametrize('name', CLOSED)
def test_a_memory_begins_as_the_model_it_is_added_to(name, plain):
  """Equal logits within a segment; and for a memory that is filled but shut, beyond it too."""
  folder, text = plain
  a = assembly.assemble(memory_config(text, **CLOSED[name]))
  state, line = retrofit.begin_from(a, a.init(), folder)
  assert 'begin as in' in line
  old = assembly.load_for_inference(folder)
  before, after = nnx.merge(old.graphdef, old.params), nnx.merge(a.graphdef, state.params)
  tokens = jax.random.randint(jax.random.key(0), (2, 48), 0, 256)
  logits = lambda model, tokens: model.logits(model(tokens, None)[0])
  expected = jax.jit(functools.partial(logits, before))(tokens[:, :16])
  whole = jax.jit(functools.partial(logits, after))(tokens)
  np.testing.assert_allclose(whole[:, :16], expected, atol=1e-5)
  if 'short_term' not in CLOSED[name]:   # what is shut out has no part in the second segment either
    second = jax.jit(functools.partial(logits, before))(tokens[:, 16:32])
    np.testing.assert_allclose(whole[:, 16:32], second, atol=1e-5)
  # And it can open: the gate's gradient is not that of a saturated sigmoid.
  if name in ('infini', 'memorizing'):
    def loss(params):
      model = nnx.merge(a.graphdef, params)
      return jnp.square(logits(model, tokens)[:, 16:]).mean()
    grads = jax.jit(jax.grad(loss))(state.params)
    assert np.abs(grads['blocks'][1]['gate'].get_value()).max() > 1e-7


def test_every_memory_says_truly_whether_it_can_begin_so():
  assert {name for name, kind in MEMORIES.items() if kind.identity} >= {'none', 'infini', 'memorizing', 'armt'}
  assert not MEMORIES['rmt'].identity   # its tokens are seen from the first step on


def test_a_run_begins_from_another_and_carries_on_as_itself(plain, tmp_path, capsys):
  folder, text = plain
  config = memory_config(text, **CLOSED['infini'])
  config.run.init_from = folder
  config.optimizer.gate_rate = 30.0
  assert train.run(config, str(tmp_path / 'w')) == 0
  assert f'parameters begin as in {folder}, 2 (4 numbers) anew' in capsys.readouterr().out
  config.run.num_steps = 3
  train.run(config, str(tmp_path / 'w'), allow_config_change='run.num_steps')
  assert 'begin as in' not in capsys.readouterr().out   # its own checkpoint is carried on


@pytest.mark.parametrize('changes,message', [
    (dict(embed_dim=32, head_dim=8), r'has shape \(16, 2, 2, 8\), and this model.s \(32, 2, 2, 8\)'),
    (dict(), 'missing: no such|no checkpoint|config.json'),
])
def test_what_does_not_fit_is_named(plain, changes, message, tmp_path):
  folder, text = plain
  a = assembly.assemble(memory_config(text, **changes))
  with pytest.raises(ConfigError, match=message):
    retrofit.begin_from(a, a.init(), folder if changes else str(tmp_path / 'missing'))
