#pragma once
#include "selective_scan.h"
namespace mmvssm { namespace MMVSSM_ISA {
static int32_t ss2d_forward(const Ss2dProblem& p, ParallelFor parallel_for) { return 0; }
static int32_t ss2d_backward(const Ss2dProblem& p, ParallelFor parallel_for) { return 0; }
}}
