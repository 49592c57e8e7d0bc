"""EleutherAI's lm-evaluation-harness over a `subject.Subject`: how likely texts are, what follows.

    loglikelihood          (context, continuation) -> (log p(continuation | context), is it greedy)
    loglikelihood_rolling  (text,) -> log p(text); one longer than max_length is read in windows
    generate_until         (context, settings) -> what is written next, before the first of `until`

As in lm_eval's own models: context and continuation are encoded together and cut apart, spaces at
the context's end going with the continuation; answers come in the order of the request; with
truncate='left' what is longer than max_length loses its beginning. Every text begins with the
separator, as documents do in training; it is lm_eval's prefix token, and ends what is written.

Rolling windows are lm_eval's (max_length, stride = max_length): each token is scored once, after
those before it in its window, and the last window reaches back to be full. A model without
max_length reads a text whole. Which it was stands in the results, with how many texts were cut, and how
many answers a cache had before: of those it is not known.

Answers are cached (--use_cache) apart for each `key`: what differs in parameters or settings is asked anew.

Differs: what is too long is an error unless truncate='left' is asked for, since a question that
lost its context scores as one that was not answered; sampling is refused, for a subject writes
what is likeliest; log-probabilities that are NaN end the run.

Source: EleutherAI/lm-evaluation-harness 0.4.13, lm_eval/api/model.py and models/huggingface.py.
Held by: tests/test_lm_eval.py.
"""

import collections
import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval import utils
from lm_eval.api import model as model_lib
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from tqdm import tqdm

from longctx.errors import ConfigError, check, check_choice, check_range, nearest
from longctx.evaluation.exported_class import MAX_NEW
from longctx.evaluation.subject import Scored, Subject, before_stop

TRUNCATE = ('error', 'left')
# Settings that choose among likely tokens: without effect on the likeliest.
OF_SAMPLING = ('do_sample', 'temperature', 'top_k', 'top_p', 'min_p')


class Harness(TemplateLM):
  """A subject as lm_eval asks for it: `lm_eval.simple_evaluate(model=Harness(...), ...)`."""

  def __init__(self, subject: Subject, *, batch_size: int = 1, max_length: int = 0,
               max_gen_toks: int = 256, truncate: str = 'error',
               identity: str = '', told: Mapping[str, Any] | None = None):
    """Defaults are lm_eval's.

    Args:
      subject: the model.
      batch_size: texts that are handed to it at once; answers are cached batch by batch.
      max_length: tokens read of one text; 0: as many as the model can, which may be any number.
      max_gen_toks: written at most, where a task does not say.
      truncate: what becomes of a text that is too long: 'error', or 'left' to cut its beginning.
      identity: which parameters the subject has, and how it reads: what answers are cached under.
      told: what the results are to tell of the model.
    """
    super().__init__()
    check_range('batch_size', batch_size, low=1)
    check_range('max_length', max_length, low=0)
    check_range('max_gen_toks', max_gen_toks, low=1)
    check_choice('truncate', truncate, TRUNCATE)
    most = subject.max_length
    check(not most or max_length <= most,
          f'max_length={max_length}: must be at most model.max_length={most}')
    self.subject, self.batch_size, self.truncate = subject, batch_size, truncate
    self.max_length, self.max_gen_toks = max_length or most, max_gen_toks   # max_length 0: any
    self.identity, self.told, self.cut = identity, dict(told or {}), collections.Counter()
    self.cached = 0   # answers of before, among which none is counted in `cut`

  # What lm_eval asks of a tokenizer.

  @property
  def eot_token_id(self) -> int:
    return self.subject.tokenizer.separator

  @property
  def tokenizer_name(self) -> str:
    return f'longctx-{self.subject.tokenizer.fingerprint}'

  def tok_encode(self, string: str, add_special_tokens: bool | None = None,
                 **kwargs: Any) -> list[int]:
    """With the separator before it, unless told otherwise."""
    del kwargs
    first = [self.eot_token_id] if add_special_tokens in (None, True) else []
    return first + self.subject.tokenizer.encode(string.encode('utf-8')).tolist()

  def chat_template(self, chat_template: bool | str = False) -> str:
    check(not chat_template, '--apply_chat_template: a model of longctx has no chat template; '
          'leave it out')
    return ''

  @property
  def key(self) -> str:
    """The hash of all that an answer depends on, whatever is asked; rounding aside."""
    parts = (self.identity, self.subject.tokenizer.fingerprint, self.max_length, self.max_gen_toks, self.truncate)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]

  def get_model_info(self) -> dict[str, Any]:
    """What stands in the results beside lm_eval's own."""
    return {'longctx': dict(
        self.told, tokenizer=self.subject.tokenizer.fingerprint, max_length=self.max_length,
        rolling=dict(max_length=self.max_length, stride=self.max_length),
        truncate=self.truncate, truncated=dict(self.cut), cached=self.cached)}

  # The three requests.

  def _loglikelihood_tokens(
      self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
      disable_tqdm: bool = False, **kwargs: Any) -> list[tuple[float, bool]]:
    del kwargs
    kind, rows = 'loglikelihood', []
    for (_, text), context, continuation in requests:
      check(len(continuation) > 0, f'{kind}: the continuation {text!r} has no tokens of its own '
            'after its context; give the task answers that are text')
      rows.append(self._fitted(context + continuation, 1 + self.max_length, len(continuation),
                               kind))
    found: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
    for i, scored in self._scored(rows, kind, disable_tqdm):
      count = len(requests[i][2])
      found[i] = float(scored.logprobs[-count:].sum()), bool(scored.greedy[-count:].all())
      self.cache_hook.add_partial(kind, requests[i][0], found[i])
    return found

  def loglikelihood_rolling(self, requests: Sequence[Instance],
                            disable_tqdm: bool = False) -> list[float]:
    kind, rows = 'loglikelihood_rolling', []
    of: list[tuple[int, int]] = []   # of each row: its request, how many of its last are scored
    for i, request in enumerate(requests):
      tokens = self.tok_encode(request.args[0], add_special_tokens=False)
      for window in utils.get_rolling_token_windows(
          tokens, self.prefix_token_id, self.max_length or max(1, len(tokens)), context_len=1):
        context, scored = utils.make_disjoint_window(window)
        rows.append(np.array(context + scored, np.int32))
        of.append((i, len(scored)))
    sums, waiting = [0.0] * len(requests), collections.Counter(i for i, _ in of)
    for row, scored in self._scored(rows, kind, disable_tqdm):
      i, count = of[row]
      sums[i] += float(scored.logprobs[-count:].sum())
      waiting[i] -= 1
      if not waiting[i]:
        self.cache_hook.add_partial(kind, requests[i].args, sums[i])
    return sums

  def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
    kind, found = 'generate_until', [''] * len(requests)
    settings = [self._settings(request.args[1]) for request in requests]
    alike: dict[tuple[bytes, ...], list[int]] = {}   # stops -> their requests
    for i, (count, stops) in enumerate(settings):
      check(not self.max_length or count < self.max_length,
            f'max_gen_toks={count}: must be below max_length={self.max_length}, to leave room '
            'for what is read; give --gen_kwargs max_gen_toks=N')
      alike.setdefault(stops, []).append(i)
    with tqdm(total=len(requests), desc=kind, disable=disable_tqdm) as bar:
      for stops, those in alike.items():
        prompts = [self._fitted(self.tok_encode(requests[i].args[0]), self.max_length - settings[i][0], 1,
                                kind) for i in those]
        for batch in self._to_write(prompts, [settings[i][0] for i in those]):
          most = max(settings[those[at]][0] for at in batch)
          written = self.subject.generate([prompts[at] for at in batch], most, stops)
          for at, tokens in zip(batch, written):
            i = those[at]
            text = before_stop(self.subject.tokenizer.decode(tokens[:settings[i][0]]), stops)
            found[i] = text.decode('utf-8', 'replace')
            self.cache_hook.add_partial(kind, requests[i].args, found[i])
          bar.update(len(batch))
    return found

  # Below them.

  def _fitted(self, tokens: list[int], most: int, needed: int, kind: str) -> np.ndarray:
    """At most `most` of the tokens, the last `needed` among them; all without a max_length."""
    if self.max_length and len(tokens) > most:
      given = (f'{kind}: a text of {len(tokens):,} tokens, max_length={self.max_length} leaves '
               f'room for {most:,}')
      check(needed <= most, f'{given}, and its last {needed:,} are to be scored; give shorter '
            'answers')
      check(self.truncate == 'left', f'{given}; give --model_args truncate=left to cut the '
            'beginnings of texts, where a task allows it; or a model for longer ones')
      self.cut[kind] += 1
      tokens = tokens[-most:]
    return np.array(tokens, np.int32)

  def _batches(self, rows: Sequence[np.ndarray]) -> Iterator[list[int]]:
    """Indices of rows of like length, the longest first: what is too large fails at once."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for at in range(0, len(order), self.batch_size):
      yield order[at:at + self.batch_size]

  def _to_write(self, prompts: Sequence[np.ndarray], counts: Sequence[int]) -> Iterator[list[int]]:
    """Indices of prompts after which about as much is written, the most first; what does not fit together goes alone."""
    order = sorted(range(len(prompts)), key=lambda i: (-counts[i], -len(prompts[i])))
    for low in range(0, len(order), self.batch_size):
      batch = order[low:low + self.batch_size]
      if self.max_length and counts[batch[0]] + max(len(prompts[i]) for i in batch) > self.max_length:
        yield from ([i] for i in batch)
      else:
        yield batch

  def _scored(self, rows: Sequence[np.ndarray], kind: str,
              disable_tqdm: bool) -> Iterator[tuple[int, Scored]]:
    with tqdm(total=len(rows), desc=kind, disable=disable_tqdm) as bar:
      for batch in self._batches(rows):
        for i, scored in zip(batch, self.subject.score([rows[i] for i in batch])):
          if np.isnan(scored.logprobs).any():   # lm_eval would take it for the best answer
            raise FloatingPointError(f'{kind}: log-probabilities are NaN: the parameters are not '
                                     'finite, or the model overflows')
          yield i, scored
        bar.update(len(batch))

  def _settings(self, given: Mapping[str, Any]) -> tuple[int, tuple[bytes, ...]]:
    """(tokens at most, stops) of a task's generation_kwargs."""
    known = ('until', *MAX_NEW, *OF_SAMPLING)
    for name, value in given.items():
      check(name in known, f'gen_kwargs: {name}={value!r}: a model of longctx has no such setting'
            f'{nearest(name, known)}; it has {", ".join(known)}')
    sample, temperature = given.get('do_sample'), given.get('temperature')
    if sample or (sample is None and float(temperature or 0) > 0):
      raise ConfigError(f'gen_kwargs: do_sample={sample}, temperature={temperature}: a model of '
                        'longctx writes what is likeliest; give --gen_kwargs '
                        'do_sample=False,temperature=0')
    until = given.get('until') or []
    until = [until] if isinstance(until, str) else until
    count = next((given[name] for name in MAX_NEW if given.get(name) is not None),
                 self.max_gen_toks)
    check_range('max_gen_toks', int(count), low=1)
    return int(count), tuple(stop.encode('utf-8') for stop in until if stop)


@contextlib.contextmanager
def cache_of_its_own() -> Iterator[None]:
  """Has lm_eval's --use_cache keep each `Harness.key` in a file of its own; its keys name what is asked and not who."""
  theirs = model_lib.CachingLM

  def caching(lm: Harness, cache_db: str) -> Any:
    path, _, rank = cache_db.rpartition('_rank')
    made = theirs(lm, f'{path}_{lm.key}_rank{rank}')
    lm.cached = len(made.dbdict)
    return made

  model_lib.CachingLM = caching
  try:
    yield
  finally:
    model_lib.CachingLM = theirs
