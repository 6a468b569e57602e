// The part of onnxruntime's C interface that onnx_library.cpp uses.
//
// The interface is a table of functions. It only grows at its end, and a place in it
// never gets another meaning. So the layout of one version is valid for all later ones.
// Names are those of onnxruntime, places that are not used have none.
#pragma once

#include <cstddef>
#include <cstdint>

// What onnxruntime gives as pointers only.
struct OrtStatus;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtShapeInferContext;
struct OrtCustomOp;

// That of onnxruntime 1.17, the first with KernelContext_ParallelFor.
constexpr uint32_t kOrtApiVersion = 17;

enum OrtErrorCode : int { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };
enum ONNXTensorElementDataType : int { ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1 };
enum OrtMemType : int { OrtMemTypeDefault = 0 };
enum OrtCustomOpInputOutputCharacteristic : int {
  INPUT_OUTPUT_REQUIRED = 0,
  INPUT_OUTPUT_OPTIONAL = 1,
};

struct OrtApi {
  OrtStatus* (*CreateStatus)(OrtErrorCode, const char* message);
  void* unused_1[25];
  OrtStatus* (*CreateCustomOpDomain)(const char* name, OrtCustomOpDomain** out);
  OrtStatus* (*CustomOpDomain_Add)(OrtCustomOpDomain*, const OrtCustomOp*);
  OrtStatus* (*AddCustomOpDomain)(OrtSessionOptions*, OrtCustomOpDomain*);
  void* unused_29[22];
  OrtStatus* (*GetTensorMutableData)(OrtValue*, void** out);
  void* unused_52[9];
  OrtStatus* (*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo*, size_t* out);
  OrtStatus* (*GetDimensions)(const OrtTensorTypeAndShapeInfo*, int64_t* out,
                              size_t count);
  void* unused_63[2];
  OrtStatus* (*GetTensorTypeAndShape)(const OrtValue*, OrtTensorTypeAndShapeInfo** out);
  void* unused_66[19];
  OrtStatus* (*KernelInfoGetAttribute_float)(const OrtKernelInfo*, const char* name,
                                             float* out);
  OrtStatus* (*KernelInfoGetAttribute_int64)(const OrtKernelInfo*, const char* name,
                                             int64_t* out);
  void* unused_87[3];
  OrtStatus* (*KernelContext_GetInput)(const OrtKernelContext*, size_t index,
                                       const OrtValue** out);
  OrtStatus* (*KernelContext_GetOutput)(OrtKernelContext*, size_t index,
                                        const int64_t* shape, size_t rank,
                                        OrtValue** out);
  void* unused_92[1];
  void (*ReleaseStatus)(OrtStatus*);
  void* unused_94[5];
  void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo*);
  void* unused_100[174];
  OrtStatus* (*KernelContext_ParallelFor)(const OrtKernelContext*,
                                          void (*function)(void* data, size_t index),
                                          size_t count, size_t batches, void* data);
};

#define MMVSSM_PLACE(name, place) \
  static_assert(offsetof(OrtApi, name) == (place) * sizeof(void*), #name)
MMVSSM_PLACE(CreateCustomOpDomain, 26);
MMVSSM_PLACE(GetTensorMutableData, 51);
MMVSSM_PLACE(GetDimensionsCount, 61);
MMVSSM_PLACE(GetTensorTypeAndShape, 65);
MMVSSM_PLACE(KernelInfoGetAttribute_float, 85);
MMVSSM_PLACE(KernelContext_GetInput, 90);
MMVSSM_PLACE(ReleaseStatus, 93);
MMVSSM_PLACE(ReleaseTensorTypeAndShapeInfo, 99);
MMVSSM_PLACE(KernelContext_ParallelFor, 274);
#undef MMVSSM_PLACE

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);  // null for a version that it lacks
  const char* (*GetVersionString)();
};

// A custom operator. Functions that are null have a default.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  ONNXTensorElementDataType (*GetInputType)(const OrtCustomOp*, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  ONNXTensorElementDataType (*GetOutputType)(const OrtCustomOp*, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void* kernel, OrtKernelContext*);
  void (*KernelDestroy)(void* kernel);
  OrtCustomOpInputOutputCharacteristic (*GetInputCharacteristic)(const OrtCustomOp*,
                                                                 size_t index);
  OrtCustomOpInputOutputCharacteristic (*GetOutputCharacteristic)(const OrtCustomOp*,
                                                                  size_t index);
  OrtMemType (*GetInputMemoryType)(const OrtCustomOp*, size_t index);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*,
                               void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
  // Of later versions.
  size_t (*GetMayInplace)(int** input, int** output);
  void (*ReleaseMayInplace)(int* input, int* output);
  size_t (*GetAliasMap)(int** input, int** output);
  void (*ReleaseAliasMap)(int* input, int* output);
};
