"""Is longctx's training step as fast as PyTorch's at nanoGPT's shape, on one CPU?

    python experiments/00_speed_of_one_device/run.py --tier=cpu       # about 6 minutes on 2 cores
    python experiments/00_speed_of_one_device/run.py --tier=smoke     # about 2 minutes: does it run?

Every contender is one process. All are alive at once and make steps in turn, so that each round is
a fair pair however the machine's speed drifts; a contender's figure is the median over rounds of
its ratio to PyTorch in the same round. Writes results.json and speed.png beside this file.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))

CONTENDERS = {
    'PyTorch': ['pytorch_model.py'],
    'PyTorch, torch.compile': ['pytorch_model.py', '--compile'],
    'longctx': ['longctx_model.py'],
    'longctx, 2 CPU devices': ['longctx_model.py', '--devices=2'],
}
BASELINE = 'PyTorch'
SHAPES = {'T=256': (256, 12), 'T=2048': (2048, 2)}   # length, batch
TIERS = {   # contenders, rounds, steps a round by shape, layers
    'smoke': (['PyTorch', 'longctx'], 2, {'T=256': 1, 'T=2048': 1}, 1),
    'cpu': (list(CONTENDERS), 15, {'T=256': 4, 'T=2048': 2}, 4),
}
PAUSE = 0.25   # seconds between turns: the other side's threads stop spinning


class Worker:
  """A contender's process."""

  def __init__(self, name: str, length: int, batch: int, layers: int):
    command = [sys.executable, os.path.join(HERE, CONTENDERS[name][0]), *CONTENDERS[name][1:],
               f'--length={length}', f'--batch={batch}', f'--layers={layers}']
    env = dict(os.environ, PYTHONPATH=ROOT + os.pathsep + os.environ.get('PYTHONPATH', ''))
    self.name = name
    self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                    stderr=subprocess.DEVNULL, text=True, env=env)

  def read(self) -> dict:
    line = self.process.stdout.readline()
    if not line:
      raise SystemExit(f'{self.name}: its process ended with status {self.process.wait()}; run '
                       f'`{" ".join(self.process.args)}` to see why')
    return json.loads(line)

  def steps(self, count: int) -> dict:
    print(count, file=self.process.stdin, flush=True)
    return self.read()

  def close(self) -> None:
    self.process.stdin.close()
    self.process.wait()


def measure(shape: str, names: list[str], rounds: int, steps: int, layers: int) -> dict:
  length, batch = SHAPES[shape]
  workers, found = {}, {}
  try:
    for name in names:   # one after the other: start-up is timed too
      began = time.perf_counter()
      workers[name] = Worker(name, length, batch, layers)
      found[name] = workers[name].read() | dict(start_seconds=time.perf_counter() - began)
    turns = {name: [] for name in names}
    for i in range(rounds):
      for name in names if i % 2 == 0 else names[::-1]:
        time.sleep(PAUSE)
        turns[name].append(workers[name].steps(steps))
  finally:
    for worker in workers.values():
      worker.close()
  median = lambda name, key: statistics.median(t[key] for t in turns[name])
  ratio = lambda name, key: statistics.median(
      b[key] / a[key] for a, b in zip(turns[name], turns[BASELINE]))
  return {name: found[name] | dict(
      tokens_per_second=length * batch / median(name, 'wall'), cpu_seconds=median(name, 'cpu'),
      speed_ratio=ratio(name, 'wall'), cpu_ratio=ratio(name, 'cpu'), loss=turns[name][-1]['loss'],
      rounds=turns[name]) for name in names}


def table(results: dict) -> str:
  lines = ['| shape | contender | parameters | tokens/s | speed / PyTorch | CPU work: PyTorch / it '
           '| start, s |', '|---|---|---|---|---|---|---|']
  for shape, rows in results.items():
    for name, r in rows.items():
      lines.append(f'| {shape}, batch {SHAPES[shape][1]} | {name} | {r["parameters"]:,} '
                   f'| {r["tokens_per_second"]:,.0f} | {r["speed_ratio"]:.2f} '
                   f'| {r["cpu_ratio"]:.2f} | {r["start_seconds"]:.0f} |')
  return '\n'.join(lines)


def draw(results: dict, path: str) -> None:
  """One bar a contender and shape: speed relative to PyTorch, every round as a dot."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure
  figure = Figure(figsize=(8, 3.2), dpi=150, layout='constrained')
  FigureCanvasAgg(figure)
  for axes, (shape, rows) in zip(figure.subplots(1, len(results), sharey=True), results.items()):
    for y, (name, r) in enumerate(rows.items()):
      axes.barh(y, r['speed_ratio'], color='tab:orange' if 'PyTorch' in name else 'tab:blue')
      dots = [b['wall'] / a['wall'] for a, b in zip(r['rounds'], rows[BASELINE]['rounds'])]
      axes.plot(dots, [y] * len(dots), 'k.', markersize=3)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.axvline(1, color='black', linewidth=0.8)
    axes.set_xlim(0)
    axes.set_title(shape)
    axes.set_xlabel('speed relative to PyTorch')
  figure.savefig(path)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--tier', choices=TIERS, default='cpu')
  parser.add_argument('--out', default=HERE, help='folder for results.json and speed.png')
  args = parser.parse_args()
  names, rounds, steps, layers = TIERS[args.tier]
  results = {shape: measure(shape, names, rounds, steps[shape], layers) for shape in SHAPES}
  print(table(results))
  with open(os.path.join(args.out, 'results.json'), 'w') as f:
    json.dump(dict(tier=args.tier, cores=os.cpu_count(), results=results), f, indent=1)
  draw(results, os.path.join(args.out, 'speed.png'))


if __name__ == '__main__':
  main()
