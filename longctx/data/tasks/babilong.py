"""BABILong: the facts of a bAbI story among the sentences of a long text, and a question on them.

    babilong_qa1 ... babilong_qa20    (Kuratov et al. 2024, arXiv:2406.10149; booydar/babilong)

The facts keep their order; each stands between two sentences of the background, evenly anywhere,
several in one place too. The prompt is BABILong's: instruction, examples, how to answer, <context>,
question; in our words, with two examples of the same kind of story, and with "Answer:" begun.
Background: `eval.haystack`, BABILong's is books; by itself one sentence over and over (results are
marked -syn). Differs:
stories are drawn from a seed (babilong_people, babilong_relations) and short enough for any length
that is not refused; lengths are exact; asked for a depth, the first fact that the answer needs
stands there, and the others evenly before and after it.

Scored by BABILong's metric, task 7 by whole words (babilong_metric has both, and the harness' one).
Held by: tests/test_tasks.py, tests/test_task_babilong.py.
"""

import functools

import numpy as np

from longctx.data.tasks import needles
from longctx.data.tasks.babilong_metric import LABELS, score
from longctx.data.tasks.babilong_people import GIVERS, OBJECTS
from longctx.data.tasks.babilong_people import STORIES as PEOPLE_STORIES
from longctx.data.tasks.babilong_relations import NEEDS
from longctx.data.tasks.babilong_relations import STORIES as RELATION_STORIES
from longctx.data.tasks.example import Draw, Example, Task, generator
from longctx.errors import check

STORIES = PEOPLE_STORIES | RELATION_STORIES
MOST_FACTS = {number: {2: 14, 3: 20}.get(number, 10) for number in STORIES}
EXAMPLE_FACTS = 5
FACT_BYTES, QUESTION_BYTES = 52, 110   # the longest; two facts of 17 are longer, and all it has

_ABOUT_WHO = 'about who is where'
_ABOUT_THINGS = 'about people and the things they take, leave and hand on'
_LAST = 'Somebody who has been in several places is in the last of them.'
_WITH = 'A thing that somebody holds moves with its holder, and stays where it is left.'
_PLACE, _YES_NO = 'Answer with one word, the place.', 'Answer with one word, yes or no.'
# What the facts are about, what to bear in mind, how to answer.
RULES: dict[int, tuple[str, str, str]] = {
    1: (_ABOUT_WHO, _LAST, _PLACE),
    2: (_ABOUT_THINGS, _WITH, _PLACE),
    3: (_ABOUT_THINGS, _WITH, _PLACE),
    4: ('about how places lie', 'What is north of a place has that place to its south.', _PLACE),
    5: (_ABOUT_THINGS, 'Who gives a thing no longer has it.',
        'Answer with one word, the person or the thing.'),
    6: (_ABOUT_WHO, _LAST, _YES_NO),
    7: (_ABOUT_THINGS, 'Count what somebody took or was given and still has.',
        'Answer with one word, none, one, two or three.'),
    8: (_ABOUT_THINGS, 'List what somebody took or was given and still has.',
        'Answer with nothing, or with the things and commas between them.'),
    9: (_ABOUT_WHO, _LAST, _YES_NO),
    10: (_ABOUT_WHO, _LAST + ' Who is in either of two places is maybe in each.',
         'Answer with one word, yes, no or maybe.'),
    11: (_ABOUT_WHO, _LAST + ' He and she are who was named just before.', _PLACE),
    12: (_ABOUT_WHO, _LAST, _PLACE),
    13: (_ABOUT_WHO, _LAST + ' They are the two who were named just before.', _PLACE),
    14: ('about where people were at which time',
         'The times are yesterday, this morning, this afternoon and this evening, in this order.',
         _PLACE),
    15: ('about animals and what they fear', 'Each fears what all of its kind fear.',
         'Answer with one word, the animal, as of one.'),
    16: ('about animals and their colors', 'All of a kind have the same color.',
         'Answer with one word, the color.'),
    17: ('about shapes on a grid', 'Next to each other means one step and no more.', _YES_NO),
    18: ('about the sizes of things', 'What fits inside a thing fits inside all that is bigger.',
         _YES_NO),
    19: ('about how places lie', 'Each is one step from the other.',
         'Answer with two of n, s, e and w, the steps to go, and a comma between them.'),
    20: ('about what people feel, where they go and what they take', 'What somebody feels is why.',
         'Answer with one word, the place or the feeling.'),
}


@functools.cache
def head(number: int) -> bytes:
  """All that stands before the context."""
  about, rule, how = RULES[number]
  rng, shown = generator('babilong example', number), []
  while len(shown) < 2:
    story = STORIES[number](rng, EXAMPLE_FACTS)
    if story.answer not in [other.answer for other in shown]:
      shown.append(story)
  examples = ''.join(f'<example>\n{" ".join(story.facts)} {story.question}\n'
                     f'Answer: {story.answer}\n</example>\n\n' for story in shown)
  return (f'A text hides facts {about}. Answer the question by these facts alone. {rule}\n\n'
          f'{examples}{how} Write no more than that.\n\n<context>\n').encode()


def choices(number: int, question: str) -> tuple[str, ...]:
  """The answers that are most likely, given the question and no facts: all of them alike."""
  if number in (3, 4, 14):
    return tuple(label for label in LABELS[number] if label not in question)
  if number == 5:
    others = tuple(who for who in GIVERS if who not in question)
    return OBJECTS if question.startswith('What') else others
  if number in (7, 8):
    return ('one',) if number == 7 else ('nothing',)
  if number == 20:
    wanted = [need for need, (place, thing) in NEEDS.items()
              if f'the {place}' in question or f'the {thing}' in question]
    return tuple(wanted) or ('kitchen',)   # which two of the four needs lead to
  return LABELS[number]


def babilong(draw: Draw, number: int) -> Example:
  name, most = f'babilong_qa{number}', MOST_FACTS[number]
  new_tokens = 1 + max(map(len, [','.join(OBJECTS)] if number == 8 else LABELS[number]))
  least = 1 + draw.count(head(number)) + most * FACT_BYTES + QUESTION_BYTES + new_tokens
  check(draw.length >= least, f"{name}: length={draw.length}: must be at least {least} in this "
        f"model's tokens, so that every story of {most} facts fits ({new_tokens} for the answer)")
  story = STORIES[number](draw.rng, most)
  depths = np.sort(draw.rng.random(len(story.facts)))
  first = story.support[0]
  if draw.depth is not None:
    before, after = draw.rng.random(first), draw.rng.random(len(depths) - first - 1)
    depths = np.concatenate([np.sort(before) * draw.depth, [draw.depth],
                             draw.depth + np.sort(after) * (1 - draw.depth)])
  return needles.hidden(
      draw, name, head=head(number), needles=[fact.encode() + b' ' for fact in story.facts],
      depths=depths.tolist(), target=f' {story.answer}'.encode(),
      question=f'\n</context>\n\nQuestion: {story.question}\nAnswer:'.encode(),
      references=[story.answer], new_tokens=new_tokens, needed=story.support,
      number=number, asked=story.question, choices=choices(number, story.question))


# Of the best answer to the question without its facts: derived where all answers are alike likely,
# else counted (7: that one thing is carried, 8: that nothing is). In 20 the question tells much.
FLOORS = {
    **dict.fromkeys((1, 2, 11, 12, 13), 1 / 6), **dict.fromkeys((3, 4, 14), 1 / 5),
    **dict.fromkeys((6, 9, 17, 18), 1 / 2), **dict.fromkeys((15, 16), 1 / 4),
    5: (3 / 3 + 2 / 4) / 5, 7: 0.59, 8: 0.36, 10: 1 / 3, 19: 1 / 12, 20: (1 / 2 + 3 / 4 + 1) / 3}

TASKS = {
    f'babilong_qa{number}': Task(
        make=functools.partial(babilong, number=number), score=score, floor=FLOORS[number],
        reads=('haystack',), instead_of=dict(haystack='books'),
        source='BABILong, arXiv:2406.10149, on bAbI, arXiv:1502.05698; stories and prompt our own')
    for number in sorted(STORIES)
}
