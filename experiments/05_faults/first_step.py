"""How long is it from launch/local.sh to the first step, with four processes?

    python experiments/05_faults/first_step.py                # minutes on 2 idle cores; carries on where it stopped
    python experiments/05_faults/first_step.py --tier=smoke   # two processes of a small model

configs/quickstart.py over 4 processes of 2 devices each, first with nothing kept (no tokens, no compiled program), then
with both. `seconds` is from the start of the launcher to its line "first step after" (the goal: under 60), when the run
is ended. Each start is a line of results/first_step.jsonl.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, ROOT)

from experiments import shared  # noqa: E402

SAYS = 'first step after '
TIERS = {
    'smoke': dict(config='configs/quickstart.py:debug', processes=2, repeats=1),
    'cpu': dict(config='configs/quickstart.py', processes=4, repeats=3),
}


def measure(config: str, processes: int, kept: str) -> dict:
  """One start; `kept`: the folder of tokens and programs."""
  with tempfile.TemporaryDirectory() as folder:
    command = [os.path.join(ROOT, 'launch', 'local.sh'), f'--config={config}', f'--workdir={folder}/w',
               f'--processes={processes}', '--config.mesh.layout=data', f'--config.data.batch_size={2 * processes}',
               f'--config.data.cache_dir={kept}/tokens', f'--config.run.compilation_cache={kept}/xla']
    began = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          env=os.environ | {'PYTHON': sys.executable}) as child:
      said = []
      for line in child.stdout:
        said.append(line)
        if line.startswith(SAYS):
          seconds = time.monotonic() - began
          break
      else:
        raise SystemExit(''.join(said))
      for _ in range(2):   # the second ends it at once
        child.send_signal(signal.SIGTERM)
        time.sleep(0.5)
      child.stdout.read()
    return dict(seconds=round(seconds, 1), of_process=float(line.removeprefix(SAYS).split()[0]))


def runs(tier: dict) -> Iterator[tuple[dict, Callable[[], dict]]]:
  for repeat in range(tier['repeats']):
    with tempfile.TemporaryDirectory() as kept:
      for what in ('nothing', 'all'):
        key = dict(config=tier['config'], processes=tier['processes'], kept=what, repeat=repeat)
        yield key, lambda key=key, kept=kept: measure(key['config'], key['processes'], kept) | dict(
            cores=len(os.sched_getaffinity(0)), **shared.provenance())


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--tier', choices=TIERS, default='cpu')
  parser.add_argument('--out', default=os.path.join(HERE, 'results'))
  args = parser.parse_args()
  os.makedirs(args.out, exist_ok=True)
  shared.carry_on(os.path.join(args.out, 'first_step.jsonl'), lambda _: runs(TIERS[args.tier]))


if __name__ == '__main__':
  main()
