"""Where the operations of a compiled program were made."""

from jaxgpt.reports import profile

PROGRAM = """
HloModule jit_train_step

ENTRY %main (p: bf16[2,8]) -> bf16[2,8] {
  %p = bf16[2,8]{1,0} parameter(0), metadata={op_name="state"}
  %fused.1 = (bf16[2,8]{1,0}, f32[2]{0}) custom-call(%p), metadata={op_name="jit(f)/attention.forward/fwd"}
  %out = bf16[2,8]{1,0} get-tuple-element(%fused.1), index=0, metadata={op_name="jit(f)/attention.forward/fwd"}
  %c.2 = bf16[2,8]{1,0} call(%out), metadata={op_name="jit(f)/linear.forward/call"}
  ROOT %add.3 = bf16[2,8]{1,0} add(%out, %out)
}
"""


def test_a_call_of_a_library_is_an_operation_and_a_call_of_a_computation_is_not():
    assert profile.operation_origins(PROGRAM) == {"fused.1": "attention.forward", "add.3": "between layers"}
