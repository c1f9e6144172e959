// What launchers ask about the current device; the driver is asked once for each device.
#pragma once

namespace pyseg {

// 10 * major + minor, such as 80.
int compute_capability();
int multiprocessor_count();

}  // namespace pyseg
