"""python launch/scaling.py [--topologies=v5e:8x8] [--lengths=131072] [--table_only]

Weak scaling of Llama-3-8B's training step, by compilation: each length on more and more chips, with as many
tokens a chip, since rows are added (`mesh.data`) and a row stays cut in as many pieces (`mesh.seq`). What
the TPU's own compiler says of each step is a line of launch/scaling.jsonl, and is not asked again; the table
goes into launch/README.md. Nothing is run: seconds are sums over the published peaks (parallel/chips.py), of the
arithmetic by the model's formula, since kernels tell a compiler no FLOPs, and what remat does again.
Held by: tests/test_launch_fits.py.
"""

import argparse
import json

import fits

RESULTS = fits.HERE / 'scaling.jsonl'
TOPOLOGIES = ('v5e:8x8', 'v5e:16x16', 'v5p:4x4x4', 'v5p:4x8x8', 'v5p:8x8x8')
PIECES = {2**17: 16, 2**20: 64, 2**22: 256}   # of a row; where there are as many chips
REMAT = 4 / 3   # all arithmetic over that of the forward and the backward pass, where all of the former is done again
BEGIN, END = '<!-- the table of scaling.py -->', '<!-- its end -->'


def cut(topology: str, length: int) -> dict[str, int]:
  """How a batch lies on the mesh: a row in `seq` pieces, `data` rows."""
  chips = fits.chips_of(topology)
  pieces = min(PIECES[length], chips)
  return dict(data=chips // pieces, seq=pieces)


def measure(topology: str, length: int) -> dict:
  """Of one compilation: bytes of a device, bytes that it sends, seconds of a step at the published peaks."""
  mesh = cut(topology, length)
  found = fits.told('compile', topology, '8B', length, **mesh)
  line = dict(topology=topology, length=length, **mesh, fits=found['fits'],
              gib=round(found['memory']['total'] / 2**30, 2), of=round(found['memory']['chip'] / 2**30, 2),
              compile_seconds=round(found['compile_seconds']))
  if 'roofline' not in found:   # it does not fit: the compiler says no more
    return line
  roofline, sent = found['roofline'], found['wire_bytes']
  useful = roofline['utilization'] * roofline['least']   # seconds of the model's own arithmetic
  seconds = roofline['seconds'] | dict(compute=max(roofline['seconds']['compute'], REMAT * useful))
  exposed = sum(x['exposed_bytes'] for x in found['exchanges'])
  waits = seconds['wire'] * exposed / sent
  least = max(seconds['compute'], seconds['memory'], seconds['wire'] - waits) + waits
  return line | dict(sent_bytes=sent, exposed_bytes=exposed, seconds=seconds, least=least, utilization=useful / least)


def table(rows: list[dict]) -> str:
  lines = ['| tokens of a row | slice | rows x pieces | tokens a chip | memory, GiB of | sent, GiB a step | of it exposed '
           '| s computing, memory, links | at most MFU |', '|---' * 9 + '|']
  order = lambda r: (r['length'], TOPOLOGIES.index(r['topology']))
  for r in sorted(rows, key=order):
    head = (f'| {fits.name_of(r["length"])} | {r["topology"]} | {r["data"]} x {r["seq"]} | '
            f'{r["length"] // r["seq"]:,} | {r["gib"]:.1f} of {r["of"]:.0f} | ')
    if 'least' not in r:
      lines.append(f'{head}does not fit | | | |')
      continue
    s = r['seconds']
    lines.append(f'{head}{r["sent_bytes"] / 2**30:.1f} | {r["exposed_bytes"] / 2**30:.2f} | {s["compute"]:.3g}, '
                 f'{s["memory"]:.3g}, {s["wire"]:.3g} | {r["utilization"]:.0%} |')
  return '\n'.join(lines)


def read() -> list[dict]:
  return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--topologies', default=','.join(TOPOLOGIES))
  parser.add_argument('--lengths', default=','.join(map(str, PIECES)))
  parser.add_argument('--table_only', action='store_true', help='write the table of what was compiled')
  given = parser.parse_args()
  done = {(r['topology'], r['length']) for r in read()}
  for length in map(int, given.lengths.split(',') * (not given.table_only)):
    for topology in given.topologies.split(','):
      if (topology, length) not in done:
        line = json.dumps(measure(topology, length))
        with open(RESULTS, 'a') as file:
          file.write(line + '\n')
        print(line, flush=True)
  fits.write_table(fits.README, table(read()), BEGIN, END)
  print(table(read()))


if __name__ == '__main__':
  main()
