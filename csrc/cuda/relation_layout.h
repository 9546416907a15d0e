// Where things lie in a block of relation_kl, and which element a lane holds: plain arithmetic,
// tested on a CPU.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define BERTKD_BOTH __host__ __device__ constexpr
#else
#define BERTKD_BOTH constexpr
#endif

namespace bertkd::cuda {

constexpr int kRowTile = 16;   // query rows of a warp
constexpr int kKeyGroup = 64;  // keys of a warp: 8 accumulators of 8 columns a side
constexpr int kAccumulators = kKeyGroup / 8;
constexpr int kMaxRows = 128;
constexpr int kGradColumns = 32;  // columns of the gradient that a warp makes at a time

BERTKD_BOTH int round_up(int x, int step) { return (x + step - 1) / step * step; }

// Eight elements more than the width: rows then start 4 banks apart (mod 8), and the eight rows of
// an ldmatrix never meet in a bank.
BERTKD_BOTH int row_stride(int columns) { return round_up(columns, 16) + 8; }

// Bytes from the start of the block's shared memory. The scores' gradient takes the teacher's
// place, which is done with by then.
struct Layout {
  int rows;  // length, in whole tiles
  int row_tiles, key_groups;
  int stride_s, stride_t, stride_d;
  int student, student_keys, teacher, teacher_keys, gradient;
  int weights, row_loss, maxima, sums, max_weight, real;
  int total;
};

BERTKD_BOTH Layout make_layout(int length, int width_s, int width_t, bool self, bool backward) {
  Layout x{};
  x.rows = round_up(length, kRowTile);
  x.row_tiles = x.rows / kRowTile;
  x.key_groups = (x.rows + kKeyGroup - 1) / kKeyGroup;
  x.stride_s = row_stride(width_s);
  x.stride_t = row_stride(width_t);
  x.stride_d = row_stride(x.rows);
  const int tile_s = x.rows * x.stride_s * 2, tile_t = x.rows * x.stride_t * 2;
  x.student = 0;
  x.student_keys = self ? 0 : tile_s;
  x.teacher = self ? tile_s : 2 * tile_s;
  x.teacher_keys = self ? x.teacher : x.teacher + tile_t;
  x.gradient = x.teacher;
  const int of_teacher = self ? tile_t : 2 * tile_t;
  const int of_gradient = backward ? x.rows * x.stride_d * 2 : 0;
  x.weights = x.teacher + (of_teacher > of_gradient ? of_teacher : of_gradient);
  x.row_loss = x.weights + kMaxRows * 4;
  x.maxima = x.row_loss + kMaxRows * 4;
  x.sums = x.maxima + 2 * kMaxRows * 2 * 4;
  x.max_weight = x.sums + 2 * kMaxRows * 3 * 4;
  x.real = x.max_weight + 16;
  x.total = x.real + kMaxRows;
  return x;
}

BERTKD_BOTH int threads_of(const Layout& x) { return 32 * x.row_tiles * x.key_groups; }

struct Place {
  int row, column;
};

// The element of a 16 x 8 accumulator that `lane` holds as its number e of 4.
BERTKD_BOTH Place accumulator_place(int lane, int e) {
  return {lane / 4 + (e / 2) * 8, (lane % 4) * 2 + e % 2};
}

// Row addresses that a lane gives to ldmatrix, relative to the corner of a 16 x 16 block, for
// - the left operand, 16 rows x 16 k, from memory [row][k]: matrices (r0 k0) (r8 k0) (r0 k8) (r8
// k8);
BERTKD_BOTH Place left_place(int lane) { return {lane % 16, lane / 16 * 8}; }
// - the left operand from memory [k][row], transposed on the way: the same four matrices;
BERTKD_BOTH Place left_transposed_place(int lane) {
  return {lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8};
}
// - two right operands, 16 k x 16 columns, from memory [column][k]: (c0 k0) (c0 k8) (c8 k0) (c8
// k8);
BERTKD_BOTH Place right_place(int lane) { return {lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8}; }
// - two right operands from memory [k][column], transposed on the way: the same four matrices.
BERTKD_BOTH Place right_transposed_place(int lane) { return {lane % 16, lane / 16 * 8}; }

}  // namespace bertkd::cuda
