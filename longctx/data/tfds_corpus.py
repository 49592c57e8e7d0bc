"""A corpus from TensorFlow Datasets, read as array_record (or parquet) without TensorFlow.

The dataset's own splits are used. One that has only 'train' is divided by data.split, a document's
name being its index; others name what stands for the three with data.tfds_splits, in TFDS's words.
Held by: tests/test_data_tfds.py, which also asserts that TensorFlow is not imported.
"""

import contextlib
import copy
import dataclasses
import os
import re
from collections.abc import Iterator

from absl import logging

from longctx.data.corpus import PART, SPLITS, SplitRule, cut_bytes, explain_empty
from longctx.errors import ConfigError, check, nearest


class TfdsSource:
  """Documents that are the `text_feature` of a dataset's examples."""

  num_copies = 0   # none is looked for
  _range: tuple[int, int] | None = None   # of the examples that a part has

  def __init__(self, config, rule: SplitRule):
    self._name = config.tfds_name
    self._rule = rule
    self._feature = config.text_feature
    self._builder = _open_builder(config.tfds_name, config.tfds_dir)
    self._splits = dict(zip(SPLITS, config.tfds_splits or SPLITS))
    self._divide = not config.tfds_splits and set(self._builder.info.splits) == {'train'}
    if not self._divide:
      self._check_own_splits(config)
    self.label = 'tfds-' + re.sub(r'\W+', '-', config.tfds_name)
    features = self._builder.info.features
    known = sorted(features) if hasattr(features, 'keys') else []
    check(self._feature in known, f'data.text_feature={self._feature!r}: {self._name!r} has the '
          f'features {", ".join(known) or "of no name"}{nearest(self._feature, known)}')

  def _check_own_splits(self, config) -> None:
    for field in dataclasses.fields(config):
      value = getattr(config, field.name)
      check(field.name not in ('split', 'validation_fraction', 'test_fraction')
            or value == field.default, f'data.{field.name}={value!r}: is not read, '
            f'data.tfds_name={self._name!r} has splits of its own ('
            f'{", ".join(config.tfds_splits or self._builder.info.splits)}); leave it at '
            f'{field.default!r}, or say with data.tfds_splits what is held out')
    if not config.tfds_splits:
      return
    parts = {split: self._info(split)[1].file_instructions for split in SPLITS}
    for i, one in enumerate(SPLITS):
      for other in SPLITS[i + 1:]:
        shared = sum(max(0, min(a.skip + a.take, b.skip + b.take) - max(a.skip, b.skip))
                     for a in parts[one] for b in parts[other] if a.filename == b.filename)
        check(not shared, f'data.tfds_splits={config.tfds_splits}: {one} and {other} share {shared} '
              "examples; must be apart, such as ('train[:90%]', 'train[90%:]', 'test')")

  def _info(self, split: str):
    name = 'train' if self._divide else self._splits[split]
    try:
      return name, self._builder.info.splits[name]
    except ValueError as e:
      raise ConfigError(
          f'{split} split {name!r} of data.tfds_name={self._name!r}: it has '
          f'{", ".join(self._builder.info.splits)}; say which to use, such as data.tfds_splits='
          "('train[:90%]', 'train[90%:]', 'test')") from e

  def fingerprint(self, split: str) -> list:
    """Changes with the dataset, its version, its files and what of it is read."""
    name, info = self._info(split)
    files = [[str(f), *_stat(f)] for f in info.filepaths]
    return [self.label, self._builder.info.full_name, self._feature, name, info.num_examples,
            dataclasses.astuple(self._rule) if self._divide else '', files, *(self._range or ())]

  def continues(self, split: str) -> bool:
    """A part begins with an example."""
    return False

  def parts(self, split: str) -> list['TfdsSource']:
    """Sources of about PART bytes, each a range of the examples."""
    info = self._info(split)[1]
    number = min(int(info.num_bytes or 0) // PART, info.num_examples)
    if number < 2:
      return [self]
    cuts = [info.num_examples * i // number for i in range(number + 1)]
    found = [copy.copy(self) for _ in range(number)]
    for part, low, high in zip(found, cuts, cuts[1:]):
      part._range = low, high
    return found

  def explain_empty(self, split: str) -> str:
    """Why a split has no text; for the error."""
    name, info = self._info(split)
    what = f'data.tfds_name={self._name!r}'
    if not self._divide:
      return f'{what}: none of the {info.num_examples} examples of its split {name!r} has text'
    return explain_empty(self._rule, split, what, info.num_examples)

  def documents(self, split: str) -> Iterator[tuple[str, Iterator[bytes]]]:
    name, info = self._info(split)
    with _as_config_error(f'data.tfds_name={self._name!r}: cannot be read'):
      examples = self._builder.as_data_source(split=name)
      for i in range(*self._range or (info.num_examples,)):
        label = f'train/{i}'
        if self._divide and not self._rule.holds(label, split):
          continue
        text = examples[i][self._feature]
        text = text.encode() if isinstance(text, str) else text
        check(isinstance(text, bytes), f'data.text_feature={self._feature!r}: is of type '
              f'{type(text).__name__} in {self._name!r}, not text')
        yield f'{self._name} {name}[{i}]', iter(
            [cut_bytes(text, self._rule, split) if self._divide else text])


def _stat(path) -> tuple[int, int]:
  try:
    stat = os.stat(path)
  except OSError:  # not on a local disk: the version and counts have to do
    return 0, 0
  return stat.st_size, stat.st_mtime_ns


@contextlib.contextmanager
def _as_config_error(what: str) -> Iterator[None]:
  """TFDS raises many kinds for what its user got wrong; keeps the first line of what they say."""
  try:
    yield
  except ConfigError:
    raise
  except ImportError as e:
    raise ConfigError(f'{what}: it needs the package {e.name!r}; install it with pip') from e
  except Exception as e:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    raise ConfigError(f'{what}: {lines[0] if lines else type(e).__name__}') from e


def _open_builder(name: str, folder: str):
  """The prepared builder; downloads and prepares the dataset when it is not there."""
  import tensorflow_datasets as tfds
  folder = os.path.expanduser(folder) or None
  what = f'data.tfds_name={name!r}'
  try:
    with _as_config_error(f'{what}: cannot be opened'):
      builder = tfds.builder(name, data_dir=folder)
  except ConfigError as e:
    if not isinstance(e.__cause__, tfds.core.registered.DatasetNotFoundError) or ':' in name:
      raise
    known = tfds.list_builders(with_community_datasets=False)
    if folder and os.path.isdir(folder):
      known += os.listdir(folder)
    raise ConfigError(f'{what}: TensorFlow Datasets has no dataset of this name, nor has '
                      f'data.tfds_dir={folder or ""!r}{nearest(name.split("/")[0], known)}') from e
  if not builder.info.splits:
    logging.info('Preparing the dataset %s', name)
    with _as_config_error(f'{what}: cannot be downloaded and prepared'):
      builder = tfds.builder(name, data_dir=folder, file_format='array_record')
      builder.download_and_prepare()
  formats = builder.info.available_file_formats()
  readable = tfds.core.file_adapters.FileFormat.with_random_access()
  stored = ', '.join(f.value for f in formats)
  check(bool(formats & readable), f'{what}: is stored as {stored}, which only TensorFlow reads; '
        "prepare it again with file_format='array_record', or move it away to have that done")
  return builder
