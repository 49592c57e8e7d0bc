"""One of many like parts of the prompt, asked for by its key or by what it says.

    json_kv            a JSON object of random UUIDs, a value asked for by its key (Liu et al. 2023,
                       arXiv:2307.03172, their prompt; in HELMET, arXiv:2410.02694, as json_kv).
                       Differs: a last pair, "note", of what of one more pair there is room for, so
                       that the length is exact; no examples come first.
    corpus_in_context  the ID of the one document that answers a question, in the format of LOFT
                       (Lee et al. 2024, arXiv:2406.13121). Documents tell of invented buildings,
                       who built them, when and of what; with eval.haystack they are passages of
                       that text, and the question is a sentence of one of them. Differs: documents
                       are few sentences long; a last one, ID 000000, has what of one more there is
                       room for.
Held by: tests/test_tasks.py, tests/test_task_needles.py.
"""

import itertools

import numpy as np

from longctx.data.tasks import fit, haystack, scoring
from longctx.data.tasks.example import Draw, Example, Task
from longctx.data.tasks.needles import depths_of, hidden
from longctx.errors import ConfigError

KV_HEAD = (b'Extract the value corresponding to the specified key in the JSON object below.\n\n'
           b'JSON data:\n{')
PAIR = 81   # bytes of a pair, its comma and its line
IN_NOTE = bytes.maketrans(b'":,\n ', b'-----')   # what ends a string, or looks like a pair

CORPUS_HEAD = (b'You will be given a list of documents. Find the one that is asked for.\n\n'
               b'====== Corpus ======\n')
# bytes of a passage of real text, and of a sentence asked for, at least
PASSAGE, SENTENCE = 300, 24
# what looks like a document or an ID
IN_SCRAPS = bytes.maketrans(b'|:\n0123456789', b',,,0000000000')
KINDS = ('bridge', 'lighthouse', 'mill', 'library', 'theatre', 'harbour', 'school', 'hospital',
         'granary', 'tower', 'chapel', 'market hall', 'aqueduct', 'observatory', 'prison',
         'bakery')
STUFFS = ('basalt', 'brick', 'limestone', 'oak', 'granite', 'iron', 'larch', 'marble', 'sandstone',
          'slate', 'clay', 'copper', 'chalk', 'cedar', 'concrete', 'flint')
ONSETS = ('b', 'br', 'd', 'dr', 'f', 'g', 'gr', 'h', 'k', 'l', 'm', 'n', 'p', 'r', 's', 'st', 't',
          'tr', 'v', 'z')
VOWELS, CODAS = ('a', 'e', 'i', 'o', 'u'), ('l', 'm', 'n', 'r', 's', 'th', 'x', 'nd', 'rk', 'lt')


def uuids(rng: np.random.Generator, count: int) -> list[str]:
  """Random UUIDs of version 4."""
  out = []
  for digits in rng.bytes(16 * count).hex(' ', 16).split():
    variant = '89ab'[int(digits[16], 16) & 3]
    out.append(f'{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-'
               f'{digits[20:]}')
  return out


def json_kv(draw: Draw) -> Example:
  depths = depths_of(draw, 1)
  count = 1 + fit.bytes_for(draw) // PAIR
  found = uuids(draw.rng, 2 * count + 2)
  pairs = [f'"{key}": "{value}",\n '.encode() for key, value in zip(found[::2], found[1::2])]
  target = f' "{found[1]}"'.encode()
  return hidden(
      draw, 'json_kv', head=KV_HEAD, needles=pairs[:1], depths=depths, text=b''.join(pairs[1:]),
      places=PAIR * np.arange(count + 1),
      rest=lambda cut: b'"note": "' + cut.translate(IN_NOTE) + b'"}',
      question=f'\n\nKey: "{found[0]}"\nCorresponding value:'.encode(), target=target,
      references=found[1:2], new_tokens=len(target))


def invented(rng: np.random.Generator, count: int) -> list[str]:
  """Different invented names, of three syllables."""
  bases = (len(ONSETS), len(VOWELS)) * 3 + (len(CODAS),)
  sounds = (ONSETS, VOWELS) * 3 + (CODAS,)
  out = []
  for number in rng.choice(int(np.prod(bases)), size=count, replace=False).tolist():
    name = ''
    for base, sound in zip(bases, sounds):
      number, i = divmod(number, base)
      name += sound[i]
    out.append(name.capitalize())
  return out


def buildings(draw: Draw, size: int) -> tuple[list[tuple[str, str]], str]:
  """((title, content) of documents of more than `size` bytes together, a query for the first)."""
  rng, count = draw.rng, 2 + size // 150   # no document has less
  names = invented(rng, 2 * count)
  sizes = (len(KINDS), len(STUFFS), 950, 90)
  kinds, stuffs, years, windows = (rng.integers(n, size=count).tolist() for n in sizes)
  told = haystack.noise(rng, 160 * count).decode().split('. ')
  out = []
  for i in range(count):
    kind, stuff, builder = KINDS[kinds[i]], STUFFS[stuffs[i]], names[2 * i + 1]
    out.append((f'The {kind} of {names[2 * i]}',
                f'{builder} built it of {stuff} in {1000 + years[i]}. It has '
                f'{10 + windows[i]} windows. {". ".join(told[3 * i:3 * i + 3])}.'))
  return out, f'What did {names[1]} build of {STUFFS[stuffs[0]]}?'


def passages(draw: Draw, size: int) -> tuple[list[tuple[str, str]], str]:
  """The same of the haystack's passages; the query is a sentence that the first alone has."""
  text = haystack.of(draw)(size)
  starts = haystack.sentence_starts(text)
  cuts = [0]
  for start in starts.tolist():
    if start - cuts[-1] >= PASSAGE:
      cuts.append(start)
  parts = [text[low:high].strip() for low, high in itertools.pairwise(cuts)]
  for i in draw.rng.permutation(len(parts)).tolist():
    inside = starts[(starts >= cuts[i]) & (starts <= cuts[i + 1])]
    said = [text[low:high].strip() for low, high in itertools.pairwise(inside)]
    sentence = min(said, key=lambda one: (len(one) < SENTENCE, sum(one in part for part in parts)))
    others = [one for one in parts if sentence not in one]
    if len(sentence) >= SENTENCE and len(others) > len(parts) // 2:
      return [('Passage', one.decode()) for one in [parts[i], *others]], sentence.decode()
  raise ConfigError(f"{draw.label('haystack')}: no sentence of it is of {SENTENCE} bytes and seldom "
                    'enough to tell one passage from another; give another text')


def corpus_in_context(draw: Draw) -> Example:
  depths = depths_of(draw, 1)
  size = fit.bytes_for(draw)
  documents, query = (passages if draw.haystack else buildings)(draw, size)
  ids = (100_000 + draw.rng.choice(900_000, size=len(documents), replace=False)).tolist()
  gold, *others = (f'ID: {i} | TITLE: {title} | CONTENT: {content} | END ID: {i}\n'.encode()
                   for i, (title, content) in zip(ids, documents))
  target = f' {ids[0]}'.encode()
  return hidden(
      draw, 'corpus_in_context', head=CORPUS_HEAD, needles=[gold], depths=depths,
      text=b''.join(others), places=np.cumsum([0, *map(len, others)]),
      rest=lambda cut: (b'ID: 000000 | TITLE: Scraps | CONTENT: ' + cut.translate(IN_SCRAPS)
                        + b' | END ID: 000000\n'),
      question=('\n====== Query ======\nWhich document is the most relevant to the query? Give '
                f'its ID.\nquery: {query}\nFinal Answer:').encode(),
      target=target, references=[str(ids[0])], new_tokens=len(target))


TASKS = {
    'json_kv': Task(make=json_kv, score=scoring.match_all, floor=2.0 ** -122,
                    source='Liu et al. 2023, arXiv:2307.03172'),
    'corpus_in_context': Task(make=corpus_in_context, score=scoring.first_number, floor=1 / 900_000,
                              reads=('haystack',), own=dict(haystack='invented documents'),
                              source='after Lee et al. 2024 (LOFT), arXiv:2406.13121; documents '
                                     'are our own'),
}
