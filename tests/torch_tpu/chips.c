/* For tests/torch_tpu/check.py, by LD_PRELOAD: one chip, where XLA's plugin for CPUs does not say how many it has.
 *
 * torch_tpu asks for the number before it compiles a jax program, through xla::PjRtCApiTopologyDescription::ChipCount(),
 * which returns an absl::StatusOr<int>: a status word, 1 for "ok", and the value.
 */
#include <stdint.h>

struct status_or_int {
  uintptr_t status;
  int value;
};

struct status_or_int *_ZNK3xla27PjRtCApiTopologyDescription9ChipCountEv(struct status_or_int *result, const void *self) {
  (void)self;
  result->status = 1;
  result->value = 1;
  return result;
}
