// Stage 0: for each row of logits the candidates for its k largest, and its log-sum-exp as (max, sum of exponentials).
//
// A row passes through the buffer once, in chunks. Elements above a running threshold are compressed behind those
// already held; when more than `capacity` are held, the threshold rises until at least k and at most half the capacity
// are above it. Columns come in ascending order, so an element equal to a threshold that k held elements reach can
// never be among the k first, and the comparison may be strict.
#pragma once

#include "rows.h"
#include "tables.h"

namespace megatron_replay::ascend {

constexpr uint32_t kTopkChunk = 2048;
constexpr float kLeast = -3.0e38f;

template <typename T>
class Topk {
 public:
  __aicore__ inline void Init(GM_ADDR logits, GM_ADDR values, GM_ADDR columns, GM_ADDR counts, GM_ADDR sums,
                              uint32_t positions, uint32_t width, uint32_t stride, uint32_t k, uint32_t capacity) {
    width_ = width;
    stride_ = stride;
    k_ = k;
    capacity_ = capacity;
    range_ = ShareOfBlock(positions);
    logits_.SetGlobalBuffer((__gm__ T*)logits, positions ? static_cast<uint64_t>(positions - 1) * stride + width : 0);
    values_.SetGlobalBuffer((__gm__ float*)values, static_cast<uint64_t>(positions) * capacity);
    columns_.SetGlobalBuffer((__gm__ int32_t*)columns, static_cast<uint64_t>(positions) * capacity);
    counts_.SetGlobalBuffer((__gm__ int32_t*)counts, static_cast<uint64_t>(positions) * kBlock);
    sums_.SetGlobalBuffer((__gm__ float*)sums, static_cast<uint64_t>(positions) * 2);
    room_ = capacity + kTopkChunk + kLanes;
    pipe_.InitBuffer(chunk_in_, 2, kTopkChunk * sizeof(T));
    pipe_.InitBuffer(wide_, kTopkChunk * sizeof(float));
    pipe_.InitBuffer(shares_, kTopkChunk * sizeof(float));
    pipe_.InitBuffer(ramp_, kTopkChunk * sizeof(int32_t));
    pipe_.InitBuffer(mask_, room_ / 8);
    for (uint32_t i = 0; i < 2; ++i) {
      pipe_.InitBuffer(held_values_[i], room_ * sizeof(float));
      pipe_.InitBuffer(held_columns_[i], room_ * sizeof(int32_t));
    }
    pipe_.InitBuffer(scratch_, kScratch * sizeof(float));
    pipe_.InitBuffer(values_out_, 1, capacity * sizeof(float));
    pipe_.InitBuffer(columns_out_, 1, capacity * sizeof(int32_t));
    pipe_.InitBuffer(counts_out_, 2, kBlock * sizeof(int32_t));
    pipe_.InitBuffer(sums_out_, 2, 2 * kBlock * sizeof(float));
    CreateVecIndex(ramp_.Get<int32_t>(), 0, kTopkChunk);
    Duplicate(scratch_.Get<float>(), 0.0f, static_cast<int32_t>(kScratch));
    PipeBarrier<PIPE_V>();
  }

  __aicore__ inline void Process() {
    if (range_.first == range_.last) return;
    Chunk chunk = First(range_.first);
    Load(chunk);
    while (true) {
      Chunk next = chunk;
      const bool more = Advance(next);
      if (more) Load(next);
      if (chunk.start == 0) Open();
      Compute(chunk);
      if (chunk.start + chunk.count == width_) Close(chunk.row);
      if (!more) return;
      chunk = next;
    }
  }

 private:
  struct Chunk {
    uint32_t row, start, count;
  };

  __aicore__ inline Chunk First(uint32_t row) { return {row, 0, Least(kTopkChunk, width_)}; }

  __aicore__ inline bool Advance(Chunk& chunk) {
    if (chunk.start + chunk.count < width_) {
      chunk.start += chunk.count;
      chunk.count = Least(kTopkChunk, width_ - chunk.start);
      return true;
    }
    if (chunk.row + 1 == range_.last) return false;
    chunk = First(chunk.row + 1);
    return true;
  }

  __aicore__ inline void Load(const Chunk& chunk) {
    const LocalTensor<T> raw = chunk_in_.template AllocTensor<T>();
    DataCopyPad(raw, logits_[static_cast<uint64_t>(chunk.row) * stride_ + chunk.start],
                DataCopyExtParams{1, static_cast<uint32_t>(chunk.count * sizeof(T)), 0, 0, 0},
                DataCopyPadExtParams<T>{false, 0, 0, T{}});
    chunk_in_.EnQue(raw);
  }

  __aicore__ inline void Open() {
    held_ = 0;
    real_ = 0;
    threshold_ = kMinusInfinity;
    state_ = sums_out_.template AllocTensor<float>();
    Duplicate(state_, kLeast, static_cast<int32_t>(kBlock));
    Duplicate(state_[kBlock], 0.0f, static_cast<int32_t>(kBlock));
    PipeBarrier<PIPE_V>();
  }

  __aicore__ inline void Compute(const Chunk& chunk) {
    const LocalTensor<float> wide = wide_.Get<float>();
    const uint32_t repeats = (chunk.count + kLanes - 1) / kLanes;
    if (chunk.count % kLanes) {
      Duplicate(wide[(repeats - 1) * kLanes], kMinusInfinity, static_cast<int32_t>(kLanes));
      PipeBarrier<PIPE_V>();
    }
    LocalTensor<T> raw = chunk_in_.template DeQue<T>();
    Widen(wide, raw, chunk.count);
    PipeBarrier<PIPE_V>();
    chunk_in_.FreeTensor(raw);
    AddUp(wide, repeats);
    Append(wide, repeats * kLanes, chunk.start);
    if (held_ > capacity_) Shrink();
  }

  // (max, sum exp(x - max)) takes in a chunk.
  __aicore__ inline void AddUp(const LocalTensor<float>& wide, uint32_t repeats) {
    const LocalTensor<float> work = scratch_.Get<float>(), shares = shares_.Get<float>();
    const LocalTensor<float> top = work[0], peak = work[8], fade = work[16], sum = work[24], each = work[64],
                             tops = work[128];
    const int32_t lanes = static_cast<int32_t>(kLanes), chunks = static_cast<int32_t>(repeats),
                  block = static_cast<int32_t>(kBlock);
    WholeReduceMax(each, wide, lanes, chunks, 1, 1, 8, ReduceOrder::ORDER_ONLY_VALUE);
    PipeBarrier<PIPE_V>();
    WholeReduceMax(top, each, chunks, 1, 1, 1, 8, ReduceOrder::ORDER_ONLY_VALUE);
    PipeBarrier<PIPE_V>();
    Brcb(tops, top, 1, {1, 8});
    PipeBarrier<PIPE_V>();
    Max(peak, tops, state_, block);
    PipeBarrier<PIPE_V>();
    Sub(fade, state_, peak, block);
    Sub(shares, wide, peak, kLanes, static_cast<uint8_t>(repeats), {1, 1, 0, 8, 8, 0});
    PipeBarrier<PIPE_V>();
    Exp(fade, fade, block);
    Exp(shares, shares, static_cast<int32_t>(repeats * kLanes));
    Adds(state_, peak, 0.0f, block);
    PipeBarrier<PIPE_V>();
    WholeReduceSum(each, shares, lanes, chunks, 1, 1, 8);
    Mul(state_[kBlock], state_[kBlock], fade, block);
    PipeBarrier<PIPE_V>();
    WholeReduceSum(sum, each, chunks, 1, 1, 1, 8);
    PipeBarrier<PIPE_V>();
    Add(state_[kBlock], state_[kBlock], sum, 1);
    PipeBarrier<PIPE_V>();
  }

  // The elements above the threshold, with their columns, behind those that are held.
  __aicore__ inline void Append(const LocalTensor<float>& wide, uint32_t count, uint32_t start) {
    const LocalTensor<float> values = Values(now_);
    const LocalTensor<int32_t> columns = Columns(now_);
    const LocalTensor<uint8_t> mask = mask_.Get<uint8_t>();
    uint64_t found = 0, same = 0;
    CompareScalar(mask, wide, threshold_, CMPMODE::GT, count);
    PipeBarrier<PIPE_V>();
    GatherMask(values[held_], wide, mask.template ReinterpretCast<uint32_t>(), true, count, {1, 1, 8, 0}, found);
    GatherMask(columns[held_], ramp_.Get<int32_t>(), mask.template ReinterpretCast<uint32_t>(), true, count,
               {1, 1, 8, 0}, same);
    PipeBarrier<PIPE_V>();
    if (found) Adds(columns[held_], columns[held_], static_cast<int32_t>(start), static_cast<int32_t>(found));
    PipeBarrier<PIPE_V>();
    real_ += static_cast<uint32_t>(found);
    Fill(now_, held_ + static_cast<uint32_t>(found));
  }

  // Ends what is held at `end`: the rest of the last block becomes empty slots.
  __aicore__ inline void Fill(uint32_t side, uint32_t end) {
    const uint32_t rest = end % kBlock;
    held_ = end;
    if (!rest) return;
    uint64_t lanes[2] = {0xFFull & ~((1ull << rest) - 1), 0};
    Duplicate(Values(side)[end - rest], kMinusInfinity, lanes, 1, 1, 8);
    Duplicate(Columns(side)[end - rest], -1, lanes, 1, 1, 8);
    PipeBarrier<PIPE_V>();
    held_ = end - rest + kBlock;
  }

  // The number of held elements that compare so; they are left in the other buffer from `at` on.
  __aicore__ inline uint32_t Compress(CMPMODE mode, float bound, uint32_t at) {
    const LocalTensor<uint8_t> mask = mask_.Get<uint8_t>();
    uint64_t found = 0;
    CompareScalar(mask, Values(now_), bound, mode, padded_);
    PipeBarrier<PIPE_V>();
    GatherMask(Values(1 - now_)[at], Values(now_), mask.template ReinterpretCast<uint32_t>(), true, padded_,
               {1, 1, 8, 0}, found);
    PipeBarrier<PIPE_V>();
    return static_cast<uint32_t>(found);
  }

  __aicore__ inline void CompressColumns(uint32_t at) {
    uint64_t found = 0;
    GatherMask(Columns(1 - now_)[at], Columns(now_), mask_.Get<uint32_t>(), true, padded_, {1, 1, 8, 0}, found);
    PipeBarrier<PIPE_V>();
  }

  // Halves what is held, by bisection between a bound with at least k elements above it and one with fewer. Where equal
  // elements leave no such bound, the first of them fill up to k.
  __aicore__ inline void Shrink() {
    padded_ = (held_ + kLanes - 1) / kLanes * kLanes;
    if (padded_ > held_) {
      Duplicate(Values(now_)[held_], kMinusInfinity, static_cast<int32_t>(padded_ - held_));
      Duplicate(Columns(now_)[held_], -1, static_cast<int32_t>(padded_ - held_));
      PipeBarrier<PIPE_V>();
    }
    if (real_ <= capacity_ / 2) {  // the room is taken by empty slots
      const uint32_t kept = Compress(CMPMODE::GT, kMinusInfinity, 0);
      CompressColumns(0);
      Fill(1 - now_, kept);
      now_ = 1 - now_;
      return;
    }
    // below the threshold: elements equal to it may be held
    int64_t low = Key(threshold_) - 1, high = Key(kPlusInfinity);
    bool enough = false;
    while (high - low > 1 && !enough) {
      const int64_t middle = (low + high) >> 1;
      const uint32_t above = Compress(CMPMODE::GT, Number(middle), 0);
      if (above >= k_) {
        low = middle;
        enough = above <= capacity_ / 2;
      } else {
        high = middle;
      }
    }
    uint32_t kept = Compress(CMPMODE::GT, Number(enough ? low : high), 0);
    CompressColumns(0);
    Fill(1 - now_, kept);
    real_ = kept;
    if (!enough) {
      const uint32_t at = held_, first = k_ - kept;
      Compress(CMPMODE::EQ, Number(high), at);
      CompressColumns(at);
      Fill(1 - now_, at + first);
      real_ = k_;
    }
    threshold_ = Number(enough ? low : high);
    now_ = 1 - now_;
  }

  __aicore__ inline void Close(uint32_t row) {
    const int32_t held = static_cast<int32_t>(held_);
    LocalTensor<int32_t> count = counts_out_.template AllocTensor<int32_t>();
    Duplicate(count, held, static_cast<int32_t>(kBlock));
    counts_out_.EnQue(count);
    count = counts_out_.template DeQue<int32_t>();
    DataCopy(counts_[static_cast<uint64_t>(row) * kBlock], count, kBlock);
    counts_out_.FreeTensor(count);
    if (held_) {
      LocalTensor<float> values = values_out_.template AllocTensor<float>();
      LocalTensor<int32_t> columns = columns_out_.template AllocTensor<int32_t>();
      Muls(values, Values(now_), 1.0f, held);
      Adds(columns, Columns(now_), 0, held);
      values_out_.EnQue(values);
      columns_out_.EnQue(columns);
      values = values_out_.template DeQue<float>();
      columns = columns_out_.template DeQue<int32_t>();
      DataCopy(values_[static_cast<uint64_t>(row) * capacity_], values, held_);
      DataCopy(columns_[static_cast<uint64_t>(row) * capacity_], columns, held_);
      values_out_.FreeTensor(values);
      columns_out_.FreeTensor(columns);
      PipeBarrier<PIPE_V>();
    }
    sums_out_.EnQue(state_);
    state_ = sums_out_.template DeQue<float>();
    DataCopyPad(sums_[static_cast<uint64_t>(row) * 2], state_, DataCopyExtParams{2, sizeof(float), 0, 0, 0});
    sums_out_.FreeTensor(state_);
  }

  __aicore__ inline LocalTensor<float> Values(uint32_t side) { return held_values_[side].Get<float>(); }
  __aicore__ inline LocalTensor<int32_t> Columns(uint32_t side) { return held_columns_[side].Get<int32_t>(); }

  // Numbers in the order of integers, and back.
  __aicore__ inline int64_t Key(float x) {
    const int32_t bits = *reinterpret_cast<int32_t*>(&x);
    return bits < 0 ? static_cast<int64_t>(bits ^ 0x7FFFFFFF) : bits;
  }

  __aicore__ inline float Number(int64_t key) {
    int32_t bits = static_cast<int32_t>(key);
    if (bits < 0) bits ^= 0x7FFFFFFF;
    return *reinterpret_cast<float*>(&bits);
  }

  static constexpr uint32_t kScratch = 192;
  static constexpr float kPlusInfinity = __builtin_huge_valf(), kMinusInfinity = -__builtin_huge_valf();

  TPipe pipe_;
  GlobalTensor<T> logits_;
  GlobalTensor<float> values_, sums_;
  GlobalTensor<int32_t> columns_, counts_;
  TQue<TPosition::VECIN, 2> chunk_in_;
  TQue<TPosition::VECOUT, 1> values_out_, columns_out_, counts_out_, sums_out_;
  TBuf<TPosition::VECCALC> wide_, shares_, ramp_, mask_, scratch_, held_values_[2], held_columns_[2];
  LocalTensor<float> state_;
  Range range_;
  float threshold_;
  uint32_t width_, stride_, k_, capacity_, room_, held_, real_, padded_, now_ = 0;
};

template <typename T>
__aicore__ inline void topk(GM_ADDR logits, GM_ADDR values, GM_ADDR columns, GM_ADDR counts, GM_ADDR sums,
                            uint32_t positions, uint32_t width, uint32_t stride, uint32_t k, uint32_t capacity) {
  Topk<T> kernel;
  kernel.Init(logits, values, columns, counts, sums, positions, width, stride, k, capacity);
  kernel.Process();
}

}  // namespace megatron_replay::ascend
