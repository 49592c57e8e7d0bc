"""How many examples a second of each task can be made, on one core?

    python experiments/04_arena/generators.py               # RULER's thirteen, bytes and subwords: two minutes
    python experiments/04_arena/generators.py --tasks=passkey --lengths=4096 --tokenizer=PATH.model --pieces=0

Subwords are those of a SentencePiece tokenizer of 8,000 pieces, trained here on Python's standard library;
a prompt has 4,096 of them. Counted is the time of the processor, so that what else runs does not matter much;
the first example of each task, which reads word lists and files, is made before. Writes
results/generators.json.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

import numpy as np  # noqa: E402

from longctx.data import corpus  # noqa: E402
from longctx.data.tasks import example, ruler  # noqa: E402
from longctx.data.tasks.table import TASKS  # noqa: E402
from longctx.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece  # noqa: E402

SUBWORDS = 4096   # tokens of a prompt in them


def subwords(pieces: int) -> Tokenizer:
  """So many of Python's standard library."""
  source = corpus.stdlib_source(corpus.SplitRule(kind='hash', validation=0.0, test=0.0))
  with tempfile.NamedTemporaryFile(suffix='.model') as file:
    file.write(train_sentencepiece((b''.join(chunks) for _, chunks in source.documents('train')), pieces))
    file.flush()
    return load_tokenizer(file.name)


def measured(tasks: list[str], tokenizer: Tokenizer, lengths: list[int], seconds: float, what: str) -> list[dict]:
  """A row for each task and length, told as they come."""
  print(f'{f"examples a second of one core, {what}":48s}' + ''.join(f'{length:>10,}' for length in lengths))
  rows = []
  for name in tasks:
    found = [speed(name, tokenizer, length, seconds) for length in lengths]
    rows += found
    print(f'{name:48s}' + ''.join(f'{row["per_second"]:>10,.1f}' for row in found), flush=True)
  return rows


def speed(name: str, tokenizer: Tokenizer, length: int, seconds: float) -> dict:
  """Examples 1, 2, ... until so many seconds have gone."""
  made = lambda index: example.example(name, TASKS[name], tokenizer, length=length, index=index)
  made(0)
  count, start = 0, time.process_time()
  while count == 0 or time.process_time() - start < seconds:
    count += 1
    made(count)
  return dict(task=name, length=length, examples=count,
              per_second=round(count / (time.process_time() - start), 1))


def processor() -> str:
  with open('/proc/cpuinfo', encoding='utf-8') as file:
    names = [line.split(':', 1)[1].strip() for line in file if line.startswith('model name')]
  return names[0] if names else platform.machine()


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--tasks', default=','.join(ruler.TASKS))
  parser.add_argument('--lengths', default='4096,32768,131072')
  parser.add_argument('--tokenizer', default='bytes')
  parser.add_argument('--pieces', type=int, default=8000, help='of the subwords measured besides; 0: none')
  parser.add_argument('--seconds', type=float, default=1.0, help='of each task and length')
  parser.add_argument('--out', default=os.path.join(HERE, 'results', 'generators.json'))
  args = parser.parse_args(argv)
  tasks, lengths = args.tasks.split(','), [int(length) for length in args.lengths.split(',')]
  found = dict(rows=measured(tasks, load_tokenizer(args.tokenizer), lengths, args.seconds,
                             os.path.basename(args.tokenizer)))
  if args.pieces:
    rows = measured(tasks, subwords(args.pieces), [SUBWORDS], args.seconds, f'{args.pieces:,} subwords')
    found['subwords'] = dict(pieces=args.pieces, trained_on='standard library', rows=rows)
  os.makedirs(os.path.dirname(args.out), exist_ok=True)
  with open(args.out, 'w', encoding='utf-8') as file:
    about = dict(tokenizer=os.path.basename(args.tokenizer), processor=processor(),
                 python=platform.python_version(), numpy=np.__version__)
    json.dump(about | found, file, indent=1)
    file.write('\n')


if __name__ == '__main__':
  main()
