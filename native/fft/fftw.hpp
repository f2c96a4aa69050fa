// The only place that knows an FFT library: FFTW in single precision, loaded at run time from a given file, so that
// neither its headers nor a system package are needed to build.
#pragma once
#include <cstddef>
#include <memory>
#include <string>

#include "base/extent.hpp"

namespace znn {

// Loads libfftw3f from `path`. Throws std::runtime_error naming the path and what is wrong with it.
void load_fftw(const std::string& path);
bool fftw_loaded();
std::string fftw_version();
std::string fftw_path();

// How long the planner may look: estimate (no measurement), measure, patient.
void set_fftw_rigour(const std::string& rigour);  // throws std::runtime_error naming an unknown value
std::string fftw_rigour();

// What the planner has learned, as text, to be kept with the machine.
std::string export_wisdom();
bool import_wisdom(const std::string& wisdom);

// In-place real transform of one real image of extent t, rows padded to 2*(t.x/2+1) floats: the spectrum is
// [t.z][t.y][t.x/2+1] interleaved complex. Plans are shared, made once per extent under one mutex, and never freed.
class RealTransform {
public:
    static const RealTransform& of(Extent t);  // throws std::runtime_error if FFTW is not loaded or cannot plan

    void forward(float* data) const;  // image -> spectrum
    void inverse(float* data) const;  // spectrum -> image, scaled by t.volume(); destroys the spectrum

    RealTransform(Extent t);

private:
    void* forward_ = nullptr;
    void* inverse_ = nullptr;
};

}  // namespace znn
