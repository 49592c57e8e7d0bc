"""Which memory recalls, for how long, at what size of state, and what is it worth on books?

    python experiments/03_memories/run.py --part=recall     # hours on 2 cores; carries on where it stopped
    python experiments/03_memories/run.py --part=passkey
    python experiments/03_memories/run.py --part=books --books='../shared/data/books/*.txt'
    python experiments/03_memories/run.py --part=forms      # orders of reading against each other
    python experiments/03_memories/run.py --part=inner_rate # Titans' step, with and without its clip
    python experiments/03_memories/run.py --tier=smoke      # all (books with --books), tiny, minutes

Each run is one line of results/<part>.jsonl, with the commit and versions that made it; a run that is there is
not done again. Then the tables of README.md are printed and the figures drawn from all lines.
"""

import argparse
import functools
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

import books  # noqa: E402
import forms  # noqa: E402
import inner_rate  # noqa: E402
import models  # noqa: E402
import passkey  # noqa: E402
import recall  # noqa: E402

from experiments import shared  # noqa: E402
from longctx.parallel import host_memory  # noqa: E402

PARTS = {'recall': recall, 'passkey': passkey, 'books': books, 'forms': forms,
         'inner_rate': inner_rate}

# The first rate and seed come first, of all models. 'hour': that alone, and four passkeys. 'cpu': of recall the
# seeds after the first only at the rate that was best with it. 'gpu': all rates with all seeds.
TIERS = {
    'smoke': dict(
        seeds=(0,), rates=(3e-3,), recall_only_best=True, recall=('infini',), recall_tasks=('segment_rewrite',),
        recall_steps=2, recall_pairs=(8,), passkey=('transformer_xl',), passkey_rates=(3e-3,),
        passkey_steps=2, passkey_curriculum=(1,), passkey_segments=64, books=('rmt',),
        books_debug=True, books_steps=6, forms=((4, 16, 32, 2),), forms_alone=((4, 16, 32, 1),), inner_chunks=50),
    'cpu': dict(
        seeds=(0, 1), rates=(3e-3, 1e-3, 1e-2), recall=models.RECALL, recall_tasks=recall.TIMES,
        recall_steps=600, recall_pairs=recall.TESTED, passkey=models.PASSKEY,
        passkey_rates=(3e-3, 1e-3), passkey_steps=1000, passkey_curriculum=passkey.CURRICULUM,
        passkey_segments=16_384, books=models.BOOKS, books_debug=False, books_steps=400,
        recall_only_best=True, forms=forms.SHAPES, forms_alone=forms.ALONE, inner_chunks=1000),
}
TIERS['gpu'] = TIERS['cpu'] | dict(seeds=(0, 1, 2), recall_only_best=False)
TIERS['hour'] = TIERS['cpu'] | dict(
    seeds=(0,), rates=(3e-3,), passkey=('infini', 'gated_delta', 'armt', 'titans_mag'),
    passkey_rates=(3e-3,))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--tier', choices=TIERS, default='cpu')
  parser.add_argument('--part', choices=tuple(PARTS), default='', help='one part; else all')
  parser.add_argument('--models', default='', help='names with commas between; else all')
  parser.add_argument('--books', default='', help='text files for --part=books, a glob')
  parser.add_argument('--out', default=os.path.join(HERE, 'results'))
  args = parser.parse_args()
  args.models = tuple(filter(None, args.models.split(',')))
  unknown = set(args.models) - set(models.NAMES)
  if unknown:
    parser.error(f'--models: no {", ".join(sorted(unknown))}; there are {", ".join(models.NAMES)}')
  if args.part == 'books' and not args.books:
    parser.error("--books: missing; --part=books reads text files, such as --books='books/*.txt'")
  host_memory.keep_freed_memory()
  os.makedirs(args.out, exist_ok=True)
  made_by = shared.provenance()   # now: files may change while it runs, and what was imported does not
  def runs(part, done):
    for key, work in part.runs(args, TIERS[args.tier], done):
      yield key, lambda work=work: work() | made_by
  for name, part in PARTS.items():
    if name != args.part and (args.part or (name == 'books' and not args.books)):
      continue
    path = os.path.join(args.out, f'{name}.jsonl')
    done = shared.carry_on(path, functools.partial(runs, part))
    print(part.table(done), flush=True)
    part.draw(done, os.path.join(args.out, f'{name}.png'))


if __name__ == '__main__':
  main()
