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

// A place that moves along an orientation, by steps of one; only the start needs a division.
struct Walk
{
    int inner;
    int outer;
    int inner_size;
    bool reverse;

    QUARTERMAP_INLINE Walk(int q, int inner_size_, bool reverse_)
        : inner(q % inner_size_)
        , outer(q / inner_size_)
        , inner_size(inner_size_)
        , reverse(reverse_)
    {
    }

    QUARTERMAP_INLINE void step()
    {
        if (reverse)
        {
            bool const wraps = inner == 0;
            inner = wraps ? inner_size - 1 : inner - 1;
            outer -= wraps ? 1 : 0;
        }
        else
        {
            bool const wraps = inner == inner_size - 1;
            inner = wraps ? 0 : inner + 1;
            outer += wraps ? 1 : 0;
        }
    }
};

} // namespace quartermap
