"""Tasks of this library as files that lm_eval runs on anybody's model; its tokenizers likewise.

For each task and length, NAME_LENGTH.yaml and .jsonl, an example a line; beside them the Python
that reads and scores them, which needs nothing of longctx. The tag longctx_NAME runs all lengths of
a task. The folder can be moved. Lengths are counted with the tokenizer given here: with another
model's, texts have more or fewer tokens. An answer may take its example's new_tokens, in tokens of
the model that writes (exported_class.py); --gen_kwargs max_gen_toks=N gives all N.
Held by: tests/test_lm_eval.py.
"""

import json
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from longctx.data.tasks import babilong_metric, scoring
from longctx.data.tasks.example import Example, depth_of, example
from longctx.data.tasks.table import TASKS, floor, text_of, unread
from longctx.data.tokenizer import SPACE, Bytes, SentencePiece, Tokenizer
from longctx.errors import ConfigError, check_choice
from longctx.evaluation import exported
from longctx.files import atomic_write

# Where scores of tasks may stand: modules that need the standard library and each other alone.
SCORES = (scoring, babilong_metric)
YAML = """\
class: !function longctx_class.Task
task: {name}
tag: [{tag}]
dataset_path: ""
dataset_name: ""
custom_dataset: !function longctx_tasks.load
dataset_kwargs: {{longctx_file: {file}}}
output_type: generate_until
test_split: test
num_fewshot: 0
doc_to_text: prompt
doc_to_target: target
target_delimiter: ""
process_results: !function longctx_tasks.process_results
metric_list: [{{metric: score, aggregation: mean, higher_is_better: true}}]
generation_kwargs: {{do_sample: false, until: []}}
metadata: {metadata}
"""


def export(folder: str, names: Sequence[str], *, lengths: Sequence[int], samples: int,
           tokenizer: Tokenizer, seed: int, depths: int,
           sources: Mapping[str, str]) -> list[str]:
  """Writes tasks into a folder; returns the names that lm_eval knows them by.

  Args:
    folder: made if need be.
    names: of tasks.
    lengths, samples: so many examples of each task and length.
    tokenizer: counts the lengths.
    seed, depths: as in section eval of a config.
    sources: each of example.SOURCES, likewise.
  """
  for name in names:
    check_choice('--tasks', name, TASKS)
  for told in unread(names, dict(sources, depths=depths), '--{}'):
    print(told, file=sys.stderr)
  made = {   # all before any is written: a length may be too short, or an example no text
      (name, length): [
          _line(name, index, example(name, TASKS[name], tokenizer, length=length, index=index, seed=seed,
                                     depth=depth_of(TASKS[name], index, depths), setting='--{}', **sources))
          for index in range(samples)]
      for name in names for length in lengths}
  try:
    _write_python(pathlib.Path(folder))
    for (name, length), lines in made.items():
      about = dict(version=1.0, length=length, tokenizer_fingerprint=tokenizer.fingerprint,
                   seed=seed, depths=depths if TASKS[name].placed else 0,
                   **{source: value if source in TASKS[name].reads else ''
                      for source, value in sources.items()},
                   text=text_of(name, sources).words, floor=floor(name, sources), source=TASKS[name].source)
      _write(pathlib.Path(folder), name, length, lines, about)
  except OSError as e:
    raise ConfigError(f'--export={folder}: cannot be written: {e.strerror}; give another '
                      'folder') from e
  return [f'longctx_{name}_{length}' for name, length in made]


def _write_python(folder: pathlib.Path) -> None:
  package = folder / 'longctx_scores'
  package.mkdir(parents=True, exist_ok=True)
  source = pathlib.Path(exported.__file__)   # the class beside it imports lm_eval, which is not needed here
  atomic_write(folder / 'longctx_tasks.py', source.read_bytes())
  atomic_write(folder / 'longctx_class.py', source.with_name('exported_class.py').read_bytes())
  atomic_write(package / '__init__.py', b'"""How answers to tasks of longctx are scored."""\n')
  for module in SCORES:
    source = pathlib.Path(module.__file__).read_text(encoding='utf-8')
    source = re.sub(r'^( *)from longctx\.data\.tasks\.', r'\1from .', source, flags=re.MULTILINE)
    atomic_write(package / f'{_stem(module.__name__)}.py', source.encode())


def _stem(module: str) -> str:
  return module.rpartition('.')[2]


def _write(folder: pathlib.Path, name: str, length: int, lines: Sequence[dict],
           about: dict[str, Any]) -> None:
  file = f'{name}_{length}.jsonl'
  text = ''.join(json.dumps(line, ensure_ascii=False) + '\n' for line in lines)
  atomic_write(folder / file, text.encode())
  text = YAML.format(name=f'longctx_{name}_{length}', tag=f'longctx_{name}', file=file,
                     metadata=json.dumps(about))
  atomic_write(folder / f'{name}_{length}.yaml', text.encode())


def _line(task: str, index: int, one: Example) -> dict[str, Any]:
  score = TASKS[task].score
  module, name = score.__module__, score.__name__
  if module not in [known.__name__ for known in SCORES]:
    raise AssertionError(f'{module}.{name}: a score must stand in one of harness_tasks.SCORES')
  try:
    prompt = one.prompt.decode()
  except UnicodeDecodeError as e:
    raise ConfigError(f'--tasks={task}: example {index} is no text but bytes ({e}), which lm_eval '
                      'cannot be given; leave the task out') from e
  return dict(
      index=index, prompt=prompt, question=one.question, target=one.target.decode(),
      references=list(one.references), new_tokens=one.new_tokens, depth=one.depth,
      needles=[list(span) for span in one.needles], scorer=f'{_stem(module)}.{name}',
      info=json.dumps(dict(one.info)))   # a string: data sets want like fields in every line


# Tokenizers.


def write_tokenizer(tokenizer: Tokenizer, folder: str) -> bool:
  """Files of a Hugging Face tokenizer of the same tokens; False where there is none.

  With it tasks of lm_eval that make text to a length count; a model of longctx reads its own.
  """
  if isinstance(tokenizer, Bytes):
    content = _of_bytes()
  elif tokenizer.is_bpe:
    content = _of_bpe(tokenizer)
  else:
    return False
  settings = dict(tokenizer_class='PreTrainedTokenizerFast', clean_up_tokenization_spaces=False)
  for name, one in (('tokenizer.json', content), ('tokenizer_config.json', settings)):
    (pathlib.Path(folder) / name).write_text(json.dumps(one), encoding='utf-8')
  return True


def _of_bytes() -> dict[str, Any]:
  # GPT-2's spelling of bytes: itself where it can be seen, else a letter from 256 on.
  seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
  hidden = iter(range(256, 512))
  vocab = {chr(byte if byte in seen else next(hidden)): byte for byte in range(256)}
  level = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=False, use_regex=False)
  return dict(version='1.0', added_tokens=[], normalizer=None, pre_tokenizer=level, decoder=level,
              post_processor=None, truncation=None, padding=None,
              model=dict(type='BPE', vocab=vocab, merges=[]))


def _of_bpe(tokenizer: SentencePiece) -> dict[str, Any]:
  """But for texts with U+2581, which here are spelt in byte tokens."""
  pieces, merges = tokenizer.pieces(), tokenizer.merges()
  pairs = [(piece[:cut], piece[cut:]) for piece in sorted(merges, key=lambda piece: -merges[piece])
           for cut in range(1, len(piece)) if piece[:cut] in merges and piece[cut:] in merges]
  replace = lambda pattern, content: dict(type='Replace', pattern={'String': pattern},
                                          content=content)
  return dict(
      version='1.0', added_tokens=[], normalizer=replace(' ', SPACE), pre_tokenizer=None,
      post_processor=None, truncation=None, padding=None,
      decoder=dict(type='Sequence', decoders=[replace(SPACE, ' '), dict(type='ByteFallback'),
                                              dict(type='Fuse')]),
      model=dict(type='BPE', vocab={piece: i for i, piece in enumerate(pieces)}, merges=pairs,
                 byte_fallback=True, fuse_unk=True, unk_token=pieces[0]))
