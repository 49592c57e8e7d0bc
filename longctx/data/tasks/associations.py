"""Needles that share no word with what is asked: to find one, one has to know what it is about.

    association   "Anna lives beside the Colosseum", asked as "Which person has been to Rome?"
    association2  asked as "... to Italy?", one step further

In the way of NoLiMa (Modarressi et al. 2025, arXiv:2502.05167), with facts and words of our own.
Three others live beside places elsewhere, so that a name is no answer by itself: one who reads all
names and knows nothing of the places is right in a quarter of cases, which is the floor. No needle
has a word in common with the question; making one that has is a fault. Differs: NoLiMa has one
needle, no others, and books around it. A model that never read about the world cannot know the
places, but may learn the 42 of them from examples.
Held by: tests/test_tasks.py, tests/test_task_needles.py.
"""

import re

from longctx.data.tasks import fit, haystack, scoring
from longctx.data.tasks.example import Draw, Example, Task
from longctx.data.tasks.needles import depths_of, hidden
from longctx.errors import check

# What is lived beside, its city, its country; a country may have several.
PLACES = (
    ('the Colosseum', 'Rome', 'Italy'), ('the Rialto', 'Venice', 'Italy'),
    ('La Scala', 'Milan', 'Italy'), ('the Eiffel Tower', 'Paris', 'France'),
    ('the Louvre', 'Paris', 'France'), ('the Canebiere', 'Marseille', 'France'),
    ('the Brandenburg Gate', 'Berlin', 'Germany'), ('the Semperoper', 'Dresden', 'Germany'),
    ('the Elbphilharmonie', 'Hamburg', 'Germany'), ('the Prado', 'Madrid', 'Spain'),
    ('the Sagrada Familia', 'Barcelona', 'Spain'), ('the Alhambra', 'Granada', 'Spain'),
    ('the Acropolis', 'Athens', 'Greece'), ('the Hagia Sophia', 'Istanbul', 'Turkey'),
    ('the Kremlin', 'Moscow', 'Russia'), ('the Hermitage', 'Saint Petersburg', 'Russia'),
    ('the Taj Mahal', 'Agra', 'India'), ('the Gateway Arch', 'Saint Louis', 'America'),
    ('the Golden Gate', 'San Francisco', 'America'),
    ('the Empire State Building', 'New York', 'America'),
    ('the Forbidden Palace', 'Beijing', 'China'), ('the Bund', 'Shanghai', 'China'),
    ('Senso-ji', 'Tokyo', 'Japan'), ('Kinkaku-ji', 'Kyoto', 'Japan'),
    ('the Atomium', 'Brussels', 'Belgium'), ('the Rijksmuseum', 'Amsterdam', 'Netherlands'),
    ('the Belvedere', 'Vienna', 'Austria'), ('the Hradcany', 'Prague', 'Czechia'),
    ('the Wawel', 'Krakow', 'Poland'), ('the Little Mermaid', 'Copenhagen', 'Denmark'),
    ('the Vasa', 'Stockholm', 'Sweden'), ('the Vigeland sculptures', 'Oslo', 'Norway'),
    ('Big Ben', 'London', 'England'), ('the Cavern Club', 'Liverpool', 'England'),
    ('Holyrood', 'Edinburgh', 'Scotland'), ('the Ha-penny Bridge', 'Dublin', 'Ireland'),
    ('the Great Sphinx', 'Giza', 'Egypt'), ('Table Mountain', 'Cape Town', 'South Africa'),
    ('the Opera House with its white sails', 'Sydney', 'Australia'),
    ('Christ the Redeemer', 'Rio de Janeiro', 'Brazil'),
    ('the Casa Rosada', 'Buenos Aires', 'Argentina'), ('the CN Tower', 'Toronto', 'Canada'))
NAMES = (
    'Agnes', 'Bruno', 'Clara', 'Dario', 'Edith', 'Felix', 'Greta', 'Hugo', 'Ines', 'Jonas',
    'Karin', 'Leon', 'Mila', 'Nora', 'Oscar', 'Petra', 'Quinn', 'Rosa', 'Simon', 'Tara', 'Ursula',
    'Viktor', 'Wanda', 'Xaver', 'Yvonne', 'Zoe')
PEOPLE = 4   # of whom one is asked for
HEAD = b'Here is a long text. A question about its people comes last.\n'


def words(text: str) -> set[str]:
  """The words of a text, in small letters."""
  return set(re.findall(r'[^\W\d_]+', text.lower()))


def apart(needles: list[str], question: str) -> None:
  """AssertionError where a needle shares a word with the question: it could be found so."""
  shared = set.union(*map(words, needles)) & words(question)
  if shared:
    raise AssertionError(f'the question {question!r} and its needles share {sorted(shared)}')


def association(draw: Draw, name: str, steps: int) -> Example:
  """`steps`: from a place to its city is 1, to its country 2."""
  depths = depths_of(draw, PEOPLE)
  text = haystack.of(draw)(fit.bytes_for(draw))
  names = [one for one in NAMES if one.encode() not in text]
  check(len(names) >= PEOPLE, f"{draw.label('haystack')}: holds all but {len(names)} of the names "
        f'of {name}, {PEOPLE} of which must not be in it; give another text')
  people = [names[i] for i in draw.rng.permutation(len(names))[:PEOPLE]]
  places, countries = [], set()
  # of as many countries: one answer alone is right
  for i in draw.rng.permutation(len(PLACES)).tolist():
    if PLACES[i][2] not in countries and len(places) < PEOPLE:
      places.append(PLACES[i])
      countries.add(PLACES[i][2])
  needles = [f'Nowadays {person} lives beside {place[0]}. '
             for person, place in zip(people, places)]
  question = f'\nQuestion: Which person has been to {places[0][steps]}?\nAnswer by a name:'
  apart(needles, question)
  target = f' {people[0]}'.encode()
  return hidden(draw, name, head=HEAD, needles=[needle.encode() for needle in needles],
                depths=depths, question=question.encode(), target=target, references=people[:1],
                new_tokens=max(len(one) for one in NAMES) + 1, needed=[0], text=text,
                choices=tuple(sorted(people)))


SOURCE = 'after Modarressi et al. 2025 (NoLiMa), arXiv:2502.05167; facts and words are our own'
TASKS = {
    'association': Task(make=lambda draw: association(draw, 'association', 1),
                        score=scoring.first_choice, floor=1 / PEOPLE, source=SOURCE,
                        reads=('haystack',)),
    'association2': Task(make=lambda draw: association(draw, 'association2', 2),
                         score=scoring.first_choice, floor=1 / PEOPLE, source=SOURCE,
                        reads=('haystack',)),
}
