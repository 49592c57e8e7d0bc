"""One training step on one long document, over eight virtual devices of a CPU and on one.

    python experiments/01_cost_of_attention/long_step.py --length=131072              # hours of one core's work
    python experiments/01_cost_of_attention/long_step.py --length=131072 --devices=1 --loss_only
    python experiments/01_cost_of_attention/long_step.py --length=131072 --compile_only

4 layers, d 256, 4 query and 2 kv heads, every token sees all before it. Prints one JSON line: the loss of
the first batch, seconds, compiled temporary memory of a device, peak resident memory of the process.
"""

import argparse
import json
import os
import pathlib
import resource
import sys
import time

parser = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('--length', type=int, default=32_768)
parser.add_argument('--devices', type=int, default=8)
parser.add_argument('--loss_only', action='store_true', help='the forward pass alone')
parser.add_argument('--compile_only', action='store_true')
args = parser.parse_args()
os.environ.update(JAX_PLATFORMS='cpu', JAX_NUM_CPU_DEVICES=str(args.devices))
ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

from configs import ring_32k  # noqa: E402
from longctx import assembly, train  # noqa: E402
from longctx.parallel import host_memory, mesh  # noqa: E402
from longctx.training.loss import cross_entropy  # noqa: E402

host_memory.return_freed_memory()
config = ring_32k.get_config()
config.data.length = config.model.max_length = args.length
config.model.embed_dim = 256
config.model.mlp_block = 1024   # a device's memory at 131,072 tokens: 378 instead of 657 MiB
config.mesh.order = 'zigzag'   # one document
if args.devices == 1:
  config.mesh.update(dict(seq=1, layout='single', order='contiguous'))
else:
  config.mesh.seq = args.devices
a = assembly.assemble(config)

sources = sorted(pathlib.Path(os.__file__).parent.glob('*.py'))
text = np.frombuffer(b''.join(s.read_bytes() for s in sources), np.uint8).astype(np.int32)
text = np.resize(text, args.length + 1)[None]
length = np.arange(args.length, dtype=np.int32)[None]
batch = dict(tokens=text[:, :-1], targets=text[:, 1:],
             loss_mask=np.ones_like(length, np.float32), positions=length,
             segment_ids=np.ones_like(length), document_start=length == 0)
batch = a.layout.place(a.layout.lay_out(batch), 1)


def loss(params, batch):
  model = nnx.merge(a.graphdef, params)
  placed = dict(places=(batch['index'], batch['start'])) if 'index' in batch else {}
  hidden, _ = model(batch['tokens'], None, positions_BT=batch['positions'],
                    segment_ids_BT=batch['segment_ids'], **placed)
  weights = batch['loss_mask'] / batch['loss_mask'].sum()
  size = a.layout.size
  total, _ = cross_entropy(hidden, model.output_embedding_VD(), batch['targets'], weights,
                           chunk=a.parts.loss.chunk, batch_shards=size('batch'),
                           length_shards=size('length'))
  return total


if args.loss_only:
  program = jax.jit(mesh.under(a.layout, loss)).lower(a.abstract.params, batch)
else:
  program = train.jit_step(a).lower(a.abstract, batch)
compiled = program.compile()
found = dict(length=args.length, devices=args.devices, loss_only=args.loss_only,
             temp_mib_a_device=round(compiled.memory_analysis().temp_size_in_bytes / 2 ** 20, 1))
if not args.compile_only:
  state, begin = a.init(), time.perf_counter()
  result = compiled(state.params, batch) if args.loss_only else compiled(state, batch)[1]['loss']
  found |= dict(loss=float(result), seconds=round(time.perf_counter() - begin, 1))
found['peak_resident_mib'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
print(json.dumps(found), flush=True)
