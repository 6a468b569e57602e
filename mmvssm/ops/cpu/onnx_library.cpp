// The kernels as custom operators of onnxruntime, in the domain 'mmvssm'.
//
// Each operator has the name, the inputs and the options of an op of mmvssm; see the
// declaration of that op. Tensors are float32 and contiguous. Loops run on the threads
// of the session. As with onnxruntime's own operators, NaN in an input is no error.
#include "onnx_call.h"

namespace mmvssm {
namespace {

// Those of the instruction set in use.
const Kernels* kernels;

// Arrays of three axes that are neighbours in memory in this or another order.
Array array(const float* data, int64_t first, int64_t second, int64_t third) {
  return {(void*)data, kFloat32, {first, second, third}};
}

// (batch, channel, position), from memory that is so or (batch, position, channel).
Array sequence(const float* data, int64_t channels, int64_t length,
               bool channels_last) {
  return channels_last ? array(data, channels * length, 1, channels)
                       : array(data, channels * length, length, 1);
}

// Reverses the positions, the axis with that number.
void reverse(Array* x, int axis, int64_t length) {
  x->data = (float*)x->data + (length - 1) * x->stride[axis];
  x->stride[axis] = -x->stride[axis];
}

void ss2d_scan(Call& call) {
  const bool channels_last = call.option(0) != 0;
  if (!call.expect_axes(0, 4,
                        channels_last ? "(batch, height, width, channels)"
                                      : "(batch, channels, height, width)") ||
      !call.expect_axes(2, 3, "(scans, channels, rank)") ||
      !call.expect_axes(4, 2, "(scans * channels, states)"))
    return;
  const Shape& x = call.shape(0);
  const int64_t batch = x[0], channels = x[channels_last ? 3 : 1];
  const int64_t height = x[channels_last ? 1 : 2], width = x[channels_last ? 2 : 3];
  // VMamba's four routes.
  static const int32_t routes[] = {0, 1, 2, 3};
  const int64_t orders = 4, rank = call.shape(2)[2], states = call.shape(4)[1];
  const int64_t columns = orders * (rank + 2 * states), length = height * width;
  call.expect(1, {3, {orders, rank + 2 * states, channels}});
  call.expect(2, {3, {orders, channels, rank}});
  call.expect(3, {2, {orders, channels}});
  call.expect(4, {2, {orders * channels, states}});
  call.expect(5, {1, {orders * channels}});
  float* y = call.output(0, x);
  const int64_t copied = channels_last ? 0 : x.elements();
  const Buffer projected(call, batch * length * columns), rows(call, copied),
      out(call, copied);
  ProductArgs product = {};
  product.batch = batch;
  product.channels = channels;
  product.length = length;
  product.columns = columns;
  product.x = sequence(call.data(0), channels, length, channels_last);
  product.weight = call.data(1);
  product.rows = channels_last ? nullptr : (float*)rows;
  product.out = projected;
  call.run(kernels->product, product);
  Ss2dArgs scan = {};
  scan.batch = batch;
  scan.channels = channels;
  scan.height = height;
  scan.width = width;
  scan.states = states;
  scan.rank = rank;
  scan.orders = orders;
  scan.positions = length;
  scan.routes = routes;
  scan.x = channels_last ? call.data(0) : rows;
  scan.projected = projected;
  scan.projected_stride = columns;
  scan.dt_weight = call.data(2);
  scan.dt_bias = call.data(3);
  scan.A = call.data(4);
  scan.D = call.data(5);
  scan.out = channels_last ? y : (float*)out;
  call.run(kernels->ss2d_forward, scan);
  if (!channels_last)
    call.run(kernels->copy_to_columns, CopyArgs{batch, channels, length, out, y});
}

// One direction of bidirectional_scan: its weights, and where they are.
struct Direction {
  int first;  // input
  int64_t taps, rank;
  const float* conv_weight;
};

// A convolution's weight (channel, tap), with zeros before the first taps.
void pad_taps(const float* from, int64_t channels, int64_t taps, int64_t padded,
              float* to) {
  memset(to, 0, channels * padded * 4);
  for (int64_t c = 0; c < channels; ++c)
    memcpy(to + c * padded + padded - taps, from + c * taps, taps * 4);
}

void bidirectional_scan(Call& call) {
  const bool average = call.option(0) != 0, channels_last = call.option(1) != 0;
  Direction directions[] = {{2, 0, 0, nullptr}, {9, 0, 0, nullptr}};
  if (!call.expect_axes(
          0, 3,
          channels_last ? "(batch, length, channels)" : "(batch, channels, length)"))
    return;
  const Shape& x = call.shape(0);
  const int64_t batch = x[0], channels = x[channels_last ? 2 : 1],
                length = x[channels_last ? 1 : 2];
  call.expect(1, x);
  int64_t taps = 0, states = 0;
  for (Direction& d : directions) {
    if (!call.expect_axes(d.first, 2, "(channels, width)") ||
        !call.expect_axes(d.first + 3, 2, "(channels, rank)") ||
        !call.expect_axes(d.first + 5, 2, "(channels, states)"))
      return;
    d.taps = call.shape(d.first)[1];
    d.rank = call.shape(d.first + 3)[1];
    d.conv_weight = call.data(d.first);
    taps = d.taps > taps ? d.taps : taps;
    // One scan computes both directions.
    if (states == 0) states = call.shape(d.first + 5)[1];
    call.expect(d.first, {2, {channels, d.taps}});
    call.expect(d.first + 1, {1, {channels}});
    call.expect(d.first + 2, {2, {d.rank + 2 * states, channels}});
    call.expect(d.first + 3, {2, {channels, d.rank}});
    call.expect(d.first + 4, {1, {channels}});
    call.expect(d.first + 5, {2, {channels, states}});
    call.expect(d.first + 6, {1, {channels}});
  }
  float* out = call.output(0, x);
  const int64_t size = batch * channels * length;
  const Buffer padded[2] = {{call, channels * taps}, {call, channels * taps}};
  const Buffer u[2] = {{call, size}, {call, size}};
  const Buffer delta[2] = {{call, size}, {call, size}};
  const Buffer y[2] = {{call, size}, {call, size}};
  const Buffer last_state(call, 2 * batch * channels * states);
  const Buffer projected[2] = {
      {call, batch * length * (directions[0].rank + 2 * states)},
      {call, batch * length * (directions[1].rank + 2 * states)}};
  if (call.failed()) return;

  ConvArgs conv = {};
  conv.batch = batch;
  conv.channels = channels;
  conv.length = length;
  conv.taps = taps;
  conv.x = sequence(call.data(0), channels, length, channels_last);
  for (int i = 0; i < 2; ++i) {
    const Direction& d = directions[i];
    if (d.taps < taps) pad_taps(d.conv_weight, channels, d.taps, taps, padded[i]);
    conv.directions[i].weight = d.taps < taps ? padded[i] : d.conv_weight;
    conv.directions[i].bias = call.data(d.first + 1);
    conv.directions[i].out = sequence(u[i], channels, length, true);
  }
  call.run(kernels->conv_forward, conv);

  PairArgs pair = {};
  for (int i = 0; i < 2; ++i) {
    const Direction& d = directions[i];
    const int64_t columns = d.rank + 2 * states;
    ProductArgs product = {};
    product.batch = batch;
    product.channels = channels;
    product.length = length;
    product.columns = columns;
    product.x = conv.directions[i].out;
    product.weight = call.data(d.first + 2);
    product.out = projected[i];
    call.run(kernels->product, product);
    product.channels = d.rank;
    product.columns = channels;
    product.x = array(projected[i], length * columns, 1, columns);
    product.weight = call.data(d.first + 3);
    product.out = delta[i];
    call.run(kernels->product, product);

    ScanArgs& scan = pair.directions[i];
    scan.batch = batch;
    scan.channels = channels;
    scan.length = length;
    scan.states = states;
    scan.groups = 1;
    scan.softplus = 1;
    scan.u = conv.directions[i].out;
    scan.delta = sequence(delta[i], channels, length, true);
    scan.out = sequence(y[i], channels, length, true);
    scan.B = {projected[i] + d.rank, kFloat32, {length * columns, 0, 1, columns}};
    scan.C = {projected[i] + d.rank + states,
              kFloat32,
              {length * columns, 0, 1, columns}};
    if (i == 1) {
      reverse(&scan.u, 2, length);
      reverse(&scan.delta, 2, length);
      reverse(&scan.out, 2, length);
      reverse(&scan.B, 3, length);
      reverse(&scan.C, 3, length);
    }
    scan.bias = call.data(d.first + 4);
    scan.A = call.data(d.first + 5);
    scan.D = call.data(d.first + 6);
    scan.last_state = last_state + i * batch * channels * states;
  }
  call.run(kernels->pair_forward, pair);

  GateArgs gate = {};
  gate.batch = batch;
  gate.channels = channels;
  gate.length = length;
  gate.scale = average ? 0.5f : 1.0f;
  gate.y = sequence(y[0], channels, length, true);
  gate.y_from_end = sequence(y[1], channels, length, true);
  gate.z = sequence(call.data(1), channels, length, channels_last);
  gate.out = sequence(out, channels, length, channels_last);
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
  scan.u = sequence(call.data(0), channels, length, false);
  scan.delta = sequence(call.data(1), channels, length, false);
  const int64_t group = states * length;
  scan.B = {(void*)call.data(3), kFloat32, {groups * group, group, length, 1}};
  scan.C = {(void*)call.data(4), kFloat32, {groups * group, group, length, 1}};
  scan.A = call.data(2);
  scan.D = call.data(5);
  if (call.has(6)) scan.z = sequence(call.data(6), channels, length, false);
  scan.bias = call.data(7);
  scan.out = sequence(out, channels, length, false);
  scan.last_state = last_state == nullptr ? (float*)buffer : last_state;
  call.run(kernels->scan_forward, scan);
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
  args.q = array(call.data(0), length * q[2], q[2], 1);
  args.k = array(call.data(1), length * q[2], q[2], 1);
  args.v = array(call.data(2), length * v[2], v[2], 1);
  args.cosine = call.data(3);
  args.sine = call.data(4);
  args.out = array(call.output(0, v), length * v[2], v[2], 1);
  const int64_t keys = (args.keys + kPanel - 1) / kPanel * kPanel,
                values = (args.values + kPanel - 1) / kPanel * kPanel;
  const Buffer sums(call, batch * heads * keys * (1 + values));
  args.sums = sums;
  call.run(kernels->attention_forward, args);
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
  args.x = array(call.data(0), channels, 1, 0);
  if (call.has(2)) args.residual = array(call.data(2), channels, 1, 0);
  args.weight = call.data(1);
  args.out = array(call.output(0, x), channels, 1, 0);
  args.total = array(call.output(1, x), channels, 1, 0);
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

constexpr const char* kChannelsLast = "channels_last";

const Operator operators[] = {
    {kInterface,
     "SS2DScan",
     6,
     {"x", "x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A", "Ds"},
     0,
     1,
     1,
     {{kChannelsLast, false, 0}},
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
     2,
     {{"average", false, 0}, {kChannelsLast, false, 0}},
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
