// Which processors this process may use, and pinning. What cannot be found out is a value, not an error.
#pragma once
#include <sched.h>

#include <vector>

namespace znn {

// One logical processor per usable physical core: the affinity mask, thinned to one hardware thread a core, and cut to
// the CPU quota of the control group. Never empty.
std::vector<int> usable_physical_cores();

// All logical processors in the affinity mask.
std::vector<int> usable_processors();

// Pins the calling thread. False if the system refuses.
bool pin_this_thread(int processor);

// Whether the calling thread is on this processor now.
bool runs_on(int processor);

// Pins the calling thread while it lives; a negative processor pins nothing.
class PinnedThread {
public:
    explicit PinnedThread(int processor);
    ~PinnedThread();
    PinnedThread(const PinnedThread&) = delete;
    PinnedThread& operator=(const PinnedThread&) = delete;

private:
    cpu_set_t before_;
    bool pinned_ = false;
};

}  // namespace znn
