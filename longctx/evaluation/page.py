"""One HTML page that needs nothing but itself: text made safe, tables, figures for light and dark.

The page has no script, and its own policy forbids it to load anything (default-src 'none'). Text of
prompts and answers is whatever a model read or wrote: it is escaped, what is no UTF-8 becomes
U+FFFD, control characters become their pictures, and marks that turn the direction of writing
around are spelt out.
Held by: tests/test_report.py, tests/test_report_browser.py.
"""

import base64
import html
import io
import re
import struct
from collections.abc import Callable, Sequence
from typing import Any

from longctx.draw import theme

# Characters that a page shows as nothing, or that reorder what stands around them.
UNSEEN = re.compile(
  '[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]'
)

STYLE = """
:root { color-scheme: light dark; --ink: #1c1f26; --paper: #ffffff; --soft: #5b6270;
  --line: #d9dce3; --box: #f5f6f8; --right: #0a7d5a; --wrong: #c2264c; --needle: #f0496e;
  --heat: 240, 150, 20; }
@media (prefers-color-scheme: dark) { :root { --ink: #d9dce3; --paper: #16181d; --soft: #9aa0ad;
  --line: #343841; --box: #1f2229; --right: #3ddba8; --wrong: #ff7d9b; --needle: #ff7d9b;
  --heat: 150, 98, 0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.2rem 1rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: .4rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-bottom: .2rem;
  border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; overflow-wrap: anywhere; }
p { margin: .5rem 0; } .soft { color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
/* Wider than a phone: there it scrolls. */
img { max-width: max(100%, 36rem); height: auto; display: block; margin: .6rem 0; }
figure { margin: 0; } figcaption { color: var(--soft); font-size: .9rem; }
pre { background: var(--box); border: 1px solid var(--line); border-radius: 6px;
  padding: .6rem .8rem; margin: .4rem 0; font: 13px/1.5 ui-monospace, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
pre.command { white-space: pre; overflow-x: auto; }
mark { background: none; color: inherit; box-shadow: inset 0 -.22em var(--needle); }
.left { color: var(--soft); font-style: italic; font-family: system-ui, sans-serif; }
.right { color: var(--right); font-weight: 600; } .wrong { color: var(--wrong); font-weight: 600; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--soft); }
"""

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(title: str, parts: Sequence[str]) -> bytes:
  """The whole file, UTF-8."""
  head = (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
          f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
          '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
          '<meta name="color-scheme" content="light dark">\n'
          # Without an icon of its own a page makes its browser ask the server for one.
          '<link rel="icon" href="data:,">\n'
          f'<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n')
  return (head + '\n'.join(parts) + '\n</body>\n</html>\n').encode()


def text(value: str | bytes) -> str:
  """As it may stand in HTML, between tags and in quoted attributes."""
  if isinstance(value, bytes):
    value = value.decode('utf-8', 'replace')
  # A lone surrogate cannot be written as UTF-8.
  value = value.encode('utf-8', 'replace').decode('utf-8').replace('\r\n', '\n')
  return html.escape(UNSEEN.sub(_picture, value), quote=True)


def _picture(found: re.Match) -> str:
  code = ord(found.group())
  if code < 0x20:
    return chr(0x2400 + code)
  return '\u2421' if code == 0x7f else f'\u27e8U+{code:04X}\u27e9'


def paragraph(words: str, soft: bool = False) -> str:
  return f'<p{" class=soft" if soft else ""}>{text(words)}</p>'


def heading(words: str, level: int = 2) -> str:
  return f'<h{level}>{text(words)}</h{level}>'


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Of plain words; the first column to the left, the others to the right."""
  line = lambda cells, tag: (
    '<tr>' + ''.join(f'<{tag}>{text(cell)}</{tag}>' for cell in cells) + '</tr>'
  )
  return ('<div class="wide"><table>\n<thead>' + line(names, 'th') + '</thead>\n<tbody>\n'
          + '\n'.join(line(row, 'td') for row in rows) + '\n</tbody></table></div>')


def verdict(score: float) -> str:
  word = 'right' if score == 1 else 'wrong' if score == 0 else f'{100 * score:.0f} % right'
  return f'<span class="{"right" if score == 1 else "wrong"}">{word}</span>'


def preformatted(inside: str, kind: str = '') -> str:
  """`inside` is HTML already."""
  # A line end after <pre> is dropped by browsers: one more keeps a text that begins with one.
  return f'<pre{f" class={kind}" if kind else ""}>\n{inside}</pre>'


def details(summary: str, inside: str) -> str:
  return f'<details><summary>{text(summary)}</summary>\n{inside}\n</details>'


def figure(draw: Callable[[Any], None], caption: str) -> str:
  """Draws into an open file twice: the browser chooses the light one or the dark one."""
  light, dark = io.BytesIO(), io.BytesIO()
  draw(light)
  with theme.dark():
    draw(dark)
  link = lambda file: 'data:image/png;base64,' + base64.b64encode(file.getvalue()).decode()
  # As large as its inches: letters are of one size in all figures, whatever their width.
  pixels, = struct.unpack('>I', light.getvalue()[16:20])
  return (
    '<figure><div class="wide"><picture>'
    f'<source srcset="{link(dark)}" media="(prefers-color-scheme: dark)">'
    f'<img src="{link(light)}" width="{pixels * 96 // theme.DPI}" alt="{text(caption)}">'
    '</picture></div>'
    f'<figcaption>{text(caption)}</figcaption></figure>'
  )


# Long texts.

EDGE, AROUND = 240, 160   # bytes that are shown at either end, and on either side of what is marked


def excerpt(data: bytes, spans: Sequence[tuple[int, int]]) -> str:
  """A text with these spans of bytes marked; of a long one the ends and what is about the marks."""
  shown = merge([(0, EDGE), (len(data) - EDGE, len(data)),
                 *((low - AROUND, high + AROUND) for low, high in spans)], len(data))
  parts, at = [], 0
  for low, high in shown:
    if low > at:
      parts.append(left_out(low - at))
    at = low
    for start, stop in merge(spans, len(data)):
      if start >= high or stop <= low:
        continue
      parts += [text(data[at:start]), f'<mark>{text(data[max(start, low):min(stop, high)])}</mark>']
      at = min(stop, high)
    parts.append(text(data[at:high]))
    at = high
  return ''.join(parts)


def left_out(count: int, of: str = 'bytes') -> str:
  return f'<span class="left"> \u2026 {count:,} {of} \u2026 </span>'


def merge(spans: Sequence[tuple[int, int]], length: int) -> list[tuple[int, int]]:
  """Spans in their order, within the text, those that touch made one."""
  found: list[tuple[int, int]] = []
  for low, high in sorted((max(0, low), min(length, high)) for low, high in spans):
    if low >= high:
      continue
    if found and low <= found[-1][1]:
      found[-1] = found[-1][0], max(found[-1][1], high)
    else:
      found.append((low, high))
  return found
