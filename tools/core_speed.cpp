// How quick each core is for this machine, sampled: see bench_quiet.py.
//
// A sample times additions that do not wait for one another, in CPU time of the thread that makes them: a core that
// another virtual machine shares, as its second thread, makes half as many in a nanosecond. What else this machine runs
// does not count, for it takes no CPU time of that thread.

#include <cstdint>
#include <cstdio>
#include <ctime>
#include <thread>
#include <vector>

#include <unistd.h>
#if defined(__linux__)
#include <sched.h>
#endif

namespace {

double seconds(clockid_t clock) {
    timespec now;
    clock_gettime(clock, &now);
    return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

double additions_a_nanosecond() {
    constexpr int ROUNDS = 20000;
    std::uint64_t a = 0, b = 0, c = 0, d = 0;
    const double begun = seconds(CLOCK_THREAD_CPUTIME_ID);
    for (int i = 0; i < ROUNDS; ++i) {
        a += 1, b += 1, c += 1, d += 1;
        asm volatile("" : "+r"(a), "+r"(b), "+r"(c), "+r"(d));  // or the compiler would know the sums
    }
    return 4.0 * ROUNDS / (seconds(CLOCK_THREAD_CPUTIME_ID) - begun) / 1e9;
}

}  // namespace

// Appends (time.monotonic() of the beginning, core, additions a nanosecond) to the file, three doubles a sample, for as
// long as the process that started this one lives.
extern "C" int64_t metatrain_watch(const char *path, const int64_t *cores, int64_t count, int64_t microseconds) {
    std::FILE *file = std::fopen(path, "ab");
    if (!file) return 1;
    const pid_t parent = getppid();
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < count; ++i)
        threads.emplace_back([=] {
#if defined(__linux__)
            cpu_set_t own;
            CPU_ZERO(&own);
            CPU_SET(cores[i], &own);
            sched_setaffinity(0, sizeof own, &own);
#endif
            const timespec pause{0, long(microseconds) * 1000};
            while (getppid() == parent) {
                nanosleep(&pause, nullptr);
                const double begun = seconds(CLOCK_MONOTONIC);
                additions_a_nanosecond();  // to wake up
                const double sample[] = {begun, double(cores[i]), additions_a_nanosecond()};
                std::fwrite(sample, sizeof sample, 1, file);  // which locks the file
                std::fflush(file);
            }
        });
    for (std::thread &thread : threads) thread.join();
    return 0;
}
