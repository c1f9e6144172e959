// The kernels of the distance transforms for this processor, for other operators' use.
#pragma once

#include "distance/distance_transform_cpu_kernel.h"

namespace pyseg {

const DistanceKernelTable& distance_kernel_table();

}  // namespace pyseg
