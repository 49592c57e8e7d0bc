"""The stream: what is in each batch, against loops; determinism, hosts, epochs, resumption."""

import collections
import json
import sys

import numpy as np
import pytest

from longctx.data import stream
from longctx.errors import ConfigError
from tests import oracles

SEP = 256
FORMS = [{'form': 'packed'}, {'form': 'packed', 'long_documents': 'trim'},
         {'form': 'packed', 'long_documents': 'drop'}, {'form': 'segments'}]


@pytest.fixture(scope='module')
def corpus_dir(tmp_path_factory):
  """Nine documents of 1 to 90 random bytes; the names are in the order of the list."""
  root = tmp_path_factory.mktemp('corpus')
  rng = np.random.default_rng(7)
  for i, n in enumerate([31, 1, 90, 12, 5, 44, 17, 3, 60]):
    (root / f'{i}.txt').write_bytes(rng.integers(0, 256, n, dtype=np.uint8).tobytes())
  return root


def documents_of(root):
  return [list(p.read_bytes()) for p in sorted(root.glob('*.txt'))]


def config_of(root, **kwargs):
  defaults = {'corpus': 'files', 'files': str(root / '*.txt'), 'cache_dir': str(root / 'cache'),
              'validation_fraction': 0, 'test_fraction': 0, 'length': 8, 'batch_size': 4}
  return stream.Config(**(defaults | kwargs))


def open_stream(root, *, seed=0, host_index=0, num_hosts=1, **kwargs):
  return stream.open_stream(config_of(root, **kwargs), seed=seed, host_index=host_index,
                            num_hosts=num_hosts)


def rows_of(batch):
  """Each row as a tuple of (token, target, mask, position, segment, start)."""
  arrays = [batch[k] for k in ('tokens', 'targets', 'loss_mask', 'positions', 'segment_ids',
                               'document_start')]
  return [tuple(zip(*(a[b].tolist() for a in arrays))) for b in range(len(arrays[0]))]


def assert_same(a, b):
  assert a.keys() == b.keys()
  for k in a:
    np.testing.assert_array_equal(a[k], b[k], err_msg=k)


def rows_in_order(s, num_rows):
  rows = []
  i = 0
  while len(rows) < num_rows:
    rows += rows_of(s.batch(i))
    i += 1
  return rows[:num_rows]


def test_dtypes_and_shapes(corpus_dir):
  batch = next(open_stream(corpus_dir))
  kinds = {'tokens': np.int32, 'targets': np.int32, 'loss_mask': np.float32,
           'positions': np.int32, 'segment_ids': np.int32, 'document_start': np.bool_}
  assert {k: v.dtype.type for k, v in batch.items()} == kinds
  assert {v.shape for v in batch.values()} == {(4, 8)}


@pytest.mark.parametrize('length', [1, 7, 8, 64])
@pytest.mark.parametrize('batch_size', [1, 4])
def test_packed_split_is_the_chopped_line(corpus_dir, length, batch_size):
  s = open_stream(corpus_dir, length=length, batch_size=batch_size)
  documents = documents_of(corpus_dir)
  order = s._source._layout.line.order.tolist()
  assert sorted(order) == list(range(9))
  chopped = oracles.chopped_rows([documents[d] for d in order], length, SEP)
  expected = collections.Counter(
      tuple((t, y, 1.0, p, g, start) for t, y, p, g, start in row) for row in chopped)
  num_rows = s.accounting['rows_per_epoch']
  assert num_rows == len(chopped)
  rows = rows_in_order(s, 3 * num_rows)
  epochs = [rows[e * num_rows:(e + 1) * num_rows] for e in range(3)]
  for epoch in epochs:
    assert collections.Counter(epoch) == expected
  if num_rows > 8:
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [tuple((t, y, 1.0, p, g, s) for t, y, p, g, s in row) for row in chopped]


@pytest.mark.parametrize('policy', ['trim', 'drop'])
@pytest.mark.parametrize('length', [13, 40, 91])
def test_whole_documents_stand_in_padded_rows(corpus_dir, policy, length):
  s = open_stream(corpus_dir, length=length, batch_size=1, long_documents=policy)
  expected = collections.Counter()
  for document in documents_of(corpus_dir):
    pairs = oracles.document_pairs(document, SEP)
    if len(pairs) <= length or policy == 'trim':
      expected[tuple(pairs[:length])] += 1
  found = collections.Counter()
  for row in rows_in_order(s, s.accounting['rows_per_epoch']):
    segments = [r[4] for r in row]
    real = [g for g in segments if g]
    assert real == sorted(real)
    assert segments == real + [0] * (length - len(real))  # padding at the end alone
    assert sorted(set(real)) == list(range(1, len(set(real)) + 1))
    for g in set(real):
      part = [r for r in row if r[4] == g]
      found[tuple((r[0], r[1]) for r in part)] += 1
      assert [r[3] for r in part] == list(range(len(part)))
      assert [r[5] for r in part] == [True] + [False] * (len(part) - 1)
      assert all(r[2] == 1.0 for r in part)
    assert all(r == (0, 0, 0.0, 0, 0, False) for r in row if not r[4])
  assert found == expected


@pytest.mark.parametrize('length, batch_size', [(1, 1), (5, 3), (8, 4), (16, 2), (64, 1)])
def test_segments_are_the_lanes(corpus_dir, length, batch_size):
  s = open_stream(corpus_dir, length=length, batch_size=batch_size, form='segments')
  documents = documents_of(corpus_dir)
  orders, at = [], 0
  previous = [None] * batch_size
  for epoch in range(3):
    order = s._source._layout.line(epoch).order.tolist()
    assert sorted(order) == list(range(9))
    orders.append(order)
    for batch in oracles.lane_batches([documents[d] for d in order], length, batch_size, SEP):
      got = rows_of(s.batch(at))
      at += 1
      for lane, (row, expected) in enumerate(zip(got, batch)):
        assert [(t, y, p, start) for t, y, _, p, _, start in row] == \
               [(t, y, p, start) for t, y, p, _, start in expected]
        assert all(mask == 1 for _, _, mask, _, _, _ in row)
        for *_, segment, start in row:
          assert segment >= 1
          assert (segment != previous[lane]) == start  # a new id where, and only where, one starts
          previous[lane] = segment
  assert at == 3 * s.accounting['rows_per_epoch'] // batch_size
  assert orders[0] != orders[1]


@pytest.mark.parametrize('form', FORMS, ids=str)
def test_every_pair_is_trained_on_or_counted(corpus_dir, form):
  s = open_stream(corpus_dir, **form)
  account = s.accounting
  documents = documents_of(corpus_dir)
  pairs = [p for d in documents for p in oracles.document_pairs(d, SEP)]
  assert account['tokens'] == len(pairs) == sum(map(len, documents)) + 9
  assert account['bytes'] == sum(map(len, documents))
  assert account['documents'] == 9
  trained = collections.Counter()
  for row in rows_in_order(s, account['rows_per_epoch']):
    trained.update((r[0], r[1]) for r in row if r[2])
  assert sum(trained.values()) == account['tokens_per_epoch']
  lost = account['trimmed_tokens'] + account['dropped_tokens'] + account['tail_tokens']
  assert sum(trained.values()) + lost == account['tokens']
  assert not trained - collections.Counter(pairs)  # nothing twice, nothing made up


@pytest.mark.parametrize('form', FORMS, ids=str)
@pytest.mark.parametrize('threads', [0, 1, 2])
def test_iteration_is_batch_0_1_2(corpus_dir, form, threads):
  s = open_stream(corpus_dir, threads=threads, **form)
  for i in range(40):
    assert_same(next(s), s.batch(i))
  s.close()


@pytest.mark.parametrize('form', FORMS, ids=str)
def test_seed_decides_everything(corpus_dir, form):
  a, b, c = (open_stream(corpus_dir, seed=seed, **form) for seed in (3, 3, 4))
  for i in (0, 1, 17, 1000):
    assert_same(a.batch(i), b.batch(i))
  assert any(not np.array_equal(a.batch(i)['tokens'], c.batch(i)['tokens']) for i in range(3))


@pytest.mark.parametrize('form', FORMS, ids=str)
@pytest.mark.parametrize('num_hosts', [2, 4])
def test_hosts_share_the_batch_of_one(corpus_dir, form, num_hosts):
  one = open_stream(corpus_dir, **form)
  hosts = [open_stream(corpus_dir, host_index=h, num_hosts=num_hosts, **form)
           for h in range(num_hosts)]
  for _ in range(12):
    whole = next(one)
    parts = [next(h) for h in hosts]
    assert {len(p['tokens']) for p in parts} == {4 // num_hosts}
    assert_same(whole, {k: np.concatenate([p[k] for p in parts]) for k in whole})
  assert len({json.dumps(s.state()) for s in [one, *hosts]}) == 1


@pytest.mark.parametrize('form', [FORMS[0], FORMS[3]], ids=str)
@pytest.mark.parametrize('threads', [0, 1, 2])
def test_resumes_at_the_exact_element(corpus_dir, form, threads):
  straight = open_stream(corpus_dir, threads=threads, **form)
  expected = [straight.batch(i) for i in range(25)]
  saved = [straight.state()]
  for _ in range(20):
    next(straight)
    saved.append(straight.state())
  resumed = open_stream(corpus_dir, threads=threads, **form)
  for i, state in enumerate(saved):
    if i % 3 == 0:  # with a reader already under way, or not yet
      next(resumed)
    resumed.restore(json.loads(json.dumps(state)))
    assert resumed.state() == state
    for k in range(i, i + 3):
      assert_same(next(resumed), expected[k])
  fresh = open_stream(corpus_dir, threads=threads, **form)
  fresh.restore(saved[13])
  assert_same(next(fresh), expected[13])


HOSTS = (4, 2, 1, 4, 1, 2)   # of one run, each for a batch


def on_changing_hosts(open_one):
  """The batches of a run that is stopped after each, and carried on by another number of hosts."""
  state, batches = None, []
  for num_hosts in HOSTS:
    hosts = [open_one(host_index=h, num_hosts=num_hosts) for h in range(num_hosts)]
    if state is not None:
      for host in hosts:
        host.restore(json.loads(state))
    parts = [next(host) for host in hosts]
    state, = {json.dumps(host.state()) for host in hosts}   # one for all
    batches.append({k: np.concatenate([p[k] for p in parts]) for k in parts[0]})
    for host in hosts:
      host.close()
  return batches


@pytest.mark.parametrize('form', [*FORMS, {'form': 'segments', 'align': True}], ids=str)
def test_other_numbers_of_hosts_read_every_document_once(tmp_path, form):
  """Twelve documents, each byte of which tells document and place: two epochs of three batches."""
  for i in range(12):
    (tmp_path / f'{i:02}.txt').write_bytes(bytes(range(16 * i, 16 * i + 15)))
  batches = on_changing_hosts(lambda **hosts: open_stream(tmp_path, length=16, threads=0, prefetch=0,
                                                          **form, **hosts))
  straight = open_stream(tmp_path, length=16, **form)
  for i, batch in enumerate(batches):
    assert_same(batch, straight.batch(i))
  for epoch in (batches[:3], batches[3:]):
    ids = [y for batch in epoch for y in batch['targets'][batch['loss_mask'] == 1] if y != SEP]
    assert sorted(ids) == [16 * i + at for i in range(12) for at in range(15)]


@pytest.mark.parametrize('form', [
    {'form': 'masked'},
    {'form': 'pairs', 'generator': 'translate', 'source_length': 64},
    {'form': 'labels', 'generator': 'sentiment', 'length': 340},
    {'corpus': 'tasks', 'tasks': ('passkey',), 'length': 400}], ids=str)
def test_other_numbers_of_hosts_read_the_same_rows(corpus_dir, form):
  made = {} if form.get('form') == 'masked' else {'files': '', 'corpus': 'generated', 'length': 64}
  if form.get('form') in ('pairs', 'labels'):
    made['long_documents'] = 'drop'
  open_one = lambda **hosts: open_stream(corpus_dir, **(dict(threads=0, prefetch=0) | made | form | hosts))
  straight = open_one()
  batches = on_changing_hosts(open_one)
  for i, batch in enumerate(batches):
    assert_same(batch, straight.batch(i))
  assert len({batch['tokens'].tobytes() for batch in batches}) == len(HOSTS)


@pytest.mark.parametrize('change', [
    {'length': 9}, {'batch_size': 8}, {'seed': 1}, {'form': 'segments'},
    {'long_documents': 'trim'}], ids=str)
def test_refuses_the_state_of_another_stream(corpus_dir, change):
  state = open_stream(corpus_dir).state()
  (field, value), = change.items()
  with pytest.raises(ConfigError, match=f'{field} was .* and is {value!r}'):
    open_stream(corpus_dir, **change).restore(state)


def test_refuses_the_state_of_another_corpus_or_split(corpus_dir, tmp_path):
  state = open_stream(corpus_dir).state()
  for i, document in enumerate(documents_of(corpus_dir)):
    (tmp_path / f'{i}.txt').write_bytes(bytes(document))
  same = open_stream(tmp_path)
  same.restore(state)  # the same content elsewhere, written later, is the same stream
  (tmp_path / '3.txt').write_bytes(b'changed')
  with pytest.raises(ConfigError, match='saved data stream is another one: content was'):
    open_stream(tmp_path).restore(state)
  with pytest.raises(ConfigError, match='tokenizer was None'):
    same.restore({'next_index': 3})


def test_small_corpus_repeats_within_a_batch(tmp_path):
  (tmp_path / 'a.txt').write_bytes(b'abcdefgh')
  s = open_stream(tmp_path, length=4, batch_size=8)
  assert s.accounting['rows_per_epoch'] == 2
  assert s.accounting['tail_tokens'] == 1
  rows = collections.Counter(r[0][0] for r in rows_of(next(s)))
  assert rows == {SEP: 4, ord('d'): 4}


def test_documents_for_evaluation(corpus_dir):
  documents = stream.open_documents(config_of(corpus_dir), 'train')
  expected = documents_of(corpus_dir)
  assert len(documents) == 9
  assert documents.lengths.tolist() == [len(d) + 1 for d in expected]
  assert documents.total_tokens == sum(map(len, expected)) + 9
  assert documents.total_bytes == sum(map(len, expected))
  for i, d in enumerate(expected):
    assert documents.document(i).tolist() == [SEP] + d
    assert documents.document(i).dtype == np.int32
  for i in (-1, 9):
    with pytest.raises(IndexError):
      documents.document(i)


@pytest.mark.parametrize('kwargs, message', [
    ({'corpus': 'file'}, r"^data\.corpus='file': must be one of .* \(did you mean \"files\"\?\)"),
    ({'corpus': 'files'}, r"^data\.files='': data\.corpus='files' needs it"),
    ({'corpus': 'tfds'}, r"^data\.tfds_name='': data\.corpus='tfds' needs it"),
    ({'files': '*.txt'}, r"^data\.files='\*\.txt': is not read with data\.corpus='stdlib'"),
    ({'tfds_splits': ('train',)}, r"^data\.tfds_splits=\('train',\): must be empty or three"),
    ({'split': 'hashed'}, r"^data\.split='hashed': .* \(did you mean \"hash\"\?\)"),
    ({'form': 'segment'}, r"^data\.form='segment': .* \(did you mean \"segments\"\?\)"),
    ({'long_documents': 'cut'}, r"^data\.long_documents='cut': must be one of split, trim, drop"),
    ({'form': 'segments', 'long_documents': 'trim'},
     r"^data\.long_documents='trim': must be 'split' with data\.form='segments'"),
    ({'validation_fraction': -0.1}, r'^data\.validation_fraction=-0\.1: must be at least 0'),
    ({'test_fraction': float('nan')}, r'^data\.test_fraction=nan: must be'),
    ({'validation_fraction': 0.5, 'test_fraction': 0.5}, r'= 1\.0: must be below 1'),
    ({'length': 0}, r'^data\.length=0: must be at least 1'),
    ({'batch_size': 0}, r'^data\.batch_size=0: must be at least 1'),
    ({'threads': -1}, r'^data\.threads=-1: must be at least 0'),
    ({'threads': 3, 'prefetch': 2}, r'^data\.prefetch=2: must be 0 or at least data\.threads=3'),
])
def test_config_mistakes(kwargs, message):
  with pytest.raises(ConfigError, match=message) as e:
    stream.Config(**kwargs)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize('kwargs, message', [
    ({'length': 1000}, r'^data\.length=1000: the split has only 272 tokens'),
    ({'form': 'segments', 'batch_size': 40}, r'^data\.batch_size=40: .* has only 272 tokens'),
    ({'length': 1, 'long_documents': 'drop'}, r"^data\.long_documents='drop': all 9 documents"),
    ({'batch_size': 5, 'num_hosts': 2}, r'^data\.batch_size=5: must be a multiple of .*, 2'),
    ({'host_index': 2, 'num_hosts': 2}, r'^host_index=2: must be in 0\.\.1'),
    ({'seed': -1}, r'^seed=-1: must be at least 0'),
    ({'tokenizer': 'byte'}, r"^data\.tokenizer='byte': .* \(did you mean \"bytes\"\?\)"),
])
def test_opening_mistakes(corpus_dir, kwargs, message):
  with pytest.raises(ConfigError, match=message):
    open_stream(corpus_dir, **kwargs)


def test_config_import_is_light():
  """Reading a config must not pay for Grain or TFDS: --help answers in seconds."""
  import subprocess
  code = ("import sys; import longctx.data.stream as s; s.Config(); "
          "heavy = 'grain', 'tensorflow_datasets', 'sentencepiece', 'jax'; "
          "print([m for m in heavy if m in sys.modules])")
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == '[]'
