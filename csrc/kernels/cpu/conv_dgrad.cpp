#include "conv_panels.h"

FR_NAMESPACE_BEGIN

Status conv_dgrad(const ConvDgradArgs& args, const Pool& pool) { return Status::unsupported; }

FR_NAMESPACE_END
