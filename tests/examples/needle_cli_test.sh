#!/usr/bin/env bash
# The needles from the outside: exit codes, messages, and a short search.
# usage: needle_cli_test.sh <needle> [scratch folder]
set -u
needle=$(realpath "$1")
here=$(realpath "$(dirname "${BASH_SOURCE[0]}")")
scratch=${2:-}
if [[ -z $scratch ]]; then
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
fi
mkdir -p "$scratch" && cd "$scratch" || exit 1

failures=0
fail() {
    printf 'FAIL: %s\n' "$*"
    failures=$((failures + 1))
}

# refuses <pattern> <arguments>: exit code 2, one line on stderr that matches.
refuses() {
    local pattern=$1 code
    shift
    "$needle" "$@" >stdout.out 2>stderr.out
    code=$?
    [[ $code == 2 ]] || fail "[$*]: exit code $code, must be 2"
    [[ $(wc -l <stderr.out) == 1 ]] || fail "[$*]: $(wc -l <stderr.out) lines on stderr, must be 1: $(cat stderr.out)"
    grep -Eq "$pattern" stderr.out || fail "[$*]: stderr is '$(cat stderr.out)', must match '$pattern'"
}

head -c 20000 "$here/../../examples/data/kjv_psalms_new_testament.txt" >text.txt || exit 1
{ cat text.txt; echo '{'; } >brace.txt
head -c 500 text.txt >short.txt

"$needle" --help >help.out 2>&1 || fail "--help: exit code $?, must be 0"
for option in --mixer --text --length --needles --steps --every --seed --seeds --threads; do
    grep -q -e "$option" help.out || fail "--help does not mention $option"
done
refuses 'nonsense' --nonsense
refuses 'length' --length 10
refuses 'needles' --needles 0
refuses 'steps' --steps 0
refuses 'seed' --seed -3
refuses 'mixer blender: unknown' --mixer blender
refuses 'given twice' --mixer sisa --mixer sisa
refuses 'nowhere.txt: cannot be read' --text nowhere.txt
refuses 'short.txt: too short' --text short.txt
refuses 'brace.txt: has a brace' --text brace.txt

# A search too short to find anything: two mixers, two seeds, three evaluations, the last after the last step.
short=(--text text.txt --length 64 --steps 5 --every 2 --seeds 2 --needles 2)
"$needle" "${short[@]}" --threads 2 >two.out 2>errors.out || fail "short search: exit code $?"
[[ -s errors.out ]] && fail "short search: stderr is '$(cat errors.out)'"
[[ $(grep -c 'of 200 needles after 5 steps' two.out) == 4 ]] || fail "short search: not four runs of 5 steps"
for mixer in softmax sisa; do
    grep -Eq "^$mixer +[0-9]+ +> 5 +> 5$" two.out || fail "short search: $mixer has no row of steps"
    grep -Eq "^$mixer: needles retrieved" two.out || fail "short search: $mixer has no table of depths"
done
[[ $(grep -Ec '^ +[245]( +[0-9.]+){6}$' two.out) == 6 ]] || fail "short search: not six rows of depths"

# The same needles on another number of threads.
"$needle" "${short[@]}" --threads 1 >one.out 2>&1
diff <(grep '%, by depth' -A 6 two.out) <(grep '%, by depth' -A 6 one.out) || fail "one thread: another result than two"

((failures == 0)) && echo ok
exit $((failures > 0))
