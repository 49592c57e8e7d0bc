"""Stories of bAbI 1 to 3 and 5 to 13: people who move, take things, put them down and hand them on.

    1 where is who              2 where is what           3 where was what before
    5 who gave what to whom     6 is who where            7 how many things does who carry
    8 what does who carry       9 and no longer          10 either or
    11 then she ...            12 two together           13 then they ...

(Weston et al. 2015, arXiv:1502.05698; facebookarchive/bAbI-tasks; its words.) Every story is drawn
anew, from a world whose places are all alike: where things lie and people stand at first is random,
where bAbI's apple is always in the kitchen. Differs besides: one question a story, with as many
facts before it as are asked for; answers of yes, no and maybe are drawn evenly (6, 9, 10), and the
kinds of question (5); 3 asks where a thing was before its last place, where it was only once.
Held by: tests/test_task_babilong.py (a solver that reads the text).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Story(NamedTuple):
  facts: list[str]
  question: str
  answer: str
  support: list[int]    # facts that the answer follows from, rising


PLACES = ('bathroom', 'bedroom', 'garden', 'hallway', 'kitchen', 'office')
OBJECTS = ('apple', 'football', 'milk')
SEX = {'Daniel': 'he', 'John': 'he', 'Mary': 'she', 'Sandra': 'she'}
PEOPLE = tuple(SEX)
GIVERS = ('Bill', 'Fred', 'Jeff', 'Mary')
TOWN_PEOPLE = ('Bill', 'Fred', 'Julie', 'Mary')
TOWN_PLACES = ('bedroom', 'cinema', 'kitchen', 'office', 'park', 'school')
MOVED = ('moved to', 'went to', 'went back to', 'journeyed to', 'travelled to')
TOOK = ('got', 'grabbed', 'took', 'picked up')
DROPPED = ('dropped', 'discarded', 'put down', 'left')
GAVE = ('gave', 'handed', 'passed')
THEN = ('Then', 'After that', 'Following that', 'Afterwards')
NUMBERS = ('none', 'one', 'two', 'three')


class World:
  """Who and what is where, and how much of it the facts have told."""

  def __init__(self, rng: np.random.Generator, people: Sequence[str] = PEOPLE):
    self.rng, self.people = rng, people
    self.at = {person: self.pick(PLACES) for person in people}
    self.lies = {thing: self.pick(PLACES) for thing in OBJECTS}   # or where its holder took it
    self.holds: dict[str, list[str]] = {person: [] for person in people}
    self.facts: list[str] = []
    self.told: dict[str, tuple[str, int]] = {}          # person -> place, the fact that told it
    self.got: dict[str, int] = {}                       # thing -> the fact by which it is held
    self.handled: dict[str, list[int]] = {person: [] for person in people}
    # Places where a thing was told to be, and by which facts.
    self.trail: dict[str, list[tuple[str, set[int]]]] = {thing: [] for thing in OBJECTS}
    self.gifts: list[tuple[str, str, str, int]] = []    # who, what, to whom, fact

  def pick(self, of: Sequence):
    return of[self.rng.integers(len(of))]

  def tell(self, fact: str) -> int:
    self.facts.append(fact + '.')
    return len(self.facts) - 1

  def goes(self, person: str, place: str, fact: str) -> None:
    number = self.tell(fact)
    self.at[person], self.told[person] = place, (place, number)
    for thing in self.holds[person]:
      self._known(thing, place, {self.got[thing], number})

  def move(self) -> None:
    person = self.pick(self.people)
    place = self.pick([place for place in PLACES if place != self.at[person]])
    self.goes(person, place, f'{person} {self.pick(MOVED)} the {place}')

  def handle(self, verbs: Sequence[str]) -> bool:
    """Takes, drops or gives something, if somebody can."""
    can = [(verb, *rest) for verb in verbs for rest in getattr(self, f'_can_{verb}')()]
    if can:
      verb, *rest = self.pick(can)
      getattr(self, f'_{verb}')(*rest)
    return bool(can)

  def _can_take(self) -> list:
    held = {thing for things in self.holds.values() for thing in things}
    return [(who, thing) for who in self.people for thing in OBJECTS
            if thing not in held and self.lies[thing] == self.at[who]]

  def _can_drop(self) -> list:
    return [(who, thing) for who in self.people for thing in self.holds[who]]

  def _can_give(self) -> list:
    return [(who, thing, whom) for who, thing in self._can_drop() for whom in self.people
            if whom != who and self.at[whom] == self.at[who]]

  def _take(self, who: str, thing: str) -> None:
    number = self.tell(f'{who} {self.pick(TOOK)} the {thing}{self.pick(["", " there"])}')
    self.got[thing] = number
    self.holds[who].append(thing)
    self.handled[who].append(number)
    self._seen(who, thing, number)

  def _drop(self, who: str, thing: str) -> None:
    number = self.tell(f'{who} {self.pick(DROPPED)} the {thing}{self.pick(["", " there"])}')
    self.holds[who].remove(thing)
    self.lies[thing] = self.at[who]
    self.handled[who].append(number)
    self._seen(who, thing, number)

  def _give(self, who: str, thing: str, whom: str) -> None:
    self.got[thing] = number = self.tell(f'{who} {self.pick(GAVE)} the {thing} to {whom}')
    self.holds[who].remove(thing)
    self.holds[whom].append(thing)
    self.handled[who].append(number)
    self.handled[whom].append(number)
    self.gifts.append((who, thing, whom, number))

  def _seen(self, who: str, thing: str, number: int) -> None:
    """A thing is where somebody took or left it, if it was told where that is."""
    if who in self.told:
      place, told = self.told[who]
      self._known(thing, place, {told, number})

  def _known(self, thing: str, place: str, support: set[int]) -> None:
    trail = self.trail[thing]
    if trail and trail[-1][0] == place:
      trail[-1] = place, support
    else:
      trail.append((place, support))

  def story(self, question: str, answer: str, support) -> Story:
    return Story(self.facts, question, answer, sorted(set(support)))


def _played(people: Sequence[str], verbs: Sequence[str], least: int,
            ask: Callable[..., Story | None], wishes: Sequence = ((),)):
  """rng, most -> a story of `least` to `most` facts, at the end of which there is something to ask.

  What is asked is drawn from `wishes` before the story: none is rarer for being seldom possible.
  """
  def make(rng: np.random.Generator, most: int) -> Story:
    wish = wishes[rng.integers(len(wishes))]
    while True:
      world = World(rng, people)
      enough = rng.integers(least, most + 1)
      while len(world.facts) < enough or not (story := ask(world, *wish)):
        if len(world.facts) == most:
          break   # nothing to ask: another world
        if not verbs or rng.random() < 0.5 or not world.handle(verbs):
          world.move()
      else:
        return story
  return make


def _where_is_who(world: World) -> Story | None:
  who = world.pick(list(world.told))
  place, fact = world.told[who]
  return world.story(f'Where is {who}?', place, [fact])


def _where_is_what(world: World) -> Story | None:
  known = [thing for thing in OBJECTS if world.trail[thing]]
  if not known:
    return None
  thing = world.pick(known)
  place, support = world.trail[thing][-1]
  return world.story(f'Where is the {thing}?', place, support)


def _where_was_what(world: World) -> Story | None:
  once = lambda trail: len(trail) > 1 and [place for place, _ in trail].count(trail[-1][0]) == 1
  known = [thing for thing in OBJECTS if once(world.trail[thing])]
  if not known:
    return None
  thing = world.pick(known)
  (before, why), (place, also) = world.trail[thing][-2:]
  return world.story(f'Where was the {thing} before the {place}?', before, why | also)


GIFT_QUESTIONS = (   # in which the gift is given as (who, thing, whom), and which of them is asked
    ('What did {0} give to {2}?', 1), ('Who gave the {1} to {2}?', 0),
    ('Who did {0} give the {1} to?', 2), ('Who gave the {1}?', 0), ('Who received the {1}?', 2))


def _who_gave_what(world: World, text: str, asked: int) -> Story | None:
  if not world.gifts:
    return None
  *gift, fact = world.pick(world.gifts)
  question = text.format(*gift)
  # One answer, whichever gift is meant.
  answers = {other[asked] for other in world.gifts if text.format(*other[:3]) == question}
  return world.story(question, gift[asked], [fact]) if len(answers) == 1 else None


def _is_who_where(world: World) -> Story | None:
  who = world.pick(list(world.told))
  place, fact = world.told[who]
  answer = world.pick(['yes', 'no'])
  asked = place if answer == 'yes' else world.pick([other for other in PLACES if other != place])
  return world.story(f'Is {who} in the {asked}?', answer, [fact])


def _how_many(world: World) -> Story | None:
  known = [who for who in world.people if world.handled[who]]
  if not known:
    return None
  who = world.pick(known)
  return world.story(f'How many objects is {who} carrying?', NUMBERS[len(world.holds[who])],
                     world.handled[who])


def _carries_what(world: World) -> Story | None:
  known = [who for who in world.people if world.handled[who]]
  if not known:
    return None
  who = world.pick(known)
  return world.story(f'What is {who} carrying?', ','.join(world.holds[who]) or 'nothing',
                     world.handled[who])


def _no_longer(rng: np.random.Generator, most: int) -> Story:
  """9: some facts say where somebody is, some where not."""
  while True:
    world, been, not_in = World(rng), {who: [] for who in PEOPLE}, {who: {} for who in PEOPLE}
    for _ in range(rng.integers(2, most + 1)):
      who = world.pick(PEOPLE)
      kind = world.pick(['moves', 'moves', 'is', 'not'])
      if kind == 'not':
        place = world.pick([place for place in PLACES if place != world.at[who]])
        how = 'no longer' if place in been[who] else 'not'
        not_in[who][place] = world.tell(f'{who} is {how} in the {place}')
        continue
      others = [place for place in PLACES if place != world.at[who]]
      place = world.at[who] if kind == 'is' else world.pick(others)
      world.goes(who, place, f'{who} is in the {place}' if kind == 'is' else
                 f'{who} {world.pick(MOVED)} the {place}')
      been[who].append(place)
      not_in[who] = {}
    if rng.random() < 0.5:
      if world.told:
        who = world.pick(list(world.told))
        place, number = world.told[who]
        return world.story(f'Is {who} in the {place}?', 'yes', [number])
    else:
      who = world.pick([who for who in PEOPLE if who in world.told or not_in[who]])
      known = dict(not_in[who])
      if who in world.told:
        here, number = world.told[who]
        known |= {place: number for place in PLACES if place != here and place not in known}
      place = world.pick(list(known))
      return world.story(f'Is {who} in the {place}?', 'no', [known[place]])


def _either(rng: np.random.Generator, most: int) -> Story:
  """10: the last that was told of somebody is one place, or either of two."""
  while True:
    world, last = World(rng, TOWN_PEOPLE), {}
    for number in range(rng.integers(2, most + 1)):
      who, kind = world.pick(TOWN_PEOPLE), world.pick(['moves', 'is', 'either'])
      one, other = (TOWN_PLACES[i] for i in rng.permutation(len(TOWN_PLACES))[:2])
      if kind == 'is' and who in last:
        one = world.pick(last[who][0])   # who does not move stays
      world.tell({'moves': f'{who} {world.pick(MOVED)} the {one}', 'is': f'{who} is in the {one}',
                  'either': f'{who} is either in the {one} or the {other}'}[kind])
      last[who] = ((one, other) if kind == 'either' else (one,), number)
    answer = world.pick(['yes', 'no', 'maybe'])
    places = {'yes': (1,), 'no': (1, 2), 'maybe': (2,)}[answer]
    known = [who for who in last if len(last[who][0]) in places]
    if known:
      who = world.pick(known)
      places, number = last[who]
      asked = world.pick([p for p in TOWN_PLACES if (p in places) == (answer != 'no')])
      return world.story(f'Is {who} in the {asked}?', answer, [number])


def _paired(first: int, then: bool):
  """rng, most -> a story of twos of facts: of `first` people, then of the same or of others."""
  def make(rng: np.random.Generator, most: int) -> Story:
    world = World(rng)
    together = None
    for number in range(2 * int(rng.integers(1, most // 2 + 1))):
      same = then and number % 2
      if not same:
        together = [PEOPLE[i] for i in rng.permutation(len(PEOPLE))[:first]]
      free = [place for place in PLACES if all(world.at[who] != place for who in together)]
      place, moved = world.pick(free), world.pick(MOVED)
      names = ' and '.join(together)
      if same:
        names = f'{world.pick(THEN)} {"they" if first > 1 else SEX[together[0]]}'
      fact = f'{names} {moved} the {place}'
      world.goes(together[0], place, fact)
      for who in together[1:]:
        world.at[who], world.told[who] = place, (place, len(world.facts) - 1)
    who = world.pick(list(world.told))
    place, number = world.told[who]
    # Whom "they" means the fact before says.
    support = [number - 1, number] if then and number % 2 else [number]
    return world.story(f'Where is {who}?', place, support)
  return make


STORIES: dict[int, Callable[[np.random.Generator, int], Story]] = {
    1: _played(PEOPLE, (), 2, _where_is_who),
    2: _played(PEOPLE, ('take', 'drop'), 2, _where_is_what),
    3: _played(PEOPLE, ('take', 'drop'), 3, _where_was_what),
    5: _played(GIVERS, ('take', 'give'), 2, _who_gave_what, GIFT_QUESTIONS),
    6: _played(PEOPLE, (), 2, _is_who_where),
    7: _played(PEOPLE, ('take', 'drop', 'give'), 2, _how_many),
    8: _played(PEOPLE, ('take', 'drop', 'give'), 2, _carries_what),
    9: _no_longer,
    10: _either,
    11: _paired(1, then=True),
    12: _paired(2, then=False),
    13: _paired(2, then=True),
}
