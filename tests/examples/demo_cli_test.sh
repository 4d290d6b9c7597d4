#!/usr/bin/env bash
# The language model from the outside: exit codes, messages, checkpoints, Ctrl-C.
# usage: demo_cli_test.sh <language_model> [scratch folder]
set -u
demo=$(realpath "$1")
here=$(realpath "$(dirname "${BASH_SOURCE[0]}")")
scratch=${2:-}
if [[ -z $scratch ]]; then
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
fi
mkdir -p "$scratch" && cd "$scratch" || exit 1
rm -f ./*.safetensors ./*.txt ./*.out

failures=0
fail() {
    printf 'FAIL: %s\n' "$*"
    failures=$((failures + 1))
}

# refuses <pattern> <arguments>: exit code 2, one line on stderr that matches, nothing left behind.
refuses() {
    local pattern=$1 before after code
    shift
    before=$(ls -A)
    "$demo" "$@" >stdout.out 2>stderr.out
    code=$?
    after=$(ls -A | grep -v '\.out$')
    [[ $code == 2 ]] || fail "[$*]: exit code $code, must be 2"
    [[ $(wc -l <stderr.out) == 1 ]] || fail "[$*]: $(wc -l <stderr.out) lines on stderr, must be 1: $(cat stderr.out)"
    grep -Eq "$pattern" stderr.out || fail "[$*]: stderr is '$(cat stderr.out)', must match '$pattern'"
    [[ $(grep -v '\.out$' <<<"$before") == "$after" ]] || fail "[$*]: left files behind: $after"
}

head -c 20000 "$here/../../examples/data/kjv_psalms_new_testament.txt" >text.txt || exit 1
head -c 30000 "$here/../../examples/data/kjv_psalms_new_testament.txt" | tail -c 20000 >other.txt
small=(--text text.txt --sample 20 --threads 2)

# Arguments.
"$demo" --help >help.out 2>&1 || fail "--help: exit code $?, must be 0"
for option in --mixer --all --text --steps --seed --threads --checkpoint --resume --sample --prompt; do
    grep -q -e "$option" help.out || fail "--help does not mention $option"
done
for value in 'default: s4d' 'steps.*=.*800' 'seed.*=.*1' 'sample.*=.*120' 'prompt.*=.*"And "'; do
    grep -q -e "$value" help.out || fail "--help lacks a default: $value"
done
refuses 'nonsense' --nonsense
refuses 'stray' stray
refuses 'steps' "${small[@]}" --steps 0
refuses 'steps' "${small[@]}" --steps many
refuses 'threads' --text text.txt --threads 0
refuses 'sample' --text text.txt --sample -1
refuses 'seed' "${small[@]}" --seed -3
refuses 'mixer blender: unknown, must be one of s4d, softmax, sisa, interdomain, s4d_only, sd, sd_linear, linear' "${small[@]}" --mixer blender
refuses 'given twice' "${small[@]}" --mixer s4d --mixer s4d
refuses 'all|mixer' "${small[@]}" --all --mixer s4d

# Texts.
: >empty.txt
head -c 500 text.txt >short.txt
refuses 'nowhere.txt: cannot be read: No such file' --text nowhere.txt
refuses 'cannot be read: Is a directory' --text .
refuses 'empty.txt: the file is empty' --text empty.txt
refuses 'short.txt: too short, has 500 bytes, needs at least [0-9]+' --text short.txt
if ((EUID != 0)); then
    cp text.txt secret.txt && chmod 000 secret.txt
    refuses 'secret.txt: cannot be read: Permission denied' --text secret.txt
    rm -f secret.txt
fi

# A run from start to end. A short one is not judged; its output has no escape codes.
both=("${small[@]}" --mixer s4d --mixer softmax --steps 12)
"$demo" "${both[@]}" --checkpoint whole.safetensors >whole.out 2>whole_errors.out || fail "whole run: exit code $?"
[[ -s whole_errors.out ]] && fail "whole run: stderr is '$(cat whole_errors.out)'"
[[ -s whole.safetensors ]] || fail "whole run: left no checkpoint"
grep -q $'\x1b\|\r' whole.out && fail "whole run: escape codes in a file"
for word in unigram bigram 'bits/byte' parameters 'decode' 's4d writes' 'softmax writes'; do
    grep -q "$word" whole.out || fail "whole run: output lacks '$word'"
done
grep -Eq '^  softmax +layer 1: rank +[0-9.]+, +[0-9]+% +layer 2: rank' whole.out || fail "whole run: no ranks of softmax's layers"
grep -Eq '^  softmax( +[0-9]+\.[0-9]{3}){3}$' whole.out || fail "whole run: nothing on softmax's first layer made linear"
grep -q '^  s4d .*rank' whole.out && fail "whole run: ranks of a mixer without queries and keys"
tail -n 1 whole.out | grep -q '^Verdict: none.* 12' || fail "a short run is judged: $(tail -n 1 whole.out)"
expected=$(grep '^Same seed' whole.out)

# The same bits on another number of threads, and not with another seed.
"$demo" --text text.txt --sample 20 --threads 1 --mixer s4d --mixer softmax --steps 12 >one.out 2>&1
[[ $(grep '^Same seed' one.out) == "$expected" ]] || fail "one thread: other parameters than two threads"
"$demo" "${both[@]}" --seed 2 >seed.out 2>&1
[[ $(grep '^Same seed' seed.out) == "$expected" ]] && fail "another seed: the same parameters"

# A finished run can be continued too: it shows its results again, and does not train.
"$demo" --text text.txt --sample 20 --resume whole.safetensors >again.out 2>&1 || fail "resuming a finished run: $?"
[[ $(grep '^Same seed' again.out) == "$expected" ]] || fail "resuming a finished run: other parameters"

# Checkpoints that cannot be used are refused, and are left as they are.
cp whole.safetensors kept.safetensors
head -c 1000 whole.safetensors >cut.safetensors
head -c 400000 whole.safetensors >half.safetensors
head -c 100000 /dev/urandom >garbage.safetensors
: >nothing.safetensors
sums=$(cksum ./*.safetensors)
refuses 'missing.safetensors: cannot open' "${small[@]}" --resume missing.safetensors
refuses 'checkpoint cut.safetensors: ' "${small[@]}" --resume cut.safetensors
refuses 'checkpoint half.safetensors: ' "${small[@]}" --resume half.safetensors
refuses 'checkpoint garbage.safetensors: ' "${small[@]}" --resume garbage.safetensors
refuses 'checkpoint nothing.safetensors: ' "${small[@]}" --resume nothing.safetensors
refuses 'checkpoint text.txt: ' "${small[@]}" --resume text.txt
refuses 'was made with another text' --text other.txt --resume whole.safetensors
refuses 'was made with --steps 12' "${small[@]}" --resume whole.safetensors --steps 13
refuses 'was made with --seed 1' "${small[@]}" --resume whole.safetensors --seed 2
refuses 'was made with --mixer s4d --mixer softmax' "${small[@]}" --resume whole.safetensors --mixer s4d
refuses 'exists already' "${small[@]}" --checkpoint kept.safetensors
refuses 'there is no folder' "${small[@]}" --checkpoint nowhere/new.safetensors
refuses 'exists already' "${small[@]}" --resume whole.safetensors --checkpoint kept.safetensors
[[ $(cksum ./*.safetensors) == "$sums" ]] || fail "a refused run changed a checkpoint"

# interrupt <signal> <seconds> <arguments>: stops the demo that long after its header appears; gives
# its exit code. A program that a script starts in the background ignores Ctrl-C unless it asks for it.
interrupt() {
    local signal=$1 seconds=$2 pid
    shift 2
    : >part.out
    "$demo" "$@" >part.out 2>part_errors.out &
    pid=$!
    until grep -q '^training' part.out || ! kill -0 "$pid" 2>/dev/null; do sleep 0.02; done
    sleep "$seconds"
    kill "-$signal" "$pid" 2>/dev/null
    wait "$pid"
}

# Ctrl-C without --checkpoint leaves one with a name of its own, never replacing another.
for name in language_model language_model-2; do
    interrupt INT 0.05 "${small[@]}" --steps 100000
    code=$?
    [[ $code == 130 ]] || fail "SIGINT: exit code $code, must be 130"
    [[ -s $name.safetensors ]] || fail "SIGINT: left no $name.safetensors"
    grep -q -e "--resume $name.safetensors" part_errors.out || fail "SIGINT: '$(cat part_errors.out)'"
done

# Stopped as often as it takes, in either mixer, the run ends with the bits of the uninterrupted one.
interrupt INT 0 "${both[@]}" --checkpoint part.safetensors
code=$? sittings=1
while ((code == 130 || code == 143)); do
    ((sittings < 60)) || { fail "no end after $sittings sittings"; break; }
    interrupt TERM "$(awk "BEGIN { print 0.1 * $sittings }")" --text text.txt --sample 20 --threads 2 \
        --resume part.safetensors
    code=$? sittings=$((sittings + 1))
done
[[ $code == 0 ]] || fail "interrupted run: exit code $code at last: $(cat part_errors.out)"
((sittings >= 3)) || fail "interrupted run: only $sittings sittings"
[[ $(grep '^Same seed' part.out) == "$expected" ]] || fail "interrupted run: other parameters after $sittings sittings"

((failures == 0)) && echo "ok, $sittings sittings"
exit $((failures > 0))
