"""How long does a step wait for its batch?

    python experiments/05_faults/input.py                # some minutes on 2 idle cores; carries on where it stopped
    python experiments/05_faults/input.py --tier=smoke   # a small model, seconds

configs/quickstart.py for fewer steps, its text tokenised beforehand, at two batch sizes. badput.json counts the seconds
of steps and those that the devices waited for a batch; the goal is under 2 % of both together. Each run is a line of
results/input.jsonl.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, ROOT)

from experiments import shared  # noqa: E402

TIERS = {
    'smoke': dict(config='configs/quickstart.py:debug', batches=(2,), steps=20, repeats=1),
    'cpu': dict(config='configs/quickstart.py', batches=(2, 16), steps=100, repeats=2),
}


def measure(config: str, batch: int, steps: int) -> dict:
  with tempfile.TemporaryDirectory() as folder:
    flags = dict(data_batch_size=batch, run_num_steps=steps, run_checkpoint_every=steps, run_log_every=steps,
                 perplexity_max_tokens=512)
    subprocess.run([sys.executable, '-m', 'longctx.main', f'--config={config}', f'--workdir={folder}',
                    *(f'--config.{name.replace("_", ".", 1)}={value}' for name, value in flags.items())],
                   cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    with open(os.path.join(folder, 'badput.json'), encoding='utf-8') as file:
      seconds = json.load(file)['seconds']
  waited, trained = seconds['input'], seconds['steps']
  return dict(steps_seconds=round(trained, 2), input_seconds=round(waited, 4),
              waited=round(waited / (waited + trained), 5), cores=len(os.sched_getaffinity(0)))


def runs(tier: dict) -> Iterator[tuple[dict, Callable[[], dict]]]:
  for repeat, batch in itertools.product(range(tier['repeats']), tier['batches']):
    key = dict(config=tier['config'], batch=batch, steps=tier['steps'], repeat=repeat)
    yield key, lambda key=key: measure(key['config'], key['batch'], key['steps']) | shared.provenance()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--tier', choices=TIERS, default='cpu')
  parser.add_argument('--out', default=os.path.join(HERE, 'results'))
  args = parser.parse_args()
  os.makedirs(args.out, exist_ok=True)
  for row in shared.carry_on(os.path.join(args.out, 'input.jsonl'), lambda _: runs(TIERS[args.tier])):
    print(f'{row["batch"]} rows: {row["waited"]:.2%} of the time waited for a batch')


if __name__ == '__main__':
  main()
