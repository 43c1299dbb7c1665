// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Whatever is wrong is refused by name, before a byte is written.
#include <cmath>
#include <functional>
#include <limits>

#include "support.hpp"

namespace oscar::testing {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// The arguments of append and attend, right until a test breaks one.
struct Arguments {
  Arguments() : fixture(make_setup()), call{{}, rows(1, 2), rows(1, 2)}, q(rows(1, 4)), out(q) {
    fixture.grow({60, 10});
    call = fixture.next({8, 3});
    start = call.query_start;
    q = random_queries(fixture, 11, 4, DType::kF32, 1);
    out = rows(11, 4);
    layout = fixture.layout;
    cache = fixture.view();
    batch = {2, start.data()};
    k = call.k.view();
    v = call.v.view();
    q_view = q.view();
    out_view = out.mutable_view();
    workspace = Memory(attend_workspace_bytes(layout, 2, 11, 4) + 64);
    workspace_bytes = workspace.size() - 64;
    lse.assign(44, 7.0f);
  }

  static CacheSetup make_setup() {
    CacheSetup setup;
    setup.layout = {.kv_heads = 2,
                    .head_dim = 32,
                    .format = kK2V2,
                    .page_tokens = 32,
                    .window = 32,
                    .sinks = 4,
                    .exact_dtype = DType::kF32};
    setup.capacity = {100, 40};
    setup.dtype = DType::kF32;
    return setup;
  }
  static Rows rows(int tokens, int heads) { return Rows(DType::kF32, tokens, heads, 32); }

  [[nodiscard]] Status append() const { return oscar::append(layout, cache, batch, k, v, part); }
  [[nodiscard]] Status attend() {
    return oscar::attend(layout, cache, batch, q_view, k, v, options, out_view, lse.data(),
                         workspace_data(), workspace_bytes);
  }
  [[nodiscard]] std::uint8_t* workspace_data() {
    return null_workspace ? nullptr : workspace.data() + workspace_offset;
  }
  void set_center(float x) {
    fixture.center.assign(64, kMaxInput);
    fixture.center[40] = x;
    cache.center = fixture.center.data();
  }
  void set_key(float x) { poke(call.k, x); }
  void set_value(float x) { poke(call.v, x); }
  static void poke(Rows& target, float x) {
    std::vector<float> row = target.get(10, 1);
    row[31] = x;
    target.set(10, 1, row.data());
  }

  CacheFixture fixture;
  Call call;
  Rows q;
  Rows out;
  std::vector<std::int32_t> start;
  Layout layout;
  CacheView cache;
  Batch batch;
  ConstRows k;
  ConstRows v;
  ConstRows q_view;
  MutableRows out_view;
  AttendOptions options;
  AppendPart part = AppendPart::kBoth;
  std::vector<float> lse;
  Memory workspace{0};
  std::size_t workspace_bytes = 0;
  std::size_t workspace_offset = 0;
  bool null_workspace = false;
};

struct Fault {
  const char* name;  // the argument that the message must name
  std::function<void(Arguments&)> make;
  StatusCode code = StatusCode::kInvalidArgument;
};

const Fault kCommonFaults[] = {
    {"head_dim", [](Arguments& a) { a.layout.head_dim = 40; }, StatusCode::kUnsupported},
    {"head_dim", [](Arguments& a) { a.layout.head_dim = 272; }, StatusCode::kUnsupported},
    {"head_dim", [](Arguments& a) { a.layout.head_dim = -32; }, StatusCode::kUnsupported},
    {"format", [](Arguments& a) { a.layout.format = {2, 4}; }},
    {"page_tokens", [](Arguments& a) { a.layout.page_tokens = 48; }},
    {"page_tokens", [](Arguments& a) { a.layout.page_tokens = 0; }},
    {"kv_heads", [](Arguments& a) { a.layout.kv_heads = 0; }},
    {"window", [](Arguments& a) { a.layout.window = -1; }},
    {"sinks", [](Arguments& a) { a.layout.sinks = 33; }},
    {"sinks", [](Arguments& a) { a.layout.sinks = -1; }},
    {"exact_blocks", [](Arguments& a) { a.layout.exact_blocks = 3; }},
    {"exact_blocks",
     [](Arguments& a) {
       a.layout.exact_blocks = 4;
       a.layout.sinks = 3;
     }},
    {"exact_stride", [](Arguments& a) { a.cache.exact_stride = 16; }},
    {"exact", [](Arguments& a) { a.cache.exact = nullptr; }},
    {"slot", [](Arguments& a) { a.cache.slot = nullptr; }},
    {"seq_len", [](Arguments& a) { a.cache.seq_len = nullptr; }},
    {"pages", [](Arguments& a) { a.cache.pages = nullptr; }},
    {"block_table", [](Arguments& a) { a.cache.block_table = nullptr; }},
    {"query_start", [](Arguments& a) { a.batch.query_start = nullptr; }},
    {"batch.size", [](Arguments& a) { a.batch.size = -1; }},
    {"query_start", [](Arguments& a) { a.start[0] = 1; }},
    {"query_start", [](Arguments& a) { a.start[1] = 12; }},
    {"query_start", [](Arguments& a) { a.start[2] = 10; }},
    {"seq_len[1]", [](Arguments& a) { a.fixture.seq_len[1] = -1; }},
    {"seq_len[0]", [](Arguments& a) { a.fixture.seq_len[0] = std::numeric_limits<int>::max(); }},
    {"slot[1]", [](Arguments& a) { a.fixture.slot[1] = -1; }},
    {"slot[0]", [](Arguments& a) { a.fixture.slot[0] = static_cast<int>(a.cache.slots); }},
    {"exact_from[0]", [](Arguments& a) { a.fixture.exact_from[0] = 33; }},
    {"exact_from[1]", [](Arguments& a) { a.fixture.exact_from[1] = -1; }},
    {"block_table[0][0]", [](Arguments& a) { a.fixture.block_table[0] = -1; },
     StatusCode::kOutOfRange},
    {"block_table[0][0]",
     [](Arguments& a) { a.fixture.block_table[0] = static_cast<int>(a.cache.num_pages); },
     StatusCode::kOutOfRange},
    {"block_table", [](Arguments& a) { a.cache.max_pages = 0; }, StatusCode::kOutOfRange},
    {"balance",
     [](Arguments& a) {
       a.fixture.balance.assign(64, 1.0f);
       a.fixture.balance[40] = 0.0f;
       a.cache.balance = a.fixture.balance.data();
     }},
    {"balance",
     [](Arguments& a) {
       a.fixture.balance.assign(64, kNaN);
       a.cache.balance = a.fixture.balance.data();
     }},
    {"center[head 1, channel 8] is nan", [](Arguments& a) { a.set_center(kNaN); }},
    {"center[head 1, channel 8] is -inf", [](Arguments& a) { a.set_center(-kInf); }},
    {"center[head 1, channel 8] is 65520", [](Arguments& a) { a.set_center(65520.0f); }},
};

const Fault kAppendFaults[] = {
    {"k", [](Arguments& a) { a.k.data = nullptr; }},
    {"v", [](Arguments& a) { a.v.data = nullptr; }},
    {"k", [](Arguments& a) { a.k.heads = 1; }},
    {"v", [](Arguments& a) { a.v.tokens = 10; }},
    {"block_table[0][1]", [](Arguments& a) { a.fixture.block_table[1] = 1000; },
     StatusCode::kOutOfRange},
    {"k[token 10, head 1, channel 31]", [](Arguments& a) { a.set_key(kNaN); }},
    {"k[token 10, head 1, channel 31]", [](Arguments& a) { a.set_key(-kInf); }},
    {"k[token 10, head 1, channel 31]", [](Arguments& a) { a.set_key(65520.0f); }},
    {"v[token 10, head 1, channel 31]", [](Arguments& a) { a.set_value(kNaN); }},
    {"v[token 10, head 1, channel 31]", [](Arguments& a) { a.set_value(kInf); }},
    {"v[token 10, head 1, channel 31]", [](Arguments& a) { a.set_value(-70000.0f); }},
};

const Fault kAttendFaults[] = {
    {"q", [](Arguments& a) { a.q_view.data = nullptr; }},
    {"k_new", [](Arguments& a) { a.k.data = nullptr; }},
    {"v_new", [](Arguments& a) { a.v.heads = 3; }},
    {"k_new", [](Arguments& a) { a.k.tokens = 3; }},
    {"out", [](Arguments& a) { a.out_view.data = nullptr; }},
    {"out", [](Arguments& a) { a.out_view.heads = 2; }},
    {"q", [](Arguments& a) { a.q_view.heads = a.out_view.heads = 3; }},
    {"q", [](Arguments& a) { a.q_view.heads = a.out_view.heads = 34; }},
    {"q", [](Arguments& a) { a.q_view.heads = a.out_view.heads = 1; }},
    {"scale", [](Arguments& a) { a.options.scale = kNaN; }},
    {"softcap", [](Arguments& a) { a.options.softcap = -1.0f; }},
    {"softcap", [](Arguments& a) { a.options.softcap = kInf; }},
    {"sliding_window", [](Arguments& a) { a.options.sliding_window = -1; }},
    {"workspace", [](Arguments& a) { a.workspace_bytes = 0; }},
    {"workspace", [](Arguments& a) { a.workspace_bytes -= 1; }},
    {"workspace", [](Arguments& a) { a.workspace_offset = 32; }},
    {"workspace", [](Arguments& a) { a.null_workspace = true; }},
    {"block_table[0][1]",
     [](Arguments& a) {
       a.options.strict = true;  // tokens 60..67 complete the second tile
       a.fixture.block_table[1] = 1000;
     },
     StatusCode::kOutOfRange},
};

void expect_refused(const Fault& fault, const Status& status, const std::string& message_start) {
  EXPECT_EQ(status.code(), fault.code) << status.message();
  EXPECT_NE(status.message().find(message_start), std::string::npos)
      << "'" << status.message() << "' does not name " << message_start;
}

void check_append(const Fault& fault) {
  Arguments a;
  fault.make(a);
  const Memory pages = a.fixture.pages;
  const Memory exact = a.fixture.exact;
  for (const AppendPart part : {AppendPart::kBoth, AppendPart::kPack}) {
    a.part = part;
    expect_refused(fault, a.append(), fault.name);
  }
  EXPECT_TRUE(a.fixture.pages == pages) << fault.name;
  EXPECT_TRUE(a.fixture.exact == exact) << fault.name;
}

void check_attend(const Fault& fault) {
  Arguments a;
  fault.make(a);
  const std::vector<float> lse = a.lse;
  expect_refused(fault, a.attend(), fault.name);
  EXPECT_EQ(a.lse, lse);
  bool written = false;
  for (int token = 0; token < 11; ++token) {
    for (int head = 0; head < 4; ++head) {
      for (const float x : a.out.get(token, head)) written |= !std::isnan(x);
    }
  }
  EXPECT_FALSE(written) << fault.name;
}

TEST(StatusTest, RightArgumentsAreAccepted) {
  Arguments a;
  Status status = a.attend();
  EXPECT_TRUE(status.ok()) << status.message();
  status = a.append();
  EXPECT_TRUE(status.ok()) << status.message();
}

TEST(StatusTest, AppendRefuses) {
  for (const Fault& fault : kCommonFaults) check_append(fault);
  for (const Fault& fault : kAppendFaults) check_append(fault);
}

TEST(StatusTest, AttendRefuses) {
  for (const Fault& fault : kCommonFaults) check_attend(fault);
  for (const Fault& fault : kAttendFaults) check_attend(fault);
}

TEST(StatusTest, RememberNeedsNoPages) {
  Arguments a;
  a.cache.pages = nullptr;
  a.cache.block_table = nullptr;
  a.part = AppendPart::kRemember;
  const Status status = a.append();
  EXPECT_TRUE(status.ok()) << status.message();
}

TEST(StatusTest, LargestInputIsAccepted) {
  for (const float x : {65504.0f, -65504.0f}) {
    Arguments a;
    a.set_key(x);
    a.set_value(x);
    a.set_center(x);
    Status status = a.append();
    EXPECT_TRUE(status.ok()) << status.message();
    status = a.attend();
    EXPECT_TRUE(status.ok()) << status.message();
  }
}

// Every bit pattern that is not a number, infinite or too large, in the 16-bit types.
TEST(StatusTest, SixteenBitInputsAreChecked) {
  for (const DType dtype : {DType::kF16, DType::kBF16}) {
    CacheSetup setup = Arguments::make_setup();
    setup.dtype = dtype;
    CacheFixture fixture(setup);
    Call call = fixture.next({1, 0});
    for (const float x : {kNaN, kInf, -kInf, 70000.0f, -70000.0f}) {
      std::vector<float> row = call.v.get(0, 1);
      row[17] = x;
      Call bad = call;
      bad.v.set(0, 1, row.data());
      const Memory exact = fixture.exact;
      const Status status = fixture.append(bad);
      EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << x;
      EXPECT_NE(status.message().find("v[token 0, head 1, channel 17]"), std::string::npos)
          << status.message();
      EXPECT_TRUE(fixture.exact == exact);
    }
  }
}

TEST(StatusTest, EmptyBatchIsAccepted) {
  Layout layout = Arguments::make_setup().layout;
  const ConstRows none{.heads = 2};
  const ConstRows no_queries{.heads = 4};
  const MutableRows no_out{.heads = 4};
  Memory workspace(attend_workspace_bytes(layout, 0, 0, 4));
  EXPECT_TRUE(append(layout, {}, {}, none, none).ok());
  const Status status = attend(layout, {}, {}, no_queries, none, none, {}, no_out, nullptr,
                               workspace.data(), workspace.size());
  EXPECT_TRUE(status.ok()) << status.message();
}

}  // namespace
}  // namespace oscar::testing
