#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes unicode_tables.hpp, what the tokenizer has to know of Unicode, from Python's unicodedata:

    python3 tools/decompose/make_unicode.py > tools/decompose/unicode_tables.hpp
"""
import sys
import unicodedata

CODES = [c for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]


def ranges(holds):
    out = []
    for c in CODES:
        if holds(c):
            if out and out[-1][1] == c - 1:
                out[-1][1] = c
            else:
                out.append([c, c])
    return out


def category(c):
    return unicodedata.category(chr(c))


def stripped(c):
    return [ord(x) for x in unicodedata.normalize("NFD", chr(c)) if unicodedata.category(x) != "Mn"]


def lowered(c):
    return [ord(x) for x in chr(c).lower()]


def shifts(images):
    """Runs {first, last, step, shift} of codes whose image is one code, at one distance."""
    out = []
    for c, image in images:
        if len(image) != 1:
            continue
        d = image[0] - c
        last = out[-1] if out else None
        if last and last[3] == d and c - last[1] in (1, 2) and (last[0] == last[1] or c - last[1] == last[2]):
            last[2], last[1] = c - last[1], c
        else:
            out.append([c, c, 1, d])
    return out


def rows(items):
    line = "   "
    for item in items:
        text = " {" + ", ".join(str(x) if x < 10 else hex(x) for x in item) + "},"
        if len(line) + len(text) > 138:
            print(line)
            line = "   "
        line += text
    print(line)


def table(comment, kind, name, items):
    print(f"\n/// {comment}\ninline constexpr {kind} {name}[] = {{")
    rows(items)
    print("};")


def hangul(c):
    return 0xAC00 <= c <= 0xD7A3


strip = [(c, stripped(c)) for c in CODES if not hangul(c) and stripped(c) != [c] and category(c) != "Mn"]
lower = [(c, lowered(c)) for c in CODES if lowered(c) != [c]]
assert all(len(i) <= 3 for _, i in strip + lower)
print(f"""// SPDX-License-Identifier: Apache-2.0
//
// Made by make_unicode.py from Unicode {unicodedata.unidata_version}; not written by hand.
#pragma once

#include <cstdint>

namespace interstate::tools::unicode {{

/// Codes first, first + step, ..., last, each of which becomes itself + shift.
struct Shift {{
    std::int32_t first, last, step, shift;
}};
struct Range {{
    std::int32_t first, last;
}};
/// A code that becomes several; zeros after the last.
struct Several {{
    std::int32_t from, to[3];
}};""")
table("Categories P*.", "Range", "punctuation", ranges(lambda c: category(c)[0] == "P"))
table("Categories Cc, Cf and Co; unassigned codes may be letters by now.", "Range", "control", ranges(lambda c: category(c) in ("Cc", "Cf", "Co")))
table("Categories Z*.", "Range", "space", ranges(lambda c: category(c)[0] == "Z"))
table("Category Mn.", "Range", "mark", ranges(lambda c: category(c) == "Mn"))
table("Canonical decomposition without its marks (Mn); syllables of Hangul are not here.", "Shift", "stripped", shifts(strip))
print("\ninline constexpr Several stripped_several[] = {")
def several_rows(images):
    line = "   "
    for c, i in images:
        if len(i) < 2:
            continue
        text = " {" + hex(c) + ", {" + ", ".join(hex(x) for x in i + [0] * (3 - len(i))) + "}},"
        if len(line) + len(text) > 138:
            print(line)
            line = "   "
        line += text
    print(line)
several_rows(strip)
print("};")
assert all(len(i) for _, i in strip)
table("Lower case.", "Shift", "lowered", shifts(lower))
print("\ninline constexpr Several lowered_several[] = {")
several_rows(lower)
print("};\n\n}  // namespace interstate::tools::unicode")
