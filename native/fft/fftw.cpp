#include "fft/fftw.hpp"

#include <dlfcn.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <stdexcept>
#include <tuple>

namespace znn {

namespace {

using Plan = void*;
using Complex = float[2];

// FFTW's documented constants (its manual, chapter "FFTW Reference").
constexpr unsigned flag_measure = 0u, flag_patient = 1u << 5, flag_estimate = 1u << 6;

struct Library {
    void* handle = nullptr;
    std::string path, version, rigour = "measure";
    unsigned flags = flag_measure;

    Plan (*plan_r2c)(int, const int*, float*, Complex*, unsigned) = nullptr;
    Plan (*plan_c2r)(int, const int*, Complex*, float*, unsigned) = nullptr;
    void (*execute_r2c)(Plan, float*, Complex*) = nullptr;
    void (*execute_c2r)(Plan, Complex*, float*) = nullptr;
    char* (*export_wisdom)() = nullptr;
    int (*import_wisdom)(const char*) = nullptr;
};

Library library;
std::mutex planner;  // FFTW's planner is not thread-safe

template <class Function>
void resolve(void* handle, const std::string& path, const char* name, Function& function) {
    void* symbol = dlsym(handle, name);
    if (!symbol) throw std::runtime_error(path + " is not a usable libfftw3f: it has no " + name);
    function = reinterpret_cast<Function>(symbol);
}

}  // namespace

void load_fftw(const std::string& path) {
    std::lock_guard guard(planner);
    if (library.handle) {
        if (library.path == path) return;
        throw std::runtime_error("FFTW is already loaded from " + library.path + ", cannot change to " + path);
    }
    void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!handle) throw std::runtime_error("cannot load FFTW from " + path + ": " + dlerror());
    resolve(handle, path, "fftwf_plan_dft_r2c", library.plan_r2c);
    resolve(handle, path, "fftwf_plan_dft_c2r", library.plan_c2r);
    resolve(handle, path, "fftwf_execute_dft_r2c", library.execute_r2c);
    resolve(handle, path, "fftwf_execute_dft_c2r", library.execute_c2r);
    resolve(handle, path, "fftwf_export_wisdom_to_string", library.export_wisdom);
    resolve(handle, path, "fftwf_import_wisdom_from_string", library.import_wisdom);
    const char* version = nullptr;
    resolve(handle, path, "fftwf_version", version);
    library.version = version;
    library.path = path;
    library.handle = handle;
}

bool fftw_loaded() { return library.handle != nullptr; }
std::string fftw_version() { return library.version; }
std::string fftw_path() { return library.path; }
std::string fftw_rigour() { return library.rigour; }

void set_fftw_rigour(const std::string& rigour) {
    std::lock_guard guard(planner);
    if (rigour == "estimate")
        library.flags = flag_estimate;
    else if (rigour == "measure")
        library.flags = flag_measure;
    else if (rigour == "patient")
        library.flags = flag_patient;
    else
        throw std::runtime_error("unknown FFTW rigour '" + rigour + "': expected estimate, measure or patient");
    library.rigour = rigour;
}

std::string export_wisdom() {
    std::lock_guard guard(planner);
    if (!library.handle) return {};
    char* text = library.export_wisdom();
    std::string wisdom = text ? text : "";
    std::free(text);
    return wisdom;
}

bool import_wisdom(const std::string& wisdom) {
    std::lock_guard guard(planner);
    return library.handle && library.import_wisdom(wisdom.c_str());
}

RealTransform::RealTransform(Extent t) {
    const std::size_t floats = std::size_t(t.z) * t.y * 2 * (t.x / 2 + 1);
    float* data = static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64));
    if (!data) throw std::bad_alloc();
    // Axes of extent 1 are left out: a 2D transform is planned as such.
    int extents[3], rank = 0;
    if (t.z > 1) extents[rank++] = t.z;
    if (t.y > 1 || rank) extents[rank++] = t.y;
    extents[rank++] = t.x;
    Complex* spectrum = reinterpret_cast<Complex*>(data);
    forward_ = library.plan_r2c(rank, extents, data, spectrum, library.flags);
    inverse_ = library.plan_c2r(rank, extents, spectrum, data, library.flags);
    std::free(data);
    if (!forward_ || !inverse_) throw std::runtime_error("FFTW cannot plan a transform of extent " + to_string(t));
}

const RealTransform& RealTransform::of(Extent t) {
    // Never freed, nor destroyed at exit: a network may outlive it, and FFTW would seem to leak.
    static auto& plans = *new std::map<std::tuple<int, int, int>, std::unique_ptr<RealTransform>>;
    std::lock_guard guard(planner);
    if (!library.handle) throw std::runtime_error("the fft method needs FFTW, and no libfftw3f is loaded");
    auto& plan = plans[{t.z, t.y, t.x}];
    if (!plan) plan = std::make_unique<RealTransform>(t);
    return *plan;
}

void RealTransform::forward(float* data) const {
    library.execute_r2c(forward_, data, reinterpret_cast<Complex*>(data));
}

void RealTransform::inverse(float* data) const {
    library.execute_c2r(inverse_, reinterpret_cast<Complex*>(data), data);
}

}  // namespace znn
