// The launchers on the stand-in: they run at once, whatever the stream.
#include "../op_host/launch.h"

#include "entries.h"
#include "launchers.h"

namespace megatron_replay::ascend {

using namespace ascend_sim;

void launch_restricted_fwd(void*, uint32_t blocks, Element element, const void* hidden, const void* weight, const void* offsets,
                           const void* columns, const void* gold, void* z, void* stats, void* mixture, uint32_t positions, uint32_t width,
                           uint32_t candidates, uint32_t vocab) {
  run_restricted_fwd(element == Element::kFloat32 ? restricted_fwd_f32 : restricted_fwd_bf16, blocks, element, hidden, weight, offsets,
                     columns, gold, z, stats, mixture, positions, width, candidates, vocab);
}

}  // namespace megatron_replay::ascend
