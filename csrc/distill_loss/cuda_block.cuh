// The kernel of the loss: a block, or a group of blocks, takes rows one after the other.
//
//   sums      the slots of a row, as they arrive in shared memory
//   exchange  between lanes, warps, and the blocks of a group; then the loss and the constants of the gradient
//   moments   jsd only: a second sweep, over shared memory, and a second exchange
//   gradient  from shared memory; where a slot was read for the last time, the next row's is on its way into it
//
// A thread sweeps the slots that it staged itself, so that the sweeps need no barriers.
#pragma once

#include "distill_loss/cuda_slots.cuh"
#include "distill_loss/cuda_sweeps.cuh"

namespace pycompress::distill_loss {

template <class Slots, Soft kSoft>
class LossBlock {
 public:
  __device__ explicit LossBlock(const CudaParams& params)
      : p_(params),
        threads_(static_cast<int>(blockDim.x)),
        thread_(static_cast<int>(threadIdx.x)),
        rank_(static_cast<int>(blockIdx.x) % params.blocks_per_row),
        group_(static_cast<int>(blockIdx.x) / params.blocks_per_row),
        own_((params.slots_per_block + threads_ - 1) / threads_) {}

  __device__ void run();

 private:
  static constexpr int kClasses = Slots::kClasses;
  static constexpr bool kTeacher = kSoft != Soft::student_only, kJsd = kSoft == Soft::jsd;
  static constexpr int kParts = 4;  // of a thread's slots: one is summed while the others are on their way
  static constexpr int kBatch = 3;  // loads of single classes that are under way at once; a fourth spills on sm_90
  static constexpr int kStep = kClasses < 4 ? kClasses : 4;  // classes in registers as f32: 8 would spill
  using Pack = typename Slots::Pack;

  // What a warp does for the block, and the first warp's block for the group.
  __device__ bool first_warp() const { return thread_ < cuda::kWarp; }
  __device__ int lane() const { return thread_ % cuda::kWarp; }
  __device__ int warps() const { return threads_ / cuda::kWarp; }

  // Shared memory:  | RowTerms | Kept |, 128 bytes | 64 bytes a warp | student's slots | teacher's slots |
  struct Kept {  // by thread 0, from row to row
    double inverse, loss, hard, soft;
  };
  static_assert(sizeof(RowTerms) == 64 && sizeof(Kept) <= 64 && sizeof(RowSums32) == 64, "scratch_bytes");
  __device__ RowTerms& shared_terms() const { return *reinterpret_cast<RowTerms*>(cuda::dynamic_shared()); }
  __device__ Kept& kept() const { return *reinterpret_cast<Kept*>(cuda::dynamic_shared() + 64); }
  template <class T>
  __device__ T& of_warp(int warp) const {
    return reinterpret_cast<T*>(cuda::dynamic_shared() + 128)[warp];
  }
  __device__ char* shared_student(int local) const {
    return cuda::dynamic_shared() + p_.scratch_bytes + local * Slots::kBytes;
  }
  __device__ char* shared_teacher(int local) const {
    return shared_student(local) + p_.slots_per_block * Slots::kBytes;
  }

  __device__ static void unpack(const Pack& pack, int from, float (&to)[kStep]) {
#pragma unroll
    for (int i = 0; i < kStep; ++i) to[i] = cuda::to_float(pack.value[from + i]);
  }

  // f(local, slot, begin) for this thread's slots of one part of a row
  template <class F>
  __device__ void for_slots(const RowView& v, int part, F f) const {
    const int end = own_ * (part + 1) / kParts;
#pragma unroll 1
    for (int k = own_ * part / kParts; k < end; ++k) {
      const int local = k * threads_ + thread_, slot = rank_ * p_.slots_per_block + local;
      if (local < p_.slots_per_block && slot < v.slots) f(local, slot, slot * kClasses - v.lead);
    }
  }

  __device__ void stage(int label, int64_t row, int part) const;
  __device__ void stage_single(const RowView& v, int part) const;
  __device__ void wait(int part) const;
  __device__ void fetch(const RowView& v, int local, int slot, int begin, Pack& s, Pack& t) const;

  __device__ void sum_part(const RowView& v, int part, RowSums32& x) const;
  __device__ void moments_part(const RowView& v, int part, const Terms& terms, float2& x) const;
  __device__ void gradient_part(const RowView& v, int part, int label, const RowTerms& terms) const;
  __device__ void fill_part(const RowView& v, int part, float value) const;

  __device__ void meet();
  __device__ void exchange(RowSums32& x);
  __device__ void exchange(float2& x);
  __device__ RowTerms finish(const RowView& v, float weight, float label_logit, RowSums32& x, RowValue& value);
  __device__ void output(int64_t row, int label, float weight, const RowValue& value);
  __device__ void run_row(int64_t row, int label, int next_label);

  const CudaParams& p_;
  const int threads_, thread_, rank_, group_;
  const int own_;      // slots of a thread
  uint32_t step_ = 0;  // exchanges of the group so far
};

// ---- between the threads of a row -----------------------------------------------------------------------------------

// First warp: until all blocks of the group have come here as often as this one. What they wrote before is there.
template <class Slots, Soft kSoft>
__device__ void LossBlock<Slots, kSoft>::meet() {
  constexpr int kFlags = kFlagBytes / 4;
  __syncwarp(cuda::kAllLanes);  // order of memory: what the lanes read at the last meeting comes before the release
  const uint32_t wanted = (step_ + 1) * static_cast<uint32_t>(p_.blocks_per_row);
  if (lane() == 0) {
    p_.flags.add_release(int64_t(group_) * kFlags, 1);
    while (static_cast<int32_t>(p_.flags.load_acquire(int64_t(group_) * kFlags) - wanted) < 0) cuda::pause();
  }
  __syncwarp(cuda::kAllLanes);
  ++step_;
}

// The row's sums, in every lane of the first warp. Blocks write in turn to one of two places: who writes to a place
// again has met the others since, and they have read it.
template <class Slots, Soft kSoft>
__device__ void LossBlock<Slots, kSoft>::exchange(RowSums32& x) {
  merge_lanes<kSoft>(p_.formula, x);
  if (warps() > 1) {
    if (lane() == 0) of_warp<RowSums32>(thread_ / cuda::kWarp) = x;
    __syncthreads();
    if (!first_warp()) return;
    x = lane() < warps() ? of_warp<RowSums32>(lane()) : RowSums32{};
    merge_lanes<kSoft>(p_.formula, x);
  }
  if (p_.blocks_per_row == 1) return;
  const int64_t place = (int64_t(group_) * 2 + (step_ & 1)) * p_.blocks_per_row;
  if (lane() == 0) store_sums(p_.exchange, (place + rank_) * kExchange, x);
  meet();
  x = RowSums32{};
  for (int block = lane(); block < p_.blocks_per_row; block += cuda::kWarp) {
    merge<kSoft>(p_.formula, load_sums(p_.exchange, (place + block) * kExchange), x);
  }
  merge_lanes<kSoft>(p_.formula, x);
}

template <class Slots, Soft kSoft>
__device__ void LossBlock<Slots, kSoft>::exchange(float2& x) {
  x = make_float2(cuda::warp_sum(x.x), cuda::warp_sum(x.y));
  if (warps() > 1) {
    if (lane() == 0) of_warp<float2>(thread_ / cuda::kWarp) = x;
    __syncthreads();
    if (!first_warp()) return;
    x = lane() < warps() ? of_warp<float2>(lane()) : make_float2(0, 0);
    x = make_float2(cuda::warp_sum(x.x), cuda::warp_sum(x.y));
  }
  if (p_.blocks_per_row == 1) return;
  const int64_t place = (int64_t(group_) * 2 + (step_ & 1)) * p_.blocks_per_row;
  if (lane() == 0) p_.exchange.template store_as<float2>((place + rank_) * kExchange, x);
  meet();
  x = make_float2(0, 0);
  for (int block = lane(); block < p_.blocks_per_row; block += cuda::kWarp) {
    const float2 other = p_.exchange.template load_as<float2>((place + block) * kExchange);
    x = make_float2(x.x + other.x, x.y + other.y);
  }
  x = make_float2(cuda::warp_sum(x.x), cuda::warp_sum(x.y));
}

// ---- rows -----------------------------------------------------------------------------------------------------------

// The constants of the row, in every thread; value: in the first warp.
template <class Slots, Soft kSoft>
__device__ RowTerms LossBlock<Slots, kSoft>::finish(const RowView& v, float weight, float label_logit, RowSums32& x,
                                                    RowValue& value) {
  const CudaFormula& f = p_.formula;
  RowTerms terms;
  float gain = 0;
  const auto share_terms = [&] {
    if (warps() == 1) return;
    if (thread_ == 0) shared_terms() = terms;
    __syncthreads();
    terms = shared_terms();
  };
  exchange(x);
  if (first_warp()) {
    // NaN items go into the gradient too when somebody else divides by them.
    const double inverse = kept().inverse, share = p_.normalize_grad || inverse != inverse ? inverse : 1.0;
    gain = static_cast<float>(static_cast<double>(weight) * share);
    finish_hard(f, x, label_logit, gain, terms, value);
    finish_soft<kSoft>(f, x, gain, terms, value);
    if (!(value.hard == value.hard && value.soft == value.soft && gain == gain)) terms.valid = 0;
  }
  share_terms();
  if constexpr (kJsd) {
    float2 moments = make_float2(0, 0);
#pragma unroll 1
    for (int part = 0; part < kParts; ++part) moments_part(v, part, terms.common, moments);
    exchange(moments);
    if (first_warp()) finish_jsd(f, x, moments, gain, terms, value);
    share_terms();
  }
  return terms;
}

template <class Slots, Soft kSoft>
__device__ void LossBlock<Slots, kSoft>::output(int64_t row, int label, float weight, const RowValue& value) {
  if (thread_ != 0 || rank_ != 0) return;
  double loss = 0, hard = 0, soft = 0;
  if (label == kBad) loss = hard = soft = static_cast<double>(kNaN);
  if (is_valid(label)) {
    const double share = kept().inverse * static_cast<double>(weight);
    hard = share * static_cast<double>(value.hard);
    soft = share * static_cast<double>(value.soft);
    // A part whose weight is 0 is 0, so that no 0 * infinity arises.
    loss = (p_.formula.hard ? p_.formula.alpha * hard : 0) + (p_.formula.soft ? p_.formula.no_alpha * soft : 0);
  }
  if (!p_.loss.is_null()) {
    p_.loss.store(row, static_cast<float>(loss));
    p_.hard.store(row, static_cast<float>(hard));
    p_.soft.store(row, static_cast<float>(soft));
  }
  kept().loss += loss;
  kept().hard += hard;
  kept().soft += soft;
}

// One row; next_label: of the one after it, whose slots follow into the shared memory.
template <class Slots, Soft kSoft>
__device__ void LossBlock<Slots, kSoft>::run_row(int64_t row, int label, int next_label) {
  const bool gradient = !p_.grad.is_null();
  const RowView v = Slots::view(p_, row);
  RowValue value;
  RowTerms terms;
  float weight = 0;
  if (is_valid(label)) {
    // For the value alone, which thread 0 tells. Read before the exchange: the gradient may overwrite it after.
    const float label_logit = label >= 0 && rank_ == 0 && thread_ == 0 ? Slots::logit(p_, v, label) : 0;
    if (first_warp()) weight = weight_of_token(p_, row);
    const bool restages = !gradient && !kJsd;  // the sums are the last to read the slots
    RowSums32 x;
#pragma unroll 1
    for (int part = 0; part < kParts; ++part) {
      wait(restages ? 0 : part);
      sum_part(v, part, x);
      if (restages) stage(next_label, row + p_.groups, part);
    }
    terms = finish(v, weight, label_logit, x, value);
    if (restages) {
      output(row, label, weight, value);
      return;
    }
  }
  output(row, label, weight, value);
#pragma unroll 1
  for (int part = 0; part < kParts; ++part) {
    if (gradient && is_valid(label) && terms.valid != 0) {
      gradient_part(v, part, label, terms);
    } else if (gradient) {
      fill_part(v, part, label == kIgnored ? 0.0f : kNaN);
    }
    stage(next_label, row + p_.groups, part);
  }
}

template <class Slots, Soft kSoft>
__device__ void LossBlock<Slots, kSoft>::run() {
  int64_t row = group_;
  if (first_warp()) {
    const double inverse = inverse_of_items(p_);
    if (thread_ == 0) kept() = {inverse, 0, 0, 0};
    __syncwarp(cuda::kAllLanes);  // order of memory: the shuffles that follow give none
  }
  int label = load_label(p_, row);
  for (int part = 0; part < kParts; ++part) stage(label, row, part);
  while (row < p_.tokens) {
    const int next_label = row + p_.groups < p_.tokens ? load_label(p_, row + p_.groups) : kIgnored;
    run_row(row, label, next_label);
    row += p_.groups;
    label = next_label;
  }
  if (thread_ == 0 && rank_ == 0 && !p_.totals.is_null()) {
    p_.totals.store(int64_t(group_) * 3, kept().loss);
    p_.totals.store(int64_t(group_) * 3 + 1, kept().hard);
    p_.totals.store(int64_t(group_) * 3 + 2, kept().soft);
  }
}

}  // namespace pycompress::distill_loss

#include "distill_loss/cuda_parts.cuh"
