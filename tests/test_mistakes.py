"""What a user gets wrong in configs, flags, files and workdirs: one line each, and exit status 2.

Every row of the tables is a command line, the files it meets, and what its one line must say: the
field, the value, what is allowed, and the nearest right name where there is one. Most rows call
`main` in this process; a few start the real command.
"""

import io
import json
import os
import pathlib
import re
import subprocess
import sys
import threading

import jax
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

from longctx import assembly, chat, contexts, generate, main, train
from longctx.configuration import base
from longctx.errors import ConfigError
from longctx.parallel import device_memory
from longctx.training import step, workdir

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = f'--config={ROOT}/tests/programs/mistaken.py'
LSTM = f'--config={ROOT}/configs/lstm.py:debug'
WORKDIR = '--workdir={tmp}/w'
TEXT = ''.join(f'line {i} of a text that is long enough to be cut into parts\n' for i in range(60))

# A run of two steps on one device, in a second.
TINY = [
    CONFIG, '--config.data.corpus=files', '--config.data.split=contiguous',
    '--config.data.files={corpus}/*.txt', '--config.data.cache_dir={corpus}/cache',
    '--config.data.validation_fraction=0.2', '--config.data.length=16',
    '--config.model.max_length=32', '--config.model.embed_dim=8', '--config.model.num_heads=2',
    '--config.mesh.layout=single', '--config.optimizer.warmup_steps=0', '--config.run.num_steps=2',
    '--config.run.log_every=1', '--config.run.checkpoint_every=1',
    '--config.run.compilation_cache={corpus}/programs',
    '--config.perplexity.segment=16', '--config.perplexity.max_tokens=64']


@pytest.fixture(scope='session')
def corpus(tmp_path_factory):
  folder = tmp_path_factory.mktemp('corpus')
  for name in 'ab':
    (folder / f'{name}.txt').write_text(TEXT)
  return folder


@pytest.fixture(scope='module')
def trained(tmp_path_factory, corpus, programs):
  """The workdir of a run that has done two steps."""
  folder = tmp_path_factory.mktemp('trained')
  args = [arg.format(corpus=corpus) for arg in TINY]
  assert main.main(['main', *args, f'--workdir={folder}']) == 0
  return folder


@pytest.fixture(scope='module', autouse=True)
def programs(corpus):
  """The runs of this file share compiled programs, and those of other files know nothing of it."""
  names = ('jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs')
  before = {name: getattr(jax.config, name) for name in names}
  with pytest.MonkeyPatch.context() as patch:
    main.set_compilation_cache(f'{corpus}/programs')
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    compilation_cache.reset_cache()
    for face in (main, generate, chat):
      patch.setattr(face, 'set_compilation_cache', lambda folder: None)
    yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def the_line(err: str) -> str:
  """The only line of stderr, without its prefix."""
  assert err.startswith('longctx: ')
  assert err.endswith('\n')
  assert err.count('\n') == 1, err
  assert len(err) < 1500
  assert not re.search('Traceback|  File "|invalid literal|object at 0x', err)
  return err.removeprefix('longctx: ').rstrip('\n')


def check_mistake(face, args, expected, capfd):
  capfd.readouterr()
  assert face.main([face.__name__, *args]) == 2
  line = the_line(capfd.readouterr().err)
  for part in expected:
    assert part in line


# --- Flags.

FLAGS = [
    ([], '--config: missing; give a config file'),
    ([WORKDIR], '--config: missing'),
    (['--config.run.num_steps=3', WORKDIR], '--config: missing; give a config file before its'),
    (['--config', '--workdir=w'], '--config=--workdir=w: no such file'),
    ([WORKDIR, '--config'], '--config: has no value'),
    (['--config=', WORKDIR], '--config=: names no file'),
    ([CONFIG], '--workdir: missing; give a folder for the run, such as'),
    ([CONFIG, WORKDIR, '--mode=trian'],
     "--mode='trian': must be one of train, eval, describe, plan, compile (did you mean \"train\"?)"),
    ([CONFIG, WORKDIR, '--mode='], "--mode='': must be one of train, eval, describe, plan, compile"),
    ([CONFIG, '--wrkdir=w'], '--wrkdir: unknown flag (did you mean "workdir"?)'),
    (['--confg=configs/quickstart.py'], '--confg: unknown flag (did you mean "config"?)'),
    ([CONFIG, WORKDIR, '--model.num_layers=3'],
     '--model.num_layers: unknown flag (did you mean "config.model.num_layers"?)'),
    ([CONFIG, WORKDIR, '--prompt=a'], '--prompt: unknown flag'),
    ([CONFIG, WORKDIR, 'hello'], "'hello': not a flag; flags begin with --"),
    ([CONFIG, WORKDIR, '--config.seed', '1', '2'], "'2': not a flag"),
    ([CONFIG, WORKDIR, '--num_processes=two'], '--num_processes=two: must be a whole number'),
    ([CONFIG, WORKDIR, '--num_processes=-1'], '--num_processes=-1: must be at least 0'),
    ([CONFIG, WORKDIR, '--num_processes=2'], '--num_processes=2: does nothing alone; give '
     '--coordinator_address=host:port'),
    ([CONFIG, WORKDIR, '--process_id=0'], '--process_id=0: does nothing alone'),
    ([CONFIG, WORKDIR, '--coordinator_address=h:1', '--num_processes=2', '--process_id=2'],
     '--process_id=2: must be below --num_processes=2'),
    ([CONFIG, WORKDIR, '--coordinator_address=localhost'],
     '--coordinator_address=localhost: must be host:port, such as'),
    ([CONFIG, WORKDIR, '--distributed=maybe'], '--distributed=maybe: must be true or false'),
    ([CONFIG, WORKDIR, '--flagfile={tmp}/no'], '--flagfile: Unable to open flagfile: '),
    ([CONFIG, '--workdir'], '--workdir: has no value; write --workdir=VALUE'),
    ([CONFIG, WORKDIR, '--config.seed'], '--config.seed: has no value; write --config.seed=VALUE'),
]


@pytest.mark.parametrize('args, expected', FLAGS, ids=[m for _, m in FLAGS])
def test_a_mistake_in_the_flags(tmp_path, capfd, args, expected):
  args = [arg.format(tmp=tmp_path) for arg in args]
  check_mistake(main, args, [expected.format(tmp=tmp_path)], capfd)
  assert not list(tmp_path.iterdir())   # nothing was begun


# --- Config files.

BASE = 'from longctx.configuration import base, check_variant\ndef get_config(variant=""):\n'

FILES = [
    ('c.py:debgu', BASE + '  check_variant(variant)\n  return base()\n',
     ["c.py:debgu: variant 'debgu': must be one of '' (no colon), debug (did you mean", '"debug"?)']),
    ('d.py', 'x = 1', ['d.py: no such file (did you mean "', 'c.py"?)']),
    ('folder', None, ['folder: is a folder; give a config file in it, such as']),
    ('c.py', 'x = 1\ndef get_config(:\n  pass\n', ['c.py: line 2: not Python: ']),
    ('c.py', 'x = 1\n', ['c.py: has no function get_config; see configs/quickstart.py']),
    ('c.py', b'\x00\xff\xfe', ['c.py: ']),
    ('c.py', BASE + '  {}["lenght"]\n', ["c.py: line 3: KeyError: 'lenght'"]),
    ('c.py', 'import not_there_at_all\n',
     ["c.py: line 1: ModuleNotFoundError: No module named 'not_there_at_all'"]),
    ('c.py', BASE + '  import sys\n  sys.exit("bye")\n', ['c.py: line 4: SystemExit: bye']),
    ('c.py', BASE + '  open("/no/such/file")\n', ['c.py: line 3: FileNotFoundError: ']),
    ('c.py', BASE + '  raise ValueError("two\\nlines " + "x" * 9999)\n',
     ['c.py: line 3: ValueError: two lines xxx', 'xxx...']),
    ('c.py', BASE + '  return {"seed": 1}\n',
     ['c.py: get_config returned dict; must be the ConfigDict']),
    ('c.py', BASE + '  pass\n', ['c.py: get_config returned NoneType; must be the ConfigDict']),
    ('c.py:debug', 'from longctx.configuration import base\ndef get_config():\n  return base()\n',
     ["c.py:debug: variant 'debug': get_config of this file takes no variant"]),
    ('c.json', '{"seed": ', ['c.json: is no JSON (', 'give a config that a workdir keeps, or a Python file']),
    ('c.json', '[1]', ["c.json: holds a list; must hold an object of sections, as a workdir's config.json does"]),
    ('c.json:debug', '{}', ['c.json:debug: a JSON file has no variants; give the file without a colon']),
    ('c.py', BASE + '  return base("decodr")\n',
     ["model='decodr': must be one of decoder, memory, elman, lstm, gru, slstm, encoder, "
      'encoder_decoder (did you mean "decoder"?)']),
    ('c.py', BASE + '  c = base()\n  c.data.length = "64"\n', ['c.py: line 4: TypeError: ',
     'length']),
    ('c.py', BASE + '  c = base()\n  c.data.lenght = 64\n  return c\n',
     ['data.lenght: no such field; data has corpus, ', ' (did you mean "length"?)']),
    ('c.py', BASE + '  c = base()\n  c.modle = c.model\n  return c\n',
     ['modle: no such section; a config has seed, model, data', ' (did you mean "model"?)']),
    ('c.py', BASE + '  c = base()\n  del c.run\n  c.run = 3\n  return c\n',
     ['run=3: must be a section of fields']),
    ('c.py', BASE + '  c = base()\n  c.run.num_steps = True\n  return c\n',
     ['run.num_steps=True: must be of type int, not bool']),
    ('c.py', BASE + '  c = base()\n  del c.model.window\n  c.model.window = 256\n  return c\n',
     ['model.window=256: must be a tuple of int, such as (512, 0)']),
    ('c.py', BASE + '  c = base()\n  c.data.tfds_splits = (1, 2, 3)\n  return c\n',
     ['data.tfds_splits=(1, 2, 3): must hold str alone, not int']),
    ('c.py', BASE + '  c = base()\n  del c.data.files\n  c.data.files = None\n  return c\n',
     ['data.files=None: must be of type str, not NoneType']),
    ('c.py', BASE + '  c = base()\n  c.model.name = "gur"\n  return c\n',
     ["model.name='gur': must be one of decoder, memory, elman, lstm, gru, slstm, encoder, "
      'encoder_decoder (did you mean "gru"?)']),
    ('c.py', BASE + '  c = base("lstm")\n  c.model.num_heads = 4\n  return c\n',
     ['model.num_heads: no such field; model has name, vocab_size']),
]


@pytest.mark.parametrize('name, content, expected', FILES, ids=[str(e[0]) for _, _, e in FILES])
def test_a_mistake_in_a_config_file(tmp_path, capfd, name, content, expected):
  if content is None:
    (tmp_path / 'folder').mkdir()
  else:
    (tmp_path / ('c.json' if 'json' in name else 'c.py')).write_bytes(content if isinstance(content, bytes) else content.encode())
  args = [f'--config={tmp_path}/{name}', f'--workdir={tmp_path}/w']
  check_mistake(main, args, expected, capfd)
  assert not (tmp_path / 'w').exists()


def test_a_leaf_without_a_type_cannot_be_overridden(tmp_path, capfd):
  (tmp_path / 'c.py').write_text(BASE + '  c = base()\n  c.data.more = None\n  return c\n')
  args = [f'--config={tmp_path}/c.py', f'--workdir={tmp_path}/w', '--config.data.more=1']
  check_mistake(main, args, ['data.more=None: the config file gives this field the type NoneType',
                             'give it a number, true or false, a string or a tuple'], capfd)


# --- Overrides of fields: what can be known from the config alone.

FIELDS = [
    ('model.mixer_negative=True', "model.mixer_negative=True: is read by delta_net, gated_delta, kda "
     'only', 'set model.mixer_negative=False'),
    ('data.align=True', "data.align=True: is read with data.form='segments' only", 'set data.align=False'),
    ('model.layers=("rglru",) model.mixer_key_dim=8', 'model.mixer_key_dim=8: is read by',
     "model.layers=('rglru',)"),
    # Names.
    ('modle.num_layers=3', 'modle.num_layers: no such field (did you mean "model.num_layers"?); a '
     'config has data, eval, loss'),
    ('model.num_layer=3',
     'model.num_layer: no such field (did you mean "model.num_layers"?); model '
     'has attention, dropout, dtype'),
    ('data.num_layers=3', 'data.num_layers: no such field (did you mean "model.num_layers"?)'),
    ('sead=3', 'sead: no such field (did you mean "seed"?)'),
    ('learning_rate=3', '(did you mean "optimizer.learning_rate"?)'),
    ('model={}',
     'model: is a section; override its fields one by one, such as --config.model.attention='),
    # Types.
    ('run.num_steps=many', 'run.num_steps=many: must be a whole number'),
    ('run.num_steps=1e4', 'run.num_steps=1e4: must be a whole number'),
    ('run.num_steps=2.5', 'run.num_steps=2.5: must be a whole number'),
    ('run.num_steps=true', 'run.num_steps=true: must be a whole number'),
    ('run.num_steps=', 'run.num_steps=: must be a whole number'),
    ('optimizer.learning_rate=fast', 'optimizer.learning_rate=fast: must be a number'),
    ('model.tied=perhaps', 'model.tied=perhaps: must be true or false'),
    ('model.window=(1,', 'model.window=(1,: must be a tuple, such as'),
    ("model.window=('a',)", "model.window=('a',): must hold int alone, not str"),
    ('model.window=(1.5,)', 'model.window=(1.5,): must hold int alone, not float'),
    ('perplexity.modes=(1,)', 'perplexity.modes=(1,): must hold str alone, not int'),
    # Numbers that are none.
    ('optimizer.learning_rate=nan', 'optimizer.learning_rate=nan: must be a finite number'),
    ('optimizer.learning_rate=inf', 'optimizer.learning_rate=inf: must be a finite number'),
    ('model.rope_base=inf', 'model.rope_base=inf: must be a finite number'),
    ('data.test_fraction=nan', 'data.test_fraction=nan: must be a finite number'),
    # Ranges, section by section.
    ('seed=-1', 'seed=-1: must be a whole number from 0 to 2147483647'),
    ('seed=4294967296', 'seed=4294967296: must be a whole number from 0 to 2147483647'),
    ('model.num_layers=0', 'model.num_layers=0: must be at least 1'),
    ('model.embed_dim=-32', 'model.embed_dim=-32: must be at least 1'),
    ('model.num_heads=5', 'model.num_heads=5: must divide model.embed_dim=32'),
    ('model.num_kv_heads=3', 'model.num_kv_heads=3: must divide model.num_heads=4'),
    ('model.head_dim=7', 'model.head_dim=7: must be even for rope positions'),
    ('model.dropout=1', 'model.dropout=1.0: must be at least 0 and below 1'),
    ('model.window=(-1,)', 'model.window=(-1,): must be a tuple of at least one size >= 0'),
    ('model.window=(8,0)', 'model.window=(8, 0): its length must divide model.num_layers=1'),
    ('model.init_std=-0.1', 'model.init_std=-0.1: must be greater than 0'),
    ('model.vocab_size=100', 'model.vocab_size=100: the tokenizer has 257 symbols; give at least'),
    ('data.length=0', 'data.length=0: must be at least 1'),
    ('data.batch_size=-8', 'data.batch_size=-8: must be at least 1'),
    ('data.validation_fraction=-0.1', 'data.validation_fraction=-0.1: must be at least 0'),
    ('data.validation_fraction=0.99', 'data.validation_fraction + data.test_fraction = 1.04: must '
     'be below 1'),
    ('data.prefetch=-1', 'data.prefetch=-1: must be at least 0'),
    ('optimizer.learning_rate=-0.001', 'optimizer.learning_rate=-0.001: must be at least 0'),
    ('optimizer.beta1=1', 'optimizer.beta1=1.0: must be at least 0 and below 1'),
    ('optimizer.ema=1.5', 'optimizer.ema=1.5: must be at least 0 and below 1'),
    ('optimizer.final_fraction=2',
     'optimizer.final_fraction=2.0: must be at least 0 and at most 1'),
    ('optimizer.decay_factor=0', 'optimizer.decay_factor=0.0: must be above 0 and at most 1'),
    ('optimizer.warmup_steps=20', 'optimizer.warmup_steps=20: must be below the number of steps, '
     'run.num_steps=20'),
    ('loss.chunk=-1', 'loss.chunk=-1: must be at least 0'),
    ('loss.label_smoothing=1', 'loss.label_smoothing=1.0: must be below 1'),
    ('mesh.data=0', 'mesh.data=0: must be at least 1, or -1 for all remaining devices'),
    ('mesh.seq=0', 'mesh.seq=0: must be at least 1'),
    ('run.num_steps=0', 'run.num_steps=0: must be at least 1'),
    ('run.eval_every=-1', 'run.eval_every=-1: must be at least 0'),
    ('run.keep_last=0', 'run.keep_last=0: must be at least 1'),
    ('run.profile_start=20', 'run.profile_start=20: must be at least -1 and at most 19'),
    ('perplexity.batch_size=0', 'perplexity.batch_size=0: must be at least 1'),
    ('perplexity.modes=()', 'perplexity.modes=(): must be a tuple of one or more of full, sliding'),
    # Names of choices.
    ('optimizer.name=adam', "optimizer.name='adam': must be one of adamw, adafactor, lion, muon, "
     'sgd (did you mean "adamw"?)'),
    ('optimizer.schedule=cosin', 'must be one of constant, cosine, linear, wsd, staircase (did you mean '
     '"cosine"?)'),
    ('model.dtype=float23', "model.dtype='float23': must be one of ", '(did you mean "float32"?)'),
    ('model.remat=dot', "model.remat='dot': must be one of none, full, dots", '"dots"?)'),
    ('model.position=rop', "model.position='rop': must be one of rope, learned, none", '"rope"?)'),
    ('model.attention=blokwise', "model.attention='blokwise': must be one of auto, ",
     '"blockwise"?)'),
    ('mesh.layout=fsdpp', "mesh.layout='fsdpp': must be one of single, data, fsdp", '"fsdp"?)'),
    ('data.corpus=stdlb', "data.corpus='stdlb': must be one of stdlib, files, tfds", '"stdlib"?)'),
    ('data.form=pakced', "data.form='pakced': must be one of packed, segments", '"packed"?)'),
    ('data.long_documents=spilt', 'must be one of split, trim, drop', '(did you mean "split"?)'),
    ('perplexity.split=valid', "perplexity.split='valid': must be one of train, validation, test",
     '(did you mean "validation"?)'),
    ('perplexity.modes=slidng', "perplexity.modes='slidng': must be one of full, sliding"),
    # Fields that do not go together.
    ('data.corpus=files', "data.files='': data.corpus='files' needs it"),
    ('data.files=*.txt', "data.files='*.txt': is not read with data.corpus='stdlib'; set "
     "data.corpus='files'"),
    ('data.tfds_dir=/x', "data.tfds_dir='/x': is not read with data.corpus='stdlib'; set "
     "data.corpus='tfds'"),
    ("data.tfds_splits=('a','b','c')", "data.tfds_splits=('a', 'b', 'c'): is not read with "),
    ('data.text_feature=title', "data.text_feature='title': is not read with data.corpus='stdlib'"),
    ('data.tokenizer=byte', "data.tokenizer='byte': must be 'bytes' or the path of a SentencePiece "
     '.model file, and no such file is there (did you mean "bytes"?)'),
    ('data.form=segments', "data.form='segments': ", 'model.window=(0,) the state grows with it; '
     'give every layer a window'),
    ('data.form=segments model.window=(8,) model.position=learned', "data.form='segments': ",
     "model.position='learned' has none beyond model.max_length; set model.position='rope'"),
    ('data.length=128', 'data.length=128: must be at most model.max_length=64'),
    ('run.accumulate=3', 'run.accumulate=3: must divide data.batch_size=8'),
    ('perplexity.length=65', 'perplexity.length=65: must be at most model.max_length=64'),
    ('perplexity.stride=65', 'perplexity.stride=65: must be at most ', 'model.max_length=64'),
    ('perplexity.use_ema=true', 'perplexity.use_ema=True: ', 'set optimizer.ema=0.999 or so'),
    # What the eight devices of the tests cannot be cut into.
    ('mesh.data=3', 'mesh.data=3 x mesh.seq=1 x mesh.model=1: 3 places for 8 device(s)'),
    ('mesh.model=16', 'mesh.model=16: 16 places for 8 device(s)'),
    ('mesh.seq=2', "mesh.seq=2: layout 'tensor' cuts nothing over 'seq'; set mesh.layout to one of "
     'sequence'),
    ('data.batch_size=12',
     'data.batch_size=12 / run.accumulate=1 = 12 rows a microbatch: must be a '
     'multiple of mesh.data=8'),
    ('mesh.model=8',
     'model.num_heads=4: mesh.model=8 must divide it; choose mesh.model from 1, 2, 4'),
    ('mesh.seq=8 mesh.layout=sequence data.length=60 data.form=segments model.window=(8,)',
     'data.length=60 over mesh.seq=8: ', 'a data.length that mesh.seq divides'),
    ('perplexity.batch_size=4', 'perplexity.batch_size=4: mesh.data=8 must divide it; '
     'choose mesh.data from 1, 2, 4, or let perplexity.batch_size be a multiple of 8'),
    ('mesh.strategy=rings', "mesh.strategy='rings': must be one of auto, allgather, ring, "
     'bidirectional, ulysses, hybrid (did you mean "ring"?)'),
    ('mesh.order=stripped', "mesh.order='stripped': must be one of contiguous, zigzag, striped "
     '(did you mean "striped"?)'),
    ('mesh.seq=8 mesh.layout=sequence mesh.strategy=hybrid mesh.ulysses=3',
     "mesh.ulysses=3: with mesh.strategy='hybrid' it must divide mesh.seq=8 and leave a ring of at "
     'least 2; one of 2, 4'),
    ('mesh.ulysses=2', "mesh.ulysses=2: is read with mesh.strategy='hybrid' only, not 'ring'"),
    ('mesh.seq=8 mesh.layout=sequence mesh.strategy=ulysses',
     "mesh.strategy='ulysses' with 8 devices to share 4 query and 4 kv heads of each"),
    ('perplexity.segment=60 mesh.seq=8 mesh.layout=sequence', 'perplexity.segment=60: mesh.seq=8 '
     'must divide it'),
]


@pytest.mark.parametrize('overrides, expected', [(m[0], m[1:]) for m in FIELDS],
                         ids=[m[0] for m in FIELDS])
def test_a_mistake_in_a_field(tmp_path, capfd, overrides, expected):
  args = [f'--config.{override}' for override in overrides.split(' ')]
  check_mistake(main, [CONFIG, *args, f'--workdir={tmp_path}/w'], expected, capfd)
  assert not (tmp_path / 'w').exists()   # a mistake leaves no folder behind


MEMORY = f'--config={ROOT}/configs/books_memory.py:debug'


@pytest.mark.parametrize('overrides, expected', [
    ('model.schedule=parallel data.align=False', "model.schedule='parallel': is not read with data.align=False"),
    ('model.schedule=parallel model.truncate=3', 'model.truncate=3: must divide the 4 segments of a row'),
    ('model.schedule=wavefront', "serves memories of dependency class P2 that all layers have, not infini (P1)"),
    ('model.long_term=titans model.segment=100 data.length=100', 'model.memory_chunk=0 (64 here): must divide '
     'model.segment=100, since whole chunks of a segment are learned; set 50'),
    ('model.long_term=compressive model.short_term=16', 'model.segment=16: must be a multiple of model.memory_rate=0 '
     '(3 here); every 3 tokens that fall out are kept as one; set model.memory_rate=2'),
    ('model.long_term=memorizing model.memory_size=2000000000', 'model.memory_* or'),
    ('model.long_term=memorizing model.memory_size=2000000000 data.form=packed data.align=False', 'state of a'),
])
def test_a_mistake_about_a_memory(tmp_path, capfd, overrides, expected):
  args = [f'--config.{override}' for override in overrides.split(' ')]
  if 'memorizing' in overrides:   # found when its text has been read
    (tmp_path / 'a.txt').write_text(TEXT)
    args += ['--config.data.corpus=files', f'--config.data.files={tmp_path}/*.txt', '--config.data.split=contiguous',
             f'--config.data.cache_dir={tmp_path}/cache', '--config.perplexity.split=train']
  check_mistake(main, [MEMORY, *args, f'--workdir={tmp_path}/w'], [expected], capfd)


@pytest.mark.parametrize('form, run, rows, name', [
    ('segments', {}, {'memory': 4, 'state of an evaluation': 2}, 'memory'),
    ('packed', {}, {'state of a step': 4}, 'state of a step'),
    ('packed', dict(accumulate=4), {'state of an evaluation': 2}, 'state of an evaluation'),
    ('packed', dict(accumulate=2, curriculum=(2, 1)), {'state of a step': 8}, 'state of a step')])
def test_states_count_whether_they_are_carried_or_made(monkeypatch, form, run, rows, name):
  """Rows of a microbatch where a step makes its own; an evaluation's where it is larger."""
  config = base('memory')
  config.model.update(dict(num_layers=1, embed_dim=8, num_heads=1, segment=8, long_term='memorizing',
                           memory_size=10_000))
  config.data.update(dict(form=form, length=32, batch_size=4))
  config.run.update(run)
  config.perplexity.batch_size = 2
  a = assembly.assemble(config, jax.devices()[:1])
  size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
  model = nnx.merge(a.graphdef, a.abstract.params)
  states = {name: size(jax.eval_shape(lambda n=n: model.init_state(n))) for name, n in rows.items()}
  total = size(a.abstract._replace(memory=None)) + sum(states.values())
  monkeypatch.setattr(device_memory, 'free_bytes', lambda device: total)
  assembly.check_fits(a)
  monkeypatch.setattr(device_memory, 'free_bytes', lambda device: total - 1)
  with pytest.raises(ConfigError, match=rf'needs {total:,} bytes on the host \({name} {states[name]:,}'):
    assembly.check_fits(a)


@pytest.mark.parametrize('layout', [[], ['--config.mesh.layout=sequence']])
@pytest.mark.parametrize('config, name', [
    (LSTM, 'lstm'), (LSTM, 'elman'), (LSTM, 'gru'), (LSTM, 'slstm'),
    (LSTM.replace('lstm.py', 'lstm_ptb_medium.py'), 'lstm')])
def test_a_sequence_cut_of_a_cell(tmp_path, capfd, config, name, layout):
  check_mistake(main, [config, f'--config.model.name={name}', '--config.mesh.seq=2', *layout,
                       f'--workdir={tmp_path}/w'],
                [f'mesh.seq=2: model.name={name!r} cannot be cut along the sequence',
                 'set mesh.seq=1 and give the devices to mesh.data'], capfd)


def test_each_of_the_tables_is_long_enough():
  assert len(FLAGS) + len(FILES) + len(FIELDS) + len(WORLD) + len(GENERATE) >= 120


# --- Corpora, tokenizers, workdirs.

WORLD = [
    (['--config.data.files={tmp}/none/*.txt'],
     ["data.files='{tmp}/none/*.txt': matches no file; check the path"]),
    (['--config.data.files={tmp}/*', '--workdir={corpus}/w1'],
     ["data.files='{tmp}/*': matches only folders; write '{tmp}/*/**/*.txt'"]),
    (['--config.data.files={tmp}/empty/*.txt'], ["data.corpus='files': all 1 documents of the "
                                                 'train split are empty']),
    (['--config.data.files={corpus}/a.txt', '--config.data.split=hash'],
     ["split of data.corpus='files' (1 documents) is empty with data.split='hash'; cut every "
      "document instead with data.split='contiguous'"]),
    (['--config.data.validation_fraction=0'], ['data.validation_fraction=0.0: the validation split '
                                               'of', 'is empty']),
    (['--config.data.length=32', '--config.data.files={tmp}/short/*.txt'],
     ['data.length=32: the split has only', 'choose a shorter length']),
    (['--config.data.tokenizer={tmp}'], ["data.tokenizer='{tmp}': must be 'bytes' or the path of a "
                                         'SentencePiece .model file']),
    (['--config.data.tokenizer={corpus}/a.txt'],
     ["data.tokenizer='{corpus}/a.txt': is not a SentencePiece model"]),
    (['--workdir={corpus}/a.txt'], ['--workdir={corpus}/a.txt: ', 'is a file; give a folder']),
    (['--workdir={corpus}/a.txt/w'], ['--workdir={corpus}/a.txt/w: ', 'is a file; give a folder']),
    (['--workdir=/proc/w'],
     ['--workdir=/proc/w: cannot make this folder', 'that you may write to']),
    (['--mode=eval'], ['--workdir={tmp}/w: no such folder; give the workdir of a run']),
    (['--mode=eval', '--workdir={corpus}'], ['--workdir={corpus}: no run was started there']),
    (['--mode=eval', '--workdir={began}'], ['--workdir={began}: no checkpoint there yet; train']),
    (['--mode=eval', '--workdir={trained}', '--config.perplexity.use_ema=true'],
     ['perplexity.use_ema=True: ']),
    (['--mode=eval', '--workdir={trained}', '--config.model.embed_dim=16'],
     ['{trained}/config.json disagrees with this config: model.embed_dim: W has 8, you gave 16. '
      'model.embed_dim cannot change in this workdir: give what W has; or give another workdir']),
    (['--mode=eval', '--workdir={trained}', '--config.model.window=(4,)', '--config.seed=7'],
     ['disagrees with this config: model.window: W has [0], you gave [4]. To go on with what you '
      'gave: --allow_config_change=model.window; or']),
    (['--mode=eval', '--workdir={trained}', '--checkpoint=7'],
     ['{trained}/checkpoints: has no checkpoint of step 7; it has 1, 2']),
    (['--mode=eval', '--workdir={trained}', '--checkpoint=last'],
     ['--checkpoint=last: must be newest, best or a step, such as 1000']),
    (['--workdir={trained}', '--checkpoint=best'],
     ['--checkpoint=best: does nothing with --mode=train; give --mode=eval']),
    (['--workdir={trained}', '--config.optimizer.learning_rate=0.5',
      '--config.optimizer.weight_decay=0.2'],
     ['{trained}/config.json disagrees with this config: optimizer.learning_rate: W has 0.003, you '
      'gave 0.5; optimizer.weight_decay: W has 0.1, you gave 0.2. To go on with what you gave: '
      '--allow_config_change=optimizer.learning_rate,optimizer.weight_decay; or give another '
      'workdir']),
    (['--workdir={trained}', '--config.seed=7', '--config.data.length=8',
      '--config.run.num_steps=3'],
     ['data.length, seed cannot change in this workdir: give what W has. For the rest: '
      '--allow_config_change=run.num_steps; or give another workdir']),
    (['--workdir={trained}', '--allow_config_change=run.num_step'],
     ['--allow_config_change=run.num_step: no such key (did you mean "run.num_steps"?)']),
    (['--workdir={trained}', '--config.run.num_steps=1', '--allow_config_change=run.num_steps'],
     ['run.num_steps=1: the workdir has already done 2 steps; give more, or another workdir']),
    (['--workdir={trained}', '--config.data.batch_size=16', '--allow_config_change=data'],
     ['the saved data stream is another one: batch_size was 8 and is 16']),
    (['--workdir={trained}', '--config.model.embed_dim=16', '--allow_config_change=model'],
     ['[', '16', '8']),
    (['--workdir={held}'],
     ['--workdir={held}: held by a run that is still going (pid ', 'wait for']),
    (['--workdir={torn}'], ['{torn}/config.json: not a config that a run wrote']),
    (['--config.data.cache_dir={corpus}/a.txt'], ["data.cache_dir='{corpus}/a.txt': ", 'set '
                                                  'data.cache_dir to a folder']),
    (['--config.data.corpus=tfds', '--config.data.files=', '--config.data.tfds_name=no_such_set',
      '--config.data.tfds_dir={tmp}'], ["data.tfds_name='no_such_set': TensorFlow Datasets has no "
                                        'dataset of this name']),
]


@pytest.fixture
def world(tmp_path, corpus, trained):
  """The folders that the rows of WORLD and GENERATE name."""
  for name, text in (('empty', ''), ('short', 'ab')):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'a.txt').write_text(text)
  places = {name: tmp_path / name for name in ('began', 'held', 'torn')}
  for place in places.values():
    place.mkdir()
  (places['began'] / 'config.json').write_bytes((trained / 'config.json').read_bytes())
  (places['torn'] / 'config.json').write_text('{"seed": ')
  with workdir.lock(places['held']):
    yield dict(tmp=tmp_path, corpus=corpus, trained=trained, **places)


@pytest.mark.parametrize('args, expected', WORLD, ids=[f'{a[-1]}' for a, _ in WORLD])
def test_a_mistake_about_files_and_folders(world, capfd, args, expected):
  fill = lambda lines: [line.format(**world) for line in lines]
  before = (world['trained'] / 'config.json').read_bytes()
  check_mistake(main, fill([*TINY, WORKDIR, *args]), fill(expected), capfd)
  assert (world['trained'] / 'config.json').read_bytes() == before


def test_a_workdir_is_not_bound_by_a_config_that_could_not_run(world, capfd):
  fill = lambda args: [arg.format(**world) for arg in [*TINY, WORKDIR, *args]]
  check_mistake(main, fill(['--config.data.files={tmp}/none']), ['matches no file'], capfd)
  assert main.main(['main', *fill([])]) == 0


# --- longctx.generate.

GENERATE = [
    ([], ['--workdir: missing; give the folder of a trained run']),
    (['--workdir={tmp}/none'], ['--workdir={tmp}/none: no such folder']),
    (['--workdir={corpus}/a.txt'], ['--workdir={corpus}/a.txt: no such folder']),
    (['--workdir={corpus}'], ['--workdir={corpus}: no run was started there']),
    (['--workdir={began}'], ['--workdir={began}: no checkpoint there yet; train first']),
    (['--workdir={torn}'], ['{torn}/config.json: not a config that a run wrote']),
    (['--workdir={trained}', '--use_ema'], ['use_ema: this run keeps no averaged parameters']),
    (['--workdir={trained}', '--prompt=abc', '--max_new_tokens=29'],
     ['--max_new_tokens=29: with the 4 tokens of the prompt', 'is 33; must be at most '
      'model.max_length=32']),
    (['--workdir={trained}', '--max_new_tokens=0'], ['--max_new_tokens=0: must be at least 1']),
    (['--workdir={trained}', '--max_new_tokens=few'], ['--max_new_tokens=few: must be a whole']),
    (['--workdir={trained}', '--temperature=-1'], ['--temperature=-1.0: must be at least 0']),
    (['--workdir={trained}', '--temperature=nan'], ['--temperature=nan: must be at least 0']),
    (['--workdir={trained}', '--temperature=hot'], ['--temperature=hot: must be a number']),
    (['--workdir={trained}', '--top_p=1.5'], ['--top_p=1.5: must be above 0 and at most 1']),
    (['--workdir={trained}', '--top_k=-1'], ['--top_k=-1: must be at least 0']),
    (['--workdir={trained}', '--min_p=1'], ['--min_p=1.0: must be at least 0 and below 1']),
    (['--workdir={trained}', '--seed=-1'], ['--seed=-1: must be at least 0']),
    (['--workdir={trained}', '--prompt_file={tmp}/none'], ['--prompt_file={tmp}/none: cannot be '
                                                           'read: No such file']),
    (['--workdir={trained}', '--prompt=a', '--prompt_file=b'], ['give one of them, not both']),
    (['--workdir={trained}', '--promt=a'], ['--promt: unknown flag (did you mean "prompt"?)']),
    (['--workdir={trained}', 'hello'], ["'hello': not a flag; give the prompt as --prompt="]),
]


@pytest.mark.parametrize('args, expected', GENERATE, ids=[' '.join(a) for a, _ in GENERATE])
def test_a_mistake_of_generate(world, capfd, args, expected):
  fill = lambda lines: [line.format(**world) for line in lines]
  check_mistake(generate, fill(args), fill(expected), capfd)


# --- longctx.chat and longctx.contexts, with a run's own checkpoint.

CHAT = [
    (['--workdir={tmp}/none'], ['--workdir={tmp}/none: no such folder']),
    (['--workdir={trained}', '--context=a'], ['--store: missing; give a folder for contexts']),
    (['--workdir={trained}', '--context=a', '--store={corpus}/a.txt'],
     ['--store={corpus}/a.txt: is a file; give a folder']),
    (['--workdir={began}', '--context=a', '--store={tmp}/s'],
     ['--workdir={began}: no checkpoint there yet; train first']),
    (['--workdir={trained}', '--context=a', '--store={tmp}/s', '--capacity=33'],
     ['--capacity=33: must be at most model.max_length=32']),
    (['--workdir={trained}', '--context=a', '--store={tmp}/s', '--budgt=1'],
     ['--budgt: unknown flag (did you mean "budget"?)']),
]


@pytest.mark.parametrize('args, expected', CHAT, ids=[' '.join(a) for a, _ in CHAT])
def test_a_mistake_of_chat(world, capfd, args, expected):
  fill = lambda lines: [line.format(**world) for line in lines]
  check_mistake(chat, fill(args), fill(expected), capfd)


def test_a_conversation_that_grows_too_long_is_saved_and_looked_after(world, capfd, monkeypatch):
  """33 tokens where there is room for 32: said in a line, and what was before it is there."""
  fill = lambda *args: [arg.format(**world) for arg in args]
  talk = fill('chat', '--workdir={trained}', '--context=a', '--store={tmp}/s', '--max_new_tokens=4')
  for line, status in ((b'abc\n', 0), (b'x' * 40, 2)):
    monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(line)))
    capfd.readouterr()
    assert chat.main(talk) == status
  said = [s for s in capfd.readouterr().err.splitlines() if s.startswith('longctx: ')]
  assert len(said) == 1
  assert 'this context has room for 32' in said[0]
  assert contexts.main(fill('contexts', 'show', 'a', '--store={tmp}/s')) == 0
  shown = capfd.readouterr().out
  assert 'max_length = 32' in shown
  assert 'capacity      32' in shown
  check_mistake(contexts, fill('show', 'b', '--store={tmp}/s'), ["context 'b': there is none"], capfd)


# --- A run that ends in the middle.


@pytest.mark.parametrize('where, error, status', [
    ('traced', ConfigError('a.b=1: must be 2'), 2), ('traced', KeyboardInterrupt(), 130),
    ('between steps', ConfigError('a.b=1: must be 2'), 2),
    ('between steps', KeyboardInterrupt(), 130)])
def test_an_error_in_the_middle_leaves_everything_closed(
    world, capfd, monkeypatch, where, error, status):
  """What was logged and saved is on disk, the workdir is free, and the run can go on."""
  args = ['main', *(arg.format(**world) for arg in [*TINY, WORKDIR])]
  with monkeypatch.context() as broken:
    if where == 'traced':
      def raises(*args, **settings):
        raise error
      broken.setattr(step, 'train_step', raises)
    else:
      score = train.Trainer.score
      def raises_after(self, at, state):
        score(self, at, state)
        raise error
      broken.setattr(train.Trainer, 'score', raises_after)
    assert main.main(args) == status
  line = the_line(capfd.readouterr().err)
  assert line == str(error) if status == 2 else line.startswith('interrupted')
  folder = world['tmp'] / 'w'
  if where == 'between steps':
    steps = [json.loads(row)['step'] for row in (folder / 'metrics.jsonl').read_text().splitlines()]
    assert steps == [1, 2, 2]
    assert (folder / 'checkpoints' / '1' / 'manifest.json').exists()
  workdir.lock(folder).release()
  for thread in threading.enumerate():
    if 'grain' in thread.name:
      thread.join(60)   # told to end, it may be at its last batch
      assert not thread.is_alive()


# --- The real command.


def command(module, *args, **env):
  return subprocess.run([sys.executable, '-m', module, *args], capture_output=True, timeout=120,
                        cwd=ROOT, env={**os.environ, 'JAX_PLATFORMS': 'cpu', **env}, check=False)


@pytest.mark.parametrize('module, args, env, expected', [
    ('longctx.main', ['--config=configs/quickstart.py:debgu', '--workdir=w'], {},
     'did you mean "debug"'),
    ('longctx.main', ['--config=configs/quickstart.py:debug', '--workdir=w'],
     {'JAX_PLATFORMS': 'abacus'}, 'JAX_PLATFORMS=abacus: '),
    ('longctx.generate', ['--workdir=.', b'--prompt=caf\xe9'], {},
     '--prompt: byte 3 (0xe9) is not UTF-8; to continue text in another encoding give'),
], ids=['variant', 'platform', 'prompt'])
def test_the_real_command(module, args, env, expected):
  done = command(module, *args, **env)
  assert done.returncode == 2
  assert expected in the_line(done.stderr.decode())
  assert done.stdout == b''


@pytest.mark.parametrize('args, status', [(['--help'], 0), ([], 2)])
def test_help_and_a_bare_call_answer_before_jax_is_imported(args, status):
  """Under 3 s on any machine follows from what is not imported; half a second was measured."""
  done = subprocess.run([sys.executable, '-X', 'importtime', '-m', 'longctx.main', *args],
                        capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
  assert done.returncode == status
  imported = {line.split('|')[-1].strip() for line in done.stderr.splitlines() if '|' in line}
  assert not imported & {'jax', 'flax', 'optax', 'orbax', 'numpy', 'grain'}
  if status:
    assert the_line(done.stderr.splitlines()[-1] + '\n').startswith('--config: missing')
  else:
    for name in main.define_flags():
      if name not in ('flagfile', 'undefok'):
        assert f'--{name}=' in done.stdout
    assert '--config=' in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert 'flagfile' not in done.stdout
