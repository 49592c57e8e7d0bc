"""Configs: every field of every part, with its default, and back again to the parts.

`base(model)` spreads the defaults of each part's `Config` into one `ConfigDict`, so that every leaf
can be overridden on the command line; a config file changes what its experiment is about.
`parts(config)` builds the parts again and refuses unknown keys and wrong types by name.
Held by: tests/test_configs.py, tests/test_mistakes.py.
"""

import dataclasses
import math
import types
import typing
from typing import Any, NamedTuple

import ml_collections

from longctx.data import stream
from longctx.errors import ConfigError, check, check_range, nearest
from longctx.evaluation import perplexity, tasks
from longctx.models import (
  decoder,
  encoder,
  encoder_config,
  encoder_decoder,
  memory_config,
  memory_decoder,
  recurrent,
)
from longctx.parallel import mesh
from longctx.training import loss, optim


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """How long a run is, and what it does besides updating."""

  num_steps: int = 1000
  log_every: int = 10
  eval_every: int = 0             # steps between evaluations; 0: at the end only
  checkpoint_every: int = 100
  keep_last: int = 2              # checkpoints kept beside the best one
  keep_best: bool = True          # by validation loss
  accumulate: int = 1             # microbatches a step
  curriculum: tuple[int, ...] = ()   # segments of a row at first, a stage each; then all of them. Where rows
                                  #   carry a document on: that gradients go back through
  curriculum_steps: int = 100     # of a stage
  init_from: str = ''             # workdir of a run whose parameters of the same names are begun with
  max_bad_steps: int = 10         # steps in a row that are not finite, or spikes; then the run stops
  spike_sigmas: float = 0.0       # a step this many standard deviations above those before is skipped
                                  #   (its loss or gradient norm; 6 is usual); 0: none is
  spike_window: int = 128         # of so many steps; see training/spikes.py
  rollback_after: int = 0         # bad steps in a row; then the run returns to the checkpoint before
                                  #   them and passes over the data since; 0: never
  watchdog_seconds: int = 600     # without an end of a step, or another sign of progress (ten times as long
                                  #   at the start, compiling, in the first step, evaluating, saving; five
                                  #   times as long as a step has taken), a run or --mode=eval says where each
                                  #   process stands, and ends; 0: never, as for a debugger
  check_hosts_every: int = 0      # steps between comparisons of what the devices hold alike; 0: never
  save_patience: int = 90         # seconds for which the last checkpoint is tried again where it fails
  profile_start: int = -1         # first step of a profiler window; -1: none
  profile_steps: int = 3
  compilation_cache: str = ''     # folder; '': with the user's caches; 'none': off
  expect: str = ''                # what the run prints at its start: the loss to expect, and when

  def __post_init__(self):
    for name in ('num_steps', 'log_every', 'checkpoint_every', 'keep_last', 'accumulate',
                 'max_bad_steps', 'profile_steps', 'curriculum_steps'):
      check_range(f'run.{name}', getattr(self, name), 1)
    for name in ('eval_every', 'spike_sigmas', 'watchdog_seconds', 'check_hosts_every', 'save_patience'):
      check_range(f'run.{name}', getattr(self, name), 0)
    check_range('run.spike_window', self.spike_window, 4)
    check(0 <= self.rollback_after <= self.max_bad_steps, f'run.rollback_after={self.rollback_after}: must be '
          f'at least 0 and at most run.max_bad_steps={self.max_bad_steps}, after which the run stops')
    check_range('run.profile_start', self.profile_start, -1, self.num_steps - 1)


MODELS = {
    'decoder': (decoder.Config, decoder.Decoder),
    'memory': (memory_config.Config, memory_decoder.MemoryDecoder),
    'elman': (recurrent.Config, recurrent.Recurrent),
    'lstm': (recurrent.Config, recurrent.Recurrent),
    'gru': (recurrent.Config, recurrent.Recurrent),
    'slstm': (recurrent.Config, recurrent.Recurrent),
    'encoder': (encoder_config.Config, encoder.Encoder),
    'encoder_decoder': (encoder_config.PairConfig, encoder_decoder.EncoderDecoder),
}
# The forms of data that a model can learn from, where it is not a language model.
FORMS = {'encoder': ('masked', 'labels'), 'encoder_decoder': ('pairs',)}
LANGUAGE = ('packed', 'segments')

SECTIONS = {
    'data': stream.Config,
    'optimizer': optim.Config,
    'loss': loss.Config,
    'mesh': mesh.Config,
    'run': Run,
    'perplexity': perplexity.Config,
    'eval': tasks.Config,
}


class Parts(NamedTuple):
  """A config, taken apart and checked."""

  seed: int
  model: Any
  data: stream.Config
  optimizer: optim.Config
  loss: loss.Config
  mesh: mesh.Config
  run: Run
  perplexity: perplexity.Config
  eval: tasks.Config


def check_variant(variant: str, variants: tuple[str, ...] = ('', 'debug')) -> None:
  """Refuses what follows the colon in --config=FILE:VARIANT unless the file knows it."""
  named = ', '.join(v or "'' (no colon)" for v in variants)
  check(variant in variants, f'variant {variant!r}: must be one of {named}'
        f'{nearest(variant, [v for v in variants if v])}')


def base(model: str = 'decoder') -> ml_collections.ConfigDict:
  """Every field of every part at its default, for the named model."""
  check(model in MODELS, f'model={model!r}: must be one of {", ".join(MODELS)}'
        f'{nearest(model, MODELS)}')
  sections = {'model': MODELS[model][0], **SECTIONS}
  config = ml_collections.ConfigDict({
      'seed': 0,
      **{name: {f.name: f.default for f in dataclasses.fields(part)}
         for name, part in sections.items()}})
  config.model.name = model
  return config


def parts(config: ml_collections.ConfigDict) -> Parts:
  """The parts that a config describes; ConfigError names the first mistake in it."""
  known = ('seed', 'model', *SECTIONS)
  for name in config:
    check(name in known, f'{name}: no such section; a config has {", ".join(known)}'
          f'{nearest(name, known)}')
  for name in ('model', *SECTIONS):
    check(isinstance(config.get(name, {}), (dict, ml_collections.ConfigDict)),
          f'{name}={config.get(name)!r}: must be a section of fields')
  seed = config.get('seed', 0)
  check(isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2 ** 31,
        f'seed={seed!r}: must be a whole number from 0 to 2147483647')
  model = dict(config.get('model', {}))
  name = model.get('name', 'decoder')
  check(name in MODELS, f'model.name={name!r}: must be one of {", ".join(MODELS)}'
        f'{nearest(name, MODELS)}')
  model = build('model', MODELS[name][0], model)
  # Before the mesh is asked whether its layout fits such a cut.
  _check_dependency(model, config.get('mesh', {}).get('seq', 1))
  built = {section: build(section, part, dict(config.get(section, {})))
           for section, part in SECTIONS.items()}
  _check_form(model, built['data'].form)
  _check_schedule(model, built['data'])
  return Parts(seed=seed, model=model, **built)


def _check_form(model: Any, form: str) -> None:
  able = FORMS.get(model.name, LANGUAGE)
  check(form in able, f'data.form={form!r}: model.name={model.name!r} learns from {" or ".join(able)}; '
        f'set data.form to it, or model.name to '
        f'{" or ".join(n for n in MODELS if form in FORMS.get(n, LANGUAGE))}')
  classes = getattr(model, 'num_classes', 0)
  check(bool(classes) == (form == 'labels'), f'model.num_classes={classes}: with data.form={form!r} '
        + ('must be the number of classes, such as 2' if form == 'labels' else 'must be 0: it guesses '
           'tokens'))


def _check_schedule(model: Any, data: stream.Config) -> None:
  """That the order which is asked for can be kept to."""
  schedule = getattr(model, 'schedule', 'auto')
  check(schedule in ('auto', 'sequential') or data.align, f'model.schedule={schedule!r}: is not read with data.align='
        f"{data.align}, where documents begin anywhere and segments are read one by one; set data.form='segments' "
        "and data.align=True, or model.schedule='auto'")
  if schedule == 'parallel' and model.truncate:
    of_a_row = max(1, data.length // model.segment)
    check(of_a_row % model.truncate == 0 or model.truncate % of_a_row == 0, f'model.truncate={model.truncate}: must '
          f"divide the {of_a_row} segments of a row, or be a multiple of them, with model.schedule='parallel'; or "
          "set 'sequential'")


def _check_dependency(model: Any, cuts: Any) -> None:
  """What a mesh cannot cut: models whose every step needs the one before, class P2 or P3."""
  dependency = max(layer.dependency for layer in model.layer_facts(1))
  check(cuts == 1 or dependency in ('P0', 'P1'),
        f'mesh.seq={cuts}: model.name={model.name!r} cannot be cut along the sequence, each step needs '
        f'the one before (dependency class {dependency}); set mesh.seq=1 and give the devices to '
        'mesh.data')


def build(section: str, part: type, values: dict[str, Any]) -> Any:
  """part(**values), with unknown keys and wrong types refused by name."""
  fields = {f.name: f.type for f in dataclasses.fields(part)}
  hints = typing.get_type_hints(part)
  for key, value in values.items():
    check(key in fields, f'{section}.{key}: no such field; {section} has '
          f'{", ".join(fields)}{nearest(key, fields)}')
    values[key] = _typed(f'{section}.{key}', value, hints[key])
  return part(**values)


def _typed(field: str, value: Any, kind: Any) -> Any:
  if isinstance(kind, types.GenericAlias):   # tuple[int, ...]
    inner = typing.get_args(kind)[0]
    if not isinstance(value, (tuple, list)):
      raise ConfigError(f'{field}={value!r}: must be a tuple of {inner.__name__}, '
                        'such as ' + ('(512, 0)' if inner is int else "('a', 'b')"))
    wrong = [v for v in value if not isinstance(v, inner) or isinstance(v, bool)]
    if wrong:
      raise ConfigError(f'{field}={value}: must hold {inner.__name__} alone, not '
                        f'{type(wrong[0]).__name__}')
    return tuple(value)
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value)
  wrong = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
  check(not wrong, f'{field}={value!r}: must be of type {kind.__name__}, '
        f'not {type(value).__name__}')
  check(kind is not float or math.isfinite(value), f'{field}={value}: must be a finite number')
  return value
