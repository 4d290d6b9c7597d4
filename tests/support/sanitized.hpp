// Whether this build watches every access to memory, which makes it some twenty times slower: tests then have few of their
// largest sizes, and leave the others to the builds that do not. float16, whose accesses are bfloat16's, is not compiled for it.
#pragma once

namespace interstate::test {

#if defined(__SANITIZE_ADDRESS__)
inline constexpr bool sanitized = true;
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
inline constexpr bool sanitized = true;
#else
inline constexpr bool sanitized = false;
#endif
#else
inline constexpr bool sanitized = false;
#endif

}  // namespace interstate::test
