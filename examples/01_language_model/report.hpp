// What is printed while training.
#pragma once

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <string>

#include <unistd.h>

namespace demo {

/// A progress bar that redraws itself in place on a terminal, and prints a plain line every few
/// seconds anywhere else, so that a log stays readable.
class Progress {
  public:
    Progress(std::string name, std::int64_t steps, std::int64_t done)
        : name_(std::move(name)), steps_(steps), done_(done), terminal_(isatty(STDOUT_FILENO) == 1) {}

    void update(std::int64_t step, double bits, double bytes_per_second) {
        done_ = step;
        // One batch says little: what is shown follows the last twenty or so.
        bits_ = bits_ == 0.0 ? bits : 0.95 * bits_ + 0.05 * bits;
        speed_ = bytes_per_second;
        const auto time = Clock::now();
        // Time left from the steps of this sitting.
        ++steps_here_;
        const double elapsed = std::chrono::duration<double>(time - started_).count();
        left_ = elapsed / static_cast<double>(steps_here_) * static_cast<double>(steps_ - done_);
        if (time - printed_ < (terminal_ ? std::chrono::milliseconds(100) : std::chrono::milliseconds(5000)))
            return;
        printed_ = time;
        print();
    }

    void finish() {
        if (steps_here_ == 0) return;
        print();
        if (terminal_) std::putchar('\n');
        std::fflush(stdout);
    }

  private:
    using Clock = std::chrono::steady_clock;

    void print() const {
        constexpr int width = 20;
        const int filled = static_cast<int>(width * done_ / steps_);
        std::string bar(static_cast<std::size_t>(filled), '#');
        bar.resize(width, '.');
        std::printf("%s%-12s [%s] %4lld/%lld  %.3f bits/byte  %6.0f bytes/s  %3.0f s left%s",
                    terminal_ ? "\r" : "", name_.c_str(), bar.c_str(), static_cast<long long>(done_),
                    static_cast<long long>(steps_), bits_, speed_, left_, terminal_ ? "\x1b[K" : "\n");
        std::fflush(stdout);
    }

    std::string name_;
    std::int64_t steps_, done_, steps_here_ = 0;
    bool terminal_;
    double bits_ = 0.0, speed_ = 0.0, left_ = 0.0;
    Clock::time_point started_ = Clock::now(), printed_ = started_;
};

/// Prints a byte that a model wrote; control characters could do anything to a terminal.
inline void print_byte(std::uint8_t byte) {
    const bool control = (byte < 0x20 && byte != '\n' && byte != '\t') || byte == 0x7f;
    std::putchar(control ? '?' : byte);
    std::fflush(stdout);
}

}  // namespace demo
