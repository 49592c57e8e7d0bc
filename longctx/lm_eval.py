"""python -m longctx.lm_eval --model longctx --model_args workdir=W[,checkpoint=best] --tasks ...
python -m longctx.lm_eval --export=DIR --tasks=passkey --lengths=1024,4096 --tokenizer=bytes

The first runs EleutherAI's lm-evaluation-harness, with all of its own flags, on a checkpoint of a
workdir. --model_args takes

  workdir       folder of a run; nothing is written there
  checkpoint    newest (the default: the newest that can be read), best (of the lowest validation
                loss), or a step
  use_ema       True: the averaged parameters
  seq           devices that share what the model remembers, for contexts larger than one holds
  segment       tokens of a text that are read in one call (512)
  max_length    tokens of a text at most; 0 (the default): the model's own, which may be any number
  max_gen_toks  tokens to write where a task does not say (256)
  truncate      error (the default), or left: cut the beginning of what is too long, and count it

and --batch_size is the texts read at once. JAX_PLATFORMS chooses the device. --use_cache PATH keeps
answers, so that a run that was interrupted carries on: in PATH_HASH_rank0.db, where HASH is of the
checkpoint that was read, its tokenizer and the last three settings above; where the newest has moved
all is asked anew, and checkpoint=STEP carries on with the one before. The results tell `step` and
`checkpoint_hash`, which tasks.jsonl calls `checkpoint`. Tasks that make text to a length in tokens
(RULER's) count with the checkpoint's tokenizer, unless --metadata names one, and take their lengths
there: --tasks niah_single_1 --metadata '{"max_seq_lengths": [1024]}'. Of RULER's, niah_single_1,
niah_multikey_2, niah_multikey_3, ruler_cwe and ruler_fwe run without a network. Lengths at
which lm_eval would make no example of ruler_vt, ruler_cwe or ruler_fwe, for ever, are refused.

The second writes tasks of this library as files that lm_eval runs on anybody's model: a data set
for each length, which is counted in the tokens of --tokenizer. An answer may take its example's own
room, in tokens of the model that writes, or what --gen_kwargs max_gen_toks=N says.
"""

# A user's mistake ends in one line on stderr and exit status 2.
# Held by: tests/test_lm_eval.py.

import contextlib
import functools
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from typing import Any

from absl import flags

from longctx import command_line
from longctx.command_line import complain
from longctx.errors import ConfigError, check, check_range, nearest
from longctx.main import check_devices, set_compilation_cache

INSTALL = "pip install 'lm_eval>=0.4.13,<0.5'"
MODEL = 'longctx'
KNOWN = ('workdir', 'checkpoint', 'use_ema', 'seq', 'segment', 'max_length', 'max_gen_toks',
         'truncate')
# Of lm_eval's RULER, what is made of no text that is fetched; ruler_vt too, but see harness_ruler.py.
OFFLINE = ('niah_single_1', 'niah_multikey_2', 'niah_multikey_3', 'ruler_cwe', 'ruler_fwe')
# Where lm_eval itself checks what its user gave; a ValueError from elsewhere is a fault.
CHECKS = (os.path.join('config', 'evaluate_config.py'), os.path.join('api', 'registry.py'),
          os.path.join('ruler', 'prepare_niah.py'), os.path.join('ruler', 'qa_utils.py'))


def check_installed() -> None:
  try:
    import lm_eval.api.model  # noqa: F401
  except ImportError as e:
    raise ConfigError(f'lm_eval: cannot be imported ({e}); {INSTALL}') from e


@functools.cache
def model_class() -> type:
  """What lm_eval makes from --model longctx; named to lm_eval once."""
  import lm_eval.models  # noqa: F401  before ours: lm_eval names its own only while there is none
  from lm_eval.api.registry import register_model

  from longctx.evaluation import harness

  @register_model(MODEL)
  class Longctx(harness.Harness):
    """A checkpoint. lm_eval gives batch_size, device and trust_remote_code too."""

    def __init__(self, *, workdir: str = '', checkpoint: str | int = 'newest',
                 use_ema: bool = False, seq: int = 1, segment: int = 512, max_length: int = 0,
                 max_gen_toks: int = 256, truncate: str = 'error', batch_size: str | int = 1,
                 device: str | None = None, trust_remote_code: bool = False, **unknown: Any):
      del device, trust_remote_code   # JAX_PLATFORMS has the first; the second is of data sets
      check('max_batch_size' not in unknown, '--max_batch_size: does nothing here; give '
            "--batch_size, and no 'auto'")
      for name in unknown:
        raise ConfigError(f'--model_args: {name}: unknown{nearest(name, KNOWN)}; a model of '
                          f'longctx has {", ".join(KNOWN)}')
      check(str(batch_size).isdigit(), f'--batch_size={batch_size}: must be a whole number, such '
            'as 8')
      check(isinstance(use_ema, bool), f'--model_args use_ema={use_ema}: must be True or False')
      for name, value in dict(seq=seq, segment=segment, max_length=max_length,
                              max_gen_toks=max_gen_toks).items():
        check(type(value) is int, f'--model_args {name}={value}: must be a whole number')
      subject, known = open_subject(str(workdir), str(checkpoint), use_ema, seq, int(batch_size), segment)
      super().__init__(
          subject, batch_size=int(batch_size), max_length=max_length, max_gen_toks=max_gen_toks,
          truncate=truncate, identity=f'{known["checkpoint"]} {known["model"]}',
          told=dict(workdir=str(workdir), checkpoint=checkpoint, use_ema=use_ema, seq=seq, segment=segment,
                    step=known['step'], checkpoint_hash=known['checkpoint'], model_hash=known['model']))

  return Longctx


def open_subject(workdir: str, checkpoint: str, use_ema: bool, seq: int, batch_size: int,
                 segment: int) -> tuple[Any, dict[str, Any]]:
  """The model of a checkpoint, and which it is (examine.identity)."""
  check(bool(workdir), '--model_args: workdir is missing; give the folder of a trained run: '
        '--model_args workdir=runs/quickstart')
  command_line.check_checkpoint(checkpoint)
  check_range('--model_args seq', seq, low=1)
  from longctx import assembly, examine
  from longctx.evaluation.subject import ModelSubject
  found = assembly.load_for_inference(workdir, use_ema=use_ema, checkpoint=checkpoint, seq=seq)
  known = examine.identity(found.model_config, workdir, found.step, use_ema)
  return ModelSubject(found.graphdef, found.params, found.tokenizer, layout=found.layout, batch_size=batch_size,
                      segment=segment), known


# Running lm_eval.


def run(words: list[str]) -> None:
  """lm_eval's own command line."""
  check_installed()
  from lm_eval._cli import HarnessCLI
  from lm_eval.utils import setup_logging
  model_class()
  setup_logging()
  with _command_line(words):
    parser = HarnessCLI()
    args = parser.parse_args()
  if args.command != 'run':
    return parser.execute(args)
  told = told_by(args)
  check_flags(told)
  if told['model'] == MODEL:
    check_devices()
    set_compilation_cache('')
    import jax
    args.device = jax.devices()[0].device_kind   # for the results, where lm_eval would say cuda:0
  from longctx.evaluation import harness, harness_ruler
  cache = harness.cache_of_its_own() if told['model'] == MODEL else contextlib.nullcontext()
  try:
    with given_tokenizer(args, told), harness_ruler.guard(), cache:
      parser.execute(args)
  except FloatingPointError as e:
    raise ConfigError(str(e)) from e
  except ImportError as e:
    raise ConfigError(f'lm_eval: {e}; some of its tasks need more than itself: pip install {e.name or "it"}, or '
                      "'lm_eval[ruler]' transformers for RULER's") from e
  except OSError as e:   # requests has a ConnectionError of its own, which is no ConnectionError
    if type(e).__name__ != 'ConnectionError':
      raise
    raise ConfigError(f'lm_eval: {e}; some of its tasks fetch texts when they are made: have a network, or put tasks that '
                      f'need none, of RULER {", ".join(OFFLINE)}, or write longctx\'s own: --export=DIR '
                      '--tasks=ruler_niah_single_2 ...') from e
  except ValueError as e:
    if traceback.extract_tb(e.__traceback__)[-1].filename.endswith(CHECKS):
      raise ConfigError(f'lm_eval: {e}') from e
    raise


@contextlib.contextmanager
def _command_line(words: list[str]) -> Iterator[None]:
  """lm_eval reads sys.argv, and writes into it."""
  before, sys.argv = sys.argv, ['lm_eval', *words]
  try:
    yield
  finally:
    sys.argv = before


def told_by(args: Any) -> dict[str, Any]:
  """What lm_eval goes by: its flags, and where they say nothing its --config file."""
  from lm_eval.config.evaluate_config import EvaluatorConfig
  from lm_eval.utils import simple_parse_args_string
  try:
    told = EvaluatorConfig.load_yaml_config(args.config) if args.config else {}
  except (OSError, TypeError, ValueError) as e:
    raise ConfigError(f'--config={args.config}: {" ".join(str(e).split())}; give a YAML file of names and values') from e
  told = told | {name: value for name, value in vars(args).items() if value or value == 0}
  for name in ('model_args', 'metadata'):
    value = told.get(name) or {}
    told[name] = simple_parse_args_string(value) if isinstance(value, str) else value
  return told


def check_flags(told: dict[str, Any]) -> None:
  """What lm_eval would fill in, or take and do nothing with."""
  check(bool(told.get('model')), f'--model: missing; give --model {MODEL} --model_args workdir=W')
  check(bool(told.get('tasks')), '--tasks: missing; python -m longctx.lm_eval ls tasks tells them')
  check(told['model'] != MODEL or told.get('device') is None,
        f'--device={told.get("device")}: does nothing with --model {MODEL}; set JAX_PLATFORMS')


@contextlib.contextmanager
def given_tokenizer(args: Any, told: dict[str, Any]) -> Iterator[None]:
  """Tells tasks that count tokens of the checkpoint's tokenizer, as Hugging Face's files."""
  metadata, workdir = told['metadata'], str(told['model_args'].get('workdir', ''))
  if told['model'] != MODEL or not workdir or {'tokenizer', 'pretrained', 'model'} & set(metadata):
    yield
    return
  from longctx.data import tokenizer
  from longctx.evaluation import harness_tasks
  from longctx.training import workdir as workdir_lib
  own = tokenizer.load_tokenizer(workdir_lib.load_config(workdir).data.tokenizer)
  with tempfile.TemporaryDirectory() as folder:
    if harness_tasks.write_tokenizer(own, folder):
      args.metadata = dict(metadata, tokenizer=folder)
    else:
      print("longctx: this checkpoint's SentencePiece model is no BPE; tasks that count tokens need "
            '--metadata tokenizer=FOLDER', file=sys.stderr)
    yield


# Writing tasks for lm_eval.


def define_export_flags() -> flags.FlagValues:
  table = flags.FlagValues()
  text = lambda *args: flags.DEFINE_string(*args, flag_values=table)
  whole = lambda *args: flags.DEFINE_integer(*args, flag_values=table)
  text('export', '', 'Folder to write into.')
  text('tasks', '', 'Tasks of this library, with commas between.')
  text('lengths', '', 'Tokens of a prompt and its answer, with commas between.')
  whole('samples', 100, 'Examples of each task and length.')
  text('tokenizer', '', "What counts the tokens: 'bytes', or the path of a SentencePiece .model "
       'file.')
  whole('seed', 0, 'The same seed makes the same examples.')
  whole('depths', 0, 'Where needles stand, of tasks that place any: so many depths from 0 to 1 in turn; '
        '0: anywhere, evenly drawn.')
  text('haystack', '', "What needles are hidden in: '' is each task's own, 'repeated', 'noise', or "
       'a glob of text files.')
  text('paragraphs', '', "What is asked about: '' is invented documents; or a glob of SQuAD or "
       'HotpotQA files.')
  text('files', '', "The folder of Long Range Arena's files, for tasks lra_*.")
  return table


def export(argv: list[str]) -> None:
  f = define_export_flags()
  command_line.parse_flags(f, argv)
  for name, such in (('export', 'runs/tasks'), ('tasks', 'passkey'), ('lengths', '1024,4096'),
                     ('tokenizer', 'bytes')):
    check(bool(f[name].value), f'--{name}: missing; give --{name}={such} or so')
  tasks, lengths = ([word.strip() for word in words.split(',')] for words in (f.tasks, f.lengths))
  check(all(length.isdigit() for length in lengths), f'--lengths={f.lengths}: must be whole '
        'numbers with commas between, such as 1024,4096')
  for name, low in dict(samples=1, seed=0, depths=0).items():
    check_range(f'--{name}', f[name].value, low=low)
  from longctx.data.tasks.example import SOURCES
  from longctx.data.tokenizer import load_tokenizer
  from longctx.evaluation import harness_tasks
  names = harness_tasks.export(
      f.export, tasks, lengths=[int(length) for length in lengths], samples=f.samples,
      tokenizer=load_tokenizer(f.tokenizer), seed=f.seed, depths=f.depths,
      sources={source: f[source].value for source in SOURCES})
  print(f'wrote {", ".join(names)}\n'
        f'lm_eval --include_path {f.export} --tasks {",".join(names)} --model ...')


def main(argv: list[str]) -> int:
  words = argv[1:]
  try:
    if not words or (len(words) == 1 and words[0] in command_line.HELP):
      print(command_line.help_text(__doc__, define_export_flags()))
      print(f'\nThe flags of lm_eval ({INSTALL}): python -m longctx.lm_eval run --help')
    elif any(word.partition('=')[0] in ('--export', '-export') for word in words):
      export(argv)
    else:
      run(words)
  except ConfigError as e:
    return complain(e)
  except KeyboardInterrupt:
    complain(KeyboardInterrupt('interrupted; with --use_cache PATH the same command carries on; where a newer '
                               'checkpoint may have been saved since, name the old: checkpoint=STEP'))
    return 130
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv))
