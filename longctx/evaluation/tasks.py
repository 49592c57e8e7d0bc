"""Tasks put to a subject: examples made, answers written and scored, each kept as a line (records.py).

Every task of data/tasks/table.py at every length, `samples` examples each, a batch at a time. The control
puts the same questions without their context: what is right then was not read. Nothing is ever cut: what is
longer than the model takes is an error, or counted. What carries on is compared with the examples of now, and
scored anew where its task scores otherwise than it did.
Held by: tests/test_eval_tasks.py (oracle 100, constant the floor, interrupted == uninterrupted).
"""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from longctx.data.tasks import sources, version
from longctx.data.tasks.example import SOURCES, Example, depth_of, example
from longctx.data.tasks.table import TASKS, floor, text_of, unread
from longctx.errors import ConfigError, check, check_choice, check_choices, check_range
from longctx.evaluation import course, records, ruler_summary
from longctx.evaluation.subject import Subject, prompt_tokens
from longctx.progress import moved
from longctx.training import processes

SMALL = 1024   # tokens of examples that are all made before the first is asked: thousands a second
CHEAP = 2 ** 18   # tokens of kept answers of a task and length whose examples are made again whatever made them: a second
ITEMS = ('fit', 'of')   # in Example.info: how many items of a benchmark's own are short enough, of how many


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Which tasks are put, how often and how long."""
  tasks: tuple[str, ...] = ()  # names of data/tasks/table.py; (): --mode=eval reads held-out text instead
  lengths: tuple[int, ...] = ()  # tokens, the answer's too; (): data.length
  samples: int = 100  # examples of each task and length
  depths: int = 0  # where needles stand, of tasks that place any: so many depths from 0 to 1 in turn; 0: anywhere, evenly drawn
  seed: int = 0
  haystack: str = ''  # what needles are hidden in, see data/tasks/haystack.py; '': the task's own text
  paragraphs: str = ''  # SQuAD or HotpotQA files by a glob, for ruler_qa_*; '': invented ones
  files: str = ''  # the folder of Long Range Arena's files, see data/tasks/lra.py, for lra_*
  batch_size: int = 8  # rows read at once
  segment: int = 512  # tokens a row and call
  controls: bool = True  # the same questions without their context, too
  answers: bool = False  # how likely the right answers are, too
  too_long: str = 'error'  # than model.max_length: 'error', or 'count' and leave out

  def __post_init__(self):
    check_choices('eval.tasks', self.tasks, TASKS)
    for length in self.lengths:
      check_range('eval.lengths', length, low=1)
    for name in ('tasks', 'lengths'):
      values = getattr(self, name)
      check(len(set(values)) == len(values), f'eval.{name}={values}: has one twice; give each once')
    for name, low in dict(samples=1, depths=0, seed=0, batch_size=1, segment=1).items():
      check_range(f'eval.{name}', getattr(self, name), low=low)
    check(self.depths <= self.samples, f'eval.depths={self.depths}: must be at most eval.samples='
          f'{self.samples}, or some depths have no example')
    check_choice('eval.too_long', self.too_long, ('error', 'count'))
    self.unread()   # refuses what no task has a use for

  def sources(self) -> dict[str, str]:
    return {source: getattr(self, source) for source in SOURCES}

  def unread(self) -> list[str]:
    """Which of the sources given some tasks do not read, and whether some have no depth."""
    return unread(self.tasks, dict(self.sources(), depths=self.depths), 'eval.{}') if self.tasks else []


def check_lengths(config: Config, lengths: tuple[int, ...], max_length: int) -> None:
  """Refuses what the model is not made for, before anything is read."""
  over = tuple(n for n in lengths if max_length and n > max_length)
  check(not over or config.too_long == 'count', f'eval.lengths={over}: must be at most '
        f"model.max_length={max_length}; set eval.too_long='count' to have such examples counted and "
        'left out, or give a model.max_length that the model can do')


def settings_key(config: Config, about: Mapping[str, Any]) -> str:
  """The hash of all that an answer depends on, whatever the task; the example itself and rounding aside."""
  return _hash([about['checkpoint'], about['model'], about['tokenizer'], config.seed, 0,   # once eval.depths
                config.controls, config.answers])


def task_keys(config: Config, settings: str, digests: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
  """Of each task the hash of the settings, of what it reads and of its depths: others ask nobody else again.

  Files count by what they hold (`digests`, see data/tasks/sources.py) and not by their paths.
  """
  depths = {name: [config.depths] if config.depths and TASKS[name].placed else [] for name in config.tasks}
  return {name: _hash([settings, sources.read_by(name, config.sources(), digests[name]), *depths[name]])
          for name in config.tasks}


def _hash(parts: Any) -> str:
  return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def run(subject: Subject, config: Config, folder: str, about: Mapping[str, Any], *,
        lengths: tuple[int, ...]) -> list[records.Cell]:
  """Puts what is not answered yet; all processes of a run call it. Prints the table, writes W/tasks.md.

  Args:
    subject: who answers.
    config: what is asked.
    folder: the workdir, where tasks.jsonl is or will be.
    about: what each line tells of the model: `checkpoint`, `model` and `tokenizer` identify it, again.about says with which config.
    lengths: config.lengths, or what stands for them.
  """
  check_lengths(config, lengths, subject.max_length)
  main = jax.process_index() == 0
  for told in config.unread() if main else ():
    print(told, flush=True)
  sources.forget()
  digests = processes.of_first(processes.together(
      lambda: sources.digests(config.tasks, config.sources()) if main else {}))
  settings = settings_key(config, about)
  keys = task_keys(config, settings, digests)
  kept = processes.together(lambda: records.Records(folder, keys, enabled=main))
  maker = _Maker(subject, config, lengths)
  # What was counted as too long is an error now, if that is asked for.
  answered = [list(one) for one, line in kept.lines.items() if config.too_long == 'count' or not line['too_long']]
  done = {tuple(one) for one in processes.of_first(answered)}
  processes.together(lambda: _check(maker, kept))
  progress = course.Progress(maker.tokens(), maker.tokens(done), enabled=main)
  for batch in maker.batches(done):
    lines = [dict(key=keys[line['task']], settings=settings, **line, code=version.code_of(line['task']),
                  digests=digests[line['task']], **about)
             for line in _answered(subject, config, batch)]
    processes.together(lambda lines=lines: kept.append(lines))
    last = lines[-1]
    progress.update(f'{last["task"]} at {last["length"]:,}, example {last["index"] + 1}', sum(line['length'] for line in lines))
  progress.close()
  wanted = [one for one in maker.identities() if main]
  found = records.cells(kept.lines[one] for one in wanted)
  if main:
    text = '\n\n'.join([records.table(found, {name: floor(name, config.sources()) for name in config.tasks}),
                        *records.footnotes(found), *(one.markdown() for one in ruler_summary.compared(found))])
    print(text, flush=True)
    kept.write_table(text + '\n')
  return found


@dataclasses.dataclass(frozen=True)
class Asked:
  """An example and what it was made from."""

  task: str
  length: int
  index: int
  depth: float | None    # that was asked for
  made: Example
  tokens: np.ndarray     # of the prompt, the separator first


class _Maker:
  """The examples of an evaluation, by their index."""

  def __init__(self, subject: Subject, config: Config, lengths: tuple[int, ...]):
    self.config, self.lengths = config, lengths
    self.tokenizer, self.max_length = subject.tokenizer, subject.max_length

  def identities(self) -> Iterator[tuple]:
    for task in self.config.tasks:
      for length in self.lengths:
        yield from ((task, length, index) for index in range(self.config.samples))

  def tokens(self, of: Any = None) -> int:
    """Of all examples, or of those among `of`."""
    return sum(length for task, length, index in self.identities()
               if of is None or (task, length, index) in of)

  def make(self, task: str, length: int, index: int) -> Asked:
    c = self.config
    depth = depth_of(TASKS[task], index, c.depths)
    made = example(task, TASKS[task], self.tokenizer, length=length, index=index, seed=c.seed,
                   depth=depth, **c.sources())
    return Asked(task, length, index, depth, made, prompt_tokens(self.tokenizer, made.prompt))

  def batches(self, done: set[tuple]) -> Iterator[list[Asked]]:
    """What is left to be asked; a batch is of one task and length."""
    for task in self.config.tasks:
      for length in self.lengths:
        left = [index for index in range(self.config.samples) if (task, length, index) not in done]
        for at in range(0, len(left), self.config.batch_size):
          yield [self.make(task, length, index) for index in left[at:at + self.config.batch_size]]

  def check(self, kept: records.Records) -> list[dict]:
    """ConfigError where a length is too short for a task, or what was answered is no longer what it makes.

    Examples of one length need not be alike: where it is small one may be too long and the first be not. Those of
    kept answers are all made again, but for many long ones by the same code (version.py), which would take minutes.

    Returns: the kept lines whose task scores them otherwise now, with the score of now.
    """
    identities = list(self.identities())
    asked = {one[:2] for one in identities}   # tasks and lengths; of the others nothing is said now
    lines = {one: line for one, line in kept.lines.items() if one[:2] in asked}
    tokens = collections.Counter()
    for task, length, _ in lines:
      tokens[task, length] += length
    codes = {task: version.code_of(task) for task in self.config.tasks}
    other = {one for one, line in lines.items() if codes[one[0]] is None or line.get('code') != codes[one[0]]}
    if sum(length for _, length, _ in other) > CHEAP:
      print(f'{kept.path}: {len(other):,} answers are of other code than this; their examples are made again, to be '
            'compared', flush=True)
    for one in identities:   # the first and the last: of a benchmark's own items there may be fewer
      if one[2] in (0, self.config.samples - 1) or one[1] <= SMALL:
        self.make(*one)
    changed, scored = [], 0
    for one in (one for one in lines if one in other or tokens[one[:2]] <= CHEAP):
      line = lines[one]
      try:
        made = self.make(*one).made
      except ConfigError:
        if one[2] < self.config.samples:
          raise
        continue   # more samples than now were asked for once
      moved()
      check(_is_of(line, made), f'{kept.path}: task {one[0]!r} makes other examples of this seed than when they '
            f'were answered, such as example {one[2]} of {one[1]} tokens; remove the file, or give another workdir')
      found = _scored(line, made)
      differ = {name for name, value in found.items() if line.get(name) != value}
      if differ or (one in other and codes[one[0]] is not None):
        changed.append(line | found | dict(code=codes[one[0]]) | dict(example_sha256=_digest_of(made)))
      scored += not differ <= set(ITEMS)   # lines of before have none
    if scored:
      print(f'{kept.path}: {scored:,} answers have another score or other references now than when they were '
            'given; those of now count', flush=True)
    return changed


def _check(maker: _Maker, kept: records.Records) -> None:
  """By the first process alone, which has the lines; minutes, perhaps, and a collective would not wait as long."""
  try:
    kept.append(maker.check(kept))
  finally:
    processes.barrier('kept answers')


def _is_of(line: Mapping[str, Any], made: Example) -> bool:
  """Whether a line is of this example; how an answer is scored aside."""
  if 'example_sha256' not in line:   # lines of before it was kept
    return (line['prompt_sha256'], line['new_tokens']) == (_digest(made.prompt), made.new_tokens)
  return line['example_sha256'] == _digest_of(made)


def _scored(line: Mapping[str, Any], made: Example) -> dict[str, Any]:
  """What a line has of its example's score, as it is now; no answer is asked for."""
  score = TASKS[line['task']].score
  return _looked_for(made) | {f'{which}score': float(score(line[f'{which}written'], made))
                              for which in ('', 'control_') if line.get(f'{which}written') is not None}


def _looked_for(made: Example) -> dict[str, Any]:
  return dict(references=list(made.references)) | {name: made.info[name] for name in ITEMS if name in made.info}


def _digest_of(made: Example) -> str:
  """Of all that is asked of a model: prompt, question, right answer, room."""
  return _digest(b'%d %d %d ' % (len(made.prompt), made.question, made.new_tokens) + made.prompt + made.target)


def _digest(text: bytes) -> str:
  return hashlib.sha256(text).hexdigest()


def _answered(subject: Subject, config: Config, batch: list[Asked]) -> list[dict]:
  """A line for each example of a batch."""
  most, needs = subject.max_length, lambda one: len(one.tokens) + one.made.new_tokens
  if most and any(needs(one) > most for one in batch):
    check(config.too_long == 'count', f'eval.lengths={batch[0].length}: with its answer an example of task '
          f'{batch[0].task!r} takes {max(map(needs, batch))} tokens, and model.max_length={most}; give eval.lengths='
          f"{2 * most - max(map(needs, batch))} or eval.too_long='count'")
    each = [_answered(subject, config, [one]) if needs(one) <= most else
            [_line(config, one, too_long=True, written=None, score=None)] for one in batch]
    return [line for lines in each for line in lines]
  room = max(one.made.new_tokens for one in batch)
  if most and len(batch) > 1 and max(len(one.tokens) for one in batch) + room > most:   # each fits by itself
    return [line for one in batch for line in _answered(subject, config, [one])]
  written = _written(subject, [one.tokens for one in batch], batch, room)
  lines = [_line(config, one, too_long=False, written=text, score=float(TASKS[one.task].score(text, one.made)))
           for one, text in zip(batch, written)]
  if config.controls:
    asked = [prompt_tokens(subject.tokenizer, one.made.without_context) for one in batch]
    for line, one, text in zip(lines, batch, _written(subject, asked, batch, room)):
      line.update(control_written=text, control_score=float(TASKS[one.task].score(text, one.made)))
  if config.answers:
    targets = [subject.tokenizer.encode(one.made.target) for one in batch]
    rows = [np.concatenate([one.tokens, target]).astype(np.int32) for one, target in zip(batch, targets)]
    for line, target, scored in zip(lines, targets, subject.score(rows)):
      line.update(answer_logprob=float(scored.logprobs[-len(target):].sum()),
                  answer_greedy=bool(scored.greedy[-len(target):].all()))
  return lines


def _written(subject: Subject, prompts: list[np.ndarray], batch: list[Asked], room: int) -> list[str]:
  try:
    answers = subject.generate(prompts, room)
  except FloatingPointError as e:
    raise ConfigError(f'--workdir: {e}; evaluate another checkpoint') from e
  return [subject.tokenizer.decode(answer[:one.made.new_tokens]).decode('utf-8', 'replace')
          for answer, one in zip(answers, batch)]


def _line(config: Config, one: Asked, **answer: Any) -> dict:
  """What an example was, and how it was answered."""
  return dict(task=one.task, length=one.length, index=one.index, seed=config.seed,
              **{source: value if source in TASKS[one.task].reads else ''
                 for source, value in config.sources().items()}, text=text_of(one.task, config.sources()).words,
              **({'depths': config.depths} if TASKS[one.task].placed else {}), depth_asked=one.depth, depth=one.made.depth,
              prompt_sha256=_digest(one.made.prompt), example_sha256=_digest_of(one.made), prompt_tokens=len(one.tokens),
              new_tokens=one.made.new_tokens, **_looked_for(one.made), **answer)
