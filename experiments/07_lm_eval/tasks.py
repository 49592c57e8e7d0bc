"""Three local tasks for lm-evaluation-harness, of Python source that quickstart's model was not trained on.

    python experiments/07_lm_eval/tasks.py --out=runs/lm_eval_tasks

    python_bits       what the first 500 bytes of a file cost                   (loglikelihood_rolling)
    python_next_line  which of four lines, three of them of other files, goes on (multiple_choice, chance 25 %)
    python_keyword    a keyword of five letters or more, written on from its third (generate_until)

Of the files in the validation and test splits of the default corpus, up to five examples each (python_bits:
one), drawn from --seed.
Held by: tests/test_experiments.py.
"""

import argparse
import json
import keyword
import os
import random
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from longctx.data import corpus, stream

CONTEXT = 300   # bytes before a line or a keyword
PER_FILE = 5    # examples of a task, at most
LINE = r'(?m)^    \S.{10,60}\n'
KEYWORD = rf'(?<=[ \n])({"|".join(k for k in keyword.kwlist if len(k) >= 5)})(?=[ :\n])'


def held_out() -> list[str]:
  """The texts of the splits that are not trained on, where each byte is a character."""
  source = corpus.open_source(stream.Config())
  texts = [b''.join(parts) for split in ('validation', 'test') for _, parts in source.documents(split)]
  return [text.decode() for text in texts if text.isascii()]


def places(pattern: str, text: str, rng: random.Random) -> list[re.Match]:
  """Of a file, with enough before them."""
  found = [m for m in re.finditer(pattern, text) if m.start() >= CONTEXT]
  return rng.sample(found, min(PER_FILE, len(found)))


def bits(texts: list[str], rng: random.Random) -> list[dict]:
  return [dict(text=text[:500]) for text in texts if len(text) >= 500]


def next_line(texts: list[str], rng: random.Random) -> list[dict]:
  """The true line and three of other files, in any order; all indented alike, so that no margin tells."""
  found = [(i, m) for i, text in enumerate(texts) for m in places(LINE, text, rng)]
  examples = []
  for i, m in found:
    others = sorted({other.group() for j, other in found if j != i} - {m.group()})
    choices = [m.group(), *rng.sample(others, 3)]
    rng.shuffle(choices)
    examples.append(dict(q=texts[i][m.start() - CONTEXT:m.start()], choices=choices,
                         gold=choices.index(m.group())))
  return examples


def keywords(texts: list[str], rng: random.Random) -> list[dict]:
  return [dict(q=text[m.start() - CONTEXT:m.start() + 2], a=m.group()[2:])
          for text in texts for m in places(KEYWORD, text, rng)]


def metric(name: str, how: str, higher: bool) -> dict:
  return dict(metric=name, aggregation=how, higher_is_better=higher)


TASKS = {
    'python_bits': (bits, dict(
        output_type='loglikelihood_rolling', doc_to_text='', doc_to_target='text',
        metric_list=[metric('bits_per_byte', 'bits_per_byte', False)])),
    'python_next_line': (next_line, dict(
        output_type='multiple_choice', doc_to_text='q', doc_to_choice='choices', doc_to_target='gold',
        target_delimiter='',
        metric_list=[metric('acc', 'mean', True), metric('acc_norm', 'mean', True)])),
    'python_keyword': (keywords, dict(
        output_type='generate_until', doc_to_text='q', doc_to_target='a', target_delimiter='',
        metric_list=[metric('exact_match', 'mean', True)],
        generation_kwargs=dict(until=[' ', ':', '\n'], max_gen_toks=8, do_sample=False))),
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--out', required=True, help='folder to write into')
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  os.makedirs(args.out, exist_ok=True)
  texts = held_out()
  for name, (make, about) in TASKS.items():
    examples = make(texts, random.Random(args.seed))
    data = os.path.join(os.path.abspath(args.out), f'{name}.jsonl')
    with open(data, 'w', encoding='utf-8') as file:
      file.writelines(json.dumps(example) + '\n' for example in examples)
    with open(os.path.join(args.out, f'{name}.yaml'), 'w', encoding='utf-8') as file:   # JSON is YAML too
      json.dump(dict(task=name, dataset_path='json', test_split='test',
                     dataset_kwargs=dict(data_files=dict(test=data)), **about), file, indent=1)
    print(f'{name}: {len(examples)} examples')


if __name__ == '__main__':
  main()
