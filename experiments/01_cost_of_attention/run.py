"""What does attention over a cut sequence cost, in work and in memory, on one CPU?

    python experiments/01_cost_of_attention/run.py --tier=smoke    # under a minute: does it run?
    python experiments/01_cost_of_attention/run.py --tier=cpu      # about 10 minutes on 2 cores

4 query and 4 kv heads of 64, one causal row, float32, forward and backward. Contenders are processes
that take turns; the measure is CPU time (user and system), which other work on the machine spoils
least, and the ratio is the median over rounds. Memory is the compiled program's temporary memory of
one device, which is exact. PyPI's ringattention 0.1.2 takes part where a folder on PYTHONPATH has it:

    pip install --no-deps --target=FOLDER ringattention==0.1.2 && pip install --target=FOLDER einops
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, ROOT)

from cost import contenders  # noqa: E402

from experiments import shared  # noqa: E402

TIERS = {   # lengths timed, length of the dense one, lengths of the memory table, rounds
    'smoke': ((1024,), 1024, (1024,), 1),
    'cpu': ((16_384, 32_768), 8_192, (8_192, 32_768), 3),
}
ALONE, RING, PACKAGE, DENSE, GSPMD = contenders()


def start(name: str, length: int, *more: str) -> subprocess.Popen:
  path = os.pathsep.join([ROOT, os.environ.get('PYTHONPATH', '')])
  return subprocess.Popen(
      [sys.executable, os.path.join(HERE, 'cost.py'), f'--name={name}', f'--length={length}', *more],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
      env=dict(os.environ, PYTHONPATH=path))


def read(process: subprocess.Popen) -> dict:
  line = process.stdout.readline()
  if not line:
    raise SystemExit(f'{process.args} ended with status {process.wait()}; run it to see why')
  return json.loads(line)


def memory(name: str, length: int) -> int:
  process = start(name, length, '--memory_only')
  found = read(process)['temp_bytes']
  process.communicate()
  return found


def turns(names: list[str], length: int, rounds: int) -> dict[str, list[dict]]:
  processes = {name: start(name, length) for name in names}
  found = {name: [] for name in names}
  try:
    for process in processes.values():
      read(process)
    for _ in range(rounds):
      for name, process in processes.items():
        print(file=process.stdin, flush=True)
        found[name].append(read(process))
  finally:
    for process in processes.values():
      process.stdin.close()
      process.wait()
  return found


def ratio(turns: dict, name: str, base: str) -> float:
  return statistics.median(a['cpu'] / b['cpu'] for a, b in zip(turns[name], turns[base]))


def has_package() -> bool:
  folders = os.environ.get('PYTHONPATH', '').split(os.pathsep)
  return any(os.path.isfile(os.path.join(p, 'ringattention', 'ringattention_jax.py'))
             for p in folders if p)


def draw(results: dict, path: str) -> None:
  """Memory and CPU time by length, a line a contender."""
  seconds = {length: {name: statistics.median(turns) for name, turns in found.items()}
             for length, found in results['cpu_seconds'].items()}
  kinds = (('temporary memory of a device, MiB', results['memory'], 2 ** 20),
           ('CPU time, forward and backward, seconds', seconds, 1))

  def panels(figure):
    for axis, (label, found, unit) in zip(figure.subplots(1, 2), kinds):
      lengths = sorted(found, key=int)   # of JSON, words
      for i, name in enumerate((ALONE, RING, PACKAGE, DENSE, GSPMD)):
        points = [(int(n), found[n][name] / unit) for n in lengths if name in found[n]]
        if points:
          axis.plot(*zip(*points), marker='o', linewidth=1, color=f'C{i}', label=name)
      axis.set(xlabel='tokens', ylabel=label, yscale='log')
      axis.set_xscale('log', base=2)
      axis.legend(fontsize=7)

  shared.draw(panels, path, width=11, height=4)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--tier', choices=TIERS, default='cpu')
  parser.add_argument('--out', default=HERE, help='folder for results.json and cost.png')
  args = parser.parse_args()
  lengths, dense_length, memory_lengths, rounds = TIERS[args.tier]
  others = [PACKAGE] if has_package() else []
  results = dict(tier=args.tier, cores=os.cpu_count(), memory={}, cpu_seconds={}, ratios={})
  for length in memory_lengths:
    results['memory'][length] = {
        name: memory(name, length) for name in (ALONE, RING, *others, GSPMD)}
    for name, size in results['memory'][length].items():
      print(f'memory, {length:,} tokens: {name}: {size / 2 ** 20:,.1f} MiB a device, '
            f'{size / results["memory"][length][RING]:.2f} times the ring')
  for length, names in [*((n, [ALONE, RING, *others]) for n in lengths),
                        (dense_length, [RING, DENSE])]:
    found = turns(names, length, rounds)
    norms = [t['gradient_norm'] for name in names for t in found[name]]
    if max(norms) > 1.001 * min(norms):
      raise SystemExit(f'the contenders do not compute the same: gradient norms {norms}')
    results['cpu_seconds'].setdefault(length, {}).update({n: [t['cpu'] for t in found[n]] for n in names})
    results['ratios'].setdefault(length, {}).update({n: ratio(found, n, RING) for n in names})
    for name in names:
      print(f'CPU time, {length:,} tokens: {name}: '
            f'{statistics.median(t["cpu"] for t in found[name]):.2f} s, '
            f'{results["ratios"][length][name]:.2f} times the ring')
  with open(os.path.join(args.out, 'results.json'), 'w') as f:
    json.dump(results, f, indent=1)
  draw(results, os.path.join(args.out, 'cost.png'))


if __name__ == '__main__':
  main()
