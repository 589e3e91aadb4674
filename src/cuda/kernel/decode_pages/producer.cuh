// The copying warp of decode_pages. It walks the block's runs of the list, tells the other warps which segments come,
// and keeps the stages full.
#pragma once

#include <cstdint>

#include "cuda/kernel/decode_pages/config.h"
#include "cuda/ptx/bulk.cuh"
#include "cuda/work/page_list.cuh"
#include "cuda/work/rows.cuh"

namespace quire::cuda {

template <class Config>
class PageProducer {
 public:
  // `stages` is the shared address of the first stage. `part` is the block's set of KV heads, `place` its number among
  // the blocks of that set.
  __device__ __forceinline__ PageProducer(const DecodePagesParams& p, typename Config::Storage& shared,
                                          std::uint32_t stages, int part, int place, int lane)
      : p_(p),
        shared_(shared),
        stages_(stages),
        full_(ptx::shared_address(shared.full)),
        empty_(ptx::shared_address(shared.empty)),
        part_(part),
        place_(place),
        lane_(lane),
        policy_(ptx::evict_first_policy()) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int run = lane + 32 * i;
      if (run >= p.slice.num_runs) continue;
      const attention::PageRun& from = p.slice.runs[run];
      copies_[i] = {from.data + part * from.part_stride, from.block_stride, from.slice_stride, from.bytes, from.at};
    }
    ptx::touch_params<sizeof(AttentionParams)>(p);
  }

  __device__ __forceinline__ void run() {
    ptx::wait_for_previous_kernel();
    const PageList<Config::kRows> list(p_, p_.list, part_ == 0 && place_ == 0 ? p_.partials_of_pages.tiles : nullptr,
                                       lane_);
    const PageRuns runs(p_.list, list.total());
    const int first = place_ * runs.runs_per_block;
#pragma unroll 1
    for (int i = 0; i < runs.runs_per_block; ++i) {
      const int begin = (first + i) * runs.length;
      if (begin >= runs.total) break;
      walk(list, first + i, begin, min(runs.length, runs.total - begin));
    }
    start_segment(nullptr, {});
  }

 private:
  struct Copy {
    const std::uint8_t* from = nullptr;
    std::int64_t block_stride = 0;
    std::int32_t slice_stride = 0, bytes = 0, at = 0;
  };

  // Walks one run of the list, `left` grains from grain `at` on, and makes a segment of each tile that the run meets.
  __device__ __forceinline__ void walk(const PageList<Config::kRows>& list, int run, int at, int left) {
    int batch = list.find(at);
#pragma unroll 1
    for (; left > 0; ++batch) {
      const SequenceSlices work = sequence_slices<Config::kRows>(p_, batch);
      const int grains = work.grains(p_.list);
#pragma unroll 1
      for (int tile = 0; tile < work.tiles && left > 0; ++tile) {
        if (at >= grains) {
          at -= grains;
          continue;
        }
        const int from = at;
        const int count = min(grains - from, left);
        typename Config::Segment segment;
        const int before = from << p_.list.grain_shift;
        segment.run = work.run.from(before);
        segment.num_slices = min(count << p_.list.grain_shift, work.slices - before);
        segment.slot = run + batch * p_.list.max_tiles + tile;
        const int blocks = lane_ < segment.num_slices ? entry_of(batch, segment.run.slice(lane_)) : -1;
        // This work is done while the entries of the block table are on their way.
        segment.tile = tile_of_sequence<Config::kRows>(p_, work, batch, tile * Config::kRows);
        if (part_ == 0 && lane_ == 0) {
          int4& runs = p_.partials_of_pages.tiles[batch * p_.list.max_tiles + tile];
          if (from == 0) runs.x = run;
          if (from + count == grains) runs.y = run;
        }
        start_segment(&segment, segment);
        copy_slices(segment, blocks);
        left -= count;
        at = 0;
      }
    }
  }

  // Tells the consumers that a segment begins; null tells them that the list has ended.
  __device__ __forceinline__ void start_segment(const typename Config::Segment* given,
                                                const typename Config::Segment& segment) {
    const int i = segment_ % Config::kSegments;
    if (lane_ == 0) {
      ptx::barrier_wait_at(ptx::shared_address(&shared_.segment_empty[i]), segment_ / Config::kSegments % 2 ^ 1);
      shared_.segments[i].num_slices = 0;
      if (given != nullptr) shared_.segments[i] = segment;
      ptx::barrier_arrive_at(ptx::shared_address(&shared_.segment_full[i]));
    }
    __syncwarp();
    ++segment_;
  }

  // The block table's entry for a slice, or -1 where the table has none.
  __device__ __forceinline__ int entry_of(int batch, int slice) const {
    const int key = slice * kSliceKeys;
    const int entry = p_.block_shift >= 0 ? key >> p_.block_shift : key / p_.block_size;
    if (entry >= p_.max_blocks) return -1;
    return p_.block_table[batch * p_.table_batch_stride + entry * p_.table_block_stride];
  }

  // The entry, or -1 where there is nothing to read. Keys of entries outside of the cache are counted once.
  __device__ __forceinline__ int checked(int block, const TileRows& tile, int slice) const {
    if (block >= 0 && block < p_.num_blocks) return block;
    const int key = slice * kSliceKeys;
    if (key / p_.block_size >= p_.max_blocks) return -1;
    if (part_ == 0 && p_.error_counter != nullptr) {
      const int keys = min(key + kSliceKeys, tile.end) - max(key, tile.first);
      if (keys > 0) atomicAdd(p_.error_counter, static_cast<unsigned long long>(keys));
    }
    return -1;
  }

  // Copies the slices of a segment. `next` is the entry of this lane's slice among the first 32.
  __device__ __forceinline__ void copy_slices(const typename Config::Segment& segment, int next) {
    const TileRows& tile = segment.tile;
    const SliceRun& run = segment.run;
    const int end = segment.num_slices;
    // Every segment begins with the first group of warps, so the last groups may get a stage without a slice.
    const int stages = (end + p_.groups - 1) / p_.groups * p_.groups;
#pragma unroll 1
    for (int first = 0; first < stages; first += 32) {
      const int blocks = first + lane_ < end ? checked(next, tile, run.slice(first + lane_)) : -1;
      next = first + 32 + lane_ < end ? entry_of(tile.batch, run.slice(first + 32 + lane_)) : -1;
      const int count = min(32, stages - first);
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        const int block = __shfl_sync(kFullWarp, blocks, i);
        const int key = run.slice(first + i) * kSliceKeys;
        const bool careful = block < 0 || key < tile.full_begin || key + kSliceKeys > tile.full_end;
        copy_slice(block, key, careful);
      }
    }
  }

  __device__ __forceinline__ void copy_slice(int block, int key, bool careful) {
    constexpr int kNowhere = -(1 << 30);
    const std::uint32_t barrier = full_ + 8 * stage_;
    ptx::barrier_wait_at(empty_ + 8 * stage_, parity_);
    if (lane_ == 0) {
      shared_.infos[stage_].first_key = block < 0 ? kNowhere : key;
      shared_.infos[stage_].careful = careful ? 1 : 0;
      if (block < 0) {
        ptx::barrier_arrive_at(barrier);
      } else {
        ptx::barrier_arrive_expecting(barrier, static_cast<std::uint32_t>(p_.slice.copy_bytes));
      }
    }
    __syncwarp();
    if (block >= 0) {
      const int slot = p_.block_shift >= 0 ? key & (p_.block_size - 1) : key % p_.block_size;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Copy& copy = copies_[i];
        if (copy.bytes == 0) continue;
        const std::uint8_t* from =
            copy.from + block * copy.block_stride + static_cast<std::int64_t>(slot / kSliceKeys) * copy.slice_stride;
        ptx::bulk_copy(stages_ + stage_ * p_.stage_bytes + copy.at, from, static_cast<std::uint32_t>(copy.bytes),
                       barrier, policy_);
      }
    }
    if (++stage_ == p_.num_stages) {
      stage_ = 0;
      parity_ ^= 1U;
    }
  }

  const DecodePagesParams& p_;
  typename Config::Storage& shared_;
  const std::uint32_t stages_, full_, empty_;
  const int part_, place_, lane_;
  const std::uint64_t policy_;
  Copy copies_[2];
  int segment_ = 0, stage_ = 0;
  std::uint32_t parity_ = 1;
};

}  // namespace quire::cuda
