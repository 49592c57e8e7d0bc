"""Long Range Arena over files: tiny ones, written here as their makers write them."""

import json
import os
import pathlib
import pickle

import numpy as np
import pytest

from longctx import lm_eval
from longctx.data import tokenizer
from longctx.data.tasks import example, lra
from longctx.data.tasks.table import TASKS
from longctx.errors import ConfigError
from longctx.evaluation import report, tasks
from longctx.evaluation.subject import Constant, Oracle

REVIEWS = {('test', 'pos'): {'0_9.txt': 'A joy.<br />Go.', '10_8.txt': 'Fine caf\u00e9 scenes.', '2_7.txt': 'x' * 900},
           ('test', 'neg'): {'1_2.txt': 'A bore.'}, ('train', 'pos'): {'0_9.txt': 'Good.'},
           ('train', 'neg'): {'0_1.txt': 'Bad.', '1_1.txt': 'Worse.'}}
# As LRA's generator writes [MAX 4 [MIN 2 3 ] 1 ] and [SM 8 9 ].
LISTS = ('Source\tTarget\r\n( ( ( ( [MAX 4 ) ( ( ( [MIN 2 ) 3 ) ] ) ) 1 ) ] )\t4\r\n( ( ( [SM 8 ) 9 ) ] )\t7\r\n')
PAPERS = '1.0\tA1\tB2\tWe cite.\tWe are cited.\n0.0\tA3\tB4\tAlone.\tAlone too.\n'


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  return write_files(tmp_path_factory.mktemp('lra'))


def write_files(folder):
  """All that a folder for `eval.files` may hold; its path."""
  for (split, label), texts in REVIEWS.items():
    where = folder / 'aclImdb' / split / label
    where.mkdir(parents=True)
    for name, text in texts.items():
      (where / name).write_text(text)
  for name, text in (('listops-1000/basic_{}.tsv', LISTS), ('tsv_data/new_aan_pairs.{}.tsv', PAPERS)):
    for split in ('train', 'test'):
      path = folder / name.format(split)
      path.parent.mkdir(exist_ok=True)
      path.write_bytes(text.encode())
  pictures(folder / 'cifar-10-batches-bin', binary=True)
  write_paths(folder)
  return str(folder)


def planes(number):
  """Red, green and blue of a picture: [3, 1024]."""
  return np.random.default_rng(number).integers(0, 256, (3, 1024)).astype(np.uint8)


def pictures(folder, binary):
  folder.mkdir()
  for name, numbers in {'test_batch': (0, 1), **{f'data_batch_{i}': (10 * i,) for i in range(1, 6)}}.items():
    labels = [number % 10 for number in numbers]
    data = np.stack([planes(number).reshape(-1) for number in numbers])
    if binary:
      rows = b''.join(bytes([label]) + row.tobytes() for label, row in zip(labels, data, strict=True))
      (folder / f'{name}.bin').write_bytes(rows)
    else:   # keys and strings are bytes, as Python 2 wrote them
      batch = {b'data': data, b'labels': labels, b'batch_label': name.encode(), b'filenames': [b'a.png'] * len(labels)}
      (folder / name).write_bytes(pickle.dumps(batch, protocol=2))


def write_paths(folder):
  from matplotlib import image
  where = folder / 'pathfinder32/curv_contour_length_14'
  (where / 'metadata').mkdir(parents=True)
  for batch in (2, 10):   # the tenth comes after the second
    (where / f'imgs/{batch}').mkdir(parents=True)
    lines = []
    for i in range(10):
      light = np.full((32, 32), batch * 10 + i, np.uint8)
      path = where / f'imgs/{batch}/sample_{i}.png'
      image.imsave(path, light, cmap='gray', vmin=0, vmax=255)
      if batch == 10 and i == 8:
        path.write_bytes(b'')
      lines.append(f'imgs/{batch} sample_{i}.png {i} {i % 2} 3 14 1.0\n')
    (where / f'metadata/{batch}.npy').write_text(''.join(lines))


def draw(name, files, length=1400, index=0, tok=None, **kwargs):
  return example.example(name, lra.TASKS[name], tok or tokenizer.Bytes(), length=length, index=index, files=files,
                         **kwargs)


def body(one, name):
  """What stands between the instruction and the question, full stops before it gone."""
  kind = lra.KINDS[name.removesuffix('_train')]
  before, after = one.prompt[:one.question].split(kind.head, 1)
  assert before.replace(b'. ', b'').strip(b'. ') == b'' and one.prompt[one.question:] == kind.question
  return after


def everything(name, files, length=1400):
  """Body -> label of all that fits."""
  first = draw(name, files, length)
  drawn = [draw(name, files, length, index) for index in range(first.info['fit'])]
  return {body(one, name): one.references[0] for one in drawn}


def test_reviews_and_those_that_do_not_fit(files):
  texts = {text.encode(): {'pos': 'positive', 'neg': 'negative'}[label]
           for (split, label), found in REVIEWS.items() if split == 'test' for text in found.values()}
  assert everything('lra_text', files) == texts
  short = everything('lra_text', files, 300)
  assert short == {text: label for text, label in texts.items() if len(text) < 200}
  one = draw('lra_text', files, 300)
  assert one.info == {'fit': 3, 'of': 4} and set(everything('lra_text_train', files).values()) == {
      'positive', 'negative'}


def test_how_many_items_fit_stands_in_each_line_and_below_the_tables(files, tmp_path, capsys):
  put = lambda length: tasks.run(
      Constant(tokenizer.Bytes(), b' positive'), tasks.Config(tasks=('lra_text',), lengths=(length,), samples=3, files=files),
      str(tmp_path), dict(checkpoint='c', model='m', tokenizer='bytes'), lengths=(length,))
  put(300)
  assert {(one['fit'], one['of']) for one in map(json.loads, (tmp_path / 'tasks.jsonl').read_text().splitlines())} == {(3, 4)}
  said = 'lra_text at 300: 3 of 4 items fit; the longer ones were left out.'
  assert said in (tmp_path / 'tasks.md').read_text() and said in capsys.readouterr().out
  (tmp_path / 'config.json').write_text(json.dumps(dict(model=dict(name='decoder'), data=dict(length=300, tokenizer='bytes'))))
  assert said in report.render(str(tmp_path)).decode()
  put(1300)
  assert 'items fit' not in (tmp_path / 'tasks.md').read_text()


def test_lists_lose_their_round_brackets(files):
  assert everything('lra_listops', files) == {b'[MAX 4 [MIN 2 3 ] 1 ]': '4', b'[SM 8 9 ]': '7'}


def test_papers(files):
  assert everything('lra_retrieval', files) == {b'First: We cite.\nSecond: We are cited.': 'yes',
                                                b'First: Alone.\nSecond: Alone too.': 'no'}


def test_pictures_in_grey_from_both_formats(files, tmp_path):
  grey = lambda number: bytes(int(np.floor((0.2989 * r + 0.587 * g + 0.114 * b) / 255 * 255.5))
                              for r, g, b in planes(number).astype(float).T)
  wanted = {grey(0): 'airplane', grey(1): 'automobile'}
  assert everything('lra_image', files) == wanted
  pictures(tmp_path / 'cifar-10-batches-py', binary=False)
  assert everything('lra_image', str(tmp_path)) == wanted
  assert draw('lra_image_train', str(tmp_path)).info == {'fit': 5, 'of': 5}
  assert lra.grey(np.array([[255, 0], [255, 0], [255, 0]])) == b'\xff\x00'


def test_pickles_that_run_code_are_refused(tmp_path):
  pictures(tmp_path / 'cifar-10-batches-py', binary=False)
  marker = tmp_path / 'ran'

  class Evil:
    def __reduce__(self):
      return os.mkdir, (str(marker),)

  (tmp_path / 'cifar-10-batches-py/test_batch').write_bytes(pickle.dumps({b'data': Evil(), b'labels': []}))
  with pytest.raises(ConfigError, match=r'is no batch of CIFAR-10; fetch it again .*mkdir has no place in it'):
    draw('lra_image', str(tmp_path))
  assert not marker.exists()


def test_paths_are_the_first_eight_and_the_last_tenth(files):
  lights = lambda name: {light[0]: label for light, label in everything(name, files).items()}
  # Of 109 and 108 in the test the latter is an empty image.
  assert lights('lra_pathfinder') == {109: 'yes'}
  assert lights('lra_pathfinder_train') == {light: ('no', 'yes')[light % 2] for light in (*range(20, 30), *range(100, 106))}
  assert len(set(body(draw('lra_pathfinder', files), 'lra_pathfinder'))) == 1


@pytest.mark.parametrize('name', sorted(lra.TASKS))
def test_the_laws_of_tasks_hold(name, files):
  task = lra.TASKS[name]
  for length in (1300, 1301):
    one = draw(name, files, length)
    assert 1 + len(one.prompt) + one.new_tokens == length and one == draw(name, files, length)
    assert task.score(one.target.decode(), one) == 1 and task.score('', one) == 0
    assert task.score(one.without_context.decode(), one) == 0
    assert len(one.target) <= one.new_tokens
  with pytest.raises(ConfigError, match=rf'{name}: length=8: must be at least (\d+), for its shortest item'):
    draw(name, files, 8)
  with pytest.raises(ConfigError, match=rf'{name}: reads files; set eval.files'):
    draw(name, '')


def test_each_item_once_a_test_and_again_in_another_order_in_training(files):
  seeds = {tuple(body(draw('lra_text', files, seed=seed, index=i), 'lra_text') for i in range(4)) for seed in range(8)}
  assert len(seeds) > 1
  with pytest.raises(ConfigError, match=r'lra_text: example 4: only 4 items of at most 1400 bytes are there'):
    draw('lra_text', files, index=4)
  again = [[body(draw('lra_text_train', files, index=3 * turn + i), 'lra_text_train') for i in range(3)]
           for turn in range(6)]
  assert all(sorted(one) == sorted(again[0]) for one in again) and len({tuple(one) for one in again}) > 1


def test_subwords_choose_the_same_items(files, tmp_path):
  path = tmp_path / 'small.model'
  path.write_bytes(tokenizer.train_sentencepiece([b'A joy. A bore. It is positive or negative. ' * 50], 300))
  tok = tokenizer.load_tokenizer(str(path))
  one, same = draw('lra_text', files, 300, tok=tok), draw('lra_text', files, 300)
  assert body(one, 'lra_text') == body(same, 'lra_text') and one.info == same.info
  assert 1 + len(tok.encode(one.prompt)) + one.new_tokens == 300
  with pytest.raises(ConfigError, match='is not UTF-8, which a SentencePiece tokenizer needs'):
    draw('lra_image', files, tok=tok)


@pytest.mark.parametrize('name, path, text, said', [
    ('lra_text', 'aclImdb/test/neg', None, 'holds no aclImdb/test/neg; give the folder'),
    ('lra_text', 'aclImdb/test/neg', 'folder', 'has no item of its test set'),
    ('lra_listops', 'listops-1000/basic_test.tsv', 'Source\tTarget\n( [SM 8 )\n', 'basic_test.tsv: line 2 is not as'),
    ('lra_retrieval', 'tsv_data/new_aan_pairs.test.tsv', '2.0\ta\tb\tc\td\n', 'pairs.test.tsv: line 1 is not as'),
    ('lra_image', 'cifar-10-batches-bin/test_batch.bin', 'short', 'has 5 bytes, not a multiple of 3073'),
    ('lra_image', 'none', None, 'holds no cifar-10-batches-bin or cifar-10-batches-py'),
    ('lra_pathfinder', 'pathfinder32/curv_contour_length_14/metadata/1.npy', '', 'holds no line of any'),
])
def test_files_that_are_wrong_are_named(tmp_path, name, path, text, said):
  where = tmp_path / path
  if text == 'folder':
    for part in ('neg', 'pos'):
      (where.parent / part).mkdir(parents=True)
  elif text is not None:
    where.parent.mkdir(parents=True)
    where.write_text(text)
  with pytest.raises(ConfigError, match=rf"^data\.task_files='{tmp_path}': .*{said}"):
    draw(name, str(tmp_path), setting='data.task_{}')


def test_a_home_folder_is_found(files, monkeypatch):
  monkeypatch.setenv('HOME', str(pathlib.Path(files).parent))
  assert draw('lra_text', f'~/{pathlib.Path(files).name}').info['of'] == 4


def test_lm_eval_is_given_what_is_text(files, tmp_path, capsys):
  write = lambda *args: lm_eval.main(['longctx.lm_eval', f'--export={tmp_path}/d', '--lengths=1300', '--samples=2',
                                      '--tokenizer=bytes', *args])
  assert write('--tasks=lra_listops') == 2
  assert 'lra_listops: reads files; set eval.files (in training, data.task_files; for lm_eval, --files) to' in (
      capsys.readouterr().err)
  assert write('--tasks=lra_image', f'--files={files}') == 2
  assert '--tasks=lra_image: example 0 is no text but bytes' in capsys.readouterr().err
  assert not (tmp_path / 'd').exists()
  assert write('--tasks=lra_listops,mqar', f'--files={files}') == 0
  said = capsys.readouterr().err
  assert said == f'--files={files!r}: not read by mqar, whose text is their own\n'
  lines = [json.loads(line) for line in (tmp_path / 'd/lra_listops_1300.jsonl').read_text().splitlines()]
  assert sorted(line['target'] for line in lines) == [' 4', ' 7']
  about = {name: (tmp_path / f'd/{name}_1300.yaml').read_text() for name in ('lra_listops', 'mqar')}
  assert [f'"files": "{files}"' in text for text in about.values()] == [True, False]


@pytest.mark.parametrize('name', sorted(lra.KINDS))
def test_the_oracle_scores_a_hundred_and_who_always_says_one_label_his_share(name, files, tmp_path):
  put = lambda who, checkpoint: tasks.run(
      who, tasks.Config(tasks=(name,), lengths=(1300,), samples=len(made), files=files, controls=False), str(tmp_path),
      dict(checkpoint=checkpoint, model='m', tokenizer='bytes'), lengths=(1300,))[0].score.mean
  made = [draw(name, files, 1300, index=i) for i in range(draw(name, files, 1300).info['fit'])]
  assert put(Oracle(tokenizer.Bytes(), made), 'oracle') == 1
  assert not TASKS[name].placed and draw(name, files, 1300, depth=0.9) == made[0]
  labels = lra.KINDS[name].labels
  shares = [put(Constant(tokenizer.Bytes(), f' {label}'.encode()), label) for label in labels]
  assert shares == [pytest.approx(sum(one.references[0] == label for one in made) / len(made)) for label in labels]
  # Of sets with as many of each label that is the floor.
  assert sum(shares) == 1 and (name == 'lra_listops' or TASKS[name].floor == 1 / len(labels))
