"""python -m longctx.report --workdir=W [--examples=passkey:512:0,passkey:512:3 | --prompt_file=F | --source=TEXT]

Writes W/report.html: scores, figures, examples, and how to make them again, on one page that opens
from disk. With examples of the last evaluation (task:length:index) or a prompt it also shows what
the answer drew on: which tokens, heads and slots of a memory; of an encoder-decoder, with a source, which of
its tokens the text that it writes.
"""

# Flags in, one call. A user's mistake ends in one line on stderr and exit status 2.
# Held by: tests/test_report.py.

import os
import sys
from typing import Any

from absl import flags

from longctx import command_line
from longctx.command_line import complain
from longctx.errors import ConfigError, check, check_choice, check_range
from longctx.generate import read_source, read_text
from longctx.main import check_devices, set_compilation_cache

ANSWERS = ('written', 'right')


def define_flags() -> flags.FlagValues:
  table = flags.FlagValues()
  text = lambda *args: flags.DEFINE_string(*args, flag_values=table)
  whole = lambda *args: flags.DEFINE_integer(*args, flag_values=table)
  text('workdir', '', 'Folder of a run; report.html is written there.')
  text(
    'examples',
    '',
    'task:length:index of examples in tasks.jsonl to look into, with commas between.',
  )
  text('prompt', '', 'Text to look into; - reads it from stdin.')
  text('prompt_file', '', 'File with the text to look into, every byte of it.')
  text('source', '', 'Of an encoder-decoder, the text that it reads; - reads it from stdin.')
  text('source_file', '', 'File with that text.')
  text(
    'answer',
    'written',
    'Of examples: written (by the model, now) or right: the answer that is looked into.',
  )
  whole('max_new_tokens', 32, 'Of a prompt: tokens that are written after it, and looked into.')
  text('layers', '', 'Layers whose heads are shown, with commas between; empty: all.')
  whole(
    'pieces', 32, 'Parts of the prompt that are put out in turn, a few rounds of them; 0: none.'
  )
  whole('segment', 512, 'Tokens a call.')
  text('checkpoint', 'newest', command_line.CHECKPOINT_HELP)
  flags.DEFINE_bool('use_ema', False, 'Use the averaged parameters.', flag_values=table)
  flags.DEFINE_bool('help', False, 'Show this help.', flag_values=table)
  return table


def check_flags(f: flags.FlagValues) -> tuple[list[tuple[str, int, int]], tuple[int, ...]]:
  """(the examples, the layers) that are asked for."""
  check(bool(f.workdir), '--workdir: missing; give the folder of a run, such as runs/passkey')
  check(os.path.isdir(f.workdir), f'--workdir={f.workdir}: no such folder')
  command_line.check_checkpoint(f.checkpoint)
  check_choice('--answer', f.answer, ANSWERS)
  for name, low in dict(max_new_tokens=1, pieces=0, segment=1).items():
    check_range(f'--{name}', f[name].value, low)
  given = [name for name in ('examples', 'prompt', 'prompt_file', 'source', 'source_file') if f[name].value]
  check(len(given) <= 1, f'--{", --".join(given)}: give one of them')
  try:
    layers = tuple(int(i) for i in f.layers.split(',') if f.layers)
    examples = [(task, int(length), int(index)) for task, length, index in
                (one.strip().split(':') for one in f.examples.split(',') if f.examples)]
  except ValueError:
    raise ConfigError(
      f'--examples={f.examples}, --layers={f.layers}: must be task:length:index, such as '
      'passkey:512:0, and numbers, such as 0,3, with commas between'
    ) from None
  return examples, layers


class Looker:
  """A checkpoint that is looked into."""

  def __init__(self, f: flags.FlagValues, layers: tuple[int, ...]):
    from longctx import assembly
    from longctx.evaluation.subject import ModelSubject
    self.f, self.layers = f, layers
    self.trained = assembly.load_for_inference(
      f.workdir, use_ema=f.use_ema, checkpoint=f.checkpoint
    )
    self.tokenizer = self.trained.tokenizer
    assembly.check_writes(self.trained.model_config)
    self.source = read_source(f, self.tokenizer, self.trained.model_config)
    if self.source is not None:
      return
    self.subject = ModelSubject(
      self.trained.graphdef,
      self.trained.params,
      self.tokenizer,
      layout=None,
      batch_size=8,
      segment=f.segment,
    )

  def tokens(self, prompt: bytes, name: str) -> Any:
    from longctx.evaluation.subject import prompt_tokens
    return prompt_tokens(self.tokenizer, prompt, name)

  def write(self, prompt: Any, max_new_tokens: int) -> Any:
    return self.subject.generate([prompt], max_new_tokens)[0]

  def look(self, prompt: Any, answer: Any) -> Any:
    import dataclasses

    from longctx.evaluation import inspect

    found = inspect.inspect(
      self.trained.graphdef,
      self.trained.params,
      prompt,
      answer,
      layers=self.layers,
      chunk=self.f.segment,
    )
    if self.f.pieces:
      found = dataclasses.replace(found, occlusion_T=inspect.occlude(
          self.subject, prompt, answer, self.f.pieces))
    return found


def example_section(looker: Looker, line: dict) -> str:
  """What an example's answer drew on."""
  from longctx.data.tasks.table import TASKS
  from longctx.evaluation import inspect_page, page, report
  name, who, own = ':'.join(map(str, (line['task'], line['length'], line['index']))), looker.trained.step, looker.f.use_ema
  check((line['step'], line['use_ema']) == (who, own), f'--examples={name}: was answered by step {line["step"]}, '
        f'use_ema={line["use_ema"]}, and --checkpoint={looker.f.checkpoint} is step {who}, use_ema={own}; give '
        f'{"--use_ema" if line["use_ema"] else "--nouse_ema"} and --checkpoint=newest or best, or evaluate this one')
  made = report.remake(line, looker.tokenizer)
  prompt = looker.tokens(made.prompt, line['task'])
  written = looker.write(prompt, made.new_tokens)
  right = looker.f.answer == 'right'
  answer = looker.tokenizer.encode(made.target) if right else written
  check(
    len(answer) > 0,
    f'--examples={line["task"]}:{line["length"]}:{line["index"]}: the model writes nothing '
    'there; give --answer=right to look into the right answer',
  )
  text = looker.tokenizer.decode(written).decode('utf-8', 'replace')
  told = report.answer(dict(written=text, score=TASKS[line['task']].score(text, made),
                            references=line['references']))
  if right:
    told += page.paragraph('What is looked into is the expected answer.')
  found = looker.look(prompt, answer)
  return inspect_page.section(
      f'{line["task"]}, {line["length"]:,} tokens, example {line["index"]}', found,
      inspect_page.text_of(found, looker.tokenizer, made.needles, made.question), told)


def prompt_section(looker: Looker) -> str:
  """What the text after a prompt drew on."""
  from longctx.evaluation import inspect_page, page
  data, name = read_text(looker.f, 'prompt')
  prompt = looker.tokens(data, name)
  answer = looker.write(prompt, looker.f.max_new_tokens)
  check(len(answer) > 0, f'{name}: the model writes nothing after it; give another prompt')
  found = looker.look(prompt, answer)
  written = page.text(looker.tokenizer.decode(answer))
  return inspect_page.section(name, found, inspect_page.text_of(found, looker.tokenizer),
                              f'<p>written: <code>{written}</code></p>')


def source_section(looker: Looker) -> str:
  """What a text that was written after a source drew on."""
  import numpy as np

  from longctx.evaluation import inspect_page, inspect_pair, page
  from longctx.inference import sampling
  trained, tokenizer = looker.trained, looker.tokenizer
  begin = tokenizer.separator
  written = [*sampling.generate(
      trained.graphdef, trained.params, [begin], sources=[looker.source], stop_token=begin,
      sampling=sampling.Sampling(temperature=0.0), max_new_tokens=looker.f.max_new_tokens,
      banned=range(tokenizer.vocab_size, trained.model_config.vocab_size))]
  check(len(written) > 0, '--source: the model writes nothing after it; give another')
  found = inspect_pair.inspect_pair(trained.graphdef, trained.params, np.array(looker.source),
                                    np.array([begin, *written]), layers=looker.layers)
  return inspect_page.section('--source', found, inspect_page.text_of(found, tokenizer),
                              f'<p>written: <code>{page.text(tokenizer.decode(written))}</code></p>')


def run(f: flags.FlagValues) -> None:
  examples, layers = check_flags(f)
  from longctx.evaluation import records, report
  sections = []
  if examples or f.prompt or f.prompt_file or f.source or f.source_file:
    lines = {records.identity(line): line for line in
             report.newest(report.lines_of(f.workdir, 'tasks.jsonl'))[0]}
    for one in examples:
      check(
        one in lines,
        f'--examples={":".join(map(str, one))}: is not in the last evaluation of '
        f'--workdir={f.workdir}, which has {len(lines):,} examples; evaluate it first: '
        'python -m longctx.main '
        f'--mode=eval --config.eval.tasks="(\'{one[0]}\',)" ...',
      )
    check_devices()
    set_compilation_cache('')
    looker = Looker(f, layers)
    sections = ([example_section(looker, lines[one]) for one in examples] if examples else
                [(prompt_section if looker.source is None else source_section)(looker)])
  print(f'report: {report.write(f.workdir, sections)}')


def main(argv: list[str]) -> int:
  try:
    f = define_flags()
    command_line.parse_flags(
      f, argv, stray='give what to look into as --examples=... or --prompt="..."'
    )
    if f.help:
      print(command_line.help_text(__doc__, f))
      return 0
    run(f)
  except ConfigError as e:
    return complain(e)
  except KeyboardInterrupt:
    return 130
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv))
