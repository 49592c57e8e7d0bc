"""A memory added to a trained model: it begins as that model, and what is missing or misfit is named."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import assembly, retrofit, train
from longctx.configuration import base
from longctx.errors import ConfigError
from longctx.models import decoder
from longctx.models import memory_config as memory
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
    'two stores': dict(long_term='infini', gate='tanh', memory_variant='linear', short_term=8),
}


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=pytest.mark.slow) if name in ('memorizing', 'armt') else name
    for name in CLOSED])
def test_a_memory_begins_as_the_model_it_is_added_to(name, plain):
  """Equal logits within a segment; and for a memory that is filled but shut, beyond it too."""
  folder, text = plain
  a = assembly.assemble(memory_config(text, **CLOSED[name]))
  state, line = retrofit.begin_from(a, a.init(), folder)
  assert 'begin as in' in line
  assert 'does not begin' not in line
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


def test_every_memory_says_whether_it_can_begin_so_and_those_that_can_are_held_to_it():
  promised = {name for name, kind in MEMORIES.items() if kind.identity}
  assert promised == {config.get('long_term', 'none') for config in CLOSED.values()}


HEARD = sorted(name for name, kind in MEMORIES.items() if not kind.identity)


@pytest.mark.parametrize('name', HEARD)
def test_a_memory_that_is_heard_at_first_is_named(name):
  settings = dict(short_term=6) if name == 'compressive' else {}
  config = memory.Config(long_term=name, segment=6, **settings)
  assert retrofit.heard_at_first(config, ['blocks/0/new']) == name
  assert retrofit.heard_at_first(config, []) == ''   # that run had it too


def test_a_run_that_begins_with_such_a_memory_says_so(plain):
  folder, text = plain
  a = assembly.assemble(memory_config(text, long_term='rmt', memory_tokens=2))
  _, line = retrofit.begin_from(a, a.init(), folder)
  assert line.endswith("(32 numbers) anew; the new model does not begin as that one: "
                       "model.long_term='rmt' is heard from the first token on")


@pytest.mark.parametrize('long_term', ['infini', 'memorizing'])
def test_a_new_gate_that_is_half_open_is_refused(plain, long_term):
  folder, text = plain
  a = assembly.assemble(memory_config(text, long_term=long_term))
  with pytest.raises(ConfigError, match=r"model.gate='sigmoid': a new gate of it is half open at "
                     r"first, and halves what attention says; set model.gate='tanh', which begins"):
    retrofit.begin_from(a, a.init(), folder)
  trained = memory.Config(long_term=long_term)
  assert retrofit.heard_at_first(trained, ['head/table']) == ''   # the gate was learned in that run


PLAIN = dict(num_layers=2, embed_dim=16, num_heads=2)
OTHERS = [
    (decoder.Config(**PLAIN, rope_base=500.0), memory.Config(**PLAIN),
     'model.rope_base is 500.0 there and 10000.0 here'),
    (decoder.Config(**PLAIN, norm_epsilon=1e-5), memory.Config(**PLAIN),
     'model.norm_epsilon is 1e-05 there and 1e-06 here'),
    (decoder.Config(**PLAIN, position='none'), memory.Config(**PLAIN),
     "model.position is 'none' there and 'rope' here"),
    (decoder.Config(**PLAIN), memory.Config(**PLAIN, position='relative'),
     "model.position is 'rope' there and 'relative' here"),
    (decoder.Config(**PLAIN), memory.Config(**PLAIN, qk_norm=True), 'model.qk_norm is False there'),
    (decoder.Config(**PLAIN), memory.Config(**PLAIN | dict(num_layers=3)), 'model.num_layers is 2'),
    (decoder.Config(**PLAIN, window=(0, 9)), memory.Config(**PLAIN, segment=10),
     'model.window is (0, 9) there, and here each token sees all of its model.segment=10'),
    (decoder.Config(**PLAIN, window=(9,)), decoder.Config(**PLAIN), 'model.window is (9,) there'),
    (memory.Config(**PLAIN, long_term='infini'),
     memory.Config(**PLAIN, long_term='infini', gate='tanh'),
     "model.gate is 'sigmoid' there and 'tanh' here"),
    (decoder.Config(**PLAIN, window=(10,), dtype='bfloat16', dropout=0.1, max_length=9),
     memory.Config(**PLAIN, segment=10, short_term=5, long_term='infini', gate='tanh'), ''),
    (memory.Config(**PLAIN),
     memory.Config(**PLAIN, long_term='infini', gate='tanh', segment=9), ''),
]


@pytest.mark.parametrize('old, new, said', OTHERS, ids=[said or 'nothing' for _, _, said in OTHERS])
def test_settings_that_give_the_parameters_another_meaning_are_named(old, new, said):
  found = retrofit.differences(old.resolved(99), new.resolved(99))
  assert len(found) == bool(said)
  assert said in ''.join(found)


@pytest.mark.slow
def test_a_run_begins_from_another_and_carries_on_as_itself(plain, tmp_path, capsys):
  folder, text = plain
  config = memory_config(text, **CLOSED['infini'])
  config.run.init_from = folder
  config.optimizer.gate_rate = 30.0
  assert train.run(config, str(tmp_path / 'w')) == 0
  assert f'parameters begin as in {folder}, 2 (4 numbers) anew' in capsys.readouterr().out
  after_two = assembly.load_for_inference(str(tmp_path / 'w')).params
  config.run.num_steps = 3
  train.run(config, str(tmp_path / 'w'), allow_config_change='run.num_steps')
  assert 'begin as in' not in capsys.readouterr().out   # its own checkpoint is carried on
  # What its gates are is told at each logged step, as the loss met them.
  text = (tmp_path / 'w' / 'metrics.jsonl').read_text()
  first, _, third = [line for line in map(json.loads, text.splitlines()) if 'loss' in line]
  for i in range(2):
    gate_N = np.abs(np.tanh(after_two['blocks'][i]['gate'].get_value()))
    assert gate_N.max() > gate_N.mean() > 0
    assert third[f'gate_mean_{i}'] == pytest.approx(gate_N.mean())
    assert third[f'gate_max_{i}'] == pytest.approx(gate_N.max())
    assert first[f'gate_max_{i}'] == 0   # shut


@pytest.mark.parametrize('changes,message', [
    (dict(rope_base=500.0, norm_epsilon=1e-5), r'mean something else here: model.rope_base is '
     r'10000.0 there and 500.0 here; model.norm_epsilon is 1e-06 there and 1e-05 here; set the'),
    (dict(vocab_size=300), r'embedding/table has shape \(257, 16\), and this model.s \(300, 16\)'),
    (dict(), 'missing: no such|no checkpoint|config.json'),
])
def test_what_does_not_fit_is_named(plain, changes, message, tmp_path):
  folder, text = plain
  a = assembly.assemble(memory_config(text, **changes))
  with pytest.raises(ConfigError, match=message):
    retrofit.begin_from(a, a.init(), folder if changes else str(tmp_path / 'missing'))


@pytest.mark.slow
def test_a_run_whose_documents_begin_rows_is_read_on_elsewhere(plain, tmp_path):
  """Training reads whole segments side by side; inference takes the same parameters to any text."""
  config = memory_config(plain[1], long_term='infini')
  config.data.update(dict(form='segments', align=True))
  config.perplexity.max_tokens = 64
  train.run(config, str(tmp_path / 'w'))
  loaded = assembly.load_for_inference(str(tmp_path / 'w'))
  model = nnx.merge(loaded.graphdef, loaded.params)
  hidden, _ = model(jnp.arange(5)[None], model.init_state(1))
  assert np.isfinite(np.asarray(hidden)).all()
