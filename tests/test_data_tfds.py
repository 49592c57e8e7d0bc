"""TensorFlow Datasets: read in array_record form, without TensorFlow, its splits as it has them."""

import itertools
import json
import sys

import pytest

from longctx.data import corpus, stream
from longctx.errors import ConfigError

TEXTS = [f'document {i} ' + 'ü' * i for i in range(30)]


def make_builder(splits):
  """A builder class `TinyTexts` with the given splits: name -> list of texts."""
  import tensorflow_datasets as tfds

  class TinyTexts(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
      features = tfds.features.FeaturesDict({'text': tfds.features.Text(),
                                             'title': tfds.features.Text()})
      # not dataset_info_from_configs: that looks for files beside the module
      return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
      return {name: self._generate_examples(texts) for name, texts in splits.items()}

    def _generate_examples(self, texts):
      for i, text in enumerate(texts):
        yield i, {'text': text, 'title': f't{i}'}

  return TinyTexts


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """Folders of array_record files: one with train and test, one with train alone."""
  folders = {}
  for key, splits in {'two': {'train': TEXTS[:20], 'test': TEXTS[20:]},
                      'one': {'train': TEXTS}}.items():
    folder = tmp_path_factory.mktemp(key)
    make_builder(splits)(data_dir=str(folder), file_format='array_record').download_and_prepare()
    folders[key] = folder
  assert 'tensorflow' not in sys.modules
  return folders


def config_of(folder, tmp_path, **kwargs):
  defaults = {'corpus': 'tfds', 'tfds_name': 'tiny_texts', 'tfds_dir': str(folder),
              'cache_dir': str(tmp_path / 'cache'), 'length': 16, 'batch_size': 2}
  return stream.Config(**(defaults | kwargs))


def texts(config, split):
  d = stream.open_documents(config, split)
  return [d.tokenizer.decode(d.document(i)).decode() for i in range(len(d))]


def test_own_splits(prepared, tmp_path):
  config = config_of(prepared['two'], tmp_path)
  assert texts(config, 'train') == TEXTS[:20]
  assert texts(config, 'test') == TEXTS[20:]
  batch = next(stream.open_stream(config, seed=0))
  assert batch['tokens'].shape == (2, 16)
  assert 'tensorflow' not in sys.modules


def test_another_feature(prepared, tmp_path):
  config = config_of(prepared['two'], tmp_path, text_feature='title')
  assert texts(config, 'test') == [f't{i}' for i in range(10)]


def test_train_alone_is_divided_by_the_hash_of_the_index(prepared, tmp_path):
  config = config_of(prepared['one'], tmp_path, validation_fraction=0.2, test_fraction=0.2)
  rule = corpus.SplitRule(kind='hash', validation=0.2, test=0.2)
  found = {split: texts(config, split) for split in corpus.SPLITS}
  assert sorted(itertools.chain(*found.values())) == sorted(TEXTS)
  for split in corpus.SPLITS:
    assert found[split] == [t for i, t in enumerate(TEXTS) if rule.holds(f'train/{i}', split)]
    assert found[split]


def test_train_alone_divided_within_documents(prepared, tmp_path):
  config = config_of(prepared['one'], tmp_path, split='contiguous', validation_fraction=0.3,
                     test_fraction=0.3)
  parts = [texts(config, split) for split in corpus.SPLITS]
  assert [''.join(p) for p in zip(*parts)] == TEXTS


def test_splits_in_the_words_of_tfds(prepared, tmp_path):
  config = config_of(prepared['two'], tmp_path,
                     tfds_splits=('train[:75%]', 'train[75%:]', 'test[:3]'))
  assert texts(config, 'train') == TEXTS[:15]
  assert texts(config, 'validation') == TEXTS[15:20]
  assert texts(config, 'test') == TEXTS[20:23]


@pytest.mark.parametrize('name', ['huggingface:wikitext/wikitext-2-v1', 'robotics:tiny',
                                  'a/b:1.0.0'])
def test_names_pass_through(monkeypatch, name):
  import tensorflow_datasets as tfds
  asked = []
  def builder(*args, **kwargs):
    asked.append((args, kwargs))
    raise ImportError('no', name='datasets')
  monkeypatch.setattr(tfds, 'builder', builder)
  config = stream.Config(corpus='tfds', tfds_name=name)
  with pytest.raises(ConfigError, match=rf"^data\.tfds_name='{name}': .*the package 'datasets'"):
    stream.open_documents(config, 'train')
  assert asked == [((name,), {'data_dir': None})]


def test_an_unprepared_dataset_is_prepared_as_array_record(monkeypatch, tmp_path):
  import tensorflow_datasets as tfds
  cls = make_builder({'train': TEXTS})
  monkeypatch.setattr(tfds, 'builder', lambda name, **kwargs: cls(**kwargs))
  config = config_of(tmp_path / 'fresh', tmp_path, validation_fraction=0, test_fraction=0)
  assert texts(config, 'train') == TEXTS
  assert len(list((tmp_path / 'fresh').glob('**/*array_record*'))) == 1
  assert 'tensorflow' not in sys.modules


def test_a_changed_dataset_is_another_cache(monkeypatch, tmp_path):
  folder = tmp_path / 'data'
  config = config_of(folder, tmp_path, validation_fraction=0, test_fraction=0)
  import shutil
  for contents in (TEXTS, [t.upper() for t in TEXTS]):
    shutil.rmtree(folder, ignore_errors=True)
    make_builder({'train': contents})(data_dir=str(folder),
                                      file_format='array_record').download_and_prepare()
    assert texts(config, 'train') == contents


@pytest.mark.parametrize('kwargs, split, message', [
    ({}, 'validation', r"^validation split 'validation' of data\.tfds_name='tiny_texts': it has "
     r"train, test; say which .*data\.tfds_splits="),
    ({'tfds_splits': ('train', 'trian', 'test')}, 'validation', "'trian'.*it has train, test"),
    ({'text_feature': 'titel'}, 'train', r"^data\.text_feature='titel': .*text, title "
     r'\(did you mean "title"\?\)'),
    ({'tfds_splits': ('train', 'train', 'test')}, 'train',
     r"^data\.tfds_splits=.*: train and validation share 20 examples; must be apart, such as"),
    ({'tfds_splits': ('train[:80%]', 'test', 'train[75%:]')}, 'train',
     r'train and test share 1 examples'),
    ({'tfds_splits': ('train[:10]', 'test[:6]', 'test[5:]')}, 'train',
     r'validation and test share 1 examples'),
    ({'validation_fraction': 0.2}, 'train', r"^data\.validation_fraction=0\.2: is not read, "
     r"data\.tfds_name='tiny_texts' has splits of its own \(train, test\); leave it at 0\.05"),
    ({'split': 'contiguous', 'tfds_splits': ('train[:10]', 'train[10:]', 'test')}, 'train',
     r"^data\.split='contiguous': is not read"),
    ({'tfds_name': 'tiny_text'}, 'train', r'^data\.tfds_name=.*did you mean "tiny_texts"'),
    ({'tfds_name': 'imdb_review'}, 'train', r'did you mean "imdb_reviews"'),
    ({'tfds_name': 'nobody:tiny'}, 'train', r'Namespace nobody not found'),
])
def test_mistakes(prepared, tmp_path, kwargs, split, message):
  with pytest.raises(ConfigError, match=message) as e:
    stream.open_documents(config_of(prepared['two'], tmp_path, **kwargs), split)
  assert '\n' not in str(e.value)


def test_tfrecord_needs_tensorflow(prepared, tmp_path):
  import shutil
  shutil.copytree(prepared['two'], tmp_path / 'data')
  version = tmp_path / 'data' / 'tiny_texts' / '1.0.0'
  for path in version.glob('*array_record*'):
    path.rename(str(path).replace('array_record', 'tfrecord'))
  info = json.loads((version / 'dataset_info.json').read_text())
  (version / 'dataset_info.json').write_text(json.dumps(info | {'fileFormat': 'tfrecord'}))
  with pytest.raises(ConfigError, match=r"is stored as tfrecord, .*file_format='array_record'"):
    texts(config_of(tmp_path / 'data', tmp_path), 'train')
