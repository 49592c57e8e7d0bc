"""python -m longctx.generate --workdir=W --prompt='def ' [--max_new_tokens=200 --temperature=0.8 ...]

Continues a prompt with a checkpoint of a workdir and writes the text while it is made. The
text ends at the end of the document (the separator) or after max_new_tokens. A user's mistake ends
in one line on stderr and exit status 2.
Held by: tests/test_generate.py.
"""

import codecs
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

from absl import flags

from longctx import command_line
from longctx.command_line import complain
from longctx.errors import ConfigError, check, check_range
from longctx.main import check_devices, set_compilation_cache

CONTROL = re.compile('[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]')  # what a terminal may take for a command


def define_flags() -> flags.FlagValues:
  """The flags of this face, in a table of their own: `longctx.main` has flags of the same names."""
  table = flags.FlagValues()
  define_model_flags(table)
  text = lambda *args: flags.DEFINE_string(*args, flag_values=table)
  text('prompt', '', 'Text to continue; - reads it from stdin; empty starts a new document.')
  text('prompt_file', '', 'File with the text to continue, every byte of it.')
  text('source', '', 'Of an encoder-decoder: the text to translate or to summarise; - reads it from stdin.')
  text('source_file', '', 'File with that text, every byte of it.')
  flags.DEFINE_bool('echo', True, 'Write the prompt before the text that continues it.',
                    flag_values=table)
  flags.DEFINE_bool('help', False, 'Show this help.', flag_values=table)
  return table


def define_model_flags(table: flags.FlagValues) -> None:
  """Which model, and how it chooses."""
  text = lambda *args: flags.DEFINE_string(*args, flag_values=table)
  whole = lambda *args: flags.DEFINE_integer(*args, flag_values=table)
  real = lambda *args: flags.DEFINE_float(*args, flag_values=table)
  text('workdir', '', 'Folder of a run; nothing is written there.')
  text('checkpoint', 'newest', command_line.CHECKPOINT_HELP)
  whole('max_new_tokens', 200, 'Tokens to make at most.')
  real('temperature', 0.8, 'Divides the logits; 0 always takes the most probable token.')
  whole('top_k', 0, 'Keeps the k most probable tokens; 0 = off.')
  real('top_p', 1.0, 'Keeps the fewest tokens with this much probability together; 1 = off.')
  real('min_p', 0.0, 'Keeps tokens with at least this share of the largest probability; 0 = off.')
  whole('seq', 1, 'Devices that share what the model remembers, for contexts larger than one holds.')
  whole('seed', 0, 'The same seed draws the same text.')
  flags.DEFINE_bool('use_ema', False, 'Use the averaged parameters.', flag_values=table)


def parse(argv: list[str]) -> flags.FlagValues:
  """Flags from a command line; ConfigError names the first mistake."""
  table = define_flags()
  command_line.parse_flags(table, argv, stray='give the prompt as --prompt="..."')
  return table


def check_flags(f: flags.FlagValues) -> Any:
  """The checks that need no checkpoint; returns the Sampling."""
  settings = check_model_flags(f)
  for name in ('prompt', 'source'):
    check(not (f[name].value and f[f'{name}_file'].value),
          f'--{name}, --{name}_file: give one of them, not both')
  check('-' not in (f.prompt, f.source) or f.prompt != f.source,
        '--prompt=- --source=-: stdin can be one of them; give the other by a file')
  return settings


def check_model_flags(f: flags.FlagValues) -> Any:
  """Those of `define_model_flags`."""
  check(bool(f.workdir), '--workdir: missing; give the folder of a trained run, such as '
        'runs/quickstart')
  check(os.path.isdir(f.workdir), f'--workdir={f.workdir}: no such folder')
  command_line.check_checkpoint(f.checkpoint)
  check_range('--max_new_tokens', f.max_new_tokens, low=1)
  check_range('--seq', f.seq, low=1)
  check_range('--seed', f.seed, low=0, high=2**31 - 1)
  from longctx.inference.sampling import Sampling
  try:
    return Sampling(temperature=f.temperature, top_k=f.top_k, top_p=f.top_p, min_p=f.min_p)
  except ConfigError as e:
    raise ConfigError(f'--{e}') from None


def read_text(f: flags.FlagValues, flag: str) -> tuple[bytes, str]:
  """The bytes of --prompt or --source, or of its file, and what to call them in an error."""
  text, path = f[flag].value, f[f'{flag}_file'].value
  if path:
    try:
      with open(path, 'rb') as file:
        return file.read(), f'--{flag}_file={path}'
    except OSError as e:
      raise ConfigError(f'--{flag}_file={path}: cannot be read: {e.strerror}') from e
  if text == '-':
    return sys.stdin.buffer.read(), f'--{flag}=- (stdin)'
  data = os.fsencode(text)  # the bytes of the command line, whatever they are
  try:
    data.decode('utf-8')
  except UnicodeDecodeError as e:
    raise ConfigError(f'--{flag}: byte {e.start} ({data[e.start]:#04x}) is not UTF-8; to '
                      f'{"continue" if flag == "prompt" else "read"} text in another encoding give '
                      f'--{flag}_file=FILE') from None
  return data, f'--{flag}'


def read_source(f: flags.FlagValues, tokenizer: Any, model_config: Any) -> list[int] | None:
  """Token ids of the source as training has it, the separator last; None for a language model."""
  longest = getattr(model_config, 'source_length', 0)
  given = bool(f.source or f.source_file)
  check(given or not longest, f'--source: missing; model.name={model_config.name!r} writes what follows '
        'from a source: give --source=TEXT or --source_file=FILE')
  if not given:
    return None
  check(longest > 0, f'--source: model.name={model_config.name!r} reads a text and carries it on; give '
        '--prompt, or the workdir of an encoder_decoder')
  data, name = read_text(f, 'source')
  ids = [*tokenizer.encode(data, name).tolist(), tokenizer.separator]
  check(len(ids) <= longest, f'{name}: has {len(ids)} tokens (its separator counted); must be at most '
        f'model.source_length={longest}')
  return ids


def write_text(prompt: bytes, tokens: Iterable[int], decode: Callable[[list[int]], bytes],
               write: Callable[[str], Any]) -> None:
  """Writes the prompt, then every token's text as soon as its last byte is known.

  A token may hold part of a character: its bytes wait for the rest. Bytes that are no UTF-8
  become U+FFFD.
  """
  decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
  write(decoder.decode(prompt))
  for token in tokens:
    write(decoder.decode(decode([token])))
  write(decoder.decode(b'', final=True))


class Terminal:
  """Writes to stdout at once; `last` is the last character, and `echo` False drops the first text."""

  def __init__(self, echo: bool):
    self.last, self.skip = '\n', not echo
    self.is_terminal = sys.stdout.isatty()
    if hasattr(sys.stdout, 'reconfigure'):
      sys.stdout.reconfigure(encoding='utf-8', errors='replace')

  def __call__(self, text: str) -> None:
    if text and not self.skip:
      sys.stdout.write(CONTROL.sub('\ufffd', text) if self.is_terminal else text)
      sys.stdout.flush()
      self.last = text[-1]
    self.skip = False


def run(f: flags.FlagValues) -> None:
  """Loads, generates, writes."""
  settings = check_flags(f)
  prompt, name = read_text(f, 'prompt')
  check_devices()
  set_compilation_cache('')
  from longctx import assembly
  from longctx.inference import sampling
  graphdef, params, tokenizer, model_config, layout, *_ = assembly.load_for_inference(
      f.workdir, use_ema=f.use_ema, checkpoint=f.checkpoint, seq=f.seq)
  assembly.check_writes(model_config)
  source = read_source(f, tokenizer, model_config)
  prompt_ids = [tokenizer.separator, *tokenizer.encode(prompt, name).tolist()]
  total = len(prompt_ids) + f.max_new_tokens
  check(not model_config.max_length or total <= model_config.max_length,
        f'--max_new_tokens={f.max_new_tokens}: with the {len(prompt_ids)} tokens of the prompt '
        f'(its separator counted) that is {total}; must be at most model.max_length='
        f'{model_config.max_length}')
  tokens = sampling.generate(
      graphdef, params, prompt_ids, max_new_tokens=f.max_new_tokens, sampling=settings,
      stop_token=tokenizer.separator, seed=f.seed, layout=layout,
      sources=None if source is None else [source],
      banned=range(tokenizer.vocab_size, model_config.vocab_size))   # no text stands for these
  terminal = Terminal(f.echo)
  try:
    write_text(prompt, tokens, tokenizer.decode, terminal)
  except FloatingPointError as e:
    raise ConfigError(f'--workdir={f.workdir}: {e}') from e
  finally:
    if terminal.last != '\n':
      terminal('\n')


def main(argv: list[str]) -> int:
  try:
    f = parse(argv)
    if f.help:
      print(command_line.help_text(__doc__, f))
      return 0
    run(f)
  except ConfigError as e:
    return complain(e)
  except KeyboardInterrupt:
    return 130  # the text so far stands
  except BrokenPipeError:  # the reader, such as head, had enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv))
