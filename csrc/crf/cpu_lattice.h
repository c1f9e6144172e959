// Building the permutohedral lattice on the CPU.
//
// Points are embedded and their simplices found in vectors of points. Vertices are numbered in the order of their first
// appearance, by a hash table of packed keys: coordinates less their smallest, each in as many bits as the range of the
// image's coordinates needs, 64 bits together where they fit, else 16 bits each in 128. A key is linear in the
// coordinates, so the keys of a simplex and of neighbours follow from one by additions. Consecutive points mostly share
// their simplex: then no key is looked up.
//
// An image is cut into one stretch of points for each worker, with a table each; the tables are merged in the order of
// the stretches, which numbers vertices as one table would have.
#pragma once

#include <stdlib.h>
#include <string.h>

#include <new>

#include "common/cpu_workers.h"
#include "common/simd.h"
#include "crf/crf_cpu_kernel.h"
#include "crf/permutohedral_math.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

// Memory that grows, of plain elements.
template <typename E>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { free(data_); }
  // Keeps the elements; false where there is no memory.
  bool grow(int64_t size) {
    void* const larger = realloc(data_, size_t(size) * sizeof(E));
    if (larger == nullptr) return false;
    data_ = static_cast<E*>(larger);
    size_ = size;
    return true;
  }
  E* data() const { return data_; }
  int64_t size() const { return size_; }
  E& operator[](int64_t i) const { return data_[i]; }

 private:
  E* data_ = nullptr;
  int64_t size_ = 0;
};

// Keys to numbers 0, 1, ... in the order of insertion: open addressing, at most half full.
template <typename Key>
class VertexTable {
 public:
  // False where there is no memory.
  bool start() { return resize(1 << 10) && keys_.grow(1 << 9); }
  int64_t size() const { return size_; }
  Key key(int64_t number) const { return keys_[number]; }

  // The number of a key, or -1.
  int32_t find(Key key) const {
    for (uint64_t at = hash(key);; at = (at + 1) & mask_) {
      const int32_t number = slots_[int64_t(at)];
      if (number < 0 || keys_[number] == key) return number;
    }
  }

  // Inserts a key that is new; -1 where there is no memory.
  int32_t insert(Key key) {
    uint64_t at = hash(key);
    for (int32_t number; (number = slots_[int64_t(at)]) >= 0; at = (at + 1) & mask_)
      if (keys_[number] == key) return number;
    if (size_ == keys_.size()) {
      if (!keys_.grow(2 * size_) || !resize(4 * size_)) return -1;
      for (at = hash(key); slots_[int64_t(at)] >= 0;) at = (at + 1) & mask_;
    }
    keys_[size_] = key;
    slots_[int64_t(at)] = int32_t(size_);
    return int32_t(size_++);
  }

 private:
  Buffer<Key> keys_;
  Buffer<int32_t> slots_;
  int64_t size_ = 0;
  uint64_t mask_ = 0;
  int shift_ = 0;

  uint64_t hash(Key key) const {
    uint64_t folded = uint64_t(key);
    if constexpr (sizeof(Key) > 8) folded ^= uint64_t(key >> 64) * 0xd6e8feb86659fd93u;
    return (folded * 0x9e3779b97f4a7c15u) >> shift_;
  }
  bool resize(int64_t slots) {
    if (!slots_.grow(slots)) return false;
    memset(slots_.data(), -1, size_t(slots) * sizeof(int32_t));
    mask_ = uint64_t(slots) - 1;
    shift_ = 64 - __builtin_ctzll(uint64_t(slots));
    for (int64_t i = 0; i < size_; ++i) {
      uint64_t at = hash(keys_[i]);
      while (slots_[int64_t(at)] >= 0) at = (at + 1) & mask_;
      slots_[int64_t(at)] = int32_t(i);
    }
    return true;
  }
};

// How the coordinates of an image's vertices are packed.
struct KeyLayout {
  int32_t least[crf::kMostFeatures];
  int shift[crf::kMostFeatures];
  int bits[crf::kMostFeatures];
  int total;
};

template <int kD, typename T>
class PointSimplices {
 public:
  static constexpr int kLane = kLanes<T>;
  Vec<T> elevated[kD + 1], base[kD + 1], rank[kD + 1];

  PointSimplices(const LatticeArgs& a, int64_t image)
      : features_(static_cast<const T*>(a.features) + image * kD * a.points), points_(a.points) {
    for (int i = 0; i < kD; ++i) scale_[i] = T(crf::feature_scale(kD, i, a.scale));
  }

  // The lanes beyond the last point repeat it.
  void embed(int64_t point) {
    Vec<T> scaled[kD];
    for (int i = 0; i < kD; ++i) {
      const T* const from = features_ + i * points_ + point;
      Vec<T> f;
      if (point + kLane <= points_) {
        f = load(from);
      } else {
        T lanes[kLane];
        for (int64_t lane = 0; lane < kLane; ++lane) lanes[lane] = from[smaller(lane, points_ - 1 - point)];
        f = load(lanes);
      }
      scaled[i] = f * scale_[i];
    }
    crf::embed<kD, T>(scaled, elevated);
  }
  void enclose() { crf::enclosing_simplex<kD, T>(elevated, base, rank); }
  const T* scale() const { return scale_; }

 private:
  const T* features_;
  int64_t points_;
  T scale_[kD];
};

// Finds the range of the coordinates of all images: false where features are not finite or vertices leave 16 bits.
template <int kD, typename T>
inline bool key_layouts(const LatticeArgs& a, int64_t parts, const Workers& workers, KeyLayout* layouts, T* extremes) {
  constexpr int kLane = kLanes<T>;
  const int64_t stretches = a.images * parts;
  // extremes: [stretches, 2, kD + 1], least and most; the last ones say whether all numbers are finite (0) or not (NaN).
  for_each_part(workers, stretches, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      PointSimplices<kD, T> points(a, s / parts);
      const int64_t part = s % parts, last = a.points * (part + 1) / parts;
      Vec<T> least[kD], most[kD], nothing{};
      for (int i = 0; i < kD; ++i) least[i] = most[i] = Vec<T>{};
      for (int64_t point = a.points * part / parts; point < last; point += kLane) {
        points.embed(point);
        for (int i = 0; i < kD; ++i) {
          least[i] = points.elevated[i] < least[i] ? points.elevated[i] : least[i];
          most[i] = points.elevated[i] > most[i] ? points.elevated[i] : most[i];
        }
        for (int i = 0; i <= kD; ++i) nothing += points.elevated[i] - points.elevated[i];
      }
      T* const to = extremes + s * 2 * (kD + 1);
      T sum = 0;
      for (int lane = 0; lane < kLane; ++lane) sum += nothing[lane];
      for (int i = 0; i < kD; ++i) {
        T low = 0, high = 0;
        for (int lane = 0; lane < kLane; ++lane) {
          low = smaller<T>(low, least[i][lane]);
          high = larger<T>(high, most[i][lane]);
        }
        to[i] = low;
        to[kD + 1 + i] = high;
      }
      to[kD] = sum;
    }
  });
  for (int64_t image = 0; image < a.images; ++image) {
    KeyLayout& layout = layouts[image];
    int shift = 0;
    for (int i = 0; i < kD; ++i) {
      T low = 0, high = 0;
      for (int64_t s = image * parts; s < (image + 1) * parts; ++s) {
        const T* const of = extremes + s * 2 * (kD + 1);
        if (!(of[kD] == 0)) return false;
        low = smaller(low, of[i]);
        high = larger(high, of[kD + 1 + i]);
      }
      constexpr T kMost = crf::most_coordinate(kD);
      if (!(low >= -kMost && high <= kMost)) return false;
      layout.least[i] = int32_t(low) - crf::key_margin(kD) - 1;
      const int32_t range = int32_t(high) + crf::key_margin(kD) + 1 - layout.least[i];
      layout.bits[i] = 32 - __builtin_clz(uint32_t(range));
      layout.shift[i] = shift;
      shift += layout.bits[i];
    }
    layout.total = shift;
  }
  return true;
}

template <int kD, typename T, typename Key>
class LatticeBuilder {
 public:
  static constexpr int kLane = kLanes<T>, kCorners = kD + 1;

  LatticeBuilder(const LatticeArgs& a, int64_t parts) : args_(a), parts_(parts) {}
  ~LatticeBuilder() { delete[] stretches_; }
  LatticeBuilder(const LatticeBuilder&) = delete;
  LatticeBuilder& operator=(const LatticeBuilder&) = delete;

  // False where there is no memory.
  bool build(const KeyLayout* layouts, const Workers& workers) {
    const LatticeArgs& a = args_;
    const int64_t count = a.images * parts_;
    stretches_ = new (std::nothrow) Stretch[size_t(count)];
    if (stretches_ == nullptr || !first_.grow(a.images + 1) || !layouts_.grow(larger<int64_t>(a.images, 1)))
      return false;
    if (a.images > 0) memcpy(layouts_.data(), layouts, size_t(a.images) * sizeof(KeyLayout));
    for_each_part(workers, count, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) stretches_[s].good = build_stretch(s);
    });
    for (int64_t s = 0; s < count; ++s)
      if (!stretches_[s].good) return false;
    for_each_part(workers, a.images, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t image = begin; image < end; ++image) stretches_[image * parts_].good = merge(image);
    });
    first_[0] = 0;
    for (int64_t image = 0; image < a.images; ++image) {
      if (!stretches_[image * parts_].good) return false;
      first_[image + 1] = first_[image] + table(image).size();
    }
    for_each_part(workers, count, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) renumber(s);
    });
    return true;
  }

  int64_t vertices() const { return first_[args_.images]; }

  void finish(const LatticeOutput& out, const Workers& workers) const {
    const LatticeArgs& a = args_;
    for (int64_t image = 0; image <= a.images; ++image) out.offset[image] = first_[image];
    for_each_part(workers, out.rows, [&](int64_t, int64_t begin, int64_t end) {
      for (int j = 0; j < kCorners; ++j)
        memset(out.neighbour + 2 * (j * out.rows + begin), -1, size_t(end - begin) * 2 * sizeof(int32_t));
    });
    for_each_part(workers, out.rows, [&](int64_t, int64_t begin, int64_t end) {
      int64_t image = 0;
      for (int64_t v = begin; v < end; ++v) {
        int16_t* const to = out.key + v * kD;
        if (v >= vertices()) {
          memset(to, 0, kD * sizeof(int16_t));
          continue;
        }
        while (v >= first_[image + 1]) ++image;
        const KeyLayout& layout = layouts_[image];
        const Key key = table(image).key(v - first_[image]);
        for (int i = 0; i < kD; ++i)
          to[i] = int16_t(int32_t(uint32_t(key >> layout.shift[i]) & ((1u << layout.bits[i]) - 1)) + layout.least[i]);
        const Steps steps(layout);
        for (int j = 0; j < kCorners; ++j) {
          // One up in every coordinate but j, d down in that one. It alone has this vertex one step down.
          const int32_t found = table(image).find(key + steps.up[j]);
          if (found < 0) continue;
          const int64_t other = found + first_[image];
          out.neighbour[2 * (j * out.rows + v)] = int32_t(other);
          out.neighbour[2 * (j * out.rows + other) + 1] = int32_t(v);
        }
      }
    });
  }

 private:
  // What is added to a key for a step of one along the direction of coordinate j; and, from the vertex of one remainder
  // to that of the next, where coordinate j is the one whose period is over.
  struct Steps {
    Key up[kCorners];
    explicit Steps(const KeyLayout& layout) {
      Key ones = 0;
      for (int i = 0; i < kD; ++i) ones += Key(1) << layout.shift[i];
      for (int j = 0; j < kD; ++j) up[j] = ones - (Key(kCorners) << layout.shift[j]);
      up[kD] = ones;
    }
  };
  struct Stretch {
    VertexTable<Key> table;
    Buffer<int32_t> renamed;  // number in the table -> number in the image's first table; none for that itself
    bool good = true;
  };

  LatticeArgs args_;
  int64_t parts_;  // stretches of an image
  Stretch* stretches_ = nullptr;
  Buffer<int64_t> first_;  // vertex of each image
  Buffer<KeyLayout> layouts_;

  const VertexTable<Key>& table(int64_t image) const { return stretches_[image * parts_].table; }

  bool build_stretch(int64_t s) {
    const LatticeArgs& a = args_;
    const int64_t image = s / parts_, part = s % parts_;
    VertexTable<Key>& table = stretches_[s].table;
    if (!table.start()) return false;
    const KeyLayout& layout = layouts_[image];
    const Steps steps(layout);
    PointSimplices<kD, T> points(a, image);
    // One place for the last point of the vector before, then the vector's points.
    typedef int32_t Ints __attribute__((vector_size(kLane * 4), aligned(4), may_alias));
    int32_t base[kCorners][kLane + 1], rank[kCorners][kLane + 1], same[kLane];
    T weight[kCorners][kLane];
    for (int i = 0; i < kCorners; ++i) base[i][0] = INT32_MIN, rank[i][0] = 0;  // like no point
    Key last_key[kCorners];
    int32_t last[kCorners];
    for (int r = 0; r < kCorners; ++r) last_key[r] = 0, last[r] = -1;
    const int64_t begin = a.points * part / parts_, end = a.points * (part + 1) / parts_;
    int32_t* vertex_to = a.vertex + (image * a.points + begin) * kCorners;
    T* weight_to = static_cast<T*>(a.weight) + (image * a.points + begin) * kCorners;
    for (int64_t point = begin; point < end; point += kLane) {
      points.embed(point);
      points.enclose();
      Vec<T> w[kCorners];
      crf::barycentric_weights<kD, T>(points.elevated, points.base, points.rank, w);
      Ints differ{};
      for (int i = 0; i < kCorners; ++i) {
        store(weight[i], w[i]);
        *reinterpret_cast<Ints*>(base[i] + 1) = __builtin_convertvector(points.base[i], Ints);
        *reinterpret_cast<Ints*>(rank[i] + 1) = __builtin_convertvector(points.rank[i], Ints);
        differ |= (*reinterpret_cast<const Ints*>(base[i]) ^ *reinterpret_cast<const Ints*>(base[i] + 1)) |
                  (*reinterpret_cast<const Ints*>(rank[i]) ^ *reinterpret_cast<const Ints*>(rank[i] + 1));
      }
      *reinterpret_cast<Ints*>(same) = differ == 0;
      const int64_t lanes = smaller<int64_t>(kLane, end - point);
      for (int64_t lane = 0; lane < lanes; ++lane) {
        if (!same[lane]) {
          int order[kCorners];  // the coordinate of each rank
          Key key = 0;
          for (int i = 0; i < kCorners; ++i) order[rank[i][lane + 1]] = i;
          for (int i = 0; i < kD; ++i) key += Key(uint32_t(base[i][lane + 1] - layout.least[i])) << layout.shift[i];
          for (int r = 0; r < kCorners; ++r) {
            if (r > 0) key += steps.up[order[kD - r + 1]];
            if (key == last_key[r] && last[r] >= 0) continue;
            last_key[r] = key;
            last[r] = table.insert(key);
            if (last[r] < 0) return false;
          }
        }
        for (int r = 0; r < kCorners; ++r) {
          vertex_to[r] = last[r];
          weight_to[r] = weight[r][lane];
        }
        vertex_to += kCorners;
        weight_to += kCorners;
      }
      for (int i = 0; i < kCorners; ++i) base[i][0] = base[i][lanes], rank[i][0] = rank[i][lanes];
    }
    return true;
  }

  // Puts the vertices of an image's other stretches into the table of its first one.
  bool merge(int64_t image) {
    VertexTable<Key>& to = stretches_[image * parts_].table;
    for (int64_t s = image * parts_ + 1; s < (image + 1) * parts_; ++s) {
      const VertexTable<Key>& from = stretches_[s].table;
      if (from.size() == 0) continue;
      Buffer<int32_t>& renamed = stretches_[s].renamed;
      if (!renamed.grow(from.size())) return false;
      for (int64_t i = 0; i < from.size(); ++i)
        if ((renamed[i] = to.insert(from.key(i))) < 0) return false;
    }
    return true;
  }

  void renumber(int64_t s) const {
    const LatticeArgs& a = args_;
    const int64_t image = s / parts_, part = s % parts_;
    const int32_t first = int32_t(first_[image]);
    if (part == 0 && first == 0) return;
    const int64_t begin = a.points * part / parts_, end = a.points * (part + 1) / parts_;
    int32_t* const vertex = a.vertex + image * a.points * kCorners;
    const int32_t* const renamed = stretches_[s].renamed.data();
    for (int64_t i = begin * kCorners; i < end * kCorners; ++i)
      vertex[i] = first + (part == 0 ? vertex[i] : renamed[vertex[i]]);
  }
};

// grad_features = E^T D^T grad_weight for each point, with the weights' derivatives D within the simplex.
template <int kD, typename T>
inline void lattice_backward(const LatticeArgs& a, const T* grad_weight, T* grad_features, const Workers& workers) {
  constexpr int kLane = kLanes<T>;
  const int64_t blocks = (a.points + kLane - 1) / kLane;
  for_each_part(workers, a.images * blocks, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t image = at / blocks, point = at % blocks * kLane;
      const int64_t lanes = smaller<int64_t>(kLane, a.points - point);
      PointSimplices<kD, T> points(a, image);
      points.embed(point);
      points.enclose();
      Vec<T> grad[kD + 1], grad_elevated[kD + 1], grad_scaled[kD];
      const T* const from = grad_weight + (image * a.points + point) * (kD + 1);
      for (int r = 0; r <= kD; ++r) {
        T lane_grad[kLane] = {};
        for (int64_t lane = 0; lane < lanes; ++lane) lane_grad[lane] = from[lane * (kD + 1) + r];
        grad[r] = load(lane_grad);
      }
      crf::barycentric_weights_vjp<kD, T>(grad, points.rank, grad_elevated);
      crf::embed_transpose<kD, T>(grad_elevated, grad_scaled);
      for (int i = 0; i < kD; ++i) {
        const Vec<T> g = grad_scaled[i] * points.scale()[i];
        T* const to = grad_features + (image * kD + i) * a.points + point;
        for (int64_t lane = 0; lane < lanes; ++lane) to[lane] = g[lane];
      }
    }
  });
}

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
