"""The reader of compiled programs, on programs written by hand and on compiled ones."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from longctx import assembly, configuration, train
from longctx.parallel import hlo, hlo_exchanges, hlo_work

# A ring of 4 devices: 7 turns, each hides one exchange behind a kernel and shows two.
RING = """HloModule ring, is_scheduled=true, num_partitions=4

%fused_dot (a: f32[8,16], b: f32[16,4]) -> f32[8,4] {
  %a = f32[8,16]{1,0} parameter(0)
  %b = f32[16,4]{1,0} parameter(1)
  ROOT %dot.1 = f32[8,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%fused_add (a: f32[8,16]) -> f32[8,16] {
  %a = f32[8,16]{1,0} parameter(0)
  ROOT %add.9 = f32[8,16]{1,0} add(%a, %a)
}

%less (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %lt.1 = pred[] compare(%a, %b), direction=LT
}

%body (p: (s32[], f32[8,16], s32[])) -> (s32[], f32[8,16], s32[]) {
  %p = (s32[], f32[8,16]{1,0}, /*index=2*/s32[]) parameter(0)
  %three = s32[] constant(3)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,16]{1,0} get-tuple-element(%p), index=1
  %limit = s32[] get-tuple-element(%p), index=2
  %hidden-start = (f32[8,16]{1,0}, f32[8,16]{1,0}) collective-permute-start(%x), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %kernel = f32[8,16]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"flops":1000,"bytes_accessed":5}}}
  %hidden-done = f32[8,16]{1,0} collective-permute-done(%hidden-start)
  %shown-start = (f32[8,16]{1,0}, f32[8,16]{1,0}) collective-permute-start(%hidden-done), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %cheap = f32[8,16]{1,0} fusion(%kernel), kind=kLoop, calls=%fused_add
  %buffer = f32[8,16]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %shown-done = f32[8,16]{1,0} collective-permute-done(%shown-start)
  %gather = f32[32,16]{1,0} all-gather(%cheap), replica_groups=[1,4]<=[4], dimensions={0}
  %copied = s32[] copy(%i)
  %next = s32[] add(%three, %copied)
  ROOT %t = (s32[], f32[8,16]{1,0}, s32[]) tuple(%next, %shown-done, %limit)
}

%condition (p: (s32[], f32[8,16], s32[])) -> pred[] {
  %p = (s32[], f32[8,16]{1,0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=2
  ROOT %wrapped = pred[] fusion(%i, %n), kind=kLoop, calls=%less
}

ENTRY %main (x: f32[8,16], w: f32[16,4]) -> f32[8,4] {
  %x = f32[8,16]{1,0} parameter(0)
  %w = f32[16,4]{1,0} parameter(1)
  %two = s32[] constant(2)
  %limit = s32[] constant(LIMIT)
  %reduce-start = f32[8,16]{1,0} all-reduce-start(%x), replica_groups={{0,1},{2,3}}, to_apply=%fused_add
  %first = (s32[], f32[8,16]{1,0}, s32[]) tuple(%two, %x, %limit)
  %loop = (s32[], f32[8,16]{1,0}, s32[]) while(%first), condition=%condition, body=%body
  %reduced = f32[8,16]{1,0} all-reduce-done(%reduce-start)
  %y = f32[8,16]{1,0} get-tuple-element(%loop), index=1
  ROOT %out = f32[8,4]{1,0} fusion(%y, %w), kind=kOutput, calls=%fused_dot
}
"""
MESH = {'data': 2, 'seq': 2}


def ring(limit: int = 21) -> hlo.Program:
  return hlo.parse(RING.replace('LIMIT', str(limit)))


def loop_of(program: hlo.Program) -> tuple:
  body = program.computations[program.entry]
  return body, next(x for x in body if x.opcode == 'while')


@pytest.mark.parametrize('limit, turns', [(21, 7), (20, 6), (22, 7), (3, 1), (2, 0), (-5, 0)])
def test_a_loop_turns_while_its_counter_is_below_the_limit(limit, turns):
  program = ring(limit)   # for (i = 2; i < limit; i += 3)
  assert hlo.trip_count(program, *loop_of(program)) == turns


@pytest.mark.parametrize('old, new', [
    ('%limit = s32[] constant(LIMIT)', '%limit = s32[] custom-call(%x), custom_call_target="f"'),
    ('%two = s32[] constant(2)', '%two = s32[] custom-call(%x), custom_call_target="f"'),
    ('%next = s32[] add(%three, %copied)', '%next = s32[] multiply(%three, %copied)'),
    ('tuple(%next, %shown-done, %limit)', 'tuple(%next, %shown-done, %next)'),
    ('direction=LT', 'direction=NE')])
def test_a_loop_of_unknown_length_is_said_to_be_unknown(old, new):
  program = hlo.parse(RING.replace(old, new).replace('LIMIT', '21'))
  assert hlo.trip_count(program, *loop_of(program)) is None
  done = hlo_work.work(program)
  assert (done.flops, done.unknown_loops) == (1000 + 2 * 8 * 16 * 4, 1)   # its body once


def test_the_compilers_own_trip_count_is_taken():
  said = 'body=%body, backend_config={"known_trip_count":{"n":"11"}}'
  program = hlo.parse(RING.replace('body=%body', said).replace('LIMIT', '21'))
  assert hlo.trip_count(program, *loop_of(program)) == 11


def test_exchanges_of_the_ring():
  rows = {x.name: x for x in hlo_exchanges.exchanges(ring(), MESH)}
  shard = 8 * 16 * 4
  facts = {name: (x.kind, x.axis, x.group, x.bytes, x.times, x.exposed, x.split)
           for name, x in rows.items()}
  assert facts == {
      'hidden-start': ('collective-permute', 'data+seq', 4, shard, 7, False, True),
      'shown-start': ('collective-permute', 'data+seq', 4, shard, 7, True, True),
      'gather': ('all-gather', 'data+seq', 4, 3 * shard, 7, True, False),
      'reduce-start': ('all-reduce', 'seq', 2, shard, 1, False, True)}   # behind the loop


def test_a_loop_without_products_hides_nothing():
  program = hlo.parse(RING.replace('"tpu_custom_call"', '"AllocateBuffer"').replace('LIMIT', '21'))
  rows = {x.name: x.exposed for x in hlo_exchanges.exchanges(program, MESH)}
  assert rows['reduce-start'] and rows['hidden-start']


def test_notes_over_several_lines_and_threads_of_their_own_change_nothing():
  """As TPUs' programs have them; a closing brace in the first column is not the end."""
  notes = 'frontend_attributes={kernel_metadata={\n"blocks":"{\\"block_q\\": 1024}"\n}}, backend'
  text = RING.replace('"tpu_custom_call", backend', f'"tpu_custom_call", {notes}')
  text = text.replace('%b), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n}',
                      '%b), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n'
                      '}, execution_thread="sparsecore"')
  assert text.count('\n}}, backend') == text.count('}, execution_thread') == 1
  program = hlo.parse(text.replace('LIMIT', '21'))
  plain = ring()
  assert {name: [x.name for x in body] for name, body in program.computations.items()} == {
      name: [x.name for x in body] for name, body in plain.computations.items()}
  assert hlo_exchanges.exchanges(program, MESH) == hlo_exchanges.exchanges(plain, MESH)
  assert hlo_work.work(program) == hlo_work.work(plain)


def test_work_of_the_ring():
  assert hlo_work.work(ring()) == (7 * 1000 + 2 * 8 * 16 * 4, 0, 0)
  silent = hlo.parse(RING.replace('"flops":1000,', '').replace('LIMIT', '21'))
  assert hlo_work.work(silent) == (2 * 8 * 16 * 4, 0, 1)


# TPU: an exchange that begins in one fusion, goes on in one that computes, ends in a third; and the
# generic form, by a computation of its own.
CHAINED = """HloModule chained, is_scheduled=true

%begin (a: bf16[4,8]) -> (bf16[4,8], bf16[8,8]) {
  %a = bf16[4,8]{1,0} parameter(0)
  %all-gather.1 = bf16[8,8]{1,0} all-gather(%a), channel_id=3, replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}, dimensions={0}, frontend_attributes={chain_id="5"}
  ROOT %custom-call.1 = (bf16[4,8]{1,0}, bf16[8,8]{1,0:S(1)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%middle (a: bf16[4,8], l: bf16[8,8], r: bf16[8,8]) -> bf16[8,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %l = bf16[8,8]{1,0} parameter(1)
  %r = bf16[8,8]{1,0} parameter(2)
  %all-gather.2 = bf16[8,8]{1,0} all-gather(%a), channel_id=3, replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}, dimensions={0}, frontend_attributes={chain_id="5"}
  ROOT %conv = bf16[8,8]{1,0} convolution(%l, %r), dim_labels=bf_io->bf
}

%finish (a: bf16[4,8]) -> bf16[8,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %all-gather.3 = bf16[8,8]{1,0} all-gather(%a), channel_id=3, replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}, dimensions={0}, frontend_attributes={chain_id="5"}
  ROOT %custom-call.3 = bf16[8,8]{1,0} custom-call(%a, %all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%wrapped (a: bf16[4,8]) -> bf16[4,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  ROOT %all-to-all.1 = bf16[4,8]{1,0} all-to-all(%a), replica_groups={{0,1,2,3}}, dimensions={0}
}

ENTRY %main (a: bf16[4,8], b: bf16[8,8]) -> bf16[8,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %b = bf16[8,8]{1,0} parameter(1)
  %async-start = ((bf16[4,8]), bf16[4,8]{1,0}, s32[]) async-start(%a), calls=%wrapped
  %async-collective-start = (bf16[4,8]{1,0}, bf16[8,8]{1,0}) fusion(%a), kind=kCustom, calls=%begin
  %async-update = ((bf16[4,8]), bf16[4,8]{1,0}, s32[]) async-update(%async-start)
  %async-done = bf16[4,8]{1,0} async-done(%async-update)
  %y = bf16[8,8]{1,0} fusion(%a, %b, %b), kind=kOutput, calls=%middle
  ROOT %async-collective-done = bf16[8,8]{1,0} fusion(%a), kind=kCustom, calls=%finish
}
"""


def test_fused_and_wrapped_exchanges_count_once():
  facts = [(x.kind, x.axis, x.bytes, x.exposed, x.split)
           for x in hlo_exchanges.exchanges(hlo.parse(CHAINED), MESH)]
  assert facts == [('all-to-all', 'data+seq', 64 * 3 // 4, True, True),   # done before the product
                   ('all-gather', 'data', 64, False, True)]
  late = CHAINED.replace('  %y = bf16[8,8]{1,0} fusion(%a, %b, %b), kind=kOutput, calls=%middle\n', '')
  assert [x.exposed for x in hlo_exchanges.exchanges(hlo.parse(late), MESH)] == [True, True]


# TPU: each of four keeps a quarter of the sum.
SCATTERED = """HloModule scattered, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.1.clone (a: f32[8,16]) -> f32[2,16] {
  %a = f32[8,16]{1,0} parameter(0)
  %all-reduce.5 = f32[8,16]{1,0} all-reduce(%a), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %partition-id = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %slice = f32[2,16]{1,0} dynamic-slice(%all-reduce.5, %partition-id, %zero), dynamic_slice_sizes={2,16}
}

ENTRY %main (a: f32[8,16]) -> f32[2,16] {
  %a = f32[8,16]{1,0} parameter(0)
  ROOT %fusion = f32[2,16]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1.clone, metadata={op_name="jit(f)/sum"}
}
"""


def test_a_fused_reduce_scatter_is_one():
  found = hlo_exchanges.exchanges(hlo.parse(SCATTERED), dict(data=2, seq=4, model=1))
  assert [(x.kind, x.axis, x.group, x.bytes, x.exposed, x.where) for x in found] == [
      ('reduce-scatter', 'seq', 4, 8 * 16 * 4 * 3 // 4, True, 'jit(f)/sum')]


@pytest.mark.parametrize('written, groups', [
    ('replica_groups={{0,2},{1,3}}', [[0, 2], [1, 3]]),
    ('replica_groups={}', [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ('source_target_pairs={{0,4},{4,0}}', [[0, 4], [4, 0]]),
    ('replica_groups=[2,4]<=[8]', [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ('replica_groups=[4,2]<=[2,2,2]T(0,2,1)', [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
    ("replica_groups=mesh['a'=4,'b'=2], device_ids=([4,2]T(1,0)) {'b'}",
     [[0, 2], [4, 6], [1, 3], [5, 7]]),
    ('no groups', [])])
def test_groups_in_every_form(written, groups):
  assert hlo_exchanges.groups(f'channel_id=1, {written}, dimensions={{0}}', 8) == groups


def test_axes_are_those_along_which_a_group_differs():
  mesh = {'data': 2, 'seq': 4}
  axis = lambda *groups: hlo_exchanges.axes_of(list(groups), mesh)
  assert axis([0, 1, 2, 3], [4, 5, 6, 7]) == 'seq'
  assert axis([0, 2], [1, 3], [4, 6], [5, 7]) == 'seq'      # a part of it
  assert axis([0, 4], [1, 5], [2, 6], [3, 7]) == 'data'
  assert axis([0, 1], [0, 4]) == 'data+seq'
  assert axis([0], [1]) == 'none'
  assert axis() == axis([0, 9]) == '?'


@pytest.mark.parametrize('size, kernel, stride, pad, spread, kernel_spread', [
    (8, 3, 1, (0, 0), 1, 1), (8, 3, 2, (1, 1), 1, 1), (5, 4, 3, (3, 3), 4, 1),
    (6, 3, 1, (2, 2), 1, 2), (4, 4, 3, (0, 0), 4, 1)])
def test_convolutions_count_the_products_that_are_made(size, kernel, stride, pad, spread,
                                                      kernel_spread):
  B, I, O = 2, 3, 5   # noqa: E741
  def convolve(x, w):
    return lax.conv_general_dilated(x, w, (stride,), [pad], (spread,), (kernel_spread,))
  args = jnp.ones((B, I, size)), jnp.ones((O, I, kernel))
  # With all ones each output is the number of products that made it.
  products = float(convolve(*args).sum())
  text = jax.jit(convolve).lower(*args).as_text(dialect='hlo')
  assert hlo_work.work(hlo.parse(text)).flops == 2 * products


# Compiled programs.

mesh_of = functools.partial(jax.make_mesh, axis_types=(AxisType.Auto,) * 2)


def compiled(function, mesh, in_specs, out_specs, *shapes):
  sharded = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, spec))
             for s, spec in zip(shapes, in_specs)]
  mapped = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs,
                         check_vma=False)
  return hlo.parse(jax.jit(mapped).lower(*sharded).compile().as_text())


@pytest.mark.usefixtures('optimized')
def test_a_compiled_ring_in_a_scan_in_a_scan():
  T, D, hops, layers = 64, 32, 3, 5
  mesh = mesh_of((2, 4), ('data', 'seq'))
  def run(x_TD, w_DD):
    def hop(x_TD, _):
      x_TD = lax.ppermute(x_TD, 'seq', [(i, (i + 1) % 4) for i in range(4)])
      return jnp.tanh(x_TD @ w_DD), None
    def layer(x_TD, _):
      x_TD = lax.scan(hop, x_TD, None, length=hops)[0]
      return lax.psum(x_TD, 'data'), None
    return lax.scan(layer, x_TD, None, length=layers)[0]
  program = compiled(run, mesh, (P('seq'), P()), P('seq'), (4 * T, D), (D, D))
  assert program.scheduled
  found = sorted((x.kind, x.axis, x.group, x.bytes, x.times, x.exposed)
                 for x in hlo_exchanges.exchanges(program, dict(mesh.shape)))
  shard = T * D * 4
  # 8 pairs: two rings of 4. A CPU splits no exchange in start and end: all exposed.
  assert found == [('all-reduce', 'data', 2, shard, layers, True),
                   ('collective-permute', 'seq', 8, shard, hops * layers, True)]
  assert hlo_work.work(program) == (2 * T * D * D * hops * layers, 0, 0)
  least = 2 * T * D * 4 * hops * layers   # a product reads and writes its activations
  assert least < hlo_work.traffic(program) < 8 * least


@pytest.mark.usefixtures('optimized')
def test_compiled_collectives_by_their_bytes():
  mesh = mesh_of((2, 4), ('data', 'seq'))
  def run(x):   # [8, 64] on each device
    y = lax.all_gather(x, 'seq', tiled=True)
    z = lax.psum_scatter(y, ('data', 'seq'), tiled=True)
    w = lax.all_to_all(z.reshape(4, 1, 64), 'seq', 0, 0)
    return y.sum() + lax.psum(w, 'data').sum()
  program = compiled(run, mesh, (P('seq'),), P(), (32, 64))
  found = {x.kind: (x.axis, x.bytes) for x in hlo_exchanges.exchanges(program, dict(mesh.shape))}
  row = 64 * 4
  assert found == {'all-gather': ('seq', 3 * 8 * row),
                   'reduce-scatter': ('data+seq', 32 * row * 7 // 8),
                   'all-to-all': ('seq', 4 * row * 3 // 4), 'all-reduce': ('data', 4 * row)}


def test_a_while_loop_that_depends_on_data_is_unknown():
  def run(x, n):
    return lax.fori_loop(0, n, lambda _, x: x @ x, x)
  text = jax.jit(run).lower(jnp.ones((16, 16)), 3).compile().as_text()
  assert hlo_work.work(hlo.parse(text)) == (2 * 16**3, 1, 0)


@pytest.mark.usefixtures('optimized')
@pytest.mark.parametrize('layer_loop, remat', [('unrolled', 'none'), ('scan', 'full')])
def test_flops_of_a_train_step_are_the_models_formula(layer_loop, remat):
  """Dense attention; the formula's 6 a weight and token, and one forward more with remat."""
  config = configuration.base()
  config.data.batch_size, config.data.length = 2, 128
  config.model.update(dict(max_length=128, num_layers=3, embed_dim=64, attention='reference',
                           layer_loop=layer_loop, remat=remat, vocab_size=1100))
  config.mesh.layout = 'single'
  a = assembly.assemble(config)
  text = train.jit_step(a).lower(a.abstract, a.abstract_batch()).compile().as_text()
  done = hlo_work.work(hlo.parse(text))
  tokens, model = 2 * 128, a.model_config
  expected = model.flops_per_token(128) * tokens
  if remat == 'full':
    forward = 2 * model.layer_matrices() + 4 * 128 * model.embed_dim
    # The last product of a layer and that of the attention's values are not made again: nothing
    # in the backward pass asks for them.
    expected += 3 * tokens * (forward - 2 * model.embed_dim * model.widths()['mlp_dim'])
  assert done.unknown_loops == done.unknown_kernels == 0
  assert done.flops == pytest.approx(expected, rel=0.04)   # XLA makes one product again in a scan


def test_every_shape_is_measured():
  assert hlo.num_bytes('(f32[4,8]{1,0:T(8,128)}, bf16[3]{0}, /*index=2*/pred[], s4[10], u32[]{:S(2)})'
                       ) == 128 + 6 + 1 + 5 + 4
  assert hlo_work.main_memory('(f32[4,8]{1,0:T(8,128)S(1)}, f32[2,2]{1,0})') == 16
  kinds = set(itertools.chain(*([kind] for kind, _ in hlo.arrays('f8e4m3fn[2] f64[] c64[1]'))))
  assert kinds == {'f8e4m3fn', 'f64', 'c64'}


def test_a_text_that_is_no_program_is_refused():
  with pytest.raises(ValueError, match='ENTRY'):
    hlo.parse('HloModule nothing\n')
