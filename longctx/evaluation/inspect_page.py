"""An inspection (inspect.py) as a part of the report: the prompt coloured by what the answer drew
on, heads, memory.

Held by: tests/test_report.py.

N heads  R rows of the answer  T tokens of prompt and answer
"""

import codecs
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from longctx.data.tokenizer import Tokenizer
from longctx.draw import attention, memory
from longctx.evaluation import page
from longctx.evaluation.inspect import KEYS_KEPT, Inspection

AROUND, ENDS, PEAKS = 40, (24, 96), 12   # tokens about a peak, at the ends; peaks that are shown
HEADS, WORDS = 10, 8                     # lines of the tables of heads and tokens


class Text(NamedTuple):
  """A prompt by its tokens; spans are of tokens, [low, high)."""

  pieces: list[bytes]                    # of each token of prompt and answer
  needles: list[tuple[int, int]]
  question: int                          # first token that is no context; 0: not known


def text_of(found: Inspection, tokenizer: Tokenizer, needles: Sequence[tuple[int, int]] = (),
            question: int = 0) -> Text:
  """From spans of bytes of the prompt."""
  pieces = [tokenizer.decode(found.tokens_T[i:i + 1]) for i in range(len(found.tokens_T))]
  ends = np.cumsum([len(piece) for piece in pieces])
  holds = lambda at: int(np.searchsorted(ends, at, side='right'))   # the token with byte `at`
  spans = [(holds(low), holds(high - 1) + 1) for low, high in needles]
  return Text(pieces, spans, holds(question) if question else 0)


def section(title: str, found: Inspection, text: Text, answer: str) -> str:
  """HTML. `answer`: what report.answer says of it, HTML too."""
  parts = [
    page.heading(f'What the answer drew on: {title}'),
    answer,
    page.paragraph(
      f'log-probability of the {len(found.logprobs)} tokens of this answer: '
      f'{found.logprobs.sum():.3f} nats'
    ),
  ]
  parts += [page.paragraph(note, soft=True) for note in found.notes]
  if found.occlusion_T is not None:
    parts += [
      page.heading('What the answer loses without each piece of the prompt', 3),
      strip(text, np.maximum(found.occlusion_T[: found.prompt], 0)),
      page.paragraph(
        'Spaces in the place of a piece; strongest shade: '
        f'{found.occlusion_T.max():.3f} nats less likely.',
        soft=True,
      ),
    ]
  read_T = read(found)
  if read_T is not None:
    parts += [
      page.heading('What its heads read', 3),
      strip(text, read_T[: found.prompt]),
      page.paragraph(
        'The mean of all layers, heads and tokens of the answer; strongest shade: '
        f'{read_T[: found.prompt].max():.4f}.',
        soft=True,
      ),
    ]
    parts += [*_heads(found, text), *_maps(found, text), _shares(found)]
  parts += _memory(found, text)
  return '\n'.join(parts)


def read(found: Inspection) -> np.ndarray | None:
  """[T]: the mean weight of each token over all maps; None where the model has none."""
  maps = [one.tokens_NRT.mean((0, 1)) for layer in found.layers for one in layer.maps.values()]
  return np.mean(maps, axis=0) if maps else None


def strip(text: Text, weights_T: np.ndarray) -> str:
  """The prompt, each token shaded by its weight; of a long one what matters."""
  length, top = len(weights_T), float(weights_T.max())
  peaks = np.argsort(-weights_T, kind='stable')[:PEAKS] if top > 0 else []
  about = lambda low, high: (low - AROUND, high + AROUND)
  shown = page.merge([(0, ENDS[0]), (length - ENDS[1], length), *(about(i, i + 1) for i in peaks),
                      *(about(*span) for span in text.needles)], length)
  inside = np.zeros(length + 1, bool)
  for low, high in text.needles:
    inside[low:high] = True
  parts, at = [], 0
  for low, high in shown:
    if low > at:
      parts.append(page.left_out(low - at, 'tokens'))
    parts += _shaded(text.pieces[low:high], weights_T[low:high] / (top or 1.0), inside[low:high])
    at = high
  return page.preformatted(''.join(parts))


def _shaded(pieces: list[bytes], shades: np.ndarray, inside: np.ndarray) -> list[str]:
  """Spans of characters of one shade; a character of several tokens has its strongest."""
  decoder = codecs.getincrementaldecoder('utf-8')('replace')
  runs: list[list] = []   # [shade in twentieths, in a needle, text]
  waiting = 0.0
  for i, piece in enumerate(pieces):
    waiting = max(waiting, float(shades[i]))
    words = decoder.decode(piece, final=i == len(pieces) - 1)
    if not words:
      continue
    shade, needle = round(20 * waiting), bool(inside[i])
    waiting = 0.0
    if runs and runs[-1][:2] == [shade, needle]:
      runs[-1][2] += words
    else:
      runs.append([shade, needle, words])
  parts = []
  for shade, needle, words in runs:
    words = page.text(words)
    if shade:
      words = f'<span style="background:rgba(var(--heat),{shade / 20:.2f})">{words}</span>'
    parts.append(f'<mark>{words}</mark>' if needle else words)
  return parts


def _each_head(found: Inspection) -> list[tuple[str, np.ndarray]]:
  """('layer 1 attention, head 2', mean weights [T] over the answer's tokens)."""
  return [
    (
      f'layer {layer.index} {name}' + (f', head {n}' if len(one.tokens_NRT) > 1 else ''),
      one.tokens_NRT[n].mean(0),
    )
    for layer in found.layers
    for name, one in layer.maps.items()
    for n in range(len(one.tokens_NRT))
  ]


def _heads(found: Inspection, text: Text) -> list[str]:
  """Which heads read the needle; without one, which tokens are read most."""
  percent = lambda x: f'{100 * x:.1f} %'
  if text.needles:
    inside = np.zeros(len(found.tokens_T), bool)
    for low, high in text.needles:
      inside[low:high] = True
    heads = sorted(
      ((weights[inside].sum(), name) for name, weights in _each_head(found)), reverse=True
    )
    return [
      page.heading('Heads that read the needle', 3),
      page.table(['head', 'of its reading'], [[name, percent(x)] for x, name in heads[:HEADS]]),
      page.paragraph(
        f'The needle is {percent(inside.mean())} of the text: so much of a head that reads '
        'all alike.',
        soft=True,
      ),
    ]
  read_T = read(found)[:found.prompt]
  best = np.argsort(-read_T, kind='stable')[:WORDS]
  near = lambda i: b''.join(text.pieces[max(0, i - 8):i + 9]).decode('utf-8', 'replace')
  rows = [[near(i), f'{i:,}', percent(read_T[i])] for i in best]
  return [page.heading('Tokens that are read most', 3),
          page.table(['token, between its neighbours', 'place', 'mean weight'], rows)]


def _maps(found: Inspection, text: Text) -> list[str]:
  """A figure a kind of map."""
  parts = []
  marks = {'needle': text.needles} if text.needles else {}
  if text.question:
    marks['question'] = [(text.question, found.prompt)]
  what = {
    'attention': 'attention of each head',
    'cross attention': 'attention of each head to the source',
    'retrieved': 'what each head retrieved from its memory',
    'segments': 'gates of cached segments',
  }
  for name in dict.fromkeys(name for layer in found.layers for name in layer.maps):
    maps = {f'layer {layer.index}': layer.maps[name].tokens_NRT.mean(1)
            for layer in found.layers if name in layer.maps}
    draw = lambda file, maps=maps, name=name: attention.draw(
        maps, file, title=f'Answer over the text: {what[name]}', marks=marks)
    parts.append(
      page.figure(
        draw,
        f'{what[name].capitalize()}, mean over the tokens of the answer; heads of a '
        'layer from the top.',
      )
    )
  states = {f'layer {layer.index}': layer.states_NRS.mean(1)
            for layer in found.layers if layer.states_NRS is not None}
  if states:
    draw = lambda file: attention.draw(
      states, file, title='Answer over the state vectors', marks={}, unit='state vector'
    )
    parts.append(page.figure(draw, 'Attention of each head to the state vectors of the memory.'))
  return parts


def _shares(found: Inspection) -> str:
  """How much of each layer's reading goes where."""
  percent = lambda x: f'{100 * x:.1f} %'
  rows = []
  for layer in found.layers:
    for name, one in layer.maps.items():
      of_T = one.tokens_NRT.mean((0, 1))
      rows.append(
        [
          f'layer {layer.index} {name}',
          percent(of_T[: found.prompt].sum()),
          percent(of_T[found.prompt :].sum()),
          percent(max(0.0, float(one.other_NR.mean()))),
        ]
      )
  return page.details('Where the reading of each layer goes', page.table(
      ['layer', 'prompt', 'answer so far', "the memory's own tokens, or nothing"], rows))


def _memory(found: Inspection, text: Text) -> list[str]:
  rows: list[list[str]] = []
  for layer in found.layers:
    for name, values_NR in layer.numbers_NR.items():
      rows.append([f'layer {layer.index} {layer.kind}: {name}',
                   '  '.join(f'{x:.3g}' for x in values_NR.mean(1))])
  parts = []
  if rows:
    parts += [
      page.heading('What the memory said', 3),
      page.table(['layer', 'head by head'], rows),
      page.paragraph(
        'gate: how much of what the memory says enters a head; read strength: how much was '
        "written under keys like the answer's queries (0: nothing); agreement: of the query "
        'with a matrix, 1 where it holds that key alone.',
        soft=True,
      ),
    ]
  # That a cache holds a key for each token read needs no figure.
  if {name for _, name in found.norms.series} - {KEYS_KEPT}:
    draw: Callable = lambda file: memory.draw(
      found.norms.tokens,
      found.norms.series,
      file,
      needles=text.needles,
      title='What the states hold while the prompt is read',
    )
    parts.append(
      page.figure(
        draw,
        'Norms of the states of each layer by tokens read; of a cache, how many keys '
        'it holds. Red: the needle.',
      )
    )
  return parts
