/* The decoder of packed models; see dwz.h and docs/packing.md.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#include "dwz.h"

#include "dwz_dictionary.h"

#include <string.h>

#define HALF 32768u
#define WEIGHT_LIMIT (1 << 22)
#define LARGEST_FRAME (1u << 20)
#define SCALE_BITS 14
#define SCALE (1u << SCALE_BITS)
#define LOWEST (1u << 16)

enum { BYTES, PLANES, TABLE, SCALED, ROWS };
enum { RAW, LANES, MIXED };
enum { F_KIND, F_LENGTH, F_WIDTH, F_ROTATED, F_ROW, F_METHOD, F_LANES, F_CLASSES, F_DISTINCT, F_SCALED,
       F_RESIDUAL = 15, F_CLASS = 16, F_LEVEL = 32 };

/* 65536 / (1 + exp(-(i - 32) / 4)) for i from 0 to 64, rounded, at most 65535. */
static const uint16_t ANCHORS[65] = {
    22, 28, 36, 47, 60, 77, 98, 126, 162, 208, 267, 342, 439,
    562, 720, 922, 1179, 1506, 1921, 2446, 3108, 3938, 4971, 6249, 7812, 9702,
    11955, 14595, 17625, 21025, 24743, 28693, 32768, 36843, 40793, 44511, 47911, 50941, 53581,
    55834, 57724, 59287, 60565, 61598, 62428, 63090, 63615, 64030, 64357, 64614, 64816, 64974,
    65097, 65194, 65269, 65328, 65374, 65410, 65438, 65459, 65476, 65489, 65500, 65508, 65514,
};

static int64_t shifted(int64_t x, int bits) { /* floor(x / 2^bits), whatever >> does to negative numbers */
    return x >= 0 ? x >> bits : ~(~x >> bits);
}

static uint32_t hashed(uint32_t a, uint32_t b) {
    uint32_t x = a * 0x9E3779B1u + b * 0x85EBCA6Bu;
    x = (x ^ x >> 15) * 0x2C1B3C6Du;
    return x ^ x >> 13;
}

static uint32_t bit_length(uint32_t x) {
    uint32_t result = 0;
    while (x) {
        x >>= 1;
        result++;
    }
    return result;
}

static uint32_t get32(const uint8_t *at) {
    return at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

/* ---- The coder ---- */

static void begin(dwz_work *w, const uint8_t *in, size_t size) {
    int i;
    w->in = in;
    w->in_size = size;
    w->low = w->value = 0;
    w->high = 0xFFFFFFFFu;
    for (i = 0; i < 4; i++) w->value = w->value << 8 | ((size_t)i < size ? in[i] : 0u);
    w->in_place = 4;
    w->error = 0;
}

static int code(dwz_work *w, uint32_t chance, int bit) {
    uint32_t middle;
    if (w->learning) return bit;
    middle = w->low + (uint32_t)((uint64_t)(w->high - w->low) * chance >> 16);
#ifdef DWZ_ENCODER
    if (w->sink == NULL)
#endif
        bit = w->value <= middle;
    if (bit) w->high = middle;
    else w->low = middle + 1;
    while (!((w->low ^ w->high) >> 24)) {
#ifdef DWZ_ENCODER
        if (w->sink != NULL) {
            if (w->sink_place < w->sink_size) w->sink[w->sink_place] = (uint8_t)(w->high >> 24);
            w->sink_place++;
        } else
#endif
        {
            w->value <<= 8;
            if (w->in_place < w->in_size) w->value |= w->in[w->in_place];
            else if (w->in_place >= w->in_size + 4) w->error = 1;
            w->in_place++;
        }
        w->low <<= 8;
        w->high = w->high << 8 | 0xFFu;
    }
    return bit;
}

static int code_bit(dwz_work *w, unsigned field, unsigned place, int bit) {
    uint16_t *chance = &w->chances[field][place];
    uint32_t c = *chance;
    bit = code(w, c, bit);
    c = bit ? c + ((65535u - c) >> 4) : c - (c >> 4);
    *chance = (uint16_t)(c < 32 ? 32 : c > 65504 ? 65504 : c);
    return bit;
}

static uint32_t code_plain(dwz_work *w, int bits, uint32_t value) {
    uint32_t result = 0;
    while (bits-- > 0) result = result << 1 | (uint32_t)code(w, HALF, (int)(value >> bits & 1u));
    return result;
}

static uint32_t code_number(dwz_work *w, unsigned field, uint32_t value) {
    uint32_t length = 0, mine;
    value += 1; /* at most 2^32 - 1 */
    mine = bit_length(value);
    while (length < 32 && code_bit(w, field, length, mine > length + 1)) length++;
    if (length == 32) {
        w->error = 1;
        return 0;
    }
    return ((1u << length) | code_plain(w, (int)length, value & ((1u << length) - 1))) - 1;
}

static uint32_t code_tree(dwz_work *w, unsigned field, int bits, uint32_t value) {
    uint32_t node = 1;
    int place;
    for (place = bits - 1; place >= 0; place--)
        node = node << 1 | (uint32_t)code_bit(w, field, node, (int)(value >> place & 1u));
    return node - (1u << bits);
}

/* ---- Mixing ---- */

static int mix(dwz_work *w, const uint32_t *contexts, int count, uint32_t node, int32_t *weights, uint32_t limit,
               int shift, int bit) {
    uint32_t places[8], cells[8];
    int32_t inputs[8], p, error;
    int64_t dot = 0;
    int i;
    for (i = 0; i < count; i++) {
        uint32_t cell, n;
        places[i] = (contexts[i] ^ node) & w->mask;
        cell = w->table[places[i]];
        if ((cell & 255u) != contexts[i] >> 24) cell = 0x80000000u | contexts[i] >> 24;
        cells[i] = cell;
        n = cell >> 8 & 255u;
        inputs[i] = (int32_t)shifted(w->stretch[cell >> 20] * w->trust[n], 8);
        dot += (int64_t)inputs[i] * weights[i];
    }
    dot = shifted(dot, 16);
    p = w->squash[dot > 2047 ? 4095 : dot < -2048 ? 0 : dot + 2048];
    p = p < 32 ? 32 : p > 65504 ? 65504 : p;
    bit = code(w, (uint32_t)p, bit);
    error = bit ? 65536 - p : -p;
    for (i = 0; i < count; i++) {
        uint32_t n = cells[i] >> 8 & 255u, chance = cells[i] >> 16;
        int32_t weight = weights[i] + (int32_t)shifted((int64_t)inputs[i] * error + (1 << (shift - 1)), shift);
        weights[i] = weight > WEIGHT_LIMIT ? WEIGHT_LIMIT : weight < -WEIGHT_LIMIT ? -WEIGHT_LIMIT : weight;
        chance = bit ? chance + ((65535u - chance) * w->rate[n] >> 16) : chance - (chance * w->rate[n] >> 16);
        w->table[places[i]] = chance << 16 | (n < limit ? n + 1 : limit) << 8 | (cells[i] & 255u);
    }
    return bit;
}

static void learn(dwz_work *w, uint8_t value) {
    uint32_t key, found, length = 0;
    if (w->length && w->history[w->match % DWZ_HISTORY] == value) {
        if (w->length < 65535) w->length++;
        w->match++;
    } else {
        w->length = 0;
    }
    w->history[w->count++ % DWZ_HISTORY] = value;
    w->far4 = w->far4 << 8 | w->near4 >> 24;
    w->near4 = w->near4 << 8 | value;
    if (w->count < 5) return;
    key = hashed(10, hashed(w->near4, w->far4 & 255u)) >> 20;
    found = w->index[key];
    if (!w->length && found && w->count - found < DWZ_HISTORY - 32) {
        while (length < 32 && length < found &&
               w->history[(found - 1 - length) % DWZ_HISTORY] == w->history[(w->count - 1 - length) % DWZ_HISTORY])
            length++;
        if (length >= 4) {
            w->match = found;
            w->length = length;
        }
    }
    w->index[key] = w->count;
}

static uint8_t code_byte(dwz_work *w, uint64_t place, uint8_t value) {
    uint32_t contexts[8], last = w->near4 & 255u, column = (uint32_t)(place & 3u) << 4, node = 1;
    uint32_t length = w->length < 31 ? w->length : 31;
    uint32_t expected = length ? w->history[w->match % DWZ_HISTORY] | 256u : 0;
    int bit;
    contexts[0] = hashed(1, last);
    contexts[1] = hashed(2, w->near4 & 0xFFFFu);
    contexts[2] = hashed(3, w->near4 & 0xFFFFFFu);
    contexts[3] = hashed(4, w->near4);
    contexts[4] = hashed(5, hashed(w->near4, w->far4 & 0xFFFFu));
    contexts[5] = hashed(6 + column, w->near4 >> 24 | w->far4 >> 24 << 8);
    contexts[6] = hashed(7 + column, w->near4 >> 24 | last << 8);
    for (bit = 7; bit >= 0; bit--) {
        if (expected >> (bit + 1) == node) contexts[7] = hashed(8, length * 2 + (expected >> bit & 1u)) ^ node;
        else contexts[7] = hashed(9, 0);
        node = node << 1 | (uint32_t)mix(w, contexts, 8, node, w->byte_weights[node], 127, 14, value >> bit & 1);
    }
    learn(w, (uint8_t)node);
    return (uint8_t)node;
}

/* ---- Planes ----
 * The byte of number e that belongs to plane p lies at out[e * stride + p] until all planes are there; numbers of 4 and
 * 2 bits are packed as soon as they are known. */

typedef struct {
    uint8_t *out;
    uint32_t count, row, stride, place, depth;
    unsigned bits;          /* below 8: packed */
    const uint8_t *groups;  /* the first plane, at the same stride, for a later one */
} plane_t;

static uint32_t get(const plane_t *p, uint32_t e) {
    if (p->bits >= 8) return p->out[(size_t)e * p->stride + p->place];
    return (uint32_t)p->out[e * p->bits / 8] >> (e * p->bits & 7u) & ((1u << p->bits) - 1);
}

static void put(const plane_t *p, uint32_t e, uint32_t value) {
    if (p->bits >= 8) {
        p->out[(size_t)e * p->stride + p->place] = (uint8_t)value;
    } else {
        uint8_t *byte = &p->out[e * p->bits / 8];
        uint32_t shift = e * p->bits & 7u;
        *byte = (uint8_t)((shift ? *byte : 0u) | value << shift);
    }
}

static void mixed(dwz_work *w, const plane_t *p, uint32_t plane, uint32_t chosen, uint32_t common) {
    uint32_t size = 1u << p->depth, salt = plane << 4, used = 0, line = 0, column = 0, e, i;
    uint32_t everything = hashed(16 + salt, 0), group = hashed(17 + salt, 0);
    for (i = 0; i < 3; i++) used += chosen >> i & 1u;
    for (e = 0; e < 257; e++)
        for (i = 0; i < used; i++) w->weights[e][i] = (int32_t)(65536u / used);
    for (e = 0; e < size; e++) {
        uint32_t up = (e - common) & (size - 1), down = (common - e) & (size - 1);
        w->magnitudes[e] = (uint8_t)bit_length(up < down ? up : down);
    }
    for (e = 0; e < p->count && !w->error; e++) {
        uint32_t contexts[3], n = 0, node = 1, value = get(p, e);
        if (chosen & 1u) contexts[n++] = everything;
        if (chosen & 2u) {
            if (p->groups != NULL) group = hashed(17 + salt, p->groups[(size_t)e * p->stride]);
            contexts[n++] = group;
        }
        if (chosen & 4u) {
            uint32_t left = column ? w->magnitudes[get(p, e - 1)] : 0, above = line ? w->magnitudes[get(p, e - p->row)] : 0;
            contexts[n++] = hashed(18 + salt, left * 16 + above);
        }
        if (mix(w, contexts, (int)n, 0, w->weights[256], 255, 15, value == common)) {
            put(p, e, common);
        } else {
            int bit;
            for (bit = (int)p->depth - 1; bit >= 0; bit--)
                node = node << 1 |
                       (uint32_t)mix(w, contexts, (int)n, node, w->weights[node], 255, 15, (int)(value >> bit & 1u));
            put(p, e, node - size);
        }
        if (++column == p->row) {
            column = 0;
            line++;
            group = hashed(17 + salt, line);
        }
    }
}

static uint32_t level(uint32_t i) { /* 0 1 2 3 4 5 6 7 8 10 12 14 16 20 ... 16384 */
    return i < 8 ? i : (4 + (i & 3u)) << ((i >> 2) - 1);
}

/* For each range of slots, the symbol that its first slot belongs to; and whether there is only one. */
static void set_buckets(dwz_work *w, uint32_t number) {
    const uint16_t *below = w->below[number];
    uint32_t s = 0, bucket;
    for (bucket = 0; bucket < 1u << DWZ_RANGE_BITS; bucket++) {
        while (below[s + 1] <= bucket << (SCALE_BITS - DWZ_RANGE_BITS)) s++;
        w->first[number][bucket] = (uint8_t)s;
    }
    w->known[number] = below[s + 1] - below[s] == (int)SCALE;
}

static int read_table(dwz_work *w, uint32_t number, uint32_t size) {
    uint32_t before = 0, total = 0, sum = 0, s, largest;
    uint16_t *f = w->below[number];
    for (s = 0; s < size; s++) {
        before = code_tree(w, F_LEVEL + (before >> 2), 6, 0);
        if (before > 52) return DWZ_BROKEN;
        f[s] = (uint16_t)level(before);
        total += f[s];
    }
    if (!total) return DWZ_BROKEN;
    for (s = 0; s < size; s++) {
        if (f[s]) {
            uint32_t share = (uint32_t)((uint64_t)f[s] * SCALE / total);
            f[s] = (uint16_t)(share ? share : 1);
        }
        sum += f[s];
    }
    do {
        for (largest = 0, s = 1; s < size; s++)
            if (f[s] > f[largest]) largest = s;
        if (sum <= SCALE) {
            f[largest] = (uint16_t)(f[largest] + (SCALE - sum));
            sum = SCALE;
        } else {
            uint32_t cut = sum - SCALE < f[largest] / 2u ? sum - SCALE : f[largest] / 2u;
            f[largest] = (uint16_t)(f[largest] - cut);
            sum -= cut;
        }
    } while (sum != SCALE);
    for (sum = 0, s = 0; s < size; s++) {
        uint32_t mine = f[s];
        f[s] = (uint16_t)sum;
        sum += mine;
    }
    f[size] = (uint16_t)SCALE;
    set_buckets(w, number);
    return DWZ_OK;
}

static int read_states(dwz_work *w, uint32_t lanes, const uint8_t **at, const uint8_t *end) {
    uint32_t i;
    if ((size_t)(end - *at) < 4 * (size_t)lanes) return 0;
    for (i = 0; i < lanes; i++, *at += 4) w->states[i] = get32(*at);
    return 1;
}

static int next_symbol(dwz_work *w, uint32_t class_, uint32_t lanes, uint32_t *lane, uint8_t *symbol,
                       const uint8_t **at, const uint8_t *end) {
    const uint16_t *below = w->below[class_];
    uint32_t x = w->states[*lane], slot = x & (SCALE - 1), s = w->first[class_][slot >> (SCALE_BITS - DWZ_RANGE_BITS)];
    if (w->known[class_]) { /* one symbol only: nobody's turn */
        *symbol = w->first[class_][0];
        return 1;
    }
    while (below[s + 1] <= slot) s++;
    x = (uint32_t)(below[s + 1] - below[s]) * (x >> SCALE_BITS) + slot - below[s];
    if (x < LOWEST) {
        if (end - *at < 2) return 0;
        x = x << 16 | (*at)[0] | (uint32_t)(*at)[1] << 8;
        *at += 2;
    }
    w->states[*lane] = x;
    *symbol = (uint8_t)s;
    if (++*lane == lanes) *lane = 0;
    return 1;
}

static int in_lanes(dwz_work *w, const plane_t *p, const uint8_t **body, size_t *body_size) {
    uint32_t bits = code_number(w, F_LANES, 0), classes = code_number(w, F_CLASSES, 0), lanes, lane = 0, i, e;
    uint32_t groups = p->groups != NULL ? 256 : (p->count - 1) / p->row + 1, column = 0, line = 0, mine = 0;
    const uint8_t *at = *body, *end = at + *body_size;
    if (bits > 10 || classes > 15 || (classes && groups > DWZ_MOST_GROUPS)) return DWZ_BROKEN;
    if (classes) {
        for (i = 0; i < groups; i++) {
            mine = code_tree(w, F_CLASS + mine, 4, 0);
            if (mine > classes) return DWZ_BROKEN;
            w->classes[i] = (uint8_t)mine;
        }
        mine = w->classes[0];
    } else {
        memset(w->classes, 0, 256);
    }
    for (i = 0; i <= classes; i++)
        if (read_table(w, i, 1u << p->depth) != DWZ_OK) return DWZ_BROKEN;
    lanes = 1u << bits;
    if (!read_states(w, lanes, &at, end)) return DWZ_BROKEN;
    for (e = 0; e < p->count; e++) {
        uint8_t symbol;
        if (p->groups != NULL) mine = w->classes[p->groups[(size_t)e * p->stride]];
        if (!next_symbol(w, mine, lanes, &lane, &symbol, &at, end)) return DWZ_BROKEN;
        put(p, e, symbol);
        if (++column == p->row && classes) {
            column = 0;
            line++;
            if (line < groups) mine = w->classes[line];
        }
    }
    for (i = 0; i < lanes; i++)
        if (w->states[i] != LOWEST) return DWZ_BROKEN;
    *body_size = (size_t)(end - at);
    *body = at;
    return DWZ_OK;
}

static int code_planes(dwz_work *w, plane_t *p, uint32_t planes, const uint8_t **body, size_t *body_size) {
    uint32_t plane, e, method, chosen, common;
    uint8_t *out = p->out;
    for (plane = 0; plane < planes; plane++) {
        if (p->stride > 1) p->place = p->stride - planes + plane;
        p->groups = plane ? out + (p->stride - planes) : NULL;
        method = code_number(w, F_METHOD, 0);
        if (method == RAW) {
            if (p->depth != 8 || *body_size < p->count) return DWZ_BROKEN;
            for (e = 0; e < p->count; e++) put(p, e, (*body)[e]);
            *body += p->count;
            *body_size -= p->count;
        } else if (method == MIXED) {
            chosen = code_plain(w, 3, 0);
            common = code_plain(w, (int)p->depth, 0);
            if (!chosen) return DWZ_BROKEN;
            mixed(w, p, plane, chosen, common);
        } else if (method != LANES || in_lanes(w, p, body, body_size) != DWZ_OK) {
            return DWZ_BROKEN;
        }
        if (w->error) return DWZ_BROKEN;
    }
    return DWZ_OK;
}

static void put_number(uint8_t *at, uint64_t value, uint32_t bytes) {
    for (; bytes--; value >>= 8) *at++ = (uint8_t)value;
}

/* The float32 product of two bit patterns, to the nearest or even; 0 unless all are ordinary numbers. */
static uint32_t product(uint32_t a, uint32_t b) {
    uint32_t ea = a >> 23 & 255u, eb = b >> 23 & 255u, kept, shift;
    uint64_t all = (uint64_t)(a << 9 >> 9 | 0x800000u) * (b << 9 >> 9 | 0x800000u), rest;
    int32_t exponent;
    shift = 23 + (uint32_t)(all >> 47);
    rest = all & (((uint64_t)1 << shift) - 1);
    kept = (uint32_t)(all >> shift);
    if (rest > (uint64_t)1 << (shift - 1) || (rest == (uint64_t)1 << (shift - 1) && (kept & 1u))) kept++;
    exponent = (int32_t)(ea + eb) - 127 + (int32_t)(shift - 23) + (int32_t)(kept >> 24);
    if (ea == 0 || ea == 255 || eb == 0 || eb == 255 || exponent < 1 || exponent > 254) return 0;
    return ((a ^ b) & 0x80000000u) | (uint32_t)exponent << 23 | (kept >> 24 ? 0 : kept & 0x7FFFFFu);
}

static uint32_t code_near(dwz_work *w, uint32_t expected) {
    uint32_t folded = code_number(w, F_RESIDUAL, 0);
    return folded & 1u ? expected - (folded >> 1) - 1 : expected + (folded >> 1);
}

static int scaled(dwz_work *w, uint8_t *out, uint32_t done, uint32_t size) {
    uint32_t distance = code_number(w, F_ROW, 0), factor = code_plain(w, 32, 0), i;
    if (size % 4 || distance > done || distance < size) return DWZ_BROKEN;
    for (i = 0; i < size && !w->error; i += 4)
        put_number(out + i, code_near(w, product(get32(out + i - distance), factor)), 4);
    return DWZ_OK;
}

/* Numbers of a table, or of one table for each row that is the first one times a number. */
static int expand(dwz_work *w, plane_t *p, uint32_t distinct, int rows) {
    uint32_t e, i, column = 0, bytes = p->stride;
    for (i = 0; i < distinct; i++) w->row_table[i] = (uint32_t)w->distinct[i];
    for (e = 0; e < p->count && !w->error; e++) {
        uint8_t *at = p->out + (size_t)e * bytes;
        uint32_t index = distinct > 1 ? at[bytes - 1] : 0;
        if (rows && column == 0) {
            int is_scaled = code_bit(w, F_SCALED, 0, 0);
            uint32_t factor = is_scaled ? code_plain(w, 32, 0) : 0;
            for (i = 0; i < distinct; i++)
                w->row_table[i] = is_scaled ? code_near(w, product((uint32_t)w->distinct[i], factor))
                                            : (uint32_t)w->distinct[i];
        }
        if (index >= distinct) return DWZ_BROKEN;
        put_number(at, rows ? w->row_table[index] : w->distinct[index], bytes);
        if (++column == p->row) column = 0;
    }
    return DWZ_OK;
}

static int numbers(dwz_work *w, uint32_t kind, uint8_t *out, uint32_t size, const uint8_t **body, size_t *body_size) {
    uint32_t width = code_number(w, F_WIDTH, 0), bytes, distinct, e, i;
    int rotated;
    plane_t p;
    if (width > 5 || (uint64_t)size * 8 % (2u << width)) return DWZ_BROKEN;
    p.out = out;
    p.bits = 2u << width;
    p.row = code_number(w, F_ROW, 0);
    if (p.row > 0x7FFFFFFFu) return DWZ_BROKEN;
    p.row++;
    bytes = p.bits < 8 ? 1 : p.bits / 8;
    p.count = p.bits < 8 ? size * (8 / p.bits) : size / bytes;
    p.stride = bytes;
    p.place = 0;
    p.depth = p.bits < 8 ? p.bits : 8;
    if (kind == PLANES) {
        rotated = code_bit(w, F_ROTATED, 0, 0);
        if (rotated && bytes == 1) return DWZ_BROKEN;
        if (code_planes(w, &p, bytes, body, body_size) != DWZ_OK) return DWZ_BROKEN;
        for (e = 0; bytes > 1 && e < p.count; e++) {
            uint8_t *at = out + (size_t)e * bytes;
            uint64_t value = 0;
            for (i = 0; i < bytes; i++) value = value << 8 | at[i];
            if (rotated) value = value >> 1 | value << (p.bits - 1);
            put_number(at, value, bytes);
        }
        return DWZ_OK;
    }
    distinct = code_number(w, F_DISTINCT, 0) + 1;
    if (distinct > 256 || p.bits < 8 || (kind == ROWS && (p.bits != 32 || distinct > p.row))) return DWZ_BROKEN;
    for (i = 0; i < distinct; i++) {
        w->distinct[i] = p.bits > 32 ? (uint64_t)code_plain(w, 32, 0) << 32 : 0;
        w->distinct[i] |= code_plain(w, p.bits > 32 ? 32 : (int)p.bits, 0);
    }
    p.depth = bit_length(distinct - 1);
    p.place = bytes - 1;
    if (distinct > 1 && code_planes(w, &p, 1, body, body_size) != DWZ_OK) return DWZ_BROKEN;
    return expand(w, &p, distinct, kind == ROWS);
}

/* ---- Frames ---- */

static void reset(dwz_work *w) {
    uint32_t i;
    for (i = 0; i < DWZ_FIELDS * 64; i++) w->chances[i / 64][i % 64] = HALF;
}

static int frame(dwz_work *w, uint8_t *out, uint32_t size, uint64_t place, const uint8_t *body, size_t body_size) {
    uint32_t done = 0, i;
    reset(w);
    while (done < size) {
        uint32_t kind = code_number(w, F_KIND, 0), length = code_number(w, F_LENGTH, 0);
        int status = DWZ_OK;
        if (w->error || kind > ROWS || length >= size - done) return DWZ_BROKEN;
        length++;
        if (kind == BYTES)
            for (i = 0; i < length && !w->error; i++) out[done + i] = code_byte(w, place + done + i, 0);
        else if (kind == SCALED) status = scaled(w, out + done, done, length);
        else status = numbers(w, kind, out + done, length, &body, &body_size);
        if (status != DWZ_OK || w->error) return DWZ_BROKEN;
        done += length;
    }
    return w->in_place < w->in_size || body_size ? DWZ_BROKEN : DWZ_OK;
}

static uint32_t crc32(uint32_t crc, const uint8_t *data, size_t size) {
    static const uint32_t NIBBLES[16] = {
        0x00000000u, 0x1DB71064u, 0x3B6E20C8u, 0x26D930ACu, 0x76DC4190u, 0x6B6B51F4u, 0x4DB26158u, 0x5005713Cu,
        0xEDB88320u, 0xF00F9344u, 0xD6D6A3E8u, 0xCB61B38Cu, 0x9B64C2B0u, 0x86D3D2D4u, 0xA00AE278u, 0xBDBDF21Cu,
    };
    crc = ~crc;
    while (size--) {
        crc ^= *data++;
        crc = crc >> 4 ^ NIBBLES[crc & 15u];
        crc = crc >> 4 ^ NIBBLES[crc & 15u];
    }
    return ~crc;
}

static int varint(const uint8_t **at, const uint8_t *end, uint64_t *value) {
    int shift;
    *value = 0;
    for (shift = 0; shift < 63; shift += 7) {
        uint8_t byte;
        if (*at == end) return 0;
        byte = *(*at)++;
        *value |= (uint64_t)(byte & 127u) << shift;
        if (byte < 128) return 1;
    }
    return 0;
}

static int header(const uint8_t **at, const uint8_t *end, uint64_t *size, unsigned *table_bits) {
    if (end - *at < 4 || memcmp(*at, "DWZ", 3) != 0) return DWZ_NOT_DWZ;
    if ((*at)[3] != 1) return DWZ_VERSION;
    *at += 4;
    if (!varint(at, end, size) || *at == end) return DWZ_CHECKSUM;
    *table_bits = *(*at)++;
    return *table_bits < 10 || *table_bits > 22 ? DWZ_BROKEN : DWZ_OK;
}

int dwz_header(const uint8_t *in, size_t in_size, uint64_t *size, unsigned *table_bits) {
    return header(&in, in + in_size, size, table_bits);
}

static void start(dwz_work *w, uint32_t *table, unsigned table_bits) {
    uint32_t d, p, i;
    memset(w, 0, sizeof *w);
    w->table = table;
    w->mask = (1u << table_bits) - 1;
    for (i = 0; i <= w->mask; i++) table[i] = 0x80000000u;
    for (d = 0; d < 4096; d++)
        w->squash[d] = (uint16_t)(((64 - d % 64) * ANCHORS[d / 64] + d % 64 * ANCHORS[d / 64 + 1]) >> 6);
    for (p = 0, d = 0; p < 4096; p++) {
        while (d < 4095 && w->squash[d] < p * 16 + 8) d++;
        w->stretch[p] = (int16_t)((int32_t)d - 2048);
    }
    for (d = 0; d < 256; d++) {
        w->rate[d] = (uint16_t)(131072u / (2 * d + 3));
        w->trust[d] = (uint16_t)(1280u * d / (5 * d + 2));
    }
    for (d = 0; d < 256; d++)
        for (i = 0; i < 8; i++) w->byte_weights[d][i] = 20000;
    w->learning = 1;
    for (i = 0; i < DWZ_DICTIONARY_SIZE; i++) code_byte(w, i, DWZ_DICTIONARY[i]);
    w->learning = 0;
}

int dwz_unpack(const uint8_t *in, size_t in_size, uint8_t *out, size_t out_size, dwz_work *work, uint32_t *table,
               size_t table_words) {
    const uint8_t *at = in, *end = in + in_size;
    uint64_t size, frame_size, coded, body, done = 0;
    unsigned table_bits;
    int status = header(&at, end, &size, &table_bits);
    if (status != DWZ_OK) return status;
    if (in_size < 8 || crc32(0, in, in_size - 4) != get32(end - 4)) return DWZ_CHECKSUM;
    if (size > out_size) return DWZ_OUT_SIZE;
    if (table_words < (size_t)1 << table_bits) return DWZ_TABLE_SIZE;
    end -= 4;
    start(work, table, table_bits);
    for (;;) {
        if (!varint(&at, end, &frame_size)) return DWZ_BROKEN;
        if (frame_size == 0) break;
        if (frame_size > LARGEST_FRAME || frame_size > size - done) return DWZ_BROKEN;
        if (!varint(&at, end, &coded) || !varint(&at, end, &body)) return DWZ_BROKEN;
        if (coded > (uint64_t)(end - at) || body > (uint64_t)(end - at) - coded) return DWZ_BROKEN;
        begin(work, at, (size_t)coded);
        at += coded;
        status = frame(work, out + done, (uint32_t)frame_size, done, at, (size_t)body);
        if (status != DWZ_OK) return status;
        at += body;
        done += frame_size;
    }
    if (done != size || end - at != 4 || crc32(0, out, (size_t)size) != get32(at)) return DWZ_BROKEN;
    return DWZ_OK;
}

const char *dwz_message(int status) {
    static const char *const MESSAGES[] = {
        "done",
        "it does not begin as a packed model does",
        "it is of a version that this decoder does not read",
        "it is truncated or damaged: its checksum is wrong",
        "it is damaged: its content makes no sense",
        "the output buffer is too small",
        "the table of predictions is too small",
    };
    return status >= 0 && status <= DWZ_TABLE_SIZE ? MESSAGES[status] : "an unknown status";
}
