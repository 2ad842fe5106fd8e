// What a reader does with every event: draws of episodes, rows gathered from columns, the distinct items of steps. See
// episodes.py and gather.py.
//
// What can be wrong with an argument is found here, and told by a number: nothing is read or written outside of arrays.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

namespace {

// Rows of so many bytes, which the compiler knows: a few of them are moves, and not a call.
template <int64_t BYTES>
struct Known {
    static void copy(char* out, const char* from, int64_t rows, int64_t) {
        switch (rows) {
            case 0: return;
            case 1: std::memcpy(out, from, BYTES); return;
            case 2: std::memcpy(out, from, 2 * BYTES); return;
            case 3: std::memcpy(out, from, 3 * BYTES); return;
            case 4: std::memcpy(out, from, 4 * BYTES); return;
            default: std::memcpy(out, from, rows * BYTES);
        }
    }
    static void copy(char* out, const char* from, int64_t) { std::memcpy(out, from, BYTES); }
};

struct Any {
    static void copy(char* out, const char* from, int64_t rows, int64_t bytes) { std::memcpy(out, from, rows * bytes); }
    static void copy(char* out, const char* from, int64_t bytes) { std::memcpy(out, from, bytes); }
};

// Calls `made` with the kind of rows that are so wide.
template <typename Made>
int64_t by_width(int64_t bytes, const Made& made) {
    switch (bytes) {
        case 1: return made(Known<1>());
        case 4: return made(Known<4>());
        case 8: return made(Known<8>());
        default: return made(Any());
    }
}

// Calls `made` with an index of int32 or int64.
template <typename Made>
int64_t by_index(const void* index, int64_t bytes, const Made& made) {
    return bytes == 4 ? made(static_cast<const int32_t*>(index)) : made(static_cast<const int64_t*>(index));
}

// Runs of consecutive rows, each of one of several columns.
struct Runs {
    const int64_t* sizes;  // rows of each column
    int64_t columns;
    const int64_t* which;  // each run's column; null: the first
    const int64_t *starts, *lengths;
    int64_t count;

    int64_t column(int64_t run) const { return which ? which[run] : 0; }
    bool within(int64_t run) const {
        const int64_t own = column(run);
        return own >= 0 && own < columns && starts[run] >= 0 && lengths[run] >= 0 &&
               starts[run] <= sizes[own] - lengths[run];
    }
};

// Runs are fetched so far ahead of their copy: windows are larger than the caches, and their tasks' order is random.
constexpr int64_t AHEAD = 8;

template <typename Row>
int64_t gather(char* out, int64_t room, const char* const* columns, const Runs& runs, int64_t bytes) {
    int64_t done = 0;
    for (int64_t run = 0; run < runs.count; run++) {
        const int64_t rows = runs.lengths[run];
        if (!runs.within(run) || rows > room - done) return run;
        if (run + AHEAD < runs.count && runs.within(run + AHEAD)) {
            const char* next = columns[runs.column(run + AHEAD)] + runs.starts[run + AHEAD] * bytes;
            for (int line = 0; line < 3; line++) __builtin_prefetch(next + 64 * line);
        }
        Row::copy(out + done * bytes, columns[runs.column(run)] + runs.starts[run] * bytes, rows, bytes);
        done += rows;
    }
    return done == room ? -1 : runs.count;
}

// A set of whole numbers as bits, and above every 64 words of bits a word that tells which of them are not 0.
constexpr int LEVELS = 4;  // of the highest, looked through whole, all that an int32 can be need 128 words

struct Bits {
    uint64_t* level[LEVELS];
    int64_t top = 0;  // words of the highest level

    Bits(uint64_t* words, int64_t numbers) {
        for (auto& own : level) {
            own = words;
            words += top = numbers = (numbers + 63) / 64;
        }
    }

    void add(int64_t number) {
        for (auto& own : level) {
            uint64_t& word = own[number >> 6];
            const uint64_t before = word;
            word |= uint64_t(1) << (number & 63);
            if (before) return;  // the levels above know already
            number >>= 6;
        }
    }

    // Calls `found` with each word of bits that is not 0, ascending.
    template <typename Found>
    void each(const Found& found) {
        each(LEVELS - 1, 0, top, found);
    }

    template <typename Found>
    void each(int at, int64_t first, int64_t last, const Found& found) {
        for (int64_t word = first; word < last; word++) {
            if (at == 0) {
                found(word);
                continue;
            }
            for (uint64_t left = level[at][word]; left; left &= left - 1) {
                const int64_t below = word * 64 + __builtin_ctzll(left);
                each(at - 1, below, below + 1, found);
            }
        }
    }

    // Makes the words empty that have this number.
    void remove(int64_t number) {
        for (auto& own : level) own[number >>= 6] = 0;
    }
};

// One counter more in a hash: see randomness.hashed.
uint64_t hashed(uint64_t state, uint64_t counter) {
    state = (state ^ counter) + 0x9E3779B97F4A7C15u;
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9u;
    state = (state ^ (state >> 27)) * 0x94D049BB133111EBu;
    return state ^ (state >> 31);
}

// So few numbers are compared with one another in less time than they are sorted in: no branch depends on them.
constexpr int64_t FEW = 96;
constexpr int64_t LANES = 8;
using Numbers __attribute__((vector_size(LANES * sizeof(uint64_t)))) = uint64_t;

// How many of n numbers are less, for each of them. Both have room, and something in it, up to whole LANES.
void ranks(uint64_t* out, const uint64_t* numbers, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) {
        Numbers own, less{};
        std::memcpy(&own, numbers + i, sizeof own);
        for (int64_t j = 0; j < n; j++) less -= reinterpret_cast<Numbers>(Numbers{} + numbers[j] < own);
        std::memcpy(out + i, &less, sizeof less);
    }
}

// What metatrain_draw needs for one task after another.
class Draw {
public:
    // Writes the chosen events of a task; returns where they end.
    int64_t* write(int64_t* out, uint64_t key, int64_t n, int64_t first, int64_t support, int64_t query) {
        const int64_t room = (n + LANES - 1) / LANES * LANES;
        draws_.resize(room);
        for (int64_t i = 0; i < n; i++) draws_[i] = hashed(key, i);
        by_draw_.resize(room);
        const uint64_t s = support, q = query;
        if (n <= FEW) {
            ranks(by_draw_.data(), draws_.data(), n);
            const auto rank = [this](int64_t i) { return by_draw_[i]; };
            return split(out, n, first, [&](int64_t i) { return rank(i) < q; }, [&](int64_t i) { return rank(i) - q < s; });
        }
        std::copy_n(draws_.begin(), n, by_draw_.begin());
        // The least draw that is not chosen, and the least that is not query's, where there are such.
        const auto begin = by_draw_.begin();
        auto end = begin + n;
        const bool some = support + query < n, both = support > 0;
        if (some) std::nth_element(begin, end = begin + support + query, begin + n);
        const uint64_t beyond = some ? *end : 0;
        if (both) std::nth_element(begin, begin + query, end);
        const uint64_t between = both ? by_draw_[query] : beyond;
        return split(
            out, n, first, [&](int64_t i) { return !(both || some) || draws_[i] < between; },
            [&](int64_t i) { return both && draws_[i] >= between && (!some || draws_[i] < beyond); });
    }

private:
    // Support, then query; written without a branch, so each has room for what is overwritten by its next event.
    template <typename IsQuery, typename IsSupport>
    int64_t* split(int64_t* out, int64_t n, int64_t first, const IsQuery& is_query, const IsSupport& is_support) {
        supports_.resize(n + 1), queries_.resize(n + 1);
        int64_t supports = 0, queries = 0;
        for (int64_t i = 0; i < n; i++) {
            supports_[supports] = queries_[queries] = first + i;
            supports += is_support(i), queries += is_query(i);
        }
        return std::copy_n(queries_.data(), queries, std::copy_n(supports_.data(), supports, out));
    }

    std::vector<uint64_t> draws_, by_draw_;
    std::vector<int64_t> supports_, queries_;
};

}  // namespace

extern "C" {

// Of each task's events first, first + 1, … those of the least draws: `query` of them its query, the next `support` its
// support; in `out` a task's support, then its query, each ascending. An event's draw is the hash of its task's key and
// its position, different for all of a task. -1; -2: no memory; or the number of the first task with too few events, or
// too little room.
int64_t metatrain_draw(int64_t* out, int64_t room, const int64_t* events, const int64_t* first, const int64_t* support,
                       const int64_t* query, const uint64_t* keys, int64_t tasks) {
    try {
        Draw draw;
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t n = events[task], s = support[task], q = query[task];
            if (s < 0 || q < 0 || s + q > n || (room -= s + q) < 0) return task;
            out = draw.write(out, hashed(0, keys[task]), n, first[task], s, q);
        }
        return -1;
    } catch (const std::bad_alloc&) {
        return -2;
    }
}

// Copies runs of rows behind one another; -1, or the number of the first run that is not within its column.
int64_t metatrain_gather(char* out, int64_t room, int64_t bytes, const char* const* columns, const Runs* runs) {
    return by_width(bytes, [&](auto row) { return gather<decltype(row)>(out, room, columns, *runs, bytes); });
}

// The lengths of runs of rows of jagged columns, and where each run's values begin and how many they are; -1, or the
// number of the first run that is not within its column.
int64_t metatrain_lengths(int32_t* out, int64_t room, int64_t* begins, int64_t* counts, const int64_t* const* offsets,
                          const Runs* runs) {
    int64_t done = 0;
    for (int64_t run = 0; run < runs->count; run++) {
        const int64_t rows = runs->lengths[run];
        if (!runs->within(run) || rows > room - done) return run;
        const int64_t* own = offsets[runs->column(run)] + runs->starts[run];
        for (int64_t row = 0; row < rows; row++) out[done++] = int32_t(own[row + 1] - own[row]);
        begins[run] = own[0];
        counts[run] = own[rows] - own[0];
    }
    return done == room ? -1 : runs->count;
}

// Copies rows by their numbers; -1, or the place of the first number that the column does not have.
int64_t metatrain_take(char* out, int64_t bytes, const char* column, int64_t size, const void* numbers,
                       int64_t number_bytes, int64_t count) {
    return by_width(bytes, [&](auto row) {
        return by_index(numbers, number_bytes, [&](auto index) -> int64_t {
            for (int64_t i = 0; i < count; i++) {
                if (index[i] < 0 || index[i] >= size) return i;
                decltype(row)::copy(out + i * bytes, column + index[i] * bytes, bytes);
            }
            return -1;
        });
    });
}

// The lengths of rows of a jagged column with so many values by their numbers, and in `taken` their sum; -1, or the
// place of the first number that the column does not have, or whose values it does not have.
int64_t metatrain_take_lengths(int32_t* out, int64_t* taken, const int64_t* offsets, int64_t size, int64_t values,
                               const void* numbers, int64_t number_bytes, int64_t count) {
    return by_index(numbers, number_bytes, [&](auto index) -> int64_t {
        int64_t all = 0;
        for (int64_t i = 0; i < count; i++) {
            if (index[i] < 0 || index[i] >= size) return i;
            const int64_t begin = offsets[index[i]], end = offsets[index[i] + 1];
            if (begin < 0 || end < begin || end > values) return i;
            all += end - begin;
            out[i] = int32_t(end - begin);
        }
        *taken = all;
        return -1;
    });
}

// The values of rows of a jagged column by their numbers, which `metatrain_take_lengths` has found to be there.
int64_t metatrain_take_values(char* out, int64_t bytes, const char* values, const int64_t* offsets, const void* numbers,
                              int64_t number_bytes, int64_t count) {
    return by_width(bytes, [&](auto row) {
        return by_index(numbers, number_bytes, [&](auto index) -> int64_t {
            char* to = out;
            for (int64_t i = 0; i < count; i++) {
                const int64_t start = offsets[index[i]], length = offsets[index[i] + 1] - start;
                decltype(row)::copy(to, values + start * bytes, length, bytes);
                to += length * bytes;
            }
            return -1;
        });
    });
}

// Whether numbers are all from 0 to below - 1.
int64_t metatrain_all_below(const int32_t* numbers, int64_t count, int64_t below) {
    uint32_t most = 0;  // as unsigned, a negative one is large
    for (int64_t i = 0; i < count; i++) most = uint32_t(numbers[i]) > most ? uint32_t(numbers[i]) : most;
    return !count || most < below;
}

// Whether numbers, given as their bits, are all finite: their exponents are not all ones.
int64_t metatrain_all_finite(const uint32_t* numbers, int64_t count) {
    uint32_t most = 0;
    for (int64_t i = 0; i < count; i++) {
        const uint32_t exponent = numbers[i] & 0x7f800000u;
        most = exponent > most ? exponent : most;
    }
    return most < 0x7f800000u;
}

// Words that `metatrain_distinct` needs for a catalogue, all 0 between calls.
int64_t metatrain_distinct_words(int64_t catalogue) {
    int64_t all = 0;
    for (int i = 0; i < LEVELS; i++) all += catalogue = (catalogue + 63) / 64;
    return all;
}

// The distinct items of each step, ascending, in `items` [as many as rows], where each step's begin in `item_bounds`
// [steps + 1], and the place of every row's item among those of its step in `places`; -1, or the number of the first run
// that is not within its column, or has an item that is not in the catalogue. A step has so many runs as any other.
// ranks: int32 for every 64 items of the catalogue.
int64_t metatrain_distinct(const int32_t* const* columns, const Runs* runs, int64_t steps, int64_t catalogue,
                           uint64_t* words, int32_t* ranks, int32_t* items, int32_t* places, int64_t room,
                           int64_t* item_bounds) {
    for (int64_t run = 0, left = room; run < runs->count; run++) {
        if (!runs->within(run) || (left -= runs->lengths[run]) < 0) return run;
        if (!metatrain_all_below(columns[runs->column(run)] + runs->starts[run], runs->lengths[run], catalogue))
            return run;
    }
    Bits bits(words, catalogue);
    const int64_t each = steps ? runs->count / steps : 0;
    int64_t count = 0;
    item_bounds[0] = 0;
    for (int64_t step = 0; step < steps; step++) {
        const int64_t first = count;
        const auto rows = [&](const auto& seen) {
            for (int64_t run = step * each; run < (step + 1) * each; run++) {
                const int32_t* own = columns[runs->column(run)] + runs->starts[run];
                for (int64_t i = 0; i < runs->lengths[run]; i++) seen(own[i]);
            }
        };
        rows([&](int64_t item) { bits.add(item); });
        bits.each([&](int64_t word) {
            ranks[word] = int32_t(count - first);
            for (uint64_t left = bits.level[0][word]; left; left &= left - 1)
                items[count++] = int32_t(word * 64 + __builtin_ctzll(left));
        });
        rows([&](int64_t item) {
            const uint64_t before = (uint64_t(1) << (item & 63)) - 1;
            *places++ = ranks[item >> 6] + __builtin_popcountll(bits.level[0][item >> 6] & before);
        });
        for (int64_t i = first; i < count; i++)
            if (i == first || items[i] >> 6 != items[i - 1] >> 6) bits.remove(items[i]);
        item_bounds[step + 1] = count;
    }
    return -1;
}

}  // extern "C"
