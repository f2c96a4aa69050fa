// Tensors of other libraries without a copy: the DLPack protocol (https://dmlc.github.io/dlpack, ABI of version 0.x, which
// every producer still hands out), as far as float32 on the CPU needs it.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

namespace znn::bindings {

namespace py = pybind11;

namespace dlpack {
struct Tensor {
    void* data;
    std::int32_t device_type, device_id;
    std::int32_t ndim;
    std::uint8_t type_code, type_bits;
    std::uint16_t type_lanes;
    std::int64_t* shape;
    std::int64_t* strides;  // in elements; null: C order
    std::uint64_t byte_offset;
};
struct Managed {
    Tensor tensor;
    void* context;
    void (*deleter)(Managed*);
};
inline constexpr int cpu = 1, float_code = 2;
}  // namespace dlpack

// Holds a tensor handed over by `__dlpack__` for as long as it lives. Created and destroyed with the GIL held.
class SharedTensor {
public:
    // Throws TypeError or ValueError naming `what` unless it is float32 on the CPU of exactly this shape.
    SharedTensor(const py::object& object, const std::vector<std::int64_t>& shape, const std::string& what) {
        if (!py::hasattr(object, "__dlpack__"))
            throw py::type_error(what + ": expected a tensor with __dlpack__, got " +
                                 py::str(py::type::of(object)).cast<std::string>());
        const py::object capsule = object.attr("__dlpack__")();
        managed_ = static_cast<dlpack::Managed*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
        if (!managed_) throw py::error_already_set();
        PyCapsule_SetName(capsule.ptr(), "used_dltensor");  // by the protocol it is ours now
        try {
            check(shape, what);
        } catch (...) {
            release();
            throw;
        }
    }
    SharedTensor(const SharedTensor&) = delete;
    ~SharedTensor() { release(); }

    float* data() const {
        return reinterpret_cast<float*>(static_cast<char*>(managed_->tensor.data) + managed_->tensor.byte_offset);
    }
    // In floats from one index to the next along an axis.
    std::int64_t stride(int axis) const {
        const dlpack::Tensor& t = managed_->tensor;
        if (t.strides) return t.strides[axis];
        std::int64_t step = 1;
        for (int i = t.ndim - 1; i > axis; --i) step *= t.shape[i];
        return step;
    }
    // Whether it is in C order without gaps.
    bool packed() const {
        std::int64_t step = 1;
        for (int i = managed_->tensor.ndim - 1; i >= 0; step *= managed_->tensor.shape[i--])
            if (managed_->tensor.shape[i] != 1 && stride(i) != step) return false;
        return true;
    }

private:
    void check(const std::vector<std::int64_t>& shape, const std::string& what) const {
        const dlpack::Tensor& t = managed_->tensor;
        if (t.device_type != dlpack::cpu) throw py::type_error(what + ": expected a tensor on the CPU");
        if (t.type_code != dlpack::float_code || t.type_bits != 32 || t.type_lanes != 1)
            throw py::type_error(what + ": expected float32");
        const std::vector<std::int64_t> got(t.shape, t.shape + t.ndim);
        if (got == shape) return;
        const auto text = [](const std::vector<std::int64_t>& s) {
            std::string out = "(";
            for (auto n : s) out += std::to_string(n) + ", ";
            return out + ")";
        };
        throw py::value_error(what + ": expected shape " + text(shape) + ", got " + text(got));
    }
    void release() {
        if (managed_->deleter) managed_->deleter(managed_);
    }

    dlpack::Managed* managed_ = nullptr;
};

}  // namespace znn::bindings
