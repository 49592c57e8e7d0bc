"""lm-evaluation-harness: oracles through its own command line, our scorers, exported tasks."""

import hashlib
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import types

os.environ.update(HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1')   # read when lm_eval is imported

import jax
import numpy as np
import pytest

pytest.importorskip('lm_eval', reason="optional: pip install 'lm_eval>=0.4.13'")
import datasets
import lm_eval.tasks
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM

from longctx import assembly, configuration
from longctx import lm_eval as face
from longctx.data.tasks import example
from longctx.data.tasks.table import TASKS
from longctx.data.tokenizer import Bytes, SentencePiece, load_tokenizer, train_sentencepiece
from longctx.errors import ConfigError
from longctx.evaluation import harness_ruler, harness_tasks, perplexity, tasks
from longctx.evaluation.harness import Harness, cache_of_its_own
from longctx.evaluation.subject import Constant, ModelSubject, Oracle, Scored
from longctx.training import workdir
from longctx.training.checkpoint import Checkpoints
from tests import oracles

SEP = Bytes.separator
LENGTH = 32   # of the checkpoint's model
TEXTS = ['It was the best of times,', 'ta b tab', 'naïve café — 雪', 'x' * 100]


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
  """No list of lm_eval's own tasks, nor of the machine's parts; nothing in the home folder."""
  manager = lm_eval.tasks.TaskManager
  monkeypatch.setattr(lm_eval.tasks, 'TaskManager',
                      lambda **kwargs: manager(include_defaults=False, **kwargs))
  monkeypatch.setattr('lm_eval.evaluator.add_env_info', lambda results: None)
  monkeypatch.setattr('lm_eval.evaluator.set_torch_seed', lambda seed: None)
  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(tmp_path / 'datasets'))
  monkeypatch.setattr(face, 'set_compilation_cache', lambda folder: None)


class Laplace:
  """The adaptive order-0 model: what it says depends on all before. Repeats the last token."""

  tokenizer = Bytes()

  def __init__(self, max_length=0):
    self.max_length, self.asked = max_length, []

  def nll(self, tokens):
    return oracles.count_model_nll(tokens[:-1], tokens[1:], 257)

  def score(self, rows):
    self.asked.append(len(rows))
    assert all(not self.max_length or len(row) - 1 <= self.max_length for row in rows)
    likeliest = lambda row: np.array([np.bincount(row[:t]).argmax() for t in range(1, len(row))])
    return [Scored(-self.nll(row), likeliest(row) == row[1:]) for row in rows]

  def generate(self, prompts, max_new_tokens, stops=()):
    self.asked.append(len(prompts))
    longest = max(map(len, prompts)) + max_new_tokens
    assert not self.max_length or longest <= self.max_length
    return [np.full(max_new_tokens, prompt[-1], np.int32) for prompt in prompts]


def requests(kind, *args):
  return [Instance(kind, {}, one, i) for i, one in enumerate(args)]


def tokens_of(text, separator=True):
  return np.array([SEP] * separator + list(text.encode()), np.int32)


# The three requests.


def test_a_continuation_is_scored_after_the_whole_context():
  """Also after no context, and with the context's last space; in the order of the request."""
  pairs = [('a b', 'b'), ('', 'ab'), ('b ', 'aa'), ('aab', 'aa'), ('é', 'é')]
  found = Harness(Laplace(), batch_size=2).loglikelihood(
      requests('loglikelihood', *pairs), disable_tqdm=True)
  for (context, continuation), (logprob, _) in zip(pairs, found):
    tokens = tokens_of(context + continuation)
    scored = context.endswith(' ') + len(continuation.encode())
    nll = oracles.count_model_nll(tokens[:-1], tokens[1:], 257)
    assert logprob == pytest.approx(-nll[-scored:].sum(), rel=1e-12)
  # After SEP a a b the likeliest byte is a, twice; after SEP it is another SEP.
  assert [greedy for _, greedy in found] == [False, False, False, True, False]
  assert all(type(logprob) is float and type(greedy) is bool for logprob, greedy in found)


def test_a_text_is_read_in_lm_evals_windows():
  """Of max_length 4, t0 .. t9: SEP t0..t2 | t3..t6 | t5..t8, the last scored on its last two."""
  text = 'abbacabcaa'
  t = tokens_of(text, separator=False)
  nll = lambda *row: oracles.count_model_nll(np.array(row[:-1]), np.array(row[1:]), 257)
  expected = -(nll(SEP, *t[:4]).sum() + nll(*t[3:8]).sum() + nll(*t[5:10])[-2:].sum())
  both = requests('loglikelihood_rolling', (text,), ('',), ('a',))
  found = Harness(Laplace(4), batch_size=2).loglikelihood_rolling(both, disable_tqdm=True)
  np.testing.assert_allclose(found, [expected, 0, -np.log(257 + 1) + np.log(1)], rtol=1e-12)
  whole = Harness(Laplace()).loglikelihood_rolling(both[:1], disable_tqdm=True)
  np.testing.assert_allclose(whole, [-nll(SEP, *t).sum()], rtol=1e-12)
  cut = Harness(Laplace(), max_length=4)
  assert cut.loglikelihood_rolling(both, disable_tqdm=True) == found
  assert cut.get_model_info()['longctx']['rolling'] == dict(max_length=4, stride=4)
  assert Harness(Laplace()).get_model_info()['longctx']['rolling'] == dict(max_length=0, stride=0)


def test_what_is_written_ends_before_the_first_stop():
  stops = {'until': ['bb', '', 'x'], 'max_gen_toks': 4}
  asked = [('ab', {'until': [], 'max_gen_toks': 3}), ('ab', stops),
           ('', {'until': 'b', 'max_new_tokens': 2}), ('ca', stops),
           ('é', {'temperature': 0.0, 'top_p': 0.9})]
  subject = Laplace()
  found = Harness(subject, batch_size=2, max_gen_toks=2).generate_until(
      requests('generate_until', *asked), disable_tqdm=True)
  assert found == ['bbb', '', '', 'aaaa', '\ufffd\ufffd']
  assert sorted(subject.asked) == [1, 2, 2]   # those of the same stops together


def test_what_is_too_long_is_an_error_or_cut_and_counted():
  pairs = requests('loglikelihood', ('abcdefgh', 'ij'), ('a', 'b'))
  texts = requests('generate_until', ('abcdefgh', {'max_gen_toks': 2, 'until': []}))
  with pytest.raises(ConfigError, match=r'of 11 tokens, .* room for 7; give .*truncate=left'):
    Harness(Laplace(6)).loglikelihood(pairs, disable_tqdm=True)
  with pytest.raises(ConfigError, match=r'of 9 tokens, .* room for 4; give .*truncate=left'):
    Harness(Laplace(6)).generate_until(texts, disable_tqdm=True)
  cut = Harness(Laplace(6), truncate='left')
  row = tokens_of('defghij', separator=False)
  nll = oracles.count_model_nll(row[:-1], row[1:], 257)
  found = cut.loglikelihood(pairs, disable_tqdm=True)
  assert found[0][0] == pytest.approx(-nll[-2:].sum(), rel=1e-12)
  assert cut.generate_until(texts, disable_tqdm=True) == ['hh']
  assert cut.get_model_info()['longctx']['truncated'] == dict(loglikelihood=1, generate_until=1)
  with pytest.raises(ConfigError, match='its last 8 are to be scored'):
    cut.loglikelihood(requests('loglikelihood', ('a', 'bcdefghi')), disable_tqdm=True)
  with pytest.raises(ConfigError, match='max_gen_toks=6: must be below max_length=6'):
    cut.generate_until(requests('generate_until', ('a', {'max_gen_toks': 6})), disable_tqdm=True)
  exact, whole = Harness(Laplace(10)), Harness(Laplace())   # just long enough, and of any length
  assert exact.loglikelihood(pairs, True) == whole.loglikelihood(pairs, True)
  assert not exact.cut


@pytest.mark.parametrize('settings, said', [
    ({'do_sample': True}, 'do_sample=True, temperature=None: .*do_sample=False'),
    ({'temperature': 0.7}, 'do_sample=None, temperature=0.7: '),
    ({'num_beams': 4}, 'num_beams=4: a model of longctx has no such setting'),
    ({'max_gen_tok': 4}, r'max_gen_tok=4: .*\(did you mean "max_gen_toks"\?\)'),
    ({'max_gen_toks': 0}, 'max_gen_toks=0: must be at least 1')])
def test_settings_that_a_subject_has_not_are_refused(settings, said):
  with pytest.raises(ConfigError, match=said):
    Harness(Laplace()).generate_until(requests('generate_until', ('a', settings)), True)


def test_logits_that_are_not_finite_end_the_run():
  """np.argmax, by which lm_eval picks an answer, takes NaN for the largest."""
  class Broken(Laplace):
    def nll(self, tokens):
      return np.full(len(tokens) - 1, np.nan)
  with pytest.raises(FloatingPointError, match='loglikelihood: log-probabilities are NaN'):
    Harness(Broken()).loglikelihood(requests('loglikelihood', ('a', 'b')), disable_tqdm=True)


def test_an_interrupted_run_carries_on_from_lm_evals_cache(tmp_path):
  class Interrupted(Laplace):
    def _next(self):
      if len(self.asked) == 2:
        raise KeyboardInterrupt
    def score(self, rows):
      self._next()
      return super().score(rows)
    def generate(self, prompts, max_new_tokens, stops=()):
      self._next()
      return super().generate(prompts, max_new_tokens, stops)

  asked = {'loglikelihood': [('abc'[:n], 'd') for n in (1, 2, 3)],
           'loglikelihood_rolling': [('abcd'[:n],) for n in (2, 3, 4)],
           'generate_until': [('abc'[:n], {'until': [], 'max_gen_toks': 2}) for n in (1, 2, 3)]}
  for kind, args in asked.items():
    cache = str(tmp_path / kind)
    with pytest.raises(KeyboardInterrupt):
      getattr(CachingLM(Harness(Interrupted()), cache), kind)(requests(kind, *args))
    rest = Laplace()
    found = getattr(CachingLM(Harness(rest), cache), kind)(requests(kind, *args))
    assert rest.asked == [1]   # two of three were kept
    assert found == getattr(Harness(Laplace()), kind)(requests(kind, *args), disable_tqdm=True)
  # Of a text in three windows two were read: it is read anew, whole.
  texts, cache = requests('loglikelihood_rolling', ('abcdefg',), ('ab',)), str(tmp_path / 'windows')
  with pytest.raises(KeyboardInterrupt):
    CachingLM(Harness(Interrupted(3)), cache).loglikelihood_rolling(texts)
  rest = Laplace(3)
  found = CachingLM(Harness(rest), cache).loglikelihood_rolling(texts)
  assert rest.asked == [1, 1, 1, 1]
  assert found == Harness(Laplace(3)).loglikelihood_rolling(texts, disable_tqdm=True)


def test_the_cache_of_other_parameters_or_settings_is_another(tmp_path):
  """And of none but what changes an answer."""
  alike = [Harness(Laplace(9), identity='a', batch_size=size, told=dict(seq=size)).key for size in (1, 2)]
  other = [Harness(Laplace(9), **{'identity': 'a', **setting}).key for setting in (
      dict(identity='b'), dict(max_length=8), dict(max_gen_toks=9), dict(truncate='left'))]
  tokens = Laplace(9)
  tokens.tokenizer = types.SimpleNamespace(fingerprint='other')
  other.append(Harness(tokens, identity='a').key)
  assert alike[0] == alike[1] and len({alike[0], *other}) == 6
  before = lm_eval.api.model.CachingLM
  with cache_of_its_own():
    kept = lm_eval.api.model.CachingLM(Harness(Laplace(9), identity='a'), f'{tmp_path}/d_rank_1/c_rank0.db')
  assert kept.cache_db == f'{tmp_path}/d_rank_1/c_{alike[0]}_rank0.db' and lm_eval.api.model.CachingLM is before


def test_what_is_written_at_once_is_cut_to_each_ones_own_room():
  """In tokens; and what would be too long together is written alone."""
  class Counts(Laplace):
    def generate(self, prompts, max_new_tokens, stops=()):
      assert not super().generate(prompts, max_new_tokens, stops)[0][max_new_tokens:].size
      return [tokens_of('0123456789', separator=False)[:max_new_tokens] for _ in prompts]
  asked = requests('generate_until', *((text, {'until': [], 'max_gen_toks': count})
                                       for text, count in (('ab', 3), ('abcd', 1), ('a', 5), ('', 2))))
  for max_length, batches in ((0, [4]), (10, [4]), (8, [1, 1, 1, 1])):
    subject = Counts(max_length)
    assert Harness(subject, batch_size=4).generate_until(asked, disable_tqdm=True) == ['012', '0', '01234', '01']
    assert subject.asked == batches


# Through lm_eval's own command line.


def write_tasks(folder, **more):
  """Three local tasks, one of each kind."""
  folder.mkdir()
  docs = {'choice': [dict(q=f'{a} plus {b} is', choices=[str(a + b + 1), str(a + b)], gold=1)
                     for a, b in ((1, 2), (3, 4))],
          'rolling': [dict(text=text) for text in TEXTS],
          'copy': [dict(q=f'Copy: <{word}> to: ', a=word) for word in ('snow', 'ice', 'rain')]}
  metric = lambda name, how: dict(metric=name, aggregation=how, higher_is_better=True)
  kinds = {
      'choice': dict(output_type='multiple_choice', doc_to_text='q', doc_to_choice='choices',
                     doc_to_target='gold', metric_list=[metric('acc', 'mean')]),
      'rolling': dict(output_type='loglikelihood_rolling', doc_to_text='', doc_to_target='text',
                      metric_list=[metric('byte_perplexity', 'weighted_perplexity'),
                                   metric('bits_per_byte', 'bits_per_byte')]),
      'copy': dict(output_type='generate_until', doc_to_text='q', doc_to_target='a',
                   metric_list=[metric('exact_match', 'mean')],
                   generation_kwargs=dict(until=['.'], max_gen_toks=8))}
  for name, kind in kinds.items():
    file = folder / f'{name}.jsonl'
    file.write_text('\n'.join(map(json.dumps, docs[name])))
    kind.update(task=name, dataset_path='json', test_split='test',
                dataset_kwargs=dict(data_files=dict(test=str(file))))
    (folder / f'{name}.yaml').write_text(json.dumps(kind))   # which is YAML too
  return str(folder)


def run(tmp_path, include, tasks, *more):
  """lm_eval's results, read from the file it writes; and what every request was answered."""
  out = tmp_path / 'results'
  assert face.main(['longctx.lm_eval', '--model', 'longctx', '--tasks', tasks, '--include_path',
                    include, '--output_path', str(out), '--log_samples', *more]) == 0
  newest = max(out.rglob('results_*.json'), key=lambda path: path.stat().st_mtime_ns)
  samples = {}
  for path in out.rglob('samples_*.jsonl'):
    task = path.name.removeprefix('samples_').rsplit('_', 1)[0]
    samples[task] = [json.loads(line) for line in path.read_text().splitlines()]
  return json.loads(newest.read_text()), samples


def begun(folder, max_length=LENGTH):
  """A workdir with a config and no checkpoint."""
  folder.mkdir(exist_ok=True)
  config = configuration.base('decoder')
  config.model.update(dict(num_layers=1, embed_dim=16, num_heads=2, max_length=max_length,
                           layer_loop='unrolled'))
  config.data.update(dict(length=LENGTH, batch_size=1))
  config.mesh.layout = 'single'
  workdir.agree(folder, config)
  return folder


def put(monkeypatch, tmp_path, subject, step=1):
  """In place of a checkpoint."""
  known = dict(step=step, checkpoint=f'of step {step}', model='m')
  monkeypatch.setattr(face, 'open_subject', lambda *args: (subject, known))
  return f'--model_args=workdir={begun(tmp_path / "w")}'


def test_a_uniform_model_has_257_symbols(tmp_path, monkeypatch):
  args = put(monkeypatch, tmp_path, Constant(Bytes(), b'snow. and more'))
  found, samples = run(tmp_path, write_tasks(tmp_path / 't'), 'choice,rolling,copy', args,
                       '--batch_size=2')
  results = found['results']
  assert results['rolling']['byte_perplexity,none'] == pytest.approx(257, rel=1e-12)
  assert results['rolling']['bits_per_byte,none'] == pytest.approx(8.005624549193879, rel=1e-12)
  assert results['choice']['acc,none'] == 0.0   # as likely as it, and first
  assert results['copy']['exact_match,none'] == pytest.approx(1 / 3)
  # The stop is not part of it.
  assert [one['filtered_resps'] for one in samples['copy']] == [['snow']] * 3
  assert found['config']['device'] == jax.devices()[0].device_kind
  assert found['config']['longctx']['workdir'] == f'{tmp_path}/w'
  assert found['config']['longctx']['rolling'] == dict(max_length=0, stride=0)


class Knows:
  """Copies what stands between < and >, and holds right sums for certain."""

  tokenizer, max_length = Bytes(), 0

  def generate(self, prompts, max_new_tokens, stops=()):
    texts = [self.tokenizer.decode(prompt).decode() for prompt in prompts]
    words = [text[text.find('<') + 1:text.find('>')] for text in texts]
    return [self.tokenizer.encode(f'{word}.'.encode()) for word in words]

  def score(self, rows):
    texts = [self.tokenizer.decode(row).decode().split() for row in rows]
    sure = [int(a) + int(b) == int(c) for a, _, b, _, c in texts]
    return [Scored(np.full(len(row) - 1, yes - 1.0), np.full(len(row) - 1, yes))
            for row, yes in zip(rows, sure)]


def test_an_oracle_is_always_right(tmp_path, monkeypatch):
  args = put(monkeypatch, tmp_path, Knows())
  found, _ = run(tmp_path, write_tasks(tmp_path / 't'), 'choice,copy', args)
  assert found['results']['choice']['acc,none'] == 1.0
  assert found['results']['copy']['exact_match,none'] == 1.0


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  return saved(begun(tmp_path_factory.mktemp('w')))


def saved(folder):
  """A small decoder's checkpoint, with larger weights than at birth."""
  a = assembly.assemble(workdir.load_config(folder), jax.devices()[:1])
  state = a.init()
  state = state._replace(params=jax.tree.map(lambda x: 8 * x, state.params))
  with Checkpoints(folder / 'checkpoints') as checkpoints:
    checkpoints.save(1, state, stream_state={}, meta=dict(tokenizer='bytes'))
  return str(folder)


def test_results_are_those_of_our_own_scorers(tmp_path, checkpoint):
  """A text of whole windows, whose last separator is not scored: perplexity's are then the same."""
  text = ('The quick brown fox jumps over the lazy dog; ' * 3)[:3 * LENGTH]
  include = write_tasks(tmp_path / 't')
  (tmp_path / 't' / 'rolling.jsonl').write_text(json.dumps(dict(text=text)))
  found, samples = run(tmp_path, include, 'choice,rolling,copy', '--gen_kwargs=max_gen_toks=5',
                       f'--model_args=workdir={checkpoint},segment=16', '--batch_size=2')
  graphdef, params, tokenizer, _, layout, _ = assembly.load_for_inference(checkpoint)

  class Documents:
    lengths, total_tokens = np.array([len(text) + 1]), len(text) + 1
    document = staticmethod(lambda i: tokens_of(text))

  ours = perplexity.evaluate(graphdef, params, Documents(), tokenizer, perplexity.Config(
      modes=('full',), segment=16, batch_size=2, max_tokens=len(text)), layout=layout)
  theirs = found['results']['rolling']['bits_per_byte,none']
  assert theirs == pytest.approx(ours.bits_per_byte, rel=1e-6)
  subject, _ = face.open_subject(checkpoint, 'newest', False, 1, 3, 16)
  for one in samples['copy']:
    written, = subject.generate([tokens_of(one['doc']['q'])], 5, [b'.'])
    text = tokenizer.decode(written).split(b'.')[0]
    assert one['filtered_resps'] == [text.decode('utf-8', 'replace')]
  for one in samples['choice']:
    for choice, (logprob, greedy) in zip(one['doc']['choices'], one['filtered_resps']):
      answer = f' {choice}'
      scored, = subject.score([tokens_of(one['doc']['q'] + answer)])
      assert float(logprob) == pytest.approx(scored.logprobs[-len(answer):].sum(), rel=1e-6)
      assert str(greedy) == str(bool(scored.greedy[-len(answer):].all()))
  told = found['config']['longctx']
  assert told['max_length'] == LENGTH and told['checkpoint'] == 'newest' and told['step'] == 1
  sums = pathlib.Path(checkpoint, 'checkpoints', '1', 'manifest.json').read_bytes()
  assert told['checkpoint_hash'] == hashlib.sha256(sums + b'False').hexdigest()[:16]   # as in tasks.jsonl


def test_a_cache_holds_no_answers_of_another_checkpoint(tmp_path, monkeypatch, capsys):
  """Interrupted, trained on, the same command again; and the first checkpoint by its step carries on."""
  include, cache = write_tasks(tmp_path / 't'), f'--use_cache={tmp_path}/cache'
  class Says(Laplace):
    def __init__(self, word, most=9):
      super().__init__()
      self.word, self.most = word, most
    def generate(self, prompts, max_new_tokens, stops=()):
      if len(self.asked) == self.most:
        raise KeyboardInterrupt
      self.asked.append(len(prompts))
      return [tokens_of(self.word, separator=False)] * len(prompts)

  def answers(subject, step, *more, cached=0):
    args = put(monkeypatch, tmp_path, subject, step) + ''.join(more)
    found, samples = run(tmp_path / subject.word, include, 'copy', args, cache)
    told = found['config']['longctx']
    assert (told['step'], told['cached']) == (step, cached)   # of the cached ones it is not known how many were cut
    return [one['filtered_resps'][0] for one in samples['copy']]

  args = put(monkeypatch, tmp_path, Says('old', most=2))
  assert face.main(['longctx.lm_eval', '--model', 'longctx', '--tasks=copy', '--include_path', include, args, cache]) == 130
  assert 'carries on; where a newer checkpoint may have been saved since, name the old' in capsys.readouterr().err
  new, rest, cut = Says('new'), Says('old'), Says('cut')
  assert answers(new, 2) == ['new'] * 3 and new.asked == [1, 1, 1]
  assert answers(rest, 1, cached=2) == ['old'] * 3 and rest.asked == [1]
  assert answers(cut, 1, ',max_gen_toks=99') == ['cut'] * 3


# Mistakes.


@pytest.mark.parametrize('words, said', [
    (['--tasks=copy'], '--model: missing; give --model longctx'),
    (['--model', 'longctx', '--model_args=workdir=W'], '--tasks: missing'),
    (['--model', 'longctx', '--tasks=copy'], '--model_args: workdir is missing'),
    (['M', '--device=cuda:0'], '--device=cuda:0: does nothing with --model longctx; set JAX_'),
    (['M', '--tasks=nosuch'], 'lm_eval: Tasks not found: nosuch'),
    (['--model', 'longctxs', '--tasks=copy', '--model_args=a=b'],
     "lm_eval: Attempted to load model 'longctxs'"),
    (['M', '--batch_size=auto'], '--batch_size=auto: must be a whole number'),
    (['M', '--max_batch_size=8'], '--max_batch_size: does nothing here'),
    (['M,chekpoint=best'], '--model_args: chekpoint: unknown (did you mean "checkpoint"?)'),
    (['M,seq=two'], '--model_args seq=two: must be a whole number'),
    (['M,seq=0'], '--model_args seq=0: must be at least 1'),
    (['M,use_ema=yes'], '--model_args use_ema=yes: must be True or False'),
    (['M,checkpoint=beast'], '--checkpoint=beast: must be newest, best or a step'),
    (['M,truncate=right'], "truncate='right': must be one of error, left"),
    (['M,max_length=99'], 'max_length=99: must be at most model.max_length=32'),
    (['M', '--apply_chat_template'], '--apply_chat_template: a model of longctx has no chat'),
    (['--model', 'longctx', '--tasks=copy', '--model_args=workdir=/no/such'],
     '--workdir=/no/such: no such folder'),
    (['--export=D', '--tasks=passkey', '--lengths=512'], '--tokenizer: missing'),
    (['--export=D', '--tasks=paskey', '--lengths=512', '--tokenizer=bytes'],
     '(did you mean "passkey"?)'),
    (['--export=D', '--tasks=passkey', '--lengths=8', '--tokenizer=bytes'],
     'length=8: must be at least'),
    (['--export=D', '--tasks=passkey', '--lengths=1k', '--tokenizer=bytes'],
     '--lengths=1k: must be whole numbers'),
    (['--export=D', '--tasks=mqar', '--lengths=512', '--tokenizer=bytes', '--haystack=noise'],
     "--haystack='noise': is read by none of mqar; leave it out"),
    (['--export=D', '--tasks=parity', '--lengths=512', '--tokenizer=bytes', '--depths=2'],
     '--depths=2: is taken by none of parity; leave it out'),
    (['--export=D', '--sample=3'], '--sample: unknown flag (did you mean "samples"?)'),
    (['--export=/dev/null/x', '--tasks=passkey', '--lengths=512', '--samples=1',
      '--tokenizer=bytes'],
     '--export=/dev/null/x: cannot be written')])
def test_a_mistake_ends_in_one_line(tmp_path, words, said, request, capsys):
  include = write_tasks(tmp_path / 't')
  if words[0].startswith('M'):
    folder = request.getfixturevalue('checkpoint')
    words = ['--model', 'longctx', f'--model_args=workdir={folder}{words[0][1:]}', *words[1:]]
    words += [] if any(word.startswith('--tasks') for word in words) else ['--tasks=copy']
  words = [word.replace('=D', f'={tmp_path}/d') for word in words]
  more = [] if words[0].startswith('--export') else ['--include_path', include]
  assert face.main(['longctx.lm_eval', *words, *more]) == 2
  lines = capsys.readouterr().err.splitlines()
  error = [line for line in lines if line.startswith('longctx: ')]
  assert len(error) == 1 and said in error[0]
  assert not (tmp_path / 'd').exists()


def test_a_workdir_without_a_checkpoint_is_named(tmp_path, capsys):
  folder = begun(tmp_path / 'w')
  assert face.main(['longctx.lm_eval', '--model', 'longctx', f'--model_args=workdir={folder}',
                    '--tasks=copy', '--include_path', write_tasks(tmp_path / 't')]) == 2
  said = capsys.readouterr().err
  assert f'longctx: --workdir={folder}: no checkpoint there yet; train first' in said


def test_without_lm_eval_the_remedy_is_named(monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, 'lm_eval.api.model', None)
  assert face.main(['longctx.lm_eval', '--model', 'longctx', '--tasks', 'a']) == 2
  assert "pip install 'lm_eval>=" in capsys.readouterr().err


def test_help_tells_of_both_commands(capsys):
  assert face.main(['longctx.lm_eval', '--help']) == 0
  said = capsys.readouterr().out
  assert 'checkpoint' in said and '--export' in said and 'run --help' in said


# RULER's tasks as lm_eval makes them.

RULER = os.path.join(os.path.dirname(lm_eval.tasks.__file__), 'ruler')
NEEDLE = re.compile(r'magic numbers for ([a-z-]+) is: (\d{7})\.')


@pytest.fixture
def offline(monkeypatch):
  """lm_eval tries to fetch nltk's models when it makes needles, and does without where there is no sentence to cut."""
  pytest.importorskip('wonderwords', reason="optional: pip install 'lm_eval[ruler]'")
  pytest.importorskip('transformers', reason='optional: reads the tokenizer that tasks count with')
  nltk = pytest.importorskip('nltk', reason="optional: pip install 'lm_eval[ruler]'")
  monkeypatch.setattr(nltk, 'download', lambda *args, **kwargs: False)


class Finds:
  """Tells the number of the needle where it is even, and of an odd one all but a digit."""

  tokenizer, max_length = Bytes(), 1200

  def generate(self, prompts, max_new_tokens, stops=()):
    found = [NEEDLE.search(self.tokenizer.decode(prompt[1:]).decode())[2] for prompt in prompts]
    said = [f' \n{number if int(number) % 2 == 0 else number[:-1]}. The' for number in found]
    return [self.tokenizer.encode(text.encode())[:max_new_tokens] for text in said]


def ruler(tmp_path, args, limit, task='niah_single_1'):
  return run(tmp_path, RULER, task, args, f'--limit={limit}', '--batch_size=4',
             '--metadata={"max_seq_lengths": [1024]}')


def scores(samples):
  """Of each of lm_eval's documents, by our scorer of RULER."""
  answered = [(one['filtered_resps'][0], types.SimpleNamespace(references=one['doc']['outputs'])) for one in samples]
  return [TASKS['ruler_niah_single_1'].score(*one) for one in answered]


@pytest.mark.slow
def test_a_task_of_ruler_that_lm_eval_makes_is_scored_as_ours(tmp_path, monkeypatch, offline):
  found, samples = ruler(tmp_path, put(monkeypatch, tmp_path, Finds()), 24)
  ours = scores(samples['niah_single_1'])
  even = [int(one['doc']['outputs'][0]) % 2 == 0 for one in samples['niah_single_1']]
  assert ours == even and 0 < sum(even) < 24
  assert found['results']['niah_single_1']['1024,none'] == sum(ours) / 24
  for one in samples['niah_single_1']:   # counted in the tokens of the model, which are bytes
    doc = one['doc']
    assert doc['length'] == len(doc['input']) + 128 <= 1024 and doc['outputs'][0] in doc['input']
    assert one['arguments']['gen_args_0']['arg_0'] == f'{doc["input"]} {doc["gen_prefix"]}'


@pytest.mark.slow
def test_a_checkpoint_is_put_to_a_task_of_ruler(tmp_path, offline):
  folder = saved(begun(tmp_path / 'w', max_length=1200))
  found, samples = ruler(tmp_path, f'--model_args=workdir={folder}', 4)
  trained = assembly.load_for_inference(folder)
  subject = ModelSubject(trained.graphdef, trained.params, Bytes(), layout=None, batch_size=4, segment=512)
  asked = [one['arguments']['gen_args_0']['arg_0'] for one in samples['niah_single_1']]
  written = subject.generate([tokens_of(text) for text in asked], 128)
  texts = [Bytes().decode(tokens).decode('utf-8', 'replace') for tokens in written]
  assert [one['filtered_resps'][0] for one in samples['niah_single_1']] == texts and any(texts)
  assert found['results']['niah_single_1']['1024,none'] == np.mean(scores(samples['niah_single_1']))


@pytest.mark.slow
@pytest.mark.parametrize('task', ['niah_single_2', 'ruler_qa_squad'])
def test_a_task_of_ruler_whose_text_cannot_be_fetched_says_which_can_do_without(task, tmp_path, monkeypatch, offline, capsys):
  import requests
  def refuse(*args, **kwargs):
    raise requests.exceptions.ConnectionError('Max retries exceeded')
  monkeypatch.setattr(requests.adapters.HTTPAdapter, 'send', refuse)
  args = put(monkeypatch, tmp_path, Constant(Bytes(), b''))
  assert face.main(['longctx.lm_eval', '--model', 'longctx', '--tasks', task, '--include_path', RULER, args,
                    '--metadata={"max_seq_lengths": [1024]}', '--limit=1']) == 2
  said, = [line for line in capsys.readouterr().err.splitlines() if line.startswith('longctx: ')]
  assert ' some of its tasks fetch texts when they are made: have a network, or put tasks that need none, of RULER' in said
  assert all(name in said and name in face.__doc__ for name in face.OFFLINE)


@pytest.mark.slow
def test_a_length_that_lm_eval_itself_refuses_ends_in_one_line(tmp_path, monkeypatch, offline, capsys):
  args = put(monkeypatch, tmp_path, Constant(Bytes(), b''))
  assert face.main(['longctx.lm_eval', '--model', 'longctx', '--tasks=niah_single_1', '--include_path', RULER, args,
                    '--metadata={"max_seq_lengths": [64]}']) == 2
  assert 'longctx: lm_eval: Could not generate any sample for haystack' in capsys.readouterr().err


# Exported tasks.

NO_BYTES = {'ruler_compat_vt': 'its example of 500 tokens has no room in bytes'}
EXPORTED = sorted(name for name in set(TASKS) - set(NO_BYTES) if 'files' not in TASKS[name].reads)


def test_an_exported_task_is_the_same_task(tmp_path, monkeypatch):
  """The oracle knows our examples by their prompts: it answers these, and scores 1."""
  folder = tmp_path / 'd'
  assert face.main(['longctx.lm_eval', f'--export={folder}', '--tasks=passkey,mqar', '--samples=3',
                    '--lengths=512,700', '--tokenizer=bytes', '--seed=4', '--depths=2']) == 0
  moved = folder.rename(tmp_path / 'elsewhere')
  examples = [example.example(name, TASKS[name], Bytes(), length=length, index=i, seed=4,
                              depth=[0.0, 1.0][i % 2])
              for name in ('passkey', 'mqar') for length in (512, 700) for i in range(3)]
  args = put(monkeypatch, tmp_path, Oracle(Bytes(), examples))
  found, samples = run(tmp_path, str(moved), 'longctx_passkey,longctx_mqar_700', args)
  names = ['longctx_passkey_512', 'longctx_passkey_700', 'longctx_mqar_700']
  assert [found['results'][name]['score,none'] for name in names] == [1.0, 1.0, 1.0]
  depths = [one['doc']['depth'] for one in samples['longctx_passkey_700']]
  assert depths == [one.depth for one in examples[3:6]]
  args = put(monkeypatch, tmp_path, Constant(Bytes(), b' 1'))
  found, _ = run(tmp_path, str(moved), 'longctx_passkey_512', args)
  assert found['results']['longctx_passkey_512']['score,none'] == 0.0


class WritesOn(Oracle):
  """Right, and then more of the text for as long as it may."""

  def generate(self, prompts, max_new_tokens, stops=()):
    answers = [self._targets[self.tokenizer.decode(prompt[1:])] for prompt in prompts]
    return [self.tokenizer.encode(answer + b' and so on' * 99)[:max_new_tokens] for answer in answers]


@pytest.mark.parametrize('tokens', ['bytes', 'sentencepiece'])
def test_an_exported_answer_has_the_room_of_its_own_example(tokens, tmp_path, monkeypatch):
  """Of answers of unlike lengths, as MRCR's, what is written after them counts as in our own evaluation."""
  if tokens != 'bytes':
    (tmp_path / 'm.model').write_bytes(train_sentencepiece([pathlib.Path(__file__).read_bytes()], 400))
    tokens = str(tmp_path / 'm.model')
  tokenizer = load_tokenizer(tokens)
  examples = [example.example('mrcr_2', TASKS['mrcr_2'], tokenizer, length=4096, index=i) for i in range(3)]
  assert len({one.new_tokens for one in examples}) > 1
  subject = WritesOn(tokenizer, examples)
  assert face.main(['longctx.lm_eval', f'--export={tmp_path}/d', '--tasks=mrcr_2', '--samples=3', '--lengths=4096',
                    f'--tokenizer={tokens}']) == 0
  args = put(monkeypatch, tmp_path, subject)
  found, _ = run(tmp_path, f'{tmp_path}/d', 'longctx_mrcr_2', args, '--batch_size=2')
  ours = tasks.run(subject, tasks.Config(tasks=('mrcr_2',), samples=3, controls=False), str(tmp_path / 'w'),
                   dict(checkpoint='c', model='m', tokenizer='t'), lengths=(4096,))
  theirs = found['results']['longctx_mrcr_2_4096']['score,none']
  assert theirs == pytest.approx(ours[0].score.mean, rel=1e-12) and (theirs == 1) == (tokens == 'bytes')
  _, samples = run(tmp_path / 'n', f'{tmp_path}/d', 'longctx_mrcr_2', args, '--gen_kwargs=max_new_tokens=7', '--limit=1')
  assert samples['longctx_mrcr_2_4096'][0]['filtered_resps'][0].encode() == tokenizer.decode(
      tokenizer.encode(examples[0].target)[:7])


@pytest.mark.parametrize('text', ['README', 'help'])
def test_the_export_that_is_told_of_runs(text, tmp_path):
  """Three examples of it."""
  said = (pathlib.Path(__file__).parent.parent / 'README.md').read_text() if text == 'README' else face.__doc__
  command, = re.findall(r'(?:`|longctx\.lm_eval )(--export=DIR [^`\n]+)', said)
  words = shlex.split(command.replace('DIR', f'{tmp_path}/d'))
  assert face.main(['longctx.lm_eval', *(word for word in words if '--samples' not in word), '--samples=3']) == 0
  assert len((tmp_path / 'd' / 'passkey_4096.jsonl').read_text().splitlines()) == 3


@pytest.fixture(scope='module')
def everything(tmp_path_factory):
  """An example of each task, and what the written Python alone says of its target and of none."""
  folder = tmp_path_factory.mktemp('all')
  names = harness_tasks.export(str(folder), EXPORTED, lengths=[4096], samples=1, tokenizer=Bytes(),
                               seed=0, depths=0, sources={})
  program = ('import json, pathlib, sys; sys.path.insert(0, "."); import longctx_tasks as t\n'
             'docs = {p.stem: json.loads(p.read_text()) for p in pathlib.Path().glob("*.jsonl")}\n'
             'score = lambda doc, text: t.process_results(doc, [text])["score"]\n'
             'both = {name: [score(d, d["target"]), score(d, "")] for name, d in docs.items()}\n'
             'assert not {"longctx", "numpy", "jax"} & set(sys.modules)\n'
             'print(json.dumps(both))')
  said = subprocess.run([sys.executable, '-I', '-S', '-c', program], cwd=folder, check=True,
                        capture_output=True, text=True)
  return folder, names, json.loads(said.stdout)


@pytest.mark.parametrize('name', EXPORTED)
def test_every_task_can_be_exported(everything, name):
  folder, names, scores = everything
  assert f'longctx_{name}_4096' in names and scores[f'{name}_4096'] == [1, 0]
  about = (folder / f'{name}_4096.yaml').read_text()
  if name == 'ruler_qa_1':
    assert '"text": "invented documents in place of SQuAD\'s", "floor": 0.04' in about
  doc = json.loads((folder / f'{name}_4096.jsonl').read_text())
  made = example.example(name, TASKS[name], Bytes(), length=4096, index=0)
  assert doc['prompt'].encode() == made.prompt and doc['question'] == made.question


class MadeError(Exception):
  """A task was about to be made."""


def asked(tmp_path, monkeypatch, capsys, *words):
  """What is said of tasks that lm_eval would make next; '' where it was about to."""
  def download(self, dataset_kwargs=None, **kwargs):
    raise MadeError(self.config.task)
  monkeypatch.setattr('lm_eval.api.task.ConfigurableTask.download', download)
  args = put(monkeypatch, tmp_path, Constant(Bytes(), b''))
  words = ['longctx.lm_eval', '--include_path', RULER, *(args if word == 'M' else word for word in words)]
  capsys.readouterr()
  try:
    assert face.main(words) == 2
  except MadeError:
    return ''
  said, = [line for line in capsys.readouterr().err.splitlines() if line.startswith('longctx: ')]
  return said


def at(*lengths):
  return f'--metadata={json.dumps(dict(max_seq_lengths=lengths))}'


BOTH = ['--model', 'longctx', 'M']
CWE = r'ruler_cwe (\d+) to 4095 or at least (\d+)'


@pytest.mark.parametrize('words, said', [
    (['--tasks=ruler_vt', at(9999)], 'ruler_vt none;'),   # in bytes its worked example has no room, whatever the length
    (['--tasks=ruler_v?', at(9999)], 'ruler_vt none;'),
    (['--tasks=ruler_*', at(300, 2500, 9999)], rf"^max_seq_lengths=\[300, 2500, 9999\]: .*: {CWE}, ruler_fwe at least 364, "
     r'ruler_vt none; .*--tasks=ruler_cwe,ruler_fwe,ruler_vt$'),
    (['--tasks=ruler', at(2500)], 'of: ruler_vt none; .*--tasks=ruler_vt$'),                       # a group
    (['--tasks=longcxt', at(2500)], 'of: ruler_vt none;'),                                         # a tag
    (['--tasks=niah_single_1,ruler_cwe', at(512)], rf'of: {CWE};'),
    (['--tasks=ruler_cwe'], rf'^max_seq_lengths=\[4096\]: .*of: {CWE};'),                          # lm_eval's own
    (['--tasks=ruler_fwe', at(363)], 'of: ruler_fwe at least 364;'),
    ([f'--tasks={RULER}/cw*.yaml', at(100)], rf'of: {CWE};'),                                      # files
    (['--tasks=ruler_fwe', '--metadata=max_seq_lengths=99'], '=99: must be a list of whole numbers, such as')])
def test_lengths_at_which_lm_eval_would_make_examples_for_ever_are_refused(words, said, tmp_path, monkeypatch, offline, capsys):
  found = asked(tmp_path, monkeypatch, capsys, *BOTH, *words)
  assert re.search(said, found.removeprefix('longctx: --tasks: ')), found
  if (spans := re.search(CWE, found)):
    assert 1900 < int(spans[1]) < 2300 and 6600 < int(spans[2]) < 8000


@pytest.mark.parametrize('words', [['niah_single_1', at(64)], ['ruler_cwe', at(2500, 4095, 8000)], ['ruler_fwe', at(364)],
                                   ['ruler_[cf]we', at(2500)]])
def test_other_lengths_and_tasks_are_not_refused(words, tmp_path, monkeypatch, offline, capsys):
  assert asked(tmp_path, monkeypatch, capsys, *BOTH, f'--tasks={words[0]}', *words[1:]) == ''


@pytest.mark.parametrize('tasks, more', [('[ruler_fwe]', {}), ('ruler_f*', {}), ('[mine]', {}), ('[niah_single_1]', dict(tasks=1))])
def test_tasks_of_a_config_file_are_refused_likewise(tasks, more, tmp_path, monkeypatch, offline, capsys):
  """A task of another name, whose text the same generator makes, too; flags go before the file."""
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'mine.yaml').write_text(f'include: {RULER}/fwe.yaml\ntask: mine\n')
  (tmp_path / 'config.yaml').write_text(
      f'model: longctx\nmodel_args: {{workdir: {tmp_path}/w}}\ntasks: {tasks}\n'
      f'include_path: [{RULER}, {tmp_path}/mine]\nmetadata: {{max_seq_lengths: [99]}}\n')
  words = [f'--config={tmp_path}/config.yaml', *(['--tasks=ruler_fwe'] if more else [])]
  monkeypatch.setattr(sys.modules[__name__], 'RULER', f'{tmp_path}/mine') if 'mine' in tasks else None
  found = asked(tmp_path, monkeypatch, capsys, *words)
  assert f'{"mine" if "mine" in tasks else "ruler_fwe"} at least 364;' in found and '[99]' in found


def test_a_config_file_that_is_none_is_named(tmp_path, monkeypatch, capsys):
  assert f'--config={tmp_path}/none.yaml: Config file not found: ' in asked(
      tmp_path, monkeypatch, capsys, f'--config={tmp_path}/none.yaml')


# Of a generator: its call, with a tokenizer and a length; letters of a token; a part of the least length that has no end.
CALLS = {'vt': ('vt_utils.get_dataset(tok, {})', 4, 0.9),   # in bytes it has none
         'cwe': ('cwe_utils.sys_word_pair_random(20, {}, tok)', 1, 0.1),
         'fwe': ('fwe_utils.sys_kwext(tok, {}, num_samples=5)', 1, 0.9)}


def generated(task, length, seconds):
  """Answers of the examples that lm_eval makes; None where it does not end in time."""
  call, letters, _ = CALLS[task]
  program = (f'import json, types; from lm_eval.tasks.ruler import {task}_utils\n'
             f'tok = lambda text: types.SimpleNamespace(input_ids=range(-(-len(text) // {letters})))\n'
             f'print("begun", flush=True)\nfound = {call.format(length)}\n'
             'print("\\n" + json.dumps([one["outputs"] for one in found]))')
  try:
    one = subprocess.run([sys.executable, '-c', program], capture_output=True, timeout=seconds, check=False)
  except subprocess.TimeoutExpired as e:
    return None if b'begun' in e.stdout else e.stderr
  assert one.returncode == 0, one.stderr
  return json.loads(one.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize('task', CALLS)
def test_the_least_lengths_are_those_of_lm_evals_own_generators(task, offline):
  """At the least each example has answers, and somewhat below there is no end."""
  _, letters, endless = CALLS[task]
  of, = [of for name, of in harness_ruler.SPANS.values() if name == f'ruler_{task}']
  (least, _), *_ = of(lambda text: -(-len(text) // letters))
  found = generated(task, least, 120)
  assert found and all(found)
  assert generated(task, int(endless * least), 60) is None


def test_the_tokenizer_that_tasks_count_with_has_our_tokens(tmp_path):
  tokenizers = pytest.importorskip('tokenizers')
  assert harness_tasks.write_tokenizer(Bytes(), str(tmp_path))
  theirs = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
  text = ''.join(map(chr, range(1, 0x250))) + '雪 🙂\r\n\t  x'
  assert theirs.encode(text, add_special_tokens=False).ids == list(text.encode())
  assert theirs.decode(list(text.encode())) == text
  source = pathlib.Path(__file__).read_text()
  (tmp_path / 'm.model').write_bytes(train_sentencepiece([source.encode()], 600))
  ours = SentencePiece(str(tmp_path / 'm.model'))
  assert harness_tasks.write_tokenizer(ours, str(tmp_path))
  theirs = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
  source += ' naïve   雪 🙂\r\n\n\t x '
  ids = ours.encode(source.encode()).tolist()
  assert theirs.encode(source, add_special_tokens=False).ids == ids and len(ids) < 0.6 * len(source)
  assert theirs.decode(ids) == source
