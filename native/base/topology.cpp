#include "base/topology.hpp"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <set>
#include <string>

namespace znn {

namespace {

// The first hardware thread of the core that `processor` belongs to.
std::string core_key(int processor) {
    std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(processor) + "/topology/thread_siblings_list");
    std::string siblings;
    if (!(file >> siblings)) return std::to_string(processor);
    return siblings;
}

// Processors granted by the control group's quota, or a very large number.
double quota() {
    double limit = 1e9;
    std::ifstream v2("/sys/fs/cgroup/cpu.max");
    std::string max;
    double period = 0;
    if (v2 >> max >> period && max != "max" && period > 0) limit = std::stod(max) / period;
    std::ifstream v1("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), v1_period("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
    double granted = 0;
    if (v1 >> granted && v1_period >> period && granted > 0 && period > 0) limit = std::min(limit, granted / period);
    return limit;
}

}  // namespace

std::vector<int> usable_processors() {
    std::vector<int> processors;
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0)
        for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
            if (CPU_ISSET(cpu, &set)) processors.push_back(cpu);
    if (processors.empty()) processors.push_back(0);
    return processors;
}

std::vector<int> usable_physical_cores() {
    std::vector<int> cores;
    std::set<std::string> seen;
    for (int processor : usable_processors())
        if (seen.insert(core_key(processor)).second) cores.push_back(processor);
    const auto granted = static_cast<std::size_t>(std::max(1.0, std::floor(quota())));
    if (cores.size() > granted) cores.resize(granted);
    return cores;
}

bool pin_this_thread(int processor) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(processor, &set);
    return pthread_setaffinity_np(pthread_self(), sizeof set, &set) == 0;
}

bool runs_on(int processor) { return sched_getcpu() == processor; }

PinnedThread::PinnedThread(int processor) {
    if (processor < 0 || pthread_getaffinity_np(pthread_self(), sizeof before_, &before_) != 0) return;
    pinned_ = pin_this_thread(processor);
}

PinnedThread::~PinnedThread() {
    if (pinned_) pthread_setaffinity_np(pthread_self(), sizeof before_, &before_);
}

}  // namespace znn
