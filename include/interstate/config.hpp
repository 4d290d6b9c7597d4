// Version, namespaces and the few compiler switches every other header stands on.
#pragma once

#define INTERSTATE_VERSION_MAJOR 0
#define INTERSTATE_VERSION_MINOR 1
#define INTERSTATE_VERSION_PATCH 0

// Everything lives in interstate::<this>, inline: `interstate::s4d::forward` is how it is written,
// and two major versions can be linked into one program.
#define INTERSTATE_ABI v0

#if defined(__CUDACC__)
#define INTERSTATE_HD __host__ __device__
#else
#define INTERSTATE_HD
#endif

#if defined(__GNUC__) || defined(__clang__)
#define INTERSTATE_INLINE __attribute__((always_inline)) inline
#else
#error "Interstate needs g++ 12, clang++ 14 or newer (vector extensions and target attributes)."
#endif
