"""A memory added to a trained model: it begins as that model, and what is missing or misfit is named."""

import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import assembly, retrofit, train
from longctx.configuration import base
from longctx.errors import ConfigError
from longctx.models import decoder, memory_decoder
from longctx.models import memory_config as memory
from longctx.models.memories import MEMORIES
from tests.compilation import quick_compilation  # noqa: F401
from tests.programs import tiny

pytestmark = pytest.mark.usefixtures('quick_compilation')


WINDOW = 16   # of the plain model: its rows are no longer


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
  """A workdir of a plain decoder of two stacked layers with a window, trained for two steps; and its text."""
  folder = tmp_path_factory.mktemp('plain')
  text = {'files': tiny.write_corpus(folder / 'text'), 'cache_dir': str(folder / 'cache')}
  config = tiny.get_config()
  config.data.update(text)
  config.model.update(dict(num_layers=2, layer_loop='scan', qk_norm=True, window=(WINDOW,)))
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
    # Its 'fixed' gate would keep half of a state a segment.
    'block_recurrent': dict(long_term='block_recurrent', gate='tanh', memory_variant='lstm', memory_tokens=2),
    'ttt': dict(long_term='ttt', gate='tanh', short_term=8),
    'memory_caching': dict(long_term='memory_caching', gate='tanh', memory_size=64, short_term=8),
    'titans': dict(long_term='titans', gate='tanh', memory_variant='memory', short_term=8),
}
ADDED = [name for name in CLOSED if name in ('block_recurrent', 'ttt', 'memory_caching', 'titans')]


def begun(plain, **model):
  """(logits of parameters and tokens, the parameters that are begun with, logits of the plain model)."""
  folder, text = plain
  a = assembly.assemble(memory_config(text, **model))
  state, line = retrofit.begin_from(a, a.init(), folder)
  assert 'begin as in' in line
  assert 'does not begin' not in line
  def logits(graphdef, params, tokens):
    model = nnx.merge(graphdef, params)
    return model.logits(model(tokens, None)[0])
  old = assembly.load_for_inference(folder)
  before = jax.jit(functools.partial(logits, old.graphdef, old.params))
  return functools.partial(logits, a.graphdef), state.params, before


TOKENS = jax.random.randint(jax.random.key(0), (2, 3 * WINDOW), 0, 256)


@pytest.mark.parametrize('name', [
    name if name == 'infini' else pytest.param(name, marks=pytest.mark.slow)
    for name, settings in CLOSED.items() if 'short_term' not in settings])
def test_a_memory_begins_as_the_model_it_is_added_to(name, plain):
  """Without a window each segment is read as if it were a text; the memory is filled, but shut."""
  after, params, before = begun(plain, **CLOSED[name])
  whole = jax.jit(after)(params, TOKENS)
  for start in range(0, 3 * WINDOW, WINDOW):
    np.testing.assert_allclose(whole[:, start:start + WINDOW], before(TOKENS[:, start:start + WINDOW]), atol=1e-5)
  if 'gate' in CLOSED[name]:
    can_open(after, params)


def can_open(after, params):
  """The gate's gradient is not 0, as a saturated sigmoid's, or that of what says nothing, would be."""
  loss = lambda params: jnp.square(after(params, TOKENS)[:, WINDOW:]).mean()
  grads = jax.jit(jax.grad(loss))(params)
  assert np.abs(grads['blocks'][1]['gate'].get_value()).max() > 1e-7


def opened(params):
  """The same with all that is shut a little open."""
  def change(path, x):
    shut = path[-1] in ('gate', 'w_value') and not np.asarray(x.get_value()).any()
    return x.replace(x.get_value() + 0.3) if shut else x
  return nnx.from_flat_state([(path, change(path, x)) for path, x in nnx.to_flat_state(params)])


@pytest.mark.parametrize('name, segment', [
    (name, segment) if (name, segment) in (('two stores', 1), ('transformer_xl', 4), ('ttt', 4)) else
    pytest.param(name, segment, marks=pytest.mark.slow) for name in CLOSED for segment in (1, 4)])
def test_it_begins_as_the_windowed_model_it_is_added_to_over_many_segments(name, segment, plain):
  """Token i of a segment sees short_term + i before it: with segments of one token all see a window, however
  long the text is; with longer ones those that both models let see all that was read, and no others."""
  after, params, before = begun(
      plain, **CLOSED[name] | dict(segment=segment, short_term=WINDOW - segment))
  after, expected = jax.jit(after), before(TOKENS)
  found = after(params, TOKENS)
  if segment == 1:
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # The first token lies beyond what two layers of such a window reach: a memory knows it, where one is opened.
    far, other = slice(2 * WINDOW - 1, None), TOKENS.at[:, 0].set((TOKENS[:, 0] + 1) % 256)
    moved = lambda params: np.any(after(params, other) != after(params, TOKENS), axis=-1)[:, far]
    assert not moved(params).any()
    assert name == 'transformer_xl' or moved(opened(params)).all()
  else:
    np.testing.assert_allclose(found[:, :WINDOW], expected[:, :WINDOW], atol=1e-5)
    assert (np.abs(found - expected).max((0, 2)) > 1e-4)[WINDOW:].all()
    if 'gate' in CLOSED[name]:
      can_open(after, params)


def says_that_it_begins_so(name, **settings):
  return MEMORIES[name].identity(memory.Config(long_term=name, segment=6, **settings).settings())


def test_every_memory_says_whether_it_begins_so_and_those_that_do_are_held_to_it():
  for config in CLOSED.values():
    assert says_that_it_begins_so(**{'name': 'none'} | {
        {'long_term': 'name'}.get(field, field): value for field, value in config.items()})
  never = set(MEMORIES) - {config.get('long_term', 'none') for config in CLOSED.values()}
  assert never == {'compressive', 'rmt'}


HEARD = sorted(set(MEMORIES) - {'none', 'armt'})


@pytest.mark.parametrize('name', HEARD)
def test_a_memory_that_is_heard_at_first_is_named(name):
  """Of the default gate, which is half open, or none."""
  settings = dict(short_term=6) if name == 'compressive' else {}
  assert not says_that_it_begins_so(name, **settings)
  config = memory.Config(long_term=name, segment=6, **settings)
  assert retrofit.heard_at_first(config, ['blocks/0/new']) == name
  assert retrofit.heard_at_first(config, []) == ''   # that run had it too


@pytest.mark.parametrize('name', ADDED)
def test_what_is_added_to_attention_has_a_gate_only_where_it_is_asked_for(name):
  """Of one number a layer that has the memory, which the count knows; what else there is stays."""
  def parameters(gate):
    config = memory.Config(**CLOSED[name] | dict(
        gate=gate, vocab_size=9, num_layers=3, embed_dim=16, num_heads=2, segment=8, memory_layers=(0, 2)))
    params = nnx.state(nnx.eval_shape(lambda: memory_decoder.MemoryDecoder(config, rngs=nnx.Rngs(0))))
    found = {'/'.join(map(str, path)): leaf.get_value().shape for path, leaf in nnx.to_flat_state(params)}
    assert sum(map(math.prod, found.values())) == config.resolved(9).num_parameters()
    return found

  gates = {f'blocks/{i}/gate': (1,) for i in (0, 2)}
  assert parameters('tanh') == parameters('sigmoid') | gates


@pytest.mark.parametrize('settings, message', [
    (dict(long_term='rmt'), "model.gate='tanh': is not read with model.long_term='rmt', but with infini, memorizing, "
     "block_recurrent, memory_caching, titans, ttt; set model.gate='sigmoid'"),
    (dict(long_term='ttt'), "model.gate='tanh': is not read by model.long_term='ttt', which stands in the place of "
     "attention without model.short_term, so that nothing would be left; set model.short_term, or 'sigmoid'"),
    (dict(long_term='memory_caching'), "model.gate='tanh': is not read by model.long_term='memory_caching'"),
    (dict(long_term='titans', memory_variant='memory'), "is not read by model.memory_variant='memory'"),
    (dict(long_term='titans', short_term=8), "model.gate='tanh': is read with model.memory_variant='memory' alone, "
     "not 'mag', where attention is scaled"),
])
def test_a_gate_with_nothing_to_shut_is_refused(settings, message):
  with pytest.raises(ConfigError, match=re.escape(message)):
    memory.Config(segment=8, gate='tanh', **settings)


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
    # More is kept and looked up than in training (arXiv:2203.08913, section 4.3).
    (memory.Config(**PLAIN, long_term='memorizing', memory_size=64, memory_top=4),
     memory.Config(**PLAIN, long_term='memorizing', memory_size=512, memory_top=8), ''),
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


LENGTH, SEGMENT, SIGNS = 16, 4, 16


def documents():
  """A letter, a sign many times, a mark and the letter again, bytes: of 8 letters, each with all signs."""
  letter = np.repeat(list(b'abcdefgh'), SIGNS)[:, None]
  sign = np.tile(ord('A') + np.arange(SIGNS), 8)[:, None]
  mark = np.full_like(letter, ord('#'))
  return np.concatenate([letter, np.repeat(sign, LENGTH - 4, axis=1), mark, letter], axis=1)


def of_letters(config, files, folder):
  config.data.update(dict(corpus='files', files=files, cache_dir=str(folder / 'cache'), length=LENGTH,
                          batch_size=32, validation_fraction=0.05))
  config.model.update(dict(num_layers=2, embed_dim=64, num_heads=2, qk_norm=True, attention='reference', init_std=0.1))
  config.optimizer.update(dict(learning_rate=3e-3, warmup_steps=10))
  config.run.update(dict(log_every=25, compilation_cache='none'))
  config.perplexity.update(dict(modes=('full',), max_tokens=64, segment=LENGTH))
  return config


@pytest.fixture(scope='module')
def without_a_memory(tmp_path_factory):
  """(workdir of a plain decoder with a window of a segment that has read these documents, the glob, the folder)."""
  folder = tmp_path_factory.mktemp('letters')
  (folder / 'text').mkdir()
  for i, row in enumerate(documents()):
    (folder / 'text' / f'{i}.txt').write_bytes(bytes(row.tolist()))
  config = of_letters(base('decoder'), f'{folder}/text/*.txt', folder)
  config.model.update(dict(window=(SEGMENT,), max_length=LENGTH))
  config.run.num_steps = 60
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(assembly, 'assemble', functools.partial(assembly.assemble, devices=jax.devices()[:1]))
    train.run(config, str(folder / 'plain'))
  return folder, config.data.files


@pytest.mark.slow
@pytest.mark.parametrize('name', [name for name in CLOSED if 'gate' in CLOSED[name]])
def test_a_memory_that_was_added_is_what_knows(name, without_a_memory, tmp_path):
  """Its gate opens at a rate of its own; what is out of the window is then answered from the memory alone."""
  folder, files = without_a_memory
  config = of_letters(base('memory'), files, folder)
  config.data.update(dict(form='segments', align=True))
  config.model.update(dict(segment=SEGMENT) | CLOSED[name])
  if name == 'memory_caching':
    config.model.memory_size = LENGTH // SEGMENT   # states, each of a segment
  config.optimizer.gate_rate = 30.0
  config.run.update(dict(init_from=str(folder / 'plain'), num_steps=300))
  train.run(config, str(tmp_path / 'w'))
  read = documents()
  tokens, answer = np.pad(read[:, :-1], ((0, 0), (1, 0)), constant_values=256), read[:, -1]
  asked = len(read[0]) // SEGMENT * SEGMENT   # the last segment's first token

  def nats(loaded, change=None):
    """Of the answer; what is in the long-term memories may be changed before the question is read."""
    run = jax.jit(lambda tokens, state: nnx.merge(loaded.graphdef, loaded.params)(tokens, state))
    model = nnx.merge(loaded.graphdef, loaded.params)
    _, state = run(tokens[:, :asked], model.init_state(len(read), LENGTH))
    if change is not None:
      layers = tuple(m._replace(store=jax.tree.map(change, m.store)) for m in state.memory.layers)
      state = state._replace(memory=state.memory._replace(layers=layers))
    logits = model.logits(run(tokens[:, asked:], state)[0])[:, -1]
    return -np.asarray(jax.nn.log_softmax(logits))[np.arange(len(read)), answer].mean()

  guess, loaded = np.log(8), assembly.load_for_inference(str(tmp_path / 'w'))
  assert nats(assembly.load_for_inference(str(folder / 'plain'))) > 0.9 * guess
  assert nats(loaded) < 0.3 * guess
  assert nats(loaded, jnp.zeros_like) > 0.9 * guess
  assert nats(loaded, lambda x: jnp.roll(x, SIGNS, axis=0)) > 0.9 * guess   # of a text with another letter
  gates = [block.gate.get_value() for block in nnx.merge(loaded.graphdef, loaded.params).blocks
           if block.gate is not None]
  opened = [np.abs(np.tanh(gate)).max() > 0.2 for gate in gates]   # 0 before
  assert any(opened) if name in ADDED else opened and all(opened)   # of what is added one layer may be enough


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
