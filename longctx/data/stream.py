"""The data stream: batches of tokens, a pure function of the seed and the batch's index.

A batch is a dict of arrays [B, T] (this host's rows of the global batch):

    tokens, targets  int32    inputs and the tokens that follow them
    loss_mask        float32  1 where there is a pair to learn, 0 on padding
    positions        int32    within the document, from 0
    segment_ids      int32    equal within a document, different in its neighbours; 0 is padding
    document_start   bool     where a document begins, and with it the state that models carry

form='packed': rows are independent. form='segments': row b of a batch carries on where row b of the
batch before ended, and so does the state; with `align` a document begins a row, and the rest of its last row
is padding, so that models read whole segments of memory in any order of theirs. form='masked': rows as
packed, some of whose tokens are hidden and are the targets (masking.py). form='pairs' and 'labels': one
example a row, with a source and with a class (examples.py). Grain reads batches ahead in threads; its state is the
index of the next batch, whatever the number of hosts.
Held by: tests/test_data_stream.py.

B batch  T tokens of a row
"""

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from longctx.data import cache, corpus, examples, generators, packing
from longctx.data.masking import MaskedRows
from longctx.data.tokenizer import Tokenizer, load_tokenizer
from longctx.errors import ConfigError, check, check_choice, check_range

Batch = dict[str, np.ndarray]
DTYPES = {'tokens': np.int32, 'targets': np.int32, 'loss_mask': np.float32,
          'positions': np.int32, 'segment_ids': np.int32, 'document_start': np.bool_}
SOURCE_DTYPES = {'source': np.int32, 'source_valid': np.bool_}   # of form='pairs', besides
EXAMPLES = ('pairs', 'labels')   # forms of one example a row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  corpus: str = 'stdlib'             # 'stdlib', 'files', 'tfds', 'tasks' or 'generated'
  files: str = ''                    # a glob, for corpus='files', of paths or a URL; ** goes through folders
  generator: str = ''                # one of generators.py, for corpus='generated'
  tfds_name: str = ''                # as TensorFlow Datasets has it, for corpus='tfds'
  tfds_dir: str = ''                 # '' is TFDS's own folder
  tfds_splits: tuple[str, ...] = ()  # three, such as ('train[:90%]', 'train[90%:]', 'test')
  text_feature: str = 'text'         # the feature of a TFDS example that holds the text
  tasks: tuple[str, ...] = ()        # for corpus='tasks': names of data/tasks/table.py
  task_loss: str = 'answer'          # what of an example is learned: 'answer' or 'all'
  task_lengths: tuple[int, ...] = ()   # of the examples, drawn at random; (): data.length
  task_haystack: str = ''            # what needles are hidden in; see data/tasks/haystack.py
  task_files: str = ''               # the folder of Long Range Arena's files; see data/tasks/lra.py
  split: str = 'hash'                # 'hash': whole documents; 'contiguous': a part of each
  validation_fraction: float = 0.05
  test_fraction: float = 0.05
  tokenizer: str = 'bytes'           # or the path of a SentencePiece .model file
  form: str = 'packed'               # 'segments', 'masked', 'pairs' or 'labels'
  align: bool = False                # form='segments': each document begins a row of its own
  length: int = 256                  # tokens of a row
  source_length: int = 0             # form='pairs': tokens of a row's source
  mask_rate: float = 0.15            # form='masked': of the tokens so many are to be guessed
  batch_size: int = 8                # rows of all hosts together
  long_documents: str = 'split'      # longer than a row: 'split', 'trim' or 'drop'
  cache_dir: str = ''                # folder or URL; '' is $XDG_CACHE_HOME/longctx or ~/.cache/longctx
  build_processes: int = 0           # that each process tokenises a large corpus with; 0: one a core
  prefetch: int = 4                  # batches read ahead
  threads: int = 1                   # 0 reads in the calling thread

  def __post_init__(self):
    check_choice('data.corpus', self.corpus, ('stdlib', 'files', 'tfds', 'tasks', 'generated'))
    for field, owner in (('files', 'files'), ('tfds_name', 'tfds'), ('tasks', 'tasks'),
                         ('generator', 'generated')):
      value = getattr(self, field)
      check(bool(value) or self.corpus != owner,
            f"data.{field}={value!r}: data.corpus={owner!r} needs it")
      check(not value or self.corpus == owner, f'data.{field}={value!r}: is not read with '
            f'data.corpus={self.corpus!r}; set data.corpus={owner!r}')
    check(len(self.tfds_splits) in (0, 3), f'data.tfds_splits={self.tfds_splits}: must be empty '
          'or three names, of train, validation and test')
    for field, unset in (('tfds_dir', ''), ('tfds_splits', ()), ('text_feature', 'text')):
      value = getattr(self, field)
      check(value == unset or self.corpus == 'tfds', f'data.{field}={value!r}: is not read with '
            f"data.corpus={self.corpus!r}; set data.corpus='tfds'")
    self._check_tasks()
    check_choice('data.split', self.split, ('hash', 'contiguous'))
    check_range('data.validation_fraction', self.validation_fraction, 0, 1)
    check_range('data.test_fraction', self.test_fraction, 0, 1)
    held_out = self.validation_fraction + self.test_fraction
    check(held_out < 1, f'data.validation_fraction + data.test_fraction = {held_out}: must be '
          'below 1, the rest is the train split')
    check_choice('data.form', self.form, ('packed', 'segments', 'masked', *EXAMPLES))
    check_choice('data.long_documents', self.long_documents, ('split', 'trim', 'drop'))
    self._check_examples()
    check(self.form != 'segments' or self.long_documents == 'split',
          f"data.long_documents={self.long_documents!r}: must be 'split' with "
          "data.form='segments', whose rows carry a document on")
    check(self.form == 'segments' or not self.align, "data.align=True: is read with "
          "data.form='segments' only, whose rows carry a document on; set data.align=False")
    check_range('data.length', self.length, 1)
    check_range('data.batch_size', self.batch_size, 1)
    check_range('data.build_processes', self.build_processes, 0)
    check_range('data.prefetch', self.prefetch, 0)
    check_range('data.threads', self.threads, 0)
    check(self.prefetch == 0 or self.prefetch >= self.threads, f'data.prefetch={self.prefetch}: '
          f'must be 0 or at least data.threads={self.threads}, or threads would idle')

  def _check_tasks(self) -> None:
    check_choice('data.task_loss', self.task_loss, ('answer', 'all'))
    for field, unset in (('task_loss', 'answer'), ('task_lengths', ()), ('task_haystack', ''),
                         ('task_files', '')):
      value = getattr(self, field)
      check(value == unset or self.corpus == 'tasks', f'data.{field}={value!r}: is not read with '
            f"data.corpus={self.corpus!r}; set data.corpus='tasks'")
    for length in self.task_lengths:
      check_range('data.task_lengths', length, 1, self.length)
    check(self.corpus != 'tasks' or self.long_documents == 'split',
          f'data.long_documents={self.long_documents!r}: does nothing with '
          "data.corpus='tasks', whose examples fit; set data.long_documents='split'")

  def _check_examples(self) -> None:
    """What forms of one example a row, and masked rows, need or do not read."""
    given = {'pairs': ('files', 'generated'), 'labels': ('files', 'generated')}.get(
        self.form, ('stdlib', 'files', 'tfds', *['tasks'] * (self.form == 'packed')))
    check_choice(f'data.corpus (with data.form={self.form!r})', self.corpus, given)
    if self.corpus == 'generated':
      table = {'pairs': generators.PAIRS, 'labels': generators.LABELS}[self.form]
      check_choice(f'data.generator (with data.form={self.form!r})', self.generator, table)
    if self.form in EXAMPLES:
      check(self.long_documents != 'split', "data.long_documents='split': with data.form="
            f"{self.form!r} a row is one example; set 'drop', or 'trim' to cut what is too long")
      check(self.split == 'hash', f'data.split={self.split!r}: examples of data.form={self.form!r} '
            "are not cut; set data.split='hash'")
    check(self.source_length >= 2 or self.form != 'pairs', f'data.source_length={self.source_length}: '
          "must be at least 2 with data.form='pairs', the separator counted")
    check(self.source_length == 0 or self.form == 'pairs', f'data.source_length={self.source_length}: '
          f"is read with data.form='pairs' only, not {self.form!r}; set data.source_length=0")
    default = type(self).__dataclass_fields__['mask_rate'].default
    check(self.mask_rate == default or self.form == 'masked', f'data.mask_rate={self.mask_rate}: is '
          f"read with data.form='masked' only, not {self.form!r}; set data.mask_rate={default}")
    check(0 < self.mask_rate <= 1, f'data.mask_rate={self.mask_rate}: must be above 0 and at most 1')


def shapes(config: Config) -> dict[str, tuple[tuple[int, int], type]]:
  """Name -> (shape, dtype) of what a batch of all hosts holds."""
  rows = config.batch_size
  found = {name: ((rows, config.length), dtype) for name, dtype in DTYPES.items()}
  if config.form == 'pairs':
    found |= {name: ((rows, config.source_length), dtype) for name, dtype in SOURCE_DTYPES.items()}
  return found


class Documents:
  """Random access to the documents of a split, for evaluation."""

  def __init__(self, store: cache.Cache, tokenizer: Tokenizer):
    self.tokenizer = tokenizer
    self.total_tokens = int(store.meta['tokens'])
    self.total_bytes = int(store.meta['bytes'])
    self.content = store.content
    self._store = store

  def __len__(self) -> int:
    return len(self._store)

  @property
  def lengths(self) -> np.ndarray:
    """Tokens of each document, its leading SEP counted: the number of its (input, target) pairs."""
    return self._store.lengths

  def document(self, i: int) -> np.ndarray:
    """SEP b1 .. bn; the target of its last token is SEP."""
    if not 0 <= i < len(self):
      raise IndexError(f'document {i} of {len(self)}')
    return self._store.read(i, 0, int(self.lengths[i])).astype(np.int32)


def _open(config: Config, split: str, share: tuple[int, int]) -> tuple[cache.Cache, Tokenizer]:
  check_choice('split', split, corpus.SPLITS)
  tokenizer = load_tokenizer(config.tokenizer)
  source = corpus.open_source(config)
  return cache.open_cache(source, split, tokenizer, config.cache_dir, share=share,
                          processes=config.build_processes), tokenizer


def _task_examples(config: Config, split: str, seed: int) -> Any:
  from longctx.data import task_stream
  check_choice('split', split, corpus.SPLITS)
  return task_stream.Examples(config, load_tokenizer(config.tokenizer), split, seed)


def open_documents(config: Config, split: str, *, builders: tuple[int, int] = (0, 1)) -> Any:
  """The documents of a split; of tasks, some examples of a seed that is not trained on.

  `builders`: (i, n) of n processes that open it together, and tokenise what is not yet.
  """
  if config.corpus == 'tasks':
    from longctx.data import task_stream
    return task_stream.TaskDocuments(_task_examples(config, split, 0))
  return Documents(*_open(config, split, builders))


class BatchSource:
  """Batch i of this host, for any i: the random-access source that Grain reads."""

  def __init__(self, config: Config, store: cache.Cache, *, seed: int, host_index: int,
               num_hosts: int):
    share = config.batch_size // num_hosts
    self.rows = range(host_index * share, (host_index + 1) * share)
    self._config = config
    self._store = store
    lengths = store.lengths
    if config.form == 'segments':
      self._layout = packing.Lanes(lengths, config.length, config.batch_size, seed,
                                   align=config.align)
      return
    if config.long_documents == 'split':
      self._layout = packing.SplitRows(lengths, config.length, seed)
    else:
      self._layout = packing.WholeRows(lengths, config.length, seed,
                                       trim=config.long_documents == 'trim')
    num_rows = self.num_rows = self._layout.num_rows   # of an epoch
    self._order = packing.PerEpoch(lambda epoch: packing.shuffled(num_rows, seed, 1 + epoch))

  def __len__(self) -> int:
    return sys.maxsize  # epochs follow one another without end

  def __getitem__(self, i: int) -> Batch:
    shape = (len(self.rows), self._config.length)
    batch = {name: np.zeros(shape, dtype) for name, dtype in DTYPES.items()}
    for local, row in enumerate(self.rows):
      self._fill({k: v[local] for k, v in batch.items()}, self._pieces(i, row))
    return batch

  def _pieces(self, i: int, row: int) -> list[packing.Piece]:
    if self._config.form == 'segments':
      return self._layout.pieces(i, row)
    epoch, at = divmod(i * self._config.batch_size + row, self._layout.num_rows)
    return self._layout.pieces(int(self._order(epoch)[at]))

  def _fill(self, row: Batch, pieces: list[packing.Piece]) -> None:
    low = 0
    for piece in pieces:
      high = low + piece.count
      tokens = self._store.read(piece.document, piece.offset, piece.offset + piece.count + 1)
      row['tokens'][low:high] = tokens[:-1]
      row['targets'][low:high] = tokens[1:]
      row['loss_mask'][low:high] = 1
      row['positions'][low:high] = np.arange(piece.position, piece.position + piece.count)
      row['segment_ids'][low:high] = piece.segment
      row['document_start'][low] = piece.position == 0
      low = high

  def accounting(self) -> dict:
    """What an epoch trains on and what it leaves out; see packing.py."""
    meta = self._store.meta
    counts = {k: meta[k] for k in ('documents', 'empty_documents', 'dropped_copies', 'bytes',
                                   'tokens')}
    return counts | self._layout.accounting()


class Stream:
  """An endless iterator over batches, with a state that a checkpoint can hold."""

  def __init__(self, config: Config, source: Any, identity: dict, tokenizer: Tokenizer):
    import grain
    self.config = config
    self.tokenizer = tokenizer
    self.accounting = source.accounting()
    self._source = source
    self._identity = identity
    options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=config.prefetch)
    self._iterator = iter(grain.MapDataset.source(source).to_iter_dataset(options))

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    return next(self._iterator)

  def batch(self, i: int) -> Batch:
    """Batch i, without moving the stream."""
    return self._source[i]

  def state(self) -> dict:
    """JSON; the same on every host."""
    return {'next_index': int(self._iterator.get_state()['next_index']), **self._identity}

  def restore(self, state: dict) -> None:
    """Goes to where a stream of the same data, seed and shape was."""
    differing = [f'{k} was {state.get(k)!r} and is {v!r}' for k, v in self._identity.items()
                 if state.get(k) != v]
    check(not differing, f'the saved data stream is another one: {"; ".join(differing)}; resume '
          'with the settings and data that it was saved with')
    self._iterator.set_state({'next_index': int(state['next_index'])})

  def close(self) -> None:
    """Ends the reading threads."""
    self._iterator.close()


def open_stream(config: Config, *, split: str = 'train', seed: int, host_index: int = 0,
                num_hosts: int = 1, builders: tuple[int, int] = (0, 1)) -> Stream:
  """The batches of a split: the rows of host i of n; tokenises the corpus first if no cache of it is there.

  `builders`: (i, n) of n processes that tokenise together; several may read the same rows.
  """
  check_range('seed', seed, 0)
  check(config.batch_size % num_hosts == 0, f'data.batch_size={config.batch_size}: must be a '
        f'multiple of the number of hosts, {num_hosts}; each reads an equal share of the rows')
  if not 0 <= host_index < num_hosts:
    raise ConfigError(f'host_index={host_index}: must be in 0..{num_hosts - 1}')
  source, content, tokenizer = open_rows(config, split=split, seed=seed, host_index=host_index,
                                         num_hosts=num_hosts, builders=builders)
  identity = {'content': content, 'tokenizer': tokenizer.fingerprint, 'split': split,
              'seed': seed, 'form': config.form, 'length': config.length,
              'batch_size': config.batch_size, 'long_documents': config.long_documents}
  if config.align:
    identity['align'] = True
  if config.form == 'masked':
    identity['mask_rate'] = config.mask_rate
  if config.form == 'pairs':
    identity['source_length'] = config.source_length
  return Stream(config, source, identity, tokenizer)


def open_rows(config: Config, *, split: str, seed: int, host_index: int = 0, num_hosts: int = 1,
              builders: tuple[int, int] = (0, 1)) -> tuple[Any, str, Tokenizer]:
  """(batches by their index, what identifies their content, the tokenizer) of a split."""
  hosts = dict(host_index=host_index, num_hosts=num_hosts)
  if config.form in EXAMPLES:
    check_choice('split', split, corpus.SPLITS)
    tokenizer = load_tokenizer(config.tokenizer)
    found = examples.open_examples(config, tokenizer, split, seed, builders)
    dtypes = {name: dtype for name, (_, dtype) in shapes(config).items()}
    return examples.ExampleRows(config, found, dtypes=dtypes, **hosts), found.content, tokenizer
  if config.corpus == 'tasks':
    from longctx.data import task_stream
    found = _task_examples(config, split, seed)
    return task_stream.TaskSource(config, found, **hosts), found.content, found.tokenizer
  store, tokenizer = _open(config, split, builders)
  rows = BatchSource(config, store, seed=seed, **hosts)
  if config.form == 'masked':
    rows = MaskedRows(rows, tokenizer, config.mask_rate, seed, config.batch_size)
  return rows, store.content, tokenizer
