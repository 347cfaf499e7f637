// Tensors as Python hands them over: (address, dtype, sizes, strides), checked before any pointer is followed.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "types.h"

namespace ptq {

namespace py = pybind11;

enum class Element : int { f32 = 0, f16 = 1, bf16 = 2, i8 = 3, u8 = 4, i32 = 5, i64 = 6 };

inline int64_t element_size(Element e) {
    switch (e) {
        case Element::f32:
        case Element::i32:
            return 4;
        case Element::f16:
        case Element::bf16:
            return 2;
        case Element::i8:
        case Element::u8:
            return 1;
        case Element::i64:
            return 8;
    }
    return 0;
}

inline const char* element_name(Element e) {
    static const char* const names[] = {"float32", "float16", "bfloat16", "int8", "uint8", "int32", "int64"};
    return names[static_cast<int>(e)];
}

// At most four dimensions. `name` is the argument's, for messages.
class View {
  public:
    View(const char* name, const py::tuple& t) : name_(name) {
        if (t.size() != 4) fail("is not (address, dtype, sizes, strides)");
        address_ = entry<uintptr_t>(t[0]);
        const int element = entry<int>(t[1]);
        if (element < 0 || element > static_cast<int>(Element::i64)) fail("has dtype code " + std::to_string(element));
        element_ = static_cast<Element>(element);
        const py::tuple sizes = entry<py::tuple>(t[2]), strides = entry<py::tuple>(t[3]);
        if (sizes.size() > 4 || sizes.size() != strides.size())
            fail("has more than four dimensions, or not as many strides");
        dims_ = static_cast<int>(sizes.size());
        int64_t reach = 1;  // elements from the first to just behind the last
        for (int d = 0; d < dims_; ++d) {
            size_[d] = entry<int64_t>(sizes[d]);
            stride_[d] = entry<int64_t>(strides[d]);
            if (size_[d] < 0 || stride_[d] < 0) fail("has a negative size or stride");
            if (size_[d] == 0) empty_ = true;
            int64_t step;
            if (__builtin_mul_overflow(size_[d] > 0 ? size_[d] - 1 : 0, stride_[d], &step) ||
                __builtin_add_overflow(reach, step, &reach) || reach > std::numeric_limits<int64_t>::max() / 16) {
                fail("has sizes that overflow");
            }
        }
        if (!empty_ && address_ == 0) fail("is a null pointer");
        if (address_ % static_cast<uintptr_t>(element_size(element_)) != 0) fail("is not aligned to its elements");
    }

    [[noreturn]] void fail(const std::string& what) const {
        throw std::invalid_argument(std::string(name_) + " " + what);
    }

    int64_t size(int d) const { return size_[d]; }
    int64_t stride(int d) const { return stride_[d]; }
    Element element() const { return element_; }
    bool is_float() const { return static_cast<int>(element_) <= 2; }
    DType dtype() const {
        if (!is_float()) fail(std::string("is ") + element_name(element_) + ", expected floating point");
        return static_cast<DType>(static_cast<int>(element_));
    }

    // -1 accepts any size.
    void shape(std::initializer_list<int64_t> expected) const {
        if (static_cast<int>(expected.size()) != dims_) {
            fail("has " + std::to_string(dims_) + " dimensions, expected " + std::to_string(expected.size()));
        }
        int d = 0;
        for (int64_t size : expected) {
            if (size >= 0 && size_[d] != size) {
                fail("has size " + std::to_string(size_[d]) + " in dimension " + std::to_string(d) + ", expected " +
                     std::to_string(size));
            }
            ++d;
        }
    }

    // Dense from dimension `first` on (rows of a matrix: 1).
    void dense(int first = 0) const {
        int64_t expected = 1;
        for (int d = dims_ - 1; d >= first; --d) {
            if (size_[d] > 1 && stride_[d] != expected) fail("is not contiguous");
            expected *= size_[d];
        }
    }

    template <typename T>
    T* as(Element wanted) const {
        if (element_ != wanted) {
            fail(std::string("is ") + element_name(element_) + ", expected " + element_name(wanted));
        }
        return reinterpret_cast<T*>(address_);
    }
    void* address() const { return reinterpret_cast<void*>(address_); }

  private:
    template <typename T>
    T entry(const py::handle& value) const {
        try {
            return py::cast<T>(value);
        } catch (const py::cast_error&) {
            fail("has an address, dtype, size or stride of the wrong type");
        }
    }

    const char* name_;
    uintptr_t address_ = 0;
    Element element_ = Element::f32;
    int dims_ = 0;
    int64_t size_[4] = {1, 1, 1, 1}, stride_[4] = {0, 0, 0, 0};
    bool empty_ = false;
};

// --- operands
// ----------------------------------------------------------------------------------------------------------

inline Rows rows_of(const View& v, int64_t rows, int64_t width) {
    v.shape({rows, width});
    v.dense(1);
    return {v.address(), v.dtype(), v.stride(0)};
}

inline MutableRows mutable_rows_of(const View& v, int64_t rows, int64_t width) {
    v.shape({rows, width});
    v.dense(1);
    return {v.address(), v.dtype(), v.stride(0)};
}

inline Vector vector_of(const View& v, int64_t size) {
    v.shape({size});
    v.dense();
    return {v.address(), v.dtype()};
}

template <typename T>
T* dense_of(const View& v, Element element, std::initializer_list<int64_t> shape) {
    v.shape(shape);
    v.dense();
    return v.as<T>(element);
}

inline Positions positions_of(const View& v, int64_t rows) {
    v.shape({-1});
    v.dense();
    if (v.element() != Element::i32 && v.element() != Element::i64) v.fail("are not int32 or int64");
    if (rows > 0 && (v.size(0) == 0 || rows % v.size(0) != 0)) {
        v.fail("(" + std::to_string(v.size(0)) + ") do not divide " + std::to_string(rows) + " rows");
    }
    return {v.address(), v.element() == Element::i64, v.size(0)};
}

inline Table table_of(const View& v) {
    v.shape({-1, 4});
    v.dense();
    return {v.as<const Grid>(Element::f32), v.size(0)};
}

}  // namespace ptq
