// The kernels as custom operators of onnxruntime, in the domain 'mmvssm'.
//
// Each operator has the inputs and the options of an op of mmvssm; see the declaration of
// that op. Tensors are float32. Maps and sequences of SS2DScan and BidirectionalScan are
// channels-last: (batch, height, width, channels) and (batch, length, channels). Loops run
// on the threads of the session. As with onnxruntime's own operators, NaN is no error.
#include "onnx_call.h"

namespace mmvssm {
namespace {

// Those of the instruction set in use.
const Kernels* kernels;

// A sequence (batch, channel, position) from memory (batch, position, channel).
Array sequence(const float* data, int64_t channels, int64_t length) {
  return {(void*)data, kFloat32, {channels * length, 1, channels}};
}

// The same from memory (batch, channel, position).
Array sequence_of_columns(const float* data, int64_t channels, int64_t length) {
  return {(void*)data, kFloat32, {channels * length, length, 1}};
}

// B or C (batch, group, state, position) from memory of rows, one for each position,
// that have other columns, too.
Array weights_of_rows(const float* data, int64_t columns, int64_t length) {
  return {(void*)data, kFloat32, {columns * length, 0, 1, columns}};
}

// Reverses the positions, the axis with that number.
void reverse(Array* x, int axis, int64_t length) {
  x->data = (float*)x->data + (length - 1) * x->stride[axis];
  x->stride[axis] = -x->stride[axis];
}

void ss2d_scan(Call& call) {
  if (!call.expect_axes(0, 4, "(batch, height, width, channels)") ||
      !call.expect_axes(2, 3, "(scans, channels, rank)") ||
      !call.expect_axes(4, 2, "(scans * channels, states)"))
    return;
  const Shape& x = call.shape(0);
  const int64_t batch = x[0], height = x[1], width = x[2], channels = x[3];
  const int64_t rank = call.shape(2)[2], states = call.shape(4)[1];
  // VMamba's four routes.
  static const int32_t routes[] = {0, 1, 2, 3};
  const int64_t orders = 4, columns = orders * (rank + 2 * states);
  call.expect(1, {3, {orders, rank + 2 * states, channels}});
  call.expect(2, {3, {orders, channels, rank}});
  call.expect(3, {2, {orders, channels}});
  call.expect(4, {2, {orders * channels, states}});
  call.expect(5, {1, {orders * channels}});
  float* y = call.output(0, x);
  const int64_t places = batch * height * width;
  const Buffer projected(call, places * columns);
  call.run(kernels->product, ProductArgs{places, columns, channels, call.data(0),
                                         channels, call.data(1), projected});
  Ss2dArgs scan = {};
  scan.batch = batch;
  scan.channels = channels;
  scan.height = height;
  scan.width = width;
  scan.states = states;
  scan.rank = rank;
  scan.orders = orders;
  scan.positions = height * width;
  scan.routes = routes;
  scan.x = call.data(0);
  scan.projected = projected;
  scan.projected_stride = columns;
  scan.dt_weight = call.data(2);
  scan.dt_bias = call.data(3);
  scan.A = call.data(4);
  scan.D = call.data(5);
  scan.out = y;
  call.run(kernels->ss2d_forward, scan);
}

// The weights of one direction of bidirectional_scan.
struct Direction {
  Direction(Call& call, int first, int64_t channels, int64_t taps, int64_t states) {
    if (!call.expect_axes(first + 3, 2, "(channels, rank)")) return;
    rank = call.shape(first + 3)[1];
    columns = rank + 2 * states;
    call.expect(first, {2, {channels, taps}});
    call.expect(first + 1, {1, {channels}});
    call.expect(first + 2, {2, {columns, channels}});
    call.expect(first + 3, {2, {channels, rank}});
    call.expect(first + 4, {1, {channels}});
    call.expect(first + 5, {2, {channels, states}});
    call.expect(first + 6, {1, {channels}});
    conv_weight = call.data(first);
    conv_bias = call.data(first + 1);
    x_proj_weight = call.data(first + 2);
    dt_proj_weight = call.data(first + 3);
    dt_proj_bias = call.data(first + 4);
    A = call.data(first + 5);
    D = call.data(first + 6);
  }
  int64_t rank = 0, columns = 0;
  const float *conv_weight, *conv_bias, *x_proj_weight, *dt_proj_weight, *dt_proj_bias,
      *A, *D;
};

void bidirectional_scan(Call& call) {
  if (!call.expect_axes(0, 3, "(batch, length, channels)") ||
      !call.expect_axes(2, 2, "(channels, width)") ||
      !call.expect_axes(7, 2, "(channels, states)"))
    return;
  const Shape& x = call.shape(0);
  const int64_t batch = x[0], length = x[1], channels = x[2];
  const int64_t taps = call.shape(2)[1], states = call.shape(7)[1];
  call.expect(1, x);
  const Direction directions[] = {{call, 2, channels, taps, states},
                                  {call, 9, channels, taps, states}};
  float* out = call.output(0, x);
  const int64_t rows = batch * length, size = rows * channels;
  const Buffer u[] = {{call, size}, {call, size}};
  const Buffer delta[] = {{call, size}, {call, size}};
  const Buffer y[] = {{call, size}, {call, size}};
  const Buffer projected[] = {{call, rows * directions[0].columns},
                              {call, rows * directions[1].columns}};
  const Buffer last_state(call, 2 * batch * channels * states);
  if (call.failed()) return;

  ConvArgs conv = {};
  conv.batch = batch;
  conv.channels = channels;
  conv.length = length;
  conv.taps = taps;
  conv.x = sequence(call.data(0), channels, length);
  for (int i = 0; i < 2; ++i) {
    conv.directions[i].weight = directions[i].conv_weight;
    conv.directions[i].bias = directions[i].conv_bias;
    conv.directions[i].out = sequence(u[i], channels, length);
  }
  call.run(kernels->conv_forward, conv);

  PairArgs pair = {};
  for (int i = 0; i < 2; ++i) {
    const Direction& d = directions[i];
    call.run(kernels->product, ProductArgs{rows, d.columns, channels, u[i], channels,
                                           d.x_proj_weight, projected[i]});
    call.run(kernels->product, ProductArgs{rows, channels, d.rank, projected[i],
                                           d.columns, d.dt_proj_weight, delta[i]});
    ScanArgs& scan = pair.directions[i];
    scan.batch = batch;
    scan.channels = channels;
    scan.length = length;
    scan.states = states;
    scan.groups = 1;
    scan.softplus = 1;
    scan.u = sequence(u[i], channels, length);
    scan.delta = sequence(delta[i], channels, length);
    scan.out = sequence(y[i], channels, length);
    scan.B = weights_of_rows(projected[i] + d.rank, d.columns, length);
    scan.C = weights_of_rows(projected[i] + d.rank + states, d.columns, length);
    scan.A = d.A;
    scan.D = d.D;
    scan.bias = d.dt_proj_bias;
    scan.last_state = last_state + i * batch * channels * states;
  }
  ScanArgs& last = pair.directions[1];
  reverse(&last.u, 2, length);
  reverse(&last.delta, 2, length);
  reverse(&last.out, 2, length);
  reverse(&last.B, 3, length);
  reverse(&last.C, 3, length);
  call.run(kernels->pair_forward, pair);

  GateArgs gate = {};
  gate.batch = batch;
  gate.channels = channels;
  gate.length = length;
  gate.scale = call.option(0) != 0 ? 0.5f : 1.0f;
  gate.y = sequence(y[0], channels, length);
  gate.y_from_end = sequence(y[1], channels, length);
  gate.z = sequence(call.data(1), channels, length);
  gate.out = sequence(out, channels, length);
  call.run(kernels->gate_forward, gate);
}

void selective_scan(Call& call) {
  if (!call.expect_axes(0, 3, "(batch, channels, length)") ||
      !call.expect_axes(2, 2, "(channels, states)") ||
      !call.expect_axes(3, 4, "(batch, groups, states, length)"))
    return;
  const Shape &u = call.shape(0), &B = call.shape(3);
  const int64_t batch = u[0], channels = u[1], length = u[2];
  const int64_t states = call.shape(2)[1], groups = B[1];
  if (channels % groups) {
    call.fail(Text().add("the %lld groups of B and C do not divide the %lld channels",
                         (long long)groups, (long long)channels));
    return;
  }
  call.expect(1, u);
  call.expect(2, {2, {channels, states}});
  call.expect(3, {4, {batch, groups, states, length}});
  call.expect(4, B);
  call.expect(5, {1, {channels}});
  call.expect(6, u);
  call.expect(7, {1, {channels}});
  float* out = call.output(0, u);
  const Shape last = {3, {batch, channels, states}};
  float* last_state = call.output(1, last);
  const Buffer buffer(call, last_state == nullptr ? last.elements() : 0);
  ScanArgs scan = {};
  scan.batch = batch;
  scan.channels = channels;
  scan.length = length;
  scan.states = states;
  scan.groups = groups;
  scan.softplus = call.option(0) != 0;
  scan.u = sequence_of_columns(call.data(0), channels, length);
  scan.delta = sequence_of_columns(call.data(1), channels, length);
  const int64_t group = states * length;
  scan.B = {(void*)call.data(3), kFloat32, {groups * group, group, length, 1}};
  scan.C = {(void*)call.data(4), kFloat32, {groups * group, group, length, 1}};
  scan.A = call.data(2);
  scan.D = call.data(5);
  if (call.has(6)) scan.z = sequence_of_columns(call.data(6), channels, length);
  scan.bias = call.data(7);
  scan.out = sequence_of_columns(out, channels, length);
  scan.last_state = last_state == nullptr ? (float*)buffer : last_state;
  call.run(kernels->scan_forward, scan);
}

// (batch, position, channel)
Array positions(const float* data, const Shape& shape) {
  return {(void*)data, kFloat32, {shape[1] * shape[2], shape[2], 1}};
}

void linear_attention(Call& call) {
  const int64_t heads = (int64_t)call.option(0);
  if (!call.expect_axes(0, 3, "(batch, length, channels)") ||
      !call.expect_axes(2, 3, "(batch, length, channels)"))
    return;
  const Shape &q = call.shape(0), &v = call.shape(2);
  const int64_t batch = q[0], length = q[1];
  const bool turned = call.has(3);
  if (heads < 1 || q[2] % heads || v[2] % heads || (turned && q[2] / heads % 2)) {
    call.fail(Text().add("%lld heads do not fit %lld channels of q and k and %lld of "
                         "v%s",
                         (long long)heads, (long long)q[2], (long long)v[2],
                         turned ? " with whole pairs of channels for cos and sin" : ""));
    return;
  }
  if (turned != call.has(4)) {
    call.fail(Text().add("cos and sin must be given together"));
    return;
  }
  call.expect(1, q);
  call.expect(2, {3, {batch, length, v[2]}});
  call.expect(3, {2, {length, q[2] / 2}});
  call.expect(4, {2, {length, q[2] / 2}});
  AttentionArgs args = {};
  args.batch = batch;
  args.heads = heads;
  args.length = length;
  args.keys = q[2] / heads;
  args.values = v[2] / heads;
  args.normalise = call.option(1) != 0;
  args.eps = call.option(2);
  args.q = positions(call.data(0), q);
  args.k = positions(call.data(1), q);
  args.v = positions(call.data(2), v);
  args.cosine = call.data(3);
  args.sine = call.data(4);
  args.out = positions(call.output(0, v), v);
  const int64_t keys = (args.keys + kPanel - 1) / kPanel * kPanel,
                values = (args.values + kPanel - 1) / kPanel * kPanel;
  const Buffer sums(call, batch * heads * keys * (1 + values));
  args.sums = sums;
  call.run(kernels->attention_forward, args);
}

// (row, channel)
Array rows(const float* data, int64_t channels) {
  return {(void*)data, kFloat32, {channels, 1}};
}

void add_rms_norm(Call& call) {
  if (call.failed()) return;
  const Shape& x = call.shape(0);
  const int64_t channels = x.rank == 0 ? 0 : x[x.rank - 1];
  if (x.elements() == 0 || channels == 0) {
    call.fail(Text().add("x must be (..., channels) with no empty side, got ").add(x));
    return;
  }
  call.expect(1, {1, {channels}});
  call.expect(2, x);
  NormArgs args = {};
  args.rows = x.elements() / channels;
  args.channels = channels;
  args.eps = call.option(0);
  args.x = rows(call.data(0), channels);
  if (call.has(2)) args.residual = rows(call.data(2), channels);
  args.weight = call.data(1);
  args.out = rows(call.output(0, x), channels);
  args.total = rows(call.output(1, x), channels);
  call.run(kernels->norm_forward, args);
}

// What onnxruntime asks an operator.

const Operator& as_operator(const OrtCustomOp* op) { return *(const Operator*)op; }

OrtStatus* create_kernel(const OrtCustomOp* op, const OrtApi* api,
                         const OrtKernelInfo* info, void** kernel) {
  const Operator& self = as_operator(op);
  Node* node = (Node*)malloc(sizeof(Node));
  if (node == nullptr) return api->CreateStatus(ORT_FAIL, "mmvssm: there is no memory");
  *node = {api, &self, {}};
  for (int i = 0; i < self.options; ++i) {
    int64_t number = (int64_t)self.option[i].value;
    float value = self.option[i].value;
    OrtStatus* status =
        self.option[i].is_float
            ? api->KernelInfoGetAttribute_float(info, self.option[i].name, &value)
            : api->KernelInfoGetAttribute_int64(info, self.option[i].name, &number);
    if (status != nullptr) api->ReleaseStatus(status);
    node->options[i] = self.option[i].is_float ? value : (float)number;
  }
  *kernel = node;
  return nullptr;
}

OrtStatus* compute(void* kernel, OrtKernelContext* context) {
  const Node& node = *(const Node*)kernel;
  Call call(node, context);
  node.op->compute(call);
  return call.status();
}

constexpr OrtCustomOp kInterface = {
    kOrtApiVersion,
    [](const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*) -> void* {
      return nullptr;  // See CreateKernelV2.
    },
    [](const OrtCustomOp* op) { return as_operator(op).name; },
    [](const OrtCustomOp*) -> const char* { return nullptr; },
    [](const OrtCustomOp*, size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; },
    [](const OrtCustomOp* op) { return (size_t)as_operator(op).inputs; },
    [](const OrtCustomOp*, size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; },
    [](const OrtCustomOp* op) { return (size_t)as_operator(op).outputs; },
    [](void*, OrtKernelContext*) {},  // See KernelComputeV2.
    [](void* kernel) { free(kernel); },
    [](const OrtCustomOp* op, size_t index) {
      return as_operator(op).optional >> index & 1 ? INPUT_OUTPUT_OPTIONAL
                                                   : INPUT_OUTPUT_REQUIRED;
    },
    [](const OrtCustomOp*, size_t index) {
      return index > 0 ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
    },
    [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; },
    [](const OrtCustomOp*) { return 1; },
    [](const OrtCustomOp*) { return 1; },
    [](const OrtCustomOp*) { return 1; },
    [](const OrtCustomOp*) { return 1; },
    create_kernel,
    compute,
    nullptr,
    [](const OrtCustomOp*) { return 1; },
    [](const OrtCustomOp*) { return INT32_MAX; },
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

const Operator operators[] = {
    {kInterface,
     "SS2DScan",
     6,
     {"x", "x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A", "Ds"},
     0,
     1,
     0,
     {},
     ss2d_scan},
    {kInterface,
     "BidirectionalScan",
     16,
     {"x", "z", "forward.conv_weight", "forward.conv_bias", "forward.x_proj_weight",
      "forward.dt_proj_weight", "forward.dt_proj_bias", "forward.A", "forward.D",
      "backward.conv_weight", "backward.conv_bias", "backward.x_proj_weight",
      "backward.dt_proj_weight", "backward.dt_proj_bias", "backward.A", "backward.D"},
     0,
     1,
     1,
     {{"average", false, 0}},
     bidirectional_scan},
    {kInterface,
     "SelectiveScan",
     8,
     {"u", "delta", "A", "B", "C", "D", "z", "delta_bias"},
     1 << 5 | 1 << 6 | 1 << 7,
     2,
     1,
     {{"delta_softplus", false, 0}},
     selective_scan},
    {kInterface,
     "LinearAttention",
     5,
     {"q", "k", "v", "cos", "sin"},
     1 << 3 | 1 << 4,
     1,
     3,
     {{"heads", false, 1}, {"normalise", false, 1}, {"eps", true, 1e-6f}},
     linear_attention},
    {kInterface,
     "AddRMSNorm",
     3,
     {"x", "weight", "residual"},
     1 << 2,
     2,
     1,
     {{"eps", true, 1e-5f}},
     add_rms_norm},
};

// The best instruction set of this machine, or the one that MMVSSM_CPU_ISA names. Null
// if it is not available.
const Kernels* choose_kernels() {
  static const char* const names[] = {"baseline", "avx2", "avx512"};
  const char* wanted = getenv("MMVSSM_CPU_ISA");
  for (int isa = 2; isa >= 0; --isa) {
    if (wanted != nullptr && *wanted != 0 && strcmp(wanted, names[isa])) continue;
    if (const Kernels* found = find_kernels(isa)) return found;
  }
  return nullptr;
}

// The domain of all sessions; it lives as long as the process.
OrtStatus* make_domain(const OrtApi& api, OrtCustomOpDomain** domain) {
  if (OrtStatus* status = api.CreateCustomOpDomain("mmvssm", domain)) return status;
  for (const Operator& op : operators)
    if (OrtStatus* status = api.CustomOpDomain_Add(*domain, &op)) return status;
  return nullptr;
}

}  // namespace
}  // namespace mmvssm

// What SessionOptions.register_custom_ops_library calls.
extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(
    OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace mmvssm;
  const OrtApi* api = base->GetApi(kOrtApiVersion);
  if (api == nullptr) {
    // Version 1 has the function, too.
    Text text;
    text.add("the kernels of mmvssm need onnxruntime 1.17 or newer, this is %s",
             base->GetVersionString());
    return base->GetApi(1)->CreateStatus(ORT_FAIL, text.get());
  }
  const Kernels* chosen = choose_kernels();
  if (chosen == nullptr)
    return api->CreateStatus(ORT_FAIL,
                             "MMVSSM_CPU_ISA names an instruction set that mmvssm's "
                             "kernels or this machine do not have");
  kernels = chosen;
  static OrtCustomOpDomain* shared = nullptr;
  OrtCustomOpDomain* domain = __atomic_load_n(&shared, __ATOMIC_ACQUIRE);
  if (domain == nullptr) {
    if (OrtStatus* status = make_domain(*api, &domain)) return status;
    OrtCustomOpDomain* none = nullptr;
    // Another thread may have been faster. This domain is then used once.
    __atomic_compare_exchange_n(&shared, &none, domain, false, __ATOMIC_RELEASE,
                                __ATOMIC_RELAXED);
  }
  return api->AddCustomOpDomain(options, domain);
}
