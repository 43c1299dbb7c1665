// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// The native module oscar_kv._core: checks arrays, releases the GIL, calls the library.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <omp.h>

#include "arrays.hpp"
#include "core/check.hpp"
#include "dispatch.hpp"
#include "oscar/append.hpp"
#include "oscar/attend.hpp"
#include "oscar/backend.hpp"
#include "read_bound.hpp"
#include "reference/page.hpp"

namespace oscar::python {
namespace {

using namespace nb::literals;

AppendPart parse_part(const std::string& part) {
  if (part == "both") return AppendPart::kBoth;
  if (part == "pack") return AppendPart::kPack;
  if (part == "remember") return AppendPart::kRemember;
  throw nb::value_error(("part is '" + part + "', must be both, pack or remember").c_str());
}

void append_rows(const CacheArrays& arrays, const ConstArgument& k, const ConstArgument& v,
                 const ConstArgument& query_start, const std::string& format, std::int32_t window,
                 std::int32_t sinks, const std::string& part, const Launch& launch) {
  const CacheArguments cache = cache_arguments(arrays, format, window, sinks);
  const AppendPart which = parse_part(part);
  const ConstRows k_rows = const_rows("k", k, cache.device, cache.layout.head_dim);
  const ConstRows v_rows = const_rows("v", v, cache.device, cache.layout.head_dim);
  const Batch batch{cache.batch, i32("query_start", query_start, cache.device, {cache.batch + 1})};
  Status status;
  {
    nb::gil_scoped_release release;
    status = append_on(cache, batch, k_rows, v_rows, which, launch);
  }
  check(status);
}

struct AttendArrays {
  const ConstArgument &q, &k_new, &v_new, &query_start;
  const std::optional<ConstArgument>& sink_logits;
  const MutableArgument& out;
  const std::optional<MutableArgument>& lse;
  const MutableArgument& workspace;
};

// Keeps the memory that it describes.
struct Plan {
  MutableArray memory;
  cuda::AttendPlan plan;
};

void attend_rows(const CacheArrays& arrays, const AttendArrays& call, const std::string& format,
                 std::int32_t window, std::int32_t sinks, AttendOptions options,
                 const Launch& launch, const Plan* plan) {
  const CacheArguments cache = cache_arguments(arrays, format, window, sinks);
  const Device device = cache.device;
  const std::int32_t head_dim = cache.layout.head_dim;
  const ConstRows q = const_rows("q", call.q, device, head_dim);
  const ConstRows k_new = const_rows("k_new", call.k_new, device, head_dim);
  const ConstRows v_new = const_rows("v_new", call.v_new, device, head_dim);
  const MutableRows out = mutable_rows("out", call.out, device, head_dim);
  const Batch batch{cache.batch, i32("query_start", call.query_start, device, {cache.batch + 1})};
  if (call.sink_logits) {
    options.sink_logits = f32("sink_logits", *call.sink_logits, device, {q.heads});
  }
  float* lse = nullptr;
  if (call.lse) lse = f32("lse", *call.lse, device, {q.tokens, q.heads});
  require_device("workspace", device_of(call.workspace), device);
  if (plan != nullptr) require_device("plan", device_of(plan->memory), device);
  Status status;
  {
    nb::gil_scoped_release release;
    status = attend_on(cache, batch, q, k_new, v_new, options, out, lse, call.workspace, launch,
                       plan == nullptr ? nullptr : &plan->plan);
  }
  check(status);
}

Plan plan_rows(const CacheArrays& arrays, const ConstArgument& query_start, MutableArray memory,
               std::int64_t query_tokens, std::int32_t q_heads, const std::string& format,
               std::int32_t window, std::int32_t sinks, const AttendOptions& options,
               const Launch& launch) {
  const CacheArguments cache = cache_arguments(arrays, format, window, sinks);
  if (cache.device.is_cpu())
    throw nb::type_error("pages is on the CPU, plans are for CUDA devices");
  const Batch batch{cache.batch, i32("query_start", query_start, cache.device, {cache.batch + 1})};
  require_device("memory", device_of(memory), cache.device);
  Plan made{std::move(memory), {}};
  check(
      plan_attend_on(cache, batch, query_tokens, q_heads, options, made.memory, launch, made.plan));
  return made;
}

std::size_t workspace_bytes(const CacheArrays& arrays, std::int64_t query_tokens,
                            std::int32_t q_heads, std::int32_t max_query_len) {
  Layout layout;
  const bool shaped = arrays.exact.ndim() == 5;
  layout.kv_heads = shaped ? static_cast<std::int32_t>(arrays.exact.shape(2)) : 0;
  layout.head_dim = shaped ? static_cast<std::int32_t>(arrays.exact.shape(4)) : 0;
  const std::int32_t batch = batch_of(arrays);
  return attend_workspace_bytes_on(device_of(arrays.pages), layout, batch, query_tokens, q_heads,
                                   max_query_len);
}

// k_out, v_out f32 [batch, kv_heads, max_len, head_dim]: what the next query reads of every cached
// token, in the original basis. Rows beyond a sequence's length are left alone.
void dequantize_rows(const CacheArrays& arrays, const MutableArgument& k_out,
                     const MutableArgument& v_out, const std::string& format, std::int32_t window,
                     std::int32_t sinks) {
  const CacheArguments cache = cache_arguments(arrays, format, window, sinks);
  const Layout& layout = cache.layout;
  require_device("k_out", device_of(k_out), kCpu);
  if (!cache.device.is_cpu()) throw nb::type_error("pages is on a CUDA device, must be on the CPU");
  if (k_out.ndim() != 4) throw nb::value_error("k_out must be [batch, kv_heads, tokens, head_dim]");
  const auto max_len = static_cast<std::int64_t>(k_out.shape(2));
  float* k = f32("k_out", k_out, kCpu, {cache.batch, layout.kv_heads, max_len, layout.head_dim});
  float* v = f32("v_out", v_out, kCpu, {cache.batch, layout.kv_heads, max_len, layout.head_dim});
  const std::vector<std::int32_t> no_new_tokens(static_cast<std::size_t>(cache.batch) + 1, 0);
  check(check_batch(layout, cache.view, {cache.batch, no_new_tokens.data()}, 0));
  for (int b = 0; b < cache.batch; ++b) {
    const std::int64_t length = cache.view.seq_len[b];
    if (length > max_len) throw nb::value_error("k_out has fewer tokens than a sequence");
    check(check_pages(layout, cache.view, b, length / kTileTokens));
  }
  nb::gil_scoped_release release;
  for (int b = 0; b < cache.batch; ++b) {
    for (int head = 0; head < layout.kv_heads; ++head) {
      const std::int64_t length = cache.view.seq_len[b];
      for (std::int64_t t = 0; t < length; ++t) {
        const std::int64_t row =
            ((static_cast<std::int64_t>(b) * layout.kv_heads + head) * max_len + t) *
            layout.head_dim;
        reference::dequantize(layout, cache.view, b, t, length, head, k + row, v + row);
      }
    }
  }
}

}  // namespace

NB_MODULE(_core, m) {
  nb::class_<CacheArrays>(m, "CacheArrays", "The arrays of one layer (include/oscar/cache.hpp).")
      .def(
          "__init__",
          [](CacheArrays* self, Array pages, Array exact, Array block_table, Array slot,
             Array seq_len, OptionalArray exact_from, OptionalArray balance, OptionalArray feedback,
             OptionalArray center) {
            new (self) CacheArrays{std::move(pages),   std::move(exact),    std::move(block_table),
                                   std::move(slot),    std::move(seq_len),  std::move(exact_from),
                                   std::move(balance), std::move(feedback), std::move(center)};
          },
          "pages"_a, "exact"_a, "block_table"_a, "slot"_a, "seq_len"_a, "exact_from"_a.none(),
          "balance"_a.none(), "feedback"_a.none() = nb::none(), "center"_a.none() = nb::none())
      .def("attend_workspace_bytes", &workspace_bytes, "query_tokens"_a, "q_heads"_a,
           "max_query_len"_a = 0);

  m.def(
      "append",
      [](const CacheArrays& cache, const ConstArgument& k, const ConstArgument& v,
         const ConstArgument& query_start, const std::string& format, std::int32_t window,
         std::int32_t sinks, const std::string& part, std::uintptr_t stream, std::uintptr_t fault) {
        append_rows(cache, k, v, query_start, format, window, sinks, part, {stream, fault, 0});
      },
      "cache"_a, "k"_a, "v"_a, "query_start"_a, "format"_a, "window"_a, "sinks"_a, "part"_a,
      "stream"_a = 0, "fault"_a = 0);
  m.def(
      "attend",
      [](const CacheArrays& cache, const ConstArgument& q, const ConstArgument& k_new,
         const ConstArgument& v_new, const ConstArgument& query_start, const MutableArgument& out,
         const std::optional<MutableArgument>& lse, const MutableArgument& workspace,
         const std::string& format, std::int32_t window, std::int32_t sinks, float scale,
         float softcap, std::int32_t sliding_window,
         const std::optional<ConstArgument>& sink_logits, bool strict, std::uintptr_t stream,
         std::int32_t max_query_len, const Plan* plan) {
        attend_rows(cache, {q, k_new, v_new, query_start, sink_logits, out, lse, workspace}, format,
                    window, sinks, {scale, softcap, sliding_window, nullptr, strict},
                    {stream, 0, max_query_len}, plan);
      },
      "cache"_a, "q"_a, "k_new"_a, "v_new"_a, "query_start"_a, "out"_a, "lse"_a.none(),
      "workspace"_a, "format"_a, "window"_a, "sinks"_a, "scale"_a, "softcap"_a, "sliding_window"_a,
      "sink_logits"_a.none(), "strict"_a, "stream"_a = 0, "max_query_len"_a = 0,
      "plan"_a.none() = nb::none());
  nb::class_<Plan>(m, "AttendPlan", "How a decode step is cut into work (include/oscar/cuda.hpp).");
  m.def("attend_plan_bytes", &attend_plan_bytes_on_device);
  m.def(
      "max_decode_queries", [] { return cuda::kMaxDecodeQueries; },
      "Query tokens of a sequence up to which a CUDA device takes the decode kernel.");
  m.def(
      "plan_attend",
      [](const CacheArrays& cache, const ConstArgument& query_start, MutableArray memory,
         std::int64_t query_tokens, std::int32_t q_heads, const std::string& format,
         std::int32_t window, std::int32_t sinks, std::int32_t sliding_window, bool strict,
         std::uintptr_t stream, std::int32_t max_query_len) {
        return plan_rows(cache, query_start, std::move(memory), query_tokens, q_heads, format,
                         window, sinks, {1.0f, 0.0f, sliding_window, nullptr, strict},
                         {stream, 0, max_query_len});
      },
      "cache"_a, "query_start"_a, "memory"_a, "query_tokens"_a, "q_heads"_a, "format"_a, "window"_a,
      "sinks"_a, "sliding_window"_a, "strict"_a, "stream"_a = 0, "max_query_len"_a = 0);
  m.def("dequantize", &dequantize_rows, "cache"_a, "k_out"_a, "v_out"_a, "format"_a, "window"_a,
        "sinks"_a);

  m.def(
      "tile_bytes",
      [](std::int32_t head_dim, const std::string& format) {
        Layout layout;
        layout.kv_heads = 1;
        layout.head_dim = head_dim;
        layout.format = parse_format(format);
        check(check_layout(layout));
        return layout.tile().tile_bytes();
      },
      "head_dim"_a, "format"_a, "Bytes of one tile: 32 tokens of one KV head, K and V.");
  m.def(
      "ring_tokens",
      [](std::int32_t window) {
        Layout layout;
        layout.window = window;
        return layout.ring_tokens();
      },
      "window"_a, "Slots of the ring of exact tokens for a window.");
  m.def("formats", [] {
    std::vector<std::string> names;
    for (const Format format : kFormats) names.emplace_back(name_of(format));
    return names;
  });

  m.def("available_backends", [] {
    std::vector<std::string> names;
    for (const std::string_view name : available_backends()) names.emplace_back(name);
    return names;
  });
  m.def("active_backend", [] {
    std::string_view name;
    check(active_backend(name));
    return std::string(name);
  });
  m.def("set_backend", [](const std::string& name) { check(set_backend(name)); }, "name"_a);
  m.def("cuda_built", &cuda_built, "Whether this build has CUDA kernels.");
  m.def("cuda_available", &cuda_available, "Whether it has, and a driver and a device are here.");
  m.def("cuda_read_bytes", &cuda_read_bytes, "array"_a, "total"_a, "stream"_a);
  m.def("max_threads", &omp_get_max_threads);
  m.def("read_bytes", &read_bytes, "array"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def("version", &version);
  m.attr("format_version") = kFormatVersion;
}

}  // namespace oscar::python
