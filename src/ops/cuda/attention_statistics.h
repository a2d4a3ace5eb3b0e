// Attention statistics by the kernel, for checked inputs.
#pragma once

#include "ops/attention_statistics.h"

namespace headwise::ops::device {

Statistics attention_statistics(HEADWISE_STATISTICS_PARAMETERS);

}  // namespace headwise::ops::device
