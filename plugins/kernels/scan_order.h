// From a place in the order of a scan to a place in the map.
//
// A direction is an orientation and a sense: along rows, the inner coordinate is the column; along columns, it is the
// row. `q` counts places along the orientation, from the first position; a reversed scan meets them from the last.
#pragma once

#include <cstdint>

#include "device.h"
#include "quartermap/selective_scan.h"

namespace quartermap
{

QUARTERMAP_INLINE bool is_column(int direction)
{
    return (direction & 1) != 0;
}

QUARTERMAP_INLINE bool is_reverse(int direction)
{
    return (direction & 2) != 0;
}

static_assert(QUARTERMAP_ROW == 0 && QUARTERMAP_COLUMN == 1 && QUARTERMAP_ROW_REVERSE == 2
        && QUARTERMAP_COLUMN_REVERSE == 3,
    "the bits of a direction are its orientation and its sense");

// How far apart places of the map lie in an array: for one step along the inner coordinate, and along the outer one.
struct Strides
{
    int inner;
    int outer;
};

// How an index into such an array changes from one position of a scan to the next.
struct Increments
{
    int step; // along the inner coordinate
    int wrap; // from its end to its start, and one step along the outer coordinate

    QUARTERMAP_INLINE Increments(Strides strides, int inner_size, bool reverse)
        : step(reverse ? -strides.inner : strides.inner)
        , wrap(strides.outer - (inner_size - 1) * strides.inner)
    {
        wrap = reverse ? -wrap : wrap;
    }

    // Of an array in the order of the orientation.
    QUARTERMAP_INLINE Increments(int stride, bool reverse)
        : step(reverse ? -stride : stride)
        , wrap(step)
    {
    }
};

// Visits every `stride`-th element of an array with rows of `width`, from the element `first` on; only the start needs
// divisions.
struct Visit
{
    int row;
    int column;
    int width;
    int row_step;
    int column_step;

    QUARTERMAP_INLINE Visit(int first, int stride, int width_)
        : row(first / width_)
        , column(first - row * width_)
        , width(width_)
        , row_step(stride / width_)
        , column_step(stride - row_step * width_)
    {
    }

    QUARTERMAP_INLINE void next()
    {
        column += column_step;
        bool const wraps = column >= width;
        column -= wraps ? width : 0;
        row += row_step + (wraps ? 1 : 0);
    }
};

} // namespace quartermap
