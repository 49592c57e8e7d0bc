"""How many examples a second of each task can be made, on one core?

    python experiments/04_arena/generators.py               # RULER's thirteen, bytes: a minute
    python experiments/04_arena/generators.py --tasks=passkey --lengths=4096 --tokenizer=PATH.model

Counted is the time of the processor, so that what else runs does not matter much; the first example
of each task, which reads word lists and files, is made before. Writes results/generators.json.
"""

import argparse
import json
import os
import platform
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

import numpy as np  # noqa: E402

from longctx.data.tasks import example, ruler  # noqa: E402
from longctx.data.tasks.table import TASKS  # noqa: E402
from longctx.data.tokenizer import load_tokenizer  # noqa: E402


def speed(name: str, tokenizer, length: int, seconds: float) -> dict:
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
  parser.add_argument('--seconds', type=float, default=1.0, help='of each task and length')
  parser.add_argument('--out', default=os.path.join(HERE, 'results', 'generators.json'))
  args = parser.parse_args(argv)
  lengths = [int(length) for length in args.lengths.split(',')]
  tokenizer = load_tokenizer(args.tokenizer)
  rows = []
  print(f'{"examples a second of one core":32s}' + ''.join(f'{length:>10,}' for length in lengths))
  for name in args.tasks.split(','):
    found = [speed(name, tokenizer, length, args.seconds) for length in lengths]
    rows += found
    print(f'{name:32s}' + ''.join(f'{row["per_second"]:>10,.1f}' for row in found), flush=True)
  os.makedirs(os.path.dirname(args.out), exist_ok=True)
  with open(args.out, 'w', encoding='utf-8') as file:
    about = dict(tokenizer=os.path.basename(args.tokenizer), processor=processor(),
                 python=platform.python_version(), numpy=np.__version__)
    json.dump(about | dict(rows=rows), file, indent=1)
    file.write('\n')


if __name__ == '__main__':
  main()
