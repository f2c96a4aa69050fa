// Which processors this process may use, and pinning. What cannot be found out is a value, not an error.
#pragma once
#include <vector>

namespace znn {

// One logical processor per usable physical core: the affinity mask, thinned to one hardware thread a core, and cut to
// the CPU quota of the control group. Never empty.
std::vector<int> usable_physical_cores();

// All logical processors in the affinity mask.
std::vector<int> usable_processors();

// Pins the calling thread. False if the system refuses.
bool pin_this_thread(int processor);

}  // namespace znn
