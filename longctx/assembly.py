"""From a checked config to the things a run is made of: mesh, model, optimiser, state.

`assemble` refuses what cannot work (a mesh that does not divide, a row longer than the model's
context, a state that would outgrow its room) before anything is compiled.
Held by: tests/test_train.py, tests/test_mistakes.py.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx

from longctx.configuration import FORMS, MODELS, Parts, parts
from longctx.data import examples, masking, stream
from longctx.data.tokenizer import Tokenizer, load_tokenizer
from longctx.errors import check
from longctx.evaluation import held_out, perplexity
from longctx.models import attention_layer
from longctx.parallel import chips, costs, device_memory, layouts, mesh, sequence
from longctx.training import optim, step, workdir
from longctx.training.checkpoint import Checkpoints


class Assembly(NamedTuple):
  """What a config becomes; everything here is static or abstract, nothing is allocated."""

  parts: Parts
  layout: mesh.Layout
  tokenizer: Tokenizer
  graphdef: nnx.GraphDef
  model_config: Any
  state_grows: bool
  tx: optax.GradientTransformation
  schedule: optax.Schedule
  init: Callable[[], step.TrainState]      # jitted, sharded
  abstract: step.TrainState                # ShapeDtypeStructs with shardings
  advice: str = ''                         # why mesh.strategy='auto' became what it is

  def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
    """What the stream yields, as shapes with shardings."""
    rows, length = self.parts.data.batch_size, self.parts.data.length
    shapes, layout = stream.shapes(self.parts.data), self.layout
    if layout.lays_out(length):
      length = layouts.padded_length(length, layout.order, layout.size('length'), layout.unit)
      shapes = {name: ((rows, length), dtype)
                for name, dtype in (stream.DTYPES | layouts.DTYPES).items()}
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding('batch', 'length'))
            for name, (shape, dtype) in shapes.items()}

  def truncated(self, segments: int) -> 'Assembly':
    """The same, whose gradients go back through so many segments of a document at most."""
    truncate = min(segments, self.model_config.truncate or segments)
    config = dataclasses.replace(self.model_config, truncate=truncate)
    model = nnx.eval_shape(lambda: make_model(config, jax.random.key(0)))
    return self._replace(graphdef=nnx.split(model, nnx.Param)[0], model_config=config)


def make_model(config: Any, key: jax.Array) -> nnx.Module:
  return MODELS[config.name][1](config, rngs=nnx.Rngs(key))


def assemble(config: Any, devices: list | None = None) -> Assembly:
  """Builds and checks; ConfigError names the first thing that cannot work."""
  p = parts(config)
  advice = ''
  if p.mesh.strategy == 'auto':
    chosen, advice = choose_strategy(p, devices or jax.devices())
    p = p._replace(mesh=chosen)
  layout = mesh.make_layout(p.mesh, devices)
  tokenizer = load_tokenizer(p.data.tokenizer)
  check(p.model.vocab_size in (0, tokenizer.vocab_size) or
        p.model.vocab_size > tokenizer.vocab_size,
        f'model.vocab_size={p.model.vocab_size}: the tokenizer has {tokenizer.vocab_size} '
        'symbols; give at least as many, or 0 for as many')
  model_config = p.model.resolved(tokenizer.vocab_size)
  carries = p.data.form == 'segments'
  new_model = functools.partial(make_model, model_config)
  model = nnx.eval_shape(lambda: new_model(jax.random.key(0)))
  graphdef, abstract_params = nnx.split(model, nnx.Param)
  _check_shapes(p, model_config, model.state_grows, layout)
  _check_examples(p, model_config, tokenizer, layout)
  _check_evaluation(p, model, layout)
  layout.params_sharding(abstract_params)   # refuses a mesh that does not divide a parameter

  make_tx = functools.partial(optim.make_optimizer, p.optimizer, p.run.num_steps)
  init = functools.partial(step.init_state, new_model, make_tx, seed=p.seed,
                           batch_size=p.data.batch_size, carries=carries, ema=p.optimizer.ema,
                           spike_window=p.run.spike_window if p.run.spike_sigmas else 0)
  shapes = jax.eval_shape(init)
  shardings = state_shardings(layout, shapes)
  init = jax.jit(mesh.under(layout, init), out_shardings=shardings,
                 compiler_options=_once(layout))
  abstract = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
  return Assembly(p, layout, tokenizer, graphdef, model_config, model.state_grows,
                  make_tx(abstract_params), optim.make_schedule(p.optimizer, p.run.num_steps),
                  init, abstract, advice)


def check_fits(a: Assembly) -> None:
  """ConfigError, with numbers, if what a run keeps between steps, and a state that it makes in one, are larger
  than a device's memory."""
  devices = [d for d in a.layout.mesh.devices.flat if d.process_index == jax.process_index()]
  sizes = {name: _bytes(part) for name, part in a.abstract._asdict().items()} | _largest_made(a)
  copies = len(devices) if devices[0].platform == 'cpu' else 1   # CPU devices share one memory
  free = device_memory.free_bytes(devices[0])
  largest = ', '.join(f'{name} {copies * size:,}' for name, size in sorted(sizes.items(), key=lambda x: -x[1])[:3])
  check(free is None or copies * sum(sizes.values()) <= free, f'this run needs {copies * sum(sizes.values()):,} bytes '
        f'on {"the host" if copies > 1 or devices[0].platform == "cpu" else "a device"} ({largest}), and '
        f'{devices[0].device_kind} has {free or 0:,} left; set a smaller model or data.batch_size (where memory or a '
        'state is the largest, smaller model.memory_* or perplexity.batch_size too), or give more devices; '
        '--mode=plan counts them without a device')


def _bytes(tree: Any) -> int:
  """Of one device's part."""
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _largest_made(a: Assembly) -> dict[str, int]:
  """{name: bytes} of the larger of two states: of a step whose rows carry none, and of an evaluation."""
  p, layout, segment = a.parts, a.layout, getattr(a.model_config, 'segment', 0)

  def state(rows: int, capacity: int) -> int:
    empty = lambda params: nnx.merge(a.graphdef, params).init_state(rows, capacity=capacity)
    shapes = jax.eval_shape(mesh.under(layout, empty), a.abstract.params)
    return _bytes(jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes,
                               attention_layer.shardings(layout, shapes)))

  made = {}
  if segment and p.data.form != 'segments':   # other models make none, or a small one
    shortest = segment * min(p.run.curriculum, default=0) or p.data.length
    made['state of a step'] = state(p.data.batch_size // p.run.accumulate * (p.data.length // shortest), 0)
  if p.data.form not in held_out.FORMS:
    length = perplexity.context_length(p.perplexity, nnx.merge(a.graphdef, a.abstract.params))
    if segment or not length or length > perplexity.segment_size(p.perplexity, length, layout):
      made['state of an evaluation'] = state(p.perplexity.batch_size, length)
  return dict(sorted(made.items(), key=lambda x: x[1])[-1:])


def choose_strategy(p: Parts, devices: list) -> tuple[mesh.Config, str]:
  """The mesh with the strategy that costs the least by parallel/costs.py, and why."""
  device_kind, m = devices[0].device_kind, p.mesh
  chip = chips.chip_of(device_kind)
  if m.seq == 1 or not getattr(p.model, 'windows', ()) or chip is None or not chip.link:
    why = ('mesh.seq is 1' if m.seq == 1 else 'no layer attends' if not p.model.windows else
           f'nothing is published of {device_kind}')
    return dataclasses.replace(m, strategy='ring'), f'mesh.strategy: ring ({why})'
  widths = p.model.widths()
  windows = p.model.windows
  data = m.data if m.data > 0 else max(1, len(devices) // (m.seq * m.model))
  best, why = costs.recommend(costs.Shape(
      batch=max(1, p.data.batch_size // p.run.accumulate // data),
      tokens=-(-p.data.length // m.seq), heads=max(1, p.model.num_heads // m.model),
      kv_heads=max(1, widths['num_kv_heads'] // m.model), head_dim=widths['head_dim'],
      bytes_per_element=2 if p.model.dtype == 'bfloat16' else 4, devices=m.seq,
      reach=0 if 0 in windows else max(windows), order=m.order, unit=m.unit), chip)
  return (dataclasses.replace(m, strategy=best.strategy, ulysses=best.ulysses),
          f'mesh.strategy: {why}, on {chip.name}')


def _once(layout: mesh.Layout) -> dict[str, Any] | None:
  """For a program that runs once: on a CPU a third of the time that its compilation takes."""
  if layout.mesh.devices.flat[0].platform != 'cpu':
    return None
  return {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}


def _check_shapes(p: Parts, model: Any, state_grows: bool, layout: mesh.Layout) -> None:
  check(not model.max_length or p.data.length <= model.max_length,
        f'data.length={p.data.length}: must be at most model.max_length={model.max_length}, '
        'the longest context the model is made for')
  check(p.data.form != 'segments' or not state_grows,
        f"data.form='segments': a document of any length is carried on, but with model.window="
        f'{getattr(model, "window", None)} the state grows with it; give every layer a window')
  check(p.data.form != 'segments' or getattr(model, 'position', '') != 'learned',
        "data.form='segments': a document of any length is carried on, and model.position='learned' "
        "has none beyond model.max_length; set model.position='rope'")
  check(p.data.batch_size % p.run.accumulate == 0,
        f'run.accumulate={p.run.accumulate}: must divide data.batch_size={p.data.batch_size}')
  micro = p.data.batch_size // p.run.accumulate
  check(micro % layout.size('batch') == 0,
        f'data.batch_size={p.data.batch_size} / run.accumulate={p.run.accumulate} = {micro} rows '
        f'a microbatch: must be a multiple of mesh.data={layout.size("batch")}')
  segment = getattr(model, 'segment', 0)
  if segment:
    check(p.data.length % segment == 0, f'model.segment={segment}: must divide data.length='
          f'{p.data.length}; a row is read in whole segments')
    check(layout.order == 'contiguous' and not layout.lays_out(p.data.length),
          f"mesh.order={layout.order!r} with data.length={p.data.length} over mesh.seq="
          f"{layout.size('length')}: segments are read in their order; set mesh.order='contiguous' "
          'and a data.length that mesh.seq divides')
  _check_curriculum(p, segment)
  if layout.lays_out(p.data.length):
    recurrent = [m for m in getattr(model, 'layers', ()) if m != 'attention']
    check(layout.order == 'contiguous' or not recurrent,
          f"mesh.order={layout.order!r}: layers of {', '.join(recurrent)} read the tokens in their "
          "order; set mesh.order='contiguous'")
    check(p.data.form == 'packed', f"mesh.order={layout.order!r} with data.length={p.data.length} "
          f"over mesh.seq={layout.size('length')}: rows of data.form={p.data.form!r} are read in "
          "their order; set mesh.order='contiguous' and a data.length that mesh.seq divides")
  check(getattr(model, 'remat', '') != 'offload' or mesh.has_host_memory(layout),
        "model.remat='offload': layer inputs go to the memory of the host, and these devices have "
        "no other, or none that they reach; set model.remat='full'")
  for field, dim in (('num_heads', 'heads'), ('mlp_dim', 'mlp'),
                     ('hidden_dim', 'recurrent'), ('embed_dim', 'embed')):
    if hasattr(model, field):
      mesh.check_divides(f'model.{field}', getattr(model, field), dim, layout)
  if hasattr(model, 'num_kv_heads'):
    cuts = layout.size('heads')
    check(model.num_kv_heads % cuts == 0 or cuts % model.num_kv_heads == 0,
          f'model.num_kv_heads={model.num_kv_heads}: mesh.model={cuts} must divide it, or be a '
          'multiple of it (each device then has the kv head of its query heads)')
    sequence.check_heads(layout, model.num_heads // cuts, max(1, model.num_kv_heads // cuts))


def _check_examples(p: Parts, model: Any, tokenizer: Tokenizer, layout: mesh.Layout) -> None:
  """What rows of examples, and hidden tokens, ask of a model."""
  form = p.data.form
  if form == 'pairs':
    check(p.data.source_length <= model.source_length, f'data.source_length={p.data.source_length}: must '
          f'be at most model.source_length={model.source_length}, the longest source it is made for')
    mesh.check_divides('data.source_length', p.data.source_length, 'length', layout)
  if form == 'masked':
    check(model.vocab_size > masking.mask_symbol(tokenizer), f'model.vocab_size={model.vocab_size}: must '
          f'be at least {tokenizer.vocab_size + 1}, the {tokenizer.vocab_size} symbols of the tokenizer '
          'and the mask; or 0 for as many')
  if form == 'labels':
    found = examples.num_classes(p.data)
    check(model.num_classes == found, f'model.num_classes={model.num_classes}: the data has {found} '
          f'classes; set model.num_classes={found}')


def _check_curriculum(p: Parts, segment: int) -> None:
  stages = p.run.curriculum
  if not stages:
    return
  check(bool(segment), f'run.curriculum={stages}: counts the segments of a row, and model.name='
        f"{p.model.name!r} has none; set model.name='memory', or run.curriculum=()")
  whole = p.data.length // segment
  for stage in stages:
    check(stage >= 1 and whole % stage == 0, f'run.curriculum={stages}: each must divide the '
          f'{whole} segments of a row (data.length={p.data.length} / model.segment={segment})')


def _check_evaluation(p: Parts, model: Any, layout: mesh.Layout) -> None:
  """What would end the run only after its last step."""
  e = p.perplexity
  length = perplexity.context_length(e, model)
  check(not length or e.stride <= length, f'perplexity.stride={e.stride}: must be at most the '
        f'evaluated length, which is model.max_length={length}')
  check(not e.use_ema or p.optimizer.ema > 0, 'perplexity.use_ema=True: no averaged parameters are '
        'kept with optimizer.ema=0.0; set optimizer.ema=0.999 or so, or perplexity.use_ema=False')
  check(not e.short_context or p.data.form not in held_out.FORMS, f'perplexity.short_context={e.short_context}: '
        f'tells of running text, and data.form={p.data.form!r} has none; set perplexity.short_context=0')
  mesh.check_divides('perplexity.batch_size', e.batch_size, 'batch', layout)
  mesh.check_divides('perplexity.segment', e.segment, 'length', layout)
  if p.eval.tasks:
    check(p.model.name not in FORMS, f'eval.tasks={p.eval.tasks}: are texts to carry on, and '
          f"model.name={p.model.name!r} is no language model; set eval.tasks=(), which scores held-out "
          'examples')
    mesh.check_divides('eval.batch_size', p.eval.batch_size, 'batch', layout)
    mesh.check_divides('eval.segment', p.eval.segment, 'length', layout)


def state_shardings(layout: mesh.Layout, shapes: step.TrainState) -> step.TrainState:
  """Parameters by their dims, optimiser moments like their parameters, carried state by rows."""
  whole = layout.sharding()

  def like_a_parameter(leaf):
    """Moments have their parameter's dims; factored ones (adafactor) are small and stay whole."""
    if not isinstance(leaf, nnx.Variable):
      return whole
    if not hasattr(leaf.get_value(), 'shape'):   # a MaskedNode: muon keeps no moment of it
      return leaf
    shape, dims = leaf.get_value().shape, leaf.get_metadata().get('dims')
    if dims is None or len(shape) < len(dims):
      return leaf.replace(whole)
    dims = (None,) * (len(shape) - len(dims)) + tuple(dims)
    spec = layout.spec(*dims, shape=shape)
    fits = all(axis is None or n % layout.mesh.shape[axis] == 0 for n, axis in zip(shape, spec))
    return leaf.replace(layout.sharding(*dims, shape=shape) if fits else whole)

  is_variable = lambda x: isinstance(x, nnx.Variable)
  by_dims = lambda tree: jax.tree.map(like_a_parameter, tree, is_leaf=is_variable)
  return step.TrainState(
      step=whole, params=by_dims(shapes.params), opt=by_dims(shapes.opt),
      ema=by_dims(shapes.ema), memory=attention_layer.shardings(layout, shapes.memory),
      bad_in_a_row=whole, skipped=whole, dropout_key=whole,
      recent=jax.tree.map(lambda _: whole, shapes.recent))


def open_checkpoints(parts: Parts, folder: str, read_only: bool) -> Checkpoints:
  return Checkpoints(f'{folder}/checkpoints', keep_last=parts.run.keep_last,
                     keep_best=parts.run.keep_best, read_only=read_only)


def check_same_tokenizer(tokenizer: Tokenizer, meta: dict) -> None:
  """A model reads the tokens of the tokenizer it was trained with, or none."""
  was, now = meta.get('tokenizer'), tokenizer.fingerprint
  check(was == now, f'data.tokenizer: the checkpoint was trained with tokenizer {str(was)[:16]}, '
        f'this one is {now[:16]}; give the same model file back')


def load_parameters(a: Assembly, folder: str, *, use_ema: bool = False,
                    checkpoint: str = 'newest') -> tuple[int, Any]:
  """(step, parameters) of a checkpoint: 'newest' (that can be read), 'best', or its step."""
  check(not use_ema or a.parts.optimizer.ema > 0,
        'use_ema: this run keeps no averaged parameters; train with optimizer.ema=0.999 or so')
  name = 'ema' if use_ema else 'params'
  with open_checkpoints(a.parts, folder, read_only=True) as checkpoints:
    check(bool(checkpoints.steps()), f'--workdir={folder}: no checkpoint there yet; train first: '
          f'python -m longctx.main --config=... --workdir={folder}')
    abstract = {name: getattr(a.abstract, name)}
    if checkpoint == 'newest':
      restored = checkpoints.restore_newest(abstract, partial=True)
    else:
      best = checkpoints.best_step()
      check(checkpoint != 'best' or best is not None, '--checkpoint=best: no checkpoint of '
            f'--workdir={folder} has a validation loss; give newest or a step of '
            f'{", ".join(map(str, checkpoints.steps()))}')
      at = best if checkpoint == 'best' else int(checkpoint)
      restored = checkpoints.restore_step(at, abstract, partial=True)
  check_same_tokenizer(a.tokenizer, restored.meta)
  return restored.step, restored.state[name]


class Trained(NamedTuple):
  """A run's checkpoint, ready to be used."""

  graphdef: nnx.GraphDef
  params: Any
  tokenizer: Tokenizer
  model_config: Any
  layout: mesh.Layout
  step: int


def load_for_inference(folder: str, *, use_ema: bool = False, checkpoint: str = 'newest',
                       seq: int = 1) -> Trained:
  """A run's checkpoint on one device, or on `seq` that share what the model remembers."""
  config = workdir.load_config(folder)
  devices = jax.local_devices()
  check(seq <= len(devices), f'--seq={seq}: there are {len(devices)} devices here; give at most as '
        'many (on a CPU, JAX_NUM_CPU_DEVICES=8 makes eight)')
  config.mesh.update(dict(data=1, seq=seq, model=1, layout='single' if seq == 1 else 'sequence',
                          strategy='ring', ulysses=1, order='contiguous'))
  # Of training and evaluation, which do not happen here: what any mesh can do.
  form = 'packed' if config.data.form == 'segments' else config.data.form
  config.data.update(dict(batch_size=1, form=form, align=False))
  config.run.accumulate, config.perplexity.segment = 1, seq
  if 'eval' in config:   # not in workdirs from before there were tasks
    config.eval.tasks = ()
  a = assemble(config, devices[:seq])
  step, params = load_parameters(a, folder, use_ema=use_ema, checkpoint=checkpoint)
  return Trained(a.graphdef, params, a.tokenizer, a.model_config, a.layout, step)


def check_writes(model: Any, alone: bool = False) -> None:
  """ConfigError where a model cannot carry a text on; `alone`: without a source."""
  check(model.name != 'encoder', "model.name='encoder': sees what follows a token and writes no text; give "
        'the workdir of another model')
  check(not alone or model.name != 'encoder_decoder', "model.name='encoder_decoder': writes what follows "
        'from a source and keeps no conversation; use python -m longctx.generate --source=TEXT')


def host_share(a: Assembly) -> tuple[int, int]:
  """(index, count): which of how many equal shares of a batch's rows this process reads."""
  return a.layout.host_rows(a.parts.data.batch_size)


def builders() -> tuple[int, int]:
  """(index, count): which of the processes that tokenise a corpus together this one is."""
  return jax.process_index(), jax.process_count()


def open_documents(a: Assembly) -> Any:
  """What a run is evaluated on: documents of a split, or rows where examples are learned."""
  if a.parts.data.form in held_out.FORMS:
    return held_out.open_rows(a.parts.data, a.parts.perplexity, a.layout, builders())
  return stream.open_documents(a.parts.data, a.parts.perplexity.split, builders=builders())


