"""Is the LSTM layer as fast as PyTorch's on a CPU: hidden 512, T 512, batch 16, forward and backward?

    python experiments/02_recurrences/lstm_speed.py                # about a minute on an idle machine
    python experiments/02_recurrences/lstm_speed.py --threads=1

Each side is a process with as many threads; they make steps in turn, so that each round is a fair pair
however the machine's speed drifts, and the figure is the median over rounds of the ratio to PyTorch in
the same round. Both give the gradients of the inputs and of all weights of sum(y ** 2), on the same
numbers. The floor is the time that the same FLOPs take as one large product on each side.
Writes lstm_speed.json beside this file.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
SHAPE = dict(length=512, batch=16, width=512)
PAUSE = 0.25   # seconds between turns: the other side's threads stop spinning


def flops(length: int, batch: int, width: int) -> float:
  """Multiply-adds twice, of the two matrices forward, of their two gradients each backward."""
  return 3 * 2 * length * batch * 2 * width * 4 * width


def numbers(length: int, batch: int, width: int):
  import numpy as np
  rng = np.random.default_rng(0)
  weight = lambda: rng.uniform(-1, 1, (width, 4, width)).astype('float32') * width ** -0.5
  return rng.standard_normal((batch, length, width)).astype('float32'), weight(), weight()


def longctx_step(x, w_in, w_hidden):
  from longctx.parallel import host_memory
  host_memory.keep_freed_memory()   # as longctx.main does
  import jax
  import jax.numpy as jnp
  from flax import nnx

  from longctx.models import context, recurrent
  from longctx.parallel import mesh
  width = x.shape[-1]
  config = recurrent.Config(num_layers=1, embed_dim=width, hidden_dim=width, forget_bias=0.0)
  layer = recurrent.Layer(config, width, rngs=nnx.Rngs(0))
  layer.w_in.set_value(jnp.asarray(w_in))
  layer.w_hidden.set_value(jnp.asarray(w_hidden))
  graphdef, params = nnx.split(layer)
  batch, length, _ = x.shape
  here, _ = context.place_tokens(jnp.zeros((batch, length), jnp.int32), None, None, None, None)
  state = layer.init_state(batch)
  total = lambda params, x: (nnx.merge(graphdef, params)(x, state, here)[0] ** 2).sum()
  grad = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
  options = mesh.compiler_options(mesh.make_layout(mesh.Config(layout='single')))
  program = grad.lower(params, jnp.asarray(x)).compile(compiler_options=options)
  x = jnp.asarray(x)
  a, b = jnp.ones((4096, 2048)), jnp.ones((2048, 2048))
  product = jax.jit(jnp.matmul).lower(a, b).compile(compiler_options=options)
  return (lambda: float(jax.block_until_ready(program(params, x))[0]),
          lambda: product(a, b).block_until_ready())


def torch_step(x, w_in, w_hidden):
  import torch
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  width = x.shape[-1]
  module = torch.nn.LSTM(width, width, batch_first=True)
  with torch.no_grad():
    for name, w in (('weight_ih_l0', w_in), ('weight_hh_l0', w_hidden)):
      getattr(module, name).copy_(torch.tensor(w.reshape(width, -1).T.copy()))
    module.bias_ih_l0.zero_(), module.bias_hh_l0.zero_()
  x = torch.tensor(x, requires_grad=True)

  def step():
    module.zero_grad()
    x.grad = None
    total = (module(x)[0] ** 2).sum()
    total.backward()
    return float(total.detach())

  a, b = torch.ones(4096, 2048), torch.ones(2048, 2048)
  return step, lambda: a @ b


def work(side: str) -> None:
  """A worker: for every line 'step' or 'product' on stdin one JSON line."""
  calls = dict(zip(('step', 'product'),
                   {'longctx': longctx_step, 'PyTorch': torch_step}[side](*numbers(**SHAPE))))
  for call in calls.values():
    call()
    call()
  print(json.dumps('ready'), flush=True)
  for line in sys.stdin:
    wall, cpu = time.perf_counter(), time.process_time()
    value = calls[line.strip()]()
    print(json.dumps(dict(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu,
                          value=value if isinstance(value, float) else 0.0)), flush=True)


def start(side: str, threads: int) -> subprocess.Popen:
  cores = sorted(os.sched_getaffinity(0))[:threads]
  env = dict(os.environ, JAX_PLATFORMS='cpu', PYTHONPATH=os.path.dirname(os.path.dirname(HERE)))
  process = subprocess.Popen([sys.executable, __file__, f'--work={side}'], text=True, env=env,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             preexec_fn=lambda: os.sched_setaffinity(0, cores))
  if not process.stdout.readline():
    raise SystemExit(f'{side}: its process ended with status {process.wait()}')
  return process


def measure(rounds: int, threads: int) -> dict:
  sides = {}
  try:
    for side in ('longctx', 'PyTorch'):
      sides[side] = start(side, threads)
    def ask(side, what):
      time.sleep(PAUSE)
      print(what, file=sides[side].stdin, flush=True)
      return json.loads(sides[side].stdout.readline())
    turns = {(side, what): [] for side in sides for what in ('step', 'product')}
    for i in range(rounds):
      for key in list(turns) if i % 2 == 0 else list(turns)[::-1]:
        turns[key].append(ask(*key))
  finally:
    for process in sides.values():
      process.stdin.close()
      process.wait()
  rate = 2 * 4096 * 2048 * 2048
  found = {}
  for side in sides:
    steps = turns[side, 'step']
    ratio = lambda key, steps=steps: statistics.median(
        theirs[key] / ours[key] for ours, theirs in zip(steps, turns['PyTorch', 'step']))
    per_flop = statistics.median(t['wall'] for t in turns[side, 'product']) / rate
    found[side] = dict(
        seconds=statistics.median(t['wall'] for t in steps), floor=per_flop * flops(**SHAPE),
        cpu_seconds=statistics.median(t['cpu'] for t in steps), value=steps[-1]['value'],
        speed_ratio=ratio('wall'), cpu_ratio=ratio('cpu'))
  return dict(threads=threads, rounds=rounds, flops=flops(**SHAPE), sides=found)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--threads', type=int, default=len(os.sched_getaffinity(0)))
  parser.add_argument('--rounds', type=int, default=15)
  parser.add_argument('--out', default=HERE, help='folder for lstm_speed.json')
  parser.add_argument('--work', default='', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.work:
    return work(args.work)
  found = measure(args.rounds, args.threads)
  print(f'{found["flops"] / 1e9:.0f} GFLOP, {args.threads} threads')
  for side, r in found['sides'].items():
    print(f'{side:8} {r["seconds"]:.3f} s ({r["cpu_seconds"]:.3f} s of CPU), floor {r["floor"]:.3f} s; '
          f'speed / PyTorch {r["speed_ratio"]:.2f}, CPU work: PyTorch / it {r["cpu_ratio"]:.2f}; '
          f'sum {r["value"]:.2f}')
  with open(os.path.join(args.out, 'lstm_speed.json'), 'w') as f:
    json.dump(found, f, indent=1)


if __name__ == '__main__':
  main()
