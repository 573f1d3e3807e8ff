/* The models of dwz.c in both directions, for dwindle's Python package, which compiles this where a compiler is found.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#define DWZ_ENCODER
#include "dwz.c"

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

EXPORT size_t engine_bytes(void) { return sizeof(dwz_work); }

EXPORT void engine_start(dwz_work *w, uint32_t *table, unsigned table_bits) { start(w, table, table_bits); }

EXPORT void engine_encode(dwz_work *w, uint8_t *sink, size_t size) {
    reset(w);
    begin(w, sink, 0);
    w->sink = sink;
    w->sink_size = size;
    w->sink_place = 0;
}

EXPORT void engine_decode(dwz_work *w, const uint8_t *in, size_t size) {
    reset(w);
    w->sink = NULL;
    begin(w, in, size);
}

EXPORT uint32_t engine_number(dwz_work *w, unsigned field, uint32_t value) { return code_number(w, field, value); }

EXPORT int engine_bit(dwz_work *w, unsigned field, unsigned place, int bit) { return code_bit(w, field, place, bit); }

EXPORT uint32_t engine_tree(dwz_work *w, unsigned field, int bits, uint32_t value) {
    return code_tree(w, field, bits, value);
}

EXPORT void engine_chain(dwz_work *w, unsigned field, unsigned shift, int bits, uint8_t *values, uint32_t count) {
    uint32_t before = 0, i;
    for (i = 0; i < count && !w->error && field + (before >> shift) < DWZ_FIELDS; i++)
        values[i] = (uint8_t)(before = code_tree(w, field + (before >> shift), bits, values[i]));
}

EXPORT uint32_t engine_plain(dwz_work *w, int bits, uint32_t value) { return code_plain(w, bits, value); }

EXPORT void engine_structure(dwz_work *w, uint64_t place, uint8_t *bytes, uint32_t count) {
    uint32_t i;
    for (i = 0; i < count && !w->error; i++) bytes[i] = code_byte(w, place + i, bytes[i]);
}

EXPORT void engine_symbols(dwz_work *w, uint8_t *symbols, const uint8_t *groups, uint32_t count, uint32_t row,
                           uint32_t depth, uint32_t plane, uint32_t chosen, uint32_t common) {
    plane_t p = {0};
    p.out = symbols;
    p.count = count;
    p.row = row;
    p.stride = 1;
    p.depth = depth;
    p.bits = 8;
    p.groups = groups;
    mixed(w, &p, plane, chosen, common);
}

static void set_tables(dwz_work *w, const uint16_t *below, uint32_t classes, uint32_t width) {
    uint32_t i;
    for (i = 0; i < classes; i++) {
        memcpy(w->below[i], below + (size_t)i * width, width * sizeof *below);
        set_buckets(w, i);
    }
}

/* Fill `sink` from its end with states and words; return where they begin. */
EXPORT size_t engine_encode_lanes(dwz_work *w, const uint8_t *symbols, const uint8_t *classes, uint32_t count,
                                  const uint16_t *below, uint32_t number, uint32_t width, uint32_t lanes,
                                  uint8_t *sink, size_t size) {
    uint32_t lane = 0, i, e, inverse[16][256]; /* 2^32 / frequency, rounded down */
    set_tables(w, below, number, width);
    for (i = 0; i < number; i++)
        for (e = 0; e + 1 < width; e++) {
            uint32_t f = (uint32_t)(w->below[i][e + 1] - w->below[i][e]);
            inverse[i][e] = f > 1 ? (uint32_t)(((uint64_t)1 << 32) / f) : 0xFFFFFFFFu;
        }
    for (i = 0; i < lanes; i++) w->states[i] = LOWEST;
    for (e = 0; e < count; e++) lane += !w->known[classes[e]];
    lane %= lanes;
    for (e = count; e-- > 0;) {
        const uint16_t *table = w->below[classes[e]] + symbols[e];
        uint32_t f = (uint32_t)(table[1] - table[0]), x, whole, rest;
        if (w->known[classes[e]]) continue;
        lane = (lane ? lane : lanes) - 1;
        x = w->states[lane];
        if (x >> (32 - SCALE_BITS) >= f) {
            sink[--size] = (uint8_t)(x >> 8);
            sink[--size] = (uint8_t)x;
            x >>= 16;
        }
        whole = (uint32_t)((uint64_t)x * inverse[classes[e]][symbols[e]] >> 32); /* at most 1 too small */
        rest = x - whole * f;
        if (rest >= f) {
            rest -= f;
            whole++;
        }
        w->states[lane] = (whole << SCALE_BITS) + rest + table[0];
    }
    for (i = lanes; i-- > 0;) put_number(sink + (size -= 4), w->states[i], 4);
    return size;
}

/* Return how many bytes were read; 0 where there are too few, 1 where the states do not end as they began. */
EXPORT size_t engine_decode_lanes(dwz_work *w, uint8_t *symbols, const uint8_t *classes, uint32_t count,
                                  const uint16_t *below, uint32_t number, uint32_t width, uint32_t lanes,
                                  const uint8_t *data, size_t size) {
    const uint8_t *at = data, *end = data + size;
    uint32_t lane = 0, i, e;
    set_tables(w, below, number, width);
    if (!read_states(w, lanes, &at, end)) return 0;
    for (e = 0; e < count; e++)
        if (!next_symbol(w, classes[e], lanes, &lane, &symbols[e], &at, end)) return 0;
    for (i = 0; i < lanes; i++)
        if (w->states[i] != LOWEST) return 1;
    return (size_t)(at - data);
}

/* Whether a decoder met the end too soon; and whether anything is left over. */
EXPORT int engine_failed(const dwz_work *w) { return w->error; }

EXPORT int engine_left_over(const dwz_work *w) { return w->in_place < w->in_size; }

/* Write the last bytes; return how many bytes there are, more than the sink's size where they did not fit. */
EXPORT size_t engine_finish(dwz_work *w) {
    int kept, i;
    for (kept = 0; kept <= 4; kept++) {
        uint64_t step = (uint64_t)1 << (32 - 8 * kept), value = (w->low + step - 1) / step * step;
        if (value <= w->high) {
            for (i = 0; i < kept; i++, w->sink_place++)
                if (w->sink_place < w->sink_size) w->sink[w->sink_place] = (uint8_t)(value >> (24 - 8 * i));
            break;
        }
    }
    return w->sink_place;
}
