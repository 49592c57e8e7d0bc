"""python launch/fits.py [--topologies=v5e:2x4,v5p:2x2x1] [--models=1B,8B] [--table_only]

What fits on which slice: the longest context, a power of two, at which the training step of a model
compiles for the slice with the TPU's own compiler and needs no more than its memory. One row of text at a
time, cut over all chips (layout 'sequence_fsdp', a ring in zigzag order, remat 'full').

Each compilation is a line of launch/fits.jsonl, and is not made again; the table goes into
launch/README.md. Source of the models: Llama 3, arXiv:2407.21783, and the model cards of Llama 3.2.
Held by: tests/test_launch.py.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS, README = HERE / 'fits.jsonl', HERE / 'README.md'
CONFIG = 'configs/ring_1m_v5e.py'   # its model and mesh are overridden
MODELS = {
    '1B': dict(num_layers=16, embed_dim=2048, num_heads=32, num_kv_heads=8, mlp_dim=8192, tied=True),
    '3B': dict(num_layers=28, embed_dim=3072, num_heads=24, num_kv_heads=8, mlp_dim=8192, tied=True),
    '8B': dict(num_layers=32, embed_dim=4096, num_heads=32, num_kv_heads=8, mlp_dim=14336, tied=False),
    '70B': dict(num_layers=80, embed_dim=8192, num_heads=64, num_kv_heads=8, mlp_dim=28672, tied=False),
}
TOPOLOGIES = ('v5e:2x4', 'v5e:4x4', 'v5e:8x8', 'v5e:16x16',
              'v5p:2x2x1', 'v5p:2x2x4', 'v5p:4x4x4', 'v5p:4x8x8',
              'v6e:2x4', 'v6e:4x4', 'v6e:8x8', 'v6e:16x16')
LENGTHS = tuple(2**n for n in range(13, 24))   # 8,192 to 8,388,608 tokens
BEGIN, END = '<!-- the table of fits.py -->', '<!-- its end -->'

Measure = Callable[[str, str, str, int], dict]   # (mode, topology, model, length) -> fits, gib, of


def chips_of(topology: str) -> int:
  return int(next(line.split()[2] for line in (HERE / 'slices.txt').read_text().splitlines()
                  if line.startswith(f'{topology} ')))


def command(mode: str, topology: str, model: str, length: int, **mesh: int) -> list[str]:
  """Arguments of main.py; mode is plan or compile. A row is cut over all chips, but for what `mesh` says."""
  changes = {f'model.{name}': value for name, value in MODELS[model].items()}
  changes |= {'model.max_length': length, 'data.length': length}
  changes |= {f'mesh.{name}': value for name, value in (mesh or dict(seq=chips_of(topology))).items()}
  changes |= {f'{section}.batch_size': mesh.get('data', 1) for section in ('data', 'perplexity', 'eval')}
  return ['-m', 'longctx.main', f'--config={CONFIG}', f'--mode={mode}', f'--topology={topology}',
          *(f'--config.{name}={value}' for name, value in changes.items())]


def told(mode: str, topology: str, model: str, length: int, **mesh: int) -> dict:
  """What main.py writes when it plans or compiles, in a process of its own, whose memory ends with it."""
  with tempfile.TemporaryDirectory() as folder:
    arguments = [*command(mode, topology, model, length, **mesh), f'--workdir={folder}']
    done = subprocess.run([sys.executable, *arguments], cwd=HERE.parent, capture_output=True, text=True)
    path = Path(folder, f'{mode}.json')
    if not path.exists():
      raise SystemExit(f'{topology}, {model}, {length:,} tokens: {done.stderr.strip() or done.stdout}')
    return json.loads(path.read_text())


def measure(mode: str, topology: str, model: str, length: int) -> dict:
  found = told(mode, topology, model, length)
  total, chip = ((found['total'], found['chip']) if mode == 'plan' else
                 (found['memory']['total'], found['memory']['chip']))
  return dict(fits=found['fits'], gib=round(total / 2**30, 2), of=round(chip / 2**30, 2))


class Results:
  """Lines of a file, one a compilation; what is there is not measured again."""

  def __init__(self, path: Path, measure: Measure):
    self.path, self.measure = path, measure
    lines = path.read_text().splitlines() if path.exists() else []
    self.found = {(r['topology'], r['model'], r['length']): r for r in map(json.loads, lines)}

  def compiled(self, topology: str, model: str, length: int) -> bool:
    key = (topology, model, length)
    if key not in self.found:
      row = dict(topology=topology, model=model, length=length,
                 **self.measure('compile', *key))
      self.found[key] = row
      with open(self.path, 'a') as file:
        file.write(json.dumps(row) + '\n')
      print(f'{topology} {model} {length:,} tokens: {row["gib"]} of {row["of"]} GiB, '
            f'{"fits" if row["fits"] else "does not fit"}', flush=True)
    return self.found[key]['fits']

  def longest(self, topology: str, model: str) -> int:
    """The longest of LENGTHS that compiles and fits; 0 if none. The plan says where to begin."""
    low, high = 0, len(LENGTHS)   # as many fit, by the plan
    while low < high and not any(key[:2] == (topology, model) for key in self.found):
      middle = (low + high + 1) // 2
      if self.measure('plan', topology, model, LENGTHS[middle - 1])['fits']:
        low = middle
      else:
        high = middle - 1
    known = [n for n, length in enumerate(LENGTHS)
             if self.found.get((topology, model, length), {}).get('fits')]
    at = max(known) if known else max(low - 1, 0)
    if self.compiled(topology, model, LENGTHS[at]):
      while at + 1 < len(LENGTHS) and self.compiled(topology, model, LENGTHS[at + 1]):
        at += 1
      return LENGTHS[at]
    while at > 0:
      at -= 1
      if self.compiled(topology, model, LENGTHS[at]):
        return LENGTHS[at]
    return 0


def name_of(length: int) -> str:
  """'512K', '1M'."""
  return f'{length // 2**20}M' if length >= 2**20 else f'{length // 2**10}K'


def cell(found: dict, topology: str, model: str) -> str:
  """'1M (12.1 GiB)', '-' where the shortest does not fit, '' where it was not compiled.

  'at least' where twice the length was not compiled.
  """
  rows = [r for key, r in found.items() if key[:2] == (topology, model)]
  fitting = [r for r in rows if r['fits']]
  if fitting:
    best = max(fitting, key=lambda r: r['length'])
    length = best['length']
    beyond = (topology, model, 2 * length)
    return f'{"" if beyond in found else "at least "}{name_of(length)} ({best["gib"]} GiB)'
  return '-' if any(r['length'] == LENGTHS[0] for r in rows) else ''


def table(found: dict) -> str:
  topologies = sorted({key[0] for key in found}, key=lambda t: (TOPOLOGIES + (t,)).index(t))
  models = [model for model in MODELS if any(key[1] == model for key in found)]
  lines = ['| slice | ' + ' | '.join(models) + ' |', '|---' * (len(models) + 1) + '|']
  lines += [f'| {t} | ' + ' | '.join(cell(found, t, m) for m in models) + ' |' for t in topologies]
  return '\n'.join(lines)


def write_table(readme: Path, table: str, begin: str = BEGIN, end: str = END) -> None:
  before, rest = readme.read_text().split(begin)
  after = rest.split(end, 1)[1]   # another table may end with the same mark
  readme.write_text(f'{before}{begin}\n{table}\n{end}{after}')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--topologies', default=','.join(TOPOLOGIES))
  parser.add_argument('--models', default=','.join(MODELS))
  parser.add_argument('--table_only', action='store_true', help='write the table of what was compiled')
  given = parser.parse_args()
  results = Results(RESULTS, measure)
  if not given.table_only:
    for topology in given.topologies.split(','):
      for model in given.models.split(','):
        results.longest(topology, model)
        write_table(README, table(results.found))
  write_table(README, table(results.found))
  print(table(results.found))


if __name__ == '__main__':
  main()
