// CPU kernels of selected_attention: tensors in, raw pointers to src/kernels/cpu.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cstddef>
#include <type_traits>
#include <vector>

#include "kernels/cpu/attention.h"
#include "kernels/cpu/attention_packed.h"
#include "kernels/cpu/packed_gemm.h"
#include "kernels/cpu/packed_layer.h"
#include "kernels/cpu/parallel.h"
#include "ops/attention_ops.h"
#include "ops/backward_checks.h"
#include "ops/cpu/attention_call.h"

namespace headwise::ops {
namespace {

/// Pointers of one head of q, k, v as they lie in memory (the last dimension contiguous).
template <typename T, typename Acc>
struct CoreCall {
  MaskedShape<Acc> masked;
  Tensor q, k, v, head_weight;
  ActiveList list;
  int64_t group;  ///< query heads that share a key/value head

  explicit CoreCall(const CoreInputs& in)
      : masked(in.arguments, in.q, in.q.size(0), in.q.size(1), in.q.size(2), in.k.size(2), 0,
               in.q.size(3), in.v.size(3)),
        list(list_active(in.index, in.count, in.q.size(1), true)),
        group(in.k.size(1) ? in.q.size(1) / in.k.size(1) : 1) {
    q = rows(in.q);
    k = rows(in.k);
    v = rows(in.v);
    if (in.weight) head_weight = in.weight->to(scalar_type_of<Acc>()).contiguous();
  }
  CoreCall(const CoreCall&) = delete;

  Acc weight(const ActiveHead& a) const {
    return head_weight.defined()
               ? head_weight.template const_data_ptr<Acc>()[a.b * masked.shape.num_heads + a.h]
               : Acc(1);
  }
  /// Heads with the same number read the same keys and values.
  int64_t keys_of(const ActiveHead& a) const { return a.b * masked.shape.num_heads + a.h / group; }
  kernels::HeadTensors<T> tensors(const ActiveHead& a) const {
    auto at = [&](const Tensor& t, int64_t h) {
      return t.template const_data_ptr<T>() + a.b * t.stride(0) + h * t.stride(1);
    };
    return {a.b,         a.h,         at(q, a.h), at(k, a.h / group), at(v, a.h / group),
            q.stride(2), k.stride(2), v.stride(2)};
  }

 private:
  static Tensor rows(const Tensor& t) {
    auto y = t.to(scalar_type_of<T>());
    const bool usable = (y.stride(3) == 1 || y.size(3) <= 1) && y.stride(2) >= y.size(3);
    return usable ? y : y.contiguous();
  }
};

/// Whether the packed kernels serve these widths.
template <typename T>
bool packed_core_supported(const CoreInputs& in) {
  if constexpr (std::is_same_v<T, double>) {
    return false;
  } else {
    const int64_t multiple = sizeof(T) == 2 ? 8 : 1;
    auto fits = [&](int64_t width) { return width > 0 && width % multiple == 0; };
    return kernels::packed_gemm_supported<T>() && fits(in.q.size(3)) && fits(in.v.size(3));
  }
}

/// Packing the keys pays off if several queries read them, not for the one token of a decoding
/// step.
template <typename T>
bool packs_keys(const CoreInputs& in) {
  constexpr int64_t kFewQueries = 4;
  return packed_core_supported<T>(in) && !(std::is_same_v<T, float> && in.q.size(2) < kFewQueries);
}

/// f(T(), Acc()) with the types that a call is stored and summed in.
template <typename F>
auto dispatch_core(const CoreInputs& in, const F& f) {
  const auto type = in.q.scalar_type();
  if (type == at::kDouble) return f(double(), double());
  if (type == at::kBFloat16 && packed_core_supported<at::BFloat16>(in))
    return f(at::BFloat16(), float());
  return f(float(), float());
}

template <typename T, typename Acc>
void attend(const CoreCall<T, Acc>& call, bool packed, T* context, Acc* lse) {
  const auto& s = call.masked.shape;
  const int64_t L = s.queries, dv = s.value_width, workers = at::get_num_threads();
  const int64_t query_blocks = kernels::blocks(L, kernels::kQueryBlock);
  const int64_t heads = call.list.heads.size();
  auto for_blocks = [&](int64_t head, int64_t begin, int64_t end, const auto& f) {
    const auto& a = call.list.heads[head];
    for (int64_t row = begin; row < end; row += kernels::kQueryBlock)
      f(a, row, std::min(kernels::kQueryBlock, end - row), (a.b * s.num_heads + a.h) * L + row);
  };
  if constexpr (!std::is_same_v<T, double>) {
    if (packed) {
      // With enough heads, a task is a whole head: its keys are packed once, and stay packed for
      // the heads of its group that the same worker runs next.
      const int64_t splits =
          workers == 1 || heads >= 4 * workers ? 1 : std::clamp<int64_t>(query_blocks, 1, 4);
      const int64_t chunk = kernels::blocks(query_blocks, splits) * kernels::kQueryBlock;
      kernels::Scratch<T> keys(kernels::packed_keys_size<T>(s), workers);
      kernels::Scratch<std::byte> scratch(kernels::packed_attention_scratch<T>(s), workers);
      std::vector<int64_t> held(workers, -1);
      kernels::parallel_tasks(heads * splits, [&](int64_t task, int64_t worker) {
        const int64_t begin = task % splits * chunk;
        if (begin >= L) return;
        const auto& a = call.list.heads[task / splits];
        const auto head = call.tensors(a);
        if (held[worker] != call.keys_of(a))
          kernels::pack_keys(s, s.lengths[a.b], head.k, head.ldk, head.v, head.ldv, keys[worker]);
        held[worker] = call.keys_of(a);
        for_blocks(task / splits, begin, std::min(L, begin + chunk),
                   [&](const ActiveHead& a, int64_t row, int64_t rows, int64_t at) {
                     kernels::packed_attention_forward(s, a.b, a.h, head.q, head.ldq, keys[worker],
                                                       row, rows, context + at * dv, dv, lse + at,
                                                       scratch[worker]);
                   });
        kernels::packed_gemm_done<T>();
      });
      return;
    }
  }
  if constexpr (std::is_same_v<T, Acc>) {
    kernels::Scratch<T> scratch(kernels::attention_scratch(s), workers);
    kernels::parallel_tasks(heads * query_blocks, [&](int64_t task, int64_t worker) {
      const int64_t begin = task % query_blocks * kernels::kQueryBlock;
      for_blocks(task / query_blocks, begin, std::min(L, begin + kernels::kQueryBlock),
                 [&](const ActiveHead& a, int64_t row, int64_t rows, int64_t at) {
                   kernels::attention_forward(s, call.tensors(a), row, rows, context + at * dv, dv,
                                              lse + at, scratch[worker]);
                 });
    });
  }
}

CoreForward core_forward(HEADWISE_CORE_PARAMETERS) {
  const auto in = HEADWISE_CORE_INPUTS;
  check_inputs(in);
  return dispatch_core(in, [&]<typename T, typename Acc>(T, Acc) -> CoreForward {
    const CoreCall<T, Acc> call(in);
    const auto& s = call.masked.shape;
    const auto options = q.options().dtype(scalar_type_of<T>());
    const int64_t size = s.queries * s.value_width;
    auto output = at::zeros({s.batch, s.num_heads, s.queries, s.value_width}, options);
    auto lse = at::zeros({s.batch, s.num_heads, s.queries}, options.dtype(scalar_type_of<Acc>()));
    auto context = weight ? at::zeros_like(output) : output;
    T* y = output.template mutable_data_ptr<T>();
    T* c = context.template mutable_data_ptr<T>();
    attend(call, packs_keys<T>(in), c, lse.template mutable_data_ptr<Acc>());
    if (weight)
      kernels::parallel_tasks(call.list.heads.size(), [&](int64_t n, int64_t) {
        const auto& a = call.list.heads[n];
        const int64_t at = (a.b * s.num_heads + a.h) * size;
        const Acc factor = call.weight(a);
        for (int64_t i = 0; i < size; ++i) y[at + i] = T(factor * Acc(c[at + i]));
      });
    const auto type = q.scalar_type();
    return {output.to(type), weight ? context.to(type) : at::empty({0}, q.options()), lse};
  });
}

Tensor core(HEADWISE_CORE_PARAMETERS) {
  return std::get<0>(core_forward(q, k, v, index, count, weight, HEADWISE_MASK_ARGUMENTS));
}

/// One head's dq, dk and dv from the gradient of its context.
template <typename T, typename Acc>
struct HeadBackward {
  const kernels::AttentionShape<Acc>& shape;
  bool packed;
  int64_t scratch_bytes = 0;

  HeadBackward(const kernels::AttentionShape<Acc>& shape, bool packed)
      : shape(shape), packed(packed) {
    if constexpr (!std::is_same_v<T, double>)
      if (packed) scratch_bytes = kernels::packed_backward_scratch<T>(shape);
    if (!packed) scratch_bytes = kernels::attention_scratch(shape) * sizeof(Acc);
  }

  void operator()(const kernels::HeadTensors<T>& head, const T* grad_context, const Acc* delta,
                  const Acc* lse, const kernels::MaskGradient<Acc>& mask, Acc* mask_head, T* dq,
                  T* dk, T* dv, std::byte* scratch) const {
    const int64_t width = shape.value_width;
    if constexpr (!std::is_same_v<T, double>) {
      if (packed) {
        kernels::packed_attention_backward<T>(shape, head, grad_context, width, delta, lse, mask,
                                              mask_head, {dq, dk, dv, nullptr, nullptr, nullptr},
                                              scratch);
        kernels::packed_gemm_done<T>();
        return;
      }
    }
    if constexpr (std::is_same_v<T, Acc>)
      kernels::attention_backward<T>(shape, head, grad_context, width, delta, lse, dq, shape.width,
                                     dk, shape.width, dv, width, mask, mask_head,
                                     reinterpret_cast<T*>(scratch));
  }
};

CoreBackward core_backward(const Tensor& grad_output, HEADWISE_CORE_PARAMETERS,
                           const Tensor& output, const Tensor& context, const Tensor& lse,
                           std::array<bool, 5> needs) {
  const auto in = HEADWISE_CORE_INPUTS;
  check_backward(grad_output, in, output, context, lse);
  return dispatch_core(in, [&]<typename T, typename Acc>(T, Acc) -> CoreBackward {
    const CoreCall<T, Acc> call(in);
    const auto& s = call.masked.shape;
    const Gradients<Acc> make{q.options()};
    const int64_t L = s.queries, S = s.keys, d = s.width, dv = s.value_width;
    const int64_t kv_heads = k.size(1), workers = at::get_num_threads();
    auto gq = at::zeros(q.sizes(), q.options().dtype(scalar_type_of<T>()));
    T* dq = gq.template mutable_data_ptr<T>();
    Tensor gk, gv, gw;
    Acc* dk = make.make(true, k, gk);
    Acc* dvalue = make.make(true, v, gv);
    Acc* dw = make.make(needs[3], weight, gw);
    kernels::MaskGradient<Acc> mask;
    const auto mask_gradient = make.mask(needs[4], attn_mask, mask);
    const auto grad = grad_output.to(scalar_type_of<T>()).contiguous();
    const auto ctx = (weight ? context : output).to(scalar_type_of<T>()).contiguous();
    const auto log = lse.contiguous();
    const HeadBackward<T, Acc> head_backward(s, packed_core_supported<T>(in));
    kernels::Scratch<std::byte> scratch((head_backward.scratch_bytes + 63) / 64 * 64, workers);
    kernels::Scratch<T> heads(L * dv + S * (d + dv), workers);
    kernels::Scratch<Acc> deltas(L, workers);

    // Heads that share keys and values add to the same gradient: one worker, one order.
    const auto groups =
        kernels::by_place(call.list.heads.size(), s.batch * kv_heads, [&](int64_t n) {
          const auto& a = call.list.heads[n];
          return a.b * kv_heads + a.h / call.group;
        });
    auto run_group = [&](int64_t group, int64_t copy, int64_t worker) {
      T* gc = heads[worker];
      T *dkh = gc + L * dv, *dvh = dkh + S * d;
      Acc* delta = deltas[worker];
      for (const int64_t n : groups[group]) {
        const auto& a = call.list.heads[n];
        const int64_t at = (a.b * s.num_heads + a.h) * L;
        const T* g = grad.template const_data_ptr<T>() + at * dv;
        const T* c = ctx.template const_data_ptr<T>() + at * dv;
        const Acc w = call.weight(a);
        Acc total = 0;
        for (int64_t i = 0; i < L; ++i) {
          Acc sum = 0, weighted = 0;  // of the gradient as it is stored (layer_backward_packed.cpp)
          for (int64_t j = i * dv; j < (i + 1) * dv; ++j) {
            gc[j] = T(w * Acc(g[j]));
            sum += Acc(g[j]) * Acc(c[j]);
            weighted += Acc(gc[j]) * Acc(c[j]);
          }
          delta[i] = weighted;
          total += sum;
        }
        if (dw) dw[a.b * s.num_heads + a.h] = total;
        head_backward(call.tensors(a), gc, delta, log.template const_data_ptr<Acc>() + at, mask,
                      mask.of(copy, a.b, a.h), dq + at * d, dkh, dvh, scratch[worker]);
        const int64_t rows = s.lengths[a.b], kv = group * S;
        for (int64_t i = 0; i < rows * d; ++i) dk[kv * d + i] += Acc(dkh[i]);
        for (int64_t i = 0; i < rows * dv; ++i) dvalue[kv * dv + i] += Acc(dvh[i]);
      }
    };
    const auto lists = kernels::by_mask_part(
        groups.size(), mask, s.batch, kv_heads, [&](int64_t n) { return n / kv_heads; },
        [&](int64_t n) { return n % kv_heads; });
    kernels::parallel_tasks(lists.size(), [&](int64_t list, int64_t worker) {
      for (const int64_t group : lists[list]) run_group(group, mask.copies > 1 ? list : 0, worker);
    });
    auto result = [&](const Tensor& gradient, const Tensor& input, bool wanted) {
      return wanted ? gradient.to(input.scalar_type()) : at::empty({0}, q.options());
    };
    return {result(gq, q, needs[0]), result(gk, k, needs[1]), result(gv, v, needs[2]),
            make.result(gw, weight, needs[3]), make.mask_result(mask_gradient, attn_mask)};
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(headwise, CPU, m) { HEADWISE_REGISTER_CORE(m); }

}  // namespace headwise::ops
