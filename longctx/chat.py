"""python -m longctx.chat --workdir=W --store=DIR --context=alice [--max_new_tokens=200 ...]

Talks with a memory that outlives the process: each line from the terminal or stdin is text that the
model goes on from. The context is saved at /save and at the end (end of input, Ctrl-C).

  /read FILE     reads a file of any length into the memory; Ctrl-C keeps what was read so far
  /save          saves the context
  /fork NAME     saves a copy as NAME; this conversation stays with its own
  /merge NAME    adds what another context remembers, for models whose memories add
  /forget        empties the memory; the saved one stays until the next save
  /info          tokens seen, bytes held
  /quit          saves and ends; /abandon ends without saving
  /help          this list; a line that begins with // is text that begins with /
"""

# A user's mistake ends in one line on stderr; where nobody sits at a terminal, with exit status 2 too.
# Held by: tests/test_chat.py.

import contextlib
import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

from absl import flags

from longctx import command_line, contexts, generate
from longctx.command_line import complain
from longctx.errors import ConfigError, check, check_range, nearest
from longctx.main import check_devices, set_compilation_cache

BLOCK = 2 ** 16   # bytes of a file that are tokenized at once


def define_flags() -> flags.FlagValues:
  table = flags.FlagValues()
  generate.define_model_flags(table)
  contexts.define_store_flags(table)
  flags.DEFINE_string('context', '', 'Name of the context to carry on, or to begin.', flag_values=table)
  flags.DEFINE_integer('capacity', 0, 'Tokens that a new context has room for, where the state grows '
                       "with them; 0: the model's max_length.", flag_values=table)
  flags.DEFINE_bool('help', False, 'Show this help.', flag_values=table)
  return table


class Interrupts:
  """Ctrl-C, SIGTERM and SIGHUP set a flag, so that no state is torn; `requested`, of the work at hand.

  Where nothing can be lost (`waiting`, and until the first work) they raise KeyboardInterrupt.
  `leaving`: the process was asked to end.
  """

  def __init__(self):
    self.requested = self.leaving = False
    self._raises = True

  def __enter__(self) -> 'Interrupts':
    self._before = {n: signal.signal(n, self._handle)
                    for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    return self

  def __exit__(self, *exc) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler or signal.SIG_DFL)

  def _handle(self, number: int, frame: Any) -> None:
    del frame
    self.requested = True
    self.leaving |= number != signal.SIGINT
    if self._raises:
      self._raises = False
      raise KeyboardInterrupt

  def work(self) -> None:
    """From here on only the flag is set; it is down."""
    self._raises, self.requested = False, self.leaving

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    if self.leaving:
      raise KeyboardInterrupt
    self._raises = True
    try:
      yield
    finally:
      self._raises = False


class Chat:
  """A conversation: a reader, the store it is saved in, and what the commands do."""

  def __init__(self, reader: Any, store: Any, name: str, tokenizer: Any, sampling: Any, *,
               max_new_tokens: int, seed: int, interrupts: Interrupts, terminal: Any):
    self.reader, self.store, self.name = reader, store, name
    self.tokenizer, self.sampling = tokenizer, sampling
    self.max_new_tokens, self.seed = max_new_tokens, seed
    self.interrupts, self.terminal = interrupts, terminal
    self.saved = 0        # bytes of the saved context; 0: there is none
    self.changed = False
    self.commands: dict[str, tuple[Callable, str]] = {
        '/read': (self.read, 'FILE'), '/save': (self.save, ''), '/fork': (self.fork, 'NAME'),
        '/merge': (self.merge, 'NAME'), '/forget': (self.forget, ''), '/info': (self.info, ''),
        '/help': (self.help, ''), '/quit': (self.quit, ''), '/abandon': (self.abandon, '')}
    self.ended = False

  def open(self, capacity: int = 0) -> None:
    """Carries on the context, if it is there; `capacity` is what was asked for, 0: nothing."""
    if self.name in self.store:
      context = self.store.load(self.name, self.reader.identity)
      room = context.header.capacity
      check(capacity in (0, room), f'--capacity={capacity}: context {self.name!r} has room for {room} '
            f'tokens, which cannot be changed; leave it out, or begin another context')
      self.reader.restore(context, f'context {self.name!r}')
      self.saved = self.store.row(self.name).bytes
      self.say(f'{self.name}: {self.reader.tokens:,} tokens remembered')
    else:
      self.reader.begin()
      self.say(f'{self.name}: a new context')

  def say(self, line: str) -> None:
    """A line of ours, apart from the model's text."""
    print(line, file=sys.stderr, flush=True)

  # Lines.

  def take(self, line: bytes) -> None:
    """Does what one line says."""
    text = line.rstrip(b'\r\n')
    if not text.startswith(b'/') or text.startswith(b'//'):
      self.answer(text[1:] if text.startswith(b'//') else text)
      return
    word, _, rest = os.fsdecode(text).partition(' ')
    rest = rest.strip()
    check(word in self.commands, f'{word}: no such command{nearest(word, self.commands)}; /help lists '
          'them, and a line that begins with // is text')
    act, takes = self.commands[word]
    check(bool(rest) == bool(takes), f'{word}: takes {takes or "nothing"}, and got '
          f'{rest or "nothing"}; write {word} {takes}'.rstrip())
    act(*[rest] * bool(takes))

  def _begin_line(self, text: bytes) -> bytes:
    """The text, on a line of its own after what was there before."""
    return text if self.reader.tokens == 1 else b'\n' + text

  def answer(self, text: bytes) -> None:
    """Reads a line and writes how the model goes on."""
    reader = self.reader
    ids = self.tokenizer.encode(self._begin_line(text), 'the line')
    reader.check_room(len(ids) + 1, 'the line and one token')
    self.changed = True
    reader.read(ids)
    try:
      generate.write_text(b'', self._until_stopped(reader.generate(
          max_new_tokens=self.max_new_tokens, sampling=self.sampling, seed=self.seed)),
          self.tokenizer.decode, self.terminal)
    finally:
      if self.terminal.last != '\n':
        self.terminal('\n')
    if reader.room < 1:
      self.say(f'{self.name}: full, it has room for {reader.capacity:,} tokens; /forget empties it')

  def _until_stopped(self, tokens: Iterable[int]) -> Iterator[int]:
    for token in tokens:
      yield token
      if self.interrupts.requested:
        return

  # Commands.

  def read(self, path: str) -> None:
    reader, start = self.reader, time.monotonic()
    before = reader.tokens
    with opened(path) as (file, size):
      parts = self._tokens_of(path, blocks_of(file), before)
      from tqdm import tqdm
      with tqdm(total=size, unit='B', unit_scale=True, desc=os.path.basename(path), disable=None,
                leave=False, dynamic_ncols=True) as bar:
        try:
          if reader.is_bound:   # all of it, or nothing
            parts = self._if_all_fit(path, parts)
          for ids, size in parts:
            self.changed = True
            share = size * reader.chunk / max(len(ids), 1)
            took = reader.read(ids, stop=lambda: self.interrupts.requested,
                               after_chunk=lambda share=share: bar.update(share))
            if took < len(ids) or self.interrupts.requested:
              break
        except OSError as e:
          raise ConfigError(f'/read {path}: cannot be read: {e.strerror or e}; '
                            f'{self._kept(before)}') from e
    reader.check_finite(f'/read {path}')
    took, seconds = reader.tokens - before, time.monotonic() - start
    how = 'stopped after' if self.interrupts.requested else 'read'
    self.say(f'{how} {took:,} tokens of {path} in {seconds:.1f} s ({took / seconds:,.0f} tokens/s)')

  def _kept(self, before: int) -> str:
    """What stays of a file that ends in a mistake."""
    count = self.reader.tokens - before
    if not count:
      return 'nothing of it was read'
    return f'{count:,} tokens before that were read, and stay'

  def _tokens_of(self, path: str, blocks: Iterable[bytes], before: int
                 ) -> Iterator[tuple[Any, int]]:
    """(tokens, bytes of the file) of each block; `before`: tokens of the context until then."""
    place = 0
    for block in blocks:
      text = block if place else self._begin_line(block)
      try:
        ids = self.tokenizer.encode(text, f'/read {path}, from byte {place}')
      except ConfigError as e:
        raise ConfigError(f'{e}; {self._kept(before)}') from e
      yield ids, len(block)
      place += len(block)

  def _if_all_fit(self, path: str, parts: Iterable[tuple[Any, int]]) -> list[tuple[Any, int]]:
    kept, count = [], 0
    for ids, size in parts:
      count += len(ids)
      self.reader.check_room(count, f'/read {path}: nothing of it was read: the first')
      kept.append((ids, size))
    return kept

  def save(self) -> None:
    self.saved, dropped = self.store.save(self.name, self.reader.context())
    self.changed = False
    self.say('\n'.join([f'{self.name}: saved, {self.saved:,} bytes', *contexts.told(dropped)]))

  def fork(self, name: str) -> None:
    check(name != self.name, f'/fork {name}: is this conversation; give another name')
    size, dropped = self.store.save(name, self.reader.context(), new=True)
    self.say('\n'.join([f'{name}: saved as a copy, {size:,} bytes; this conversation stays with '
                        f'{self.name}', *contexts.told(dropped)]))

  def merge(self, name: str) -> None:
    check(name != self.name, f'/merge {name}: is this conversation; give another context')
    other = self.reader.another()
    other.restore(self.store.load(name, other.identity), f'context {name!r}')
    try:
      self.reader.merge(other)
    except FloatingPointError as e:   # of the sum: this conversation is as it was
      raise ConfigError(f'/merge {name}: nothing was merged: {e}') from e
    self.changed = True
    self.say(f'{self.name}: remembers {name} too, {self.reader.tokens:,} tokens in all')

  def forget(self) -> None:
    self.reader.begin()
    self.changed = True
    self.say(f'{self.name}: forgotten' + ('; the saved one stays until the next save' * bool(self.saved)))

  def info(self) -> None:
    reader, identity = self.reader, self.reader.identity
    room = f', room for {reader.capacity:,}' if reader.is_bound else ', of any number'
    saved = ('never saved' if not self.saved else f'{self.saved:,} bytes saved'
             + ', changed since' * self.changed)
    self.say(f'{self.name}: {reader.tokens:,} tokens seen{room}, {reader.waiting:,} of them waiting to '
             f'be read; {reader.num_bytes:,} bytes held; {saved}; model {identity.model} '
             f'{identity.hash[:8]}')

  def help(self) -> None:
    self.say(__doc__.partition('\n\n')[2].rstrip())

  def quit(self) -> None:
    self.finish()
    self.ended = True

  def abandon(self) -> None:
    self.changed = False
    self.ended = True

  def finish(self) -> None:
    """Saves what is not saved yet; an empty context that was never saved is none."""
    if self.changed or (not self.saved and self.reader.tokens > 1):
      self.save()


@contextlib.contextmanager
def opened(path: str) -> Iterator[tuple[BinaryIO, int]]:
  """A regular file and its bytes; of anything else an open or a read may wait for ever."""
  try:
    where = os.path.expanduser(path)
    found = os.stat(where)
    check(not stat.S_ISDIR(found.st_mode), f'/read {path}: is a folder; give a file')
    check(stat.S_ISREG(found.st_mode), f'/read {path}: is a pipe, a socket or a device, which may '
          f'never end; only a regular file is read: save it first, such as by cat {path} > FILE')
    file = open(where, 'rb')  # noqa: SIM115  (closed below)
  except OSError as e:
    raise ConfigError(f'/read {path}: cannot be read: {e.strerror or e}') from e
  except ValueError as e:   # a path that no file can have, such as one with a NUL
    if isinstance(e, ConfigError):
      raise
    raise ConfigError(f'/read {path!r}: is no path ({e}); give the path of a file') from e
  with file:
    yield file, found.st_size


def blocks_of(file: BinaryIO) -> Iterator[bytes]:
  """A file in blocks of about BLOCK bytes that end after a line, or at least between characters."""
  rest = b''
  while block := file.read(BLOCK):
    rest += block
    cut = rest.rfind(b'\n') + 1 or _between_characters(rest)
    yield rest[:cut]
    rest = rest[cut:]
  if rest:
    yield rest


def _between_characters(text: bytes) -> int:
  """A place near the end that is within no character of UTF-8."""
  back = 1
  while back < min(4, len(text)) and text[-back] & 0xC0 == 0x80:
    back += 1
  return (len(text) - back if text[-back] >= 0xC0 else 0) or len(text)


def lines_of_stdin() -> Iterator[bytes]:
  """The lines, of a terminal with a prompt and its editing."""
  if not sys.stdin.isatty():
    yield from iter(sys.stdin.buffer.readline, b'')
    return
  with contextlib.suppress(ImportError):
    import readline  # noqa: F401  (input() then edits, and knows the lines before)
  while True:
    try:
      yield os.fsencode(input('> '))
    except EOFError:
      print(file=sys.stderr)
      return


def converse(chat: Chat) -> int:
  """Line by line until the end, then the save; the exit status."""
  at_terminal = sys.stdin.isatty()
  while True:
    try:
      status = _take_lines(chat, at_terminal)
    except FloatingPointError:
      raise   # what is remembered is not finite: what was saved before is worth more
    except BaseException:
      _rescue(chat)
      raise
    chat.interrupts.work()
    try:
      if not chat.ended:
        chat.finish()
      return status
    except (ConfigError, OSError, MemoryError) as e:   # the memory is still here, and only here
      complain(e)
      if not at_terminal or chat.interrupts.leaving:
        return 2
      chat.say('not saved: mend that and end again, /fork it under another name, or /abandon it')


def _rescue(chat: Chat) -> None:
  """Saves the context where a fault of ours ends the conversation; the fault is told after it."""
  chat.interrupts.work()
  try:
    if not chat.ended:
      chat.finish()
  except Exception as e:   # such as a state that was given to a program that failed
    complain(e)
    chat.say('not saved: what was saved before is as it was')


def _take_lines(chat: Chat, at_terminal: bool) -> int:
  lines, interrupts = lines_of_stdin(), chat.interrupts
  while not chat.ended:
    try:
      with interrupts.waiting():
        line = next(lines, None)
    except KeyboardInterrupt:
      return 130
    if line is None:
      return 0
    interrupts.work()
    try:
      chat.take(line)
    except ConfigError as e:
      complain(e)
      if not at_terminal:
        return 2
    except BrokenPipeError:   # the reader, such as head, had enough
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      return 0
    if interrupts.requested and not at_terminal:
      return 130
  return 0


def run(f: flags.FlagValues) -> int:
  """Checks, loads, talks."""
  settings = generate.check_model_flags(f)
  check(bool(f.context), '--context: missing; give the context a name, such as --context=alice')
  check_range('--capacity', f.capacity, low=0)
  store = contexts.open_store(f, make=True)
  with store.hold(f.context), Interrupts() as interrupts:
    check_devices()
    set_compilation_cache('')
    from longctx import assembly
    from longctx.inference import reader as r
    from longctx.store import identify
    graphdef, params, tokenizer, config, layout, *_ = assembly.load_for_inference(
        f.workdir, use_ema=f.use_ema, checkpoint=f.checkpoint, seq=f.seq)
    assembly.check_writes(config, alone=True)
    reader = r.Reader(
        graphdef, params, identify(config, params, tokenizer.fingerprint), layout=layout,
        first_token=tokenizer.separator, capacity=f.capacity,
        banned=range(tokenizer.vocab_size, config.vocab_size))   # no text stands for these
    chat = Chat(reader, store, f.context, tokenizer, settings, max_new_tokens=f.max_new_tokens,
                seed=f.seed, interrupts=interrupts, terminal=generate.Terminal(echo=True))
    chat.open(f.capacity)
    store.check_room(f.context, reader.num_bytes)   # before much is read that could not be saved
    interrupts.work()
    try:
      return converse(chat)
    except FloatingPointError as e:
      raise ConfigError(f'--workdir={f.workdir}: {e}; what was saved before is as it was') from e


def main(argv: list[str]) -> int:
  try:
    table = define_flags()
    command_line.parse_flags(table, argv, stray='type text when it has started, or give it on stdin')
    if table.help:
      print(command_line.help_text(__doc__, table))
      return 0
    return run(table)
  except ConfigError as e:
    return complain(e)
  except KeyboardInterrupt:
    return 130


if __name__ == '__main__':
  sys.exit(main(sys.argv))
