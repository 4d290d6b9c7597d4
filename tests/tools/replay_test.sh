#!/usr/bin/env bash
# The contract of replay's command line: exit codes, messages and files.
#
#     replay_test.sh path/to/replay [golden directory] [scratch directory]
#
# Needs bash and coreutils only. Every golden case of an operator that replay lists must be met.
set -u

replay=$(realpath "$1")
golden=$(realpath "${2:-$(dirname "$0")/../golden}")
if [ -n "${3:-}" ]; then
    scratch=$3
    mkdir -p "$scratch"
else
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
fi
cd "$scratch" || exit 1
rm -rf ./*

tests=0
failures=0
fail() {
    echo "FAILED: $*"
    failures=$((failures + 1))
}

# expect CODE ARGUMENTS...: runs replay, leaves stdout and stderr in files of those names. An error is one
# line that begins with "replay: "; anything else writes nothing to stderr.
expect() {
    local want=$1 code
    shift
    tests=$((tests + 1))
    "$replay" "$@" >stdout 2>stderr </dev/null
    code=$?
    [ "$code" -eq "$want" ] || fail "replay $* gave exit code $code, not $want: $(head -c 300 stderr)"
    if [ "$want" -eq 2 ]; then
        [ "$(wc -l <stderr)" -eq 1 ] || fail "replay $*: expected one line on stderr: $(head -c 300 stderr)"
        grep -q '^replay: ' stderr || fail "replay $*: stderr does not begin with 'replay: '"
        [ ! -s stdout ] || fail "replay $*: an error wrote to stdout"
    else
        [ ! -s stderr ] || fail "replay $*: wrote to stderr: $(head -c 300 stderr)"
    fi
}

# The last error's text, or the last output's.
says() {
    grep -qF -- "$1" stderr stdout || fail "expected '$1' in: $(head -c 300 stderr)$(head -c 300 stdout)"
}

# safetensors HEADER DATA-FILE >FILE: the header's length in 8 little-endian bytes, the header, the data.
safetensors() {
    local n=${#1} i
    for i in 0 1 2 3 4 5 6 7; do
        printf '%b' "\\x$(printf '%02x' $((n >> (8 * i) & 255)))"
    done
    printf '%s' "$1"
    cat "$2"
}

# header FILE: the JSON of a file.
header() {
    local n
    n=$(od -An -t u8 -N 8 "$1" | tr -d ' ')
    dd if="$1" bs=1 skip=8 count="$n" 2>/dev/null
}

# data FILE: what follows the header.
data() {
    local n
    n=$(od -An -t u8 -N 8 "$1" | tr -d ' ')
    tail -c +"$((n + 9))" "$1"
}

# rewrite FILE SED-EXPRESSION >FILE: the same data under an edited header.
rewrite() {
    data "$1" >data.bin
    safetensors "$(header "$1" | sed "$2")" data.bin
}

# Golden cases.

expect 0 --list
grep -q '^attention takes .*causal=true|false' stdout || fail "--list does not give attention's options"
grep -q '^s4d takes .*disc=zoh|bilinear' stdout || fail "--list does not give s4d's options"
listed=$(cut -d ' ' -f 1 stdout)
without_cpu=""  # operators, one a line, whose PARTS are the reference alone

known=0
for file in "$golden"/*.safetensors; do
    op=$(basename "$file" | cut -d . -f 1)
    if grep -qx "$op" <<<"$listed"; then
        known=$((known + 1))
        results=$(header "$file" | grep -oE '"(out|grad)\.[A-Za-z0-9_]+"' | wc -l)
        f64="--dtype f64"
        # grad.lam of this file is itself 1.3e-12 from the truth (tests/golden_test.cpp).
        case $file in */sisa.reset.*) f64="$f64 --rtol 2e-12" ;; esac
        runs=("reference $f64")
        if grep -qx "$op" <<<"$without_cpu"; then
            expect 2 --check --exec cpu --dtype f64 "$file"
            says "unknown operator"
        else
            runs+=("cpu $f64" "cpu --dtype f32")
        fi
        for run in "${runs[@]}"; do
            # shellcheck disable=SC2086
            expect 0 --check --exec $run "$file"
            [ "$(grep -c ' ok$' stdout)" -eq "$results" ] || fail "$file: one line a result is expected"
        done
        # Denominators that change sign: rounding the inputs to 16 bits alone moves results by their own size.
        case $file in *.nadaraya_watson.*) continue ;; esac
        [ "${#runs[@]}" -gt 1 ] || continue
        for dtype in f16 bf16; do expect 0 --check --exec cpu --dtype $dtype "$file"; done
    else
        expect 2 --exec reference --dtype f64 "$file" none.safetensors
        says "unknown operator"
        expect 2 --check --exec cpu --dtype f32 "$file"
        says "unknown operator"
    fi
done
[ "$known" -ge 10 ] || fail "only $known golden cases were run"

zoh=$golden/s4d.zoh.safetensors
packed=$golden/s4d.packed.safetensors
window=$golden/attention.window.safetensors

# Results: float64, named, with the operator and its options, the same bytes every time.

expect 0 --exec cpu --dtype f64 "$zoh" zoh.safetensors
[ ! -s stdout ] || fail "writing a file should print nothing"
for name in out.y out.xT grad.u grad.log_dt grad.log_neg_re grad.im grad.B grad.C grad.D grad.x0; do
    header zoh.safetensors | grep -q "\"$name\":{\"dtype\":\"F64\"" || fail "$name is not in the results"
done
header zoh.safetensors | grep -q '"op":"s4d"' || fail "results do not name the operator"
header zoh.safetensors | grep -q '"disc":"zoh"' || fail "results do not hold the options"
expect 0 --exec cpu --dtype f64 --threads 2 "$zoh" again.safetensors
cmp -s zoh.safetensors again.safetensors || fail "two threads gave other bytes"
expect 0 --exec cpu --dtype f32 --isa baseline --param-dtype f32 "$zoh" again.safetensors
expect 0 --exec reference --dtype f64 --forward-only "$zoh" forward.safetensors
header forward.safetensors | grep -q '"out.y"' || fail "--forward-only wrote no outputs"
header forward.safetensors | grep -q '"grad' && fail "--forward-only wrote gradients"
expect 0 --exec reference --dtype f64 --option disc=bilinear --method scan "$zoh" bilinear.safetensors
header bilinear.safetensors | grep -q '"disc":"bilinear"' || fail "--option is not in the results"
header bilinear.safetensors | grep -q '"method":"scan"' || fail "--method is not in the results"
cmp -s zoh.safetensors bilinear.safetensors && fail "--option changed nothing"
(cd / && ls -A "$scratch") | grep -q '\.tmp$' && fail "a temporary file was left behind"

# Differences. The results of one option, under the inputs of another.

expect 1 --check --exec cpu --dtype f64 --option disc=bilinear "$zoh"
says "DIFFERS"
expect 1 --check --exec cpu --dtype f32 --rtol 1e-12 "$zoh"
expect 0 --check --exec cpu --dtype f32 --rtol 0.01 "$zoh"
expect 1 --check --exec reference --dtype f64 --option window=16 "$window"

# out.xT has other results of the same shape in bilinear.safetensors: put its bytes where the file has them.
offset_of() {
    header "$1" | grep -oE "\"$2\":\{[^}]*\}" | grep -oE 'data_offsets":\[[0-9]+' | grep -oE '[0-9]+$'
}
start_of() { echo $(($(od -An -t u8 -N 8 "$1" | tr -d ' ') + 8 + $(offset_of "$1" "$2"))); }
cp "$zoh" modified.safetensors
chmod u+w modified.safetensors
dd if=bilinear.safetensors bs=1 skip="$(start_of bilinear.safetensors out.xT)" count=768 2>/dev/null |
    dd of=modified.safetensors bs=1 seek="$(start_of modified.safetensors out.xT)" conv=notrunc 2>/dev/null
expect 1 --check --exec reference --dtype f64 modified.safetensors
[ "$(grep -c DIFFERS stdout)" -eq 1 ] || fail "only out.xT was modified"
grep -q '^out.xT .*DIFFERS' stdout || fail "out.xT was modified"

# A NaN in the stored result never passes.
cp "$zoh" modified.safetensors
chmod u+w modified.safetensors
printf '\x00\x00\x00\x00\x00\x00\xf8\x7f' |
    dd of=modified.safetensors bs=1 seek="$(start_of "$zoh" out.y)" conv=notrunc 2>/dev/null
expect 1 --check --rtol 1e9 --exec reference --dtype f64 modified.safetensors
rewrite "$zoh" 's/"out.y"/"out.z"/' >modified.safetensors
expect 1 --check --rtol 1e9 --exec reference --dtype f64 modified.safetensors
says "out.z (missing)"

# Command lines that are wrong.

run="--exec reference --dtype f64"
# shellcheck disable=SC2086
{
    expect 0 --help
    expect 2
    expect 2 --exec reference "$zoh" none.safetensors
    expect 2 --dtype f64 "$zoh" none.safetensors
    expect 2 --exec abacus --dtype f64 "$zoh" none.safetensors
    says "--exec is abacus"
    expect 2 --exec cpu --dtype f8 "$zoh" none.safetensors
    says "must be f64, f32, f16 or bf16"
    expect 2 $run --param-dtype bf16 "$zoh" none.safetensors
    expect 2 $run --param-dtype "" --nonsense "$zoh" none.safetensors
    expect 2 $run
    expect 2 $run "$zoh"
    says "out.safetensors is missing"
    expect 2 $run "$zoh" none.safetensors surplus
    expect 2 --check $run "$zoh" none.safetensors
    says "--check takes one file"
    expect 2 $run --rtol 1 "$zoh" none.safetensors
    for rtol in -1 nan inf x ""; do expect 2 --check --rtol "$rtol" $run "$zoh"; done
    expect 2 $run --threads 2 "$zoh" none.safetensors
    expect 2 $run --isa avx2 "$zoh" none.safetensors
    for threads in -1 1025 99999999999 x; do
        expect 2 --exec cpu --dtype f64 --threads "$threads" "$zoh" none.safetensors
    done
    expect 2 --exec cpu --dtype f64 --isa mmx "$zoh" none.safetensors
    for option in disc =zoh disc=raw disc= colour=red "$(printf 'di\nsc=zoh')"; do
        expect 2 $run --option "$option" "$zoh" none.safetensors
    done
    expect 2 $run --option op=no_such_operator "$zoh" none.safetensors
    says "unknown operator"
    expect 2 $run --method fft "$window" none.safetensors
    says "attention takes"

    # Files that cannot be read or written.
    cp "$zoh" same.safetensors
    expect 2 $run same.safetensors ./same.safetensors
    says "out.safetensors is the input file"
    cmp -s "$zoh" same.safetensors || fail "the input file was overwritten"
    expect 2 $run absent.safetensors none.safetensors
    expect 2 $run . none.safetensors
    expect 2 $run /dev/null none.safetensors
    expect 2 $run "$zoh" no/such/folder/none.safetensors
    expect 2 $run "$zoh" .
}
tests=$((tests + 1))
if [ -w /dev/full ]; then
    "$replay" --list >/dev/full 2>stderr
    [ $? -eq 2 ] || fail "a full disk behind the output went unnoticed"
fi
"$replay" --exec cuda --dtype f32 --forward-only "$zoh" cuda.safetensors 2>stderr
code=$?
tests=$((tests + 1))
if [ "$code" -eq 2 ]; then
    grep -qi 'cuda' stderr || fail "the error does not say that there is no cuda executor or device"
    [ ! -e cuda.safetensors ] || fail "an error wrote a file"
elif [ "$code" -ne 0 ]; then
    fail "--exec cuda gave exit code $code"
fi

# Damaged files. Each must be refused, in one line, and write nothing.

damaged() {
    # shellcheck disable=SC2086
    expect 2 $run "$1" none.safetensors
    [ ! -e none.safetensors ] || fail "$1: an error wrote a file"
    [ -z "${2:-}" ] || says "$2"
}

: >nothing.bin
: >bad.safetensors
damaged bad.safetensors
printf 'not a safetensors file at all, but long enough to have a length' >bad.safetensors
damaged bad.safetensors
for bytes in 1 7 8 9 100 1000 5000 13967; do
    head -c $bytes "$zoh" >bad.safetensors
    damaged bad.safetensors
done
{ cat "$zoh" && printf 'x'; } >bad.safetensors
damaged bad.safetensors "bytes follow the last tensor"
for length in '\xff\xff\xff\xff\xff\xff\xff\xff' '\x00\x00\x00\x00\x00\x00\x00\x80' \
    '\x00\x00\x00\x00\x00\x00\x00\x00'; do
    { printf '%b' "$length" && tail -c +9 "$zoh"; } >bad.safetensors
    damaged bad.safetensors
done
for text in '' '{' '[]' 'null' '{}x' '{"u":1}' '{"u":{"dtype":"F64","shape":[],"data_offsets":[0,8]}}' \
    '{"__metadata__":{"op":1}}' '{"__metadata__":"s4d"}'; do
    safetensors "$text" nothing.bin >bad.safetensors
    damaged bad.safetensors
done
safetensors "$(printf '%0100000d' 0 | tr 0 '[')" nothing.bin >bad.safetensors
damaged bad.safetensors
for edit in 's/"F64"/"F32"/' 's/"F64"/"Q7"/' 's/"shape":\[3,8,2\]/"shape":[3,8,-2]/' \
    's/"shape":\[3,8,2\]/"shape":[3,8,9223372036854775807]/' 's/"shape":\[3,8,2\]/"shape":[48,1]/' \
    's/\[0,384\]/[384,0]/' 's/\[0,384\]/[0,384000]/' 's/\[0,384\]/[0,383]/' 's/\[384,768\]/[0,384]/'; do
    rewrite "$zoh" "$edit" >bad.safetensors
    cmp -s "$zoh" bad.safetensors && fail "the edit $edit did nothing"
    damaged bad.safetensors
done

# Files that are sound, and cases that are not.

case_is() {
    rewrite "$zoh" "$1" >bad.safetensors
    cmp -s "$zoh" bad.safetensors && fail "the edit $1 did nothing"
    damaged bad.safetensors "${2:-}"
}
case_is 's/"op":"s4d"/"op":"s5d"/' 'unknown operator "s5d"'
case_is 's/"op":"s4d",//' 'no "op"'
case_is 's/"op":"s4d"/"op":"\\u001b[31m\\n\\u0000"/' "unknown operator"
case_is 's/"disc":"zoh"/"disc":"raw"/' "disc=zoh|bilinear"
case_is 's/"disc":"zoh"/"disk":"zoh"/' "option disk=zoh"
case_is 's/"u":{/"w":{/' "u: is missing"
case_is 's/"log_dt":{/"log_dx":{/' "log_dt: is missing"
case_is 's/"x0":{/"x1":{/' "s4d has no input of that name"
case_is 's/"dout.y":{/"dout.w":{/' "dout.y: is missing"
case_is 's/"dout.y":{"dtype":"F64","shape":\[2,37,3\]/"dout.y":{"dtype":"F64","shape":[37,2,3]/' \
    "dout.y: extent of axis 0 is 37, must be 2"
case_is 's/"shape":\[2,37,3\]/"shape":[37,2,3]/g'
case_is 's/"u":{"dtype":"F64","shape":\[2,37,3\]/"u":{"dtype":"F64","shape":[222]/' "u: has 1 axes, must"
case_is 's/"B":{"dtype":"F64","shape":\[3,8,2\]/"B":{"dtype":"F64","shape":[3,4,4]/' "the last of 2 (re, im)"
case_is 's/"u":{"dtype":"F64","shape":\[2,37,3\]/"u":{"dtype":"F64","shape":[2,3,37]/'

# A sound file of another dtype, and one of nothing at all.
safetensors '{"__metadata__":{"op":"s4d"},"u":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' nothing.bin \
    >bad.safetensors
damaged bad.safetensors "dtype is F32, must be F64"
safetensors '{"__metadata__":{"op":"s4d"}}' nothing.bin >bad.safetensors
damaged bad.safetensors "u: is missing"
expect 2 --check --exec cpu --dtype f64 bad.safetensors
says "no results to compare"

# Empty tensors that hide huge sizes.
empty_s4d() {
    local e='"dtype":"F64","data_offsets":[0,0]'
    safetensors "{\"__metadata__\":{\"op\":\"s4d\"},\"u\":{\"shape\":[$1],$e},\"log_dt\":{\"shape\":[0],$e},
\"log_neg_re\":{\"shape\":[0,$2],$e},\"im\":{\"shape\":[0,$2],$e},\"B\":{\"shape\":[0,$2,2],$e},
\"C\":{\"shape\":[0,$2,2],$e},\"dout.y\":{\"shape\":[$1],$e}}" nothing.bin
}
empty_s4d 2,5,0 4 >empty.safetensors
for exec in reference cpu; do expect 0 --exec $exec --dtype f32 empty.safetensors empty.out; done
for sizes in "1,4611686018427387904,0 1" "0,0,0 4611686018427387904" "0,0,0 1099511627776" \
    "1099511627776,0,0 1099511627776" "0,1048576,0 1048576" "16384,16385,0 1"; do
    # shellcheck disable=SC2086
    empty_s4d $sizes >bad.safetensors
    for exec in reference cpu; do
        tests=$((tests + 1))
        "$replay" --exec $exec --dtype f64 bad.safetensors empty.out >stdout 2>stderr
        code=$?
        # A size that needs no memory is legal; no size may crash.
        [ "$code" -eq 2 ] || [ "$code" -eq 0 ] || fail "u ($sizes) on $exec gave exit code $code"
    done
done
empty_s4d 1,268435456,0 134217728 >bad.safetensors
damaged bad.safetensors "bytes of memory"

# cu_seqlens: integers of 32 bits, non-decreasing, inside the packed length of 80.
seek=$(start_of "$packed" cu_seqlens)
offsets() {
    cp "$packed" bad.safetensors
    chmod u+w bad.safetensors
    printf '%b' "$1" | dd of=bad.safetensors bs=1 seek=$((seek + 8 * $2)) conv=notrunc 2>/dev/null
    damaged bad.safetensors "$3"
}
offsets '\x00\x00\x00\x00\x00\x00\xf8\x3f' 1 "must be an integer"     # 1.5
offsets '\x00\x00\x00\x00\x00\x00\xf8\x7f' 1 "must be an integer"     # NaN
offsets '\x00\x00\x00\x00\x00\x00\xe0\x41' 4 "must be an integer"     # 2^31
offsets '\x00\x00\x00\x00\x00\x00\xf0\xff' 0 "must be an integer"     # -inf
offsets '\x00\x00\xc0\xff\xff\xff\xdf\x41' 4 "cu_seqlens: element 4"  # 2^31 - 1
offsets '\x00\x00\x00\x00\x00\x00\xf0\xbf' 0 "cu_seqlens: element 0"  # -1
offsets '\x00\x00\x00\x00\x00\x00\x59\x40' 1 "cu_seqlens: element"    # 100

echo "$tests calls of replay, $failures failures"
[ "$failures" -eq 0 ]
