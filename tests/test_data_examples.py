"""Rows of examples and hidden tokens: written-out rows, splits, lengths, counts, seeds and hosts."""

import dataclasses
import functools
import hashlib
import itertools
import tracemalloc

import numpy as np
import pytest

from longctx.data import corpus, examples, generators, masking, stream
from longctx.data.tokenizer import Bytes, load_tokenizer, train_sentencepiece
from longctx.errors import ConfigError

SEP = 256
pairs = functools.partial(stream.Config, form='pairs', corpus='generated', generator='translate',
                          long_documents='drop', length=64, source_length=64, batch_size=4, threads=0,
                          prefetch=0)
labels = functools.partial(pairs, form='labels', generator='sentiment', source_length=0, length=340)


@pytest.fixture(autouse=True)
def tokens(monkeypatch, tmp_path_factory):
  """Where they are kept that no config gives a folder for."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('tokens')))


def rows(config, split='train', seed=0, **hosts):
  return stream.open_rows(config, split=split, seed=seed, **hosts)[0]


def text(ids):
  return Bytes().decode(np.asarray(ids))


# --- The generators: their rules, by hand.


class Script:
  """In place of a generator of numbers: gives what is written, in turn."""

  def __init__(self, integers, randoms):
    self.numbers, self.randoms = iter(integers), iter(randoms)

  def integers(self, *bounds):
    del bounds
    return next(self.numbers)

  def random(self):
    return next(self.randoms)


@pytest.mark.parametrize('subject,thing,verb,denied,source,target', [
    # noun, number, how many adjectives, which
    ((10, 2, 1, 2), (3, 0, 0), 0, 0.9, b'three small horses see one river',
     b'tri kavalos mikos un fluman videm'),
    ((11, 2, 0), (4, 3, 1, 0), 6, 0.1, b'three songs do not fear four red houses',
     b'tri kantas kar domiosn rusosn ne timem'),
    ((0, 0, 0), (8, 1, 2, 1, 3), 5, 0.9, b'one fox carries two old dark stars',
     b'un vulo du stelasn vetulasn noktasn porte')])
def test_translations_by_hand(subject, thing, verb, denied, source, target):
  assert generators.translate(Script([*subject, *thing, verb], [denied])) == (source, target)


def test_summaries_name_what_was_announced():
  rng = np.random.default_rng(1)
  for _ in range(50):
    source, target = generators.summarise(rng)
    said = [f'{s.split()[0]}: {s.split()[4]}' for s in source.decode().split('. ')
            if s.split()[1] == 'announced']
    assert target.decode() == '; '.join(said) and 1 <= len(said) <= 3


def test_sentiments_are_what_most_opinions_are():
  rng, seen = np.random.default_rng(1), []
  for _ in range(300):
    source, label = generators.sentiment(rng)
    good = bad = 0
    for sentence in source.decode().rstrip('.').split('. '):
      words = sentence.split(' was ')
      if len(words) == 2 and sentence.startswith('The ') and words[1] != 'half full':
        denied = words[1].startswith('not ')
        is_good = (words[1].removeprefix('not ') in generators.GOOD) != denied
        good, bad = good + is_good, bad + (not is_good)
    assert good + bad in (3, 5, 7) and label == (good > bad)
    seen.append(label)
  assert 0.4 < np.mean(seen) < 0.6


# --- Rows.


def test_a_row_of_a_pair_by_hand(tmp_path):
  (tmp_path / 'a.tsv').write_bytes(b'ab\txyz\n')
  config = pairs(corpus='files', generator='', files=f'{tmp_path}/*.tsv', length=6, source_length=5,
                 batch_size=1, validation_fraction=0.0, test_fraction=0.0)
  row = {k: v[0].tolist() for k, v in rows(config)[0].items()}
  a, b, x, y, z = b'abxyz'
  assert row == dict(
      tokens=[SEP, x, y, z, 0, 0], targets=[x, y, z, SEP, 0, 0], loss_mask=[1, 1, 1, 1, 0, 0],
      positions=[0, 1, 2, 3, 0, 0], segment_ids=[1, 1, 1, 1, 0, 0],
      document_start=[True] + [False] * 5, source=[a, b, SEP, 0, 0],
      source_valid=[True, True, True, False, False])


def test_a_row_of_a_class_by_hand(tmp_path):
  for name, content in (('train/bad/0', 'no'), ('test/bad/0', 'n'), ('train/good/0', 'yes'),
                        ('test/good/0', 'y'), ('train/unsup/0', 'so')):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / f'{name}.txt').write_text(content)
  config = labels(corpus='files', generator='', files=str(tmp_path), length=4, batch_size=2,
                  validation_fraction=0.0, test_fraction=0.0)
  found = rows(config)[0]
  by_class = sorted(zip(found['targets'][:, 0].tolist(), found['tokens'].tolist()))
  assert by_class == [(0, [SEP, *b'no', 0]), (1, [SEP, *b'yes'])]
  np.testing.assert_array_equal(found['loss_mask'], [[1, 0, 0, 0]] * 2)
  assert rows(config, 'test').num_rows == 2 and examples.num_classes(config) == 2
  with pytest.raises(ConfigError, match='validation split is empty'):
    rows(config, 'validation')


def test_no_source_is_in_two_splits():
  sources = {}
  for split in ('train', 'validation', 'test'):
    found = rows(pairs(batch_size=64), split)
    sources[split] = {text(s[:v.sum()]) for i in range(8)
                      for s, v in zip(found[i]['source'], found[i]['source_valid'])}
    assert len(sources[split]) > 500
    share = [int(hashlib.sha256(x).hexdigest()[:16], 16) / 2 ** 64 for x in sources[split]]
    low, high = {'test': (0, 0.05), 'validation': (0.05, 0.1), 'train': (0.1, 1)}[split]
    assert all(low <= u < high for u in share)   # however many sources there may be
  assert not sources['train'] & (sources['validation'] | sources['test'])
  assert not sources['validation'] & sources['test']


def test_a_text_in_two_files_is_in_one_split(tmp_path):
  classes = ('bad', 'good')
  for part, label, i in itertools.product(('train', 'test'), classes, range(40)):
    file = tmp_path / part / label / f'{i}.txt'
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'text {i % 20}, {label if i < 10 else "alike"}')   # of a class twice, of both four times
  (tmp_path / 'train/bad/latin.txt').write_bytes(b'caf\xe9')
  rule = corpus.SplitRule(kind='hash', validation=0.5, test=0.3)
  found = {split: list(examples.folder_source(str(tmp_path), split, rule).examples(split)) for split in corpus.SPLITS}
  texts = {split: {text for _, text, _ in of} for split, of in found.items()}
  assert not texts['train'] & texts['validation'] and min(map(len, texts.values())) > 5
  assert len(found['train']) + len(found['validation']) == 81 and len(found['test']) == 80
  assert texts['test'] < texts['train'] | texts['validation']   # the folder's own: its copies stay
  for split, high in (('validation', True), ('train', False)):
    assert all((int(hashlib.sha256(text).hexdigest()[:16], 16) < 2 ** 63) == high for text in texts[split])


def test_rows_are_of_their_seed_and_of_any_number_of_hosts():
  config = pairs()
  whole = rows(config)[3]
  parts = [rows(config, host_index=i, num_hosts=2)[3] for i in range(2)]
  for name, x in whole.items():
    np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), x)
  assert (rows(config, seed=1)[3]['source'] != whole['source']).any()
  stream_ = stream.open_stream(config, seed=0)
  first, state = [next(stream_) for _ in range(4)], stream_.state()
  again = stream.open_stream(config, seed=0)
  again.restore(state | {'next_index': 3})
  np.testing.assert_array_equal(next(again)['tokens'], first[3]['tokens'])
  with pytest.raises(ConfigError, match='content'):
    stream.open_stream(dataclasses.replace(config, generator='summarise', length=64,
                                           source_length=460), seed=0).restore(state)


def test_every_example_of_files_is_read_once_an_epoch(tmp_path):
  lines = [f's{i}\tt{i}' for i in range(10)]
  (tmp_path / 'a.tsv').write_text('\n'.join(lines))
  config = pairs(corpus='files', generator='', files=f'{tmp_path}/a.tsv', batch_size=5,
                 validation_fraction=0.0, test_fraction=0.0)
  found = rows(config)
  epochs = [[text(row[:m.sum()]) for i in (j, j + 1) for row, m in
             zip(found[i]['tokens'], found[i]['loss_mask'] > 0)] for j in (0, 2)]
  assert sorted(epochs[0]) == sorted(epochs[1]) == [f't{i}'.encode() for i in range(10)]
  assert epochs[0] != epochs[1]


def test_what_is_too_long_is_left_out_or_cut_and_counted(tmp_path):
  (tmp_path / 'a.tsv').write_text('abcd\txy\nabcde\txyzw\nab\tx\n')
  config = pairs(corpus='files', generator='', files=f'{tmp_path}/a.tsv', length=4, source_length=5,
                 batch_size=1, validation_fraction=0.0, test_fraction=0.0)
  assert rows(config).accounting()['dropped_documents'] == 1
  cut = rows(dataclasses.replace(config, long_documents='trim'))
  counts = cut.accounting()
  assert (counts['trimmed_tokens'], counts['documents_cut'], counts['dropped_documents']) == (2, 1, 0)
  assert counts['tokens'] == 3 + 4 + 2 and counts['bytes'] == 2 + 3 + 1
  sources = {text(cut[i]['source'][0][:cut[i]['source_valid'][0].sum()]) for i in range(3)}
  assert sources == {b'abcd', b'ab'}
  with pytest.raises(ConfigError, match=r'all 3 examples .* are longer than a row'):
    rows(dataclasses.replace(config, length=1))
  with pytest.raises(ConfigError, match=r'none of \d+ examples .* fits data.length=12'):
    rows(pairs(length=12))[0]


def pairs_of(path, lines, **settings):
  """The config of pairs of a file that has these lines, all in the train split."""
  path.write_bytes(b'\n'.join(lines))
  return pairs(**(dict(corpus='files', generator='', files=str(path), batch_size=1, validation_fraction=0.0,
                       test_fraction=0.0) | settings))


def read(config, split='train'):
  """{source, or text: target, or class} of an epoch."""
  found, told = rows(config, split), {}
  for batch in (found[i] for i in range(found.num_rows)):
    tokens, is_text = batch['tokens'][0], batch['segment_ids'][0] > 0
    if config.form == 'labels':
      told[text(tokens[is_text])] = int(batch['targets'][0, 0])
    else:
      told[text(batch['source'][0][batch['source_valid'][0]])] = text(tokens[is_text])
  return told


def test_an_empty_source_or_target_keeps_its_partner(tmp_path):
  config = pairs_of(tmp_path / 'a.tsv', [b'a\t', b'\tb', b'cc\tddd', b'', b' \t '])
  assert read(config) == {b'a': b'', b'': b'b', b'cc': b'ddd'}   # the last is a line of spaces, which is none
  assert read(dataclasses.replace(config, long_documents='trim', length=2, source_length=2)) == {
      b'a': b'', b'': b'b', b'c': b'd'}


def test_classes_of_empty_and_cut_texts(tmp_path):
  expected = {b'': 11, b'some': 3, b'longe': 10}
  for i, (words, label) in enumerate([(b'', 11), (b'some', 3), (b'longer', 10)]):
    for part, name in (('train', f'{label:02}/{i}'), *(('test', f'{j:02}/0') for j in range(12))):
      path = tmp_path / part / f'{name}.txt'
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(words)
  for j in range(12):   # of more than ten, some of two digits
    (tmp_path / f'train/{j:02}').mkdir(exist_ok=True)
  config = labels(corpus='files', generator='', files=str(tmp_path), length=6, batch_size=1, long_documents='trim',
                  validation_fraction=0.0, test_fraction=0.0)
  assert read(config) == expected


@pytest.mark.parametrize('ends', [b'\n', b'\r\n', b'\r'])
def test_lines_of_a_large_file_are_those_of_a_small_one(tmp_path, monkeypatch, ends):
  """Wherever the chunks end that it is read in, and where a line is longer than one."""
  lines = [b'%d\t%s' % (i, b'x' * (i * 7 % 40)) for i in range(60)]
  (tmp_path / 'a.tsv').write_bytes(ends.join(lines))
  monkeypatch.setattr(corpus, 'CHUNK', 16)
  found = examples.pair_source(f'{tmp_path}/*.tsv', corpus.SplitRule(kind='hash', validation=0.0, test=0.0))
  assert list(found.examples('train')) == [
      (f'{tmp_path}/a.tsv:{i + 1}', *line.split(b'\t')) for i, line in enumerate(lines)]


@pytest.mark.parametrize('long', ['trim', 'drop'])
def test_what_is_counted_is_what_the_rows_hold(tmp_path, monkeypatch, long):
  """Of tokens of several bytes; all that is left out is read, or, where it is much, some of it."""
  lines = [b'the words %d\t%s' % (i, b'a word and another ' * (i % 7)) for i in range(90)]
  (tmp_path / 'm.model').write_bytes(train_sentencepiece(lines, 300))
  config = pairs_of(tmp_path / 'a.tsv', lines, tokenizer=f'{tmp_path}/m.model', length=20, long_documents=long)
  found, tokenizer = rows(config), load_tokenizer(config.tokenizer)
  counts, batches = found.accounting(), [found[i] for i in range(found.num_rows)]
  assert counts['dropped_documents' if long == 'drop' else 'documents_cut'] > 10
  assert counts['documents'] == counts['rows_per_epoch'] == 90 - counts['dropped_documents']
  assert counts['tokens'] == sum(b['loss_mask'].sum() for b in batches)
  assert counts['bytes'] == sum(tokenizer.num_bytes(b['targets'][b['loss_mask'] > 0]).sum() for b in batches)
  assert 'examples_counted' not in counts
  targets = [tokenizer.encode(line.split(b'\t')[1]).tolist() for line in lines]   # in one piece
  assert all(b['targets'][b['loss_mask'] > 0][:-1].tolist() in [x[:19] for x in targets] for b in batches)
  monkeypatch.setattr(examples, 'READ', 8)
  some = found.accounting()
  assert some.pop('examples_counted') == 8
  assert some == counts | {'bytes': some['bytes']} and abs(some['bytes'] / counts['bytes'] - 1) < 0.05


def test_a_process_holds_numbers_of_examples_and_no_tokens(tmp_path, monkeypatch):
  monkeypatch.setattr(corpus, 'CHUNK', 1 << 16)
  count = 200
  config = pairs_of(tmp_path / 'a.tsv', [b'%d\t%s' % (i, b'x' * 40_000) for i in range(count)], long_documents='trim')
  rows(pairs_of(tmp_path / 'b.tsv', [b'a\tb']))   # imports
  for most in (1 << 20, 1 << 18):   # as it is tokenised, and opened again; 8 MB of text
    tracemalloc.start()
    found = rows(config)
    assert tracemalloc.get_traced_memory()[1] < most
    tracemalloc.stop()
  given = found._examples
  arrays = [x for x in vars(given).values() if isinstance(x, np.ndarray)]
  assert sum(x.nbytes for x in arrays) == 3 * 8 * count
  assert not any(isinstance(x, list | tuple | dict) for x in vars(given).values())


@pytest.mark.parametrize('settings,message', [
    (dict(long_documents='split'), "long_documents='split': with data.form='pairs' a row is one example"),
    (dict(source_length=0), 'data.source_length=0: must be at least 2'),
    (dict(generator='sentiment'), r"data.generator .*='sentiment': must be one of translate, summarise"),
    (dict(form='labels'), "data.generator .*='translate': must be one of sentiment"),
    (dict(corpus='stdlib', generator=''), r"data.corpus .*='stdlib': must be one of files, generated"),
    (dict(split='contiguous'), "data.split='contiguous': examples .* are not cut"),
    (dict(mask_rate=0.3), "data.mask_rate=0.3: is read with data.form='masked' only"),
    (dict(form='masked', corpus='stdlib', generator=''), "data.source_length=64: is read with")])
def test_mistakes_are_refused_by_name(settings, message):
  with pytest.raises(ConfigError, match=message):
    pairs(**settings)


@pytest.mark.parametrize('content,message', [
    ('a\tb\nc\n', r'a.tsv:2: has 0 tabs; must have one'), ('a\tb\tc', r'a.tsv:1: has 2 tabs')])
def test_lines_that_are_no_pair_are_refused_by_their_number(tmp_path, content, message):
  (tmp_path / 'a.tsv').write_text(content)
  with pytest.raises(ConfigError, match=message):
    rows(pairs(corpus='files', generator='', files=f'{tmp_path}/a.tsv'))


def test_a_folder_without_classes_is_refused(tmp_path):
  with pytest.raises(ConfigError, match='of at least two classes'):
    rows(labels(corpus='files', generator='', files=str(tmp_path)))


# --- Hidden tokens.


def test_hidden_tokens_are_80_10_10_of_15_percent_of_the_text():
  rng, count = np.random.default_rng(0), 200_000
  tokens = rng.integers(0, 257, count).astype(np.int32)
  is_text = np.arange(count) % 10 < 8
  hidden, chosen = masking.masked(tokens, is_text, 0.15, Bytes(), rng)
  assert not (chosen & (~is_text | (tokens == SEP))).any()
  np.testing.assert_array_equal(hidden[~chosen], tokens[~chosen])
  assert abs(chosen.sum() / (is_text & (tokens != SEP)).sum() - 0.15) < 0.004
  masks, same = hidden[chosen] == 257, hidden[chosen] == tokens[chosen]
  assert abs(masks.mean() - 0.8) < 0.01 and abs(same.mean() - 0.1) < 0.01
  others = hidden[chosen][~masks & ~same]
  assert SEP not in others and set(others.tolist()) == set(range(256))


def masked_config(folder, **settings):
  for i in range(8):
    (folder / f'{i}.txt').write_text(f'the quick brown fox {i} jumps over the lazy dog ' * 9)
  return stream.Config(form='masked', corpus='files', files=f'{folder}/*.txt', length=64,
                       cache_dir=f'{folder}/cache', threads=0, prefetch=0, split='contiguous', **settings)


def test_masked_rows_guess_their_own_tokens_and_are_of_their_seed(tmp_path):
  config = masked_config(tmp_path, batch_size=4)
  plain = rows(dataclasses.replace(config, form='packed'))[2]
  found = rows(config)[2]
  np.testing.assert_array_equal(found['targets'], plain['tokens'])
  moved = found['tokens'] != plain['tokens']
  assert 0 < moved.sum() < 60 and not (moved & (found['loss_mask'] == 0)).any()
  np.testing.assert_array_equal(found['segment_ids'], plain['segment_ids'])
  np.testing.assert_array_equal(rows(config, host_index=1, num_hosts=2)[2]['tokens'],
                                found['tokens'][2:])
  assert (rows(config)[3]['loss_mask'] != found['loss_mask']).any()


def test_the_hidden_tokens_of_a_row_are_the_same_in_batches_of_any_size(tmp_path):
  whole = masked_config(tmp_path, batch_size=12)
  expected, count = rows(whole), rows(whole).num_rows
  assert 24 < count < 60   # a second epoch is read too
  for size, hosts in ((4, 1), (6, 2), (1, 1)):
    config = dataclasses.replace(whole, batch_size=size)
    parts = [rows(config, host_index=host, num_hosts=hosts) for host in range(hosts)]
    found = [part[i] for i in range(60 // size) for part in parts]
    for name in ('tokens', 'targets', 'loss_mask'):
      np.testing.assert_array_equal(np.concatenate([batch[name] for batch in found]),
                                    np.concatenate([expected[i][name] for i in range(5)]))
  hidden = np.concatenate([expected[i]['loss_mask'] for i in range(5)])
  assert len(np.unique(hidden, axis=0)) == 60   # and another row's, or another visit's, are others


def test_a_stream_of_masked_rows_carries_on_where_it_was(tmp_path):
  config = masked_config(tmp_path, batch_size=4)
  stream_ = stream.open_stream(config, seed=3)
  first, state = [next(stream_) for _ in range(4)], stream_.state()
  again = stream.open_stream(config, seed=3)
  again.restore(state | {'next_index': 2})
  for batch in first[2:]:
    found = next(again)
    for name in ('tokens', 'loss_mask'):
      np.testing.assert_array_equal(found[name], batch[name])
