"""The counts of `benchmarks.gpu_program`: programs whose kernels, operations and bytes are known."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.gpu_program import hlo, kernels, roofline, schedule
from benchmarks.gpu_program.cards import CARDS
from jaxgpt.layers import gelu

# As XLA writes it for a GPU, shortened: a product in a loop of 3 turns, whose result is put into its place in a stack;
# a fusion that reads one row; a reduction between devices beside the loop; attention; a transpose.
TEXT = """HloModule jit_step, is_scheduled=true

FileNames
1 "{package}/layers/gelu.py"
2 "{package}/layers/numerics.py"

FunctionNames
1 "forward"

FileLocations
1 {{file_name_id=1 function_name_id=1 line=41 end_line=41 column=1 end_column=9}}
2 {{file_name_id=2 function_name_id=1 line=7 end_line=7 column=1 end_column=9}}

StackFrames
1 {{file_location_id=1 parent_frame_id=1}}
2 {{file_location_id=2 parent_frame_id=2}}

%fused_update (param_0: bf16[3,4,8], param_1: f32[4,8], param_2: s32[]) -> bf16[3,4,8] {{
  %param_0 = bf16[3,4,8]{{2,1,0}} parameter(0)
  %param_1 = f32[4,8]{{1,0}} parameter(1)
  %convert.1 = bf16[4,8]{{1,0}} convert(%param_1)
  %bitcast.1 = bf16[1,4,8]{{2,1,0}} bitcast(%convert.1)
  %param_2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %dus = bf16[3,4,8]{{2,1,0}} dynamic-update-slice(%param_0, %bitcast.1, %param_2, %zero, %zero)
}}

%fused_row (param_0.1: f32[16,64]) -> (bf16[1,64], bf16[64]) {{
  %param_0.1 = f32[16,64]{{1,0}} parameter(0)
  %convert.2 = bf16[16,64]{{1,0}} convert(%param_0.1)
  %slice.1 = bf16[1,64]{{1,0}} slice(%convert.2), slice={{[3:4], [0:64]}}
  %bitcast.2 = bf16[64]{{0}} bitcast(%slice.1)
  ROOT %tuple.1 = (bf16[1,64]{{1,0}}, bf16[64]{{0}}) tuple(%slice.1, %bitcast.2)
}}

%fused_transpose (param_0.2: f32[16,64]) -> f32[64,16] {{
  %param_0.2 = f32[16,64]{{1,0}} parameter(0)
  ROOT %transpose.1 = f32[64,16]{{1,0}} transpose(%param_0.2), dimensions={{1,0}}
}}

%body (state: (s32[], bf16[4,16], bf16[16,8], bf16[3,4,8])) -> (s32[], bf16[4,16], bf16[16,8], bf16[3,4,8]) {{
  %state = (s32[], bf16[4,16]{{1,0}}, bf16[16,8]{{1,0}}, bf16[3,4,8]{{2,1,0}}) parameter(0)
  %turn = s32[] get-tuple-element(%state), index=0
  %left = bf16[4,16]{{1,0}} get-tuple-element(%state), index=1
  %right = bf16[16,8]{{1,0}} get-tuple-element(%state), index=2
  %stack = bf16[3,4,8]{{2,1,0}} get-tuple-element(%state), index=3
  %product = (f32[4,8]{{1,0}}, s8[4096]{{0}}) custom-call(%left, %right), custom_call_target="__cublas$lt$matmul", \
metadata={{op_name="jit(step)/linear.forward/dot_general" stack_frame_id=2}}, backend_config={{"gemm_backend_config":\
{{"dot_dimension_numbers":{{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}}}}
  %result = f32[4,8]{{1,0}} get-tuple-element(%product), index=0
  %update = bf16[3,4,8]{{2,1,0}} fusion(%stack, %result, %turn), kind=kLoop, calls=%fused_update
  ROOT %next = (s32[], bf16[4,16]{{1,0}}, bf16[16,8]{{1,0}}, bf16[3,4,8]{{2,1,0}}) tuple(%turn, %left, %right, %update)
}}

ENTRY %main (a: bf16[4,16], b: bf16[16,8], stack.1: bf16[3,4,8], wide: f32[16,64], q: bf16[2,8,3,4]) -> f32[16,64] {{
  %a = bf16[4,16]{{1,0}} parameter(0)
  %b = bf16[16,8]{{1,0}} parameter(1)
  %stack.1 = bf16[3,4,8]{{2,1,0}} parameter(2)
  %wide = f32[16,64]{{1,0}} parameter(3)
  %q = bf16[2,8,3,4]{{3,2,1,0}} parameter(4)
  %first = s32[] constant(0)
  %start = (s32[], bf16[4,16]{{1,0}}, bf16[16,8]{{1,0}}, bf16[3,4,8]{{2,1,0}}) tuple(%first, %a, %b, %stack.1)
  %row = (bf16[1,64]{{1,0}}, bf16[64]{{0}}) fusion(%wide), kind=kLoop, calls=%fused_row, metadata={{op_name=\
"jit(step)/gelu.forward/mul" stack_frame_id=1}}
  %early = f32[16,64]{{1,0}} all-reduce-start(%wide), replica_groups={{{{0,1,2,3}}}}, to_apply=%add
  %loop = (s32[], bf16[4,16]{{1,0}}, bf16[16,8]{{1,0}}, bf16[3,4,8]{{2,1,0}}) while(%start), condition=%cond, \
body=%body, backend_config={{"known_trip_count":{{"n":"3"}}}}
  %summed = f32[16,64]{{1,0}} all-reduce-done(%early)
  %attended = (bf16[2,3,8,4]{{3,1,2,0}}, f32[2,3,8]{{2,1,0}}, u8[0]{{0}}) custom-call(%q, %q, %q), \
custom_call_target="__cudnn$fmhaSoftmax", backend_config={{"cudnn_fmha_backend_config": {{"intermediate_tensor_shape": \
{{"dimensions": ["2", "3", "8", "8"]}}, "mask_type": "CAUSAL"}}}}
  %tiled = (bf16[2,8,3,4]{{3,2,1,0}}, f32[2,3,8]{{2,1,0}}) custom-call(%q, %q, %q), \
custom_call_target="__gpu$xla.gpu.triton", metadata={{op_name="jit(step)/attention.forward/kernel/pallas_call"}}, \
backend_config={{debug = false, ir = "ML({{\\00", name = "kernel", \
serialized_metadata = "{{\\22flops\\22: \\2212345\\22}}"}}
  %turned = f32[64,16]{{1,0}} fusion(%summed), kind=kInput, calls=%fused_transpose
  %late = (f32[4,64]{{1,0}}) reduce-scatter-start(%summed), replica_groups=[1,4]<=[4]
  %shard = f32[4,64]{{1,0}} reduce-scatter-done(%late)
  ROOT %copy.1 = f32[16,64]{{1,0}} copy(%summed)
}}
"""


@pytest.fixture(scope="module")
def launches():
    """The launches of TEXT."""
    return kernels.launches(hlo.parse(TEXT.format(package=roofline.PACKAGE)))


@pytest.fixture(scope="module")
def by_name(launches):
    """Its kernels by name."""
    return {kernel.instruction.name: kernel for kernel in launches if not kernel.is_wait}


def test_a_loops_kernels_count_for_each_turn(by_name):
    times = {name: kernel.times for name, kernel in by_name.items()}
    assert times == {
        "row": 1,
        "early": 1,
        "product": 3,
        "update": 3,
        "attended": 1,
        "tiled": 1,
        "turned": 1,
        "late": 1,
        "copy.1": 1,
    }


def test_a_product_has_its_operations_and_no_workspace(by_name):
    product = by_name["product"]
    assert product.operations == 2 * 4 * 16 * 8
    assert product.bytes == 2 * (4 * 16 + 16 * 8) + 4 * (4 * 8)
    assert (product.inputs, product.output, product.kind) == (("bf16", "bf16"), "f32", "products to f32")


def test_causal_attention_is_half_of_two_products(by_name):
    attended = by_name["attended"]
    assert attended.operations == 2 * (2 * 2 * 3 * 8 * 8 * 4) / 2
    assert attended.bytes == 2 * (2 * 8 * 3 * 4) + 2 * (2 * 3 * 8 * 4) + 4 * (2 * 3 * 8)  # q is one array
    assert attended.kind == "cuDNN attention, forward"


def test_a_kernel_in_pallas_says_its_operations(by_name):
    tiled = by_name["tiled"]
    assert (tiled.operations, tiled.inputs, tiled.kind) == (12345, ("bf16", "bf16"), "Pallas attention, forward")
    assert tiled.bytes == 2 * 2 * (2 * 8 * 3 * 4) + 4 * (2 * 3 * 8)


def test_of_a_slice_and_of_an_update_in_place_only_the_slice_counts(by_name):
    assert by_name["row"].bytes == 4 * 64 + 2 * (2 * 64)
    assert by_name["update"].bytes == 4 * (4 * 8) + 4 + 2 * (4 * 8)  # the index is read too


def test_transposes_are_seen(by_name):
    assert {name: kernel.transposed for name, kernel in by_name.items() if kernel.transposed} == {"turned": 4 * 16 * 64}


def test_a_kernel_is_from_a_line_of_ours(by_name):
    card = CARDS["h100"]
    rows = roofline.dearest(list(by_name.values()), card, count=20)
    where = {row.name: row.where for row in rows}
    assert where["loops: gelu.forward/mul"] == "layers/gelu.py:41"
    assert where["products to f32: linear.forward/dot_general"] == "layers/gelu.py:41"  # which called numerics.py


def test_the_roofline_is_the_larger_of_both_bounds(by_name):
    card = CARDS["h100"]
    kernel = by_name["product"]
    assert roofline.milliseconds(kernel, card) == pytest.approx(3e3 * kernel.bytes / 3.35232e12)
    busy = card._replace(bandwidth=1e30)
    assert roofline.milliseconds(kernel, busy) == pytest.approx(3e3 * kernel.operations / 989.4e12)
    everything = list(by_name.values())
    rows = roofline.by_kind(everything, card)
    assert sum(row.milliseconds for row in rows if row.name != "collectives") == pytest.approx(
        roofline.total(everything, card)
    )


def test_collectives_stand_where_they_are_issued(launches):
    card = CARDS["h100"]
    early, late = schedule.collectives(launches, card)
    assert (early.name, early.bytes, early.products_after) == ("all-reduce", 4096, 5)  # 3 in the loop, attention twice
    assert early.milliseconds == pytest.approx(1e3 * 2 * 4096 * 3 / 4 / card.link)
    loop = [kernel for kernel in launches if kernel.times == 3]
    assert early.beside == pytest.approx(roofline.total(loop, card))
    assert (late.name, late.products_after, late.beside) == ("reduce-scatter", 0, 0)
    assert late.milliseconds == pytest.approx(1e3 * 4096 * 3 / 4 / card.link)
    assert schedule.summary([early, late]) == (2, 1, 8192, 4096, 4096)


def test_a_program_that_jax_compiles_here():
    """A scan of 5 products, on the CPU, whose text has the same form."""

    def step(x, weights):
        return jax.lax.scan(lambda x, weight: (gelu.forward(jnp.dot(x, weight))[0], None), x, weights)[0]

    shapes = jax.ShapeDtypeStruct((64, 32), jnp.float32), jax.ShapeDtypeStruct((5, 32, 32), jnp.float32)
    module = hlo.parse(jax.jit(step).lower(*shapes).compile().as_text())
    found = kernels.kernels(module)
    assert sum(kernel.times * kernel.operations for kernel in found) == 5 * 2 * 64 * 32 * 32
    assert max(kernel.times for kernel in found) == 5
    places = {roofline.place(kernel) for kernel in found}
    assert any(place.startswith("layers/gelu.py:") for place in places)
