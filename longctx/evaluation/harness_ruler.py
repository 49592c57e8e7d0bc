"""The lengths that lm_eval's RULER can be asked for: at others some of its generators never end.

A generator of lm_eval 0.4.13 (tasks/ruler) draws its smallest example again and again where that is longer
than max_seq_lengths asks, and takes Ctrl-C for one more failure:

    ruler_vt    a worked example, which fills 500 tokens whatever the length, and ten lines of noise. Where
                five lines are more than the 500, as in bytes, no length will do
    ruler_cwe   a worked example and ten words, both longer from 4,096 on. Somewhat below it makes lists of
                no words, by whose number its score is divided
    ruler_fwe   the question alone; and a word for each 50 tokens, the second to fourth of which are asked

The others leave out what does not fit. Words and names are drawn, so that the least length is that of the
longest of DRAWS examples, in the tokens that lm_eval counts.
Held by: tests/test_lm_eval.py.
"""

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from longctx.errors import ConfigError, check

Count = Callable[[str], int]   # tokens of a text
Span = tuple[int, int | None]  # the least and the most tokens; None: any number
DRAWS = 32
HOPS, EXAMPLE = 4, 500   # of vt, as its generator has them
LONG_FROM = 4096         # of cwe, likewise


def vt(count: Count) -> list[Span]:
  from lm_eval.tasks.ruler import vt_utils as its
  room = its.CONFIG['variable_tracking']['tokens_to_generate']

  def size(lines: int, worked: bool) -> int:
    made = (its.generate_input_output(lines, 1, HOPS, is_icl=worked) for _ in range(DRAWS))
    return max(count(f'{text} {answer}') for text, answer in made) + room

  lines = 5
  if size(lines, True) > EXAMPLE:
    return []
  while size(lines + 5, True) <= EXAMPLE:
    lines += 5
  return [(size(lines, True) + size(10, False), None)]


def cwe(count: Count) -> list[Span]:
  from lm_eval.tasks.ruler import cwe_utils as its

  def least(length: int) -> int:
    """Of the form that is taken at that length."""
    sizes = []
    for _ in range(DRAWS):
      example, text, words = its.generate_input_output(10, length)
      sizes.append(count(f'{example}\n{text} {" ".join(f"{i}. {word}" for i, word in enumerate(words, 1))}'))
    return max(sizes) + its.CONFIG['tokens_to_generate']

  before = its.RNG.getstate()
  short, long = least(LONG_FROM - 1), least(LONG_FROM)
  its.RNG.setstate(before)
  spans = [(short, LONG_FROM - 1), (max(long, LONG_FROM), None)]
  return [(short, None)] if long <= LONG_FROM else spans[short >= LONG_FROM:]


def fwe(count: Count) -> list[Span]:
  from lm_eval.tasks.ruler import fwe_utils as its
  return [(max(4 * 50, count(its.TEMPLATE.format(context='', query=''))), None)]


# Of a generator that may never end: ours of the same name, and the lengths at which it does.
SPANS: dict[str, tuple[str, Callable[[Count], list[Span]]]] = {
    'vt_utils.get_vt_dataset': ('ruler_vt', vt),
    'cwe_utils.get_cw_dataset': ('ruler_cwe', cwe),
    'fwe_utils.fwe_download': ('ruler_fwe', fwe)}


@contextlib.contextmanager
def guard() -> Iterator[None]:
  """Has lm_eval's command line refuse such lengths when it has found its tasks, whatever named them."""
  from lm_eval.config.evaluate_config import EvaluatorConfig
  theirs = EvaluatorConfig.process_tasks

  def process_tasks(self: Any, metadata: dict | None = None) -> Any:
    manager = theirs(self, metadata)
    refuse(manager.task_index, self.tasks, self.metadata)
    return manager

  EvaluatorConfig.process_tasks = process_tasks
  try:
    yield
  finally:
    EvaluatorConfig.process_tasks = theirs


def refuse(index: Mapping[str, Any], tasks: Sequence[Any], metadata: Mapping[str, Any]) -> None:
  """ConfigError where a task would be made to a length at which its generator does not end.

  Args:
    index: of lm_eval's TaskManager.
    tasks: as lm_eval has found them: names of tasks, groups and tags, and configs.
    metadata: that all tasks are given.
  """
  asked = {}
  for spec in tasks:
    for name, config in _leaves(index, spec):
      if (generator := _named(config.get('custom_dataset'))) in SPANS:
        own = config.get('metadata')
        asked[name] = generator, ((own if isinstance(own, dict) else {}) | dict(metadata)).get('max_seq_lengths', [4096])
  if not asked:
    return
  from lm_eval.tasks.ruler import common_utils
  if (folder := common_utils.resolve_tokenizer_name(dict(metadata))) is None:
    return   # lm_eval says so
  tokenizer = common_utils.get_tokenizer(folder)
  dice = random.getstate(), np.random.get_state()
  wrong, lengths_asked = {}, []
  for name, (generator, lengths) in asked.items():
    check(isinstance(lengths, (list, tuple)) and all(type(length) is int for length in lengths),
          f'--metadata max_seq_lengths={lengths!r}: must be a list of whole numbers, such as [1024, 4096]')
    spans = SPANS[generator][1](lambda text: len(tokenizer(text).input_ids))
    if not all(any(low <= length and (high is None or length <= high) for low, high in spans) for length in lengths):
      wrong[f'{name} {_said(spans)}'] = SPANS[generator][0]
      lengths_asked = [*dict.fromkeys([*lengths_asked, *lengths])]
  random.setstate(dice[0])
  np.random.set_state(dice[1])
  if wrong:
    raise ConfigError(
        f"--tasks: max_seq_lengths={lengths_asked}: lm_eval's generators never end, or make lists of no words, but at "
        f"lengths, in this tokenizer's tokens, of: {', '.join(wrong)}; ask for such by --metadata "
        '\'{"max_seq_lengths": [N]}\', leave the task out, or write longctx\'s own: --export=DIR '
        f'--tasks={",".join(dict.fromkeys(wrong.values()))}')


def _said(spans: Sequence[Span]) -> str:
  return ' or '.join(f'at least {low}' if high is None else f'{low} to {high}' for low, high in spans) or 'none'


def _named(function: Any) -> str:
  """The last two words of a function's name, which stands there as a path where it was not imported."""
  path = f'{function.__module__}.{function.__name__}' if callable(function) else str(function)
  return '.'.join(path.rpartition('/')[2].split('.')[-2:])


def _leaves(index: Mapping[str, Any], spec: Any) -> Iterator[tuple[str, dict]]:
  """(name, config) of each task that a name or a config stands for, through tags and groups."""
  if isinstance(spec, str):
    if (entry := index.get(spec)) is None:
      return
    if entry.kind.name == 'TAG':
      members = sorted(entry.tags)
    elif entry.kind.name == 'GROUP':
      members = entry.cfg.get('task')
    else:
      yield spec, entry.cfg
      return
  else:
    members = spec.get('task', spec.get('group'))
    if isinstance(members, str):   # a task of its own, or another with changes
      for name, config in _leaves(index, members):
        yield name, config | spec
      if members not in index:
        yield members, spec
      return
  for member in members if isinstance(members, list) else ():
    yield from _leaves(index, member)
