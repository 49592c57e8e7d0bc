"""A long talk in which the same is asked for several times: say the i-th answer again.

    mrcr_2, mrcr_4, mrcr_8   so many answers to the same request, among answers to other ones; one
                             of them is to be said again, word for word, after twelve random letters
                             (multi-round co-reference resolution: Vodrahalli et al. 2024,
                             arXiv:2409.12640; mrcr_v2 of google-deepmind/eval_hub)

Differs: answers are made of templates and random words, of 210 to 330 letters, where the published
ones are a large model's; so scores are not comparable with published ones, floors are. The floor is
of one who says any of the 2, 4 or 8: 1 / n, and the 8 % that two unlike answers share besides
(published: 51, 27, 15 %; there it is 2 %). The places of the answers are uniform, and so is the
depth of the one asked for.
Held by: tests/test_tasks.py, tests/test_task_needles.py.
"""

import numpy as np

from longctx.data.tasks import fit, haystack, scoring
from longctx.data.tasks.example import Draw, Example, Task
from longctx.data.tasks.needles import depths_of, hidden

HEAD = b'A talk follows. What it ends with is to be answered from what was said before.\n\n'
KINDS = ('poem', 'letter', 'story', 'song', 'speech', 'riddle', 'prayer', 'review', 'recipe',
         'report')
TOPICS = ('tapirs', 'bells', 'autumn', 'trains', 'honey', 'ghosts', 'wells', 'geese', 'mirrors',
          'lanterns', 'cellars', 'comets', 'barley', 'anchors', 'thunder', 'clocks', 'moss',
          'kites', 'otters', 'pepper')
ORDINALS = ('first', 'second', 'third', 'fourth', 'fifth', 'sixth', 'seventh', 'eighth')
LINES = (  # {0} a topic, {1} to {4} random words
    '{1} {2}, said the {3}, and let {0} be', 'For {0} there is no {1} but a {2}',
    'Who would {1} a {2} without {0}?', 'All {0} {1} where the {2} and the {3} {4}',
    'Once {0} came by the {1} to {2} our {3}', 'Not one {1}, not one {2}: {0}!',
    'My {1} {2} knew {0} as a {3} knows its {4}', 'Give {0} a {1}, and they {2} until {3}',
    '{1} by {2} we {3} for {0}')
LETTERS = np.array(list('abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789'))
IN_ROUND = bytes.maketrans(b'\n:', b' ,')   # what looks like a round
MARK = 12
LEAST = 210   # letters of an answer: more than difflib's 200


def answer(rng: np.random.Generator, topic: str) -> str:
  """Lines about a topic, of random words."""
  out = ''
  while len(out) <= LEAST:   # a space too
    line = LINES[rng.integers(len(LINES))]
    words = [haystack.WORDS[i] for i in rng.integers(len(haystack.WORDS), size=4)]
    line = line.format(topic, *words)
    out += f'{line[0].upper()}{line[1:]}' + ('' if line[-1] in '?!' else '.') + ' '
  return out.strip()


def mrcr(draw: Draw, name: str, count: int) -> Example:
  rng = draw.rng
  depths = depths_of(draw, count)
  topic, *others = [TOPICS[i] for i in rng.permutation(len(TOPICS))]
  kind = KINDS[rng.integers(len(KINDS))]
  request = lambda kind, topic: f'User: Write a {kind} about {topic}.\nAssistant: '
  answers = [answer(rng, topic) for _ in range(count)]
  rounds, size = [], 0
  while size < fit.bytes_for(draw):
    other = others[rng.integers(len(others))]
    one = f'{request(KINDS[rng.integers(len(KINDS))], other)}{answer(rng, other)}\n\n'.encode()
    rounds.append(one)
    size += len(one)
  mark = ''.join(LETTERS[rng.integers(len(LETTERS), size=MARK)])
  ordinal = ORDINALS[sorted(depths).index(depths[0])]
  target = f' {mark} {answers[0]}'.encode()
  return hidden(
      draw, name, head=HEAD, depths=depths, text=b''.join(rounds),
      places=np.cumsum([0, *map(len, rounds)]),
      needles=[f'{request(kind, topic)}{one}\n\n'.encode() for one in answers], needed=[0],
      rest=lambda cut: b'User: Say something.\nAssistant: ' + cut.translate(IN_ROUND) + b'\n\n',
      question=(f'User: Write {mark} and then, word for word, the {ordinal} {kind} about {topic} '
                'that you wrote.\nAssistant:').encode(),
      target=target, references=answers[:1], new_tokens=len(target), mark=mark,
      choices=tuple(f'{mark} {one}' for one in answers))


SOURCE = ('after Vodrahalli et al. 2024 (MRCR), arXiv:2409.12640, and mrcr_v2 of '
          'google-deepmind/eval_hub')
TASKS = {
    'mrcr_2': Task(make=lambda draw: mrcr(draw, 'mrcr_2', 2), score=scoring.after_mark, floor=0.54,
                   source=SOURCE),
    'mrcr_4': Task(make=lambda draw: mrcr(draw, 'mrcr_4', 4), score=scoring.after_mark, floor=0.315,
                   source=SOURCE),
    'mrcr_8': Task(make=lambda draw: mrcr(draw, 'mrcr_8', 8), score=scoring.after_mark, floor=0.2,
                   source=SOURCE),
}
