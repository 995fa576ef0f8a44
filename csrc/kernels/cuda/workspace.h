// How much memory of the caller's a launcher works in, beside its arguments.
#pragma once

#include "../api_chain.h"
#include "../api_pool.h"

namespace fused_resnet::cuda {

// Ops that need any overload this.
template <class Args>
int64_t workspace_bytes(const Args&, const Gpu&) {
  return 0;
}
int64_t workspace_bytes(const BnStatsArgs& args, const Gpu& gpu);
int64_t workspace_bytes(const BnActBackwardReduceArgs& args, const Gpu& gpu);
int64_t workspace_bytes(const ReluBackwardReduceArgs& args, const Gpu& gpu);
int64_t workspace_bytes(const BnActGramArgs& args, const Gpu& gpu);
int64_t workspace_bytes(const ConvBnActArgs& args, const Gpu& gpu);
int64_t workspace_bytes(const ConvBnActMaxpoolArgs& args, const Gpu& gpu);
int64_t workspace_bytes(const ConvBnActAvgpoolArgs& args, const Gpu& gpu);
int64_t workspace_bytes(const ConvDgradArgs& args, const Gpu& gpu);
int64_t workspace_bytes(const ConvWgradArgs& args, const Gpu& gpu);
int64_t workspace_bytes(const BnActConvBnActArgs& args, const Gpu& gpu);
int64_t workspace_bytes(const BnActConvStatsArgs& args, const Gpu& gpu);
int64_t workspace_bytes(const BnBackwardConvDgradArgs& args, const Gpu& gpu);
int64_t workspace_bytes(const BnBackwardConvWgradArgs& args, const Gpu& gpu);
int64_t workspace_bytes(const ReluBackwardConvWgradArgs& args, const Gpu& gpu);
int64_t workspace_bytes(const BnActGramBackwardArgs& args, const Gpu& gpu);
int64_t workspace_bytes(const BnActMaxpoolBackwardReduceArgs& args, const Gpu& gpu);
int64_t workspace_bytes(const BnActMaxpoolBackwardArgs& args, const Gpu& gpu);

}  // namespace fused_resnet::cuda
