// Compiled once for each instruction set, into the namespace MMVSSM_ISA.
#include "add_norm.h"
#include "bidirectional_scan.h"
#include "linear_attention.h"
#include "product.h"
#include "selective_scan.h"
#include "ss2d_scan.h"

namespace mmvssm {
namespace MMVSSM_ISA {

extern const Kernels kernels;
const Kernels kernels = {
    kLanes,         channel_blocks_of, scan_forward,      scan_backward,
    ss2d_forward,   ss2d_backward,     pair_forward,      pair_backward,
    conv_forward,   conv_backward,     gate_forward,      gate_backward,
    norm_forward,   norm_backward,     attention_forward, attention_backward,
    product};

}  // namespace MMVSSM_ISA
}  // namespace mmvssm
