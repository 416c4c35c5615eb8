#!/bin/sh
# The environments of the Makefile. PYTHON is what the user asked for; empty: an environment that is there, else python3.
#   set_up.sh FOLDER PYTHON --state             print `ready` if nothing needs to be done
#   set_up.sh FOLDER PYTHON PIP-ARGUMENT...     make FOLDER, or update it, with the packages of these arguments
# An environment is made afresh if its set-up was interrupted, if it was moved, or if its Python is gone, is not supported
# or is another version than PYTHON. A mistake is one line and status 2.
export LC_ALL=C
SUPPORTED="3.11 3.12 3.13"
WORDS="3.11, 3.12 or 3.13"
ROOM=2500000 # KB that an environment takes with torch for CPUs

folder=$1
asked=$2
shift 2

fail() {
    echo "error: $1" >&2
    exit 2
}

version_of() {
    "$1" -c 'import sys; sys.stdout.write("%d.%d" % sys.version_info[:2])' 2>/dev/null </dev/null
}

is_supported() {
    case " $SUPPORTED " in *" $1 "*) return 0 ;; esac
    return 1
}

# Whether FOLDER is an environment that can be used or updated.
is_sound() {
    [ ! -e "$folder/setting-up" ] || return 1
    made_in=$(cat "$folder/installed" 2>/dev/null)
    [ -z "$made_in" ] || [ "$made_in" = "$PWD" ] || return 1
    version_here=$(version_of "$folder/bin/python")
    is_supported "$version_here" || return 1
    [ -z "$asked" ] || [ "$version_here" = "$(version_of "$asked")" ]
}

if [ "$1" = --state ]; then
    if [ -f "$folder/installed" ] && is_sound; then echo ready; fi
    exit 0
fi

log=$folder/set-up.log
if ! is_sound; then
    python=${asked:-python3}
    command -v "$python" >/dev/null ||
        fail "there is no $python: install Python $WORDS, or say where it is: make PYTHON=/usr/bin/python3.12"
    version=$(version_of "$python")
    [ -n "$version" ] || fail "$python does not run as Python: say where Python $WORDS is: make PYTHON=/usr/bin/python3.12"
    if ! is_supported "$version"; then
        another=
        for each in $SUPPORTED; do
            if [ "$(version_of "python$each")" = "$each" ]; then another=python$each; fi
        done
        [ -n "$another" ] && way_out="make PYTHON=$another" || way_out="install one, then make PYTHON=python3.12"
        fail "$(command -v "$python") is Python $version, and $WORDS is needed: $way_out"
    fi
    "$python" -c 'import venv, ensurepip' 2>/dev/null </dev/null ||
        fail "$python has no venv: install it (Debian, Ubuntu: apt install python$version-venv), or make PYTHON=another"
    mkdir -p "$folder" 2>/dev/null && : 2>/dev/null >"$folder/setting-up" ||
        fail "$folder cannot be written: make room, or change its permissions"
    find "$folder/" -mindepth 1 ! -name setting-up -delete || fail "$folder cannot be emptied: remove it"
    free=$(df -Pk "$folder/" | awk 'NR == 2 { print $4 }')
    [ "$free" -ge "$ROOM" ] || fail "$folder needs $((ROOM / 1000)) MB at least, and $((free / 1000)) MB are free there: make room"
    echo "making $folder with Python $version: some minutes, and $((ROOM / 1000)) MB (6000 MB with torch for GPUs)"
    "$python" -m venv "$folder" >"$log" 2>&1 || fail "$python -m venv $folder failed: $(tail -n 1 "$log")"
fi
: 2>/dev/null >"$folder/setting-up" || fail "$folder cannot be written: make room, or change its permissions"
if ! "$folder/bin/python" -m pip install --quiet "$@" >"$log" 2>&1; then
    if grep -q -e "No space left on device" -e "Disk quota exceeded" "$log"; then
        fail "no room is left in $folder or in ${TMPDIR:-/tmp}, where pip unpacks: make room, or set TMPDIR"
    fi
    if grep -q -e "connection broken by" -e "NewConnectionError" -e "Max retries exceeded" -e "ConnectTimeout" -e "ReadTimeout" "$log"; then
        fail "pip does not reach its package index: check the network, HTTPS_PROXY and PIP_INDEX_URL; $log has its words"
    fi
    fail "pip failed: $(grep -m 1 '^ERROR' "$log" || tail -n 1 "$log"); $log has the rest"
fi
echo "$PWD" >"$folder/installed"
rm "$folder/setting-up"
