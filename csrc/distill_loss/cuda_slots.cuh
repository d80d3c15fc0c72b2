// Slots: how a thread gets at the classes of a row, in global memory or where they wait in shared memory.
//
// Vector slots (16 bytes of each operand) of a bf16 row that begins 6 bytes past an address divisible by 16:
//
//   address % 16   0 . . . . . 6 . . . . e | 0 . . . . . . e | 0 . . .
//   class                      0 1 2 3 4   | 5 6 ...      12 | 13          lead = 3: slot i begins at class 8 i - lead
//
// A slot that sticks out of the row, or out of the classes of the teacher, is loaded class by class and filled up with
// -infinity, which adds nothing to any sum.
#pragma once

#include "distill_loss/cuda_params.cuh"

namespace pycompress::distill_loss {

// One row: the place of slot 0 in each operand, in bytes (single slots: of class 0), and how many slots it has.
struct RowView {
  int64_t student, teacher, grad;
  int lead, slots;
};

// ---- 16 bytes of each operand, both of type T -----------------------------------------------------------------------

template <class T>
struct VectorSlots {
  using Element = T;
  static constexpr int kClasses = 16 / sizeof(T), kBytes = 16;
  static constexpr bool kAlwaysStaged = true;
  using Pack = cuda::Pack<T, kClasses>;

  __device__ static RowView view(const CudaParams& p, int64_t row) {
    const int64_t student = p.student.offset(row);
    const int lead = static_cast<int>((student + p.student.first) & (kClasses - 1));
    RowView v{student - lead, p.teacher.offset(row) - lead, row * p.vocab - lead, lead,
              (p.vocab + lead + kClasses - 1) / kClasses};
    v.student *= int64_t(sizeof(T));
    v.teacher *= int64_t(sizeof(T));
    v.grad *= int64_t(sizeof(T));
    return v;
  }

  // The classes from `begin` on that lie in 0..end-1, from a row whose slot is at byte `at`.
  __device__ static Pack load(const Operand& operand, int64_t at, int begin, int end) {
    if (begin >= 0 && begin + kClasses <= end) return operand.data.template load_as<Pack>(at);
    Pack pack;
#pragma unroll
    for (int i = 0; i < kClasses; ++i) {
      const bool in_row = begin + i >= 0 && begin + i < end;
      pack.value[i] =
          in_row ? operand.data.template load_as<T>(at + i * int64_t(sizeof(T))) : cuda::from_float<T>(-kInfinity);
    }
    return pack;
  }

  // The same into shared memory, on its way when this returns.
  __device__ static void stage(const Operand& operand, int64_t at, int begin, int end, char* to) {
    if (begin >= 0 && begin + kClasses <= end) {
      operand.data.template cp_async<16>(to, at);
    } else if (begin < end) {
      *reinterpret_cast<Pack*>(to) = load(operand, at, begin, end);
    }
  }

  __device__ static void store(const CudaParams& p, int64_t at, int begin, const Pack& pack) {
    if (begin >= 0 && begin + kClasses <= p.vocab) {
      p.grad.template store_once_as<Pack>(at, pack);
      return;
    }
#pragma unroll
    for (int i = 0; i < kClasses; ++i) {
      if (begin + i >= 0 && begin + i < p.vocab) {
        p.grad.template store_as<T>(at + i * int64_t(sizeof(T)), pack.value[i]);
      }
    }
  }

  __device__ static float logit(const CudaParams& p, const RowView& v, int label) {
    const int64_t at = v.student + (v.lead + int64_t(label)) * int64_t(sizeof(T));
    return cuda::to_float(p.student.data.template load_as<T>(at));
  }
  __device__ static int64_t student_at(const CudaParams&, const RowView& v, int slot) {
    return v.student + slot * int64_t(16);
  }
  __device__ static int64_t teacher_at(const CudaParams&, const RowView& v, int slot) {
    return v.teacher + slot * int64_t(16);
  }
  __device__ static int64_t grad_at(const CudaParams&, const RowView& v, int slot) {
    return v.grad + slot * int64_t(16);
  }
};

// ---- one class of each operand, of any dtype and stride -------------------------------------------------------------

__device__ inline float load_any(const Operand& operand, int64_t at) {
  return cuda::load_float(operand.data, at, operand.dtype);
}

struct SingleSlots {
  using Element = float;
  static constexpr int kClasses = 1, kBytes = 4;
  static constexpr bool kAlwaysStaged = false;
  using Pack = cuda::Pack<float, 1>;

  __device__ static RowView view(const CudaParams& p, int64_t row) {
    const int64_t size = cuda::size_of(p.student.dtype);
    return {p.student.offset(row) * size, p.teacher.offset(row) * cuda::size_of(p.teacher.dtype), row * p.vocab * size,
            0, p.vocab};
  }
  __device__ static Pack load(const Operand& operand, int64_t at, int begin, int end) {
    return {{begin < end ? load_any(operand, at) : -kInfinity}};
  }
  __device__ static void store(const CudaParams& p, int64_t at, int, const Pack& g) {
    cuda::store_float(p.grad, at, p.student.dtype, g.value[0]);
  }

  __device__ static float logit(const CudaParams& p, const RowView& v, int label) {
    return load_any(p.student, student_at(p, v, label));
  }
  __device__ static int64_t student_at(const CudaParams& p, const RowView& v, int slot) {
    return v.student + slot * p.student.col_stride * cuda::size_of(p.student.dtype);
  }
  __device__ static int64_t teacher_at(const CudaParams& p, const RowView& v, int slot) {
    return v.teacher + slot * p.teacher.col_stride * cuda::size_of(p.teacher.dtype);
  }
  __device__ static int64_t grad_at(const CudaParams& p, const RowView& v, int slot) {
    return v.grad + slot * cuda::size_of(p.student.dtype);
  }
};

}  // namespace pycompress::distill_loss
