// What a thread of LossBlock does with its slots of one part of a row: stage them, wait for them, sweep over them.
#pragma once

#include "distill_loss/cuda_block.cuh"

namespace pycompress::distill_loss {

// ---- slots ----------------------------------------------------------------------------------------------------------

// Starts the way of one part of a row into shared memory. Of a row that does not count, an empty group of copies, so
// that their number stays known.
template <class Slots, Soft kSoft>
__device__ void LossBlock<Slots, kSoft>::stage(int label, int64_t row, int part) const {
  if (!p_.staged) return;
  if (is_valid(label)) {
    const RowView v = Slots::view(p_, row);
    if constexpr (kClasses == 1) {
      stage_single(v, part);
    } else {
      for_slots(v, part, [&](int local, int slot, int begin) {
        Slots::stage(p_.student, Slots::student_at(p_, v, slot), begin, p_.student_end, shared_student(local));
        if (kTeacher) Slots::stage(p_.teacher, Slots::teacher_at(p_, v, slot), begin, p_.common, shared_teacher(local));
      });
    }
  }
  cuda::cp_async_commit();
}

// Through registers, as no copy of 2 bytes exists.
template <class Slots, Soft kSoft>
__device__ void LossBlock<Slots, kSoft>::stage_single(const RowView& v, int part) const {
  const int end = own_ * (part + 1) / kParts;
  for (int first = own_ * part / kParts; first < end; first += kBatch) {
    float s[kBatch], t[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int local = (first + i) * threads_ + thread_, slot = rank_ * p_.slots_per_block + local;
      const bool mine = first + i < end && local < p_.slots_per_block;
      s[i] = mine && slot < p_.student_end ? load_any(p_.student, Slots::student_at(p_, v, slot)) : 0;
      if (kTeacher) t[i] = mine && slot < p_.common ? load_any(p_.teacher, Slots::teacher_at(p_, v, slot)) : 0;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int local = (first + i) * threads_ + thread_;
      if (first + i >= end || local >= p_.slots_per_block) continue;
      *reinterpret_cast<float*>(shared_student(local)) = s[i];
      if (kTeacher) *reinterpret_cast<float*>(shared_teacher(local)) = t[i];
    }
  }
}

// Until this thread's slots of one part are there: `part` many others were staged before it and not again since.
template <class Slots, Soft kSoft>
__device__ void LossBlock<Slots, kSoft>::wait(int part) const {
  static_assert(kParts == 4, "a wait names the number of groups behind the one that is wanted");
  if (!p_.staged) return;
  switch (part) {
    case 0: return cuda::cp_async_wait<3>();
    case 1: return cuda::cp_async_wait<2>();
    case 2: return cuda::cp_async_wait<1>();
    default: return cuda::cp_async_wait<0>();
  }
}

// The logits of a slot, -infinity for classes that it does not have or that do not count.
template <class Slots, Soft kSoft>
__device__ void LossBlock<Slots, kSoft>::fetch(const RowView& v, int local, int slot, int begin, Pack& s,
                                               Pack& t) const {
  const bool has_s = begin < p_.student_end, has_t = kTeacher && begin < p_.common;
#pragma unroll
  for (int i = 0; i < kClasses; ++i) s.value[i] = t.value[i] = cuda::from_float<typename Slots::Element>(-kInfinity);
  if (Slots::kAlwaysStaged || p_.staged) {
    if (has_s) s = *reinterpret_cast<const Pack*>(shared_student(local));
    if (has_t) t = *reinterpret_cast<const Pack*>(shared_teacher(local));
  } else {
    if (has_s) s = Slots::load(p_.student, Slots::student_at(p_, v, slot), begin, p_.student_end);
    if (has_t) t = Slots::load(p_.teacher, Slots::teacher_at(p_, v, slot), begin, p_.common);
  }
}

// ---- sweeps over one part -------------------------------------------------------------------------------------------

template <class Slots, Soft kSoft>
__device__ void LossBlock<Slots, kSoft>::sum_part(const RowView& v, int part, RowSums32& x) const {
  for_slots(v, part, [&](int local, int slot, int begin) {
    Pack packed_s, packed_t;
    fetch(v, local, slot, begin, packed_s, packed_t);
#pragma unroll
    for (int step = 0; step < kClasses; step += kStep) {
      float s[kStep], t[kStep];
      unpack(packed_s, step, s);
      unpack(packed_t, step, t);
      if (p_.formula.has_rest && begin + step + kStep > p_.common) {
        float rest[kStep];
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
          const bool in_rest = begin + step + i >= p_.common;
          rest[i] = in_rest ? s[i] : -kInfinity;
          s[i] = in_rest ? -kInfinity : s[i];
        }
        add_rest(p_.formula, rest, x);
      }
      if (begin + step < p_.common) add_slot<kSoft>(p_.formula, s, t, x);
    }
  });
}

template <class Slots, Soft kSoft>
__device__ void LossBlock<Slots, kSoft>::moments_part(const RowView& v, int part, const Terms& terms, float2& x) const {
  for_slots(v, part, [&](int local, int slot, int begin) {
    if (begin >= p_.common) return;
    Pack packed_s, packed_t;
    fetch(v, local, slot, begin, packed_s, packed_t);
#pragma unroll
    for (int step = 0; step < kClasses; step += kStep) {
      float s[kStep], t[kStep];
      unpack(packed_s, step, s);
      unpack(packed_t, step, t);
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        if (begin + step + i >= p_.common) s[i] = -kInfinity;
      }
      add_moments(p_.formula, s, t, terms, x);
    }
  });
}

template <class Slots, Soft kSoft>
__device__ void LossBlock<Slots, kSoft>::gradient_part(const RowView& v, int part, int label,
                                                       const RowTerms& terms) const {
  for_slots(v, part, [&](int local, int slot, int begin) {
    Pack packed_s, packed_t, packed_g;
    fetch(v, local, slot, begin, packed_s, packed_t);
#pragma unroll
    for (int step = 0; step < kClasses; step += kStep) {
      float s[kStep], t[kStep], g[kStep];
      unpack(packed_s, step, s);
      unpack(packed_t, step, t);
      const int first = begin + step;
      slot_gradient<kSoft>(p_.formula, s, t, terms.common, g);
      if (first + kStep > p_.common) {
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
          if (first + i >= p_.common) g[i] = rest_gradient(p_.formula, s[i], terms);
        }
      }
      if (label >= first && label < first + kStep) {
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
          if (first + i == label) g[i] -= terms.label_gain;
        }
      }
#pragma unroll
      for (int i = 0; i < kStep; ++i) packed_g.value[step + i] = cuda::from_float<typename Slots::Element>(g[i]);
    }
    Slots::store(p_, Slots::grad_at(p_, v, slot), begin, packed_g);
  });
}

template <class Slots, Soft kSoft>
__device__ void LossBlock<Slots, kSoft>::fill_part(const RowView& v, int part, float value) const {
  Pack g;
#pragma unroll
  for (int i = 0; i < kClasses; ++i) g.value[i] = cuda::from_float<typename Slots::Element>(value);
  for_slots(v, part, [&](int, int slot, int begin) { Slots::store(p_, Slots::grad_at(p_, v, slot), begin, g); });
}

}  // namespace pycompress::distill_loss
