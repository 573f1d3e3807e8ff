/* dwz: restores a model that `dwindle pack` packed, bit for bit. C99, no allocation, no floating point, no files.
 *
 * SPDX-License-Identifier: Apache-2.0
 *
 *     uint64_t size; unsigned bits;
 *     if (dwz_header(in, in_size, &size, &bits) != DWZ_OK) ...
 *     // out has `size` bytes, table 1 << bits words (256 KiB for most files), work is static
 *     if (dwz_unpack(in, in_size, out, out_size, &work, table, table_words) != DWZ_OK) ...
 *
 * The format is specified in docs/packing.md. Whatever the input holds, nothing outside the buffers is touched.
 */
#ifndef DWZ_H
#define DWZ_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
    DWZ_OK = 0,
    DWZ_NOT_DWZ = 1,     /* it does not begin as a packed model does */
    DWZ_VERSION = 2,     /* it is of another version */
    DWZ_CHECKSUM = 3,    /* it is truncated or damaged */
    DWZ_BROKEN = 4,      /* its checksum is right, and its content makes no sense */
    DWZ_OUT_SIZE = 5,    /* the output buffer is too small */
    DWZ_TABLE_SIZE = 6   /* the table is too small */
};

#define DWZ_HISTORY 16384
#define DWZ_MOST_LANES 1024
#define DWZ_MOST_GROUPS 4096
#define DWZ_FIELDS 48
/* Ranges of slots that a symbol is looked up in: more are faster, and take more memory. */
#ifdef DWZ_ENCODER
#define DWZ_RANGE_BITS 10
#else
#define DWZ_RANGE_BITS 6
#endif

/* Everything that the decoder keeps, below 90 KiB; the caller need not set anything. */
typedef struct {
    /* the coder */
    const uint8_t *in;
    size_t in_size, in_place;
    uint32_t low, high, value;
    int error, learning;
#ifdef DWZ_ENCODER
    uint8_t *sink;
    size_t sink_size, sink_place;
#endif
    /* the table of predictions, and the functions that mixing needs */
    uint32_t *table;
    uint32_t mask;
    uint16_t squash[4096];
    int16_t stretch[4096];
    uint16_t rate[256], trust[256];
    /* numbers that describe a frame */
    uint16_t chances[DWZ_FIELDS][64];
    /* the model of the structure */
    int32_t byte_weights[256][8];
    uint8_t history[DWZ_HISTORY];
    uint32_t index[4096];
    uint32_t count, match, length, near4, far4;
    /* the plane that is being decoded */
    int32_t weights[257][3];
    uint8_t magnitudes[256];
    uint16_t below[16][257];
    uint8_t first[16][1 << DWZ_RANGE_BITS], known[16];
    uint8_t classes[DWZ_MOST_GROUPS];
    uint32_t states[DWZ_MOST_LANES];
    /* a table of distinct numbers */
    uint64_t distinct[256];
    uint32_t row_table[256];
} dwz_work;

/* Read a packed file's header: how large the restored file is, and how large a table of predictions it needs. */
int dwz_header(const uint8_t *in, size_t in_size, uint64_t *size, unsigned *table_bits);

/* Restore a file; `out` must have the header's size at least, and `table` 1 << table_bits words. */
int dwz_unpack(const uint8_t *in, size_t in_size, uint8_t *out, size_t out_size, dwz_work *work, uint32_t *table,
               size_t table_words);

/* Return one sentence for a status. */
const char *dwz_message(int status);

#ifdef __cplusplus
}
#endif

#endif
