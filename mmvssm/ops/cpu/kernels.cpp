// Compiled once for each instruction set, named by MMVSSM_ISA.
#include "selective_scan.h"
#include "ss2d_scan.h"

namespace mmvssm {
namespace MMVSSM_ISA {

extern const Kernels kernels;
const Kernels kernels = {kLanes,        strips_of,    scan_forward,
                         scan_backward, ss2d_forward, ss2d_backward};

}  // namespace MMVSSM_ISA
}  // namespace mmvssm
