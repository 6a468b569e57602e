// What an operator of onnx_library.cpp is, and one call of it.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernel_args.h"
#include "onnxruntime_api.h"

namespace mmvssm {

constexpr int64_t kMaxRank = 8;

struct Shape {
  int64_t rank;
  int64_t sides[kMaxRank];
  int64_t elements() const {
    int64_t count = 1;
    for (int64_t i = 0; i < rank; ++i) count *= sides[i];
    return count;
  }
  int64_t operator[](int64_t i) const { return sides[i]; }
};

inline bool operator==(const Shape& a, const Shape& b) {
  return a.rank == b.rank && memcmp(a.sides, b.sides, a.rank * sizeof(int64_t)) == 0;
}

// A text that is cut where it gets too long.
class Text {
 public:
  Text& add(const char* format, ...) __attribute__((format(printf, 2, 3))) {
    va_list arguments;
    va_start(arguments, format);
    const int more = vsnprintf(text_ + size_, sizeof(text_) - size_, format, arguments);
    va_end(arguments);
    size_ += more < 0 ? 0 : more;
    if (size_ >= sizeof(text_)) size_ = sizeof(text_) - 1;
    return *this;
  }
  Text& add(const Shape& shape) {
    add("(");
    for (int64_t i = 0; i < shape.rank; ++i)
      add(i == 0 ? "%lld" : ", %lld", (long long)shape[i]);
    return add(shape.rank == 1 ? ",)" : ")");
  }
  const char* get() const { return text_; }

 private:
  char text_[600] = "";
  size_t size_ = 0;
};

class Call;

constexpr int kMaxInputs = 16, kMaxOptions = 3;

// What an operator is. `optional` is a mask of inputs. Outputs after the first may be
// absent.
struct Operator : OrtCustomOp {
  const char* name;
  int inputs;
  const char* input_names[kMaxInputs];
  uint32_t optional;
  int outputs;
  int options;
  struct {
    const char* name;
    bool is_float;
    float value;  // if the node has no such attribute
  } option[kMaxOptions];
  void (*compute)(Call&);
};

// An operator with the options of one node.
struct Node {
  const OrtApi* api;
  const Operator* op;
  float options[kMaxOptions];
};

// One run of a node. After the first error it does nothing more.
class Call {
 public:
  Call(const Node& node, OrtKernelContext* context)
      : api_(*node.api), node_(node), context_(context) {
    for (int i = 0; i < node.op->inputs; ++i) read(i);
  }

  OrtStatus* status() const { return status_; }
  bool failed() const { return status_ != nullptr; }
  float option(int index) const { return node_.options[index]; }

  bool has(int input) const { return has_[input]; }
  // Of an input that is absent or empty, perhaps null.
  const float* data(int input) const { return data_[input]; }
  const Shape& shape(int input) const { return shapes_[input]; }

  // Checks that an input has so many axes, and none of them is empty.
  bool expect_axes(int input, int64_t rank, const char* axes) {
    const Shape& shape = shapes_[input];
    if (failed()) return false;
    if (shape.rank == rank && shape.elements() > 0) return true;
    Text text;
    text.add("%s must be %s with no empty side, got ", name(input), axes).add(shape);
    return fail(text);
  }

  // Checks the shape of an input; one that is absent has any.
  bool expect(int input, const Shape& shape) {
    if (failed()) return false;
    if (!has(input) || shapes_[input] == shape) return true;
    Text text;
    text.add("%s must be ", name(input)).add(shape);
    return fail(text.add(", got ").add(shapes_[input]));
  }

  // Makes an output; null if the node does not have it.
  float* output(int index, const Shape& shape) {
    OrtValue* value = nullptr;
    void* data = nullptr;
    if (failed()) return nullptr;
    if (accept(api_.KernelContext_GetOutput(context_, index, shape.sides, shape.rank,
                                            &value)) &&
        value != nullptr)
      accept(api_.GetTensorMutableData(value, &data));
    return (float*)data;
  }

  // Runs a kernel on the threads of the session.
  template <class Args>
  void run(int32_t (*kernel)(const Args&, const Threads&), const Args& args) {
    if (failed()) return;
    if (kernel(args, {run_items, this}) == kOutOfMemory) fail_for_memory();
  }

  bool fail(const Text& why) {
    if (failed()) return false;
    Text text;
    text.add("mmvssm.%s: %s", node_.op->name, why.get());
    status_ = api_.CreateStatus(ORT_INVALID_ARGUMENT, text.get());
    return false;
  }
  void fail_for_memory() { fail(Text().add("there is no memory for its buffers")); }

 private:
  const char* name(int input) const { return node_.op->input_names[input]; }

  bool accept(OrtStatus* status) {
    if (status == nullptr) return !failed();
    if (failed())
      api_.ReleaseStatus(status);
    else
      status_ = status;
    return false;
  }

  void read(int input) {
    const OrtValue* value = nullptr;
    OrtTensorTypeAndShapeInfo* info = nullptr;
    void* data = nullptr;
    size_t rank = 0;
    if (!accept(api_.KernelContext_GetInput(context_, input, &value)) ||
        value == nullptr || !accept(api_.GetTensorTypeAndShape(value, &info)))
      return;
    has_[input] = true;
    if (accept(api_.GetDimensionsCount(info, &rank))) {
      Shape& shape = shapes_[input];
      shape.rank = rank;
      if (rank > kMaxRank)
        fail(Text().add("%s has too many axes", name(input)));
      else
        accept(api_.GetDimensions(info, shape.sides, rank));
    }
    api_.ReleaseTensorTypeAndShapeInfo(info);
    if (accept(api_.GetTensorMutableData((OrtValue*)value, &data)))
      data_[input] = (float*)data;
  }

  static void run_items(void* call, int64_t items, RangeFunction function,
                        void* context) {
    Call& self = *(Call*)call;
    struct Loop {
      RangeFunction function;
      void* context;
    } loop = {function, context};
    const auto run_one = [](void* data, size_t index) {
      const Loop& loop = *(const Loop*)data;
      loop.function(index, index + 1, loop.context);
    };
    if (items == 1)
      function(0, 1, context);
    else
      // Without batches, a thread that is done takes the next item.
      self.accept(self.api_.KernelContext_ParallelFor(self.context_, run_one, items, 0,
                                                      &loop));
  }

  const OrtApi& api_;
  const Node& node_;
  OrtKernelContext* const context_;
  OrtStatus* status_ = nullptr;
  bool has_[kMaxInputs] = {};
  const float* data_[kMaxInputs] = {};
  Shape shapes_[kMaxInputs] = {};
};

// Memory that lives as long as a call.
class Buffer {
 public:
  Buffer(Call& call, int64_t floats) {
    if (call.failed() || floats == 0) return;
    data_ = (float*)aligned_alloc(64, (floats * 4 + 63) / 64 * 64);
    if (data_ == nullptr) call.fail_for_memory();
  }
  ~Buffer() { free(data_); }
  Buffer(const Buffer&) = delete;
  operator float*() const { return data_; }

 private:
  float* data_ = nullptr;
};

}  // namespace mmvssm
