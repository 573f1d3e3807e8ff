/* Restore packed files for the tests: restore IN OUT, where IN holds any number of them, each behind its length, and OUT
 * gets for each a status and, where that is 0, the length and the restored file. Lengths are 4 bytes, lowest first.
 * Buffers are exactly as long as they are said to be, so that a sanitizer sees every step outside. */
#include "dwz.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LARGEST (1u << 26)

static dwz_work work;
typedef char as_small_as_promised[sizeof(dwz_work) <= 90 * 1024 ? 1 : -1];

static void put_length(FILE *out, uint32_t value) {
    int i;
    for (i = 0; i < 4; i++) fputc((int)(value >> (8 * i) & 255u), out);
}

int main(int count, char **names) {
    FILE *in, *out;
    uint8_t length[4];
    if (count != 3 || (in = fopen(names[1], "rb")) == NULL || (out = fopen(names[2], "wb")) == NULL) return 1;
    while (fread(length, 1, 4, in) == 4) {
        uint32_t size = length[0] | (uint32_t)length[1] << 8 | (uint32_t)length[2] << 16 | (uint32_t)length[3] << 24;
        uint8_t *packed = malloc(size ? size : 1), *restored = NULL;
        uint32_t *table = NULL;
        uint64_t restored_size = 0;
        unsigned table_bits = 0;
        int status;
        if (packed == NULL || fread(packed, 1, size, in) != size) return 1;
        memset(&work, 0xA5, sizeof work);
        status = dwz_header(packed, size, &restored_size, &table_bits);
        if (status == DWZ_OK && restored_size > LARGEST) status = DWZ_OUT_SIZE;
        if (status == DWZ_OK) {
            restored = malloc(restored_size ? (size_t)restored_size : 1);
            table = malloc(sizeof *table << table_bits);
            if (restored == NULL || table == NULL) return 1;
            memset(restored, 0xA5, (size_t)restored_size);
            status = dwz_unpack(packed, size, restored, (size_t)restored_size, &work, table, (size_t)1 << table_bits);
        }
        put_length(out, (uint32_t)status);
        if (status == DWZ_OK) {
            put_length(out, (uint32_t)restored_size);
            fwrite(restored, 1, (size_t)restored_size, out);
        }
        if (strlen(dwz_message(status)) == 0) return 1;
        free(table);
        free(restored);
        free(packed);
    }
    return fclose(out) != 0;
}
