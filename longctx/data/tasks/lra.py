"""The tasks of Long Range Arena over files: Tay et al. 2020, arXiv:2011.04006.

`eval.files` is a folder that holds, each as its makers pack it,

    lra_text        aclImdb/{train,test}/{pos,neg}/*.txt      IMDB reviews: positive or negative
    lra_retrieval   tsv_data/new_aan_pairs.{train,test}.tsv   label, two ids, two papers: cited?
    lra_listops     listops-1000/basic_{train,test}.tsv       Source, Target, of LRA's generator
    lra_image       cifar-10-batches-bin/ or -py/             CIFAR-10 in grey: 1,024 bytes
    lra_pathfinder  pathfinder32/curv_contour_length_14/      metadata/*.npy, imgs/: is there a path
                                                              (LRA's "hard")

and lra_text_train ... read what models are trained on. An example is a whole item with full stops
before it, up to the length. LRA cuts what is longer; here items of more bytes than there is room
for are left out, the same ones for every tokenizer, and info['fit'] and info['of'] say how many
remain. Items come in an order of the seed, each once; where they are used up a test is refused, and
training begins anew in another order (held-out text of data.corpus='tasks' is of the set that its
tasks name: evaluate with the tasks of the test). Pixels are bytes: data.tokenizer='bytes'.

As google-research/long-range-arena: round brackets of ListOps are dropped; grey is TensorFlow's
rgb_to_grayscale; of Pathfinder the first eighty in a hundred are for training and the last ten for
the test, empty images skipped. Differs: IMDB's and CIFAR's training sets are not cut for
validation; "]" stays "]", which LRA spells X.
Held by: tests/test_task_lra.py.
"""

import functools
import os
import pathlib
import pickle
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from longctx.data.tasks import fit, listops, scoring
from longctx.data.tasks.example import Draw, Example, Task, generator
from longctx.errors import ConfigError, check, labelled

CIFAR = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
GREY = (0.2989, 0.5870, 0.1140)
PIXELS, COLOURS = 1024, 3
PATHFINDER = 'pathfinder32/curv_contour_length_14'


class Items(NamedTuple):
  """What a folder holds of one split."""

  sizes: np.ndarray                            # bytes of each body
  read: Callable[[int], tuple[bytes, str]]     # number -> body, label


class Kind(NamedTuple):
  """A task over files."""

  open: Callable[[pathlib.Path, str], Items]   # folder, 'train' or 'test'
  paths: Callable[[pathlib.Path, str], list[pathlib.Path]]   # the files that `open` and its items read
  head: bytes
  question: bytes
  labels: tuple[str, ...]


def _there(folder: pathlib.Path, *names: str) -> pathlib.Path:
  """The first of these that the folder holds."""
  for name in names:
    if (folder / name).exists():
      return folder / name
  raise ConfigError(f'{folder}: holds no {" or ".join(names)}; give the folder in which it is, see '
                    'longctx/data/tasks/lra.py')


REVIEWS = (('neg', 'negative'), ('pos', 'positive'))


def _review_paths(folder: pathlib.Path, split: str) -> list[pathlib.Path]:
  return [path for part, _ in REVIEWS for path in _there(folder, f'aclImdb/{split}/{part}').glob('*.txt')]


def _reviews(folder: pathlib.Path, split: str) -> Items:
  found = []
  for part, label in REVIEWS:
    with os.scandir(_there(folder, f'aclImdb/{split}/{part}')) as entries:
      found += sorted((one.path, one.stat().st_size, label) for one in entries
                      if one.name.endswith('.txt'))
  return Items(np.array([size for _, size, _ in found]),
               lambda i: (pathlib.Path(found[i][0]).read_bytes(), found[i][2]))


def _lines(path: pathlib.Path, first: int, parse: Callable[[bytes], tuple[bytes, str]]) -> Items:
  """The lines of a table from `first` on, of which only the places are kept: it may be large."""
  places, sizes, at = [], [], 0
  with path.open('rb') as file:
    for number, line in enumerate(file):
      if number >= first and line.strip():
        try:
          body, _ = parse(line.rstrip(b'\r\n'))
        except (ValueError, KeyError, IndexError) as e:
          raise ConfigError(f'{path}: line {number + 1} is not as Long Range Arena writes it; make '
                            f'the file anew ({e})') from e
        places.append((at, len(line)))
        sizes.append(len(body))
      at += len(line)

  def read(i: int) -> tuple[bytes, str]:
    with path.open('rb') as file:
      file.seek(places[i][0])
      return parse(file.read(places[i][1]).rstrip(b'\r\n'))

  return Items(np.array(sizes), read)


def _two_papers(line: bytes) -> tuple[bytes, str]:
  label, _, _, one, other = line.split(b'\t')
  return b'First: ' + one + b'\nSecond: ' + other, {0.0: 'no', 1.0: 'yes'}[float(label)]


def _lists(line: bytes) -> tuple[bytes, str]:
  source, target = line.split(b'\t')
  return b' '.join(re.sub(rb'[()]', b' ', source).split()), str(int(target))


def grey(planes: np.ndarray) -> bytes:
  """[3, pixels] of red, green and blue -> a byte a pixel, rounded as TensorFlow does."""
  light = np.tensordot(GREY, planes / np.float32(255), 1)
  return np.clip(np.floor(light * 255.5), 0, 255).astype(np.uint8).tobytes()


class _Arrays(pickle.Unpickler):
  """Reads pickles of NumPy arrays, and nothing that runs code."""

  def find_class(self, module: str, name: str):
    if (module, name) in (('numpy', 'ndarray'), ('numpy', 'dtype'), ('_codecs', 'encode')) or (
        module in ('numpy.core.multiarray', 'numpy._core.multiarray') and name == '_reconstruct'):
      return super().find_class(module, name)
    raise pickle.UnpicklingError(f'{module}.{name} has no place in it')


def _picture_paths(folder: pathlib.Path, split: str) -> list[pathlib.Path]:
  where = _there(folder, 'cifar-10-batches-bin', 'cifar-10-batches-py')
  names = ['test_batch'] if split == 'test' else [f'data_batch_{i}' for i in range(1, 6)]
  return [_there(where, name + ('.bin' if where.name.endswith('-bin') else '')) for name in names]


def _pictures(folder: pathlib.Path, split: str) -> Items:
  labels, pixels = [], []
  for path in _picture_paths(folder, split):
    if path.suffix == '.bin':
      rows = np.frombuffer(path.read_bytes(), np.uint8)
      row = 1 + COLOURS * PIXELS
      check(rows.size % row == 0, f'{path}: has {rows.size} bytes, not a multiple of '
            f'{row}; fetch it again')
      rows = rows.reshape(-1, row)
      labels.append(rows[:, 0])
      pixels.append(rows[:, 1:])
      continue
    try:
      with path.open('rb') as file:
        batch = _Arrays(file, encoding='bytes').load()
      labels.append(np.asarray(batch[b'labels']))
      pixels.append(np.asarray(batch[b'data'], np.uint8).reshape(-1, COLOURS * PIXELS))
    except (pickle.UnpicklingError, EOFError, KeyError, ValueError) as e:
      raise ConfigError(f'{path}: is no batch of CIFAR-10; fetch it again ({e})') from e
  labels, pixels = np.concatenate(labels), np.concatenate(pixels)
  return Items(np.full(len(labels), PIXELS),
               lambda i: (grey(pixels[i].reshape(COLOURS, PIXELS)), CIFAR[labels[i]]))


def _metadata(folder: pathlib.Path) -> list[pathlib.Path]:
  by_number = lambda path: (len(path.name), path.name)
  return sorted(_there(folder, f'{PATHFINDER}/metadata').glob('*.npy'), key=by_number)


def _path_paths(folder: pathlib.Path, split: str) -> list[pathlib.Path]:
  return [*_metadata(folder), *(path for path, _ in _path_images(folder, split))]


def _path_images(folder: pathlib.Path, split: str) -> list[tuple[pathlib.Path, int]]:
  """The images of a split that hold something, with whether there is a path."""
  where, rows = _there(folder, PATHFINDER), []
  for path in _metadata(folder):
    rows += [line.split() for line in path.read_text().splitlines() if line]
  check(bool(rows), f"{where / 'metadata'}: holds no line of any *.npy; make the images anew")
  count = len(rows)
  rows = rows[:count * 8 // 10] if split == 'train' else rows[count * 9 // 10:]
  kept = [(where / row[0] / row[1], int(row[3])) for row in rows]
  return [(path, label) for path, label in kept if _there(path.parent, path.name).stat().st_size]


def _paths(folder: pathlib.Path, split: str) -> Items:
  kept = _path_images(folder, split)
  return Items(np.full(len(kept), PIXELS), lambda i: (_png(kept[i][0]), ('no', 'yes')[kept[i][1]]))


def _png(path: pathlib.Path) -> bytes:
  from matplotlib import image
  light = np.asarray(image.imread(path))
  light = light if light.ndim == 2 else light[..., 0]   # grey written as colours
  check(light.size == PIXELS, f'{path}: has {light.size} pixels; must have {PIXELS}')
  return np.round(light * 255).astype(np.uint8).tobytes()


YES_NO = ('no', 'yes')
PICTURE = b'The grey values of a picture, 32 rows of 32:\n'
PAIRS, LISTS = 'tsv_data/new_aan_pairs.{}.tsv', 'listops-1000/basic_{}.tsv'
KINDS = {
    'lra_text': Kind(_reviews, _review_paths, b'A review of a film:\n', b'\nIs it positive or negative? It is',
                     ('negative', 'positive')),
    'lra_retrieval': Kind(lambda folder, split: _lines(
        _there(folder, PAIRS.format(split)), 0, _two_papers),
                          lambda folder, split: [_there(folder, PAIRS.format(split))], b'Two papers.\n',
                          b'\nDoes one cite the other?', YES_NO),
    'lra_listops': Kind(lambda folder, split: _lines(
        _there(folder, LISTS.format(split)), 1, _lists),
                        lambda folder, split: [_there(folder, LISTS.format(split))],
                        listops.HEAD, listops.QUESTION, tuple('0123456789')),
    'lra_image': Kind(_pictures, _picture_paths, PICTURE, b'\nIt shows a', CIFAR),
    'lra_pathfinder': Kind(_paths, _path_paths, PICTURE, b'\nDoes a path join the two dots?', YES_NO),
}


@functools.lru_cache(maxsize=8)
def items(name: str, files: str, split: str) -> Items:
  found = KINDS[name].open(pathlib.Path(files).expanduser(), split)
  check(len(found.sizes) > 0, f'{name}: has no item of its {split} set; fetch the files again')
  return found


def paths(name: str, folder: pathlib.Path) -> list[pathlib.Path]:
  """The files of the folder that a task of TASKS reads."""
  kind = name.removesuffix('_train')
  return KINDS[kind].paths(folder, 'test' if kind == name else 'train')


@functools.lru_cache(maxsize=32)
def _order(*names) -> np.ndarray:
  """The numbers of items that fit, in the order of this seed and pass."""
  *seeds, count = names
  return generator(*seeds).permutation(count)


def make(draw: Draw, name: str, split: str) -> Example:
  kind, full = KINDS[name], name if split == 'test' else f'{name}_{split}'
  check(bool(draw.files), f'{full}: reads files; set eval.files (in training, data.task_files; for lm_eval, --files) to '
        'the folder that holds them, see longctx/data/tasks/lra.py')
  with labelled(draw.label('files')):
    held = items(name, draw.files, split)
  new_tokens = 1 + max(map(len, kind.labels))
  # In bytes, of which no tokenizer makes more tokens: the same items for all.
  around = 1 + new_tokens + len(kind.head) + len(kind.question)
  fitting = np.flatnonzero(held.sizes + around <= draw.length)
  check(len(fitting) > 0, f'{full}: length={draw.length}: must be at least '
        f'{around + held.sizes.min()}, for its shortest item; with {around + held.sizes.max()} '
        'all fit')
  turn, at = divmod(draw.index, len(fitting))
  check(turn == 0 or split == 'train', f'{full}: example {draw.index}: only {len(fitting)} items '
        f'of at most {draw.length} bytes are there, each once; set eval.samples to at most '
        'that, or a greater length')
  order = _order(full, draw.length, draw.seed, turn, len(fitting))
  body, label = held.read(int(fitting[order[at]]))
  prompt, _ = fit.filled(draw, lambda part: part + kind.head + body + kind.question,
                         listops.dots(draw), new_tokens, full)
  return Example(
      prompt=prompt, question=len(prompt) - len(kind.question), target=f' {label}'.encode(),
      references=(label,), new_tokens=new_tokens,
      info=dict(fit=len(fitting), of=len(held.sizes)))


# Of the Transformer of the paper's table 1, with the tokens it reads.
PUBLISHED = {'lra_listops': (36.37, 2000), 'lra_text': (64.27, 4000),
             'lra_retrieval': (57.46, 8000), 'lra_image': (42.44, 1024),
             'lra_pathfinder': (71.40, 1024)}

# Floors: of sets with as many of each label; of ListOps, the most frequent answer.
TASKS = {
    name + suffix: Task(
        make=functools.partial(make, name=name, split=split), score=scoring.exact, reads=('files',), placed=False,
        floor=0.17 if name == 'lra_listops' else 1 / len(kind.labels),
        source='Long Range Arena, arXiv:2011.04006',
        published={} if suffix else {f'Transformer at {PUBLISHED[name][1]}': PUBLISHED[name][0]})
    for name, kind in KINDS.items() for split, suffix in (('test', ''), ('train', '_train'))
}
