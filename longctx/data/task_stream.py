"""Rows of task examples without an end, for training: row n of a seed is the same on any host.

A row is one example: SEP, the prompt, the right answer; after it SEP is to be foretold, for there the answer
ends. What is learned is the answer (task_loss='answer') or every token ('all'). Row n draws its task among
data.tasks and its length among data.task_lengths (data.length where there are none), each as often; what a
row has room for besides is padding. Examples of evaluation have a seed of another kind, so that none of them
is trained on; so have the held-out splits.
Held by: tests/test_data_task_stream.py.
"""

import hashlib
import sys
from typing import Any

import numpy as np

from longctx.data.stream import DTYPES
from longctx.data.tasks import sources
from longctx.data.tasks.example import Example, example, generator
from longctx.data.tasks.table import TASKS, unread
from longctx.data.tokenizer import Tokenizer
from longctx.errors import check_choices

COUNTED = 64    # examples that the accounting tells of
HELD_OUT = 64   # documents of the validation and the test split
SETTING = 'data.task_{}'   # what a source is known by here


class Examples:
  """Example n of a split, for any n."""

  def __init__(self, config: Any, tokenizer: Tokenizer, split: str, seed: int):
    check_choices('data.tasks', config.tasks, TASKS)
    self.tokenizer = tokenizer
    self._config, self._names = config, (split, seed)
    self._lengths = config.task_lengths or (config.length,)
    given = dict(haystack=config.task_haystack, files=config.task_files)
    unread(config.tasks, given, SETTING)
    # Files count by what they hold and not by their paths, as in evaluation.
    digests = sources.digests(config.tasks, given, SETTING)
    texts = [tuple(of[source] for of in digests.values() if source in of) or value for source, value in given.items()]
    # What is too short for a task is refused before anything is trained.
    first = [self._made(name, length, 0) for name in config.tasks for length in sorted(self._lengths)[:1]]
    seen = hashlib.sha256(repr((config.tasks, self._lengths, config.task_loss, *texts,
                                [one.prompt for one in first])).encode())
    self.content = seen.hexdigest()

  def _made(self, name: str, length: int, index: int) -> Example:
    return example(name, TASKS[name], self.tokenizer, length=length, index=index, seed=self._names,
                   haystack=self._config.task_haystack, files=self._config.task_files, setting=SETTING)

  def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
    """(SEP, prompt, answer; how many of these tokens the answer has)."""
    rng = generator('rows', *self._names, index)
    name = self._config.tasks[rng.integers(len(self._config.tasks))]
    one = self._made(name, int(self._lengths[rng.integers(len(self._lengths))]), index)
    answer = self.tokenizer.encode(one.target)
    return np.concatenate([[self.tokenizer.separator], self.tokenizer.encode(one.prompt),
                           answer]).astype(np.int32), len(answer)


class TaskSource:
  """Batch i of this host, for any i; see stream.BatchSource."""

  def __init__(self, config: Any, examples: Examples, *, host_index: int, num_hosts: int):
    share = config.batch_size // num_hosts
    self._rows = range(host_index * share, (host_index + 1) * share)
    self._config, self._examples = config, examples

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    shape = (len(self._rows), self._config.length)
    batch = {name: np.zeros(shape, dtype) for name, dtype in DTYPES.items()}
    for local, row in enumerate(self._rows):
      tokens, asked = self._examples[i * self._config.batch_size + row]
      count = len(tokens)
      batch['tokens'][local, :count] = tokens
      batch['targets'][local, :count] = np.append(tokens[1:], tokens[0])
      learned = count if self._config.task_loss == 'all' else asked + 1   # the separator after it too
      batch['loss_mask'][local, count - learned:count] = 1
      batch['positions'][local, :count] = np.arange(count)
      batch['segment_ids'][local, :count] = 1
      batch['document_start'][local, 0] = True
    return batch

  def accounting(self) -> dict:
    """Of the first examples; there is no end of them."""
    tokens = [self._examples[n][0] for n in range(COUNTED)]
    total = sum(map(len, tokens))
    return dict(examples_counted=COUNTED, tokens=total,
                bytes=int(sum(self._examples.tokenizer.num_bytes(one).sum() for one in tokens)),
                padding_fraction=1 - total / COUNTED / self._config.length)


class TaskDocuments:
  """A held-out split as documents, for perplexity by position; see stream.Documents."""

  def __init__(self, examples: Examples):
    self.tokenizer = examples.tokenizer
    self._documents = [examples[n][0] for n in range(HELD_OUT)]
    self.content = hashlib.sha256(b''.join([examples.content.encode(), *self._documents])).hexdigest()
    self.lengths = np.array([len(one) for one in self._documents])
    self.total_tokens = int(self.lengths.sum())
    self.total_bytes = int(sum(self.tokenizer.num_bytes(one).sum() for one in self._documents))

  def __len__(self) -> int:
    return len(self._documents)

  def document(self, i: int) -> np.ndarray:
    if not 0 <= i < len(self):
      raise IndexError(f'document {i} of {len(self)}')
    return self._documents[i]
