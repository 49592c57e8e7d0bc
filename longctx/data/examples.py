"""Rows of one example each: a source and what follows from it, or a text and its class.

    form='pairs'    source [B, S] the source and the separator, source_valid [B, S]; tokens SEP y1 .. yn,
                    targets y1 .. yn SEP
    form='labels'   tokens SEP x1 .. xn; one target a row, the number of the class, at the separator

Pairs come from data.generator or from lines `source TAB target` of the files of data.files; labelled texts
from data.generator or from a folder as aclImdb has it, ROOT/train/CLASS/*.txt and ROOT/test/CLASS/*.txt. Either may
be a URL (remote.py).
Splits are by the hash of the source (SplitRule), so that no split has a source of another, in whatever lines
or files it stands. Only a folder of classes has a test split of its own, which is taken as its authors made it:
what it has of ROOT/train too stays in both. An example that is longer than a row is left out or cut as
data.long_documents says, and counted.
Held by: tests/test_data_examples.py.

B batch  T tokens of a target or text  S tokens of a source
"""

import dataclasses
import hashlib
import pathlib
import sys
from typing import Any

import numpy as np

from longctx import files
from longctx.data import generators, packing
from longctx.data.corpus import SplitRule, matching
from longctx.data.remote import RemoteFile, is_url
from longctx.data.tasks.example import generator
from longctx.data.tokenizer import Tokenizer
from longctx.errors import ConfigError, check

HELD_OUT = 512    # examples of a generated split that is not trained on
COUNTED = 256     # of an endless one, for the accounting
TRIES = 10_000    # of one example, until one is of the split and fits


@dataclasses.dataclass(frozen=True)
class Example:
  """Tokens without separators."""

  source: np.ndarray
  target: np.ndarray | int     # int: the class
  cut: int = 0                 # tokens that were left out


class Fit:
  """Makes tokens of an example, as long as a row may be; None where it is left out."""

  def __init__(self, config: Any, tokenizer: Tokenizer):
    self.trims = config.long_documents == 'trim'
    self.tokenizer = tokenizer
    pairs = config.form == 'pairs'
    # A separator is besides, before a target or a text and after a source.
    self.room = config.source_length - 1 if pairs else config.length - 1
    self.target_room = config.length - 1

  def __call__(self, source: bytes, target: bytes | int, name: str) -> Example | None:
    source_ids = self.tokenizer.encode(source, name)
    target_ids = target if isinstance(target, int) else self.tokenizer.encode(target, name)
    over = max(0, len(source_ids) - self.room)
    if not isinstance(target, int):
      over += max(0, len(target_ids) - self.target_room)
      target_ids = target_ids[:self.target_room]
    if over and not self.trims:
      return None
    return Example(source_ids[:self.room], target_ids, over)


class Generated:
  """Endless examples of the train split, HELD_OUT of the others."""

  def __init__(self, config: Any, fit: Fit, split: str, seed: int):
    self.name, self.split, self.fit = config.generator, split, fit
    self.make = {**generators.PAIRS, **generators.LABELS}[self.name]
    self.rule, self.seed = rule_of(config), seed
    share = {'validation': config.validation_fraction, 'test': config.test_fraction}.get(split, 1.0)
    check(share > 0, f'data.{split}_fraction={share}: the {split} split of data.generator='
          f'{self.name!r} is empty; give it a part, such as 0.05')
    self.count = 0 if split == 'train' else HELD_OUT
    self.content = f'generated {self.name}'

  def __getitem__(self, i: int) -> Example:
    for attempt in range(TRIES):
      source, target = self.make(generator(self.name, self.split, self.seed, i, attempt))
      if self.rule.holds(source.decode(), self.split):
        found = self.fit(source, target, self.name)
        if found is not None:
          return found
    raise ConfigError(f'data.generator={self.name!r}: none of {TRIES} examples of the {self.split} split '
                      f'fits data.length={self.fit.target_room + 1}'
                      + (f', data.source_length={self.fit.room + 1}' if self.name in generators.PAIRS
                         else '') + "; give longer rows, or data.long_documents='trim'")

  def accounting(self) -> dict:
    some = [self[i] for i in range(self.count or COUNTED)]
    return dict(_counts(some, self.fit.tokenizer), rows_per_epoch=self.count)


class Given:
  """Examples of files, all in memory; in an order of their own each epoch."""

  def __init__(self, named: list[tuple[str, bytes, bytes | int]], fit: Fit, split: str, seed: int,
               what: str):
    check(bool(named), f'data.files={what!r}: the {split} split is empty; give more examples, or other '
          'data.validation_fraction and data.test_fraction')
    fitted = [fit(source, target, name) for name, source, target in named]
    self.examples = [x for x in fitted if x is not None]
    self.dropped = len(fitted) - len(self.examples)
    check(bool(self.examples), f"data.long_documents='drop': all {len(fitted)} examples of the {split} "
          f'split of {what!r} are longer than a row; give longer rows, or data.long_documents=\'trim\'')
    self.count, self.fit = len(self.examples), fit
    self.content = hashlib.sha256(repr([
        (x.source.tolist(), x.target if isinstance(x.target, int) else x.target.tolist())
        for x in self.examples]).encode()).hexdigest()
    self.order = packing.PerEpoch(lambda epoch: packing.shuffled(self.count, seed, 1 + epoch))

  def __getitem__(self, i: int) -> Example:
    epoch, at = divmod(i, self.count)
    return self.examples[int(self.order(epoch)[at])]

  def accounting(self) -> dict:
    return dict(_counts(self.examples, self.fit.tokenizer), rows_per_epoch=self.count,
                dropped_documents=self.dropped)


def _counts(examples: list[Example], tokenizer: Tokenizer) -> dict:
  """Of targets: a class is one token, and one byte of text, so that its bits can be told."""
  targets = [x.target for x in examples]
  if isinstance(targets[0], int):
    size = dict(bytes=len(targets), tokens=len(targets))
  else:
    size = dict(bytes=int(sum(tokenizer.num_bytes(x).sum() for x in targets)),
                tokens=sum(len(x) + 1 for x in targets))
  return dict(documents=len(examples), **size, trimmed_tokens=sum(x.cut for x in examples),
              documents_cut=sum(x.cut > 0 for x in examples))


def rule_of(config: Any) -> SplitRule:
  return SplitRule(kind='hash', validation=config.validation_fraction, test=config.test_fraction)


def _named(source: bytes) -> str:
  """What a SplitRule knows a source by."""
  return source.decode('utf-8', 'surrogateescape')


def read_pairs(pattern: str) -> list[tuple[str, bytes, bytes]]:
  """(place, source, target) of every line of the files that a glob matches."""
  paths = matching(pattern)
  check(bool(paths), f'data.files={pattern!r}: matches no file; give files of lines `source TAB target`')
  found = []
  for path in paths:
    for number, line in enumerate(_read(path).splitlines(), start=1):
      if not line.strip():
        continue
      fields = line.split(b'\t')
      check(len(fields) == 2, f'{path}:{number}: has {len(fields) - 1} tabs; must have one, between '
            'source and target')
      found.append((f'{path}:{number}', fields[0], fields[1]))
  return found


def read_folder(root: str, split: str, rule: SplitRule) -> list[tuple[str, bytes, int]]:
  """(name, text, class) of a split; classes are the folders of ROOT/test, by name."""
  classes = folder_classes(root)
  rule = dataclasses.replace(rule, test=0.0)   # of the train folder a part is the validation split
  found = ((name, _read(file), classes.index(label))
           for name, label, file in _texts(root, 'test' if split == 'test' else 'train') if label in classes)
  return [x for x in found if split == 'test' or rule.holds(_named(x[1]), split)]


def _texts(root: str, part: str) -> list[tuple[str, str, pathlib.Path | RemoteFile]]:
  """(PART/CLASS/FILE, CLASS, the file) of all of ROOT/PART/CLASS/*.txt, by name."""
  found = []
  for file in matching(f'{root.rstrip("/")}/{part}/*/*.txt'):
    label, name = str(file).split('/')[-2:]
    found.append((f'{part}/{label}/{name}', label, file))
  return sorted(found, key=lambda x: x[:2])


def folder_classes(root: str) -> list[str]:
  if is_url(root):   # folders are only where files are
    tested, trained = ({label for _, label, _ in _texts(root, part)} for part in ('test', 'train'))
  else:
    base = pathlib.Path(root).expanduser()
    tested, trained = ({p.name for p in base.glob(f'{part}/*') if p.is_dir()} for part in ('test', 'train'))
  missing = sorted(tested - trained)
  check(len(tested) >= 2 and not missing, f'data.files={root!r}: must be a folder with train/CLASS/*.txt '
        f'and test/CLASS/*.txt, of at least two classes (as aclImdb); its test has {sorted(tested)}'
        + (f', and its train lacks {missing}' if missing else ''))
  return sorted(tested)


def _read(file: pathlib.Path | RemoteFile) -> bytes:
  def read() -> bytes:
    with file.open('rb') as opened:
      return opened.read()
  try:
    return files.patiently(f'data.files: {str(file)!r}', read)
  except OSError as e:
    raise ConfigError(f'data.files: {str(file)!r} cannot be read: {e.strerror or e}') from e


def num_classes(config: Any) -> int:
  """Of data.form='labels'."""
  if config.corpus == 'generated':
    return len(generators.CLASSES[config.generator])
  return len(folder_classes(config.files))


def open_examples(config: Any, tokenizer: Tokenizer, split: str, seed: int) -> Generated | Given:
  fit = Fit(config, tokenizer)
  if config.corpus == 'generated':
    return Generated(config, fit, split, seed)
  rule = rule_of(config)
  if config.form == 'labels':
    named = read_folder(config.files, split, rule)
  else:
    named = [x for x in read_pairs(config.files) if rule.holds(_named(x[1]), split)]
  return Given(named, fit, split, seed, config.files)


class ExampleRows:
  """Batch i of this host, for any i; as stream.BatchSource."""

  def __init__(self, config: Any, examples: Generated | Given, *, dtypes: dict, host_index: int,
               num_hosts: int):
    share = config.batch_size // num_hosts
    self._rows = range(host_index * share, (host_index + 1) * share)
    self._config, self._examples, self._dtypes = config, examples, dtypes
    self.num_rows = examples.count

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    length = lambda name: self._config.source_length if name.startswith('source') else self._config.length
    batch = {name: np.zeros((len(self._rows), length(name)), dtype)
             for name, dtype in self._dtypes.items()}
    for local, row in enumerate(self._rows):
      self._fill({k: v[local] for k, v in batch.items()},
                 self._examples[i * self._config.batch_size + row])
    return batch

  def _fill(self, row: dict[str, np.ndarray], example: Example) -> None:
    separator = self._examples.fit.tokenizer.separator
    if isinstance(example.target, int):
      text = np.append(separator, example.source)
      row['targets'][0], row['loss_mask'][0] = example.target, 1
    else:
      text = np.append(separator, example.target)
      row['targets'][:len(text)] = np.append(example.target, separator)
      row['loss_mask'][:len(text)] = 1
      source = np.append(example.source, separator)
      row['source'][:len(source)], row['source_valid'][:len(source)] = source, True
    row['tokens'][:len(text)] = text
    row['positions'][:len(text)] = np.arange(len(text))
    row['segment_ids'][:len(text)] = 1
    row['document_start'][0] = True

  def accounting(self) -> dict:
    return self._examples.accounting()
