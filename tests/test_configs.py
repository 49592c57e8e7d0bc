"""Every shipped config: each leaf can be overridden, it builds, it is told how to run, it runs."""

import importlib.util
import json
import math
import pathlib
import random
import re
import shlex

import jax
import ml_collections
import pytest
from jax.experimental.compilation_cache import compilation_cache

from longctx import assembly, command_line, configuration, main
from longctx.errors import ConfigError
from longctx.parallel import aot
from longctx.training.workdir import leaves

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted(path.stem for path in (ROOT / 'configs').glob('[!_]*.py'))

# Parameters of each config, counted by hand from its shapes: a change of a model is seen here.
PARAMETERS = {
    'bert': 820_608,
    'bert:debug': 20_640,
    'books': 2_485_248,
    'books:debug': 63_296,
    'books_memory': 2_706_084,
    'books_memory:debug': 67_876,
    'griffin': 2_530_176,
    'griffin:debug': 94_368,
    'lstm': 1_018_240,
    'lstm:debug': 33_088,
    'lstm_ptb_medium': 19_765_200,
    'lstm_ptb_medium:debug': 33_088,
    'lstm_ptb_small': 11_354_112,
    'lstm_ptb_small:debug': 33_088,
    'passkey': 246_336,
    'passkey:debug': 13_152,
    'passkey:memory': 1_091_136,
    'question_answering': 246_336,
    'question_answering:debug': 13_152,
    'quickstart': 824_576,
    'quickstart:debug': 20_864,
    'ring_1m_v5e': 8_030_261_248,
    'ring_1m_v5e:debug': 35_040,
    'ring_1m_v5p': 8_030_261_248,
    'ring_1m_v5p:debug': 35_040,
    'ring_32k': 759_040,
    'ring_32k:debug': 31_424,
    'sentiment': 114_240,
    'sentiment:debug': 20_960,
    'summarise': 541_920,
    'summarise:debug': 37_632,
    'tinyshakespeare': 824_576,
    'tinyshakespeare:debug': 20_864,
    'translate': 541_920,
    'translate:debug': 37_632,
}
CONFIGS = sorted(PARAMETERS)
OTHER_VARIANTS = ('passkey:memory',)


def flag(name: str) -> str:
  """--config=FILE[:VARIANT] of 'quickstart:debug'."""
  stem, colon, variant = name.partition(':')
  return f'--config={ROOT}/configs/{stem}.py{colon}{variant}'


def parse(*args: str) -> ml_collections.ConfigDict:
  """The config of a command line, by the parser that longctx.main has."""
  return command_line.parse_with_config(main.define_flags, ['main', *args])[1]


def docstring(stem: str) -> str:
  path = ROOT / 'configs' / f'{stem}.py'
  spec = importlib.util.spec_from_file_location(stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.__doc__


DEFAULTS = {name: leaves(parse(flag(name)).to_dict()) for name in CONFIGS}
# Each leaf by itself of the first config that has it: a leaf is parsed alike wherever it stands.
FIRST = {leaf: name for name in reversed(CONFIGS) for leaf in DEFAULTS[name]}


def another(value):
  """(a literal as a user would write it, the value it stands for); never `value` itself."""
  if isinstance(value, bool):
    return str(not value).lower(), not value
  if isinstance(value, int):
    return str(value + 3), value + 3
  if isinstance(value, float):
    return repr(value / 2 + 0.125), value / 2 + 0.125
  if isinstance(value, str):
    return f'{value}/other, *.txt=1', f'{value}/other, *.txt=1'
  assert isinstance(value, tuple), value
  new = (64, 0, 64) if value and isinstance(value[0], int) else ('a', 'b c', 'd')
  return repr(new), new


def test_every_config_file_is_in_the_table():
  assert sorted([*FILES, *(f'{stem}:debug' for stem in FILES), *OTHER_VARIANTS]) == CONFIGS


@pytest.mark.parametrize('leaf', sorted(FIRST))
def test_every_leaf_can_be_overridden(leaf):
  name = FIRST[leaf]
  before = DEFAULTS[name]
  assert type(before[leaf]) in (bool, int, float, str, tuple)   # no None, no list
  literal, value = another(before[leaf])
  after = leaves(parse(flag(name), f'--config.{leaf}={literal}').to_dict())
  assert after == before | {leaf: value}
  assert after[leaf] != before[leaf]
  assert type(after[leaf]) is type(before[leaf])


@pytest.mark.parametrize('name', CONFIGS)
def test_all_leaves_of_a_config_can_be_overridden_at_once(name):
  new = {leaf: another(value) for leaf, value in DEFAULTS[name].items()}
  given = parse(flag(name), *(f'--config.{leaf}={literal}' for leaf, (literal, _) in new.items()))
  assert leaves(given.to_dict()) == {leaf: value for leaf, (_, value) in new.items()}


def test_variants_of_the_passkey_have_workdirs_of_their_own():
  """A workdir is refused to another config than the one that began it."""
  parts = re.split(r'^(\w+):', docstring('passkey'), flags=re.MULTILINE)
  of = {name: set(re.findall(r'--workdir=(\S+)', text)) for name, text in zip(parts[1::2], parts[2::2])}
  assert of['Command'] == of['Then'] and len(set.union(of['Command'], of['Memory'], of['Debug'])) == 3


def test_overrides_in_every_form_a_user_writes():
  given = parse(flag('books'), '--config.model.window=(7,0,7)', '--config.seed', '5', '--noconfig.'
                'model.tied', '--config.model.qk_norm', '-config.optimizer.learning_rate=1',
                '--config.perplexity.modes=full', '--config.run.num_steps=3',
                '--config.run.num_steps=4', '--workdir=w')
  assert (given.model.window, given.seed, given.model.tied, given.model.qk_norm) == (
      (7, 0, 7), 5, False, True)
  assert (given.optimizer.learning_rate, given.perplexity.modes, given.run.num_steps) == (
      1.0, ('full',), 4)
  assert parse(flag('books'), '--config.model.window=[7,0,7]').model.window == (7, 0, 7)
  assert parse(*flag('books:debug').split('=')).model.embed_dim == 48
  assert parse(flag('lstm'), flag('books:debug')).model.embed_dim == 48   # the last one counts


def test_overrides_may_stand_in_a_flagfile(tmp_path):
  (tmp_path / 'flags').write_text(f'{flag("lstm")}\n# a comment\n--config.seed=9\n')
  assert parse(f'--flagfile={tmp_path}/flags').seed == 9


def test_configs_share_nothing():
  """A run's overrides are not seen by the next call of the parser, nor by the defaults."""
  parse(flag('books'), '--config.seed=9', '--config.model.window=(1,)')
  assert parse(flag('books')).seed == 0
  assert configuration.base().model.window == (0,)


@pytest.mark.parametrize('name', CONFIGS)
def test_every_config_builds_with_its_number_of_parameters(name):
  """Nothing is allocated and no corpus is looked for."""
  config = parse(flag(name))
  devices = [aot.StandIn(i, 'cpu', 'cpu') for i in range(config.mesh.seq * config.mesh.model)]
  a = assembly.assemble(config, devices)
  count = sum(math.prod(x.shape) for x in jax.tree.leaves(a.abstract.params))
  assert count == a.model_config.num_parameters() == PARAMETERS[name]
  assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(a.abstract))


@pytest.mark.parametrize('stem', FILES)
def test_a_variant_that_is_not_there_is_refused(stem):
  for variant in ('debgu', 'Debug', ' '):
    with pytest.raises(ConfigError, match=r'variant .* must be one of'):
      parse(flag(f'{stem}:{variant}'))
  assert parse(flag(f'{stem}:')) == parse(flag(stem))


@pytest.mark.parametrize('stem', FILES)
def test_every_file_tells_how_to_run_it(stem):
  lines = [line.strip() for line in docstring(stem).splitlines()]
  for label, name in (('Command:', stem), ('Debug:', f'{stem}:debug')):
    commands = [line.removeprefix(label) for line in lines if line.startswith(label)]
    assert len(commands) == 1, label
    words = [word for word in shlex.split(commands[0]) if not word.startswith('JAX_NUM_CPU_')]
    python, dash_m, module, *args = words
    assert (python, dash_m, module) == ('python', '-m', 'longctx.main')
    table, config = command_line.parse_with_config(main.define_flags, ['main', *args])
    main.check_flags(table)
    assert config == parse(flag(name))
  assert len((ROOT / 'configs' / f'{stem}.py').read_text().splitlines()) <= 60


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
  monkeypatch.chdir(ROOT)   # commands in docstrings are written for the root


@pytest.fixture
def no_compilation_cache():
  yield
  jax.config.update('jax_compilation_cache_dir', None)
  compilation_cache.reset_cache()


# Of configs that differ in size alone one stands for the others.
ALIKE = ('bert', 'books', 'griffin', 'lstm_ptb_medium', 'lstm_ptb_small', 'question_answering',
         'ring_32k', 'ring_1m_v5e', 'ring_1m_v5p', 'sentiment', 'summarise', 'tinyshakespeare')
# These make their examples; of all but passkeys and questions they say how many are right, a number without a figure.
EXAMPLES = ('passkey', 'question_answering', 'sentiment', 'summarise', 'translate')


@pytest.mark.parametrize('stem', [
    pytest.param(stem, marks=pytest.mark.slow) if stem in ALIKE else stem for stem in FILES])
def test_the_debug_variant_runs_from_end_to_end(stem, tmp_path, no_compilation_cache):
  """On a small corpus in place of its own; the learning is the config's."""
  for i in range(12):
    (tmp_path / f'{i}.txt').write_text(f'the quick brown fox {i} jumps over the lazy dog\n' * 60)
  args = ['--config.data.corpus=files', f'--config.data.files={tmp_path}/*.txt',
          '--config.data.split=contiguous', '--config.data.validation_fraction=0.1',
          f'--config.data.cache_dir={tmp_path}/cache',
          f'--config.run.compilation_cache={tmp_path}/programs']
  config = parse(flag(f'{stem}:debug'))
  if stem in EXAMPLES:
    args = args[-1:]
  if config.mesh.seq == 1:
    args.append('--config.mesh.layout=single')   # however many devices the tests have
  folder = tmp_path / 'w'
  assert main.main(['main', flag(f'{stem}:debug'), f'--workdir={folder}', *args]) == 0
  rows = [json.loads(row) for row in (folder / 'metrics.jsonl').read_text().splitlines()]
  losses = [row['loss'] for row in rows if 'loss' in row]
  assert rows[-1]['step'] == config.run.num_steps
  # Of two classes 20 steps teach nothing yet: its loss stays about that of a coin.
  assert losses[-1] < losses[0] or (stem == 'sentiment' and abs(losses[-1] - math.log(2)) < 0.1)
  assert losses[-1] < math.log(257)   # better than no idea
  found = json.loads((folder / 'evaluation.json').read_text())
  assert found['step'] == config.run.num_steps
  assert 0 < found['bits_per_byte'] < 8
  scored = ('right_rows' if config.data.form in ('pairs', 'labels', 'masked') else
            'tokens_per_second')   # of one example a row, and of tokens by their position
  assert scored in found
  assert scored == 'right_rows' or (
      folder / 'figures' / 'loss_by_position.png').stat().st_size > 1000
  assert (folder / 'checkpoints' / str(config.run.num_steps) / 'manifest.json').exists()


@pytest.mark.parametrize('decides, right', [(True, (0.95, 1.0)), (False, (0.3, 0.7))], ids=['by the text', 'by a coin'])
def test_a_classifier_learns_what_decides_the_class_and_nothing_else(decides, right, tmp_path, no_compilation_cache):
  """Texts whose last word says their class; or says nothing, of which nobody can be right."""
  rng = random.Random(0)
  for i in range(400):
    word = rng.choice(('gloomy', 'bright'))
    kind = dict(gloomy='bad', bright='good')[word] if decides else rng.choice(('bad', 'good'))
    (folder := tmp_path / 'texts' / ('test' if i < 50 else 'train') / kind).mkdir(parents=True, exist_ok=True)
    (folder / f'{i}.txt').write_text(f'{rng.randrange(10 ** 6)}: it was {word}')
  assert main.main(['main', flag('sentiment:debug'), f'--workdir={tmp_path}/w', '--config.data.corpus=files',
                    f'--config.data.files={tmp_path}/texts', '--config.data.generator=', '--config.data.validation_fraction=0.3',
                    f'--config.data.cache_dir={tmp_path}/cache', f'--config.run.compilation_cache={tmp_path}/programs',
                    '--config.data.length=40', '--config.model.max_length=40', '--config.perplexity.segment=40',
                    '--config.data.batch_size=32', '--config.run.num_steps=150', '--config.run.log_every=50',
                    '--config.optimizer.learning_rate=0.005', '--config.perplexity.max_tokens=1000']) == 0
  found = json.loads((tmp_path / 'w' / 'evaluation.json').read_text())
  assert right[0] <= found['right_rows'] <= right[1]
