// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// The plan of a decode step for all calls of the same shapes: one small kernel, whose blocks and
// warps find what those of attend_decode and combine_items would.
#include "cuda/mma.cuh"
#include "cuda/plan_part.cuh"

namespace oscar::cuda {
namespace {

__global__ void __launch_bounds__(32 * kMostDecodeWarps)
    plan_decode(const __grid_constant__ CudaAttendCall call,
                const __grid_constant__ DecodePlan plan) {
  __shared__ PlanTable table;
  const int block = static_cast<int>(blockIdx.x);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const PlannedLine line = find_line(call, plan, table, plan.block_warps);
  find_part(call, plan, table, line, block, warp, lane,
            planned_parts(call, plan, block)[warp].first);
  if (warp > 0) return;
  const SplitItem split = find_split_item(call, plan, table, line, block, lane);
  if (lane == 0) planned_items(call, plan)[block].split = split;
}

}  // namespace

void launch_plan_kernel(const CudaAttendCall& call, const DecodePlan& plan, cudaStream_t stream) {
  plan_decode<<<static_cast<unsigned>(plan.blocks), static_cast<unsigned>(32 * plan.block_warps), 0,
                stream>>>(call, plan);
}

}  // namespace oscar::cuda
