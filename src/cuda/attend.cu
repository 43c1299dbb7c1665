// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// attend for sequences of up to 8 query tokens: its memory, and which instance runs.
#include "cuda/attend_launch.cuh"

namespace oscar::cuda {

extern template void launch_decode_format<2, 2>(const CudaAttendCall& call, DecodeLaunch what,
                                                cudaStream_t stream);
extern template void launch_decode_format<4, 2>(const CudaAttendCall& call, DecodeLaunch what,
                                                cudaStream_t stream);
extern template void launch_decode_format<4, 4>(const CudaAttendCall& call, DecodeLaunch what,
                                                cudaStream_t stream);

std::size_t decode_workspace_bytes(const Layout& layout, std::int32_t batch_size,
                                   std::int64_t query_tokens, std::int32_t q_heads) {
  if (batch_size <= 0 || layout.kv_heads <= 0 || q_heads < layout.kv_heads) return 0;
  std::int64_t floats = 0;
  const std::int64_t group = q_heads / layout.kv_heads;
  for (const int columns : {4, 8, 16}) {
    if (columns == 4 && group > columns) continue;
    const int slot_columns = static_cast<int>(
        std::min<std::int64_t>(columns, group * std::min<std::int64_t>(query_tokens, 8)));
    const std::int64_t kinds = most_kinds(layout, batch_size, query_tokens, q_heads, columns);
    const std::int64_t slots = kinds + kinds / 2 + multiprocessors();
    floats = std::max(floats, slots * slot_floats(layout, slot_columns));
  }
  return static_cast<std::size_t>(floats) * sizeof(float);
}

namespace {

void launch_format(const CudaAttendCall& call, DecodeLaunch what, cudaStream_t stream) {
  if (call.layout.format == kK2V2) return launch_decode_format<2, 2>(call, what, stream);
  if (call.layout.format == kK4V2) return launch_decode_format<4, 2>(call, what, stream);
  launch_decode_format<4, 4>(call, what, stream);
}

}  // namespace

void launch_attend_decode(const CudaAttendCall& call, cudaStream_t stream) {
  launch_format(call, DecodeLaunch::kAttend, stream);
}

void launch_attend_plan(const CudaAttendCall& call, cudaStream_t stream) {
  launch_format(call, DecodeLaunch::kPlan, stream);
}

std::size_t decode_plan_bytes() {
  const auto blocks = static_cast<std::size_t>(multiprocessors());
  return blocks * (kMostDecodeWarps * kPlannedPartBytes + kPlannedItemBytes);
}

}  // namespace oscar::cuda
