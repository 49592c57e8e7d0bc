"""Rows of task examples: what is in them, what is learned of them, seeds, hosts, resumption."""

import json

import numpy as np
import pytest

from longctx.data import stream
from longctx.data.tasks import associations, example, sources
from longctx.data.tasks.table import TASKS
from longctx.data.tokenizer import Bytes
from longctx.errors import ConfigError

SEP = 256


def config_of(**settings):
  return stream.Config(**(dict(corpus='tasks', tasks=('passkey',), length=400, batch_size=4) | settings))


def open_stream(seed=0, host_index=0, num_hosts=1, split='train', **settings):
  return stream.open_stream(config_of(**settings), seed=seed, host_index=host_index, num_hosts=num_hosts,
                            split=split)


def open_documents(**settings):
  return stream.open_documents(config_of(**settings), 'validation')


def rows_of(batch):
  """Each row as (text, learned text, whether the separator after it is learned)."""
  for row in range(len(batch['tokens'])):
    one = {name: x[row] for name, x in batch.items()}
    count = int(one['segment_ids'].sum())
    assert one['tokens'][0] == SEP and one['targets'][count - 1] == SEP
    assert one['tokens'][1:count].tolist() == one['targets'][:count - 1].tolist()
    assert one['positions'][:count].tolist() == list(range(count))
    assert one['document_start'].tolist() == [True] + [False] * (len(one['tokens']) - 1)
    assert not any(one[name][count:].any() for name in one)   # padding
    learned = one['targets'][one['loss_mask'] == 1]
    yield bytes(one['tokens'][1:count].tolist()).decode(), learned.tolist()


def test_a_row_is_an_example_and_its_answer_alone_is_learned():
  for text, learned in rows_of(open_stream().batch(3)):
    key = text[-5:]
    assert text.endswith(f'The pass key is {key}') and f'The pass key is {key}. Remember it.' in text
    assert len(text) == 399
    assert learned == [*f' {key}'.encode(), SEP]


def test_all_of_a_row_may_be_learned():
  for text, learned in rows_of(open_stream(task_loss='all').batch(0)):
    assert learned == [*text.encode(), SEP]


def test_tasks_and_lengths_are_drawn_evenly_and_the_rest_is_padding():
  s = open_stream(tasks=('passkey', 'induction'), task_lengths=(320, 400), batch_size=64)
  texts = [text for text, _ in rows_of(s.batch(0))]
  kinds = [('pass key' in text, len(text) > 350) for text in texts]
  counts = [kinds.count((task, long)) for task in (True, False) for long in (True, False)]
  assert sum(counts) == 64 and min(counts) >= 6
  assert s.accounting['padding_fraction'] == pytest.approx(0.1, abs=0.03)
  assert s.accounting['bytes'] < s.accounting['tokens']   # separators have none


def test_no_row_is_one_of_another_seed_split_or_of_the_evaluation():
  texts = lambda s: [text for i in range(3) for text, _ in rows_of(s.batch(i))]
  seen = [texts(open_stream(**one)) for one in (dict(), dict(seed=1), dict(split='validation'))]
  documents = stream.open_documents(config_of(), 'validation')
  seen.append([bytes(documents.document(i)[1:].tolist()).decode() for i in range(len(documents))][:12])
  evaluated = [example.example('passkey', TASKS['passkey'], Bytes(), length=400, index=i)
               for i in range(12)]
  seen.append([(one.prompt + one.target).decode() for one in evaluated])
  for a in range(len(seen)):
    assert len(set(seen[a])) == 12
    assert all(set(seen[a]).isdisjoint(seen[b]) for b in range(a) if (a, b) != (3, 2))


def test_hosts_share_the_batch_of_one_and_a_seed_decides_it():
  whole = open_stream().batch(5)
  halves = [open_stream(host_index=h, num_hosts=2).batch(5) for h in (0, 1)]
  for name, rows in whole.items():
    np.testing.assert_array_equal(rows, np.concatenate([half[name] for half in halves]))
    assert rows.dtype == stream.DTYPES[name]


def test_resumes_at_the_exact_batch():
  straight, resumed = open_stream(), open_stream()
  for _ in range(3):
    next(straight)
  resumed.restore(json.loads(json.dumps(straight.state())))
  np.testing.assert_array_equal(next(straight)['tokens'], next(resumed)['tokens'])
  np.testing.assert_array_equal(next(resumed)['tokens'], resumed.batch(4)['tokens'])
  for change in (dict(tasks=('induction',)), dict(task_loss='all'), dict(task_lengths=(320,)), dict(seed=1)):
    with pytest.raises(ConfigError, match='saved data stream is another one'):
      open_stream(**change).restore(straight.state())


def test_a_text_counts_by_what_it_holds_and_not_by_its_path(tmp_path):
  sentences = 'Here is a sentence. And another one. ' * 20
  for name in ('a', 'b'):
    (tmp_path / name).write_text(sentences)
  content = lambda name, **more: open_documents(task_haystack=str(tmp_path / name), **more).content
  before = content('a')
  assert content('b') == before != content('a', tasks=('niah',))
  (tmp_path / 'a').write_text(sentences + 'A last one. ')   # beyond what the first examples show
  sources.forget()
  assert content('a') != before == content('b')
  with pytest.raises(ConfigError, match=r'^data\.task_haystack=.*none.: no file matches'):
    content('none')
  (tmp_path / 'c').write_text('. '.join(associations.NAMES))
  with pytest.raises(ConfigError, match=r'^data\.task_haystack=.*: holds all but 0 of the names'):
    content('c', tasks=('association',))


def test_held_out_documents_can_be_read_by_position():
  documents = stream.open_documents(config_of(task_lengths=(320, 400)), 'validation')
  assert set(documents.lengths.tolist()) == {320, 400}
  assert documents.total_tokens == documents.lengths.sum()
  assert documents.total_bytes == documents.total_tokens - len(documents)
  assert [len(documents.document(i)) for i in range(3)] == documents.lengths[:3].tolist()
  with pytest.raises(IndexError):
    documents.document(len(documents))


@pytest.mark.parametrize('settings, message', [
    (dict(tasks=()), r"^data\.tasks=\(\): data\.corpus='tasks' needs it"),
    (dict(corpus='stdlib'), r"^data\.tasks=\('passkey',\): is not read with data\.corpus='stdlib'"),
    (dict(tasks=('paskey',)), r"^data\.tasks='paskey': must be one of .* \(did you mean \"passkey\"\?\)"),
    (dict(task_loss='answers'), r"^data\.task_loss='answers': .* \(did you mean \"answer\"\?\)"),
    (dict(task_lengths=(401,)), r'^data\.task_lengths=401: must be at least 1 and at most 400'),
    (dict(length=100), r'^passkey: length=100: must be at least \d+'),
    (dict(form='segments'), r"^data\.corpus \(with data\.form='segments'\)='tasks': must be one of"),
    (dict(long_documents='trim'), r"^data\.long_documents='trim': does nothing with data\.corpus='tasks'"),
])
def test_mistakes(settings, message):
  with pytest.raises(ConfigError, match=message):
    open_stream(**settings)
