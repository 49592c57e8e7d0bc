"""What a task is: prompts made from a seed, answers scored, and the score of guessing known.

An example is text: a prompt, and what is right to write after it. Its length is counted in the
tokens of the model that reads it,

    length = 1 (the separator) + tokens of the prompt + new_tokens

and is met exactly. Example `index` of a task, length and seed is the same whatever else is drawn,
on any host: its numbers come from Philox with the hash of all that names it as the key.
Held by: tests/test_tasks.py (laws of every task).
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from longctx.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
  """A prompt and what is right to write after it."""

  prompt: bytes                  # all that is read: context, question, the begin of the answer
  question: int                  # first byte of the prompt that is no context
  target: bytes                  # what a model that knows all writes next; training learns it
  references: tuple[str, ...]    # what is looked for in the answer
  new_tokens: int                # that an answer may take
  # where needles[0] begins: 0 the context begins with it, 1 ends with it
  depth: float | None = None
  # bytes [start, stop) of the prompt that the answer needs
  needles: tuple[tuple[int, int], ...] = ()
  # What a task's score needs, and 'choices' where a guesser picks among answers: see Task.floor.
  info: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def without_context(self) -> bytes:
    """The control: the same question about nothing."""
    return self.prompt[self.question:]


# What a task may be given text by; the fields of Draw.
SOURCES = ('haystack', 'paragraphs', 'files')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draw:
  """What an example is made from."""

  rng: np.random.Generator
  tokenizer: Tokenizer
  length: int                    # tokens, answer and separator too
  index: int                     # of the example among those of its length
  depth: float | None = None     # where the needle is to begin; None: the task draws it, uniformly
  # what needles are hidden in, see haystack.of; '': the task's own text
  haystack: str = ''
  paragraphs: str = ''           # the glob of SQuAD or HotpotQA files; '': invented documents
  files: str = ''                # the folder of a benchmark's own files, for tasks that read them
  seed: Any = 0                  # which rng comes from; for what is drawn once for all examples
  setting: str = 'eval.{}'       # what its user knows a source by

  def count(self, text: bytes) -> int:
    """Tokens of a text in the model's own tokenizer."""
    return len(self.tokenizer.encode(text))

  def label(self, source: str) -> str:
    """One of SOURCES as its user gave it, for errors."""
    return f'{self.setting.format(source)}={getattr(self, source)!r}'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """A kind of examples, and how answers to them are scored.

  Attributes:
    make: a Draw -> an Example of exactly its length; ConfigError with the least length if that is
      too short.
    score: (what a model wrote, its example) -> 0 to 1.
    floor: the mean score of guessing: of one who has read the rules and not the context, and says
      what is most often right; where examples have info['choices'], of one who says any of these. With
      text of others it may be another: see table.floor.
    source: paper and section, or the file whose generator this follows.
    published: 'model at length' -> score in percent, where there is a number to compare with.
    exact: whether lengths are met exactly; else they are bounds, as in the benchmark that is
      repeated, and do not count the separator.
    reads: which of SOURCES it reads, where they are given; it cannot do without 'files'.
    own: of these, what its own text is, where none is given; '': one sentence over and over.
    instead_of: of these, whose text the published task has, for which made-up text stands in.
    placed: whether the first needle stands at the depth that is asked for; else there is none to place.
    floor_without: of these, those whose text must be the task's own for the floor to be that of guessing.
  """

  make: Callable[[Draw], Example]
  score: Callable[[str, Example], float]
  floor: float
  source: str
  published: Mapping[str, float] = dataclasses.field(default_factory=dict)
  exact: bool = True
  reads: tuple[str, ...] = ()
  own: Mapping[str, str] = dataclasses.field(default_factory=dict)
  instead_of: Mapping[str, str] = dataclasses.field(default_factory=dict)
  placed: bool = True
  floor_without: tuple[str, ...] = ()


def generator(*names: Any) -> np.random.Generator:
  """Numbers that depend on the names alone."""
  key = hashlib.sha256(repr(names).encode()).digest()[:16]
  return np.random.Generator(np.random.Philox(key=int.from_bytes(key, 'little')))


def depth_of(task: Task, index: int, depths: int) -> float | None:
  """Where the needle of example `index` is asked for: `depths` places from 0 to 1 in turn; 0: anywhere."""
  if not task.placed:
    return None
  if depths < 2:
    return 0.5 if depths else None
  return float(np.linspace(0, 1, depths)[index % depths])


def example(name: str, task: Task, tokenizer: Tokenizer, *, length: int, index: int, seed: Any = 0,
            depth: float | None = None, haystack: str = '', paragraphs: str = '',
            files: str = '', setting: str = 'eval.{}') -> Example:
  """Example `index` of a task; the same for the same arguments everywhere.

  Args:
    seed: a number, or names.
    setting: what the user knows one of SOURCES by, for errors: 'data.task_{}', '--{}'.
  """
  made = task.make(Draw(rng=generator(name, length, seed, index), tokenizer=tokenizer,
                        length=length, index=index, depth=depth, haystack=haystack,
                        paragraphs=paragraphs, files=files,
                        seed=seed, setting=setting))
  tokens = 1 + len(tokenizer.encode(made.prompt)) + made.new_tokens
  if tokens != length if task.exact else tokens - 1 > length:
    raise AssertionError(f'{name}: example {index} has {tokens} tokens, not {length}')
  return made
