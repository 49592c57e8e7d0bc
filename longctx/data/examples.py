"""Rows of one example each: a source and what follows from it, or a text and its class.

    form='pairs'    source [B, S] the source and the separator, source_valid [B, S]; tokens SEP y1 .. yn,
                    targets y1 .. yn SEP
    form='labels'   tokens SEP x1 .. xn; one target a row, the number of the class, at the separator

Pairs come from data.generator or from lines `source TAB target` of the files of data.files; labelled texts
from data.generator or from a folder as aclImdb has it, ROOT/train/CLASS/*.txt and ROOT/test/CLASS/*.txt. Either may
be a URL (remote.py). What files give is tokenised once, by all processes together, and kept as other text is
(cache.py): example i is the documents 2i, its source or text, and 2i + 1, its target or its class in digits. A part
is a group of whole files of corpus.PART bytes, so of one huge file of pairs one process makes all.
A process holds some 50 bytes for each example (while it opens them, twice as many), and no tokens.
Splits are by the hash of the source (SplitRule), so that no split has a source of another, in whatever lines
or files it stands. Only a folder of classes has a test split of its own, which is taken as its authors made it:
what it has of ROOT/train too stays in both. An example that is longer than a row is left out or cut as
data.long_documents says, and counted.
Held by: tests/test_data_examples.py.

B batch  T tokens of a target or text  S tokens of a source
"""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator
from concurrent import futures
from typing import Any

import numpy as np

from longctx import files
from longctx.data import cache, corpus, generators, packing
from longctx.data.corpus import SplitRule, matching
from longctx.data.remote import RemoteFile, is_url
from longctx.data.tasks.example import generator
from longctx.data.tokenizer import Tokenizer
from longctx.errors import ConfigError, check

HELD_OUT = 512    # examples of a generated split that is not trained on
COUNTED = 256     # of an endless one, for the accounting
TRIES = 10_000    # of one example, until one is of the split and fits
READ = 4096       # targets that are left out or cut and read, to tell their bytes
READERS = 16      # threads that do, since behind a URL each waits
WHOLE = SplitRule(kind='hash', validation=0.0, test=0.0)   # of a file


@dataclasses.dataclass(frozen=True)
class Example:
  """Tokens without separators."""

  source: np.ndarray
  target: np.ndarray | int     # int: the class
  cut: int = 0                 # tokens that were left out


class Fit:
  """How long the parts of an example may be."""

  def __init__(self, config: Any, tokenizer: Tokenizer):
    self.trims = config.long_documents == 'trim'
    self.tokenizer = tokenizer
    self.is_pairs = config.form == 'pairs'
    # A separator is besides, before a target or a text and after a source.
    self.room = config.source_length - 1 if self.is_pairs else config.length - 1
    self.target_room = config.length - 1

  def over(self, sizes: np.ndarray) -> np.ndarray:
    """Tokens [.., 2] of sources and targets that a row has no room for; of classes none."""
    return np.maximum(sizes - np.array([self.room, self.target_room]), 0) * np.array([1, int(self.is_pairs)])

  def __call__(self, source: bytes, target: bytes | int, name: str) -> Example | None:
    """The tokens of an example, as many as a row may have; None where it is left out."""
    source_ids = self.tokenizer.encode(source, name)
    target_ids = target if isinstance(target, int) else self.tokenizer.encode(target, name)
    over = self.over(np.array([len(source_ids), 0 if isinstance(target, int) else len(target_ids)]))
    if over.any() and not self.trims:
      return None
    return Example(source_ids[:self.room], target if isinstance(target, int) else target_ids[:self.target_room],
                   int(over.sum()))


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
  """Examples of files, whose tokens are in a cache; in an order of their own each epoch."""

  def __init__(self, store: cache.Cache, fit: Fit, split: str, seed: int, what: str):
    self.fit, self.content = fit, store.content
    self._store = store
    self._lengths = store.lengths.reshape(-1, 2)   # each with its leading separator
    fits = ~self._over().any(axis=1) | fit.trims
    check(bool(fits.any()), f"data.long_documents='drop': all {len(fits)} examples of the {split} "
          f"split of {what!r} are longer than a row; give longer rows, or data.long_documents='trim'")
    self._kept = np.flatnonzero(fits)
    self.count = len(self._kept)
    self.order = packing.PerEpoch(lambda epoch: packing.shuffled(self.count, seed, 1 + epoch))

  def _over(self) -> np.ndarray:
    return self.fit.over(self._lengths - 1)

  def __getitem__(self, i: int) -> Example:
    epoch, at = divmod(i, self.count)
    example = int(self._kept[self.order(epoch)[at]])
    lengths = self._lengths[example]
    over = self.fit.over(lengths - 1)
    source, target = (lengths - over).tolist()
    if over[0]:
      source_ids, target_ids = (self._store.read(2 * example + j, 0, size) for j, size in enumerate((source, target)))
    else:   # one read
      both = self._store.read(2 * example, 0, source + target)
      source_ids, target_ids = both[:source], both[source:]
    source_ids, target_ids = (ids[1:].astype(np.int32) for ids in (source_ids, target_ids))
    return Example(source_ids, target_ids if self.fit.is_pairs else int(self.fit.tokenizer.decode(target_ids)),
                   int(over.sum()))

  def accounting(self) -> dict:
    """Of targets, as `_counts`; where more than READ are left out or cut, their bytes are told by so many of them."""
    over, told = self._over(), {}
    size = dict(bytes=self.count, tokens=self.count)
    if self.fit.is_pairs:
      lost = over[:, 1].copy() if self.fit.trims else np.where(over.any(axis=1), self._lengths[:, 1] - 1, 0)
      lost_bytes, num_read = self._lost_bytes(lost)
      size = dict(bytes=self._store.meta['second_bytes'] - lost_bytes,
                  tokens=int((self._lengths[self._kept, 1] - over[self._kept, 1]).sum()))
      told = {'examples_counted': num_read} if num_read < np.count_nonzero(lost) else {}
    cut = over[self._kept].sum(axis=1)
    return dict(documents=self.count, **size, trimmed_tokens=int(cut.sum()), documents_cut=int(np.count_nonzero(cut)),
                rows_per_epoch=self.count, dropped_documents=len(self._lengths) - self.count, **told)

  def _lost_bytes(self, lost: np.ndarray) -> tuple[int, int]:
    """(bytes of so many last tokens of each target, of how many targets they were read)."""
    found = np.flatnonzero(lost)
    some = found[np.linspace(0, len(found) - 1, min(READ, len(found))).astype(int)]
    def num_bytes(example: int) -> int:
      length = int(self._lengths[example, 1])
      ids = self._store.read(2 * example + 1, length - int(lost[example]), length)
      return int(self.fit.tokenizer.num_bytes(ids).sum())
    with futures.ThreadPoolExecutor(READERS) as pool:
      total = sum(pool.map(num_bytes, some.tolist()))
    return total if len(some) == len(found) else round(total * int(lost.sum()) / int(lost[some].sum())), len(some)


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


@dataclasses.dataclass(frozen=True)
class File:
  """A file of lines `source TAB target`, or the text of a class."""

  name: str           # what messages call it
  path: pathlib.Path | RemoteFile
  label: int | None   # its class; None: it has pairs
  stat: tuple         # (bytes, what changes when it is written)

  def examples(self) -> Iterator[tuple[str, bytes, bytes]]:
    """(place, source, target or the digits of the class) of each."""
    if self.label is not None:
      yield self.name, _read(self.path), b'%d' % self.label
      return
    for number, line in enumerate(_lines(corpus.read_chunks(self.path, WHOLE, 'train')), start=1):
      if not line.strip():
        continue
      fields = line.split(b'\t')
      check(len(fields) == 2, f'{self.name}:{number}: has {len(fields) - 1} tabs; must have one, between '
            'source and target')
      yield f'{self.name}:{number}', fields[0], fields[1]


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
  """As bytes.splitlines has them, of chunks that may end anywhere."""
  left = b''
  for chunk in chunks:
    *whole, left = (left + chunk).splitlines(keepends=True)
    if left.endswith(b'\n'):   # behind a \r there may be one
      whole.append(left)
      left = b''
    yield from (line.rstrip(b'\r\n') for line in whole)
  if left:
    yield left.rstrip(b'\r\n')


@dataclasses.dataclass(frozen=True)
class ExampleSource:
  """Examples of files as documents, two each; as corpus.FileSource."""

  label: str
  what: str                 # data.files
  files: tuple[File, ...]
  rule: SplitRule | None    # of sources; None: all are in the split

  num_copies = 0   # none is looked for

  def examples(self, split: str) -> Iterator[tuple[str, bytes, bytes]]:
    """(place, source, target or the digits of the class) of each example of a split."""
    for file in self.files:
      for place, source, target in file.examples():
        if self.rule is None or self.rule.holds(_named(source), split):
          yield place, source, target

  def documents(self, split: str) -> Iterator[tuple[str, Iterator[bytes]]]:
    for place, *example in self.examples(split):
      for document in example:   # whole: a tokenizer may join what a chunk's end would part
        yield place, iter([document])

  def fingerprint(self, split: str) -> list:
    """Changes when a file is added, removed, renamed or written, or a class has another number."""
    del split   # the rule decides
    return [self.label, dataclasses.astuple(self.rule) if self.rule else '',
            [[_absolute(file.path), file.label, *file.stat] for file in self.files]]

  def continues(self, split: str) -> bool:
    """A part begins with an example."""
    return False

  def explain_empty(self, split: str) -> str:
    return (f'data.files={self.what!r}: the {split} split is empty; give more examples, or other '
            'data.validation_fraction and data.test_fraction')

  def parts(self, split: str) -> list['ExampleSource']:
    """Sources of at least PART bytes, the last but for its rest, each of whole files."""
    del split
    groups, size = [[]], 0
    for file in self.files:
      if size >= corpus.PART:
        groups.append([])
        size = 0
      groups[-1].append(file)
      size += file.stat[0]
    return [dataclasses.replace(self, files=tuple(group)) for group in groups]


def _absolute(path: pathlib.Path | RemoteFile) -> str:
  return str(path) if isinstance(path, RemoteFile) else os.path.abspath(path)


def pair_source(pattern: str, rule: SplitRule) -> ExampleSource:
  """The lines of the files that a glob matches."""
  paths = matching(pattern)
  check(bool(paths), f'data.files={pattern!r}: matches no file; give files of lines `source TAB target`')
  return ExampleSource('pairs', pattern, tuple(File(str(path), path, None, corpus._stat(path)) for path in paths), rule)


def folder_source(root: str, split: str, rule: SplitRule) -> ExampleSource:
  """The texts of a folder of which a split is a part; classes are the folders of ROOT/test, by name."""
  classes = folder_classes(root)
  rule = dataclasses.replace(rule, test=0.0)   # of the train folder a part is the validation split
  found = tuple(File(name, path, classes.index(label), corpus._stat(path))
                for name, label, path in _texts(root, 'test' if split == 'test' else 'train') if label in classes)
  return ExampleSource('labels', root, found, None if split == 'test' else rule)


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


def open_examples(config: Any, tokenizer: Tokenizer, split: str, seed: int, builders: tuple[int, int] = (0, 1)
                  ) -> Generated | Given:
  """`builders`: (i, n) of n processes that tokenise together."""
  fit = Fit(config, tokenizer)
  if config.corpus == 'generated':
    return Generated(config, fit, split, seed)
  rule = rule_of(config)
  source = (folder_source(config.files, split, rule) if config.form == 'labels' else
            pair_source(config.files, rule))
  store = cache.open_cache(source, split, tokenizer, config.cache_dir, share=builders,
                           processes=config.build_processes, pairs=True)
  return Given(store, fit, split, seed, config.files)


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
