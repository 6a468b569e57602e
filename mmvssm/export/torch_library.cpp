// The ops of mmvssm for programs of torch that run without Python, such as packages of
// AOTInductor in C++. It registers them through torch's stable interface (2.10 or newer),
// and calls the compiled kernels. Tensors are float32, and nothing is kept for a backward
// pass. As with torch's own operators, NaN is no error.
//
// torch_library.py compiles it, and writes torch_schemas.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernel_args.h"

extern "C" {
int32_t mmvssm_lanes(int32_t isa);
#define MMVSSM_KERNEL(name, Args) \
  int32_t mmvssm_##name(int32_t isa, const mmvssm::Args* args, \
                        mmvssm::ParallelFor);
MMVSSM_KERNEL(scan_forward, ScanArgs)
MMVSSM_KERNEL(ss2d_forward, Ss2dArgs)
MMVSSM_KERNEL(pair_forward, PairArgs)
MMVSSM_KERNEL(conv_forward, ConvArgs)
MMVSSM_KERNEL(gate_forward, GateArgs)
MMVSSM_KERNEL(norm_forward, NormArgs)
MMVSSM_KERNEL(attention_forward, AttentionArgs)
}

namespace mmvssm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

// The best instruction set of this machine, or the one that MMVSSM_CPU_ISA names.
int32_t choose_isa() {
  static const char* const names[] = {"baseline", "avx2", "avx512"};
  const char* wanted = std::getenv("MMVSSM_CPU_ISA");
  for (int32_t isa = 2; isa >= 0; --isa) {
    if (wanted != nullptr && *wanted != 0 && std::strcmp(wanted, names[isa])) continue;
    if (mmvssm_lanes(isa)) return isa;
  }
  STD_TORCH_CHECK(false, "mmvssm: MMVSSM_CPU_ISA=", wanted,
                  " is no instruction set that the kernels and this machine have");
  return 0;
}

template <class Args>
void run(int32_t (*kernel)(int32_t, const Args*, ParallelFor), const Args& args) {
  static const int32_t isa = choose_isa();
  const int32_t status = kernel(isa, &args, (ParallelFor)torch_parallel_for);
  STD_TORCH_CHECK(status != kOutOfMemory, "mmvssm: no memory for a kernel's buffers");
}

// Refuses what only Python can run.
void check(const char* op, bool keep, std::initializer_list<Tensor> tensors) {
  STD_TORCH_CHECK(!keep, "mmvssm::", op,
                  ": the model was exported for training; export it under "
                  "torch.no_grad(), or with mmvssm.export.to_exported_program");
  for (const Tensor& x : tensors)
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_cpu(), "mmvssm::", op,
                    ": without Python it takes float32 on the CPU");
}

float* data(const Tensor& x) { return (float*)x.data_ptr(); }
float* data(const Maybe& x) { return x.has_value() ? data(*x) : nullptr; }

Tensor dense(const Tensor& x) { return torch::stable::contiguous(x); }
Maybe dense(const Maybe& x) { return x.has_value() ? Maybe(dense(*x)) : x; }

Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes) {
  return torch::stable::new_empty(like, sizes);
}

// (..., C, L) seen as (..., L, C), or the other way round.
Tensor turned(const Tensor& x) { return torch::stable::transpose(x, -2, -1); }

// A tensor of up to four axes, as it lies in memory.
Array array(const Tensor& x) {
  Array found = {x.data_ptr(), kFloat32, {}};
  for (int64_t axis = 0; axis < x.dim(); ++axis) found.stride[axis] = x.stride(axis);
  return found;
}
Array array(const Maybe& x) { return x.has_value() ? array(*x) : Array{}; }

// The same with its last axis reversed.
Array from_end(const Tensor& x) {
  Array found = array(x);
  const int64_t last = x.dim() - 1;
  found.data = (float*)found.data + (x.size(last) - 1) * x.stride(last);
  found.stride[last] = -x.stride(last);
  return found;
}

// x weight^T + bias by torch.
Tensor product(const Tensor& x, const Tensor& weight, const Maybe& bias = {}) {
  StableIValue stack[] = {torch::stable::detail::from(x),
                          torch::stable::detail::from(weight),
                          torch::stable::detail::from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor linear(const Tensor& x, const Tensor& weight, const Maybe& bias, bool, bool keep,
              const std::string&) {
  check("linear", keep, {x, weight});
  return dense(product(x, weight, bias));
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x_, const Tensor& weight_,
                                        const Maybe& residual_, double eps, ScalarType,
                                        ScalarType, ScalarType, bool, bool keep,
                                        const std::string&) {
  check("add_rms_norm", keep, {x_, weight_});
  const Tensor x = dense(x_), weight = dense(weight_);
  const Maybe residual = dense(residual_);
  const Tensor out = torch::stable::empty_like(x), total = torch::stable::empty_like(x);
  const int64_t channels = x.size(x.dim() - 1);
  const auto rows = [&](float* memory) {
    return memory == nullptr ? Array{} : Array{memory, kFloat32, {channels, 1}};
  };
  NormArgs args = {};
  args.rows = x.numel() / channels;
  args.channels = channels;
  args.eps = (float)eps;
  args.x = rows(data(x));
  args.residual = rows(data(residual));
  args.weight = data(weight);
  args.out = rows(data(out));
  args.total = rows(data(total));
  run(mmvssm_norm_forward, args);
  return {out, total};
}

std::tuple<Tensor, Tensor, Tensor> selective_scan(
    const Tensor& u, const Tensor& delta, const Tensor& A_, const Tensor& B,
    const Tensor& C, const Maybe& D_, const Maybe& z, const Maybe& bias_, bool softplus,
    ScalarType, bool, bool keep, const std::string&) {
  check("selective_scan", keep, {u, delta, A_, B, C});
  const Tensor A = dense(A_);
  const Maybe D = dense(D_), bias = dense(bias_);
  const Tensor out = torch::stable::empty_like(u);
  const Tensor last_state = empty(u, {u.size(0), u.size(1), A.size(1)});
  ScanArgs args = {};
  args.batch = u.size(0);
  args.channels = u.size(1);
  args.length = u.size(2);
  args.states = A.size(1);
  args.groups = B.size(1);
  args.softplus = softplus;
  args.u = array(u);
  args.delta = array(delta);
  args.z = array(z);
  args.B = array(B);
  args.C = array(C);
  args.A = data(A);
  args.D = data(D);
  args.bias = data(bias);
  args.out = array(out);
  args.last_state = data(last_state);
  run(mmvssm_scan_forward, args);
  return {out, last_state, empty(u, {0})};
}

std::tuple<Tensor, Tensor, Tensor> ss2d_scan(
    const Tensor& x, const Tensor& x_proj_weight, const Tensor& dt_weight_,
    const Tensor& dt_bias_, const Tensor& A_, const Tensor& Ds, const std::string& orders,
    ScalarType, ScalarType, bool keep, const std::string&) {
  check("ss2d_scan", keep, {x, x_proj_weight, dt_weight_, dt_bias_, A_, Ds});
  STD_TORCH_CHECK(orders == "cross", "mmvssm::ss2d_scan: without Python it has the scan ",
                  "order 'cross' only, not '", orders, "'");
  // (B, C, H, W) -> (B, H, W, C)
  const Tensor map = dense(turned(torch::stable::transpose(x, 1, 2)));
  const Tensor dt_weight = dense(dt_weight_), dt_bias = dense(dt_bias_), A = dense(A_),
               D = dense(Ds), out = torch::stable::empty_like(map);
  static const int32_t routes[] = {0, 1, 2, 3};
  const int64_t columns = x_proj_weight.size(0) * x_proj_weight.size(1);
  const Tensor weight = torch::stable::flatten(x_proj_weight, 0, 1);
  const Tensor projected = dense(product(map, weight));
  Ss2dArgs args = {};
  args.batch = x.size(0);
  args.channels = x.size(1);
  args.height = x.size(2);
  args.width = x.size(3);
  args.states = A.size(1);
  args.rank = dt_weight.size(2);
  args.orders = 4;
  args.positions = args.height * args.width;
  args.routes = routes;
  args.x = data(map);
  args.projected = data(projected);
  args.projected_stride = columns;
  args.dt_weight = data(dt_weight);
  args.dt_bias = data(dt_bias);
  args.A = data(A);
  args.D = data(D);
  args.out = data(out);
  run(mmvssm_ss2d_forward, args);
  const Tensor y = torch::stable::transpose(turned(out), 1, 2);
  return {y, empty(x, {0}), empty(x, {0})};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bidirectional_scan(
    const Tensor& x, const Tensor& z, const Tensor& conv_weight,
    const Tensor& conv_bias, const Tensor& x_proj_weight, const Tensor& dt_proj_weight,
    const Tensor& dt_proj_bias, const Tensor& A, const Tensor& D,
    const Tensor& conv_weight_b, const Tensor& conv_bias_b,
    const Tensor& x_proj_weight_b, const Tensor& dt_proj_weight_b,
    const Tensor& dt_proj_bias_b, const Tensor& A_b, const Tensor& D_b, bool average,
    ScalarType, ScalarType, bool keep, const std::string&) {
  check("bidirectional_scan", keep, {x, z, conv_weight, A, D, conv_weight_b, A_b, D_b});
  STD_TORCH_CHECK(conv_weight.size(1) == conv_weight_b.size(1),
                  "mmvssm::bidirectional_scan: without Python both convolutions have one "
                  "width, not ",
                  conv_weight.size(1), " and ", conv_weight_b.size(1));
  const int64_t batch = x.size(0), channels = x.size(1), length = x.size(2);
  const int64_t states = A.size(1);
  const Tensor weights[2][7] = {
      {dense(conv_weight), dense(conv_bias), x_proj_weight, dt_proj_weight,
       dense(dt_proj_bias), dense(A), dense(D)},
      {dense(conv_weight_b), dense(conv_bias_b), x_proj_weight_b, dt_proj_weight_b,
       dense(dt_proj_bias_b), dense(A_b), dense(D_b)}};
  std::vector<Tensor> u, y, read;
  ConvArgs conv = {};
  conv.batch = batch;
  conv.channels = channels;
  conv.length = length;
  conv.taps = conv_weight.size(1);
  conv.x = array(x);
  for (int i = 0; i < 2; ++i) {
    // (B, L, D) in memory, seen as (B, D, L)
    u.push_back(turned(empty(x, {batch, length, channels})));
    y.push_back(turned(empty(x, {batch, length, channels})));
    conv.directions[i].weight = data(weights[i][0]);
    conv.directions[i].bias = data(weights[i][1]);
    conv.directions[i].out = array(u[i]);
  }
  run(mmvssm_conv_forward, conv);
  const Tensor last_state = empty(x, {2, batch, channels, states});
  PairArgs pair = {};
  for (int i = 0; i < 2; ++i) {
    const Tensor projected = product(turned(u[i]), weights[i][2]);
    const int64_t rank = weights[i][3].size(1);
    Tensor low_rank = projected, B = projected, C = projected;
    low_rank = torch::stable::narrow(low_rank, 2, 0, rank);
    B = turned(torch::stable::unsqueeze(torch::stable::narrow(B, 2, rank, states), 1));
    C = turned(
        torch::stable::unsqueeze(torch::stable::narrow(C, 2, rank + states, states), 1));
    const Tensor delta = turned(product(low_rank, weights[i][3]));
    // They live until the kernel has read them.
    read.insert(read.end(), {projected, delta});
    const auto view = [i](const Tensor& t) { return i == 0 ? array(t) : from_end(t); };
    ScanArgs& scan = pair.directions[i];
    scan.batch = batch;
    scan.channels = channels;
    scan.length = length;
    scan.states = states;
    scan.groups = 1;
    scan.softplus = 1;
    scan.u = view(u[i]);
    scan.delta = view(delta);
    scan.B = view(B);
    scan.C = view(C);
    scan.A = data(weights[i][5]);
    scan.D = data(weights[i][6]);
    scan.bias = data(weights[i][4]);
    scan.out = view(y[i]);
    scan.last_state = data(last_state) + i * batch * channels * states;
  }
  run(mmvssm_pair_forward, pair);
  const Tensor out = turned(empty(x, {batch, length, channels}));
  GateArgs gate = {};
  gate.batch = batch;
  gate.channels = channels;
  gate.length = length;
  gate.scale = average ? 0.5f : 1.0f;
  gate.y = array(y[0]);
  gate.y_from_end = array(y[1]);
  gate.z = array(z);
  gate.out = array(out);
  run(mmvssm_gate_forward, gate);
  const Tensor none = empty(x, {0});
  return {out, none, empty(x, {0}), empty(x, {0}), empty(x, {0})};
}

// (B, L, C) with neighbouring channels.
Tensor positions(const Tensor& x) { return x.stride(2) == 1 ? x : dense(x); }

std::tuple<Tensor, Tensor> linear_attention(const Tensor& q_, const Tensor& k_,
                                            const Tensor& v_, const Maybe& cos_,
                                            const Maybe& sin_, int64_t heads,
                                            bool normalise, double eps, ScalarType,
                                            ScalarType, bool keep, const std::string&) {
  check("linear_attention", keep, {q_, k_, v_});
  const Tensor q = positions(q_), k = positions(k_), v = positions(v_);
  const Maybe cosine = dense(cos_), sine = dense(sin_);
  const Tensor out = empty(v, {v.size(0), v.size(1), v.size(2)});
  AttentionArgs args = {};
  args.batch = q.size(0);
  args.heads = heads;
  args.length = q.size(1);
  args.keys = q.size(2) / heads;
  args.values = v.size(2) / heads;
  args.normalise = normalise;
  args.eps = (float)eps;
  args.q = array(q);
  args.k = array(k);
  args.v = array(v);
  args.out = array(out);
  args.cosine = data(cosine);
  args.sine = data(sine);
  const int64_t keys = (args.keys + kPanel - 1) / kPanel * kPanel,
                values = (args.values + kPanel - 1) / kPanel * kPanel;
  const Tensor sums = empty(q, {args.batch, heads, 1 + values, keys});
  args.sums = data(sums);
  run(mmvssm_attention_forward, args);
  return {out, empty(q, {0})};
}

}  // namespace
}  // namespace mmvssm

// The declarations are those of the Python package.
STABLE_TORCH_LIBRARY(mmvssm, m) {
#define MMVSSM_SCHEMA(text) m.def(text);
#include "torch_schemas.h"
}

STABLE_TORCH_LIBRARY_IMPL(mmvssm, CPU, m) {
  using namespace mmvssm;
  m.impl("linear", TORCH_BOX(&mmvssm::linear));
  m.impl("add_rms_norm", TORCH_BOX(&mmvssm::add_rms_norm));
  m.impl("selective_scan", TORCH_BOX(&mmvssm::selective_scan));
  m.impl("ss2d_scan", TORCH_BOX(&mmvssm::ss2d_scan));
  m.impl("bidirectional_scan", TORCH_BOX(&mmvssm::bidirectional_scan));
  m.impl("linear_attention", TORCH_BOX(&mmvssm::linear_attention));
}
