// Rows picked from several tables side by side, and the reverse; a table's distinct ids: see picking.py.
//
// What can be wrong with an argument is found here, and told by a number: nothing is read or written outside of arrays.

#include <algorithm>
#include <cstdint>
#include <exception>
#include <new>
#include <thread>
#include <vector>

namespace {

struct Table {
    float *rows;
    const int64_t *index;  // of every place, into the rows
    int64_t count, width;
};

struct Places {
    const Table *tables;
    int64_t count;        // of tables
    const bool *present;  // places that are not have zeros
    int64_t places;
    float *values;        // [places, sum of the widths]
};

// Numbers from which on a thread more is worth its start.
constexpr int64_t WORTH_A_THREAD = 1 << 18;

// The first table with an index outside of its rows, counted from 1; 0: none has. A table without rows is not read.
int64_t outside(const Places &all) {
    for (int64_t t = 0; t < all.count; ++t) {
        const Table &table = all.tables[t];
        bool wrong = false;
        if (table.count)
            for (int64_t p = 0; p < all.places; ++p)
                wrong |= all.present[p] && uint64_t(table.index[p]) >= uint64_t(table.count);
        if (wrong) return t + 1;
    }
    return 0;
}

int64_t width_of(const Places &all) {
    int64_t width = 0;
    for (int64_t t = 0; t < all.count; ++t) width += all.tables[t].width;
    return width;
}

template <typename Work>
void in_threads(int64_t threads, int64_t numbers, const Work &work) {
    threads = std::max<int64_t>(1, std::min(threads, numbers / WORTH_A_THREAD));
    std::vector<std::thread> others;
    int64_t own = 1;  // from here on parts are left to this thread
    try {
        others.reserve(threads);
        for (; own < threads; ++own) others.emplace_back([&, own] { work(own, threads); });
    } catch (const std::exception &) {
        // No more threads are to be had: slower, and the same.
    }
    work(0, threads);
    for (int64_t part = own; part < threads; ++part) work(part, threads);
    for (std::thread &other : others) other.join();
}

void pick(const Places &all, int64_t width, int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
        float *to = all.values + p * width;
        if (!all.present[p]) {
            std::fill(to, to + width, 0.0f);
            continue;
        }
        for (int64_t t = 0; t < all.count; ++t) {
            const Table &table = all.tables[t];
            const float *from = table.count ? table.rows + table.index[p] * table.width : nullptr;
            for (int64_t i = 0; i < table.width; ++i) to[i] = from ? from[i] : 0.0f;
            to += table.width;
        }
    }
}

// Each thread has some rows of each table, and adds to them in the order of the places, however many threads there are.
void add(const Places &all, int64_t width, int64_t part, int64_t parts) {
    const float *from = all.values;
    for (int64_t t = 0; t < all.count; ++t) {
        const Table &table = all.tables[t];
        if (t) from += all.tables[t - 1].width;
        if (!table.count) continue;
        const int64_t first = part * table.count / parts, own = (part + 1) * table.count / parts - first;
        for (int64_t p = 0; p < all.places; ++p) {
            const int64_t row = all.present[p] ? table.index[p] - first : -1;
            if (uint64_t(row) >= uint64_t(own)) continue;
            float *to = table.rows + (first + row) * table.width;
            const float *value = from + p * width;
            for (int64_t i = 0; i < table.width; ++i) to[i] += value[i];
        }
    }
}

// How many of the set bits come before this one; `before` has that of each word's first bit.
int64_t rank(const std::vector<uint64_t> &bits, const std::vector<int64_t> &before, int64_t id) {
    const uint64_t below = bits[id / 64] & ((uint64_t(1) << (id % 64)) - 1);
    return before[id / 64] + __builtin_popcountll(below);
}

}  // namespace

extern "C" {

// The distinct ones of so many ids into a table, ascending, and where each id is among them; the table has so many rows.
// Returns how many there are; -1: an id is outside of the table, or there is no memory.
int64_t metatrain_distinct(const int64_t *ids, int64_t count, int64_t rows, int64_t *keys, int64_t *positions) {
    try {
        std::vector<uint64_t> bits((rows + 63) / 64);
        std::vector<int64_t> before(bits.size());
        for (int64_t i = 0; i < count; ++i) {
            if (uint64_t(ids[i]) >= uint64_t(rows)) return -1;
            bits[ids[i] / 64] |= uint64_t(1) << (ids[i] % 64);
        }
        int64_t found = 0;
        for (std::size_t word = 0; word < bits.size(); ++word) {
            before[word] = found;
            for (uint64_t left = bits[word]; left; left &= left - 1)
                keys[found++] = int64_t(word) * 64 + __builtin_ctzll(left);
        }
        for (int64_t i = 0; i < count; ++i) positions[i] = rank(bits, before, ids[i]);
        return found;
    } catch (const std::bad_alloc &) {
        return -1;
    }
}

// values[p] = the rows at index[p] of all tables, side by side. Returns the table, from 1 on, whose index is wrong.
int64_t metatrain_pick(const Table *tables, int64_t count, const bool *present, int64_t places, float *values,
                       int64_t threads) {
    const Places all{tables, count, present, places, values};
    if (const int64_t wrong = outside(all)) return wrong;
    const int64_t width = width_of(all);
    in_threads(threads, places * width, [&](int64_t part, int64_t parts) {
        pick(all, width, part * places / parts, (part + 1) * places / parts);
    });
    return 0;
}

// rows[index[p]] += its part of values[p], table by table. Returns as `metatrain_pick`.
int64_t metatrain_add(const Table *tables, int64_t count, const bool *present, int64_t places, float *values,
                      int64_t threads) {
    const Places all{tables, count, present, places, values};
    if (const int64_t wrong = outside(all)) return wrong;
    const int64_t width = width_of(all);
    in_threads(threads, places * width, [&](int64_t part, int64_t parts) { add(all, width, part, parts); });
    return 0;
}
}
