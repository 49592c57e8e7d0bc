"""Stories of bAbI 4 and 14 to 20: how things stand to one another, and what follows.

    4 north of what     14 where before, by times of day   15 who fears what (all wolves ...)
    16 of what colour, as another of its kind               17 left of, above: two steps
    18 what fits into what: two steps                       19 which way to go: two steps
    20 where to, and why

(Weston et al. 2015, arXiv:1502.05698; facebookarchive/bAbI-tasks; its words.) One question a story;
the kinds of questions, and yes and no, are drawn evenly. In 20 the question alone says much of the
answer.
Held by: tests/test_task_babilong.py (a solver that reads the text).
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from longctx.data.tasks.babilong_people import MOVED, PLACES, TOOK, TOWN_PEOPLE, TOWN_PLACES, Story

COMPASS = {'n': ('north', (0, 1)), 's': ('south', (0, -1)),
           'e': ('east', (1, 0)), 'w': ('west', (-1, 0))}
BACK = {'n': 's', 's': 'n', 'e': 'w', 'w': 'e'}
TIMES = ('yesterday', 'this morning', 'this afternoon', 'this evening')
KINDS = {'cat': 'cats', 'mouse': 'mice', 'sheep': 'sheep', 'wolf': 'wolves'}
OWNERS = ('Emily', 'Gertrude', 'Jessica', 'Winona')
COLOURS, BEASTS = ('gray', 'green', 'white', 'yellow'), ('frog', 'lion', 'rhino', 'swan')
PETS = ('Bernhard', 'Brian', 'Greg', 'Julius', 'Lily')
SHAPES = tuple(f'{colour} {shape}' for colour in ('red', 'blue', 'pink', 'yellow')
               for shape in ('square', 'rectangle', 'triangle', 'sphere'))
SIDES = {'to the left of': (-1, 0), 'to the right of': (1, 0), 'above': (0, 1), 'below': (0, -1)}
# Rising in size.
BOXES = ('chocolate', 'box of chocolates', 'box', 'suitcase', 'chest', 'container')
NEEDS = {'hungry': ('kitchen', 'apple'), 'thirsty': ('kitchen', 'milk'),
         'bored': ('garden', 'football'), 'tired': ('bedroom', 'pajamas')}
TIRED_PEOPLE = ('Antoine', 'Jason', 'Sumit', 'Yann')


def _pick(rng: np.random.Generator, of: Sequence):
  return of[rng.integers(len(of))]


def _some(rng: np.random.Generator, of: Sequence, count: int | None = None) -> list:
  """`count` different ones, or all, in any order."""
  return [of[i] for i in rng.permutation(len(of))[:count]]


def _shuffled(rng: np.random.Generator, facts: Sequence[str], question: str, answer: str,
              support: Sequence[int]) -> Story:
  order = rng.permutation(len(facts))
  places = np.argsort(order)
  return Story([facts[i][0].upper() + facts[i][1:] + '.' for i in order], question, answer,
               sorted(int(places[i]) for i in set(support)))


def _stands(one: str, way: str, other: str) -> str:
  return f'the {one} is {COMPASS[way][0]} of the {other}'


def _told_either_way(rng: np.random.Generator, one: str, way: str, other: str) -> str:
  return _pick(rng, [_stands(one, way, other), _stands(other, BACK[way], one)])


def _north_of_what(rng: np.random.Generator, most: int) -> Story:
  """4: three places in a row."""
  del most
  first, middle, last = _some(rng, PLACES, 3)
  way = _pick(rng, list(COMPASS))   # from each to the one before
  facts = [_told_either_way(rng, first, way, middle), _told_either_way(rng, middle, way, last)]
  asked, answer, fact, seen = _pick(rng, [(middle, first, 0, way), (middle, last, 1, BACK[way])])
  question = _pick(rng, [f'What is {COMPASS[seen][0]} of the {asked}?',
                         f'What is the {asked} {COMPASS[BACK[seen]][0]} of?'])
  return _shuffled(rng, facts, question, answer, [fact])


def _before(rng: np.random.Generator, most: int) -> Story:
  """14: who was where at which time, in any order."""
  moves = {}
  asked = _pick(rng, TOWN_PEOPLE)
  slots = [(who, time) for who in TOWN_PEOPLE for time in range(len(TIMES))]
  mine = _some(rng, [slot for slot in slots if slot[0] == asked], 2)
  others = [slot for slot in slots if slot not in mine]
  for who, time in [*mine, *_some(rng, others, rng.integers(0, most - 1))]:
    been = [place for (other, _), place in moves.items() if other == who]
    moves[who, time] = _pick(rng, [place for place in TOWN_PLACES if place not in been])
  facts = []
  for (who, time), place in moves.items():
    said = f'{who} {_pick(rng, MOVED)} the {place}'
    facts.append(_pick(rng, [f'{said} {TIMES[time]}', f'{TIMES[time]} {said}']))
  keys = list(moves)
  times = sorted(time for who, time in keys if who == asked)
  at = int(rng.integers(1, len(times)))
  before, after = (asked, times[at - 1]), (asked, times[at])
  return _shuffled(rng, facts, f'Where was {asked} before the {moves[after]}?', moves[before],
                   [keys.index(before), keys.index(after)])


def _fears(rng: np.random.Generator, most: int) -> Story:
  """15: four who are of a kind each, and what each kind fears."""
  del most
  kinds = list(KINDS)
  of = dict(zip(OWNERS, _some(rng, kinds), strict=True))
  fear = {kind: _pick(rng, [other for other in kinds if other != kind]) for kind in kinds}
  facts = [f'{who} is a {kind}' for who, kind in of.items()]
  facts += [f'{KINDS[kind]} are afraid of {KINDS[other]}' for kind, other in fear.items()]
  who = _pick(rng, OWNERS)
  return _shuffled(rng, facts, f'What is {who} afraid of?', fear[of[who]],
                   [OWNERS.index(who), len(OWNERS) + kinds.index(of[who])])


def _coloured(rng: np.random.Generator, most: int) -> Story:
  """16: all of a kind have one colour; the one asked of has another of its kind beside it."""
  del most
  while True:
    of = {pet: _pick(rng, BEASTS) for pet in PETS}
    who = _pick(rng, PETS)
    if list(of.values()).count(of[who]) > 1:
      break
  colour = dict(zip(BEASTS, _some(rng, COLOURS), strict=True))
  others = [pet for pet in PETS if pet != who]
  facts = [f'{pet} is a {of[pet]}' for pet in PETS]
  facts += [f'{pet} is {colour[of[pet]]}' for pet in others]
  alike = [pet for pet in others if of[pet] == of[who]]
  support = [PETS.index(pet) for pet in [who, *alike]]
  support += [len(PETS) + others.index(pet) for pet in alike]
  return _shuffled(rng, facts, f'What color is {who}?', colour[of[who]], support)


def _beside(rng: np.random.Generator, most: int) -> Story:
  """17: three shapes, each a step from the one before; is one on this side of another?"""
  del most
  shapes, sides = _some(rng, SHAPES, 3), list(SIDES)
  first = _pick(rng, sides)
  back = tuple(-step for step in SIDES[first])
  second = _pick(rng, [side for side in sides if SIDES[side] != back])   # no two in one place
  facts = [f'the {shapes[0]} is {first} the {shapes[1]}',
           f'the {shapes[1]} is {second} the {shapes[2]}']
  at = [np.add(SIDES[first], SIDES[second]), np.array(SIDES[second]), np.zeros(2, int)]
  one, other = _some(rng, [0, 1, 2], 2)
  apart = np.sign(at[one] - at[other])
  axis = _pick(rng, [axis for axis in (0, 1) if apart[axis]])
  answer = _pick(rng, ['yes', 'no'])
  sign = apart[axis] if answer == 'yes' else -apart[axis]
  side = next(side for side, step in SIDES.items() if step[axis] == sign)
  return _shuffled(rng, facts, f'Is the {shapes[one]} {side} the {shapes[other]}?', answer, [0, 1])


def _fits(rng: np.random.Generator, most: int) -> Story:
  """18: what is larger than what; a question whose answer takes two facts and not one."""
  while True:
    pairs = list(itertools.combinations(range(len(BOXES)), 2))   # smaller, larger
    told = _some(rng, pairs, rng.integers(3, most + 1))
    between = {(small, large): middle for small, large in pairs if (small, large) not in told
               for middle in range(small + 1, large)
               if (small, middle) in told and (middle, large) in told}
    if between:
      break
  facts = [_pick(rng, [f'the {BOXES[small]} fits inside the {BOXES[large]}',
                       f'the {BOXES[large]} is bigger than the {BOXES[small]}'])
           for small, large in told]
  small, large = _pick(rng, list(between))
  answer, bigger = _pick(rng, ['yes', 'no']), rng.random() < 0.5
  one, other = (large, small) if bigger == (answer == 'yes') else (small, large)
  question = (f'Is the {BOXES[one]} bigger than the {BOXES[other]}?' if bigger else
              f'Does the {BOXES[one]} fit in the {BOXES[other]}?')
  middle = between[small, large]
  return _shuffled(rng, facts, question, answer,
                   [told.index((small, middle)), told.index((middle, large))])


def _way(rng: np.random.Generator, most: int) -> Story:
  """19: five places on a grid; from one to another by two steps, which are the only such."""
  del most
  names = _some(rng, PLACES, 5)
  at, facts, neighbours = {names[0]: (0, 0)}, [], []

  def put(name: str, beside: str, way: str) -> None:
    """One more place, a step `way` from another."""
    at[name] = tuple(int(x) for x in np.add(at[beside], COMPASS[way][1]))
    neighbours.append((beside, name))
    facts.append(_told_either_way(rng, name, way, beside))

  first = _pick(rng, list(COMPASS))
  second = _pick(rng, [way for way in COMPASS if way != BACK[first]])
  put(names[1], names[0], first)
  put(names[2], names[1], second)
  for name in names[3:]:
    # Not between the two ends, where another way would lead; nor where something stands.
    free = [(beside, way) for beside in at for way in COMPASS
            if (spot := tuple(np.add(at[beside], COMPASS[way][1]).tolist())) not in at.values()
            and not all(abs(np.subtract(spot, at[end])).sum() == 1 for end in (names[0], names[2]))]
    put(name, *_pick(rng, free))
  return _shuffled(rng, facts, f'How do you go from the {names[0]} to the {names[2]}?',
                   f'{first},{second}', [0, 1])


def _why(rng: np.random.Generator, most: int) -> Story:
  """20: people who need something go where it is and take it; where will one go, or why did one?"""
  needs = dict(zip(TIRED_PEOPLE, _some(rng, list(NEEDS)), strict=True))
  steps, facts, by = dict.fromkeys(TIRED_PEOPLE, 0), [], {}

  def act(who: str) -> None:
    place, thing = NEEDS[needs[who]]
    facts.append(f'{who} ' + (f'is {needs[who]}', f'{_pick(rng, MOVED)} the {place}',
                              f'{_pick(rng, TOOK)} the {thing} there')[steps[who]] + '.')
    by[who, steps[who]] = len(facts) - 1
    steps[who] += 1

  kind, who = int(rng.integers(3)), _pick(rng, TIRED_PEOPLE)
  # The others do some of theirs before, between and after what is asked of.
  others = [other for other in TIRED_PEOPLE if other != who for _ in range(3)]
  extra = _some(rng, others, rng.integers(0, min(len(others), most - kind - 1) + 1))
  for actor in _some(rng, [who] * (kind + 1) + extra):
    act(actor)
  place, thing = NEEDS[needs[who]]
  if kind == 0:
    return Story(facts, f'Where will {who} go?', place, [by[who, 0]])
  what = f'go to the {place}' if kind == 1 else f'get the {thing}'
  return Story(facts, f'Why did {who} {what}?', needs[who], [by[who, 0]])


STORIES: dict[int, Callable[[np.random.Generator, int], Story]] = {
    4: _north_of_what, 14: _before, 15: _fears, 16: _coloured, 17: _beside, 18: _fits, 19: _way,
    20: _why}
