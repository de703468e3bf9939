#!/bin/sh
# llmctl, whose `serve` listens on 127.0.0.1 by default: in a container nobody would reach that. Whoever gives --host or
# --config decides himself.
set -eu
if [ "${1-}" = serve ]; then
    case " $* " in
    *" --host"* | *" --config"*) ;;
    *) set -- "$@" --host 0.0.0.0 ;;
    esac
fi
exec llmctl "$@"
