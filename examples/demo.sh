#!/bin/bash
# The main job of codexd, from a dropped file to an answer, in a directory that is
# thrown away.  The real Codex CLI runs the tasks; only the model is scripted.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"

root=$(mktemp -d -t codexd-demo.XXXXXX)
started=()

stop() {
    local status=$? pid
    for pid in "${started[@]}"; do
        kill "$pid" 2>/dev/null || true # it may have ended by itself
        wait "$pid" || true
    done
    if ((status)); then
        echo "The demo failed. What codexd logged:" >&2
        cat "$root"/*.log >&2
    fi
    rm -rf "$root"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

bold='' plain=''
[[ -t 1 ]] && bold=$'\e[1m' plain=$'\e[0m'
heading() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }

show() { # print a command, then run it
    printf '$ %s\n' "$*"
    "$@"
}

start() { # start NAME COMMAND…: in the background; returns when it says that it is ready
    local name=$1 line
    shift
    printf '$ %s &\n' "$*"
    mkfifo "$root/$name.ready"
    "$@" >"$root/$name.ready" 2>"$root/$name.log" &
    started=("$!" "${started[@]}")
    exec {out}<"$root/$name.ready" # kept open: a program may say more later
    if ! read -r -t 30 line <&"$out"; then
        echo "$name did not become ready" >&2
        return 1
    fi
    echo "$line"
}

drop() { # drop NAME: standard input becomes inbox/NAME, whole and at once
    cat >"$root/.$1"
    printf '$ cat %s\n' "$1"
    cat "$root/.$1"
    show mv "$root/.$1" "$root/inbox/$1"
}

answer() { # answer STEM: wait until its answer file is there
    local deadline=$((SECONDS + 60)) found
    until found=$(compgen -G "$root/answers/$1.*.md"); do
        if ((SECONDS > deadline)); then
            echo "no answer to $1 within 60 s" >&2
            return 1
        fi
        if ! kill -0 "${started[0]}" 2>/dev/null; then # the last that was started
            echo "codexd ended before it answered" >&2
            return 1
        fi
        sleep 0.1
    done
    printf '$ cat %s\n' "$found"
    cat "$found"
}

field() { sed -n "s/^$1: //p" | head -n 1 | tr -d '"'; }

heading "1. A model on loopback, so that no account is needed"
export CODEXD_SCRIPTED_KEY=scripted
start model python -m codexd.scripted --home "$root/codex"

heading "2. codexd, with everything below one directory"
start codexd codexd --root "$root" serve

heading "3. Drop a task into the inbox"
drop first.md <<'TASK'
---
session: demo
title: A word to remember
---
Please remember the word PELICAN.
TASK

heading "4. Its answer is a file as well"
first=$(answer first)
echo "$first"

heading "5. A second task of the same session"
drop second.md <<'TASK'
---
session: demo
---
Which word was it?
TASK

heading "6. Codex went on in the same thread, and knows the word"
second=$(answer second)
echo "$second"

heading "7. What codexd says about it"
show codexd --root "$root" session show demo
show codexd --root "$root" status
show cat "$root/tasks.md"

thread=$(field thread <<<"$first")
if [[ -z $thread || $thread != "$(field thread <<<"$second")" || $second != *PELICAN* ]]; then
    echo "the second task did not go on in the thread of the first" >&2
    exit 1
fi
heading "Done: two tasks, one thread ($thread). Stopping; nothing is left behind."
