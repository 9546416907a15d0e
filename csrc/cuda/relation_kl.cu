// The host's side of relation_kl: arguments are refused here, before a kernel can touch memory.
#include "relation_kl.cuh"

namespace bertkd::cuda {

namespace {

// Rows are copied 16 bytes at a time.
void require_heads(const char* name, const Heads& x, int64_t width, DType dtype,
                   const Attention& args) {
  const std::string is = std::string(name) + " ";
  require(
      x.dtype == dtype,
      is + "must have the dtype of a_s: student and teacher are multiplied by one kind of product");
  require(x.width == width,
          is + "has width " + std::to_string(x.width) + ", expected " + std::to_string(width));
  require(x.data != nullptr, is + "has no data");
  require(is_aligned(x.data, 16), is + "does not start on a 16-byte boundary");
  require(args.length == 1 || x.stride_l % 8 == 0,
          is + "has rows that do not start on 16-byte boundaries");
  require((args.heads == 1 || x.stride_h % 8 == 0) && (args.batch == 1 || x.stride_b % 8 == 0),
          is + "has heads that do not start on 16-byte boundaries");
}

void require_width(const char* side, int64_t width) {
  require(width >= kMinWidth && width <= kMaxWidth && width % 8 == 0,
          std::string(side) + "'s head width is " + std::to_string(width) +
              ", must be a multiple of 8 from 16 to 128");
}

void run(Attention args, const Launch& launch, bool self) {
  if (self) {
    args.b_s = args.a_s;
    args.b_t = args.a_t;
    args.grad_b = args.grad_a;
  }
  relation::Params p{};
  p.self = self;
  p.backward = args.weights.data != nullptr;
  require(args.batch >= 0 && args.heads >= 0 && args.length >= 0, "sizes must not be negative");
  require(p.backward ? args.loss != nullptr
                     : args.rows != nullptr || args.batch * args.heads * args.length == 0,
          p.backward ? "loss is missing" : "rows is missing");
  const int64_t heads = args.batch * args.heads;
  require(args.batch <= 65535 && args.heads < (int64_t{1} << 31), "batch must be at most 65535");
  if (args.length > 0 && heads > 0) {
    require(args.length <= kMaxLength,
            "length is " + std::to_string(args.length) + ", must be at most 128");
    require_width("student", args.a_s.width);
    require_width("teacher", args.a_t.width);
    const DType dtype = args.a_s.dtype;
    require(dtype == DType::kFloat16 || dtype == DType::kBFloat16, "a_s must be fp16 or bf16");
    require_heads("a_s", args.a_s, args.a_s.width, dtype, args);
    require_heads("b_s", args.b_s, args.a_s.width, dtype, args);
    require_heads("a_t", args.a_t, args.a_t.width, dtype, args);
    require_heads("b_t", args.b_t, args.a_t.width, dtype, args);
    if (p.backward) {
      require_heads("grad_a", args.grad_a, args.a_s.width, dtype, args);
      require_heads("grad_b", args.grad_b, args.a_s.width, dtype, args);
      require_workspace(launch, heads);
    }
    constexpr float log2e = 1.4426950408889634f;
    p.args = args;
    p.layout = make_layout(static_cast<int>(args.length), static_cast<int>(args.a_s.width),
                           static_cast<int>(args.a_t.width), self, p.backward);
    require(p.layout.total <= shared_limit(),
            "a head needs " + std::to_string(p.layout.total) +
                " bytes of shared memory, this GPU gives a block " +
                std::to_string(shared_limit()));
    p.factor_s = args.scale_s * log2e;
    p.factor_t = args.scale_t * log2e;
    p.partials = launch.workspace;
    dtype == DType::kFloat16 ? relation::launch_relation<F16>(p, launch.stream)
                             : relation::launch_relation<BF16>(p, launch.stream);
  }
  if (p.backward)
    sum_partials(launch.workspace, args.length > 0 ? heads : 0, args.loss, launch.stream);
}

}  // namespace

void relation_kl(const Attention& args, const Launch& launch) { run(args, launch, false); }

void self_relation_kl(const Attention& args, const Launch& launch) { run(args, launch, true); }

int64_t relation_kl_workspace(int64_t batch, int64_t heads) { return batch * heads; }

int64_t relation_kl_shared_bytes(int64_t length, int64_t width_s, int64_t width_t, bool self,
                                 bool backward) {
  require(length >= 0 && length <= kMaxLength, "length must be at most 128");
  require(width_s > 0 && width_s <= kMaxWidth && width_t > 0 && width_t <= kMaxWidth,
          "widths must be 1 to 128");
  return make_layout(static_cast<int>(length), static_cast<int>(width_s), static_cast<int>(width_t),
                     self, backward)
      .total;
}

}  // namespace bertkd::cuda
